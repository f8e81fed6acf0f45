/* See block_image.h. */

#define _GNU_SOURCE
#include "block_image.h"

#include "block_overlay.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define SEGMENTS_AT_ONCE 128u
#define ZEROS_AT_ONCE 65536u

void pv_transfer_skip(struct pv_transfer *t, uint64_t n)
{
	while (n && t->at < t->count) {
		uint64_t room = t->segments[t->at].iov_len - t->within;
		if (n < room) {
			t->within += n;
			return;
		}
		n -= room;
		t->at++;
		t->within = 0;
	}
}

/* The next part of the transfer, of at most n bytes, as preadv wants it; how many segments that are. */
static int gather(const struct pv_transfer *t, uint64_t n, struct iovec *into)
{
	uint64_t within = t->within;
	uint32_t found = 0;

	for (uint32_t i = t->at; i < t->count && n && found < SEGMENTS_AT_ONCE; i++, within = 0) {
		uint64_t room = t->segments[i].iov_len - within;
		if (!room)
			continue;
		uint64_t piece = room < n ? room : n;
		into[found++] = (struct iovec){(uint8_t *)t->segments[i].iov_base + within, piece};
		n -= piece;
	}
	return (int)found;
}

int pv_transfer_file(struct pv_block_image *image, struct pv_transfer *t, int fd, uint64_t n, uint64_t shift,
		     bool write, bool wait)
{
	struct iovec piece[SEGMENTS_AT_ONCE];

	while (n) {
		if (!wait && atomic_load_explicit(&image->no_nowait[write], memory_order_relaxed))
			return -EAGAIN;
		int count = gather(t, n, piece);
		if (!count)
			return -EINVAL; /* less memory than asked for: a defect of the caller's */
		int flags = wait ? 0 : RWF_NOWAIT;
		off_t at = (off_t)(t->offset + shift);
		ssize_t done = write ? pwritev2(fd, piece, count, at, flags) : preadv2(fd, piece, count, at, flags);
		if (done < 0) {
			if (errno == EINTR)
				continue;
			if (!wait && (errno == EOPNOTSUPP || errno == ENOSYS)) {
				atomic_store(&image->no_nowait[write], true);
				continue;
			}
			return -errno;
		}
		if (!done)
			return -EIO; /* the file has become shorter */
		pv_transfer_skip(t, (uint64_t)done);
		t->offset += (uint64_t)done;
		t->left -= (uint64_t)done;
		n -= (uint64_t)done;
	}
	return 0;
}

int pv_image_read(struct pv_block_image *image, struct pv_transfer *t, bool wait)
{
	if (image->overlay)
		return pv_overlay_read(image, t, wait);
	return pv_transfer_file(image, t, image->fd, t->left, 0, false, wait);
}

int pv_image_write(struct pv_block_image *image, struct pv_transfer *t, bool wait)
{
	if (image->overlay)
		return pv_overlay_write(image, t, wait);
	return pv_transfer_file(image, t, image->fd, t->left, 0, true, wait);
}

/* "No such operation here, or not for this range": what another way may still do. */
static bool unsupported(int error)
{
	return error == EOPNOTSUPP || error == ENOSYS || error == ENOTTY || error == EINVAL || error == ENODEV;
}

static int allocate(int fd, int mode, uint64_t offset, uint64_t n)
{
	int result;
	do
		result = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)n);
	while (result && errno == EINTR);
	return result ? -errno : 0;
}

static int write_zeros(int fd, uint64_t offset, uint64_t n)
{
	static const uint8_t zeros[ZEROS_AT_ONCE];

	while (n) {
		ssize_t done = pwrite(fd, zeros, n < sizeof(zeros) ? n : sizeof(zeros), (off_t)offset);
		if (done < 0 && errno != EINTR)
			return -errno;
		if (done > 0) {
			offset += (uint64_t)done;
			n -= (uint64_t)done;
		}
	}
	return 0;
}

int pv_file_zero(int fd, uint64_t offset, uint64_t n, bool unmap)
{
	if (!n)
		return 0;
	/* Not the other way round: without `unmap` the guest wants the space to stay its own. */
	int result = unmap ? allocate(fd, FALLOC_FL_PUNCH_HOLE, offset, n) : -EOPNOTSUPP;
	if (result && unsupported(-result))
		result = allocate(fd, FALLOC_FL_ZERO_RANGE, offset, n);
	if (result && unsupported(-result))
		result = write_zeros(fd, offset, n);
	return result;
}

/* Discarding is a hint (5.2.6.2): where nothing can be given back, nothing need be done. */
int pv_image_discard(struct pv_block_image *image, uint64_t offset, uint64_t n)
{
	int result;

	if (!n)
		return 0;
	if (image->overlay)
		return pv_overlay_zero(image, offset, n, true, false);
	if (image->is_device) {
		uint64_t range[2] = {offset, n};
		result = ioctl(image->fd, BLKDISCARD, range) ? -errno : 0;
	} else {
		result = allocate(image->fd, FALLOC_FL_PUNCH_HOLE, offset, n);
	}
	return unsupported(-result) ? 0 : result;
}

int pv_image_zero(struct pv_block_image *image, uint64_t offset, uint64_t n, bool unmap)
{
	if (image->overlay)
		return pv_overlay_zero(image, offset, n, unmap, true);
	if (image->is_device && !unmap && n) {
		uint64_t range[2] = {offset, n};
		if (!ioctl(image->fd, BLKZEROOUT, range))
			return 0;
		if (!unsupported(errno))
			return -errno;
	}
	return pv_file_zero(image->fd, offset, n, unmap);
}

/*
 * fdatasync, whose failure sticks: the kernel reports a page that it could not write back only once and forgets it
 * then, so a later success would promise what is lost.
 */
int pv_file_sync(struct pv_block_image *image, int fd)
{
	int before = atomic_load(&image->flush_error), result;

	if (before)
		return before;
	do
		result = fdatasync(fd) ? -errno : 0;
	while (result == -EINTR);
	if (result)
		atomic_store(&image->flush_error, result);
	return result;
}

int pv_image_flush(struct pv_block_image *image)
{
	return image->overlay ? pv_overlay_flush(image) : pv_file_sync(image, image->fd);
}
