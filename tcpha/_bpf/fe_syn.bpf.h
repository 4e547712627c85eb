/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The packet path: a SYN is answered, and who has the answer's cookie. */
#ifndef FE_SYN_BPF_H
#define FE_SYN_BPF_H

#include "cookie.bpf.h"
#include "fe_maps.bpf.h"
#include "route.bpf.h"

/* include/linux/skbuff.h of the kernel */
#define CHECKSUM_UNNECESSARY 1
#define CHECKSUM_COMPLETE 2
#define CHECKSUM_PARTIAL 3

#define SECOND_NS 1000000000ULL

static __always_inline bool is_wary(void)
{
	__u32 zero = 0;
	struct tcpha_guesses *g = bpf_map_lookup_elem(&guesses, &zero);

	return g && now_ns() < tcpha_now(&g->until_ns);
}

/* Somebody without timestamps has a wrong cookie. CPUs share this: under a flood it is read, and no more. */
static __always_inline void note_guess(void)
{
	__u32 zero = 0;
	struct tcpha_guesses *g = bpf_map_lookup_elem(&guesses, &zero);
	__u64 now = now_ns();

	if (!g)
		return;
	if (now - g->since_ns >= SECOND_NS) {
		g->since_ns = now;
		g->count = 0;
	}
	if (tcpha_now(&g->count) < TCPHA_GUESSES)
		__sync_fetch_and_add(&g->count, 1);
	else if (g->until_ns < now + TCPHA_WARY_NS - SECOND_NS / 2)
		g->until_ns = now + TCPHA_WARY_NS;
}

/*
 * Whether a segment has our cookie. Of a client without timestamps it does not count while we are wary,
 * unless the end of its handshake was seen before. By that, a RST is known, too, which may come without them
 * (RFC 7323 section 3.2).
 */
static __always_inline bool has_cookie(const struct packet *p, const struct tcpha_keys *k,
				       const struct tcpha_shaken *before, struct cookie *c)
{
	bool known;

	c->good = cookie_check(&p->flow, k, p->seq, p->ack, c);
	known = before && before->isn == c->isn && before->ours == c->ours;
	if (known && p->flags & TCPHA_T_RST)
		return true;
	return c->good && (known || c->opt.found & OPT_TS || !is_wary());
}

/* It stands where the SYN stood, which has no IP options. */
struct syn_ack {
	struct iphdr ip;
	struct tcphdr tcp;
	__be32 opt[6]; /* MSS; the others, as they are agreed */
};

/* What is agreed, as a cookie tells. mss: the client's. */
static __always_inline __u32 metadata(__u32 key, __u32 mss, __u32 wscale, __u32 agreed, bool ecn)
{
	__u32 meta = key, i;

#pragma unroll
	for (i = 1; i < 8; i++)
		if (mss >= MSS_VALUES[i])
			meta = (meta & ~(7U << META_MSS)) | i << META_MSS;
	meta |= (agreed & OPT_WSCALE ? wscale : NO_WSCALE) << META_WSCALE;
	meta |= agreed & OPT_SACK ? META_SACK : 0;
	meta |= ecn ? META_ECN : 0;
	return meta;
}

/* The MSS that our answer offers: what the device, the way and our configuration leave room for. */
static __always_inline __u32 our_mss(const struct sk_buff *kernel, const struct tcpha_state *own,
				     const struct way *way)
{
	__u32 mtu = own->mtu, mss;

	if (!mtu || mtu > kernel->dev->mtu)
		mtu = kernel->dev->mtu;
	mss = mtu - conf.headers;
	return mss > way->mss ? way->mss : mss;
}

/* Returns how many words there are. */
static __always_inline __u32 write_options(__be32 opt[6], __u32 mss, __u32 agreed, __u32 tsval, __u32 tsecr)
{
	__u32 n = 1;

	opt[0] = bpf_htonl(0x02040000 | (mss & 0xffff));
	if (agreed & OPT_TS) {
		opt[1] = bpf_htonl(agreed & OPT_SACK ? 0x0402080a : 0x0101080a);
		opt[2] = bpf_htonl(tsval);
		opt[3] = bpf_htonl(tsecr);
		n = 4;
		if (agreed & OPT_WSCALE)
			opt[n++] = bpf_htonl(0x01030300 | conf.wscale);
		return n;
	}
	if (agreed & OPT_SACK)
		opt[n++] = bpf_htonl(0x01010402);
	if (agreed & OPT_WSCALE)
		opt[n++ & 3] = bpf_htonl(0x01030300 | conf.wscale);
	return n;
}

