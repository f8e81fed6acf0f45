/*
 * Hostile rings against virtqueue.c, built with ASan and UBSan: usage: virtqueue_harness SEED ROUNDS RACE_ROUNDS.
 *
 * Guest memory is three separate allocations, so that a step outside one is a report of the sanitizer's: two regions
 * that are neighbours for the guest, and one that ends at 2^64. Each round fills rings with what a driver that
 * misbehaves in every field might write, lets a device take, read, fill and give back chains, and then compares all of
 * memory with a copy: only the used ring and writable buffers may have changed, and only in pages that are marked.
 * In the second part another thread scribbles over the ring all the while; there only the sanitizers judge.
 */
#include "virtqueue.h"
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REGIONS 3
#define PAGES 8
#define REGION_SIZE ((uint64_t)PAGES * PV_PAGE)
#define NO_READ_BUFFER 70000

static const uint64_t gpas[REGIONS] = {0, REGION_SIZE, 0 - REGION_SIZE};
static uint8_t *ram[REGIONS], *before[REGIONS], *allowed[REGIONS];
static uint64_t *dirty[REGIONS];
static struct pv_vm *vm;
static struct pv_chain *chains;
static unsigned results[16], taken;

static uint64_t some_address(void)
{
	static const uint64_t edges[] = {0, 2 * REGION_SIZE - 1, 2 * REGION_SIZE, 0xffffffff, ~0ull, ~0ull - 15, 1ull << 63};
	uint64_t region = gpas[below(REGIONS)];
	switch (below(12)) {
	case 0:
		return edges[below(7)];
	case 1:
		return rnd();
	case 2:
		return region + REGION_SIZE - below(20);
	case 3:
		return region - below(20);
	default:
		return region + below(REGION_SIZE);
	}
}

static uint32_t some_length(void)
{
	static const uint32_t edges[] = {0, 1, 16, 0xffffffff, 0x80000000, 0xfffffff0, REGION_SIZE, REGION_SIZE + 1};
	return below(8) ? (uint32_t)below(300) : edges[below(8)];
}

static void put_desc(uint8_t *table, uint32_t index, uint32_t entries)
{
	uint64_t addr = some_address();
	uint32_t len = some_length();
	uint16_t flags = (uint16_t)below(4), next = (uint16_t)below(entries);
	if (!below(6)) {
		flags = (uint16_t)((below(3) ? 4 : 6) | (below(8) ? 0 : 1));
		len = 16 * (uint32_t)below(6) + !below(10);
	}
	if (!below(20)) {
		flags = (uint16_t)rnd();
		next = (uint16_t)rnd();
	}
	memcpy(table + index * 16, &addr, 8);
	memcpy(table + index * 16 + 8, &len, 4);
	memcpy(table + index * 16 + 12, &flags, 2);
	memcpy(table + index * 16 + 14, &next, 2);
}

struct ring {
	uint16_t size;
	unsigned region;
	uint64_t desc, avail, used; /* offsets in the region */
};

static void put_16(struct ring *r, uint64_t at, uint16_t value)
{
	memcpy(ram[r->region] + at, &value, 2);
}

/* Descriptors also all over memory, since an indirect table may be anywhere. */
static void fill_memory(void)
{
	for (unsigned i = 0; i < REGIONS; i++)
		for (uint32_t d = 0; d < REGION_SIZE / 16; d++)
			put_desc(ram[i], d, 1 + (uint32_t)below(16));
}

static struct ring make_ring(struct pv_queue *q)
{
	struct ring r = {.size = (uint16_t)(1u << below(6)), .region = (unsigned)below(REGIONS)};
	/* At the very end of the region, often: one byte further is a report. */
	uint64_t used_size = 6 + 8u * r.size, avail_size = 6 + 2u * r.size;
	r.used = below(2) ? ((REGION_SIZE - used_size) & ~3ull) : 0x1000;
	r.avail = 0x3000 - avail_size;
	r.desc = 0x4000;
	uint64_t gpa = gpas[r.region];
	int result = pv_queue_start(q, vm, r.size, gpa + r.desc, gpa + r.avail, gpa + r.used, (int)below(2), below(4) != 0);
	CHECK(result == 0);
	for (uint32_t i = 0; i < r.size; i++) {
		put_desc(ram[r.region] + r.desc, i, r.size);
		put_16(&r, r.avail + 4 + 2 * i, (uint16_t)(below(30) ? below(r.size) : rnd()));
	}
	/* Anywhere in the 16 bits, and most often just before they wrap around. */
	q->next_avail = q->next_used = q->notified = (uint16_t)(0 - below(40));
	put_16(&r, r.avail, (uint16_t)below(2));
	put_16(&r, r.avail + 2, (uint16_t)(q->next_avail + (below(20) ? below(r.size + 1u) : rnd())));
	put_16(&r, r.avail + 4 + 2 * r.size, (uint16_t)(q->next_avail + below(4)));
	return r;
}

