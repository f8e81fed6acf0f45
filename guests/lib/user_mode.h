/* Leaving CPL 0, and what must be in place to come back. */
#pragma once

#include <stdint.h>

/* A vector for calls from user mode that works on every host without the VMM's help: INT $4.
 *
 * Any vector whose gate has DPL 3 would do on a CPU (guests/ring3 takes 0x80). But a PVM host runs CPL 3
 * of the guest as a process of its own kernel, whose IDT opens only vectors 3 and 4 to user mode; INT
 * with any other ends as #UD in the guest there, unless the VMM steps in. Vector 4 was made for INTO
 * ("overflow"), which does not exist in 64-bit mode (SDM vol. 2A, INT n/INTO/INT3/INT1), so it is free. */
#define USER_CALL_VECTOR 4

/* Tell the CPU which stack to take when an interrupt comes from CPL 3 (loads TR). */
void tss_load(void);
/* Let CPL 3 read, write and execute the 2 MiB page(s) around [address, address + size). */
void allow_user(uint64_t address, uint64_t size);
/* Go to CPL 3 with interrupts enabled; `argument` arrives in RDI. The way back is an interrupt. */
_Noreturn void enter_user_mode(void (*entry)(uint64_t argument), uint64_t stack_top,
                               uint64_t argument);

/* Top of the stack that interrupts from CPL 3 start on. */
extern char kernel_stack_top[];
