/* See replica.h. */

#define _GNU_SOURCE
#include "replica.h"

#include "core.h"
#include "page_delta.h"
#include "ram_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RECORD 8
#define OF_A_FILE (1ull << 61) /* /proc/PID/pagemap: Documentation/admin-guide/mm/pagemap.rst */
#define SOMEWHERE (3ull << 62) /* present, or swapped */
#define AT_ONCE 32 /* pages that are read, decoded and written with one call each */

/*
 * Mark in `bits`, which are all clear, those of `pages` pages of a private mapping that are copies, by what pagemap told
 * of them; their number.
 */
uint64_t pv_own_pages(const uint64_t *told, uint64_t pages, uint64_t *bits)
{
	uint64_t total = 0;

	for (uint64_t page = 0; page < pages; page++) {
		if (!(told[page] & SOMEWHERE) || told[page] & OF_A_FILE)
			continue;
		bits[page / 64] |= 1ull << page % 64;
		total++;
	}
	return total;
}

/* Give back the file's pages in `ranges`, over which there are copies that nobody will drop; 0 or -errno. */
int pv_free_covered(int fd, const struct pv_page_range *ranges, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)ranges[i].first * PV_PAGE,
			      (off_t)ranges[i].count * PV_PAGE))
			return -errno;
	return 0;
}

/* Mark in `bits` the pages of a checked batch, which may hold `coded` ones. */
void pv_replica_mark(const uint8_t *batch, uint64_t size, int coded, uint64_t *bits)
{
	uint32_t kinds = PV_RUN_ZERO | (coded ? PV_RUN_CODED : 0);

	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint64_t count = head[1] & ~kinds;
		pv_dirty_mark(bits, head[0], head[0] + count);
		if (!(head[1] & kinds))
			at += count * PV_PAGE;
		for (; head[1] & kinds & ~PV_RUN_ZERO && count; count--) {
			uint16_t tag;
			memcpy(&tag, batch + at, sizeof(tag));
			at += sizeof(tag) + (tag & PV_CODE_SIZE);
		}
	}
}

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

static int read_all(int fd, uint8_t *to, uint64_t size, uint64_t at)
{
	while (size) {
		ssize_t done = pread(fd, to, size, (off_t)at);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done < 0 ? -errno : -EIO;
		to += done;
		at += (uint64_t)done;
		size -= (uint64_t)done;
	}
	return 0;
}

/* Coded pages (page_delta.h) over what the file has there; bytes of `coded` they took, or -errno. */
static int64_t write_coded(int fd, const uint8_t *coded, uint64_t offset, uint64_t count)
{
	uint8_t pages[AT_ONCE * PV_PAGE];
	int64_t used = 0;

	while (count) {
		uint64_t now = count < AT_ONCE ? count : AT_ONCE;
		int result = read_all(fd, pages, now * PV_PAGE, offset);
		if (result)
			return result;
		for (uint64_t i = 0; i < now; i++)
			used += pv_page_decode(pages + i * PV_PAGE, coded + used);
		result = write_all(fd, pages, now * PV_PAGE, offset);
		if (result)
			return result;
		offset += now * PV_PAGE;
		count -= now;
	}
	return used;
}

/*
 * Put a batch into the file, which pv_ram_check has checked, or pv_delta_check if it may hold `coded` pages; pages of
 * zeros become holes. Pages, or -errno: then the file is half old, half new.
 */
int64_t pv_replica_write(int fd, const uint8_t *batch, uint64_t size, int coded)
{
	uint32_t kinds = PV_RUN_ZERO | (coded ? PV_RUN_CODED : 0);
	int64_t total = 0;

	for (uint64_t at = 0; at < size;) {
		uint32_t head[2];
		memcpy(head, batch + at, sizeof(head));
		at += RECORD;
		uint64_t offset = (uint64_t)head[0] * PV_PAGE, count = head[1] & ~kinds;
		int64_t used = (int64_t)(count * PV_PAGE);
		total += (int64_t)count;
		if (head[1] & PV_RUN_ZERO) {
			if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)used))
				return -errno;
			continue;
		}
		if (head[1] & kinds)
			used = write_coded(fd, batch + at, offset, count);
		else
			used = write_all(fd, batch + at, (uint64_t)used, offset) ?: used; /* an error, if there is one */
		if (used < 0)
			return used;
		at += (uint64_t)used;
	}
	return total;
}
