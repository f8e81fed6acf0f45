/*
 * Copy on write: a file that holds what differs from a base, cluster by cluster.
 *
 *     0                header (block/overlay.py knows it)
 *     bitmap_at        one bit a cluster, LSB first: the cluster is here, not in the base
 *     data_at          the clusters, each at its own offset; sparse
 *
 * The bitmap is used in memory, and reaches the file only by pv_overlay_flush(), behind the data its bits stand for. So
 * after a crash every cluster that the file claims is whole, and everything flushed is there. A cluster that is
 * written for the first time and only in part is copied from the base first.
 *
 * Whoever writes clusters that are not here yet has them to itself until they are (struct pv_allocation): a copy from the
 * base would undo what another request writes beside the sectors that it is for.
 *
 * pv_overlay_commit() moves clusters into the base while the disk is in use: `users` is held shared by each transfer
 * and exclusively while clusters move.
 */
#ifndef PYVMM_BLOCK_OVERLAY_H
#define PYVMM_BLOCK_OVERLAY_H

#include "block_image.h"

#include <pthread.h>

#define PV_CLUSTER 4096u
#define PV_BITMAP_PAGE 4096u /* the bitmap is written in pieces of this size */

/* Clusters that a request in flight brings in. It lives on that request's stack. */
struct pv_allocation {
	uint64_t first, end;
	struct pv_allocation *next;
};

struct pv_overlay {
	int base_fd;                 /* not owned */
	bool persistent;             /* there is a bitmap in the file to be kept up */
	_Atomic bool base_written;   /* pv_overlay_commit() wrote to the base since the last flush */
	uint64_t bitmap_at, data_at;
	uint64_t clusters;
	uint64_t bitmap_size;        /* bytes, whole pages */
	_Atomic uint64_t *bits;
	_Atomic uint8_t *changed;    /* one for each page of the bitmap: differs from the file's */
	uint64_t *snapshots, *pages; /* the flush's: copies of changed pages, and which they are */
	pthread_rwlock_t users;
	pthread_mutex_t allocating;  /* around what follows */
	pthread_cond_t allocated;    /* one of them is done */
	struct pv_allocation *allocations;
	pthread_mutex_t flushing;
};

struct pv_overlay *pv_overlay_new(int base_fd, uint64_t size, uint64_t bitmap_at, uint64_t data_at, int persistent);
void pv_overlay_free(struct pv_overlay *o);
void pv_overlay_load_bits(struct pv_overlay *o, const uint8_t *bits, uint64_t n);
uint64_t pv_overlay_used(struct pv_overlay *o);

int pv_overlay_read(struct pv_block_image *image, struct pv_transfer *t, bool wait);
int pv_overlay_write(struct pv_block_image *image, struct pv_transfer *t, bool wait);
int pv_overlay_zero(struct pv_block_image *image, uint64_t offset, uint64_t n, bool unmap, bool exact);
int pv_overlay_flush(struct pv_block_image *image);

int64_t pv_overlay_commit(struct pv_block_image *image, int base_fd, uint64_t first, uint64_t most);
void pv_overlay_clear(struct pv_block_image *image);
int pv_overlay_trim(struct pv_block_image *image);

#endif
