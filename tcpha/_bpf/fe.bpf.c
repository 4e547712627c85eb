// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Front end: packets of handed-over flows go to their back end without waking a process.
 *
 * fe_ingress	tc ingress of the network interfaces
 * fe_tap	tc ingress of the daemon's TAP device: operations, and packets that were held
 * fe_fast	tc ingress of its other TAP device: requests of the packet path, decided
 *
 * The packet path: a SYN is answered here, by cookie; the segment that brings the request goes to user
 * space; what comes back from there goes to a back end as it is, or to a socket of our own. fe_socket.bpf.c
 * makes an object without it.
 */
#include <linux/errno.h>
#include <stdbool.h>

#include "cookie.bpf.h"
#include "flow.h"
#include "route.bpf.h"
#include "verdict.bpf.h"

const volatile struct tcpha_fe_conf conf SEC(".rodata.conf");

#ifndef SOCKET_PATH_ONLY
#define PACKET_PATH true
#else
#define PACKET_PATH false
#endif

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct tcpha_flow);
	__type(value, struct tcpha_entry);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TCPHA_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct tcpha_backend);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_OPS);
	__type(key, __u32);
	__type(value, struct tcpha_offer);
} offers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tcpha_flow);
	__type(value, struct tcpha_shaken);
} shaken SEC(".maps");

/* Ids of flows of the packet path that are over: a late copy of the request must not be served again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tcpha_flow);
	__type(value, __u64);
} served SEC(".maps");

/* When data first came of a connection that nobody knows. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct tcpha_flow);
	__type(value, __u64);
} strangers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_guesses);
} guesses SEC(".maps");

#define GSO_SEGMENTS 64 /* of a packet, about, where nobody has counted them */

/* Room for an entry in the making; the stack has too little. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_entry);
} scratch SEC(".maps");

/* Identifies outer packets that routers may cut: of those, no two may be alike for a while (RFC 6864). */
static __u32 outer_id;

static __always_inline int encapsulate(struct __sk_buff *skb, const struct tcpha_backend *be)
{
	struct iphdr *inner, outer = {};
	__u32 sum = 0, length;
	int i;

	inner = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return -1;
	outer.version = 4;
	outer.ihl = 5;
	outer.tos = inner->tos;
	length = bpf_ntohs(inner->tot_len) ?: skb->len - ETH_HLEN;
	if (length + sizeof(outer) <= 0xffff) /* else 0, as the kernel has it (BIG TCP) */
		outer.tot_len = bpf_htons(length + sizeof(outer));
	outer.frag_off = inner->frag_off; /* keeps DF: path MTU discovery stays honest (RFC 2003) */
	if (!(inner->frag_off & bpf_htons(IP_DF)))
		outer.id = bpf_htons(
			__sync_fetch_and_add(&outer_id, skb->gso_size ? skb->gso_segs ?: GSO_SEGMENTS : 1));
	outer.ttl = 64;
	outer.protocol = IPPROTO_IPIP;
	outer.saddr = unmap_v4(be->src);
	outer.daddr = unmap_v4(be->addr);
#pragma unroll
	for (i = 0; i < 10; i++)
		sum += ((__u16 *)&outer)[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	outer.check = ~sum;
	if (bpf_skb_adjust_room(skb, sizeof(outer), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 |
					BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &outer, sizeof(outer), 0);
}

/* The RTT of the handshake, for the back end, in a field that has no use in packets with DF (RFC 6864). */
static __always_inline void tell_rtt(struct __sk_buff *skb, __u16 rtt_ms)
{
	struct iphdr *ip;
	__u16 id = bpf_htons(rtt_ms);

	ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return;
	bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), ip->id, id, 2);
	bpf_skb_store_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, id), &id, sizeof(id), 0);
}

/* To our own stack. What comes from user space still bears its mark instead of our address. */
static __always_inline int to_stack(struct __sk_buff *skb)
{
	bpf_skb_change_type(skb, PACKET_HOST);
	return TC_ACT_UNSPEC;
}

static __always_inline int to_backend(struct __sk_buff *skb, const struct tcpha_backend *be)
{
	struct bpf_redir_neigh nh = {.nh_family = AF_INET};
	long ret;

	if (be->mode == TCPHA_LOCAL)
		return to_stack(skb);
	if (be->mode == TCPHA_TUNNEL && encapsulate(skb, be) < 0) {
		COUNT(unreachable, 1);
		return TC_ACT_SHOT;
	}
	/* resolves the neighbour and writes the Ethernet header, so no MAC address is cached here */
	nh.ipv4_nh = unmap_v4(be->nexthop);
	ret = bpf_redirect_neigh(be->ifindex, &nh, sizeof(nh), 0);
	if (ret == TC_ACT_SHOT)
		COUNT(unreachable, 1);
	return ret;
}

/* include/linux/skbuff.h of the kernel */
#define CHECKSUM_UNNECESSARY 1
#define CHECKSUM_COMPLETE 2
#define CHECKSUM_PARTIAL 3

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

struct icmp_too_big { /* RFC 1191 section 4; linux/icmp.h needs more of libc than there is for BPF */
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 unused;
	__be16 mtu;
};

/*
 * Tell the client that its packet is too big: ICMP destination unreachable, fragmentation needed (RFC 1191),
 * quoting the headers. The kernel, too, sends as many of these as are asked for. What user space has written
 * does not come from the client's device: that is dropped, and the client repeats it.
 *
 * A packet whose TCP checksum a device is to complete cannot be cut before that. It will be completed in the
 * quotation: the sum of what it is made from is known then, whatever that is (see lco_csum() of the kernel).
 * The quoted IP header, which is right, adds nothing.
 */
