# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from tcpha._fast.datapath cimport BeDatapath
from tcpha._fast.defs cimport tcpha_counters, tcpha_flow
from tcpha._fast.diag cimport SockDiag, diag
from tcpha._fast.nfqueue cimport packet
from tcpha._fast.places cimport Places, places
from tcpha._fast.rewrite cimport icmp_view, tcp_view
from tcpha._fast.sys cimport pthread_cond_t, pthread_mutex_t, pthread_rwlock_t
from tcpha._fast.table cimport flow_table

cdef enum:
    MAX_FRONTENDS = 256


cdef struct be_nfqueue:
    pthread_rwlock_t lock  # the table and what lies in it
    pthread_mutex_t wait_lock
    pthread_cond_t answered
    uint32_t answers       # how many there were
    flow_table flows
    diag *sockets
    int raw_fd
    const places *places
    uint32_t chunk         # payload of a forged segment
    bint local             # on the front end, for its Local Node
    bint shared            # others may talk to one of the local servers directly
    uint32_t frontends[MAX_FRONTENDS]
    uint32_t nfrontends
    uint32_t cursor        # of sweep()
    uint64_t killed
    uint64_t unknown       # packets from the VIP that are of no flow that is known: dropped
    tcpha_counters n


# For the front end, to whose Local Node a packet belongs. The lock is not held.
cdef int local_inward(be_nfqueue *d, packet *p) noexcept nogil
cdef int local_icmp(be_nfqueue *d, icmp_view *v) noexcept nogil
cdef bint local_inject(be_nfqueue *d, tcp_view *v) noexcept nogil


cdef class BeNfqueue(BeDatapath):
    cdef be_nfqueue *d
    cdef list queues
    cdef object raw
    cdef SockDiag sockets
    cdef Places places
    cdef bint _has_socket(self, const tcpha_flow *local, list devices)
