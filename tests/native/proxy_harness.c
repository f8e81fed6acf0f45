/*
 * Hostile frames against proxy_*.c, built with ASan and UBSan: usage: proxy_harness WHAT SEED FRAMES.
 *
 * compare: both sides send frames of few flows, sound, changed at random places, cut off; epochs begin and end, time
 *   passes, modes change. Each of the primary's must come out once, with its bytes; none may get lost.
 * rewriter: such frames both ways. Only what may change does, and a checksum that was right is right after it.
 */
#include "proxy_compare.h"
#include "proxy_rewriter.h"
#include "harness.h"

#include <stdlib.h>
#include <string.h>

#define LARGEST 2000

static uint8_t made[LARGEST];
static uint32_t made_size;

static void put8(uint32_t value) { made[made_size++] = (uint8_t)value; }
static void put16(uint32_t value) { put8(value >> 8), put8(value); }
static void put32(uint32_t value) { put16(value >> 16), put16(value); }

static uint32_t sum_of(uint32_t sum, const uint8_t *at, uint32_t size)
{
	for (uint32_t i = 0; i < size; i++)
		sum += i & 1 ? at[i] : (uint32_t)at[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* The sum over a TCP segment and its pseudo header: 0xffff if the checksum is right. */
static uint32_t tcp_sum(const uint8_t *frame, const struct pv_packet *p, bool six)
{
	uint32_t size = p->body + p->body_size - p->transport;
	const uint8_t *ends = frame + p->network + (six ? 8 : 12);
	uint32_t sum = sum_of(6 + (size >> 16) + (size & 0xffff), ends, six ? 32 : 8);
	return sum_of(sum, frame + p->transport, size);
}

static uint32_t near(void) /* numbers that meet, and wrap */
{
	return one_in(20) ? (uint32_t)rnd() : 0xfffffff0u + (uint32_t)below(64);
}

static void put_tcp(bool inward)
{
	static const uint16_t flags[] = {0x10, 0x18, 0x02, 0x12, 0x11, 0x14, 0x04, 0x30, 0x00};
	uint32_t port = (uint32_t)below(3), size_at, start = made_size;
	put16(inward ? 1000 + port : 80);
	put16(inward ? 80 : 1000 + port);
	put32(near());
	put32(near());
	size_at = made_size;
	uint16_t flag = flags[below(9)];
	put16(flag);
	put16((uint32_t)rnd());
	put16(0);
	put16((uint32_t)below(8));
	if (one_in(2)) {
		for (uint64_t i = below(3); i; i--)
			put8(1);
		put8(8), put8(one_in(8) ? (uint32_t)below(12) : 10), put32(near()), put32(near());
	}
	if (one_in(3)) {
		uint32_t blocks = 1 + (uint32_t)below(2);
		put8(5), put8(2 + 8 * blocks);
		for (uint32_t i = 0; i < 2 * blocks; i++)
			put32(near());
	}
	if (one_in(8))
		put8((uint32_t)rnd()), put8((uint32_t)rnd());
	if (one_in(12))
		put8(8), put8(2);
	while ((made_size - start) % 4)
		put8(one_in(2));
	made[size_at] |= (uint8_t)((one_in(20) ? below(16) : (made_size - start) / 4) << 4);
	for (uint64_t i = flag & 2 && !one_in(8) ? 0 : below(20); i; i--)
		put8('a' + (uint32_t)below(2));
}

static void put_udp(bool inward)
{
	uint32_t size = (uint32_t)below(6);
	put16(inward ? 1000 : 53), put16(inward ? 53 : 1000), put16(8 + size), put16(0);
	while (size--)
		put8('a' + (uint32_t)below(2));
}

static void put_ip(bool inward, bool six, unsigned depth);

static void put_icmp(bool inward, bool six, unsigned depth)
{
	static const uint8_t types[2][3] = {{3, 11, 0}, {2, 1, 135}};
	put8(types[six][below(3)]), put8((uint32_t)below(2)), put16(0), put32((uint32_t)below(2));
	uint32_t start = made_size;
	if (depth < 2)
		put_ip(!inward, six, depth + 1);
	if (one_in(3)) /* a quotation need not be whole */
		made_size -= (uint32_t)below(made_size - start + 1);
}

static void put_ip(bool inward, bool six, unsigned depth)
{
	uint32_t start = made_size, protocol = one_in(8) ? (uint32_t)rnd() & 0xff : one_in(4) ? six ? 58 : 1 : one_in(4) ? 17 : 6;
	bool options = one_in(5), fragment = one_in(8);
	if (six) {
		put32(0x60000000), put16(0), put8(options ? 60 : fragment ? 44 : protocol), put8(63 + !one_in(9));
		for (int end = 0; end < 2; end++)
			put32(0xfd000000), put32(0), put32(0), put32(end == inward);
		if (options)
			put8(fragment ? 44 : protocol), put8(0), put8(1), put8(4), put32((uint32_t)below(2));
		if (fragment)
			put8(protocol), put8(0), put16((uint32_t)below(3) * 8 + (uint32_t)below(2)), put32((uint32_t)below(3));
	} else {
		put8(options ? 0x46 : 0x45), put8(0), put16(0), put16((uint32_t)below(3));
		put16(fragment ? (uint32_t)below(2) * 0x2000 + (uint32_t)below(3) : 0), put8(63 + !one_in(9));
		put8(protocol), put16(0);
		for (int end = 0; end < 2; end++)
			put32(0x0a000001 + (end != inward));
		if (options)
			put32(0x94040000);
	}
	if (protocol == 6)
		put_tcp(inward);
	else if (protocol == 17)
		put_udp(inward);
	else
		put_icmp(inward, six, depth);
	uint32_t size = made_size - start, at = start + (six ? 4 : 2);
	made[at] = (uint8_t)((six ? size - 40 : size) >> 8);
	made[at + 1] = (uint8_t)(six ? size - 40 : size);
	struct pv_packet p;
	struct pv_flow_key key;
	if (!depth && protocol == 6) {
		pv_parse(&p, &key, made, made_size, PV_PARSE_INTO_FRAGMENT);
		if (p.class == PV_PACKET_TCP) {
			uint32_t sum = ~tcp_sum(made, &p, six);
			made[p.transport + 16] = (uint8_t)(sum >> 8);
			made[p.transport + 17] = (uint8_t)sum;
		}
	}
}

/* A frame in memory of its own size, so that a byte too much is found. */
static uint8_t *make_frame(bool inward, uint32_t *size)
{
	memset(made, 0x52, made_size = 12);
	for (uint64_t tags = one_in(6) ? 1 + below(3) : 0; tags; tags--)
		put16(one_in(2) ? 0x8100 : 0x88a8), put16((uint32_t)below(2));
	switch (below(10)) {
	case 0:
		put16(0x0806), put16(1), put16(0x0800), put8(6), put8(4), put16((uint32_t)below(3));
		for (int i = 0; i < 5; i++)
			put32((uint32_t)below(2));
		break;
	case 1:
		put16(one_in(2) ? 0x88b5 : (uint32_t)rnd()), put32((uint32_t)below(2));
		break;
	default: {
		bool six = one_in(2);
		put16(six ? 0x86dd : 0x0800);
		put_ip(inward, six, 0);
	}
	}
	if (one_in(4))
		for (uint64_t changes = 1 + below(3); changes; changes--)
			made[12 + below(made_size - 12)] = (uint8_t)rnd();
	*size = one_in(8) ? (uint32_t)below(made_size + 1) : made_size + (one_in(8) ? (uint32_t)below(9) : 0);
	uint8_t *frame = memory(*size);
	memcpy(frame, made, *size < made_size ? *size : made_size);
	return frame;
}

/* -- compare ------------------------------------------------------------------------------------ */

static uint8_t *seen;      /* by number of the primary's frame: 1 it is inside, 2 it came out */
static uint32_t *sums;
static uint64_t came_out, acknowledged;

static uint32_t sum32(const uint8_t *at, uint32_t size)
{
	uint32_t sum = 2166136261u; /* FNV-1a */
	while (size--)
		sum = (sum ^ *at++) * 16777619u;
	return sum;
}

static void take_all(struct pv_compare *c)
{
	static uint8_t unit[PV_NET_UNIT];
	uint32_t size, number;
	while ((size = pv_compare_take(c, unit))) {
		memcpy(&number, unit + 4, 4);
		if (!number) { /* the comparison's own: an acknowledgment, whose checksum is right */
			struct pv_packet p;
			struct pv_flow_key key;
			pv_parse(&p, &key, unit + PV_NET_HEADER, size - PV_NET_HEADER, PV_PARSE_FROM_GUEST);
			CHECK(p.class == PV_PACKET_TCP && !p.body_size && p.flags == PV_TCP_ACK);
			CHECK(tcp_sum(unit + PV_NET_HEADER, &p, key.family == 6) == 0xffff);
			acknowledged++;
			continue;
		}
		CHECK(seen[number] == 1);
		CHECK(sums[number] == sum32(unit, size));
		seen[number] = 2;
		came_out++;
	}
}

static uint64_t due[PV_DUE_REASONS], equal_bytes;

static struct pv_compare *start(uint64_t epoch, uint64_t now)
{
	struct pv_compare_limits limits = {
		.compare_timeout = 20 + below(300), .idle_timeout = 500, .max_queue_size = 2 + (uint32_t)below(20),
		.max_connections = 4 + (uint32_t)below(30), .max_bytes = 500 + below(10000),
	};
	if (one_in(2))
		limits.policy[PV_PACKET_OTHER] = (uint8_t)below(3);
	if (one_in(2))
		limits.policy[PV_PACKET_ARP] = (uint8_t)below(3);
	struct pv_compare *c = pv_compare_new(&limits);
	CHECK(c && !pv_compare_set_mode(c, one_in(5) ? PV_COMPARE_HOLD : PV_COMPARE_HYBRID, epoch, now));
	return c;
}

/* With frames in it. */
static void end(struct pv_compare *c)
{
	struct pv_connection_info info[40];
	CHECK(pv_compare_connections(c, info, 40) == c->table.count);
	for (int reason = 1; reason < PV_DUE_REASONS; reason++)
		due[reason] += c->counters.due[reason];
	equal_bytes += c->counters.equal_bytes;
	pv_compare_free(c);
}

static int compare(uint32_t frames)
{
	uint64_t now = 0, epoch = 1, begun = 1, checkpoints = 0, refused = 0, bad = 0;
	struct pv_compare *c = start(epoch, now);
	uint8_t header[PV_NET_HEADER] = {0}, *last = NULL;
	uint32_t last_size = 0;

	seen = memory(frames + 1);
	sums = memory((frames + 1ull) * sizeof(*sums));
	for (uint32_t i = 1; i <= frames; i++) {
		uint32_t size;
		uint8_t *frame;
		if (last && one_in(2)) { /* what one side has sent, the other often does, too */
			frame = memory(size = last_size);
			memcpy(frame, last, size);
			struct pv_packet p;
			struct pv_flow_key key;
			pv_parse(&p, &key, frame, size, PV_PARSE_FROM_GUEST);
			if (p.class == PV_PACKET_TCP && one_in(6))
				frame[p.transport + 13] ^= PV_TCP_FIN;
			else if (key.family && one_in(12))
				frame[p.network + (key.family == 4 ? 8 : 7)] ^= 1; /* hop limit */
		} else {
			frame = make_frame(false, &size);
		}
		memcpy(header + 4, &i, 4);
		if (one_in(2)) {
			uint8_t *unit = memory(PV_NET_HEADER + size);
			memcpy(unit, header, PV_NET_HEADER);
			memcpy(unit + PV_NET_HEADER, frame, size);
			sums[i] = sum32(unit, PV_NET_HEADER + size);
			free(unit);
			int result = pv_compare_primary(c, header, frame, size, now);
			seen[i] = result == PV_COMPARE_TAKEN;
			refused += result == PV_COMPARE_REFUSED;
			bad += result == PV_COMPARE_BAD;
		} else {
			uint64_t of = one_in(9) ? begun - below(2) : one_in(50) ? begun + 1 : epoch;
			CHECK(pv_compare_secondary(c, header, frame, size, of, now) != PV_COMPARE_REFUSED);
		}
		free(last);
		last = frame;
		last_size = size;
		now += below(10);
		struct pv_due why;
		bool wanted = pv_compare_due(c, &why, 0);
		if (wanted)
			CHECK(why.reason < PV_DUE_REASONS && why.sizes[0] <= PV_COMPARE_SAMPLE && why.sizes[1] <= PV_COMPARE_SAMPLE);
		if (begun == epoch && (wanted ? one_in(20) : one_in(100)))
			CHECK(!pv_compare_begin_epoch(c, ++begun));
		else if (begun != epoch && one_in(6)) {
			CHECK(!pv_compare_commit(c, epoch = begun, now));
			checkpoints++;
		}
		if (one_in(10))
			pv_compare_scan(c, now);
		if (one_in(3))
			take_all(c);
		if (one_in(300)) {
			CHECK(!pv_compare_set_mode(c, PV_COMPARE_PASS, 0, now));
			take_all(c);
			for (uint32_t each = 0; each <= i; each++)
				CHECK(seen[each] != 1);
			CHECK(!c->held_bytes[0] && !c->held_bytes[1] && !c->table.count);
			if (one_in(2)) {
				end(c);
				c = start(++begun, now);
			} else {
				CHECK(!pv_compare_set_mode(c, PV_COMPARE_HYBRID, ++begun, now));
			}
			epoch = begun;
		}
		CHECK(c->held_bytes[0] <= c->limits.max_bytes && c->held_bytes[1] <= c->limits.max_bytes);
		CHECK(c->table.count <= c->limits.max_connections && c->table.count == c->busy.count + c->idle.count);
	}
	end(c);
	printf("{\"out\": %lu, \"checkpoints\": %lu, \"refused\": %lu, \"bad\": %lu, \"equal_bytes\": %lu, \"acknowledged\": %lu",
	       came_out, checkpoints, refused, bad, equal_bytes, acknowledged);
	for (int reason = 1; reason < PV_DUE_REASONS; reason++)
		printf(", \"reason_%d\": %lu", reason, due[reason]);
	printf("}\n");
	free(last);
	free(seen);
	free(sums);
	return 0;
}

/* -- rewriter ----------------------------------------------------------------------------------- */

static int rewriter(uint32_t frames)
{
	struct pv_rewriter_limits limits = {.max_connections = 12, .live_timeout = 400, .quiet_timeout = 300};
	struct pv_rewriter *r = pv_rewriter_new(&limits);
	struct pv_rewriter_record records[12];
	uint64_t now = 0, checked = 0, partial = 0;

	CHECK(r);
	for (uint32_t i = 0; i < frames; i++) {
		bool inward = one_in(2);
		uint32_t size;
		uint8_t *frame = make_frame(inward, &size), header[PV_NET_HEADER] = {0};
		struct pv_packet p;
		struct pv_flow_key key;
		pv_parse(&p, &key, frame, size, PV_PARSE_INTO_FRAGMENT);
		if (one_in(4)) {
			header[0] = 1;
			header[6] = (uint8_t)(one_in(2) ? p.transport : rnd());
			header[8] = one_in(2) ? 16 : (uint8_t)rnd();
		}
		bool left = header[0] && header[6] == p.transport && header[8] == 16;
		uint8_t *before = memory(size);
		memcpy(before, frame, size);
		int changed = inward ? pv_rewriter_to_guest(r, header, frame, size, now) :
				       pv_rewriter_from_guest(r, header, frame, size, now);
		CHECK(changed || !memcmp(before, frame, size));
		if (changed) {
			uint32_t from = p.transport + 4, to = p.class == PV_PACKET_TCP ? p.body : p.body + p.body_size;
			if (p.class == PV_PACKET_ICMP)
				from = p.transport + 2;
			for (uint32_t at = 0; at < size; at++)
				CHECK(before[at] == frame[at] || (at >= from && at < to));
			if (p.class == PV_PACKET_TCP) {
				bool six = key.family == 6;
				if (left) {
					CHECK(!memcmp(before + p.transport + 16, frame + p.transport + 16, 2));
					partial++;
				} else {
					/* A sum of 0 is 0xffff, too (RFC 1624, 3). */
					CHECK(tcp_sum(before, &p, six) % 0xffff == tcp_sum(frame, &p, six) % 0xffff);
					checked++;
				}
			}
		}
		free(before);
		free(frame);
		now += below(8);
		if (one_in(100))
			pv_rewriter_scan(r, now);
		if (one_in(300)) {
			uint32_t count = pv_rewriter_records(r, records, 12);
			CHECK(count <= 12);
			pv_rewriter_checkpoint(r, records, one_in(2) ? count : 0, now);
		}
		CHECK(r->table.count <= 12);
		CHECK(r->table.count == r->lists[0].count + r->lists[1].count + r->lists[2].count);
	}
	printf("{\"checked\": %lu, \"partial\": %lu, \"quoted\": %lu, \"learned\": %lu, \"opaque\": %lu, \"forgotten\": %lu, "
	       "\"raised\": %lu}\n", checked, partial, r->counters.quoted, r->counters.learned, r->counters.opaque,
	       r->counters.forgotten, r->counters.timestamps_raised);
	pv_rewriter_free(r);
	return 0;
}

int main(int argc, char **argv)
{
	CHECK(argc == 4);
	state = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15ull + 1;
	uint32_t frames = (uint32_t)strtoul(argv[3], NULL, 10);
	return strcmp(argv[1], "compare") ? rewriter(frames) : compare(frames);
}
