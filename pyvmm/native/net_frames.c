/* One frame, from a queue to the backend and back. See net_pump.h. */

#include "net_pump.h"

#include <string.h>

/* 5.1.3: feature bits */
#define F_CSUM (1u << 0)
#define F_GUEST_CSUM (1u << 1)
#define F_HOST_TSO4 (1u << 11)
#define F_HOST_TSO6 (1u << 12)
#define F_MRG_RXBUF (1u << 15)
/* 5.1.6: flags and gso_type */
#define HDR_F_NEEDS_CSUM 1
#define GSO_NONE 0
#define GSO_TCPV4 1
#define GSO_TCPV6 4
#define GSO_ECN 0x80
#define TCP_HEADER 20u
/* Destination, source, two VLAN tags, type. */
#define LINK_HEADERS 22u

/* readv(2) and writev(2) take no more (UIO_MAXIOV). */
#define SEGMENTS 1024

struct net_header {
	uint8_t flags, gso_type;
	uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};
_Static_assert(sizeof(struct net_header) == PV_NET_HEADER, "struct virtio_net_hdr with num_buffers");

/*
 * Whether a frame of `length` bytes may have this header (5.1.6.2); what the driver may leave undefined is cleared. The
 * kernel behind a tap checks again what it relies on; here it is kept to what was negotiated.
 */
static bool accept_header(const struct pv_net *n, struct net_header *h, uint32_t length)
{
	h->flags &= HDR_F_NEEDS_CSUM; /* 5.1.6.2.2: the device ignores the others */
	h->num_buffers = 0;
	if (h->flags) {
		if (!(n->features & F_CSUM) || h->csum_start < PV_NET_FRAME_MIN ||
		    (uint32_t)h->csum_start + h->csum_offset + 2 > length)
			return false;
	} else {
		h->csum_start = h->csum_offset = 0;
	}
	if (h->gso_type == GSO_NONE) {
		h->gso_size = h->hdr_len = 0;
		return true;
	}
	uint32_t needed = h->gso_type == GSO_TCPV4 ? F_HOST_TSO4 : h->gso_type == GSO_TCPV6 ? F_HOST_TSO6 : 0;
	if (!(n->features & needed) || !h->flags || !h->gso_size || h->csum_start + TCP_HEADER > length)
		return false;
	if (h->hdr_len > length) /* 5.1.6.2.2: only a hint, not to be relied on */
		h->hdr_len = (uint16_t)length;
	return true;
}

/* -- driver to backend -------------------------------------------------------------------------- */

/* Send a frame whose bytes are iov[1 .. count); iov[0] is for its header. PV_NET_DONE, _WAIT or _GONE. */
static int transmit(struct pv_net *n, struct net_header *header, struct iovec *iov, int count, uint32_t size)
{
	uint32_t length = size - PV_NET_HEADER;
	if (!accept_header(n, header, length)) {
		n->counters.tx_malformed++;
		return PV_NET_DONE;
	}
	if (!n->link_up) {
		n->counters.tx_link_down++;
		return PV_NET_DONE;
	}
	iov[0] = (struct iovec){header, PV_NET_HEADER};
	int result = pv_backend_send(n, iov, count, size);
	if (result == PV_NET_DONE) {
		n->counters.tx_frames++;
		n->counters.tx_bytes += length;
	}
	return result == PV_NET_NOTHING ? PV_NET_DONE : result;
}

static int send_chain(struct pv_net *n, const struct pv_chain *chain)
{
	struct net_header header;
	struct iovec iov[SEGMENTS];
	int count = 1;

	if (chain->readable_bytes < PV_NET_HEADER + PV_NET_FRAME_MIN || chain->readable_bytes > PV_NET_UNIT) {
		n->counters.tx_malformed++;
		return PV_NET_DONE;
	}
	uint32_t size = (uint32_t)chain->readable_bytes;
	/* A copy: what was checked is what is sent, whatever the driver writes meanwhile. */
	pv_chain_read(chain, 0, &header, PV_NET_HEADER);
	if (chain->readable < SEGMENTS) {
		size_t skip = PV_NET_HEADER;
		for (uint32_t i = 0; i < chain->readable; i++) {
			const struct iovec *s = &chain->segments[i];
			if (skip >= s->iov_len) {
				skip -= s->iov_len;
				continue;
			}
			iov[count++] = (struct iovec){(uint8_t *)s->iov_base + skip, s->iov_len - skip};
			skip = 0;
		}
	} else {
		int flushed = n->kind == PV_NET_STREAM ? pv_backend_flush(n) : PV_NET_DONE;
		if (flushed != PV_NET_DONE)
			return flushed;
		/* Behind the place of a stream's length: see send_to_stream(). */
		pv_chain_read(chain, PV_NET_HEADER, n->output + 4, size - PV_NET_HEADER);
		iov[count++] = (struct iovec){n->output + 4, size - PV_NET_HEADER};
	}
	return transmit(n, &header, iov, count, size);
}

