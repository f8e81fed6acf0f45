/* See replica.h. */

#define _GNU_SOURCE
#include "replica.h"

#include "core.h"
#include "ram_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RECORD 8

/* Forget the replica's own copies of the pages in `ranges`, which ascend; 0 or -errno. */
int pv_replica_drop(uint8_t *hva, const struct pv_page_range *ranges, uint64_t count)
{
	for (uint64_t i = 0; i < count;) {
		uint64_t first = ranges[i].first, end = first + ranges[i].count;
		for (i++; i < count && ranges[i].first - end <= PV_DROP_GAP; i++)
			end = (uint64_t)ranges[i].first + ranges[i].count;
		if (madvise(hva + first * PV_PAGE, (end - first) * PV_PAGE, MADV_DONTNEED))
			return -errno;
	}
	return 0;
}

static int write_all(int fd, const uint8_t *from, uint64_t size, uint64_t at)
{
	while (size) {
		ssize_t done = pwrite(fd, from, size, (off_t)at);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done < 0 ? -errno : -EIO;
		from += done;
		at += (uint64_t)done;
		size -= (uint64_t)done;
	}
	return 0;
}

/* Put a checked batch into the file; pages of zeros become holes. 0 or -errno: then the file is half old, half new. */
int pv_replica_write(int fd, const uint8_t *batch, uint64_t size)
{
	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint64_t offset = (uint64_t)head[0] * PV_PAGE, bytes = (uint64_t)(head[1] & ~PV_RUN_ZERO) * PV_PAGE;
		if (head[1] & PV_RUN_ZERO) {
			if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes))
				return -errno;
			continue;
		}
		int result = write_all(fd, batch + at, bytes, offset);
		if (result)
			return result;
		at += bytes;
	}
	return 0;
}
