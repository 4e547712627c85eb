// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Front end: packets of handed-over flows go to their back end without waking a process.
 *
 * fe_ingress	tc ingress of the network interfaces
 * fe_tap	tc ingress of the daemon's TAP device: operations, and packets that were held
 */
#include "common.bpf.h"
#include "flow.h"

const volatile struct tcpha_fe_conf conf SEC(".rodata.conf");

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

static __always_inline int encapsulate(struct __sk_buff *skb, const struct tcpha_backend *be)
{
	struct iphdr *inner, outer = {};
	__u32 sum = 0;
	int i;

	inner = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(inner + 1) > (void *)(long)skb->data_end)
		return -1;
	outer.version = 4;
	outer.ihl = 5;
	outer.tos = inner->tos;
	outer.tot_len = bpf_htons(bpf_ntohs(inner->tot_len) + sizeof(outer));
	outer.frag_off = inner->frag_off; /* keeps DF: path MTU discovery stays honest (RFC 2003) */
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

static __always_inline int forward(struct __sk_buff *skb, struct tcpha_entry *e)
{
	struct bpf_redir_neigh nh = {.nh_family = 2 /* AF_INET */};
	struct tcpha_backend *be;
	__u32 index = e->backend;
	__u32 segments = skb->gso_segs ?: 1;
	__u32 bytes = skb->len - ETH_HLEN;
	long ret;

	be = bpf_map_lookup_elem(&backends, &index);
	if (!be || !be->mode) {
		COUNT(unreachable, 1);
		return TC_ACT_SHOT;
	}
	__sync_fetch_and_add(&e->packets, segments);
	__sync_fetch_and_add(&e->bytes, bytes);
	if (be->mode == TCPHA_LOCAL) {
		/* one that was held bears the mark instead of our address */
		bpf_skb_change_type(skb, PACKET_HOST);
		return TC_ACT_UNSPEC;
	}
	if (be->mode == TCPHA_TUNNEL && encapsulate(skb, be) < 0) {
		COUNT(unreachable, 1);
		return TC_ACT_SHOT;
	}
	/* resolves the neighbour and writes the Ethernet header, so no MAC address is cached here */
	nh.ipv4_nh = unmap_v4(be->nexthop);
	ret = bpf_redirect_neigh(be->ifindex, &nh, sizeof(nh), 0);
	if (ret == TC_ACT_SHOT) {
		COUNT(unreachable, 1);
		return TC_ACT_SHOT;
	}
	COUNT(forwarded, segments);
	COUNT(forwarded_bytes, bytes);
	return ret;
}

/* To user space, which finds the connection by the slot in the destination MAC address. */
static __always_inline int hold(struct __sk_buff *skb, const struct tcpha_entry *e)
{
	__u8 mac[ETH_ALEN] = {TCPHA_MAC_MARK >> 8, TCPHA_MAC_MARK & 0xff};
	__u32 slot = e->slot;

	__builtin_memcpy(mac + 2, &slot, sizeof(slot));
	if (bpf_skb_store_bytes(skb, 0, mac, sizeof(mac), 0) < 0)
		return TC_ACT_SHOT;
	COUNT(held, 1);
	return bpf_redirect(conf.tap, 0);
}

/* The entry of the packet's flow, or 0: the packet is for the stack. */
static __always_inline struct tcpha_entry *classify(const struct headers *h)
{
	struct tcpha_flow flow;
	struct tcpha_entry *e;
	__u32 length;
	__u8 flags;

	if (h->ip->daddr != unmap_v4(conf.vaddr) || h->tcp->dest != conf.vport)
		return 0;
	map_v4(flow.caddr, h->ip->saddr);
	map_v4(flow.vaddr, h->ip->daddr);
	flow.cport = h->tcp->source;
	flow.vport = h->tcp->dest;
	e = bpf_map_lookup_elem(&flows, &flow);
	if (!e)
		return 0;
	flags = ((__u8 *)h->tcp)[13];
	length = bpf_ntohs(h->ip->tot_len) - h->ip->ihl * 4 - h->tcp->doff * 4;
	switch (tcpha_classify(e, flags, bpf_ntohl(h->tcp->seq), length, bpf_ktime_get_ns())) {
	case TCPHA_TO_STACK:
		return 0;
	case TCPHA_TO_LIVE:
		COUNT(live_syn, 1);
	}
	return e;
}

SEC("tc")
int fe_ingress(struct __sk_buff *skb)
{
	struct tcpha_entry *e;
	struct headers h;

	if (skb->pkt_type != PACKET_HOST || skb->protocol != bpf_htons(ETH_P_IP) ||
	    parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_UNSPEC;
	e = classify(&h);
	if (!e)
		return TC_ACT_UNSPEC;
	return e->state == TCPHA_FORWARD ? forward(skb, e) : hold(skb, e);
}

SEC("tc")
int fe_tap(struct __sk_buff *skb)
{
	struct tcpha_entry *e;
	struct headers h;

	if (skb->protocol == bpf_htons(TCPHA_ETH_OP))
		return run_op_frame(skb);
	if (skb->protocol != bpf_htons(ETH_P_IP) || parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	e = classify(&h);
	if (e)
		return e->state == TCPHA_FORWARD ? forward(skb, e) : hold(skb, e);
	/* given back to our own stack: the frame still bears the mark instead of our address */
	bpf_skb_change_type(skb, PACKET_HOST);
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "GPL";
