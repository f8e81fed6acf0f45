/*
 * What is written to a protected disk, by several threads and while it is copied, against what its records make of
 * another disk; usage: forward_harness SEED ROUNDS. Both must be the same in the end.
 *
 * Then nobody takes the records any more: writes must go on, and the queue must say so.
 */
#define _GNU_SOURCE
#include "block_forward.h"
#include "ram_stream.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE (64u << 10)
#define LIMIT (192u << 10)
#define WRITERS 3
#define PIECE (16u << 10)
#define CHECK(what)                                                                                                    \
	do {                                                                                                           \
		if (!(what)) {                                                                                         \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);                                     \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

struct head {
	uint32_t crc, kind;
	uint64_t epoch, offset, length;
};

static struct pv_forward forward;
static struct pv_block_image image = {.size = SIZE};
static uint8_t replica[SIZE];
static uint8_t taken[PV_FORWARD_DATA + 64];
static unsigned rounds;
static uint64_t seed;
static uint64_t written, zeroed, copied, records;

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	return *state ^= *state << 17;
}

static void *write_on(void *argument)
{
	uint64_t state = seed * 977 + (uintptr_t)argument + 1;
	static _Thread_local uint8_t data[PIECE];

	for (unsigned i = 0; i < rounds; i++) {
		uint64_t sectors = 1 + next(&state) % (PIECE / PV_SECTOR), place = next(&state) % (SIZE / PV_SECTOR);
		uint64_t n = sectors * PV_SECTOR, offset = place * PV_SECTOR;
		if (n > SIZE - offset)
			n = SIZE - offset;
		if (next(&state) % 5 == 0) {
			CHECK(!pv_forward_zero(&forward, &image, offset, n, next(&state) & 1));
			__atomic_add_fetch(&zeroed, 1, __ATOMIC_RELAXED);
			continue;
		}
		for (uint64_t at = 0; at < n; at += 8)
			memcpy(data + at, &(uint64_t){next(&state)}, 8);
		uint64_t cut = next(&state) % (n + 1);
		struct iovec segments[3] = {{data, cut}, {data + cut, 0}, {data + cut, n - cut}};
		struct pv_transfer t = {.segments = segments, .count = 3, .offset = offset, .left = n};
		CHECK(!pv_forward_write(&forward, &image, &t) && !t.left && t.offset == offset + n);
		__atomic_add_fetch(&written, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static void *copy_on(void *argument)
{
	for (unsigned i = 0; i < rounds; i++) {
		CHECK(!pv_forward_copy(&forward, &image, (uint64_t)(i % (SIZE / PIECE)) * PIECE, PIECE));
		copied++;
	}
	return argument;
}

/* Until the marker comes. */
static void *take_on(void *argument)
{
	for (;;) {
		int64_t size = pv_forward_take(&forward, taken, sizeof(taken));
		CHECK(size >= 0);
		if (!size) {
			uint64_t count;
			ssize_t got = read(forward.event, &count, sizeof(count));
			(void)got;
		}
		for (int64_t at = 0; at < size;) {
			struct head head;
			memcpy(&head, taken + at, sizeof(head));
			uint64_t data = head.kind == PV_FORWARD_WRITE ? head.length : 0;
			CHECK(pv_crc32c(0, taken + at + 4, sizeof(head) - 4 + data) == head.crc && head.epoch == 1);
			at += sizeof(head);
			if (head.kind == PV_FORWARD_MARKER) {
				CHECK(at == size);
				return argument;
			}
			CHECK(head.offset + head.length <= SIZE);
			if (data)
				memcpy(replica + head.offset, taken + at, data);
			else
				memset(replica + head.offset, 0, head.length);
			at += (int64_t)data;
			records++;
		}
	}
}

static void *nothing_taken(void)
{
	static uint8_t data[PIECE];
	struct iovec segment = {data, PIECE};

	pv_forward_begin(&forward, forward.event, 1, LIMIT, 50);
	for (unsigned i = 0; i < 40; i++) {
		struct pv_transfer t = {.segments = &segment, .count = 1, .offset = 0, .left = PIECE};
		CHECK(!pv_forward_write(&forward, &image, &t));
	}
	CHECK(!forward.active && !forward.queued && pv_forward_mark(&forward, 1) == -ETIMEDOUT);
	CHECK(pv_forward_take(&forward, taken, sizeof(taken)) == -ETIMEDOUT);
	CHECK(pv_forward_copy(&forward, &image, 0, PIECE) == -ETIMEDOUT);
	return NULL;
}

int main(int count, char **words)
{
	pthread_t threads[WRITERS + 2];
	static uint8_t content[SIZE];

	CHECK(count == 3);
	seed = strtoull(words[1], NULL, 10);
	rounds = (unsigned)strtoul(words[2], NULL, 10);
	image.fd = memfd_create("disk", 0);
	CHECK(image.fd >= 0 && !ftruncate(image.fd, SIZE));
	pv_forward_init(&forward);
	pv_forward_begin(&forward, eventfd(0, 0), 1, LIMIT, 60000);
	CHECK(!pthread_create(&threads[WRITERS], NULL, copy_on, NULL));
	CHECK(!pthread_create(&threads[WRITERS + 1], NULL, take_on, NULL));
	for (uintptr_t i = 0; i < WRITERS; i++)
		CHECK(!pthread_create(&threads[i], NULL, write_on, (void *)i));
	for (unsigned i = 0; i <= WRITERS; i++)
		pthread_join(threads[i], NULL);
	CHECK(!pv_forward_mark(&forward, 1));
	pthread_join(threads[WRITERS + 1], NULL);
	CHECK(pread(image.fd, content, SIZE, 0) == SIZE);
	CHECK(!memcmp(content, replica, SIZE));
	nothing_taken();
	pv_forward_end(&forward);
	pv_forward_destroy(&forward);
	printf("{\"written\": %lu, \"zeroed\": %lu, \"copied\": %lu, \"records\": %lu}\n", written, zeroed, copied, records);
	return 0;
}
