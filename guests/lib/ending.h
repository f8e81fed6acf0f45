/* How a guest ends. */
#pragma once

#include "cpu.h"

/* pyvmm (and QEMU's isa-debug-exit): writing v to this port ends the VM with the process exit
 * status (v << 1) | 1. It is always odd, so it cannot be taken for the 0 of a clean end. */
#define DEBUG_EXIT_PORT 0xf4

/* Wait with interrupts off: the clean end (status 0) once all CPUs do it. */
static inline _Noreturn void halt_forever(void)
{
    for (;;) /* an NMI wakes even this */
        __asm__ volatile("cli; hlt");
}

/* End the VM with status (value << 1) | 1. */
static inline _Noreturn void debug_exit(uint8_t value)
{
    outb(DEBUG_EXIT_PORT, value);
    halt_forever(); /* where no such port exists */
}
