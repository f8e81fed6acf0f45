/*
 * The block device's threads against a driver that lies; usage: block_harness SEED ROUNDS OVERLAY(0|1).
 *
 * Requests of random types, sectors, lengths, directions and framing, several in flight, and the device suspended and
 * resumed in between. Each must come back once, with a status, and not a byte outside its buffers may change.
 */
#define _GNU_SOURCE
#include "block_device.h"
#include "block_overlay.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define RING 64u
#define DESC 0x1000
#define AVAIL 0x2000
#define USED 0x3000
#define SLOTS 0x10000
#define SLOT_SIZE 0x4000u
#define IN_FLIGHT 8u
#define EACH (RING / IN_FLIGHT)
#define RAM_SIZE (SLOTS + IN_FLIGHT * SLOT_SIZE)
#define SECTORS 200u
#define WORKERS 4
#define GUARD 0x5a

static uint8_t *ram;
static struct pv_block_device *device;
static struct pv_block_worker workers[WORKERS];
static unsigned statuses[4];

struct request {
	bool out;
	uint32_t length, status_at;
};
static struct request requests[IN_FLIGHT];

static void *serve(void *worker)
{
	int result;
	while ((result = pv_block_work(device, worker)) != PV_BLOCK_END)
		if (result == PV_BLOCK_BROKEN)
			abort(); /* this driver's chains are well-formed */
	return NULL;
}

static uint64_t pick_sector(void)
{
	switch (rand() % 8) {
	case 0: return SECTORS + (unsigned)rand() % 3 - 1;
	case 1: return UINT64_MAX - (unsigned)rand() % 3;
	case 2: return 1ull << 55;
	default: return (unsigned)rand() % SECTORS;
	}
}

static uint32_t pick_type(void)
{
	static const uint32_t types[] = {0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 13, 2, 0x80000000u};
	return types[(unsigned)rand() % (sizeof(types) / sizeof(types[0]))];
}

/* Fill slot i; its descriptors are i * EACH .. */
static void make(unsigned i)
{
	struct { uint64_t addr; uint32_t len; uint16_t flags, next; } d;
	uint8_t *slot = ram + SLOTS + i * SLOT_SIZE;
	uint32_t type = pick_type(), readable = 16, writable = 1;
	uint64_t sector = pick_sector();

	memset(slot, GUARD, SLOT_SIZE);
	if (rand() % 8)
		*(type == 0 || type == 8 ? &writable : &readable) += type >= 11 ? 16 * (1 + (unsigned)rand() % 18)
								   : 512 * ((unsigned)rand() % 12);
	if (!(rand() % 10))
		readable = (unsigned)rand() % 40;
	if (!(rand() % 10))
		writable = 1 + (unsigned)rand() % 700;
	memcpy(slot, &type, 4);
	memcpy(slot + 8, &sector, 8);
	for (uint32_t at = 16; at + 16 <= readable && type >= 11; at += 16) {
		uint32_t words[2] = {(unsigned)rand() % 40, (unsigned)rand() % 6 ? 0 : (unsigned)rand() % 4};
		uint64_t first = pick_sector();
		memcpy(slot + at, &first, 8);
		memcpy(slot + at + 8, words, 8);
	}
	uint32_t total = readable + writable, at = 0;
	memset(slot + total, GUARD, SLOT_SIZE - total); /* a short header's rest */
	for (unsigned n = 0; at < total; n++) {
		uint32_t left = (at < readable ? readable : total) - at, piece = left;
		if (n < EACH - 2 && rand() % 2)
			piece = 1 + (unsigned)rand() % left;
		bool last = at + piece == total;
		d.addr = SLOTS + i * SLOT_SIZE + at;
		d.len = piece;
		d.flags = (uint16_t)((last ? 0 : 1) | (at < readable ? 0 : 2));
		d.next = (uint16_t)(i * EACH + n + 1);
		memcpy(ram + DESC + 16 * (i * EACH + n), &d, 16);
		at += piece;
	}
	requests[i] = (struct request){.length = total, .status_at = total - 1, .out = true};
	ram[SLOTS + i * SLOT_SIZE + total - 1] = 0xff;
}

