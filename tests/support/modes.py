# SPDX-License-Identifier: GPL-2.0-or-later
"""The modes in which tests run."""
from __future__ import annotations

EBPF, NFQUEUE = "ebpf", "nfqueue"
MODES = {  # forward, datapath of the FE and of the BEs, fastpath
    "direct": ("direct", EBPF, EBPF, False), "tunnel": ("tunnel", EBPF, EBPF, False),
    "fast-direct": ("direct", EBPF, EBPF, True), "fast-tunnel": ("tunnel", EBPF, EBPF, True),
    "nfqueue-direct": ("direct", NFQUEUE, NFQUEUE, False),
    "nfqueue-tunnel": ("tunnel", NFQUEUE, NFQUEUE, False),
    "ebpf-nfqueue": ("tunnel", EBPF, NFQUEUE, True),
    "nfqueue-ebpf": ("direct", NFQUEUE, EBPF, True)}
# those of a test that names none
USUAL = ("direct", "tunnel", "nfqueue-direct", "nfqueue-tunnel")
