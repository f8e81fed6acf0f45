/*
 * Flows by their key, in a table that has a limit, and lists of them by last use. Keys are chosen by clients, so they are
 * hashed with a secret (SipHash): nobody can make them meet in one bucket.
 *
 * A structure has struct pv_flow as its first member; who takes it out of a table frees it.
 */
#ifndef PYVMM_PROXY_FLOW_H
#define PYVMM_PROXY_FLOW_H

#include "proxy_packet.h"

struct pv_flow {
	struct pv_flow *same_bucket;
	struct pv_flow *older, *newer;
	struct pv_flow_key key;
	uint64_t used;                    /* ms */
};

struct pv_flow_list {
	struct pv_flow *oldest, *newest;
	uint32_t count;
};

struct pv_flow_table {
	struct pv_flow **buckets;
	uint32_t mask, count, limit;
	uint64_t secret[2];
};

/* -1 if there is no memory or no randomness. */
int pv_flow_table_open(struct pv_flow_table *table, uint32_t limit);
void pv_flow_table_close(struct pv_flow_table *table);
struct pv_flow *pv_flow_find(const struct pv_flow_table *table, const struct pv_flow_key *key);
/* The caller has made sure that it is not there, and that count < limit. */
void pv_flow_insert(struct pv_flow_table *table, struct pv_flow *flow);
void pv_flow_remove(struct pv_flow_table *table, struct pv_flow *flow);

void pv_flow_append(struct pv_flow_list *list, struct pv_flow *flow);
void pv_flow_unlist(struct pv_flow_list *list, struct pv_flow *flow);

#endif
