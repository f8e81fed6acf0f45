/* See block_overlay.h. */

#define _GNU_SOURCE
#include "block_overlay.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BITMAP_WORDS (PV_BITMAP_PAGE / 8)

struct pv_overlay *pv_overlay_new(int base_fd, uint64_t size, uint64_t bitmap_at, uint64_t data_at, int persistent)
{
	struct pv_overlay *o = calloc(1, sizeof(*o));
	if (!o)
		return NULL;
	o->base_fd = base_fd;
	o->persistent = persistent;
	o->bitmap_at = bitmap_at;
	o->data_at = data_at;
	o->clusters = (size + PV_CLUSTER - 1) / PV_CLUSTER;
	uint64_t pages = (o->clusters + 8 * PV_BITMAP_PAGE - 1) / (8 * PV_BITMAP_PAGE);
	o->bitmap_size = pages * PV_BITMAP_PAGE;
	o->bits = calloc(1, o->bitmap_size);
	o->changed = calloc(1, pages);
	o->snapshots = persistent ? malloc(o->bitmap_size) : NULL;
	o->pages = persistent ? malloc(pages * sizeof(*o->pages)) : NULL;
	pthread_rwlockattr_t fair;
	pthread_rwlockattr_init(&fair);
	/* The default lets a stream of readers starve the one that commits. */
	pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&o->users, &fair);
	pthread_rwlockattr_destroy(&fair);
	pthread_mutex_init(&o->allocating, NULL);
	pthread_cond_init(&o->allocated, NULL);
	pthread_mutex_init(&o->flushing, NULL);
	if (!o->bits || !o->changed || (persistent && (!o->snapshots || !o->pages))) {
		pv_overlay_free(o);
		return NULL;
	}
	return o;
}

void pv_overlay_free(struct pv_overlay *o)
{
	pthread_rwlock_destroy(&o->users);
	pthread_mutex_destroy(&o->allocating);
	pthread_cond_destroy(&o->allocated);
	pthread_mutex_destroy(&o->flushing);
	free((void *)o->bits);
	free((void *)o->changed);
	free(o->snapshots);
	free(o->pages);
	free(o);
}

/* The bitmap as the file has it; bits behind the last cluster mean nothing. */
void pv_overlay_load_bits(struct pv_overlay *o, const uint8_t *bits, uint64_t n)
{
	memcpy((void *)o->bits, bits, n < o->bitmap_size ? n : o->bitmap_size);
	for (uint64_t c = o->clusters; c < 8 * o->bitmap_size && c % 64; c++)
		o->bits[c / 64] &= ~(1ull << c % 64);
}

uint64_t pv_overlay_used(struct pv_overlay *o)
{
	uint64_t found = 0;
	for (uint64_t i = 0; i < (o->clusters + 63) / 64; i++)
		found += (uint64_t)__builtin_popcountll(atomic_load_explicit(&o->bits[i], memory_order_relaxed));
	return found;
}

static bool here(struct pv_overlay *o, uint64_t cluster)
{
	return atomic_load_explicit(&o->bits[cluster / 64], memory_order_acquire) >> cluster % 64 & 1;
}

/* The clusters' data is in the file (though not yet durable) by now. */
static void claim(struct pv_overlay *o, uint64_t first, uint64_t end)
{
	for (uint64_t c = first; c < end; c++)
		if (!here(o, c)) {
			atomic_fetch_or_explicit(&o->bits[c / 64], 1ull << c % 64, memory_order_release);
			atomic_store_explicit(&o->changed[c / (8 * PV_BITMAP_PAGE)], 1, memory_order_release);
		}
}

int pv_overlay_read(struct pv_block_image *image, struct pv_transfer *t, bool wait)
{
	struct pv_overlay *o = image->overlay;
	int result = 0;

	if (!wait && pthread_rwlock_tryrdlock(&o->users))
		return -EAGAIN;
	if (wait)
		pthread_rwlock_rdlock(&o->users);
	while (!result && t->left) {
		uint64_t cluster = t->offset / PV_CLUSTER, end = cluster + 1, last = t->offset + t->left;
		bool ours = here(o, cluster);
		while (end * PV_CLUSTER < last && here(o, end) == ours)
			end++;
		uint64_t n = (end * PV_CLUSTER < last ? end * PV_CLUSTER : last) - t->offset;
		result = pv_transfer_file(image, t, ours ? image->fd : o->base_fd, n, ours ? o->data_at : 0, false, wait);
	}
	pthread_rwlock_unlock(&o->users);
	return result;
}

