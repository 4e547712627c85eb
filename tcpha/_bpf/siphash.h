/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SipHash-2-4 (Aumasson and Bernstein, 2012), in pieces that suit BPF and user space. */
#ifndef SIPHASH_H
#define SIPHASH_H

#include <linux/types.h>

#define ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define SIPROUND                                                                                             \
	do {                                                                                                 \
		v0 += v1;                                                                                    \
		v1 = ROTL(v1, 13);                                                                           \
		v1 ^= v0;                                                                                    \
		v0 = ROTL(v0, 32);                                                                           \
		v2 += v3;                                                                                    \
		v3 = ROTL(v3, 16);                                                                           \
		v3 ^= v2;                                                                                    \
		v0 += v3;                                                                                    \
		v3 = ROTL(v3, 21);                                                                           \
		v3 ^= v0;                                                                                    \
		v2 += v1;                                                                                    \
		v1 = ROTL(v1, 17);                                                                           \
		v1 ^= v2;                                                                                    \
		v2 = ROTL(v2, 32);                                                                           \
	} while (0)
#define SIPWORD(m)                                                                                           \
	do {                                                                                                 \
		v3 ^= (m);                                                                                   \
		SIPROUND;                                                                                    \
		SIPROUND;                                                                                    \
		v0 ^= (m);                                                                                   \
	} while (0)
#define SIPKEYS(k0, k1)                                                                                      \
	__u64 v0 = (k0) ^ 0x736f6d6570736575ULL, v1 = (k1) ^ 0x646f72616e646f6dULL;                          \
	__u64 v2 = (k0) ^ 0x6c7967656e657261ULL, v3 = (k1) ^ 0x7465646279746573ULL
#define SIPEND                                                                                               \
	do {                                                                                                 \
		v2 ^= 0xff;                                                                                  \
		SIPROUND;                                                                                    \
		SIPROUND;                                                                                    \
		SIPROUND;                                                                                    \
		SIPROUND;                                                                                    \
	} while (0)

#ifndef __bpf__
#include <string.h>

/* Of n bytes. */
static inline __u64 tcpha_siphash(const __u8 *p, __u32 n, __u64 k0, __u64 k1)
{
	SIPKEYS(k0, k1);
	__u32 i;
	__u64 m;

	for (i = 0; i + 8 <= n; i += 8) {
		memcpy(&m, p + i, 8);
		SIPWORD(m);
	}
	m = 0;
	memcpy(&m, p + i, n & 7);
	m |= (__u64)n << 56;
	SIPWORD(m);
	SIPEND;
	return v0 ^ v1 ^ v2 ^ v3;
}
#endif

#endif
