/*
 * Telling from an exception frame what really happened, and making good what the host got wrong
 * (user_entry.c has the story).
 */

#include "user_entry.h"

#include <stddef.h>
#include <string.h>

#define GP_VECTOR 13
#define PF_SYSCALL_FETCH 0x15u /* P | U/S | I/D, Intel SDM vol. 3, 4.7 */
#define OPCODE_INT_N 0xcd
#define KVM_ENOSYS 1000 /* <linux/kvm_para.h> */
#define EFLAGS_TF (1ull << 8)
#define EFLAGS_IF (1ull << 9)
#define EFLAGS_DF (1ull << 10)
#define EFLAGS_RF (1ull << 16)
#define EFLAGS_AC (1ull << 18)
#define EFLAGS_IMPLEMENTED 0x3f7fd7ull

/* Read a 64-bit gate descriptor (Intel SDM vol. 3, 6.14.1). */
bool pv_read_gate(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, unsigned vector, struct gate *gate)
{
	uint8_t raw[16];
	uint64_t low, high;
	if (sregs->idt.limit < vector * 16 + 15 ||
	    !pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, sregs->idt.base + vector * 16, raw, sizeof raw))
		return false;
	memcpy(&low, raw, 8);
	memcpy(&high, raw + 8, 8);
	gate->target = (low & 0xffff) | ((low >> 48) << 16) | ((high & 0xffffffffu) << 32);
	gate->selector = (uint16_t)(low >> 16);
	gate->ist = raw[4] & 7;
	gate->type = raw[5] & 0xf;
	gate->dpl = (raw[5] >> 5) & 3;
	gate->present = raw[5] & 0x80;
	return true;
}

/* Linear address of the handler of ``vector`` in 64-bit and in real mode; else, or if there is none, PV_NOWHERE. */
uint64_t pv_handler_of(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, unsigned vector)
{
	struct gate gate;
	if (sregs->efer & (1u << 10))
		return pv_read_gate(vcpu, sregs, vector, &gate) && gate.present ? gate.target : PV_NOWHERE;
	const uint8_t *far = sregs->cr0 & 1 ? NULL : pv_gpa(vcpu->vm, sregs->idt.base + vector * 4, 4);
	return far ? (far[0] | far[1] << 8) + (((uint64_t)far[2] | far[3] << 8) << 4) : PV_NOWHERE;
}

bool pv_is_syscall(struct pv_vcpu *vcpu, const struct pf_frame *pf, uint64_t cr2, const struct kvm_regs *regs,
		       const struct kvm_sregs *sregs)
{
	const struct pv_user_entry *e = &vcpu->entry;
	/* RF is set in the flags that faults push: not part of the comparison. */
	uint64_t compared = EFLAGS_IMPLEMENTED & ~EFLAGS_RF;
	uint8_t code[2];
	return pf->f.rip == e->lstar && cr2 == e->lstar && (pf->f.cs & 3) == 3 && pf->error == PF_SYSCALL_FETCH &&
	       !(pf->f.rflags & e->fmask & compared) && !((pf->f.rflags ^ regs->r11) & compared & ~e->fmask) &&
	       pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, regs->rcx - 2, code, sizeof code) &&
	       code[0] == 0x0f && code[1] == 0x05;
}

/* What SYSCALL itself does to the registers (Intel SDM vol. 2, SYSCALL); RCX and R11 are right already. */
void pv_finish_syscall(const struct pv_user_entry *e, uint64_t user_rsp, struct kvm_regs *regs)
{
	regs->rsp = user_rsp;
	regs->rip = e->lstar;
	regs->rflags = (regs->r11 & ~e->fmask & ~EFLAGS_RF) | 2;
}

bool pv_read_stack(struct pv_vcpu *vcpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs, void *to,
		       size_t size)
{
	return pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, regs->rsp, to, size);
}

static bool write_stack(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, uint64_t rsp, uint64_t value)
{
	uint64_t gpa;
	/* Exception frames are 8-byte aligned, so no word crosses a page. */
	return !(rsp & 7) && !pv_translate(vcpu->vm, sregs->cr3, sregs->cr4, rsp, &gpa) &&
	       pv_write_physical(vcpu->vm, gpa, &value, sizeof value);
}

/*
 * The #UD handler has been entered with the frame of an INT n: enter the right handler with it (Intel SDM
 * vol. 3, 6.12.1). False: it is not one, or its gate needs another stack or segment than #UD's, which the
 * frame in place cannot serve; then the guest sees the #UD.
 */
