# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP_REPAIR: the numbers of a connection, seen and set from outside."""
from __future__ import annotations

import socket

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_TIMESTAMP = 19, 20, 21, 24
RECV_QUEUE, SEND_QUEUE = 1, 2
OFF_NO_PROBE = -1


def option(s: socket.socket, name: int, value: int | None = None) -> int:
    if value is not None:
        s.setsockopt(socket.IPPROTO_TCP, name, value - 2**32 if value >= 2**31 else value)
    return s.getsockopt(socket.IPPROTO_TCP, name) & 0xFFFFFFFF


def numbers(s: socket.socket) -> tuple[int, int]:
    """(rcv_nxt, snd_nxt) of a connection that has said nothing yet."""
    out = []
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    for queue in (RECV_QUEUE, SEND_QUEUE):
        s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        out.append(option(s, TCP_QUEUE_SEQ))
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_NO_PROBE)
    return out[0], out[1]
