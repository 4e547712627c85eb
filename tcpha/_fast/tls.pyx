# SPDX-License-Identifier: GPL-2.0-or-later
"""Control connections under a shared secret: TLS 1.3 with an external pre-shared key (RFC 8446
section 2.2, with Diffie-Hellman, so that the secret opens no recorded connection), by OpenSSL. It
works on memory; what is received and sent goes through the sockets that we have."""
import hmac

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset, strlen

cdef extern from "<openssl/ssl.h>" nogil:
    ctypedef struct SSL_METHOD:
        pass
    ctypedef struct SSL_CIPHER:
        pass
    ctypedef struct EVP_MD:
        pass
    enum:
        TLS1_3_VERSION
        SSL_VERIFY_PEER
        SSL_ERROR_WANT_READ
        SSL_ERROR_ZERO_RETURN
        SSL_OP_NO_TICKET
    const SSL_METHOD *TLS_method()
    SSL_CTX *SSL_CTX_new(const SSL_METHOD *method)
    void SSL_CTX_free(SSL_CTX *c)
    int SSL_CTX_set_min_proto_version(SSL_CTX *c, int version)
    int SSL_CTX_set_ciphersuites(SSL_CTX *c, const char *names)
    int SSL_CTX_set_num_tickets(SSL_CTX *c, size_t n)
    unsigned long SSL_CTX_set_options(SSL_CTX *c, unsigned long options)
    void SSL_CTX_set_verify(SSL_CTX *c, int mode, void *callback)
    void SSL_CTX_set_psk_use_session_callback(
        SSL_CTX *c, int (*f)(SSL *ssl, const EVP_MD *md, const unsigned char **id, size_t *idlen,
                             SSL_SESSION **s) noexcept nogil)
    void SSL_CTX_set_psk_find_session_callback(
        SSL_CTX *c, int (*f)(SSL *ssl, const unsigned char *id, size_t idlen,
                             SSL_SESSION **s) noexcept nogil)
    SSL *SSL_new(SSL_CTX *c)
    void SSL_free(SSL *ssl)
    int SSL_set_ex_data(SSL *ssl, int index, void *data)
    void *SSL_get_ex_data(const SSL *ssl, int index)
    void SSL_set_bio(SSL *ssl, BIO *r, BIO *w)
    void SSL_set_accept_state(SSL *ssl)
    void SSL_set_connect_state(SSL *ssl)
    int SSL_do_handshake(SSL *ssl)
    int SSL_session_reused(SSL *ssl)
    int SSL_read(SSL *ssl, void *to, int n)
    int SSL_write(SSL *ssl, const void *data, int n)
    int SSL_get_error(const SSL *ssl, int rc)
    const SSL_CIPHER *SSL_CIPHER_find(SSL *ssl, const unsigned char *id)
    SSL_SESSION *SSL_SESSION_new()
    void SSL_SESSION_free(SSL_SESSION *s)
    int SSL_SESSION_set1_master_key(SSL_SESSION *s, const unsigned char *key, size_t n)
    int SSL_SESSION_set_cipher(SSL_SESSION *s, const SSL_CIPHER *cipher)
    int SSL_SESSION_set_protocol_version(SSL_SESSION *s, int version)

cdef extern from "<openssl/bio.h>" nogil:
    ctypedef struct BIO_METHOD:
        pass
    const BIO_METHOD *BIO_s_mem()
    BIO *BIO_new(const BIO_METHOD *method)
    int BIO_read(BIO *b, void *to, int n)
    int BIO_write(BIO *b, const void *data, int n)

cdef extern from "<openssl/err.h>" nogil:
    void ERR_clear_error()
    unsigned long ERR_get_error()
    const char *ERR_reason_error_string(unsigned long e)

cdef const char *SUITE = b"TLS_AES_128_GCM_SHA256"
cdef const unsigned char *SUITE_ID = b"\x13\x01"
cdef const char *IDENTITY = b"tcpha"


class TlsError(Exception):
    """The peer does not know the secret, or does not speak TLS."""


cdef str _reason():
    cdef const char *text = ERR_reason_error_string(ERR_get_error())
    return text.decode() if text != NULL else "no handshake"


cdef SSL_SESSION *_session(SSL *ssl) noexcept nogil:
    """The pre-shared key in OpenSSL's form, or NULL."""
    cdef const shared_key *k = <const shared_key *>SSL_get_ex_data(ssl, 0)
    cdef const SSL_CIPHER *cipher = SSL_CIPHER_find(ssl, SUITE_ID)
    cdef SSL_SESSION *s = SSL_SESSION_new()
    if s != NULL and k != NULL and cipher != NULL and \
            SSL_SESSION_set1_master_key(s, k.key, 32) and SSL_SESSION_set_cipher(s, cipher) and \
            SSL_SESSION_set_protocol_version(s, TLS1_3_VERSION):
        return s
    SSL_SESSION_free(s)
    return NULL


cdef int _use(SSL *ssl, const EVP_MD *md, const unsigned char **identity, size_t *length,
              SSL_SESSION **s) noexcept nogil:
    identity[0] = <const unsigned char *>IDENTITY
    length[0] = strlen(IDENTITY)
    s[0] = _session(ssl)
    return s[0] != NULL


