/*
 * The work-arounds for hosts whose KVM emulates CPL 0, runs CPL 3 natively and gets the way from one to the
 * other wrong.
 *
 * SYSCALL there jumps to LSTAR without changing to CPL 0. The fetch at LSTAR faults with the user's CS, so
 * the guest's #PF handler is entered for something that was no page fault. INT n there raises #UD instead of
 * going through its gate. Host-side breakpoints (KVM_SET_GUEST_DEBUG; guest memory is not touched) sit on
 * the handlers that IDT[14] and IDT[6] name. On a hit the exception frame tells which it was:
 *
 *   SYSCALL      CR2 = RIP = LSTAR, CS.RPL = 3, error code 0x15 (present, user, fetch), and the flags
 *                are R11's with FMASK's cleared, and RCX points just behind a SYSCALL. A program that jumps
 *                to LSTAR cannot clear IF; should FMASK not hold IF, all it can forge is the SYSCALL that
 *                RCX points behind, which it might as well have executed. So: finish it.
 *   INT n        CS.RPL = 3 and the bytes at RIP are CD nn, which never raise #UD on a CPU: go through
 *                gate nn instead, or to #GP if the gate does not let CPL 3 in.
 *   VMCALL       at CPL 0: KVM there rewrites a hypercall instruction into the host's own kind and emulates
 *                it again, for ever. With that behaviour switched off (KVM_CAP_DISABLE_QUIRKS2) the
 *                instruction raises #UD; answer "no such hypercall", which every caller must expect.
 *   anything     a real fault: carry out the handler's first instruction and run on, because KVM would
 *                report the same breakpoint again.
 *
 * WRMSR to LSTAR and FMASK is filtered to user space (arch/x86/user_entry.py sets the filter up), so both
 * are known here without asking. The IDT is looked at again when the kernel sets LSTAR, which every kernel
 * does on each CPU before its first user mode there, and whenever an exit shows that IDTR has changed.
 *
 * SS is left as exception delivery left it (null, CPL 0), where SYSCALL would load STAR's: in 64-bit mode
 * nothing but a guest that reads SS back can tell, and setting it costs two ioctls a system call.
 */

#include "user_entry.h"

#include <errno.h>
#include <string.h>

#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_FMASK 0xc0000084u
#define PF_VECTOR 14
#define EFLAGS_TF (1ull << 8)

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

void pv_vcpu_enable_user_entry(struct pv_vcpu *vcpu, int syscall_on, int int_on)
{
	pv_kvm_run(vcpu)->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	vcpu->entry.syscall_on = syscall_on;
	vcpu->entry.int_on = int_on;
	vcpu->entry.stale = true;
	/* A step that other state was loaded over is nobody's any more; its single-stepping ends with what is armed next. */
	if (vcpu->entry.stepping) {
		vcpu->entry.stepping = false;
		vcpu->entry.rearm = true;
	}
}

/* Notice, for nothing, that the guest has loaded another IDT since the last look. */
void pv_user_entry_look(struct pv_vcpu *vcpu)
{
	struct pv_user_entry *e = &vcpu->entry;
	if ((e->syscall_on || e->int_on) && synced_sregs(vcpu)->idt.base != e->idt_base)
		e->stale = true;
}

