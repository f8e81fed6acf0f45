/* The segment selectors of lib/gdt.S, for C and assembly.
 *
 * The order is not free. SYSCALL and SYSRET compute selectors instead of reading descriptors
 * (SDM vol. 3A, "Fast System Calls in 64-Bit Mode"):
 *   SYSCALL: CS = STAR[47:32],             SS = STAR[47:32] + 8
 *   SYSRET:  CS = STAR[63:48] + 16 (or 3), SS = STAR[63:48] + 8 (or 3)
 * so kernel data must follow kernel code, and user code must follow user data.
 */
#pragma once

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_CODE32 0x18 /* only the base that SYSRET counts from */
#define USER_DATA 0x20
#define USER_CODE 0x28
#define KERNEL_CODE32 0x30 /* for the few instructions between real mode and long mode */
#define TSS_SELECTOR 0x38  /* 16 bytes: two slots */

/* The low two bits of a selector: the privilege its user asks for (RPL). */
#define RPL_USER 3
