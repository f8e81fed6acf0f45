/* disk-reader: a disk's driver, in the smallest form that is still of use.
 *
 *   size=4096      bytes of a request, whole sectors up to 65536
 *   depth=1        requests in flight, up to 64
 *   requests=64    how many; they go through the disk from its start, and start over at its end
 *   write=0        1: first write as many, then flush, then read
 *   verify=0       1: each sector must begin with its own number (that is what write=1 puts there)
 *   journal=0      write, flush and tell one number after the other, for ever; so many thousand turns of a
 *                  loop apart. The disk is zeros at first, size=512. For who looks whether any is lost.
 *
 * "begin" and "end" lines are for whoever takes the time.
 *
 * This half sets the disk up; user.c, in user mode, does all the rest.
 */
#include <stdint.h>

#include "apic.h"
#include "calls.h"
#include "ending.h"
#include "idt.h"
#include "multiboot.h"
#include "print.h"
#include "serial.h"
#include "user_mode.h"

#define F_RO (1ull << 5)
#define F_FLUSH (1ull << 9)
#define LARGE_PAGE 0x200000ull
/* Plain memory above the user program, zeroed by the loader as all of it. */
#define RING 0x800000ull
#define HEADERS 0x810000ull
#define BUFFERS 0xa00000ull

extern char user_start[], user_stack_top[];
extern void user_main(uint64_t job);

/* In the user's page: user.c reads it. */
__attribute__((section(".user_data"))) static struct job job;

static _Noreturn void refuse(const char *why)
{
    print("disk-reader: %s\n", why);
    debug_exit(1);
}

static void on_call(struct interrupt_frame *frame)
{
    switch (frame->rax) {
    case CALL_BEGIN:
        print("begin %s\n", frame->rdi ? "writing" : "reading");
        return;
    case CALL_END:
        print("end %lu\n", frame->rdi);
        return;
    case CALL_DONE:
        print("done\n");
        debug_exit(0x10);
    case CALL_WROTE:
        print("wrote %lu\n", frame->rdi);
        return;
    case CALL_LOST:
        print("disk-reader: %lu finds %lu in its place\n", frame->rdi, frame->rsi);
        debug_exit(4);
    case CALL_STATUS:
        print("disk-reader: sector %lu: status %lu\n", frame->rdi, frame->rsi);
        debug_exit(2);
    case CALL_WRONG:
        print("disk-reader: sector %lu holds what belongs to %lu\n", frame->rdi, frame->rsi);
        debug_exit(3);
    default:
        refuse("the disk does not answer");
    }
}

void guest_main(const struct multiboot_info *info)
{
    serial_init();
    idt_init();
    idt_set(USER_CALL_VECTOR, on_call, true);
    pic_mask_all();
    tss_load();

    if (!multiboot_option(info, "size", 4096, &job.size) ||
        !multiboot_option(info, "depth", 1, &job.depth) ||
        !multiboot_option(info, "requests", 64, &job.requests) ||
        !multiboot_option(info, "write", 0, &job.write) ||
        !multiboot_option(info, "verify", 0, &job.verify) ||
        !multiboot_option(info, "journal", 0, &job.journal))
        refuse("options take numbers of up to nine digits");
    if (!job.size || job.size % SECTOR || job.size > ROOM)
        refuse("size= must be whole sectors up to 65536");
    if (!job.depth || job.depth > DEPTH_MAX || !job.requests)
        refuse("depth= must be 1 to 64, requests= at least 1");
    job.registers = virtio_find(VIRTIO_ID_BLOCK);
    if (!job.registers)
        refuse("no virtio-blk device; give me one");
    uint64_t agreed;
    if (!virtio_negotiate(job.registers, F_RO | F_FLUSH, &agreed))
        refuse("the device does not agree");
    if ((job.write || job.journal) && (agreed & F_RO))
        refuse("the disk is read-only");
    volatile uint32_t *capacity = (volatile uint32_t *)(job.registers + VIRTIO_CONFIG);
    job.capacity = capacity[0] | (uint64_t)capacity[1] << 32;
    if (job.capacity < job.size / SECTOR)
        refuse("the disk is smaller than a request");

    job.descriptors = (struct virtq_desc *)RING;
    job.available = (volatile struct virtq_avail *)(RING + 0x2000);
    job.used = (volatile struct virtq_used *)(RING + 0x4000);
    job.headers = (uint8_t *)HEADERS;
    job.buffers = (uint8_t *)BUFFERS;
    if (!virtio_queue(job.registers, 0, ENTRIES, job.descriptors, (struct virtq_avail *)job.available,
                      (struct virtq_used *)job.used))
        refuse("the device lacks a queue");
    virtio_start(job.registers);

    allow_user((uint64_t)user_start, LARGE_PAGE);
    allow_user(RING, LARGE_PAGE);
    allow_user(BUFFERS, DEPTH_MAX * ROOM);
    allow_user(job.registers, VIRTIO_CONFIG);
    print("disk-reader: %lu sectors\n", job.capacity);
    enter_user_mode(user_main, (uint64_t)user_stack_top, (uint64_t)&job);
}