/* A chain must be made of whole pieces of RAM; where its writable bytes are, changes are allowed. */
static void note_segments(const struct pv_chain *chain)
{
	uint64_t bytes[2] = {0, 0};
	CHECK(chain->readable + chain->writable <= PV_CHAIN_SEGMENTS);
	for (uint32_t i = 0; i < chain->readable + chain->writable; i++) {
		const struct iovec *s = &chain->segments[i];
		unsigned region = chain->regions[i];
		CHECK(region < REGIONS && s->iov_len);
		uint64_t offset = (uint64_t)((uint8_t *)s->iov_base - ram[region]);
		CHECK(offset < REGION_SIZE && s->iov_len <= REGION_SIZE - offset);
		if (i >= chain->readable)
			memset(allowed[region] + offset, 1, s->iov_len);
		bytes[i >= chain->readable] += s->iov_len;
	}
	CHECK(bytes[0] == chain->readable_bytes && bytes[1] == chain->writable_bytes);
}

static void serve(struct pv_queue *q, struct pv_chain *chain, bool note)
{
	static uint8_t data[NO_READ_BUFFER];
	if (note)
		note_segments(chain);
	uint64_t read = pv_chain_read(chain, below(100), data, below(sizeof(data)));
	CHECK(read <= chain->readable_bytes);
	memset(data, (int)rnd(), sizeof(data));
	uint64_t room = chain->writable_bytes < sizeof(data) ? chain->writable_bytes : sizeof(data);
	uint32_t written = (uint32_t)(room ? below(room + 1) : 0);
	CHECK(pv_chain_write(q, chain, 0, data, written) == written);
	CHECK(pv_queue_push(q, chain, (uint32_t)chain->writable_bytes + 1) == PV_QUEUE_MISUSED);
	CHECK(pv_queue_push(q, chain, written) == 0);
}

static void drain(struct pv_queue *q, bool note)
{
	unsigned held = 0, limit = q->size * 2u + 2;
	int result = PV_QUEUE_EMPTY;
	if (below(2))
		pv_queue_disable_kicks(q);
	while (limit-- && (result = pv_queue_pop(q, &chains[held])) == PV_QUEUE_TAKEN) {
		taken++;
		if (++held == 4 || below(2)) /* several in flight, given back in another order */
			while (held)
				serve(q, &chains[--held], note);
	}
	results[-result & 15]++;
	if (result >= 0) {
		while (held)
			serve(q, &chains[--held], note);
		pv_queue_wants_interrupt(q);
		pv_queue_enable_kicks(q);
	} else {
		CHECK(q->broken && pv_queue_pop(q, &chains[0]) == PV_QUEUE_STOPPED);
		CHECK(!pv_queue_wants_interrupt(q) && !pv_queue_enable_kicks(q));
	}
}

static void compare(const struct ring *r)
{
	memset(allowed[r->region] + r->used, 1, 6 + 8u * r->size);
	for (unsigned i = 0; i < REGIONS; i++)
		for (uint64_t at = 0; at < REGION_SIZE; at++)
			if (ram[i][at] != before[i][at]) {
				CHECK(allowed[i][at]);
				CHECK(dirty[i][0] >> (at / PV_PAGE) & 1);
			}
}