__noinline int tell_too_big(struct __sk_buff *skb, __u32 room)
{
	struct {
		__u16 align;
		struct ethhdr eth;
		struct iphdr ip;
		struct icmp_too_big icmp;
	} out = {};
	const __u32 before_check = __builtin_offsetof(struct tcphdr, check);
	struct headers h;
	__u32 sum = 0, quoted, i;
	__s64 whole, partial;

	if (skb->ifindex == conf.tap || skb->ifindex == conf.fast_tap || parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	out.icmp.type = 3;
	out.icmp.code = 4;
	out.icmp.mtu = bpf_htons(room);
	partial = bpf_csum_diff(0, 0, (void *)&out.icmp, sizeof(out.icmp), (__u16)~h.tcp->check);
	whole = bpf_csum_diff(0, 0, (void *)&out.icmp, sizeof(out.icmp), 0);
	if (partial < 0 || whole < 0)
		return TC_ACT_SHOT;
	whole = bpf_csum_diff(0, 0, (void *)h.tcp, before_check, whole);
	if (whole < 0)
		return TC_ACT_SHOT;
	__builtin_memcpy(out.eth.h_dest, h.eth->h_source, ETH_ALEN);
	__builtin_memcpy(out.eth.h_source, h.eth->h_dest, ETH_ALEN);
	out.eth.h_proto = h.eth->h_proto;
	out.ip.version = 4;
	out.ip.ihl = 5;
	out.ip.tos = 0xc0; /* internetwork control (RFC 1812 section 4.3.2.5) */
	out.ip.frag_off = bpf_htons(IP_DF);
	out.ip.ttl = 64;
	out.ip.protocol = IPPROTO_ICMP;
	out.ip.saddr = h.ip->daddr;
	out.ip.daddr = h.ip->saddr;
	quoted = h.ip->ihl * 4 + before_check;
	out.icmp.checksum = ~fold(whole);
	if (bpf_skb_change_tail(skb, ETH_HLEN + quoted, 0) < 0) {
		quoted += sizeof(struct tcphdr) - before_check;
		out.icmp.checksum = ~fold(partial);
		if (bpf_skb_change_tail(skb, ETH_HLEN + quoted, 0) < 0)
			return TC_ACT_SHOT;
	}
	out.ip.tot_len = bpf_htons(sizeof(out.ip) + sizeof(out.icmp) + quoted);
#pragma unroll
	for (i = 0; i < 10; i++)
		sum += ((__u16 *)&out.ip)[i];
	out.ip.check = ~fold(sum);
	if (bpf_skb_adjust_room(skb, sizeof(out.ip) + sizeof(out.icmp), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0 ||
	    bpf_skb_store_bytes(skb, 0, &out.eth, sizeof(out.eth) + sizeof(out.ip) + sizeof(out.icmp), 0) < 0)
		return TC_ACT_SHOT;
	COUNT(too_big, 1);
	return bpf_redirect(skb->ifindex, 0);
}

/*
 * Whether a client's packet, or each segment of it, gets through to a back end. One without DF does: routers
 * cut what is around it.
 */
static __always_inline bool fits(struct __sk_buff *skb, __u32 room)
{
	struct headers h;

	if (!skb->gso_size && skb->len - ETH_HLEN <= room)
		return true;
	if (parse_tcp(skb, 0, &h) < 0)
		return true;
	return !(h.ip->frag_off & bpf_htons(IP_DF)) ||
	       (skb->gso_size && h.ip->ihl * 4 + h.tcp->doff * 4 + skb->gso_size <= room);
}

/* Where urgent data end, in bytes from a segment's first one on (RFC 6093); 0: it does not bear URG. */
static __always_inline __u32 urgent_end(const struct headers *h)
{
	return h->tcp->urg ? bpf_ntohs(h->tcp->urg_ptr) ?: 1 : 0;
}

/* 'at': the TCP header. 0, or an error. */
static __always_inline int clear_urg(struct __sk_buff *skb, __u32 at)
{
	__be16 old, new; /* data offset and flags */

	if (bpf_skb_load_bytes(skb, at + 12, &old, sizeof(old)))
		return -1;
	new = old & ~bpf_htons(TCPHA_T_URG);
	return new != old && (bpf_l4_csum_replace(skb, at + __builtin_offsetof(struct tcphdr, check), old,
						  new, sizeof(new)) ||
			      bpf_skb_store_bytes(skb, at + 12, &new, sizeof(new), 0));
}

/*
 * The first segment of a connection is about to leave for its back end: make it ours. A client that is told
 * that its segment is too big must not see that. Of urgent data behind the segment, the next one tells, too.
 */
static __always_inline int put_tag(struct __sk_buff *skb, const struct tcpha_flow *flow,
				   const struct tcpha_entry *e)
{
	__u32 zero = 0, ack = e->first_ack;
	struct tcpha_state *own = bpf_map_lookup_elem(&state, &zero);
	struct iphdr *ip = (void *)(long)skb->data + ETH_HLEN;
	__u32 at;
	__u64 hash;

	if (!own || (void *)(ip + 1) > (void *)(long)skb->data_end)
		return -1;
	at = ETH_HLEN + ip->ihl * 4;
	hash = tag_hash(flow, &own->keys, e->first_seq - 1, (ack - 1) & META_MASK);
	return clear_urg(skb, at) || write_tag(skb, at, tag_ack(ack, hash), tag_urgent(hash));
}

/* first: it makes the connection. */
static __always_inline int forward(struct __sk_buff *skb, const struct tcpha_flow *flow,
				   struct tcpha_entry *e, bool first)
{
	struct tcpha_backend *be;
	__u32 index = *(volatile __u32 *)&e->backend;
	__u32 segments = skb->gso_segs ?: 1;
	__u32 bytes = skb->len - ETH_HLEN;
	__u32 room;
	int ret;

	if (*(volatile __u32 *)&e->tag != tcpha_tag(flow))
		return TC_ACT_SHOT; /* it is gone, and so may be all that was known of the flow */
	be = bpf_map_lookup_elem(&backends, &index);
	if (!be || !be->mode) {
		COUNT(unreachable, 1);
		return TC_ACT_SHOT;
	}
	room = be->mtu - (be->mode == TCPHA_TUNNEL ? sizeof(struct iphdr) : 0);
	if (be->mtu && !fits(skb, room))
		return tell_too_big(skb, room);
	if (first && put_tag(skb, flow, e))
		return TC_ACT_SHOT;
	__sync_fetch_and_add(&e->packets, segments);
	__sync_fetch_and_add(&e->bytes, bytes);
	ret = to_backend(skb, be);
	if (ret == TC_ACT_REDIRECT) {
		COUNT(forwarded, segments);
		COUNT(forwarded_bytes, bytes);
	}
	return ret;
}

/*
 * To user space, which finds the connection by the slot in the destination MAC address. By the count, it
 * knows whether all have arrived there: until they have gone on, none that follows may go by itself.
 */
static __always_inline int hold(struct __sk_buff *skb, const struct tcpha_flow *flow, struct tcpha_entry *e)
{
	__u8 mac[ETH_ALEN] = {TCPHA_MAC_MARK >> 8, TCPHA_MAC_MARK & 0xff};
	__u32 slot = e->slot, held = __sync_fetch_and_add(&e->held, 1);

	if (held & TCPHA_FLOWING)
		return held & TCPHA_OURS ? to_stack(skb) : forward(skb, flow, e, false);
	__builtin_memcpy(mac + 2, &slot, sizeof(slot));
	if (bpf_skb_store_bytes(skb, 0, mac, sizeof(mac), 0) < 0)
		return TC_ACT_SHOT;
	COUNT(held, 1);
	return bpf_redirect(conf.tap, 0);
}

static __always_inline void flow_of(const struct headers *h, struct tcpha_flow *flow)
{
	map_v4(flow->caddr, h->ip->saddr);
	map_v4(flow->vaddr, h->ip->daddr);
	flow->cport = h->tcp->source;
	flow->vport = h->tcp->dest;
}

/* Bytes of a segment's payload. A total length of 0 stands for one that 16 bits cannot hold (BIG TCP). */
static __always_inline __u32 payload(const struct __sk_buff *skb, const struct headers *h)
{
	__u32 length = bpf_ntohs(h->ip->tot_len) ?: skb->len - ETH_HLEN;

	return length - h->ip->ihl * 4 - h->tcp->doff * 4;
}

/* Whether a packet belongs to the flow of an entry of its name, and not to our stack. */
static __always_inline bool is_of(const struct __sk_buff *skb, const struct tcpha_flow *flow,
				  struct tcpha_entry *e, const struct headers *h)
{
	if (*(volatile __u32 *)&e->tag != tcpha_tag(flow))
		return false;
	switch (tcpha_classify(e, ((__u8 *)h->tcp)[13], bpf_ntohl(h->tcp->seq), payload(skb, h), now_ns())) {
	case TCPHA_TO_STACK:
		return false;
	case TCPHA_TO_LIVE:
		COUNT(live_syn, 1);
	}
	return true;
}

/* To the back end, to user space, or nowhere, as the entry says. */
static __always_inline int follow_entry(struct __sk_buff *skb, const struct tcpha_flow *flow,
					struct tcpha_entry *e)
{
	__u32 state = tcpha_state_of(e);

	if (tcpha_is_forwarded(state))
		return forward(skb, flow, e, false);
	if (state == TCPHA_HELD || state == TCPHA_DRAINING)
		return hold(skb, flow, e);
	/* it was given back a moment ago */
	return !(e->flags & TCPHA_F_FAST) && e->held & TCPHA_OURS ? to_stack(skb) : TC_ACT_SHOT;
}

/* The packet path */

/* A frame for a worker. */
static __always_inline int to_worker(struct __sk_buff *skb, __u8 kind)
{
	__u8 mac[ETH_ALEN] = {TCPHA_MAC_FAST >> 8, TCPHA_MAC_FAST & 0xff, kind};

	if (bpf_skb_store_bytes(skb, 0, mac, sizeof(mac), 0) < 0)
		return TC_ACT_SHOT;
	return bpf_redirect(conf.fast_tap, 0);
}

/* The sum of a pseudo-header: RFC 9293 section 3.1. */
static __always_inline __u64 pseudo_sum(__be32 saddr, __be32 daddr, __u32 tcp_len)
{
	return (__u64)saddr + daddr + bpf_htons(IPPROTO_TCP) + bpf_htons(tcp_len);
}

/*
 * Whether a segment is known to be undamaged, so that what is in it may decide: its checksum was verified, or
 * has not been made yet. A device that has summed the whole packet says with what result; the IP header,
 * which is right, adds nothing.
 */
static __always_inline bool is_sound(struct __sk_buff *skb, const struct tcpha_flow *flow, __u32 tcp_len)
{
	const struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	__u32 summed = BPF_CORE_READ_BITFIELD(kernel, ip_summed);

	if (summed == CHECKSUM_COMPLETE)
		return fold(pseudo_sum(unmap_v4(flow->caddr), unmap_v4(flow->vaddr), tcp_len) +
			    kernel->csum) == 0xffff;
	return summed == CHECKSUM_UNNECESSARY || summed == CHECKSUM_PARTIAL;
}

#define SECOND_NS 1000000000ULL

static __always_inline bool is_wary(void)
{
	__u32 zero = 0;
	struct tcpha_guesses *g = bpf_map_lookup_elem(&guesses, &zero);

	return g && now_ns() < *(volatile __u64 *)&g->until_ns;
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
	if (*(volatile __u32 *)&g->count < TCPHA_GUESSES)
		__sync_fetch_and_add(&g->count, 1);
	else if (g->until_ns < now + TCPHA_WARY_NS - SECOND_NS / 2)
		g->until_ns = now + TCPHA_WARY_NS;
}

/*
 * Whether a segment has our cookie. Of a client without timestamps it does not count while we are wary,
 * unless the end of its handshake was seen before; by that, a RST is known, too, which may come without them
 * (RFC 7323 section 3.2).
 */
static __always_inline bool has_cookie(const struct tcpha_flow *flow, const struct tcpha_keys *k, __u32 seq,
				       __u32 ack, bool reset, const struct tcpha_shaken *before,
				       struct cookie *c)
{
	bool known;

	c->good = cookie_check(flow, k, seq, ack, c);
	known = before && before->isn == c->isn && before->ours == c->ours;
	if (known && reset)
		return true;
	return c->good && (known || c->opt.found & OPT_TS || !is_wary());
}

/*
 * Answer a SYN with a cookie, in place, if the way back is sure. No IP options in it. The checksum is left to
 * whoever would have completed that of the SYN, if it was not complete: our TCP header stands where that one
 * stood.
 */
static __always_inline int answer_syn(struct __sk_buff *skb, const struct headers *h,
				      const struct tcpha_flow *flow, const struct tcpha_state *own)
{
	struct {
		struct iphdr ip;
		struct tcphdr tcp;
		__be32 opt[6];
	} out = {};
	const struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	struct options o;
	const struct tcpha_keys *k = &own->keys;
	__u32 key = k->current & 1, meta = key, isn, n = 1, tcp_len, i, found, sum = 0;
	__u32 mtu = own->mtu, mss;
	struct way *way;
	__u64 hash;
	__s64 check;
	bool ecn;

	way = way_back(skb, h);
	if (!way)
		return TC_ACT_UNSPEC;
	out.ip.saddr = h->ip->daddr;
	out.ip.daddr = h->ip->saddr;
	out.tcp.source = h->tcp->dest;
	out.tcp.dest = h->tcp->source;
	isn = bpf_ntohl(h->tcp->seq);
	ecn = h->tcp->ece && h->tcp->cwr && (conf.options & 8);
	if (read_options(skb, ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr),
			 h->tcp->doff * 4 - sizeof(struct tcphdr), &o) < 0)
		return TC_ACT_SHOT;
	if (o.mss == 0)
		o.mss = 536; /* RFC 9293 section 3.7.1 */
	if (o.mss < MSS_VALUES[0])
		return TC_ACT_UNSPEC; /* the kernel's adoption takes no such connection */
	found = o.found & conf.options;
	if (!(found & OPT_TS) && is_wary()) {
		COUNT(wary, 1);
		return TC_ACT_UNSPEC;
	}
#pragma unroll
	for (i = 1; i < 8; i++)
		if (o.mss >= MSS_VALUES[i])
			meta = (meta & ~(7U << META_MSS)) | i << META_MSS;
	meta |= (found & OPT_WSCALE ? o.wscale : NO_WSCALE) << META_WSCALE;
	meta |= found & OPT_SACK ? META_SACK : 0;
	meta |= ecn ? META_ECN : 0;
	hash = cookie_hash(flow, k->key[key][0], k->key[key][1], isn,
			   meta | (found & OPT_TS ? META_TIMED : 0));

	if (!mtu || mtu > kernel->dev->mtu)
		mtu = kernel->dev->mtu;
	mss = mtu - conf.headers;
	if (mss > way->mss)
		mss = way->mss;
	out.opt[0] = bpf_htonl(0x02040000 | (mss & 0xffff));
	if (found & OPT_TS) {
		out.opt[1] = bpf_htonl(found & OPT_SACK ? 0x0402080a : 0x0101080a);
		out.opt[2] = bpf_htonl(clock_ms() + (__u32)(hash >> 32));
		out.opt[3] = bpf_htonl(o.tsval);
		n = 4;
		if (found & OPT_WSCALE)
			out.opt[n++] = bpf_htonl(0x01030300 | conf.wscale);
	} else {
		if (found & OPT_SACK)
			out.opt[n++] = bpf_htonl(0x01010402);
		if (found & OPT_WSCALE)
			out.opt[n++ & 3] = bpf_htonl(0x01030300 | conf.wscale);
	}
	tcp_len = sizeof(struct tcphdr) + n * 4;
	out.ip.version = 4;
	out.ip.ihl = 5;
	out.ip.tot_len = bpf_htons(sizeof(struct iphdr) + tcp_len);
	out.ip.frag_off = bpf_htons(IP_DF);
	out.ip.ttl = 64;
	out.ip.protocol = IPPROTO_TCP;
#pragma unroll
	for (i = 0; i < 10; i++)
		sum += ((__u16 *)&out.ip)[i];
	sum = (sum & 0xffff) + (sum >> 16);
	out.ip.check = ~((sum & 0xffff) + (sum >> 16));
	out.tcp.seq = bpf_htonl(((__u32)hash & ~META_MASK) | meta);
	out.tcp.ack_seq = bpf_htonl(isn + 1);
	out.tcp.doff = 5 + n;
	out.tcp.syn = 1;
	out.tcp.ack = 1;
	out.tcp.ece = ecn;
	out.tcp.window = bpf_htons(conf.window);
	check = pseudo_sum(out.ip.saddr, out.ip.daddr, tcp_len);
	check = (check & 0xffffffff) + (check >> 32);
	if (BPF_CORE_READ_BITFIELD(kernel, ip_summed) != CHECKSUM_PARTIAL) {
		/* all 24 bytes of options: what is not used is zero */
		check = bpf_csum_diff(0, 0, (void *)&out.tcp, sizeof(out.tcp) + sizeof(out.opt), check);
		if (check < 0)
			return TC_ACT_SHOT;
		out.tcp.check = ~fold(check);
	} else {
		out.tcp.check = fold(check);
	}
	if (bpf_skb_change_tail(skb, ETH_HLEN + sizeof(struct iphdr) + tcp_len, 0) < 0 ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, &out.ip, sizeof(out.ip) + sizeof(out.tcp) + 4, 0) < 0)
		return TC_ACT_SHOT;
	if (n > 1 && bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(out.ip) + sizeof(out.tcp) + 4, &out.opt[1],
					 ((n - 1) & 7) * 4, 0) < 0)
		return TC_ACT_SHOT;
	COUNT(cookies, 1);
	return bpf_redirect_neigh(way->fib.ifindex, &way->hop, sizeof(way->hop), 0);
}

