// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Back end: adoption of connections, and the guard before them.
 *
 * be_ingress	tc ingress of the network interfaces: unwraps tunnelled packets; lets only packets of
 *		existing sockets reach the VIP
 * be_tap	tc ingress of the daemon's TAP device: operations and forged packets
 * be_forged	tc ingress of the device that the listener is bound to, if it is: forged packets again
 *
 * A look-up finds sockets that are bound to a device only if it is made there, and such a socket takes only
 * packets that arrive there. be_forged also runs, by BPF_PROG_TEST_RUN, for operations.
 */
#include <stdbool.h>

#include "cookie.bpf.h"

#ifndef BPF_F_ADJ_ROOM_DECAP_L3_IPV4 /* Linux 6.3 */
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#endif

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
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct tcpha_flow);
	__type(value, struct tcpha_adoption);
} adoptions SEC(".maps");

/* Below the least RTO (RFC 6298; 200 ms in Linux): no retransmission comes so soon, but a copy does. */
#define COPY_NS 150000000ULL

/* More than the clocks of cookies and of adoptions, in milliseconds of two hosts, can be wrong by. */
#define OLDER_NS 100000000LL

/* For the front end to hear that we do not have a connection, before its request comes again. */
#define GIVE_UP_NS 1000000000ULL

#define REUSED_NS 60000000000ULL
#define YIELD_NS 10000000LL

#define MAX_AGAIN 0xff
#define TCP_RST 4

static __always_inline bool is_again(const struct __sk_buff *skb)
{
	return (skb->mark & ~MAX_AGAIN) == TCPHA_MARK_AGAIN;
}

/*
 * RST instead of the packet: it ends a socket that expects just this number (RFC 5961 section 3.2). The
 * payload stays, and means nothing: bpf_skb_change_tail() refuses what was tunnelled. So do the options, as
 * part of that: a timestamp that is older than the socket's would have the RST discarded (PAWS).
 */