/* Bytes of a cluster: the last one may be cut. */
static uint64_t cluster_size(const struct pv_block_image *image, uint64_t cluster)
{
	uint64_t room = image->size - cluster * PV_CLUSTER;
	return room < PV_CLUSTER ? room : PV_CLUSTER;
}

static int copy_cluster(struct pv_block_image *image, int from, uint64_t from_shift, int to, uint64_t to_shift,
			uint64_t cluster)
{
	uint8_t bytes[PV_CLUSTER];
	struct iovec all = {bytes, cluster_size(image, cluster)};
	struct pv_transfer t = {&all, 1, 0, 0, cluster * PV_CLUSTER, all.iov_len};
	int result = pv_transfer_file(image, &t, from, all.iov_len, from_shift, false, true);
	if (result)
		return result;
	t = (struct pv_transfer){&all, 1, 0, 0, cluster * PV_CLUSTER, all.iov_len};
	return pv_transfer_file(image, &t, to, all.iov_len, to_shift, true, true);
}

/* Before a part of a cluster is written that is ours to allocate: the rest of it must be here, too. */
static int fetch(struct pv_block_image *image, uint64_t cluster)
{
	struct pv_overlay *o = image->overlay;
	int result = 0;

	if (!here(o, cluster)) {
		result = copy_cluster(image, o->base_fd, 0, image->fd, o->data_at, cluster);
		if (!result)
			claim(o, cluster, cluster + 1);
	}
	return result;
}

static bool taken(const struct pv_overlay *o, const struct pv_allocation *a)
{
	for (const struct pv_allocation *other = o->allocations; other; other = other->next)
		if (other->first < a->end && a->first < other->end)
			return true;
	return false;
}

/*
 * Have the clusters of [offset, end) that are not here to oneself; false, only without `wait`: somebody else has one.
 * As all of them are taken at once, and `users` is held before, two requests cannot wait for each other.
 */
static bool begin_allocation(struct pv_overlay *o, struct pv_allocation *a, uint64_t offset, uint64_t end, bool wait)
{
	*a = (struct pv_allocation){offset / PV_CLUSTER, (end + PV_CLUSTER - 1) / PV_CLUSTER, NULL};
	/* What is here stays here: only pv_overlay_commit() and _clear(), who have it all, take anything back. */
	while (a->first < a->end && here(o, a->first))
		a->first++;
	while (a->first < a->end && here(o, a->end - 1))
		a->end--;
	if (a->first == a->end)
		return true;
	pthread_mutex_lock(&o->allocating);
	bool free = true;
	while (!(free = !taken(o, a)) && wait)
		pthread_cond_wait(&o->allocated, &o->allocating);
	if (free) {
		a->next = o->allocations;
		o->allocations = a;
	} else {
		a->end = a->first;
	}
	pthread_mutex_unlock(&o->allocating);
	return free;
}

static void end_allocation(struct pv_overlay *o, struct pv_allocation *a)
{
	if (a->first == a->end)
		return;
	pthread_mutex_lock(&o->allocating);
	struct pv_allocation **at = &o->allocations;
	while (*at != a)
		at = &(*at)->next;
	*at = a->next;
	pthread_cond_broadcast(&o->allocated);
	pthread_mutex_unlock(&o->allocating);
}

/* The clusters at both ends of a range that are covered in part: [0] and [1], or UINT64_MAX. */
static void partial(const struct pv_block_image *image, uint64_t offset, uint64_t end, uint64_t part[2])
{
	uint64_t first = offset / PV_CLUSTER, last = (end - 1) / PV_CLUSTER;
	bool cut_first = offset % PV_CLUSTER || (first == last && end < first * PV_CLUSTER + cluster_size(image, first));
	bool cut_last = last != first && end < last * PV_CLUSTER + cluster_size(image, last);
	part[0] = cut_first ? first : UINT64_MAX;
	part[1] = cut_last ? last : UINT64_MAX;
}

