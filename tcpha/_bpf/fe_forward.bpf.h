/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The front end: what belongs to a back end, or waits for one. */
#ifndef FE_FORWARD_BPF_H
#define FE_FORWARD_BPF_H

#include "cookie.bpf.h"
#include "fe_maps.bpf.h"

#define GSO_SEGMENTS 64 /* of a packet, about, where nobody has counted them */

/* Identifies outer packets that routers may cut: of those, no two may be alike for a while (RFC 6864). */
static __u32 outer_id;

static __always_inline int encapsulate(struct __sk_buff *skb, const struct tcpha_backend *be)
{
	struct iphdr *inner, outer = {};
	__u32 length;

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
	sum_header(&outer);
	if (bpf_skb_adjust_room(skb, sizeof(outer), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 |
					BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0)
		return -1;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &outer, sizeof(outer), 0);
}

/* The RTT of the handshake, for the back end: in the identification, which has no use where DF is (RFC 6864).
 */
static __always_inline void tell_rtt(struct __sk_buff *skb, const struct packet *p, __u16 rtt_ms)
{
	__be16 id = bpf_htons(rtt_ms);

	if (!p->df)
		return;
	bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), p->id, id, sizeof(id));
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

struct icmp_too_big { /* RFC 1191 section 4; linux/icmp.h needs more of libc than there is for BPF */
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be16 unused;
	__be16 mtu;
};

struct too_big_frame {
	__u16 align;
	struct ethhdr eth;
	struct iphdr ip;
	struct icmp_too_big icmp;
};

/* The sums of an ICMP message that quotes a TCP header: one up to its checksum, or with it, and unfinished.
 */
static __always_inline bool sum_quoted(struct icmp_too_big *icmp, struct tcphdr *tcp, __s64 *whole,
				       __s64 *partial)
{
	*partial = bpf_csum_diff(0, 0, (void *)icmp, sizeof(*icmp), (__u16)~tcp->check);
	*whole = bpf_csum_diff(0, 0, (void *)icmp, sizeof(*icmp), 0);
	if (*partial < 0 || *whole < 0)
		return false;
	*whole = bpf_csum_diff(0, 0, (void *)tcp, __builtin_offsetof(struct tcphdr, check), *whole);
	return *whole >= 0;
}

