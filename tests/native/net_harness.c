/*
 * Hostile rings and peers against net_*.c, built with ASan and UBSan: usage: net_harness SEED ROUNDS RACE_ROUNDS.
 *
 * Guest memory is three allocations, two of them neighbours for the guest. Each round sets up both rings with what a
 * driver that misbehaves in every field might write, a backend that is one end of a socket pair (a packet socket stands
 * for a tap), and a peer that sends frames or nonsense; then lets the pump make a few passes, natively or frame by
 * frame as filters have it. What must hold: nothing outside memory is touched; bytes that changed are in marked pages;
 * no chain stays out of a ring that is not broken; what the peer gets has a header that the features allow.
 * In the second part another thread scribbles over memory all the while; there only the sanitizers judge.
 */
#include "net_pump.h"
#include "harness.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define REGIONS 3
#define PAGES 32
#define REGION_SIZE ((uint64_t)PAGES * PV_PAGE)

static const uint64_t gpas[REGIONS] = {0, REGION_SIZE, 0 - REGION_SIZE};
static uint8_t *ram[REGIONS], *before[REGIONS];
static uint64_t *dirty[REGIONS];
static struct pv_vm *vm;
static struct pv_net_counters sum;
static unsigned broken, lost, offloaded, filtered_frames;

static uint32_t some_length(void)
{
	static const uint32_t edges[] = {0, 1, 11, 12, 13, 25, 26, 65612, 65613, 0xffffffff};
	return below(6) ? (uint32_t)below(3000) : below(2) ? edges[below(10)] : (uint32_t)below(70000);
}

/* Mostly good, so that frames get through. `write`: what the queue expects. */
static void put_desc(uint8_t *table, uint32_t index, uint32_t entries, bool write)
{
	uint64_t addr = gpas[below(2)] + below(REGION_SIZE);
	uint32_t len = some_length();
	uint16_t flags = (uint16_t)((write ? 2 : 0) | (below(3) ? 0 : 1)), next = (uint16_t)below(entries);
	if (!below(60))
		addr = rnd();
	if (!below(60))
		flags = (uint16_t)below(8);
	memcpy(table + index * 16, &addr, 8);
	memcpy(table + index * 16 + 8, &len, 4);
	memcpy(table + index * 16 + 12, &flags, 2);
	memcpy(table + index * 16 + 14, &next, 2);
}

/* Headers as they might be, all over memory: a chain's first bytes are anywhere. */
static void fill_memory(void)
{
	for (unsigned r = 0; r < REGIONS; r++)
		for (uint64_t at = 0; at < REGION_SIZE; at += 4) {
			static const uint32_t words[] = {0, 1, 0x00360101, 0x00360401, 0x000005a8, 0x00100022, 0x22, 0x10};
			uint32_t word = below(3) ? words[below(8)] : (uint32_t)rnd();
			memcpy(ram[r] + at, &word, 4);
		}
}

static void make_ring(struct pv_queue *q, uint64_t at, bool write)
{
	uint16_t size = (uint16_t)(1u << below(7)), ahead;
	CHECK(pv_queue_start(q, vm, size, at, at + 0x1000, at + 0x2000, (int)below(2), below(3) == 0) == 0);
	for (uint32_t i = 0; i < size; i++) {
		uint16_t head = (uint16_t)(below(100) ? below(size) : rnd());
		put_desc(ram[0] + at, i, size, write);
		memcpy(ram[0] + at + 0x1004 + 2 * i, &head, 2);
	}
	q->next_avail = q->next_used = q->notified = (uint16_t)(0 - below(40));
	ahead = (uint16_t)(q->next_avail + (below(30) ? below(size + 1u) : rnd()));
	memset(ram[0] + at + 0x1000, 0, 2);
	memcpy(ram[0] + at + 0x1002, &ahead, 2);
	memcpy(ram[0] + at + 0x2002, &q->next_used, 2);
}

