/* What Python sees of replica.h; the comments are there. */

int pv_free_covered(int fd, const struct pv_page_range *ranges, uint64_t count);
uint64_t pv_own_pages(const uint64_t *told, uint64_t pages, uint64_t *bits);
void pv_replica_mark(const uint8_t *batch, uint64_t size, int coded, uint64_t *bits);
int pv_replica_drop(uint8_t *hva, const struct pv_page_range *ranges, uint64_t count);
int64_t pv_replica_write(int fd, const uint8_t *batch, uint64_t size, int coded);
