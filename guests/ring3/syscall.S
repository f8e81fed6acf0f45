/* Where SYSCALL arrives, and how it returns.
 *
 * SYSCALL is fast because it does so little (SDM vol. 2B, SYSCALL): RCX = return address, R11 =
 * RFLAGS, RIP = LSTAR, RFLAGS &= ~FMASK, CS and SS from STAR. It does not touch RSP: the first
 * instructions run in the kernel on the *user's* stack pointer, which may be anything. So nothing
 * may be pushed, and no interrupt may come (FMASK clears IF), until RSP is our own.
 */
    .section .text
    .global syscall_entry
syscall_entry:
    /* One CPU, so one variable will do. A kernel for many uses SWAPGS to find its own per-CPU data. */
    mov %rsp, user_rsp(%rip)
    lea kernel_stack_top(%rip), %rsp
    push user_rsp(%rip)
    push %rcx
    push %r11
    push %rdi                   /* as the C ABI lets the callee change these, and Linux's rule, */
    push %rsi                   /* which we adopt, is that only RAX, RCX and R11 change */
    push %rdx
    push %r8
    push %r9
    push %r10
    sub $8, %rsp                /* nine words pushed: a tenth for RSP = 16n at the call */

    mov %rsi, %rdx              /* on_syscall(number, a, b, from): RCX is in its place already */
    mov %rdi, %rsi
    mov %rax, %rdi
    call on_syscall             /* the result is in RAX, where the user expects it */

    add $8, %rsp
    pop %r10
    pop %r9
    pop %r8
    pop %rdx
    pop %rsi
    pop %rdi
    pop %r11
    pop %rcx
    pop %rsp                    /* back on the user's stack, for one instruction in CPL 0 */
    /* RIP = RCX, RFLAGS = R11, CPL = 3. Were RCX not canonical, SYSRET would raise #GP in CPL 0 with
     * the user's RSP on Intel CPUs: kernels check it. Here RCX comes from SYSCALL itself. */
    sysretq

    .section .bss
    .balign 8
user_rsp:
    .skip 8

    .section .note.GNU-stack,"",@progbits
