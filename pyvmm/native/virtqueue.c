/* The walk over a split virtqueue; see virtqueue.h for the rules it keeps. */

#include "virtqueue.h"

#include <string.h>

/* 2.7.5: flags of a descriptor */
#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
/* 2.7.6: flag of the available ring; 2.7.8: flag of the used ring */
#define AVAIL_F_NO_INTERRUPT 1
#define USED_F_NO_NOTIFY 1

/* 2.7.5, struct virtq_desc */
struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t next;
};

/* 2.7.6, struct virtq_avail: flags, idx, ring[size], used_event. 2.7.8, struct virtq_used: flags, idx,
 * ring[size] of {id, len}, avail_event. Both begin alike. */
#define RING_FLAGS 0
#define RING_IDX 2
#define RING_ENTRIES 4
#define DESC_SIZE 16u
#define AVAIL_SIZE(size) (RING_ENTRIES + 2u * (size) + 2u)
#define USED_SIZE(size) (RING_ENTRIES + 8u * (size) + 2u)

static uint16_t load_16(const uint8_t *at, int order)
{
	return __atomic_load_n((const uint16_t *)at, order);
}

static struct pv_region *region_at(struct pv_vm *vm, uint64_t gpa)
{
	for (uint32_t i = 0; i < vm->region_count; i++)
		if (gpa >= vm->regions[i].gpa && gpa - vm->regions[i].gpa < vm->regions[i].size)
			return &vm->regions[i];
	return NULL;
}

static void mark(const struct pv_region *r, const uint8_t *at, uint64_t n)
{
	uint64_t offset = (uint64_t)(at - r->hva);
	if (r->dirty && n)
		pv_dirty_mark(r->dirty, offset / PV_PAGE, (offset + n - 1) / PV_PAGE + 1);
}

/* Host address of a part of the ring, which must be aligned (2.7) and inside one region. */
static uint8_t *ring_part(struct pv_vm *vm, uint64_t gpa, uint64_t size, uint64_t alignment, struct pv_region **region)
{
	struct pv_region *r = region_at(vm, gpa);
	if (!r || gpa % alignment || size > r->size - (gpa - r->gpa))
		return NULL;
	*region = r;
	return r->hva + (gpa - r->gpa);
}

/* Begin with indices 0 on a ring of size entries (4.2.3.2); regions never move, so host addresses are kept. */
int pv_queue_start(struct pv_queue *q, struct pv_vm *vm, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used,
		   int event_idx, int indirect)
{
	pv_queue_stop(q);
	if (!size || size > PV_QUEUE_MAX || (size & (size - 1)))
		return PV_QUEUE_BAD_SIZE;
	struct pv_region *region;
	const uint8_t *desc_at = ring_part(vm, desc, DESC_SIZE * size, 16, &region);
	const uint8_t *avail_at = ring_part(vm, avail, AVAIL_SIZE(size), 2, &region);
	uint8_t *used_at = ring_part(vm, used, USED_SIZE(size), 4, &region);
	if (!desc_at || !avail_at || !used_at)
		return PV_QUEUE_BAD_RING;
	*q = (struct pv_queue){
		.vm = vm, .size = size, .event_idx = event_idx, .indirect = indirect,
		.desc = desc_at, .avail = avail_at, .used = used_at, .used_region = region,
	};
	return 0;
}

void pv_queue_stop(struct pv_queue *q)
{
	*q = (struct pv_queue){0};
}

static int broken(struct pv_queue *q, int why)
{
	q->broken = true;
	return why;
}

/* One read of a descriptor: the copy is what is checked and used, whatever the guest writes meanwhile. */
static struct desc read_desc(const uint8_t *table, uint32_t index)
{
	struct desc d;
	memcpy(&d, table + index * DESC_SIZE, sizeof(d)); /* an indirect table has no alignment */
	__asm__ volatile("" ::: "memory");                /* d cannot be fetched again behind this */
	return d;
}

