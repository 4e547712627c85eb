# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls, atomics and the clock, as the worker loops use them (all without the GIL)."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from * nogil:
    """
    #include <stdio.h>
    #include <stdlib.h>
    #include <time.h>
    #include "clock.h"
    #define at_load(p) __atomic_load_n(p, __ATOMIC_SEQ_CST)
    #define at_store(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
    #define at_set(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
    #define at_add(p, v) __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST)
    #define at_xchg(p, v) __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST)
    #define at_cas(p, before, after) __sync_bool_compare_and_swap(p, before, after)
    #define at_or(p, v) __atomic_or_fetch(p, v, __ATOMIC_SEQ_CST)
    /* Counters that others add to meanwhile, as they are at one moment each. */
    static inline void read_counters(void *to, const void *from, size_t size)
    {
            size_t i;

            for (i = 0; i < size / 8; i++)
                    ((uint64_t *)to)[i] = at_load((const uint64_t *)from + i);
    }
    /* Make a word at least v. Whether it was less. */
    static inline int raise64(uint64_t *p, uint64_t v)
    {
            uint64_t old = at_load(p);

            while (old < v)
                    if (__atomic_compare_exchange_n(p, &old, v, 0, __ATOMIC_SEQ_CST,
                                                    __ATOMIC_SEQ_CST))
                            return 1;
            return 0;
    }
    /* TCPHA_LAB_CLOCK=NANOSECONDS:PPM, for hosts that share a kernel: ahead by so much, and so
       much faster. In each module that reads the clock. */
    static struct tcpha_clock lab_clock;
    __attribute__((constructor)) static void set_lab_clock(void)
    {
            const char *text = getenv("TCPHA_LAB_CLOCK");
            unsigned long long ahead;
            long long ppm;

            if (text && sscanf(text, "%llu:%lld", &ahead, &ppm) == 2) {
                    lab_clock.ahead_ns = ahead;
                    lab_clock.ppm = ppm;
            }
    }
    static inline uint64_t now_ns(void)
    {
            struct timespec t;

            clock_gettime(CLOCK_MONOTONIC, &t);
            return tcpha_clock_read((uint64_t)t.tv_sec * 1000000000u + t.tv_nsec,
                                    lab_clock.ahead_ns, lab_clock.ppm);
    }
    static inline uint64_t realtime_ns(void)
    {
            struct timespec t;

            clock_gettime(CLOCK_REALTIME, &t);
            return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
    }
    """
    uint32_t load32 "at_load"(uint32_t *p)
    void store32 "at_store"(uint32_t *p, uint32_t v)
    # for a lock's holder, where others look without the lock first, or for good
    void set32 "at_set"(uint32_t *p, uint32_t v)
    void set64 "at_set"(uint64_t *p, uint64_t v)
    uint32_t add32 "at_add"(uint32_t *p, long v)
    uint32_t xchg32 "at_xchg"(uint32_t *p, uint32_t v)
    bint cas32 "at_cas"(uint32_t *p, uint32_t before, uint32_t after)
    uint32_t or32 "at_or"(uint32_t *p, uint32_t v)
    uint64_t load64 "at_load"(uint64_t *p)
    void store64 "at_store"(uint64_t *p, uint64_t v)
    uint64_t add64 "at_add"(uint64_t *p, long long v)
    void *loadp "at_load"(void **p)
    void storep "at_store"(void **p, void *v)
    bint raise64(uint64_t *p, uint64_t v)
    void read_counters(void *to, const void *from_, size_t size)  # size: bytes, all of them u64
    struct tcpha_clock:
        pass
    tcpha_clock lab_clock
    uint64_t now_ns()  # CLOCK_MONOTONIC
    uint64_t realtime_ns()


cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EAGAIN
        ECONNRESET
        EINTR
        EPIPE
        ENOBUFS
        EOPNOTSUPP
        ENOENT
        EMFILE
        ENFILE


cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t n)
    ssize_t write(int fd, const void *buf, size_t n)
    int close(int fd)
    long lseek(int fd, long offset, int whence)
    int ftruncate(int fd, long size)
    enum:
        SEEK_CUR


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec *iov, int n)


cdef extern from "<arpa/inet.h>" nogil:
    uint16_t htons(uint16_t v)
    uint16_t ntohs(uint16_t v)
    uint32_t htonl(uint32_t v)
    uint32_t ntohl(uint32_t v)


cdef extern from "<endian.h>" nogil:
    uint64_t htobe64(uint64_t v)
    uint64_t be64toh(uint64_t v)


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    int accept4(int fd, sockaddr *addr, socklen_t *len, int flags)
    ssize_t recv(int fd, void *buf, size_t n, int flags)
    ssize_t send(int fd, const void *buf, size_t n, int flags)
    ssize_t sendto(int fd, const void *buf, size_t n, int flags, const sockaddr *to, socklen_t len)
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    ssize_t sendmsg(int fd, const msghdr *msg, int flags)
    int recvmmsg(int fd, mmsghdr *msgs, unsigned int n, int flags, void *timeout)
    int shutdown(int fd, int how)
    int setsockopt(int fd, int level, int name, const void *val, socklen_t len)
    int getsockopt(int fd, int level, int name, void *val, socklen_t *len)
    int getsockname(int fd, sockaddr *addr, socklen_t *len)
    enum:
        AF_INET
        AF_PACKET
        SOL_SOCKET
        SOCK_NONBLOCK
        SOCK_CLOEXEC
        MSG_PEEK
        MSG_DONTWAIT
        MSG_NOSIGNAL
        MSG_TRUNC
        SHUT_WR
        SHUT_RDWR


cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        uint16_t sin_family
        uint16_t sin_port
        in_addr sin_addr
    enum:
        IPPROTO_TCP


cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_wait(int epfd, epoll_event *ev, int n, int timeout)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *ev)
    enum:
        EPOLLIN
        EPOLLOUT
        EPOLLERR
        EPOLLHUP
        EPOLLRDHUP
        EPOLLET
        EPOLLONESHOT
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLL_CTL_DEL


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *m, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *m)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_trylock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    ctypedef struct pthread_rwlock_t:
        pass
    int pthread_rwlock_rdlock(pthread_rwlock_t *l)
    int pthread_rwlock_wrlock(pthread_rwlock_t *l)
    int pthread_rwlock_unlock(pthread_rwlock_t *l)
    int pthread_rwlock_destroy(pthread_rwlock_t *l)


cdef extern from * nogil:
    """
    #include <pthread.h>
    /* A reader that comes while a writer waits, waits too: readers here follow on readers. */
    static inline int rwlock_init(pthread_rwlock_t *l)
    {
            pthread_rwlockattr_t a;

            pthread_rwlockattr_init(&a);
            pthread_rwlockattr_setkind_np(&a, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
            return pthread_rwlock_init(l, &a);
    }
    """
    int rwlock_init(pthread_rwlock_t *l)


cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <time.h>
    /* Wait for at most so many milliseconds. */
    static inline int cond_wait_ms(pthread_cond_t *c, pthread_mutex_t *m, long ms)
    {
            struct timespec t;

            clock_gettime(CLOCK_REALTIME, &t);
            t.tv_nsec += ms * 1000000;
            t.tv_sec += t.tv_nsec / 1000000000;
            t.tv_nsec %= 1000000000;
            return pthread_cond_timedwait(c, m, &t);
    }
    """
    ctypedef struct pthread_cond_t:
        pass
    int pthread_cond_init(pthread_cond_t *c, void *attr)
    int pthread_cond_destroy(pthread_cond_t *c)
    int pthread_cond_broadcast(pthread_cond_t *c)
    int cond_wait_ms(pthread_cond_t *c, pthread_mutex_t *m, long ms)


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    enum:
        POLLIN


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)
