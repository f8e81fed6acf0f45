/*
 * Drives what moves guest RAM: a migration's batches as a hostile source would send them, snapshot files on a failing
 * disk. Each is compared with a model that is written differently; memory is exactly as large as it is said to be, so
 * that a byte too far is seen.
 *
 *   ram_harness stream|file SEED ROUNDS
 *
 * Prints one JSON object: how often it came upon what. Any difference aborts. Linked with --wrap=pwrite.
 */
#define _GNU_SOURCE
#include "core.h"
#include "harness.h"
#include "ram_file.h"
#include "ram_stream.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* -- batches of a migration ------------------------------------------------------------------------- */

#define MOST_PAGES 40

static void fill(uint8_t *ram, uint64_t pages)
{
	for (uint64_t page = 0; page < pages; page++) {
		if (one_in(3))
			continue;
		uint8_t *at = ram + page * PV_PAGE;
		if (one_in(3)) /* one byte only, which a hasty look would miss */
			at[below(PV_PAGE)] = 1;
		else
			memset(at, (int)(1 + below(255)), PV_PAGE);
	}
}

/* Whether a batch is right, and if so what memory is behind it. Byte by byte, in 128 bits. */
static bool model_unpack(const uint8_t *batch, uint64_t size, uint8_t *ram, uint64_t pages, bool *received, int64_t *total)
{
	for (int pass = 0; pass < 2; pass++) {
		unsigned __int128 at = 0;
		*total = 0;
		while (at < size) {
			if (at + 8 > size)
				return false;
			const uint8_t *b = batch + at;
			uint32_t first = b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24;
			uint32_t count = b[4] | b[5] << 8 | b[6] << 16 | (uint32_t)(b[7] & 0x7f) << 24;
			bool zero = b[7] & 0x80;
			at += 8;
			unsigned __int128 data = zero ? 0 : (unsigned __int128)count * PV_PAGE;
			if (!count || (unsigned __int128)first + count > pages || at + data > size)
				return false;
			for (uint32_t i = 0; pass && i < count; i++) {
				if (zero && !received[first + i])
					continue;
				for (unsigned byte = 0; byte < PV_PAGE; byte++)
					ram[(uint64_t)(first + i) * PV_PAGE + byte] =
						zero ? 0 : batch[(uint64_t)at + (uint64_t)i * PV_PAGE + byte];
				received[first + i] = true;
			}
			at += data;
			*total += count;
		}
	}
	return true;
}

static uint64_t hostile_batch(uint8_t *batch, uint64_t room, uint64_t pages)
{
	uint64_t at = 0;

	for (uint64_t n = below(6); n-- && at + 8 <= room;) {
		uint32_t first = (uint32_t)below(pages), count = 1 + (uint32_t)below(pages - first < 4 ? pages - first : 4);
		bool zero = one_in(2);
		if (one_in(12))
			first = (uint32_t)(one_in(2) ? rnd() : pages + below(2));
		if (one_in(12))
			count = one_in(3) ? 0 : one_in(2) ? 0x7fffffffu : (uint32_t)rnd() & 0x7fffffffu;
		uint32_t head[2] = {first, count | (zero ? PV_RUN_ZERO : 0)};
		memcpy(batch + at, head, 8);
		at += 8;
		for (uint32_t i = 0; !zero && i < count && at + PV_PAGE <= room && i < 4; i++, at += PV_PAGE)
			memset(batch + at, (int)rnd(), PV_PAGE);
	}
	if (at && one_in(6))
		at -= 1 + below(at < 5000 ? at : 5000); /* cut off */
	for (uint64_t flips = at && one_in(6) ? 1 + below(3) : 0; flips--;)
		batch[one_in(2) ? below(at) : below(at < 8 ? at : 8)] ^= (uint8_t)(1u << below(8));
	return at;
}

