/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What both programs need: packet parsing, kernel structs, socket look-up. */
#ifndef COMMON_BPF_H
#define COMMON_BPF_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "clock.h"
#include "own.h"
#include "tcpha.h"

#define IP_DF 0x4000
#define IP_MF 0x2000
#define IP_OFFSET 0x1fff

/* The few kernel structs that are read, relocated at load time (CO-RE): no vmlinux.h is needed. */
struct tcp_options_received {
	__u32 ts_recent;
	__u16 saw_tstamp : 1, tstamp_ok : 1, dsack : 1, wscale_ok : 1, sack_ok : 3, smc_ok : 1,
		snd_wscale : 4, rcv_wscale : 4;
	__u16 mss_clamp;
} __attribute__((preserve_access_index));

struct sock_common {
	__u32 skc_tw_rcv_nxt;
} __attribute__((preserve_access_index));

struct sock { /* complete, since libbpf compares the kinds of a kfunc's arguments */
	struct sock_common __sk_common;
	__u32 sk_ack_backlog;
	__u32 sk_max_ack_backlog;
} __attribute__((preserve_access_index));

struct inet_sock {
	struct sock sk;
} __attribute__((preserve_access_index));

struct inet_connection_sock {
	struct inet_sock icsk_inet;
} __attribute__((preserve_access_index));

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 tsoffset;
	__u32 snd_wnd;
	__u32 copied_seq;
	__u32 write_seq;
	__u8 ecn_flags;
	__u32 rcv_nxt;
	__u64 bytes_received;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 srtt_us;
	__u32 rcv_wnd;
	__u8 repair : 1, tcp_usec_ts : 1;
	struct tcp_options_received rx_opt;
} __attribute__((preserve_access_index));

struct inet_timewait_sock {
	struct sock_common __tw_common;
} __attribute__((preserve_access_index));

struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
	__u32 tw_ts_recent;
} __attribute__((preserve_access_index));

const volatile struct tcpha_clock lab_clock SEC(".rodata.clock");

/* As now_ns() in user space. Where the kernel's own clock is meant, it is asked by its own name. */
static __always_inline __u64 now_ns(void)
{
	__u64 now = bpf_ktime_get_ns();

	if (!lab_clock.ahead_ns && !lab_clock.ppm)
		return now;
	return tcpha_clock_read(now, lab_clock.ahead_ns, lab_clock.ppm);
}

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

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_OPS);
	__type(key, __u32);
	__type(value, struct tcpha_op);
} ops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_counters);
} counters SEC(".maps");

#define COUNT(field, n)                                                                                      \
	do {                                                                                                 \
		__u32 zero_ = 0;                                                                             \
		struct tcpha_counters *c_ = bpf_map_lookup_elem(&counters, &zero_);                          \
		if (c_)                                                                                      \
			c_->field += (n);                                                                    \
	} while (0)

struct headers {
	struct ethhdr *eth;
	struct iphdr *ip;
	struct tcphdr *tcp;
};

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

static __always_inline void map_v4(__u8 to[16], __be32 addr)
{
	__builtin_memset(to, 0, 10);
	to[10] = to[11] = 0xff;
	__builtin_memcpy(to + 12, &addr, 4);
}

/* Volatile: the program's constants are zero when it is compiled, and must not be folded. */
static __always_inline __be32 unmap_v4(const volatile __u8 from[16])
{
	return *(const volatile __be32 *)(from + 12);
}

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

/*
 * The flow that an ICMP error for addr is about (RFC 792: destination unreachable, time exceeded, parameter
 * problem), 'offset' bytes after the Ethernet header: addr sent the TCP segment that it quotes. 0, or -1:
 * the packet is something else.
 */
static __always_inline int parse_icmp_error(struct __sk_buff *skb, __u32 offset, __be32 addr,
					    struct tcpha_flow *flow)
{
	__u32 at = ETH_HLEN + offset;
	struct iphdr ip;
	__be16 port[2];
	__u8 type;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) < 0 || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_ICMP || ip.daddr != addr || (ip.frag_off & bpf_htons(IP_MF | IP_OFFSET)))
		return -1;
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

