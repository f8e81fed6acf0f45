/* Where application processors (APs) begin, and how they get from there to C.
 *
 * A start-up message (SIPI) carries one byte, a page number: the AP begins in real mode at
 * CS = page << 8, IP = 0 (SDM vol. 3A, "MP Initialization"). The image lies above 1 MiB, where real
 * mode cannot reach, so the first part is copied to a page below it: it may use only addresses that
 * are relative to its own start, until it jumps into the image for good.
 */
#include "segments.h"

#define CR0_PE 1
#define AP_STACK_SIZE 4096
#define MAX_APS 63

    .section .rodata
    .code16
    .global trampoline, trampoline_end
trampoline:
    cli
    /* CS-relative: the copy's own page, wherever it was put. The image's GDT will do (it names a
     * 32-bit code segment), only LGDT's operand must be within reach. */
    lgdtl %cs:(trampoline_gdt_pointer - trampoline)
    mov %cr0, %eax
    or $CR0_PE, %eax
    /* INIT left CD and NW set, caches off (SDM vol. 3A, "Processor State After Reset"). */
    and $0x9fffffff, %eax
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
    jmp enter_long_mode         /* lib/start.S; the same tables as the boot CPU, so the same memory */

    .code64
ap_in_long_mode:
    /* Several APs may be here at once and none has a stack yet, so the number that makes them
     * different must come from one indivisible instruction: XADD adds and returns the old value. */
    mov $1, %edi
    lock xadd %edi, next_ap(%rip)
    cmp $MAX_APS, %edi
    jae ap_done                 /* more CPUs than the table promised: no stack for this one */
    lea 1(%rdi), %eax
    imul $AP_STACK_SIZE, %eax, %eax
    lea ap_stacks(%rip), %rsp
    add %rax, %rsp              /* the top of stack number EDI */
    call ap_main
ap_done:
    cli
    hlt
    jmp ap_done

    .section .bss
    .balign 16
ap_stacks:
    .skip MAX_APS * AP_STACK_SIZE
next_ap:
    .skip 4

    .section .note.GNU-stack,"",@progbits
