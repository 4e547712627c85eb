/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An entry of the front end's flow table: what becomes of it, and whose is a client's packet. One answer for
 * the BPF programs and for the datapath in user space. Nobody else takes 'phase' apart.
 */
#ifndef TCPHA_FLOW_H
#define TCPHA_FLOW_H

#include "tcpha.h"

#define __flow inline __attribute__((always_inline))

#define TCPHA_LEAP (1U << 24) /* more than a window: further ahead, a packet is no gap's other side */

/*
 * How far a new connection's SYN may be: below 2^31 by more than a window and a leap, so that no packet
 * of the old connection, which may lag so much behind end_seq, seems to lie behind the SYN.
 */
#define TCPHA_BEHIND 0x70000000U

/* The TCP flags that matter here. */
enum {
	TCPHA_T_FIN = 1,
	TCPHA_T_SYN = 2,
	TCPHA_T_RST = 4,
	TCPHA_T_ACK = 16,
	TCPHA_T_URG = 32,
};

enum {
	TCPHA_TO_STACK = 0, /* of a newer connection */
	TCPHA_TO_FLOW = 1,
	TCPHA_TO_LIVE = 2, /* a SYN on a live flow: to the back end as well */
};

/*
 * The life of a flow
 *
 * What a flow is, and whose, is one word, its phase. It changes by one compare-and-swap or exchange, so of
 * all who want to change it, one does; and who does accounts for what was before: a connection is counted
 * once.
 *
 *      event                          from                  to           whose end the caller counts
 *      -----------------------------  --------------------  -----------  ---------------------------
 *      hold: handed over by sockets   (new)                 HELD
 *      hand_over: a back end has it   HELD                  DRAINING
 *      let_flow: what waited is sent  DRAINING              FORWARD
 *      give_back: nobody takes it     HELD                  GONE
 *
 *      begin: a request that waits    (new)                 PENDING
 *      begin, in the place of one     (new)                 REPLACING    later, when it is offered
 *      offer: a worker has chosen     PENDING, REPLACING    FORWARD      REPLACING: the older one's
 *      take_back: it was refused      FORWARD               PENDING      its own
 *      retry: its back end is down    FORWARD               REPLACING    later, its own
 *      settle: a socket of ours       REPLACING             PENDING      the older one's
 *
 *      forward: cached, or restored   (new)                 FORWARD
 *      forward, by nfqueue            HELD                  FORWARD
 *      end, and the client may send   FORWARD, DRAINING     LINGERING    its own
 *      end                            FORWARD, DRAINING     GONE         its own
 *      claim: to replace it           all but GONE          GONE         its own, or the older one's
 *      unclaim: that came to nothing  GONE                  as it was    nobody's
 *      drop: that is what was found   PENDING, REPLACING,   GONE         REPLACING: the older one's
 *                                     LINGERING
 *
 * GONE is short: the entry is about to be removed, or replaced in the table by that of a new connection.
 */
enum {
	TCPHA_HELD = 1,	     /* packets go to user space, which keeps them until a back end has it */
	TCPHA_DRAINING = 2,  /* a back end has it: user space sends on what it has kept */
	TCPHA_FORWARD = 3,   /* a back end has it: packets go there */
	TCPHA_PENDING = 4,   /* the request is on its way to user space, and what follows goes there, too */
	TCPHA_REPLACING = 5, /* the same, and this request has ended an older flow of its 4-tuple, which a
				back end had */
	TCPHA_LINGERING = 6, /* the connection is over; the client may still send its FIN, or that again */
	TCPHA_GONE = 7,
};

#define TCPHA_STATE_BITS 3
#define TCPHA_OLDER_BITS 9 /* REPLACING: the older one's back end + 1 */
#define TCPHA_PHASE_BITS (TCPHA_STATE_BITS + TCPHA_OLDER_BITS)

/*
 * A phase: state, back end of an older flow + 1, and which connection it is: a digest of its handoff id, or
 * of when it began if it has none yet. So the phase of one connection is never that of another, whose entry
 * may lie in the same memory a moment later.
 */
static __flow __u64 tcpha_phase(__u32 state, __u32 older, __u64 which)
{
	which *= 0x9e3779b97f4a7c15ULL; /* 2^64 over the golden ratio */
	return which >> TCPHA_PHASE_BITS << TCPHA_PHASE_BITS | older << TCPHA_STATE_BITS | state;
}

static __flow __u64 tcpha_phase_of(const struct tcpha_entry *e)
{
	return tcpha_now(&e->phase);
}

static __flow __u32 tcpha_phase_state(__u64 phase)
{
	return phase & ((1 << TCPHA_STATE_BITS) - 1);
}

static __flow __u32 tcpha_state_of(const struct tcpha_entry *e)
{
	return tcpha_phase_state(tcpha_phase_of(e));
}

static __flow int tcpha_is_pending(__u32 state)
{
	return state == TCPHA_PENDING || state == TCPHA_REPLACING;
}

/* A back end has the connection; packets that were held may still be on their way there. */
static __flow int tcpha_is_handed(__u32 state)
{
	return state == TCPHA_FORWARD || state == TCPHA_DRAINING;
}

