/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Structs shared by the BPF programs and user space.
 *
 * Addresses take 16 bytes (IPv4 as v4-mapped, RFC 4291 section 2.5.5.2) and are in network byte
 * order; so are ports in struct tcpha_flow. Everything else is in host byte order.
 */
#ifndef TCPHA_H
#define TCPHA_H

#include <linux/types.h>

#include "frame.h"

#define TCPHA_MAX_BACKENDS 256		/* size of the back-end table; indexes are stable for a run */
#define TCPHA_MAX_RULES 65536		/* whose use is counted */
#define TCPHA_LOCAL_NODE 255		/* index of the front end's own server */
#define TCPHA_MAX_SERVICES 64		/* of one run of the front end */
#define TCPHA_CLOSED TCPHA_MAX_SERVICES /* the number of a service that takes no new connections */
#define TCPHA_MAX_OPS 1024		/* operation slots, one for each worker thread that may exist, but: */
#define TCPHA_LOCKED_OP (TCPHA_MAX_OPS - 3) /* that of whoever holds the datapath's lock, */
					    /* and two behind it for Python's threads */
/*
 * Bytes of the request-target kept for the connection table. An entry, its key and what the kernel's hash
 * table adds to them just fit into 256 bytes, of which its allocator has blocks.
 */
#define TCPHA_TARGET_MAX 56
#define TCPHA_MARK_AGAIN                                                                                     \
	0x7c9a0100 /* of a packet that waits for the end of an old socket; and how often it did */
#define TCPHA_MARK_FRAGMENT 0x7c9a0002 /* of a first fragment, so of the packet that becomes of it */
#define TCPHA_MARK_FORGED 0x7c9a0003   /* of what passes from the TAP to the listener's device */
#define TCPHA_COOKIE_MS 120000	       /* the oldest SYN-ACK that a request may answer, milliseconds */
#define TCPHA_HEAD_MAX 2048    /* bytes of a request head that the verdict cache knows; a power of two */
#define TCPHA_LINE_MAX 512     /* of which method and request-target */
#define TCPHA_CHOICES 8	       /* back ends that a cached verdict may choose from */
#define TCPHA_MAX_FAST 8       /* front ends of a back end that may use the packet path */
#define TCPHA_MAX_VIPS 8       /* virtual addresses of a back end */
#define TCPHA_MAX_ROUTES 16384 /* by which clients are told another MSS than their interface has room for */

/* A flow, as a hash key. */
struct tcpha_flow {
	__u8 caddr[16];
	__u8 vaddr[16];
	__be16 cport;
	__be16 vport;
};

/* With the count of packets that were held: no more are, as they go by themselves; and to our own stack. */
#define TCPHA_FLOWING (1U << 31)
#define TCPHA_OURS (1U << 30)

/* Flags of struct tcpha_entry, set by BPF unless said otherwise. */
enum {
	TCPHA_F_FIN = 1,       /* the client has sent a FIN */
	TCPHA_F_RST = 2,       /* the client has sent a RST */
	TCPHA_F_NEW_SYN = 4,   /* a SYN of a newer connection went to the listener: see syn_seq */
	TCPHA_F_FAST = 8,      /* took the packet path: the client's first segment may create the socket */
	TCPHA_F_ANSWERED = 16, /* of such: the client has acknowledged something of the back end's */
};

/* A flow that the front end has diverted. */
struct tcpha_entry {
	__u64 id;	/* handoff id, unique for the life of the front end */
	__u64 start_ns; /* CLOCK_MONOTONIC */
	__u64 last_ns;	/* CLOCK_MONOTONIC of the last packet from the client */
	__u64 packets;	/* forwarded; a GSO packet counts as its segments */
	__u64 bytes;	/* forwarded, L3 and up */
	__u64 phase;	/* see flow.h */
	__u32 tag;	/* a digest of its key: shows that this memory is still the flow's, see flow.h */
	__u32 backend;	/* index into the table of back ends */
	__u32 slot;	/* TCPHA_HELD: connection slot in user space */
	__u32 flags;
	__u32 rule;	 /* index of the rule that matched */
	__u32 end_seq;	 /* behind the last byte or FIN that the client has sent; see flow.h */
	__u32 ahead_seq; /* what was seen behind a gap; none if both are equal */
	__u32 ahead_end;
	__u32 syn_seq;
	union {
		__u32 first_seq; /* TCPHA_F_FAST: of the request */
		__u32 held;	 /* else: packets that went to user space; TCPHA_FLOWING, TCPHA_OURS */
	};
	__u32 first_ack;
	__u32 behind; /* TCPHA_F_FAST: packets in user space that later ones must not overtake */
	__u16 rtt_ms; /* TCPHA_F_FAST: of the handshake; 0: not known */
	__u16 target_len;
	char target[TCPHA_TARGET_MAX];
};

