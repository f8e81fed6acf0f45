/*
 * The work-around for hosts whose KVM runs CPL 3 natively but takes SYSCALL there to LSTAR without
 * changing to CPL 0.
 *
 * On such a host the fetch at LSTAR faults with the user's CS, so the guest's #PF handler is entered for
 * something that was no page fault. A host-side breakpoint (KVM_SET_GUEST_DEBUG; guest memory is not
 * touched) sits on the handler that IDT[14] names. On a hit the exception frame tells which it was:
 *
 *   SYSCALL      CR2 = RIP = LSTAR, CS.RPL = 3, error code 0x15 (present, user, fetch), and the flags
 *                are R11's with FMASK's cleared, which only the instruction does: finish it.
 *   anything     a real page fault: carry out the handler's first instruction and run on, because KVM
 *                would report the same breakpoint again.
 *
 * WRMSR to LSTAR and FMASK is filtered to user space (arch/x86/syscall_entry.py sets the filter up), so
 * both are known here without asking, and the IDT is looked at again when the kernel sets LSTAR, which
 * every kernel does on each CPU before its first user mode there.
 */

#include "core.h"

#include <errno.h>
#include <string.h>

#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_FMASK 0xc0000084u
#define PF_VECTOR 14
#define PF_SYSCALL_FETCH 0x15u /* P | U/S | I/D, Intel SDM vol. 3, 4.7 */
#define EFLAGS_RF (1ull << 16)
#define EFLAGS_AC (1ull << 18)
#define EFLAGS_DF (1ull << 10)
#define EFLAGS_IMPLEMENTED 0x3f7fd7ull
/* Breakpoint register 3, so that 0 to 2 stay free for a debugger: G3, execute, length 1. */
#define BP_REGISTER 3
#define DR7_EXECUTE_3 (0x400ull | (1ull << 7))

struct pf_frame {
	uint64_t error, rip, cs, rflags, rsp, ss;
};

static int get_msr(struct pv_vcpu *vcpu, uint32_t index, uint64_t *value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} m = {.head.nmsrs = 1, .entry.index = index};
	if (ioctl(vcpu->fd, KVM_GET_MSRS, &m) != 1)
		return -1;
	*value = m.entry.data;
	return 0;
}

static int set_msr(struct pv_vcpu *vcpu, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} m = {.head.nmsrs = 1, .entry = {.index = index, .data = value}};
	return ioctl(vcpu->fd, KVM_SET_MSRS, &m);
}

/* KVM leaves both in kvm_run on every exit when asked to (KVM_CAP_SYNC_REGS): no ioctl on the hot path. */
static struct kvm_regs *synced_regs(struct pv_vcpu *vcpu)
{
	return &pv_kvm_run(vcpu)->s.regs.regs;
}

static struct kvm_sregs *synced_sregs(struct pv_vcpu *vcpu)
{
	return &pv_kvm_run(vcpu)->s.regs.sregs;
}

int pv_vcpu_enable_syscall_entry(struct pv_vcpu *vcpu)
{
	pv_kvm_run(vcpu)->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	vcpu->sc.on = true;
	vcpu->sc.stale = true;
	return 0;
}

static int set_debug(struct pv_vcpu *vcpu, uint32_t control, uint64_t breakpoint)
{
	struct kvm_guest_debug debug = {.control = control};
	if (breakpoint) {
		debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
		debug.arch.debugreg[BP_REGISTER] = breakpoint;
		debug.arch.debugreg[7] = DR7_EXECUTE_3;
	}
	return ioctl(vcpu->fd, KVM_SET_GUEST_DEBUG, &debug);
}

/* Offset of a 64-bit interrupt gate's target (Intel SDM vol. 3, 6.14.1). */
static uint64_t gate_target(const uint8_t gate[16])
{
	uint64_t low, high;
	memcpy(&low, gate, 8);
	memcpy(&high, gate + 8, 8);
	return (low & 0xffff) | ((low >> 48) << 16) | ((high & 0xffffffffu) << 32);
}

