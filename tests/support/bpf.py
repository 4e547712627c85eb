# SPDX-License-Identifier: GPL-2.0-or-later
"""The BPF programs of a daemon, run packet by packet, and their maps."""
from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import struct
from pathlib import Path

from tcpha.lab.bed import Host
from tests.support.hooks import programs
from tests.support.packets import CLIENT, VIP, Packet, total

STACK, DROP, REDIRECT = 0xFFFFFFFF, 2, 7  # TC_ACT_UNSPEC, _SHOT, _REDIRECT
HELD, DRAINING, FORWARD, PENDING, REPLACING, LINGERING, GONE = range(1, 8)
F_FIN, F_RST, F_NEW_SYN, F_FAST = 1, 2, 4, 8


def mapped(address: str) -> bytes:
    return bytes(10) + b"\xff\xff" + socket.inet_aton(address)


def flow(port: int = 4000) -> bytes:
    return mapped(CLIENT) + mapped(VIP) + struct.pack("!HH", port, 80)


def phase(state: int, older: int = 0, which: int = 1) -> int:
    """As tcpha_phase()."""
    return which * 0x9e3779b97f4a7c15 % 2**64 >> 12 << 12 | older << 3 | state


def entry(state: int, backend: int = 0, slot: int = 0, flags: int = 0, end_seq: int = 1000,
          syn_seq: int = 0, ahead: tuple[int, int] = (0, 0), older: int = 0) -> bytes:
    return struct.pack("=6Q12I64x", 1, 0, 0, 0, 0, phase(state, older), 0, backend, slot, flags, 0,
                       end_seq, *ahead, syn_seq, 0, 0, 0)


def tag(key: bytes) -> bytes:
    """As tcpha_tag()."""
    vport, cport, *address = struct.unpack("=HH4I", key[34:] + key[32:34] + key[:16])
    n = vport << 16 | cport
    for word in address:
        n = (n ^ word) * 0x9e3779b1 % 2**32
    return struct.pack("=I", n)


def number(index: int) -> bytes:
    return struct.pack("=I", index)


def state_of(e: bytes) -> dict[str, int]:
    names = ("id", "start", "last", "packets", "bytes", "phase", "tag", "backend", "slot", "flags",
             "rule", "end_seq", "ahead_seq", "ahead_end", "syn_seq", "first_seq", "first_ack",
             "behind", "rtt_ms", "target_len")
    known = dict(zip(names, struct.unpack("=6Q12I2H", e[:100]), strict=True))
    return known | {"state": known["phase"] & 7, "older": known["phase"] >> 3 & 511}


class Bpf:
    """The programs of a daemon on a host, and their maps."""

    def __init__(self, host: Host, names: tuple[str, ...]):
        self.host = host
        self.file = host.dir / "frame"
        found = programs(host)
        self.programs = {name: found[name] for name in names}
        self.maps = {}
        for program in self.programs.values():
            known = json.loads(host.run("bpftool", "-j", "prog", "show", "id",
                                        str(program)).stdout)
            for number in known["map_ids"]:
                name = json.loads(host.run("bpftool", "-j", "map", "show", "id",
                                           str(number)).stdout)["name"]
                self.maps[name] = str(number)

    def run(self, program: str, packet: Packet) -> tuple[int, bytes]:
        """(verdict, what became of the frame)"""
        out = Path(f"{self.file}.out")
        self.file.write_bytes(packet.frame())
        out.unlink(missing_ok=True)
        done = json.loads(self.host.run(
            "bpftool", "-j", "prog", "run", "id", str(self.programs[program]), "data_in",
            str(self.file), "data_out", str(out)).stdout)
        return int(done["retval"]), out.read_bytes()

    def put(self, name: str, key: bytes, value: bytes, mark: bytes | None = None) -> None:
        """mark: of an entry, in place of its own tag."""
        if name == "flows":  # last seen now, or the daemon takes it for idle and removes it
            value = value[:16] + struct.pack("=Q", self.host.now_ns()) + value[24:48] + \
                (mark or tag(key)) + value[52:]
        self.host.run("bpftool", "map", "update", "id", self.maps[name],
                      "key", *map(str, key), "value", *map(str, value))

    def memory(self, name: str) -> mmap.mmap:
        """A mapped array, in which single bytes can be changed."""
        fd = ctypes.CDLL("libbpf.so.1").bpf_map_get_fd_by_id(int(self.maps[name]))
        if fd < 0:
            raise OSError(-fd, f"map {name}")
        try:
            return mmap.mmap(fd, mmap.PAGESIZE)
        finally:
            os.close(fd)

    def get(self, name: str, key: bytes) -> bytes:
        found = json.loads(self.host.run("bpftool", "-j", "map", "lookup", "id", self.maps[name],
                                         "key", *map(str, key)).stdout)
        return bytes(int(byte, 16) for byte in found["value"])

    def count(self, name: str) -> int:
        return len(json.loads(self.host.run("bpftool", "-j", "map", "dump", "id",
                                            self.maps[name]).stdout))

    def drop(self, name: str, key: bytes) -> None:
        self.host.run("bpftool", "map", "delete", "id", self.maps[name], "key", *map(str, key),
                      check=False)


def answer(bpf: Bpf, packet: Packet) -> bytes:
    """The TCP header of the SYN-ACK."""
    verdict, out = bpf.run("fe_ingress", packet)
    assert verdict == REDIRECT
    ip, tcp = out[14:34], out[34:]
    assert ip[12:16] == socket.inet_aton(packet.destination)
    assert ip[16:20] == socket.inet_aton(packet.source)
    assert int.from_bytes(ip[2:4], "big") == 20 + len(tcp) and total(ip) == 0xFFFF
    assert total(ip[12:] + struct.pack("!HH", 6, len(tcp)) + tcp) == 0xFFFF
    assert tcp[:4] == struct.pack("!HH", packet.dport, packet.sport)
    assert tcp[8:12] == struct.pack("!I", (packet.seq + 1) % 2**32)
    return tcp


def calm_down(bpf: Bpf) -> None:
    """As if ten seconds had passed since the last guesses."""
    with bpf.memory("guesses") as memory:
        memory[:16] = bytes(16)
