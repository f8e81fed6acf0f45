/* One segment through the rewriter. See proxy_rewriter.h. */

#include "proxy_rewriter.h"

#include <string.h>

/* virtio 1.2, 5.1.6 */
#define HDR_F_NEEDS_CSUM 1
#define HDR_CSUM_START 6
#define HDR_CSUM_OFFSET 8
#define TCP_CHECKSUM 16u
#define ICMP_CHECKSUM 2u

#define PROTOCOL_TCP 6
/* A client cannot have seen a timestamp much younger than the last that this guest sent: it runs alongside. */
#define ECHO_AHEAD 60000

/* A segment that is being changed; `from` is where its checksum begins to count, -1: that is not to be changed. */
struct edit {
	uint8_t *frame;
	int64_t from;
	uint32_t sum;
	bool changed;
};

static void put(struct edit *e, uint32_t at, uint32_t value)
{
	uint8_t bytes[4];
	pv_put_be32(bytes, value);
	for (uint32_t i = 0; i < 4; i++) {
		/* RFC 1624, equation 3, a byte at a time: an option can be at an odd place. */
		int shift = (at + i - e->from) & 1 ? 0 : 8;
		e->sum += (0xffffu - ((uint32_t)e->frame[at + i] << shift)) + ((uint32_t)bytes[i] << shift);
	}
	memcpy(e->frame + at, bytes, 4);
	e->changed = true;
}

static void add(struct edit *e, uint32_t at, uint32_t offset)
{
	if (offset)
		put(e, at, pv_be32(e->frame + at) + offset);
}

static int finish(struct edit *e, uint32_t checksum)
{
	if (e->changed && e->from >= 0) {
		uint32_t sum = (uint16_t)~pv_be16(e->frame + checksum) + e->sum;
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		e->frame[checksum] = (uint8_t)(~sum >> 8);
		e->frame[checksum + 1] = (uint8_t)~sum;
	}
	return e->changed;
}

/* To change a message at `from` with its checksum `offset` bytes behind. */
static struct edit open_edit(const uint8_t *header, uint8_t *frame, uint32_t from, uint32_t offset)
{
	uint32_t csum_start = header[HDR_CSUM_START] | header[HDR_CSUM_START + 1] << 8;
	uint32_t csum_offset = header[HDR_CSUM_OFFSET] | header[HDR_CSUM_OFFSET + 1] << 8;
	bool partial = header[0] & HDR_F_NEEDS_CSUM && csum_start == from && csum_offset == offset;
	return (struct edit){frame, partial ? -1 : (int64_t)from, 0, false};
}

struct options {
	uint32_t timestamps; /* where in the frame, 0: none */
	uint32_t sack, sack_size;
	bool signed_;
};

static struct options find_options(const uint8_t *frame, const struct pv_packet *p)
{
	uint32_t base = p->transport + PV_TCP_HEADER, at = 0, start, length;
	struct options o = {0};
	for (int kind; (kind = pv_tcp_next_option(frame + base, p->options_size, &at, &start, &length)) >= 0;) {
		if (kind == PV_TCP_OPTION_TIMESTAMPS && length == 10) {
			o.timestamps = base + start;
		} else if (kind == PV_TCP_OPTION_SACK && (length - 2) % 8 == 0) {
			o.sack = base + start + 2;
			o.sack_size = length - 2;
		} else if (kind == PV_TCP_OPTION_MD5 || kind == PV_TCP_OPTION_AO) {
			o.signed_ = true;
		}
	}
	return o;
}

/* -- to the guest ------------------------------------------------------------------------------- */

static void learn(struct pv_rewriter *r, struct pv_rewritten *at, uint32_t ack, const uint8_t *timestamps)
{
	at->offset = at->isn - (ack - 1);
	at->state = PV_REWRITER_QUIET; /* settle() makes it live if there is something to do */
	pv_flow_unlist(&r->lists[PV_REWRITER_LEARNING], &at->flow);
	pv_flow_append(&r->lists[PV_REWRITER_QUIET], &at->flow);
	/* With the primary's number it also has the primary's clock: it is the primary's SYN, out of a checkpoint. */
	if (timestamps && at->has_timestamp && at->offset)
		at->ts_offset = at->timestamp - pv_be32(timestamps + 6);
	r->counters.learned++;
}

