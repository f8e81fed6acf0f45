/* What Python sees of ram_stream.h; the comments are there. */

#define PV_RUN_ZERO ...

struct pv_ram_cursor {
	const struct pv_page_range *ranges;
	uint64_t range_count, range;
	uint32_t page;
	uint64_t packed, zero;
};

uint64_t pv_ram_pack(struct pv_ram_cursor *cursor, const uint8_t *hva, uint8_t *out, uint64_t room);
int64_t pv_ram_check(const uint8_t *batch, uint64_t size, uint64_t pages);
int64_t pv_ram_unpack(const uint8_t *batch, uint64_t size, uint8_t *hva, uint64_t pages, uint64_t *received);
uint32_t pv_crc32c(uint32_t crc, const uint8_t *data, uint64_t size);
