// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Back end, datapath nfqueue: what the daemon injects comes in by lo, where a listener that is bound to a
 * device takes nothing. These programs have it come in by that device.
 *
 * be_detour	tc ingress of lo
 * be_arrival	tc ingress of each such device
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_helpers.h>

#include "own.h"

const volatile struct {
	__u32 mark; /* of what is injected */
} conf SEC(".rodata.conf");

/* A listener that is bound to a device. */
struct bound {
	__u8 addr[16]; /* v4-mapped */
	__be16 port;
	__u16 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1); /* user space says how many */
	__type(key, struct bound);
	__type(value, __u32);
} devices SEC(".maps");

SEC("tc")
int be_detour(struct __sk_buff *skb)
{
	struct bound to = {.addr = {[10] = 0xff, [11] = 0xff}};
	struct iphdr ip;
	__u32 *device;

	if (skb->mark != conf.mark || bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + ip.ihl * 4 + 2, &to.port, sizeof(to.port)) < 0)
		return TC_ACT_UNSPEC;
	__builtin_memcpy(to.addr + 12, &ip.daddr, sizeof(ip.daddr));
	device = bpf_map_lookup_elem(&devices, &to);
	return device ? bpf_redirect(*device, BPF_F_INGRESS) : TC_ACT_UNSPEC;
}

SEC("tc")
int be_arrival(struct __sk_buff *skb)
{
	/* lo's frames are addressed to nobody */
	if (skb->mark == conf.mark)
		bpf_skb_change_type(skb, PACKET_HOST);
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "GPL";
