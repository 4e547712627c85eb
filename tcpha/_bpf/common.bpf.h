/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What all programs need: the clock, counters, operations, addresses. */
#ifndef COMMON_BPF_H
#define COMMON_BPF_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "clock.h"
#include "own.h"
#include "tcpha.h"

const volatile struct tcpha_clock lab_clock SEC(".rodata.clock");

/* As now_ns() in user space. Where the kernel's own clock is meant, it is asked by its own name. */
static __always_inline __u64 now_ns(void)
{
	__u64 now = bpf_ktime_get_ns();

	if (!lab_clock.ahead_ns && !lab_clock.ppm)
		return now;
	return tcpha_clock_read(now, lab_clock.ahead_ns, lab_clock.ppm);
}

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, TCPHA_MAX_OPS);
	__type(key, __u32);
	__type(value, struct tcpha_op);
} ops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tcpha_counters);
} counters SEC(".maps");

#define COUNT(field, n)                                                                                      \
	do {                                                                                                 \
		__u32 zero_ = 0;                                                                             \
		struct tcpha_counters *c_ = bpf_map_lookup_elem(&counters, &zero_);                          \
		if (c_)                                                                                      \
			c_->field += (n);                                                                    \
	} while (0)

static __always_inline void map_v4(__u8 to[16], __be32 addr)
{
	__builtin_memset(to, 0, 10);
	to[10] = to[11] = 0xff;
	__builtin_memcpy(to + 12, &addr, 4);
}

/* Volatile: the program's constants are zero when it is compiled, and must not be folded. */
static __always_inline __be32 unmap_v4(const volatile __u8 from[16])
{
	return *(const volatile __be32 *)(from + 12);
}

/*
 * The operation that a frame names: Ethernet header, then its slot as a 32-bit integer in host byte order.
 */
static __always_inline struct tcpha_op *op_of_frame(struct __sk_buff *skb)
{
	__u32 slot;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &slot, sizeof(slot)) < 0)
		return 0;
	return bpf_map_lookup_elem(&ops, &slot);
}

#endif