/*
 * All of the headers but for the options, which are there. The checksum is left to whoever would have
 * completed that of the SYN, if it was not complete: our TCP header stands where that one stood. 0, or -1.
 */
static __always_inline int write_headers(struct syn_ack *out, const struct packet *p, __u32 seq, bool ecn,
					 __u32 tcp_len, bool completed)
{
	__s64 check;

	out->ip.version = 4;
	out->ip.ihl = 5;
	out->ip.tot_len = bpf_htons(sizeof(out->ip) + tcp_len);
	out->ip.frag_off = bpf_htons(IP_DF);
	out->ip.ttl = 64;
	out->ip.protocol = IPPROTO_TCP;
	out->ip.saddr = unmap_v4(p->flow.vaddr);
	out->ip.daddr = unmap_v4(p->flow.caddr);
	sum_header(&out->ip);
	out->tcp.source = p->flow.vport;
	out->tcp.dest = p->flow.cport;
	out->tcp.seq = bpf_htonl(seq);
	out->tcp.ack_seq = bpf_htonl(p->seq + 1);
	out->tcp.doff = tcp_len / 4;
	out->tcp.syn = 1;
	out->tcp.ack = 1;
	out->tcp.ece = ecn;
	out->tcp.window = bpf_htons(conf.window);
	check = pseudo_sum(out->ip.saddr, out->ip.daddr, tcp_len);
	check = (check & 0xffffffff) + (check >> 32);
	if (!completed) {
		out->tcp.check = fold(check);
		return 0;
	}
	/* all 24 bytes of options: what is not used is zero */
	check = bpf_csum_diff(0, 0, (void *)&out->tcp, sizeof(out->tcp) + sizeof(out->opt), check);
	out->tcp.check = ~fold(check);
	return check < 0 ? -1 : 0;
}

/* In the place of the SYN. */
static __always_inline int send_back(struct __sk_buff *skb, struct syn_ack *out, __u32 words, struct way *way)
{
	const __u32 fixed = sizeof(out->ip) + sizeof(out->tcp) + 4;

	if (bpf_skb_change_tail(skb, ETH_HLEN + fixed + (words - 1) * 4, 0) < 0 ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, out, fixed, 0) < 0)
		return TC_ACT_SHOT;
	if (words > 1 &&
	    bpf_skb_store_bytes(skb, ETH_HLEN + fixed, &out->opt[1], ((words - 1) & 7) * 4, 0) < 0)
		return TC_ACT_SHOT;
	COUNT(cookies, 1);
	return bpf_redirect_neigh(way->fib.ifindex, &way->hop, sizeof(way->hop), 0);
}

#define T_ECE 64
#define T_CWR 128

/* Answer a SYN with a cookie, in place, if the way back is sure. What is unusual goes to our stack. */
static __always_inline int answer_syn(struct __sk_buff *skb, const struct packet *p,
				      const struct tcpha_state *own)
{
	const struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	const struct tcpha_keys *k = &own->keys;
	__u32 key = k->current & 1, agreed, meta, words;
	struct syn_ack out = {};
	struct options o;
	struct way *way;
	__u64 hash;
	bool ecn;

	way = way_back(skb, &p->flow);
	if (!way)
		return TC_ACT_UNSPEC;
	if (read_options(skb, p, &o) < 0)
		return TC_ACT_SHOT;
	if (o.mss == 0)
		o.mss = 536; /* RFC 9293 section 3.7.1 */
	if (o.mss < MSS_VALUES[0])
		return TC_ACT_UNSPEC; /* the kernel's adoption takes no such connection */
	agreed = o.found & conf.options;
	if (!(agreed & OPT_TS) && is_wary()) {
		COUNT(wary, 1);
		return TC_ACT_UNSPEC;
	}
	ecn = (bpf_ntohs(p->bits) & (T_ECE | T_CWR)) == (T_ECE | T_CWR) && (conf.options & OPT_ECN);
	meta = metadata(key, o.mss, o.wscale, agreed, ecn);
	hash = cookie_hash(&p->flow, k->key[key][0], k->key[key][1], p->seq,
			   meta | (agreed & OPT_TS ? META_TIMED : 0));
	words = write_options(out.opt, our_mss(kernel, own, way), agreed, clock_ms() + (__u32)(hash >> 32),
			      o.tsval);
	if (write_headers(&out, p, ((__u32)hash & ~META_MASK) | meta, ecn, sizeof(out.tcp) + words * 4,
			  BPF_CORE_READ_BITFIELD(kernel, ip_summed) != CHECKSUM_PARTIAL) < 0)
		return TC_ACT_SHOT;
	return send_back(skb, &out, words, way);
}

#endif
