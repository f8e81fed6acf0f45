/*
 * The overlay on a disk that loses power; usage: overlay_crash_harness SEED ROUNDS.
 *
 * The system calls of block_image.c and block_overlay.c go to a disk in memory (-Wl,--wrap) with a volatile cache: each
 * written sector counts at once, but is durable only after fdatasync. A crash keeps any of the others and loses the rest,
 * in no order. Then the bitmap is loaded again, and each sector must hold what was flushed, or something written since.
 */
#define _GNU_SOURCE
#include "block_overlay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CLUSTERS 40u
#define SIZE (CLUSTERS * PV_CLUSTER - 3 * PV_SECTOR)
#define SECTORS (SIZE / PV_SECTOR)
#define DATA_AT (4096u + PV_BITMAP_PAGE)
#define FILE_SIZE (DATA_AT + CLUSTERS * PV_CLUSTER)
#define FILES 2
#define OVERLAY 100
#define BASE 101

struct disk {
	uint8_t now[FILE_SIZE], durable[FILE_SIZE];
};

static struct disk disks[FILES];
static unsigned syncs, lost;
/* The power fails in front of some fdatasync; what is done after that reaches no disk. */
static unsigned syncs_left;
static bool crashed;

static struct disk *disk_of(int fd)
{
	if (fd != OVERLAY && fd != BASE)
		abort();
	return &disks[fd - OVERLAY];
}

static ssize_t move(int fd, const struct iovec *iov, int count, off_t offset, bool write)
{
	ssize_t done = 0;
	for (int i = 0; i < count; i++) {
		if ((uint64_t)offset + iov[i].iov_len > FILE_SIZE)
			abort();
		if (write && !crashed)
			memcpy(disk_of(fd)->now + offset, iov[i].iov_base, iov[i].iov_len);
		else if (!write)
			memcpy(iov[i].iov_base, disk_of(fd)->now + offset, iov[i].iov_len);
		offset += (off_t)iov[i].iov_len;
		done += (ssize_t)iov[i].iov_len;
	}
	return done;
}

ssize_t __wrap_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwrite(int fd, const void *from, size_t n, off_t offset);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t n);
int __wrap_fdatasync(int fd);

ssize_t __wrap_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	(void)flags;
	return move(fd, iov, count, offset, false);
}

ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	(void)flags;
	return move(fd, iov, count, offset, true);
}

ssize_t __wrap_pwrite(int fd, const void *from, size_t n, off_t offset)
{
	struct iovec all = {(void *)(uintptr_t)from, n};
	return move(fd, &all, 1, offset, true);
}

int __wrap_fallocate(int fd, int mode, off_t offset, off_t n)
{
	(void)mode;
	if (!crashed)
		memset(disk_of(fd)->now + offset, 0, (size_t)n);
	return 0;
}

int __wrap_fdatasync(int fd)
{
	if (crashed || !syncs_left--) {
		crashed = true;
		return 0;
	}
	memcpy(disk_of(fd)->durable, disk_of(fd)->now, FILE_SIZE);
	syncs++;
	return 0;
}

static void power_off(void)
{
	for (int f = 0; f < FILES; f++)
		for (unsigned at = 0; at < FILE_SIZE; at += PV_SECTOR) {
			struct disk *d = &disks[f];
			if (!memcmp(d->now + at, d->durable + at, PV_SECTOR))
				continue;
			if (rand() & 1) {
				memcpy(d->durable + at, d->now + at, PV_SECTOR);
			} else {
				memcpy(d->now + at, d->durable + at, PV_SECTOR);
				lost++;
			}
		}
}

/* Sectors hold their version in every byte pair; possible[s]: versions that sector s may have after a crash. */
static uint16_t current[SECTORS];
static bool possible[SECTORS][65536];

static void allow_only_current(void)
{
	for (unsigned s = 0; s < SECTORS; s++) {
		memset(possible[s], 0, sizeof(possible[s]));
		possible[s][current[s]] = true;
	}
}