/* Put the breakpoint where the guest's #PF handler is now. 0, or -1 with errno. */
int pv_syscall_refresh(struct pv_vcpu *vcpu)
{
	struct pv_syscall_entry *sc = &vcpu->sc;
	struct kvm_sregs sregs;
	uint64_t target = 0;
	uint8_t gate[16];

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0 || get_msr(vcpu, MSR_LSTAR, &sc->lstar) ||
	    get_msr(vcpu, MSR_FMASK, &sc->fmask))
		return -1;
	sc->stale = false;
	sc->idt_base = sregs.idt.base;
	/* Without LSTAR there is no SYSCALL to catch, and early page faults cost nothing extra. */
	if (sc->lstar && sregs.idt.limit >= PF_VECTOR * 16 + 15 &&
	    pv_read_virtual(vcpu->vm, sregs.cr3, sregs.cr4, sregs.idt.base + PF_VECTOR * 16, gate, sizeof gate) &&
	    (gate[5] & 0x80))
		target = gate_target(gate);
	if (target == sc->armed)
		return 0;
	if (set_debug(vcpu, 0, target) < 0)
		return -1;
	sc->armed = vcpu->handler = target;
	return 0;
}

enum pv_handled pv_syscall_msr_exit(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);

	if (!vcpu->sc.on || run->exit_reason != KVM_EXIT_X86_WRMSR)
		return PV_NOT_MINE;
	if (run->msr.index != MSR_LSTAR && run->msr.index != MSR_FMASK)
		return PV_NOT_MINE;
	/* Refused (non-canonical, say): the guest gets its #GP. */
	run->msr.error = set_msr(vcpu, run->msr.index, run->msr.data) == 1 ? 0 : 1;
	vcpu->sc.stale = true;
	return PV_HANDLED;
}

static bool is_syscall(const struct pv_syscall_entry *sc, const struct pf_frame *f, uint64_t cr2, uint64_t r11)
{
	/* RF is set in pushed flags by faults and cleared in R11 by nobody: not part of the comparison. */
	uint64_t same = EFLAGS_IMPLEMENTED & ~sc->fmask & ~EFLAGS_RF;
	return f->rip == sc->lstar && cr2 == sc->lstar && (f->cs & 3) == 3 && f->error == PF_SYSCALL_FETCH &&
	       !(f->rflags & sc->fmask & EFLAGS_IMPLEMENTED & ~EFLAGS_RF) && !((f->rflags ^ r11) & same);
}

/* What SYSCALL itself does to the registers (Intel SDM vol. 2, SYSCALL); RCX and R11 are right already. */
static void finish_syscall(const struct pv_syscall_entry *sc, uint64_t user_rsp, struct kvm_regs *regs)
{
	regs->rsp = user_rsp;
	regs->rip = sc->lstar;
	regs->rflags = (regs->r11 & ~sc->fmask & ~EFLAGS_RF) | 2;
}

static bool read_frame(struct pv_vcpu *vcpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs,
		       struct pf_frame *frame)
{
	return pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, regs->rsp, frame, sizeof *frame);
}

/*
 * Carry out the handler's first instruction if it is one of those that kernels start it with. The common
 * case on a fault-heavy guest, so it saves the two ioctls and the exit of a single step.
 */
static bool skip_first_instruction(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs)
{
	static const struct {
		uint8_t length, bytes[4];
		uint64_t clears;
	} known[] = {
		{4, {0xf3, 0x0f, 0x1e, 0xfa}, 0}, /* endbr64 */
		{3, {0x0f, 0x1f, 0x00}, 0},       /* nop, as CLAC is patched out */
		{3, {0x90, 0x90, 0x90}, 0},
		{3, {0x0f, 0x01, 0xca}, EFLAGS_AC}, /* clac */
		{1, {0xfc}, EFLAGS_DF},           /* cld */
	};
	uint8_t code[4];
	if (!pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, regs->rip, code, sizeof code))
		return false;
	for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
		if (memcmp(code, known[i].bytes, known[i].length))
			continue;
		regs->rip += known[i].length;
		regs->rflags &= ~(known[i].clears | EFLAGS_RF);
		return true;
	}
	return false;
}

