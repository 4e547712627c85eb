# SPDX-License-Identifier: GPL-2.0-or-later
# The store of the ledger; the lock is held for writing.

cdef int _find(void *self, const tcpha_flow *flow, tcpha_entry *entry) noexcept nogil:
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&(<fe_nfqueue *>self).flows, flow)
    if e == NULL:
        return -1
    entry[0] = e[0]
    return 0


cdef int _put(void *self, const tcpha_flow *flow, const tcpha_entry *entry, int how) noexcept nogil:
    cdef fe_nfqueue *d = <fe_nfqueue *>self
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&d.flows, flow)
    if e != NULL and how == PUT_NEW:
        return -1
    if e == NULL:
        e = <tcpha_entry *>table_add(&d.flows, flow)
    if e == NULL:
        return -1
    e[0] = entry[0]
    return 0


cdef int _remove(void *self, const tcpha_flow *flow) noexcept nogil:
    return 0 if table_remove(&(<fe_nfqueue *>self).flows, flow) else -1


cdef int _end(void *self, uint32_t worker, const tcpha_flow *flow, uint64_t id, uint32_t backend,
              bint keep) noexcept nogil:
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&(<fe_nfqueue *>self).flows, flow)
    if e == NULL or e.backend != backend or not tcpha_end(e, id, keep):
        return 0
    if not keep:
        table_remove(&(<fe_nfqueue *>self).flows, flow)
    return 1


cdef int _drop(void *self, uint32_t worker, const tcpha_flow *flow,
               const tcpha_entry *found) noexcept nogil:
    cdef tcpha_entry *e = <tcpha_entry *>table_find(&(<fe_nfqueue *>self).flows, flow)
    return e != NULL and tcpha_drop(e, found.phase) and \
        table_remove(&(<fe_nfqueue *>self).flows, flow)
