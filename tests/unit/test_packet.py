# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets that we make ourselves."""
from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from tcpha._fast.packet import forge_segment

U16, U32 = (st.integers(0, 2 ** n - 1) for n in (16, 32))


def checksum(data: bytes) -> int:
    """RFC 1071, plainly."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


@settings(deadline=None)
@given(U32, U32, U16, st.binary(max_size=100), st.one_of(st.none(), st.tuples(U32, U32)))
def test_forged_segments(seq: int, ack: int, window: int, data: bytes,
                         stamps: tuple[int, int] | None) -> None:
    fields = {"seq": seq, "ack": ack, "window": window, "flags": 0x18, "ip_id": 7}
    if stamps:
        fields |= {"tsval": stamps[0], "tsecr": stamps[1]}
    frame = forge_segment("10.1.2.3", 4567, "10.9.8.7", 80, fields, data)
    ip = frame[24:]
    assert checksum(ip[:20]) == 0
    assert struct.unpack("!HH", ip[2:6]) == (len(ip), 7)
    assert ip[12:20] == bytes([10, 1, 2, 3, 10, 9, 8, 7])
    tcp = ip[20:]
    assert struct.unpack("!HHII", tcp[:12]) == (4567, 80, seq, ack)
    size = (tcp[12] >> 4) * 4
    assert tcp[13] == 0x18 and struct.unpack("!H", tcp[14:16])[0] == window
    assert tcp[size:] == data
    if stamps:
        assert struct.unpack("!IHH", tcp[20:24] + tcp[24:28])[0] == 0x0101080a
        assert struct.unpack("!II", tcp[24:32]) == stamps
    else:
        assert size == 20
    # the virtio-net header asks for the checksum that completes the pseudo-header's sum
    assert frame[:10] == struct.pack("<BBHHHH", 1, 0, 0, 0, 34, 16)
    pseudo = ip[12:20] + struct.pack("!HH", 6, len(tcp))
    assert struct.unpack("!H", tcp[16:18])[0] == ~checksum(pseudo) & 0xffff