static void stream(uint64_t rounds)
{
	uint64_t accepted = 0, refused = 0, packed = 0, zero = 0, batches = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		uint64_t pages = 1 + below(MOST_PAGES), bytes = pages * PV_PAGE;
		uint8_t *ram = memory(bytes), *expected = memory(bytes);
		bool came[MOST_PAGES] = {0};
		uint64_t *received = memory((pages + 63) / 64 * 8);
		for (int n = 0; n < 4; n++) {
			uint64_t room = 6 * (8 + 4 * PV_PAGE);
			uint8_t *longer = memory(room);
			uint64_t size = hostile_batch(longer, room, pages);
			uint8_t *batch = memory(size + 4);
			memcpy(batch + 4, longer, size); /* as misaligned as behind a frame's head */
			int64_t total, found = pv_ram_unpack(batch + 4, size, ram, pages, received);
			if (model_unpack(batch + 4, size, expected, pages, came, &total)) {
				CHECK(found == total);
				accepted++;
			} else {
				CHECK(found == -EINVAL);
				refused++;
			}
			CHECK(!memcmp(ram, expected, bytes));
			free(batch), free(longer);
		}
		/* What was packed arrives, in batches of any size. */
		uint8_t *source = memory(bytes);
		fill(source, pages);
		struct pv_page_range *ranges = memory(pages * sizeof(*ranges));
		struct pv_ram_cursor cursor = {.ranges = ranges};
		for (uint64_t page = 0; page < pages;) {
			uint64_t run = 1 + below(pages - page < 6 ? pages - page : 6);
			if (one_in(2)) {
				ranges[cursor.range_count++] = (struct pv_page_range){(uint32_t)page, (uint32_t)run};
				memcpy(expected + page * PV_PAGE, source + page * PV_PAGE, run * PV_PAGE);
			}
			page += run;
		}
		memset(received, 0xff, (pages + 63) / 64 * 8); /* zero pages must be written, too */
		uint64_t room = 8 + PV_PAGE + below(5 * PV_PAGE), used, arrived = 0;
		uint8_t *out = memory(room + 4);
		CHECK(pv_ram_pack(&cursor, source, out + 4, below(8 + PV_PAGE)) == 0 && !cursor.packed);
		while ((used = pv_ram_pack(&cursor, source, out + 4, room))) {
			CHECK(used <= room);
			int64_t found = pv_ram_unpack(out + 4, used, ram, pages, received);
			CHECK(found > 0);
			arrived += (uint64_t)found;
			batches++;
		}
		CHECK(arrived == cursor.packed && cursor.range == cursor.range_count);
		CHECK(!memcmp(ram, expected, bytes));
		packed += cursor.packed;
		zero += cursor.zero;
		free(out), free(ranges), free(source), free(ram), free(expected), free(received);
	}
	printf("{\"accepted\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"packed\": %" PRIu64 ", \"zero\": %" PRIu64
	       ", \"batches\": %" PRIu64 "}\n", accepted, refused, packed, zero, batches);
}

/* -- files ------------------------------------------------------------------------------------------- */

static struct {
	uint64_t partial, interrupted, failed;
	int fail_with; /* of the next failure; 0: the disk writes nothing and gives no reason */
	uint64_t fail_after;
} disk;

ssize_t __real_pwrite(int fd, const void *from, size_t size, off_t at);
ssize_t __wrap_pwrite(int fd, const void *from, size_t size, off_t at);
ssize_t __wrap_pwrite(int fd, const void *from, size_t size, off_t at)
{
	if (!disk.fail_after--) {
		disk.failed++;
		errno = disk.fail_with;
		return disk.fail_with ? -1 : 0;
	}
	if (one_in(8)) {
		disk.interrupted++;
		errno = EINTR;
		return -1;
	}
	if (one_in(3)) {
		disk.partial++;
		size = 1 + below(size);
	}
	return __real_pwrite(fd, from, size, at);
}

