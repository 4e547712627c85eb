/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The packet path's cookie: what the front end must remember between its SYN-ACK and the request, in
 * the sequence number of the SYN-ACK (RFC 4987 section 3.6) and, if the client has timestamps, in
 * its TSval.
 *
 * Of SipHash-2-4 over the flow, the client's initial sequence number and the metadata, 22 bits are the
 * upper part of our initial sequence number; the lower 10 are the metadata. 32 other bits are the offset of
 * our timestamp clock, so that a TSecr that lies in the last TCPHA_COOKIE_MS proves another 15. Whether there
 * are timestamps is hashed, too: where they were agreed, no segment without them is good. Whoever has
 * the key and the client's segment behind the handshake can tell all of it: the front end that made the
 * cookie, and the back end that adopts.
 */
#ifndef COOKIE_BPF_H
#define COOKIE_BPF_H

#include "packet.bpf.h"
#include "siphash.h"
#include "socket.bpf.h"

#define META_BITS 10
#define META_MASK ((1U << META_BITS) - 1)
#define META_KEY 1U   /* which of the two keys */
#define META_MSS 1    /* shift; 3 bits, index of MSS_VALUES */
#define META_WSCALE 4 /* shift; 4 bits, NO_WSCALE: the option was absent */
#define META_SACK (1U << 8)
#define META_ECN (1U << 9)
#define NO_WSCALE 15U
#define META_TIMED (2U << META_BITS) /* timestamps were agreed: hashed only, as each segment shows it */

/* What is negotiated. The client's MSS is rounded down to one of these. */
const volatile __u16 MSS_VALUES[8] SEC(".rodata.mss") = {536, 1220, 1360, 1400, 1440, 1452, 1460, 8960};

enum {
	OPT_TS = 1,
	OPT_SACK = 2,
	OPT_WSCALE = 4,
	OPT_ECN = 8, /* in conf.options alone: it is no option of TCP */
};

struct options {
	__u32 tsval;
	__u32 tsecr;
	__u16 mss; /* 0: absent */
	__u8 wscale;
	__u8 found; /* OPT_* */
};

/* What a cookie says; host byte order. */
struct cookie {
	__u32 isn;    /* client's */
	__u32 ours;   /* our initial sequence number */
	__u32 rtt_ms; /* between SYN-ACK and the segment, if it has timestamps; else 0 */
	__u32 meta;
	bool good;	    /* front end: it is ours, whether it counts or not */
	struct options opt; /* of the segment */
};

/* SipHash-2-4 of 47 bytes: the flow, isn, meta and nothing. */
__noinline __u64 cookie_hash(const struct tcpha_flow *flow, __u64 k0, __u64 k1, __u32 isn, __u32 meta)
{
	SIPKEYS(k0, k1);
	const __u32 *w = (const void *)flow;

	if (!flow)
		return 0;
	SIPWORD((__u64)w[1] << 32 | w[0]);
	SIPWORD((__u64)w[3] << 32 | w[2]);
	SIPWORD((__u64)w[5] << 32 | w[4]);
	SIPWORD((__u64)w[7] << 32 | w[6]);
	SIPWORD((__u64)isn << 32 | w[8]);
	SIPWORD(((__u64)47 << 56) | meta);
	SIPEND;
	return v0 ^ v1 ^ v2 ^ v3;
}

/* TCP options that are being read; the stack has no room. */
struct options_left {
	__u8 b[64]; /* 40 are read at most; the rest is for the verifier */
	__u32 at;
	__u32 length;
	__u32 bad;
	struct options o;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct options_left);
} reading SEC(".maps");

static __always_inline struct options_left *in_reading(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&reading, &zero);
}

