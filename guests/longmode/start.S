/* longmode: builds 4-level page tables with its own hands, then enters 64-bit mode.
 *
 * The other 64-bit guests get the same from lib/start.S with ready-made tables. Here every entry is
 * written at run time, the way a kernel must once it has to manage memory.
 *
 * An address has 48 bits that count (SDM vol. 3A, "4-Level Paging and 5-Level Paging"):
 *
 *   47       39 38       30 29       21 20       12 11        0
 *   [  PML4   ] [  PDPT   ] [  dir.   ] [  table  ] [ offset  ]     nine bits choose one of 512
 *
 * Identity map (low 16 MiB):  pml4[0] -> pdpt[0] -> directory[0..7], each a page of 2 MiB.
 * The alias (one 4 KiB page): pml4[245] -> pdpt[243] -> directory[247] -> table[257] -> `page`,
 * built in main.c once C runs; the tables are then its data.
 */
#include "multiboot.h"
#include "paging.h"

#define CODE32 0x08
#define CODE64 0x10
#define DATA 0x18

#define CR0_PG (1 << 31)
#define CR4_PAE (1 << 5)
#define MSR_EFER 0xc0000080
#define EFER_LME (1 << 8)

    .section .multiboot, "a"
    .balign 4
    .set header_flags, MULTIBOOT_PAGE_ALIGN | MULTIBOOT_MEMORY_INFO
    .long MULTIBOOT_HEADER_MAGIC
    .long header_flags
    .long -(MULTIBOOT_HEADER_MAGIC + header_flags)

    .section .text
    .code32
    .global _start
_start:
    /* Multiboot hands over in 32-bit protected mode with paging off; the stack is ours to make.
     * Nothing is pushed before that. */
    mov $stack_top, %esp

    /* Upper levels: one entry each. The tables are 4 KiB-aligned, so the low 12 bits of an address
     * are free, and hold the flags. Entries have 64 bits; the upper half stays 0 (from .bss). */
    movl $pdpt + (PAGE_PRESENT | PAGE_WRITABLE), pml4
    movl $page_directory + (PAGE_PRESENT | PAGE_WRITABLE), pdpt

    /* The directory: entry i maps [i * 2 MiB, (i + 1) * 2 MiB) to itself. */
    xor %ecx, %ecx
    mov $(PAGE_PRESENT | PAGE_WRITABLE | PAGE_LARGE), %eax
1:  mov %eax, page_directory(, %ecx, 8)
    add $0x200000, %eax
    inc %ecx
    cmp $(IDENTITY_MIB / 2), %ecx
    jb 1b

    /* The order is prescribed (SDM vol. 3A, "Initializing IA-32e Mode"): CR4.PAE, CR3, EFER.LME,
     * and CR0.PG last. */
    mov %cr4, %eax
    or $CR4_PAE, %eax           /* entries of 64 bits; long mode knows no others */
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax          /* "enable": long mode becomes *active* with the next step */
    wrmsr
    mov %cr0, %eax
    or $CR0_PG, %eax
    mov %eax, %cr0
    /* Paging is on. The next fetch goes through our tables: if this page were not mapped at its own
     * address, the CPU would page-fault without an IDT, that is triple-fault, right here. */
    lgdt gdt_pointer
    ljmp $CODE64, $in_long_mode /* L=1 in the descriptor: 64-bit mode */

    .code64
in_long_mode:
    mov $DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $stack_top, %esp        /* again: the upper half of RSP is undefined after the switch */
    call guest_main
end:
    cli
    hlt
    jmp end

    .section .rodata
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* 0x08 code, 32-bit (named by the map below, not used again) */
    .quad 0x00af9b000000ffff    /* 0x10 code, 64-bit: L=1, D=0 */
    .quad 0x00cf93000000ffff    /* 0x18 data */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .section .bss
    .balign 4096
    .global pml4
pml4:
    .skip 4096
pdpt:
    .skip 4096
page_directory:
    .skip 4096
    .skip 8192
stack_top:

    .section .note.GNU-stack,"",@progbits
