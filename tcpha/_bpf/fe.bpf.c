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
#include <stdbool.h>

#ifndef SOCKET_PATH_ONLY
#define PACKET_PATH true
#else
#define PACKET_PATH false
#endif

#include "fe_forward.bpf.h"
#include "fe_ops.bpf.h"
#include "fe_passed.bpf.h"

/* Whether our stack would answer a packet with a RST, and that would be too early: see drop_unknown. */
static __always_inline bool is_unknown(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple t = {};
	struct tcpha_state *own;
	__u32 zero = 0, socket;

	own = bpf_map_lookup_elem(&state, &zero);
	if (!own || !own->drop_unknown || p->flags & TCPHA_T_SYN)
		return false;
	tuple_of(&p->flow, &t);
	socket = owner(skb, &t);
	return !socket || socket == BPF_TCP_LISTEN;
}

/* A packet of a flow that has an entry. */
static __always_inline int existing_flow(struct __sk_buff *skb, const struct packet *p, struct tcpha_entry *e)
{
	return e->flags & TCPHA_F_FAST ? fast_flow(skb, p, e, false) : follow_entry(skb, p, e);
}

SEC("tc")
int fe_ingress(struct __sk_buff *skb)
{
	struct tcpha_entry *e;
	struct packet p;
	int verdict;

	if (!is_for_us(skb))
		return TC_ACT_UNSPEC;
	if (parse(skb, &p) < 0) {
		mark_fragment(skb);
		return forward_icmp(skb);
	}
	if (!service_of(&p.flow))
		return TC_ACT_UNSPEC;
	e = bpf_map_lookup_elem(&flows, &p.flow);
	if (e && e->flags & TCPHA_F_FAST && p.flags & TCPHA_T_SYN && p.seq + 1 == e->first_seq)
		return TC_ACT_SHOT; /* a late copy of the SYN that the flow began with */
	if (!e || !is_of(&p, e)) {
		verdict = PACKET_PATH ? new_flow(skb, &p, e) : TC_ACT_UNSPEC;
		if (verdict == TC_ACT_UNSPEC && is_unknown(skb, &p))
			return TC_ACT_SHOT;
		if (verdict != NEXT)
			return verdict == ACCEPTED ? TC_ACT_UNSPEC : verdict;
		e = bpf_map_lookup_elem(&flows, &p.flow);
		if (!e || !is_of(&p, e))
			return TC_ACT_SHOT;
	}
	return existing_flow(skb, &p, e);
}

SEC("tc")
int fe_tap(struct __sk_buff *skb)
{
	struct tcpha_entry *e;
	struct tcpha_frame frame;
	struct packet p;
	__u32 state;
	bool kept;

	if (skb->protocol == bpf_htons(TCPHA_ETH_OP)) {
		operate(skb);
		return TC_ACT_SHOT;
	}
	if (skb->protocol != bpf_htons(ETH_P_IP) || parse(skb, &p) < 0 || !read_frame(skb, &frame))
		return TC_ACT_SHOT;
	kept = frame.mark == bpf_htons(TCPHA_MAC_KEPT);
	e = bpf_map_lookup_elem(&flows, &p.flow);
	if (e && is_of(&p, e)) {
		state = tcpha_state_of(e);
		if (kept && state == TCPHA_DRAINING)
			return forward(skb, &p, e, false);
		if (!kept || state != TCPHA_HELD)
			return follow_entry(skb, &p, e);
	}
	return to_stack(skb);
}

SEC("tc")
int fe_fast(struct __sk_buff *skb)
{
	struct tcpha_frame frame;
	struct passed f = {};
	__u32 worker;
	bool request;

	if (!PACKET_PATH || skb->protocol != bpf_htons(ETH_P_IP) || !read_frame(skb, &frame) ||
	    parse(skb, &f.p) < 0 || f.p.doff < sizeof(struct tcphdr))
		return TC_ACT_SHOT;
	f.kind = frame.kind;
	f.e = bpf_map_lookup_elem(&flows, &f.p.flow);
	tuple_of(&f.p.flow, &f.t);
	if (f.kind == TCPHA_FAST_ACCEPT)
		return accept_here(skb, &f);
	worker = frame.worker;
	f.o = bpf_map_lookup_elem(&offers, &worker);
	if (!f.o)
		return TC_ACT_SHOT;
	f.socket = owner(skb, &f.t);
	request = (f.kind == TCPHA_FAST_SEND || f.kind == TCPHA_FAST_SOCKET) && f.p.length;
	if (request && f.socket && f.socket != BPF_TCP_LISTEN && (!f.e || is_waiting(f.e)))
		return overtaken(skb, &f);
	switch (f.kind) {
	case TCPHA_FAST_PASSED:
		return gone_on(&f);
	case TCPHA_FAST_SEND:
		return send(skb, &f);
	case TCPHA_FAST_SOCKET:
		return f.p.length ? unusual(skb, &f) : wake(skb, &f);
	}
	return later(skb, &f);
}

char LICENSE[] SEC("license") = "GPL";