/* What a whole option of 'size' bytes says. */
static __always_inline void take_option(struct options *o, const __u8 *b, __u32 size)
{
	if (b[0] == 2 && size == 4) {
		o->mss = (__u16)b[2] << 8 | b[3];
	} else if (b[0] == 3 && size == 3) {
		o->wscale = b[2] > 14 ? 14 : b[2]; /* RFC 7323 section 2.3 */
		o->found |= OPT_WSCALE;
	} else if (b[0] == 4 && size == 2) {
		o->found |= OPT_SACK;
	} else if (b[0] == 8 && size == 10) {
		o->tsval = (__u32)b[2] << 24 | (__u32)b[3] << 16 | (__u32)b[4] << 8 | b[5];
		o->tsecr = (__u32)b[6] << 24 | (__u32)b[7] << 16 | (__u32)b[8] << 8 | b[9];
		o->found |= OPT_TS;
	}
}

/* One option, or NOP. Returns 1 behind the last one. */
static long read_option(__u32 i, void *ctx)
{
	struct options_left *l = in_reading();
	__u32 at, size;
	const __u8 *b;

	(void)i;
	(void)ctx;
	if (!l)
		return 1;
	at = l->at;
	if (at >= l->length || at >= 40)
		return 1;
	b = l->b + at;
	if (b[0] == 0)
		return 1;
	if (b[0] == 1) {
		l->at = at + 1;
		return 0;
	}
	size = b[1];
	if (at + 1 >= l->length || size < 2 || at + size > l->length) {
		l->bad = 1;
		return 1;
	}
	take_option(&l->o, b, size);
	l->at = at + size;
	return 0;
}

/* Read the TCP options of a packet. 0, or -1: malformed. */
static __always_inline int read_options(struct __sk_buff *skb, const struct packet *p, struct options *o)
{
	struct options_left *l = in_reading();
	__u32 offset = p->l4 + sizeof(struct tcphdr), length = p->doff - sizeof(struct tcphdr);

	__builtin_memset(o, 0, sizeof(*o));
	if (length == 0)
		return 0;
	if (!l || load_bytes(skb, offset, l->b, length, 40) < 0)
		return -1;
	l->at = 0;
	l->length = length;
	l->bad = 0;
	__builtin_memset(&l->o, 0, sizeof(l->o));
	bpf_loop(40, read_option, 0, 0);
	*o = l->o;
	return l->bad ? -1 : 0;
}

static __always_inline __u32 clock_ms(void)
{
	return now_ns() / 1000000;
}

/*
 * Is a segment, whose sequence number is the first behind the handshake, of a client that has our
 * cookie? Fills c. 1, or 0. The age is by the clock of the front end that made it, which a back end knows
 * within some slack: see TCPHA_CLOCK. So it may seem to be from -slack to TCPHA_COOKIE_MS + slack.
 */
static __always_inline int cookie_check(const struct tcpha_flow *flow, const struct tcpha_keys *keys,
					__u32 seq, __u32 ack, struct cookie *c)
{
	__u64 h, clock = tcpha_now(&keys->clock);
	__u32 age, slack = (__u32)clock;

	c->isn = seq - 1;
	c->ours = ack - 1;
	c->meta = c->ours & META_MASK;
	c->rtt_ms = 0;
	h = cookie_hash(flow, keys->key[c->meta & META_KEY][0], keys->key[c->meta & META_KEY][1], c->isn,
			c->meta | (c->opt.found & OPT_TS ? META_TIMED : 0));
	if (((__u32)h ^ c->ours) >> META_BITS)
		return 0;
	if (c->opt.found & OPT_TS) {
		age = clock_ms() + (__u32)(clock >> 32) - (c->opt.tsecr - (__u32)(h >> 32));
		if (age + slack > TCPHA_COOKIE_MS + 2 * slack)
			return 0;
		c->rtt_ms = age;
	}
	return 1;
}

/*
 * The tag of a front end, on a client's first segment that it sends on to a back end. The client has the
 * cookie, and so has whoever is a client for once; but it is the front end that decides which back end gets a
 * request, and whether any does. So what the segment acknowledges is changed in those 22 bits that the back
 * end can tell anyhow, and its urgent pointer, which means nothing without URG, proves another 16. All
 * segments of a GSO packet have the tag then. Later ones need none: they are for a socket that is there.
 */
#define META_TAG (1U << META_BITS) /* no cookie is made of this */