/* What the client sends goes to the back end, in which the connection may be over. */
static __flow int tcpha_is_forwarded(__u32 state)
{
	return state == TCPHA_FORWARD || state == TCPHA_LINGERING;
}

/* The back end has at most a TIME_WAIT socket left, or the entry gives way to that of a newer connection. */
static __flow int tcpha_is_over(__u32 state)
{
	return state == TCPHA_LINGERING || state == TCPHA_GONE;
}

/* Whose end it is that who ends this phase has to count: the back end + 1, or 0: nobody's. */
static __flow __u32 tcpha_owed(__u64 phase, __u32 backend)
{
	return tcpha_is_handed(tcpha_phase_state(phase))
		       ? backend + 1
		       : phase >> TCPHA_STATE_BITS & ((1 << TCPHA_OLDER_BITS) - 1);
}

/* The id of an entry's connection if a back end has it, and its end is not known; else 0. */
static __flow __u64 tcpha_live(const struct tcpha_entry *e)
{
	return tcpha_is_handed(tcpha_state_of(e)) ? e->id : 0;
}

static __flow int tcpha_change(struct tcpha_entry *e, __u64 from, __u64 to)
{
	return __sync_val_compare_and_swap(&e->phase, from, to) == from;
}

/* Of a new entry, that nobody else sees yet: */

static __flow void tcpha_hold(struct tcpha_entry *e, __u32 slot)
{
	e->slot = slot;
	e->phase = tcpha_phase(TCPHA_HELD, 0, e->start_ns);
}

static __flow void tcpha_begin(struct tcpha_entry *e, __u32 older)
{
	e->phase = tcpha_phase(older ? TCPHA_REPLACING : TCPHA_PENDING, older, e->start_ns);
}

static __flow void tcpha_forward(struct tcpha_entry *e, __u64 id)
{
	e->id = id;
	e->phase = tcpha_phase(TCPHA_FORWARD, 0, id);
}

/* Of one that all may see. Each returns whether that was its phase, unless said otherwise. */

/* The caller has written what else changes, and e->id: until now, nobody looks at those. */
static __flow int tcpha_hand_over(struct tcpha_entry *e)
{
	__u64 was = tcpha_phase_of(e);

	return tcpha_phase_state(was) == TCPHA_HELD &&
	       tcpha_change(e, was, tcpha_phase(TCPHA_DRAINING, 0, e->id));
}

/* Whether connection 'id' was handed over before. */
static __flow int tcpha_was_handed(const struct tcpha_entry *e, __u64 id)
{
	__u64 phase = tcpha_phase_of(e);

	return phase == tcpha_phase(TCPHA_DRAINING, 0, id) || phase == tcpha_phase(TCPHA_FORWARD, 0, id) ||
	       phase == tcpha_phase(TCPHA_LINGERING, 0, id);
}

/* What ended meanwhile has nothing left to wait for. */
static __flow int tcpha_let_flow(struct tcpha_entry *e, __u64 id)
{
	return tcpha_change(e, tcpha_phase(TCPHA_DRAINING, 0, id), tcpha_phase(TCPHA_FORWARD, 0, id)) ||
	       tcpha_was_handed(e, id);
}

static __flow int tcpha_give_back(struct tcpha_entry *e)
{
	__u64 was = tcpha_phase_of(e);

	return tcpha_phase_state(was) == TCPHA_HELD && tcpha_change(e, was, tcpha_phase(TCPHA_GONE, 0, 0));
}

/* was: as the caller found it, before he has written what else changes. */
static __flow int tcpha_offer(struct tcpha_entry *e, __u64 was, __u64 id)
{
	return tcpha_is_pending(tcpha_phase_state(was)) &&
	       tcpha_change(e, was, tcpha_phase(TCPHA_FORWARD, 0, id));
}

static __flow int tcpha_take_back(struct tcpha_entry *e, __u64 id)
{
	return tcpha_change(e, tcpha_phase(TCPHA_FORWARD, 0, id), tcpha_phase(TCPHA_PENDING, 0, id));
}

static __flow int tcpha_retry(struct tcpha_entry *e, __u64 id, __u32 backend)
{
	return tcpha_change(e, tcpha_phase(TCPHA_FORWARD, 0, id),
			    tcpha_phase(TCPHA_REPLACING, backend + 1, id));
}

/* Returns the back end whose end is to be counted, + 1; or 0. */
static __flow __u32 tcpha_settle(struct tcpha_entry *e)
{
	__u64 was = tcpha_phase_of(e);

	return tcpha_phase_state(was) == TCPHA_REPLACING &&
			       tcpha_change(e, was, tcpha_phase(TCPHA_PENDING, 0, e->start_ns))
		       ? tcpha_owed(was, 0)
		       : 0;
}

static __flow int tcpha_end(struct tcpha_entry *e, __u64 id, int keep)
{
	__u64 to = keep ? tcpha_phase(TCPHA_LINGERING, 0, id) : tcpha_phase(TCPHA_GONE, 0, 0);

	/* in this order, in which the phase changes: it is not missed between the two */
	return tcpha_change(e, tcpha_phase(TCPHA_DRAINING, 0, id), to) ||
	       tcpha_change(e, tcpha_phase(TCPHA_FORWARD, 0, id), to);
}

