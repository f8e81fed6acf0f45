/*
 * Drives what reads KVM's dirty log and rings, filled as a kernel gone mad would fill them. Each is compared with a model
 * that is written differently; memory is exactly as large as it is said to be, so that a byte too far is seen.
 *
 *   dirty_log_harness log|ring SEED ROUNDS
 *
 * Prints one JSON object: how often it came upon what. Any difference aborts. Linked with --wrap=ioctl.
 */
#include "core.h"
#include "dirty_log.h"
#include "harness.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>

/* -- KVM's bitmap ---------------------------------------------------------------------------------- */

static struct {
	uint64_t pages;
	uint64_t *bits; /* what KVM has logged, bits behind the slot's end among it */
	int fail_get, fail_clear;
	uint64_t gets, clears;
} kvm;

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	va_start(arguments, request);
	void *argument = va_arg(arguments, void *);
	va_end(arguments);
	size_t bytes = (kvm.pages + 63) / 64 * 8;
	if (request == KVM_GET_DIRTY_LOG) {
		kvm.gets++;
		if (kvm.fail_get) {
			errno = kvm.fail_get;
			return -1;
		}
		memcpy(((struct kvm_dirty_log *)argument)->dirty_bitmap, kvm.bits, bytes);
		return 0;
	}
	CHECK(request == KVM_CLEAR_DIRTY_LOG);
	struct kvm_clear_dirty_log *clear = argument;
	CHECK(clear->first_page == 0 && clear->num_pages == kvm.pages);
	kvm.clears++;
	if (kvm.fail_clear) {
		errno = kvm.fail_clear;
		return -1;
	}
	for (uint64_t page = 0; page < kvm.pages; page++)
		if (has(clear->dirty_bitmap, page))
			kvm.bits[page / 64] &= ~(1ull << page % 64);
	return 0;
}

static void compare_runs(const uint64_t *bits, uint64_t pages, uint64_t *runs)
{
	uint64_t most = 1 + below(6), at = 0, expected = 0;
	struct pv_page_range *found = memory(most * sizeof(*found));

	for (size_t n = most; n == most;) {
		n = pv_dirty_ranges(bits, pages, at, found, most);
		CHECK(n <= most);
		for (size_t i = 0; i < n; i++) {
			while (expected < pages && !has(bits, expected))
				expected++;
			CHECK(found[i].first == expected && found[i].count);
			for (uint64_t page = 0; page < found[i].count; page++, expected++)
				CHECK(expected < pages && has(bits, expected));
			CHECK(expected == pages || !has(bits, expected));
			at = expected;
			++*runs;
		}
	}
	for (; expected < pages; expected++)
		CHECK(!has(bits, expected));
	free(found);
}

static void dirty_log(uint64_t rounds)
{
	uint64_t taken = 0, failed = 0, beyond = 0, runs = 0, empty = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		uint64_t pages = kvm.pages = 1 + below(300), words = (pages + 63) / 64, expected = 0;
		uint64_t *scratch = memory(words * 8), *marks = memory(words * 8), *all = memory(words * 8);
		uint64_t density = 1 + below(20);
		int manual = one_in(4) ? 0 : 1;
		kvm.bits = memory(words * 8);
		for (uint64_t page = 0; page < words * 64; page++) {
			if (one_in(density) && density < 20)
				kvm.bits[page / 64] |= 1ull << page % 64;
			if (page < pages && one_in(10))
				marks[page / 64] |= 1ull << page % 64;
			if (page >= pages)
				beyond += has(kvm.bits, page);
			else
				expected += has(kvm.bits, page);
		}
		for (uint64_t i = 0; i < words; i++)
			all[i] = marks[i] | kvm.bits[i];
		if (pages % 64)
			all[words - 1] &= (1ull << pages % 64) - 1;
		kvm.fail_get = one_in(10) ? EIO : 0;
		kvm.fail_clear = one_in(10) ? ENOENT : 0;
		long result = pv_dirty_log_get(3, 0, pages, manual, scratch, marks);
		if (result < 0) {
			/* Nothing is lost: KVM has it still. */
			CHECK(result == -(kvm.fail_get ? kvm.fail_get : kvm.fail_clear));
			for (uint64_t i = 0; i < words; i++)
				kvm.bits[i] |= marks[i];
			for (uint64_t page = 0; page < pages; page++)
				CHECK(!has(all, page) || has(kvm.bits, page));
			failed++;
		} else {
			CHECK((uint64_t)result == expected);
			CHECK(!memcmp(marks, all, words * 8));
			CHECK(pv_dirty_count(marks, words) >= expected);
			empty += !result;
			taken += (uint64_t)result;
		}
		/* Also of bits that lie behind the end: no run leads there. */
		compare_runs(one_in(2) ? marks : kvm.bits, pages, &runs);
		free(scratch), free(marks), free(all), free(kvm.bits);
	}
	printf("{\"taken\": %" PRIu64 ", \"failed\": %" PRIu64 ", \"beyond\": %" PRIu64 ", \"runs\": %" PRIu64
	       ", \"empty\": %" PRIu64 ", \"clears\": %" PRIu64 "}\n", taken, failed, beyond, runs, empty, kvm.clears);
}