static void hear_echo(struct pv_rewritten *at, uint32_t echo)
{
	if (at->has_last && pv_after(echo, at->last_timestamp) > ECHO_AHEAD)
		return;
	if (!at->has_echo || pv_after(echo, at->echo) > 0) {
		at->echo = echo;
		at->has_echo = true;
	}
}

static int segment_to_guest(struct pv_rewriter *r, struct pv_rewritten *at, const struct pv_packet *p,
			    const uint8_t *header, uint8_t *frame, uint64_t now)
{
	struct options o = find_options(frame, p);
	struct edit e = open_edit(header, frame, p->transport, TCP_CHECKSUM);
	bool acknowledges = p->flags & PV_TCP_ACK;

	r->counters.to_guest++;
	if (at->opaque)
		return 0;
	if (acknowledges && at->state == PV_REWRITER_LEARNING)
		learn(r, at, p->ack, o.timestamps ? frame + o.timestamps : NULL);
	if (acknowledges && at->state != PV_REWRITER_LEARNING) {
		if (o.timestamps) {
			hear_echo(at, pv_be32(frame + o.timestamps + 6));
			add(&e, o.timestamps + 6, at->ts_offset);
		}
		add(&e, p->transport + 8, at->offset);
		for (uint32_t i = 0; i < o.sack_size; i += 4)
			add(&e, o.sack + i, at->offset);
	}
	if (p->flags & PV_TCP_FIN)
		at->peer_fin = true;
	/* RFC 5961, 3.2: the one reset that ends a connection without a question. */
	if ((p->flags & PV_TCP_RST && at->has_ack && p->seq == at->ack) || (at->guest_fin && at->peer_fin))
		at->closed = true;
	pv_rewriter_settle(r, at, now);
	return finish(&e, p->transport + TCP_CHECKSUM);
}

/* An ICMP error quotes a segment of the guest's: with the primary's number, which this guest would not know. */
static int quote_to_guest(struct pv_rewriter *r, const struct pv_packet *p, const struct pv_flow_key *key,
			  const uint8_t *header, uint8_t *frame)
{
	uint32_t at = p->body + 8, end = p->body + p->body_size, ip_size = key->family == 4 ? 20 : 40;
	uint8_t type = p->body_size ? frame[p->body] : 0;
	bool error = key->family == 4 ? type == 3 || type == 11 || type == 12 : type >= 1 && type <= 4;
	struct pv_flow_key quoted = {.family = key->family, .class = PV_PACKET_TCP, .protocol = PROTOCOL_TCP};

	if (!error || p->body_size < 8 + ip_size + 8)
		return 0;
	const uint8_t *ip = frame + at;
	if (key->family == 4) {
		ip_size = (ip[0] & 15) * 4u;
		if (ip[0] >> 4 != 4 || ip_size < 20 || ip[9] != PROTOCOL_TCP || pv_be16(ip + 6) & 0x1fff ||
		    end - at < ip_size + 8)
			return 0;
		memcpy(quoted.guest, ip + 12, 4);
		memcpy(quoted.peer, ip + 16, 4);
	} else {
		if (ip[0] >> 4 != 6 || ip[6] != PROTOCOL_TCP)
			return 0;
		memcpy(quoted.guest, ip + 8, 16);
		memcpy(quoted.peer, ip + 24, 16);
	}
	at += ip_size;
	quoted.guest_port = pv_be16(frame + at);
	quoted.peer_port = pv_be16(frame + at + 2);
	memcpy(quoted.vlan, key->vlan, sizeof(quoted.vlan));
	const struct pv_rewritten *connection = pv_rewriter_find(r, &quoted, false, 0);
	if (!connection || connection->state != PV_REWRITER_LIVE || connection->opaque)
		return 0;
	struct edit e = open_edit(header, frame, p->body, ICMP_CHECKSUM);
	add(&e, at + 4, connection->offset);
	r->counters.quoted++;
	return finish(&e, p->body + ICMP_CHECKSUM);
}