static __always_inline int into_reset(struct __sk_buff *skb, const struct headers *h, __u32 seq)
{
	__u32 at = ETH_HLEN + h->ip->ihl * 4, check = at + __builtin_offsetof(struct tcphdr, check);
	__be32 old_seq = h->tcp->seq, new_seq = bpf_htonl(seq);
	__be16 old_flags = ((__be16 *)h->tcp)[6];
	__be16 new_flags = bpf_htons(5 << 12 | TCP_RST);

	if (bpf_l4_csum_replace(skb, check, old_seq, new_seq, 4) < 0 ||
	    bpf_l4_csum_replace(skb, check, old_flags, new_flags, 2) < 0 ||
	    bpf_skb_store_bytes(skb, at + __builtin_offsetof(struct tcphdr, seq), &new_seq, 4, 0) < 0 ||
	    bpf_skb_store_bytes(skb, at + 12, &new_flags, 2, 0) < 0)
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

/* Tell user space. Adoptions may wait for its next look; a refusal is passed on at once. */
static __always_inline void report(struct tcpha_event *event, const struct tcpha_flow *flow,
				   const struct cookie *c, __u32 frontend, __u32 result, __u32 reused)
{
	event->at_ns = now_ns();
	event->flow = *flow;
	event->isn = c->isn;
	event->ours = c->ours;
	event->frontend = frontend;
	event->result = result;
	event->reused = reused;
	event->pad = 0;
	bpf_ringbuf_submit(event, result == TCPHA_R_OK ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP);
}

/* The tag of a front end on a segment. */
struct tagged {
	__s32 by;  /* index of the front end; -1: it bears none */
	__u32 ack; /* what it acknowledges, without the tag */
	__u32 at;  /* where its TCP header is in the packet */
};

/* Whether there is a cookie behind a tag: the urgent pointers of two front ends may be the same by chance. */
static __always_inline bool is_cookie(const struct tcpha_flow *flow, const struct tcpha_keys *k, __u32 isn,
				      __u32 ours)
{
	__u64 key0 = k->key[ours & META_KEY][0], key1 = k->key[ours & META_KEY][1];
	__u32 meta = ours & META_MASK;

	return !(((__u32)cookie_hash(flow, key0, key1, isn, meta) ^ ours) >> META_BITS) ||
	       !(((__u32)cookie_hash(flow, key0, key1, isn, meta | META_TIMED) ^ ours) >> META_BITS);
}

/*
 * Whether a front end has put its tag on a segment of a connection that began with isn, the client's. A
 * function of its own for the verifier: what follows need not be looked at for each front end.
 */
__noinline int find_tag(struct tagged *tag, const struct tcpha_flow *flow, __u32 isn, __u32 ack, __u32 urgent)
{
	struct tcpha_keys *k;
	__u64 hash;
	__u32 i, n;

	if (!tag || !flow)
		return 0;
	for (i = 0; i < TCPHA_MAX_FAST; i++) {
		n = i;
		k = bpf_map_lookup_elem(&keys, &n);
		if (!k || !(k->used & 1 << ((ack - 1) & META_KEY)))
			continue;
		hash = tag_hash(flow, k, isn, (ack - 1) & META_MASK);
		if (tag_urgent(hash) != urgent || !is_cookie(flow, k, isn, tag_ack(ack, hash) - 1))
			continue;
		tag->by = i;
		tag->ack = tag_ack(ack, hash);
		return 1;
	}
	return 0;
}

/*
 * The first segment of a connection bears a tag; if it is long, what was cut off from it on its way does,
 * too, and says in no other way what the connection began with.
 */
static __always_inline void read_tag(struct tagged *tag, const struct headers *h,
				     const struct tcpha_flow *flow)
{
	__u32 seq = bpf_ntohl(h->tcp->seq), ack = bpf_ntohl(h->tcp->ack_seq);
	struct tcpha_adoption *a;

	tag->by = -1;
	tag->ack = ack;
	tag->at = ETH_HLEN + h->ip->ihl * 4;
	if (!conf.fast || !h->tcp->urg_ptr || h->tcp->urg || !h->tcp->ack || h->tcp->syn || h->tcp->rst ||
	    find_tag(tag, flow, seq - 1, ack, h->tcp->urg_ptr))
		return;
	a = bpf_map_lookup_elem(&adoptions, flow);
	if (a)
		find_tag(tag, flow, a->isn, ack, h->tcp->urg_ptr);
}

/* To a socket, as the client has sent it. */
static __always_inline int let_pass(struct __sk_buff *skb, const struct tagged *tag)
{
	if (tag->by >= 0 && write_tag(skb, tag->at, tag->ack, 0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

/*
 * A segment that no socket of ours expects. If it has the cookie and the tag of one of our front ends, it
 * becomes the socket. old: the sequence number that would end an older socket on the tuple, if there is one.
 * last: user space has looked for room, and there is none.
 */
static __always_inline int adopt_by_cookie(struct __sk_buff *skb, const struct headers *h,
					   const struct tcpha_flow *flow, const struct tagged *tag,
					   const struct options *o, const __u32 *old, bool last)
{
	struct bpf_sock_tuple t = {};
	struct tcpha_keys *k;
	__u8 room[3] = {TCPHA_MAC_ROOM >> 8, TCPHA_MAC_ROOM & 0xff};
	struct tcpha_event *event;
	struct tcpha_gate *g;
	struct cookie c = {};
	struct tcpha_adoption *before, now = {};
	struct headers again;
	__u32 n = tag->by, zero = 0, seq, rtt, mark, reused;
	int result;

	if (tag->by < 0 || h->tcp->doff < 5)
		return TC_ACT_SHOT;
	seq = bpf_ntohl(h->tcp->seq);
	rtt = bpf_ntohs(h->ip->id);
	g = bpf_map_lookup_elem(&gate, &zero);
	if (!g)
		return TC_ACT_SHOT;
	c.opt = *o;
	k = bpf_map_lookup_elem(&keys, &n);
	if (!k || !cookie_check(flow, k, seq, tag->ack, &c))
		return TC_ACT_SHOT;
	before = bpf_map_lookup_elem(&adoptions, flow);
	/* a late copy, of a handshake before the last one on the tuple: that connection is over long since */
	if (before && before->isn != c.isn && before->state == TCPHA_ADOPTED && (o->found & OPT_TS) &&
	    (__s64)(__s32)c.rtt_ms * 1000000 > (__s64)(now_ns() - before->at_ns) + OLDER_NS)
		return TC_ACT_SHOT;
	if (old) {
		/* end the older one first; this segment comes again, behind that, by the same way */
		if (is_again(skb))
			return TC_ACT_SHOT; /* it did not end: the client's next attempt finds it out */
		now.at_ns = now_ns();
		now.isn = c.isn;
		now.state = TCPHA_YIELDING;
		bpf_map_update_elem(&adoptions, flow, &now, BPF_ANY);
		mark = skb->mark;
		skb->mark = TCPHA_MARK_AGAIN;
		if (bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS) < 0)
			return TC_ACT_SHOT;
		skb->mark = mark;
		COUNT(yielded, 1);
		if (parse_tcp(skb, 0, &again) < 0)
			return TC_ACT_SHOT;
		return into_reset(skb, &again, *old);
	}
	if (before && before->isn == c.isn && before->state == TCPHA_ADOPTED &&
	    now_ns() - before->at_ns < COPY_NS)
		return TC_ACT_SHOT; /* that connection is over already: do not serve its request again */
	if (before && before->isn == c.isn && before->state == TCPHA_GIVEN_UP &&
	    now_ns() - before->at_ns < GIVE_UP_NS)
		return TC_ACT_SHOT;
	/* first: an adoption that user space does not hear of would never be known to end */
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return TC_ACT_SHOT;
	if (g->live + g->coming >= g->max && !last) {
		/* reports of ended connections lag behind: user space looks, and sends it back to us */
		bpf_ringbuf_discard(event, 0);
		if (bpf_skb_store_bytes(skb, 0, room, sizeof(room), 0) < 0)
			return TC_ACT_SHOT;
		return bpf_redirect(conf.tap, 0);
	}
	if (g->live + g->coming >= g->max) {
		report(event, flow, &c, n, TCPHA_R_FULL, 0);
		return TC_ACT_SHOT;
	}
	if (skb->ifindex != conf.tap && is_shared(skb)) {
		if (g->device) { /* that is where our TAP device would send it back to */
			report(event, flow, &c, n, TCPHA_R_ASSIGN, 0);
			return TC_ACT_SHOT;
		}
		bpf_ringbuf_discard(event, 0);
		now.at_ns = now_ns();
		now.isn = c.isn;
		now.state = TCPHA_YIELDING; /* what comes right behind this one has to wait for it */
		bpf_map_update_elem(&adoptions, flow, &now, BPF_ANY);
		if (bpf_skb_store_bytes(skb, 0, room, sizeof(room), 0) < 0)
			return TC_ACT_SHOT;
		return bpf_redirect(conf.tap, BPF_F_INGRESS);
	}
	t.ipv4.saddr = unmap_v4(flow->caddr);
	t.ipv4.sport = flow->cport;
	t.ipv4.daddr = unmap_v4(g->listen_addr);
	t.ipv4.dport = g->listen_port;
	if (let_pass(skb, tag) == TC_ACT_SHOT) {
		bpf_ringbuf_discard(event, 0);
		return TC_ACT_SHOT;
	}
	result = cookie_accept(skb, &t, &c, k->wscale, rtt);
	if (result) {
		report(event, flow, &c, n, result, 0);
		return TC_ACT_SHOT;
	}
	if (is_again(skb))
		skb->mark = 0;
	now.at_ns = now_ns();
	now.isn = c.isn;
	now.state = TCPHA_ADOPTED;
	reused = before && now.at_ns - before->at_ns < REUSED_NS;
	bpf_map_update_elem(&adoptions, flow, &now, BPF_ANY);
	__sync_fetch_and_add(&g->coming, 1);
	COUNT(adopted, 1);
	report(event, flow, &c, n, TCPHA_R_OK, reused);
	return TC_ACT_UNSPEC;
}

/*
 * A segment that came right behind one whose socket is in the making, on another CPU perhaps, or which has
 * to wait for the end of an older socket: it waits in the same way, or it would be lost. A TIME_WAIT that
 * nothing waits for is what became of the socket, and the segment is its own.
 */
static __always_inline int behind_first(struct __sk_buff *skb, const struct tcpha_flow *flow, __u32 seq,
					__u32 state)
{
	struct tcpha_adoption *a = bpf_map_lookup_elem(&adoptions, flow);
	__u32 mark = is_again(skb) ? skb->mark + 1 : TCPHA_MARK_AGAIN;

	if (!a || (state == BPF_TCP_TIME_WAIT && a->state != TCPHA_YIELDING) ||
	    mark == (TCPHA_MARK_AGAIN | MAX_AGAIN) || (__s64)(now_ns() - a->at_ns) > YIELD_NS ||
	    seq - a->isn < 2 || seq - a->isn > 1 << 24)
		return TC_ACT_SHOT;
	skb->mark = mark;
	COUNT(again, 1);
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

/*
 * Whether a segment is the first one of a socket's own connection, which a network has delivered once more:
 * however old what it acknowledges is, it is for that socket to judge.
 */
static __always_inline bool began_with(const struct tcp_sock *tp, __u32 seq)
{
	return seq == tp->rcv_nxt - (__u32)tp->bytes_received;
}

/*
 * Whether a segment that finds a TIME_WAIT socket is its own, late, and not the first one of a new
 * connection. If that socket's connection was adopted by cookie, its initial sequence number is known;
 * whether another one is that of a newer handshake, adopt_by_cookie() can tell. Else it is as for a SYN (RFC
 * 6191).
 */
static __always_inline bool belongs_to_past(const struct tcpha_flow *flow, __u32 seq, __u32 rcv_nxt,
					    const struct options *o, __u32 ts_recent)
{
	struct tcpha_adoption *a = bpf_map_lookup_elem(&adoptions, flow);

	if (a)
		return a->state == TCPHA_ADOPTED && a->isn == seq - 1;
	return (__s32)(seq - rcv_nxt) <= 0 &&
	       !((o->found & OPT_TS) && ts_recent && (__s32)(o->tsval - ts_recent) > 0);
}

/*
 * Only what belongs to a socket may pass. A packet that found just the listener would be answered
 * with a RST, a SYN with a SYN-ACK, and both are the front end's business.
 */
static __always_inline int guard(struct __sk_buff *skb, const struct headers *h, bool last)
{
	struct bpf_sock_tuple t = {};
	struct tcp_timewait_sock *tw;
	struct bpf_sock *skc;
	struct tcp_sock *tp;
	struct options o = {};
	struct tagged tag;
	struct tcpha_flow flow;
	__u32 state = 0, old = 0, seq = bpf_ntohl(h->tcp->seq);
	__u32 ts_recent = 0;
	int pass = 0, other = 0, verdict;
	bool control = h->tcp->syn || h->tcp->rst;

	map_v4(flow.caddr, h->ip->saddr);
	map_v4(flow.vaddr, h->ip->daddr);
	flow.cport = h->tcp->source;
	flow.vport = h->tcp->dest;
	read_tag(&tag, h, &flow);
	t.ipv4.saddr = h->ip->saddr;
	t.ipv4.daddr = h->ip->daddr;
	t.ipv4.sport = h->tcp->source;
	t.ipv4.dport = h->tcp->dest;
	skc = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	if (skc) {
		state = skc->state;
		if (state == BPF_TCP_TIME_WAIT) {
			tw = bpf_skc_to_tcp_timewait_sock(skc);
			if (tw) {
				old = tw->tw_sk.__tw_common.skc_tw_rcv_nxt;
				ts_recent = tw->tw_ts_recent;
				other = 1;
			}
		} else if (conf.fast && state != BPF_TCP_LISTEN) {
			tp = bpf_skc_to_tcp_sock(skc);
			if (tp) { /* what it acknowledges was never sent by that one */
				old = tp->rcv_nxt;
				other = !began_with(tp, seq) && ((__s32)(tag.ack - tp->write_seq) > 0 ||
								 (__s32)(tp->snd_una - tag.ack) > (1 << 20));
			}
		}
		bpf_sk_release(skc);
	}
	pass = state && state != BPF_TCP_LISTEN && !(state == BPF_TCP_TIME_WAIT && h->tcp->syn);
	if (pass && !other) {
		if (is_again(skb))
			skb->mark = 0;
		return let_pass(skb, &tag);
	}
	if (conf.fast && h->tcp->doff >= 5 &&
	    read_options(skb, ETH_HLEN + h->ip->ihl * 4 + sizeof(struct tcphdr),
			 h->tcp->doff * 4 - sizeof(struct tcphdr), &o) < 0)
		return TC_ACT_SHOT;
	if (state == BPF_TCP_TIME_WAIT && pass && belongs_to_past(&flow, seq, old, &o, ts_recent))
		return let_pass(skb, &tag);
	verdict = adopt_by_cookie(skb, h, &flow, &tag, &o, other ? &old : 0, last);
	if (verdict == TC_ACT_SHOT && conf.fast && !control)
		verdict = behind_first(skb, &flow, seq, state);
	/* what the socket cannot expect would be answered with a RST, should it end before this gets there */
	if (verdict == TC_ACT_SHOT && pass &&
	    (!conf.fast || control || (state == BPF_TCP_TIME_WAIT && (__s32)(seq - old) <= 0)))
		return let_pass(skb, &tag);
	if (verdict == TC_ACT_SHOT)
		COUNT(guarded, 1);
	return verdict;
}

/* Whether a packet that was tunnelled by a host comes from one of our front ends. */
static __always_inline bool is_ours(const __u8 from[16])
{
	if (bpf_map_lookup_elem(&frontends, from))
		return true;
	COUNT(foreign, 1);
	return false;
}

/* ECN (RFC 3168) */
#define ECN_MASK 3
#define NOT_ECT 0
#define ECT_1 1
#define ECT_0 2
#define CE 3

/*
 * Take the outer header off. What routers have written into its ECN field goes into the inner one, as RFC
 * 6040 section 4.2 has it; -1 for a packet that would have been dropped instead of marked.
 */
static __always_inline int decapsulate(struct __sk_buff *skb)
{
	__be16 inner, combined;
	__u8 tos, ecn;

	if (bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, tos), &tos, sizeof(tos)) <
		    0 ||
	    bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct iphdr), &inner, sizeof(inner)) < 0)
		return -1;
	tos &= ECN_MASK;
	ecn = bpf_ntohs(inner) & ECN_MASK;
	if (tos == CE && ecn == NOT_ECT) {
		COUNT(not_ect, 1);
		return -1;
	}
	if (bpf_skb_adjust_room(skb, -(int)sizeof(struct iphdr), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_DECAP_L3_IPV4 |
					BPF_F_ADJ_ROOM_NO_CSUM_RESET) < 0)
		return -1;
	if (tos == CE || (tos == ECT_1 && ecn == ECT_0)) {
		combined = (inner & ~bpf_htons(ECN_MASK)) | bpf_htons(tos);
		bpf_l3_csum_replace(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, check), inner, combined,
				    sizeof(inner));
		bpf_skb_store_bytes(skb, ETH_HLEN, &combined, sizeof(combined), 0);
	}
	COUNT(decapsulated, 1);
	return 0;
}

