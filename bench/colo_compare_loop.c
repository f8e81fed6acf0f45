/*
 * The two contestants of colo_compare.py, turn by turn in one thread; usage: colo_compare_loop FILE ROUNDS.
 *
 * FILE: records of u32 kind (0 a client's, 1 the primary's, 2 the secondary's), u32 size, and the frame. Proxy: a client's
 * goes through the secondary's rewriter, the secondary's through it and to the comparison, the primary's to the
 * comparison; what is equal is taken out. Copy: each frame is copied once. Prints "proxy_ns copy_ns released due" of
 * CPU time for each round.
 */
#include "proxy_compare.h"
#include "proxy_rewriter.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct record {
	uint32_t kind, size;
	const uint8_t *frame;
};

static struct record *records;
static unsigned count;
static uint8_t unit[PV_NET_UNIT];
static const uint8_t header[PV_NET_HEADER];
static uint64_t sum;

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void load(const char *name)
{
	FILE *file = fopen(name, "rb");
	if (!file || fseek(file, 0, SEEK_END))
		abort();
	long size = ftell(file);
	rewind(file);
	uint8_t *all = malloc((size_t)size);
	if (!all || fread(all, 1, (size_t)size, file) != (size_t)size)
		abort();
	records = malloc((size_t)size / 8 * sizeof(*records));
	for (long at = 0; at + 8 <= size; count++) {
		struct record *r = &records[count];
		memcpy(r, all + at, 8);
		r->frame = all + at + 8;
		if (r->kind > 2 || r->size > PV_NET_FRAME_MAX || at + 8 + r->size > size)
			abort();
		at += 8 + r->size;
	}
	fclose(file);
}

static uint64_t through_proxy(uint64_t *released, unsigned *due)
{
	struct pv_compare_limits limits = {.compare_timeout = 3000, .idle_timeout = 600000, .max_queue_size = 1024,
					   .max_connections = 16384, .max_bytes = 64u << 20};
	struct pv_rewriter_limits rewriter_limits = {.max_connections = 16384, .live_timeout = 1000000,
						     .quiet_timeout = 1000000};
	struct pv_compare *c = pv_compare_new(&limits);
	struct pv_rewriter *r = pv_rewriter_new(&rewriter_limits);
	struct pv_due why;
	if (!c || !r || pv_compare_set_mode(c, PV_COMPARE_HYBRID, 1, 0))
		abort();
	uint64_t start = now();
	for (unsigned i = 0; i < count; i++) {
		const struct record *at = &records[i];
		if (at->kind != 1)
			memcpy(unit, at->frame, at->size); /* the rewriter changes frames in place */
		if (at->kind == 0) {
			pv_rewriter_to_guest(r, header, unit, at->size, i);
		} else if (at->kind == 1) {
			pv_compare_primary(c, header, at->frame, at->size, 0);
		} else {
			pv_rewriter_from_guest(r, header, unit, at->size, i);
			pv_compare_secondary(c, header, unit, at->size, 1, 0);
		}
		for (uint32_t size; (size = pv_compare_take(c, unit));)
			sum += unit[size - 1];
	}
	uint64_t taken = now() - start;
	*released = c->counters.released;
	*due = pv_compare_due(c, &why, 0) ? why.reason : 0;
	pv_compare_free(c);
	pv_rewriter_free(r);
	return taken;
}

static uint64_t through_copy(void)
{
	uint64_t start = now();
	for (unsigned i = 0; i < count; i++) {
		memcpy(unit, records[i].frame, records[i].size);
		sum += unit[records[i].size - 1];
	}
	return now() - start;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	load(argv[1]);
	int rounds = atoi(argv[2]);
	for (int i = -1; i < rounds; i++) {
		uint64_t released, proxy, copy;
		unsigned due;
		if (i & 1) {
			proxy = through_proxy(&released, &due);
			copy = through_copy();
		} else {
			copy = through_copy();
			proxy = through_proxy(&released, &due);
		}
		if (i >= 0) /* one to warm up */
			printf("%lu %lu %lu %u\n", proxy, copy, released, due);
	}
	return sum == 1; /* so that no copy can be left out */
}
