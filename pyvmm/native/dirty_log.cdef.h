/* What Python sees of dirty_log.h; the comments are there. */

struct pv_page_range { uint32_t first, count; };
struct pv_dirty_ring { uint32_t size, next; ...; };

long pv_dirty_log_get(int vm_fd, uint32_t slot, uint64_t pages, int manual, uint64_t *scratch, uint64_t *marks);
long pv_dirty_ring_reap(struct pv_dirty_ring *ring, uint64_t *const *marks, const uint64_t *pages, uint32_t slots);
long pv_dirty_ring_skip(struct pv_dirty_ring *ring);
int pv_dirty_ring_map(struct pv_dirty_ring *ring, int vcpu_fd, uint32_t size);
void pv_dirty_ring_unmap(struct pv_dirty_ring *ring);
uint64_t pv_dirty_count(const uint64_t *bits, size_t words);
size_t pv_dirty_ranges(const uint64_t *bits, uint64_t pages, uint64_t from, struct pv_page_range *ranges, size_t max);
