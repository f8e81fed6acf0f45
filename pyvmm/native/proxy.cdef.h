/* What Python sees of proxy_compare.h and proxy_rewriter.h; the comments are there. */

#define PV_PACKET_TCP ...
#define PV_PACKET_UDP ...
#define PV_PACKET_ICMP ...
#define PV_PACKET_ARP ...
#define PV_PACKET_FRAGMENT ...
#define PV_PACKET_IP ...
#define PV_PACKET_OTHER ...
#define PV_PACKET_CLASSES ...
#define PV_COMPARE_PASS ...
#define PV_COMPARE_HOLD ...
#define PV_COMPARE_HYBRID ...
#define PV_POLICY_COMPARE ...
#define PV_POLICY_RELEASE ...
#define PV_POLICY_CHECKPOINT ...
#define PV_DUE_NOTHING ...
#define PV_DUE_PAYLOAD ...
#define PV_DUE_LENGTH ...
#define PV_DUE_HEADER ...
#define PV_DUE_SYN ...
#define PV_DUE_FIN ...
#define PV_DUE_RST ...
#define PV_DUE_START ...
#define PV_DUE_PRIMARY_ALONE ...
#define PV_DUE_SECONDARY_ALONE ...
#define PV_DUE_ACK ...
#define PV_DUE_PRIMARY_FULL ...
#define PV_DUE_SECONDARY_FULL ...
#define PV_DUE_CONNECTIONS ...
#define PV_DUE_POLICY ...
#define PV_DUE_REASONS ...
#define PV_COMPARE_TAKEN ...
#define PV_COMPARE_REFUSED ...
#define PV_COMPARE_BAD ...

struct pv_flow_key {
	uint8_t guest[16], peer[16];
	uint16_t guest_port, peer_port;
	uint16_t vlan[2];
	uint8_t family, class, protocol;
	...;
};

struct pv_due {
	uint32_t reason, coalesced;
	uint64_t epoch;
	struct pv_flow_key key;
	uint32_t position;
	uint32_t sizes[2];
	uint8_t samples[2][16];
	...;
};

struct pv_compare_limits {
	uint64_t compare_timeout, idle_timeout;
	uint32_t max_queue_size, max_connections;
	uint64_t max_bytes;
	uint8_t policy[...];
	...;
};

struct pv_compare_counters {
	uint64_t frames[2], bytes[2], released, committed, dropped, refused, bad, equal_bytes, acknowledged,
		connections_forgotten;
	uint64_t due[...];
	...;
};

struct pv_connection_info {
	struct pv_flow_key key;
	uint64_t frames[2], released, differences;
	uint32_t waiting[2];
	uint32_t diverged;
	...;
};

struct pv_compare {
	...;
};

struct pv_compare *pv_compare_new(const struct pv_compare_limits *limits);
void pv_compare_free(struct pv_compare *c);
int pv_compare_primary(struct pv_compare *c, const uint8_t *header, const uint8_t *frame, uint32_t size, uint64_t now);
int pv_compare_secondary(struct pv_compare *c, const uint8_t *header, const uint8_t *frame, uint32_t size,
			 uint64_t epoch, uint64_t now);
uint32_t pv_compare_take(struct pv_compare *c, uint8_t *unit);
void pv_compare_scan(struct pv_compare *c, uint64_t now);
int pv_compare_set_mode(struct pv_compare *c, int mode, uint64_t epoch, uint64_t now);
int pv_compare_begin_epoch(struct pv_compare *c, uint64_t epoch);
int pv_compare_commit(struct pv_compare *c, uint64_t epoch, uint64_t now);
int pv_compare_due(struct pv_compare *c, struct pv_due *due, int last);
uint32_t pv_compare_connections(struct pv_compare *c, struct pv_connection_info *info, uint32_t limit);
void pv_compare_read_counters(struct pv_compare *c, struct pv_compare_counters *counters);

struct pv_rewriter_record {
	struct pv_flow_key key;
	uint32_t offset, ts_offset, echo, has_echo;
	...;
};

struct pv_rewriter_limits {
	uint32_t max_connections;
	uint64_t live_timeout, quiet_timeout;
	...;
};

struct pv_rewriter_counters {
	uint64_t to_guest, from_guest, rewritten, quoted, learned, opaque, forgotten, refused, timestamps_raised;
	...;
};

struct pv_rewriter {
	...;
};

struct pv_rewriter *pv_rewriter_new(const struct pv_rewriter_limits *limits);
void pv_rewriter_free(struct pv_rewriter *r);
int pv_rewriter_to_guest(struct pv_rewriter *r, const uint8_t *header, uint8_t *frame, uint32_t size, uint64_t now);
int pv_rewriter_from_guest(struct pv_rewriter *r, const uint8_t *header, uint8_t *frame, uint32_t size, uint64_t now);
void pv_rewriter_scan(struct pv_rewriter *r, uint64_t now);
uint32_t pv_rewriter_checkpoint(struct pv_rewriter *r, const struct pv_rewriter_record *records, uint32_t count,
				uint64_t now);
uint32_t pv_rewriter_records(struct pv_rewriter *r, struct pv_rewriter_record *records, uint32_t limit);
void pv_rewriter_read_counters(struct pv_rewriter *r, struct pv_rewriter_counters *counters, uint32_t *connections);
