/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Whose is a client's packet, if its flow was diverted? One answer for the BPF program and for the
 * datapath in user space.
 */
#ifndef TCPHA_FLOW_H
#define TCPHA_FLOW_H

#include "tcpha.h"

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

/* The back end has at most a TIME_WAIT socket left, or the entry gives way to that of a newer connection. */
static inline __attribute__((always_inline)) int tcpha_closed(const struct tcpha_entry *e)
{
	return (e->state == TCPHA_FORWARD && e->live == 0) || e->state == TCPHA_GONE;
}

/* A back end has the connection; packets that were held may still be on their way there. */
static inline __attribute__((always_inline)) int tcpha_handed(const struct tcpha_entry *e)
{
	return e->state == TCPHA_FORWARD || (e->state == TCPHA_HOLD && e->live);
}

/* What an entry bears of its key. */
static inline __attribute__((always_inline)) __u32 tcpha_tag(const struct tcpha_flow *flow)
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
static inline __attribute__((always_inline)) void tcpha_follow(struct tcpha_entry *e, __u32 seq, __u32 end)
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
	if (!tcpha_closed(e))
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
static inline __attribute__((always_inline)) int tcpha_classify(struct tcpha_entry *e, __u8 flags, __u32 seq,
								__u32 length, __u64 now)
{
	int behind;

	if ((flags & TCPHA_T_SYN) && !(flags & TCPHA_T_ACK)) {
		behind = seq - e->end_seq < TCPHA_BEHIND;
		if (tcpha_closed(e) ||
		    (behind && tcpha_handed(e) && (e->flags & (TCPHA_F_FIN | TCPHA_F_RST))) ||
		    (behind && e->state == TCPHA_PENDING && (e->flags & TCPHA_F_FAST))) {
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
