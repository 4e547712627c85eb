/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the front end's programs know. */
#ifndef FE_MAPS_BPF_H
#define FE_MAPS_BPF_H

#include "packet.bpf.h"

const volatile struct tcpha_fe_conf conf SEC(".rodata.conf");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct tcpha_flow);
	__type(value, struct tcpha_entry);
} flows SEC(".maps");

/* The number of each service, or TCPHA_CLOSED: it stays for the connections that it has. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * TCPHA_MAX_SERVICES); /* those of earlier runs, too */
	__type(key, struct tcpha_service);
	__type(value, __u32);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, TCPHA_MAX_BACKENDS);
	__type(key, __u32);
	__type(value, struct tcpha_backend);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_OPS);
	__type(key, __u32);
	__type(value, struct tcpha_offer);
} offers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tcpha_flow);
	__type(value, struct tcpha_shaken);
} shaken SEC(".maps");

/* Ids of flows of the packet path that are over: a late copy of the request must not be served again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tcpha_flow);
	__type(value, __u64);
} served SEC(".maps");

/* When data first came of a connection that nobody knows. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct tcpha_flow);
	__type(value, __u64);
} unknown_flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_guesses);
} guesses SEC(".maps");

/* Room for an entry in the making; the stack has too little. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_entry);
} scratch SEC(".maps");

/* The service whose a flow is, or 0: it is none of ours. */
static __always_inline __u32 *service_of(const struct tcpha_flow *flow)
{
	struct tcpha_service key = {.vport = flow->vport};

	__builtin_memcpy(key.vaddr, flow->vaddr, sizeof(key.vaddr));
	return bpf_map_lookup_elem(&services, &key);
}

/* A request is no back end's any more. Another CPU may have offered it to the next one by now. */
static __always_inline void begin_anew(struct tcpha_entry *e)
{
	__sync_fetch_and_and(&e->flags, TCPHA_F_FAST);
}

#endif
