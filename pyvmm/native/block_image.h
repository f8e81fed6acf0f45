/*
 * A disk image: guest memory straight to and from a raw file, a block device, or a copy-on-write overlay
 * (block_overlay.h) over one. Offsets and sizes are bytes; the caller has checked them against `size`.
 *
 * Every function returns 0 or -errno. All of them may be called from several threads at once.
 */
#ifndef PYVMM_BLOCK_IMAGE_H
#define PYVMM_BLOCK_IMAGE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define PV_SECTOR 512u

struct pv_overlay;

struct pv_block_image {
	int fd;                      /* what is written: the image, or the overlay's file. Not owned */
	bool is_device;              /* a block device; never with an overlay */
	uint64_t size;               /* multiple of PV_SECTOR */
	struct pv_overlay *overlay;  /* or NULL */
	_Atomic bool no_nowait[2];   /* [0] reads, [1] writes: the file system does not know RWF_NOWAIT */
	_Atomic int flush_error;     /* what fdatasync once failed with: see pv_image_flush() */
};

/* A transfer under way: the rest of it lies at `within` in segments[at], and at `offset` of the image. */
struct pv_transfer {
	const struct iovec *segments;
	uint32_t count, at;
	uint64_t within;
	uint64_t offset, left;
};

void pv_transfer_skip(struct pv_transfer *t, uint64_t n);
/* Memory to or from one file, `n` bytes of the transfer, `shift` bytes behind its offset. */
int pv_transfer_file(struct pv_block_image *image, struct pv_transfer *t, int fd, uint64_t n, uint64_t shift,
		     bool write, bool wait);

/*
 * -EAGAIN, only without `wait`: it would take a while, or nobody can tell; `t` is what is left to do.
 * -EIO for a file that ends too early: it was truncated behind our back.
 */
int pv_image_read(struct pv_block_image *image, struct pv_transfer *t, bool wait);
int pv_image_write(struct pv_block_image *image, struct pv_transfer *t, bool wait);
int pv_image_discard(struct pv_block_image *image, uint64_t offset, uint64_t n);
int pv_image_zero(struct pv_block_image *image, uint64_t offset, uint64_t n, bool unmap);
int pv_image_flush(struct pv_block_image *image);

/* Zeros in a file by whatever way it knows, in the end by writing them. */
int pv_file_zero(int fd, uint64_t offset, uint64_t n, bool unmap);
int pv_file_sync(struct pv_block_image *image, int fd);

#endif
