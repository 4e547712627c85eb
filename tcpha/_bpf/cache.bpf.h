/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The verdict cache: a request that is like earlier ones needs no process.
 *
 * A head that is whole in its packet is taken as two strings: method and request-target, up to the space
 * behind them, and all the rest. Of the first, as it was sent and in whatever form, user space has said which
 * back ends may take it from clients of a service; of the second, that the parser accepts it behind any
 * target. Both are looked up by SipHash-2-4 with a secret key, so nobody can make one string pass for
 * another. Where a head ends is part of what was accepted: behind one that ends earlier, or later, comes
 * another string.
 */
#ifndef CACHE_BPF_H
#define CACHE_BPF_H

#include "choose.h"
#include "cookie.bpf.h"
#include "fe_maps.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_cache);
} cache SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, __u64);
	__type(value, struct tcpha_verdict);
} verdicts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct tcpha_load);
} loads SEC(".maps");

/* How often each rule was used: by the program, and by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_RULES);
	__type(key, __u32);
	__type(value, __u64);
} rule_hits SEC(".maps");

/* Connections of each service that needed no worker, by its number. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_SERVICES);
	__type(key, __u32);
	__type(value, __u64);
} service_hits SEC(".maps");

/* A request head, and what is made of it: the stack has no room. */
struct head {
	__u8 b[TCPHA_HEAD_MAX + 8]; /* the rest is for the last word */
	__u64 v[4];		    /* the hash in the making, */
	__u32 from;		    /* of what begins here */
	__u32 at;		    /* the second space */
	__u32 target;		    /* behind the first */
	__u32 seen;		    /* spaces */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct head);
} heads SEC(".maps");

static __always_inline struct head *the_head(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&heads, &zero);
}

static __always_inline __u64 word_at(const struct head *h, __u32 at)
{
	return *(const __u64 *)(h->b + (at & (TCPHA_HEAD_MAX - 1)));
}

static long hash_word(__u32 i, void *ctx)
{
	struct head *h = the_head();
	__u64 v0, v1, v2, v3, m;

	(void)ctx;
	if (!h)
		return 1;
	v0 = h->v[0];
	v1 = h->v[1];
	v2 = h->v[2];
	v3 = h->v[3];
	m = word_at(h, h->from + i * 8);
	SIPWORD(m);
	h->v[0] = v0;
	h->v[1] = v1;
	h->v[2] = v2;
	h->v[3] = v3;
	return 0;
}

/* As tcpha_siphash() in user space. */
static __always_inline __u64 hash_bytes(struct head *h, __u32 from, __u32 to, __u64 k0, __u64 k1)
{
	SIPKEYS(k0, k1);
	__u32 words = (to - from) / 8;
	__u64 m;

	h->v[0] = v0;
	h->v[1] = v1;
	h->v[2] = v2;
	h->v[3] = v3;
	h->from = from;
	bpf_loop(words, hash_word, 0, 0);
	v0 = h->v[0];
	v1 = h->v[1];
	v2 = h->v[2];
	v3 = h->v[3];
	m = word_at(h, from + words * 8) & ((1ULL << ((to - from) & 7) * 8) - 1);
	m |= (__u64)(to - from) << 56;
	SIPWORD(m);
	SIPEND;
	return v0 ^ v1 ^ v2 ^ v3;
}

static long next_byte(__u32 i, void *ctx)
{
	struct head *h = the_head();

	(void)ctx;
	if (!h)
		return 1;
	h->at = i;
	if (h->b[i & (TCPHA_HEAD_MAX - 1)] != ' ')
		return 0;
	h->seen++;
	if (h->seen == 2)
		return 1;
	h->target = i + 1;
	return 0;
}

static __always_inline int choose(struct tcpha_verdict *v, struct tcpha_entry *fresh)
{
	__u32 turn = __sync_fetch_and_add(&v->turn, 1), count = tcpha_now(&v->count);
	int n = tcpha_choose(v->choice, count, TCPHA_CHOICES, turn, &loads);

	if (n < 0)
		return 0;
	fresh->backend = v->choice[n & (TCPHA_CHOICES - 1)].backend;
	fresh->rule = v->choice[n & (TCPHA_CHOICES - 1)].rule;
	return 1;
}

/*
 * Decide the request that a packet brings, by what is known of others: 1, and backend, rule and target are
 * set; or 0: it must go to user space.
 */
static __always_inline int decide(struct __sk_buff *skb, const struct packet *p, struct tcpha_entry *fresh)
{
	struct tcpha_verdict *v;
	struct tcpha_cache *c;
	struct head *h = the_head();
	__u32 zero = 0, length = p->length, at, target, i, n;
	__u64 generation, key;

	c = bpf_map_lookup_elem(&cache, &zero);
	if (!c || !c->on || !h || length < 16)
		return 0;
	generation = tcpha_now(&c->generation);
	if (load_bytes(skb, p->data, h->b, length, TCPHA_HEAD_MAX) < 0)
		return 0;
	n = length < TCPHA_LINE_MAX ? length : TCPHA_LINE_MAX;
	h->seen = 0;
	bpf_loop(n, next_byte, 0, 0);
	at = h->at;
	target = h->target;
	if (h->seen != 2 || at >= length)
		return 0;
	key = hash_bytes(h, at, length, c->key[0], ~c->key[1]);
	v = bpf_map_lookup_elem(&verdicts, &key);
	if (!v || v->generation != generation || v->count)
		return 0;
	key = hash_bytes(h, 0, at, c->key[0], c->key[1]) ^ tcpha_service_word(&p->flow);
	v = bpf_map_lookup_elem(&verdicts, &key);
	if (!v || v->generation != generation || !v->count || (v->until_ns && now_ns() >= v->until_ns))
		return 0;
	fresh->target_len = at - target;
	for (i = 0; i < TCPHA_TARGET_MAX / 8; i++)
		((__u64 *)fresh->target)[i] = word_at(h, target + i * 8);
	/* this memory may be another verdict's by now, and the choice was its */
	return choose(v, fresh) && tcpha_now(&v->key) == key;
}

/* It is of this service. */
static __always_inline void count_hit(const struct tcpha_flow *flow)
{
	__u32 *service = service_of(flow);
	__u64 *hits = service ? bpf_map_lookup_elem(&service_hits, service) : 0;

	if (hits)
		__sync_fetch_and_add(hits, 1);
	COUNT(cached, 1);
}

/* A back end has got a connection, by a rule; one of another (its index + 1, or 0) is over by that. */
static __always_inline void count_load(__u32 backend, __u32 rule, __u32 old)
{
	struct tcpha_load *load = bpf_map_lookup_elem(&loads, &backend);
	__u64 *hits = bpf_map_lookup_elem(&rule_hits, &rule);

	if (hits)
		__sync_fetch_and_add(hits, 1);
	if (load) {
		__sync_fetch_and_add(&load->live, 1);
		__sync_fetch_and_add(&load->handed, 1);
	}
	if (!old--)
		return;
	load = bpf_map_lookup_elem(&loads, &old);
	if (load) {
		__sync_fetch_and_add(&load->live, -1);
		__sync_fetch_and_add(&load->closed, 1);
	}
}

#endif
