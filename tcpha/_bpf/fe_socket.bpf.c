// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The front end without the packet path: nothing in here asks for a kernel function, a loop or an adoption,
 * so it loads where fe.bpf.c does not.
 */
#define SOCKET_PATH_ONLY
#include "fe.bpf.c"
