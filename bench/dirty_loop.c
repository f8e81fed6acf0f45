/*
 * The other contestant of dirty.py, a library: what any VMM has to do at least to learn which pages a guest wrote. The
 * same ioctls on the same VM, and one look at each word of the bitmap to count pages and make runs of them.
 */
#define _GNU_SOURCE
#include "dirty_log.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

static uint64_t bits[(3ull << 30) / 4096 / 64];
static struct pv_page_range runs[(3ull << 30) / 4096 / 2 + 1];

static long scan(uint64_t pages)
{
	long count = 0;
	uint64_t made = 0, end = ~0ull;

	for (uint64_t word = 0; word < (pages + 63) / 64; word++)
		for (uint64_t left = bits[word]; left; left &= left - 1) {
			uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(left);
			if (page == end)
				runs[made - 1].count++;
			else
				runs[made++] = (struct pv_page_range){(uint32_t)page, 1};
			end = page + 1;
			count++;
		}
	return count;
}

/* Pages of slot 0, or -1. */
long loop_bitmap(int vm, uint64_t pages)
{
	struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bits};
	struct kvm_clear_dirty_log clear = {.slot = 0, .num_pages = (uint32_t)pages, .dirty_bitmap = bits};

	if (ioctl(vm, KVM_GET_DIRTY_LOG, &log) < 0)
		return -1;
	long count = scan(pages);
	if (ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
		return -1;
	return count;
}

long loop_ring(int vm, struct pv_dirty_ring *ring, uint64_t pages)
{
	struct kvm_dirty_gfn *entries = ring->entries;

	__builtin_memset(bits, 0, (pages + 63) / 64 * 8);
	for (;; ring->next++) {
		struct kvm_dirty_gfn *entry = &entries[ring->next % ring->size];
		if (__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		if (entry->slot == 0 && entry->offset < pages)
			bits[entry->offset / 64] |= 1ull << entry->offset % 64;
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
	if (ioctl(vm, KVM_RESET_DIRTY_RINGS, 0) < 0)
		return -1;
	return scan(pages);
}
