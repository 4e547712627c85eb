// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Back end, datapath nfqueue: what the daemon injects comes in by lo, where a listener that is bound to a
 * device takes nothing. These programs have it come in by that device.
 *
 * be_detour	tc ingress of lo
 * be_arrival	tc ingress of the device
 */
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_helpers.h>

#include "own.h"

const volatile struct {
	__u32 mark; /* of what is injected */
	__u32 device;
} conf SEC(".rodata.conf");

SEC("tc")
int be_detour(struct __sk_buff *skb)
{
	if (skb->mark != conf.mark)
		return TC_ACT_UNSPEC;
	return bpf_redirect(conf.device, BPF_F_INGRESS);
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