int pv_rewriter_to_guest(struct pv_rewriter *r, const uint8_t *header, uint8_t *frame, uint32_t size, uint64_t now)
{
	struct pv_packet p;
	struct pv_flow_key key;
	int changed = 0;

	pv_parse(&p, &key, frame, size, PV_PARSE_INTO_FRAGMENT);
	if (p.class != PV_PACKET_TCP && p.class != PV_PACKET_ICMP)
		return 0;
	pthread_mutex_lock(&r->lock);
	if (p.class == PV_PACKET_ICMP) {
		changed = quote_to_guest(r, &p, &key, header, frame);
	} else {
		struct pv_rewritten *at = pv_rewriter_find(r, &key, false, now);
		if (at)
			changed = segment_to_guest(r, at, &p, header, frame, now);
	}
	r->counters.rewritten += (uint64_t)changed;
	pthread_mutex_unlock(&r->lock);
	return changed;
}

/* -- from the guest ----------------------------------------------------------------------------- */

/* A SYN of a connection that was not there: what was known of one with the same addresses is over. */
static void start(struct pv_rewriter *r, struct pv_rewritten *at, const struct pv_packet *p, const struct options *o,
		  const uint8_t *frame)
{
	pv_flow_unlist(&r->lists[at->state], &at->flow);
	at->state = PV_REWRITER_LEARNING;
	pv_flow_append(&r->lists[at->state], &at->flow);
	at->has_isn = true;
	at->isn = p->seq;
	at->offset = at->ts_offset = 0;
	at->has_echo = at->has_last = at->has_ack = false;
	at->guest_fin = at->peer_fin = at->closed = false;
	at->has_timestamp = o->timestamps;
	at->timestamp = o->timestamps ? pv_be32(frame + o->timestamps + 2) : 0;
	at->opaque = o->signed_ || p->body_size;
	r->counters.opaque += at->opaque;
}

static void stamp(struct pv_rewriter *r, struct pv_rewritten *at, struct edit *e, uint32_t timestamps)
{
	uint32_t value = pv_be32(e->frame + timestamps + 2);
	if (at->has_echo && pv_after(at->echo, value - at->ts_offset) > 0) {
		at->ts_offset = value - at->echo;
		r->counters.timestamps_raised++;
	}
	add(e, timestamps + 2, 0 - at->ts_offset);
	at->last_timestamp = value - at->ts_offset;
	at->has_last = true;
}

int pv_rewriter_from_guest(struct pv_rewriter *r, const uint8_t *header, uint8_t *frame, uint32_t size, uint64_t now)
{
	struct pv_packet p;
	struct pv_flow_key key;
	int changed = 0;

	pv_parse(&p, &key, frame, size, PV_PARSE_FROM_GUEST | PV_PARSE_INTO_FRAGMENT);
	if (p.class != PV_PACKET_TCP)
		return 0;
	struct options o = find_options(frame, &p);
	bool syn = (p.flags & (PV_TCP_SYN | PV_TCP_RST)) == PV_TCP_SYN;
	pthread_mutex_lock(&r->lock);
	struct pv_rewritten *at = pv_rewriter_find(r, &key, syn || (o.timestamps && !(p.flags & PV_TCP_RST)), now);
	if (at) {
		r->counters.from_guest++;
		if (syn && !(at->has_isn && at->isn == p.seq))
			start(r, at, &p, &o, frame);
		struct edit e = open_edit(header, frame, p.transport, TCP_CHECKSUM);
		if (at->state != PV_REWRITER_LEARNING && !at->opaque) {
			add(&e, p.transport + 4, 0 - at->offset);
			if (o.timestamps)
				stamp(r, at, &e, o.timestamps);
		}
		if (p.flags & PV_TCP_ACK) {
			at->ack = p.ack;
			at->has_ack = true;
		}
		if (p.flags & PV_TCP_FIN)
			at->guest_fin = true;
		if (p.flags & PV_TCP_RST || (at->guest_fin && at->peer_fin))
			at->closed = true;
		pv_rewriter_settle(r, at, now);
		changed = finish(&e, p.transport + TCP_CHECKSUM);
	}
	r->counters.rewritten += (uint64_t)changed;
	pthread_mutex_unlock(&r->lock);
	return changed;
}
