/* From the Multiboot entry to C in 64-bit mode.
 *
 * The loader hands over in 32-bit protected mode (Multiboot 1, section 3.2): EAX = magic,
 * EBX = boot information, flat segments, paging off, interrupts off. Selectors, GDTR and ESP are
 * undefined, so none of the loader's may be used: the first thing that reloads a segment
 * register or touches the stack would go through tables that we do not own.
 */
#include "multiboot.h"
#include "segments.h"

#define CR0_PG (1 << 31)
#define CR0_WP (1 << 16)
#define CR4_PAE (1 << 5)
#define MSR_EFER 0xc0000080
#define EFER_LME (1 << 8)

    .section .multiboot, "a"
    .balign 4
    .set header_flags, MULTIBOOT_PAGE_ALIGN | MULTIBOOT_MEMORY_INFO
    .long MULTIBOOT_HEADER_MAGIC
    .long header_flags
    /* The three words add up to zero: a stray 0x1badb002 in code will not pass for a header. */
    .long -(MULTIBOOT_HEADER_MAGIC + header_flags)

    .section .text
    .code32
    .global _start
_start:
    cmp $MULTIBOOT_LOADER_MAGIC, %eax
    jne not_multiboot
    mov %ebx, %edi              /* first argument of guest_main: the boot information */
    lgdt gdt_pointer
    mov $boot_cpu, %esi         /* where to go on in 64-bit mode */

/* 32-bit protected mode -> 64-bit mode, then jump to the address in ESI; keeps EDI. Without a
 * stack, because CPUs that are started later (guests/smp) come through here before they have one.
 *
 * The order is the one of SDM vol. 3A, "Initializing IA-32e Mode": PAE first, then CR3, then
 * EFER.LME, then CR0.PG. Setting PG is what activates long mode: it is #GP without PAE, and from
 * that moment every fetch goes through the tables, so this very code must be identity-mapped. */
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

    /* WP: the kernel, too, must obey read-only pages. */
    mov %cr0, %eax
    or $(CR0_PG | CR0_WP), %eax
    mov %eax, %cr0

    /* Long mode is active, but CS still names a 32-bit segment: "compatibility mode". Only a far
     * jump to a descriptor with L=1 makes it 64-bit mode. */
    ljmp $KERNEL_CODE, $in_long_mode

not_multiboot:
    /* No serial port set up, no stack: an exit status is all we can say. */
    mov $0x7e, %al
    out %al, $0xf4
    cli
    hlt

    .code64
in_long_mode:
    /* SS, DS, ES still hold the old selectors. SS must be valid or null before the first
     * interrupt returns with IRETQ; FS and GS are null because nothing may use them yet. */
    mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    /* The upper halves of registers are undefined after a change of mode (SDM vol. 1,
     * "General-Purpose Registers in 64-Bit Mode"); a 32-bit move clears them. */
    mov %edi, %edi
    mov %esi, %esi
    jmp *%rsi

boot_cpu:
    mov $boot_stack_top, %esp
    /* A call leaves RSP = 16n + 8 at the callee's first instruction, as the C ABI wants it. */
    call guest_main
    /* Returning is the clean end: with interrupts off nothing can wake this CPU, and a VM whose
     * CPUs all wait like that is over. */
1:  cli
    hlt
    jmp 1b                      /* an NMI wakes even this */

    .section .bss
    .balign 16
    .skip 16384
boot_stack_top:

    .section .note.GNU-stack,"",@progbits
