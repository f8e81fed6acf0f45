/* void enter_user_mode(entry, stack_top, argument)
 *
 * There is no "go to CPL 3" instruction. IRETQ is used: it believes the frame on the stack, and
 * nothing says that an interrupt ever pushed it (SDM vol. 3A, "IRET in IA-32e Mode").
 */
#include "segments.h"

#define RFLAGS_IF (1 << 9)
#define RFLAGS_ALWAYS_ONE (1 << 1)

    .section .text
    .global enter_user_mode
enter_user_mode:
    sub $8, %rsi                /* as if a CALL had pushed a return address: the C ABI expects
                                   RSP = 16n + 8 at a function's first instruction */
    push $(USER_DATA | RPL_USER)                 /* SS */
    push %rsi                                    /* RSP */
    push $(RFLAGS_IF | RFLAGS_ALWAYS_ONE)        /* RFLAGS: IOPL 0, so CPL 3 cannot clear IF */
    push $(USER_CODE | RPL_USER)                 /* CS: its RPL becomes the CPL */
    push %rdi                                    /* RIP */
    mov %rdx, %rdi
    /* DS and ES: IRETQ to CPL 3 nulls what CPL 3 may not use. 64-bit code does not care. */
    iretq

    .section .bss
    .balign 16
    .skip 16384
    .global kernel_stack_top
kernel_stack_top:

    .section .note.GNU-stack,"",@progbits