/* Move one frame from the driver: an enum pv_net_flow, or what is wrong with the ring. */
int pv_net_transmit_frame(struct pv_net *n)
{
	if (!n->tx->size) /* not set up by the driver, which may still do it */
		return PV_NET_NOTHING;
	int result = pv_queue_pop(n->tx, n->tx_chain);
	if (result != PV_QUEUE_TAKEN)
		return result; /* PV_QUEUE_EMPTY is PV_NET_NOTHING */
	result = send_chain(n, n->tx_chain);
	if (result == PV_NET_WAIT || result == PV_NET_GONE) {
		pv_queue_rewind(n->tx, 1);
		return result;
	}
	pv_queue_push(n->tx, n->tx_chain, 0);
	return result;
}

int pv_net_transmit_unit(struct pv_net *n, const uint8_t *unit, uint32_t size)
{
	struct net_header header;
	struct iovec iov[2] = {{0}, {(void *)(unit + PV_NET_HEADER), size - PV_NET_HEADER}};

	memcpy(&header, unit, PV_NET_HEADER);
	return transmit(n, &header, iov, 2, size);
}

/* -- backend to driver -------------------------------------------------------------------------- */

#define OVERSIZED 100

static void give_back(struct pv_net *n)
{
	pv_queue_rewind(n->rx, (uint16_t)n->taken);
	n->taken = 0;
	n->room = 0;
}

/*
 * Take receive buffers until they hold `size` bytes: PV_NET_DONE, _WAIT (there are no more now), OVERSIZED (there can
 * never be enough), or what is wrong with them.
 */
static int take_buffers(struct pv_net *n, uint64_t size)
{
	if (!n->rx->size)
		return PV_NET_WAIT;
	uint32_t limit = n->features & F_MRG_RXBUF ? PV_NET_MERGE : 1;
	if (limit > n->rx->size)
		limit = n->rx->size;
	while (n->room < size) {
		if (n->taken == limit)
			return OVERSIZED;
		struct pv_chain *chain = &n->chains[n->taken];
		int result = pv_queue_pop(n->rx, chain);
		if (result < 0)
			return result;
		if (result == PV_QUEUE_EMPTY) {
			/* Here, where all there are have been taken: a bell for one more than these, not for the first. */
			if (pv_queue_enable_kicks(n->rx))
				continue;
			return PV_NET_WAIT;
		}
		n->taken++;
		n->room += chain->writable_bytes;
		/* 5.1.6.3.1: each is at least as large as the header. */
		if (chain->readable_bytes || chain->writable_bytes < PV_NET_HEADER)
			return PV_NET_BAD_BUFFER;
	}
	return PV_NET_DONE;
}

/* Write to the taken buffers from `offset` of the frame on; or, without `from`, mark what was written there. */
static void scatter(struct pv_net *n, uint64_t offset, const uint8_t *from, uint64_t size)
{
	for (uint32_t i = 0; i < n->taken && size; i++) {
		const struct pv_chain *chain = &n->chains[i];
		if (offset >= chain->writable_bytes) {
			offset -= chain->writable_bytes;
			continue;
		}
		uint64_t piece = chain->writable_bytes - offset < size ? chain->writable_bytes - offset : size;
		if (from) {
			pv_chain_write(n->rx, chain, offset, from, piece);
			from += piece;
		} else {
			pv_chain_mark(n->rx, chain, offset, piece);
		}
		size -= piece;
		offset = 0;
	}
}

/* A frame of `size` bytes is in the taken buffers: hand over those it needs, put the others back. */
static void hand_over(struct pv_net *n, uint32_t size)
{
	uint16_t used = 0;
	uint32_t left = size;

	for (uint16_t i = 0; left; i++) {
		uint64_t room = n->chains[i].writable_bytes;
		left -= room < left ? (uint32_t)room : left;
		used++;
	}
	/* 5.1.6.4.1: num_buffers is 1 without MRG_RXBUF, flags are 0 without GUEST_CSUM. */
	pv_chain_write(n->rx, n->chains, offsetof(struct net_header, num_buffers), &used, sizeof(used));
	if (!(n->features & F_GUEST_CSUM))
		pv_chain_write(n->rx, n->chains, offsetof(struct net_header, flags), "", 1);
	left = size;
	for (uint16_t i = 0; i < used; i++) {
		uint64_t room = n->chains[i].writable_bytes;
		uint32_t written = room < left ? (uint32_t)room : left;
		pv_queue_put(n->rx, &n->chains[i], i, written);
		left -= written;
	}
	/* All at once: a driver that sees the first buffer looks for the others then and there. */
	pv_queue_publish(n->rx, used);
	n->taken -= used;
	give_back(n);
	n->expected = size;
	n->counters.rx_frames++;
	n->counters.rx_bytes += size - PV_NET_HEADER;
}

