/*
 * TCP by position in the stream. Both sides' segments cover pieces of one sequence space, the primary's. `frontier` is
 * where it is known to be equal up to: it moves over what segments of both sides cover, whatever their boundaries, and
 * stops at a difference. A segment of the primary goes out once
 *
 * - all it carries is before the frontier (so what is sent again goes out at once), and
 * - the secondary has acknowledged as much as it does: the client's bytes must not be lost with the primary, and
 * - its urgent pointer, if it has one, was announced by the secondary.
 *
 * A SYN begins a stream: only its options and flags are compared, and the two initial sequence numbers found to be the
 * same position. A RST has no position of its own and must have its like.
 */

#include "proxy_compare.h"

#include <string.h>

static bool is(const struct pv_held *held, uint16_t flag)
{
	return held->packet.flags & flag;
}

/* A SYN that begins a connection, rather than one sent again. The rewriter may have given it the primary's number. */
static bool begins(const struct pv_connection *at, enum pv_compare_side side, const struct pv_held *held)
{
	const struct pv_compare_stream *s = &at->side[side], *primary = &at->side[PV_PRIMARY];
	if (!is(held, PV_TCP_SYN) || is(held, PV_TCP_RST))
		return false;
	return !(s->has_isn && held->packet.seq == s->isn) &&
	       !(side == PV_SECONDARY && s->has_isn && primary->has_isn && held->packet.seq == primary->isn);
}

static void place(struct pv_connection *at, enum pv_compare_side side, struct pv_held *held)
{
	bool syn = is(held, PV_TCP_SYN);
	held->seq = syn && side == PV_SECONDARY ? at->side[PV_PRIMARY].isn : held->packet.seq;
	held->end = held->seq + syn + held->packet.body_size + !!is(held, PV_TCP_FIN);
}

/* What a segment tells of its side. */
static void note(struct pv_compare_stream *s, const struct pv_held *held)
{
	if (is(held, PV_TCP_RST))
		return;
	if (is(held, PV_TCP_ACK) && (!s->has_ack || pv_after(held->packet.ack, s->ack) > 0)) {
		s->ack = held->packet.ack;
		s->has_ack = true;
	}
	if (!s->has_end || pv_after(held->end, s->last) > 0) {
		s->last = held->end;
		s->has_end = true;
	}
	if (!s->has_first) {
		s->first_seq = held->seq;
		s->has_first = true;
	}
	if (is(held, PV_TCP_URG)) {
		uint32_t urgent = held->packet.seq + held->packet.urgent;
		if (!s->urgents || s->urgent[(s->urgents - 1) % 4] != urgent) {
			s->urgent[s->urgents % 4] = urgent;
			s->urgents = s->urgents < 252 ? s->urgents + 1 : 249; /* 249 % 4 == 253 % 4 */
		}
	}
}

static bool announced(const struct pv_compare_stream *s, const struct pv_held *held)
{
	uint32_t urgent = held->packet.seq + held->packet.urgent;
	for (unsigned i = 0; i < s->urgents && i < 4; i++)
		if (s->urgent[i] == urgent)
			return true;
	return false;
}

/* Look at what has come, up to the beginning of another connection. */
static void look(struct pv_connection *at, enum pv_compare_side side, uint64_t epoch)
{
	struct pv_compare_stream *s = &at->side[side];
	while (s->fresh && s->fresh->epoch == epoch && !s->blocked) {
		if (begins(at, side, s->fresh)) {
			s->blocked = true;
		} else {
			place(at, side, s->fresh);
			note(s, s->fresh);
			s->fresh = s->fresh->next;
		}
	}
}

/* -- SYN ---------------------------------------------------------------------------------------- */

