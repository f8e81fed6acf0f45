/* What net-echo's two halves share. */
#pragma once

#include <stdint.h>

#include "virtio_mmio.h"

#define CALL_QUIT 1 /* ARP, ICMP and UDP packets answered */

#define ENTRIES 64u
#define BUFFER_SIZE 2048u

enum { RECEIVE, TRANSMIT };

struct ring {
    struct virtq_desc *descriptors;
    volatile struct virtq_avail *available;
    volatile struct virtq_used *used;
};

struct card {
    uint64_t registers;
    struct ring rings[2];
    uint8_t *buffers; /* ENTRIES of BUFFER_SIZE */
    uint8_t mac[6];
    uint8_t ip[4];
};