/* Put the breakpoints where the guest's handlers are now. 0, or -1 with errno. */
int pv_user_entry_refresh(struct pv_vcpu *vcpu)
{
	struct pv_user_entry *e = &vcpu->entry;
	struct kvm_sregs sregs;
	struct gate gate;
	uint64_t pf = 0, ud = 0, trap = PV_NOWHERE;

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0 || get_msr(vcpu, MSR_LSTAR, &e->lstar) ||
	    get_msr(vcpu, MSR_FMASK, &e->fmask))
		return -1;
	e->stale = false;
	e->idt_base = sregs.idt.base;
	vcpu->debug.user_cs = sregs.ss.dpl == 3 ? sregs.cs.selector : 0;
	vcpu->debug.user_ss = sregs.ss.selector;
	if (sregs.efer & (1u << 10)) { /* LMA: only there do these gates mean anything */
		/* Without LSTAR there is no SYSCALL to catch, and early page faults cost nothing extra. */
		if (e->syscall_on && e->lstar && pv_read_gate(vcpu, &sregs, PF_VECTOR, &gate) && gate.present)
			pf = gate.target;
		if (e->int_on && pv_read_gate(vcpu, &sregs, UD_VECTOR, &gate) && gate.present)
			ud = gate.target;
	}
	if (vcpu->debug.on && vcpu->debug.trap_vector)
		trap = pv_handler_of(vcpu, &sregs, vcpu->debug.trap_vector);
	if (pf == e->pf_handler && ud == e->ud_handler && !e->rearm &&
	    (!vcpu->debug.on || trap == vcpu->debug.trap_handler))
		return 0;
	e->rearm = false;
	e->pf_handler = pf;
	e->ud_handler = ud;
	vcpu->debug.trap_handler = trap;
	return pv_debug_arm(vcpu);
}

/*
 * A debugger that steps wants to hear of it, and of the registers as they are: it may look before the next KVM_RUN.
 * The flag by which KVM steps is in the R11 that SYSCALL left; the guest must not find it there.
 */
static enum pv_handled carried_out(struct pv_vcpu *vcpu, struct kvm_regs *regs, bool syscall)
{
	if (!pv_debug_stepping(vcpu)) {
		pv_kvm_run(vcpu)->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
		return PV_HANDLED;
	}
	if (syscall)
		regs->r11 &= ~EFLAGS_TF;
	pv_kvm_run(vcpu)->debug.arch.dr6 = PV_DR6_STEP;
	return ioctl(vcpu->fd, KVM_SET_REGS, regs) < 0 ? PV_FAILED : PV_NOT_MINE;
}

enum pv_handled pv_user_entry_msr_exit(struct pv_vcpu *vcpu)
{
	struct kvm_run *run = pv_kvm_run(vcpu);

	if (!(vcpu->entry.syscall_on || vcpu->entry.int_on) || run->exit_reason != KVM_EXIT_X86_WRMSR)
		return PV_NOT_MINE;
	if (run->msr.index != MSR_LSTAR && run->msr.index != MSR_FMASK)
		return PV_NOT_MINE;
	/* Refused (non-canonical, say): the guest gets its #GP. */
	run->msr.error = set_msr(vcpu, run->msr.index, run->msr.data) == 1 ? 0 : 1;
	vcpu->entry.stale = true;
	return PV_HANDLED;
}

static enum pv_handled handle_debug_exit(struct pv_vcpu *vcpu)
{
	struct pv_user_entry *e = &vcpu->entry;
	struct kvm_run *run = pv_kvm_run(vcpu);
	struct kvm_regs *regs = synced_regs(vcpu);
	const struct kvm_sregs *sregs = synced_sregs(vcpu);
	uint64_t pc = run->debug.arch.pc;
	bool syscall = false;
	enum pv_handled handled;
	struct pf_frame pf;

	if (e->stepping) {
		e->stepping = false;
		if (pv_debug_arm(vcpu) < 0)
			goto failed;
		return pv_debug_stepping(vcpu) ? PV_NOT_MINE : PV_HANDLED;
	}
	if (pc && pc == e->pf_handler && pv_read_stack(vcpu, regs, sregs, &pf, sizeof pf) &&
	    pv_is_syscall(vcpu, &pf, sregs->cr2, regs, sregs)) {
		pv_finish_syscall(e, pf.f.rsp, regs);
		vcpu->syscalls++;
		syscall = true;
	} else if (pc && pc == e->ud_handler && pv_finish_int(vcpu, sregs, regs)) {
		vcpu->interrupts++;
	} else if (pc && pc == e->ud_handler && pv_finish_hypercall(vcpu, sregs, regs)) {
		vcpu->hypercalls++;
	} else if (pc && (pc == e->pf_handler || pc == e->ud_handler)) {
		vcpu->faults++;
		if (pv_debug_breakpoint_at(vcpu, pc))
			return PV_NOT_MINE;
		if (!pv_skip_first_instruction(vcpu, sregs, regs)) {
			e->stepping = true;
			if (pv_debug_arm(vcpu) < 0)
				goto failed;
			return PV_HANDLED;
		}
	} else {
		return PV_NOT_MINE;
	}
	handled = carried_out(vcpu, regs, syscall);
	if (handled != PV_FAILED)
		return handled;
failed:
	vcpu->exit.error = errno;
	return PV_FAILED;
}

