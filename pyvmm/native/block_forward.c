/* A queue of records of what was written; see block_forward.h. */

#include "block_forward.h"

#include "ram_stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

/* write_log.py: u32 CRC of all that follows, u32 kind, u64 epoch, u64 offset, u64 length; little-endian */
struct head {
	uint32_t crc, kind;
	uint64_t epoch, offset, length;
};

void pv_forward_init(struct pv_forward *f)
{
	pthread_condattr_t monotonic;

	memset(f, 0, sizeof(*f));
	pthread_mutex_init(&f->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&f->room, &monotonic);
	pthread_condattr_destroy(&monotonic);
	f->event = -1;
	f->end = &f->first;
}

/* The lock is held. */
static void empty(struct pv_forward *f)
{
	while (f->first) {
		struct pv_forward_record *next = f->first->next;
		free(f->first);
		f->first = next;
	}
	f->end = &f->first;
	f->queued = 0;
}

void pv_forward_destroy(struct pv_forward *f)
{
	empty(f);
	pthread_mutex_destroy(&f->lock);
	pthread_cond_destroy(&f->room);
}

void pv_forward_begin(struct pv_forward *f, int event, uint64_t epoch, uint64_t limit, uint32_t timeout_ms)
{
	pthread_mutex_lock(&f->lock);
	empty(f);
	f->event = event;
	f->epoch = epoch;
	f->limit = limit;
	f->timeout_ms = timeout_ms;
	f->problem = 0;
	f->active = true;
	pthread_mutex_unlock(&f->lock);
}

void pv_forward_end(struct pv_forward *f)
{
	pthread_mutex_lock(&f->lock);
	f->active = false;
	f->event = -1;
	empty(f);
	pthread_cond_broadcast(&f->room);
	pthread_mutex_unlock(&f->lock);
}

/* The rest is called with the lock held, but for what says otherwise. */

static void tell(struct pv_forward *f)
{
	if (f->event >= 0)
		eventfd_write(f->event, 1);
}

static void fail(struct pv_forward *f, int problem)
{
	f->problem = problem;
	f->active = false;
	empty(f);
	pthread_cond_broadcast(&f->room);
	tell(f);
}

/* Wait until `n` bytes fit; false: nothing is recorded any more. */
static bool wait_for_room(struct pv_forward *f, uint64_t n)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += f->timeout_ms / 1000;
	until.tv_nsec += (long)(f->timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	while (f->active && f->queued && f->queued + n > f->limit)
		if (pthread_cond_timedwait(&f->room, &f->lock, &until) == ETIMEDOUT && f->active &&
		    f->queued + n > f->limit)
			fail(f, ETIMEDOUT);
	return f->active;
}

static struct pv_forward_record *new_record(uint32_t data)
{
	struct pv_forward_record *r = malloc(sizeof(*r) + sizeof(struct head) + data);
	if (r) {
		r->next = NULL;
		r->size = sizeof(struct head) + data;
	}
	return r;
}

static uint8_t *data_in(struct pv_forward_record *r)
{
	return r->bytes + sizeof(struct head);
}

static void append(struct pv_forward *f, struct pv_forward_record *r, uint32_t kind, uint64_t offset, uint64_t length)
{
	struct head head = {.kind = kind, .epoch = f->epoch, .offset = offset, .length = length};
	bool was_empty = !f->first;

	memcpy(r->bytes, &head, sizeof(head));
	head.crc = pv_crc32c(0, r->bytes + sizeof(head.crc), r->size - sizeof(head.crc));
	memcpy(r->bytes, &head.crc, sizeof(head.crc));
	*f->end = r;
	f->end = &r->next;
	f->queued += sizeof(*r) + r->size;
	if (was_empty)
		tell(f);
}

/* A record without data. */
static void note(struct pv_forward *f, uint32_t kind, uint64_t offset, uint64_t length)
{
	struct pv_forward_record *r = new_record(0);
	if (r)
		append(f, r, kind, offset, length);
	else
		fail(f, ENOMEM);
}

int pv_forward_mark(struct pv_forward *f, uint64_t epoch)
{
	pthread_mutex_lock(&f->lock);
	if (f->active) {
		f->epoch = epoch;
		note(f, PV_FORWARD_MARKER, 0, 0);
		f->epoch = epoch + 1;
	}
	int result = f->active ? 0 : -(f->problem ? f->problem : ESHUTDOWN);
	pthread_mutex_unlock(&f->lock);
	return result;
}

