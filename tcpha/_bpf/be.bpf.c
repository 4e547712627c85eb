// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Back end: adoption of connections, and the guard before them.
 *
 * be_ingress	tc ingress of the network interfaces: unwraps tunnelled packets; lets only packets of
 *		existing sockets reach the VIP
 * be_tap	tc ingress of the daemon's TAP device: operations and forged packets
 */
#include "common.bpf.h"

#ifndef BPF_F_ADJ_ROOM_DECAP_L3_IPV4 /* Linux 6.3 */
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#endif

const volatile struct tcpha_be_conf conf SEC(".rodata.conf");

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

struct sock { /* complete, since libbpf compares the kinds of a kfunc's arguments */
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *skb, struct sock *sk,
				   struct bpf_tcp_req_attrs *attrs, int attrs__sz) __ksym;

/* Front ends that may send us tunnelled packets; the value is not used. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u8[16]);
	__type(value, __u32);
} frontends SEC(".maps");

/*
 * Only what belongs to a socket may pass. A packet that found just the listener would be answered
 * with a RST, a SYN with a SYN-ACK, and both are the front end's business.
 */
static __always_inline int guard(struct __sk_buff *skb, const struct headers *h)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *skc;
	int pass = 0;

	t.ipv4.saddr = h->ip->saddr;
	t.ipv4.daddr = h->ip->daddr;
	t.ipv4.sport = h->tcp->source;
	t.ipv4.dport = h->tcp->dest;
	skc = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (skc) {
		pass = skc->state != BPF_TCP_LISTEN &&
		       !(skc->state == BPF_TCP_TIME_WAIT && h->tcp->syn);
		bpf_sk_release(skc);
	}
	if (pass)
		return TC_ACT_UNSPEC;
	COUNT(guarded, 1);
	return TC_ACT_SHOT;
}

SEC("tc")
int be_ingress(struct __sk_buff *skb)
{
	__u8 from[16];
	struct headers h;
	struct iphdr *ip;
	__u32 offset = 0;

	if (skb->pkt_type != PACKET_HOST || skb->protocol != bpf_htons(ETH_P_IP))
		return TC_ACT_UNSPEC;
	if (bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*ip)) < 0)
		return TC_ACT_UNSPEC;
	ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	if (ip->protocol == IPPROTO_IPIP && ip->ihl == 5 && ip->daddr == unmap_v4(conf.raddr) &&
	    !(ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))) {
		map_v4(from, ip->saddr);
		offset = sizeof(*ip);
	}
	if (parse_tcp(skb, offset, &h) < 0 || h.ip->daddr != unmap_v4(conf.vaddr))
		return TC_ACT_UNSPEC;
	if (offset) {
		if (!bpf_map_lookup_elem(&frontends, from)) {
			COUNT(foreign, 1);
			return TC_ACT_SHOT;
		}
		if (bpf_skb_adjust_room(skb, -(int)offset, BPF_ADJ_ROOM_MAC,
					BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_DECAP_L3_IPV4 |
						BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0 ||
		    parse_tcp(skb, 0, &h) < 0)
			return TC_ACT_SHOT;
		COUNT(decapsulated, 1);
	}
	return guard(skb, &h);
}

/* Make the forged packet the last ACK of a handshake, and its socket a child of the listener. */
static __always_inline void adopt(struct __sk_buff *skb, struct tcpha_op *op)
{
	struct bpf_tcp_req_attrs attrs = {};
	struct bpf_sock_tuple t = {};
	struct tcp_sock *listener;
	struct bpf_sock *skc;

	query(skb, op);
	if (op->result != TCPHA_R_NO_SOCKET)
		return;
	op->result = TCPHA_R_NO_LISTENER;
	tuple_of(&op->flow, &t);
	t.ipv4.daddr = unmap_v4(op->listen_addr);
	t.ipv4.dport = op->listen_port;
	skc = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!skc)
		return;
	if (skc->state != BPF_TCP_LISTEN)
		goto out;
	listener = bpf_skc_to_tcp_sock(skc);
	if (!listener)
		goto out;
	attrs.mss = op->mss;
	attrs.snd_wscale = op->snd_wscale;
	attrs.rcv_wscale = op->rcv_wscale;
	attrs.wscale_ok = op->wscale_ok;
	attrs.sack_ok = op->sack_ok;
	attrs.ecn_ok = op->ecn_ok;
	attrs.tstamp_ok = op->tstamp_ok;
	attrs.usec_ts_ok = op->usec_ts_ok;
	attrs.rcv_tsval = op->ts_recent;
	attrs.rcv_tsecr = op->tsval;
	op->error = bpf_sk_assign_tcp_reqsk(skb, (struct sock *)listener, &attrs, sizeof(attrs));
	op->result = op->error ? TCPHA_R_ASSIGN : TCPHA_R_OK;
out:
	bpf_sk_release(skc);
}

SEC("tc")
int be_tap(struct __sk_buff *skb)
{
	struct tcpha_op *op;
	struct headers h;
	__u32 slot;

	if (skb->protocol == bpf_htons(TCPHA_ETH_OP))
		return run_op_frame(skb);
	if (skb->protocol != bpf_htons(ETH_P_IP) || parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	bpf_skb_change_type(skb, PACKET_HOST);
	if (parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	slot = bpf_ntohs(h.ip->id);
	if (slot == TCPHA_IPID_PLAIN)
		return TC_ACT_OK;
	op = bpf_map_lookup_elem(&ops, &slot);
	if (!op || op->kind != TCPHA_OP_ADOPT)
		return TC_ACT_SHOT;
	adopt(skb, op);
	return op->result == TCPHA_R_OK ? TC_ACT_OK : TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "GPL";
