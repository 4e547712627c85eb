/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * For test_flow.py: flow.h's transitions as functions of a library, and threads that do all of them to one
 * entry, whose memory is one flow's after another.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>

#include <linux/types.h>

static __u64 swap(__u64 *at, __u64 from, __u64 to);
#define __sync_val_compare_and_swap swap
#include "flow.h"

static struct tcpha_entry *beside; /* another CPU lets this one's flow go in the midst of a transition */
static int beside_nth;

static __u64 swap_at(__u64 *at, __u64 from, __u64 to)
{
	__atomic_compare_exchange_n(at, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return from;
}

static __u64 swap(__u64 *at, __u64 from, __u64 to)
{
	if (beside && !--beside_nth)
		swap_at(&beside->phase, tcpha_phase(TCPHA_DRAINING, 0, beside->id),
			tcpha_phase(TCPHA_FORWARD, 0, beside->id));
	return swap_at(at, from, to);
}

size_t size_of_entry(void)
{
	return sizeof(struct tcpha_entry);
}
void begin(struct tcpha_entry *e, __u32 older)
{
	tcpha_begin(e, older);
}
void hold(struct tcpha_entry *e, __u32 slot)
{
	tcpha_hold(e, slot);
}
void forward(struct tcpha_entry *e, __u64 id)
{
	tcpha_forward(e, id);
}
int hand_over(struct tcpha_entry *e, __u64 id)
{
	e->id = id;
	return tcpha_hand_over(e);
}
int was_handed(const struct tcpha_entry *e, __u64 id)
{
	return tcpha_was_handed(e, id);
}

int let_flow(struct tcpha_entry *e, __u64 id)
{
	return tcpha_let_flow(e, id);
}
int give_back(struct tcpha_entry *e)
{
	return tcpha_give_back(e);
}
int offer(struct tcpha_entry *e, __u64 was, __u64 id)
{
	return tcpha_offer(e, was, id);
}
int take_back(struct tcpha_entry *e, __u64 id)
{
	return tcpha_take_back(e, id);
}
int retry(struct tcpha_entry *e, __u64 id, __u32 backend)
{
	return tcpha_retry(e, id, backend);
}
__u32 settle(struct tcpha_entry *e)
{
	return tcpha_settle(e);
}
int end(struct tcpha_entry *e, __u64 id, int keep)
{
	return tcpha_end(e, id, keep);
}
__u64 claim(struct tcpha_entry *e)
{
	return tcpha_claim(e);
}
void unclaim(struct tcpha_entry *e, __u64 was)
{
	tcpha_unclaim(e, was);
}
int drop(struct tcpha_entry *e, __u64 found)
{
	return tcpha_drop(e, found);
}
__u64 phase(const struct tcpha_entry *e)
{
	return tcpha_phase_of(e);
}
__u32 state(__u64 phase)
{
	return tcpha_phase_state(phase);
}
__u32 owed(__u64 phase, __u32 backend)
{
	return tcpha_owed(phase, backend);
}

#define STALE 16 /* what a thread has seen of the entry, of which most is not true any more */
#define WHOSE 7

static struct tcpha_entry entry;
static __u64 ids;
static long live;  /* connections that back ends have, as they are counted */
static char *over; /* by id: whether it was said to be over */
static long twice;
static int steps;

static void count(int n)
{
	__sync_fetch_and_add(&live, n);
}

static void count_end(__u64 id)
{
	count(-1);
	if (__sync_lock_test_and_set(&over[id], 1))
		__sync_fetch_and_add(&twice, 1);
}

/* The entry is ours alone, and becomes that of a new flow. older: whose end nobody has counted yet. */
static void replace(__u32 older, unsigned int *seed)
{
	__u64 id = __sync_add_and_fetch(&ids, 1);

	entry.start_ns = id;
	entry.backend = WHOSE;
	switch (rand_r(seed) % 3) {
	case 0:
		tcpha_begin(&entry, older);
		return;
	case 1:
		tcpha_hold(&entry, 0);
		break;
	default:
		count(1);
		tcpha_forward(&entry, id);
	}
	count(-!!older);
}

static void step(__u64 was, __u64 id, unsigned int *seed)
{
	__u64 phase, new = __sync_add_and_fetch(&ids, 1);

	switch (rand_r(seed) % 10) {
	case 0:
		phase = tcpha_claim(&entry);
		if (tcpha_phase_state(phase) == TCPHA_GONE)
			break;
		if (rand_r(seed) % 4)
			replace(tcpha_owed(phase, WHOSE), seed);
		else
			tcpha_unclaim(&entry, phase);
		break;
	case 1:
		count(1);
		if (tcpha_is_pending(tcpha_phase_state(was)))
			entry.id = new;
		count(tcpha_offer(&entry, was, new) ? -!!tcpha_owed(was, 0) : -1);
		break;
	case 2:
		if (tcpha_end(&entry, id, 1))
			count_end(id);
		break;
	case 3:
		if (tcpha_end(&entry, id, 0)) {
			count_end(id);
			replace(0, seed);
		}
		break;
	case 4:
		if (tcpha_take_back(&entry, id))
			count_end(id);
		break;
	case 5:
		tcpha_retry(&entry, id, WHOSE);
		break;
	case 6:
		count(-!!tcpha_settle(&entry));
		break;
	case 7:
		if (tcpha_drop(&entry, was)) {
			count(-!!tcpha_owed(was, 0));
			replace(0, seed);
		}
		break;
	case 8:
		if (tcpha_state_of(&entry) == TCPHA_HELD) {
			entry.id = new;
			count(tcpha_hand_over(&entry));
		} else {
			tcpha_let_flow(&entry, id);
		}
		break;
	default:
		if (tcpha_give_back(&entry))
			replace(0, seed);
	}
}

/* An end, and another CPU lets the flow go before its compare-and-swap number 'nth'. */
int end_beside_let_flow(struct tcpha_entry *e, __u64 id, int nth)
{
	int done;

	beside = e;
	beside_nth = nth;
	done = tcpha_end(e, id, 1);
	beside = NULL;
	return done;
}

static void *work(void *arg)
{
	unsigned int seed = (size_t)arg;
	__u64 was[STALE] = {}, id[STALE] = {};
	int i, n;

	for (i = 0; i < steps; i++) {
		n = rand_r(&seed) % STALE;
		if (rand_r(&seed) % 2) {
			was[n] = tcpha_phase_of(&entry);
			id[n] = *(volatile __u64 *)&entry.id;
		}
		step(was[n], id[n], &seed);
	}
	return NULL;
}

/* How many connections are counted as live when the last one is over; and how many were over twice. */
long run(int threads, int count_of_steps, unsigned int seed)
{
	pthread_t thread[64];
	int i;

	steps = count_of_steps;
	ids = live = twice = 0;
	over = calloc((size_t)threads * steps * 2 + 2, 1); /* two ids a step at most */
	tcpha_begin(&entry, 0);
	for (i = 0; i < threads; i++)
		pthread_create(&thread[i], NULL, work, (void *)(size_t)(seed + i));
	for (i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	free(over);
	return labs(live - !!tcpha_owed(tcpha_claim(&entry), WHOSE)) + twice;
}