enum {
	TCPHA_DIRECT = 1,
	TCPHA_TUNNEL = 2,
	TCPHA_LOCAL = 3, /* our own stack: the Local Node */
};

/* A word as it is now, which others change at any time. */
#ifdef __bpf__
#define tcpha_now(p) (*(const volatile __typeof__(*(p)) *)(p))
#else
#define tcpha_now(p) __atomic_load_n(p, __ATOMIC_RELAXED)
#endif

/* How to reach a back end. mode 0: not reachable. */
struct tcpha_backend {
	__u32 ifindex;
	__u32 mode;
	__u32 down; /* takes nothing at the moment: a request that it has not answered goes elsewhere */
	__u32 mtu;  /* of the way there; 0: not known */
	__u8 nexthop[16];
	__u8 addr[16];
	__u8 src[16]; /* tunnel: outer source address */
};

/* Operations of struct tcpha_op. */
enum {
	TCPHA_OP_QUERY = 1,	/* look the flow's socket up, fill the fields below */
	TCPHA_OP_ADOPT = 2,	/* attach the forged packet to a listener as a new socket */
	TCPHA_OP_END = 3,	/* the connection of handoff 'id' is over */
	TCPHA_OP_TAKE_BACK = 4, /* the back end did not take the request of handoff 'id' */
	TCPHA_OP_DROP = 5,	/* remove an entry, if it still is what was found */
	TCPHA_OP_HAND_OVER = 6, /* the flow is a back end's; what user space has kept comes now */
	TCPHA_OP_LET_FLOW = 7,	/* and what follows goes by itself, if no more than 'held' were held */
	TCPHA_OP_GIVE_BACK = 8, /* the entry goes, as our own stack has the connection; 'held' likewise */
};

/* Results of struct tcpha_op. */
enum {
	TCPHA_R_NONE = 0, /* the program did not run */
	TCPHA_R_OK = 1,
	TCPHA_R_NO_LISTENER = 2,
	TCPHA_R_ASSIGN = 3, /* the kernel refused: see error */
	TCPHA_R_NO_SOCKET = 4,
	TCPHA_R_TIME_WAIT = 5, /* a TIME_WAIT socket owns the 4-tuple: see rcv_nxt */
	TCPHA_R_LIVE = 6,      /* another socket owns the 4-tuple: see state, rcv_nxt */
	TCPHA_R_BACKLOG = 7,   /* the listener's accept queue is full */
	TCPHA_R_FULL = 8,      /* no more connections wanted */
};

/*
 * One operation and its result, in memory shared by BPF and a worker (BPF_F_MMAPABLE). The program
 * runs inside write() on the TAP, so the result is there when write() returns.
 * Sequence numbers, windows (bytes, scaled) and timestamps are those of the kernel's tcp_sock.
 */
struct tcpha_op {
	struct tcpha_flow flow;
	__u32 kind;
	__u32 result;
	__s32 error;
	__u64 id;      /* END, TAKE_BACK, HAND_OVER, LET_FLOW */
	__u64 phase;   /* DROP: as found */
	__u32 slot;    /* GIVE_BACK */
	__u32 keep;    /* END: the entry stays, for what the client may still send */
	__u32 backend; /* END, TAKE_BACK: whose it is; HAND_OVER: as in the entry */
	__u32 rule;    /* HAND_OVER: this and the next two as in the entry */
	__u32 flags;
	__u32 end_seq;
	__u32 done; /* ADOPT out: the rest is what became of it */
	__u32 held; /* LET_FLOW, GIVE_BACK; TCPHA_FLOWING: however many there were */
	/* ADOPT in, QUERY out */
	__u16 mss;
	__u8 snd_wscale;
	__u8 rcv_wscale;
	__u8 wscale_ok;
	__u8 sack_ok;
	__u8 tstamp_ok;
	__u8 usec_ts_ok;
	__u8 ecn_ok;
	__u8 pad;
	__u32 tsval;	 /* our timestamp clock, now */
	__u32 ts_recent; /* the peer's latest TSval */
	/* QUERY out */
	__u32 state; /* enum tcp_state, BPF_TCP_* */
	__u32 snd_nxt;
	__u32 snd_wnd;
	__u32 rcv_nxt;
	__u32 rcv_wnd;
	__u32 copied_seq;
	__u32 srtt_us;	       /* smoothed RTT, microseconds, already divided by 8 */
} __attribute__((aligned(8))); /* as an array map places its elements */

