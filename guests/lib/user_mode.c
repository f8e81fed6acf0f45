/* The task state segment and the user pages. */
#include "user_mode.h"

#include "cpu.h"
#include "segments.h"

/* SDM vol. 3A, "TSS Structure in 64-bit Mode". Nothing is left of the task switching it is named
 * after; it holds stack pointers. */
struct __attribute__((packed)) tss {
    uint32_t reserved0;
    uint64_t rsp[3]; /* RSP0: loaded when an interrupt raises the privilege to CPL 0 */
    uint64_t reserved1;
    uint64_t ist[7];
    uint64_t reserved2;
    uint16_t reserved3;
    uint16_t io_map; /* beyond the limit: no I/O bitmap, so CPL 3 may use no port */
};

#define TSS_PRESENT_AVAILABLE 0x89ull /* P, DPL 0, type 9: available 64-bit TSS */

#define PAGE_USER 0x004ull
#define LARGE_PAGE 0x200000ull

extern uint64_t gdt[];
extern uint64_t page_directories[]; /* page_tables.S: four in a row, one entry per 2 MiB */

static struct tss tss;

void tss_load(void)
{
    tss.rsp[0] = (uint64_t)kernel_stack_top;
    tss.io_map = sizeof(tss);

    /* A 64-bit TSS descriptor takes two slots, as its base has 64 bits (SDM vol. 3A, "TSS
     * Descriptor in 64-bit mode"). */
    uint64_t base = (uint64_t)&tss;
    uint64_t *descriptor = &gdt[TSS_SELECTOR / 8];
    descriptor[0] = (sizeof(tss) - 1) | (base & 0xffffff) << 16 | TSS_PRESENT_AVAILABLE << 40 |
                    (base >> 24 & 0xff) << 56;
    descriptor[1] = base >> 32;
    __asm__ volatile("ltr %0" : : "r"((uint16_t)TSS_SELECTOR) : "memory");
}

void allow_user(uint64_t address, uint64_t size)
{
    for (uint64_t page = address / LARGE_PAGE; page * LARGE_PAGE < address + size; page++) {
        page_directories[page] |= PAGE_USER;
        invlpg(page * LARGE_PAGE);
    }
}
