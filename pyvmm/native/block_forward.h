/*
 * What a protected guest writes to a disk, once more, for the secondary: records in the order in which the image got
 * them (block/write_log.py has their format).
 *
 * Two writes that overlap must not be in one order in the image and in the other here. So one lock is held around each
 * write to the image and the record of it; a protected disk writes one thing at a time. Each write goes to the image
 * from the record's copy: the guest may change its buffer meanwhile.
 *
 * A copy of the whole disk (pv_forward_copy) goes the same way, piece by piece, while the guest writes: a piece and a
 * write to the same place have one order here, too.
 *
 * Nobody waits for ever for room: a queue that stays full is a problem, which pv_forward_take() tells, and from then
 * on nothing is recorded. The guest's writes go on.
 *
 * A flush is not recorded: nothing of an epoch counts at the secondary before its marker, which makes all of it durable.
 */
#ifndef PYVMM_BLOCK_FORWARD_H
#define PYVMM_BLOCK_FORWARD_H

#include "block_image.h"

#include <pthread.h>

#define PV_FORWARD_DATA (1u << 20)       /* bytes of one record's data, at most */
enum { PV_FORWARD_WRITE = 1, PV_FORWARD_ZERO = 2, PV_FORWARD_MARKER = 4 };

struct pv_forward_record {
	struct pv_forward_record *next;
	uint32_t size;                   /* of `bytes` */
	uint8_t bytes[];
};

struct pv_forward {
	pthread_mutex_t lock;            /* of all below, and of the order of writes */
	pthread_cond_t room;
	_Atomic bool active;
	int event;                       /* eventfd: there is something to take, or a problem. The caller's */
	uint64_t epoch;                  /* that records belong to */
	uint64_t queued, limit;          /* bytes */
	uint32_t timeout_ms;             /* for room */
	int problem;                     /* errno */
	struct pv_forward_record *first, **end;
};

void pv_forward_init(struct pv_forward *f);
void pv_forward_destroy(struct pv_forward *f);
/* No request is in flight. Records are of `epoch` until a marker ends it. */
void pv_forward_begin(struct pv_forward *f, int event, uint64_t epoch, uint64_t limit, uint32_t timeout_ms);
/* Nothing is recorded any more; who waits for room goes on. */
void pv_forward_end(struct pv_forward *f);
/* Epoch `epoch` ends here, the next begins. No request is in flight. 0, or the problem's errno, negative. */
int pv_forward_mark(struct pv_forward *f, uint64_t epoch);
/* Whole records into `buffer`, which has room for the largest: bytes, 0 if there is none now, -errno: the problem. */
int64_t pv_forward_take(struct pv_forward *f, uint8_t *buffer, uint64_t size);
/* Record what is at `offset` of the image; at most PV_FORWARD_DATA bytes. 0 or -errno. */
int pv_forward_copy(struct pv_forward *f, struct pv_block_image *image, uint64_t offset, uint64_t n);

/* Instead of pv_image_write(), pv_image_zero() and pv_image_discard() while it is active. */
int pv_forward_write(struct pv_forward *f, struct pv_block_image *image, struct pv_transfer *t);
int pv_forward_zero(struct pv_forward *f, struct pv_block_image *image, uint64_t offset, uint64_t n, bool unmap);

#endif
