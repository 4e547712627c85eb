/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the back end's programs know. */
#ifndef BE_MAPS_BPF_H
#define BE_MAPS_BPF_H

#include "packet.bpf.h"

const volatile struct tcpha_be_conf conf SEC(".rodata.conf");

/* Front ends that send us tunnelled packets, as they said; the value is not used. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u8[16]);
	__type(value, __u32);
} frontends SEC(".maps");

/* The cookie keys of each front end that uses the packet path. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_FAST);
	__type(key, __u32);
	__type(value, struct tcpha_keys);
} keys SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_gate);
} gate SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); /* user space says how many */
	__type(key, struct tcpha_place);
	__type(value, struct tcpha_listener);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tcpha_flow);
	__type(value, struct tcpha_adoption);
} adoptions SEC(".maps");

static __always_inline bool is_vip(__be32 addr)
{
	__u32 i;

#pragma unroll
	for (i = 0; i < TCPHA_MAX_VIPS; i++) {
		if (i < conf.nvips && addr == unmap_v4(conf.vips[i]))
			return true;
	}
	return false;
}

/* Where a connection goes that is adopted. A function of its own, since several call it. */
static __noinline const struct tcpha_listener *listener_of(const struct tcpha_flow *flow)
{
	struct tcpha_place place = {.vport = flow->vport};
	const struct tcpha_listener *found;

	__builtin_memcpy(place.vaddr, flow->vaddr, sizeof(place.vaddr));
	found = bpf_map_lookup_elem(&listeners, &place);
	if (found)
		return found;
	place.vport = 0;
	return bpf_map_lookup_elem(&listeners, &place);
}

#endif