static void check(unsigned i, uint32_t written)
{
	uint8_t *slot = ram + SLOTS + i * SLOT_SIZE;
	if (!requests[i].out || !written || slot[requests[i].status_at] > 2)
		abort();
	requests[i].out = false;
	statuses[slot[requests[i].status_at]]++;
	for (uint32_t at = requests[i].length; at < SLOT_SIZE; at++)
		if (slot[at] != GUARD)
			abort();
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	srand((unsigned)atoi(argv[1]));
	unsigned rounds = (unsigned)atoi(argv[2]), suspended = 0;
	struct pv_vm *vm = calloc(1, sizeof(*vm));
	struct pv_block_image *image = calloc(1, sizeof(*image));
	struct pv_queue q = {0};
	struct pv_interrupt interrupt = {.fd = eventfd(0, EFD_NONBLOCK)};
	uint64_t *dirty = calloc(RAM_SIZE / PV_PAGE / 64 + 1, 8);
	int base = memfd_create("base", 0), over = memfd_create("over", 0);

	ram = aligned_alloc(4096, RAM_SIZE);
	if (!vm || !image || !dirty || !ram || ftruncate(base, SECTORS * 512) || ftruncate(over, SECTORS * 512))
		return 2;
	memset(ram, 0, RAM_SIZE);
	image->fd = base;
	image->size = SECTORS * 512;
	if (atoi(argv[3])) {
		image->fd = over;
		image->overlay = pv_overlay_new(base, image->size, 0, 0, false);
	}
	vm->region_count = 1;
	vm->regions[0] = (struct pv_region){0, RAM_SIZE, ram, dirty};
	if (pv_queue_start(&q, vm, RING, DESC, AVAIL, USED, 1, 1))
		return 2;
	device = pv_block_new(image, &q);
	device->doorbell = eventfd(0, EFD_NONBLOCK);
	device->interrupt = &interrupt;
	device->discard = device->write_zeroes = true;
	pthread_t threads[WORKERS];
	for (int i = 0; i < WORKERS; i++)
		if (pthread_create(&threads[i], NULL, serve, &workers[i]))
			return 2;
	pv_block_resume(device);
	uint16_t *avail = (uint16_t *)(ram + AVAIL), *used_idx = (uint16_t *)(ram + USED + 2), offered = 0, seen = 0;
	uint64_t one = 1;
	for (unsigned round = 0; round < rounds; round++) {
		atomic_store(&device->write_through, rand() % 4 == 0);
		/* As if writes were slow, so that the lead goes round. */
		atomic_store(&device->write_ns, rand() % 2 ? 1000000 : 0);
		for (unsigned i = 0; i < IN_FLIGHT; i++) {
			make(i);
			avail[2 + offered % RING] = (uint16_t)(i * EACH);
			__atomic_store_n(&avail[1], ++offered, __ATOMIC_SEQ_CST);
			if (rand() % 2 && write(device->doorbell, &one, 8) != 8)
				return 2;
		}
		if (write(device->doorbell, &one, 8) != 8)
			return 2;
		if (rand() % 3 == 0) {
			if (pv_block_suspend(device, 20000) || q.next_avail != q.next_used)
				abort();
			if (image->overlay)
				pv_overlay_clear(image);
			suspended++;
			pv_block_resume(device);
		}
		if (image->overlay && rand() % 4 == 0 && pv_overlay_commit(image, base, 0, 3) < 0)
			abort();
		while (seen != offered) {
			if (seen == __atomic_load_n(used_idx, __ATOMIC_ACQUIRE)) {
				usleep(20);
				continue;
			}
			uint32_t entry[2];
			memcpy(entry, ram + USED + 4 + 8 * (seen++ % RING), 8);
			check(entry[0] / EACH, entry[1]);
		}
	}
	struct pv_block_counter counters[PV_BLOCK_KINDS];
	uint64_t counted = 0;
	pv_block_count(device, counters);
	for (int i = 0; i < PV_BLOCK_KINDS; i++)
		counted += counters[i].requests;
	if (counted != (uint64_t)rounds * IN_FLIGHT)
		abort();
	pv_block_end(device);
	for (int i = 0; i < WORKERS; i++)
		pthread_join(threads[i], NULL);
	pv_block_free(device);
	if (image->overlay)
		pv_overlay_free(image->overlay);
	printf("{\"ok\": %u, \"ioerr\": %u, \"unsupp\": %u, \"suspended\": %u}\n", statuses[0], statuses[1], statuses[2], suspended);
	free(vm), free(image), free(dirty), free(ram);
	return 0;
}
