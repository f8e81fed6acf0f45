/* Ethernet, VLAN, ARP, IPv4, IPv6, TCP, UDP, ICMP. See proxy_packet.h. */

#include "proxy_packet.h"

#include <string.h>

#define ETHERNET 14u
#define TYPE_IPV4 0x0800
#define TYPE_ARP 0x0806
#define TYPE_VLAN 0x8100
#define TYPE_IPV6 0x86dd
#define TYPE_SERVICE_VLAN 0x88a8
#define TAGS 2

#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_ICMP6 58
/* RFC 8200 4; 4302 2.2; 6275 6.1; 7401 5.1; 5533 5.1 */
#define EXTENSION_HOP_BY_HOP 0
#define EXTENSION_ROUTING 43
#define EXTENSION_FRAGMENT 44
#define EXTENSION_AUTHENTICATION 51
#define EXTENSION_DESTINATION 60
#define EXTENSION_MOBILITY 135
#define EXTENSION_HIP 139
#define EXTENSION_SHIM6 140
/* More are nobody's; what is behind them is compared as it is. */
#define EXTENSIONS 10

struct cursor {
	const uint8_t *frame;
	uint32_t at, end; /* end <= size of the frame */
	int how;
};

static bool has_bytes(const struct cursor *c, uint32_t count)
{
	return c->end - c->at >= count;
}

static void set_class(struct pv_packet *p, struct pv_flow_key *key, enum pv_packet_class class)
{
	p->class = key->class = (uint8_t)class;
}

static void set_addresses(struct pv_flow_key *key, const struct cursor *c, const uint8_t *source, uint32_t size)
{
	bool out = c->how & PV_PARSE_FROM_GUEST;
	memcpy(out ? key->guest : key->peer, source, size);
	memcpy(out ? key->peer : key->guest, source + size, size);
}

static void set_ports(struct pv_flow_key *key, const struct cursor *c, const uint8_t *source)
{
	bool out = c->how & PV_PARSE_FROM_GUEST;
	key->guest_port = pv_be16(out ? source : source + 2);
	key->peer_port = pv_be16(out ? source + 2 : source);
}

static void set_body(struct pv_packet *p, const struct cursor *c, uint32_t from)
{
	p->body = from;
	p->body_size = c->end - from;
}

static bool parse_tcp(struct pv_packet *p, struct pv_flow_key *key, const struct cursor *c)
{
	const uint8_t *h = c->frame + c->at;
	if (!has_bytes(c, PV_TCP_HEADER))
		return false;
	uint32_t header = (h[12] >> 4) * 4u;
	if (header < PV_TCP_HEADER || !has_bytes(c, header))
		return false;
	set_class(p, key, PV_PACKET_TCP);
	set_ports(key, c, h);
	p->seq = pv_be32(h + 4);
	p->ack = pv_be32(h + 8);
	p->flags = pv_be16(h + 12) & 0x1ff;
	p->urgent = pv_be16(h + 18);
	p->options_size = (uint8_t)(header - PV_TCP_HEADER);
	set_body(p, c, c->at + header);
	return true;
}

static bool parse_udp(struct pv_packet *p, struct pv_flow_key *key, const struct cursor *c)
{
	const uint8_t *h = c->frame + c->at;
	if (!has_bytes(c, 8) || pv_be16(h + 4) < 8 || !has_bytes(c, pv_be16(h + 4)))
		return false;
	set_class(p, key, PV_PACKET_UDP);
	set_ports(key, c, h);
	/* To the end of the IP packet, not of the UDP length: what is between (RFC 9868) gets to the client, too. */
	set_body(p, c, c->at + 8);
	return true;
}

/* What IP carries. `c` is at the transport header and ends where the IP packet does. */
static void parse_transport(struct pv_packet *p, struct pv_flow_key *key, const struct cursor *c, uint8_t protocol)
{
	uint8_t icmp = key->family == 4 ? PROTOCOL_ICMP : PROTOCOL_ICMP6;
	p->transport = c->at;
	key->protocol = protocol;
	if (p->fragment && !((c->how & PV_PARSE_INTO_FRAGMENT) && !p->fragment_offset)) {
		set_class(p, key, PV_PACKET_FRAGMENT);
	} else if (protocol == PROTOCOL_TCP && parse_tcp(p, key, c)) {
		return;
	} else if (p->fragment) {
		set_class(p, key, PV_PACKET_FRAGMENT);
	} else if (protocol == PROTOCOL_UDP && parse_udp(p, key, c)) {
		return;
	} else {
		set_class(p, key, protocol == icmp && has_bytes(c, 4) ? PV_PACKET_ICMP : PV_PACKET_IP);
	}
	set_body(p, c, c->at);
}