/* Whether a header begins a TCP segment for the VIP, or a fragment of one. */
static __always_inline bool is_for_vip(const struct iphdr *ip)
{
	return ip->version == 4 && ip->protocol == IPPROTO_TCP && ip->daddr == unmap_v4(conf.vaddr);
}

/*
 * Whether a packet whose TCP header cannot be seen must not get to our stack, which would answer for the VIP
 * when it has put the fragments together. Front ends send none.
 */
static __always_inline bool keeps_out(struct __sk_buff *skb)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) < 0 || !is_for_vip(&ip))
		return false;
	COUNT(guarded, 1);
	return true;
}

#define UNWRAPPED 1000 /* no TC_ACT_* */

/*
 * What is wrapped up, for us by a front end, or so it says. Whatever holds a segment for the VIP and is not
 * as a front end of ours would send it ends here: a tunnel device of this host would unwrap that, too, for
 * anybody. A front end sends no fragments; but if a router has cut what is around a segment, our stack puts
 * that together, and the mark, which the whole keeps, sends it to user space, from where what was in it comes
 * back. What is not whole never gets anywhere, so it is enough to judge the first fragment.
 */
static __always_inline int tunnelled(struct __sk_buff *skb, const struct iphdr *outer)
{
	__be16 fragment = outer->frag_off & bpf_htons(IP_MF | IP_OFFSET);
	__u32 offset = outer->ihl * 4;
	struct tcpha_flow flow;
	struct headers h;
	struct iphdr inner;
	__u8 from[16];
	bool whole;

	if (fragment & bpf_htons(IP_OFFSET))
		return TC_ACT_UNSPEC;
	map_v4(from, outer->saddr);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + offset, &inner, sizeof(inner)) < 0)
		return fragment ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (!is_for_vip(&inner)) {
		/* an ICMP error is for our own stack to judge: it has the connection */
		if (fragment || offset != sizeof(inner) ||
		    parse_icmp_error(skb, sizeof(inner), unmap_v4(conf.vaddr), &flow) < 0)
			return TC_ACT_UNSPEC;
		return is_ours(from) && decapsulate(skb) == 0 ? TC_ACT_UNSPEC : TC_ACT_SHOT;
	}
	whole = offset == sizeof(inner) && parse_tcp(skb, sizeof(inner), &h) == 0;
	if (!is_ours(from) || !whole)
		return TC_ACT_SHOT;
	if (fragment) {
		skb->mark = TCPHA_MARK_FRAGMENT;
		return TC_ACT_UNSPEC;
	}
	return decapsulate(skb) == 0 ? UNWRAPPED : TC_ACT_SHOT;
}