static __always_inline __u64 tag_hash(const struct tcpha_flow *flow, const struct tcpha_keys *keys, __u32 isn,
				      __u32 meta)
{
	return cookie_hash(flow, keys->key[meta & META_KEY][0], keys->key[meta & META_KEY][1], isn,
			   meta | META_TAG);
}

/* Of a number to be acknowledged: what it is with the tag, or without it. */
static __always_inline __u32 tag_ack(__u32 ack, __u64 hash)
{
	return ((ack - 1) ^ ((__u32)hash & ~META_MASK)) + 1;
}

static __always_inline __be16 tag_urgent(__u64 hash)
{
	return (__be16)(hash >> 32) ?: 1;
}

/* Change what a segment acknowledges, and its urgent pointer; 'at': its TCP header. 0, or an error. */
static __always_inline int write_tag(struct __sk_buff *skb, __u32 at, __u32 ack, __be16 urgent)
{
	const __u32 at_ack = at + __builtin_offsetof(struct tcphdr, ack_seq);
	const __u32 at_check = at + __builtin_offsetof(struct tcphdr, check);
	const __u32 at_urgent = at + __builtin_offsetof(struct tcphdr, urg_ptr);
	__be32 old_ack, new_ack = bpf_htonl(ack);
	__be16 old_urgent;

	return bpf_skb_load_bytes(skb, at_ack, &old_ack, sizeof(old_ack)) ||
	       bpf_skb_load_bytes(skb, at_urgent, &old_urgent, sizeof(old_urgent)) ||
	       bpf_l4_csum_replace(skb, at_check, old_ack, new_ack, sizeof(new_ack)) ||
	       bpf_l4_csum_replace(skb, at_check, old_urgent, urgent, sizeof(urgent)) ||
	       bpf_skb_store_bytes(skb, at_ack, &new_ack, sizeof(new_ack), 0) ||
	       bpf_skb_store_bytes(skb, at_urgent, &urgent, sizeof(urgent), 0);
}

/*
 * Make the segment the last ACK of a handshake with the listener at an address of this host. 0, a
 * refusal as in TCPHA_R_*, or TCPHA_R_BACKLOG. rtt_ms: of the handshake.
 */
static __always_inline int cookie_accept(struct __sk_buff *skb, struct bpf_sock_tuple *t,
					 const struct cookie *c, __u32 rcv_wscale, __u32 rtt_ms)
{
	struct bpf_tcp_req_attrs attrs = {};
	struct tcp_sock *listener;
	struct bpf_sock *skc;
	int result = TCPHA_R_NO_LISTENER;

	skc = find_listener(skb, t);
	if (!skc)
		return result;
	if (skc->state != BPF_TCP_LISTEN)
		goto out;
	listener = bpf_skc_to_tcp_sock(skc);
	if (!listener)
		goto out;
	result = TCPHA_R_BACKLOG;
	if (listener->inet_conn.icsk_inet.sk.sk_ack_backlog >
	    listener->inet_conn.icsk_inet.sk.sk_max_ack_backlog)
		goto out;
	attrs.mss = MSS_VALUES[(c->meta >> META_MSS) & 7];
	attrs.wscale_ok = ((c->meta >> META_WSCALE) & 15) != NO_WSCALE;
	attrs.snd_wscale = attrs.wscale_ok ? (c->meta >> META_WSCALE) & 15 : 0;
	attrs.rcv_wscale = attrs.wscale_ok ? rcv_wscale : 0;
	attrs.sack_ok = (c->meta & META_SACK) != 0;
	attrs.ecn_ok = (c->meta & META_ECN) != 0;
	if (c->opt.found & OPT_TS) {
		attrs.tstamp_ok = 1;
		attrs.rcv_tsval = c->opt.tsval;
		/* The clock goes on from here. Its distance from the echo is the first RTT sample. */
		attrs.rcv_tsecr = c->opt.tsecr + (rtt_ms ?: 1);
	}
	result = 0;
	if (bpf_sk_assign_tcp_reqsk(skb, (struct sock *)listener, &attrs, sizeof(attrs)) < 0)
		result = TCPHA_R_ASSIGN;
out:
	bpf_sk_release(skc);
	return result;
}

#endif