/* The state of the socket that owns a flow on this host; 0: none does. */
static __always_inline __u32 owner(struct __sk_buff *skb, struct bpf_sock_tuple *t)
{
	struct bpf_sock *skc = bpf_skc_lookup_tcp(skb, t, sizeof(t->ipv4), BPF_F_CURRENT_NETNS, 0);
	__u32 state;

	if (!skc)
		return 0;
	state = skc->state;
	bpf_sk_release(skc);
	return state;
}

/*
 * A connection whose handshake's ACK and request are both late or lost shows first what comes behind them,
 * and nothing in that proves the cookie. So a RST has to wait until the client has repeated its request:
 * longer than the first RTO of whoever has measured the RTT of the handshake (RFC 6298). The RST for a
 * connection that is dead indeed is for the client's retransmission.
 */
#define EARLY_NS 1000000000ULL
#define STRANGER_NS 60000000000ULL

static __always_inline bool may_be_early(const struct tcpha_flow *flow)
{
	__u64 now = now_ns(), *since = bpf_map_lookup_elem(&strangers, flow);

	if (since && now - *since < STRANGER_NS)
		return now - *since < EARLY_NS;
	bpf_map_update_elem(&strangers, flow, &now, BPF_ANY);
	return true;
}

/* no TC_ACT_* */
#define DECIDED 1000  /* there is a fresh entry by which the packet may go on */
#define ACCEPTED 1001 /* it makes a socket of our own */