bool pv_finish_int(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs)
{
	struct frame f;
	struct gate ud, gate;
	uint8_t code[2];

	if (!pv_read_stack(vcpu, regs, sregs, &f, sizeof f) || (f.cs & 3) != 3 ||
	    !pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, f.rip, code, sizeof code) || code[0] != OPCODE_INT_N ||
	    !pv_read_gate(vcpu, sregs, UD_VECTOR, &ud))
		return false;
	uint8_t vector = code[1];
	bool allowed = pv_read_gate(vcpu, sregs, vector, &gate) && gate.dpl == 3 && gate.present;
	if (!allowed && !pv_read_gate(vcpu, sregs, GP_VECTOR, &gate))
		return false;
	if (!gate.present || (gate.type & ~1) != 0xe || gate.ist != ud.ist || gate.selector != ud.selector)
		return false;
	if (allowed) {
		if (!write_stack(vcpu, sregs, regs->rsp, f.rip + sizeof code))
			return false;
	} else {
		/* A fault: RIP stays on the instruction, the error code names the gate (6.13). */
		if (!write_stack(vcpu, sregs, regs->rsp - 8, vector * 8u + 2))
			return false;
		regs->rsp -= 8;
	}
	/* An interrupt gate (even type) clears IF, a trap gate leaves what the user had. */
	regs->rflags = (f.rflags & ~(EFLAGS_TF | EFLAGS_RF | (1ull << 14))) | 2;
	if (!(gate.type & 1))
		regs->rflags &= ~EFLAGS_IF;
	regs->rip = gate.target;
	return true;
}

/*
 * A step that began at CPL 3 has ended in a handler: KVM's TF, by which it stepped, is in the flags that were pushed, and
 * IRET would give it to the guest. The handler's first instructions may have pushed something since.
 */
void pv_hide_step(struct pv_vcpu *vcpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs)
{
	struct pv_guest_debug *d = &vcpu->debug;
	struct frame f;

	if (d->user_cs && sregs->ss.dpl == 0) {
		for (uint64_t at = regs->rsp; at <= regs->rsp + 32; at += 8) {
			if (!pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, at, &f, sizeof f))
				break;
			if (f.cs == d->user_cs && f.ss == d->user_ss && (f.rflags & EFLAGS_TF)) {
				write_stack(vcpu, sregs, at + offsetof(struct frame, rflags), f.rflags & ~EFLAGS_TF);
				break;
			}
		}
	}
	d->user_cs = sregs->ss.dpl == 3 ? sregs->cs.selector : 0;
	d->user_ss = sregs->ss.selector;
}

static bool is_hypercall(const uint8_t code[3])
{
	return code[0] == 0x0f && code[1] == 0x01 && (code[2] == 0xc1 || code[2] == 0xd9);
}

/* Whether a #UD at rip is one that only the hosts of these work-arounds raise: INT n at CPL 3, VMCALL at CPL 0. */
bool pv_raises_false_ud(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, uint64_t rip)
{
	uint8_t code[3] = {0};
	size_t size = sregs->ss.dpl == 3 ? 2 : 3;

	if (!pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, sregs->cs.base + rip, code, size))
		return false;
	return sregs->ss.dpl == 3 ? code[0] == OPCODE_INT_N : sregs->ss.dpl == 0 && is_hypercall(code);
}

/* The #UD handler has been entered for VMCALL or VMMCALL at CPL 0: answer it and return behind it. */
bool pv_finish_hypercall(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs)
{
	struct frame f;
	uint8_t code[3];

	if (!pv_read_stack(vcpu, regs, sregs, &f, sizeof f) || (f.cs & 3) != 0 || f.cs != sregs->cs.selector ||
	    !pv_read_virtual(vcpu->vm, sregs->cr3, sregs->cr4, f.rip, code, sizeof code) ||
	    !is_hypercall(code))
		return false;
	regs->rax = -(uint64_t)KVM_ENOSYS;
	regs->rip = f.rip + sizeof code;
	regs->rsp = f.rsp;
	regs->rflags = f.rflags & ~EFLAGS_RF;
	return true;
}

/*
 * Carry out the handler's first instruction if it is one of those that kernels start it with. The common
 * case on a fault-heavy guest, so it saves the two ioctls and the exit of a single step.
 */
bool pv_skip_first_instruction(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs)
{
	static const struct {
		uint8_t length, bytes[4];
		uint64_t clears;
	} known[] = {
		{4, {0xf3, 0x0f, 0x1e, 0xfa}, 0},   /* endbr64 */
		{3, {0x0f, 0x1f, 0x00}, 0},         /* nop, where CLAC was patched out */
		{3, {0x0f, 0x01, 0xca}, EFLAGS_AC}, /* clac */
		{1, {0x90}, 0},                     /* nop */
		{1, {0xfc}, EFLAGS_DF},             /* cld */
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
