/* Guest-physical to host addresses, and the 4/5-level page walk the syscall work-around needs. */

#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <string.h>

#define PTE_PRESENT 1ull
#define PTE_LARGE (1ull << 7)
#define PTE_ADDRESS 0x000ffffffffff000ull
#define CR4_LA57 (1ull << 12)

static struct pv_region *region_of(struct pv_vm *vm, uint64_t gpa, uint64_t size)
{
	for (uint32_t i = 0; i < vm->region_count; i++) {
		struct pv_region *r = &vm->regions[i];
		if (gpa >= r->gpa && gpa - r->gpa < r->size && size <= r->size - (gpa - r->gpa))
			return r;
	}
	return NULL;
}

/* Host address of guest-physical [gpa, gpa + size) to read from, NULL unless all of it is in one region. */
const uint8_t *pv_gpa(struct pv_vm *vm, uint64_t gpa, uint64_t size)
{
	const struct pv_region *r = region_of(vm, gpa, size);
	return r ? r->hva + (gpa - r->gpa) : NULL;
}

/* The native core's only way to write guest memory: bounds-checked, and marked dirty. */
bool pv_write_physical(struct pv_vm *vm, uint64_t gpa, const void *from, size_t n)
{
	struct pv_region *r = region_of(vm, gpa, n);
	if (!r || !n)
		return !n;
	uint64_t offset = gpa - r->gpa;
	memcpy(r->hva + offset, from, n);
	if (r->dirty)
		pv_dirty_mark(r->dirty, offset / PV_PAGE, (offset + n - 1) / PV_PAGE + 1);
	return true;
}

/*
 * Walk long-mode page tables (Intel SDM vol. 3, 4.5). Returns 0 and the GPA, or -1 if gva is not mapped.
 * Permissions are not looked at: the callers read what the CPU itself just used.
 */
int pv_translate(struct pv_vm *vm, uint64_t cr3, uint64_t cr4, uint64_t gva, uint64_t *gpa)
{
	uint64_t table = cr3 & PTE_ADDRESS;
	for (int shift = (cr4 & CR4_LA57) ? 48 : 39; shift >= 12; shift -= 9) {
		const uint8_t *at = pv_gpa(vm, table + ((gva >> shift) & 511) * 8, 8);
		if (!at)
			return -1;
		/* The guest's other vCPUs may change the entry meanwhile: read it once. */
		uint64_t entry = __atomic_load_n((const uint64_t *)at, __ATOMIC_RELAXED);
		if (!(entry & PTE_PRESENT))
			return -1;
		if (shift == 12 || (shift <= 30 && (entry & PTE_LARGE))) {
			uint64_t offset_mask = (1ull << shift) - 1;
			*gpa = (entry & PTE_ADDRESS & ~offset_mask) | (gva & offset_mask);
			return 0;
		}
		table = entry & PTE_ADDRESS;
	}
	return -1;
}

/* Copy n bytes from guest-virtual gva; false if any of them is not mapped to RAM. */
bool pv_read_virtual(struct pv_vm *vm, uint64_t cr3, uint64_t cr4, uint64_t gva, void *to, size_t n)
{
	uint8_t *out = to;
	while (n) {
		size_t piece = PV_PAGE - (gva & (PV_PAGE - 1));
		if (piece > n)
			piece = n;
		uint64_t gpa;
		if (pv_translate(vm, cr3, cr4, gva, &gpa))
			return false;
		const uint8_t *from = pv_gpa(vm, gpa, piece);
		if (!from)
			return false;
		memcpy(out, from, piece);
		out += piece;
		gva += piece;
		n -= piece;
	}
	return true;
}

/* Give the first size bytes of a memfd back to the host; they read as zeros. -1 with errno. */
int pv_punch_hole(int fd, uint64_t size)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)size);
}

/*
 * LOCK CMPXCHG8B/16B on guest memory, atomic against the guest's own vCPUs: if size bytes at gpa hold old,
 * put new there; old gets what was there. False: not RAM, or not aligned (the CPU faults on that for 16).
 */
bool pv_compare_exchange(struct pv_vm *vm, uint64_t gpa, size_t size, void *old, const void *new)
{
	struct pv_region *r = region_of(vm, gpa, size);
	if (!r || (size != 8 && size != 16) || (gpa & (size - 1)))
		return false;
	uint8_t *at = r->hva + (gpa - r->gpa);
	bool exchanged;
	if (size == 8) {
		uint64_t expected, wanted;
		memcpy(&expected, old, 8);
		memcpy(&wanted, new, 8);
		exchanged = __atomic_compare_exchange_n((uint64_t *)at, &expected, wanted, false, __ATOMIC_SEQ_CST,
							__ATOMIC_SEQ_CST);
		memcpy(old, &expected, 8);
	} else {
		uint64_t low, high, new_low, new_high;
		memcpy(&low, old, 8);
		memcpy(&high, (uint8_t *)old + 8, 8);
		memcpy(&new_low, new, 8);
		memcpy(&new_high, (const uint8_t *)new + 8, 8);
		/* Written out: gcc turns a 16-byte __atomic into a call of libatomic. Every host of KVM has it. */
		__asm__ volatile("lock cmpxchg16b %[at]; sete %[done]"
				 : [at] "+m"(*(uint8_t (*)[16])at), [done] "=q"(exchanged), "+a"(low), "+d"(high)
				 : "b"(new_low), "c"(new_high)
				 : "memory", "cc");
		memcpy(old, &low, 8);
		memcpy((uint8_t *)old + 8, &high, 8);
	}
	if (exchanged && r->dirty)
		pv_dirty_mark(r->dirty, (gpa - r->gpa) / PV_PAGE, (gpa - r->gpa) / PV_PAGE + 1);
	return true;
}
