/* Leaving CPL 0, and what must be in place to come back. */
#pragma once

#include <stdint.h>

/* Tell the CPU which stack to take when an interrupt comes from CPL 3 (loads TR). */
void tss_load(void);
/* Let CPL 3 read, write and execute the 2 MiB page(s) around [address, address + size). */
void allow_user(uint64_t address, uint64_t size);
/* Go to CPL 3 with interrupts enabled; `argument` arrives in RDI. The way back is an interrupt. */
_Noreturn void enter_user_mode(void (*entry)(uint64_t argument), uint64_t stack_top,
                               uint64_t argument);

/* Top of the stack that interrupts from CPL 3 start on. */
extern char kernel_stack_top[];
