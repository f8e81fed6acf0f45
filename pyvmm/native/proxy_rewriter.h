/*
 * filter-rewriter: the secondary's connections look to clients as the primary's do.
 *
 * Both guests choose initial sequence numbers and timestamps of their own; the client only ever sees the primary's. The
 * guest's SYN tells its number, the first segment of the client's that acknowledges something tells the primary's:
 *
 *   offset = secondary's ISN - primary's          to the guest: acknowledgment, SACK blocks, quoted segments += offset
 *                                                 from it:      sequence number -= offset
 *   ts_offset = secondary's TSval - what was echoed   to it: TSecr += ts_offset    from it: TSval -= ts_offset
 *
 * A TSval never goes out older than one that the client has echoed: after a failover PAWS (RFC 7323, 5) would drop the
 * survivor's segments. Checksums are updated incrementally (RFC 1624), or left alone where only a pseudo-header's sum is
 * in the field (VIRTIO_NET_HDR_F_NEEDS_CSUM).
 *
 * After a checkpoint the guest has the primary's numbers: the offsets are those that the primary's rewriter has, if it
 * has survived another before; else 0. A segment signed by option (MD5, TCP-AO), or data on a SYN, which makes the first
 * acknowledgment ambiguous: not rewritten, so the guests' answers differ, and a checkpoint puts it right.
 *
 * Only the guest's segments make an entry, so that no client's can. Any thread may call.
 */
#ifndef PYVMM_PROXY_REWRITER_H
#define PYVMM_PROXY_REWRITER_H

#include "net_pump.h"
#include "proxy_flow.h"

#include <pthread.h>

enum pv_rewriter_state {
	PV_REWRITER_LEARNING,             /* the guest's number is known, the primary's is not */
	PV_REWRITER_LIVE,
	PV_REWRITER_QUIET,                /* nothing to do but to watch timestamps, or closed: can be forgotten */
	PV_REWRITER_STATES,
};

struct pv_rewritten {
	struct pv_flow flow;
	uint8_t state;                    /* the list it is in */
	bool has_isn, has_timestamp, has_echo, has_ack, opaque;
	bool guest_fin, peer_fin, closed;
	uint32_t isn, offset;
	uint32_t timestamp;               /* TSval of the guest's first SYN */
	uint32_t ts_offset, echo;         /* echo: the latest TSval that the client has seen */
	uint32_t last_timestamp;          /* the latest one that went out */
	bool has_last;
	uint32_t ack;                     /* what the guest expects next of the client */
};

/* What another rewriter needs to go on with a connection. */
struct pv_rewriter_record {
	struct pv_flow_key key;
	uint32_t offset, ts_offset, echo;
	uint32_t has_echo;
};

struct pv_rewriter_limits {
	uint32_t max_connections;
	uint64_t live_timeout, quiet_timeout; /* ms without a segment; learning counts as quiet */
};

struct pv_rewriter_counters {
	uint64_t to_guest, from_guest;    /* TCP segments of known connections */
	uint64_t rewritten, quoted;
	uint64_t learned, opaque;
	uint64_t forgotten, refused;      /* no room: not tracked */
	uint64_t timestamps_raised;
};

struct pv_rewriter {
	pthread_mutex_t lock;
	struct pv_rewriter_limits limits;
	struct pv_flow_table table;
	struct pv_flow_list lists[PV_REWRITER_STATES];
	struct pv_rewriter_counters counters;
};

struct pv_rewriter *pv_rewriter_new(const struct pv_rewriter_limits *limits);
void pv_rewriter_free(struct pv_rewriter *r);
/* `frame` is changed in place: 1, or 0 if it was left as it is. `header`: struct virtio_net_hdr. `now`: ms. */
int pv_rewriter_to_guest(struct pv_rewriter *r, const uint8_t *header, uint8_t *frame, uint32_t size, uint64_t now);
int pv_rewriter_from_guest(struct pv_rewriter *r, const uint8_t *header, uint8_t *frame, uint32_t size, uint64_t now);
void pv_rewriter_scan(struct pv_rewriter *r, uint64_t now);
/* The guest has the primary's state now; `records` is what the primary's rewriter does: how many there was room for. */
uint32_t pv_rewriter_checkpoint(struct pv_rewriter *r, const struct pv_rewriter_record *records, uint32_t count,
				uint64_t now);
/* Those that are not as without a rewriter, at most `limit`; how many there are. */
uint32_t pv_rewriter_records(struct pv_rewriter *r, struct pv_rewriter_record *records, uint32_t limit);
void pv_rewriter_read_counters(struct pv_rewriter *r, struct pv_rewriter_counters *counters, uint32_t *connections);

/* proxy_rewriter.c; the lock is held. */
struct pv_rewritten *pv_rewriter_find(struct pv_rewriter *r, const struct pv_flow_key *key, bool make, uint64_t now);
void pv_rewriter_settle(struct pv_rewriter *r, struct pv_rewritten *at, uint64_t now);

#endif
