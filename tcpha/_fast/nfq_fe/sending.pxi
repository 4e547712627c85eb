# SPDX-License-Identifier: GPL-2.0-or-later
# Sending: to a back end, directly or through a tunnel.

cdef bint _emit(fe_nfqueue *d, const path *way, const uint8_t *head, uint32_t head_len,
                const uint8_t *data, uint32_t data_len) noexcept nogil:
    """Send one frame: virtio-net header and all."""
    cdef sockaddr_ll to
    cdef iovec iov[2]
    cdef msghdr m
    memset(&to, 0, sizeof(to))
    to.sll_family = AF_PACKET
    to.sll_protocol = htons(0x0800)
    to.sll_ifindex = way.ifindex
    memset(&m, 0, sizeof(m))
    m.msg_name = &to
    m.msg_namelen = sizeof(to)
    iov[0].iov_base = <void *>head
    iov[0].iov_len = head_len
    iov[1].iov_base = <void *>data
    iov[1].iov_len = data_len
    m.msg_iov = iov
    m.msg_iovlen = 2 if data_len else 1
    while sendmsg(d.packet_fd, &m, MSG_DONTWAIT) < 0:
        if errno != EINTR:
            return False
    return True


cdef bint _send_direct(fe_nfqueue *d, const path *way, tcp_view *v, uint32_t skb_info,
                       uint32_t mss) noexcept nogil:
    """As it is, in an Ethernet frame. What the device or the kernel must still do to it, the
    virtio-net header says."""
    cdef uint8_t head[VNET_SIZE + ETH_SIZE]
    memset(head, 0, VNET_SIZE)
    memcpy(head + VNET_SIZE, way.ether, ETH_SIZE)
    if v.len > way.mtu or skb_info & (SKB_CSUM_NOT_READY | SKB_GSO):
        ask_offload(head, v, mss if v.len > way.mtu else 0)
    return _emit(d, way, head, sizeof(head), v.ip, v.len)


cdef bint _send_tunnel(fe_nfqueue *d, const path *way, tcp_view *v, uint32_t skb_info,
                       uint32_t mss) noexcept nogil:
    """Wrapped in IPIP (RFC 2003), cut into segments that fit."""
    cdef uint8_t head[VNET_SIZE + ETH_SIZE + IP_SIZE + 120]
    cdef uint8_t *outer = head + VNET_SIZE + ETH_SIZE
    cdef uint8_t *inner = outer + IP_SIZE
    cdef uint8_t *tcp = inner + (v.tcp - v.ip)
    cdef uint32_t headers = <uint32_t>(v.data - v.ip), at = 0, n, seq
    cdef uint16_t word
    cdef bint whole = v.len <= way.mtu - IP_SIZE
    memset(head, 0, VNET_SIZE)
    memcpy(head + VNET_SIZE, way.ether, ETH_SIZE)
    while True:
        n = v.data_len - at if whole else min(v.data_len - at, mss)
        memcpy(inner, v.ip, headers)
        if not whole:
            word = htons(<uint16_t>(headers + n))
            memcpy(inner + 2, &word, 2)
            memset(inner + 10, 0, 2)
            word = ip_checksum(inner, <uint32_t>(tcp - inner))
            memcpy(inner + 10, &word, 2)
            seq = htonl(get32(v.tcp + 4) + at)
            memcpy(tcp + 4, &seq, 4)
            if at:
                tcp[13] &= ~<uint8_t>TCP_CWR
            if at + n < v.data_len:
                tcp[13] &= ~<uint8_t>(TCP_FIN | TCP_PSH)
        if not whole or skb_info & (SKB_CSUM_NOT_READY | SKB_GSO):
            memset(tcp + 16, 0, 2)
            seq = <uint32_t>pseudo_sum(inner, headers + n - <uint32_t>(tcp - inner)) + \
                sum_bytes(tcp, headers - <uint32_t>(tcp - inner)) + sum_bytes(v.data + at, n)
            seq = (seq & 0xffff) + (seq >> 16)
            word = ~<uint16_t>((seq & 0xffff) + (seq >> 16))
            memcpy(tcp + 16, &word, 2)
        # DF is kept, so that path MTU discovery stays honest; without it, routers may cut the
        # packet, and no two may be alike for a while (RFC 6864)
        ip_header(outer, IP_SIZE + headers + n,
                  0 if inner[6] & 0x40 else <uint16_t>add64(&d.outer_id, 1), 4, &way.src,
                  &way.addr, inner)
        if not _emit(d, way, head, VNET_SIZE + ETH_SIZE + IP_SIZE + headers, v.data + at, n):
            return False
        at += n
        if at >= v.data_len:
            return True


cdef void _to_backend(fe_nfqueue *d, tcpha_entry *e, tcp_view *v, uint32_t skb_info) noexcept nogil:
    cdef path *way = &d.paths[e.backend]
    cdef uint32_t headers = <uint32_t>(v.data - v.ip), room, mss, segments
    cdef bint ok
    if e.backend == TCPHA_LOCAL_NODE and d.local != NULL:
        if local_inject(d.local, v):
            e.packets += 1
            e.bytes += v.len
        return
    if way.ifindex == 0:
        add64(<uint64_t *>&d.n.unreachable, 1)
        return
    room = way.mtu - (IP_SIZE if way.tunnel else 0)
    mss = room - headers if room > headers + TCP_MSS_LOW else TCP_MSS_LOW
    segments = max((v.data_len + mss - 1) // mss, <uint32_t>1)
    if way.tunnel:
        ok = _send_tunnel(d, way, v, skb_info, mss)
    else:
        ok = _send_direct(d, way, v, skb_info, mss)
    if not ok:
        add64(<uint64_t *>&d.n.unreachable, 1)
        return
    e.packets += segments
    e.bytes += v.len
    add64(<uint64_t *>&d.n.forwarded, segments)
    add64(<uint64_t *>&d.n.forwarded_bytes, v.len)
