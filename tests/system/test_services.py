# SPDX-License-Identifier: GPL-2.0-or-later
"""Several addresses and ports that one front end serves."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tcpha.lab.bed import Cluster, wait_for
from tests.support.client import digest, read_all
from tests.support.daemons import front
from tests.support.modes import EBPF, MODES

pytestmark = pytest.mark.modes(*MODES)
SECOND = "192.168.1.37"
SERVICES = [(Cluster.VIP, 80), (Cluster.VIP, 8080), (SECOND, 80), (SECOND, 8080)]
MORE = f"vaddr = {SECOND}"


@pytest.fixture(scope="module")
def site(mode: dict[str, Any]) -> Iterator[Cluster]:
    """Two addresses, two ports. be2 has what is asked for at port 8080, and pictures."""
    c = Cluster(**mode, rules=[(1, "port=8080 .*"), (1, f"vaddr={SECOND} gif$"), (1, "jpg$"),
                               (0, ".*")],
                fe_conf=f"{MORE}\nlisten = 80\nlisten = 8080", be_conf=MORE)
    try:
        for n in c.nginx:
            n.file("index.html", f"index of {n.host.name}\n".encode())
            n.file("a.gif", f"gif of {n.host.name}\n".encode())
            n.file("big", size=64 << 20)
        yield c
    finally:
        c.close()


def ask(c: Cluster, vaddr: str, port: int, path: str) -> str:
    return c.curl(f"http://{vaddr}:{port}{path}").stdout


def test_each_service_has_its_rules(site: Cluster) -> None:
    for _ in range(4):  # from the second or third time on, by the verdict cache
        assert ask(site, site.VIP, 80, "/") == "index of be1\n"
        assert ask(site, SECOND, 80, "/") == "index of be1\n"
        assert ask(site, site.VIP, 8080, "/") == "index of be2\n"
        assert ask(site, SECOND, 8080, "/") == "index of be2\n"
        assert ask(site, site.VIP, 80, "/a.gif") == "gif of be1\n"
        assert ask(site, SECOND, 80, "/a.gif") == "gif of be2\n"


def test_each_service_is_counted(site: Cluster) -> None:
    fe = front(site)

    def accepted() -> dict[tuple[str, int], int]:
        return {(s["vaddr"], s["port"]): s["accepted"] for s in fe.ctl("status")["services"]}
    before, all_before = accepted(), fe.ctl("status")["counters"]["accepted"]
    for n, (vaddr, port) in enumerate(SERVICES):
        for _ in range(n + 2):
            ask(site, vaddr, port, "/")
    after = accepted()
    assert [after[s] - before[s] for s in SERVICES] == [2, 3, 4, 5]
    assert fe.ctl("status")["counters"]["accepted"] - all_before == 14


def test_what_a_request_would_get(site: Cluster) -> None:
    fe = front(site)
    be1, be2 = (h.address for h in site.be_hosts)
    assert fe.ctl("test-request", "GET", "/")["server"] == be1
    assert fe.ctl("test-request", "port=8080", "GET", "/")["server"] == be2
    rules = fe.ctl("test-request", "port=8080", "GET", "/a.jpg")["rules"]
    assert [r["rule"] for r in rules] == [0, 2, 3]
    with pytest.raises(Exception, match="81 is no port of ours; they are 80, 8080"):
        fe.ctl("test-request", "port=81", "GET", "/")


def test_large_transfers_on_all(site: Cluster) -> None:
    want = [digest(n.root / "big") for n in site.nginx]
    outs = [site.bed.dir / f"out{n}" for n in range(len(SERVICES))]
    transfers = [site.client.start(
        "curl", "-sS", "--max-time", "120", "-o", str(out), f"http://{vaddr}:{port}/big")
        for out, (vaddr, port) in zip(outs, SERVICES, strict=True)]
    assert [t.wait(130) for t in transfers] == [0] * 4
    assert [digest(out) for out in outs] == [want[0], want[1], want[0], want[1]]


class Download:
    """That is under way, until it is let go on."""

    def __init__(self, c: Cluster, vaddr: str, port: int):
        self.out = c.bed.dir / f"slow-{vaddr}-{port}"
        self.out.unlink(missing_ok=True)  # of an earlier one
        self.process = c.client.start(
            "curl", "-sS", "--max-time", "120", "--limit-rate", "8M", "-o", str(self.out),
            f"http://{vaddr}:{port}/big")
        wait_for(lambda: self.out.exists() and self.out.stat().st_size > 1 << 20, "its begin")

    def ends_well(self, want: str) -> None:
        assert self.process.wait(130) == 0
        assert digest(self.out) == want


def reload(c: Cluster, *lines: str, without: str = "") -> None:
    fe = front(c)
    text = "\n".join([line for line in c.fe_text().splitlines()
                      if not without or not line.startswith(without)] + [*lines, ""])
    fe.config.write_text(text)
    fe.ctl("reload")


def states(c: Cluster) -> dict[tuple[str, int], str]:
    return {(s["vaddr"], s["port"]): s["state"] for s in front(c).ctl("status")["services"]}


def test_services_come_and_go_by_reload(site: Cluster) -> None:
    want = digest(site.nginx[0].root / "big")
    try:
        kept = Download(site, site.VIP, 80)
        reload(site, "listen = 8081", "vaddr = 192.168.1.40")
        assert states(site)[site.VIP, 8081] == "open"
        assert ask(site, site.VIP, 8081, "/") == "index of be1\n"
        assert ask(site, SECOND, 8081, "/a.gif") == "gif of be2\n"
        of_it = Download(site, site.VIP, 8081)
        reload(site)
        wait_for(lambda: states(site)[site.VIP, 8081] == "closed", "its end")
        refused = site.curl(f"http://{site.VIP}:8081/", check=False)
        assert refused.returncode == 7, refused.stderr
        assert ask(site, site.VIP, 8080, "/") == "index of be2\n"
        of_it.ends_well(want)
        kept.ends_well(want)
        reload(site, "listen = 8081")  # again
        assert ask(site, site.VIP, 8081, "/") == "index of be1\n"
    finally:
        reload(site)
        wait_for(lambda: states(site)[site.VIP, 8081] == "closed", "its end")


def test_reloads_cost_no_request(site: Cluster) -> None:
    """Services come and go while others are asked all the time."""
    results: list[str] = []
    stop = threading.Event()

    def ask_on(port: int) -> None:
        request = f"GET / HTTP/1.1\r\nHost: {site.VIP}\r\nConnection: close\r\n\r\n".encode()
        want = b"index of be2\n" if port == 8080 else b"index of be1\n"
        while not stop.is_set():
            try:
                with site.client.connect(site.VIP, port) as s:
                    s.sendall(request)
                    results.append("" if read_all(s).endswith(want) else "another answer")
            except OSError as error:
                results.append(str(error))

    threads = [threading.Thread(target=ask_on, args=(port,)) for port in (80, 80, 8080)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            asked = len(results)
            reload(site, "listen = 8081", "vaddr = 192.168.1.40")
            wait_for(lambda n=asked: len(results) > n + 50, "requests")
            reload(site)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not any(results), {r for r in results if r}


def test_an_address_that_back_ends_lack(site: Cluster) -> None:
    """It is said, and none of its requests goes there; the others do."""
    fe = front(site)
    lacking = "192.168.1.40"
    try:
        reload(site, f"vaddr = {lacking}")
        answer = site.curl("-i", f"http://{lacking}/").stdout
        assert answer.startswith("HTTP/1.1 503 ")
        assert ask(site, site.VIP, 80, "/") == "index of be1\n"
        assert all(f"it has no vaddr for {lacking}:80" in s["reason"] and s["state"] == "up"
                   for s in fe.ctl("servers"))
    finally:
        reload(site)


def test_a_back_end_that_comes_for_a_new_address(site: Cluster) -> None:
    """What a reload has added is known to who connects from then on."""
    fresh = "192.168.1.40"
    fe, be = front(site), site.be[0]
    text = be.config.read_text()
    try:
        reload(site, f"vaddr = {fresh}")
        be.stop()
        be.config.write_text(text.replace(f"vaddr = {site.VIP}", f"vaddr = {fresh}").replace(
            f"vaddr = {SECOND}\n", ""))
        be.start()
        wait_for(lambda: fe.ctl("servers")[0]["connperbe"] == 2, "its connections")
        assert ask(site, fresh, 80, "/") == "index of be1\n"
        assert f"it has no vaddr for {site.VIP}:80" in fe.ctl("servers")[0]["reason"]
        assert site.curl("-i", f"http://{site.VIP}/").stdout.startswith("HTTP/1.1 503 ")
    finally:
        be.stop()
        be.config.write_text(text)
        be.start()
        reload(site)
        site.connected()


def test_a_reload_does_not_end_an_unload(site: Cluster) -> None:
    fe = front(site)
    download = Download(site, site.VIP, 80)
    fe.ctl("unload")
    wait_for(lambda: "open" not in states(site).values(), "the listeners' end")
    reload(site, "listen = 8081")
    assert "open" not in states(site).values()
    assert site.curl(f"http://{site.VIP}:8081/", check=False).returncode == 7
    download.ends_well(digest(site.nginx[0].root / "big"))
    assert fe.process.wait(30) == 0
    fe.config.write_text(site.fe_text())
    fe.start()
    site.connected()


def test_a_reload_that_cannot_be_changes_nothing(site: Cluster) -> None:
    fe = front(site)
    before = states(site)
    holder = site.fe_host.start("python3", "-c", f"""if True:
        import socket, time
        s = socket.socket(); s.setsockopt(socket.SOL_IP, 15, 1)
        s.bind(("{site.VIP}", 8099)); s.listen(); time.sleep(1000)""")
    try:
        wait_for(lambda: ":8099" in site.fe_host.run("ss", "-Hltn").stdout, "the holder")
        with pytest.raises(Exception, match=f"cannot listen on {site.VIP}:8099: .*'listen'"):
            reload(site, "listen = 8098", "listen = 8099")
        assert {k: v for k, v in states(site).items() if v != "closed"} == {
            k: v for k, v in before.items() if v != "closed"}
        assert site.curl(f"http://{site.VIP}:8098/", check=False).returncode == 7
        assert ask(site, site.VIP, 8080, "/") == "index of be2\n"
    finally:
        holder.kill()
        holder.wait()
        fe.config.write_text(site.fe_text())


def test_a_killed_front_end_goes_on_with_all(site: Cluster) -> None:
    want = [digest(n.root / "big") for n in site.nginx]
    downloads = [Download(site, vaddr, port) for vaddr, port in SERVICES]
    fe = front(site)
    fe.kill()
    fe.start()
    site.connected()
    assert ask(site, SECOND, 8080, "/") == "index of be2\n"
    for download, (_, port) in zip(downloads, SERVICES, strict=True):
        download.ends_well(want[port == 8080])


@pytest.mark.modes(*(name for name, mode in MODES.items() if mode[1] == EBPF))
def test_a_service_that_is_gone_after_a_kill(site: Cluster) -> None:
    """Its connections go on, though the next run does not know it. The table of nfqueue ends with
    the daemon."""
    fe = front(site)
    want = digest(site.nginx[1].root / "big")
    download = Download(site, site.VIP, 8080)
    fe.kill()
    fe.config.write_text(site.fe_text().replace("listen = 8080\n", "").replace(
        "rule = 192.168.1.38 port=8080 .*\n", ""))
    try:
        fe.start()
        site.connected()
        assert site.curl(f"http://{site.VIP}:8080/", check=False).returncode == 7
        assert ask(site, SECOND, 80, "/") == "index of be1\n"
        download.ends_well(want)
    finally:
        reload(site)
    assert ask(site, site.VIP, 8080, "/") == "index of be2\n"


def test_all_addresses_are_given_back(site: Cluster) -> None:
    fe = front(site)
    held = site.fe_host.run("ip", "-o", "-4", "addr").stdout
    assert f" {site.VIP}/32 " in held and f" {SECOND}/32 " in held
    assert fe.stop() == 0
    try:
        assert not any(v in site.fe_host.run("ip", "-o", "-4", "addr").stdout
                       for v in (site.VIP, SECOND))
    finally:
        fe.start()
        site.connected()