/* The options of a SYN without what need not be equal: padding, and the time. */
static uint32_t normalize(const struct pv_held *held, uint8_t *to)
{
	const uint8_t *options = held->unit + PV_NET_HEADER + held->packet.transport + PV_TCP_HEADER;
	uint32_t at = 0, start, length, size = 0;
	for (int kind; (kind = pv_tcp_next_option(options, held->packet.options_size, &at, &start, &length)) >= 0;) {
		memcpy(to + size, options + start, length);
		if (kind == PV_TCP_OPTION_TIMESTAMPS)
			memset(to + size + 2, 0, length - 2);
		size += length;
	}
	return size;
}

static bool same_syn(const struct pv_connection *at, const struct pv_held *held)
{
	uint8_t options[PV_TCP_OPTIONS];
	uint32_t size = normalize(held, options);
	return held->packet.flags == at->syn_flags && size == at->syn_size && !memcmp(options, at->syn_options, size);
}

static void clear(struct pv_compare_stream *s)
{
	s->has_isn = s->has_ack = s->has_end = s->has_first = s->blocked = false;
	s->urgents = 0;
}

/* Both sides are at the SYN of a connection, and nothing is left of the one before. */
static void begin(struct pv_compare *c, struct pv_connection *at)
{
	struct pv_held *syn[2] = {at->side[PV_PRIMARY].fresh, at->side[PV_SECONDARY].fresh};
	for (int side = PV_PRIMARY; side <= PV_SECONDARY; side++) {
		struct pv_compare_stream *s = &at->side[side];
		clear(s);
		s->isn = syn[side]->packet.seq;
		s->has_isn = true;
		place(at, side, syn[side]);
		note(s, syn[side]);
		s->fresh = s->fresh->next;
	}
	at->frontier = at->side[PV_PRIMARY].isn + 1;
	at->has_frontier = true;
	at->has_acked = false;
	at->syn_flags = syn[PV_PRIMARY]->packet.flags;
	at->syn_size = normalize(syn[PV_PRIMARY], at->syn_options);
	if (!same_syn(at, syn[PV_SECONDARY]))
		pv_compare_want(c, at, PV_DUE_SYN, syn[PV_PRIMARY]->seq, syn[PV_PRIMARY], 0, syn[PV_SECONDARY], 0);
}

/* -- the stream --------------------------------------------------------------------------------- */

/* The first that was looked at and has something at the frontier. */
static const struct pv_held *covering(const struct pv_connection *at, enum pv_compare_side side)
{
	for (const struct pv_held *held = at->side[side].first; held && held != at->side[side].fresh; held = held->next) {
		uint32_t data = held->seq + !!is(held, PV_TCP_SYN);
		if (!is(held, PV_TCP_RST) && pv_after(at->frontier, data) >= 0 && pv_after(held->end, at->frontier) > 0)
			return held;
	}
	return NULL;
}

/* The byte of the body that is at the frontier, and how many are from there; 0: its FIN is. */
static uint32_t from_frontier(const struct pv_connection *at, const struct pv_held *held, uint32_t *offset)
{
	*offset = at->frontier - held->seq - !!is(held, PV_TCP_SYN);
	return held->packet.body_size - *offset;
}

/* Move the frontier as far as it goes. */
static void compare_streams(struct pv_compare *c, struct pv_connection *at)
{
	const struct pv_held *held[2];
	while ((held[0] = covering(at, PV_PRIMARY)) && (held[1] = covering(at, PV_SECONDARY))) {
		uint32_t offset[2], size[2];
		for (int i = 0; i < 2; i++)
			size[i] = from_frontier(at, held[i], &offset[i]);
		uint32_t count = size[0] < size[1] ? size[0] : size[1];
		const uint8_t *a = pv_body(held[0]) + offset[0], *b = pv_body(held[1]) + offset[1];
		if (!size[0] != !size[1] || memcmp(a, b, count)) {
			uint32_t same = 0;
			while (same < count && a[same] == b[same])
				same++;
			pv_compare_want(c, at, same < count ? PV_DUE_PAYLOAD : PV_DUE_FIN, at->frontier + same,
					held[0], offset[0] + same, held[1], offset[1] + same);
			return;
		}
		c->counters.equal_bytes += count;
		at->frontier += count ? count : 1;
	}
}