enum pv_handled pv_syscall_debug_exit(struct pv_vcpu *vcpu)
{
	struct pv_syscall_entry *sc = &vcpu->sc;
	struct kvm_run *run = pv_kvm_run(vcpu);
	struct kvm_regs *regs = synced_regs(vcpu);
	const struct kvm_sregs *sregs = synced_sregs(vcpu);
	struct pf_frame frame;

	if (!sc->on)
		return PV_NOT_MINE;
	if (sc->stepping) {
		sc->stepping = false;
		if (set_debug(vcpu, 0, sc->armed) < 0)
			goto failed;
		return PV_HANDLED;
	}
	if (!sc->armed || run->debug.arch.pc != sc->armed)
		return PV_NOT_MINE;
	if (read_frame(vcpu, regs, sregs, &frame) && is_syscall(sc, &frame, sregs->cr2, regs->r11)) {
		finish_syscall(sc, frame.rsp, regs);
		run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
		vcpu->syscalls++;
		return PV_HANDLED;
	}
	vcpu->faults++;
	if (skip_first_instruction(vcpu, sregs, regs)) {
		run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
		return PV_HANDLED;
	}
	if (set_debug(vcpu, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, 0) < 0)
		goto failed;
	sc->stepping = true;
	return PV_HANDLED;
failed:
	vcpu->exit.error = errno;
	return PV_FAILED;
}

/*
 * Finish a SYSCALL that is half way when the vCPU is paused, so that no saved state depends on the quirk:
 * either the handler is entered and the breakpoint not yet reported, or the #PF still waits for delivery.
 * 1: finished one, 0: there was none, -1 with errno.
 */
int pv_vcpu_settle_syscall(struct pv_vcpu *vcpu)
{
	struct pv_syscall_entry *sc = &vcpu->sc;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
	struct pf_frame frame;
	uint64_t star;

	if (!sc->on || !sc->armed)
		return 0;
	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs) < 0 || ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		return -1;
	if (regs.rip == sc->armed && !sc->stepping) {
		if (!read_frame(vcpu, &regs, &sregs, &frame) || !is_syscall(sc, &frame, sregs.cr2, regs.r11))
			return 0;
		finish_syscall(sc, frame.rsp, &regs);
		vcpu->syscalls++;
		return ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ? -1 : 1;
	}
	if (regs.rip != sc->lstar || (sregs.cs.selector & 3) != 3)
		return 0;
	if (ioctl(vcpu->fd, KVM_GET_VCPU_EVENTS, &events) < 0)
		return -1;
	if (!(events.exception.injected || events.exception.pending) || events.exception.nr != PF_VECTOR)
		return 0;
	frame = (struct pf_frame){events.exception.error_code, regs.rip, sregs.cs.selector, regs.rflags, regs.rsp, 0};
	uint64_t cr2 = events.exception_has_payload ? events.exception_payload : sregs.cr2;
	if (!is_syscall(sc, &frame, cr2, regs.r11) || get_msr(vcpu, MSR_STAR, &star))
		return 0;
	events.exception.injected = events.exception.pending = events.exception.nr = 0;
	events.exception.error_code = events.exception.has_error_code = 0;
	events.exception_has_payload = 0;
	finish_syscall(sc, regs.rsp, &regs);
	uint16_t cs = (star >> 32) & 0xfffc;
	sregs.cs = (struct kvm_segment){.limit = ~0u, .selector = cs, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
	sregs.ss = (struct kvm_segment){
		.limit = ~0u, .selector = cs + 8, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	if (ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events) < 0 || ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 ||
	    ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
		return -1;
	vcpu->syscalls++;
	return 1;
}
