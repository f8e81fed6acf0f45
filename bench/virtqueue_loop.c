/*
 * The two contestants of virtqueue.py, turn by turn in one thread; usage: virtqueue_loop ROUNDS PACKETS SIZE.
 *
 * Queue: a driver's half offers batches of one-descriptor packets on a ring of 256, the native core takes each, copies
 * its bytes out, gives it back, and asks for doorbells at the end of the batch. Array: a loop over (address, length)
 * pairs of the same packets that copies the same bytes. Prints "queue_ns array_ns" of CPU time for each round.
 */
#include "virtqueue.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RING 256u
#define BATCH 64u
#define RAM_SIZE (64ull << 20)
#define DESC 0x10000
#define AVAIL 0x20000
#define USED 0x30000
#define PACKETS_AT 0x100000

static uint8_t *ram, *out;
static uint64_t sum;

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t through_queue(struct pv_queue *q, struct pv_chain *chain, unsigned packets, uint32_t size)
{
	uint16_t *avail = (uint16_t *)(ram + AVAIL);
	volatile uint16_t *used_idx = (uint16_t *)(ram + USED + 2);
	uint16_t reclaimed = *used_idx;
	uint64_t start = now();
	for (unsigned done = 0; done < packets; done += BATCH) {
		uint16_t idx = avail[1];
		for (unsigned i = 0; i < BATCH; i++)
			avail[2 + (uint16_t)(idx + i) % RING] = (uint16_t)(idx + i) % RING;
		__atomic_store_n(&avail[1], (uint16_t)(idx + BATCH), __ATOMIC_RELEASE);
		while (pv_queue_pop(q, chain) == PV_QUEUE_TAKEN) {
			pv_chain_read(chain, 0, out, size);
			sum += out[size - 1];
			if (pv_queue_push(q, chain, 0))
				abort();
		}
		pv_queue_wants_interrupt(q);
		if (pv_queue_enable_kicks(q))
			abort();
		while (reclaimed != *used_idx)
			sum += ((volatile uint32_t *)(ram + USED + 4))[2 * (reclaimed++ % RING)];
	}
	uint64_t taken = now() - start;
	if (q->next_used != avail[1])
		abort();
	return taken;
}

static uint64_t over_array(const struct iovec *packet, unsigned packets)
{
	uint64_t start = now();
	for (unsigned done = 0; done < packets; done++) {
		const struct iovec *p = &packet[done % RING];
		memcpy(out, p->iov_base, p->iov_len);
		__asm__ volatile("" ::: "memory");
		sum += out[p->iov_len - 1];
	}
	return now() - start;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	unsigned rounds = (unsigned)atoi(argv[1]), packets = (unsigned)atoi(argv[2]);
	uint32_t size = (uint32_t)atoi(argv[3]);
	uint64_t *dirty = calloc(RAM_SIZE / PV_PAGE / 64, 8);
	struct pv_vm *vm = calloc(1, sizeof(*vm));
	struct pv_chain *chain = calloc(1, sizeof(*chain));
	struct pv_queue q = {0};
	struct iovec packet[RING];
	ram = aligned_alloc(4096, RAM_SIZE);
	out = malloc(65536);
	if (!size || size > 65536 || !dirty || !vm || !chain || !ram || !out)
		return 2;
	memset(ram, 0, RAM_SIZE);
	vm->region_count = 1;
	vm->regions[0] = (struct pv_region){0, RAM_SIZE, ram, dirty};
	for (unsigned i = 0; i < RING; i++) {
		struct { uint64_t addr; uint32_t len; uint16_t flags, next; } d = {PACKETS_AT + i * 65536ull, size, 0, 0};
		memcpy(ram + DESC + 16 * i, &d, 16);
		packet[i] = (struct iovec){ram + d.addr, size};
	}
	if (pv_queue_start(&q, vm, RING, DESC, AVAIL, USED, 1, 1))
		return 2;
	through_queue(&q, chain, packets, size);
	over_array(packet, packets);
	for (unsigned i = 0; i < rounds; i++) {
		uint64_t queue_ns = through_queue(&q, chain, packets, size);
		printf("%llu %llu\n", (unsigned long long)queue_ns, (unsigned long long)over_array(packet, packets));
	}
	return sum == 42;
}
