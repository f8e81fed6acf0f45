/* What disk-reader's two halves share. */
#pragma once

#include <stdint.h>

#include "virtio_mmio.h"

#define CALL_BEGIN 1  /* RDI: nonzero for writing */
#define CALL_END 2    /* requests done */
#define CALL_DONE 3
#define CALL_STATUS 4 /* sector, status */
#define CALL_WRONG 5  /* sector, what is there */
#define CALL_SILENT 6
#define CALL_WROTE 7  /* number */
#define CALL_LOST 8   /* number, what is in its place */

#define ENTRIES 256u
#define DEPTH_MAX 64u  /* three descriptors each */
#define ROOM 65536u
#define SECTOR 512u

struct job {
    uint64_t registers;
    struct virtq_desc *descriptors;
    volatile struct virtq_avail *available;
    volatile struct virtq_used *used;
    uint8_t *headers; /* DEPTH_MAX of 32 bytes: header, then status */
    uint8_t *buffers; /* DEPTH_MAX of ROOM bytes */
    uint64_t capacity; /* sectors */
    uint64_t size, depth, requests;
    uint64_t write, verify;
    uint64_t journal; /* thousands of pauses between two numbers; 0: no journal */
};
