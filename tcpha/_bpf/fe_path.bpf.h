/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The packet path: a handshake whose SYN was answered by cookie, the segment that brings the request, and
 * what follows that. Each stage returns TC_ACT_*, or that it is not its business.
 */
#ifndef FE_PATH_BPF_H
#define FE_PATH_BPF_H

#include <linux/errno.h>

#include "fe_forward.bpf.h"
#include "fe_syn.bpf.h"
#include "cache.bpf.h"

/* No TC_ACT_* */
#define NEXT 1000     /* it is another stage's */
#define ACCEPTED 1001 /* it makes a socket of our own */
#define NO_ROOM 1002  /* the flow table is full */

/* A frame for a worker. */
static __always_inline int to_worker(struct __sk_buff *skb, __u8 kind)
{
	struct tcpha_frame frame = {.mark = bpf_htons(TCPHA_MAC_FAST), .kind = kind};

	return to_tap(skb, &frame, conf.fast_tap, 0);
}

/*
 * To the worker, behind the flow's request. Until it has sent all such on, and that, none that comes later
 * may go by itself.
 */
static __always_inline int to_worker_later(struct __sk_buff *skb, struct tcpha_entry *e)
{
	__sync_fetch_and_add(&e->behind, 1);
	return to_worker(skb, TCPHA_FAST_LATER);
}

#define BEHIND_NS 1000000000ULL /* far longer than a worker needs: one that is still counted was lost */

/* Whether packets of a flow that has its back end are still with a worker. */
static __always_inline bool is_crowded(const struct tcpha_entry *e)
{
	return tcpha_now(&e->behind) && now_ns() - e->start_ns < BEHIND_NS;
}

/* Whether the back end that got a request takes nothing now, so that another one may serve it. */
static __always_inline bool is_down(__u32 backend)
{
	struct tcpha_backend *be = bpf_map_lookup_elem(&backends, &backend);

	return be && be->down;
}

/* A packet of a flow that took the packet path. passed: by a worker, so nothing is before it. */
static __always_inline int fast_flow(struct __sk_buff *skb, const struct packet *p, struct tcpha_entry *e,
				     bool passed)
{
	__u32 state = tcpha_state_of(e), index;
	__u32 length = p->flags & TCPHA_T_SYN ? 0 : p->length;
	bool first = p->seq == e->first_seq && length;

	if (tcpha_is_pending(state))
		return first ? to_worker(skb, TCPHA_FAST_FIRST) : to_worker_later(skb, e);
	if (first && tcpha_is_over(state))
		return TC_ACT_SHOT; /* a late copy: it must not be served a second time */
	if (p->flags & TCPHA_T_ACK && p->ack != e->first_ack && !(e->flags & TCPHA_F_ANSWERED))
		e->flags |= TCPHA_F_ANSWERED; /* once: another CPU may be about to change another flag */
	first = first && !(e->flags & TCPHA_F_ANSWERED);
	index = tcpha_now(&e->backend);
	if (first && is_down(index)) {
		if (!tcpha_retry(e, e->id, index))
			return TC_ACT_SHOT; /* a copy of this segment, on another CPU, goes on */
		begin_anew(e);
		return to_worker(skb, TCPHA_FAST_FIRST);
	}
	/*
	 * This copy has an urgent byte, so the server would read other bytes of it than we did. Only a socket
	 * that exists may get it. If there is none, the connection comes back to us (DOUBT).
	 */
	if (urgent_end(p) && urgent_end(p) <= length)
		first = false;
	if (first)
		tell_rtt(skb, p, e->rtt_ms);
	else if (!passed && is_crowded(e))
		return to_worker_later(skb, e);
	return forward(skb, p, e, first);
}

/* What is known of a packet that belongs to no back end. */
struct arrival {
	struct bpf_sock_tuple t;
	struct cookie c;
	struct tcpha_state *own;
	struct tcpha_shaken *before; /* the end of the flow's handshake, or 0 */
	struct tcpha_entry *older;   /* the entry of an older flow of its 4-tuple, or 0 */
	__u32 socket;		     /* state of the socket that owns its 4-tuple; 0: none does */
};

/* Whether a listener of ours answers for it; else our own stack has the connection, or refuses it. */
static __always_inline bool is_listening(const struct arrival *a)
{
	return a->socket == BPF_TCP_LISTEN;
}

static __always_inline int on_syn(struct __sk_buff *skb, const struct packet *p, const struct arrival *a)
{
	const __u32 *service = service_of(&p->flow);

	if (!service || *service == TCPHA_CLOSED || !is_listening(a) ||
	    p->flags & (TCPHA_T_ACK | TCPHA_T_RST | TCPHA_T_FIN) ||
	    p->l4 != ETH_HLEN + sizeof(struct iphdr) || p->doff < sizeof(struct tcphdr) || !a->own->keys.used)
		return TC_ACT_UNSPEC;
	return answer_syn(skb, p, a->own);
}

/*
 * A connection whose handshake's ACK and request are both late or lost shows first what comes behind them,
 * and nothing in that proves the cookie. So a RST has to wait until the client has repeated its request:
 * longer than the first RTO of whoever has measured the RTT of the handshake (RFC 6298). The RST for a
 * connection that is dead indeed is for the client's retransmission.
 */