int pv_overlay_write(struct pv_block_image *image, struct pv_transfer *t, bool wait)
{
	struct pv_overlay *o = image->overlay;
	uint64_t offset = t->offset, end = offset + t->left, part[2];
	const struct pv_transfer whole = *t;
	struct pv_allocation ours;
	int result;

	if (!t->left)
		return 0;
	if (!wait && pthread_rwlock_tryrdlock(&o->users))
		return -EAGAIN;
	if (wait)
		pthread_rwlock_rdlock(&o->users);
	partial(image, offset, end, part);
	result = begin_allocation(o, &ours, offset, end, wait) ? 0 : -EAGAIN;
	for (int i = 0; i < 2 && !result; i++)
		if (part[i] != UINT64_MAX && !here(o, part[i]))
			result = wait ? fetch(image, part[i]) : -EAGAIN;
	if (!result) {
		result = pv_transfer_file(image, t, image->fd, t->left, o->data_at, true, wait);
		/* Whole clusters that got there are claimed, also if the rest is still to come. */
		if (t->offset > offset) {
			uint64_t covered = t->offset == image->size ? o->clusters : t->offset / PV_CLUSTER;
			claim(o, (offset + PV_CLUSTER - 1) / PV_CLUSTER, covered);
		}
	}
	end_allocation(o, &ours);
	pthread_rwlock_unlock(&o->users);
	/* Taken up in the middle of a cluster that is not claimed yet, its first part would be fetched over. */
	if (result == -EAGAIN)
		*t = whole;
	return result;
}

/*
 * Zeros; with `exact` every byte of them, else only clusters that are covered whole (a discard, whose result nobody
 * may rely on). A zeroed cluster is here, as a hole if `unmap`.
 */
int pv_overlay_zero(struct pv_block_image *image, uint64_t offset, uint64_t n, bool unmap, bool exact)
{
	struct pv_overlay *o = image->overlay;
	uint64_t end = offset + n, part[2];
	struct pv_allocation ours;
	int result = 0;

	if (!n)
		return 0;
	pthread_rwlock_rdlock(&o->users);
	begin_allocation(o, &ours, offset, end, true);
	partial(image, offset, end, part);
	if (exact) {
		for (int i = 0; i < 2 && !result; i++)
			if (part[i] != UINT64_MAX)
				result = fetch(image, part[i]);
	} else {
		if (part[0] != UINT64_MAX)
			offset = (part[0] + 1) * PV_CLUSTER;
		if (part[1] != UINT64_MAX)
			end = part[1] * PV_CLUSTER;
	}
	if (!result && offset < end) {
		result = pv_file_zero(image->fd, o->data_at + offset, end - offset, unmap);
		if (!result) {
			/* The ends, if partial, are here since they were fetched. */
			uint64_t covered = end == image->size ? o->clusters : end / PV_CLUSTER;
			claim(o, (offset + PV_CLUSTER - 1) / PV_CLUSTER, covered);
		}
	}
	end_allocation(o, &ours);
	pthread_rwlock_unlock(&o->users);
	return result;
}

static int write_all(int fd, const uint8_t *from, uint64_t n, uint64_t offset)
{
	while (n) {
		ssize_t done = pwrite(fd, from, n, (off_t)offset);
		if (done < 0 && errno != EINTR)
			return -errno;
		if (done > 0) {
			from += done;
			n -= (uint64_t)done;
			offset += (uint64_t)done;
		}
	}
	return 0;
}