/* -- KVM's rings ------------------------------------------------------------------------------------ */

#define SLOTS 3

static void ring(uint64_t rounds)
{
	uint64_t marked = 0, ignored = 0, full = 0, gaps = 0, wrapped = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		uint32_t size = 1u << below(7), start = (uint32_t)rnd();
		if (one_in(4))
			start = -(uint32_t)below(2 * size); /* the counter comes round on the way */
		struct kvm_dirty_gfn *entries = memory(size * sizeof(*entries));
		struct pv_dirty_ring it = {.entries = entries, .size = size, .next = start};
		uint64_t pages[SLOTS], *marks[SLOTS], *expected[SLOTS], words[SLOTS];
		for (int s = 0; s < SLOTS; s++) {
			pages[s] = 1 + below(200);
			words[s] = (pages[s] + 63) / 64;
			marks[s] = memory(words[s] * 8);
			expected[s] = memory(words[s] * 8);
		}
		uint32_t published = (uint32_t)below(size + 1), gap = one_in(4) ? (uint32_t)below(size + 1) : 0;
		for (uint32_t i = 0; i < size; i++) {
			struct kvm_dirty_gfn *entry = &entries[(start + i) % size];
			entry->slot = one_in(5) ? (uint32_t)rnd() : (uint32_t)below(SLOTS + 1);
			uint64_t pick = below(8);
			entry->offset = pick == 0 ? rnd() : pick == 1 ? ~0ull - below(3) : below(210);
			entry->flags = i >= gap && i < gap + published ? KVM_DIRTY_GFN_F_DIRTY
				       : one_in(2) ? KVM_DIRTY_GFN_F_RESET
						   : (uint32_t)rnd() & ~KVM_DIRTY_GFN_F_DIRTY; /* no flags that exist */
			if (entry->flags != KVM_DIRTY_GFN_F_DIRTY)
				continue;
			if (entry->slot >= SLOTS || entry->offset >= pages[entry->slot])
				ignored++;
			else
				expected[entry->slot][entry->offset / 64] |= 1ull << entry->offset % 64;
		}
		long skipped = gap ? pv_dirty_ring_skip(&it) : 0;
		long left = size - gap < published ? size - gap : published;
		CHECK(skipped == (left ? (long)gap : 0) || !gap);
		gaps += skipped > 0;
		long taken = pv_dirty_ring_reap(&it, marks, pages, SLOTS);
		CHECK(taken == left);
		CHECK(it.next == start + (uint32_t)skipped + (uint32_t)taken);
		full += taken == (long)size;
		wrapped += it.next < start;
		for (uint32_t i = 0; i < (uint32_t)(skipped + taken); i++)
			CHECK(entries[(start + i) % size].flags == KVM_DIRTY_GFN_F_RESET);
		for (int s = 0; s < SLOTS; s++) {
			CHECK(!memcmp(marks[s], expected[s], words[s] * 8));
			marked += pv_dirty_count(marks[s], words[s]);
			free(marks[s]), free(expected[s]);
		}
		free(entries);
	}
	printf("{\"marked\": %" PRIu64 ", \"ignored\": %" PRIu64 ", \"full\": %" PRIu64 ", \"gaps\": %" PRIu64
	       ", \"wrapped\": %" PRIu64 "}\n", marked, ignored, full, gaps, wrapped);
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	state = strtoull(argv[2], NULL, 0) * 2 + 1;
	uint64_t rounds = strtoull(argv[3], NULL, 0);
	if (!strcmp(argv[1], "log"))
		dirty_log(rounds);
	else if (!strcmp(argv[1], "ring"))
		ring(rounds);
	else
		return 2;
	return 0;
}