SEC("tc")
int be_ingress(struct __sk_buff *skb)
{
	struct headers h;
	struct iphdr *ip;
	int verdict;

	if (!is_for_us(skb))
		return TC_ACT_UNSPEC;
	if (bpf_skb_pull_data(skb, ETH_HLEN + sizeof(*ip)) < 0)
		return TC_ACT_UNSPEC;
	ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	if (ip->protocol == IPPROTO_IPIP && ip->daddr == unmap_v4(conf.raddr)) {
		verdict = tunnelled(skb, ip);
		if (verdict != UNWRAPPED)
			return verdict;
	}
	if (parse_tcp(skb, 0, &h) < 0)
		return keeps_out(skb) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	if (h.ip->daddr != unmap_v4(conf.vaddr))
		return TC_ACT_UNSPEC;
	return guard(skb, &h, false);
}

/* Make the forged packet the last ACK of a handshake, and its socket a child of the listener. */
static __always_inline void adopt(struct __sk_buff *skb, struct tcpha_op *op)
{
	struct bpf_tcp_req_attrs attrs = {};
	struct bpf_sock_tuple t = {};
	struct tcp_sock *listener;
	struct bpf_sock *skc;

	query(skb, op);
	if (op->result != TCPHA_R_NO_SOCKET)
		return;
	op->result = TCPHA_R_ASSIGN;
	if (skb->ifindex != conf.tap && is_shared(skb))
		return;
	op->result = TCPHA_R_NO_LISTENER;
	tuple_of(&op->flow, &t);
	t.ipv4.daddr = unmap_v4(op->listen_addr);
	t.ipv4.dport = op->listen_port;
	skc = find_listener(skb, &t);
	if (!skc)
		return;
	if (skc->state != BPF_TCP_LISTEN)
		goto out;
	listener = bpf_skc_to_tcp_sock(skc);
	if (!listener)
		goto out;
	attrs.mss = op->mss;
	attrs.snd_wscale = op->snd_wscale;
	attrs.rcv_wscale = op->rcv_wscale;
	attrs.wscale_ok = op->wscale_ok;
	attrs.sack_ok = op->sack_ok;
	attrs.ecn_ok = op->ecn_ok;
	attrs.tstamp_ok = op->tstamp_ok;
	attrs.usec_ts_ok = op->usec_ts_ok;
	attrs.rcv_tsval = op->ts_recent;
	attrs.rcv_tsecr = op->tsval;
	op->error = bpf_sk_assign_tcp_reqsk(skb, (struct sock *)listener, &attrs, sizeof(attrs));
	op->result = op->error ? TCPHA_R_ASSIGN : TCPHA_R_OK;
	bpf_map_delete_elem(&adoptions, &op->flow); /* what it says is of an older connection */
out:
	bpf_sk_release(skc);
}

