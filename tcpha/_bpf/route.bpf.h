/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The way back to whoever sent a SYN. By the route that its own SYN-ACK would take, the kernel finds out
 * whether a source may be true, where the answer goes, and what size the client is told. The packet path does
 * the same, and leaves to the kernel each SYN of which it is not sure that the kernel would take it.
 */
#ifndef ROUTE_BPF_H
#define ROUTE_BPF_H

#include "socket.bpf.h"

#define LOOPBACK_IFINDEX 1   /* include/net/flow.h of the kernel */
#define BPF_FIB_SKIP_NEIGH 4 /* BPF_FIB_LOOKUP_SKIP_NEIGH, since Linux 6.3 */
#define RP_LOOSE 2

struct way {
	struct bpf_fib_lookup fib;
	struct bpf_redir_neigh hop;
	__u32 mss; /* that the route has room for */
};

/* Room for a way; the stack has too little. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct way);
} ways SEC(".maps");

/* The MSS that routes tell of: advmss, or what mtu leaves. Kept by net/routes.py. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, TCPHA_MAX_ROUTES);
	__type(key, struct tcpha_route);
	__type(value, __u32);
} routes SEC(".maps");

/*
 * Whether the kernel takes packets on a device whose senders are not reached by it:
 * net.ipv4.conf.*.rp_filter, of which the higher one counts (RFC 3704). Loosely, it does so only where the
 * device has an address.
 */
static __always_inline bool may_differ(const struct net_device *dev)
{
	const struct in_device *in = dev->ip_ptr;
	const struct net *net = dev->nd_net.net;
	const struct ipv4_devconf *all;
	int filter;

	if (!in || !net)
		return false;
	all = net->ipv4.devconf_all;
	if (!all)
		return false;
	filter = in->cnf.data[IPV4_DEVCONF_RP_FILTER - 1];
	if (all->data[IPV4_DEVCONF_RP_FILTER - 1] > filter)
		filter = all->data[IPV4_DEVCONF_RP_FILTER - 1];
	return filter == 0 || (filter == RP_LOOSE && in->ifa_list);
}

/*
 * Where the answer to a SYN goes; 0: the kernel shall judge the SYN. Addresses of ours and broadcast ones
 * have no unicast route. The look-up is for a packet that comes in by lo, since that is how the kernel looks
 * for the routes of its own packets ('ip rule ... iif lo'); forwarding is on there for this alone. A VRF has
 * routes of its own, which the interface leads to.
 */
static __always_inline struct way *way_back(struct __sk_buff *skb, const struct tcpha_flow *flow)
{
	const struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	struct tcpha_route route = {.prefixlen = 8 * (sizeof(route) - sizeof(route.prefixlen))};
	__u32 zero = 0, first = flow->caddr[12], *mss;
	struct way *w = bpf_map_lookup_elem(&ways, &zero);
	__u64 flags;

	if (!w || first == 0 || first == 127 || first >= 224)
		return 0;
	flags = BPF_CORE_READ_BITFIELD(kernel->dev, priv_flags);
	__builtin_memset(w, 0, sizeof(*w));
	w->fib.family = AF_INET;
	w->fib.l4_protocol = IPPROTO_TCP;
	w->fib.sport = flow->vport;
	w->fib.dport = flow->cport;
	w->fib.ipv4_src = unmap_v4(flow->vaddr);
	w->fib.ipv4_dst = unmap_v4(flow->caddr);
	w->fib.tot_len = sizeof(struct iphdr) + sizeof(struct tcphdr); /* not 0: the MTU is asked for */
	w->fib.ifindex = flags & bpf_core_enum_value(enum netdev_priv_flags, IFF_L3MDEV_SLAVE)
				 ? skb->ifindex
				 : LOOPBACK_IFINDEX;
	if (bpf_fib_lookup(skb, &w->fib, sizeof(w->fib), BPF_FIB_SKIP_NEIGH) ||
	    (w->fib.ifindex != skb->ifindex && !may_differ(kernel->dev)))
		return 0;
	w->mss = w->fib.mtu_result - sizeof(struct iphdr) - sizeof(struct tcphdr);
	route.ifindex = w->fib.ifindex;
	__builtin_memcpy(route.addr, flow->caddr, sizeof(route.addr));
	mss = bpf_map_lookup_elem(&routes, &route);
	if (mss && *mss && *mss < w->mss)
		w->mss = *mss;
	w->hop.nh_family = w->fib.family; /* of the gateway, which may be an IPv6 one */
	__builtin_memcpy(w->hop.ipv6_nh, w->fib.ipv6_dst, sizeof(w->hop.ipv6_nh));
	return w;
}

#endif
