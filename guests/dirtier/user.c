/* dirtier, the part that writes. It runs in user mode.
 *
 * Not for protection: on a host that emulates CPL 0 one instruction at a time, 64-bit CPL 3 is what
 * runs at the speed of the CPU, so the rate is kept on every kind of host.
 */
#include "calls.h"
#include "user_mode.h"

#define PAGE_SIZE 4096

static void call(uint64_t number, uint64_t a, uint64_t b, uint64_t c)
{
    __asm__ volatile("int %1" : "+a"(number) : "i"(USER_CALL_VECTOR), "D"(a), "S"(b), "d"(c)
                     : "memory");
}

static uint64_t time_stamp(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* What page `index` holds after `round`: different for every page and every round, so a page that
 * is stale, or in another's place, gives itself away. The multiplier spreads the bits. */
static uint64_t stamp(uint64_t round, uint64_t index)
{
    return (round << 32 | index) * 0x9e3779b97f4a7c15ull;
}

void user_main(uint64_t argument)
{
    const struct job *job = (const struct job *)argument;
    for (uint64_t round = 1; job->rounds == 0 || round <= job->rounds; round++) {
        uint64_t started = time_stamp();
        for (uint64_t index = 0; index < job->pages; index++) {
            uint64_t page = job->first_page + index * job->stride * PAGE_SIZE;
            volatile uint64_t *word = (volatile uint64_t *)page;
            /* Is the last round's stamp still there? After a migration this is the proof, from
             * inside, that every page arrived in its last state. */
            uint64_t found = *word;
            if (round > 1 && found != stamp(round - 1, index))
                call(CALL_CORRUPT, index, round - 1, found);
            *word = stamp(round, index); /* one store dirties the whole page */
        }
        for (uint64_t turn = 0; turn < job->work * 1000; turn++)
            __asm__ volatile("");
        call(CALL_ROUND_DONE, round, time_stamp() - started, 0);
    }
    call(CALL_END, 0, 0, 0);
    for (;;)
        ;
}
