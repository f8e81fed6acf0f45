/* longmode, the part in C: walk the tables as the CPU does, then map a page a second time. */
#include <stdint.h>

#include "cpu.h"
#include "ending.h"
#include "paging.h"
#include "print.h"
#include "serial.h"

#define ADDRESS_BITS 0x000ffffffffff000ull

typedef uint64_t table[ENTRIES] __attribute__((aligned(4096)));

extern table pml4; /* start.S */

/* The three tables below the PML4 that the alias needs, and the page it leads to. */
static table alias_pdpt, alias_directory, alias_table;
static table page;

/* Which entry of the table at `level` (4 = PML4 ... 1 = page table) an address selects. */
static unsigned index_at(uint64_t address, unsigned level)
{
    return address >> (12 + 9 * (level - 1)) & (ENTRIES - 1);
}

static const char *name_of(unsigned level)
{
    static const char *const names[] = {"", "table", "dir", "PDPT", "PML4"};
    return names[level];
}

/* Translate as the CPU does after a TLB miss, printing each step. Returns the physical address. */
static uint64_t walk(uint64_t address)
{
    /* CR3 holds a *physical* address, and so does every entry. This code can follow them only
     * because the tables lie in memory that is mapped at its own address. */
    const uint64_t *entries = (const uint64_t *)(read_cr3() & ADDRESS_BITS);
    print("0x%lx:", address);
    for (unsigned level = 4;; level--) {
        unsigned index = index_at(address, level);
        uint64_t entry = entries[index];
        print(" %s[%u]", name_of(level), index);
        if (!(entry & PAGE_PRESENT)) {
            print(" not present\n");
            debug_exit(1);
        }
        if (level == 1 || entry & PAGE_LARGE) {
            /* The bits below this level are not translated: 12 of them, or 21 in a large page. */
            uint64_t offset = address & ((1ull << (12 + 9 * (level - 1))) - 1);
            print(" %s page\n", level == 1 ? "4 KiB" : "2 MiB");
            return (entry & ADDRESS_BITS & ~((1ull << (12 + 9 * (level - 1))) - 1)) + offset;
        }
        entries = (const uint64_t *)(entry & ADDRESS_BITS);
    }
}

static void map_alias(void)
{
    const uint64_t flags = PAGE_PRESENT | PAGE_WRITABLE;
    /* From the leaf upwards: the entry that makes it all reachable is written last, so the CPU never
     * sees half a mapping. Nothing need be flushed: "not present" is never cached in the TLB
     * (SDM vol. 3A, "Invalidation of TLBs and Paging-Structure Caches"). */
    alias_table[index_at(ALIAS_ADDRESS, 1)] = (uint64_t)page | flags;
    alias_directory[index_at(ALIAS_ADDRESS, 2)] = (uint64_t)alias_table | flags;
    alias_pdpt[index_at(ALIAS_ADDRESS, 3)] = (uint64_t)alias_directory | flags;
    pml4[index_at(ALIAS_ADDRESS, 4)] = (uint64_t)alias_pdpt | flags;
}

void guest_main(void)
{
    serial_init();
    print("64-bit mode: CR0.PG=%u CR4.PAE=%u EFER.LMA=%u\n", (unsigned)(read_cr0() >> 31 & 1),
          (unsigned)(read_cr4() >> 5 & 1), (unsigned)(rdmsr(0xc0000080) >> 10 & 1));

    print("identity: %s\n", walk((uint64_t)page) == (uint64_t)page ? "physical = virtual" : "wrong");

    map_alias();
    print("alias: %s\n",
          walk(ALIAS_ADDRESS) == (uint64_t)page ? "leads to the same page" : "wrong");

    /* The proof is not in our walk but in the CPU's: write here, read there. */
    volatile uint64_t *here = page;
    volatile uint64_t *there = (volatile uint64_t *)ALIAS_ADDRESS;
    *there = 0x1dea11ed;
    print("wrote 0x%lx at 0x%lx, read 0x%lx through the identity map\n", *there,
          (uint64_t)ALIAS_ADDRESS, *here);
    if (*here != 0x1dea11ed)
        debug_exit(1);

    /* The CPU notes in the leaf entry that it was used: A (bit 5) and D (bit 6), set by the walk
     * itself. Migration in a VMM rests on the same idea, one level below. */
    print("the alias's entry: accessed=%u dirty=%u\n",
          (unsigned)(alias_table[index_at(ALIAS_ADDRESS, 1)] >> 5 & 1),
          (unsigned)(alias_table[index_at(ALIAS_ADDRESS, 1)] >> 6 & 1));
}