static uint32_t largest(const struct pv_net *n)
{
	return n->mtu ? PV_NET_HEADER + LINK_HEADERS + n->mtu : PV_NET_UNIT;
}

/* Bring a frame to the driver: PV_NET_DONE (or dropped), _WAIT, or what is wrong with the ring. */
int pv_net_receive_unit(struct pv_net *n, const uint8_t *unit, uint32_t size)
{
	if (!n->link_up) {
		n->counters.rx_link_down++;
		return PV_NET_DONE;
	}
	if (size < PV_NET_HEADER + PV_NET_FRAME_MIN) {
		n->counters.rx_undersized++;
		return PV_NET_DONE;
	}
	bool segments = (unit[offsetof(struct net_header, gso_type)] & ~GSO_ECN) != GSO_NONE;
	/* 5.1.4.1: no frame above the MTU but for segmentation offload's. */
	int result = size > (segments ? PV_NET_UNIT : largest(n)) ? OVERSIZED : take_buffers(n, size);
	if (result == PV_NET_DONE) {
		scatter(n, 0, unit, size);
		hand_over(n, size);
		return PV_NET_DONE;
	}
	give_back(n);
	if (result != OVERSIZED)
		return result;
	n->counters.rx_oversized++;
	return PV_NET_DONE;
}

/*
 * Read a frame into the driver's buffers themselves: into as many as the last one needed, and what is beyond them into
 * `input`, at its place in the frame. If that was not it, the frame is made whole in `input`, and waits there.
 */
static int receive_from_tap(struct pv_net *n)
{
	struct iovec iov[SEGMENTS];
	int count = 0;
	uint64_t direct = 0;
	int result = take_buffers(n, n->expected);
	if (result < 0)
		return result;
	if (!n->taken)
		return PV_NET_WAIT;
	for (uint32_t i = 0; i < n->taken; i++) {
		const struct pv_chain *chain = &n->chains[i];
		for (uint32_t s = 0; s < chain->writable && count < SEGMENTS - 1 && direct < PV_NET_UNIT; s++) {
			uint64_t piece = chain->segments[s].iov_len;
			if (piece > PV_NET_UNIT - direct)
				piece = PV_NET_UNIT - direct;
			iov[count++] = (struct iovec){chain->segments[s].iov_base, piece};
			direct += piece;
		}
		if (count == SEGMENTS - 1)
			break;
	}
	iov[count++] = (struct iovec){n->input + direct, PV_NET_UNIT - direct};
	uint32_t size = 0;
	result = pv_backend_read_tap(n, iov, count, &size);
	if (result != PV_NET_DONE) {
		give_back(n);
		return result;
	}
	uint32_t written = size < direct ? size : (uint32_t)direct;
	if (size >= PV_NET_HEADER + PV_NET_FRAME_MIN && size <= largest(n)) {
		result = take_buffers(n, size);
		if (result < 0) {
			scatter(n, 0, NULL, written); /* the frame is lost with the ring, but memory has changed */
			return result;
		}
		if (result == PV_NET_DONE) {
			scatter(n, direct, n->input + direct, size - written);
			hand_over(n, size);
			return PV_NET_DONE;
		}
	}
	uint32_t at = 0;
	for (int i = 0; i + 1 < count && at < written; i++) {
		uint32_t piece = iov[i].iov_len < written - at ? (uint32_t)iov[i].iov_len : written - at;
		memcpy(n->input + at, iov[i].iov_base, piece);
		at += piece;
	}
	scatter(n, 0, NULL, written);
	give_back(n);
	n->unit = n->input;
	n->unit_size = size;
	return pv_net_receive_frame(n);
}

/* Move one frame to the driver: an enum pv_net_flow, or what is wrong with the ring. */
int pv_net_receive_frame(struct pv_net *n)
{
	if (!n->unit_size) {
		if (n->kind == PV_NET_TAP && n->link_up)
			return receive_from_tap(n);
		int result = pv_backend_next(n);
		if (result != PV_NET_DONE)
			return result;
	}
	int result = pv_net_receive_unit(n, n->unit, n->unit_size);
	if (result == PV_NET_DONE)
		n->unit_size = 0;
	return result;
}
