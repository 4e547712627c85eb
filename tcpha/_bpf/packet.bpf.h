/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A packet is described once, where it comes in. */
#ifndef PACKET_BPF_H
#define PACKET_BPF_H

#include <linux/if_packet.h>
#include <linux/tcp.h>

#include "common.bpf.h"
#include "flow.h"

#define AF_INET 2
#define IP_DF 0x4000
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

/* A TCP segment over IPv4. What is not network byte order is host byte order. */
struct packet {
	struct tcpha_flow flow; /* if a client has sent it */
	__u32 l4;		/* where its TCP header is, */
	__u32 data;		/* and its payload */
	__u32 seq;
	__u32 ack;
	__u32 length; /* of the payload */
	__u32 doff;   /* bytes of the TCP header */
	__be16 id;    /* in the IP header */
	__be16 bits;  /* data offset, and all flags */
	__be16 window;
	__be16 urgent; /* the urgent pointer, whether it means something or not */
	__u8 flags;    /* TCPHA_T_* */
	bool df;
};

/*
 * Copy from 1 to 'most' bytes, a constant, of a packet. 0, or -1. Verifiers must find the bounds in the very
 * register that the helper gets: without the barriers, the compiler may test a copy, or a number one less, or
 * nothing where it knows more than they do.
 */
static __always_inline int load_bytes(struct __sk_buff *skb, __u32 offset, void *to, __u64 length, __u64 most)
{
	asm volatile("" : "+r"(length));
	if (length < 1)
		return -1;
	asm volatile("" : "+r"(length));
	if (length > most)
		return -1;
	asm volatile("" : "+r"(length));
	return bpf_skb_load_bytes(skb, offset, to, length);
}

#define VLAN_ID 0x0fff

/*
 * Whether a frame is IPv4 and for this host, on this very device. What bears the tag of a VLAN is seen again
 * on that VLAN's device, and belongs there. The tag of VLAN 0 gives a priority only; it would go out again
 * with what is sent on, so it is taken away.
 */
static __always_inline bool is_for_us(struct __sk_buff *skb)
{
	if (skb->pkt_type != PACKET_HOST || skb->protocol != bpf_htons(ETH_P_IP))
		return false;
	if (!skb->vlan_present)
		return true;
	return !(skb->vlan_tci & VLAN_ID) && bpf_skb_vlan_pop(skb) == 0;
}

struct headers {
	struct ethhdr *eth;
	struct iphdr *ip;
	struct tcphdr *tcp;
};

/*
 * Find the headers of an IPv4 TCP packet, 'offset' bytes after the Ethernet header. 0, or -1: not
 * such a packet, or one whose TCP header cannot be seen (a fragment).
 */
static __always_inline int parse_tcp(struct __sk_buff *skb, __u32 offset, struct headers *h)
{
	void *data, *end;
	__u32 ihl;

	if (bpf_skb_pull_data(skb, ETH_HLEN + offset + sizeof(struct iphdr) + sizeof(struct tcphdr)) < 0)
		return -1;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	h->eth = data;
	h->ip = data + ETH_HLEN + offset;
	if ((void *)(h->ip + 1) > end)
		return -1;
	if (h->ip->version != 4 || h->ip->protocol != IPPROTO_TCP ||
	    (h->ip->frag_off & bpf_htons(IP_MF | IP_OFFSET)))
		return -1;
	ihl = h->ip->ihl * 4;
	if (ihl < sizeof(struct iphdr))
		return -1;
	if (ihl > sizeof(struct iphdr)) { /* IP options: the first pull may have been too short */
		if (bpf_skb_pull_data(skb, ETH_HLEN + offset + ihl + sizeof(struct tcphdr)) < 0)
			return -1;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		h->eth = data;
		h->ip = data + ETH_HLEN + offset;
		if ((void *)(h->ip + 1) > end)
			return -1;
		ihl = h->ip->ihl * 4;
	}
	h->tcp = (void *)h->ip + ihl;
	if ((void *)(h->tcp + 1) > end)
		return -1;
	return 0;
}

