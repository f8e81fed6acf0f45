/* One block request: its header, its checks, its I/O, its status (virtio 1.2, 5.2.6). */

#include "block_device.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#define HEADER_SIZE 16u
#define RANGE_SIZE 16u
#define RANGE_F_UNMAP 1u
#define QUICK_NS 200000u

/* 5.2.6, struct virtio_blk_req: the same bytes wherever the driver cuts them into descriptors (2.7.4.3) */
struct header {
	uint32_t type, reserved;
	uint64_t sector;
};

/* 5.2.6, struct virtio_blk_discard_write_zeroes */
struct range {
	uint64_t sector;
	uint32_t sectors, flags;
};

struct work {
	struct pv_block_device *d;
	struct pv_chain *chain;
	struct header header;
	void (*may_block)(void *);
	void *context;
	struct pv_block_done *done;
};

static void will_block(struct work *w)
{
	if (w->may_block)
		w->may_block(w->context);
	w->may_block = NULL;
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static bool inside(const struct pv_block_device *d, uint64_t sector, uint64_t sectors)
{
	uint64_t capacity = d->image->size / PV_SECTOR;
	return sector <= capacity && sectors <= capacity - sector;
}

static uint8_t failed(struct work *w, int result)
{
	w->done->error = result;
	return PV_BLOCK_S_IOERR;
}

static uint8_t outcome(struct work *w, int result)
{
	return result ? failed(w, result) : PV_BLOCK_S_OK;
}

/* What comes between the header and the data, or the data and the status byte, as a transfer. */
static bool data_of(struct work *w, bool write, struct pv_transfer *t)
{
	struct pv_chain *chain = w->chain;
	uint64_t n = write ? chain->readable_bytes - HEADER_SIZE : chain->writable_bytes - 1;
	uint64_t wrong_way = write ? chain->writable_bytes - 1 : chain->readable_bytes - HEADER_SIZE;

	/* Data in the wrong direction means that the driver wants something else than it says. */
	if (wrong_way || n % PV_SECTOR || !inside(w->d, w->header.sector, n / PV_SECTOR))
		return false;
	*t = (struct pv_transfer){.segments = chain->segments + (write ? 0 : chain->readable),
				  .count = write ? chain->readable : chain->writable,
				  .offset = w->header.sector * PV_SECTOR, .left = n};
	if (write)
		pv_transfer_skip(t, HEADER_SIZE);
	w->done->bytes = n;
	return true;
}

static uint8_t read_data(struct work *w)
{
	struct pv_transfer t;

	if (!data_of(w, false, &t))
		return PV_BLOCK_S_IOERR;
	int result = pv_image_read(w->d->image, &t, false);
	if (result == -EAGAIN) {
		will_block(w);
		result = pv_image_read(w->d->image, &t, true);
	}
	return outcome(w, result);
}

/*
 * Many file systems cannot say whether a write would block. Nearly all writes go to the page cache and do not, so after
 * a quick one the next is done in place, too.
 */
static int write_somehow(struct work *w, struct pv_transfer *t)
{
	if (atomic_load_explicit(&w->d->forward.active, memory_order_acquire)) {
		will_block(w);
		return pv_forward_write(&w->d->forward, w->d->image, t);
	}
	int result = pv_image_write(w->d->image, t, false);
	if (result != -EAGAIN)
		return result;
	if (atomic_load_explicit(&w->d->write_ns, memory_order_relaxed) > QUICK_NS)
		will_block(w);
	uint64_t start = now_ns();
	result = pv_image_write(w->d->image, t, true);
	uint64_t took = now_ns() - start;
	atomic_store_explicit(&w->d->write_ns, took < UINT32_MAX ? (uint32_t)took : UINT32_MAX, memory_order_relaxed);
	return result;
}

static int sync_if_asked(struct work *w)
{
	if (!atomic_load(&w->d->write_through))
		return 0;
	will_block(w);
	return pv_image_flush(w->d->image);
}

static uint8_t write_data(struct work *w)
{
	struct pv_transfer t;

	if (w->d->read_only || !data_of(w, true, &t))
		return PV_BLOCK_S_IOERR;
	int result = write_somehow(w, &t);
	return outcome(w, result ? result : sync_if_asked(w));
}

static uint8_t discard_or_zero(struct work *w, bool zero)
{
	struct pv_block_device *d = w->d;
	struct range ranges[PV_BLOCK_RANGES];
	uint64_t n = w->chain->readable_bytes - HEADER_SIZE;

	if (!(zero ? d->write_zeroes : d->discard))
		return PV_BLOCK_S_UNSUPP;
	if (d->read_only || !n || n % RANGE_SIZE || n > sizeof(ranges))
		return PV_BLOCK_S_IOERR;
	pv_chain_read(w->chain, HEADER_SIZE, ranges, n);
	for (uint64_t i = 0; i < n / RANGE_SIZE; i++) {
		/* 5.2.6.2: a flag that is not known, and `unmap` in a discard. */
		if (ranges[i].flags & ~(zero ? RANGE_F_UNMAP : 0u))
			return PV_BLOCK_S_UNSUPP;
		if (ranges[i].sectors > PV_BLOCK_RANGE_SECTORS || !inside(d, ranges[i].sector, ranges[i].sectors))
			return PV_BLOCK_S_IOERR;
		w->done->bytes += (uint64_t)ranges[i].sectors * PV_SECTOR;
	}
	will_block(w);
	int result = 0;
	for (uint64_t i = 0; i < n / RANGE_SIZE && !result; i++) {
		uint64_t offset = ranges[i].sector * PV_SECTOR, length = (uint64_t)ranges[i].sectors * PV_SECTOR;
		if (atomic_load_explicit(&d->forward.active, memory_order_acquire)) /* both sides are to read the same */
			result = pv_forward_zero(&d->forward, d->image, offset, length,
						 !zero || ranges[i].flags & RANGE_F_UNMAP);
		else
			result = zero ? pv_image_zero(d->image, offset, length, ranges[i].flags & RANGE_F_UNMAP)
				      : pv_image_discard(d->image, offset, length);
	}
	return outcome(w, result ? result : sync_if_asked(w));
}

/* 5.2.6: a string of 20 bytes, of which a driver with a smaller buffer gets the beginning. */
static uint8_t get_id(struct work *w)
{
	uint64_t n = w->chain->writable_bytes - 1;

	if (!n)
		return PV_BLOCK_S_IOERR;
	n = pv_chain_write(w->d->queue, w->chain, 0, w->d->id, n < PV_BLOCK_ID_SIZE ? n : PV_BLOCK_ID_SIZE);
	w->done->bytes = n;
	return PV_BLOCK_S_OK;
}

static uint8_t carry_out(struct work *w)
{
	struct pv_block_done *done = w->done;

	switch (w->header.type) {
	case PV_BLOCK_T_IN:
		done->kind = PV_BLOCK_READS;
		return read_data(w);
	case PV_BLOCK_T_OUT:
		done->kind = PV_BLOCK_WRITES;
		return write_data(w);
	case PV_BLOCK_T_FLUSH:
		done->kind = PV_BLOCK_FLUSHES;
		will_block(w);
		return outcome(w, w->d->read_only ? 0 : pv_image_flush(w->d->image));
	case PV_BLOCK_T_GET_ID:
		return get_id(w);
	case PV_BLOCK_T_DISCARD:
		done->kind = PV_BLOCK_DISCARDS;
		return discard_or_zero(w, false);
	case PV_BLOCK_T_WRITE_ZEROES:
		done->kind = PV_BLOCK_ZEROES;
		return discard_or_zero(w, true);
	default:
		return PV_BLOCK_S_UNSUPP;
	}
}

/* The rest of the writable bytes, which nobody wrote, becomes zeros: the used length covers them (2.7.8.2). */
static void zero_from(struct pv_chain *chain, uint64_t offset)
{
	struct pv_transfer t = {.segments = chain->segments + chain->readable, .count = chain->writable};

	pv_transfer_skip(&t, offset);
	for (; t.at < t.count; t.at++, t.within = 0)
		memset((uint8_t *)t.segments[t.at].iov_base + t.within, 0, t.segments[t.at].iov_len - t.within);
}

/* Carry out the request in `chain`; the status is in place then. PV_BLOCK_NO_STATUS if there is no room for one. */
int pv_block_serve(struct pv_block_device *d, struct pv_chain *chain, void (*may_block)(void *), void *context,
		   struct pv_block_done *done)
{
	struct work w = {.d = d, .chain = chain, .may_block = may_block, .context = context, .done = done};

	*done = (struct pv_block_done){.kind = PV_BLOCK_OTHERS, .status = PV_BLOCK_S_IOERR};
	if (!chain->writable_bytes)
		return PV_BLOCK_NO_STATUS;
	if (pv_chain_read(chain, 0, &w.header, HEADER_SIZE) == HEADER_SIZE)
		done->status = carry_out(&w);
	uint64_t at = chain->writable_bytes - 1;
	if (done->status || done->kind != PV_BLOCK_READS) {
		uint64_t kept = done->status == PV_BLOCK_S_OK && done->kind == PV_BLOCK_OTHERS ? done->bytes : 0;
		if (kept < at)
			zero_from(chain, kept);
	}
	if (done->status)
		done->bytes = 0;
	done->written = (uint32_t)chain->writable_bytes;
	/* Marked dirty with all the rest when the chain is given back. */
	pv_chain_write(d->queue, chain, at, &done->status, 1);
	return 0;
}
