/* What comes in, and what is wanted then. See proxy_compare.h. */

#include "proxy_compare.h"

#include <stdlib.h>
#include <string.h>

/* -- what is wanted ----------------------------------------------------------------------------- */

static void sample(struct pv_due *due, int side, const struct pv_held *held, uint32_t from)
{
	if (!held || from >= held->packet.body_size)
		return;
	uint32_t size = held->packet.body_size - from;
	due->sizes[side] = size < PV_COMPARE_SAMPLE ? size : PV_COMPARE_SAMPLE;
	memcpy(due->samples[side], pv_body(held) + from, due->sizes[side]);
}

/* A checkpoint for a reason that no frame needs to show. */
void pv_compare_notify(struct pv_compare *c, const struct pv_flow_key *key, enum pv_compare_reason reason)
{
	c->counters.due[reason]++;
	if (c->compared != c->epoch || c->mode == PV_COMPARE_PASS)
		return; /* one is under way; what it does not cure is found by commit_flow() */
	if (c->due.reason) {
		c->due.coalesced++;
		return;
	}
	memset(&c->due, 0, sizeof(c->due));
	c->due.reason = reason;
	c->due.epoch = c->compared;
	if (key)
		c->due.key = *key;
	c->last_due = c->due;
}

void pv_compare_want(struct pv_compare *c, struct pv_connection *at, enum pv_compare_reason reason, uint32_t position,
		     const struct pv_held *primary, uint32_t primary_at, const struct pv_held *secondary,
		     uint32_t secondary_at)
{
	bool first = !c->due.reason;
	at->diverged = true;
	at->differences++;
	pv_compare_notify(c, &at->flow.key, reason);
	if (!first || !c->due.reason)
		return;
	c->due.position = position;
	sample(&c->due, PV_PRIMARY, primary, primary_at);
	sample(&c->due, PV_SECONDARY, secondary, secondary_at);
	c->last_due = c->due;
}

/* -- what comes in ------------------------------------------------------------------------------ */

static struct pv_held *hold(struct pv_compare *c, enum pv_compare_side side, const uint8_t *header,
			    const uint8_t *frame, uint32_t size, uint64_t epoch, uint64_t now)
{
	uint32_t whole = PV_NET_HEADER + size;
	if (c->held_bytes[side] + whole > c->limits.max_bytes)
		return NULL;
	struct pv_held *held = malloc(sizeof(*held) + whole);
	if (!held)
		return NULL;
	memset(held, 0, sizeof(*held));
	memcpy(held->unit, header, PV_NET_HEADER);
	memcpy(held->unit + PV_NET_HEADER, frame, size);
	held->size = whole;
	held->arrived = now;
	held->epoch = epoch;
	c->held_bytes[side] += whole;
	return held;
}

/* One of the secondary's that there is no room for: its flow, or all of them, cannot be compared to the end. */
static int lose(struct pv_compare *c, struct pv_connection *at, uint64_t epoch, enum pv_compare_reason reason)
{
	c->counters.dropped++;
	if (epoch != c->compared) {
		c->apart.epoch = epoch; /* found at the commit */
		c->lost = reason;
	} else if (at) {
		pv_compare_want(c, at, reason, 0, NULL, 0, NULL, 0);
	} else {
		pv_compare_notify(c, NULL, reason);
	}
	return PV_COMPARE_TAKEN;
}

static int take_primary(struct pv_compare *c, struct pv_held *held, const struct pv_flow_key *key, uint64_t now)
{
	enum pv_compare_policy policy = c->limits.policy[key->class];
	if (c->mode == PV_COMPARE_PASS || (c->mode == PV_COMPARE_HYBRID && policy == PV_POLICY_RELEASE)) {
		c->counters.released++;
		pv_compare_send_out(c, held);
		return PV_COMPARE_TAKEN;
	}
	struct pv_connection *at = NULL;
	if (c->mode == PV_COMPARE_HYBRID && policy == PV_POLICY_COMPARE)
		at = pv_compare_connect(c, key);
	if (!at) {
		pv_stream_append(&c->apart.side[PV_PRIMARY], held);
		if (c->mode == PV_COMPARE_HYBRID)
			pv_compare_notify(c, key, policy == PV_POLICY_COMPARE ? PV_DUE_CONNECTIONS : PV_DUE_POLICY);
		return PV_COMPARE_TAKEN;
	}
	pv_compare_rebase(c, at);
	pv_stream_append(&at->side[PV_PRIMARY], held);
	at->frames[PV_PRIMARY]++;
	if (held->epoch == c->compared)
		pv_compare_progress(c, at);
	if (at->side[PV_PRIMARY].count > c->limits.max_queue_size && !at->diverged)
		pv_compare_notify(c, key, PV_DUE_PRIMARY_FULL);
	pv_compare_settle(c, at, now);
	return PV_COMPARE_TAKEN;
}

