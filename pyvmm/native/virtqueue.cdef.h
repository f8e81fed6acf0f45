/* What Python sees of virtqueue.h; the comments are there. */

#define PV_QUEUE_MAX ...
#define PV_CHAIN_SEGMENTS ...

#define PV_QUEUE_EMPTY ...
#define PV_QUEUE_TAKEN ...
#define PV_QUEUE_STOPPED ...
#define PV_QUEUE_BAD_SIZE ...
#define PV_QUEUE_BAD_RING ...
#define PV_QUEUE_BAD_INDEX ...
#define PV_QUEUE_BAD_HEAD ...
#define PV_QUEUE_BAD_NEXT ...
#define PV_QUEUE_LOOP ...
#define PV_QUEUE_BAD_ADDRESS ...
#define PV_QUEUE_BAD_ORDER ...
#define PV_QUEUE_BAD_TABLE ...
#define PV_QUEUE_TOO_LONG ...
#define PV_QUEUE_MISUSED ...

struct pv_queue {
	uint16_t size;
	bool event_idx, indirect, broken;
	uint16_t next_avail, next_used, notified;
	...;
};

struct iovec {
	void *iov_base;
	size_t iov_len;
};

struct pv_chain {
	uint16_t head;
	uint32_t readable, writable;
	uint64_t readable_bytes, writable_bytes;
	struct iovec segments[...];
	...;
};

int pv_queue_start(struct pv_queue *q, struct pv_vm *vm, uint16_t size, uint64_t desc, uint64_t avail, uint64_t used,
		   int event_idx, int indirect);
void pv_queue_stop(struct pv_queue *q);
int pv_queue_pop(struct pv_queue *q, struct pv_chain *chain);
int pv_queue_rewind(struct pv_queue *q, uint16_t count);
int pv_queue_put(struct pv_queue *q, const struct pv_chain *chain, uint16_t ahead, uint32_t written);
int pv_queue_publish(struct pv_queue *q, uint16_t count);
int pv_queue_push(struct pv_queue *q, const struct pv_chain *chain, uint32_t written);
int pv_queue_wants_interrupt(struct pv_queue *q);
int pv_queue_enable_kicks(struct pv_queue *q);
uint16_t pv_queue_available(const struct pv_queue *q);
void pv_queue_disable_kicks(struct pv_queue *q);
uint64_t pv_chain_read(const struct pv_chain *chain, uint64_t offset, void *to, uint64_t n);
uint64_t pv_chain_write(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, const void *from,
			uint64_t n);
void pv_chain_mark(const struct pv_queue *q, const struct pv_chain *chain, uint64_t offset, uint64_t n);
