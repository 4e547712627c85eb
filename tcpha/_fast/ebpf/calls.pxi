# SPDX-License-Identifier: GPL-2.0-or-later
# Calls of the programs: a frame on the TAP, and what it is about in a mailbox.

cdef int _operate(int tap, tcpha_op *ops, uint32_t worker, const tcpha_flow *flow,
                  uint32_t what) noexcept nogil:
    """Have the program do something with a flow; the answer is in ops[worker]."""
    cdef uint8_t frame[10 + 14 + 46]
    cdef uint16_t kind = htons(TCPHA_ETH_OP)
    cdef tcpha_op *op = &ops[worker]
    memset(frame, 0, sizeof(frame))
    frame[VNET_SIZE] = 2
    frame[VNET_SIZE + 6] = 2
    memcpy(frame + VNET_SIZE + 12, &kind, 2)
    memcpy(frame + VNET_SIZE + ETH_SIZE, &worker, 4)
    op.flow = flow[0]
    op.kind = what
    op.result = TCPHA_R_NONE
    if tap_send(tap, frame, sizeof(frame), NULL, 0) != 0 or op.result == TCPHA_R_NONE:
        return -1
    return 0


cdef inline int _query(int tap, tcpha_op *ops, uint32_t worker,
                       const tcpha_flow *flow) noexcept nogil:
    """Look a flow's socket up."""
    return _operate(tap, ops, worker, flow, TCPHA_OP_QUERY)
