/*
 * Split virtqueues, the device's side (virtio 1.2, 2.7): take chains of descriptors off the available ring as
 * host addresses, give them back on the used ring, and suppress notifications both ways.
 *
 * The ring is memory that a hostile guest changes at any moment, so every word of it is read once, checked, and
 * only the checked copy is used. Whatever is wrong with it becomes a negative pv_queue_result: the device then sets
 * DEVICE_NEEDS_RESET (2.1.2) and the queue hands out nothing more.
 *
 * Not thread-safe: the device's lock is held around every call.
 */
#ifndef PYVMM_VIRTQUEUE_H
#define PYVMM_VIRTQUEUE_H

#include "core.h"

#include <sys/uio.h>

/* Largest queue offered; the specification's limit is 32768 (2.7). Also the descriptors walked in one table. */
#define PV_QUEUE_MAX 1024
/* Segments of a chain: one for each descriptor of the queue and of an indirect table, and one more for each time a
 * buffer runs from one region of RAM into the next. */
#define PV_CHAIN_SEGMENTS (2 * PV_QUEUE_MAX + PV_MAX_REGIONS)

enum pv_queue_result {
	PV_QUEUE_EMPTY = 0,
	PV_QUEUE_TAKEN = 1,
	PV_QUEUE_STOPPED = -1,       /* not configured, or broken before */
	PV_QUEUE_BAD_SIZE = -2,      /* not a power of two, or more than PV_QUEUE_MAX */
	PV_QUEUE_BAD_RING = -3,      /* a part of the ring is misaligned or not inside one region of RAM */
	PV_QUEUE_BAD_INDEX = -4,     /* the available index runs ahead by more buffers than the queue has */
	PV_QUEUE_BAD_HEAD = -5,      /* a chain starts outside the descriptor table */
	PV_QUEUE_BAD_NEXT = -6,      /* a chain goes on outside its table */
	PV_QUEUE_LOOP = -7,          /* a chain is longer than its table */
	PV_QUEUE_BAD_ADDRESS = -8,   /* a buffer is not in RAM */
	PV_QUEUE_BAD_ORDER = -9,     /* a device-readable buffer behind a device-writable one */
	PV_QUEUE_BAD_TABLE = -10,    /* an indirect table that is not negotiated, nested, chained, odd in size, not in RAM */
	PV_QUEUE_TOO_LONG = -11,     /* more than 4 GiB - 1 in a chain, or more segments than there is room for */
	PV_QUEUE_MISUSED = -12,      /* the device gave back what it does not have: a defect of pyvmm's */
};

struct pv_queue {
	struct pv_vm *vm;
	uint16_t size;               /* 0: stopped */
	bool event_idx, indirect;    /* negotiated: VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC */
	bool broken;
	uint16_t next_avail;         /* index of the available entry to take next */
	uint16_t next_used;          /* index of the used entry to fill next */
	uint16_t notified;           /* next_used when the driver's wish for a notification was last looked at */
	const uint8_t *desc, *avail;
	uint8_t *used;
	struct pv_region *used_region;
};

/* A chain: segments[0 .. readable) to read from, segments[readable .. readable + writable) to write to. */
struct pv_chain {
	uint16_t head;               /* of the descriptor table: what identifies the chain on the used ring */
	bool writing;                /* a device-writable buffer was seen */
	uint32_t readable, writable; /* segments; empty buffers have none */
	uint64_t readable_bytes, writable_bytes;
	struct iovec segments[PV_CHAIN_SEGMENTS];
	uint8_t regions[PV_CHAIN_SEGMENTS]; /* index of the region each segment lies in */
};

int pv_queue_start(struct pv_queue *q, struct pv_vm *vm, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used,
		   int event_idx, int indirect);
void pv_queue_stop(struct pv_queue *q);
int pv_queue_pop(struct pv_queue *q, struct pv_chain *chain);
int pv_queue_rewind(struct pv_queue *q, uint16_t count);
int pv_queue_put(struct pv_queue *q, const struct pv_chain *chain, uint16_t ahead, uint32_t written);
int pv_queue_publish(struct pv_queue *q, uint16_t count);
int pv_queue_push(struct pv_queue *q, const struct pv_chain *chain, uint32_t written);
int pv_queue_wants_interrupt(struct pv_queue *q);
int pv_queue_enable_kicks(struct pv_queue *q);
uint16_t pv_queue_available(const struct pv_queue *q);
void pv_queue_disable_kicks(struct pv_queue *q);

uint64_t pv_chain_read(const struct pv_chain *chain, uint64_t offset, void *to, uint64_t n);
uint64_t pv_chain_write(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, const void *from,
			uint64_t n);
void pv_chain_mark(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, uint64_t n);

#endif