/* Add the buffer of d to the chain, cut where regions of RAM meet. */
static int add_buffer(struct pv_vm *vm, struct pv_chain *chain, const struct desc *d)
{
	uint64_t gpa = d->addr, left = d->len;
	bool writable = d->flags & DESC_F_WRITE;
	uint64_t *bytes = writable ? &chain->writable_bytes : &chain->readable_bytes;

	if (gpa + left < gpa)
		return PV_QUEUE_BAD_ADDRESS;
	/* 2.7.4.2: device-readable elements come first, and that goes for empty ones, too. */
	if (!writable && chain->writing)
		return PV_QUEUE_BAD_ORDER;
	chain->writing = writable;
	/* 2.7.5.2 forbids chains of more than 2^32 bytes; 2^32 itself would not fit a used entry's len. */
	if (chain->readable_bytes + chain->writable_bytes + left > UINT32_MAX)
		return PV_QUEUE_TOO_LONG;
	*bytes += left;
	/* Nothing forbids an empty buffer; it has no segment, and its address means nothing. */
	while (left) {
		struct pv_region *r = region_at(vm, gpa);
		if (!r)
			return PV_QUEUE_BAD_ADDRESS;
		uint32_t at = chain->readable + chain->writable;
		if (at == PV_CHAIN_SEGMENTS)
			return PV_QUEUE_TOO_LONG;
		uint64_t room = r->size - (gpa - r->gpa);
		uint64_t piece = left < room ? left : room;
		chain->segments[at] = (struct iovec){r->hva + (gpa - r->gpa), piece};
		chain->regions[at] = (uint8_t)(r - vm->regions);
		if (writable)
			chain->writable++;
		else
			chain->readable++;
		gpa += piece;
		left -= piece;
	}
	return 0;
}

/*
 * Follow the chain from table[index] on. Returns 0 or a negative result. A chain without a loop is no longer than its
 * table, so more steps than entries are a loop. Only a direct chain may end in an indirect table.
 */
static int walk(struct pv_queue *q, struct pv_chain *chain, const uint8_t *table, uint32_t entries, uint32_t index,
		bool direct)
{
	uint32_t steps = entries < PV_QUEUE_MAX ? entries : PV_QUEUE_MAX;
	for (;;) {
		if (!steps--)
			return PV_QUEUE_LOOP;
		struct desc d = read_desc(table, index);
		if (d.flags & DESC_F_INDIRECT) {
			/* 2.7.5.3.1: negotiated, not within a table, and the last descriptor of its chain. */
			if (!q->indirect || !direct || (d.flags & DESC_F_NEXT))
				return PV_QUEUE_BAD_TABLE;
			/*
			 * The WRITE flag of such a descriptor is ignored (2.7.5.3.2). Its table may be longer than the
			 * queue: 2.7.5.3.1 forbids that, Linux does it; PV_QUEUE_MAX bounds the walk.
			 */
			struct pv_region *r;
			const uint8_t *inner = ring_part(q->vm, d.addr, d.len, 1, &r);
			if (!inner || !d.len || d.len % DESC_SIZE)
				return PV_QUEUE_BAD_TABLE;
			return walk(q, chain, inner, d.len / DESC_SIZE, 0, false);
		}
		int problem = add_buffer(q->vm, chain, &d);
		if (problem)
			return problem;
		if (!(d.flags & DESC_F_NEXT))
			return 0;
		if (d.next >= entries)
			return PV_QUEUE_BAD_NEXT;
		index = d.next;
	}
}

static void empty_chain(struct pv_chain *chain, uint16_t head)
{
	chain->head = head;
	chain->writing = false;
	chain->readable = chain->writable = 0;
	chain->readable_bytes = chain->writable_bytes = 0;
}