static bool parse_ipv4(struct pv_packet *p, struct pv_flow_key *key, struct cursor *c)
{
	const uint8_t *h = c->frame + c->at;
	if (!has_bytes(c, 20) || h[0] >> 4 != 4)
		return false;
	uint32_t header = (h[0] & 15) * 4u, total = pv_be16(h + 2);
	if (header < 20 || total < header || !has_bytes(c, total))
		return false;
	uint16_t fragment = pv_be16(h + 6);
	c->end = c->at + total; /* what follows pads the frame */
	p->extensions = c->at + 20;
	c->at += header;
	key->family = 4;
	set_addresses(key, c, h + 12, 4);
	p->service = h[1] >> 2;
	p->hop_limit = h[8];
	p->more_fragments = fragment & 0x2000;
	p->fragment_offset = (uint16_t)((fragment & 0x1fff) * 8);
	p->fragment = fragment & 0x3fff;
	p->fragment_id = pv_be16(h + 4);
	parse_transport(p, key, c, h[9]);
	return true;
}

static bool parse_ipv6(struct pv_packet *p, struct pv_flow_key *key, struct cursor *c)
{
	const uint8_t *h = c->frame + c->at;
	if (!has_bytes(c, 40) || h[0] >> 4 != 6 || c->end - c->at - 40 < pv_be16(h + 4))
		return false;
	uint8_t next = h[6];
	c->end = c->at + 40 + pv_be16(h + 4);
	c->at += 40;
	p->extensions = c->at;
	key->family = 6;
	set_addresses(key, c, h + 8, 16);
	p->service = (uint8_t)(pv_be16(h) >> 6 & 0x3f);
	p->hop_limit = h[7];
	for (int i = 0; i < EXTENSIONS && has_bytes(c, 8); i++) {
		const uint8_t *e = c->frame + c->at;
		uint32_t length = (e[1] + 1u) * 8;
		switch (next) {
		case EXTENSION_FRAGMENT:
			p->fragment_offset = pv_be16(e + 2) & 0xfff8;
			p->more_fragments = e[3] & 1;
			p->fragment = p->fragment_offset || p->more_fragments; /* else it is an atomic one (RFC 6946) */
			p->fragment_id = pv_be32(e + 4);
			length = 8;
			break;
		case EXTENSION_AUTHENTICATION:
			length = (e[1] + 2u) * 4;
			break;
		case EXTENSION_HOP_BY_HOP:
		case EXTENSION_ROUTING:
		case EXTENSION_DESTINATION:
		case EXTENSION_MOBILITY:
		case EXTENSION_HIP:
		case EXTENSION_SHIM6:
			break;
		default:
			parse_transport(p, key, c, next);
			return true;
		}
		if (!has_bytes(c, length))
			break;
		next = e[0];
		c->at += length;
		if (p->fragment_offset) /* what follows is the middle of something */
			break;
	}
	parse_transport(p, key, c, next);
	return true;
}

static void parse_arp(struct pv_packet *p, struct cursor *c)
{
	const uint8_t *h = c->frame + c->at;
	uint32_t size = has_bytes(c, 8) ? 8u + 2u * (h[4] + h[5]) : 0;
	if (size && has_bytes(c, size))
		c->end = c->at + size; /* the rest is padding, which need not be equal */
	set_body(p, c, c->at);
}

void pv_parse(struct pv_packet *p, struct pv_flow_key *key, const uint8_t *frame, uint32_t size, int how)
{
	struct cursor c = {.frame = frame, .at = ETHERNET, .end = size, .how = how};

	memset(p, 0, sizeof(*p));
	memset(key, 0, sizeof(*key));
	set_class(p, key, PV_PACKET_OTHER);
	p->body_size = size;
	if (size < ETHERNET)
		return;
	uint16_t type = pv_be16(frame + 12);
	for (int i = 0; i < TAGS && (type == TYPE_VLAN || type == TYPE_SERVICE_VLAN) && has_bytes(&c, 4); i++) {
		key->vlan[i] = 0x8000 | (pv_be16(frame + c.at) & 0xfff);
		type = pv_be16(frame + c.at + 2);
		c.at += 4;
	}
	p->network = c.at;
	if (type == TYPE_IPV4 && parse_ipv4(p, key, &c))
		return;
	if (type == TYPE_IPV6 && parse_ipv6(p, key, &c))
		return;
	if (type == TYPE_ARP) {
		set_class(p, key, PV_PACKET_ARP);
		parse_arp(p, &c);
	}
}

int pv_tcp_next_option(const uint8_t *options, uint32_t size, uint32_t *at, uint32_t *start, uint32_t *length)
{
	while (*at < size && options[*at] == 1) /* no operation */
		(*at)++;
	if (*at >= size || !options[*at] || size - *at < 2 || options[*at + 1] < 2 || options[*at + 1] > size - *at)
		return -1;
	*start = *at;
	*length = options[*at + 1];
	*at += *length;
	return options[*start];
}
