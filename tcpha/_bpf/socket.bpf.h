/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Sockets of this host, and what the kernel knows of a packet and its device. */
#ifndef SOCKET_BPF_H
#define SOCKET_BPF_H

#include "packet.bpf.h"

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

struct bpf_tcp_req_attrs { /* include/net/tcp.h of the kernel, since 6.9 */
	__u32 rcv_tsval;
	__u32 rcv_tsecr;
	__u16 mss;
	__u8 rcv_wscale;
	__u8 snd_wscale;
	__u8 ecn_ok;
	__u8 wscale_ok;
	__u8 sack_ok;
	__u8 tstamp_ok;
	__u8 usec_ts_ok;
	__u8 reserved[3];
};

extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *skb, struct sock *sk, struct bpf_tcp_req_attrs *attrs,
				   int attrs__sz) __ksym __weak;

struct list_head {
	struct list_head *next;
} __attribute__((preserve_access_index));

struct packet_type {
	__be16 type;
	struct list_head list;
} __attribute__((preserve_access_index));

struct ipv4_devconf {
	int data[IPV4_DEVCONF_RP_FILTER]; /* and more */
} __attribute__((preserve_access_index));

struct in_device {
	void *ifa_list;
	struct ipv4_devconf cnf;
} __attribute__((preserve_access_index));

struct netns_ipv4 {
	struct ipv4_devconf *devconf_all;
} __attribute__((preserve_access_index));

struct net {
	struct netns_ipv4 ipv4;
} __attribute__((preserve_access_index));

typedef struct {
	struct net *net;
} __attribute__((preserve_access_index)) possible_net_t;

enum netdev_priv_flags {
	IFF_L3MDEV_SLAVE = 1 << 21,
};

struct net_device {
	unsigned int priv_flags;
	unsigned int mtu;
	struct in_device *ip_ptr;
	struct list_head ptype_specific; /* packet sockets that are bound to it, and to one protocol */
	possible_net_t nd_net;
} __attribute__((preserve_access_index));

struct sk_buff {
	struct net_device *dev;
	__u8 ip_summed : 2;
	__u32 csum;
} __attribute__((preserve_access_index));

extern void *bpf_cast_to_kern_ctx(void *obj) __ksym __weak;

static __always_inline void tuple_of(const struct tcpha_flow *flow, struct bpf_sock_tuple *t)
{
	t->ipv4.saddr = unmap_v4(flow->caddr);
	t->ipv4.daddr = unmap_v4(flow->vaddr);
	t->ipv4.sport = flow->cport;
	t->ipv4.dport = flow->vport;
}

/*
 * The listener that a SYN from t would find. The client may have a connection of its own with the address
 * and port where the application listens, or its remains: looked up by 4-tuple, that hides the listener.
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

/* Fill op from a connection's socket. */
static __always_inline void read_socket(const struct tcp_sock *tp, struct tcpha_op *op)
{
	op->snd_nxt = tp->snd_nxt;
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
	if (tp)
		read_socket(tp, op);
out:
	bpf_sk_release(skc);
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
 * Whether somebody else gets what a device receives behind our stack: a DHCP client, say. Then the stack
 * works on a clone, and a clone has no socket assigned: adoption must wait until the packet has gone through
 * a device of ours.
 */
static __always_inline bool is_shared(struct __sk_buff *skb)
{
	const struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	const struct net_device *dev = kernel->dev;
	__u64 end = (__u64)dev + bpf_core_field_offset(struct net_device, ptype_specific);
	__u64 at = (__u64)dev->ptype_specific.next;
	__be16 type;
	int i;

	for (i = 0; i < 8 && at != end; i++) { /* of LLDP or ARP there may be some */
		if (bpf_probe_read_kernel(&type, sizeof(type),
					  (void *)(at - bpf_core_field_offset(struct packet_type, list) +
						   bpf_core_field_offset(struct packet_type, type))) < 0 ||
		    type == bpf_htons(ETH_P_IP) ||
		    bpf_probe_read_kernel(&at, sizeof(at), (void *)at) < 0) /* list.next */
			return true;
	}
	return at != end;
}

#endif