/* Bytes of a segment's payload. A total length of 0 stands for one that 16 bits cannot hold (BIG TCP). */
static __always_inline __u32 payload(const struct __sk_buff *skb, const struct headers *h)
{
	__u32 length = bpf_ntohs(h->ip->tot_len) ?: skb->len - ETH_HLEN;

	return length - h->ip->ihl * 4 - h->tcp->doff * 4;
}

/* 0, or -1: it is no such packet. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *p)
{
	struct headers h;

	if (parse_tcp(skb, 0, &h) < 0)
		return -1;
	map_v4(p->flow.caddr, h.ip->saddr);
	map_v4(p->flow.vaddr, h.ip->daddr);
	p->flow.cport = h.tcp->source;
	p->flow.vport = h.tcp->dest;
	p->l4 = ETH_HLEN + h.ip->ihl * 4;
	p->doff = h.tcp->doff * 4;
	p->data = p->l4 + p->doff;
	p->seq = bpf_ntohl(h.tcp->seq);
	p->ack = bpf_ntohl(h.tcp->ack_seq);
	p->length = payload(skb, &h);
	p->id = h.ip->id;
	p->bits = ((__be16 *)h.tcp)[6];
	p->window = h.tcp->window;
	p->urgent = h.tcp->urg_ptr;
	p->flags = ((__u8 *)h.tcp)[13];
	p->df = (h.ip->frag_off & bpf_htons(IP_DF)) != 0;
	return 0;
}

/* Where urgent data end, in bytes from a segment's first one on (RFC 6093); 0: it does not bear URG. */
static __always_inline __u32 urgent_end(const struct packet *p)
{
	return p->flags & TCPHA_T_URG ? bpf_ntohs(p->urgent) ?: 1 : 0;
}

/*
 * The flow that an ICMP error is about (RFC 792: destination unreachable, time exceeded, parameter problem),
 * 'offset' bytes after the Ethernet header: whoever gets it sent the TCP segment that it quotes. 0, or -1:
 * the packet is something else.
 */
static __always_inline int parse_icmp_error(struct __sk_buff *skb, __u32 offset, struct tcpha_flow *flow)
{
	__u32 at = ETH_HLEN + offset;
	struct iphdr ip;
	__be16 port[2];
	__be32 addr;
	__u8 type;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_ICMP || (ip.frag_off & bpf_htons(IP_MF | IP_OFFSET)))
		return -1;
	addr = ip.daddr;
	at += ip.ihl * 4;
	if (bpf_skb_load_bytes(skb, at, &type, 1) < 0 || (type != 3 && type != 11 && type != 12))
		return -1;
	at += 8;
	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_TCP || ip.saddr != addr || (ip.frag_off & bpf_htons(IP_OFFSET)) ||
	    bpf_skb_load_bytes(skb, at + ip.ihl * 4, port, sizeof(port)) < 0)
		return -1;
	map_v4(flow->caddr, ip.daddr);
	map_v4(flow->vaddr, ip.saddr);
	flow->cport = port[1];
	flow->vport = port[0];
	return 0;
}

/* What a frame of a TAP device is. false: there is none. */
static __always_inline bool read_frame(struct __sk_buff *skb, struct tcpha_frame *f)
{
	return bpf_skb_load_bytes(skb, 0, f, sizeof(*f)) == 0;
}

/* To a TAP device, or in by it, as TC_ACT_* of bpf_redirect(). */
static __always_inline int to_tap(struct __sk_buff *skb, const struct tcpha_frame *f, __u32 tap, __u64 flags)
{
	if (bpf_skb_store_bytes(skb, 0, f, sizeof(*f), 0) < 0)
		return TC_ACT_SHOT;
	return bpf_redirect(tap, flags);
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The sum of a pseudo-header: RFC 9293 section 3.1. */
static __always_inline __u64 pseudo_sum(__be32 saddr, __be32 daddr, __u32 tcp_len)
{
	return (__u64)saddr + daddr + bpf_htons(IPPROTO_TCP) + bpf_htons(tcp_len);
}

/* Set the checksum of a header without options, where 0 stands for it. */
static __always_inline void sum_header(struct iphdr *ip)
{
	__u32 sum = 0, i;

#pragma unroll
	for (i = 0; i < 10; i++)
		sum += ((__u16 *)ip)[i];
	ip->check = ~fold(sum);
}

#endif
