# SPDX-License-Identifier: GPL-2.0-or-later
"""Dynamic registration, and the secret that both sides share."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha._fast import message
from tcpha.lab.bed import Cluster, wait_for
from tests.support.client import REQUEST, body, digest, read_all
from tests.support.daemons import (
    REGISTER,
    front,
    joined,
    logged,
    secret_file,
    start_back,
    start_front,
)
from tests.support.state import settle

pytestmark = pytest.mark.modes("direct", "nfqueue-direct")  # how packets travel is not the point
UNAVAILABLE = "Service Unavailable\n503"
# longer to compile than HELLO may take
LONG = [f"/(a{n}|b{n}c+)+d[^e]*e{n}" for n in range(400)]


def picture(c: Cluster) -> str:
    return c.get("/a.jpg", "-w", "%{http_code}")


@pytest.fixture
def half(mode: dict[str, Any]) -> Iterator[Cluster]:
    """The front end knows the first back end; the second one must register. Neither runs yet."""
    c = Cluster(2, **mode, start=False, rules=[(0, "^/one")])
    try:
        for server in c.nginx:
            server.file("a.jpg", f"{server.host.name}\n".encode())
            server.file("one", b"one\n")
            server.file("big.jpg", size=8 << 20)
        yield c
    finally:
        c.close()


def test_joins_serves_and_leaves(half: Cluster) -> None:
    secret = f"secret = {secret_file(half, 'secret')}"
    address = half.be_hosts[1].address
    start_front(half, secret)
    start_back(half, 0, secret)
    assert picture(half) == UNAVAILABLE
    be = start_back(half, 1, secret, REGISTER, "rule = jpg$", f"rule = {address} ^/two",
                    "port = 667")
    wait_for(lambda: joined(half) == [address], "the registration")
    assert be.ctl("status")["registered"] is True
    assert picture(half) == "be2\n200"
    assert [(r["server"], r["pattern"]) for r in front(half).ctl("rules")] == [
        (half.be_hosts[0].address, "^/one"), (address, "jpg$"), (address, "^/two")]
    assert half.get("/one") == "one\n"
    with half.client.connect(half.VIP) as s:  # it leaves at once, and finishes what it has
        s.sendall(REQUEST.replace(b"1k", b"big.jpg"))
        got = s.recv(65536)
        be.ctl("unload")
        wait_for(lambda: not joined(half), "the end of the registration")
        assert picture(half) == UNAVAILABLE
        got += read_all(s)
    want = digest(half.nginx[1].root / "big.jpg")
    assert hashlib.sha256(body(got)).hexdigest() == want
    assert be.process.wait(20) == 0
    half.be.pop()
    assert [s["server"] for s in front(half).ctl("servers")] == [half.be_hosts[0].address]
    assert len(front(half).ctl("rules")) == 1
    settle(half)


def test_drained_back_ends_that_register_stay_so(half: Cluster) -> None:
    """While they are away, too; then they can be undrained."""
    secret = f"secret = {secret_file(half, 'secret')}"
    address = half.be_hosts[1].address
    start_front(half, secret)
    start_back(half, 0, secret)
    be = start_back(half, 1, secret, REGISTER, "rule = jpg$")
    wait_for(lambda: joined(half) == [address], "the registration")
    front(half).ctl("drain", address)

    def drained() -> bool:
        return any(s["server"] == address and s["state"] == "draining" and s["connperbe"] == 2
                   for s in front(half).ctl("servers"))

    def away() -> bool:
        return all(s["server"] != address for s in front(half).ctl("servers"))
    be.stop()
    wait_for(away, "the end of the registration")
    be.start()
    wait_for(drained, "the registration, drained")
    assert picture(half) == UNAVAILABLE
    front(half).kill()
    front(half).start()
    wait_for(drained, "the registration, drained")
    be.stop()
    wait_for(away, "the end of the registration")
    front(half).ctl("undrain", address)
    be.start()
    wait_for(lambda: joined(half) == [address], "the registration")
    assert picture(half) == "be2\n200"


def test_registers_again(half: Cluster) -> None:
    secret = f"secret = {secret_file(half, 'secret')}"
    address = half.be_hosts[1].address
    be = start_back(half, 1, secret, REGISTER, "rule = jpg$")  # before the front end
    start_front(half, secret)
    wait_for(lambda: joined(half) == [address], "the registration")
    assert front(half).stop() == 0
    wait_for(lambda: not be.ctl("status")["registered"], "the front end's end")
    front(half).start()
    wait_for(lambda: joined(half) == [address], "the registration at the new run")
    assert picture(half) == "be2\n200"
    front(half).kill()
    front(half).start()
    wait_for(lambda: joined(half) == [address], "the registration after kill -9")
    be.kill()
    wait_for(lambda: not front(half).ctl("servers")[1:], "the end of the registration")
    assert picture(half) == UNAVAILABLE
    be.start()
    wait_for(lambda: joined(half) == [address], "the back end's new run")
    assert picture(half) == "be2\n200"
    front(half).ctl("reload")
    assert joined(half) == [address] and picture(half) == "be2\n200"
    front(half).config.write_text("vaddr = nonsense\n")
    with pytest.raises(Exception, match="nonsense"):
        front(half).ctl("reload")
    assert joined(half) == [address] and picture(half) == "be2\n200"


@pytest.fixture
def plain() -> Iterator[Cluster]:
    """As 'half', where it does not matter how packets travel."""
    c = Cluster(2, start=False, rules=[(0, "^/one")])
    try:
        for server in c.nginx:
            server.file("a.jpg", f"{server.host.name}\n".encode())
        yield c
    finally:
        c.close()


def test_refused_without_the_same_secret(plain: Cluster) -> None:
    ours, other = secret_file(plain, "ours"), secret_file(plain, "other")
    start_front(plain, f"secret = {ours}")
    for lines, why in (((), "one side has a shared secret"),
                       ((f"secret = {other}",), "the shared secrets differ")):
        be = start_back(plain, 1, REGISTER, "rule = jpg$", *lines)
        wait_for(logged(be, why), "the reason on the back end")
        wait_for(logged(front(plain), why), "the reason on the front end")
        assert not joined(plain) and picture(plain) == UNAVAILABLE
        assert be.log.read_text().count("cannot register") == 1
        assert be.stop() == 0
        be.log.unlink()
    assert len(front(plain).ctl("servers")) == 1


def test_refused_without_any_secret_unless_allowed(plain: Cluster) -> None:
    start_front(plain)
    be = start_back(plain, 1, REGISTER, "rule = jpg$")
    wait_for(logged(be, "takes no registrations"), "the reason")
    assert len(front(plain).ctl("servers")) == 1
    assert front(plain).stop() == 0
    start_front(plain, "registration = open")
    wait_for(lambda: joined(plain) == [plain.be_hosts[1].address], "the registration")
    assert picture(plain) == "be2\n200"


def test_control_connections_need_the_secret_too(plain: Cluster) -> None:
    ours = secret_file(plain, "ours")
    start_front(plain, f"secret = {ours}")
    be = start_back(plain, 0)
    wait_for(lambda: "one side has a shared secret" in front(plain).ctl("servers")[0]["reason"],
             "the reason")
    wait_for(logged(be, "one side has a shared secret"), "the reason on the back end")
    assert be.stop() == 0
    start_back(plain, 0, f"secret = {secret_file(plain, 'other')}")
    wait_for(lambda: "the shared secrets differ" in front(plain).ctl("servers")[0]["reason"],
             "the reason")


def hello(**fields: Any) -> bytes:
    known = {"role": "be", "vaddr": Cluster.VIP, "version": message.VERSION, "port": 666,
             "clock": 1, "rule": ["x"]}
    return bytes(message.encode_hello(json.dumps(known | fields).encode()))


def said_to(c: Cluster, data: bytes) -> bytes:
    """What the front end answers where back ends register."""
    with c.client.connect(c.fe_host.address) as s:
        s.sendall(data)
        try:
            return read_all(s)
        except ConnectionResetError:
            return b""


def test_rules_that_take_long_to_compile(plain: Cluster) -> None:
    """Each waits until those before it are compiled. A stranger has one of them at a time."""
    start_front(plain, "registration = open")
    with plain.client.connect(plain.fe_host.address) as stranger:
        stranger.sendall(hello(rule=LONG[1:]))
        wait_for(lambda: b"still being compiled" in said_to(plain, hello(rule=LONG[1:])),
                 "the stranger's turn")
    be = start_back(plain, 1, REGISTER, *(f"rule = {p}" for p in LONG), "rule = jpg$")
    wait_for(lambda: joined(plain) == [plain.be_hosts[1].address], "the registration", 60)
    assert picture(plain) == "be2\n200"
    assert "cannot register" not in be.log.read_text()


def test_garbage_where_back_ends_register(plain: Cluster) -> None:
    start_front(plain, "registration = open")

    def said(data: bytes) -> bytes:
        return said_to(plain, data)
    for data in (REQUEST, os.urandom(500), hello()[:20] + b"\xff" * 400, hello(role="fe"),
                 hello(rule=[]), hello(rule=[7]), hello(rule="x"), hello(port=0), hello(port="x"),
                 hello(vaddr="10.0.0.1"), hello(version=99), b"\x16\x03\x01" + os.urandom(300)):
        said(data)
    assert b"does not compile" in said(hello(rule=["jpg("]))
    assert len(front(plain).ctl("servers")) == 1
    start_back(plain, 1, REGISTER, "rule = jpg$")
    wait_for(lambda: joined(plain) == [plain.be_hosts[1].address], "the registration")
    assert "internal error" not in front(plain).log.read_text()


def test_many_come_and_go(plain: Cluster) -> None:
    """Places of back ends that have left are used again. The front end's file says no raddr."""
    start_front(plain, "registration = open")
    front(plain).stop()
    front(plain).config.write_text(front(plain).config.read_text().replace("raddr", "#raddr"))
    front(plain).start()
    be = start_back(plain, 1, REGISTER, "rule = jpg$")
    address = plain.be_hosts[1].address
    for last in range(5):
        host = plain.be_hosts[1]
        wait_for(lambda: len(joined(plain)) == 1, "the registration")
        assert picture(plain) == "be2\n200"
        assert be.stop() == 0
        wait_for(lambda: len(front(plain).ctl("servers")) == 1, "the end of the registration")
        host.ip("addr", "del", f"{address}/24", "dev", "eth0")
        host.address = address = f"192.168.1.{100 + last}"
        host.ip("addr", "add", f"{address}/24", "dev", "eth0")
        be.config.write_text(plain.be_text(host) + REGISTER + "rule = jpg$\n")
        be.start()
    wait_for(lambda: joined(plain) == [address], "the registration")
    assert picture(plain) == "be2\n200"
