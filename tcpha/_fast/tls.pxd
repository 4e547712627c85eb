# SPDX-License-Identifier: GPL-2.0-or-later
from libc.stdint cimport uint8_t, uint32_t

cdef extern from "<openssl/types.h>" nogil:
    ctypedef struct SSL:
        pass
    ctypedef struct BIO:
        pass
    ctypedef struct SSL_CTX:
        pass
    ctypedef struct SSL_SESSION:
        pass

cdef enum:
    TLS_RECORD = 16384     # most bytes of plaintext in a record (RFC 8446 section 5.1)
    TLS_SEALED = TLS_RECORD + 256 + 5

cdef enum tls_result:      # of tls_open(), besides a number of bytes
    TLS_MORE = 0
    TLS_CLOSED = -1
    TLS_BROKEN = -2


# One end of an encrypted connection, over memory. One thread at a time may use it.
cdef struct tls:
    SSL *ssl
    BIO *received
    BIO *to_send


cdef int tls_seal(tls *t, const uint8_t *data, uint32_t length, uint8_t *out) noexcept nogil
cdef void tls_received(tls *t, const uint8_t *data, uint32_t length) noexcept nogil
cdef int tls_open(tls *t, uint8_t *out, uint32_t room) noexcept nogil


# The pre-shared key, and whether the peer claimed to know it.
cdef struct shared_key:
    unsigned char key[32]
    bint claimed


cdef class Channel:
    cdef tls t
    cdef SSL_CTX *context
    cdef shared_key psk
    cdef readonly bint established
