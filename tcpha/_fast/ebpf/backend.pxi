# SPDX-License-Identifier: GPL-2.0-or-later
# The back end's half, for Python.

cdef class BeEbpf(BeDatapath):
    """The back end's half. ways: as for Places; instance, and left, for those who tunnel to us: as
    for FeEbpf; sockets: given on the front end, for its Local Node; fast: with the packet path."""

    cdef be_ebpf *d
    cdef readonly Object obj
    cdef Places places
    cdef SockDiag sockets

    def __cinit__(self, str path, tap, list ways, str raddr, uint32_t instance,
                  SockDiag sockets=None, bint fast=False, dict left=None):
        cdef tcpha_be_conf conf
        cdef uint32_t i
        self.d = <be_ebpf *>calloc(1, sizeof(be_ebpf))
        if self.d == NULL:
            raise MemoryError
        self.places = Places(ways)
        self.d.places = self.table.places = &self.places.p
        memset(&conf, 0, sizeof(conf))
        memcpy(conf.vips, self.d.places.vips, sizeof(conf.vips))
        conf.nvips = self.d.places.nvips
        address_bytes(raddr, conf.raddr)
        conf.tap = tap[1]
        conf.fast = fast
        self.obj = Object(path, (<char *>&conf)[:sizeof(conf)], {"listeners": len(ways)},
                          _fitting(left, {"frontends": (16, 4)}), instance)
        for i in range(self.d.places.nlisteners):
            self._tell(&self.d.places.listeners[i])
        self.d.tap = tap[0]
        self.d.forged = self.obj.program_fd("be_forged")
        self.d.gate = <tcpha_gate *>self.obj.map_memory("gate", sizeof(tcpha_gate))
        self.d.ops = <tcpha_op *>self.obj.map_memory("ops", TCPHA_MAX_OPS * sizeof(tcpha_op))
        self.sockets = sockets
        if sockets is not None:
            self.d.sockets = &sockets.d
        self.table.self = self.d
        self.table.adopt = _adopt
        self.table.alive = _alive
        self.table.feed = _feed
        self.table.position = _position
        self.table.outside = _outside
        self.table.ended = _ended
        self.table.sweep = _nothing
        if fast:
            self._open_adoption()

    cdef int _open_adoption(self) except -1:
        cdef cookie_adoption *a = &self.adoption
        a.event_fd = self.obj.map_fd("events")
        a.tap_fd = self.d.tap
        a.keys = <tcpha_keys *>self.obj.map_memory("keys", TCPHA_MAX_FAST * sizeof(tcpha_keys))
        a.gate = self.d.gate
        a.next_event = _next_event
        a.admit = _admit
        a.give_up = _give_up
        self.d.consumed = <uint64_t *>self.obj.ring_memory("events", 0, True, 4096)
        self.d.produced = <uint64_t *>self.obj.ring_memory("events", 4096, False, 4096 + 2 * RING)
        self.d.ring = <uint8_t *>self.d.produced + 4096
        self.d.adoptions = self.obj.map_fd("adoptions")
        self.table.fast = a
        return 0

    def __dealloc__(self):
        free(self.d)

    cdef int _tell(self, const tcpha_listener *to) except -1:
        """The programs, where connections go that are for a listener."""
        cdef int rc, fd = self.obj.map_fd("listeners")
        cdef uint32_t i
        for i in range(self.d.places.count):
            if self.d.places.each[i].to == to:
                rc = bpf_map_update_elem(fd, &self.d.places.each[i].of, to, BPF_ANY)
                if rc < 0:
                    raise OSError(-rc, "cannot write to the table of listeners")
        return 0

    def follow(self, str address, int port, uint32_t device):
        """A listener is bound to a device. The way over it, where be_forged must run, is kept when
        one comes that is bound to none: its sockets are found there, too."""
        self._tell(self.places.bind(address, port, device))  # in this order: see _await()

    def allow(self, str address, bint allowed):
        """Accept tunnelled packets from a front end, or no longer."""
        cdef uint8_t key[16]
        cdef uint32_t one = 1
        address_bytes(address, key)
        if allowed:
            bpf_map_update_elem(self.obj.map_fd("frontends"), key, &one, BPF_ANY)
        else:
            bpf_map_delete_elem(self.obj.map_fd("frontends"), key)

    def allowed(self):
        """Front ends whose tunnelled packets are accepted; also those of an earlier run."""
        cdef uint8_t keys[FRONTENDS * 16]
        cdef uint32_t values[FRONTENDS]
        cdef uint32_t cursor, i, count = FRONTENDS
        cdef int rc = bpf_map_lookup_batch(self.obj.map_fd("frontends"), NULL, &cursor, keys,
                                           values, &count, NULL)
        if rc < 0 and rc != -ENOENT:  # ENOENT: that was all
            raise OSError(-rc, "cannot read the table of front ends")
        return [address_text(keys + 16 * i) for i in range(count)]

    def counters(self):
        out = _counters(self.obj)
        out["killed"] = self.d.killed
        return out