static void peer_sends(int fd, bool packets)
{
	static uint8_t data[80000];
	for (unsigned i = (unsigned)below(20); i; i--) { /* a frame or nonsense */
		uint32_t length = below(4) ? (uint32_t)below(1500) : (uint32_t)below(70000);
		memset(data, (int)rnd(), 24);
		if (packets) {
			memset(data, 0, below(12));
			if (send(fd, data, 12 + length % 65600, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
				return;
			continue;
		}
		uint32_t prefix = __builtin_bswap32(below(60) ? length % 65600 + 1 : (uint32_t)rnd());
		memcpy(data, &prefix, 4);
		length = length % 65600 + 5;
		if (!below(40))
			length -= (uint32_t)below(length); /* and no more of it */
		if (send(fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL) < (ssize_t)length)
			return;
	}
}

static void peer_reads(int fd, bool packets, uint32_t features)
{
	static uint8_t data[80000];
	ssize_t got;
	while ((got = recv(fd, data, sizeof(data), MSG_DONTWAIT)) > 0) {
		if (!packets)
			continue;
		uint16_t start, offset;
		memcpy(&start, data + 6, 2);
		memcpy(&offset, data + 8, 2);
		CHECK(got >= 26 && got <= (ssize_t)PV_NET_UNIT && data[0] <= 1 && !data[10] && !data[11]);
		CHECK(!data[0] || (features & 1 && start + offset + 2 <= got - 12));
		CHECK(data[1] == 0 || (data[0] && ((data[1] == 1 && features & 1u << 11) || (data[1] == 4 && features & 1u << 12))));
		offloaded += data[0];
	}
}

static void filters(struct pv_net *n)
{
	static uint8_t unit[PV_NET_UNIT];
	uint32_t size = 0;
	for (unsigned i = 0; i < 20; i++) {
		if (pv_net_pull_guest(n, unit, &size) == PV_NET_DONE) {
			filtered_frames++;
			CHECK(size >= 26 && size <= PV_NET_UNIT);
			pv_net_push_backend(n, unit, size);
		}
		if (pv_net_pull_backend(n, unit, &size) == PV_NET_DONE) {
			filtered_frames++;
			CHECK(size <= PV_NET_UNIT);
			pv_net_push_guest(n, unit, size);
		}
	}
}

static void compare(void)
{
	for (unsigned r = 0; r < REGIONS; r++)
		for (uint64_t at = 0; at < REGION_SIZE; at++)
			CHECK(ram[r][at] == before[r][at] || dirty[r][0] >> (at / PV_PAGE) & 1);
}

static void one_round(bool judge)
{
	static const uint32_t feature_sets[] = {0, 1u << 15, 1u << 15 | 1, 1u << 15 | 3 | 1u << 11 | 1u << 12 | 1u << 7};
	struct pv_queue rx = {0}, tx = {0};
	struct pv_interrupt interrupt = {.fd = eventfd(0, EFD_NONBLOCK)};
	bool packets = below(2), filtered = !below(4);
	uint32_t features = feature_sets[below(4)];
	int ends[2], bells[3];
	CHECK(!socketpair(AF_UNIX, (packets ? SOCK_SEQPACKET : SOCK_STREAM) | SOCK_NONBLOCK, 0, ends));
	for (unsigned i = 0; i < 3; i++)
		CHECK((bells[i] = eventfd(0, EFD_NONBLOCK)) >= 0);
	make_ring(&rx, 0x4000, true);
	make_ring(&tx, 0x8000, false);
	if (!below(30))
		pv_queue_stop(below(2) ? &rx : &tx);
	for (unsigned r = 0; judge && r < REGIONS; r++) {
		memcpy(before[r], ram[r], REGION_SIZE);
		*dirty[r] = 0;
	}
	struct pv_net *n = pv_net_new(&rx, &tx, &interrupt);
	CHECK(n && !pv_net_add_doorbells(n, bells[0], bells[1], bells[2]));
	pv_net_set_backend(n, packets ? PV_NET_TAP : PV_NET_STREAM, ends[0]);
	pv_net_configure(n, features, below(3) ? 0 : (uint16_t)(68 + below(9000)));
	peer_sends(ends[1], packets);
	if (!below(10))
		pv_net_discard(n, (uint32_t)below(5));
	pv_net_set_filtered(n, filtered);
	pv_net_set_link(n, below(20) != 0);
	pv_net_stop(n); /* so that each run is one pass */
	for (unsigned pass = 0; pass < 6; pass++) {
		pv_net_allow(n, below(6) != 0);
		eventfd_write(bells[below(3)], 1);
		CHECK(pv_net_run(n) == PV_NET_STOPPED);
		if (filtered)
			filters(n);
		CHECK(!judge || rx.broken || rx.next_avail == rx.next_used);
		CHECK(!judge || tx.broken || tx.next_avail == tx.next_used);
		peer_reads(ends[1], packets, features);
		if (!below(20))
			shutdown(ends[1], SHUT_RDWR);
		else
			peer_sends(ends[1], packets);
	}
	if (judge)
		compare();
	broken += rx.broken + tx.broken;
	lost += n->kind == PV_NET_NONE;
	for (unsigned i = 0; i < sizeof(sum) / 8; i++)
		((uint64_t *)&sum)[i] += ((uint64_t *)&n->counters)[i];
	pv_net_free(n);
	for (unsigned i = 0; i < 3; i++)
		close(bells[i]);
	close(ends[0]);
	close(ends[1]);
	close(interrupt.fd);
}

static _Atomic bool scribbling;

static void *scribble(void *unused)
{
	uint64_t state = 88172645463325252ull;
	while (scribbling) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		__atomic_store_n(ram[0] + 0x4000 + (state >> 8) % 0x8000, (uint8_t)(state >> 40), __ATOMIC_RELAXED);
	}
	return unused;
}

int main(int argc, char **argv)
{
	CHECK(argc == 4);
	state = strtoull(argv[1], NULL, 0) * 2 + 1;
	unsigned rounds = (unsigned)atoi(argv[2]), races = (unsigned)atoi(argv[3]);
	vm = calloc(1, sizeof(*vm));
	vm->region_count = REGIONS;
	for (unsigned i = 0; i < REGIONS; i++) {
		ram[i] = aligned_alloc(64, REGION_SIZE);
		before[i] = malloc(REGION_SIZE);
		dirty[i] = calloc(1, sizeof(uint64_t));
		vm->regions[i] = (struct pv_region){gpas[i], REGION_SIZE, ram[i], dirty[i]};
	}
	for (unsigned i = 0; i < rounds; i++) {
		if (i % 8 == 0)
			fill_memory();
		one_round(true);
	}
	pthread_t thread;
	scribbling = true;
	CHECK(!pthread_create(&thread, NULL, scribble, NULL));
	for (unsigned i = 0; i < races; i++)
		one_round(false);
	scribbling = false;
	pthread_join(thread, NULL);
	printf("{\"tx_frames\": %llu, \"rx_frames\": %llu, \"tx_malformed\": %llu, \"rx_oversized\": %llu, "
	       "\"rx_undersized\": %llu, \"rx_inactive\": %llu, \"tx_link_down\": %llu, \"broken\": %u, \"lost\": %u, "
	       "\"offloaded\": %u, \"filtered\": %u}\n",
	       (unsigned long long)sum.tx_frames, (unsigned long long)sum.rx_frames, (unsigned long long)sum.tx_malformed,
	       (unsigned long long)sum.rx_oversized, (unsigned long long)sum.rx_undersized,
	       (unsigned long long)sum.rx_inactive, (unsigned long long)sum.tx_link_down, broken, lost, offloaded,
	       filtered_frames);
	for (unsigned i = 0; i < REGIONS; i++) {
		free(ram[i]);
		free(before[i]);
		free(dirty[i]);
	}
	free(vm);
	return 0;
}
