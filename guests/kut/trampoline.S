/* Copied to address 0, where CPUs start in real mode after a SIPI with vector 0; then through start64.S to ap_main. */
#include "segments.h"

#define AP_STACK_SIZE 1024
#define MAX_APS 63

    .section .rodata
    .code16
    .global trampoline, trampoline_end
trampoline:
    cli
    lgdtl %cs:(trampoline_gdt_pointer - trampoline)
    mov %cr0, %eax
    and $0x9fffffff, %eax       /* INIT left caches off */
    or $1, %eax
    mov %eax, %cr0
    ljmpl $KERNEL_CODE32, $ap_in_protected_mode
trampoline_gdt_pointer:
    .word TSS_SELECTOR + 16 - 1
    .long gdt
trampoline_end:

    .section .text
    .code32
ap_in_protected_mode:
    mov $KERNEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %ss
    mov $ap_in_long_mode, %esi
    jmp enter_long_mode

    .code64
ap_in_long_mode:
    mov $1, %edi
    lock xadd %edi, next_ap(%rip)
    cmp $MAX_APS, %edi
    jae 1f
    lea 1(%rdi), %eax
    imul $AP_STACK_SIZE, %eax, %eax
    lea ap_stacks(%rip), %rsp
    add %rax, %rsp
    call ap_main
1:  cli
    hlt
    jmp 1b

    .section .bss
    .balign 16
ap_stacks:
    .skip MAX_APS * AP_STACK_SIZE
next_ap:
    .skip 4

    .section .note.GNU-stack,"",@progbits