cdef int _find(SSL *ssl, const unsigned char *identity, size_t length,
               SSL_SESSION **s) noexcept nogil:
    cdef shared_key *k = <shared_key *>SSL_get_ex_data(ssl, 0)
    s[0] = NULL
    if length == strlen(IDENTITY) and memcmp(identity, IDENTITY, length) == 0:
        k.claimed = True
        s[0] = _session(ssl)
    return 1


cdef int tls_seal(tls *t, const uint8_t *data, uint32_t length, uint8_t *out) noexcept nogil:
    """Encrypt at most TLS_RECORD bytes into out (TLS_SEALED bytes). How many that are now, or
    TLS_BROKEN."""
    ERR_clear_error()
    if SSL_write(t.ssl, data, <int>length) != <int>length:
        return TLS_BROKEN
    return BIO_read(t.to_send, out, TLS_SEALED)


cdef void tls_received(tls *t, const uint8_t *data, uint32_t length) noexcept nogil:
    """Bytes that came from the peer, for tls_open()."""
    BIO_write(t.received, data, <int>length)


cdef int tls_open(tls *t, uint8_t *out, uint32_t room) noexcept nogil:
    """Decrypt into out. How many bytes; TLS_MORE: none, until more is received; TLS_CLOSED or
    TLS_BROKEN."""
    cdef int n, error
    ERR_clear_error()
    n = SSL_read(t.ssl, out, <int>room)
    if n > 0:
        return n
    error = SSL_get_error(t.ssl, n)
    if error == SSL_ERROR_WANT_READ:
        return TLS_MORE
    return TLS_CLOSED if error == SSL_ERROR_ZERO_RETURN else TLS_BROKEN


cdef class Channel:
    """One end of a connection. server: who accepted it."""

    def __cinit__(self, bytes secret, bint server):
        cdef bytes key = hmac.digest(secret, b"tcpha control connection", "sha256")
        memcpy(self.psk.key, <const unsigned char *>key, 32)
        self.context = SSL_CTX_new(TLS_method())
        if self.context == NULL:
            raise MemoryError
        SSL_CTX_set_min_proto_version(self.context, TLS1_3_VERSION)
        SSL_CTX_set_ciphersuites(self.context, SUITE)
        SSL_CTX_set_num_tickets(self.context, 0)
        SSL_CTX_set_options(self.context, SSL_OP_NO_TICKET)
        if server:
            SSL_CTX_set_psk_find_session_callback(self.context, _find)
        else:
            # there are no authorities: a certificate instead of the secret does not help a server
            SSL_CTX_set_verify(self.context, SSL_VERIFY_PEER, NULL)
            SSL_CTX_set_psk_use_session_callback(self.context, _use)
        self.t.ssl = SSL_new(self.context)
        self.t.received = BIO_new(BIO_s_mem())
        self.t.to_send = BIO_new(BIO_s_mem())
        if self.t.ssl == NULL or self.t.received == NULL or self.t.to_send == NULL:
            raise MemoryError
        SSL_set_bio(self.t.ssl, self.t.received, self.t.to_send)
        SSL_set_ex_data(self.t.ssl, 0, &self.psk)
        if server:
            SSL_set_accept_state(self.t.ssl)
        else:
            SSL_set_connect_state(self.t.ssl)

    def __dealloc__(self):
        SSL_free(self.t.ssl)       # and its BIOs
        SSL_CTX_free(self.context)
        memset(&self.psk, 0, sizeof(self.psk))

    @property
    def claimed(self):
        """On a server: whether the peer said that it knows the secret."""
        return bool(self.psk.claimed)

    def received(self, bytes data):
        """Bytes that came from the peer."""
        tls_received(&self.t, data, <uint32_t>len(data))

    def to_send(self):
        """Bytes that the peer should get."""
        cdef uint8_t buf[TLS_SEALED]
        cdef int n = BIO_read(self.t.to_send, buf, TLS_SEALED)
        return (<char *>buf)[:n] if n > 0 else b""

    def shake_hands(self):
        """Go on with the handshake: sets 'established' at its end. Raises TlsError; to_send() may
        have an alert for the peer."""
        cdef int rc
        ERR_clear_error()
        rc = SSL_do_handshake(self.t.ssl)
        if rc == 1:
            if not SSL_session_reused(self.t.ssl):
                raise TlsError("the peer knows no secret")
            self.established = True
        elif SSL_get_error(self.t.ssl, rc) != SSL_ERROR_WANT_READ:
            raise TlsError(_reason())

    def write(self, bytes data):
        """Encrypt; to_send() has the result."""
        ERR_clear_error()
        if data and SSL_write(self.t.ssl, <const char *>data, <int>len(data)) != <int>len(data):
            raise TlsError("cannot write")

    def read(self, uint32_t most):
        """Decrypt what is there, at most so many bytes; b'': nothing is."""
        cdef bytearray out = bytearray(most)
        cdef int n = tls_open(&self.t, out, most)
        if n < 0:
            raise TlsError("the peer closed the connection")
        return bytes(out[:n])