enum pv_handled pv_user_entry_debug_exit(struct pv_vcpu *vcpu)
{
	enum pv_handled handled = handle_debug_exit(vcpu);

	if ((vcpu->entry.syscall_on || vcpu->entry.int_on) && pv_debug_stepping(vcpu))
		pv_hide_step(vcpu, synced_regs(vcpu), synced_sregs(vcpu));
	return handled;
}

/*
 * Finish an entry that is half way when the vCPU is paused, so that no saved state depends on the quirk:
 * either the handler is entered and the breakpoint not yet reported, or the #PF or #UD still waits for delivery.
 * 1: finished one, 0: there was none, -1 with errno.
 */
int pv_vcpu_settle_user_entry(struct pv_vcpu *vcpu)
{
	struct pv_user_entry *e = &vcpu->entry;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
	struct pf_frame pf;
	uint64_t star;

	if (!(e->pf_handler || e->ud_handler) || e->stepping)
		return 0;
	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs) < 0 || ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
		return -1;
	if (regs.rip == e->pf_handler) {
		if (!pv_read_stack(vcpu, &regs, &sregs, &pf, sizeof pf) || !pv_is_syscall(vcpu, &pf, sregs.cr2, &regs, &sregs))
			return 0;
		pv_finish_syscall(e, pf.f.rsp, &regs);
		vcpu->syscalls++;
		return ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ? -1 : 1;
	}
	if (regs.rip == e->ud_handler) {
		if (pv_finish_int(vcpu, &sregs, &regs))
			vcpu->interrupts++;
		else if (pv_finish_hypercall(vcpu, &sregs, &regs))
			vcpu->hypercalls++;
		else
			return 0;
		return ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ? -1 : 1;
	}
	if (ioctl(vcpu->fd, KVM_GET_VCPU_EVENTS, &events) < 0)
		return -1;
	if (!(events.exception.injected || events.exception.pending))
		return 0;
	if (events.exception.nr == UD_VECTOR && e->ud_handler && pv_raises_false_ud(vcpu, &sregs, regs.rip)) {
		/* RIP is still on the instruction: it is executed again, here or on a host that carries it out itself. */
		events.exception.injected = events.exception.pending = events.exception.nr = 0;
		return ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events) < 0 ? -1 : 1;
	}
	if (regs.rip != e->lstar || (sregs.cs.selector & 3) != 3 || events.exception.nr != PF_VECTOR)
		return 0;
	pf = (struct pf_frame){events.exception.error_code,
			       {regs.rip, sregs.cs.selector, regs.rflags, regs.rsp, sregs.ss.selector}};
	uint64_t cr2 = events.exception_has_payload ? events.exception_payload : sregs.cr2;
	if (!pv_is_syscall(vcpu, &pf, cr2, &regs, &sregs) || get_msr(vcpu, MSR_STAR, &star))
		return 0;
	events.exception.injected = events.exception.pending = events.exception.nr = 0;
	events.exception.error_code = events.exception.has_error_code = 0;
	events.exception_has_payload = 0;
	pv_finish_syscall(e, regs.rsp, &regs);
	uint16_t cs = (star >> 32) & 0xfffc;
	sregs.cs = (struct kvm_segment){
		.limit = ~0u, .selector = cs, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
	sregs.ss = (struct kvm_segment){
		.limit = ~0u, .selector = cs + 8, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	if (ioctl(vcpu->fd, KVM_SET_VCPU_EVENTS, &events) < 0 || ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 ||
	    ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
		return -1;
	vcpu->syscalls++;
	return 1;
}