static void refuse_bad_rings(void)
{
	struct pv_queue q = {0};
	uint64_t good = gpas[0];
	static const uint16_t sizes[] = {0, 3, 2048, 65535};
	for (unsigned i = 0; i < 4; i++)
		CHECK(pv_queue_start(&q, vm, sizes[i], good, good, good, 1, 1) == PV_QUEUE_BAD_SIZE);
	CHECK(pv_queue_start(&q, vm, 8, good + 8, good, good, 1, 1) == PV_QUEUE_BAD_RING);
	CHECK(pv_queue_start(&q, vm, 8, good, good + 1, good, 1, 1) == PV_QUEUE_BAD_RING);
	CHECK(pv_queue_start(&q, vm, 8, good, good, good + 2, 1, 1) == PV_QUEUE_BAD_RING);
	CHECK(pv_queue_start(&q, vm, 8, good, good, good + REGION_SIZE - 64, 1, 1) == PV_QUEUE_BAD_RING);
	CHECK(pv_queue_start(&q, vm, 8, ~0ull << 4, good, good, 1, 1) == PV_QUEUE_BAD_RING);
	CHECK(pv_queue_pop(&q, chains) == PV_QUEUE_STOPPED && pv_queue_push(&q, chains, 0) == PV_QUEUE_STOPPED);
}

/* Both ends of the address space are RAM here, so only arithmetic says that this buffer is not. */
static void refuse_a_buffer_around_the_end(void)
{
	struct pv_queue q = {0};
	struct { uint64_t addr; uint32_t len; uint16_t flags, next; } desc = {~0ull - 7, 16, 2, 0};
	memset(ram[0], 0, REGION_SIZE);
	memcpy(ram[0], &desc, sizeof(desc));
	ram[0][0x1002] = 1;
	CHECK(pv_queue_start(&q, vm, 1, 0, 0x1000, 0x2000, 0, 0) == 0);
	CHECK(pv_queue_pop(&q, chains) == PV_QUEUE_BAD_ADDRESS && chains->writable == 0);
}

static _Atomic bool scribbling;

static void *scribble(void *argument)
{
	const struct ring *r = argument;
	uint64_t state = 88172645463325252ull;
	while (scribbling) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		/* Lengths, flags and nexts of the table, and now and then the available ring. */
		uint64_t at = r->desc + (state >> 8) % (16u * r->size);
		if (!(state & 7))
			at = r->avail + 4 + (state >> 8) % (2u * r->size);
		__atomic_store_n(ram[r->region] + at, (uint8_t)(state >> 40), __ATOMIC_RELAXED);
	}
	return NULL;
}

static void race(void)
{
	struct pv_queue q = {0};
	struct ring r = make_ring(&q);
	scribbling = true;
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, scribble, &r) == 0);
	for (unsigned i = 0; i < 200; i++) {
		put_16(&r, r.avail + 2, (uint16_t)(q.next_avail + r.size));
		q.broken = false;
		q.next_used = q.next_avail;
		drain(&q, false);
	}
	scribbling = false;
	pthread_join(thread, NULL);
}

int main(int argc, char **argv)
{
	CHECK(argc == 4);
	state = strtoull(argv[1], NULL, 0) * 2 + 1;
	unsigned rounds = (unsigned)atoi(argv[2]), races = (unsigned)atoi(argv[3]);
	vm = calloc(1, sizeof(*vm));
	chains = calloc(4, sizeof(*chains));
	vm->region_count = REGIONS;
	for (unsigned i = 0; i < REGIONS; i++) {
		ram[i] = aligned_alloc(64, REGION_SIZE);
		before[i] = malloc(REGION_SIZE);
		allowed[i] = malloc(REGION_SIZE);
		dirty[i] = calloc(1, sizeof(uint64_t));
		vm->regions[i] = (struct pv_region){gpas[i], REGION_SIZE, ram[i], dirty[i]};
	}
	refuse_bad_rings();
	refuse_a_buffer_around_the_end();
	for (unsigned round = 0; round < rounds; round++) {
		if (round % 16 == 0)
			fill_memory();
		struct pv_queue q = {0};
		struct ring r = make_ring(&q);
		for (unsigned i = 0; i < REGIONS; i++) {
			memcpy(before[i], ram[i], REGION_SIZE);
			memset(allowed[i], 0, REGION_SIZE);
			*dirty[i] = 0;
		}
		drain(&q, true);
		compare(&r);
	}
	for (unsigned i = 0; i < races; i++)
		race();
	printf("{\"taken\": %u, \"results\": {", taken);
	for (unsigned i = 0; i < 13; i++)
		printf("%s\"%d\": %u", i ? ", " : "", -(int)i, results[i]);
	printf("}}\n");
	for (unsigned i = 0; i < REGIONS; i++) {
		free(ram[i]);
		free(before[i]);
		free(allowed[i]);
		free(dirty[i]);
	}
	free(chains);
	free(vm);
	return 0;
}
