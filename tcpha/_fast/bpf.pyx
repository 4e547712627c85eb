# SPDX-License-Identifier: GPL-2.0-or-later
"""BPF objects, maps and their programs' places at tcx and tc, through libbpf. Errors are BpfError
with libbpf's own words."""
import os

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memmove, memset

from tcpha._fast.sys cimport lab_clock

cdef extern from "<stdarg.h>" nogil:
    ctypedef struct va_list:
        pass

cdef extern from "<stdio.h>" nogil:
    int vasprintf(char **to, const char *fmt, va_list ap)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t n, int prot, int flags, int fd, long offset)
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
    void *MAP_FAILED

cdef extern from "<bpf/btf.h>" nogil:
    struct btf:
        pass
    btf *btf__load_vmlinux_btf()
    int btf__find_by_name_kind(const btf *b, const char *name, uint32_t kind)
    void btf__free(btf *b)
    enum:
        BTF_KIND_FUNC

cdef extern from "<bpf/libbpf.h>" nogil:
    enum libbpf_print_level:
        LIBBPF_DEBUG
    ctypedef int (*libbpf_print_fn_t)(libbpf_print_level level, const char *fmt, va_list ap)
    libbpf_print_fn_t libbpf_set_print(libbpf_print_fn_t fn)
    struct bpf_object:
        pass
    struct bpf_map:
        pass
    struct bpf_program:
        pass
    struct bpf_tc_hook:
        size_t sz
        int ifindex
        int attach_point
    struct bpf_tc_opts:
        size_t sz
        int prog_fd
        uint32_t flags
        uint32_t prog_id
        uint32_t handle
        uint32_t priority
    enum:
        BPF_TC_INGRESS
        BPF_TC_F_REPLACE
    bpf_object *bpf_object__open_file(const char *path, const void *opts)
    int bpf_object__load(bpf_object *obj)
    void bpf_object__close(bpf_object *obj)
    bpf_map *bpf_object__find_map_by_name(const bpf_object *obj, const char *name)
    bpf_program *bpf_object__find_program_by_name(const bpf_object *obj, const char *name)
    int bpf_map__fd(const bpf_map *m)
    int bpf_map__set_max_entries(bpf_map *m, uint32_t n)
    int bpf_map__reuse_fd(bpf_map *m, int fd)
    int bpf_map__update_elem(const bpf_map *m, const void *key, size_t key_size, const void *value,
                             size_t value_size, uint64_t flags)
    int bpf_map__set_initial_value(bpf_map *m, const void *data, size_t n)
    int bpf_program__fd(const bpf_program *p)
    int bpf_tc_hook_create(bpf_tc_hook *hook)
    int bpf_tc_attach(const bpf_tc_hook *hook, bpf_tc_opts *opts)
    int bpf_tc_query(const bpf_tc_hook *hook, bpf_tc_opts *opts)
    int libbpf_num_possible_cpus()

cdef extern from "<bpf/bpf.h>" nogil:
    struct bpf_prog_info:
        uint32_t id
        char name[16]
        uint32_t nr_map_ids
        uint64_t map_ids
    struct bpf_map_info:
        uint32_t key_size
        uint32_t value_size
        char name[16]
    ctypedef int attach_type "enum bpf_attach_type"
    int bpf_prog_query(int target, attach_type where, uint32_t flags, uint32_t *attach_flags,
                       uint32_t *ids, uint32_t *count)
    int bpf_prog_detach2(int prog_fd, int target, attach_type where)
    int bpf_prog_get_fd_by_id(uint32_t id)
    int bpf_map_get_fd_by_id(uint32_t id)
    int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *length)


# Of union bpf_attr, for BPF_PROG_ATTACH; headers before Linux 6.6 lack the last two.
cdef extern from *:
    """
    #include <linux/bpf.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    struct tcx_attr {
        __u32 ifindex, program, type, flags, replace, relative;
        __u64 revision;
    };

    static long tcx_attach_call(struct tcx_attr *attr)
    {
        return syscall(SYS_bpf, BPF_PROG_ATTACH, attr, sizeof(*attr));
    }
    """
    struct tcx_attr:
        uint32_t ifindex
        uint32_t program
        uint32_t type
        uint32_t flags
        uint32_t relative
    long tcx_attach_call(tcx_attr *attr)

