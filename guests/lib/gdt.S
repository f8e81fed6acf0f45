/* The one global descriptor table of all 64-bit guests.
 *
 * In 64-bit mode base and limit are ignored for code and data (SDM vol. 3A, "Segmentation in
 * IA-32e Mode"); what remains of a code descriptor is the L bit (64-bit), DPL and "present".
 * It is writable: LTR sets the busy bit in the TSS descriptor.
 *
 * Bits of the upper half, from the top of a 64-bit word (SDM vol. 3A, "Segment Descriptors"):
 *   63..56 base   55 G   54 D/B   53 L   52 AVL   51..48 limit   47 P   46..45 DPL   44 S
 *   43..40 type   39..32 base
 */
    .section .data
    .balign 16
    .global gdt
gdt:
    .quad 0                     /* 0x00 null: loading it is allowed, using it is #GP        */
    .quad 0x00af9b000000ffff    /* 0x08 kernel code: P, DPL 0, execute/read, L              */
    .quad 0x00cf93000000ffff    /* 0x10 kernel data: P, DPL 0, read/write                   */
    .quad 0x00cffb000000ffff    /* 0x18 user code, 32-bit: the slot SYSRET counts from      */
    .quad 0x00cff3000000ffff    /* 0x20 user data: P, DPL 3, read/write                     */
    .quad 0x00affb000000ffff    /* 0x28 user code: P, DPL 3, execute/read, L                */
    .quad 0x00cf9b000000ffff    /* 0x30 kernel code, 32-bit: P, DPL 0, D                    */
    .quad 0, 0                  /* 0x38 TSS: filled in by tss_load(), its address is known  */
                                /*      in pieces only at link time                         */
gdt_end:

    /* What LGDT reads: limit (size - 1) and a 32-bit base, because LGDT runs in 32-bit mode. */
    .global gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .long 0                     /* and the upper half, for the day it is loaded in long mode */

    .section .note.GNU-stack,"",@progbits
