/* Between user_entry.c (when to step in) and exception_frame.c (what to do then). */
#ifndef PYVMM_USER_ENTRY_H
#define PYVMM_USER_ENTRY_H

#include "core.h"

#define UD_VECTOR 6

/* What the CPU pushes in 64-bit mode, lowest address first (Intel SDM vol. 3, 6.14.2). */
struct frame {
	uint64_t rip, cs, rflags, rsp, ss;
};

/* The same with the error code of a page fault below it. */
struct pf_frame {
	uint64_t error;
	struct frame f;
};

struct gate {
	uint64_t target;
	uint16_t selector;
	uint8_t ist, type, dpl;
	bool present;
};

bool pv_read_gate(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, unsigned vector, struct gate *gate);
uint64_t pv_handler_of(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, unsigned vector);
bool pv_read_stack(struct pv_vcpu *vcpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs, void *to,
		   size_t size);
bool pv_is_syscall(struct pv_vcpu *vcpu, const struct pf_frame *pf, uint64_t cr2, const struct kvm_regs *regs,
		   const struct kvm_sregs *sregs);
void pv_finish_syscall(const struct pv_user_entry *e, uint64_t user_rsp, struct kvm_regs *regs);
void pv_hide_step(struct pv_vcpu *vcpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs);
bool pv_finish_int(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs);
bool pv_raises_false_ud(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, uint64_t rip);
bool pv_finish_hypercall(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs);
bool pv_skip_first_instruction(struct pv_vcpu *vcpu, const struct kvm_sregs *sregs, struct kvm_regs *regs);

#endif
