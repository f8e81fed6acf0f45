/* Interrupts and exceptions in 64-bit mode. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define VECTOR_INVALID_OPCODE 6
#define VECTOR_GENERAL_PROTECTION 13
#define VECTOR_PAGE_FAULT 14

/* What lib/vectors.S leaves on the stack, lowest address first. A handler may change it: what it
 * writes is what the interrupted program gets back. */
struct interrupt_frame {
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8;
    uint64_t rbp, rdi, rsi, rdx, rcx, rbx, rax;
    uint64_t vector;
    uint64_t error_code; /* 0 where the CPU pushes none */
    /* Pushed by the CPU: SDM vol. 3A, "64-Bit Mode Stack Frame". */
    uint64_t rip, cs, rflags, rsp, ss;
};

typedef void interrupt_handler(struct interrupt_frame *frame);

/* Gates for the 32 exceptions, each ending the guest with a report; then load IDTR. */
void idt_init(void);
/* Load IDTR on another CPU: the table is shared, the register is not. */
void idt_load(void);
/* `from_user`: may CPL 3 raise it with INT n? (Exceptions and interrupts come through anyway.) */
void idt_set(unsigned vector, interrupt_handler *handler, bool from_user);