/* Counters, per CPU. */
struct tcpha_counters {
	__u64 forwarded; /* packets */
	__u64 forwarded_bytes;
	__u64 held;
	__u64 live_syn;	   /* SYNs on live flows, forwarded for a challenge ACK */
	__u64 unreachable; /* no way to the back end: dropped */
	__u64 guarded;	   /* back end: no socket for it, dropped */
	__u64 foreign;	   /* back end: tunnelled by a host that is no front end of ours, dropped */
	__u64 decapsulated;
	__u64 cookies;	/* front end: SYNs answered */
	__u64 requests; /* front end: requests that went to user space */
	__u64 cached;	/* front end: requests that the verdict cache decided */
	__u64 forged;	/* segments of no known flow that had no valid cookie */
	__u64 adopted;	/* back end: by a client's own segment */
	__u64 yielded;	/* back end: older sockets on the 4-tuple that were ended for that */
	__u64 again;	/* back end: rounds of segments that waited for their socket */
	__u64 icmp;	/* front end: ICMP errors sent on to the back end that they concern */
	__u64 too_big;	/* front end: no room on the way to the back end, and the client was told */
	__u64 not_ect;	/* back end: met congestion in the tunnel, and cannot tell: dropped */
	__u64 wary;	/* front end: SYNs without timestamps, left to the listener: see tcpha_guesses */
};

/* A route, as the key of a longest-prefix match: the address and its length are the v4-mapped ones. */
struct tcpha_route {
	__u32 prefixlen; /* bits of what follows */
	__u32 ifindex;
	__u8 addr[16];
};

/* The cookie keys of one front end. */
struct tcpha_keys {
	__u64 key[2][2];
	__u32 current; /* front end: the one for new cookies */
	__u32 used;    /* front end: SYNs are answered; back end: 1, 2: the first, the second key is known */
	__u32 wscale;  /* that the front end offers */
	__u32 pad;
	__u64 clock; /* back end: see TCPHA_CLOCK; front end: 0 */
};

/*
 * What a back end knows of a front end's clock, in one word: by how many milliseconds it is ahead of ours,
 * modulo 2^32, and how many milliseconds either way that may be wrong.
 */
#define TCPHA_CLOCK(ahead_ms, slack_ms) ((__u64)(__u32)(ahead_ms) << 32 | (__u32)(slack_ms))

/*
 * The front end's keys, and what else the maps hold that outlive a daemon: flows, backends, services, shaken
 * and this one. In memory shared with user space. The version changes with the layout of any of these, and
 * with what a cookie is made of: clients have cookies of the earlier run in their hands. (So does
 * MSG_VERSION.)
 */
#define TCPHA_STATE_VERSION 7
struct tcpha_state {
	struct tcpha_keys keys;
	__u64 key_number; /* of the cookie key in use */
	__u32 version;
	__u32 drop_unknown; /* flows of an earlier run may not be known yet */
	__u32 mtu;	    /* the least between here and the back ends; 0: not known */
	__u32 pad;
};

/* A service: an address and a port of ours that clients connect to. */
struct tcpha_service {
	__u8 vaddr[16];
	__be16 vport;
	__u16 pad;
};

/* What a worker says of a request, and what the program answers; in memory shared with it. */
struct tcpha_offer {
	__u64 id;
	__u64 start_ns;
	__u32 backend;
	__u32 rule;
	__u32 target_len;
	__u32 result; /* out: 1: the flow is the back end's; 2: it was one's before; 0: neither */
	__u32 old;    /* out: back end of an older flow, whose end is known by this; + 1 */
	__u32 alone;  /* nothing follows the request before it is answered: there is no order to keep */
	__u32 rtt_ms; /* of the handshake, where there is no request */
	__u32 pad;
	char target[TCPHA_TARGET_MAX];
};

