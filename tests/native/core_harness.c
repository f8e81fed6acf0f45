/*
 * Drives the parts of the native core that read what a guest (or a kernel gone mad) wrote: page tables, guest
 * addresses, KVM's coalesced ring, the sinks. Each is compared with a model that is written differently.
 *
 *   core_harness memory|ring|sinks SEED ROUNDS
 *
 * Prints one JSON object: how often it came upon what. Any difference aborts.
 */

#include "core.h"
#include "harness.h"

#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#define RING_ENTRIES ((PV_PAGE - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio))

/* -- guest addresses and page tables ------------------------------------------------------------ */

#define REGIONS 3
#define PAGES 16

static struct {
	uint64_t gpa, size;
	uint8_t *bytes;
} ram[REGIONS];

/* Byte by byte, in 128 bits, so that nothing can wrap. */
static uint8_t *model_gpa(uint64_t gpa, uint64_t size)
{
	for (int i = 0; i < REGIONS; i++) {
		unsigned __int128 end = (unsigned __int128)gpa + size;
		if (gpa >= ram[i].gpa && gpa < ram[i].gpa + ram[i].size &&
		    end <= (unsigned __int128)ram[i].gpa + ram[i].size)
			return ram[i].bytes + (gpa - ram[i].gpa);
	}
	return NULL;
}

static uint64_t some_gpa(void)
{
	int i = (int)below(REGIONS);
	switch (below(6)) {
	case 0:
		return rnd();
	case 1:
		return ~0ull - below(64);
	case 2:
		return ram[i].gpa + ram[i].size - below(16);
	case 3:
		return ram[i].gpa - below(16);
	default:
		return ram[i].gpa + below(ram[i].size);
	}
}

static uint64_t some_entry(void)
{
	uint64_t entry = rnd() & 0xfff;
	if (below(8))
		entry |= 1; /* present */
	if (below(4))
		entry &= ~0x80ull;
	if (below(5))
		entry |= (ram[below(REGIONS)].gpa + below(PAGES) * PV_PAGE) & 0x000ffffffffff000ull;
	else
		entry |= rnd() & ~0xfffull;
	return entry | (rnd() & 0xfff0000000000000ull);
}

/* One entry at a time, as the figures of SDM vol. 3, 4.5 read: 0 if not mapped, else the page size. */
static uint64_t model_walk(uint64_t cr3, int levels, uint64_t gva, uint64_t *gpa)
{
	uint64_t at = cr3 & 0x000ffffffffff000ull;
	for (int level = levels; level >= 1; level--) {
		uint64_t span = 1ull << (12 + 9 * (level - 1));
		uint8_t *slot = model_gpa(at | ((gva / span) % 512) << 3, 8);
		uint64_t entry;
		if (!slot)
			return 0;
		memcpy(&entry, slot, 8);
		if (entry % 2 == 0)
			return 0;
		if (level == 1 || (level <= 3 && (entry & 0x80))) {
			*gpa = (entry & 0x000ffffffffff000ull) / span * span + gva % span;
			return span;
		}
		at = entry & 0x000ffffffffff000ull;
	}
	return 0;
}

