/*
 * What the host wrote to guest memory: one bit a page, LSB first in 64-bit words, as KVM_GET_DIRTY_LOG lays
 * them out. Every operation on a word is atomic, so that marks by vCPU threads, devices and the harvest of a
 * migration never lose one to another and need no lock.
 */

#include "core.h"

static uint64_t mask_of(uint64_t first, uint64_t end, uint64_t word)
{
	uint64_t low = first > word * 64 ? first - word * 64 : 0;
	uint64_t high = end < (word + 1) * 64 ? end - word * 64 : 64;
	uint64_t below = high == 64 ? ~0ull : (1ull << high) - 1;
	return below & ~((1ull << low) - 1);
}

/* Mark pages first to end - 1; the caller has checked that they are in the bitmap. */
void pv_dirty_mark(uint64_t *bits, uint64_t first, uint64_t end)
{
	if (first >= end)
		return;
	for (uint64_t word = first / 64; word <= (end - 1) / 64; word++)
		__atomic_fetch_or(&bits[word], mask_of(first, end, word), __ATOMIC_SEQ_CST);
}

/* Give a bitmap's bits back: a round that failed, or another log of the same pages. */
void pv_dirty_merge(uint64_t *bits, const uint64_t *from, size_t words)
{
	for (size_t i = 0; i < words; i++)
		if (from[i])
			__atomic_fetch_or(&bits[i], from[i], __ATOMIC_SEQ_CST);
}

/* Take all bits out, word by word. */
void pv_dirty_harvest(uint64_t *bits, uint64_t *into, size_t words)
{
	for (size_t i = 0; i < words; i++)
		into[i] = bits[i] ? __atomic_exchange_n(&bits[i], 0, __ATOMIC_SEQ_CST) : 0;
}
