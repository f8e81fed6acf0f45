/*
 * What the proxy understands of a frame, and the flow it belongs to. Nothing here trusts a length or an offset of the
 * frame's: what does not fit is no error but a frame of a class that is compared byte by byte.
 *
 * Sources: IEEE 802.1Q (tags), RFC 791 and 8200 (IP), 826 (ARP), 9293 (TCP), 768 (UDP), 792 and 4443 (ICMP).
 */
#ifndef PYVMM_PROXY_PACKET_H
#define PYVMM_PROXY_PACKET_H

#include <stdbool.h>
#include <stdint.h>

/* Each has a policy of its own. */
enum pv_packet_class {
	PV_PACKET_TCP,
	PV_PACKET_UDP,
	PV_PACKET_ICMP,     /* both versions, with neighbour discovery */
	PV_PACKET_ARP,
	PV_PACKET_FRAGMENT, /* of either IP version */
	PV_PACKET_IP,       /* another protocol above IP, or a header of the above that does not fit */
	PV_PACKET_OTHER,    /* another ethertype, or an IP header that does not fit */
	PV_PACKET_CLASSES,
};

#define PV_TCP_FIN 0x001
#define PV_TCP_SYN 0x002
#define PV_TCP_RST 0x004
#define PV_TCP_ACK 0x010
#define PV_TCP_URG 0x020

#define PV_TCP_HEADER 20u
#define PV_TCP_OPTIONS 40u
/* RFC 9293 3.1; 7323 3; 2018 3; 2385; 5925; 7413 */
#define PV_TCP_OPTION_SACK 5
#define PV_TCP_OPTION_TIMESTAMPS 8
#define PV_TCP_OPTION_MD5 19
#define PV_TCP_OPTION_AO 29
#define PV_TCP_OPTION_FAST_OPEN 34

/* Compared and hashed as 48 bytes: no padding, unused members are 0. */
struct pv_flow_key {
	uint8_t guest[16], peer[16];      /* IPv4: in the first four */
	uint16_t guest_port, peer_port;
	uint16_t vlan[2];                 /* 0x8000 | VID, outermost first; 0: no tag */
	uint8_t family;                   /* 4, 6, 0: no IP */
	uint8_t class;
	uint8_t protocol;
	uint8_t unused[5];
};
_Static_assert(sizeof(struct pv_flow_key) == 48, "hashed as six words");

/* Offsets count from the destination's address. */
struct pv_packet {
	uint8_t class;
	uint8_t hop_limit, service;       /* IP: TTL; DSCP without ECN */
	bool fragment;                    /* also where a first fragment was looked into */
	bool more_fragments;
	uint16_t fragment_offset;         /* bytes */
	uint32_t fragment_id;
	uint32_t network, transport;
	uint32_t extensions;              /* IP options or extension headers: from here to `transport` */
	uint32_t body, body_size;         /* what a comparison is about: a payload, a message, or the whole frame */
	uint32_t seq, ack;                /* TCP, from here on */
	uint16_t flags, urgent;
	uint8_t options_size;             /* at transport + PV_TCP_HEADER */
};

/* What pv_parse() does beyond the usual. */
#define PV_PARSE_FROM_GUEST 1         /* else to it: source and destination change places in the key */
#define PV_PARSE_INTO_FRAGMENT 2      /* a first fragment with a whole TCP header is a TCP packet */

void pv_parse(struct pv_packet *p, struct pv_flow_key *key, const uint8_t *frame, uint32_t size, int how);

/*
 * The next option of a TCP header: its kind, and where and how long it is, without padding; -1 at the end or where the
 * rest makes no sense. Start with *at = 0.
 */
int pv_tcp_next_option(const uint8_t *options, uint32_t size, uint32_t *at, uint32_t *start, uint32_t *length);

static inline uint16_t pv_be16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t pv_be32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline void pv_put_be32(uint8_t *p, uint32_t value)
{
	p[0] = (uint8_t)(value >> 24);
	p[1] = (uint8_t)(value >> 16);
	p[2] = (uint8_t)(value >> 8);
	p[3] = (uint8_t)value;
}

/* Serial number arithmetic (RFC 1982, 32 bits): how far `a` is after `b`; negative: before it. */
static inline int32_t pv_after(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b);
}

#endif
