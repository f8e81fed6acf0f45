/* The connections that a rewriter knows. See proxy_rewriter.h. */

#include "proxy_rewriter.h"

#include <stdlib.h>
#include <string.h>

struct pv_rewriter *pv_rewriter_new(const struct pv_rewriter_limits *limits)
{
	struct pv_rewriter *r = calloc(1, sizeof(*r));
	if (!r)
		return NULL;
	r->limits = *limits;
	pthread_mutex_init(&r->lock, NULL);
	if (pv_flow_table_open(&r->table, limits->max_connections) < 0) {
		pv_rewriter_free(r);
		return NULL;
	}
	return r;
}

static void forget(struct pv_rewriter *r, struct pv_rewritten *at)
{
	pv_flow_unlist(&r->lists[at->state], &at->flow);
	pv_flow_remove(&r->table, &at->flow);
	free(at);
}

void pv_rewriter_free(struct pv_rewriter *r)
{
	for (int state = 0; state < PV_REWRITER_STATES; state++)
		while (r->lists[state].oldest)
			forget(r, (struct pv_rewritten *)r->lists[state].oldest);
	pv_flow_table_close(&r->table);
	pthread_mutex_destroy(&r->lock);
	free(r);
}

/* Room for one more: a quiet one goes, or one that a client has not answered; never one that would break. */
static bool make_room(struct pv_rewriter *r)
{
	static const uint8_t order[] = {PV_REWRITER_QUIET, PV_REWRITER_LEARNING};
	if (r->table.count < r->table.limit)
		return true;
	for (unsigned i = 0; i < sizeof(order); i++)
		if (r->lists[order[i]].oldest) {
			forget(r, (struct pv_rewritten *)r->lists[order[i]].oldest);
			r->counters.forgotten++;
			return true;
		}
	return false;
}

struct pv_rewritten *pv_rewriter_find(struct pv_rewriter *r, const struct pv_flow_key *key, bool make, uint64_t now)
{
	struct pv_rewritten *at = (struct pv_rewritten *)pv_flow_find(&r->table, key);
	if (at || !make)
		return at;
	at = make_room(r) ? calloc(1, sizeof(*at)) : NULL;
	if (!at) {
		r->counters.refused++;
		return NULL;
	}
	at->flow.key = *key;
	at->flow.used = now;
	at->state = PV_REWRITER_QUIET;
	pv_flow_insert(&r->table, &at->flow);
	pv_flow_append(&r->lists[at->state], &at->flow);
	return at;
}

/* Into the list it belongs to, as the one used last. */
void pv_rewriter_settle(struct pv_rewriter *r, struct pv_rewritten *at, uint64_t now)
{
	uint8_t state = at->state;
	pv_flow_unlist(&r->lists[at->state], &at->flow);
	if (state != PV_REWRITER_LEARNING)
		state = (at->offset || at->ts_offset) && !at->closed ? PV_REWRITER_LIVE : PV_REWRITER_QUIET;
	at->state = state;
	at->flow.used = now;
	pv_flow_append(&r->lists[state], &at->flow);
}

void pv_rewriter_scan(struct pv_rewriter *r, uint64_t now)
{
	pthread_mutex_lock(&r->lock);
	for (int state = 0; state < PV_REWRITER_STATES; state++) {
		uint64_t timeout = state == PV_REWRITER_LIVE ? r->limits.live_timeout : r->limits.quiet_timeout;
		struct pv_flow *flow;
		while ((flow = r->lists[state].oldest) && now > flow->used && now - flow->used > timeout) {
			forget(r, (struct pv_rewritten *)flow);
			r->counters.forgotten++;
		}
	}
	pthread_mutex_unlock(&r->lock);
}

uint32_t pv_rewriter_checkpoint(struct pv_rewriter *r, const struct pv_rewriter_record *records, uint32_t count,
				uint64_t now)
{
	struct pv_flow *flow;
	uint32_t taken = 0;

	pthread_mutex_lock(&r->lock);
	/* What clients have echoed stays true; all else was this guest's, which is no more. */
	for (int state = 0; state < PV_REWRITER_QUIET; state++)
		while ((flow = r->lists[state].oldest)) {
			struct pv_rewritten *at = (struct pv_rewritten *)flow;
			at->offset = at->ts_offset = 0;
			pv_flow_unlist(&r->lists[state], flow);
			at->state = PV_REWRITER_QUIET;
			pv_flow_append(&r->lists[PV_REWRITER_QUIET], flow);
		}
	for (flow = r->lists[PV_REWRITER_QUIET].oldest; flow; flow = flow->newer) {
		struct pv_rewritten *at = (struct pv_rewritten *)flow;
		at->offset = at->ts_offset = 0; /* a closed one may have had them */
		at->has_isn = at->has_timestamp = at->has_last = at->has_ack = false;
		at->opaque = at->guest_fin = at->peer_fin = at->closed = false;
	}
	for (; taken < count; taken++) {
		const struct pv_rewriter_record *from = &records[taken];
		struct pv_rewritten *at = pv_rewriter_find(r, &from->key, true, now);
		if (!at)
			break;
		at->offset = from->offset;
		at->ts_offset = from->ts_offset;
		if (from->has_echo && (!at->has_echo || pv_after(from->echo, at->echo) > 0)) {
			at->echo = from->echo;
			at->has_echo = true;
		}
		pv_rewriter_settle(r, at, now);
	}
	pthread_mutex_unlock(&r->lock);
	return taken;
}

uint32_t pv_rewriter_records(struct pv_rewriter *r, struct pv_rewriter_record *records, uint32_t limit)
{
	uint32_t count = 0;
	pthread_mutex_lock(&r->lock);
	for (const struct pv_flow *flow = r->lists[PV_REWRITER_LIVE].oldest; flow; flow = flow->newer, count++) {
		const struct pv_rewritten *at = (const struct pv_rewritten *)flow;
		if (count < limit)
			records[count] = (struct pv_rewriter_record){
				.key = flow->key, .offset = at->offset, .ts_offset = at->ts_offset,
				.echo = at->echo, .has_echo = at->has_echo,
			};
	}
	pthread_mutex_unlock(&r->lock);
	return count;
}

void pv_rewriter_read_counters(struct pv_rewriter *r, struct pv_rewriter_counters *counters, uint32_t *connections)
{
	pthread_mutex_lock(&r->lock);
	*counters = r->counters;
	*connections = r->table.count;
	pthread_mutex_unlock(&r->lock);
}