/* Copy the pages of the bitmap that differ from the file's, one behind the other; how many, or -ENOMEM. */
static int64_t take_snapshot(struct pv_overlay *o, uint64_t pages)
{
	int64_t taken = 0;
	for (uint64_t page = 0; page < pages; page++) {
		/* Cleared before the bits are read: one that is set later marks the page again. */
		if (!atomic_exchange(&o->changed[page], 0))
			continue;
		o->pages[taken] = page;
		uint64_t *copy = o->snapshots + (uint64_t)taken * BITMAP_WORDS;
		for (unsigned i = 0; i < BITMAP_WORDS; i++)
			copy[i] = atomic_load_explicit(&o->bits[page * BITMAP_WORDS + i], memory_order_acquire);
		taken++;
	}
	return taken;
}

/*
 * Data, then the bits that stand for it. The bitmap is copied *before* the data is synced: a bit that is set meanwhile
 * stands for data that may have missed it, and waits for the next flush.
 */
int pv_overlay_flush(struct pv_block_image *image)
{
	struct pv_overlay *o = image->overlay;

	if (!o->persistent)
		return 0; /* nobody finds it again anyway */
	pthread_mutex_lock(&o->flushing);
	int64_t taken = take_snapshot(o, o->bitmap_size / PV_BITMAP_PAGE);
	bool base_too = atomic_exchange(&o->base_written, false);
	int result = pv_file_sync(image, image->fd);
	/* A bit is taken back only when the base durably holds what it stood for. */
	if (!result && base_too)
		result = pv_file_sync(image, o->base_fd);
	for (int64_t i = 0; i < taken && !result; i++)
		result = write_all(image->fd, (uint8_t *)(o->snapshots + (uint64_t)i * BITMAP_WORDS), PV_BITMAP_PAGE,
				   o->bitmap_at + o->pages[i] * PV_BITMAP_PAGE);
	if (!result && taken)
		result = pv_file_sync(image, image->fd);
	if (result) {
		for (int64_t i = 0; i < taken; i++)
			atomic_store(&o->changed[o->pages[i]], 1);
		if (base_too)
			atomic_store(&o->base_written, true);
	}
	pthread_mutex_unlock(&o->flushing);
	return result;
}

static void disclaim(struct pv_overlay *o, uint64_t first, uint64_t end)
{
	for (uint64_t c = first; c < end; c++)
		if (here(o, c)) {
			atomic_fetch_and(&o->bits[c / 64], ~(1ull << c % 64));
			atomic_store_explicit(&o->changed[c / (8 * PV_BITMAP_PAGE)], 1, memory_order_release);
		}
}

/*
 * Move up to `most` clusters, from `first` on, into the base. Returns the cluster to go on with (all of them: `clusters`)
 * or -errno. Meanwhile the disk is at rest, so callers take it in small steps.
 */
int64_t pv_overlay_commit(struct pv_block_image *image, int base_fd, uint64_t first, uint64_t most)
{
	struct pv_overlay *o = image->overlay;
	uint64_t c = first, moved = 0;
	int result = 0;

	pthread_rwlock_wrlock(&o->users);
	for (; c < o->clusters && moved < most; c++) {
		if (!here(o, c))
			continue;
		atomic_store(&o->base_written, true);
		result = copy_cluster(image, image->fd, o->data_at, base_fd, 0, c);
		if (result)
			break;
		disclaim(o, c, c + 1);
		moved++;
	}
	pthread_rwlock_unlock(&o->users);
	return result ? result : (int64_t)c;
}

static int punch(struct pv_block_image *image)
{
	return fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)image->overlay->data_at,
			 (off_t)image->size) && errno != EOPNOTSUPP ? -errno : 0;
}

/* Back to the base's content; what was in the overlay is gone once this is flushed. */
void pv_overlay_clear(struct pv_block_image *image)
{
	pthread_rwlock_wrlock(&image->overlay->users);
	disclaim(image->overlay, 0, image->overlay->clusters);
	pthread_rwlock_unlock(&image->overlay->users);
}

/* Give an empty overlay's space back, after the flush that made it durably empty. */
int pv_overlay_trim(struct pv_block_image *image)
{
	pthread_rwlock_wrlock(&image->overlay->users);
	int result = pv_overlay_used(image->overlay) ? 0 : punch(image);
	pthread_rwlock_unlock(&image->overlay->users);
	return result;
}
