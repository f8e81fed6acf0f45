/* virtio 1.2 over memory-mapped registers, the driver's side: find a device, agree, hand it queues.
 *
 * Section numbers are the specification's. Polled only: no queue asks for interrupts.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define VIRTIO_ID_NET 1
#define VIRTIO_ID_BLOCK 2

#define VIRTIO_F_VERSION_1 (1ull << 32)

/* Offset of QueueNotify (4.2.2): writing a queue's number there is the doorbell. */
#define VIRTIO_QUEUE_NOTIFY 0x50
/* Offset of the device's own configuration space. */
#define VIRTIO_CONFIG 0x100

/* A split virtqueue (2.7): descriptors, what the driver offers, what the device has used. */
struct virtq_desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

#define VIRTQ_DESC_NEXT 1
#define VIRTQ_DESC_WRITE 2 /* for the device to write */

struct virtq_avail {
    uint16_t flags;
    uint16_t index; /* of the next entry; counts modulo 2^16, the ring is a power of two */
    uint16_t ring[];
};

#define VIRTQ_AVAIL_NO_INTERRUPT 1

struct virtq_used {
    uint16_t flags;
    uint16_t index;
    struct {
        uint32_t id;
        uint32_t length;
    } ring[];
};

#define VIRTQ_USED_NO_NOTIFY 1 /* the device needs no doorbell now */

/* Address of the registers of the first device of that kind; 0: there is none. */
uint64_t virtio_find(uint32_t device_id);
/* Reset the device and agree on VERSION_1 and those of `wanted` that it offers, which become *agreed.
 * False: it does not agree. */
bool virtio_negotiate(uint64_t registers, uint64_t wanted, uint64_t *agreed);
/* Hand over queue `index` of `size` entries in zeroed memory. False: the device has no such queue. */
bool virtio_queue(uint64_t registers, uint32_t index, uint32_t size, struct virtq_desc *descriptors,
                  struct virtq_avail *available, struct virtq_used *used);
/* The queues are there, the device may begin. */
void virtio_start(uint64_t registers);