/* The headers of an answer to a client's packet. */
static __always_inline void answer_headers(struct too_big_frame *out, const struct headers *h)
{
	__builtin_memcpy(out->eth.h_dest, h->eth->h_source, ETH_ALEN);
	__builtin_memcpy(out->eth.h_source, h->eth->h_dest, ETH_ALEN);
	out->eth.h_proto = h->eth->h_proto;
	out->ip.version = 4;
	out->ip.ihl = 5;
	out->ip.tos = 0xc0; /* internetwork control (RFC 1812 section 4.3.2.5) */
	out->ip.frag_off = bpf_htons(IP_DF);
	out->ip.ttl = 64;
	out->ip.protocol = IPPROTO_ICMP;
	out->ip.saddr = h->ip->daddr;
	out->ip.daddr = h->ip->saddr;
}

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
	const __u32 before_check = __builtin_offsetof(struct tcphdr, check);
	struct too_big_frame out = {.icmp = {.type = 3, .code = 4, .mtu = bpf_htons(room)}};
	struct headers h;
	__s64 whole, partial;
	__u32 quoted;

	if (skb->ifindex == conf.tap || skb->ifindex == conf.fast_tap || parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	if (!sum_quoted(&out.icmp, h.tcp, &whole, &partial))
		return TC_ACT_SHOT;
	answer_headers(&out, &h);
	quoted = h.ip->ihl * 4 + before_check;
	out.icmp.checksum = ~fold(whole);
	if (bpf_skb_change_tail(skb, ETH_HLEN + quoted, 0) < 0) {
		quoted += sizeof(struct tcphdr) - before_check;
		out.icmp.checksum = ~fold(partial);
		if (bpf_skb_change_tail(skb, ETH_HLEN + quoted, 0) < 0)
			return TC_ACT_SHOT;
	}
	out.ip.tot_len = bpf_htons(sizeof(out.ip) + sizeof(out.icmp) + quoted);
	sum_header(&out.ip);
	if (bpf_skb_adjust_room(skb, sizeof(out.ip) + sizeof(out.icmp), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0 ||
	    bpf_skb_store_bytes(skb, 0, &out.eth, sizeof(out) - sizeof(out.align), 0) < 0)
		return TC_ACT_SHOT;
	COUNT(too_big, 1);
	return bpf_redirect(skb->ifindex, 0);
}

/*
 * Whether a client's packet, or each segment of it, gets through to a back end. One without DF does: routers
 * cut what is around it.
 */
static __always_inline bool fits(const struct __sk_buff *skb, const struct packet *p, __u32 room)
{
	return !p->df || (skb->gso_size ? p->data + skb->gso_size : skb->len) - ETH_HLEN <= room;
}

/* 0, or an error. */
static __always_inline int clear_urg(struct __sk_buff *skb, const struct packet *p)
{
	__be16 new = p->bits & ~bpf_htons(TCPHA_T_URG);

	return new != p->bits && (bpf_l4_csum_replace(skb, p->l4 + __builtin_offsetof(struct tcphdr, check),
						      p->bits, new, sizeof(new)) ||
				  bpf_skb_store_bytes(skb, p->l4 + 12, &new, sizeof(new), 0));
}

/*
 * The first segment of a connection is about to leave for its back end: make it ours. A client that is told
 * that its segment is too big must not see that. Of urgent data behind the segment, the next one tells, too.
 */
static __always_inline int put_tag(struct __sk_buff *skb, const struct packet *p, const struct tcpha_entry *e)
{
	__u32 zero = 0, ack = e->first_ack;
	struct tcpha_state *own = bpf_map_lookup_elem(&state, &zero);
	__u64 hash;

	if (!own)
		return -1;
	hash = tag_hash(&p->flow, &own->keys, e->first_seq - 1, (ack - 1) & META_MASK);
	return clear_urg(skb, p) || write_tag(skb, p->l4, tag_ack(ack, hash), tag_urgent(hash));
}

/* first: it makes the connection. */
static __always_inline int forward(struct __sk_buff *skb, const struct packet *p, struct tcpha_entry *e,
				   bool first)
{
	struct tcpha_backend *be;
	__u32 index = tcpha_now(&e->backend);
	__u32 segments = skb->gso_segs ?: 1;
	__u32 bytes = skb->len - ETH_HLEN;
	__u32 room;
	int ret;

	if (tcpha_now(&e->tag) != tcpha_tag(&p->flow))
		return TC_ACT_SHOT; /* it is gone, and so may be all that was known of the flow */
	be = bpf_map_lookup_elem(&backends, &index);
	if (!be || !be->mode) {
		COUNT(unreachable, 1);
		return TC_ACT_SHOT;
	}
	room = be->mtu - (be->mode == TCPHA_TUNNEL ? sizeof(struct iphdr) : 0);
	if (be->mtu && !fits(skb, p, room))
		return tell_too_big(skb, room);
	if (first && put_tag(skb, p, e))
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
 * To user space, which finds the connection by the slot in the frame. By the count, it
 * knows whether all have arrived there: until they have gone on, none that follows may go by itself.
 */
static __always_inline int hold(struct __sk_buff *skb, const struct packet *p, struct tcpha_entry *e)
{
	struct tcpha_frame frame = {.mark = bpf_htons(TCPHA_MAC_MARK), .slot = e->slot};
	__u32 held = __sync_fetch_and_add(&e->held, 1);

	if (held & TCPHA_FLOWING)
		return held & TCPHA_OURS ? to_stack(skb) : forward(skb, p, e, false);
	COUNT(held, 1);
	return to_tap(skb, &frame, conf.tap, 0);
}

/* Whether a packet belongs to the flow of an entry of its 4-tuple, and not to our stack. */
static __always_inline bool is_of(const struct packet *p, struct tcpha_entry *e)
{
	if (tcpha_now(&e->tag) != tcpha_tag(&p->flow))
		return false;
	switch (tcpha_classify(e, p->flags, p->seq, p->length, now_ns())) {
	case TCPHA_TO_STACK:
		return false;
	case TCPHA_TO_LIVE:
		COUNT(live_syn, 1);
	}
	return true;
}

/* To the back end, to user space, or nowhere, as the entry says. */
static __always_inline int follow_entry(struct __sk_buff *skb, const struct packet *p, struct tcpha_entry *e)
{
	__u32 state = tcpha_state_of(e);

	if (tcpha_is_forwarded(state))
		return forward(skb, p, e, false);
	if (state == TCPHA_HELD || state == TCPHA_DRAINING)
		return hold(skb, p, e);
	/* it was given back a moment ago */
	return !(e->flags & TCPHA_F_FAST) && e->held & TCPHA_OURS ? to_stack(skb) : TC_ACT_SHOT;
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

	if (parse_icmp_error(skb, 0, &flow) < 0 || !service_of(&flow))
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
	struct tcpha_flow flow = {};
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_TCP || (ip.frag_off & bpf_htons(IP_MF | IP_OFFSET)) != bpf_htons(IP_MF))
		return;
	map_v4(flow.vaddr, ip.daddr);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + ip.ihl * 4 + 2, &flow.vport, sizeof(flow.vport)) == 0 &&
	    service_of(&flow))
		skb->mark = TCPHA_MARK_FRAGMENT;
}

#endif
