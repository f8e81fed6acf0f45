/* What Python sees of replica.h; the comments are there. */

int pv_replica_drop(uint8_t *hva, const struct pv_page_range *ranges, uint64_t count);
int64_t pv_replica_write(int fd, const uint8_t *batch, uint64_t size, int coded);
