/* What the dirtier's two halves say to each other: number in RAX, arguments in RDI, RSI, RDX. */
#pragma once

#include <stdint.h>

#define CALL_ROUND_DONE 1 /* round, TSC ticks it took: print, then wait for the next period */
#define CALL_CORRUPT 2    /* page, round, what was found: a page lost what was written to it */
#define CALL_END 3

struct job {
    uint64_t first_page; /* address */
    uint64_t pages;
    uint64_t rounds; /* 0: for ever */
    uint64_t stride; /* in pages */
    uint64_t work;   /* thousands of turns of an empty loop, each round */
};
