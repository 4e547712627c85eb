# SPDX-License-Identifier: GPL-2.0-or-later
"""Bases of the datapaths: see datapath.pxd for the interface that the workers call."""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from tcpha._fast.defs cimport (
    TCPHA_F_ANSWERED, TCPHA_F_FAST, TCPHA_F_FIN, TCPHA_F_RST, TCPHA_MAX_OPS, TCPHA_TARGET_MAX,
    tcpha_entry, tcpha_flow)
from tcpha._fast.packet cimport address_text
from tcpha._fast.sys cimport now_ns, ntohs


cdef dict flow_row(const tcpha_flow *key, const tcpha_entry *e):
    """A row of the connection table."""
    cdef uint64_t now = now_ns()
    cdef uint32_t n = min(e.target_len, <uint32_t>TCPHA_TARGET_MAX)
    return {
        "flow": (<char *>key)[:sizeof(tcpha_flow)], "id": e.id, "backend": e.backend,
        "client": address_text(key.caddr), "port": ntohs(key.cport),
        "vaddr": address_text(key.vaddr), "vport": ntohs(key.vport),
        "target": e.target[:n].decode("latin-1"), "truncated": e.target_len > TCPHA_TARGET_MAX,
        "rule": e.rule,
        "state": "closing" if e.flags & (TCPHA_F_FIN | TCPHA_F_RST) else "forward",
        "age": (now - e.start_ns) / 1e9, "idle": max(0, <long>(now - e.last_ns)) / 1e9,
        "packets": e.packets, "bytes": e.bytes,
        "doubtful": e.flags & (TCPHA_F_FAST | TCPHA_F_ANSWERED) == TCPHA_F_FAST}


cdef class FeDatapath:
    def __cinit__(self, *args, **kwargs):
        self.table.event_fd = -1

    def idle_flows(self, double idle, dict limits):
        return [f for f in self.flows() if f["idle"] > limits.get(f["backend"], idle)]

    def forget_flow(self, bytes flow, uint64_t id):
        """Remove a flow's entry if it still is that handoff's."""
        cdef tcpha_entry e
        cdef tcpha_flow key
        memcpy(&key, <const char *>flow, sizeof(key))
        return self.table.forget(self.table.self, TCPHA_MAX_OPS - 2, &key, id, False, &e) == 1


cdef class BeDatapath:
    pass
