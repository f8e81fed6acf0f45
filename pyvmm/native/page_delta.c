/* See page_delta.h. */

#define _GNU_SOURCE
#include "page_delta.h"

#include "core.h"
#include "ram_stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RECORD 8u
#define TAG 2u
#define LINE_WORDS 8u
#define SPARSE_GOOD 1024u /* so few coded bytes that LZ4 is not tried */
#define PROBES 8u         /* places looked at for one that can be given to another page */
#define KEPT_FOR 2u       /* checkpoints that a page must not have been in */
#define MOST_FAILURES 5u  /* 2 to that power is how often at most a page is sent whole before it is tried again */
#define NOBODY UINT32_MAX

typedef uint64_t __attribute__((aligned(1), may_alias)) loose_word;

struct place {
	uint32_t page; /* NOBODY: free */
	uint32_t used; /* the checkpoint */
	uint32_t region;
	uint32_t next_free; /* place + 1 */
};

struct known {
	uint32_t place; /* + 1; 0: not kept */
	uint8_t wait;   /* as often it is still sent whole */
	uint8_t failures;
};

struct pv_delta {
	struct known *known[PV_MAX_REGIONS];
	struct place *places;
	uint8_t *pages;
	uint64_t count, fresh; /* places; those from `fresh` on were never used */
	uint64_t touched;      /* places that the host has found memory for */
	uint64_t missed;       /* pages that there was no place for */
	uint64_t hand;
	uint32_t free, now;
};

/*
 * For regions of `pages` pages, with `limit` bytes at most for everything. NULL: that is too little, or there is none.
 * Host memory is found for it as it is used.
 */
struct pv_delta *pv_delta_new(const uint64_t *pages, uint32_t regions, uint64_t limit)
{
	uint64_t total = 0, fixed = sizeof(struct pv_delta);

	if (regions > PV_MAX_REGIONS)
		return NULL;
	for (uint32_t i = 0; i < regions; i++)
		total += pages[i];
	fixed += total * sizeof(struct known);
	if (!total || limit < fixed + PV_PAGE + sizeof(struct place))
		return NULL;
	struct pv_delta *delta = calloc(1, sizeof(*delta));
	if (!delta)
		return NULL;
	delta->count = (limit - fixed) / (PV_PAGE + sizeof(struct place));
	if (delta->count > total)
		delta->count = total;
	delta->pages = mmap(NULL, delta->count * PV_PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	bool whole = delta->pages != MAP_FAILED && (delta->places = calloc(delta->count, sizeof(struct place)));
	for (uint32_t i = 0; whole && i < regions; i++)
		whole = (delta->known[i] = calloc(pages[i] ? pages[i] : 1, sizeof(struct known))) != NULL;
	if (!whole) {
		pv_delta_free(delta);
		return NULL;
	}
	return delta;
}

void pv_delta_free(struct pv_delta *delta)
{
	if (!delta)
		return;
	if (delta->pages != MAP_FAILED)
		munmap(delta->pages, delta->count * PV_PAGE);
	for (uint32_t i = 0; i < PV_MAX_REGIONS; i++)
		free(delta->known[i]);
	free(delta->places);
	free(delta);
}

/*
 * Another checkpoint begins. Between two of them: have memory found for the places that the last one missed, `most` at
 * once. That takes the host longer than all the rest, so it is not done while somebody waits for the pages.
 */
void pv_delta_next(struct pv_delta *delta)
{
	delta->now++;
}

void pv_delta_touch(struct pv_delta *delta, uint64_t most)
{
	uint64_t more = delta->missed < most ? delta->missed : most;

	delta->missed = 0;
	if (more > delta->count - delta->touched)
		more = delta->count - delta->touched;
	for (uint64_t i = 0; i < more; i++)
		delta->pages[(delta->touched + i) * PV_PAGE] = 0;
	delta->touched += more;
}

static void forget(struct pv_delta *delta, struct known *known)
{
	if (!known->place)
		return;
	struct place *place = delta->places + known->place - 1;
	place->page = NOBODY;
	place->next_free = delta->free;
	delta->free = known->place;
	known->place = 0;
}

/* A place for a page; 0: the others are in use. Was it one of another page, that is forgotten. */
static uint32_t find_place(struct pv_delta *delta)
{
	if (delta->free) {
		uint32_t place = delta->free;
		delta->free = delta->places[place - 1].next_free;
		return place;
	}
	if (delta->fresh < delta->touched)
		return (uint32_t)++delta->fresh;
	delta->missed++;
	for (unsigned i = 0; i < PROBES && delta->fresh; i++) {
		uint64_t at = delta->hand;
		delta->hand = at + 1 >= delta->fresh ? 0 : at + 1;
		struct place *place = delta->places + at;
		if (delta->now - place->used >= KEPT_FOR) { /* nobody's are in the list of free ones, which is empty */
			delta->known[place->region][place->page].place = 0;
			delta->missed--;
			return (uint32_t)at + 1;
		}
	}
	return 0;
}

/* `page` is what the other side will have there. */
static void keep(struct pv_delta *delta, uint32_t region, uint32_t number, const uint8_t *page)
{
	struct known *known = delta->known[region] + number;

	if (!known->place)
		known->place = find_place(delta);
	if (!known->place)
		return;
	delta->places[known->place - 1] = (struct place){.page = number, .region = region, .used = delta->now};
	memcpy(delta->pages + (uint64_t)(known->place - 1) * PV_PAGE, page, PV_PAGE);
}

/* `words` without its zeros, into `out`, which has room for all; bytes, or 0: more than PV_CODE_MOST. */
static uint32_t pack_sparse(const uint64_t *words, uint8_t *out)
{
	uint64_t lines = 0, data[PV_PAGE / 8];
	uint32_t used = sizeof(lines), count = 0;

	for (unsigned line = 0; line < 64; line++) {
		const uint64_t *word = words + line * LINE_WORDS;
		if (!(word[0] | word[1] | word[2] | word[3] | word[4] | word[5] | word[6] | word[7]))
			continue;
		uint8_t mask = 0;
		for (unsigned i = 0; i < LINE_WORDS; i++)
			if (word[i]) {
				mask |= (uint8_t)(1u << i);
				data[count++] = word[i];
			}
		lines |= 1ull << line;
		out[used++] = mask;
	}
	if (used + count * 8 > PV_CODE_MOST)
		return 0;
	memcpy(out, &lines, sizeof(lines));
	memcpy(out + used, data, (size_t)count * 8);
	return used + count * 8;
}

/* `page` coded into `out`, tag and all; bytes, or 0: it is no smaller. `base`: what the other side has, or NULL. */
static uint32_t encode_page(const uint8_t *page, const uint8_t *base, int use_lz4, uint8_t *out,
			    struct pv_delta_counts *counts)
{
	uint64_t words[PV_PAGE / 8];
	uint8_t packed[PV_CODE_MOST];

