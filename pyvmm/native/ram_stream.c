/* See ram_stream.h. */

#include "ram_stream.h"

#include "core.h"

#include <errno.h>
#include <string.h>

#define RECORD 8u

/* Of a page anywhere: behind the head of a frame and a record it is not at a multiple of eight. */
typedef uint64_t __attribute__((aligned(1), may_alias)) loose_word;

bool pv_page_is_zero(const uint8_t *page)
{
	const loose_word *words = (const loose_word *)page;

	/* Most pages that are not zero say so early; then 64 bytes at a time. */
	if (words[0] | words[PV_PAGE / 16] | words[PV_PAGE / 8 - 1])
		return false;
	for (unsigned i = 0; i < PV_PAGE / 8; i += 8)
		if (words[i] | words[i + 1] | words[i + 2] | words[i + 3] | words[i + 4] | words[i + 5] | words[i + 6] |
		    words[i + 7])
			return false;
	return true;
}

/*
 * Fill `out` with records, as many as there is room for; how many bytes. 0: all runs are packed, or there is no room
 * for even one page.
 *
 * The guest may write a page meanwhile. It is logged then and comes again; but the copy must be what is judged to be
 * zero or not, so a page is copied first and looked at second.
 */
uint64_t pv_ram_pack(struct pv_ram_cursor *cursor, const uint8_t *hva, uint8_t *out, uint64_t room)
{
	uint64_t used = 0;
	uint8_t *record = NULL;
	uint32_t next_in_record = 0;
	bool record_zero = false;

	while (cursor->range < cursor->range_count) {
		const struct pv_page_range *range = &cursor->ranges[cursor->range];
		if (cursor->page == range->count) {
			cursor->range++;
			cursor->page = 0;
			continue;
		}
		if (used + RECORD + PV_PAGE > room)
			break;
		uint32_t page = range->first + cursor->page;
		bool goes_on = record && page == next_in_record;
		uint8_t *body = out + used + (goes_on && !record_zero ? 0 : RECORD);
		memcpy(body, hva + (uint64_t)page * PV_PAGE, PV_PAGE);
		bool zero = pv_page_is_zero(body);
		if (!goes_on || zero != record_zero) {
			/* Behind a run of data the copy lies where the head goes, but then it is a zero page's. */
			record = out + used;
			record_zero = zero;
			uint32_t head[2] = {page, zero ? PV_RUN_ZERO : 0};
			memcpy(record, head, sizeof(head));
			used += RECORD;
		}
		uint32_t count;
		memcpy(&count, record + 4, sizeof(count));
		count++;
		memcpy(record + 4, &count, sizeof(count));
		if (!zero)
			used += PV_PAGE;
		else
			cursor->zero++;
		next_in_record = page + 1;
		cursor->page++;
		cursor->packed++;
	}
	return used;
}

/* Number of pages in a batch, or -EINVAL if any record of it does not fit the batch or the region. */
int64_t pv_ram_check(const uint8_t *batch, uint64_t size, uint64_t pages)
{
	int64_t total = 0;

	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		if (size - at < RECORD)
			return -EINVAL;
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint64_t count = head[1] & ~PV_RUN_ZERO;
		if (!count || head[0] >= pages || count > pages - head[0])
			return -EINVAL;
		if (!(head[1] & PV_RUN_ZERO)) {
			if (count > (size - at) / PV_PAGE)
				return -EINVAL;
			at += count * PV_PAGE;
		}
		total += (int64_t)count;
	}
	return total;
}

/*
 * Put a batch into memory of `pages` pages; how many it held, or -EINVAL and nothing written. `received` has a bit for
 * each page that came before: memory begins as zeros, so a zero page that is the first of its place is not touched,
 * and the host need not find memory for it.
 */
int64_t pv_ram_unpack(const uint8_t *batch, uint64_t size, uint8_t *hva, uint64_t pages, uint64_t *received)
{
	int64_t total = pv_ram_check(batch, size, pages);

	if (total < 0)
		return total;
	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint32_t count = head[1] & ~PV_RUN_ZERO;
		if (head[1] & PV_RUN_ZERO) {
			for (uint32_t page = head[0]; page < head[0] + count; page++)
				if (received[page / 64] >> (page % 64) & 1)
					memset(hva + (uint64_t)page * PV_PAGE, 0, PV_PAGE);
		} else {
			memcpy(hva + (uint64_t)head[0] * PV_PAGE, batch + at, (uint64_t)count * PV_PAGE);
			at += (uint64_t)count * PV_PAGE;
			pv_dirty_mark(received, head[0], (uint64_t)head[0] + count);
		}
	}
	return total;
}

/* ---- CRC-32C (RFC 3720, appendix B.4): the polynomial that x86 has an instruction for ---- */

static uint32_t crc32c_by_bits(uint32_t crc, const uint8_t *data, uint64_t size)
{
	while (size--) {
		crc ^= *data++;
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return crc;
}

__attribute__((target("sse4.2"))) static uint32_t crc32c_by_instruction(uint32_t crc, const uint8_t *data, uint64_t size)
{
	uint64_t wide = crc;

	for (; size >= 8; size -= 8, data += 8) {
		uint64_t word;
		memcpy(&word, data, sizeof(word));
		wide = __builtin_ia32_crc32di(wide, word);
	}
	crc = (uint32_t)wide;
	while (size--)
		crc = __builtin_ia32_crc32qi(crc, *data++);
	return crc;
}

/* CRC-32C of `size` more bytes behind what `crc` (0 at first) is the checksum of. */
uint32_t pv_crc32c(uint32_t crc, const uint8_t *data, uint64_t size)
{
	return ~(__builtin_cpu_supports("sse4.2") ? crc32c_by_instruction(~crc, data, size)
						   : crc32c_by_bits(~crc, data, size));
}
