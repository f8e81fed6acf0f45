/* smp: waking the other CPUs.
 *
 * After reset one CPU runs; the others wait to be told. The boot CPU learns from the MP table who
 * they are, sends each INIT and a start-up message, and waits - with a deadline, as a CPU that does
 * not come up must not hang the machine. Then all work at once, which needs two things that one CPU
 * alone never did: a lock for what cannot be shared (the serial port), and indivisible instructions
 * for what can (a counter).
 */
#include <stdint.h>

#include "apic.h"
#include "cpu.h"
#include "ending.h"
#include "idt.h"
#include "mp_table.h"
#include "pit.h"
#include "print.h"
#include "serial.h"

/* Any free page below 1 MiB; its number is the SIPI's vector. The loader's tables lie lower, the
 * EBDA higher. */
#define TRAMPOLINE 0x60000
#define ADDITIONS 100
#define DEADLINE_MS 3000

extern const char trampoline[], trampoline_end[];

static struct cpu_list cpus;
static uint32_t serial_lock;
static uint32_t up;      /* APs that have printed */
static uint32_t go;      /* set when all may start to count */
static uint32_t counter;
static uint32_t counted; /* CPUs that have finished counting */

/* XCHG with memory locks the bus (or the cache line) by itself: SDM vol. 3A, "Locked Atomic
 * Operations". Who gets the 0 back has the lock. */
static void lock(uint32_t *word)
{
    while (__atomic_exchange_n(word, 1, __ATOMIC_ACQUIRE))
        while (__atomic_load_n(word, __ATOMIC_RELAXED)) /* wait reading: it disturbs others less */
            pause();
}

static void unlock(uint32_t *word)
{
    /* A plain store is enough on x86: stores are not moved before earlier loads and stores (SDM vol.
     * 3A, "Memory Ordering in P6 and More Recent Processor Families"). */
    __atomic_store_n(word, 0, __ATOMIC_RELEASE);
}

static void count(void)
{
    for (unsigned i = 0; i < ADDITIONS; i++)
        __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); /* "counter++" would lose some */
    __atomic_fetch_add(&counted, 1, __ATOMIC_RELEASE);
}

/* Called by trampoline.S on each AP, with a stack of its own. Returning halts the AP. */
void ap_main(void)
{
    idt_load(); /* IDTR is per CPU; a fault here shall be reported, not be a triple fault */
    lock(&serial_lock);
    print("APIC ID %u is up\n", apic_id());
    unlock(&serial_lock);
    __atomic_fetch_add(&up, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&go, __ATOMIC_ACQUIRE))
        pause();
    count();
}

/* Wait until *word reaches `wanted`, looking once a millisecond. */
static bool reaches(const uint32_t *word, uint32_t wanted)
{
    for (unsigned ms = 0; ms < DEADLINE_MS; ms++) {
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) == wanted)
            return true;
        pit_start(1);
        if (!pit_wait())
            return false;
    }
    return false;
}

static _Noreturn void fail(const char *why, uint32_t got, uint32_t wanted)
{
    lock(&serial_lock);
    print("%s: %u of %u\n", why, got, wanted);
    unlock(&serial_lock);
    debug_exit(1);
}

/* MP Specification 1.4, appendix B.4: INIT, 10 ms, SIPI, 200 us, SIPI again. The second is for APs
 * that missed the first; one that runs already ignores it. */
static void start(uint32_t id)
{
    bool sent = apic_send_init(id);
    pit_start(10);
    sent = sent && pit_wait();
    sent = sent && apic_send_startup(id, TRAMPOLINE >> 12);
    pit_start(1);
    sent = sent && pit_wait();
    sent = sent && apic_send_startup(id, TRAMPOLINE >> 12);
    if (!sent)
        fail("could not send to APIC ID", id, cpus.count);
}

void guest_main(void)
{
    serial_init();
    idt_init();
    pic_mask_all();
    apic_enable();

    const char *problem = mp_table_read(&cpus);
    if (problem) {
        print("cannot find the CPUs: %s\n", problem);
        debug_exit(1);
    }
    uint32_t self = apic_id();
    print("%u CPUs in the MP table, this is APIC ID %u, %s\n", cpus.count, self,
          self == cpus.boot_apic_id ? "the boot CPU" : "not the boot CPU?");

    const char *from = trampoline;
    char *to = (char *)TRAMPOLINE;
    uint64_t length = (uint64_t)(trampoline_end - trampoline);
    __asm__ volatile("rep movsb" : "+S"(from), "+D"(to), "+c"(length) : : "memory");

    for (unsigned i = 0; i < cpus.count; i++)
        if (cpus.apic_ids[i] != self)
            start(cpus.apic_ids[i]);
    if (!reaches(&up, cpus.count - 1))
        fail("CPUs that came up", up + 1, cpus.count);

    lock(&serial_lock);
    print("all %u CPUs are up\n", cpus.count);
    unlock(&serial_lock);

    __atomic_store_n(&go, 1, __ATOMIC_RELEASE);
    count();
    if (!reaches(&counted, cpus.count))
        fail("CPUs that finished", counted, cpus.count);
    if (counter != cpus.count * ADDITIONS)
        fail("additions that were not lost", counter, cpus.count * ADDITIONS);
    print("%u additions by %u CPUs, none lost\n", counter, cpus.count);
}