	memcpy(words, page, PV_PAGE);
	for (unsigned i = 0; base && i < PV_PAGE / 8; i++)
		words[i] ^= ((const loose_word *)base)[i];
	uint32_t size = pack_sparse(words, out + TAG), tag = base ? PV_CODE_XOR : 0;
	if (use_lz4 && (!size || size > SPARSE_GOOD)) {
		uint32_t other = pv_lz4_pack((const uint8_t *)words, packed, size ? size : PV_CODE_MOST);
		if (other) {
			memcpy(out + TAG, packed, other);
			size = other;
			tag |= PV_CODE_LZ4;
		}
	}
	if (!size)
		return 0;
	counts->based += base != NULL;
	counts->lz4 += (tag & PV_CODE_LZ4) != 0;
	uint16_t word = (uint16_t)(tag | size);
	memcpy(out, &word, TAG);
	return TAG + size;
}

/* Whether `page`, which is going to the other side, went coded; then into `out`, bytes of it. 0: as it is. */
static uint32_t try_page(struct pv_delta *delta, uint32_t region, uint32_t number, const uint8_t *page, int use_lz4,
			 uint8_t *out, struct pv_delta_counts *counts)
{
	struct known *known = delta->known[region] + number;

	if (known->wait) {
		known->wait--; /* and not kept */
		return 0;
	}
	const uint8_t *base = known->place ? delta->pages + (uint64_t)(known->place - 1) * PV_PAGE : NULL;
	uint32_t size = encode_page(page, base, use_lz4, out, counts);
	if (size) {
		known->failures = 0;
	} else if (base) {
		known->wait = (uint8_t)(1u << known->failures);
		known->failures += known->failures < MOST_FAILURES;
		forget(delta, known);
		return 0;
	}
	keep(delta, region, number, page);
	return size;
}

/*
 * Code the pages of a batch that pv_ram_pack made, in its place; the new size, which is not larger. From here on the
 * batch must reach the other side, or the encoder is good for nothing: it takes it that all of it is there.
 *
 * What is written never overtakes what is read: a record's head is only ever added behind a page that became at least
 * a kilobyte smaller.
 */
uint64_t pv_delta_encode(struct pv_delta *delta, uint32_t region, uint8_t *batch, uint64_t size, int use_lz4,
			 struct pv_delta_counts *counts)
{
	uint64_t out = 0;
	uint8_t coded[TAG + sizeof(uint64_t) + PV_PAGE / 64 + PV_PAGE];

	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint32_t count = head[1] & ~PV_RUN_ZERO;
		if (head[1] & PV_RUN_ZERO) {
			for (uint32_t i = 0; i < count; i++)
				forget(delta, delta->known[region] + head[0] + i);
			memmove(batch + out, head, sizeof(head));
			out += RECORD;
			continue;
		}
		uint64_t record = 0; /* where the run that is being written has its head */
		uint32_t run[2] = {0, 0};
		for (uint32_t i = 0; i < count; i++, at += PV_PAGE) {
			uint32_t bytes = try_page(delta, region, head[0] + i, batch + at, use_lz4, coded, counts);
			uint32_t kind = bytes ? PV_RUN_CODED : 0;
			if (!run[1] || (run[1] & PV_RUN_CODED) != kind) {
				record = out;
				out += RECORD;
				run[0] = head[0] + i;
				run[1] = kind;
			}
			if (bytes)
				memcpy(batch + out, coded, bytes);
			else if (out != at)
				memmove(batch + out, batch + at, PV_PAGE);
			out += bytes ? bytes : PV_PAGE;
			run[1]++;
			memcpy(batch + record, run, sizeof(run));
			counts->coded += bytes != 0;
			counts->plain += bytes == 0;
		}
	}
	counts->saved += size - out;
	return out;
}

