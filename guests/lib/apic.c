/* Source: SDM vol. 3A, "Advanced Programmable Interrupt Controller (APIC)". */
#include "apic.h"

#include "cpu.h"
#include "pit.h"

/* SDM vol. 3A, "The Local APIC Block Diagram": table of the register addresses. It is the same
 * address on every CPU; each sees its own APIC there. */
#define APIC_BASE 0xfee00000ull
#define REG_ID 0x020
#define REG_EOI 0x0b0
#define REG_SPURIOUS 0x0f0
#define REG_ICR_LOW 0x300
#define REG_ICR_HIGH 0x310
#define REG_LVT_TIMER 0x320
#define REG_TIMER_INITIAL 0x380
#define REG_TIMER_CURRENT 0x390
#define REG_TIMER_DIVIDE 0x3e0

#define SPURIOUS_ENABLE (1u << 8)
#define SPURIOUS_VECTOR 0xff
#define LVT_MASKED (1u << 16)
#define LVT_PERIODIC (1u << 17)
#define DIVIDE_BY_16 0x3

#define ICR_INIT 0x500u
#define ICR_STARTUP 0x600u
#define ICR_PENDING (1u << 12)
#define ICR_ASSERT (1u << 14)

#define PIC_MASTER_DATA 0x21
#define PIC_SLAVE_DATA 0xa1

#define MEASURE_MS 10
#define POLL_LIMIT 10000

/* volatile: each access is an event in the device, none may be merged, moved or left out. Always
 * 32 bits wide, at 16-byte steps: the SDM leaves other accesses undefined. */
static volatile uint32_t *reg(unsigned offset)
{
    return (volatile uint32_t *)(APIC_BASE + offset);
}

void pic_mask_all(void)
{
    outb(PIC_MASTER_DATA, 0xff);
    outb(PIC_SLAVE_DATA, 0xff);
}

void apic_enable(void)
{
    /* After reset the APIC is there but disabled by software: no interrupt is delivered until this
     * bit is set (SDM vol. 3A, "Local APIC State After It Has Been Software Disabled"). */
    *reg(REG_SPURIOUS) = SPURIOUS_ENABLE | SPURIOUS_VECTOR;
}

uint32_t apic_id(void)
{
    return *reg(REG_ID) >> 24;
}

void apic_end_of_interrupt(void)
{
    *reg(REG_EOI) = 0;
}

bool apic_measure(struct clock_rates *rates)
{
    /* Masked and one-shot: counts down from the top, nothing happens at zero. */
    *reg(REG_TIMER_DIVIDE) = DIVIDE_BY_16;
    *reg(REG_LVT_TIMER) = LVT_MASKED;

    pit_start(MEASURE_MS);
    *reg(REG_TIMER_INITIAL) = 0xffffffff;
    uint64_t tsc = rdtsc();
    bool ended = pit_wait();
    rates->apic_per_ms = (0xffffffff - *reg(REG_TIMER_CURRENT)) / MEASURE_MS;
    rates->tsc_per_ms = (rdtsc() - tsc) / MEASURE_MS;
    apic_timer_stop();
    return ended && rates->apic_per_ms && rates->tsc_per_ms;
}

void apic_timer_periodic(uint8_t vector, uint32_t counts)
{
    *reg(REG_TIMER_DIVIDE) = DIVIDE_BY_16;
    *reg(REG_LVT_TIMER) = LVT_PERIODIC | vector;
    *reg(REG_TIMER_INITIAL) = counts; /* this write starts it, so it comes last */
}

void apic_timer_stop(void)
{
    *reg(REG_LVT_TIMER) = LVT_MASKED;
    *reg(REG_TIMER_INITIAL) = 0;
}

/* SDM vol. 3A, "Issuing Interprocessor Interrupts". */
static bool send(uint32_t target_id, uint32_t command)
{
    *reg(REG_ICR_HIGH) = target_id << 24;
    *reg(REG_ICR_LOW) = command; /* the write of the low half sends */
    for (unsigned polls = 0; polls < POLL_LIMIT; polls++) {
        if (!(*reg(REG_ICR_LOW) & ICR_PENDING))
            return true;
        pause();
    }
    return false;
}

bool apic_send_init(uint32_t target_id)
{
    return send(target_id, ICR_INIT | ICR_ASSERT);
}

bool apic_send_startup(uint32_t target_id, uint8_t page)
{
    return send(target_id, ICR_STARTUP | ICR_ASSERT | page);
}
