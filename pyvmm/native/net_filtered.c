/* Frames that go one by one through whoever filters them, and those that nobody is there for. See net_pump.h. */

#include "net_pump.h"

#include <string.h>

/* Throw away what came in before the driver was ready, at most `limit` frames; how many there were. */
uint32_t pv_net_discard(struct pv_net *n, uint32_t limit)
{
	uint32_t count = 0;
	pthread_mutex_lock(&n->lock);
	while (count < limit && pv_backend_next(n) == PV_NET_DONE) {
		n->unit_size = 0;
		count++;
	}
	n->counters.rx_inactive += count;
	pthread_mutex_unlock(&n->lock);
	return count;
}

/* Take the next frame from the driver: PV_NET_DONE, _NOTHING, or what is wrong with the ring. */
int pv_net_pull_guest(struct pv_net *n, uint8_t *unit, uint32_t *size)
{
	int result = PV_QUEUE_EMPTY;
	bool found = false;
	pthread_mutex_lock(&n->lock);
	if (n->allowed && n->tx->size) {
		n->tx_due = true;
		/* A driver that offers nonsense without end must not keep the lock. */
		for (unsigned i = 0; i < PV_NET_BATCH && !found; i++) {
			result = pv_queue_pop(n->tx, n->tx_chain);
			if (result != PV_QUEUE_TAKEN)
				break;
			uint64_t bytes = n->tx_chain->readable_bytes;
			found = bytes >= PV_NET_HEADER + PV_NET_FRAME_MIN && bytes <= PV_NET_UNIT;
			if (found)
				*size = (uint32_t)pv_chain_read(n->tx_chain, 0, unit, bytes);
			else
				n->counters.tx_malformed++;
			pv_queue_push(n->tx, n->tx_chain, 0);
		}
		if (result == PV_QUEUE_EMPTY)
			n->tx_due = pv_queue_enable_kicks(n->tx);
		if (pv_queue_wants_interrupt(n->tx))
			pv_interrupt_raise(n->interrupt, PV_INTERRUPT_USED_BUFFER);
		if (result < 0)
			pv_net_broken(n, 1, result);
	}
	pthread_mutex_unlock(&n->lock);
	return found ? PV_NET_DONE : result < 0 ? result : PV_NET_NOTHING;
}

/* Take the next frame from the backend: PV_NET_DONE, _NOTHING, _GONE. */
int pv_net_pull_backend(struct pv_net *n, uint8_t *unit, uint32_t *size)
{
	pthread_mutex_lock(&n->lock);
	int result = pv_backend_next(n);
	if (result == PV_NET_DONE) {
		memcpy(unit, n->unit, n->unit_size);
		*size = n->unit_size;
		n->unit_size = 0;
	} else {
		n->readable = false;
	}
	pthread_mutex_unlock(&n->lock);
	return result;
}

/* Bring a frame to the driver: PV_NET_DONE, _WAIT (until PV_NET_FRAMES), or what is wrong with the ring. */
int pv_net_push_guest(struct pv_net *n, const uint8_t *unit, uint32_t size)
{
	int result = PV_NET_WAIT;
	pthread_mutex_lock(&n->lock);
	if (n->allowed) {
		result = pv_net_receive_unit(n, unit, size);
		n->rx_due = result != PV_NET_WAIT;
		if (pv_queue_wants_interrupt(n->rx))
			pv_interrupt_raise(n->interrupt, PV_INTERRUPT_USED_BUFFER);
		if (result < 0)
			pv_net_broken(n, 0, result);
	}
	pthread_mutex_unlock(&n->lock);
	return result;
}

/* Send a frame to the backend: PV_NET_DONE, _WAIT (until PV_NET_FRAMES) or _GONE. */
int pv_net_push_backend(struct pv_net *n, const uint8_t *unit, uint32_t size)
{
	pthread_mutex_lock(&n->lock);
	int result = pv_net_transmit_unit(n, unit, size);
	n->writable = result != PV_NET_WAIT && !n->output_end;
	pthread_mutex_unlock(&n->lock);
	return result;
}