static void find_frontier(struct pv_connection *at)
{
	const struct pv_compare_stream *a = &at->side[PV_PRIMARY], *b = &at->side[PV_SECONDARY];
	if (at->has_frontier || !a->has_first || !b->has_first)
		return;
	/* Neither has sent anything new before its first segment, so what is before either was sent before the epoch. */
	at->frontier = pv_after(a->first_seq, b->first_seq) > 0 ? a->first_seq : b->first_seq;
	at->has_frontier = true;
}

/* Whether its bytes and its end are both sides'. */
static bool is_equal(const struct pv_connection *at, const struct pv_held *held)
{
	return at->has_frontier && pv_after(held->end, at->frontier) <= 0;
}

static bool is_acknowledged(const struct pv_connection *at, const struct pv_held *held)
{
	const struct pv_compare_stream *s = &at->side[PV_SECONDARY];
	return !is(held, PV_TCP_ACK) || (s->has_ack && pv_after(held->packet.ack, s->ack) <= 0);
}

/* The other side has the same. A segment that carries nothing is only about what it acknowledges. */
static bool is_matched(const struct pv_connection *at, enum pv_compare_side side, const struct pv_held *held)
{
	if (held->end != held->seq && !is_equal(at, held))
		return false;
	return !is(held, PV_TCP_URG) || announced(&at->side[!side], held);
}

bool pv_tcp_waits_for_ack(const struct pv_connection *at, const struct pv_held *held)
{
	return !is(held, PV_TCP_RST) && is_matched(at, PV_PRIMARY, held) && !is_acknowledged(at, held);
}

static bool same_reset(const struct pv_held *a, const struct pv_held *b)
{
	return a->packet.seq == b->packet.seq && a->packet.flags == b->packet.flags &&
	       (!is(a, PV_TCP_ACK) || a->packet.ack == b->packet.ack) && a->packet.body_size == b->packet.body_size &&
	       !memcmp(pv_body(a), pv_body(b), a->packet.body_size);
}

static struct pv_held **first_reset(struct pv_connection *at, enum pv_compare_side side)
{
	struct pv_compare_stream *s = &at->side[side];
	for (struct pv_held **held = &s->first; *held && *held != s->fresh; held = &(*held)->next)
		if (is(*held, PV_TCP_RST))
			return held;
	return NULL;
}

static void compare_resets(struct pv_compare *c, struct pv_connection *at)
{
	struct pv_held **a, **b;
	while ((a = first_reset(at, PV_PRIMARY)) && (b = first_reset(at, PV_SECONDARY))) {
		if (!same_reset(*a, *b)) {
			pv_compare_want(c, at, PV_DUE_RST, (*a)->packet.seq, *a, 0, *b, 0);
			return;
		}
		pv_compare_release(c, at, a);
		pv_compare_drop(c, at, b);
	}
}

/* A client is told what a segment acknowledges. */
static void tell(struct pv_connection *at, const struct pv_held *held)
{
	if (is(held, PV_TCP_ACK) && (!at->has_acked || pv_after(held->packet.ack, at->acked) > 0)) {
		at->acked = held->packet.ack;
		at->has_acked = true;
	}
}

