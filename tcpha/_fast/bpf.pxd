# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint32_t, uint64_t


cdef extern from "<bpf/bpf.h>" nogil:
    enum:
        BPF_ANY
        BPF_EXIST
        BPF_NOEXIST
    int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags)
    int bpf_map_lookup_elem(int fd, const void *key, void *value)
    int bpf_map_delete_elem(int fd, const void *key)
    int bpf_map_get_next_key(int fd, const void *key, void *next_key)
    int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values,
                             uint32_t *count, const void *opts)
    struct bpf_test_run_opts:
        size_t sz
        const void *data_in
        uint32_t data_size_in
        const void *ctx_in
        uint32_t ctx_size_in
    int bpf_prog_test_run_opts(int prog_fd, bpf_test_run_opts *opts)

cdef extern from "<linux/bpf.h>" nogil:
    struct __sk_buff:
        uint32_t mark
        uint32_t ifindex


cdef class Object:
    cdef void *obj
    cdef dict links
    cdef int _constants(self, const char *name, const void *values, size_t size) except -1
    cdef int map_fd(self, str name) except -1
    cdef void *map_memory(self, str name, size_t size) except NULL
    cdef void *ring_memory(self, str name, long offset, bint writable, size_t size) except NULL