#define EARLY_NS 1000000000ULL
#define UNKNOWN_NS 60000000000ULL

static __always_inline bool may_be_early(const struct tcpha_flow *flow)
{
	__u64 now = now_ns(), *since = bpf_map_lookup_elem(&unknown_flows, flow);

	if (since && now - *since < UNKNOWN_NS)
		return now - *since < EARLY_NS;
	bpf_map_update_elem(&unknown_flows, flow, &now, BPF_ANY);
	return true;
}

/* A segment that has no cookie of ours, or one that does not count. */
static __always_inline int without_cookie(struct __sk_buff *skb, const struct packet *p, struct arrival *a)
{
	struct tcpha_entry *fresh;

	if (a->before && p->seq - a->before->isn < TCPHA_LEAP) /* or a keep-alive probe */
		return p->seq != a->before->isn && p->length ? to_worker(skb, TCPHA_FAST_EARLY) : TC_ACT_SHOT;
	/*
	 * Another CPU may have had the first segment since we looked for an entry. It makes the entry, and
	 * perhaps a socket in its place, before 'shaken' forgets. So look again.
	 */
	if (owner(skb, &a->t) != BPF_TCP_LISTEN)
		return TC_ACT_UNSPEC;
	fresh = bpf_map_lookup_elem(&flows, &p->flow);
	if (fresh && fresh != a->older)
		return NEXT;
	COUNT(forged, 1);
	if (!a->c.good && !(a->c.opt.found & OPT_TS)) /* or clients whom we left out would keep us wary */
		note_guess();
	if ((p->length || p->flags & TCPHA_T_FIN) && may_be_early(&p->flow))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC; /* which says so with a RST */
}

/* The end of a handshake: all that is kept of a connection before its request comes. */
static __always_inline void note_handshake(const struct packet *p, const struct arrival *a)
{
	struct tcpha_shaken now = {};

	if (a->before && a->before->isn == a->c.isn)
		return;
	now.since_ns = now_ns();
	now.isn = a->c.isn;
	now.ours = a->c.ours;
	now.rtt_ms = a->c.rtt_ms;
	now.tsval = a->c.opt.tsval;
	now.tsecr = a->c.opt.tsecr;
	now.timestamps = (a->c.opt.found & OPT_TS) != 0;
	now.window = bpf_ntohs(p->window);
	bpf_map_update_elem(&shaken, &p->flow, &now, BPF_ANY);
}

/* The segment becomes a socket of our own. */
static __always_inline int to_socket(struct __sk_buff *skb, const struct packet *p, struct arrival *a)
{
	struct tcpha_frame frame = {.mark = bpf_htons(TCPHA_MAC_FAST), .kind = TCPHA_FAST_ACCEPT};

	if (is_shared(skb))
		return to_tap(skb, &frame, conf.fast_tap, BPF_F_INGRESS);
	bpf_map_delete_elem(&shaken, &p->flow);
	return cookie_accept(skb, &a->t, &a->c, conf.wscale, a->c.rtt_ms) ? TC_ACT_SHOT : ACCEPTED;
}

/*
 * Whether a segment is known to be undamaged, so that what is in it may decide: its checksum was verified, or
 * has not been made yet. A device that has summed the whole packet says with what result; the IP header,
 * which is right, adds nothing.
 */
static __always_inline bool is_sound(struct __sk_buff *skb, const struct packet *p)
{
	const struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	__u32 summed = BPF_CORE_READ_BITFIELD(kernel, ip_summed);

	if (summed == CHECKSUM_COMPLETE)
		return fold(pseudo_sum(unmap_v4(p->flow.caddr), unmap_v4(p->flow.vaddr),
				       p->doff + p->length) +
			    kernel->csum) == 0xffff;
	return summed == CHECKSUM_UNNECESSARY || summed == CHECKSUM_PARTIAL;
}

#define GOING_ROUNDS 4096 /* far longer than another CPU needs from TCPHA_GONE to what becomes of it */

static long has_gone(__u32 i, void *ctx)
{
	const struct tcpha_flow *flow = ctx;
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, flow);

	(void)i;
	return !e || tcpha_state_of(e) != TCPHA_GONE;
}

/*
 * Claim an entry, to replace it; *was gets its phase. 1: it is ours. -1: another CPU has replaced it, with a
 * copy of our segment, which goes on. 0: it is gone, or about to be. It is looked up once more, as the memory
 * of one that is gone may be another flow's at any time.
 */
static __always_inline int claim(struct tcpha_entry *e, struct tcpha_flow *flow, __u64 *was)
{
	struct tcpha_entry *now = bpf_map_lookup_elem(&flows, flow);

	if (now != e)
		return now ? -1 : 0;
	*was = tcpha_claim(e);
	if (tcpha_phase_state(*was) != TCPHA_GONE)
		return 1;
	bpf_loop(GOING_ROUNDS, has_gone, flow, 0);
	return bpf_map_lookup_elem(&flows, flow) ? -1 : 0;
}

