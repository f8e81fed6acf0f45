/*
 * Who has which debug register, and how far a vCPU runs before a debugger hears of it.
 *
 *   DR3, DR2     the work-arounds for entering CPL 0 (user_entry.c), on hosts that need them, once the guest is in
 *                64-bit mode: without them no system call would arrive. They win.
 *   DR1          on those hosts, what takes the place of two things their KVM does not do: a #BP from 64-bit CPL 3 or
 *                from real mode, or the #DB after a step at CPL 3, goes to the guest's handler. The breakpoint on that
 *                handler (``trap_handler``) catches it before an instruction of it runs, and pyvmm/gdb takes it back.
 *   what is left the debugger's own breakpoints: DR0 there, all four on other hosts.
 *
 * KVM_SET_GUEST_DEBUG is called nowhere else, so neither side undoes the other's. Where CPL 0 is emulated KVM looks at
 * no data breakpoint: watchpoints are then kept by stepping, and comparing here costs a twentieth of doing so in Python.
 */

#include "core.h"

#include <string.h>

#define BP_PF 3
#define BP_UD 2
#define BP_TRAP 1
#define DR7_FIXED 0x400ull
#define DR7_GLOBAL(n) (2ull << ((n) * 2))
#define DR7_ENABLED(n) (3ull << ((n) * 2))
#define DR7_KIND(n) (15ull << (16 + (n) * 4))

static void put(struct kvm_guest_debug *debug, unsigned number, uint64_t address)
{
	debug->arch.debugreg[number] = address;
	debug->arch.debugreg[7] &= ~(DR7_ENABLED(number) | DR7_KIND(number));
	debug->arch.debugreg[7] |= DR7_GLOBAL(number); /* execute, length 1 */
}

bool pv_debug_stepping(const struct pv_vcpu *vcpu)
{
	return vcpu->debug.step || vcpu->debug.watches[0].size;
}

/* Tell KVM what the work-arounds and the debugger want together. 0, or -1 with errno. */
int pv_debug_arm(struct pv_vcpu *vcpu)
{
	const struct pv_user_entry *e = &vcpu->entry;
	struct pv_guest_debug *d = &vcpu->debug;
	struct kvm_guest_debug debug = {0};

	/* With a breakpoint where it stands a vCPU would not get on: a step of the work-around's runs without any. */
	if (!e->stepping) {
		if (d->on && d->dr7) {
			memcpy(debug.arch.debugreg, d->address, sizeof d->address);
			debug.arch.debugreg[7] = d->dr7;
		}
		if (d->on && d->trap_handler != PV_NOWHERE)
			put(&debug, BP_TRAP, d->trap_handler);
		if (e->pf_handler)
			put(&debug, BP_PF, e->pf_handler);
		if (e->ud_handler)
			put(&debug, BP_UD, e->ud_handler);
	}
	if (debug.arch.debugreg[7]) {
		debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
		debug.arch.debugreg[7] |= DR7_FIXED;
	}
	if (d->on)
		debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP | d->inject;
	if (e->stepping || (d->on && pv_debug_stepping(vcpu)))
		debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
	if (d->on && d->step && d->block_irq)
		debug.control |= KVM_GUESTDBG_BLOCKIRQ;
	d->inject = 0;
	return ioctl(vcpu->fd, KVM_SET_GUEST_DEBUG, &debug);
}

/* Of a vCPU that stands still: from its next KVM_RUN on. ``old`` of the watches is read here. 0, or -1 with errno. */
int pv_vcpu_set_debug(struct pv_vcpu *vcpu, const struct pv_guest_debug *wanted)
{
	struct pv_guest_debug *d = &vcpu->debug;

	*d = *wanted;
	d->finish_access = false;
	d->trap_handler = PV_NOWHERE;
	for (int i = 0; i < PV_WATCHES; i++) {
		struct pv_watch *watch = &d->watches[i];
		const uint8_t *now = watch->size <= 8 ? pv_gpa(vcpu->vm, watch->gpa, watch->size) : NULL;
		if (now)
			memcpy(watch->old, now, watch->size);
		else
			watch->size = 0;
	}
	if (!(vcpu->entry.syscall_on || vcpu->entry.int_on))
		return pv_debug_arm(vcpu);
	vcpu->entry.stale = vcpu->entry.rearm = true; /* before it runs the handlers are looked up again */
	return 0;
}

/* In the vCPU's thread, after a stop at the trap handler that was the guest's own: let it run its first instruction. */
int pv_vcpu_step_past_trap(struct pv_vcpu *vcpu)
{
	vcpu->entry.stepping = true;
	return pv_debug_arm(vcpu);
}

bool pv_debug_breakpoint_at(const struct pv_vcpu *vcpu, uint64_t pc)
{
	const struct pv_guest_debug *d = &vcpu->debug;
	for (unsigned n = 0; d->on && n < 4; n++)
		if ((d->dr7 & DR7_ENABLED(n)) && !(d->dr7 & DR7_KIND(n)) && d->address[n] == pc)
			return true;
	return false;
}

/* A step for the sake of the watches alone after which they hold what they did: nothing to tell. */
bool pv_debug_nothing_changed(struct pv_vcpu *vcpu, uint64_t dr6)
{
	const struct pv_guest_debug *d = &vcpu->debug;

	if (d->step || !d->watches[0].size || !(dr6 & PV_DR6_STEP) || (dr6 & 15))
		return false;
	for (int i = 0; i < PV_WATCHES && d->watches[i].size; i++) {
		const uint8_t *now = pv_gpa(vcpu->vm, d->watches[i].gpa, d->watches[i].size);
		if (!now || memcmp(now, d->watches[i].old, d->watches[i].size))
			return false;
	}
	return true;
}
