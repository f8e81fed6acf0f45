/* From Multiboot to C in 32-bit protected mode, paging off. */
    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 0, -0x1badb002

    .section .text
    .code32
    .global _start
_start:
    lgdt gdt_pointer            /* the loader's may be anywhere */
    ljmp $0x08, $1f
1:  mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $stack_top, %esp
    sub $12, %esp               /* the C ABI wants the argument at a multiple of 16 */
    push %ebx
    call kut_main
1:  cli
    hlt
    jmp 1b

    .section .data
    .balign 16
    .global gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* 0x08 code, 32-bit */
    .quad 0x00cf93000000ffff    /* 0x10 data */
    .quad 0x00009b060000ffff    /* 0x18 code, 16-bit, base 0x60000, 64 KiB: the way back to real mode */
    .quad 0x000093000000ffff    /* 0x20 data, 16-bit */
gdt_end:
    .global gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .section .bss
    .balign 16
    .skip 8192
stack_top:

    .section .note.GNU-stack,"",@progbits
