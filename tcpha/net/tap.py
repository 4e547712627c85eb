# SPDX-License-Identifier: GPL-2.0-or-later
"""TAP devices. They vanish with the last descriptor, so nothing of them needs undoing."""
from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from tcpha.net.host import Host
from tcpha.net.journal import POLLED, Kept
from tcpha.net.links import IFF_UP

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_NOARP = 0x0080
TUN_F_CSUM_TSO46_ECN = 0x01 | 0x02 | 0x04 | 0x08
TUN = "/dev/net/tun"
MTU = 65000  # a forged segment carries up to 60,000 bytes


QUEUE_LENGTH = 16384  # frames that wait for a reader


def open_tap(host: Host, prefix: str) -> tuple[int, int, str]:
    """Create a TAP device with a virtio-net header, up. Returns (descriptor, ifindex, name)."""
    fds, index, name = open_queues(host, prefix, 1)
    return fds[0], index, name


def _open_queue(name: bytes, flags: int) -> tuple[int, str]:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        remedy = f"'chmod 666 {TUN}', as udev has it" if error.errno == errno.EACCES else \
            "'modprobe tun' may help"
        raise OSError(error.errno, f"{TUN}: {error.strerror}; {remedy}") from None
    try:
        request = struct.pack("16sH22x", name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags)
        full = fcntl.ioctl(fd, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
        # GSO packets that we keep for a while stay in one piece
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM_TSO46_ECN)
        return fd, full
    except BaseException:
        os.close(fd)
        raise


def open_queues(host: Host, prefix: str, count: int) -> tuple[list[int], int, str]:
    """The same with several queues; packets of a flow share one. Returns a descriptor for each."""
    flags = IFF_MULTI_QUEUE if count > 1 else 0
    fd, name = _open_queue(f"{prefix}%d".encode(), flags)
    fds = [fd]
    try:
        while len(fds) < count:
            fds.append(_open_queue(name.encode(), flags)[0])
        ipv6 = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        if ipv6.exists():  # no router solicitations of its own
            ipv6.write_text("1")
        index = host.ipr.link_lookup(ifname=name)[0]
        host.ipr.link("set", index=index, mtu=MTU, txqlen=QUEUE_LENGTH, flags=IFF_UP | IFF_NOARP,
                      change=IFF_UP | IFF_NOARP)
        return fds, index, name
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def accept_any_source(host: Host, name: str, index: int) -> None:
    """Let forged packets pass reverse-path filtering, whatever conf.all says, now or later.

    The effective value is the higher of 'all' and the device's; 2 (loose) passes only on a device
    that has an address. This one is on the host already, and nobody hears of it: the kernel would
    answer ARP for another one, at any interface.
    """
    path = f"net/ipv4/conf/{name}/rp_filter"

    def wanted() -> str:
        return "0" if host.read_sysctl("net/ipv4/conf/all/rp_filter") == "0" else "2"

    def set_up() -> None:
        value = wanted()
        (Path("/proc/sys") / path).write_text(value)
        if value == "2":
            host.ensure_loopback(index)
    set_up()
    # nothing to be missed once the device is gone, and its sysctls with it
    host.keep(("tap", name), Kept(f"sysctl {path.replace('/', '.')}", POLLED,
                                  lambda: host.read_sysctl(path) not in ("", wanted()), set_up))
