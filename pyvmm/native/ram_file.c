/* See ram_file.h. */

#define _GNU_SOURCE
#include "ram_file.h"

#include "core.h"
#include "ram_stream.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * Put a file's pages where others are mapped: whoever uses these addresses, KVM among them, sees the file from now on.
 * 0 or -errno; then the old mapping may be gone, and so must the machine be.
 */
int pv_remap(uint64_t hva, uint64_t size, int fd, uint64_t offset, int is_private)
{
	int flags = MAP_FIXED | MAP_NORESERVE | (is_private ? MAP_PRIVATE : MAP_SHARED);

	if (mmap((void *)(uintptr_t)hva, size, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset) == MAP_FAILED)
		return -errno;
	return 0;
}

static void add_page(uint32_t *crc, uint64_t number, const uint8_t *page)
{
	*crc = pv_crc32c(*crc, (const uint8_t *)&number, sizeof(number));
	*crc = pv_crc32c(*crc, page, PV_PAGE);
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

/*
 * Write those of `count` pages from page `first` on that are not zero, where they belong in a file whose region starts
 * at `offset`. *crc and *written go on. 0 or -errno. Nobody may write these pages meanwhile.
 */
int pv_ram_write(int fd, uint64_t offset, const uint8_t *hva, uint64_t first, uint64_t count, uint32_t *crc,
		 uint64_t *written)
{
	uint64_t run = 0; /* pages of data that end where we are */

	for (uint64_t n = first; n <= first + count; n++) {
		const uint8_t *page = hva + n * PV_PAGE;
		/* Not longer than a mebibyte, so that what is written is still in the cache. */
		bool data = n < first + count && run < 256 && !pv_page_is_zero(page);
		if (data) {
			add_page(crc, n, page);
			run++;
			continue;
		}
		if (!run)
			continue;
		int result = write_all(fd, page - run * PV_PAGE, run * PV_PAGE, offset + (n - run) * PV_PAGE);
		if (result)
			return result;
		*written += run;
		bool look_again = run == 256;
		run = 0;
		if (look_again)
			n--;
	}
	return 0;
}

/* The CRC, and the number of pages that are not zero, of what is there. */
void pv_ram_sum(const uint8_t *hva, uint64_t first, uint64_t count, uint32_t *crc, uint64_t *present)
{
	for (uint64_t n = first; n < first + count; n++) {
		const uint8_t *page = hva + n * PV_PAGE;
		if (pv_page_is_zero(page))
			continue;
		add_page(crc, n, page);
		++*present;
	}
}

/* Runs that are at most `gap` pages apart become one. The number that are left. */
static uint64_t merge_runs(uint64_t *runs, uint64_t used, uint64_t gap)
{
	uint64_t last = 0;

	for (uint64_t i = 1; i < used; i++) {
		uint64_t *before = runs + 2 * last, *run = runs + 2 * i;
		if (run[0] - (before[0] + before[1]) <= gap) {
			before[1] = run[0] + run[1] - before[0];
			continue;
		}
		last++;
		runs[2 * last] = run[0];
		runs[2 * last + 1] = run[1];
	}
	return used ? last + 1 : 0;
}

/*
 * Add to `runs`, pairs of (first page, pages), where `count` pages from `first` on differ from the same pages of `base`;
 * NULL for either is pages of zeros. At most `room` runs (at least one): were there more, those with small gaps between
 * them become one, so that it may hold pages that do not differ. *used and *gap go on from call to call, in ascending
 * order of pages; both start as 0.
 */
void pv_ram_differences(const uint8_t *hva, const uint8_t *base, uint64_t first, uint64_t count, uint64_t *runs,
			uint64_t room, uint64_t *used, uint64_t *gap)
{
	for (uint64_t n = first; n < first + count; n++) {
		const uint8_t *page = hva ? hva + n * PV_PAGE : NULL;
		const uint8_t *was = base ? base + n * PV_PAGE : NULL;
		bool same = page && was ? !memcmp(page, was, PV_PAGE)
			    : page || was ? pv_page_is_zero(page ? page : was) : true;
		if (same)
			continue;
		uint64_t *last = *used ? runs + 2 * (*used - 1) : NULL;
		if (last && n - (last[0] + last[1]) <= *gap) {
			last[1] = n + 1 - last[0];
			continue;
		}
		while (*used == room && room > 1) {
			*gap = *gap ? *gap * 2 : 1;
			*used = merge_runs(runs, *used, *gap);
		}
		last = *used ? runs + 2 * (*used - 1) : NULL;
		if (last && (n - (last[0] + last[1]) <= *gap || *used == room)) {
			last[1] = n + 1 - last[0];
			continue;
		}
		runs[2 * *used] = n;
		runs[2 * *used + 1] = 1;
		++*used;
	}
}
