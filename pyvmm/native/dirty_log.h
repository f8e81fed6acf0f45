/*
 * What vCPUs wrote to guest memory, as KVM logs it: by bitmap (KVM_GET_DIRTY_LOG, api.rst 4.8 and 4.117) or by rings
 * (api.rst 8.29). Both end up in the bitmap that the host's own writes are marked in (dirty_bitmap.c), so that one
 * harvest has them all.
 *
 * Order, which makes a lost write impossible: a page is taken out of the log and write-protected again before anybody
 * reads it, so a write that comes later is logged anew.
 */
#ifndef PYVMM_DIRTY_LOG_H
#define PYVMM_DIRTY_LOG_H

#include <stddef.h>
#include <stdint.h>

/* A run of pages, counted from the start of their region. */
struct pv_page_range {
	uint32_t first, count;
};

/* One vCPU's ring, mapped behind its kvm_run. */
struct pv_dirty_ring {
	void *entries; /* struct kvm_dirty_gfn[size] */
	uint32_t size;
	uint32_t next; /* where the next entry will be; counts on without end, taken modulo size */
};

long pv_dirty_log_get(int vm_fd, uint32_t slot, uint64_t pages, int manual, uint64_t *scratch, uint64_t *marks);
long pv_dirty_ring_reap(struct pv_dirty_ring *ring, uint64_t *const *marks, const uint64_t *pages, uint32_t slots);
long pv_dirty_ring_skip(struct pv_dirty_ring *ring);
int pv_dirty_ring_map(struct pv_dirty_ring *ring, int vcpu_fd, uint32_t size);
void pv_dirty_ring_unmap(struct pv_dirty_ring *ring);
uint64_t pv_dirty_count(const uint64_t *bits, size_t words);
size_t pv_dirty_ranges(const uint64_t *bits, uint64_t pages, uint64_t from, struct pv_page_range *ranges, size_t max);

#endif
