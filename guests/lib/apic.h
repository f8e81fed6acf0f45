/* The local APIC of the CPU that runs the code: its ID, its timer, interrupts between CPUs. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

/* How fast the two clocks without a fixed frequency run, measured against the PIT. */
struct clock_rates {
    uint64_t apic_per_ms; /* timer counts (after the divider) */
    uint64_t tsc_per_ms;
};

/* Mask the two old PICs, so that only what the guest sets up can interrupt. */
void pic_mask_all(void);

void apic_enable(void);
uint32_t apic_id(void);
/* "I have handled it": until then, nothing of the same or lower priority is delivered. */
void apic_end_of_interrupt(void);

/* False: no PIT to measure against. */
bool apic_measure(struct clock_rates *rates);
/* Raise `vector` every `counts` timer counts. */
void apic_timer_periodic(uint8_t vector, uint32_t counts);
void apic_timer_stop(void);

/* Both return false if the APIC never reports the message as sent. */
bool apic_send_init(uint32_t target_id);
/* Start in real mode at physical page << 12, which must be below 1 MiB. */
bool apic_send_startup(uint32_t target_id, uint8_t page);
