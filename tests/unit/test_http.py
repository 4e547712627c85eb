# SPDX-License-Identifier: GPL-2.0-or-later
"""The request-head parser, against llhttp (through httptools) and by itself."""
from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcpha._fast.http import BadRequest, parse_head
from tests.support.llhttp import agree


def test_reads_what_is_there() -> None:
    data = b"GET /a/b.jpg?x=1 HTTP/1.1\r\nHost: a\r\nX: \t y \r\nEmpty:\r\n\r\nBODY"
    assert parse_head(data) == (b"GET", b"/a/b.jpg?x=1", 1, len(data) - 4)
    assert parse_head(b"GET / HTTP/1.0\r\n\r\n") == (b"GET", b"/", 0, 18)
    assert parse_head(b"\r\n\r\nGET / HTTP/1.0\r\n\r\n") == (b"GET", b"/", 0, 22)
    assert parse_head(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")[1] == b"*"
    assert parse_head(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")[1] == b"http://a/"
    assert parse_head(b"GET http://a:80?b HTTP/1.1\r\nHost: a\r\n\r\n")[1] == b"http://a:80?b"
    assert parse_head(b"GET http://[::1] HTTP/1.1\r\nHost: a\r\n\r\n")[1] == b"http://[::1]"
    assert parse_head(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")[1] == b"a:443"


@pytest.mark.parametrize("head", [
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    b"GET / HTTP/1.1\rHost: a\r\n\r\n",
    b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http:// HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http:/// HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET https://?a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://b@a/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a{}/ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT /a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT a:1/b HTTP/1.1\r\nHost: a\r\n\r\n",
    b"CONNECT a|b:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    b"GET / http/1.1\r\nHost: a\r\n\r\n",
    b"GE(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00",
])
def test_refuses_what_could_be_read_in_two_ways(head: bytes) -> None:
    for chunk in (None, 1, 7):
        with pytest.raises(BadRequest):
            parse_head(head, chunk)


METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS"])
TARGETS = st.one_of(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#"),
            max_size=40).map(lambda t: b"/" + t.encode()),
    st.binary(max_size=12))
NAMES = st.one_of(st.sampled_from([b"Host", b"Content-Length", b"Transfer-Encoding", b"X-A",
                                   b"content-length", b"Host ", b" X", b"X:", b""]),
                  st.binary(max_size=6))
VALUES = st.one_of(st.sampled_from([b"a", b"1", b"chunked", b"0", b" 5 ", b"\tz", b"identity", b"",
                                    b"1,2", b"-1", b"x\ry", b"x\ny", b"x\0y"]),
                   st.binary(max_size=10))
ENDS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\n ", b" \r\n"])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Request heads, most of them nearly right."""
    out = draw(METHODS) + b" " + draw(TARGETS) + b" "
    out += draw(st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/0.9", b""]))
    out += draw(ENDS)
    for _ in range(draw(st.integers(0, 4))):
        out += draw(NAMES) + draw(st.sampled_from([b": ", b":", b" :"])) + draw(VALUES)
        out += draw(ENDS)
    return out + draw(ENDS) + draw(st.binary(max_size=4))


@settings(max_examples=3000, deadline=None)
@given(heads())
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n")
@example(b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\t\r\n\r\n")
def test_agrees_with_llhttp(data: bytes) -> None:
    agree(data)


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=200))
def test_survives_anything(data: bytes) -> None:
    agree(data)


@settings(max_examples=500, deadline=None)
@given(heads(), st.integers(1, 20))
def test_pieces_make_no_difference(data: bytes, chunk: int) -> None:
    def outcome(chunk: int | None) -> object:
        try:
            return parse_head(data, chunk)
        except BadRequest as error:
            return str(error)
    assert outcome(chunk) == outcome(None)
