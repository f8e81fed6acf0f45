/*
 * Guest RAM in a file that can be mapped: page n of a region lies at a fixed offset plus n * 4096, and pages of zeros
 * are holes. The CRC32C covers the pages that are not zero, each behind its number, in ascending order.
 */
#ifndef PYVMM_RAM_FILE_H
#define PYVMM_RAM_FILE_H

#include <stdint.h>

int pv_remap(uint64_t hva, uint64_t size, int fd, uint64_t offset, int is_private);
int pv_ram_write(int fd, uint64_t offset, const uint8_t *hva, uint64_t first, uint64_t count, uint32_t *crc,
		 uint64_t *written);
void pv_ram_sum(const uint8_t *hva, uint64_t first, uint64_t count, uint32_t *crc, uint64_t *present);
void pv_ram_differences(const uint8_t *hva, const uint8_t *base, uint64_t first, uint64_t count, uint64_t *runs,
			uint64_t room, uint64_t *used, uint64_t *gap);

#endif
