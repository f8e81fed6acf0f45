/*
 * What has no stream: UDP, ICMP, ARP, fragments, and all that is compared because nobody knows what it means. Messages of
 * one flow must be the same; they may have overtaken each other, since whoever sends them may have several threads.
 */

#include "proxy_compare.h"

#include <string.h>

/* How far back in the secondary's queue a message is looked for. */
#define REACH 64

/* Where a message has its checksum, which need not be complete and says nothing the message does not: 2 bytes, or 0. */
static uint32_t checksum_at(const struct pv_packet *p)
{
	return p->class == PV_PACKET_ICMP ? 2 : 0;
}

/* The first byte of the bodies that differs, or the length of the shorter one. */
static uint32_t same_bytes(const struct pv_held *a, const struct pv_held *b)
{
	uint32_t size = a->packet.body_size < b->packet.body_size ? a->packet.body_size : b->packet.body_size;
	uint32_t sum = checksum_at(&a->packet), from = 0;
	if (sum && size >= sum + 2) {
		if (memcmp(pv_body(a), pv_body(b), sum) == 0)
			from = sum + 2;
	}
	if (!memcmp(pv_body(a) + from, pv_body(b) + from, size - from))
		return size;
	while (from < size && pv_body(a)[from] == pv_body(b)[from])
		from++;
	return from;
}

/* Fragments have an identification of their sender's choice: one of the primary's goes with one of the secondary's. */
static bool same_datagram(const struct pv_connection *at, const struct pv_packet *a, const struct pv_packet *b)
{
	for (uint32_t i = 0; i < at->pairs && i < PV_FRAGMENT_PAIRS; i++) {
		uint32_t pair = (at->pairs - 1 - i) % PV_FRAGMENT_PAIRS;
		if (at->pair[pair][0] == a->fragment_id || at->pair[pair][1] == b->fragment_id)
			return at->pair[pair][0] == a->fragment_id && at->pair[pair][1] == b->fragment_id;
	}
	return true;
}

static void remember_datagram(struct pv_connection *at, const struct pv_packet *a, const struct pv_packet *b)
{
	for (uint32_t i = 0; i < at->pairs && i < PV_FRAGMENT_PAIRS; i++)
		if (at->pair[i][0] == a->fragment_id && at->pair[i][1] == b->fragment_id)
			return;
	uint32_t pair = at->pairs % PV_FRAGMENT_PAIRS;
	at->pair[pair][0] = a->fragment_id;
	at->pair[pair][1] = b->fragment_id;
	at->pairs = at->pairs < 2 * PV_FRAGMENT_PAIRS ? at->pairs + 1 : PV_FRAGMENT_PAIRS + 1;
}

static bool same_header(const struct pv_connection *at, const struct pv_held *a, const struct pv_held *b)
{
	const struct pv_packet *p = &a->packet, *q = &b->packet;
	if (!at->flow.key.family)
		return true;
	if (p->hop_limit != q->hop_limit || p->service != q->service)
		return false;
	if (p->fragment || q->fragment)
		return p->fragment == q->fragment && p->fragment_offset == q->fragment_offset &&
		       p->more_fragments == q->more_fragments && same_datagram(at, p, q);
	uint32_t size = p->transport - p->extensions;
	return size == q->transport - q->extensions &&
	       !memcmp(a->unit + PV_NET_HEADER + p->extensions, b->unit + PV_NET_HEADER + q->extensions, size);
}

/* PV_DUE_NOTHING, or what is different and where. */
static enum pv_compare_reason compare(const struct pv_connection *at, const struct pv_held *a, const struct pv_held *b,
				      uint32_t *where)
{
	*where = same_bytes(a, b);
	if (*where < a->packet.body_size && *where < b->packet.body_size)
		return PV_DUE_PAYLOAD;
	if (a->packet.body_size != b->packet.body_size)
		return PV_DUE_LENGTH;
	*where = 0;
	return same_header(at, a, b) ? PV_DUE_NOTHING : PV_DUE_HEADER;
}

static struct pv_held **find(struct pv_compare *c, struct pv_connection *at, const struct pv_held *primary)
{
	struct pv_held **held = &at->side[PV_SECONDARY].first;
	uint32_t where;
	for (int i = 0; i < REACH && *held && (*held)->epoch == c->compared; i++, held = &(*held)->next)
		if (compare(at, primary, *held, &where) == PV_DUE_NOTHING)
			return held;
	return NULL;
}

void pv_datagram_progress(struct pv_compare *c, struct pv_connection *at)
{
	struct pv_held **primary = &at->side[PV_PRIMARY].first, **secondary = &at->side[PV_SECONDARY].first;
	while (*primary && *secondary && (*primary)->epoch == c->compared && (*secondary)->epoch == c->compared) {
		struct pv_held **same = find(c, at, *primary);
		if (!same) {
			uint32_t where;
			enum pv_compare_reason reason = compare(at, *primary, *secondary, &where);
			pv_compare_want(c, at, reason, where, *primary, where, *secondary, where);
			return;
		}
		if (at->flow.key.class == PV_PACKET_FRAGMENT)
			remember_datagram(at, &(*primary)->packet, &(*same)->packet);
		c->counters.equal_bytes += (*primary)->packet.body_size;
		pv_compare_drop(c, at, same);
		pv_compare_release(c, at, primary);
	}
}
