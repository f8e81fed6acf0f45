/* A hash table and a list. See proxy_flow.h. */

#include "proxy_flow.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

static inline uint64_t rotate(uint64_t value, int by)
{
	return value << by | value >> (64 - by);
}

struct sip {
	uint64_t a, b, c, d;
};

static inline void sip_round(struct sip *s)
{
	s->a += s->b;
	s->c += s->d;
	s->b = rotate(s->b, 13) ^ s->a;
	s->d = rotate(s->d, 16) ^ s->c;
	s->a = rotate(s->a, 32);
	s->c += s->b;
	s->a += s->d;
	s->b = rotate(s->b, 17) ^ s->c;
	s->d = rotate(s->d, 21) ^ s->a;
	s->c = rotate(s->c, 32);
}

/* SipHash-1-3 (Aumasson and Bernstein, 2012) of the key's six words. */
static uint64_t hash(const struct pv_flow_table *table, const struct pv_flow_key *key)
{
	uint64_t words[6];
	struct sip s = {
		table->secret[0] ^ 0x736f6d6570736575ull, table->secret[1] ^ 0x646f72616e646f6dull,
		table->secret[0] ^ 0x6c7967656e657261ull, table->secret[1] ^ 0x7465646279746573ull,
	};

	memcpy(words, key, sizeof(words));
	for (int i = 0; i < 6; i++) {
		s.d ^= words[i];
		sip_round(&s);
		s.a ^= words[i];
	}
	s.d ^= (uint64_t)sizeof(*key) << 56;
	sip_round(&s);
	s.a ^= (uint64_t)sizeof(*key) << 56;
	s.c ^= 0xff;
	for (int i = 0; i < 3; i++)
		sip_round(&s);
	return s.a ^ s.b ^ s.c ^ s.d;
}

int pv_flow_table_open(struct pv_flow_table *table, uint32_t limit)
{
	uint32_t size = 16;
	while (size < limit && size < 1u << 24)
		size *= 2;
	table->buckets = calloc(size, sizeof(*table->buckets));
	table->mask = size - 1;
	table->count = 0;
	table->limit = limit;
	return table->buckets && getrandom(table->secret, sizeof(table->secret), 0) == sizeof(table->secret) ? 0 : -1;
}

void pv_flow_table_close(struct pv_flow_table *table)
{
	free(table->buckets);
	table->buckets = NULL;
}

struct pv_flow *pv_flow_find(const struct pv_flow_table *table, const struct pv_flow_key *key)
{
	struct pv_flow *flow = table->buckets[hash(table, key) & table->mask];
	while (flow && memcmp(&flow->key, key, sizeof(*key)))
		flow = flow->same_bucket;
	return flow;
}

void pv_flow_insert(struct pv_flow_table *table, struct pv_flow *flow)
{
	struct pv_flow **bucket = &table->buckets[hash(table, &flow->key) & table->mask];
	flow->same_bucket = *bucket;
	*bucket = flow;
	table->count++;
}

void pv_flow_remove(struct pv_flow_table *table, struct pv_flow *flow)
{
	struct pv_flow **at = &table->buckets[hash(table, &flow->key) & table->mask];
	while (*at != flow)
		at = &(*at)->same_bucket;
	*at = flow->same_bucket;
	table->count--;
}

void pv_flow_append(struct pv_flow_list *list, struct pv_flow *flow)
{
	flow->older = list->newest;
	flow->newer = NULL;
	if (list->newest)
		list->newest->newer = flow;
	else
		list->oldest = flow;
	list->newest = flow;
	list->count++;
}

void pv_flow_unlist(struct pv_flow_list *list, struct pv_flow *flow)
{
	if (flow->older)
		flow->older->newer = flow->newer;
	else
		list->oldest = flow->newer;
	if (flow->newer)
		flow->newer->older = flow->older;
	else
		list->newest = flow->older;
	flow->older = flow->newer = NULL;
	list->count--;
}
