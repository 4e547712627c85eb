# SPDX-License-Identifier: GPL-2.0-or-later
"""HELLO: what it says of addresses, ports and places, and who fits whom."""
from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from tcpha._fast.message import encode_hello
from tcpha.control.hello import Hello, HelloError, answer, check

A, B, C = "10.0.0.100", "10.0.0.101", "10.0.0.102"


def heard(body: dict[str, Any]) -> Hello:
    """What a peer makes of a HELLO with that in it."""
    async def judge(_: Hello) -> None:
        pass

    async def meet() -> Hello:
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            far.sendall(encode_hello(json.dumps(body).encode()))
            hello, _ = await answer(near, Hello("fe", A), None, judge)
            return hello
    return asyncio.run(meet())


def test_all_that_is_said_is_heard() -> None:
    said = Hello("be", A, 666, vaddrs=[A, B], ports=[80, 443],
                 places=[[A, 0, 3], [B, 443, (1 << 64) - 1]])
    assert heard(json.loads(said.body())) == said


def test_of_older_and_newer_peers() -> None:
    body = json.loads(Hello("fe", A, 80).body())
    for name in ("vaddrs", "ports", "places"):
        del body[name]
    hello = heard(body | {"later": {"than": "us"}})
    assert (hello.vaddr, hello.vaddrs, hello.ports, hello.places) == (A, [], [], [])
    # of a family that we do not serve
    assert heard(body | {"vaddrs": [A, "2001:db8::1"]}).vaddrs == [A, "2001:db8::1"]


@pytest.mark.parametrize("what", [
    {"vaddrs": A}, {"vaddrs": [1]}, {"vaddrs": ["x"]}, {"vaddrs": ["10.0.0.01"]},
    {"vaddrs": ["2001:DB8::1"]}, {"vaddrs": ["fe80::1%eth0"]}, {"ports": [0]}, {"ports": [65536]},
    {"ports": [True]}, {"ports": ["80"]}, {"ports": {"80": 80}}, {"places": [[A, 0]]},
    {"places": [{"vaddr": A}]}, {"places": ["abc"]}, {"places": [[A, -1, 1]]},
    {"places": [[A, 0, 1 << 64]]}, {"places": [[A, 0, 1.5]]}, {"places": [[4, 0, 1]]}])
def test_what_is_malformed_is_refused(what: dict[str, Any]) -> None:
    body = json.loads(Hello("be", A).body())
    with pytest.raises(HelloError, match="the peer's HELLO is malformed: "):
        heard(body | what)


@pytest.mark.parametrize("front, back", [([A], [A]), ([A], [A, B]), ([B], [A, B]),
                                         ([B, A], [A, B, C]), ([A, B], [A]), ([A, B], [B, C])])
def test_who_fits(front: list[str], back: list[str]) -> None:
    check(Hello("fe", front[0], vaddrs=front), "fe", back)
    check(Hello("be", back[0], vaddrs=back), "be", front)


def test_who_fits_of_an_older_release() -> None:
    check(Hello("fe", B), "fe", [A, B])
    check(Hello("be", B), "be", [B])


@pytest.mark.parametrize("hello, role, vaddrs, words", [
    (Hello("be", A, vaddrs=[A]), "fe", [A], "the peer is a 'be', not a 'fe'"),
    (Hello("fe", A, vaddrs=[A, C]), "fe", [B], f"serves vaddr {A}, {C}, we serve {B}; make"),
    (Hello("fe", B), "fe", [A], f"serves vaddr {B}, we serve {A}"),
    (Hello("be", A), "be", [B, C], f"serves vaddr {A}, we serve {B}, {C}")])
def test_who_does_not_fit(hello: Hello, role: str, vaddrs: list[str], words: str) -> None:
    with pytest.raises(HelloError, match=words):
        check(hello, role, vaddrs)