#define GOING_ROUNDS 4096 /* far longer than another CPU needs from TCPHA_GONE to what becomes of it */

static long has_gone(__u32 i, void *ctx)
{
	const struct tcpha_flow *flow = ctx;
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, flow);

	(void)i;
	return !e || tcpha_state_of(e) != TCPHA_GONE;
}

/*
 * Make an entry ours to replace; its phase was *was. Another CPU may have been first: if it had a copy of
 * our segment, that one goes on (-1). If it removes the entry, there is soon none to replace (0). It is
 * looked up once more, as the memory of one that is gone may be another flow's at any time.
 */
static __always_inline int claim(struct tcpha_entry *e, struct tcpha_flow *flow, __u64 *was)
{
	struct tcpha_entry *now = bpf_map_lookup_elem(&flows, flow);

	if (now != e)
		return now ? -1 : 0;
	*was = tcpha_claim(e);
	if (tcpha_phase_state(*was) != TCPHA_GONE)
		return 1;
	bpf_loop(GOING_ROUNDS, has_gone, flow, 0);
	return bpf_map_lookup_elem(&flows, flow) ? -1 : 0;
}

/* As in _fast/message.pyx. */
static __always_inline __u64 fast_id(const struct cookie *c)
{
	return 1ULL << 63 | (__u64)c->isn << 31 | c->ours >> 1;
}

