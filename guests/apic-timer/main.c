/* apic-timer: interrupts, from the table to the tick.
 *
 * Four things must be in place before a timer can interrupt a 64-bit CPU:
 *   1. an IDT with a gate for the vector               (lib/idt.c, lib/vectors.S)
 *   2. nobody else who interrupts: the old PICs masked
 *   3. the local APIC enabled, its timer told the vector and the count
 *   4. IF set in RFLAGS - here only ever together with HLT
 * How long a count takes is not written anywhere, so it is measured against the PIT first.
 */
#include <stdint.h>

#include "apic.h"
#include "cpu.h"
#include "ending.h"
#include "idt.h"
#include "multiboot.h"
#include "print.h"
#include "serial.h"

/* Below 0x20 are the exceptions; above, any will do. The upper four bits are its priority class
 * (SDM vol. 3A, "Interrupt, Task, and Processor Priority"). */
#define TIMER_VECTOR 0x40
#define TICK_MS 20
#define TICKS 5

/* Written by the handler, read by the loop: volatile, or the compiler may read it only once. */
static volatile unsigned ticks;

static void on_tick(struct interrupt_frame *frame)
{
    (void)frame;
    ticks++;
    /* Without it the APIC considers the tick "in service" and delivers no other of its class. */
    apic_end_of_interrupt();
}

void guest_main(const struct multiboot_info *info)
{
    (void)info;
    serial_init();
    idt_init();
    idt_set(TIMER_VECTOR, on_tick, false);

    /* The PICs of 1981 come out of reset with vectors 0-15, on top of the exceptions: a tick of
     * theirs would look like #DF. */
    pic_mask_all();
    apic_enable();

    struct clock_rates rates;
    if (!apic_measure(&rates)) {
        print("the PIT does not count, nothing to measure with\n");
        debug_exit(1);
    }
    print("APIC timer: %lu counts per ms\n", rates.apic_per_ms);

    apic_timer_periodic(TIMER_VECTOR, (uint32_t)(rates.apic_per_ms * TICK_MS));
    unsigned seen = 0;
    uint64_t started = rdtsc();
    while (seen < TICKS) {
        /* Checked with interrupts off and slept in one step with switching them on, so no tick can
         * be missed between "not yet" and "sleep": see cpu.h. */
        while (ticks == seen)
            sleep_until_interrupt();
        seen++;
        print("tick %u\n", seen);
    }
    uint64_t elapsed = (rdtsc() - started) / rates.tsc_per_ms;
    apic_timer_stop();

    /* Printing takes time too, but the timer does not wait for it: the period holds. Two clocks
     * agree if the ticks took what they should by the TSC; hosts are busy, so not too strictly. */
    bool plausible = elapsed >= (TICKS - 1) * TICK_MS * 9 / 10;
    print("%u ticks of %u ms: %s\n", TICKS, TICK_MS,
          plausible ? "the TSC agrees" : "too early by the TSC");
    if (!plausible)
        debug_exit(1);
}
