/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a frame on one of our TAP devices is: that stands in the place of its destination MAC address.
 * Programs and user space both read and write it by this.
 */
#ifndef TCPHA_FRAME_H
#define TCPHA_FRAME_H

#include <linux/types.h>

#define TCPHA_ETH_OP                                                                                         \
	0x88b5 /* IEEE 802 local experimental EtherType: an operation; its slot follows, 32 bits */

/* The first two bytes: of unicast addresses that are administered locally, and that no device has. */
enum {
	TCPHA_MAC_MARK = 0x0274,  /* a packet of a flow that is being handed over, of 'slot' */
	TCPHA_MAC_KEPT = 0x027a,  /* written: it was kept, and goes on */
	TCPHA_MAC_FAST = 0x0276,  /* on the fast TAP: of 'kind' */
	TCPHA_MAC_ROOM = 0x0278,  /* at a back end: it waits for room. Written: it was looked for; 'full' */
	TCPHA_MAC_ADOPT = 0x027c, /* written: to become a socket, by the operation in 'slot' */
	TCPHA_MAC_PLAIN = 0x027e, /* written: for a socket that is there */
};

/* What a worker wants of a frame that it writes to the fast TAP, or what one is that it reads there. */
enum {
	TCPHA_FAST_FIRST = 1,  /* read: a request */
	TCPHA_FAST_LATER = 2,  /* both: another segment of its flow; it goes where its entry says */
	TCPHA_FAST_SEND = 3,   /* written: to the back end of the worker's offer */
	TCPHA_FAST_SOCKET = 4, /* written: to a socket of our own */
	TCPHA_FAST_EARLY = 5,  /* both: a later segment that has come before the request's first one */
	TCPHA_FAST_ACCEPT = 6, /* neither: from fe_ingress to a socket of our own */
	TCPHA_FAST_PASSED = 7, /* written: the head of one that was TCPHA_FAST_LATER and has gone on */
};

struct tcpha_frame {
	__be16 mark; /* TCPHA_MAC_* */
	union {
		__u32 slot; /* of a connection, or of an operation */
		__u8 full;  /* there is no room */
		struct {
			__u8 kind;    /* TCPHA_FAST_* */
			__u16 worker; /* written: whose offer it goes by */
			__u8 pad;     /* as long as 'slot': verifiers ask that all is set */
		} __attribute__((packed));
	};
} __attribute__((packed));

#endif
