# SPDX-License-Identifier: GPL-2.0-or-later
"""Bases of the datapaths: see datapath.pxd for the interface that the workers call."""


cdef class FeDatapath:
    def __cinit__(self, *args, **kwargs):
        self.table.event_fd = -1


cdef class BeDatapath:
    pass