/*
 * A packet to the VIP that belongs to no back end; e: the entry of an older flow of its name, or 0.
 * Whatever is unusual goes to our stack.
 */
static __always_inline int without_flow(struct __sk_buff *skb, const struct headers *h, struct tcpha_entry *e)
{
	struct bpf_sock_tuple t = {};
	struct tcpha_shaken *before, now = {};
	struct tcpha_entry *fresh;
	struct tcpha_state *own;
	struct tcpha_keys *k;
	struct tcpha_flow flow;
	struct cookie c = {};
	__u8 accept[3] = {TCPHA_MAC_FAST >> 8, TCPHA_MAC_FAST & 0xff, TCPHA_FAST_ACCEPT};
	__u32 zero = 0, length, seq, ack, doff, offset, socket, older = 0, rtt_ms;
	__u8 flags = ((__u8 *)h->tcp)[13];
	__be16 window;
	__u64 was = 0, id, *over;
	long failed;
	int claimed;
	bool hit;

	own = bpf_map_lookup_elem(&state, &zero);
	if (!own)
		return TC_ACT_UNSPEC;
	k = &own->keys;
	flow_of(h, &flow);
	tuple_of(&flow, &t);
	socket = owner(skb, &t);
	if (socket && socket != BPF_TCP_LISTEN)
		return TC_ACT_UNSPEC;
	if (flags & TCPHA_T_SYN) {
		if (!socket)
			return TC_ACT_UNSPEC; /* which refuses it */
		if ((flags & (TCPHA_T_ACK | TCPHA_T_RST | TCPHA_T_FIN)) || h->ip->ihl != 5 ||
		    h->tcp->doff < 5 || !k->used)
			return TC_ACT_UNSPEC;
		return answer_syn(skb, h, &flow, own);
	}
	if (!(flags & TCPHA_T_ACK) || h->tcp->doff < 5)
		return TC_ACT_UNSPEC;
	length = payload(skb, h);
	seq = bpf_ntohl(h->tcp->seq);
	ack = bpf_ntohl(h->tcp->ack_seq);
	window = h->tcp->window;
	doff = h->tcp->doff * 4;
	offset = ETH_HLEN + h->ip->ihl * 4 + doff;
	if (read_options(skb, ETH_HLEN + h->ip->ihl * 4 + sizeof(struct tcphdr), doff - sizeof(struct tcphdr),
			 &c.opt) < 0)
		return TC_ACT_SHOT;
	before = bpf_map_lookup_elem(&shaken, &flow);
	if (!has_cookie(&flow, k, seq, ack, flags & TCPHA_T_RST, before, &c)) {
		if (before && seq - before->isn < TCPHA_LEAP) /* or a keep-alive probe */
			return seq != before->isn && length ? to_worker(skb, TCPHA_FAST_EARLY) : TC_ACT_SHOT;
		/*
		 * Another CPU may have had the first segment in its hands since we looked for an entry.
		 * First there is an entry, and perhaps a socket in its place; then 'shaken' forgets.
		 */
		if (owner(skb, &t) != BPF_TCP_LISTEN)
			return TC_ACT_UNSPEC;
		fresh = bpf_map_lookup_elem(&flows, &flow);
		if (fresh && fresh != e)
			return DECIDED;
		COUNT(forged, 1);
		if (!c.good && !(c.opt.found & OPT_TS)) /* or clients whom we left out would keep us wary */
			note_guess();
		if ((length || flags & TCPHA_T_FIN) && may_be_early(&flow))
			return TC_ACT_SHOT;
		return TC_ACT_UNSPEC; /* which says so with a RST */
	}
	if (flags & TCPHA_T_RST) {
		bpf_map_delete_elem(&shaken, &flow);
		return TC_ACT_SHOT;
	}
	id = fast_id(&c);
	over = bpf_map_lookup_elem(&served, &flow);
	if (over && *over == id)
		return TC_ACT_SHOT;
	/*
	 * Our daemon was killed, and this client had our SYN-ACK by then. The next run serves it, when it
	 * repeats this.
	 */
	if (!socket && (length || flags & TCPHA_T_FIN))
		return TC_ACT_SHOT;
	/* of urgent data, the server reads other bytes than there are in the segment: ours must, too */
	if (flags & (TCPHA_T_FIN | TCPHA_T_URG))
		goto accept;
	if (length == 0) {
		if (!before || before->isn != c.isn) {
			now.since_ns = now_ns();
			now.isn = c.isn;
			now.ours = c.ours;
			now.rtt_ms = c.rtt_ms;
			now.tsval = c.opt.tsval;
			now.tsecr = c.opt.tsecr;
			now.timestamps = (c.opt.found & OPT_TS) != 0;
			now.window = bpf_ntohs(window);
			bpf_map_update_elem(&shaken, &flow, &now, BPF_ANY);
		}
		return TC_ACT_SHOT;
	}
	fresh = bpf_map_lookup_elem(&scratch, &zero);
	if (!fresh)
		return TC_ACT_SHOT;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->tag = tcpha_tag(&flow);
	fresh->flags = TCPHA_F_FAST;
	fresh->start_ns = fresh->last_ns = now_ns();
	fresh->end_seq = fresh->first_seq = seq;
	fresh->first_ack = ack;
	rtt_ms = before && before->isn == c.isn ? before->rtt_ms : c.rtt_ms;
	fresh->rtt_ms = rtt_ms > 0xffff ? 0xffff : rtt_ms;
	if (e) {
		claimed = claim(e, &flow, &was);
		if (claimed < 0)
			return TC_ACT_SHOT;
		if (!claimed)
			e = 0;
	}
	hit = is_sound(skb, &flow, doff + length) && decide(skb, offset, length, fresh);
	if (e)
		older = tcpha_owed(was, e->backend);
	if (hit)
		tcpha_forward(fresh, id);
	else
		tcpha_begin(fresh, older); /* user space counts that it is over */
	failed = bpf_map_update_elem(&flows, &flow, fresh, e ? BPF_ANY : BPF_NOEXIST);
	if (failed) {
		if (e)
			tcpha_unclaim(e, was);
		if (failed == -EEXIST)
			return TC_ACT_SHOT;
		goto accept; /* the table is full: a socket can say so, with 503 */
	}
	bpf_map_delete_elem(&shaken, &flow);
	if (!hit) {
		COUNT(requests, 1);
		return to_worker(skb, TCPHA_FAST_FIRST);
	}
	count_load(fresh->backend, fresh->rule, older);
	COUNT(cached, 1);
	return DECIDED;
accept:
	if (is_shared(skb))
		return bpf_skb_store_bytes(skb, 0, accept, sizeof(accept), 0) < 0
			       ? TC_ACT_SHOT
			       : bpf_redirect(conf.fast_tap, BPF_F_INGRESS);
	bpf_map_delete_elem(&shaken, &flow);
	return cookie_accept(skb, &t, &c, conf.wscale, c.rtt_ms) ? TC_ACT_SHOT : ACCEPTED;
}