int64_t pv_forward_take(struct pv_forward *f, uint8_t *buffer, uint64_t size)
{
	uint64_t taken = 0;
	bool marker = false;

	pthread_mutex_lock(&f->lock);
	/* A batch ends with a marker: what is before it is made durable then. */
	while (f->first && f->first->size <= size - taken && !marker) {
		struct pv_forward_record *r = f->first;
		struct head head;
		memcpy(buffer + taken, r->bytes, r->size);
		memcpy(&head, r->bytes, sizeof(head));
		marker = head.kind == PV_FORWARD_MARKER;
		taken += r->size;
		f->queued -= sizeof(*r) + r->size;
		f->first = r->next;
		if (!f->first)
			f->end = &f->first;
		free(r);
	}
	if (taken)
		pthread_cond_broadcast(&f->room);
	int64_t result = f->problem ? -f->problem : (int64_t)taken;
	pthread_mutex_unlock(&f->lock);
	return result;
}

static bool all_zero(const uint8_t *data, uint64_t n)
{
	return !n || (!data[0] && !memcmp(data, data + 1, n - 1));
}

int pv_forward_copy(struct pv_forward *f, struct pv_block_image *image, uint64_t offset, uint64_t n)
{
	if (n > PV_FORWARD_DATA)
		return -EINVAL;
	struct pv_forward_record *r = new_record((uint32_t)n);
	if (!r)
		return -ENOMEM;
	struct iovec into = {data_in(r), n};
	struct pv_transfer t = {.segments = &into, .count = 1, .offset = offset, .left = n};
	pthread_mutex_lock(&f->lock);
	int result = wait_for_room(f, r->size) ? 0 : -(f->problem ? f->problem : ESHUTDOWN);
	if (!result)
		result = pv_image_read(image, &t, true);
	if (!result && all_zero(data_in(r), n)) {
		note(f, PV_FORWARD_ZERO, offset, n);
	} else if (!result) {
		append(f, r, PV_FORWARD_WRITE, offset, n);
		r = NULL;
	}
	pthread_mutex_unlock(&f->lock);
	free(r);
	return result;
}

static void gather(uint8_t *into, struct pv_transfer *t, uint64_t n)
{
	t->offset += n;
	t->left -= n;
	while (n) {
		const struct iovec *segment = &t->segments[t->at];
		uint64_t part = segment->iov_len - t->within;
		if (!part) { /* a driver's empty descriptor */
			t->at++;
			t->within = 0;
			continue;
		}
		if (part > n)
			part = n;
		memcpy(into, (const uint8_t *)segment->iov_base + t->within, part);
		into += part;
		n -= part;
		pv_transfer_skip(t, part);
	}
}

/* There is no memory for a record: that ends the replication, and is nothing that the guest has to know. */
static int write_unrecorded(struct pv_forward *f, struct pv_block_image *image, struct pv_transfer *t)
{
	pthread_mutex_lock(&f->lock);
	if (f->active)
		fail(f, ENOMEM);
	int result = pv_image_write(image, t, true);
	pthread_mutex_unlock(&f->lock);
	return result;
}

int pv_forward_write(struct pv_forward *f, struct pv_block_image *image, struct pv_transfer *t)
{
	int result = 0;

	while (t->left && !result) {
		uint64_t n = t->left < PV_FORWARD_DATA ? t->left : PV_FORWARD_DATA, offset = t->offset;
		struct pv_forward_record *r = new_record((uint32_t)n);
		if (!r)
			return write_unrecorded(f, image, t);
		gather(data_in(r), t, n);
		struct iovec from = {data_in(r), n};
		struct pv_transfer piece = {.segments = &from, .count = 1, .offset = offset, .left = n};
		pthread_mutex_lock(&f->lock);
		wait_for_room(f, r->size);
		result = pv_image_write(image, &piece, true);
		if (result) {
			/* Nobody knows how much of it is there. */
			if (f->active)
				fail(f, -result);
		} else if (f->active) {
			append(f, r, PV_FORWARD_WRITE, offset, n);
			r = NULL;
		}
		pthread_mutex_unlock(&f->lock);
		free(r);
	}
	return result;
}

int pv_forward_zero(struct pv_forward *f, struct pv_block_image *image, uint64_t offset, uint64_t n, bool unmap)
{
	pthread_mutex_lock(&f->lock);
	wait_for_room(f, sizeof(struct head));
	int result = pv_image_zero(image, offset, n, unmap);
	if (result && f->active)
		fail(f, -result);
	else if (f->active)
		note(f, PV_FORWARD_ZERO, offset, n);
	pthread_mutex_unlock(&f->lock);
	return result;
}
