/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the front end's user space wants: see TCPHA_OP_QUERY and what follows it. */
#ifndef FE_OPS_BPF_H
#define FE_OPS_BPF_H

#include "fe_maps.bpf.h"
#include "socket.bpf.h"

/*
 * What user space wants of an entry. It could not do so itself: between its look and its update, a packet
 * may change the entry or put another in its place.
 */
static __always_inline void remove_entry(const struct tcpha_flow *flow, const struct tcpha_entry *e,
					 bool served_it)
{
	__u64 id = e->id;

	if (PACKET_PATH && served_it && (e->flags & TCPHA_F_FAST) && (e->flags & TCPHA_F_ANSWERED))
		bpf_map_update_elem(&served, flow, &id, BPF_ANY);
	bpf_map_delete_elem(&flows, flow);
}

static __always_inline void change_entry(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || !op->id || e->backend != op->backend)
		return;
	if (op->kind == TCPHA_OP_TAKE_BACK ? !tcpha_take_back(e, op->id) : !tcpha_end(e, op->id, op->keep))
		return;
	op->result = TCPHA_R_OK;
	if (op->kind == TCPHA_OP_TAKE_BACK)
		begin_anew(e);
	else if (!op->keep)
		remove_entry(&op->flow, e, true);
}

/*
 * A back end has a connection whose packets were held. Packets must not overtake each other: those that user
 * space has kept go first, while all others still go there. That they may go by themselves is decided
 * together with whether one more has come.
 */
static __always_inline void hand_over(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e)
		return;
	if (tcpha_was_handed(e, op->id)) /* tried again, as what follows this went wrong */
		op->result = TCPHA_R_OK;
	if (tcpha_state_of(e) != TCPHA_HELD)
		return;
	e->id = op->id;
	e->backend = op->backend;
	e->rule = op->rule;
	e->flags = op->flags;
	e->end_seq = op->end_seq;
	e->ahead_seq = e->ahead_end = 0;
	if (tcpha_hand_over(e))
		op->result = TCPHA_R_OK;
}

/* Whether what was held has all come to user space; if so, no more is. */
static __always_inline bool stop_holding(const struct tcpha_op *op, struct tcpha_entry *e, __u32 flags)
{
	if (op->held == TCPHA_FLOWING)
		__sync_lock_test_and_set(&e->held, flags);
	return op->held == TCPHA_FLOWING ||
	       __sync_val_compare_and_swap(&e->held, op->held, flags) == op->held;
}

static __always_inline void let_flow(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || e->id != op->id)
		return;
	op->result = TCPHA_R_BACKLOG;
	if (!stop_holding(op, e, TCPHA_FLOWING))
		return;
	op->result = tcpha_let_flow(e, op->id) ? TCPHA_R_OK : TCPHA_R_NO_SOCKET;
}

/* The same, if no back end has it: it is our own stack's. */
static __always_inline void give_back(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || tcpha_state_of(e) != TCPHA_HELD || e->slot != op->slot)
		return;
	op->result = TCPHA_R_BACKLOG;
	if (!stop_holding(op, e, TCPHA_FLOWING | TCPHA_OURS))
		return;
	if (tcpha_give_back(e))
		bpf_map_delete_elem(&flows, &op->flow);
	op->result = TCPHA_R_OK;
}

/*
 * Remove an entry that user space has found over, or left behind. Since it looked, a new connection's may
 * have taken its place: that one stays.
 */
static __always_inline void drop_entry(struct tcpha_op *op)
{
	struct tcpha_entry *e = bpf_map_lookup_elem(&flows, &op->flow);

	op->result = TCPHA_R_NO_SOCKET;
	if (!e || !tcpha_drop(e, op->phase))
		return;
	op->result = TCPHA_R_OK;
	remove_entry(&op->flow, e, tcpha_phase_state(op->phase) == TCPHA_LINGERING);
}

/* An operation frame: it ends here. */
static __always_inline void operate(struct __sk_buff *skb)
{
	struct tcpha_op *op = op_of_frame(skb);

	if (!op)
		return;
	switch (op->kind) {
	case TCPHA_OP_QUERY:
		query(skb, op);
		break;
	case TCPHA_OP_END:
	case TCPHA_OP_TAKE_BACK:
		change_entry(op);
		break;
	case TCPHA_OP_DROP:
		drop_entry(op);
		break;
	case TCPHA_OP_HAND_OVER:
		hand_over(op);
		break;
	case TCPHA_OP_LET_FLOW:
		let_flow(op);
		break;
	case TCPHA_OP_GIVE_BACK:
		give_back(op);
	}
}

#endif
