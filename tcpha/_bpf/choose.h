/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Who gets a request. Workers and 'test-request' ask tcpha_refusal() who may. A verdict in the cache keeps
 * what it said, until a change makes all verdicts void. Of those who may, workers and the BPF program take
 * one by tcpha_choose().
 *
 * Rules that match are asked in their order, those with the same pattern and conditions together: a group.
 * The first group with a member that may take the request decides; in it the one with the fewest connections.
 * Equal ones take turns. If there is no such group, back ends at which nobody listened when we last heard are
 * asked all the same: the application may be back. Then it is the Local Node's.
 */
#ifndef TCPHA_CHOOSE_H
#define TCPHA_CHOOSE_H

#include "tcpha.h"

#define __choose inline __attribute__((always_inline))

/* What decides whether a back end may take a request. */
struct tcpha_member {
	__u32 used;
	__u32 links;	     /* control connections that are up */
	__u32 dead;	     /* by detection */
	__u32 full_live;     /* it said FULL: not asked again until it has fewer connections than this, */
	__u64 full_until_ns; /* or then */
	__u64 draining;	     /* services, a bit each; */
	__u64 app_down;	     /* those for which nothing listens there, */
	__u64 lacking;	     /* and whose address it does not have */
};

/* Why it may not. */
enum {
	TCPHA_MAY = 0,
	TCPHA_AWAY = 1, /* no control connection is up, or it does not serve the address */
	TCPHA_DEAD = 2,
	TCPHA_DRAINED = 3,
	TCPHA_DEAF = 4, /* nobody listens there */
	TCPHA_FULL = 5,
	TCPHA_TRIED = 6, /* it has not taken this very request */
};

/* service: a bit; desperate: even if nobody listened there when we last heard. */
static __choose __u32 tcpha_refusal(const struct tcpha_member *m, __u64 service, __u32 live, int tried,
				    int desperate, __u64 now)
{
	if (!tcpha_now(&m->used) || !tcpha_now(&m->links) || tcpha_now(&m->lacking) & service)
		return TCPHA_AWAY;
	if (tcpha_now(&m->dead))
		return TCPHA_DEAD;
	if (tcpha_now(&m->draining) & service)
		return TCPHA_DRAINED;
	if (tcpha_now(&m->app_down) & service && !desperate)
		return TCPHA_DEAF;
	if (now < tcpha_now(&m->full_until_ns) && live >= tcpha_now(&m->full_live))
		return TCPHA_FULL;
	return tried ? TCPHA_TRIED : TCPHA_MAY;
}

/* A service, as a word by which verdicts for the same target differ. */
static __choose __u64 tcpha_service_word(const struct tcpha_flow *flow)
{
	__u64 half[2];

	__builtin_memcpy(half, flow->vaddr, sizeof(half));
	return (half[0] ^ half[1]) * 0x9e3779b97f4a7c15ULL + flow->vport;
}

static __choose const struct tcpha_load *tcpha_load_of(void *loads, __u32 backend)
{
#ifdef __bpf__
	return bpf_map_lookup_elem(loads, &backend);
#else
	return &((const struct tcpha_load *)loads)[backend];
#endif
}

/*
 * Of so many that may take a request: the place of the one that gets it, or -1. number: of the request.
 * Multiples of the golden ratio are even among any of them, also where every other request is for another
 * group. room: of the array, a power of two; loads: by back end, an array or a map of BPF.
 */
static __choose int tcpha_choose(const struct tcpha_choice *of, __u32 count, __u32 room, __u64 number,
				 void *loads)
{
	__u32 start = ((number * 0x9e3779b97f4a7c15ULL) >> 32) * count >> 32, least = 0, i, n, live;
	const struct tcpha_load *load;
	int found = -1;

	for (i = 0; i < room && i < count; i++) {
		n = start + i < count ? start + i : start + i - count;
		n &= room - 1;
		load = tcpha_load_of(loads, of[n].backend);
		if (!load)
			continue;
		live = tcpha_now(&load->live);
		if (found >= 0 && live >= least)
			continue;
		least = live;
		found = n;
	}
	return found;
}

#endif