/* Take the next available chain: PV_QUEUE_TAKEN, PV_QUEUE_EMPTY, or what is wrong. */
int pv_queue_pop(struct pv_queue *q, struct pv_chain *chain)
{
	if (!q->size || q->broken)
		return PV_QUEUE_STOPPED;
	/* 2.7.13.3: the driver published idx behind a barrier; the acquire pairs with it. */
	uint16_t avail_idx = load_16(q->avail + RING_IDX, __ATOMIC_ACQUIRE);
	if (avail_idx == q->next_avail)
		return PV_QUEUE_EMPTY;
	/*
	 * The driver has size descriptors, so at most size chains are on offer and with the device together. The
	 * second comparison alone would miss an index that moved backwards while chains are with the device.
	 */
	if ((uint16_t)(avail_idx - q->next_avail) > q->size || (uint16_t)(avail_idx - q->next_used) > q->size)
		return broken(q, PV_QUEUE_BAD_INDEX);
	uint16_t head = load_16(q->avail + RING_ENTRIES + 2u * (q->next_avail & (q->size - 1)), __ATOMIC_RELAXED);
	if (head >= q->size)
		return broken(q, PV_QUEUE_BAD_HEAD);
	empty_chain(chain, head);
	int problem = walk(q, chain, q->desc, q->size, head, true);
	if (problem) {
		empty_chain(chain, head);
		return broken(q, problem);
	}
	q->next_avail++;
	return PV_QUEUE_TAKEN;
}

/*
 * Put back the `count` chains that were taken last and not given back: they are taken again next, in the same order.
 * For a device that finds out what it needs them for only once it has them.
 */
int pv_queue_rewind(struct pv_queue *q, uint16_t count)
{
	if (!q->size || q->broken)
		return PV_QUEUE_STOPPED;
	if (count > (uint16_t)(q->next_avail - q->next_used))
		return PV_QUEUE_MISUSED;
	q->next_avail -= count;
	return 0;
}

/*
 * Write the used entry `ahead` places behind those the driver sees (2.7.8): the first `written` of the chain's writable
 * bytes were written; they are marked dirty. pv_queue_publish() shows it.
 */
int pv_queue_put(struct pv_queue *q, const struct pv_chain *chain, uint16_t ahead, uint32_t written)
{
	/* Before anything else: memory was written, also if another chain has broken the queue meanwhile. */
	pv_chain_mark(q, chain, 0, written);
	if (!q->size || q->broken)
		return PV_QUEUE_STOPPED;
	if (written > chain->writable_bytes || chain->head >= q->size || ahead >= (uint16_t)(q->next_avail - q->next_used))
		return PV_QUEUE_MISUSED;
	uint32_t entry[2] = {chain->head, written};
	uint8_t *at = q->used + RING_ENTRIES + 8u * ((uint16_t)(q->next_used + ahead) & (q->size - 1));
	memcpy(at, entry, sizeof(entry));
	mark(q->used_region, at, sizeof(entry));
	return 0;
}

/* Show the driver `count` entries that were put, all at once. */
int pv_queue_publish(struct pv_queue *q, uint16_t count)
{
	if (!q->size || q->broken)
		return PV_QUEUE_STOPPED;
	if (count > (uint16_t)(q->next_avail - q->next_used))
		return PV_QUEUE_MISUSED;
	q->next_used += count;
	/* 2.7.8.2: the entries, and what the chains' buffers hold, before the index that offers them. */
	__atomic_store_n((uint16_t *)(q->used + RING_IDX), q->next_used, __ATOMIC_RELEASE);
	mark(q->used_region, q->used + RING_IDX, 2);
	return 0;
}

/* Give one chain back. */
int pv_queue_push(struct pv_queue *q, const struct pv_chain *chain, uint32_t written)
{
	int problem = pv_queue_put(q, chain, 0, written);
	return problem ? problem : pv_queue_publish(q, 1);
}

/*
 * Whether the driver wants a used buffer notification for what was pushed since the last call (2.7.7). The fence
 * pairs with the driver's between asking for notifications and looking at idx: one of the two sees the other's write.
 */
