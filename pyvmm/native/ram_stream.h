/*
 * Guest RAM as a migration sends it: runs of pages packed into batches, and batches unpacked into memory.
 *
 * A batch is a sequence of records, all words little-endian:
 *
 *     u32 first page | u32 count, with PV_RUN_ZERO if all of them are zero | count * 4096 bytes, unless zero
 *
 * What arrives is hostile: unpacking checks all of a batch against the region before it writes any of it.
 */
#ifndef PYVMM_RAM_STREAM_H
#define PYVMM_RAM_STREAM_H

#include "dirty_log.h"

#include <stdbool.h>

#define PV_RUN_ZERO 0x80000000u

/* Where packing has got to in a list of runs. */
struct pv_ram_cursor {
	const struct pv_page_range *ranges;
	uint64_t range_count;
	uint64_t range;   /* index of the run being packed */
	uint32_t page;    /* pages of it that are done */
	uint64_t packed;  /* pages so far */
	uint64_t zero;    /* of these, zero ones */
};

bool pv_page_is_zero(const uint8_t *page);
uint64_t pv_ram_pack(struct pv_ram_cursor *cursor, const uint8_t *hva, uint8_t *out, uint64_t room);
int64_t pv_ram_check(const uint8_t *batch, uint64_t size, uint64_t pages);
int64_t pv_ram_unpack(const uint8_t *batch, uint64_t size, uint8_t *hva, uint64_t pages, uint64_t *received);
uint32_t pv_crc32c(uint32_t crc, const uint8_t *data, uint64_t size);

#endif
