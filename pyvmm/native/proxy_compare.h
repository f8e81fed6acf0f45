/*
 * colo-compare: what two guests answered, packet by packet, until it is the same.
 *
 *   primary's frames ----> queue of the flow --equal--> out, to the client
 *                               |  differs, too old, too many: `due`, a checkpoint is wanted
 *   secondary's frames --> queue of the flow --equal--> freed
 *
 * Epochs. pv_compare_begin_epoch(n) is called while the primary is paused for the checkpoint that starts epoch n: its
 * frames are of epoch n from then on. Frames of the epoch before still go out when the secondary's equal them. Once the
 * secondary holds the checkpoint, pv_compare_commit(n) releases the primary's frames of all epochs before n, drops the
 * secondary's, and only then compares those of n: to both sides the primary's state at the pause is the common past.
 *
 * TCP is compared by position in the stream (proxy_tcp.c), all else message by message (proxy_datagram.c). The
 * secondary's frames have passed its rewriter: their sequence numbers are the primary's, but for a SYN's.
 *
 * Not compared: link-layer addresses, IP identification, checksums, and of TCP window, timestamps, ECN, and bytes sent
 * again below what was found equal. A guest that retransmits other bytes than it sent is not found out.
 *
 * A segment that acknowledges more than the secondary has is held, and the client told what both have (proxy_ack.c).
 *
 * Any thread may call: one lock covers all of it, and nothing waits.
 */
#ifndef PYVMM_PROXY_COMPARE_H
#define PYVMM_PROXY_COMPARE_H

#include "net_pump.h"
#include "proxy_flow.h"

#include <pthread.h>

enum pv_compare_side { PV_PRIMARY, PV_SECONDARY };

enum pv_compare_mode {
	PV_COMPARE_PASS,                  /* alone: the primary's go out at once, the secondary's nowhere */
	PV_COMPARE_HOLD,                  /* periodic: the primary's wait for the commit */
	PV_COMPARE_HYBRID,
};

enum pv_compare_policy {
	PV_POLICY_COMPARE,
	PV_POLICY_RELEASE,                /* not compared: the primary's go out, the secondary's nowhere */
	PV_POLICY_CHECKPOINT,             /* not compared: each of the primary's wants a checkpoint */
};

/* Why a checkpoint is wanted; 0: it is not. */
enum pv_compare_reason {
	PV_DUE_NOTHING,
	PV_DUE_PAYLOAD,                   /* other bytes */
	PV_DUE_LENGTH,                    /* one message is the other's beginning */
	PV_DUE_HEADER,                    /* hop limit, DSCP, IP options or extension headers, fragment */
	PV_DUE_SYN,                       /* options or flags of a SYN */
	PV_DUE_FIN,                       /* one stream ends where the other goes on */
	PV_DUE_RST,                       /* two different resets */
	PV_DUE_START,                     /* one side begins a new connection, the other goes on with the old one */
	PV_DUE_PRIMARY_ALONE,             /* the secondary did not send it within the time */
	PV_DUE_SECONDARY_ALONE,
	PV_DUE_ACK,                       /* the secondary did not acknowledge as much within the time */
	PV_DUE_PRIMARY_FULL,              /* max_queue_size, or memory */
	PV_DUE_SECONDARY_FULL,
	PV_DUE_CONNECTIONS,               /* more than are tracked */
	PV_DUE_POLICY,
	PV_DUE_REASONS,
};

enum pv_compare_result {
	PV_COMPARE_TAKEN = 0,
	PV_COMPARE_REFUSED = -1,          /* the primary's: no room, the caller still has it; `due` says so */
	PV_COMPARE_BAD = -2,              /* too short, too long, or of an epoch that has not begun */
};

#define PV_COMPARE_SAMPLE 16

