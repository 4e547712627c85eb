// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Back end: adoption of connections, and the guard before them.
 *
 * be_ingress	tc ingress of the network interfaces: unwraps tunnelled packets; lets only packets of
 *		existing sockets reach a VIP
 * be_tap	tc ingress of the daemon's TAP device: operations and forged packets
 * be_forged	tc ingress of each device that a listener is bound to: forged packets for that one again
 *
 * A look-up finds sockets that are bound to a device only if it is made there, and such a socket takes only
 * packets that arrive there. be_forged also runs, by BPF_PROG_TEST_RUN, for operations.
 */
#include <stdbool.h>

#include "be_guard.bpf.h"
#include "be_tunnel.bpf.h"

SEC("tc")
int be_ingress(struct __sk_buff *skb)
{
	struct packet p;
	struct iphdr *ip;
	int verdict;

	if (!is_for_us(skb))
		return TC_ACT_UNSPEC;
	if (bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*ip)) < 0)
		return TC_ACT_UNSPEC;
	ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	if (ip->protocol == IPPROTO_IPIP && ip->daddr == unmap_v4(conf.raddr)) {
		verdict = tunnelled(skb, ip);
		if (verdict != UNWRAPPED)
			return verdict;
	}
	if (parse(skb, &p) < 0)
		return keeps_out(skb) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (!is_vip(unmap_v4(p.flow.vaddr)))
		return TC_ACT_UNSPEC;
	return guard(skb, &p, false);
}

/* What the client and the front end agreed on. */
static __always_inline void agreed(const struct tcpha_op *op, struct bpf_tcp_req_attrs *attrs)
{
	attrs->mss = op->mss;
	attrs->snd_wscale = op->snd_wscale;
	attrs->rcv_wscale = op->rcv_wscale;
	attrs->wscale_ok = op->wscale_ok;
	attrs->sack_ok = op->sack_ok;
	attrs->ecn_ok = op->ecn_ok;
	attrs->tstamp_ok = op->tstamp_ok;
	attrs->usec_ts_ok = op->usec_ts_ok;
	attrs->rcv_tsval = op->ts_recent;
	attrs->rcv_tsecr = op->tsval;
}

/* Make the forged packet the last ACK of a handshake, and its socket a child of the listener. */
static __always_inline void adopt(struct __sk_buff *skb, struct tcpha_op *op)
{
	const struct tcpha_listener *to;
	struct bpf_tcp_req_attrs attrs = {};
	struct bpf_sock_tuple t = {};
	struct tcp_sock *listener;
	struct bpf_sock *skc;

	query(skb, op);
	if (op->result != TCPHA_R_NO_SOCKET)
		return;
	op->result = TCPHA_R_ASSIGN;
	if (skb->ifindex != conf.tap && is_shared(skb))
		return;
	op->result = TCPHA_R_NO_LISTENER;
	to = listener_of(&op->flow);
	if (!to)
		return;
	tuple_of(&op->flow, &t);
	t.ipv4.daddr = unmap_v4(to->addr);
	t.ipv4.dport = to->port;
	skc = find_listener(skb, &t);
	if (!skc)
		return;
	if (skc->state != BPF_TCP_LISTEN)
		goto out;
	listener = bpf_skc_to_tcp_sock(skc);
	if (!listener)
		goto out;
	agreed(op, &attrs);
	op->error = bpf_sk_assign_tcp_reqsk(skb, (struct sock *)listener, &attrs, sizeof(attrs));
	op->result = op->error ? TCPHA_R_ASSIGN : TCPHA_R_OK;
	bpf_map_delete_elem(&adoptions, &op->flow); /* what it says is of an older connection */
out:
	bpf_sk_release(skc);
}

/* A packet that user space has written. */
static __always_inline int forged(struct __sk_buff *skb, const struct packet *p)
{
	struct tcpha_frame frame;
	struct tcpha_op *op;
	__u32 slot;
	int verdict;

	if (!read_frame(skb, &frame))
		return TC_ACT_SHOT;
	bpf_skb_change_type(skb, PACKET_HOST);
	if (frame.mark == bpf_htons(TCPHA_MAC_ROOM))
		return guard(skb, p, frame.full);
	if (frame.mark == bpf_htons(TCPHA_MAC_PLAIN))
		return TC_ACT_OK;
	if (frame.mark != bpf_htons(TCPHA_MAC_ADOPT))
		return TC_ACT_SHOT;
	slot = frame.slot;
	op = bpf_map_lookup_elem(&ops, &slot);
	if (!op || op->flow.cport != p->flow.cport || unmap_v4(op->flow.caddr) != unmap_v4(p->flow.caddr) ||
	    __sync_val_compare_and_swap(&op->kind, TCPHA_OP_ADOPT, 0) != TCPHA_OP_ADOPT)
		return TC_ACT_SHOT; /* too late: user space has given it up */
	adopt(skb, op);
	verdict = op->result == TCPHA_R_OK ? TC_ACT_OK : TC_ACT_SHOT;
	op->done = 1; /* last: user space may be looking at it already */
	return verdict;
}

static __always_inline void operate(struct __sk_buff *skb)
{
	struct tcpha_op *op = op_of_frame(skb);

	if (op && op->kind == TCPHA_OP_QUERY)
		query(skb, op);
}

SEC("tc")
int be_tap(struct __sk_buff *skb)
{
	const struct tcpha_listener *to;
	struct packet p;

	if (skb->protocol == bpf_htons(TCPHA_ETH_OP)) {
		operate(skb);
		return TC_ACT_SHOT;
	}
	if (skb->protocol != bpf_htons(ETH_P_IP) || parse(skb, &p) < 0)
		return TC_ACT_SHOT;
	to = listener_of(&p.flow);
	if (!to || !to->device)
		return forged(skb, &p);
	skb->mark = TCPHA_MARK_FORGED;
	return bpf_redirect(to->device, BPF_F_INGRESS);
}

SEC("tc")
int be_forged(struct __sk_buff *skb)
{
	struct packet p;
	int verdict;

	if (is_again(skb)) /* be_ingress is next; the MAC may be one of ours */
		bpf_skb_change_type(skb, PACKET_HOST);
	if (skb->mark != TCPHA_MARK_FORGED)
		return TC_ACT_UNSPEC;
	if (skb->protocol == bpf_htons(TCPHA_ETH_OP)) {
		operate(skb);
		return TC_ACT_SHOT;
	}
	skb->mark = 0;
	if (parse(skb, &p) < 0)
		return TC_ACT_SHOT;
	verdict = forged(skb, &p);
	return verdict == TC_ACT_UNSPEC ? TC_ACT_OK : verdict; /* be_ingress has nothing to judge here */
}

char LICENSE[] SEC("license") = "GPL";
