# SPDX-License-Identifier: GPL-2.0-or-later
"""Three machines with different kernels and clocks, and virtio-net between them: checksums that
nobody has computed yet, GSO, GRO and mergeable buffers are real there."""
from __future__ import annotations

import hashlib
import os
import socket
import time

import pytest

from tcpha.lab.bed import wait_for
from tests.kernels.cluster import VIP, Machines, Server
from tests.support.client import REQUEST

KEEP = REQUEST.replace(b"close", b"keep-alive").replace(b"1k", b"256k")
SIZE = 256 << 10
OK = b"HTTP/1.1 200"
SECONDS = 30  # for requests to be served again



def test_uptimes_differ(machines: Machines) -> None:
    ages = [float(m.run("cat", "/proc/uptime").stdout.split()[0]) for m in machines.all]
    assert ages[0] > ages[1] + 1 > ages[2] + 2, ages



def test_dispatch(machines: Machines) -> None:
    """By rule; on the packet path, where all have it."""
    before = [be.ctl("status")["counters"] for be in machines.be]
    for _ in range(3):
        assert machines.get("/") == "index of be1\n"
        assert machines.get("/a.jpg") == "picture of be2\n"
    after = [be.ctl("status")["counters"] for be in machines.be]
    for old, new in zip(before, after, strict=True):
        assert new["adopted"] >= old["adopted"] + 3
        if machines.fast:
            assert new["fast"] >= old["fast"] + 3, (old, new)



def test_large_download(machines: Machines) -> None:
    out = machines.bed.dir / "down"
    machines.get("/big", "-o", str(out))
    assert hashlib.sha256(out.read_bytes()).hexdigest() == machines.be[0].digest("big")



@pytest.mark.parametrize("options", [(), ("-H", "Expect:")], ids=["expect", "at once"])
def test_uploads(machines: Machines, options: tuple[str, ...]) -> None:
    source = machines.bed.dir / "source"
    source.write_bytes(os.urandom(5 << 20))
    want = hashlib.sha256(source.read_bytes()).hexdigest()
    machines.client.run("xargs", "-P", "4", "-L", "1", "curl", "-sSf", "--max-time", "300",
                        *options, "-T", input="\n".join(
                            f"{source} http://{VIP}/up/{n}" for n in range(16)))
    for n in range(16):
        assert machines.be[0].digest(f"up/{n}") == want



def test_four_requests_on_one_connection(machines: Machines) -> None:
    done = machines.get("/256k", *["-o", "/dev/null", f"http://{VIP}/256k"] * 3, "-o", "/dev/null",
                        "-w", "%{local_port} %{http_code}\n")
    lines = done.split("\n")[:4]
    assert len(set(lines)) == 1 and lines[0].endswith(" 200")



def begin(machines: Machines) -> socket.socket:
    """A download that waits for its reader."""
    s = machines.client.connect(VIP, timeout=120)
    s.sendall(KEEP)
    got = b""
    while len(got) < len(OK):
        got += s.recv(len(OK) - len(got)) or pytest.fail(f"the connection has ended after {got!r}")
    assert got == OK, got + s.recv(1 << 10)
    return s



def finish(s: socket.socket) -> str:
    """Its digest."""
    data = bytearray(OK)
    while (end := data.find(b"\r\n\r\n")) < 0 or len(data) < end + 4 + SIZE:
        got = s.recv(1 << 20)
        assert got, f"the connection has ended after {len(data)} bytes: {data[:200]!r}"
        data += got
    s.close()
    return hashlib.sha256(data[end + 4:]).hexdigest()



@pytest.mark.parametrize("who", ["fe", "be"])
def test_downloads_outlive_daemons(machines: Machines, who: str, count: int) -> None:
    want = machines.be[0].digest("256k")
    held = [begin(machines) for _ in range(count)]
    wait_for(lambda: machines.fe.ctl("status")["in_hand"] == 0, "all handed over")
    victims: list[Server] = [machines.fe] if who == "fe" else machines.be
    for daemon in victims:
        daemon.kill()
    for daemon in victims:
        daemon.start()
    machines.connected()
    assert {finish(s) for s in held} == {want}



@pytest.mark.parametrize("who", ["fe", "be1"])
def test_a_machine_that_stands_still(machines: Machines, who: str) -> None:
    """Its clock stands still, too, and is behind from then on."""
    (machine,) = (m for m in machines.all if m.name == who)
    held = begin(machines)
    machine.pause(True)
    time.sleep(5)
    machine.pause(False)
    start = time.monotonic()
    assert machines.get("/a.jpg", "--retry", "9", "--retry-delay", "1", seconds=SECONDS)
    wait_for(lambda: machines.get("/", seconds=SECONDS) == "index of be1\n", "be1 to serve",
             SECONDS)
    assert time.monotonic() - start < SECONDS
    assert finish(held) == machines.be[0].digest("256k")
    machines.connected()
    for _ in range(3):
        assert machines.get("/", seconds=5) == "index of be1\n"
