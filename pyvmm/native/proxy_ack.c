/*
 * Acknowledgments of what both guests have, while the primary's own say more.
 *
 * The two need not acknowledge the same numbers on their way. Where the secondary has lost a segment, or its window was
 * full, the primary is far ahead; with its acknowledgments held and nothing in between, the client would hear neither of
 * progress nor of what is missing, and find out one timeout, and one segment, at a time.
 */

#include "proxy_compare.h"

#include <string.h>

#define HEADERS 256u /* Ethernet with tags, IP with extensions, TCP */

static uint32_t add_words(uint32_t sum, const uint8_t *at, uint32_t size)
{
	for (uint32_t i = 0; i + 1 < size; i += 2)
		sum += pv_be16(at + i);
	return size & 1 ? sum + ((uint32_t)at[size - 1] << 8) : sum;
}

static void put_be16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

/* RFC 1071 */
static void put_checksum(uint8_t *at, uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	put_be16(at, ~sum);
}

static void clear_blocks(uint8_t *options, uint32_t size)
{
	uint32_t at = 0, start, length;
	for (int kind; (kind = pv_tcp_next_option(options, size, &at, &start, &length)) >= 0;)
		if (kind == PV_TCP_OPTION_SACK)
			memset(options + start, 1, length); /* the secondary may not have these: no operation */
}

static uint8_t *timestamps(uint8_t *options, uint32_t size)
{
	uint32_t at = 0, start, length;
	for (int kind; (kind = pv_tcp_next_option(options, size, &at, &start, &length)) >= 0;)
		if (kind == PV_TCP_OPTION_TIMESTAMPS && length == 10)
			return options + start + 2;
	return NULL;
}

/* The headers of `held` around these numbers, and nothing behind them. A segment that is too odd for it has none: 0. */
static uint32_t make(const struct pv_held *held, uint8_t family, uint32_t seq, uint32_t ack, bool blocks,
		     const uint8_t *clock, uint8_t *unit)
{
	const struct pv_packet *p = &held->packet;
	if (p->body > HEADERS)
		return 0;
	uint8_t *frame = unit + PV_NET_HEADER, *ip = frame + p->network, *tcp = frame + p->transport;
	uint32_t size = p->body - p->transport;

	memset(unit, 0, PV_NET_HEADER); /* all checksums are complete */
	memcpy(frame, held->unit + PV_NET_HEADER, p->body);
	pv_put_be32(tcp + 4, seq);
	pv_put_be32(tcp + 8, ack);
	tcp[12] &= 0xf0;
	tcp[13] = PV_TCP_ACK;
	memset(tcp + 16, 0, 4); /* checksum, urgent pointer */
	uint8_t *time = timestamps(tcp + PV_TCP_HEADER, p->options_size);
	if (clock && time)
		memcpy(time, clock, 4);
	if (!blocks)
		clear_blocks(tcp + PV_TCP_HEADER, p->options_size);
	if (family == 4) {
		put_be16(ip + 2, p->body - p->network);
		put_be16(ip + 10, 0);
		put_checksum(ip + 10, add_words(0, ip, p->transport - p->network));
	} else {
		put_be16(ip + 4, p->body - p->network - 40);
	}
	uint32_t sum = 6 + size;
	sum = family == 4 ? add_words(sum, ip + 12, 8) : add_words(sum, ip + 8, 32);
	put_checksum(tcp + 16, add_words(sum, tcp, size));
	return PV_NET_HEADER + p->body;
}

/*
 * `primary` has to wait until the secondary acknowledges as much. If `secondary` is not NULL, it is what that has just
 * sent, and goes out itself, with its blocks and its window, so that the client sends again what the secondary lacks.
 * Its TSval is the primary's: to the client there is one clock (RFC 7323, 5). Else the primary's says what is common.
 */
void pv_compare_acknowledge(struct pv_compare *c, struct pv_connection *at, struct pv_held *primary,
			    const struct pv_held *secondary)
{
	uint8_t unit[PV_NET_HEADER + HEADERS];
	uint32_t ack = secondary ? secondary->packet.ack : at->side[PV_SECONDARY].ack, size;
	int32_t news = pv_after(ack, at->acked);

	if (!at->has_acked || news < 0 || (!news && !secondary))
		return;
	uint32_t seq = secondary ? secondary->seq : primary->packet.seq;
	if (at->has_frontier && pv_after(seq, at->frontier) > 0)
		seq = at->frontier; /* what the client can have got of the stream */
	if (secondary) {
		const uint8_t *clock = timestamps(primary->unit + PV_NET_HEADER + primary->packet.transport + PV_TCP_HEADER,
						  primary->packet.options_size);
		size = make(secondary, at->flow.key.family, seq, ack, true, clock, unit);
	} else {
		size = make(primary, at->flow.key.family, seq, ack, false, NULL, unit);
	}
	if (!size || !pv_compare_send_copy(c, unit, size))
		return;
	at->acked = ack;
	c->counters.acknowledged++;
}