cdef enum:
    BPF_TCX_INGRESS = 46
    BPF_F_BEFORE = 8
    BPF_F_AFTER = 16
    BPF_F_ID = 32
    TCX_MOST = 64  # BPF_MPROG_MAX


class BpfError(OSError):
    """The kernel or libbpf refused; the message holds the reason."""

    log = ()  # lines: more of what they said


# What libbpf said last, the end of it. Loading happens in one thread, at start.
cdef char LAST[16384]
cdef size_t LAST_LEN = 0


cdef int _listen(libbpf_print_level level, const char *fmt, va_list ap) noexcept nogil:
    """Keep what was said. The verifier's log, which is long, comes in one piece, and its end tells
    why a program was refused."""
    global LAST_LEN
    cdef char *text = NULL
    cdef const char *end
    cdef size_t n, room
    cdef int said = 0 if level == LIBBPF_DEBUG else vasprintf(&text, fmt, ap)
    if said <= 0:
        free(text)
        return said
    n = min(<size_t>said, sizeof(LAST) // 2)
    end = text + said - n
    room = sizeof(LAST) - n
    if LAST_LEN > room:
        memmove(LAST, LAST + LAST_LEN - room, room)
        LAST_LEN = room
    memcpy(LAST + LAST_LEN, end, n)
    LAST_LEN += n
    free(text)
    return said


libbpf_set_print(_listen)

TELLING = ("not found", "incompatible", "invalid", "unknown func")
LOG_END = "-- END PROG LOAD LOG --"


cdef list _said():
    """What libbpf printed since the last call, the lines that tell why: the verifier's last ones,
    or one of its own."""
    global LAST_LEN
    lines = [x.strip() for x in LAST[:LAST_LEN].decode(errors="replace").splitlines() if x.strip()]
    LAST_LEN = 0
    for at, line in enumerate(lines):
        if line.endswith(LOG_END):
            return [x for x in lines[max(at - 8, 0):at]
                    if not x.startswith(("processed ", "verification time", "stack depth",
                                         "max_states", "libbpf:"))]
    return [line for word in TELLING for line in lines if word in line][:1] or lines[:1]


cdef _check(long rc, what):
    if rc < 0:
        lines = _said()
        reason = f" ({lines[len(lines) - 1]})" if lines else ""
        error = BpfError(-rc, f"{what}: {os.strerror(-rc)}{reason}")
        error.log = lines
        raise error
    return rc


def kernel_has_function(str name):
    """Whether the running kernel's BTF names a function: True, False, or None without BTF."""
    cdef btf *b = btf__load_vmlinux_btf()
    cdef int rc
    cdef bytes raw = name.encode()
    if b == NULL:
        _said()
        return None
    rc = btf__find_by_name_kind(b, raw, BTF_KIND_FUNC)
    btf__free(b)
    return rc > 0


cdef class Object:
    """A BPF object file, loaded into the kernel.

    rodata: initial bytes of the program's constants; max_entries: {map name: size}; reuse: maps to
    go on with, by name (see maps_of()); instance: whose it is, for instance_of().
    """

    def __cinit__(self, str path, bytes rodata=b"", dict max_entries=None, dict reuse=None,
                  uint32_t instance=0):
        cdef bpf_object *obj
        cdef bpf_map *m
        cdef bytes raw = os.fsencode(path)
        self.obj = NULL
        self.links = {}
        obj = bpf_object__open_file(raw, NULL)
        if obj == NULL:
            _check(-2, f"{path} is no BPF object")
        self.obj = obj
        if rodata:
            self._constants(b".rodata.conf", <const char *>rodata, len(rodata))
            if bpf_object__find_map_by_name(obj, b".rodata.clock") != NULL:  # it asks for the time
                self._constants(b".rodata.clock", &lab_clock, sizeof(lab_clock))
            self._constants(b".rodata.own", &instance, sizeof(instance))
        for name, size in (max_entries or {}).items():
            m = bpf_object__find_map_by_name(obj, name.encode())
            if m == NULL:
                raise BpfError(2, f"{path}: no map {name}")
            _check(bpf_map__set_max_entries(m, size), name)
        for name, fd in (reuse or {}).items():
            m = bpf_object__find_map_by_name(obj, name.encode())
            if m == NULL:
                raise BpfError(2, f"{path}: no map {name}")
            _check(bpf_map__reuse_fd(m, fd), name)
        _check(bpf_object__load(obj), f"{os.path.basename(path)} does not load")
        _said()

    def __dealloc__(self):
        if self.obj != NULL:
            bpf_object__close(<bpf_object *>self.obj)

    cdef int _constants(self, const char *name, const void *values, size_t size) except -1:
        cdef bpf_map *m = bpf_object__find_map_by_name(<bpf_object *>self.obj, name)
        if m == NULL:
            raise BpfError(2, f"no constants {name.decode()}")
        return _check(bpf_map__set_initial_value(m, values, size), name.decode())

    cdef int map_fd(self, str name) except -1:
        cdef bpf_map *m = bpf_object__find_map_by_name(<bpf_object *>self.obj, name.encode())
        if m == NULL:
            raise BpfError(2, f"no map {name}")
        return bpf_map__fd(m)

    cdef void *map_memory(self, str name, size_t size) except NULL:
        """A BPF_F_MMAPABLE map's values, mapped for the life of the process."""
        cdef void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, self.map_fd(name), 0)
        if p == MAP_FAILED:
            raise BpfError(12, f"cannot map {name} into memory")
        return p

    cdef void *ring_memory(self, str name, long offset, bint writable, size_t size) except NULL:
        """A part of a ring buffer: its consumer's page at 0, its producer's and the data, twice in
        a row, behind that."""
        cdef void *p = mmap(NULL, size, PROT_READ | (PROT_WRITE if writable else 0), MAP_SHARED,
                            self.map_fd(name), offset)
        if p == MAP_FAILED:
            raise BpfError(12, f"cannot map {name} into memory")
        return p

    def put(self, str name, bytes key, bytes value):
        """Set an element of a map."""
        cdef const char *k = key
        cdef const char *v = value
        cdef bpf_map *m = bpf_object__find_map_by_name(<bpf_object *>self.obj, name.encode())
        if m == NULL:
            raise BpfError(2, f"no map {name}")
        _check(bpf_map__update_elem(m, k, len(key), v, len(value), BPF_ANY), name)

    def program_fd(self, str name):
        cdef bytes raw = name.encode()
        cdef bpf_program *p = bpf_object__find_program_by_name(<bpf_object *>self.obj, raw)
        if p == NULL:
            raise BpfError(2, f"no program {name}")
        return bpf_program__fd(p)