int pv_queue_wants_interrupt(struct pv_queue *q)
{
	if (!q->size || q->broken)
		return 0;
	uint16_t before = q->notified, now = q->next_used;
	q->notified = now;
	if (before == now)
		return 0;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!q->event_idx)
		return !(load_16(q->avail + RING_FLAGS, __ATOMIC_RELAXED) & AVAIL_F_NO_INTERRUPT);
	/* 2.7.7.2: notify if idx passed used_event, all modulo 2^16. */
	uint16_t used_event = load_16(q->avail + RING_ENTRIES + 2u * q->size, __ATOMIC_RELAXED);
	return (uint16_t)(now - used_event - 1) < (uint16_t)(now - before);
}

static void write_used_16(struct pv_queue *q, uint32_t offset, uint16_t value)
{
	__atomic_store_n((uint16_t *)(q->used + offset), value, __ATOMIC_RELAXED);
	mark(q->used_region, q->used + offset, 2);
}

/*
 * Ask for an available buffer notification (2.7.10); 1 if there is something to take already, for which none may
 * come: the caller goes on taking.
 */
int pv_queue_enable_kicks(struct pv_queue *q)
{
	if (!q->size || q->broken)
		return 0;
	if (q->event_idx)
		write_used_16(q, RING_ENTRIES + 8u * q->size, q->next_avail);
	else
		write_used_16(q, RING_FLAGS, 0);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return load_16(q->avail + RING_IDX, __ATOMIC_ACQUIRE) != q->next_avail;
}

/* The driver's index: chains made available so far, modulo 2^16. What it says is not checked. 0 while there is no ring. */
uint16_t pv_queue_available(const struct pv_queue *q)
{
	return q->size ? load_16(q->avail + RING_IDX, __ATOMIC_ACQUIRE) : 0;
}

/* Tell the driver that it need not notify. With EVENT_IDX flags are 0 (2.7.10) and an old avail_event says it. */
void pv_queue_disable_kicks(struct pv_queue *q)
{
	if (q->size && !q->broken && !q->event_idx)
		write_used_16(q, RING_FLAGS, USED_F_NO_NOTIFY);
}

/* Copy up to n of the chain's readable bytes from offset on; how many there were. */
uint64_t pv_chain_read(const struct pv_chain *chain, uint64_t offset, void *to, uint64_t n)
{
	uint64_t done = 0;
	for (uint32_t i = 0; i < chain->readable && done < n; i++) {
		const struct iovec *s = &chain->segments[i];
		if (offset >= s->iov_len) {
			offset -= s->iov_len;
			continue;
		}
		uint64_t piece = s->iov_len - offset < n - done ? s->iov_len - offset : n - done;
		memcpy((uint8_t *)to + done, (const uint8_t *)s->iov_base + offset, piece);
		done += piece;
		offset = 0;
	}
	return done;
}

/* Go over [offset, offset + n) of the writable bytes: copy there if from is given, mark dirty. */
static uint64_t fill(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, const uint8_t *from,
		     uint64_t n)
{
	uint64_t done = 0;
	for (uint32_t i = chain->readable; i < chain->readable + chain->writable && done < n; i++) {
		const struct iovec *s = &chain->segments[i];
		if (offset >= s->iov_len) {
			offset -= s->iov_len;
			continue;
		}
		uint64_t piece = s->iov_len - offset < n - done ? s->iov_len - offset : n - done;
		uint8_t *at = (uint8_t *)s->iov_base + offset;
		if (from)
			memcpy(at, from + done, piece);
		mark(&q->vm->regions[chain->regions[i]], at, piece);
		done += piece;
		offset = 0;
	}
	return done;
}

/* Copy up to n bytes to the chain's writable bytes from offset on, and mark them; how many there was room for. */
uint64_t pv_chain_write(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, const void *from,
			uint64_t n)
{
	return q->size && from ? fill(q, chain, offset, from, n) : 0;
}

/* Mark writable bytes that were written behind the queue's back (readv): after they were written. */
void pv_chain_mark(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, uint64_t n)
{
	if (q->size)
		fill(q, chain, offset, NULL, n);
}
