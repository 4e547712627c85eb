/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The packet path: what comes back from the worker to whom a packet went, and what is to become of it. */
#ifndef FE_PASSED_BPF_H
#define FE_PASSED_BPF_H

#include "fe_path.bpf.h"

/* What user space writes to the fast TAP: a packet, what it was for, and which worker has sent it. */
struct passed {
	struct packet p;
	struct bpf_sock_tuple t;
	struct tcpha_entry *e;
	struct tcpha_offer *o;
	__u32 socket; /* state of the socket that owns its 4-tuple; 0: none does */
	__u32 kind;   /* TCPHA_FAST_* */
};

/* A worker has chosen: make the entry what it says. Returns whether the packet may go on by it. */
static __always_inline bool take_offer(struct tcpha_offer *o, struct tcpha_entry *e)
{
	__u64 was = tcpha_phase_of(e);

	o->old = 0;
	o->start_ns = e->start_ns;
	o->result = tcpha_is_forwarded(tcpha_phase_state(was)) ? 2 : 0;
	if (!tcpha_is_pending(tcpha_phase_state(was)))
		return o->result;
	e->backend = o->backend;
	e->rule = o->rule;
	e->id = o->id;
	e->target_len = o->target_len;
	__builtin_memcpy(e->target, o->target, sizeof(e->target));
	e->flags &= ~TCPHA_F_NEW_SYN; /* a SYN that came meanwhile was not the one of this request */
	if (!o->alone)
		__sync_fetch_and_add(&e->behind, 1);
	/* unless it is being dropped, or replaced, as its client was silent for long, or gone */
	if (tcpha_offer(e, was, o->id)) {
		o->old = tcpha_owed(was, 0);
		o->result = 1;
	}
	return o->result == 1;
}

static __always_inline bool is_waiting(const struct tcpha_entry *e)
{
	return e && tcpha_is_pending(tcpha_state_of(e));
}

/* A segment that could not become a socket on the device that it came from. */
static __always_inline int accept_here(struct __sk_buff *skb, struct passed *f)
{
	__u32 zero = 0;
	struct tcpha_state *own = bpf_map_lookup_elem(&state, &zero);
	struct cookie c = {};

	if (!own || read_options(skb, &f->p, &c.opt) < 0 ||
	    !cookie_check(&f->p.flow, &own->keys, f->p.seq, f->p.ack, &c) ||
	    cookie_accept(skb, &f->t, &c, conf.wscale, c.rtt_ms))
		return TC_ACT_SHOT;
	bpf_map_delete_elem(&shaken, &f->p.flow);
	return to_stack(skb);
}

/* A request that got a socket, as its client was silent for long, when it was on its way already. */
static __always_inline int overtaken(struct __sk_buff *skb, struct passed *f)
{
	__u64 was = f->e ? tcpha_phase_of(f->e) : 0;

	if (f->e && tcpha_drop(f->e, was)) {
		f->o->old = tcpha_owed(was, 0);
		bpf_map_delete_elem(&flows, &f->p.flow);
	}
	return to_stack(skb);
}

/* A request, and to whom it goes. */
static __always_inline int send(struct __sk_buff *skb, struct passed *f)
{
	if (!f->e || f->p.seq != f->e->first_seq || !take_offer(f->o, f->e) || !is_of(&f->p, f->e))
		return TC_ACT_SHOT;
	return fast_flow(skb, &f->p, f->e, true);
}

/* A client that has been silent since the handshake: user space forged its ACK, which is to be a socket. */
static __always_inline int wake(struct __sk_buff *skb, struct passed *f)
{
	__u32 zero = 0;
	struct tcpha_state *own = bpf_map_lookup_elem(&state, &zero);
	struct cookie c = {};

	f->o->result = 1; /* it is no longer silent, unless we find otherwise */
	if (!own || (f->e && is_of(&f->p, f->e)) || read_options(skb, &f->p, &c.opt) < 0 ||
	    !cookie_check(&f->p.flow, &own->keys, f->p.seq, f->p.ack, &c) || f->socket != BPF_TCP_LISTEN)
		return TC_ACT_SHOT;
	if (cookie_accept(skb, &f->t, &c, conf.wscale, f->o->rtt_ms)) {
		f->o->result = 0; /* there may be room later */
		return TC_ACT_SHOT;
	}
	return to_stack(skb);
}

/* A request that is not plain becomes a socket. The worker removes the entry, once there is one. */
static __always_inline int unusual(struct __sk_buff *skb, struct passed *f)
{
	__u32 zero = 0;
	struct tcpha_state *own = bpf_map_lookup_elem(&state, &zero);
	struct cookie c = {};

	f->o->result = 0;
	if (!own || !is_waiting(f->e) || f->p.seq != f->e->first_seq || read_options(skb, &f->p, &c.opt) < 0)
		return TC_ACT_SHOT;
	cookie_check(&f->p.flow, &own->keys, f->p.seq, f->p.ack, &c); /* tells what was agreed */
	if (cookie_accept(skb, &f->t, &c, conf.wscale, f->e->rtt_ms))
		return TC_ACT_SHOT; /* the client's next attempt may find room */
	f->o->old = tcpha_settle(f->e);
	f->o->result = 1;
	return to_stack(skb);
}

/* What came behind a request, or before it. */
static __always_inline int later(struct __sk_buff *skb, struct passed *f)
{
	if (f->kind == TCPHA_FAST_EARLY && is_waiting(f->e))
		return to_worker_later(skb, f->e); /* behind the first one, which waits there by now */
	if (f->e && is_of(&f->p, f->e))
		return f->e->flags & TCPHA_F_FAST && tcpha_is_forwarded(tcpha_state_of(f->e))
			       ? fast_flow(skb, &f->p, f->e, f->kind == TCPHA_FAST_LATER)
			       : follow_entry(skb, &f->p, f->e);
	if (f->kind == TCPHA_FAST_EARLY && f->socket == BPF_TCP_LISTEN)
		return TC_ACT_SHOT; /* there was no room for a socket; the listener would answer with a RST */
	return to_stack(skb);
}

/* The worker has sent on all that it had of a flow, or one of that. */
static __always_inline int gone_on(struct passed *f)
{
	if (f->e && f->e->behind)
		__sync_fetch_and_add(&f->e->behind, -1);
	return TC_ACT_SHOT;
}

#endif