static int transfer(struct pv_block_image *image, uint8_t *bytes, unsigned sector, unsigned count, bool write)
{
	struct iovec all = {bytes, count * PV_SECTOR};
	struct pv_transfer t = {&all, 1, 0, 0, (uint64_t)sector * PV_SECTOR, all.iov_len};
	return write ? pv_image_write(image, &t, true) : pv_image_read(image, &t, true);
}

static void check(struct pv_block_image *image, bool after_crash)
{
	static uint8_t bytes[SIZE];
	if (transfer(image, bytes, 0, SECTORS, false))
		abort();
	for (unsigned s = 0; s < SECTORS; s++) {
		uint16_t version, other;
		memcpy(&version, bytes + s * PV_SECTOR, 2);
		for (unsigned i = 2; i < PV_SECTOR; i += 2) {
			memcpy(&other, bytes + s * PV_SECTOR + i, 2);
			if (other != version) {
				fprintf(stderr, "sector %u is mixed: %u and %u\n", s, version, other);
				exit(1);
			}
		}
		if (after_crash ? !possible[s][version] : version != current[s]) {
			fprintf(stderr, "sector %u holds version %u, %s %u\n", s, version,
				after_crash ? "which is impossible; at the crash it was" : "not", current[s]);
			exit(1);
		}
		current[s] = version;
	}
}

static struct pv_overlay *open_overlay(struct pv_block_image *image)
{
	memset(image, 0, sizeof(*image));
	image->fd = OVERLAY;
	image->size = SIZE;
	image->overlay = pv_overlay_new(BASE, SIZE, 4096, DATA_AT, true);
	pv_overlay_load_bits(image->overlay, disks[0].now + 4096, PV_BITMAP_PAGE);
	return image->overlay;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	srand((unsigned)atoi(argv[1]));
	unsigned rounds = (unsigned)atoi(argv[2]), crashes = 0, versions = 0;
	struct pv_block_image image;
	static uint8_t bytes[SIZE];

	open_overlay(&image);
	allow_only_current();
	for (unsigned round = 0; round < rounds; round++) {
		syncs_left = (unsigned)rand() % 12;
		crashed = false;
		for (unsigned step = 0; step < 30 && !crashed; step++) {
			unsigned sector = (unsigned)rand() % SECTORS, count = 1 + (unsigned)rand() % 30;
			if (count > SECTORS - sector)
				count = SECTORS - sector;
			unsigned what = (unsigned)rand() % 12;
			if (what < 7) {
				uint16_t version = (uint16_t)(++versions % 65535 + 1);
				for (unsigned i = 0; i < count * PV_SECTOR; i += 2)
					memcpy(bytes + i, &version, 2);
				for (unsigned s = sector; s < sector + count; s++)
					possible[s][current[s] = version] = true;
				if (transfer(&image, bytes, sector, count, true))
					abort();
			} else if (what < 8) {
				for (unsigned s = sector; s < sector + count; s++)
					possible[s][current[s] = 0] = true;
				if (pv_image_zero(&image, sector * PV_SECTOR, count * PV_SECTOR, what & 1))
					abort();
			} else if (what < 9) {
				unsigned first = (unsigned)rand() % CLUSTERS;
				if (pv_overlay_commit(&image, BASE, first, 1 + (unsigned)rand() % 9) < 0)
					abort();
			} else if (what < 11) {
				if (pv_image_flush(&image))
					abort();
				if (!crashed)
					allow_only_current();
			} else {
				check(&image, false);
			}
		}
		power_off();
		crashes++;
		pv_overlay_free(image.overlay);
		open_overlay(&image);
		check(&image, true);
		allow_only_current();
		/* What survived is on the disk now, whichever half of it was not synced. */
		memcpy(disks[0].durable, disks[0].now, FILE_SIZE);
		memcpy(disks[1].durable, disks[1].now, FILE_SIZE);
	}
	pv_overlay_free(image.overlay);
	printf("{\"crashes\": %u, \"syncs\": %u, \"sectors_lost\": %u}\n", crashes, syncs, lost);
	return 0;
}
