/* An identity map of the low 4 GiB in 2 MiB pages, written by the assembler.
 *
 * Building it at run time takes 2048 stores; here it costs nothing but 24 KiB in the file.
 * guests/longmode builds its own at run time, because there the building is the lesson.
 *
 * Three levels instead of four: a page-directory entry with PS=1 maps 2 MiB by itself
 * (SDM vol. 3A, "4-Level Paging and 5-Level Paging").
 *
 * Who may use a page is the AND of the U/S bits of all levels. So the upper levels say "user"
 * and each page-directory entry decides; all of them start as supervisor-only.
 */
#define PRESENT 0x001
#define WRITABLE 0x002
#define USER 0x004
#define WRITE_THROUGH 0x008
#define CACHE_DISABLE 0x010
#define LARGE 0x080

    .section .data
    .balign 4096
    .global pml4
pml4:
    .quad pdpt + (PRESENT | WRITABLE | USER)
    .fill 511, 8, 0

pdpt:
    .quad page_directories + 0x0000 + (PRESENT | WRITABLE | USER)
    .quad page_directories + 0x1000 + (PRESENT | WRITABLE | USER)
    .quad page_directories + 0x2000 + (PRESENT | WRITABLE | USER)
    .quad page_directories + 0x3000 + (PRESENT | WRITABLE | USER)
    .fill 508, 8, 0

    .global page_directories
page_directories:
    .set address, 0
    .rept 3 * 512                               /* 0-3 GiB: RAM */
    .quad address + (PRESENT | WRITABLE | LARGE)
    .set address, address + 0x200000
    .endr
    /* 3-4 GiB: devices, among them the local APIC. No firmware has set the MTRRs here, so the
     * page tables must say "uncached" (SDM vol. 3A, "Selecting Memory Types"). */
    .rept 512
    .quad address + (PRESENT | WRITABLE | WRITE_THROUGH | CACHE_DISABLE | LARGE)
    .set address, address + 0x200000
    .endr

    .section .note.GNU-stack,"",@progbits
