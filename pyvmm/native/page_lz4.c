/*
 * LZ4 blocks (lz4_Block_format.md of the LZ4 project) of exactly one page: positions fit 12 bits, and the table is small
 * enough to be cleared for each. Reading trusts nothing.
 */

#include "page_delta.h"

#include "core.h"

#include <stdbool.h>
#include <string.h>

#define LEAST_MATCH 4u
#define LAST_LITERALS 5u  /* a block ends with so many at least */
#define LAST_MATCH 12u    /* and no match begins closer to the end */
#define HASH_BITS 10
#define GIVE_UP_SHIFT 5   /* each 32 places without a match, the next steps are one longer */

static uint32_t load32(const uint8_t *at)
{
	uint32_t value;
	memcpy(&value, at, sizeof(value));
	return value;
}

/* The bytes behind a nibble of 15. */
static uint8_t *put_rest(uint8_t *out, uint32_t rest)
{
	for (; rest >= 255; rest -= 255)
		*out++ = 255;
	*out++ = (uint8_t)rest;
	return out;
}

/* One sequence; `match` 0 for the last one, which has none. NULL: no room. */
static uint8_t *put_sequence(uint8_t *out, const uint8_t *end, const uint8_t *literals, uint32_t count, uint32_t offset,
			     uint32_t match)
{
	if ((uint64_t)(end - out) < 1 + count / 255 + 1 + count + 2 + match / 255 + 1)
		return NULL;
	uint32_t rest = match ? match - LEAST_MATCH : 0;
	*out++ = (uint8_t)((count < 15 ? count : 15) << 4 | (rest < 15 ? rest : 15));
	if (count >= 15)
		out = put_rest(out, count - 15);
	memcpy(out, literals, count);
	out += count;
	if (!match)
		return out;
	*out++ = (uint8_t)offset;
	*out++ = (uint8_t)(offset >> 8);
	return rest >= 15 ? put_rest(out, rest - 15) : out;
}

/* Bytes of `page` packed into `out`, or 0: they are more than `room`, or nearly. */
uint32_t pv_lz4_pack(const uint8_t *page, uint8_t *out, uint32_t room)
{
	uint16_t table[1 << HASH_BITS] = {0}; /* position + 1 */
	uint8_t *to = out;
	uint32_t anchor = 0, at = 0, misses = 0;

	while (at <= PV_PAGE - LAST_MATCH) {
		uint32_t word = load32(page + at), hash = word * 2654435761u >> (32 - HASH_BITS);
		uint32_t before = table[hash];
		table[hash] = (uint16_t)(at + 1);
		if (!before-- || load32(page + before) != word) {
			at += 1 + (misses++ >> GIVE_UP_SHIFT);
			continue;
		}
		uint32_t match = LEAST_MATCH;
		while (at + match < PV_PAGE - LAST_LITERALS && page[before + match] == page[at + match])
			match++;
		to = put_sequence(to, out + room, page + anchor, at - anchor, at - before, match);
		if (!to)
			return 0;
		at += match;
		anchor = at;
		misses = 0;
	}
	to = put_sequence(to, out + room, page + anchor, PV_PAGE - anchor, 0, 0);
	return to ? (uint32_t)(to - out) : 0;
}

/* A length whose nibble was `nibble`; false: the block ends within it, or it is longer than a page. */
static bool get_length(const uint8_t *in, uint32_t size, uint32_t *at, uint32_t nibble, uint32_t *length)
{
	uint32_t byte = 255;

	for (*length = nibble; nibble == 15 && byte == 255; *length += byte) {
		if (*at >= size || *length > PV_PAGE)
			return false;
		byte = in[(*at)++];
	}
	return true;
}

/* Unpack a block (hostile) that gives exactly a page; 0, or -1 and the page is spoilt. */
int pv_lz4_unpack(const uint8_t *in, uint32_t size, uint8_t *page)
{
	uint32_t at = 0, done = 0;

	while (at < size) {
		uint32_t token = in[at++], count, match;
		if (!get_length(in, size, &at, token >> 4, &count) || count > size - at || count > PV_PAGE - done)
			return -1;
		memcpy(page + done, in + at, count);
		at += count;
		done += count;
		if (at == size)
			return done == PV_PAGE && !(token & 15) ? 0 : -1;
		if (size - at < 2)
			return -1;
		uint32_t offset = in[at] | (uint32_t)in[at + 1] << 8;
		at += 2;
		if (!get_length(in, size, &at, token & 15, &match))
			return -1;
		match += LEAST_MATCH;
		if (!offset || offset > done || match > PV_PAGE - done)
			return -1;
		for (; match; match--, done++) /* it may overlap what it makes */
			page[done] = page[done - offset];
	}
	return -1;
}
