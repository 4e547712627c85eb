/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * CLOCK_MONOTONIC as BPF programs and user space read it. Hosts of a lab share one: there, each daemon may
 * be given a clock of its own, so that whoever compares clocks of two hosts is found out.
 */
#ifndef TCPHA_CLOCK_H
#define TCPHA_CLOCK_H

#include <linux/types.h>

/* All zero: the clock is what the kernel says. */
struct tcpha_clock {
	__u64 ahead_ns;
	__s64 ppm; /* how much faster it runs */
};

static inline __attribute__((always_inline)) __u64 tcpha_clock_read(__u64 kernel_ns, __u64 ahead_ns,
								    __s64 ppm)
{
	return kernel_ns + ahead_ns + (__s64)(kernel_ns / 1000000) * ppm;
}

#endif
