/* disk-reader, the part that drives the disk. It runs in user mode, which every host runs at full speed.
 *
 * Request n of those in flight has descriptors 3n to 3n + 2 for good: header, data, status (5.2.6). What
 * changes from one use to the next is the sector, and the directions for writing.
 */
#include <stdbool.h>

#include "calls.h"
#include "user_mode.h"

#define TYPE_IN 0
#define TYPE_OUT 1
#define TYPE_FLUSH 4
#define HEADER_SIZE 16u
#define HEADER_ROOM 32u
#define SPIN_LIMIT 4000000000ul

struct header {
    uint32_t type, reserved;
    uint64_t sector;
    uint8_t status;
};

static struct job *job;
static uint16_t offered, taken;
static uint64_t next_sector;

static void call(uint64_t number, uint64_t a, uint64_t b)
{
    __asm__ volatile("int %1" : "+a"(number) : "i"(USER_CALL_VECTOR), "D"(a), "S"(b) : "memory");
}

static void order(void)
{
    __asm__ volatile("mfence" : : : "memory");
}

static struct header *header_of(uint64_t slot)
{
    return (struct header *)(job->headers + slot * HEADER_ROOM);
}

static uint64_t *sector_of(uint64_t slot, uint64_t n)
{
    return (uint64_t *)(job->buffers + slot * ROOM + n * SECTOR);
}

static void prepare(uint64_t slot, uint32_t type)
{
    struct virtq_desc *d = job->descriptors + 3 * slot;
    uint64_t header = (uint64_t)header_of(slot);
    uint16_t head = (uint16_t)(3 * slot);
    header_of(slot)->type = type;
    d[0] = (struct virtq_desc){header, HEADER_SIZE, VIRTQ_DESC_NEXT, (uint16_t)(type == TYPE_FLUSH ? head + 2 : head + 1)};
    d[1] = (struct virtq_desc){(uint64_t)sector_of(slot, 0), (uint32_t)job->size,
                               (uint16_t)(VIRTQ_DESC_NEXT | (type == TYPE_IN ? VIRTQ_DESC_WRITE : 0)), (uint16_t)(head + 2)};
    d[2] = (struct virtq_desc){header + HEADER_SIZE, 1, VIRTQ_DESC_WRITE, 0};
}

/* Put a request on the available ring (2.7.13); the doorbell is the caller's. */
static void offer(uint64_t slot)
{
    struct header *header = header_of(slot);
    uint64_t sectors = job->size / SECTOR;
    header->sector = header->type == TYPE_FLUSH ? 0 : next_sector;
    header->status = 0xff;
    if (header->type == TYPE_OUT && !job->journal)
        for (uint64_t n = 0; n < sectors; n++)
            *sector_of(slot, n) = next_sector + n;
    next_sector += sectors;
    if (next_sector + sectors > job->capacity)
        next_sector = 0;
    job->available->ring[offered % ENTRIES] = (uint16_t)(3 * slot);
    __asm__ volatile("" : : : "memory");
    job->available->index = ++offered;
}

static void ring(void)
{
    order(); /* 2.7.13.3: the index before the look at the flags */
    if (!(job->used->flags & VIRTQ_USED_NO_NOTIFY))
        *(volatile uint32_t *)(job->registers + VIRTIO_QUEUE_NOTIFY) = 0;
}

/* Wait for a request to come back; its slot. */
static uint64_t collect(void)
{
    for (uint64_t spins = 0; job->used->index == taken; spins++) {
        if (spins == SPIN_LIMIT)
            call(CALL_SILENT, 0, 0);
        __asm__ volatile("pause" : : : "memory");
    }
    __asm__ volatile("" : : : "memory");
    uint64_t slot = job->used->ring[taken++ % ENTRIES].id / 3;
    struct header *header = header_of(slot);
    if (header->status)
        call(CALL_STATUS, header->sector, header->status);
    if (header->type == TYPE_IN && job->verify)
        for (uint64_t n = 0; n < job->size / SECTOR; n++)
            if (*sector_of(slot, n) != header->sector + n)
                call(CALL_WRONG, header->sector + n, *sector_of(slot, n));
    return slot;
}

static void run(uint32_t type)
{
    uint64_t in_flight = job->depth < job->requests ? job->depth : job->requests;
    next_sector = 0;
    for (uint64_t slot = 0; slot < in_flight; slot++)
        prepare(slot, type);
    call(CALL_BEGIN, type == TYPE_OUT, 0);
    for (uint64_t slot = 0; slot < in_flight; slot++)
        offer(slot);
    ring();
    for (uint64_t begun = in_flight, ended = 0; ended < job->requests;) {
        /* All that have come back go out again behind one doorbell. */
        bool any = false;
        do {
            uint64_t slot = collect();
            ended++;
            if (begun < job->requests) {
                offer(slot);
                begun++;
                any = true;
            }
        } while (job->used->index != taken);
        if (any)
            ring();
    }
    call(CALL_END, job->requests, 0);
}

static void ask(uint32_t type, uint64_t sector)
{
    prepare(0, type);
    next_sector = sector;
    offer(0);
    ring();
    collect();
}

/* Numbers without end: each goes to the disk, is flushed, and is told. The one in whose place it comes
 * must be there still. */
static void keep_journal(void)
{
    for (uint64_t number = 1;; number++) {
        uint64_t sector = number % job->capacity;
        ask(TYPE_IN, sector);
        uint64_t found = *sector_of(0, 0);
        if (found != (number > job->capacity ? number - job->capacity : 0))
            call(CALL_LOST, number, found);
        *sector_of(0, 0) = number;
        ask(TYPE_OUT, sector);
        ask(TYPE_FLUSH, 0);
        call(CALL_WROTE, number, 0);
        for (uint64_t turn = 0; turn < job->journal * 1000; turn++)
            __asm__ volatile("pause");
    }
}

void user_main(uint64_t argument)
{
    job = (struct job *)argument;
    if (job->journal)
        keep_journal();
    if (job->write) {
        run(TYPE_OUT);
        prepare(0, TYPE_FLUSH);
        offer(0);
        ring();
        collect();
    }
    run(TYPE_IN);
    call(CALL_DONE, 0, 0);
}
