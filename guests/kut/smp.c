/* Other CPUs: counted by fw_cfg, started by INIT and SIPI to all, vector 0, so they begin at address 0. */
#include "kut.h"

#define APIC 0xfee00000u
#define ICR_INIT_ALL 0xc4500u  /* all but self, assert, INIT */
#define ICR_START_ALL 0xc4600u /* all but self, start-up, vector 0 */
#define POLLS 200000u

extern const char trampoline[], trampoline_end[];

static uint32_t up;

static volatile uint32_t *apic(unsigned offset)
{
    return (volatile uint32_t *)(uintptr_t)(APIC + offset);
}

/* Called on each of the others, with a stack of its own. */
void ap_main(void)
{
    __atomic_fetch_add(&up, 1, __ATOMIC_RELEASE);
}

int test_main(void)
{
    uint32_t cpus = (uint32_t)fw_cfg(FW_CFG_CPUS, 2);
    say("INFO: ");
    say_number(cpus);
    say(" CPUs\n");
    /* The zero is hidden from the compiler, which would take address 0 for a mistake. */
    uintptr_t zero;
    __asm__("xor %0, %0" : "=r"(zero));
    volatile char *to = (volatile char *)zero;
    for (const char *from = trampoline; from < trampoline_end; from++)
        *to++ = *from;
    *apic(0xf0) = 0x1ff; /* enabled by software */
    *apic(0x310) = 0;
    *apic(0x300) = ICR_INIT_ALL;
    for (unsigned i = 0; i < 100; i++)
        inb(0x3fd); /* 10 ms on old hardware; an emulated one needs none */
    *apic(0x300) = ICR_START_ALL;
    for (uint32_t polls = 0; polls < POLLS && __atomic_load_n(&up, __ATOMIC_ACQUIRE) < cpus - 1; polls++)
        inb(0x3fd); /* an exit, so that others get a turn */
    report(__atomic_load_n(&up, __ATOMIC_ACQUIRE) == cpus - 1, "every other CPU came up from vector 0");
    report(*apic(0x20) >> 24 == 0, "the boot CPU has APIC ID 0");
    if (cpus == 1)
        report_skip("with other CPUs");
    else
        report(true, "with other CPUs");
    return report_summary();
}
