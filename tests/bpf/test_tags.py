# SPDX-License-Identifier: GPL-2.0-or-later
"""What front end and back end tell each other in a client's own segments: cookies and tags, packet
by packet (BPF_PROG_TEST_RUN)."""
from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tcpha._fast import message
from tcpha.lab.bed import Cluster
from tests.support.bpf import DROP, F_FAST, FORWARD, REDIRECT, Bpf, answer, entry, flow
from tests.support.cookies import META, Keys
from tests.support.packets import ACK, MSS, PSH, SACK_TS, SYN, Packet, options

URG, ISN = 32, 7000
GET = b"GET /tagged HTTP/1.1\r\n\r\n"
SIZE, PLACES = 56, 8  # of struct tcpha_keys; TCPHA_MAX_FAST
VERSION = 64  # offset in struct tcpha_state
PLAIN = 15 << 4  # what was negotiated: nothing


@pytest.fixture(scope="module")
def fe(lab: Cluster) -> Bpf:
    return Bpf(lab.fe_host, ("fe_ingress",))


@pytest.fixture(scope="module")
def be(lab: Cluster) -> Bpf:
    return Bpf(lab.be_hosts[0], ("be_ingress",))


def read_keys(bpf: Bpf) -> tuple[Keys, int]:
    """A front end's own, and which of them is in use."""
    with bpf.memory("state") as state:
        a, b, c, d, current = struct.unpack_from("=4QI", state)
    return Keys(((a, b), (c, d))), current


def test_what_a_cookie_is_made_of(fe: Bpf) -> None:
    """Who changes it gives new numbers to both versions: the next run finds the keys of this one,
    and a back end is told them, but neither could judge the cookies."""
    with fe.memory("state") as state:
        version, = struct.unpack_from("=I", state, VERSION)
    assert (version, message.VERSION) == (7, 7)
    keys, current = read_keys(fe)
    for given in (MSS, MSS + SACK_TS):
        tcp = answer(fe, Packet(SYN, sport=4030, seq=ISN, tcp_options=given))
        ours, = struct.unpack("!I", tcp[4:8])
        assert ours & 1 == current
        assert ours == keys.ours(flow(4030), ISN, ours & META, 8 in options(tcp))


# Of a copy of the first segment: its urgent pointer, and whether it gets a tag. A client that has
# sent something urgent since says so in what it repeats; an urgent byte may be part of that, too.
COPIES = {"a plain one": (None, True), "urgent data behind it": (len(GET) + 1, True),
          "its last byte is urgent": (len(GET), False), "its first byte is": (1, False),
          "no byte is, or which": (0, False)}


@pytest.mark.parametrize("what", COPIES)
def test_urgent_data_in_a_copy(fe: Bpf, what: str) -> None:
    """The tag stands where the urgent pointer is."""
    urgent, tagged = COPIES[what]
    known, port = bytearray(entry(FORWARD, flags=F_FAST, end_seq=ISN + 1)), 4031
    keys, current = read_keys(fe)
    ack = (keys.ours(flow(port), ISN, PLAIN | current, False) + 1) % 2**32
    struct.pack_into("=II", known, 84, ISN + 1, ack)  # first_seq, first_ack
    copy = Packet(ACK | PSH | URG * (urgent is not None), sport=port, seq=ISN + 1, ack=ack,
                  urgent=urgent or 0, data=GET)
    fe.put("flows", flow(port), bytes(known))
    try:
        verdict, out = fe.run("fe_ingress", copy)
    finally:
        fe.drop("flows", flow(port))
    if tagged:
        ack, pointer = keys.tag(flow(port), ISN, ack)
        copy = replace(copy, flags=ACK | PSH, ack=ack, urgent=pointer)
    assert verdict == REDIRECT
    # but for its checksum, which was none
    assert out[34:50] + out[52:] == copy.ip()[20:36] + copy.ip()[38:]


@contextmanager
def no_room(be: Bpf) -> Iterator[None]:
    """What would be adopted goes to user space first, and so is told from all else."""
    with be.memory("gate") as gate:
        most = gate[:4]
        gate[:4] = bytes(4)
        try:
            yield
        finally:
            gate[:4] = most


def first(keys: Keys, port: int, which: int) -> Packet:
    """The first segment of a connection, with the tag of whoever has these keys."""
    ours = keys.ours(flow(port), ISN, PLAIN | which, False)
    ack, urgent = keys.tag(flow(port), ISN, (ours + 1) % 2**32)
    return Packet(ACK | PSH, sport=port, seq=ISN + 1, ack=ack, urgent=urgent, data=GET)


# their tags of a connection from port 4030 have the same urgent pointer
ALIKE = Keys(((1, 2), (3, 4))), Keys(((101, 5), (6, 7)))


def test_two_tags_that_look_alike(be: Bpf) -> None:
    """Each one's connections are adopted, whichever front end is looked at first."""
    both = [first(keys, 4030, 0) for keys in ALIKE]
    assert both[0].urgent == both[1].urgent
    with be.memory("keys") as memory, no_room(be):
        for n, keys in enumerate(ALIKE, PLACES - 2):
            struct.pack_into("=4Q3I", memory, n * SIZE, *keys.key[0], *keys.key[1], 0, 3, 7)
        try:
            assert [be.run("be_ingress", packet)[0] for packet in both] == [REDIRECT] * 2
        finally:
            memory[(PLACES - 2) * SIZE:PLACES * SIZE] = bytes(2 * SIZE)


def test_a_key_that_is_not_known_yet(be: Bpf) -> None:
    """A front end tells its keys one by one. What is in the place of the second one until then,
    nothing at first, is worth nothing, or each who knows that makes cookies and tags."""
    keys = Keys(((8, 9), (0, 0)))
    with be.memory("keys") as memory, no_room(be):
        at = (PLACES - 1) * SIZE
        try:
            for used, want in ((1, [REDIRECT, DROP]), (3, [REDIRECT, REDIRECT])):
                struct.pack_into("=4Q3I", memory, at, *keys.key[0], *keys.key[1], 0, used, 7)
                assert [be.run("be_ingress", first(keys, 4032, n))[0] for n in range(2)] == want
        finally:
            memory[at:at + SIZE] = bytes(SIZE)
