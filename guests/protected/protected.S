/* protected: from real mode to 32-bit protected mode, by hand.
 *
 * The same start as guests/hello, and then the switch every PC operating system once made. The
 * order is that of SDM vol. 3A, "Switching to Protected Mode":
 *   interrupts off - a GDT - CR0.PE - far jump - data segments - an IDT.
 * At the end the thing protected mode is named after: a forbidden access is caught, not done.
 */
#define SERIAL_DATA 0x3f8
#define SERIAL_LINE_STATUS 0x3fd
#define TRANSMITTER_EMPTY 0x20

#define CODE 0x08
#define DATA 0x10
#define OUTSIDE_GDT 0x28        /* a selector that names no descriptor */
#define CR0_PE 1
#define VECTOR_GP 13

    .code16
    .text
    .global _start
_start:
    cli                         /* a real-mode vector is no IDT entry: no interrupt in between */
    ljmp $0, $settled           /* CS = 0, whatever the loader chose (see guests/hello) */
settled:
    xor %ax, %ax
    mov %ax, %ds

    /* On a PC the 21st address line may still be forced to 0, for programs of 1981 that relied on
     * 1 MiB wrapping around. "Fast A20": bit 1 of port 0x92 (bit 0 is reset, keep it 0). A VM
     * without the line answers all ones or ignores it: skip the write if it is on already. */
    in $0x92, %al
    test $2, %al
    jnz 1f
    or $2, %al
    and $0xfe, %al
    out %al, $0x92
1:
    /* 16-bit LGDT with a 32-bit base (the L suffix): 16-bit operand size would load only 24 bits of
     * it, a relic of the 80286 (SDM vol. 2A, LGDT). */
    lgdtl gdt_pointer

    mov %cr0, %eax
    or $CR0_PE, %eax
    mov %eax, %cr0
    /* Protected mode, but CS still holds its 16-bit real-mode segment: each segment register has a
     * hidden part that changes only when the register is loaded. So load it. */
    ljmpl $CODE, $protected

    .code32
protected:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x7c00, %esp
    cld

    mov $in_protected_mode, %esi
    call print

    /* One flat segment of 4 GiB: an address above 1 MiB is simply that address, where real mode ends
     * at ffff:ffff. Were A20 forced to 0, this would be 0x8000 by another name. */
    movl $0, 0x008000
    movl $0x5ca1ab1e, 0x108000
    cmpl $0, 0x008000
    jne 1f
    mov $above_1_mib, %esi
    call print
1:
    /* The gate's address comes in two halves, and the assembler cannot split an address that only
     * the linker knows, so it is stored here (SDM vol. 3A, "IDT Descriptors"). */
    mov $on_general_protection, %eax
    mov %ax, gate_gp
    shr $16, %eax
    mov %ax, gate_gp + 6
    lidt idt_pointer

    /* A selector beyond the end of the GDT. The CPU checks before it loads: #GP, and the error code
     * is the selector (SDM vol. 3A, "Interrupt 13—General Protection Exception (#GP)"). */
    mov $OUTSIDE_GDT, %eax
    mov %eax, %fs
    mov $not_caught, %esi
    call print
end:
    cli
    hlt
    jmp end

/* Stack on entry: error code, EIP of the instruction that failed, CS, EFLAGS. */
on_general_protection:
    mov $caught, %esi
    cmpl $OUTSIDE_GDT, (%esp)
    je 1f
    mov $not_caught, %esi
1:  call print
    /* EIP points *at* the MOV (a fault, not a trap), so IRET would fault again, for ever. This
     * program has nothing left to do: stop here. */
    jmp end

/* Print the string at ESI, which ends with a zero byte. */
print:
    lodsb
    test %al, %al
    jz 2f
    mov %al, %ah
    mov $SERIAL_LINE_STATUS, %dx
1:  in %dx, %al
    test $TRANSMITTER_EMPTY, %al
    jz 1b
    mov %ah, %al
    mov $SERIAL_DATA, %dx
    out %al, %dx
    jmp print
2:  ret

    .balign 8
gdt:
    .quad 0                     /* selector 0 is the null selector, its descriptor is never read */
    /* base 0, limit 0xfffff in 4 KiB units (G), 32-bit (D/B), present, DPL 0
     * (SDM vol. 3A, "Segment Descriptors") */
    .quad 0x00cf9b000000ffff    /* 0x08: code, execute/read */
    .quad 0x00cf93000000ffff    /* 0x10: data, read/write   */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

/* Entries 0-12 are not present; 13 (#GP) is the last one, so the limit ends there. */
    .balign 8
idt:
    .fill VECTOR_GP, 8, 0
gate_gp:
    .word 0                     /* offset 15..0  */
    .word CODE
    .byte 0
    .byte 0x8e                  /* present, DPL 0, 32-bit interrupt gate */
    .word 0                     /* offset 31..16 */
idt_pointer:
    .word idt_pointer - idt - 1
    .long idt

in_protected_mode:
    .asciz "Now in 32-bit protected mode.\r\n"
above_1_mib:
    .asciz "Memory above 1 MiB is its own.\r\n"
caught:
    .asciz "A bad selector was caught: #GP(0x28).\r\n"
not_caught:
    .asciz "#GP did not come\r\n"