/*
 * To the worker, behind the flow's request. Until it has sent all such on, and that, none that comes later
 * may go by itself.
 */
static __always_inline int to_worker_later(struct __sk_buff *skb, struct tcpha_entry *e)
{
	__sync_fetch_and_add(&e->behind, 1);
	return to_worker(skb, TCPHA_FAST_LATER);
}

#define BEHIND_NS 1000000000ULL /* far longer than a worker needs: one that is still counted was lost */

/* Whether packets of a flow that has its back end are still with a worker. */
static __always_inline bool is_crowded(const struct tcpha_entry *e)
{
	return *(volatile __u32 *)&e->behind && now_ns() - e->start_ns < BEHIND_NS;
}

/* A request is no back end's any more. Another CPU may have offered it to the next one by now. */
static __always_inline void begin_anew(struct tcpha_entry *e)
{
	__sync_fetch_and_and(&e->flags, TCPHA_F_FAST);
}

/*
 * A packet of a flow that took the packet path; urgent: see urgent_end(); passed: by a worker, so nothing is
 * before it. A function of its own for the verifier, too.
 */
static __always_inline int fast_flow(struct __sk_buff *skb, const struct tcpha_flow *flow,
				     struct tcpha_entry *e, __u32 seq, __u32 ack, __u32 length, __u32 urgent,
				     bool passed)
{
	struct tcpha_backend *be;
	__u32 index, state;
	bool first;

	if (!e)
		return TC_ACT_SHOT;
	first = seq == e->first_seq && length;
	index = e->backend;
	state = tcpha_state_of(e);
	if (tcpha_is_pending(state))
		return first ? to_worker(skb, TCPHA_FAST_FIRST) : to_worker_later(skb, e);
	if (first && tcpha_is_over(state))
		return TC_ACT_SHOT; /* a late copy: it must not be served a second time */
	if (ack != e->first_ack && !(e->flags & TCPHA_F_ANSWERED))
		e->flags |= TCPHA_F_ANSWERED; /* once: another CPU may be about to change another flag */
	first = first && !(e->flags & TCPHA_F_ANSWERED);
	if (first) {
		be = bpf_map_lookup_elem(&backends, &index);
		if (be && be->down) { /* it was not served: another back end may */
			if (!tcpha_retry(e, e->id, index))
				return TC_ACT_SHOT; /* a copy of this segment, on another CPU, goes on */
			begin_anew(e);
			return to_worker(skb, TCPHA_FAST_FIRST);
		}
	}
	/*
	 * A copy with an urgent byte in it: of that, the server would read other bytes than we did. The back
	 * end's socket may have it, if there is one; if not, the connection comes back to us (DOUBT).
	 */
	if (urgent && urgent <= length)
		first = false;
	if (first)
		tell_rtt(skb, e->rtt_ms);
	else if (!passed && is_crowded(e))
		return to_worker_later(skb, e);
	return forward(skb, flow, e, first);
}

/*
 * An ICMP error about a segment that a back end sent in the name of the VIP belongs to that back end: it has
 * the connection, and looks whether it ever sent such a segment. Path MTU discovery needs this (RFC 1191).
 */
static __always_inline int forward_icmp(struct __sk_buff *skb)
{
	struct tcpha_backend *be;
	struct tcpha_entry *e;
	struct tcpha_flow flow;
	__u32 index;

	if (parse_icmp_error(skb, 0, unmap_v4(conf.vaddr), &flow) < 0 || flow.vport != conf.vport)
		return TC_ACT_UNSPEC;
	e = bpf_map_lookup_elem(&flows, &flow);
	if (!e || !tcpha_is_forwarded(tcpha_state_of(e)))
		return TC_ACT_UNSPEC;
	index = e->backend;
	be = bpf_map_lookup_elem(&backends, &index);
	if (!be || !be->mode)
		return TC_ACT_SHOT;
	COUNT(icmp, 1);
	return to_backend(skb, be);
}

/*
 * The first fragment of a segment for the VIP. Our stack puts the fragments together, and the mark, which
 * the whole keeps, sends that to user space, from where it comes back in one piece.
 */
static __always_inline void mark_fragment(struct __sk_buff *skb)
{
	struct iphdr ip;
	__be16 dport;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_TCP || ip.daddr != unmap_v4(conf.vaddr) ||
	    (ip.frag_off & bpf_htons(IP_MF | IP_OFFSET)) != bpf_htons(IP_MF))
		return;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + ip.ihl * 4 + 2, &dport, sizeof(dport)) == 0 &&
	    dport == conf.vport)
		skb->mark = TCPHA_MARK_FRAGMENT;
}

/* Whether our stack would answer a packet with a RST, and that would be too early: see drop_strangers. */
static __always_inline bool drop_stranger(struct __sk_buff *skb, const struct headers *h)
{
	struct bpf_sock_tuple t = {};
	struct tcpha_state *own;
	struct tcpha_flow flow;
	__u32 zero = 0, socket;

	own = bpf_map_lookup_elem(&state, &zero);
	if (!own || !own->drop_strangers || h->tcp->syn)
		return false;
	flow_of(h, &flow);
	tuple_of(&flow, &t);
	socket = owner(skb, &t);
	return !socket || socket == BPF_TCP_LISTEN;
}

