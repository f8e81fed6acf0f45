/* What Python sees of page_delta.h; the comments are there. */

#define PV_RUN_CODED ...
#define PV_CODE_XOR ...
#define PV_CODE_LZ4 ...

struct pv_delta_counts {
	uint64_t coded, plain, based, lz4, saved;
};

struct pv_delta *pv_delta_new(const uint64_t *pages, uint32_t regions, uint64_t limit);
void pv_delta_free(struct pv_delta *delta);
void pv_delta_next(struct pv_delta *delta);
void pv_delta_touch(struct pv_delta *delta, uint64_t most);
uint64_t pv_delta_encode(struct pv_delta *delta, uint32_t region, uint8_t *batch, uint64_t size, int use_lz4,
			 struct pv_delta_counts *counts);
int64_t pv_delta_check(const uint8_t *batch, uint64_t size, uint64_t pages);
uint32_t pv_lz4_pack(const uint8_t *page, uint8_t *out, uint32_t room);
int pv_lz4_unpack(const uint8_t *in, uint32_t size, uint8_t *page);
