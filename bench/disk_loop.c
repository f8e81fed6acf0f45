/*
 * The two contestants of disk.py's engine part, turn by turn; usage: disk_loop FILE ROUNDS REQUESTS SIZE DEPTH.
 *
 * Engine: a driver's half offers read requests on a ring of 256, DEPTH at a time, and rings the doorbell when the device
 * asks for it; one thread of the native core's serves them. Loop: the same reads by preadv, one after the other. Prints
 * "engine_ns loop_ns" for each round: CPU time of the thread that reads, which neighbours on the machine do not change.
 */
#define _GNU_SOURCE
#include "block_device.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define RING 256u
#define RAM_SIZE (32ull << 20)
#define DESC 0x10000
#define AVAIL 0x20000
#define USED 0x30000
#define HEADERS 0x40000
#define DATA 0x100000

static uint8_t *ram;
static struct pv_block_device *device;
static struct pv_block_worker worker;
static uint64_t image_size;
static clockid_t engine_clock;

static uint64_t spent(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *serve(void *unused)
{
	(void)unused;
	while (pv_block_work(device, &worker) != PV_BLOCK_END)
		abort();
	return NULL;
}

static uint64_t next_offset(uint64_t offset, uint32_t size)
{
	return offset + 2ull * size <= image_size ? offset + size : 0;
}

static uint64_t engine(unsigned requests, uint32_t size, unsigned depth)
{
	uint16_t *avail = (uint16_t *)(ram + AVAIL);
	volatile uint16_t *used_idx = (uint16_t *)(ram + USED + 2);
	volatile uint16_t *kick_at = (uint16_t *)(ram + USED + 4 + 8 * RING);
	uint16_t idx = avail[1];
	uint64_t offset = 0, start = spent(engine_clock), one = 1;
	for (unsigned done = 0; done < requests; done += depth) {
		uint16_t before = idx;
		for (unsigned i = 0; i < depth; i++) {
			uint64_t *header = (uint64_t *)(ram + HEADERS + 32 * i);
			header[0] = PV_BLOCK_T_IN;
			header[1] = offset / 512;
			offset = next_offset(offset, size);
			avail[2 + idx++ % RING] = (uint16_t)(3 * i);
		}
		__atomic_store_n(&avail[1], idx, __ATOMIC_SEQ_CST);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if ((uint16_t)(idx - *kick_at - 1) < (uint16_t)(idx - before) && write(device->doorbell, &one, 8) != 8)
			abort();
		while (*used_idx != idx)
			sched_yield();
		for (unsigned i = 0; i < depth; i++)
			if (ram[HEADERS + 32 * i + 16])
				abort();
	}
	return spent(engine_clock) - start;
}

static uint64_t loop(int fd, unsigned requests, uint32_t size, unsigned depth)
{
	uint64_t offset = 0, start = spent(CLOCK_THREAD_CPUTIME_ID);
	for (unsigned done = 0; done < requests; done++) {
		struct iovec piece = {ram + DATA + done % depth * (uint64_t)size, size};
		if (preadv(fd, &piece, 1, (off_t)offset) != (ssize_t)size)
			abort();
		offset = next_offset(offset, size);
	}
	return spent(CLOCK_THREAD_CPUTIME_ID) - start;
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	int fd = open(argv[1], O_RDONLY);
	unsigned rounds = (unsigned)atoi(argv[2]), requests = (unsigned)atoi(argv[3]), depth = (unsigned)atoi(argv[5]);
	uint32_t size = (uint32_t)atoi(argv[4]);
	uint64_t *dirty = calloc(RAM_SIZE / PV_PAGE / 64, 8);
	struct pv_vm *vm = calloc(1, sizeof(*vm));
	struct pv_block_image *image = calloc(1, sizeof(*image));
	struct pv_queue q = {0};
	struct pv_interrupt interrupt = {.fd = eventfd(0, EFD_NONBLOCK)};
	ram = aligned_alloc(4096, RAM_SIZE);
	if (fd < 0 || !depth || depth > RING / 4 || !size || size % 512 || DATA + (uint64_t)depth * size > RAM_SIZE || !dirty ||
	    !vm || !image || !ram)
		return 2;
	memset(ram, 0, RAM_SIZE);
	image->fd = fd;
	image->size = image_size = (uint64_t)lseek(fd, 0, SEEK_END);
	vm->region_count = 1;
	vm->regions[0] = (struct pv_region){0, RAM_SIZE, ram, dirty};
	for (unsigned i = 0; i < depth; i++) {
		struct { uint64_t addr; uint32_t len; uint16_t flags, next; } d[3] = {
			{HEADERS + 32 * i, 16, 1, (uint16_t)(3 * i + 1)},
			{DATA + (uint64_t)i * size, size, 3, (uint16_t)(3 * i + 2)},
			{HEADERS + 32 * i + 16, 1, 2, 0},
		};
		memcpy(ram + DESC + 48 * i, d, sizeof(d));
	}
	if (pv_queue_start(&q, vm, RING, DESC, AVAIL, USED, 1, 1))
		return 2;
	device = pv_block_new(image, &q);
	device->doorbell = eventfd(0, EFD_NONBLOCK);
	device->interrupt = &interrupt;
	pthread_t thread;
	if (pthread_create(&thread, NULL, serve, NULL) || pthread_getcpuclockid(thread, &engine_clock))
		return 2;
	pv_block_resume(device);
	engine(depth, size, depth);
	loop(fd, requests, size, depth);
	for (unsigned i = 0; i < rounds; i++) {
		uint64_t engine_ns = engine(requests, size, depth);
		printf("%llu %llu\n", (unsigned long long)engine_ns, (unsigned long long)loop(fd, requests, size, depth));
	}
	pv_block_end(device);
	pthread_join(thread, NULL);
	return 0;
}
