# SPDX-License-Identifier: GPL-2.0-or-later
# What would become of a request: for 'test-request'.

cdef object _consider(frontend *f, bytes head, uint32_t number):
    """See FrontEnd.consider()."""
    cdef http_head h
    cdef bytearray buf = bytearray(head)
    cdef ruleset *rules
    cdef hs_scratch_t *scratch = NULL
    cdef uint64_t nobody[TRIED_WORDS]
    cdef tcpha_choice chosen
    cdef uint32_t g, i, b
    cdef int rc
    memset(&h, 0, sizeof(h))
    memset(nobody, 0, sizeof(nobody))
    rc = http_parse(&h, head, min(<uint32_t>len(head), f.headlimit))
    if rc != HTTP_DONE:
        error = h.error.decode() if rc == HTTP_BAD else \
            "longer than headlimit" if len(head) >= f.headlimit else "not complete"
        return error, "", "", [], -1, -1, 0
    target = head[h.target:h.target + h.target_len].decode("ascii")
    seen = (chr(h.root) if h.root else "") + target[h.origin - h.target:]
    rules = f.rules   # the loop's thread publishes them, and runs this
    matched = []
    winner = asked = -1
    if rules != NULL and rules.groups:
        bits = bytearray(rules.words * 8)
        if hs_clone_scratch(rules.patterns.scratch, &scratch) != HS_SUCCESS:
            raise MemoryError
        rc = match_target(rules, scratch, &h, <uint8_t *><char *>buf,
                          <uint64_t *><char *>bits)
        hs_free_scratch(scratch)
        if rc < 0:
            raise MemoryError
        for g in range(rules.groups):
            if bits[g >> 3] >> (g & 7) & 1 and rules.services[g] >> number & 1:
                for i in range(rules.first[g], rules.first[g + 1]):
                    b = rules.choices[i].backend
                    matched.append((rules.choices[i].rule,
                                    _refusal(f, b, number, nobody, False, now_ns())))
        if _pick(f, rules, <uint64_t *><char *>bits, number, nobody, False, &chosen):
            winner = chosen.rule
        elif _pick(f, rules, <uint64_t *><char *>bits, number, nobody, True, &chosen):
            asked = chosen.rule
    return None, target, seen, matched, winner, asked, \
        _refusal(f, TCPHA_LOCAL_NODE, number, nobody, False, now_ns())
