/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The back end: a segment that has the cookie and the tag of a front end becomes a socket. */
#ifndef BE_ADOPT_BPF_H
#define BE_ADOPT_BPF_H

#include "be_maps.bpf.h"
#include "cookie.bpf.h"

/* Below the least RTO (RFC 6298; 200 ms in Linux): no retransmission comes so soon, but a copy does. */
#define COPY_NS 150000000ULL

/* More than the clocks of cookies and of adoptions, in milliseconds of two hosts, can be wrong by. */
#define OLDER_NS 100000000LL

/* For the front end to hear that we do not have a connection, before its request comes again. */
#define GIVE_UP_NS 1000000000ULL

#define REUSED_NS 60000000000ULL
#define YIELD_NS 10000000LL

#define MAX_AGAIN 0xff

static __always_inline bool is_again(const struct __sk_buff *skb)
{
	return (skb->mark & ~MAX_AGAIN) == TCPHA_MARK_AGAIN;
}

/*
 * RST instead of the packet: it ends a socket that expects just this number (RFC 5961 section 3.2). The
 * payload stays, and means nothing: bpf_skb_change_tail() refuses what was tunnelled. So do the options, as
 * part of that: a timestamp that is older than the socket's would have the RST discarded (PAWS).
 */
static __always_inline int into_reset(struct __sk_buff *skb, const struct packet *p, __u32 seq)
{
	__u32 check = p->l4 + __builtin_offsetof(struct tcphdr, check);
	__be32 old_seq = bpf_htonl(p->seq), new_seq = bpf_htonl(seq);
	__be16 new_bits = bpf_htons(5 << 12 | TCPHA_T_RST);

	if (bpf_l4_csum_replace(skb, check, old_seq, new_seq, 4) < 0 ||
	    bpf_l4_csum_replace(skb, check, p->bits, new_bits, 2) < 0 ||
	    bpf_skb_store_bytes(skb, p->l4 + __builtin_offsetof(struct tcphdr, seq), &new_seq, 4, 0) < 0 ||
	    bpf_skb_store_bytes(skb, p->l4 + 12, &new_bits, 2, 0) < 0)
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

/* Tell user space. Adoptions may wait for its next look; a refusal is passed on at once. */
static __always_inline void report(struct tcpha_event *event, const struct tcpha_flow *flow,
				   const struct cookie *c, __u32 frontend, __u32 result, __u32 reused)
{
	event->at_ns = now_ns();
	event->flow = *flow;
	event->isn = c->isn;
	event->ours = c->ours;
	event->frontend = frontend;
	event->result = result;
	event->reused = reused;
	event->pad = 0;
	bpf_ringbuf_submit(event, result == TCPHA_R_OK ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP);
}

/* The tag of a front end on a segment. */
struct tagged {
	__s32 by;  /* index of the front end; -1: it bears none */
	__u32 ack; /* what it acknowledges, without the tag */
};

/* Whether there is a cookie behind a tag: the urgent pointers of two front ends may be the same by chance. */
static __always_inline bool is_cookie(const struct tcpha_flow *flow, const struct tcpha_keys *k, __u32 isn,
				      __u32 ours)
{
	__u64 key0 = k->key[ours & META_KEY][0], key1 = k->key[ours & META_KEY][1];
	__u32 meta = ours & META_MASK;

	return !(((__u32)cookie_hash(flow, key0, key1, isn, meta) ^ ours) >> META_BITS) ||
	       !(((__u32)cookie_hash(flow, key0, key1, isn, meta | META_TIMED) ^ ours) >> META_BITS);
}

/*
 * Whether a front end has put its tag on a segment of a connection that began with isn, the client's. A
 * function of its own for the verifier: what follows need not be looked at for each front end.
 */
__noinline int find_tag(struct tagged *tag, const struct tcpha_flow *flow, __u32 isn, __u32 ack, __u32 urgent)
{
	struct tcpha_keys *k;
	__u64 hash;
	__u32 i, n;

	if (!tag || !flow)
		return 0;
	for (i = 0; i < TCPHA_MAX_FAST; i++) {
		n = i;
		k = bpf_map_lookup_elem(&keys, &n);
		if (!k || !(k->used & 1 << ((ack - 1) & META_KEY)))
			continue;
		hash = tag_hash(flow, k, isn, (ack - 1) & META_MASK);
		if (tag_urgent(hash) != urgent || !is_cookie(flow, k, isn, tag_ack(ack, hash) - 1))
			continue;
		tag->by = i;
		tag->ack = tag_ack(ack, hash);
		return 1;
	}
	return 0;
}

/*
 * The first segment of a connection bears a tag; if it is long, what was cut off from it on its way does,
 * too, and says in no other way what the connection began with.
 */
static __always_inline void read_tag(struct tagged *tag, const struct packet *p)
{
	const __u8 must = TCPHA_T_ACK, must_not = TCPHA_T_URG | TCPHA_T_SYN | TCPHA_T_RST;
	struct tcpha_adoption *a;

	tag->by = -1;
	tag->ack = p->ack;
	if (!conf.fast || !p->urgent || (p->flags & (must | must_not)) != must ||
	    find_tag(tag, &p->flow, p->seq - 1, p->ack, p->urgent))
		return;
	a = bpf_map_lookup_elem(&adoptions, &p->flow);
	if (a)
		find_tag(tag, &p->flow, a->isn, p->ack, p->urgent);
}

/* To a socket, as the client has sent it. */
static __always_inline int let_pass(struct __sk_buff *skb, const struct packet *p, const struct tagged *tag)
{
	if (tag->by >= 0 && write_tag(skb, p->l4, tag->ack, 0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

/* A segment that no socket of ours expects, on its way to become one. */
struct arrival {
	struct tagged tag;
	struct cookie c;
	struct tcpha_gate *gate;
	const struct tcpha_listener *to;
	struct tcpha_adoption *before; /* of the last connection on its 4-tuple, or 0 */
	bool last;		       /* user space has looked for room, and there is none */
};

/* A late copy, of a handshake before the last one on the 4-tuple: that connection is over long since. */
static __always_inline bool is_old(const struct arrival *a)
{
	return a->before && a->before->isn != a->c.isn && a->before->state == TCPHA_ADOPTED &&
	       (a->c.opt.found & OPT_TS) &&
	       (__s64)(__s32)a->c.rtt_ms * 1000000 > (__s64)(now_ns() - a->before->at_ns) + OLDER_NS;
}

/* Whether that connection is over already, or refused: its request is not to be served again. */
static __always_inline bool is_repeated(const struct arrival *a)
{
	__u64 wait;

	if (!a->before || a->before->isn != a->c.isn)
		return false;
	wait = a->before->state == TCPHA_ADOPTED    ? COPY_NS
	       : a->before->state == TCPHA_GIVEN_UP ? GIVE_UP_NS
						    : 0;
	return now_ns() - a->before->at_ns < wait;
}

static __always_inline void note(const struct packet *p, const struct arrival *a, __u32 state)
{
	struct tcpha_adoption now = {.at_ns = now_ns(), .isn = a->c.isn, .state = state};

	bpf_map_update_elem(&adoptions, &p->flow, &now, BPF_ANY);
}

/* End the older socket first, that expects 'old'. This segment comes again, behind that, by the same way. */
static __always_inline int yield_first(struct __sk_buff *skb, const struct packet *p, const struct arrival *a,
				       __u32 old)
{
	__u32 mark = skb->mark;

	if (is_again(skb))
		return TC_ACT_SHOT; /* it did not end: the client's next attempt finds it out */
	note(p, a, TCPHA_YIELDING);
	skb->mark = TCPHA_MARK_AGAIN;
	if (bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS) < 0)
		return TC_ACT_SHOT;
	skb->mark = mark;
	COUNT(yielded, 1);
	return into_reset(skb, p, old);
}

/* To user space, or at once in by our TAP device: what waits for room, or for a device of ours. */
static __always_inline int wait_there(struct __sk_buff *skb, __u64 flags)
{
	struct tcpha_frame frame = {.mark = bpf_htons(TCPHA_MAC_ROOM)};

	return to_tap(skb, &frame, conf.tap, flags);
}

static __always_inline bool has_room(const struct tcpha_gate *g)
{
	return g->live + g->coming < g->max;
}

/* A refusal. */
static __always_inline int refuse(struct tcpha_event *event, const struct packet *p, const struct arrival *a,
				  __u32 result)
{
	report(event, &p->flow, &a->c, a->tag.by, result, 0);
	return TC_ACT_SHOT;
}

/* The segment becomes the socket. k: what its cookie was made with. */
static __always_inline int accept(struct __sk_buff *skb, const struct packet *p, const struct arrival *a,
				  const struct tcpha_keys *k, struct tcpha_event *event)
{
	struct bpf_sock_tuple t = {};
	__u32 reused;
	int result;

	t.ipv4.saddr = unmap_v4(p->flow.caddr);
	t.ipv4.sport = p->flow.cport;
	t.ipv4.daddr = unmap_v4(a->to->addr);
	t.ipv4.dport = a->to->port;
	if (let_pass(skb, p, &a->tag) == TC_ACT_SHOT) {
		bpf_ringbuf_discard(event, 0);
		return TC_ACT_SHOT;
	}
	result = cookie_accept(skb, &t, &a->c, k->wscale, p->df ? bpf_ntohs(p->id) : 0);
	if (result)
		return refuse(event, p, a, result);
	if (is_again(skb))
		skb->mark = 0;
	reused = a->before && now_ns() - a->before->at_ns < REUSED_NS;
	note(p, a, TCPHA_ADOPTED);
	__sync_fetch_and_add(&a->gate->coming, 1);
	COUNT(adopted, 1);
	report(event, &p->flow, &a->c, a->tag.by, TCPHA_R_OK, reused);
	return TC_ACT_UNSPEC;
}

/* Where there is room for it, and where the kernel can give it a socket. */
static __always_inline int adopt_if_room(struct __sk_buff *skb, const struct packet *p,
					 const struct arrival *a, const struct tcpha_keys *k)
{
	struct tcpha_gate *g = a->gate;
	struct tcpha_event *event;

	/* first: an adoption that user space does not hear of would never be known to end */
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return TC_ACT_SHOT;
	if (!has_room(g) && a->last)
		return refuse(event, p, a, TCPHA_R_FULL);
	if (!has_room(g)) { /* reports of ends lag behind: user space looks, and sends it back to us */
		bpf_ringbuf_discard(event, 0);
		return wait_there(skb, 0);
	}
	if (skb->ifindex != conf.tap && is_shared(skb)) {
		if (a->to->device) /* that is where our TAP device would send it back to */
			return refuse(event, p, a, TCPHA_R_ASSIGN);
		bpf_ringbuf_discard(event, 0);
		note(p, a, TCPHA_YIELDING); /* what comes right behind this one has to wait for it */
		return wait_there(skb, BPF_F_INGRESS);
	}
	return accept(skb, p, a, k, event);
}

/*
 * If a segment has the cookie and the tag of one of our front ends, it becomes a socket. old: the sequence
 * number that would end an older socket on the 4-tuple, if there is one.
 */
static __always_inline int adopt_by_cookie(struct __sk_buff *skb, const struct packet *p, struct arrival *a,
					   const __u32 *old)
{
	__u32 n = a->tag.by, zero = 0;
	struct tcpha_keys *k;

	if (a->tag.by < 0 || p->doff < sizeof(struct tcphdr))
		return TC_ACT_SHOT;
	a->gate = bpf_map_lookup_elem(&gate, &zero);
	k = bpf_map_lookup_elem(&keys, &n);
	if (!a->gate || !k || !cookie_check(&p->flow, k, p->seq, a->tag.ack, &a->c))
		return TC_ACT_SHOT;
	a->to = listener_of(&p->flow);
	if (!a->to)
		return TC_ACT_SHOT;
	a->before = bpf_map_lookup_elem(&adoptions, &p->flow);
	if (is_old(a))
		return TC_ACT_SHOT;
	if (old)
		return yield_first(skb, p, a, *old);
	return is_repeated(a) ? TC_ACT_SHOT : adopt_if_room(skb, p, a, k);
}

/*
 * The socket for this segment is being made, on another CPU perhaps, or waits for the end of an older one.
 * So the segment waits, too, or it would be lost. A TIME_WAIT that nothing waits for is what became of the
 * socket: the segment is its own.
 */
static __always_inline int behind_first(struct __sk_buff *skb, const struct packet *p, __u32 state)
{
	struct tcpha_adoption *a = bpf_map_lookup_elem(&adoptions, &p->flow);
	__u32 mark = is_again(skb) ? skb->mark + 1 : TCPHA_MARK_AGAIN;

	if (!a || (state == BPF_TCP_TIME_WAIT && a->state != TCPHA_YIELDING) ||
	    mark == (TCPHA_MARK_AGAIN | MAX_AGAIN) || (__s64)(now_ns() - a->at_ns) > YIELD_NS ||
	    p->seq - a->isn < 2 || p->seq - a->isn > 1 << 24)
		return TC_ACT_SHOT;
	skb->mark = mark;
	COUNT(again, 1);
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

#endif
