/*
 * Pages as what has changed in them since the last checkpoint, one by one and only where that is smaller.
 *
 * A batch of ram_stream.h may then have a third kind of record:
 *
 *     u32 first page | u32 count with PV_RUN_CODED | for each page: u16 tag | coded bytes
 *
 * The tag holds the number of coded bytes and how to read them. What they give is the page, or with PV_CODE_XOR the
 * page XOR what the other side has there. Without PV_CODE_LZ4 they are
 *
 *     u64 which of the page's 64 lines are not zero | u8 for each of these, which of its 8 words are not | these words
 *
 * and with it an LZ4 block (page_lz4.c). A line that is named has a word, and nothing is left over.
 *
 * The encoder keeps what it sent last of some pages, within a bound. A page whose changes were no smaller than itself is
 * sent whole for a while, the longer the more often that happened, and costs no room then.
 */
#ifndef PYVMM_PAGE_DELTA_H
#define PYVMM_PAGE_DELTA_H

#include <stdint.h>

#define PV_RUN_CODED 0x40000000u
#define PV_CODE_XOR 0x8000u
#define PV_CODE_LZ4 0x4000u
#define PV_CODE_SIZE 0x1fffu
#define PV_CODE_MOST 3072u /* coded bytes of a page: more gains too little */

struct pv_delta;

struct pv_delta_counts {
	uint64_t coded; /* pages */
	uint64_t plain; /* pages, not zero ones */
	uint64_t based; /* of the coded ones, with PV_CODE_XOR */
	uint64_t lz4;   /* of the coded ones, with PV_CODE_LZ4 */
	uint64_t saved; /* bytes */
};

struct pv_delta *pv_delta_new(const uint64_t *pages, uint32_t regions, uint64_t limit);
void pv_delta_free(struct pv_delta *delta);
void pv_delta_next(struct pv_delta *delta);
void pv_delta_touch(struct pv_delta *delta, uint64_t most);
uint64_t pv_delta_encode(struct pv_delta *delta, uint32_t region, uint8_t *batch, uint64_t size, int use_lz4,
			 struct pv_delta_counts *counts);
int64_t pv_delta_check(const uint8_t *batch, uint64_t size, uint64_t pages);
uint32_t pv_page_decode(uint8_t *page, const uint8_t *coded);

uint32_t pv_lz4_pack(const uint8_t *page, uint8_t *out, uint32_t room);
int pv_lz4_unpack(const uint8_t *in, uint32_t size, uint8_t *page);

#endif
