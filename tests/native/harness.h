/* What harnesses share: checks that end them, numbers that a seed repeats, memory that is no larger than asked for. */
#ifndef PYVMM_HARNESS_H
#define PYVMM_HARNESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			abort(); \
		} \
	} while (0)

static uint64_t state;

static inline uint64_t rnd(void) /* xorshift64*, Vigna 2014 */
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return state * 0x2545f4914f6cdd1dull;
}

static inline uint64_t below(uint64_t limit)
{
	return (rnd() >> 16) % limit;
}

static inline bool one_in(uint64_t n)
{
	return !below(n);
}

static inline void *memory(uint64_t size)
{
	void *at = calloc(size ? size : 1, 1);
	CHECK(at);
	return at;
}

/* Bit `page` of a bitmap. */
static inline bool has(const uint64_t *bits, uint64_t page)
{
	return bits[page / 64] >> page % 64 & 1;
}

#endif
