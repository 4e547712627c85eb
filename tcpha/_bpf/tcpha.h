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

#define TCPHA_MAX_BACKENDS 256	 /* size of the back-end table; indexes are stable for a run */
#define TCPHA_LOCAL_NODE 255	 /* index of the front end's own server */
#define TCPHA_MAX_OPS 1024	 /* operation slots, one for each worker thread that may exist */
#define TCPHA_TARGET_MAX 96	 /* bytes of the request-target kept for the connection table */
#define TCPHA_ETH_OP 0x88b5	 /* IEEE 802 local experimental EtherType: operation frames on the TAP */
#define TCPHA_MAC_MARK 0x0274	 /* first two bytes of the MAC of a frame that BPF put on the TAP */
#define TCPHA_IPID_PLAIN 0xffff	 /* IP id of forged packets that want no adoption */

/* A flow, as a hash key. */
struct tcpha_flow {
	__u8 caddr[16];
	__u8 vaddr[16];
	__be16 cport;
	__be16 vport;
};

/* States of struct tcpha_entry. */
enum {
	TCPHA_HOLD = 1,	   /* being handed over: packets go to user space, which keeps them */
	TCPHA_FORWARD = 2, /* handed over: packets go to the back end */
};

/* Flags of struct tcpha_entry, set by BPF unless said otherwise. */
enum {
	TCPHA_F_FIN = 1,      /* the client has sent a FIN */
	TCPHA_F_RST = 2,      /* the client has sent a RST */
	TCPHA_F_NEW_SYN = 4,  /* a SYN of a newer connection went to the listener: see syn_seq */
	TCPHA_F_CLOSED = 8,   /* by user space: the back end has only a TIME_WAIT socket left */
};

/* A flow that the front end has diverted. */
struct tcpha_entry {
	__u64 id;	/* handoff id, unique for the life of the front end */
	__u64 start_ns; /* CLOCK_MONOTONIC */
	__u64 last_ns;	/* CLOCK_MONOTONIC of the last packet from the client */
	__u64 packets;	/* forwarded; a GSO packet counts as its segments */
	__u64 bytes;	/* forwarded, L3 and up */
	__u32 state;
	__u32 backend;	/* index into the table of back ends */
	__u32 slot;	/* connection slot in user space while in TCPHA_HOLD */
	__u32 flags;
	__u32 rule;	/* index of the rule that matched */
	__u32 end_seq;	/* behind the last byte or FIN that the client has sent; see flow.h */
	__u32 ahead_seq; /* what was seen behind a gap; none if both are equal */
	__u32 ahead_end;
	__u32 syn_seq;
	__u32 target_len;
	char target[TCPHA_TARGET_MAX];
};

enum {
	TCPHA_DIRECT = 1,
	TCPHA_TUNNEL = 2,
	TCPHA_LOCAL = 3, /* our own stack: the Local Node */
};

/* How to reach a back end. mode 0: not reachable. */
struct tcpha_backend {
	__u32 ifindex;
	__u32 mode;
	__u8 nexthop[16];
	__u8 addr[16];
	__u8 src[16]; /* tunnel: outer source address */
};

/* Operations of struct tcpha_op. */
enum {
	TCPHA_OP_QUERY = 1, /* look the flow's socket up, fill the fields below */
	TCPHA_OP_ADOPT = 2, /* attach the forged packet to a listener as a new socket */
};

/* Results of struct tcpha_op. */
enum {
	TCPHA_R_NONE = 0,     /* the program did not run */
	TCPHA_R_OK = 1,
	TCPHA_R_NO_LISTENER = 2,
	TCPHA_R_ASSIGN = 3,   /* the kernel refused: see error */
	TCPHA_R_NO_SOCKET = 4,
	TCPHA_R_TIME_WAIT = 5, /* a TIME_WAIT socket owns the tuple: see rcv_nxt */
	TCPHA_R_LIVE = 6,      /* another socket owns the tuple: see state, rcv_nxt */
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
	__u8 listen_addr[16]; /* ADOPT: the listener */
	__be16 listen_port;
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
	__u32 tsval;	/* our timestamp clock, now */
	__u32 ts_recent; /* the peer's latest TSval */
	/* QUERY out */
	__u32 state; /* enum tcp_state, BPF_TCP_* */
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 write_seq;
	__u32 snd_wnd;
	__u32 rcv_nxt;
	__u32 rcv_wnd;
	__u32 copied_seq;
	__u32 srtt_us; /* smoothed RTT, microseconds, already divided by 8 */
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
};

struct tcpha_fe_conf {
	__u8 vaddr[16];
	__be16 vport;
	__u16 pad;
	__u32 tap;
};

struct tcpha_be_conf {
	__u8 vaddr[16];
	__u8 raddr[16];
	__u32 tap;
};

#endif
