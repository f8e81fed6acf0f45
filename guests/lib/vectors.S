/* 256 entry points for interrupts, and the way from there to C and back.
 *
 * The CPU does not say which vector brought it here, so each needs its own entry. For some
 * exceptions it pushes an error code, for the others we push a 0, so that all frames look alike
 * (SDM vol. 3A, "Exception and Interrupt Reference": the "error code" column).
 */
    .section .text
    .balign 16
    .global vector_stubs
vector_stubs:
    .set vector, 0
    .rept 256
    .balign 16                  /* stub n is at vector_stubs + 16 n: no table of addresses */
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    push $0
    .endif
    push $vector
    jmp save_and_dispatch
    .set vector, vector + 1
    .endr

    .balign 16
save_and_dispatch:
    /* All of them, though C would preserve some: handlers see (and may change) every register.
     * The order is that of struct interrupt_frame, backwards, as the stack grows down. */
    push %rax
    push %rbx
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %rbp
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    /* The CPU aligned RSP to 16 before its 5 words (SDM vol. 3A, "64-Bit Mode Stack Frame"); with
     * our 2 + 15 that makes 22: still a multiple of 16, as the C ABI wants it at a call. */
    mov %rsp, %rdi
    cld                         /* the C ABI wants DF clear; the interrupted code may have set it */
    call interrupt_dispatch
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rbp
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    add $16, %rsp               /* vector and error code: IRETQ knows nothing of them */
    iretq

    .section .note.GNU-stack,"",@progbits