static int take_secondary(struct pv_compare *c, struct pv_held *held, const struct pv_flow_key *key, uint64_t now)
{
	uint64_t epoch = held->epoch;
	struct pv_connection *at = pv_compare_connect(c, key);
	if (!at) {
		pv_compare_free_held(c, PV_SECONDARY, held);
		return lose(c, NULL, epoch, PV_DUE_CONNECTIONS);
	}
	pv_compare_rebase(c, at);
	at->frames[PV_SECONDARY]++;
	if (at->diverged && epoch == c->compared) {
		c->counters.dropped++;
		pv_compare_free_held(c, PV_SECONDARY, held);
		return PV_COMPARE_TAKEN;
	}
	pv_stream_append(&at->side[PV_SECONDARY], held);
	if (epoch == c->compared)
		pv_compare_progress(c, at);
	if (at->side[PV_SECONDARY].count > c->limits.max_queue_size && !at->diverged) {
		lose(c, at, epoch, PV_DUE_SECONDARY_FULL);
		pv_compare_drop_stream(c, at, PV_SECONDARY);
	}
	pv_compare_settle(c, at, now);
	return PV_COMPARE_TAKEN;
}

static bool well_formed(struct pv_compare *c, enum pv_compare_side side, uint32_t size)
{
	if (size < PV_NET_FRAME_MIN || size > PV_NET_FRAME_MAX) {
		c->counters.bad++;
		return false;
	}
	c->counters.frames[side]++;
	c->counters.bytes[side] += size;
	return true;
}

int pv_compare_primary(struct pv_compare *c, const uint8_t *header, const uint8_t *frame, uint32_t size, uint64_t now)
{
	int result = PV_COMPARE_BAD;
	pthread_mutex_lock(&c->lock);
	if (well_formed(c, PV_PRIMARY, size)) {
		struct pv_held *held = hold(c, PV_PRIMARY, header, frame, size, c->epoch, now);
		struct pv_flow_key key;
		if (held) {
			pv_parse(&held->packet, &key, held->unit + PV_NET_HEADER, size, PV_PARSE_FROM_GUEST);
			result = take_primary(c, held, &key, now);
		} else {
			c->counters.refused++;
			pv_compare_notify(c, NULL, PV_DUE_PRIMARY_FULL);
			result = PV_COMPARE_REFUSED;
		}
	}
	pthread_mutex_unlock(&c->lock);
	return result;
}

int pv_compare_secondary(struct pv_compare *c, const uint8_t *header, const uint8_t *frame, uint32_t size,
			 uint64_t epoch, uint64_t now)
{
	int result = PV_COMPARE_BAD;
	pthread_mutex_lock(&c->lock);
	if (epoch > c->epoch && c->mode == PV_COMPARE_HYBRID) {
		c->counters.bad++;
	} else if (well_formed(c, PV_SECONDARY, size)) {
		struct pv_packet packet;
		struct pv_flow_key key;
		result = PV_COMPARE_TAKEN;
		pv_parse(&packet, &key, frame, size, PV_PARSE_FROM_GUEST);
		if (c->mode != PV_COMPARE_HYBRID || epoch < c->compared) {
			c->counters.dropped++;
		} else if (c->limits.policy[key.class] == PV_POLICY_COMPARE) {
			struct pv_held *held = hold(c, PV_SECONDARY, header, frame, size, epoch, now);
			if (held) {
				held->packet = packet;
				result = take_secondary(c, held, &key, now);
			} else {
				result = lose(c, (struct pv_connection *)pv_flow_find(&c->table, &key), epoch,
					      PV_DUE_SECONDARY_FULL);
			}
		}
	}
	pthread_mutex_unlock(&c->lock);
	return result;
}
