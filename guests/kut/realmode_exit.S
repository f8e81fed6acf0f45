/* SDM vol. 3A, "Switching Back to Real-Address Mode": 16-bit segments first, then CR0.PE, then a far jump. */
    .section .text
    .code32
    .global to_real_mode
to_real_mode:
    cli
    mov $0x20, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    ljmp $0x18, $0              /* a 16-bit segment whose base is the page that the copy lies in */

    .section .rodata
    .code16
    .global real_mode, real_mode_end
real_mode:
    mov %cr0, %eax
    and $~1, %eax
    mov %eax, %cr0
    ljmp $0x6000, $1f - real_mode
1:  mov %cs, %ax
    mov %ax, %ds
    mov $message - real_mode, %si
    mov $0x3f8, %dx
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  mov $0, %al
    out %al, $0xf4
    cli
    hlt
message:
    .asciz "real mode says goodbye\n"
real_mode_end:

    .section .note.GNU-stack,"",@progbits