/* ---- the other side ---- */

static uint32_t ones(uint64_t bits)
{
	return (uint32_t)__builtin_popcountll(bits);
}

/* Whether `size` bytes are words without zeros as page_delta.h has them, no less and no more. */
static bool sparse_is_whole(const uint8_t *coded, uint32_t size)
{
	uint64_t lines;
	uint32_t words = 0;

	if (size < sizeof(lines))
		return false;
	memcpy(&lines, coded, sizeof(lines));
	uint32_t heads = (uint32_t)sizeof(lines) + ones(lines);
	if (size < heads)
		return false;
	for (uint32_t i = sizeof(lines); i < heads; i++) {
		if (!coded[i])
			return false;
		words += ones(coded[i]);
	}
	return size == heads + words * 8;
}

static void unpack_sparse(const uint8_t *coded, uint64_t *words)
{
	uint64_t lines;

	memcpy(&lines, coded, sizeof(lines));
	const uint8_t *mask = coded + sizeof(lines), *data = mask + ones(lines);
	for (; lines; lines &= lines - 1, mask++) {
		uint64_t *line = words + (unsigned)__builtin_ctzll(lines) * LINE_WORDS;
		for (uint32_t left = *mask; left; left &= left - 1, data += 8) {
			uint64_t word;
			memcpy(&word, data, sizeof(word));
			line[__builtin_ctz(left)] ^= word;
		}
	}
}

/* Number of pages in a batch (hostile) with coded ones, or -EINVAL if anything of it is not as it has to be. */
int64_t pv_delta_check(const uint8_t *batch, uint64_t size, uint64_t pages)
{
	int64_t total = 0;
	uint8_t page[PV_PAGE];

	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		if (size - at < RECORD)
			return -EINVAL;
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint64_t count = head[1] & ~(PV_RUN_ZERO | PV_RUN_CODED);
		uint32_t kind = head[1] & (PV_RUN_ZERO | PV_RUN_CODED);
		if (!count || head[0] >= pages || count > pages - head[0] || kind == (PV_RUN_ZERO | PV_RUN_CODED))
			return -EINVAL;
		if (!kind) {
			if (count > (size - at) / PV_PAGE)
				return -EINVAL;
			at += count * PV_PAGE;
		}
		for (uint64_t i = 0; kind == PV_RUN_CODED && i < count; i++) {
			uint16_t tag;
			if (size - at < TAG)
				return -EINVAL;
			memcpy(&tag, batch + at, TAG);
			at += TAG;
			uint32_t bytes = tag & PV_CODE_SIZE;
			if (bytes > size - at || tag & ~(PV_CODE_SIZE | PV_CODE_XOR | PV_CODE_LZ4))
				return -EINVAL;
			if (tag & PV_CODE_LZ4 ? pv_lz4_unpack(batch + at, bytes, page) != 0
					      : !sparse_is_whole(batch + at, bytes))
				return -EINVAL;
			at += bytes;
		}
		total += (int64_t)count;
	}
	return total;
}

/* A checked page: `page` is what was there, and becomes what it is now. Bytes of `coded` that it took. */
uint32_t pv_page_decode(uint8_t *page, const uint8_t *coded)
{
	uint16_t tag;
	uint64_t words[PV_PAGE / 8] = {0};

	memcpy(&tag, coded, TAG);
	if (tag & PV_CODE_LZ4)
		(void)pv_lz4_unpack(coded + TAG, tag & PV_CODE_SIZE, (uint8_t *)words);
	else
		unpack_sparse(coded + TAG, words);
	for (unsigned i = 0; tag & PV_CODE_XOR && i < PV_PAGE / 8; i++)
		words[i] ^= ((const loose_word *)page)[i];
	memcpy(page, words, PV_PAGE);
	return TAG + (tag & PV_CODE_SIZE);
}
