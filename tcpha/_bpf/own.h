/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Which daemon a program belongs to. The kernel does not say so of programs at tcx; no program reads it.
 */
#ifndef TCPHA_OWN_H
#define TCPHA_OWN_H

#include <linux/types.h>

const volatile __u32 own SEC(".rodata.own");

#endif
