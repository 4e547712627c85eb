# SPDX-License-Identifier: GPL-2.0-or-later
"""Lists of what the kernel has, read message by message. pyroute2 makes objects of all there is:
for a full table of BGP that takes a minute, and gigabytes."""
from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST_DUMP = 0x301
NLA_TYPE_MASK = 0x3FFF
HEADER = 16
PATIENCE = 5.0  # seconds for the next piece of an answer


def dump(protocol: int, kind: int, request: bytes) -> Iterator[tuple[int, bytes, int, int]]:
    """Of each message of the answer: its type, the data that it is part of, where it begins there
    behind its header, and ends. What changes meanwhile may be missing, or come twice. Raises
    OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as s:
        s.settimeout(PATIENCE)
        s.bind((0, 0))
        s.send(struct.pack("=IHHII", HEADER + len(request), kind, NLM_F_REQUEST_DUMP, 1, 0)
               + request)
        while True:
            data = s.recv(1 << 16)
            at = 0
            while at + HEADER <= len(data):
                size, answer = struct.unpack_from("=IH", data, at)
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    error = -struct.unpack_from("=i", data, at + HEADER)[0]
                    raise OSError(error, os.strerror(error))
                yield answer, data, at + HEADER, at + size
                at += size + -size % 4


def attributes(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Of each attribute its type, and where its value begins and ends."""
    while at + 4 <= end:
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4:
            return
        yield kind & NLA_TYPE_MASK, at + 4, at + size
        at += size + -size % 4