SEC("tc")
int fe_ingress(struct __sk_buff *skb)
{
	struct tcpha_entry *e;
	struct tcpha_flow flow;
	struct headers h;
	__u32 seq, ack, length;
	int verdict;

	if (!is_for_us(skb))
		return TC_ACT_UNSPEC;
	if (parse_tcp(skb, 0, &h) < 0) {
		mark_fragment(skb);
		return forward_icmp(skb);
	}
	if (h.ip->daddr != unmap_v4(conf.vaddr) || h.tcp->dest != conf.vport)
		return TC_ACT_UNSPEC;
	flow_of(&h, &flow);
	seq = bpf_ntohl(h.tcp->seq);
	ack = bpf_ntohl(h.tcp->ack_seq);
	length = h.tcp->syn ? 0 : payload(skb, &h);
	e = bpf_map_lookup_elem(&flows, &flow);
	if (e && (e->flags & TCPHA_F_FAST) && h.tcp->syn && seq + 1 == e->first_seq)
		return TC_ACT_SHOT; /* a late copy of the SYN that the flow began with */
	if (!e || !is_of(skb, &flow, e, &h)) {
		verdict = PACKET_PATH ? without_flow(skb, &h, e) : TC_ACT_UNSPEC;
		if (verdict == TC_ACT_UNSPEC && parse_tcp(skb, 0, &h) == 0 && drop_stranger(skb, &h))
			return TC_ACT_SHOT;
		if (verdict == ACCEPTED)
			return TC_ACT_UNSPEC;
		if (verdict != DECIDED)
			return verdict;
		e = bpf_map_lookup_elem(&flows, &flow);
		if (!e || parse_tcp(skb, 0, &h) < 0 || !is_of(skb, &flow, e, &h))
			return TC_ACT_SHOT;
	}
	if (e->flags & TCPHA_F_FAST)
		return fast_flow(skb, &flow, e, seq, h.tcp->ack ? ack : e->first_ack, length, urgent_end(&h),
				 false);
	return follow_entry(skb, &flow, e);
}

/*
 * What user space wants of an entry. It could not do so itself: between its look and its update, a packet
 * may change the entry or put another in its place.
 */
static __always_inline void remove_entry(const struct tcpha_flow *flow, const struct tcpha_entry *e,
					 bool served_it)
{
	__u64 id = e->id;

	if (PACKET_PATH && served_it && (e->flags & TCPHA_F_FAST) && (e->flags & TCPHA_F_ANSWERED))
		bpf_map_update_elem(&served, flow, &id, BPF_ANY);
	bpf_map_delete_elem(&flows, flow);
}

static __always_inline void change_entry(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || !op->id)
		return;
	if (op->kind == TCPHA_OP_TAKE_BACK ? !tcpha_take_back(e, op->id) : !tcpha_end(e, op->id, op->keep))
		return;
	op->result = TCPHA_R_OK;
	if (op->kind == TCPHA_OP_TAKE_BACK)
		begin_anew(e);
	else if (!op->keep)
		remove_entry(&op->flow, e, true);
}

/*
 * A back end has a connection whose packets were held. Packets must not overtake each other: those that user
 * space has kept go first, while all others still go there. That they may go by themselves is decided
 * together with whether one more has come.
 */
static __always_inline void hand_over(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e)
		return;
	if (tcpha_was_handed(e, op->id)) /* tried again, as what follows this went wrong */
		op->result = TCPHA_R_OK;
	if (tcpha_state_of(e) != TCPHA_HELD)
		return;
	e->id = op->id;
	e->backend = op->backend;
	e->rule = op->rule;
	e->flags = op->flags;
	e->end_seq = op->end_seq;
	e->ahead_seq = e->ahead_end = 0;
	if (tcpha_hand_over(e))
		op->result = TCPHA_R_OK;
}

/* Whether what was held has all come to user space; if so, no more is. */
static __always_inline bool stop_holding(const struct tcpha_op *op, struct tcpha_entry *e, __u32 flags)
{
	if (op->held == TCPHA_FLOWING)
		__sync_lock_test_and_set(&e->held, flags);
	return op->held == TCPHA_FLOWING ||
	       __sync_val_compare_and_swap(&e->held, op->held, flags) == op->held;
}

static __always_inline void let_flow(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || e->id != op->id)
		return;
	op->result = TCPHA_R_BACKLOG;
	if (!stop_holding(op, e, TCPHA_FLOWING))
		return;
	op->result = tcpha_let_flow(e, op->id) ? TCPHA_R_OK : TCPHA_R_NO_SOCKET;
}

/* The same, if no back end has it: it is our own stack's. */
static __always_inline void give_back(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || tcpha_state_of(e) != TCPHA_HELD || e->slot != op->slot)
		return;
	op->result = TCPHA_R_BACKLOG;
	if (!stop_holding(op, e, TCPHA_FLOWING | TCPHA_OURS))
		return;
	if (tcpha_give_back(e))
		bpf_map_delete_elem(&flows, &op->flow);
	op->result = TCPHA_R_OK;
}

/*
 * Remove an entry that user space has found over, or left behind. Since it looked, a new connection's may
 * have taken its place: that one stays.
 */
static __always_inline void drop_entry(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || !tcpha_drop(e, op->phase))
		return;
	op->result = TCPHA_R_OK;
	remove_entry(&op->flow, e, tcpha_phase_state(op->phase) == TCPHA_LINGERING);
}