static void address_rounds(uint64_t rounds)
{
	struct pv_vm *vm = pv_vm_new();
	uint64_t dirty[REGIONS] = {0};
	uint64_t inside = 0, outside = 0, mapped = 0, unmapped = 0, large = 0, read = 0, unread = 0;
	/* The last one ends at the end of the address space. */
	const uint64_t gpas[REGIONS] = {0, 0x100000000ull, 0ull - PAGES * PV_PAGE};

	CHECK(vm);
	for (int i = 0; i < REGIONS; i++) {
		ram[i].gpa = gpas[i];
		/* Some short of the end, so that size is not what the model's "<" hides. */
		ram[i].size = (uint64_t)(PAGES - (i == 2)) * PV_PAGE;
		ram[i].bytes = aligned_alloc(PV_PAGE, ram[i].size);
		CHECK(ram[i].bytes);
		CHECK(!pv_vm_add_region(vm, ram[i].gpa, ram[i].size, (uint64_t)(uintptr_t)ram[i].bytes, &dirty[i]));
	}
	for (uint64_t round = 0; round < rounds; round++) {
		if (round % 64 == 0)
			for (int i = 0; i < REGIONS; i++)
				for (uint64_t word = 0; word < ram[i].size / 8; word++) {
					uint64_t entry = some_entry();
					memcpy(ram[i].bytes + word * 8, &entry, 8);
				}
		uint64_t gpa = some_gpa(), size = below(4) ? below(9000) + 1 : rnd();
		uint8_t *expected = model_gpa(gpa, size);
		CHECK(pv_gpa(vm, gpa, size) == expected);
		expected ? inside++ : outside++;

		uint64_t cr3 = some_gpa(), cr4 = below(2) ? 1 << 12 : 0, gva = rnd(), at = 0, model_at = 0;
		uint64_t span = model_walk(cr3, cr4 ? 5 : 4, gva, &model_at);
		CHECK((pv_translate(vm, cr3, cr4, gva, &at) == 0) == (span != 0));
		if (span) {
			CHECK(at == model_at);
			mapped++;
			large += span > PV_PAGE;
		} else {
			unmapped++;
		}

		uint8_t got[3 * PV_PAGE];
		size_t n = 1 + below(below(4) ? 16 : sizeof got);
		gva = below(2) ? gva : (gva | 0xfff) - below(16); /* about to cross into the next page */
		bool whole = true;
		for (size_t i = 0; whole && i < n; i++)
			whole = model_walk(cr3, cr4 ? 5 : 4, gva + i, &model_at) && model_gpa(model_at, 1);
		CHECK(pv_read_virtual(vm, cr3, cr4, gva, got, n) == whole);
		for (size_t i = 0; whole && i < n; i++) {
			model_walk(cr3, cr4 ? 5 : 4, gva + i, &model_at);
			CHECK(got[i] == *model_gpa(model_at, 1));
		}
		whole ? read++ : unread++;
	}
	for (int i = 0; i < REGIONS; i++)
		free(ram[i].bytes);
	pv_vm_free(vm);
	printf("{\"inside\": %" PRIu64 ", \"outside\": %" PRIu64 ", \"mapped\": %" PRIu64 ", \"unmapped\": %" PRIu64
	       ", \"large\": %" PRIu64 ", \"read\": %" PRIu64 ", \"unread\": %" PRIu64 "}\n",
	       inside, outside, mapped, unmapped, large, read, unread);
}

/* -- the coalesced ring ------------------------------------------------------------------------- */

static void ring(uint64_t rounds)
{
	struct pv_vm *vm = pv_vm_new();
	uint64_t entries = 0, sunk = 0, skipped = 0, refused = 0;

	CHECK(vm);
	vm->ring = malloc(PV_PAGE); /* not more: what is read behind it is found */
	CHECK(vm->ring);
	CHECK(!pv_vm_set_sink(vm, 0x3f8, 1));
	for (uint64_t round = 0; round < rounds; round++) {
		uint64_t *words = (uint64_t *)vm->ring;
		for (size_t i = 0; i < PV_PAGE / 8; i++)
			words[i] = rnd();
		for (size_t i = 0; i < RING_ENTRIES; i++) {
			struct kvm_coalesced_mmio *e = &vm->ring->coalesced_mmio[i];
			if (below(8))
				e->len = (uint32_t)below(10);
			if (below(2))
				e->pio = (uint32_t)below(2);
			if (below(2))
				e->phys_addr = 0x3f8;
		}
		vm->ring->first = (uint32_t)(below(8) ? below(RING_ENTRIES) : rnd());
		vm->ring->last = (uint32_t)(below(8) ? below(RING_ENTRIES) : rnd());
		uint32_t at = vm->ring->first, last = vm->ring->last;
		bool legal = at < RING_ENTRIES && last < RING_ENTRIES;
		refused += !legal;
		struct pv_exit entry;
		int kind;
		while ((kind = pv_vm_drain_ring(vm, &entry))) {
			struct kvm_coalesced_mmio *e;
			CHECK(legal);
			for (;;) {
				CHECK(at != last);
				e = &vm->ring->coalesced_mmio[at];
				at = at + 1 == RING_ENTRIES ? 0 : at + 1;
				if (e->len < 1 || e->len > 8)
					skipped++;
				else if (e->pio && e->len == 1 && (uint16_t)e->phys_addr == 0x3f8)
					sunk++;
				else
					break;
			}
			uint64_t data = 0;
			memcpy(&data, e->data, e->len);
			CHECK(kind == (e->pio ? PV_EXIT_IO : PV_EXIT_MMIO));
			CHECK(entry.size == e->len && entry.count == 1 && entry.is_write && entry.data == data);
			CHECK(e->pio ? entry.port == (uint16_t)e->phys_addr : entry.address == e->phys_addr);
			CHECK(pthread_mutex_trylock(&vm->ring_lock)); /* the entry's taker has it */
			pv_vm_release_ring(vm);
			entries++;
		}
		CHECK(pthread_mutex_trylock(&vm->ring_lock) == 0);
		pthread_mutex_unlock(&vm->ring_lock);
		uint8_t taken[PV_SINK_SIZE];
		pv_vm_take_sink(vm, 1, taken, sizeof taken);
		CHECK(vm->sinks_pending == 0);
	}
	free(vm->ring);
	vm->ring = NULL;
	struct pv_exit entry;
	CHECK(pv_vm_drain_ring(vm, &entry) == 0); /* a host without one */
	pv_vm_free(vm);
	printf("{\"entries\": %" PRIu64 ", \"sunk\": %" PRIu64 ", \"skipped\": %" PRIu64 ", \"refused\": %" PRIu64 "}\n",
	       entries, sunk, skipped, refused);
}