/* A packet that user space has written. */
static __always_inline int forged(struct __sk_buff *skb)
{
	struct tcpha_op *op;
	struct headers h;
	__u8 mac[3];
	__u32 slot;
	int verdict;

	if (skb->protocol != bpf_htons(ETH_P_IP) || parse_tcp(skb, 0, &h) < 0)
		return TC_ACT_SHOT;
	bpf_skb_change_type(skb, PACKET_HOST);
	if (parse_tcp(skb, 0, &h) < 0 || bpf_skb_load_bytes(skb, 0, mac, sizeof(mac)) < 0)
		return TC_ACT_SHOT;
	if (mac[0] == TCPHA_MAC_ROOM >> 8 && mac[1] == (TCPHA_MAC_ROOM & 0xff))
		return guard(skb, &h, mac[2]);
	slot = bpf_ntohs(h.ip->id);
	if (slot == TCPHA_IPID_PLAIN)
		return TC_ACT_OK;
	op = bpf_map_lookup_elem(&ops, &slot);
	if (!op || op->flow.cport != h.tcp->source || unmap_v4(op->flow.caddr) != h.ip->saddr ||
	    __sync_val_compare_and_swap(&op->kind, TCPHA_OP_ADOPT, 0) != TCPHA_OP_ADOPT)
		return TC_ACT_SHOT; /* too late: user space has given it up */
	adopt(skb, op);
	verdict = op->result == TCPHA_R_OK ? TC_ACT_OK : TC_ACT_SHOT;
	op->done = 1; /* last: user space may be looking at it already */
	return verdict;
}

