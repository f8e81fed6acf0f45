/* pc-testdev: port latches in all widths, the page flush, memory of its own, interrupt lines through the IOAPIC. */
#include "kut.h"

#define LATCH 0xe0
#define FLUSH 0xe4
#define BYTE_LATCH 0xe8
#define LINES 0x2000
#define MEMORY 0xff000000u
#define APIC 0xfee00000u
#define IOAPIC 0xfec00000u

static volatile uint32_t *mmio(uint32_t address)
{
    return (volatile uint32_t *)(uintptr_t)address;
}

static void latches(void)
{
    outl(LATCH, 0x12345678);
    report(inl(LATCH) == 0x12345678, "latch: 32 bits");
    report(inw(LATCH + 2) == 0x1234 && inb(LATCH + 1) == 0x56, "latch: parts of it");
    outb(LATCH + 3, 0xab);
    outw(LATCH, 0xcdef);
    report(inl(LATCH) == 0xab34cdef, "latch: written in parts");
    report(inb(BYTE_LATCH) == 0xef && inl(BYTE_LATCH) == 0xab34cdef, "latch: by bytes");
}

static void flush(void)
{
    static volatile uint32_t word;
    word = 0xfeedface;
    outl(FLUSH, (uint32_t)(uintptr_t)&word);
    report(word == 0xfeedface, "flush: the page is still there");
}

static void memory(void)
{
    *mmio(MEMORY + 0x100) = 0xdeadbeef;
    *(volatile uint8_t *)mmio(MEMORY + 0x102) = 0x42;
    report(*mmio(MEMORY + 0x100) == 0xde42beef, "memory: read and written");
    *mmio(MEMORY + 0xfffc) = 7;
    report(*mmio(MEMORY + 0xfffc) == 7 && *mmio(MEMORY) == 0, "memory: to its end");
}

/* Raise a line, see the vector pending in the local APIC (interrupts stay off, nothing handles it). */
static bool arrives(uint32_t line, uint32_t vector)
{
    *mmio(IOAPIC) = 0x10 + 2 * line + 1;
    *mmio(IOAPIC + 0x10) = 0; /* to APIC ID 0 */
    *mmio(IOAPIC) = 0x10 + 2 * line;
    *mmio(IOAPIC + 0x10) = vector; /* fixed, edge, active high, unmasked */
    volatile uint32_t *request = mmio(APIC + 0x200 + vector / 32 * 16);
    uint32_t bit = 1u << vector % 32;
    if (*request & bit)
        return false;
    outb((uint16_t)(LINES + line), 1);
    bool came = false;
    for (unsigned i = 0; i < 10000 && !came; i++)
        came = *request & bit;
    outb((uint16_t)(LINES + line), 0);
    return came;
}

int test_main(void)
{
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    *mmio(APIC + 0xf0) = 0x1ff;
    latches();
    flush();
    memory();
    report(arrives(5, 0x45), "lines: 5");
    report(arrives(14, 0x66), "lines: 14");
    return report_summary();
}
