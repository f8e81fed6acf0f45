/* dirtier: writes a given number of distinct pages per period, for migration to chew on.
 *
 * Live migration copies memory while the guest goes on writing it; whether it ever gets done depends
 * on how fast pages become dirty again. This guest makes that rate a parameter:
 *
 *   pages=256    distinct 4 KiB pages written in each round
 *   period=100   milliseconds from one round to the next
 *   rounds=5     how many rounds; 0 is for ever
 *   stride=1     pages from one that is written to the next
 *   work=0       thousands of turns of an empty loop in each round: a guest that computes, too
 *
 * Each round prints a line with the time the writing took: it grows when the host logs dirty pages.
 * Every page carries a stamp that the next round checks, so memory lost on the way is noticed.
 *
 * This half is the kernel: it keeps the time (APIC timer), prints, and serves user.c, which writes.
 */
#include <stdint.h>

#include "apic.h"
#include "calls.h"
#include "cpu.h"
#include "ending.h"
#include "idt.h"
#include "multiboot.h"
#include "print.h"
#include "serial.h"
#include "user_mode.h"

#define TIMER_VECTOR 0x40
#define PAGE_SIZE 4096ull
#define MIB 0x100000ull
/* Above the user program, which has 4 to 6 MiB to itself. */
#define FIRST_PAGE (8 * MIB)
/* The boot page tables make the first 3 GiB ordinary memory. */
#define MAPPED_END (3072 * MIB)
#define MAX_PERIOD_MS 10000

extern char user_start[], user_stack_top[];
extern void user_main(uint64_t job);

/* In the user's page: user.c reads it. */
__attribute__((section(".user_data"))) static struct job job;

static uint64_t pages;
static struct clock_rates rates;
static volatile uint64_t periods; /* that have passed since the start */
static uint64_t periods_served;

static void on_tick(struct interrupt_frame *frame)
{
    (void)frame;
    periods++;
    apic_end_of_interrupt();
}

static void on_call(struct interrupt_frame *frame)
{
    switch (frame->rax) {
    case CALL_ROUND_DONE: {
        uint64_t microseconds = frame->rsi * 1000 / rates.tsc_per_ms;
        uint64_t late = periods - periods_served; /* periods that ended while we were writing */
        print("round %lu: %lu pages in %lu us", frame->rdi, pages, microseconds);
        if (late)
            print(", late by %lu", late);
        print("\n");
        /* The period is the timer's, so time spent here and in the loop does not add to it. A round
         * that was late starts the next at once and does not try to catch up. */
        if (!late)
            while (periods == periods_served)
                sleep_until_interrupt();
        periods_served = periods;
        return;
    }
    case CALL_CORRUPT:
        print("page %lu does not hold what round %lu wrote: 0x%lx\n", frame->rdi, frame->rsi,
              frame->rdx);
        debug_exit(2);
    case CALL_END:
        apic_timer_stop();
        print("done\n");
        halt_forever();
    default:
        print("no such call: %lu\n", frame->rax);
        debug_exit(1);
    }
}

static void refuse(const char *why)
{
    print("dirtier: %s\n", why);
    debug_exit(1);
}

void guest_main(const struct multiboot_info *info)
{
    serial_init();
    idt_init();
    idt_set(TIMER_VECTOR, on_tick, false);
    idt_set(USER_CALL_VECTOR, on_call, true);
    pic_mask_all();
    apic_enable();
    tss_load();

    uint64_t period, rounds, stride, work;
    if (!multiboot_option(info, "pages", 256, &pages) ||
        !multiboot_option(info, "period", 100, &period) ||
        !multiboot_option(info, "rounds", 5, &rounds) ||
        !multiboot_option(info, "stride", 1, &stride) ||
        !multiboot_option(info, "work", 0, &work))
        refuse("pages=, period=, rounds=, stride= and work= take numbers of up to nine digits");
    if (stride == 0)
        refuse("stride= must be 1 or more");
    if (period == 0 || period > MAX_PERIOD_MS)
        refuse("period= must be 1 to 10000 ms");
    if (!(info->flags & MULTIBOOT_HAS_MEMORY))
        refuse("the loader does not say how much memory there is");
    uint64_t end = MIB + info->memory_upper_kib * 1024ull;
    if (end > MAPPED_END)
        end = MAPPED_END;
    uint64_t most = end > FIRST_PAGE ? (end - FIRST_PAGE) / PAGE_SIZE : 0;
    if (pages == 0 || pages > most / stride) {
        print("dirtier: pages= must be 1 to %lu in this much memory\n", most / stride);
        debug_exit(1);
    }
    if (!apic_measure(&rates))
        refuse("the PIT does not count, nothing to measure with");

    job = (struct job){FIRST_PAGE, pages, rounds, stride, work};
    allow_user((uint64_t)user_start, 2 * MIB);
    allow_user(FIRST_PAGE, pages * stride * PAGE_SIZE);

    print("%lu pages every %lu ms, ", pages, period);
    if (stride > 1)
        print("each %lu pages from the last, ", stride);
    if (rounds)
        print("%lu rounds\n", rounds);
    else
        print("for ever\n");
    apic_timer_periodic(TIMER_VECTOR, (uint32_t)(rates.apic_per_ms * period));
    enter_user_mode(user_main, (uint64_t)user_stack_top, (uint64_t)&job);
}