def possible_cpus():
    return libbpf_num_possible_cpus()


cdef void _at_ingress(bpf_tc_hook *hook, bpf_tc_opts *opts, int ifindex, uint32_t priority,
                      uint32_t handle) noexcept:
    """Name a place of tc_attach()'s to libbpf."""
    memset(hook, 0, sizeof(hook[0]))
    memset(opts, 0, sizeof(opts[0]))
    hook.sz = sizeof(hook[0])
    hook.ifindex = ifindex
    hook.attach_point = BPF_TC_INGRESS
    opts.sz = sizeof(opts[0])
    opts.handle = handle
    opts.priority = priority


def tc_attached(int ifindex, uint32_t priority, uint32_t handle):
    """Id of the program at a place of tc_attach()'s; 0: there is none."""
    cdef bpf_tc_hook hook
    cdef bpf_tc_opts opts
    _at_ingress(&hook, &opts, ifindex, priority, handle)
    if bpf_tc_query(&hook, &opts) < 0:
        _said()
        return 0
    return opts.prog_id


def tcx_programs(int ifindex):
    """Ids of the programs at an interface's tcx ingress (Linux 6.6), in their order. They come
    before any filter of tc."""
    cdef uint32_t ids[TCX_MOST]
    cdef uint32_t count = TCX_MOST, flags = 0, i
    if bpf_prog_query(ifindex, <attach_type>BPF_TCX_INGRESS, 0, &flags, ids, &count) < 0:
        _said()
        return []  # an older kernel
    return [ids[i] for i in range(count)]