struct pv_due {
	uint32_t reason;
	uint32_t coalesced;               /* more since then, of any reason */
	uint64_t epoch;
	struct pv_flow_key key;
	uint32_t position;                /* TCP: sequence number; else: byte of the body */
	uint32_t sizes[2];                /* of the samples: what either side has there */
	uint8_t samples[2][PV_COMPARE_SAMPLE];
};

struct pv_compare_limits {
	uint64_t compare_timeout;         /* ms */
	uint64_t idle_timeout;            /* ms; flows that nobody used for so long are forgotten */
	uint32_t max_queue_size;          /* frames of a flow and side */
	uint32_t max_connections;
	uint64_t max_bytes;               /* of a side, all flows */
	uint8_t policy[PV_PACKET_CLASSES];
};

struct pv_compare_counters {
	uint64_t frames[2], bytes[2];     /* came in */
	uint64_t released;                /* found equal, or by policy */
	uint64_t committed;               /* released by a checkpoint */
	uint64_t dropped;                 /* the secondary's, of an ended epoch, a flow that differs, or no room */
	uint64_t refused, bad;
	uint64_t equal_bytes;
	uint64_t acknowledged;            /* made here: see proxy_ack.c */
	uint64_t connections_forgotten;
	uint64_t due[PV_DUE_REASONS];
};

struct pv_held {
	struct pv_held *next;
	uint64_t arrived, epoch;
	struct pv_packet packet;
	uint32_t seq, end;                /* TCP: what it occupies, in the primary's sequence space */
	uint32_t size;
	uint8_t unit[];                   /* header and frame */
};

struct pv_compare_stream {
	struct pv_held *first, **end;
	struct pv_held *fresh;            /* the first that is not looked at yet */
	uint32_t count;
	/* TCP, of what was looked at: */
	bool has_isn, has_ack, has_end;
	bool blocked;                     /* `fresh` begins a new connection */
	uint32_t isn, ack, last;          /* as it came; highest acknowledged; highest sent */
	uint32_t first_seq;
	bool has_first;
	uint8_t urgents;
	uint32_t urgent[4];
};

#define PV_FRAGMENT_PAIRS 8

struct pv_connection {
	struct pv_flow flow;
	struct pv_compare_stream side[2];
	uint64_t epoch;                   /* that its state is of */
	bool busy;                        /* has frames, so it is in the list of those */
	bool diverged;                    /* until the next commit */
	bool has_frontier;
	uint32_t frontier;                /* TCP: all before it was equal */
	bool has_acked;
	uint32_t acked;                   /* TCP: the most that a client was told of */
	uint32_t syn_size;
	uint16_t syn_flags;
	uint8_t syn_options[PV_TCP_OPTIONS];
	uint32_t pairs;                   /* fragments: which identification is which */
	uint32_t pair[PV_FRAGMENT_PAIRS][2];
	uint64_t frames[2], released, differences;
};

struct pv_connection_info {
	struct pv_flow_key key;
	uint64_t frames[2], released, differences;
	uint32_t waiting[2];
	uint32_t diverged;
};

struct pv_compare {
	pthread_mutex_t lock;
	struct pv_compare_limits limits;
	enum pv_compare_mode mode;
	uint64_t epoch;                   /* of the primary's frames that come now */
	uint64_t compared;                /* the epoch that is compared; behind `epoch` until the commit */
	uint64_t since;                   /* ms, when that began */
	struct pv_flow_table table;
	struct pv_flow_list busy, idle;
	struct pv_connection apart;       /* the primary's frames that wait for a commit, whatever comes */
	enum pv_compare_reason lost;      /* why one of the secondary's, of epoch apart.epoch, could not be kept */
	struct pv_held *out, **out_end;
	uint64_t out_count;
	uint64_t held_bytes[2];           /* with those in `out` */
	struct pv_due due, last_due;
	struct pv_compare_counters counters;
};

