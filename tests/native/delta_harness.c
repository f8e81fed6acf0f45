/*
 * Drives what makes a checkpoint's pages smaller: both sides against each other, and the secondary's against a hostile
 * primary. Memory is exactly as large as it is said to be, so that a byte too far is seen.
 *
 *   delta_harness pair|hostile|lz4 SEED ROUNDS
 *
 * `pair`: a guest's pages change, are packed, coded, checked and put into a file, which must then hold them.
 * `hostile`: damaged and made-up batches; what is accepted must be written without leading anywhere else.
 *
 * Prints one JSON object: how often it came upon what. Any difference aborts.
 */
#define _GNU_SOURCE
#include "core.h"
#include "harness.h"
#include "page_delta.h"
#include "ram_stream.h"
#include "replica.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 24u

static void change(uint8_t *page)
{
	switch (below(6)) {
	case 0:
		memset(page, 0, PV_PAGE);
		break;
	case 1: /* nothing that could be made smaller */
		for (unsigned i = 0; i < PV_PAGE; i++)
			page[i] = (uint8_t)rnd();
		break;
	case 2: /* text, as it were */
		for (unsigned i = 0; i < PV_PAGE; i++)
			page[i] = "the guest "[(i + below(2)) % 10];
		break;
	case 3:
		break; /* written as it was */
	default:
		for (uint64_t n = 1 + below(20); n--;)
			page[below(PV_PAGE)] ^= (uint8_t)(1 + below(255));
	}
}

/* A file of PAGES pages that holds `content`. */
static int file_of(const uint8_t *content)
{
	int fd = memfd_create("replica", MFD_CLOEXEC);
	CHECK(fd >= 0 && !ftruncate(fd, PAGES * PV_PAGE));
	CHECK(pwrite(fd, content, PAGES * PV_PAGE, 0) == PAGES * PV_PAGE);
	return fd;
}

static bool file_holds(int fd, const uint8_t *content)
{
	uint8_t *found = memory(PAGES * PV_PAGE);
	CHECK(pread(fd, found, PAGES * PV_PAGE, 0) == PAGES * PV_PAGE);
	bool same = !memcmp(found, content, PAGES * PV_PAGE);
	free(found);
	return same;
}

/* Some pages change; the batch of them, as the primary packs it. */
static uint64_t next_batch(uint8_t *ram, uint8_t *batch, uint64_t room)
{
	struct pv_page_range ranges[PAGES];
	uint32_t used = 0;

	for (uint32_t page = 0; page < PAGES; page++) {
		if (one_in(3))
			continue;
		change(ram + (uint64_t)page * PV_PAGE);
		if (used && ranges[used - 1].first + ranges[used - 1].count == page)
			ranges[used - 1].count++;
		else
			ranges[used++] = (struct pv_page_range){.first = page, .count = 1};
	}
	struct pv_ram_cursor cursor = {.ranges = ranges, .range_count = used};
	uint64_t size = pv_ram_pack(&cursor, ram, batch, room);
	CHECK(cursor.range == used);
	return size;
}

static void pair(uint64_t rounds)
{
	struct pv_delta_counts counts = {0};
	uint64_t room = PAGES * (PV_PAGE + 8) + PV_PAGE;

	for (uint64_t round = 0; round < rounds; round++) {
		uint8_t *ram = memory(PAGES * PV_PAGE);
		for (uint32_t page = 0; page < PAGES; page++)
			change(ram + (uint64_t)page * PV_PAGE);
		int fd = file_of(ram);
		/* Too few places for all pages, or enough. */
		struct pv_delta *delta = pv_delta_new((uint64_t[]){1, PAGES}, 2, one_in(2) ? 60000 : 1 << 20);
		CHECK(delta);
		for (unsigned epoch = 0; epoch < 30; epoch++) {
			uint8_t *batch = memory(room);
			uint64_t size = next_batch(ram, batch, room);
			int64_t pages = pv_ram_check(batch, size, PAGES);
			pv_delta_next(delta);
			uint64_t coded = pv_delta_encode(delta, 1, batch, size, one_in(2), &counts);
			CHECK(coded <= size);
			uint8_t *sent = memory(coded);
			memcpy(sent, batch, coded);
			CHECK(pv_delta_check(sent, coded, PAGES) == pages);
			uint64_t bits[1] = {0};
			pv_replica_mark(sent, coded, 1, bits);
			CHECK(__builtin_popcountll(bits[0]) == pages);
			CHECK(pv_replica_write(fd, sent, coded, 1) == pages);
			CHECK(file_holds(fd, ram));
			pv_delta_touch(delta, 7);
			free(sent), free(batch);
		}
		pv_delta_free(delta);
		close(fd);
		free(ram);
	}
	printf("{\"coded\": %" PRIu64 ", \"plain\": %" PRIu64 ", \"based\": %" PRIu64 ", \"lz4\": %" PRIu64 "}\n", counts.coded,
	       counts.plain, counts.based, counts.lz4);
}