def tcx_attach(int ifindex, int prog_fd, uint32_t behind):
    """Attach a program to an interface's tcx ingress, right behind the one with an id, or before
    all others (0). What it lets pass by TC_ACT_UNSPEC, which is TCX_NEXT, the others see. It stays
    when we are gone."""
    cdef tcx_attr attr
    memset(&attr, 0, sizeof(attr))
    attr.ifindex = ifindex
    attr.program = prog_fd
    attr.type = BPF_TCX_INGRESS
    attr.flags = BPF_F_AFTER | BPF_F_ID if behind else BPF_F_BEFORE
    attr.relative = behind
    if tcx_attach_call(&attr) < 0:
        _check(-errno, f"tcx on interface {ifindex}")


def tcx_detach(int ifindex, int prog_fd):
    """Take a program away from there."""
    _check(bpf_prog_detach2(prog_fd, ifindex, <attach_type>BPF_TCX_INGRESS),
           f"tcx on interface {ifindex}")


cdef bpf_prog_info _info(int fd) except *:
    cdef bpf_prog_info program
    cdef uint32_t length = sizeof(program)
    memset(&program, 0, sizeof(program))
    _check(bpf_obj_get_info_by_fd(fd, &program, &length), "BPF program")
    return program


def program_id(int fd):
    """The kernel's id of a program."""
    return _info(fd).id


def program_name(int fd):
    cdef bpf_prog_info program = _info(fd)
    return program.name.decode(errors="replace")


def open_program(uint32_t number):
    """A descriptor of the program with an id, which is the caller's to close; for those with
    CAP_SYS_ADMIN."""
    return _check(bpf_prog_get_fd_by_id(number), f"BPF program {number}")


def instance_of(int prog_fd):
    """The instance that Object() was told when a program was loaded; None: it was not by us."""
    cdef uint32_t key = 0, value = 0
    instance = None
    for name, (fd, _, size) in maps_of(prog_fd).items():
        if name == ".rodata.own" and size == sizeof(value) and \
                bpf_map_lookup_elem(fd, &key, &value) == 0:
            instance = value
        os.close(fd)
    return instance


def maps_of(int prog_fd):
    """{name: (descriptor, size of a key, of a value)} of a program's maps. The descriptors are the
    caller's to close; for those with CAP_SYS_ADMIN."""
    cdef bpf_prog_info program
    cdef bpf_map_info info
    cdef uint32_t ids[64]
    cdef uint32_t length = sizeof(program), i
    cdef int fd
    memset(&program, 0, sizeof(program))
    program.nr_map_ids = 64
    program.map_ids = <uint64_t>&ids[0]
    found = {}
    if bpf_obj_get_info_by_fd(prog_fd, &program, &length) < 0:
        program.nr_map_ids = 0
    for i in range(min(program.nr_map_ids, <uint32_t>64)):
        fd = bpf_map_get_fd_by_id(ids[i])
        length = sizeof(info)
        memset(&info, 0, sizeof(info))
        if fd >= 0 and bpf_obj_get_info_by_fd(fd, &info, &length) == 0:
            found[info.name.decode()] = fd, info.key_size, info.value_size
    return found


def tc_attach(int ifindex, int prog_fd, uint32_t priority, uint32_t handle):
    """Attach a program to an interface's tc ingress; a clsact qdisc is made if there is none.
    A filter at the same place is replaced. True: the qdisc is ours."""
    cdef bpf_tc_hook hook
    cdef bpf_tc_opts opts
    cdef int rc
    _at_ingress(&hook, &opts, ifindex, priority, handle)
    rc = bpf_tc_hook_create(&hook)
    if rc < 0 and rc != -17:  # EEXIST
        _check(rc, f"clsact qdisc on interface {ifindex}")
    _said()
    opts.prog_fd = prog_fd
    opts.flags = BPF_TC_F_REPLACE
    _check(bpf_tc_attach(&hook, &opts), f"tc filter on interface {ifindex}")
    return rc == 0