/* -- sinks -------------------------------------------------------------------------------------- */

struct writer {
	pthread_t thread;
	struct pv_vm *vm;
	uint64_t bytes, full;
	uint16_t port;
};

static void *write_bytes(void *argument)
{
	struct writer *w = argument;
	for (uint64_t i = 0; i < w->bytes;) {
		if (pv_sink_byte(w->vm, w->port, (uint8_t)(i * 7)))
			i++;
		else
			w->full++;
	}
	return NULL;
}

static void sinks(uint64_t bytes)
{
	struct pv_vm *vm = pv_vm_new();
	struct writer writers[PV_SINKS] = {0};
	uint64_t got[PV_SINKS] = {0}, full = 0, all = 0;
	static uint8_t buffer[PV_SINK_SIZE];

	CHECK(vm);
	CHECK(pv_vm_set_sink(vm, 0, PV_SINKS) < 0 && pv_vm_set_sink(vm, 0, -2) < 0);
	CHECK(!pv_sink_byte(vm, 0xffff, 1));
	CHECK(pv_vm_take_sink(vm, -1, buffer, 1) == 0 && pv_vm_take_sink(vm, PV_SINKS, buffer, 1) == 0);

	/* One of them to the brim. */
	CHECK(!pv_vm_set_sink(vm, 0xffff, 0));
	for (int i = 0; i < PV_SINK_SIZE; i++) {
		eventfd_t told;
		CHECK(pv_sink_byte(vm, 0xffff, (uint8_t)i));
		CHECK((eventfd_read(vm->sink_event, &told) == 0) == (i == 0)); /* by the first byte, and only once */
	}
	CHECK(!pv_sink_byte(vm, 0xffff, 0) && vm->sinks_pending == PV_SINK_SIZE);
	for (int i = 0; i < PV_SINK_SIZE;) {
		size_t n = pv_vm_take_sink(vm, 0, buffer, 1 + below(5000));
		CHECK(n);
		for (size_t k = 0; k < n; k++)
			CHECK(buffer[k] == (uint8_t)(i + (int)k));
		i += (int)n;
	}
	CHECK(vm->sinks_pending == 0 && pv_vm_take_sink(vm, 0, buffer, 1) == 0);
	CHECK(!pv_vm_set_sink(vm, 0xffff, -1) && !pv_sink_byte(vm, 0xffff, 1));

	/* A writer on each, one reader of all that sleeps until it is told. */
	for (int i = 0; i < PV_SINKS; i++) {
		writers[i] = (struct writer){.vm = vm, .bytes = bytes, .port = (uint16_t)(0x3f8 + i)};
		CHECK(!pv_vm_set_sink(vm, writers[i].port, i));
		CHECK(!pthread_create(&writers[i].thread, NULL, write_bytes, &writers[i]));
	}
	while (all < PV_SINKS * bytes) {
		struct pollfd wait = {.fd = vm->sink_event, .events = POLLIN};
		eventfd_t value;
		if (!vm->sinks_pending)
			CHECK(poll(&wait, 1, 10000) == 1);
		eventfd_read(vm->sink_event, &value);
		for (int i = 0; i < PV_SINKS; i++) {
			size_t n = pv_vm_take_sink(vm, i, buffer, sizeof buffer);
			for (size_t k = 0; k < n; k++)
				CHECK(buffer[k] == (uint8_t)((got[i] + k) * 7));
			got[i] += n;
			all += n;
		}
	}
	for (int i = 0; i < PV_SINKS; i++) {
		pthread_join(writers[i].thread, NULL);
		CHECK(got[i] == bytes);
		full += writers[i].full;
	}
	CHECK(vm->sinks_pending == 0);
	pv_vm_free(vm);
	printf("{\"bytes\": %" PRIu64 ", \"full\": %" PRIu64 "}\n", all, full);
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	state = strtoull(argv[2], NULL, 0) * 2 + 1;
	uint64_t rounds = strtoull(argv[3], NULL, 0);
	if (!strcmp(argv[1], "memory"))
		address_rounds(rounds);
	else if (!strcmp(argv[1], "ring"))
		ring(rounds);
	else if (!strcmp(argv[1], "sinks"))
		sinks(rounds);
	else
		return 2;
	return 0;
}