static uint64_t made_up(uint8_t *batch, uint64_t room)
{
	uint64_t at = 0;

	for (uint64_t n = 1 + below(4); n--;) {
		uint32_t first = (uint32_t)below(PAGES), count = 1 + (uint32_t)below(2);
		uint32_t head[2] = {first, count | PV_RUN_CODED};
		memcpy(batch + at, head, 8);
		at += 8;
		for (; count--;) {
			uint64_t lines = rnd() & rnd() & rnd() & rnd();
			uint32_t used = 8;
			for (unsigned left = (unsigned)__builtin_popcountll(lines), i = 0; i < left; i++)
				batch[at + 2 + used++] = (uint8_t)(1u << below(8));
			used += (used - 8) * 8 - (one_in(12) ? 1 : 0);
			memcpy(batch + at + 2, &lines, 8);
			if (one_in(8))
				used = (uint32_t)below(used);
			uint16_t tag = (uint16_t)(used | (one_in(2) ? PV_CODE_XOR : 0) | (one_in(9) ? PV_CODE_LZ4 : 0));
			memcpy(batch + at, &tag, 2);
			at += 2 + used;
			CHECK(at < room / 2);
		}
	}
	return at;
}

static void hostile(uint64_t rounds)
{
	uint64_t accepted = 0, refused = 0, room = 4 * PAGES * (PV_PAGE + 8);
	uint8_t *ram = memory(PAGES * PV_PAGE);
	struct pv_delta *delta = pv_delta_new((uint64_t[]){PAGES}, 1, 1 << 20);
	struct pv_delta_counts counts = {0};
	int fd = file_of(ram);

	for (uint64_t round = 0; round < rounds; round++) {
		uint8_t *batch = memory(room);
		uint64_t size;
		if (one_in(2)) {
			size = made_up(batch, room);
		} else {
			size = next_batch(ram, batch, room);
			pv_delta_next(delta);
			size = pv_delta_encode(delta, 0, batch, size, 1, &counts);
			pv_delta_touch(delta, 10);
		}
		if (size && one_in(3))
			size -= 1 + below(size < 50 ? size : 50);
		for (uint64_t flips = size && one_in(2) ? 1 + below(3) : 0; flips--;)
			batch[below(one_in(2) && size > 40 ? 40 : size)] ^= (uint8_t)(1u << below(8));
		uint8_t *sent = memory(size);
		memcpy(sent, batch, size);
		int64_t pages = pv_delta_check(sent, size, PAGES);
		if (pages >= 0) {
			accepted++;
			uint64_t bits[1] = {0};
			pv_replica_mark(sent, size, 1, bits);
			CHECK(pv_replica_write(fd, sent, size, 1) == pages);
			CHECK(lseek(fd, 0, SEEK_END) == PAGES * PV_PAGE);
		} else {
			CHECK(pages == -EINVAL);
			refused++;
		}
		free(sent), free(batch);
	}
	pv_delta_free(delta);
	close(fd);
	free(ram);
	printf("{\"accepted\": %" PRIu64 ", \"refused\": %" PRIu64 "}\n", accepted, refused);
}

/* Blocks of LZ4: packed and unpacked is the same; damaged and made-up ones lead nowhere. */
static void lz4(uint64_t rounds)
{
	uint64_t packed = 0, large = 0, unpacked = 0, refused = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		uint8_t *page = memory(PV_PAGE), *other = memory(PV_PAGE);
		for (unsigned i = 0; i < 3; i++)
			change(page);
		uint32_t room = one_in(2) ? PV_CODE_MOST : (uint32_t)below(PV_PAGE);
		uint8_t *out = memory(room);
		uint32_t size = pv_lz4_pack(page, out, room);
		CHECK(size <= room);
		if (size) {
			packed++;
			CHECK(!pv_lz4_unpack(out, size, other) && !memcmp(page, other, PV_PAGE));
		} else {
			large++;
		}
		for (uint64_t flips = size ? 1 + below(4) : 0; flips--;)
			out[below(size)] = (uint8_t)rnd();
		if (size && one_in(3))
			size = (uint32_t)below(size);
		uint8_t *block = memory(size);
		memcpy(block, out, size);
		if (size && !pv_lz4_unpack(block, size, other))
			unpacked++;
		else
			refused++;
		free(block), free(out), free(page), free(other);
	}
	printf("{\"packed\": %" PRIu64 ", \"large\": %" PRIu64 ", \"unpacked\": %" PRIu64 ", \"refused\": %" PRIu64 "}\n", packed,
	       large, unpacked, refused);
}

int main(int argc, char **argv)
{
	CHECK(argc == 4);
	state = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15ull + 1;
	uint64_t rounds = strtoull(argv[3], NULL, 10);
	if (!strcmp(argv[1], "pair"))
		pair(rounds);
	else if (!strcmp(argv[1], "hostile"))
		hostile(rounds);
	else if (!strcmp(argv[1], "lz4"))
		lz4(rounds);
	else
		return 2;
	return 0;
}
