/* What becomes of colo-compare's frames when an epoch or their time is over, and what can be asked of it. */

#include "proxy_compare.h"

#include <stdlib.h>
#include <string.h>

struct pv_compare *pv_compare_new(const struct pv_compare_limits *limits)
{
	struct pv_compare *c = calloc(1, sizeof(*c));
	if (!c)
		return NULL;
	c->limits = *limits;
	c->out_end = &c->out;
	pv_stream_open(&c->apart.side[PV_PRIMARY]);
	pv_stream_open(&c->apart.side[PV_SECONDARY]);
	pthread_mutex_init(&c->lock, NULL);
	if (pv_flow_table_open(&c->table, limits->max_connections) < 0) {
		pv_compare_free(c);
		return NULL;
	}
	return c;
}

static void free_out(struct pv_compare *c)
{
	while (c->out) {
		struct pv_held *held = c->out;
		c->out = held->next;
		free(held);
	}
}

void pv_compare_free(struct pv_compare *c)
{
	while (c->busy.oldest)
		pv_compare_forget(c, (struct pv_connection *)c->busy.oldest);
	while (c->idle.oldest)
		pv_compare_forget(c, (struct pv_connection *)c->idle.oldest);
	pv_compare_drop_stream(c, &c->apart, PV_PRIMARY);
	free_out(c);
	pv_flow_table_close(&c->table);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

uint32_t pv_compare_take(struct pv_compare *c, uint8_t *unit)
{
	uint32_t size = 0;
	pthread_mutex_lock(&c->lock);
	struct pv_held *held = c->out;
	if (held) {
		c->out = held->next;
		if (!c->out)
			c->out_end = &c->out;
		c->out_count--;
		size = held->size;
		memcpy(unit, held->unit, size);
		pv_compare_free_held(c, PV_PRIMARY, held);
	}
	pthread_mutex_unlock(&c->lock);
	return size;
}

/* -- epochs ------------------------------------------------------------------------------------- */

/* The primary's of epochs before `epoch` go out, the secondary's are dropped. */
static void end_flow(struct pv_compare *c, struct pv_connection *at, uint64_t epoch)
{
	struct pv_compare_stream *primary = &at->side[PV_PRIMARY], *secondary = &at->side[PV_SECONDARY];
	while (primary->first && primary->first->epoch < epoch) {
		c->counters.committed++;
		pv_compare_send_out(c, pv_stream_take_off(primary, &primary->first));
	}
	while (secondary->first && secondary->first->epoch < epoch) {
		c->counters.dropped++;
		pv_compare_drop(c, at, &secondary->first);
	}
}

int pv_compare_begin_epoch(struct pv_compare *c, uint64_t epoch)
{
	pthread_mutex_lock(&c->lock);
	int result = epoch > c->epoch && c->compared == c->epoch && c->mode != PV_COMPARE_PASS ? 0 : -1;
	if (!result) {
		c->epoch = epoch;
		c->due.reason = PV_DUE_NOTHING; /* this is the checkpoint that was wanted */
	}
	pthread_mutex_unlock(&c->lock);
	return result;
}

/* What was wanted for a frame of the new epoch while that had not begun. */
static void want_again(struct pv_compare *c, struct pv_connection *at)
{
	if (at->side[PV_PRIMARY].count > c->limits.max_queue_size)
		pv_compare_notify(c, &at->flow.key, PV_DUE_PRIMARY_FULL);
}

static void commit(struct pv_compare *c, uint64_t epoch, uint64_t now)
{
	struct pv_flow *next;

	c->compared = epoch;
	c->since = now;
	end_flow(c, &c->apart, epoch);
	/* A flow that comes to rest goes into the other list; none comes into this one. */
	for (struct pv_flow *flow = c->busy.oldest; flow; flow = next) {
		struct pv_connection *at = (struct pv_connection *)flow;
		next = flow->newer;
		pv_compare_rebase(c, at); /* before they are gone: it looks at the primary's */
		end_flow(c, at, epoch);
		pv_compare_progress(c, at);
		want_again(c, at);
		pv_compare_settle(c, at, now);
	}
	const struct pv_held *apart = c->apart.side[PV_PRIMARY].first;
	if (c->mode != PV_COMPARE_HYBRID)
		return;
	if (apart)
		pv_compare_notify(c, NULL, c->limits.policy[apart->packet.class] == PV_POLICY_CHECKPOINT ?
					   PV_DUE_POLICY : PV_DUE_CONNECTIONS);
	else if (c->apart.epoch == epoch)
		pv_compare_notify(c, NULL, c->lost);
}

int pv_compare_commit(struct pv_compare *c, uint64_t epoch, uint64_t now)
{
	pthread_mutex_lock(&c->lock);
	int result = epoch == c->epoch && c->mode != PV_COMPARE_PASS ? 0 : -1;
	if (!result && epoch != c->compared)
		commit(c, epoch, now);
	pthread_mutex_unlock(&c->lock);
	return result;
}

/*
 * From now on so. To PV_COMPARE_PASS: all of the primary's goes out, and what was known is forgotten. From it: `epoch`
 * is what comes now, and both sides have the same past.
 */
int pv_compare_set_mode(struct pv_compare *c, int mode, uint64_t epoch, uint64_t now)
{
	int result = -1;
	pthread_mutex_lock(&c->lock);
	if (mode == PV_COMPARE_PASS) {
		end_flow(c, &c->apart, UINT64_MAX);
		while (c->busy.oldest) {
			end_flow(c, (struct pv_connection *)c->busy.oldest, UINT64_MAX);
			pv_compare_forget(c, (struct pv_connection *)c->busy.oldest);
		}
		while (c->idle.oldest)
			pv_compare_forget(c, (struct pv_connection *)c->idle.oldest);
		result = 0;
	} else if (c->mode == PV_COMPARE_PASS && (mode == PV_COMPARE_HOLD || mode == PV_COMPARE_HYBRID)) {
		c->epoch = c->compared = epoch;
		c->since = now;
		result = 0;
	}
	if (!result) {
		c->mode = mode;
		c->due.reason = PV_DUE_NOTHING;
	}
	pthread_mutex_unlock(&c->lock);
	return result;
}

/* -- time --------------------------------------------------------------------------------------- */

static bool expired(const struct pv_compare *c, const struct pv_held *held, uint64_t now)
{
	if (!held || held->epoch != c->compared)
		return false;
	uint64_t from = held->arrived > c->since ? held->arrived : c->since;
	return now > from && now - from >= c->limits.compare_timeout;
}

static void look_at_age(struct pv_compare *c, struct pv_connection *at, uint64_t now)
{
	const struct pv_held *primary = at->side[PV_PRIMARY].first, *secondary = at->side[PV_SECONDARY].first;
	if (at->diverged)
		return;
	if (expired(c, primary, now)) {
		bool ack = at->flow.key.class == PV_PACKET_TCP && pv_tcp_waits_for_ack(at, primary);
		pv_compare_want(c, at, ack ? PV_DUE_ACK : PV_DUE_PRIMARY_ALONE,
				ack ? primary->packet.ack : primary->seq, primary, 0, secondary, 0);
	} else if (expired(c, secondary, now)) {
		pv_compare_want(c, at, PV_DUE_SECONDARY_ALONE, secondary->seq, primary, 0, secondary, 0);
	}
}

/* To be called every expired_scan_cycle. */
void pv_compare_scan(struct pv_compare *c, uint64_t now)
{
	pthread_mutex_lock(&c->lock);
	if (c->mode == PV_COMPARE_HYBRID && c->compared == c->epoch)
		for (struct pv_flow *flow = c->busy.oldest; flow; flow = flow->newer)
			look_at_age(c, (struct pv_connection *)flow, now);
	while (c->idle.oldest && now > c->idle.oldest->used && now - c->idle.oldest->used > c->limits.idle_timeout) {
		pv_compare_forget(c, (struct pv_connection *)c->idle.oldest);
		c->counters.connections_forgotten++;
	}
	pthread_mutex_unlock(&c->lock);
}

/* -- questions ---------------------------------------------------------------------------------- */

int pv_compare_due(struct pv_compare *c, struct pv_due *due, int last)
{
	pthread_mutex_lock(&c->lock);
	*due = last ? c->last_due : c->due;
	pthread_mutex_unlock(&c->lock);
	return due->reason != PV_DUE_NOTHING;
}

static uint32_t describe(const struct pv_flow_list *list, struct pv_connection_info *info, uint32_t limit)
{
	uint32_t count = 0;
	for (const struct pv_flow *flow = list->newest; flow && count < limit; flow = flow->older, count++) {
		const struct pv_connection *at = (const struct pv_connection *)flow;
		info[count] = (struct pv_connection_info){
			.key = flow->key,
			.frames = {at->frames[PV_PRIMARY], at->frames[PV_SECONDARY]},
			.released = at->released,
			.differences = at->differences,
			.waiting = {at->side[PV_PRIMARY].count, at->side[PV_SECONDARY].count},
			.diverged = at->diverged,
		};
	}
	return count;
}

/* At most `limit`, those with frames that wait first: how many. */
uint32_t pv_compare_connections(struct pv_compare *c, struct pv_connection_info *info, uint32_t limit)
{
	pthread_mutex_lock(&c->lock);
	uint32_t count = describe(&c->busy, info, limit);
	count += describe(&c->idle, info + count, limit - count);
	pthread_mutex_unlock(&c->lock);
	return count;
}

void pv_compare_read_counters(struct pv_compare *c, struct pv_compare_counters *counters)
{
	pthread_mutex_lock(&c->lock);
	*counters = c->counters;
	pthread_mutex_unlock(&c->lock);
}