/* Returns the phase that it was in; GONE: another one was first. */
static __flow __u64 tcpha_claim(struct tcpha_entry *e)
{
	return __sync_lock_test_and_set(&e->phase, tcpha_phase(TCPHA_GONE, 0, 0));
}

static __flow void tcpha_unclaim(struct tcpha_entry *e, __u64 was)
{
	e->phase = was;
}

static __flow int tcpha_drop(struct tcpha_entry *e, __u64 found)
{
	__u32 state = tcpha_phase_state(found);

	return (tcpha_is_pending(state) || state == TCPHA_LINGERING) &&
	       tcpha_change(e, found, tcpha_phase(TCPHA_GONE, 0, 0));
}

/* What an entry bears of its key. */
static __flow __u32 tcpha_tag(const struct tcpha_flow *flow)
{
	__u32 address[4], tag = (__u32)flow->vport << 16 | flow->cport;
	int i;

	__builtin_memcpy(address, flow->caddr, sizeof(address));
	for (i = 0; i < 4; i++)
		tag = (tag ^ address[i]) * 0x9e3779b1U; /* 2^32 over the golden ratio */
	return tag;
}

/*
 * Follow what the client sends. Who guesses sequence numbers may make end_seq too high by TCPHA_LEAP at
 * most: only what joins the bytes known so far moves it; what lies ahead is kept as one block until the
 * gap before it closes.
 */
static __flow void tcpha_follow(struct tcpha_entry *e, __u32 seq, __u32 end)
{
	__u32 behind = e->end_seq;

	if ((__s32)(seq - behind) > 0) {
		if (seq - behind >= TCPHA_LEAP)
			return;
		if (e->ahead_seq == e->ahead_end)
			e->ahead_seq = e->ahead_end = seq;
		if ((__s32)(seq - e->ahead_seq) < 0)
			e->ahead_seq = seq;
		if ((__s32)(end - e->ahead_end) > 0)
			e->ahead_end = end;
		return;
	}
	if ((__s32)(end - behind) <= 0)
		return;
	if (e->ahead_seq != e->ahead_end && (__s32)(e->ahead_seq - end) <= 0) {
		if ((__s32)(e->ahead_end - end) > 0)
			end = e->ahead_end;
		e->ahead_seq = e->ahead_end = 0;
	}
	e->end_seq = end;
	/*
	 * Nobody sends more after a FIN or a RST: it was forged, and so was a SYN behind it. But where the
	 * back end has closed, there is nothing to cut, and what comes now was overtaken by the SYN.
	 */
	e->flags &= ~(TCPHA_F_FIN | TCPHA_F_RST);
	if (!tcpha_is_over(tcpha_state_of(e)))
		e->flags &= ~TCPHA_F_NEW_SYN;
}

/*
 * A packet of 'length' bytes of payload with TCP flags TCPHA_T_*, for a flow's entry.
 *
 * A SYN on a flow is the client's host reusing its port, or an attacker. Once the connection is over, or the
 * client has closed (FIN or RST seen, with a number that can be) or no back end has taken its request, and
 * the SYN lies behind all that it has sent (RFC 6191), it goes to the listener. What lies behind such a SYN
 * belongs to the newer connection, what does not to the old one, whose entry stays until the back end says
 * CLOSED; should the old one go on, the SYN is forgotten. So a forged SYN cuts nothing. Any other SYN belongs
 * to the back end, whose kernel answers with a challenge ACK (RFC 5961 section 4).
 */
static __flow int tcpha_classify(struct tcpha_entry *e, __u8 flags, __u32 seq, __u32 length, __u64 now)
{
	__u32 state;
	int behind;

	if ((flags & TCPHA_T_SYN) && !(flags & TCPHA_T_ACK)) {
		behind = seq - e->end_seq < TCPHA_BEHIND;
		state = tcpha_state_of(e);
		if (tcpha_is_over(state) ||
		    (behind && tcpha_is_handed(state) && (e->flags & (TCPHA_F_FIN | TCPHA_F_RST))) ||
		    (behind && tcpha_is_pending(state))) {
			e->syn_seq = seq;
			e->flags |= TCPHA_F_NEW_SYN;
			return TCPHA_TO_STACK;
		}
		return TCPHA_TO_LIVE;
	}
	if ((e->flags & TCPHA_F_NEW_SYN) && (__s32)(seq - e->syn_seq) > 0)
		return TCPHA_TO_STACK;
	tcpha_follow(e, seq, seq + length + (flags & TCPHA_T_FIN));
	e->last_ns = now;
	if (seq + length - e->end_seq + TCPHA_LEAP < 2 * TCPHA_LEAP) {
		if (flags & TCPHA_T_FIN)
			e->flags |= TCPHA_F_FIN;
		if (flags & TCPHA_T_RST)
			e->flags |= TCPHA_F_RST;
	}
	return TCPHA_TO_FLOW;
}

#endif