/* By the definition in ram_file.h, with a CRC (RFC 3720) that is worked out bit by bit. */
static uint32_t model_crc(uint32_t crc, const uint8_t *data, uint64_t size)
{
	crc = ~crc;
	for (uint64_t i = 0; i < size * 8; i++)
		crc = crc >> 1 ^ (((crc ^ data[i / 8] >> i % 8) & 1) ? 0x82f63b78u : 0);
	return ~crc;
}

static void file(uint64_t rounds)
{
	uint64_t pages_written = 0, refused = 0, holes = 0, long_runs = 0;

	for (uint64_t round = 0; round < rounds; round++) {
		bool longer = one_in(8); /* more than is written at one go */
		uint64_t pages = longer ? 250 + below(300) : 1 + below(30), first = below(pages), offset = below(4) * PV_PAGE;
		uint64_t count = longer ? pages - first : below(pages - first + 1);
		uint8_t *ram = memory(pages * PV_PAGE), *back = memory(pages * PV_PAGE);
		if (longer)
			memset(ram, 7, pages * PV_PAGE);
		else
			fill(ram, pages);
		int fd = memfd_create("ram", MFD_CLOEXEC);
		CHECK(fd >= 0 && !ftruncate(fd, (off_t)(offset + pages * PV_PAGE)));
		disk.fail_after = one_in(6) ? below(4) : ~0ull;
		disk.fail_with = one_in(2) ? ENOSPC : 0;
		uint64_t failed = disk.failed, written = 0, present = 0, model = 0;
		uint32_t crc = 0, sum = 0, modelled = 0;
		int result = pv_ram_write(fd, offset, ram, first, count, &crc, &written);
		if (disk.failed != failed) {
			CHECK(result == (disk.fail_with ? -disk.fail_with : -EIO) && written < count);
			refused++;
		} else {
			CHECK(!result);
			CHECK(pread(fd, back, pages * PV_PAGE, (off_t)offset) == (ssize_t)(pages * PV_PAGE));
			for (uint64_t n = 0; n < pages; n++) {
				static const uint8_t nothing[PV_PAGE];
				bool inside = n >= first && n < first + count;
				CHECK(!memcmp(back + n * PV_PAGE, inside ? ram + n * PV_PAGE : nothing, PV_PAGE));
				if (!inside)
					continue;
				if (!memcmp(ram + n * PV_PAGE, nothing, PV_PAGE)) {
					holes++;
					continue;
				}
				model++;
				modelled = model_crc(modelled, (const uint8_t *)&n, 8);
				modelled = model_crc(modelled, ram + n * PV_PAGE, PV_PAGE);
			}
			pv_ram_sum(ram, first, count, &sum, &present);
			CHECK(crc == sum && crc == modelled && written == present && written == model);
			pages_written += written;
			long_runs += longer && written > 256;
			/* And mapped in another memory's place. */
			uint8_t *place = mmap(NULL, pages * PV_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			CHECK(place != MAP_FAILED);
			CHECK(!pv_remap((uintptr_t)place, pages * PV_PAGE, fd, offset, 1));
			CHECK(!memcmp(place, back, pages * PV_PAGE));
			CHECK(pv_remap((uintptr_t)place, pages * PV_PAGE, -1, offset, 1) == -EBADF);
			CHECK(pv_remap((uintptr_t)place, pages * PV_PAGE, fd, offset + 1, 1) == -EINVAL);
			munmap(place, pages * PV_PAGE);
		}
		close(fd);
		free(ram), free(back);
	}
	printf("{\"written\": %" PRIu64 ", \"holes\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"long\": %" PRIu64
	       ", \"partial\": %" PRIu64 ", \"interrupted\": %" PRIu64 "}\n", pages_written, holes, refused, long_runs,
	       disk.partial, disk.interrupted);
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	state = strtoull(argv[2], NULL, 0) * 2 + 1;
	uint64_t rounds = strtoull(argv[3], NULL, 0);
	if (!strcmp(argv[1], "stream"))
		stream(rounds);
	else if (!strcmp(argv[1], "file"))
		file(rounds);
	else
		return 2;
	return 0;
}
