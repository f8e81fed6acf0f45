/*
 * Output that needs no Python while it happens: sinks and latches for single ports, and the ring in which
 * KVM collects writes to registered ports and addresses (Documentation/virt/kvm/api.rst, 4.116).
 */

#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define RING_ENTRIES \
	((PV_PAGE - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio))

struct pv_vm *pv_vm_new(void)
{
	struct pv_vm *vm = calloc(1, sizeof *vm);
	if (!vm)
		return NULL;
	vm->sink_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (vm->sink_event < 0) {
		free(vm);
		return NULL;
	}
	pthread_mutex_init(&vm->sink_lock, NULL);
	pthread_mutex_init(&vm->ring_lock, NULL);
	return vm;
}

void pv_vm_free(struct pv_vm *vm)
{
	if (!vm)
		return;
	close(vm->sink_event);
	pthread_mutex_destroy(&vm->sink_lock);
	pthread_mutex_destroy(&vm->ring_lock);
	free(vm);
}

int pv_vm_add_region(struct pv_vm *vm, uint64_t gpa, uint64_t size, uint64_t hva, uint64_t *dirty)
{
	if (vm->region_count == PV_MAX_REGIONS)
		return -ENOSPC;
	vm->regions[vm->region_count++] = (struct pv_region){gpa, size, (uint8_t *)(uintptr_t)hva, dirty};
	return 0;
}

/* Bytes written to port go to sink (0..PV_SINKS-1); -1: back to the device. */
int pv_vm_set_sink(struct pv_vm *vm, uint16_t port, int sink)
{
	if (sink < -1 || sink >= PV_SINKS)
		return -EINVAL;
	atomic_store(&vm->sink_of[port], (uint8_t)(sink + 1));
	return 0;
}

/* One-byte reads of port return value (0..255); -1: ask the device. */
void pv_vm_set_latch(struct pv_vm *vm, uint16_t port, int value)
{
	atomic_store(&vm->latch_of[port], value < 0 ? 0 : (uint16_t)(0x100 | (value & 0xff)));
}

/* Take a byte for port's sink. False: the port has none, or it is full and the device must take over. */
bool pv_sink_byte(struct pv_vm *vm, uint16_t port, uint8_t byte)
{
	uint8_t number = atomic_load(&vm->sink_of[port]);
	if (!number)
		return false;
	struct pv_sink *sink = &vm->sinks[number - 1];
	pthread_mutex_lock(&vm->sink_lock);
	bool room = sink->used < PV_SINK_SIZE;
	bool wake = false;
	if (room) {
		sink->bytes[sink->used++] = byte;
		wake = atomic_fetch_add(&vm->sinks_pending, 1) == 0;
	}
	pthread_mutex_unlock(&vm->sink_lock);
	/* One wake-up per drain, not per byte: an eventfd write costs as much as a small exit. */
	if (wake)
		eventfd_write(vm->sink_event, 1);
	return room;
}

/* Move up to size collected bytes of sink into buffer, oldest first; how many. */
size_t pv_vm_take_sink(struct pv_vm *vm, int number, uint8_t *buffer, size_t size)
{
	if (number < 0 || number >= PV_SINKS)
		return 0;
	struct pv_sink *sink = &vm->sinks[number];
	pthread_mutex_lock(&vm->sink_lock);
	size_t n = sink->used < size ? sink->used : size;
	memcpy(buffer, sink->bytes, n);
	memmove(sink->bytes, sink->bytes + n, sink->used - n);
	sink->used -= (uint32_t)n;
	atomic_fetch_sub(&vm->sinks_pending, (uint32_t)n);
	pthread_mutex_unlock(&vm->sink_lock);
	return n;
}

/*
 * Carry out coalesced writes in order. Returns 0 when the ring is empty (lock released), or PV_EXIT_IO /
 * PV_EXIT_MMIO with *entry filled: then the caller has the lock until pv_vm_release_ring().
 */
int pv_vm_drain_ring(struct pv_vm *vm, struct pv_exit *entry)
{
	struct kvm_coalesced_mmio_ring *ring = vm->ring;
	if (!ring)
		return 0;
	/*
	 * Locked even to find it empty: another thread may have taken the last entry and not carried it out yet,
	 * and that write came before the exit for which the caller asks.
	 */
	pthread_mutex_lock(&vm->ring_lock);
	for (;;) {
		uint32_t first = __atomic_load_n(&ring->first, __ATOMIC_RELAXED);
		uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
		if (first == last || first >= RING_ENTRIES || last >= RING_ENTRIES)
			break;
		struct kvm_coalesced_mmio e = ring->coalesced_mmio[first];
		__atomic_store_n(&ring->first, (first + 1) % RING_ENTRIES, __ATOMIC_RELEASE);
		if (!e.len || e.len > 8)
			continue;
		if (e.pio && e.len == 1 && pv_sink_byte(vm, (uint16_t)e.phys_addr, e.data[0]))
			continue;
		memset(entry, 0, sizeof *entry);
		entry->is_write = 1;
		entry->size = (uint8_t)e.len;
		entry->count = 1;
		entry->port = (uint16_t)e.phys_addr;
		entry->address = e.phys_addr;
		memcpy(&entry->data, e.data, e.len);
		entry->reason = e.pio ? KVM_EXIT_IO : KVM_EXIT_MMIO;
		return e.pio ? PV_EXIT_IO : PV_EXIT_MMIO;
	}
	pthread_mutex_unlock(&vm->ring_lock);
	return 0;
}

void pv_vm_release_ring(struct pv_vm *vm)
{
	pthread_mutex_unlock(&vm->ring_lock);
}
