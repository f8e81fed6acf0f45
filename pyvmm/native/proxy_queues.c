/* The frames of either side by flow. See proxy_compare.h. */

#include "proxy_compare.h"

#include <stdlib.h>
#include <string.h>

/* -- queues ------------------------------------------------------------------------------------- */

void pv_stream_open(struct pv_compare_stream *s)
{
	memset(s, 0, sizeof(*s));
	s->end = &s->first;
}

void pv_stream_append(struct pv_compare_stream *s, struct pv_held *held)
{
	held->next = NULL;
	*s->end = held;
	s->end = &held->next;
	s->count++;
	if (!s->fresh)
		s->fresh = held;
}

struct pv_held *pv_stream_take_off(struct pv_compare_stream *s, struct pv_held **at)
{
	struct pv_held *held = *at;
	*at = held->next;
	if (s->end == &held->next)
		s->end = at;
	if (s->fresh == held)
		s->fresh = held->next;
	s->count--;
	return held;
}

void pv_compare_free_held(struct pv_compare *c, enum pv_compare_side side, struct pv_held *held)
{
	c->held_bytes[side] -= held->size;
	free(held);
}

void pv_compare_send_out(struct pv_compare *c, struct pv_held *held)
{
	held->next = NULL;
	*c->out_end = held;
	c->out_end = &held->next;
	c->out_count++;
}

bool pv_compare_send_copy(struct pv_compare *c, const uint8_t *unit, uint32_t size)
{
	if (c->held_bytes[PV_PRIMARY] + size > c->limits.max_bytes)
		return false;
	struct pv_held *held = calloc(1, sizeof(*held) + size);
	if (!held)
		return false;
	memcpy(held->unit, unit, size);
	held->size = size;
	c->held_bytes[PV_PRIMARY] += size;
	pv_compare_send_out(c, held);
	return true;
}

void pv_compare_release(struct pv_compare *c, struct pv_connection *at, struct pv_held **held)
{
	c->counters.released++;
	at->released++;
	pv_compare_send_out(c, pv_stream_take_off(&at->side[PV_PRIMARY], held));
}

/* One of the secondary's that has done its duty. */
void pv_compare_drop(struct pv_compare *c, struct pv_connection *at, struct pv_held **held)
{
	pv_compare_free_held(c, PV_SECONDARY, pv_stream_take_off(&at->side[PV_SECONDARY], held));
}

void pv_compare_drop_stream(struct pv_compare *c, struct pv_connection *at, enum pv_compare_side side)
{
	while (at->side[side].first)
		pv_compare_free_held(c, side, pv_stream_take_off(&at->side[side], &at->side[side].first));
}

/* -- flows -------------------------------------------------------------------------------------- */

void pv_compare_forget(struct pv_compare *c, struct pv_connection *at)
{
	pv_compare_drop_stream(c, at, PV_PRIMARY);
	pv_compare_drop_stream(c, at, PV_SECONDARY);
	pv_flow_unlist(at->busy ? &c->busy : &c->idle, &at->flow);
	pv_flow_remove(&c->table, &at->flow);
	free(at);
}

/* Into the list it belongs to. One without frames is the same on both sides, so it can be forgotten any time. */
void pv_compare_settle(struct pv_compare *c, struct pv_connection *at, uint64_t now)
{
	bool busy = at->side[PV_PRIMARY].first || at->side[PV_SECONDARY].first || at->diverged;
	if (busy && at->busy)
		return;
	pv_flow_unlist(at->busy ? &c->busy : &c->idle, &at->flow);
	at->busy = busy;
	at->flow.used = now;
	pv_flow_append(busy ? &c->busy : &c->idle, &at->flow);
}

void pv_compare_rebase(struct pv_compare *c, struct pv_connection *at)
{
	if (at->epoch == c->compared)
		return;
	pv_tcp_rebase(at, c->compared);
	at->pairs = 0;
	at->diverged = false;
	at->epoch = c->compared;
}

struct pv_connection *pv_compare_connect(struct pv_compare *c, const struct pv_flow_key *key)
{
	struct pv_connection *at = (struct pv_connection *)pv_flow_find(&c->table, key);
	if (at)
		return at;
	if (c->table.count >= c->table.limit) {
		if (!c->idle.oldest)
			return NULL;
		pv_compare_forget(c, (struct pv_connection *)c->idle.oldest);
		c->counters.connections_forgotten++;
	}
	at = calloc(1, sizeof(*at));
	if (!at)
		return NULL;
	pv_stream_open(&at->side[PV_PRIMARY]);
	pv_stream_open(&at->side[PV_SECONDARY]);
	at->flow.key = *key;
	at->epoch = c->compared;
	pv_flow_insert(&c->table, &at->flow);
	pv_flow_append(&c->idle, &at->flow);
	return at;
}

void pv_compare_progress(struct pv_compare *c, struct pv_connection *at)
{
	if (at->diverged)
		return;
	if (at->flow.key.class == PV_PACKET_TCP)
		pv_tcp_progress(c, at);
	else
		pv_datagram_progress(c, at);
}