static __always_inline void tuple_of(const struct tcpha_flow *flow, struct bpf_sock_tuple *t)
{
	t->ipv4.saddr = unmap_v4(flow->caddr);
	t->ipv4.daddr = unmap_v4(flow->vaddr);
	t->ipv4.sport = flow->cport;
	t->ipv4.dport = flow->vport;
}

/*
 * The listener that a SYN from t would find. The client may have a connection of its own with the address
 * and port where the application listens, or its remains: looked up by name, that hides the listener.
 */
static __always_inline struct bpf_sock *find_listener(struct __sk_buff *skb, struct bpf_sock_tuple *t)
{
	struct bpf_sock *skc = bpf_skc_lookup_tcp(skb, t, sizeof(t->ipv4), BPF_F_CURRENT_NETNS, 0);

	if (!skc || skc->state == BPF_TCP_LISTEN)
		return skc;
	bpf_sk_release(skc);
	t->ipv4.sport = 0; /* nobody's */
	return bpf_skc_lookup_tcp(skb, t, sizeof(t->ipv4), BPF_F_CURRENT_NETNS, 0);
}

/* Fill op from the socket that owns op->flow in this namespace. Sets op->result. */
static __always_inline void query(struct __sk_buff *skb, struct tcpha_op *op)
{
	struct bpf_sock_tuple t = {};
	struct tcp_timewait_sock *tw;
	struct bpf_sock *skc;
	struct tcp_sock *tp;

	op->result = TCPHA_R_NO_SOCKET;
	op->state = 0;
	tuple_of(&op->flow, &t);
	skc = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!skc)
		return;
	op->state = skc->state;
	if (skc->state == BPF_TCP_LISTEN)
		goto out;
	op->result = TCPHA_R_LIVE;
	if (skc->state == BPF_TCP_TIME_WAIT) {
		op->result = TCPHA_R_TIME_WAIT;
		tw = bpf_skc_to_tcp_timewait_sock(skc);
		if (tw)
			op->rcv_nxt = tw->tw_sk.__tw_common.skc_tw_rcv_nxt;
		goto out;
	}
	tp = bpf_skc_to_tcp_sock(skc);
	if (!tp)
		goto out;
	op->snd_una = tp->snd_una;
	op->snd_nxt = tp->snd_nxt;
	op->write_seq = tp->write_seq;
	op->snd_wnd = tp->snd_wnd;
	op->rcv_nxt = tp->rcv_nxt;
	op->rcv_wnd = tp->rcv_wnd;
	op->copied_seq = tp->copied_seq;
	op->srtt_us = tp->srtt_us >> 3;
	op->mss = tp->rx_opt.mss_clamp;
	op->ts_recent = tp->rx_opt.ts_recent;
	op->wscale_ok = BPF_CORE_READ_BITFIELD(tp, rx_opt.wscale_ok);
	op->sack_ok = BPF_CORE_READ_BITFIELD(tp, rx_opt.sack_ok) != 0;
	op->tstamp_ok = BPF_CORE_READ_BITFIELD(tp, rx_opt.tstamp_ok);
	op->snd_wscale = BPF_CORE_READ_BITFIELD(tp, rx_opt.snd_wscale);
	op->rcv_wscale = BPF_CORE_READ_BITFIELD(tp, rx_opt.rcv_wscale);
	op->ecn_ok = tp->ecn_flags & 1; /* TCP_ECN_OK, RFC 3168 */
	op->usec_ts_ok = 0;
	if (bpf_core_field_exists(tp->tcp_usec_ts))
		op->usec_ts_ok = BPF_CORE_READ_BITFIELD(tp, tcp_usec_ts);
	/* tcp_clock_ms() or tcp_clock_us() of the kernel, plus this socket's offset */
	op->tsval = (__u32)(bpf_ktime_get_ns() / (op->usec_ts_ok ? 1000 : 1000000)) + tp->tsoffset;
out:
	bpf_sk_release(skc);
}

/*
 * The operation slot that an operation frame or a forged packet names.
 * The frame: Ethernet header, then the slot as a 32-bit integer in host byte order.
 */
static __always_inline struct tcpha_op *op_of_frame(struct __sk_buff *skb)
{
	__u32 slot;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &slot, sizeof(slot)) < 0)
		return 0;
	return bpf_map_lookup_elem(&ops, &slot);
}

#endif