#define TCPHA_GUESSES 256	     /* in a second, that are no reason to be wary */
#define TCPHA_WARY_NS 10000000000ULL /* for so long after the last second with more than that */

/*
 * Wrong cookies of clients that have no timestamps, in memory shared with user space. Of such a cookie 22
 * bits are to be guessed. So where many are wrong, we are wary: these clients' SYNs are the listener's, and
 * their cookies mean nothing.
 */
struct tcpha_guesses {
	__u64 since_ns; /* the present second's begin */
	__u64 until_ns; /* we are wary */
	__u32 count;	/* in the present second */
	__u32 pad;
};

/* The verdict cache, in memory shared with user space. */
struct tcpha_cache {
	__u64 key[2];	  /* of the hashes by which it is looked up */
	__u64 generation; /* of all that verdicts depend on; those of another one are void */
	__u32 on;
	__u32 pad;
};

struct tcpha_choice {
	__u32 backend;
	__u32 rule;
};

/* Who may take requests with a method and target; or that the rest of a head is well-formed. */
struct tcpha_verdict {
	__u64 key; /* its own: when it is gone, its memory is another one's at once */
	__u64 generation;
	__u64 until_ns; /* CLOCK_MONOTONIC; void from then on. 0: it has no end */
	__u32 count;	/* of choices; 0: of the rest of a head */
	__u32 turn;	/* how often it was used */
	struct tcpha_choice choice[TCPHA_CHOICES];
};

/* What a back end has, in memory shared with user space. */
struct tcpha_load {
	__u64 handed; /* by cached verdicts */
	__u64 closed; /* known to be so by a connection that a cached verdict put in the place of an older one
		       */
	__u32 live;   /* connections handed to it, offers included */
	__u32 pad;
};

/* A handshake that has ended, without a request yet. */
struct tcpha_shaken {
	__u64 since_ns;
	__u32 isn;  /* client's */
	__u32 ours; /* our initial sequence number */
	__u32 rtt_ms;
	__u32 tsval; /* of the client's ACK */
	__u32 tsecr;
	__u16 window;
	__u8 timestamps;
	__u8 pad;
};

/* What became of the request of a flow at the back end. */
enum {
	TCPHA_ADOPTED = 0,
	TCPHA_YIELDING = 1, /* it is about to be adopted: an older socket on the 4-tuple ends first */
	TCPHA_GIVEN_UP = 2, /* the front end was told that it did not come */
};

struct tcpha_adoption {
	__u64 at_ns;
	__u32 isn; /* the client's */
	__u32 state;
};

/* Room for adoptions at the back end, in memory shared with user space. */
struct tcpha_gate {
	__u32 max;
	__u32 live;   /* connections that user space knows of, and the application may have open */
	__u32 coming; /* of those it does not know of yet */
};

/* What a listener is for, as a hash key. */
struct tcpha_place {
	__u8 vaddr[16];
	__be16 vport; /* 0: any port of the VIP that is in no other place */
	__u16 pad;
};

/* Where the application listens for a place. */
struct tcpha_listener {
	__u8 addr[16];
	__be16 port;
	__u16 pad;
	__u32 device; /* that it is bound to (SO_BINDTODEVICE); 0: to none */
};

/* What the back end's program did with a client's segment. */
struct tcpha_event {
	__u64 at_ns; /* CLOCK_MONOTONIC */
	struct tcpha_flow flow;
	__u32 isn;  /* client's */
	__u32 ours; /* our initial sequence number */
	__u32 frontend;
	__u32 result; /* TCPHA_R_OK, or why not */
	__u32 reused; /* its 4-tuple had another one within a minute, whose end may yet be reported */
	__u32 pad;
};

struct tcpha_fe_conf {
	__u32 tap;
	__u32 fast_tap;
	__u16 headers; /* bytes of each packet that are no payload, on the way to back ends */
	__u16 window;  /* of the SYN-ACK */
	__u8 wscale;
	__u8 options; /* OPT_*, see cookie.bpf.h */
	__u16 pad;
};

struct tcpha_be_conf {
	__u8 vips[TCPHA_MAX_VIPS][16];
	__u8 raddr[16];
	__u32 nvips;
	__u32 tap;
	__u32 fast; /* the packet path is there */
};

#endif
