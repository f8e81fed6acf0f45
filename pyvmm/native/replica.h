/*
 * Guest RAM of a COLO secondary: the last checkpoint in a memfd, mapped MAP_PRIVATE where the guest has it. What the
 * replica writes is the kernel's copy-on-write, and is undone by dropping those copies; what a checkpoint brings goes
 * into the file, where every page that has no copy shows it at once.
 *
 * Both happen while nothing runs. A batch (ram_stream.h) was checked before (pv_ram_check, pv_delta_check).
 */
#ifndef PYVMM_REPLICA_H
#define PYVMM_REPLICA_H

#include "dirty_log.h"

/* Runs of dropped pages that are so many clean ones apart, or fewer, are dropped as one: a system call costs more than
 * finding a page again. */
#define PV_DROP_GAP 8

int pv_free_covered(int fd, const struct pv_page_range *ranges, uint64_t count);
uint64_t pv_own_pages(const uint64_t *told, uint64_t pages, uint64_t *bits);
void pv_replica_mark(const uint8_t *batch, uint64_t size, int coded, uint64_t *bits);
int pv_replica_drop(uint8_t *hva, const struct pv_page_range *ranges, uint64_t count);
int64_t pv_replica_write(int fd, const uint8_t *batch, uint64_t size, int coded);

#endif