/* An entry for the request, not in the table yet; or 0. */
static __always_inline struct tcpha_entry *draft(const struct packet *p, const struct arrival *a)
{
	__u32 zero = 0, rtt_ms = a->c.rtt_ms;
	struct tcpha_entry *fresh = bpf_map_lookup_elem(&scratch, &zero);

	if (!fresh)
		return 0;
	if (a->before && a->before->isn == a->c.isn)
		rtt_ms = a->before->rtt_ms;
	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->tag = tcpha_tag(&p->flow);
	fresh->flags = TCPHA_F_FAST;
	fresh->start_ns = fresh->last_ns = now_ns();
	fresh->end_seq = fresh->first_seq = p->seq;
	fresh->first_ack = p->ack;
	fresh->rtt_ms = rtt_ms > 0xffff ? 0xffff : rtt_ms;
	return fresh;
}

/* A request: the flow begins. It goes on by what is known of others like it, or to a worker. */
static __always_inline int begin(struct __sk_buff *skb, struct packet *p, struct arrival *a, __u64 id)
{
	struct tcpha_entry *fresh = draft(p, a), *e = a->older;
	__u32 older = 0;
	int claimed;
	__u64 was = 0;
	long failed;
	bool hit;

	if (!fresh)
		return TC_ACT_SHOT;
	if (e) {
		claimed = claim(e, &p->flow, &was);
		if (claimed < 0)
			return TC_ACT_SHOT;
		if (!claimed)
			e = 0;
	}
	hit = is_sound(skb, p) && decide(skb, p, fresh);
	if (e)
		older = tcpha_owed(was, e->backend);
	if (hit)
		tcpha_forward(fresh, id);
	else
		tcpha_begin(fresh, older); /* user space counts that it is over */
	failed = bpf_map_update_elem(&flows, &p->flow, fresh, e ? BPF_ANY : BPF_NOEXIST);
	if (failed && e)
		tcpha_unclaim(e, was);
	if (failed)
		return failed == -EEXIST ? TC_ACT_SHOT : NO_ROOM;
	bpf_map_delete_elem(&shaken, &p->flow);
	if (!hit) {
		COUNT(requests, 1);
		return to_worker(skb, TCPHA_FAST_FIRST);
	}
	count_load(fresh->backend, fresh->rule, older);
	count_hit(&p->flow);
	return NEXT;
}

/* As in _fast/message.pyx. */
static __always_inline __u64 fast_id(const struct cookie *c)
{
	return 1ULL << 63 | (__u64)c->isn << 31 | c->ours >> 1;
}

/* A segment of a client that has our cookie. */
static __always_inline int with_cookie(struct __sk_buff *skb, struct packet *p, struct arrival *a)
{
	__u64 id = fast_id(&a->c), *over;
	int verdict = NO_ROOM;

	if (p->flags & TCPHA_T_RST) {
		bpf_map_delete_elem(&shaken, &p->flow);
		return TC_ACT_SHOT;
	}
	over = bpf_map_lookup_elem(&served, &p->flow);
	if (over && *over == id)
		return TC_ACT_SHOT;
	/*
	 * Our daemon was killed, and this client had our SYN-ACK by then. The next run serves it, when it
	 * repeats this.
	 */
	if (!is_listening(a) && (p->length || p->flags & TCPHA_T_FIN))
		return TC_ACT_SHOT;
	if (!p->length && !(p->flags & (TCPHA_T_FIN | TCPHA_T_URG))) {
		note_handshake(p, a);
		return TC_ACT_SHOT;
	}
	/* of urgent data, the server reads other bytes than there are in the segment: ours must, too */
	if (!(p->flags & (TCPHA_T_FIN | TCPHA_T_URG)))
		verdict = begin(skb, p, a, id);
	/* a socket can say, with 503, that there is no room */
	return verdict == NO_ROOM ? to_socket(skb, p, a) : verdict;
}

/*
 * A packet to the VIP that belongs to no back end. NEXT: it does now, or may. Whatever is unusual goes to our
 * stack.
 */
static __always_inline int new_flow(struct __sk_buff *skb, struct packet *p, struct tcpha_entry *older)
{
	struct arrival a = {.older = older};
	__u32 zero = 0;

	a.own = bpf_map_lookup_elem(&state, &zero);
	if (!a.own)
		return TC_ACT_UNSPEC;
	tuple_of(&p->flow, &a.t);
	a.socket = owner(skb, &a.t);
	if (a.socket && !is_listening(&a))
		return TC_ACT_UNSPEC;
	if (p->flags & TCPHA_T_SYN)
		return on_syn(skb, p, &a);
	if (!(p->flags & TCPHA_T_ACK) || p->doff < sizeof(struct tcphdr))
		return TC_ACT_UNSPEC;
	if (read_options(skb, p, &a.c.opt) < 0)
		return TC_ACT_SHOT;
	a.before = bpf_map_lookup_elem(&shaken, &p->flow);
	return has_cookie(p, &a.own->keys, a.before, &a.c) ? with_cookie(skb, p, &a)
							   : without_cookie(skb, p, &a);
}

#endif