SEC("tc")
int fe_tap(struct __sk_buff *skb)
{
	struct tcpha_entry *e;
	struct tcpha_flow flow;
	struct tcpha_op *op;
	struct headers h;
	__u32 state;
	bool kept;

	if (skb->protocol == bpf_htons(TCPHA_ETH_OP)) {
		op = op_of_frame(skb);
		if (op && op->kind == TCPHA_OP_QUERY)
			query(skb, op);
		else if (op && (op->kind == TCPHA_OP_END || op->kind == TCPHA_OP_TAKE_BACK))
			change_entry(op);
		else if (op && op->kind == TCPHA_OP_DROP)
			drop_entry(op);
		else if (op && op->kind == TCPHA_OP_HAND_OVER)
			hand_over(op);
		else if (op && op->kind == TCPHA_OP_LET_FLOW)
			let_flow(op);
		else if (op && op->kind == TCPHA_OP_GIVE_BACK)
			give_back(op);
		return TC_ACT_SHOT;
	}
	if (skb->protocol != bpf_htons(ETH_P_IP) || parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	kept = *(__be16 *)h.eth->h_dest == bpf_htons(TCPHA_MAC_KEPT);
	flow_of(&h, &flow);
	e = bpf_map_lookup_elem(&flows, &flow);
	if (e && is_of(skb, &flow, e, &h)) {
		state = tcpha_state_of(e);
		if (kept && state == TCPHA_DRAINING)
			return forward(skb, &flow, e, false);
		if (!kept || state != TCPHA_HELD)
			return follow_entry(skb, &flow, e);
	}
	return to_stack(skb);
}

/* The offer that a frame names. */
static __always_inline struct tcpha_offer *offer_of(struct __sk_buff *skb)
{
	__u32 index;
	__u16 n;

	if (bpf_skb_load_bytes(skb, 3, &n, sizeof(n)) < 0)
		return 0;
	index = n;
	return bpf_map_lookup_elem(&offers, &index);
}

/* A worker has chosen: make the entry what it says. Returns whether the packet may go on by it. */
static __always_inline bool take_offer(struct tcpha_offer *o, struct tcpha_entry *e)
{
	__u64 was = tcpha_phase_of(e);

	o->old = 0;
	o->start_ns = e->start_ns;
	o->result = tcpha_is_forwarded(tcpha_phase_state(was)) ? 2 : 0;
	if (!tcpha_is_pending(tcpha_phase_state(was)))
		return o->result;
	e->backend = o->backend;
	e->rule = o->rule;
	e->id = o->id;
	e->target_len = o->target_len;
	__builtin_memcpy(e->target, o->target, sizeof(e->target));
	e->flags &= ~TCPHA_F_NEW_SYN; /* a SYN that came meanwhile was not the one of this request */
	if (!o->alone)
		__sync_fetch_and_add(&e->behind, 1);
	/* unless it is being dropped, or replaced, as its client was silent for long, or gone */
	if (tcpha_offer(e, was, o->id)) {
		o->old = tcpha_owed(was, 0);
		o->result = 1;
	}
	return o->result == 1;
}

/* A segment that could not become a socket on the device that it came from. */
static __always_inline int accept_here(struct __sk_buff *skb, const struct headers *h,
				       const struct tcpha_flow *flow, struct bpf_sock_tuple *t)
{
	__u32 zero = 0, seq = bpf_ntohl(h->tcp->seq), ack = bpf_ntohl(h->tcp->ack_seq);
	struct tcpha_state *own = bpf_map_lookup_elem(&state, &zero);
	struct cookie c = {};

	if (!own ||
	    read_options(skb, ETH_HLEN + h->ip->ihl * 4 + sizeof(struct tcphdr),
			 h->tcp->doff * 4 - sizeof(struct tcphdr), &c.opt) < 0 ||
	    !cookie_check(flow, &own->keys, seq, ack, &c) || cookie_accept(skb, t, &c, conf.wscale, c.rtt_ms))
		return TC_ACT_SHOT;
	bpf_map_delete_elem(&shaken, flow);
	return to_stack(skb);
}

SEC("tc")
int fe_fast(struct __sk_buff *skb)
{
	struct bpf_sock_tuple t = {};
	struct tcpha_offer *o;
	struct tcpha_state *own;
	struct tcpha_entry *e;
	struct tcpha_flow flow;
	struct cookie c = {};
	struct headers h;
	__u32 zero = 0, seq, ack, length, socket;
	bool ours, passed;
	__u64 was;
	__u8 kind;

	if (!PACKET_PATH || skb->protocol != bpf_htons(ETH_P_IP) ||
	    bpf_skb_load_bytes(skb, 2, &kind, 1) < 0 || parse_tcp(skb, 0, &h) < 0 || h.tcp->doff < 5)
		return TC_ACT_SHOT;
	flow_of(&h, &flow);
	seq = bpf_ntohl(h.tcp->seq);
	ack = bpf_ntohl(h.tcp->ack_seq);
	length = payload(skb, &h);
	e = bpf_map_lookup_elem(&flows, &flow);
	tuple_of(&flow, &t);
	if (kind == TCPHA_FAST_ACCEPT)
		return accept_here(skb, &h, &flow, &t);
	o = offer_of(skb);
	if (!o)
		return TC_ACT_SHOT;
	socket = owner(skb, &t);
	ours = socket && socket != BPF_TCP_LISTEN;
	if (ours && (kind == TCPHA_FAST_SEND || kind == TCPHA_FAST_SOCKET) && length &&
	    (!e || tcpha_is_pending(tcpha_state_of(e)))) {
		/* it was silent for long, and got a socket when the request was on its way already */
		was = e ? tcpha_phase_of(e) : 0;
		if (e && tcpha_drop(e, was)) {
			o->old = tcpha_owed(was, 0);
			bpf_map_delete_elem(&flows, &flow);
		}
		return to_stack(skb);
	}
	if (kind == TCPHA_FAST_PASSED) {
		if (e && e->behind)
			__sync_fetch_and_add(&e->behind, -1);
		return TC_ACT_SHOT;
	}
	if (kind == TCPHA_FAST_EARLY && e && tcpha_is_pending(tcpha_state_of(e)))
		return to_worker_later(skb, e); /* behind the first one, which waits there by now */
	passed = kind == TCPHA_FAST_SEND || kind == TCPHA_FAST_LATER;
	if (kind == TCPHA_FAST_SEND) {
		if (!e || seq != e->first_seq || !take_offer(o, e) || !is_of(skb, &flow, e, &h))
			return TC_ACT_SHOT;
		return fast_flow(skb, &flow, e, seq, ack, length, urgent_end(&h), passed);
	}
	if (kind == TCPHA_FAST_SOCKET) {
		own = bpf_map_lookup_elem(&state, &zero);
		o->result = !length; /* it is no longer silent, unless we find otherwise */
		if (!own || (length ? !e || !tcpha_is_pending(tcpha_state_of(e)) || seq != e->first_seq
				    : e && is_of(skb, &flow, e, &h)))
			return TC_ACT_SHOT;
		if (read_options(skb, ETH_HLEN + h.ip->ihl * 4 + sizeof(struct tcphdr),
				 h.tcp->doff * 4 - sizeof(struct tcphdr), &c.opt) < 0)
			return TC_ACT_SHOT;
		if (!cookie_check(&flow, &own->keys, seq, ack, &c) && !length)
			return TC_ACT_SHOT;
		if (!length) { /* a client that has been silent since the handshake: user space forged its ACK
				*/
			if (socket != BPF_TCP_LISTEN)
				return TC_ACT_SHOT;
			if (cookie_accept(skb, &t, &c, conf.wscale, bpf_ntohs(h.ip->id))) {
				o->result = 0; /* there may be room later */
				return TC_ACT_SHOT;
			}
		} else {
			if (!e || cookie_accept(skb, &t, &c, conf.wscale, e->rtt_ms))
				return TC_ACT_SHOT; /* the client's next attempt may find room */
			/* the worker removes the entry, once there is a socket */
			o->old = tcpha_settle(e);
			o->result = 1;
		}
	} else if (e && is_of(skb, &flow, e, &h)) {
		if (e->flags & TCPHA_F_FAST && tcpha_is_forwarded(tcpha_state_of(e)))
			return fast_flow(skb, &flow, e, seq, ack, length, urgent_end(&h), passed);
		return follow_entry(skb, &flow, e);
	} else if (kind == TCPHA_FAST_EARLY && socket == BPF_TCP_LISTEN) {
		return TC_ACT_SHOT; /* there was no room for a socket; the listener would answer with a RST */
	}
	return to_stack(skb);
}

char LICENSE[] SEC("license") = "GPL";
