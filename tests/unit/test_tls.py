# SPDX-License-Identifier: GPL-2.0-or-later
"""The handshake of two who share a secret, and of two who do not."""
from __future__ import annotations

import pytest

from tcpha._fast.tls import Channel, TlsError


def meet(client: Channel, server: Channel) -> None:
    for _ in range(4):
        for one, other in ((client, server), (server, client)):
            if not one.established:
                one.shake_hands()
            other.received(one.to_send())


def test_handshake() -> None:
    client, server = Channel(b"x" * 16, False), Channel(b"x" * 16, True)
    meet(client, server)
    assert client.established and server.established and server.claimed
    for one, other in ((client, server), (server, client)):
        for data in (b"some message", bytes(16384)):
            one.write(data)
            sealed = one.to_send()
            assert data not in sealed
            other.received(sealed)
            assert other.read(20000) == data and other.read(20000) == b""


@pytest.mark.parametrize("what", ["another secret", "no TLS", "a byte changed", "repeated"])
def test_handshake_refused(what: str) -> None:
    client, server = Channel(b"x" * 16, False), Channel(b"x" * 16, True)
    if what == "another secret":
        with pytest.raises(TlsError):
            meet(Channel(b"x" * 15 + b"y", False), server)
        assert server.claimed
    elif what == "no TLS":
        server.received(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(TlsError):
            server.shake_hands()
        assert not server.claimed
    else:
        meet(client, server)
        client.write(b"some message")
        sealed = bytearray(client.to_send())
        if what == "repeated":
            server.received(bytes(sealed))
            assert server.read(100) == b"some message"
        else:
            sealed[10] ^= 1
        server.received(bytes(sealed))
        with pytest.raises(TlsError):
            server.read(100)
    assert not (what == "another secret" and server.established)
