# SPDX-License-Identifier: GPL-2.0-or-later
"""What the routes of a host tell the packet path."""
from __future__ import annotations

from ipaddress import IPv4Network

from tcpha.net.routes import Line, told


def line(prefix: str, mss: int = 0, interfaces: tuple[int, ...] = (2,), table: int = 254) -> Line:
    network = IPv4Network(prefix)
    return Line(table, (network.prefixlen, int(network.network_address)), interfaces, mss)


def places(lines: list[Line], most: int = 100) -> dict[str, int]:
    return {f"{index} {IPv4Network((address, length))}": mss
            for (index, length, address), mss in told(lines, most).items()}


def test_what_routes_tell() -> None:
    everywhere = line("0.0.0.0/0", 1200)
    inner, inmost = line("10.0.0.0/8"), line("10.1.0.0/16", 900)
    assert places([inner, line("10.1.0.0/16")]) == {}
    assert places([everywhere]) == {"2 0.0.0.0/0": 1200}
    assert places([inmost, everywhere, inner]) == {
        "2 0.0.0.0/0": 1200, "2 10.0.0.0/8": 0, "2 10.1.0.0/16": 900}
    # one that says what the one around it says; the kernel prefers the first of a prefix
    assert places([everywhere, line("10.0.0.0/8", 1200)]) == {"2 0.0.0.0/0": 1200}
    assert places([everywhere, line("0.0.0.0/0", 700)]) == {"2 0.0.0.0/0": 1200}
    # each interface by itself
    assert places([everywhere, line("10.0.0.0/8", interfaces=(3,)),
                   line("10.1.0.0/16", 900, (3, 4))]) == {
        "2 0.0.0.0/0": 1200, "3 10.1.0.0/16": 900, "4 10.1.0.0/16": 900}
    # of several tables the smallest that any has for an address
    assert places([everywhere, line("0.0.0.0/0", 800, table=100), inner,
                   line("10.1.0.0/16", 1300)]) == {"2 0.0.0.0/0": 800}
    assert places([everywhere, line("10.0.0.0/8", 1300, table=100)]) == {"2 0.0.0.0/0": 1200}
    assert places([line("10.0.0.0/8", 1300, table=100), inner]) == {"2 10.0.0.0/8": 1300}


def test_more_routes_than_there_is_room_for() -> None:
    many = [line(f"10.{n}.0.0/16", 700 + n) for n in range(50)]
    assert len(places(many, 50)) == 50
    assert places([*many, line("10.99.0.0/16", 0, (3,)), line("10.99.0.0/16", 900, (4,))], 50) == {
        "2 0.0.0.0/0": 700, "4 0.0.0.0/0": 900}
