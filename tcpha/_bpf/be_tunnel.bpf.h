/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The back end: what comes through a tunnel, and what of that is a front end's. */
#ifndef BE_TUNNEL_BPF_H
#define BE_TUNNEL_BPF_H

#include "be_maps.bpf.h"

#ifndef BPF_F_ADJ_ROOM_DECAP_L3_IPV4 /* Linux 6.3 */
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#endif

/* Whether a packet that was tunnelled by a host comes from one of our front ends. */
static __always_inline bool is_ours(const __u8 from[16])
{
	if (bpf_map_lookup_elem(&frontends, from))
		return true;
	COUNT(foreign, 1);
	return false;
}

/* ECN (RFC 3168) */
#define ECN_MASK 3
#define NOT_ECT 0
#define ECT_1 1
#define ECT_0 2
#define CE 3

/*
 * Take the outer header off. What routers have written into its ECN field goes into the inner one, as RFC
 * 6040 section 4.2 has it; -1 for a packet that would have been dropped instead of marked.
 */
static __always_inline int decapsulate(struct __sk_buff *skb)
{
	__be16 inner, combined;
	__u8 tos, ecn;

	if (bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, tos), &tos, sizeof(tos)) <
		    0 ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct iphdr), &inner, sizeof(inner)) < 0)
		return -1;
	tos &= ECN_MASK;
	ecn = bpf_ntohs(inner) & ECN_MASK;
	if (tos == CE && ecn == NOT_ECT) {
		COUNT(not_ect, 1);
		return -1;
	}
	if (bpf_skb_adjust_room(skb, -(int)sizeof(struct iphdr), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_DECAP_L3_IPV4 |
					BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0)
		return -1;
	if (tos == CE || (tos == ECT_1 && ecn == ECT_0)) {
		combined = (inner & ~bpf_htons(ECN_MASK)) | bpf_htons(tos);
		bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), inner, combined,
				    sizeof(inner));
		bpf_skb_store_bytes(skb, ETH_HLEN, &combined, sizeof(combined), 0);
	}
	COUNT(decapsulated, 1);
	return 0;
}

/* Whether a header begins a TCP segment for a VIP, or a fragment of one. */
static __always_inline bool is_for_vip(const struct iphdr *ip)
{
	return ip->version == 4 && ip->protocol == IPPROTO_TCP && is_vip(ip->daddr);
}

/*
 * Whether a packet whose TCP header cannot be seen must not get to our stack, which would answer for a VIP
 * when it has put the fragments together. Front ends send none.
 */
static __always_inline bool keeps_out(struct __sk_buff *skb)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 || !is_for_vip(&ip))
		return false;
	COUNT(guarded, 1);
	return true;
}

#define UNWRAPPED 1000 /* no TC_ACT_* */

/*
 * What is wrapped up, for us by a front end, or so it says. Whatever holds a segment for a VIP and is not
 * as a front end of ours would send it ends here: a tunnel device of this host would unwrap that, too, for
 * anybody. A front end sends no fragments; but if a router has cut what is around a segment, our stack puts
 * that together, and the mark, which the whole keeps, sends it to user space, from where what was in it comes
 * back. What is not whole never gets anywhere, so it is enough to judge the first fragment.
 */
static __always_inline int tunnelled(struct __sk_buff *skb, const struct iphdr *outer)
{
	__be16 fragment = outer->frag_off & bpf_htons(IP_MF | IP_OFFSET);
	__u32 offset = outer->ihl * 4;
	struct tcpha_flow flow;
	struct headers h;
	struct iphdr inner;
	__u8 from[16];
	bool whole;

	if (fragment & bpf_htons(IP_OFFSET))
		return TC_ACT_UNSPEC;
	map_v4(from, outer->saddr);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offset, &inner, sizeof(inner)) < 0)
		return fragment ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (!is_for_vip(&inner)) {
		/* an ICMP error is for our own stack to judge: it has the connection */
		if (fragment || offset != sizeof(inner) || !is_vip(inner.daddr) ||
		    parse_icmp_error(skb, sizeof(inner), &flow) < 0)
			return TC_ACT_UNSPEC;
		return is_ours(from) && decapsulate(skb) == 0 ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	}
	whole = offset == sizeof(inner) && parse_tcp(skb, sizeof(inner), &h) == 0;
	if (!is_ours(from) || !whole)
		return TC_ACT_SHOT;
	if (fragment) {
		skb->mark = TCPHA_MARK_FRAGMENT;
		return TC_ACT_UNSPEC;
	}
	return decapsulate(skb) == 0 ? UNWRAPPED : TC_ACT_SHOT;
}

#endif
