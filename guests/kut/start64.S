/* From Multiboot to C in 64-bit mode. A test image is a 32-bit ELF file whatever mode it tests; its header has no
 * flags, so it is loaded by its program headers. Unlike lib/start.S it must not lie at 1 MiB but at 4 MiB, where such
 * images lie.
 */
#include "segments.h"

#define CR0_PG (1 << 31)
#define CR4_PAE (1 << 5)
#define MSR_EFER 0xc0000080
#define EFER_LME (1 << 8)

    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 0, -0x1badb002

    .section .text
    .code32
    .global _start
_start:
    mov %ebx, %edi
    lgdt gdt_pointer
    mov $boot_cpu, %esi

/* Shared with CPUs that are started later: goes on at ESI in 64-bit mode, keeps EDI, needs no stack. */
    .global enter_long_mode
enter_long_mode:
    mov %cr4, %eax
    or $CR4_PAE, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov %cr0, %eax
    or $CR0_PG, %eax
    mov %eax, %cr0
    ljmp $KERNEL_CODE, $in_long_mode

    .code64
in_long_mode:
    mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov %edi, %edi
    mov %esi, %esi
    jmp *%rsi

boot_cpu:
    mov $stack_top, %esp
    call kut_main
1:  cli
    hlt
    jmp 1b

    .section .bss
    .balign 16
    .skip 8192
stack_top:

    .section .note.GNU-stack,"",@progbits
