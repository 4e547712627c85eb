/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The back end: only what belongs to a socket gets to a VIP. */
#ifndef BE_GUARD_BPF_H
#define BE_GUARD_BPF_H

#include "be_adopt.bpf.h"

/* The socket that owns a packet's 4-tuple. */
struct found {
	__u32 state;	 /* 0: there is none */
	__u32 rcv_nxt;	 /* what would end it */
	__u32 ts_recent; /* of one in TIME_WAIT */
	bool other;	 /* the packet may be the first of another connection */
};

/*
 * Whether a segment is the first one of a socket's own connection, which a network has delivered once more:
 * however old what it acknowledges is, it is for that socket to judge.
 */
static __always_inline bool began_with(const struct tcp_sock *tp, __u32 seq)
{
	return seq == tp->rcv_nxt - (__u32)tp->bytes_received;
}

static __always_inline void find_socket(struct __sk_buff *skb, const struct packet *p,
					const struct tagged *tag, struct found *s)
{
	struct bpf_sock_tuple t = {};
	struct tcp_timewait_sock *tw;
	struct bpf_sock *skc;
	struct tcp_sock *tp;

	tuple_of(&p->flow, &t);
	skc = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (!skc)
		return;
	s->state = skc->state;
	if (s->state == BPF_TCP_TIME_WAIT) {
		tw = bpf_skc_to_tcp_timewait_sock(skc);
		if (tw) {
			s->rcv_nxt = tw->tw_sk.__tw_common.skc_tw_rcv_nxt;
			s->ts_recent = tw->tw_ts_recent;
			s->other = true;
		}
	} else if (conf.fast && s->state != BPF_TCP_LISTEN) {
		tp = bpf_skc_to_tcp_sock(skc);
		if (tp) { /* what it acknowledges was never sent by that one */
			s->rcv_nxt = tp->rcv_nxt;
			s->other = !began_with(tp, p->seq) && ((__s32)(tag->ack - tp->write_seq) > 0 ||
							       (__s32)(tp->snd_una - tag->ack) > (1 << 20));
		}
	}
	bpf_sk_release(skc);
}

/*
 * Whether a segment that finds a TIME_WAIT socket is its own, late, and not the first one of a new
 * connection. If that socket's connection was adopted by cookie, its initial sequence number is known;
 * whether another one is that of a newer handshake, adopt_by_cookie() can tell. Else it is as for a SYN (RFC
 * 6191).
 */
static __always_inline bool belongs_to_past(const struct packet *p, const struct options *o,
					    const struct found *s)
{
	struct tcpha_adoption *a = bpf_map_lookup_elem(&adoptions, &p->flow);

	if (a)
		return a->state == TCPHA_ADOPTED && a->isn == p->seq - 1;
	return (__s32)(p->seq - s->rcv_nxt) <= 0 &&
	       !((o->found & OPT_TS) && s->ts_recent && (__s32)(o->tsval - s->ts_recent) > 0);
}

/*
 * Only what belongs to a socket may pass. A packet that found just the listener would be answered with a RST,
 * a SYN with a SYN-ACK, and both are the front end's business. last: user space has looked for room, and
 * there is none.
 */
static __always_inline int guard(struct __sk_buff *skb, const struct packet *p, bool last)
{
	struct arrival a = {.last = last};
	struct found s = {};
	bool control = p->flags & (TCPHA_T_SYN | TCPHA_T_RST), pass;
	int verdict;

	read_tag(&a.tag, p);
	find_socket(skb, p, &a.tag, &s);
	pass = s.state && s.state != BPF_TCP_LISTEN &&
	       !(s.state == BPF_TCP_TIME_WAIT && p->flags & TCPHA_T_SYN);
	if (pass && !s.other) {
		if (is_again(skb))
			skb->mark = 0;
		return let_pass(skb, p, &a.tag);
	}
	if (conf.fast && p->doff >= sizeof(struct tcphdr) && read_options(skb, p, &a.c.opt) < 0)
		return TC_ACT_SHOT;
	if (s.state == BPF_TCP_TIME_WAIT && pass && belongs_to_past(p, &a.c.opt, &s))
		return let_pass(skb, p, &a.tag);
	verdict = adopt_by_cookie(skb, p, &a, s.other ? &s.rcv_nxt : 0);
	if (verdict == TC_ACT_SHOT && conf.fast && !control)
		verdict = behind_first(skb, p, s.state);
	/* only what the socket expects: should it end meanwhile, our stack answers all else with a RST */
	if (verdict == TC_ACT_SHOT && pass &&
	    (!conf.fast || control || (s.state == BPF_TCP_TIME_WAIT && (__s32)(p->seq - s.rcv_nxt) <= 0)))
		return let_pass(skb, p, &a.tag);
	if (verdict == TC_ACT_SHOT)
		COUNT(guarded, 1);
	return verdict;
}

#endif