struct pv_compare *pv_compare_new(const struct pv_compare_limits *limits);
void pv_compare_free(struct pv_compare *c);
/* `header`: 12 bytes of struct virtio_net_hdr; `now`: ms, monotonic. An enum pv_compare_result. */
int pv_compare_primary(struct pv_compare *c, const uint8_t *header, const uint8_t *frame, uint32_t size, uint64_t now);
int pv_compare_secondary(struct pv_compare *c, const uint8_t *header, const uint8_t *frame, uint32_t size,
			 uint64_t epoch, uint64_t now);
/* The next frame for a client, header first, into PV_NET_UNIT bytes: its size, 0 if there is none. */
uint32_t pv_compare_take(struct pv_compare *c, uint8_t *unit);
void pv_compare_scan(struct pv_compare *c, uint64_t now);
int pv_compare_set_mode(struct pv_compare *c, int mode, uint64_t epoch, uint64_t now);
int pv_compare_begin_epoch(struct pv_compare *c, uint64_t epoch);
int pv_compare_commit(struct pv_compare *c, uint64_t epoch, uint64_t now);
/* Whether a checkpoint is wanted; `last`: or was, the last time. */
int pv_compare_due(struct pv_compare *c, struct pv_due *due, int last);
uint32_t pv_compare_connections(struct pv_compare *c, struct pv_connection_info *info, uint32_t limit);
void pv_compare_read_counters(struct pv_compare *c, struct pv_compare_counters *counters);

/* The rest is between proxy_compare.c and the files named; the lock is held. */
void pv_compare_notify(struct pv_compare *c, const struct pv_flow_key *key, enum pv_compare_reason reason);
void pv_compare_want(struct pv_compare *c, struct pv_connection *at, enum pv_compare_reason reason, uint32_t position,
		     const struct pv_held *primary, uint32_t primary_at, const struct pv_held *secondary,
		     uint32_t secondary_at);
/* proxy_queues.c */
void pv_stream_open(struct pv_compare_stream *s);
void pv_stream_append(struct pv_compare_stream *s, struct pv_held *held);
struct pv_held *pv_stream_take_off(struct pv_compare_stream *s, struct pv_held **at);
void pv_compare_free_held(struct pv_compare *c, enum pv_compare_side side, struct pv_held *held);
void pv_compare_send_out(struct pv_compare *c, struct pv_held *held);
/* A frame of the proxy's own. */
bool pv_compare_send_copy(struct pv_compare *c, const uint8_t *unit, uint32_t size);
void pv_compare_release(struct pv_compare *c, struct pv_connection *at, struct pv_held **held);
void pv_compare_drop(struct pv_compare *c, struct pv_connection *at, struct pv_held **held);
void pv_compare_drop_stream(struct pv_compare *c, struct pv_connection *at, enum pv_compare_side side);
struct pv_connection *pv_compare_connect(struct pv_compare *c, const struct pv_flow_key *key);
void pv_compare_forget(struct pv_compare *c, struct pv_connection *at);
void pv_compare_settle(struct pv_compare *c, struct pv_connection *at, uint64_t now);
void pv_compare_rebase(struct pv_compare *c, struct pv_connection *at);
void pv_compare_progress(struct pv_compare *c, struct pv_connection *at);
/* proxy_tcp.c */
void pv_tcp_progress(struct pv_compare *c, struct pv_connection *at);
void pv_tcp_rebase(struct pv_connection *at, uint64_t epoch);
bool pv_tcp_waits_for_ack(const struct pv_connection *at, const struct pv_held *held);
/* proxy_ack.c */
void pv_compare_acknowledge(struct pv_compare *c, struct pv_connection *at, struct pv_held *primary,
			    const struct pv_held *secondary);
/* proxy_datagram.c */
void pv_datagram_progress(struct pv_compare *c, struct pv_connection *at);

static inline const uint8_t *pv_body(const struct pv_held *held)
{
	return held->unit + PV_NET_HEADER + held->packet.body;
}

#endif
