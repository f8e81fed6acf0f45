/*
 * The data path of a block device (virtio 1.2, 5.2): requests off one queue, carried out by a few threads.
 *
 * At most one of the threads leads: it takes chains and waits for the doorbell. What the page cache can answer it does
 * itself, which is a request without any change of threads. Before an operation that may take a while it gives the
 * lead to another one, so that other requests pass by (5.2.6 lets them complete in any order).
 *
 * `lock` is held around every use of the queue and never during I/O.
 */
#ifndef PYVMM_BLOCK_DEVICE_H
#define PYVMM_BLOCK_DEVICE_H

#include "block_forward.h"
#include "block_image.h"
#include "virtio_interrupt.h"
#include "virtqueue.h"

#include <pthread.h>

/* 5.2.6: request types and status */
#define PV_BLOCK_T_IN 0u
#define PV_BLOCK_T_OUT 1u
#define PV_BLOCK_T_FLUSH 4u
#define PV_BLOCK_T_GET_ID 8u
#define PV_BLOCK_T_DISCARD 11u
#define PV_BLOCK_T_WRITE_ZEROES 13u
#define PV_BLOCK_S_OK 0
#define PV_BLOCK_S_IOERR 1
#define PV_BLOCK_S_UNSUPP 2

#define PV_BLOCK_ID_SIZE 20u
#define PV_BLOCK_RANGES 16u              /* max_discard_seg, max_write_zeroes_seg */
#define PV_BLOCK_RANGE_SECTORS 0x400000u /* 2 GiB: max_discard_sectors, max_write_zeroes_sectors */

/* Kinds of requests, as counted */
enum {
	PV_BLOCK_READS, PV_BLOCK_WRITES, PV_BLOCK_FLUSHES, PV_BLOCK_DISCARDS, PV_BLOCK_ZEROES, PV_BLOCK_OTHERS,
	PV_BLOCK_KINDS
};

struct pv_block_counter {
	uint64_t requests, errors, bytes;
};

/* What pv_block_work() returns */
enum {
	PV_BLOCK_END = 0,        /* pv_block_end() was called */
	PV_BLOCK_BROKEN,         /* the queue is broken: worker.problem is a PV_QUEUE result or PV_BLOCK_NO_STATUS */
	PV_BLOCK_FAILED,         /* the host failed a request: worker.error, worker.kind; the guest was told */
};
#define PV_BLOCK_NO_STATUS (-100) /* a chain without a byte for the status */

struct pv_block_worker {
	int problem;
	int error;               /* errno */
	int kind;
	struct pv_chain chain;
};

struct pv_block_device {
	struct pv_block_image *image;
	struct pv_queue *queue;
	struct pv_interrupt *interrupt; /* NULL: nobody is told */
	int doorbell;                /* non-blocking eventfd */
	bool read_only;
	bool discard, write_zeroes;  /* negotiated */
	_Atomic bool write_through;  /* every write is durable before it completes */
	char id[PV_BLOCK_ID_SIZE];

	pthread_mutex_t lock;
	pthread_cond_t turn;         /* somebody may take the lead, or has to end */
	pthread_cond_t quiet;        /* busy has become 0 */
	struct pv_block_worker *leader;
	unsigned busy;               /* threads that use the queue or do I/O */
	bool running, ending;
	struct pv_forward forward;   /* while the guest is protected */
	_Atomic uint32_t write_ns;   /* what the last write without RWF_NOWAIT took */
	struct pv_block_counter counters[PV_BLOCK_KINDS];
};

struct pv_block_device *pv_block_new(struct pv_block_image *image, struct pv_queue *queue);
void pv_block_free(struct pv_block_device *d);
/* A thread of the device's: returns when Python is needed, and is called again. Call it without the interpreter. */
int pv_block_work(struct pv_block_device *d, struct pv_block_worker *w);
void pv_block_resume(struct pv_block_device *d);
/* 0, or ETIMEDOUT: requests are still in flight, and none will be taken. */
int pv_block_suspend(struct pv_block_device *d, uint32_t timeout_ms);
void pv_block_end(struct pv_block_device *d);
void pv_block_count(struct pv_block_device *d, struct pv_block_counter *into);

/* block_request.c. `may_block` is called once, before the first operation that may take a while. */
struct pv_block_done {
	int kind;
	uint8_t status;
	int error;               /* -errno of the host, if the host is to blame */
	uint64_t bytes;
	uint32_t written;
};
int pv_block_serve(struct pv_block_device *d, struct pv_chain *chain, void (*may_block)(void *), void *context,
		   struct pv_block_done *done);

#endif