static __always_inline void operate(struct __sk_buff *skb)
{
	struct tcpha_op *op = op_of_frame(skb);

	if (op && op->kind == TCPHA_OP_QUERY)
		query(skb, op);
}

SEC("tc")
int be_tap(struct __sk_buff *skb)
{
	struct tcpha_gate *g;
	__u32 zero = 0;

	if (skb->protocol == bpf_htons(TCPHA_ETH_OP)) {
		operate(skb);
		return TC_ACT_SHOT;
	}
	g = bpf_map_lookup_elem(&gate, &zero);
	if (!g || !g->device)
		return forged(skb);
	skb->mark = TCPHA_MARK_FORGED;
	return bpf_redirect(g->device, BPF_F_INGRESS);
}

SEC("tc")
int be_forged(struct __sk_buff *skb)
{
	int verdict;

	if (is_again(skb)) /* be_ingress is next; the MAC may be one of ours */
		bpf_skb_change_type(skb, PACKET_HOST);
	if (skb->mark != TCPHA_MARK_FORGED)
		return TC_ACT_UNSPEC;
	if (skb->protocol == bpf_htons(TCPHA_ETH_OP)) {
		operate(skb);
		return TC_ACT_SHOT;
	}
	skb->mark = 0;
	verdict = forged(skb);
	return verdict == TC_ACT_UNSPEC ? TC_ACT_OK : verdict; /* be_ingress has nothing to judge here */
}

char LICENSE[] SEC("license") = "GPL";
