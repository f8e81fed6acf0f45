/*
 * Overlapping writes in flight to clusters that are not in the overlay yet; usage: overlay_race_harness SEED ROUNDS.
 *
 * Requests that overlap may take effect in any order, but only where they overlap: afterwards every sector holds what
 * one of those that cover it wrote, and what no request covers holds what was there before. The system calls that write
 * dawdle at random (-Wl,--wrap), so that what comes between the steps of one request does come between them.
 */
#define _GNU_SOURCE
#include "block_overlay.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CLUSTERS 3u
#define SIZE (CLUSTERS * PV_CLUSTER - 3 * PV_SECTOR)
#define SECTORS (SIZE / PV_SECTOR)
#define WRITERS 4

ssize_t __real_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
int __real_fallocate(int fd, int mode, off_t offset, off_t n);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t n);

static _Thread_local unsigned chance;

static void dawdle(void)
{
	if (rand_r(&chance) % 2)
		usleep((unsigned)rand_r(&chance) % 300);
}

ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	dawdle();
	ssize_t done = __real_pwritev2(fd, iov, count, offset, flags);
	dawdle();
	return done;
}

int __wrap_fallocate(int fd, int mode, off_t offset, off_t n)
{
	dawdle();
	int result = __real_fallocate(fd, mode, offset, n);
	dawdle();
	return result;
}

static struct pv_block_image image;
static pthread_barrier_t start;

struct writer {
	unsigned sector, count, zero;
	uint8_t version; /* in every byte it writes; 0 for zeros */
	unsigned chance;
	int result;
};

static int transfer(uint8_t *bytes, unsigned sector, unsigned count, bool write)
{
	struct iovec all = {bytes, count * PV_SECTOR};
	struct pv_transfer t = {&all, 1, 0, 0, (uint64_t)sector * PV_SECTOR, all.iov_len};
	if (!write)
		return pv_image_read(&image, &t, true);
	/* As block_request.c does it. */
	int result = pv_image_write(&image, &t, false);
	return result == -EAGAIN ? pv_image_write(&image, &t, true) : result;
}

static void *write_once(void *argument)
{
	struct writer *w = argument;
	uint8_t bytes[SIZE];

	chance = w->chance;
	memset(bytes, w->version, sizeof(bytes));
	pthread_barrier_wait(&start);
	dawdle();
	w->result = w->zero ? pv_image_zero(&image, w->sector * PV_SECTOR, w->count * PV_SECTOR, w->zero - 1)
			    : transfer(bytes, w->sector, w->count, true);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	srand((unsigned)atoi(argv[1]));
	unsigned rounds = (unsigned)atoi(argv[2]), overlaps = 0, partial_beside_whole = 0;
	int base = memfd_create("base", 0);
	static uint8_t bytes[SIZE];

	image.fd = memfd_create("over", 0);
	image.size = SIZE;
	memset(bytes, 0xba, SIZE);
	if (pwrite(base, bytes, SIZE, 0) != (ssize_t)SIZE || ftruncate(image.fd, SIZE))
		return 2;
	image.overlay = pv_overlay_new(base, SIZE, 0, 0, false);
	pthread_barrier_init(&start, NULL, WRITERS);
	for (unsigned round = 0; round < rounds; round++) {
		struct writer writers[WRITERS];
		pthread_t threads[WRITERS];
		for (unsigned i = 0; i < WRITERS; i++) {
			struct writer *w = &writers[i];
			bool whole = rand() % 2;
			unsigned each = PV_CLUSTER / PV_SECTOR, first = (unsigned)rand() % CLUSTERS;
			w->sector = whole ? first * each : (unsigned)rand() % SECTORS;
			w->count = whole ? each * (1 + (unsigned)rand() % CLUSTERS) : 1 + (unsigned)rand() % each;
			if (w->count > SECTORS - w->sector)
				w->count = SECTORS - w->sector;
			w->zero = rand() % 4 ? 0 : 1 + (unsigned)rand() % 2;
			w->version = w->zero ? 0 : (uint8_t)(i + 1);
			w->chance = (unsigned)rand();
			partial_beside_whole += !whole;
			if (pthread_create(&threads[i], NULL, write_once, w))
				return 2;
		}
		for (unsigned i = 0; i < WRITERS; i++) {
			pthread_join(threads[i], NULL);
			if (writers[i].result)
				return 3;
		}
		if (transfer(bytes, 0, SECTORS, false))
			return 3;
		for (unsigned at = 0; at < SIZE; at++) {
			unsigned covered = 0;
			bool possible = false;
			for (unsigned i = 0; i < WRITERS; i++) {
				unsigned n = at / PV_SECTOR - writers[i].sector;
				if (n < writers[i].count) {
					covered++;
					possible |= bytes[at] == writers[i].version;
				}
			}
			overlaps += covered > 1;
			if (covered ? !possible : bytes[at] != 0xba) {
				fprintf(stderr, "round %u: sector %u, written by %u, holds %#x\n", round, at / PV_SECTOR, covered,
					bytes[at]);
				return 1;
			}
		}
		pv_overlay_clear(&image);
	}
	pv_overlay_free(image.overlay);
	printf("{\"overlaps\": %u, \"partial\": %u}\n", overlaps / PV_SECTOR, partial_beside_whole);
	return 0;
}
