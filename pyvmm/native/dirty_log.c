/* See dirty_log.h. */

#include "dirty_log.h"

#include "core.h"

#include <errno.h>
#include <sys/mman.h>

/*
 * Take memslot `slot`'s bits from KVM and add them to `marks`; `scratch` has as many words as the slot has 64 pages
 * begun. With manual protection the bits are cleared after they were read, and only those: a write in between stays
 * logged. Returns the number of pages KVM had logged, or -errno; then no bit is lost.
 */
long pv_dirty_log_get(int vm_fd, uint32_t slot, uint64_t pages, int manual, uint64_t *scratch, uint64_t *marks)
{
	size_t words = (pages + 63) / 64;
	struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = scratch};

	if (ioctl(vm_fd, KVM_GET_DIRTY_LOG, &log) < 0)
		return -errno;
	if (pages % 64) /* what lies behind the slot's end is no page, whatever its bit says */
		scratch[words - 1] &= (1ull << pages % 64) - 1;
	uint64_t count = pv_dirty_count(scratch, words);
	if (!count)
		return 0;
	if (manual) {
		struct kvm_clear_dirty_log clear = {
			.slot = slot, .num_pages = (uint32_t)pages, .first_page = 0, .dirty_bitmap = scratch,
		};
		if (ioctl(vm_fd, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
			return -errno;
	}
	pv_dirty_merge(marks, scratch, words);
	return (long)count;
}

/*
 * Take the entries that KVM has published in a ring. marks[s] is the bitmap of memslot s, pages[s] its size; other
 * slots are nobody's RAM. The caller then lets KVM write-protect the pages again (KVM_RESET_DIRTY_RINGS). One thread
 * at a time. Returns how many entries there were.
 */
long pv_dirty_ring_reap(struct pv_dirty_ring *ring, uint64_t *const *marks, const uint64_t *pages, uint32_t slots)
{
	struct kvm_dirty_gfn *entries = ring->entries;
	long count = 0;

	while (count < (long)ring->size) {
		struct kvm_dirty_gfn *entry = &entries[ring->next % ring->size];
		/* The flag is published behind the entry, and our answer must not overtake our reading it. */
		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		if (entry->slot < slots && entry->offset < pages[entry->slot])
			pv_dirty_mark(marks[entry->slot], entry->offset, entry->offset + 1);
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		ring->next++;
		count++;
	}
	return count;
}

/*
 * Behind entries that KVM overwrote before they were taken (it had more than the ring holds) comes a gap that KVM counts
 * as used: hand it back as taken, or the vCPU never runs again. Call it only while the ring is full. Returns its length.
 */
long pv_dirty_ring_skip(struct pv_dirty_ring *ring)
{
	struct kvm_dirty_gfn *entries = ring->entries;
	uint32_t gap = 0;

	while (gap < ring->size && __atomic_load_n(&entries[(ring->next + gap) % ring->size].flags, __ATOMIC_ACQUIRE) !=
					   KVM_DIRTY_GFN_F_DIRTY)
		gap++;
	if (gap == ring->size)
		return 0;
	for (uint32_t i = 0; i < gap; i++)
		__atomic_store_n(&entries[ring->next++ % ring->size].flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	return gap;
}

/* Map the ring of `size` entries behind a vCPU's kvm_run; 0 or -errno. */
int pv_dirty_ring_map(struct pv_dirty_ring *ring, int vcpu_fd, uint32_t size)
{
	void *at = mmap(NULL, size * sizeof(struct kvm_dirty_gfn), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd,
			(off_t)KVM_DIRTY_LOG_PAGE_OFFSET * PV_PAGE);
	if (at == MAP_FAILED)
		return -errno;
	*ring = (struct pv_dirty_ring){.entries = at, .size = size};
	return 0;
}

void pv_dirty_ring_unmap(struct pv_dirty_ring *ring)
{
	if (ring->entries)
		munmap(ring->entries, ring->size * sizeof(struct kvm_dirty_gfn));
	*ring = (struct pv_dirty_ring){0};
}

/* Set bits. */
uint64_t pv_dirty_count(const uint64_t *bits, size_t words)
{
	uint64_t count = 0;

	for (size_t i = 0; i < words; i++)
		if (bits[i])
			count += (uint64_t)__builtin_popcountll(bits[i]);
	return count;
}

/* First page at or behind `from` whose bit is `wanted`, or `pages`. */
static uint64_t next_page(const uint64_t *bits, uint64_t pages, uint64_t from, bool wanted)
{
	while (from < pages) {
		uint64_t word = (wanted ? bits[from / 64] : ~bits[from / 64]) >> (from % 64);
		if (word) {
			from += (uint64_t)__builtin_ctzll(word);
			return from < pages ? from : pages;
		}
		from = (from / 64 + 1) * 64;
	}
	return pages;
}

/*
 * Up to `max` runs of set bits from page `from` on; how many. Fewer than `max`: there are no more. Else go on behind
 * the last one.
 */
size_t pv_dirty_ranges(const uint64_t *bits, uint64_t pages, uint64_t from, struct pv_page_range *ranges, size_t max)
{
	size_t n = 0;

	for (; n < max; n++) {
		uint64_t first = next_page(bits, pages, from, true);
		if (first >= pages)
			break;
		from = next_page(bits, pages, first, false);
		ranges[n] = (struct pv_page_range){(uint32_t)first, (uint32_t)(from - first)};
	}
	return n;
}