/* Send on and drop what is done. */
static void finish(struct pv_compare *c, struct pv_connection *at)
{
	struct pv_compare_stream *primary = &at->side[PV_PRIMARY], *secondary = &at->side[PV_SECONDARY];
	struct pv_held **held;
	struct pv_held *waits = NULL;
	for (held = &primary->first; *held && *held != primary->fresh;) {
		if (is(*held, PV_TCP_RST) || !is_matched(at, PV_PRIMARY, *held) || !is_acknowledged(at, *held)) {
			if (!waits && pv_tcp_waits_for_ack(at, *held))
				waits = *held;
			held = &(*held)->next;
		} else if (is(*held, PV_TCP_SYN) && !same_syn(at, *held)) {
			pv_compare_want(c, at, PV_DUE_SYN, (*held)->seq, *held, 0, NULL, 0);
			return;
		} else {
			tell(at, *held);
			pv_compare_release(c, at, held);
		}
	}
	for (held = &secondary->first; *held && *held != secondary->fresh;) {
		if (is(*held, PV_TCP_RST) || !is_matched(at, PV_SECONDARY, *held)) {
			held = &(*held)->next;
		} else {
			if (waits && (*held)->end == (*held)->seq && is(*held, PV_TCP_ACK))
				pv_compare_acknowledge(c, at, waits, *held);
			pv_compare_drop(c, at, held);
		}
	}
	if (waits)
		pv_compare_acknowledge(c, at, waits, NULL);
}

/* Whether both sides go on to another connection; what is left of this one has no answer any more. */
static bool goes_on(struct pv_compare *c, struct pv_connection *at)
{
	struct pv_compare_stream *primary = &at->side[PV_PRIMARY], *secondary = &at->side[PV_SECONDARY];
	bool left[2] = {primary->first != primary->fresh, secondary->first != secondary->fresh};
	if (primary->blocked && secondary->blocked && !left[0] && !left[1])
		return true;
	if ((primary->blocked && !left[0] && left[1]) || (secondary->blocked && !left[1] && left[0]) ||
	    (primary->blocked && secondary->blocked))
		pv_compare_want(c, at, PV_DUE_START, primary->first ? primary->first->packet.seq : 0, primary->first, 0,
				secondary->first, 0);
	return false;
}

void pv_tcp_progress(struct pv_compare *c, struct pv_connection *at)
{
	for (;;) {
		look(at, PV_PRIMARY, c->compared);
		look(at, PV_SECONDARY, c->compared);
		find_frontier(at);
		if (at->has_frontier)
			compare_streams(c, at);
		if (!at->diverged)
			compare_resets(c, at);
		if (!at->diverged)
			finish(c, at);
		if (at->diverged || !goes_on(c, at))
			return;
		begin(c, at);
		if (at->diverged)
			return;
	}
}

/*
 * The primary's state as its epoch ended is what both sides go on from: all it has sent was sent by both, what it has
 * acknowledged was acknowledged by both, and offsets between initial sequence numbers are no more.
 */
void pv_tcp_rebase(struct pv_connection *at, uint64_t epoch)
{
	struct pv_compare_stream *primary = &at->side[PV_PRIMARY], *secondary = &at->side[PV_SECONDARY];
	for (; primary->fresh && primary->fresh->epoch < epoch; primary->fresh = primary->fresh->next) {
		struct pv_held *held = primary->fresh;
		if (at->flow.key.class != PV_PACKET_TCP)
			continue;
		if (begins(at, PV_PRIMARY, held)) {
			clear(primary);
			primary->isn = held->packet.seq;
			primary->has_isn = true;
			at->syn_flags = held->packet.flags;
			at->syn_size = normalize(held, at->syn_options);
		}
		place(at, PV_PRIMARY, held);
		note(primary, held);
	}
	while (secondary->fresh && secondary->fresh->epoch < epoch)
		secondary->fresh = secondary->fresh->next;
	primary->blocked = false;
	primary->urgents = 0;
	primary->has_first = secondary->has_first = false;
	secondary->blocked = false;
	secondary->urgents = 0;
	secondary->has_isn = primary->has_isn;
	secondary->isn = primary->isn;
	secondary->has_ack = primary->has_ack;
	secondary->ack = primary->ack;
	secondary->has_end = primary->has_end;
	secondary->last = primary->last;
	at->has_acked = primary->has_ack;
	at->acked = primary->ack;
	at->has_frontier = primary->has_end;
	at->frontier = primary->last;
}
