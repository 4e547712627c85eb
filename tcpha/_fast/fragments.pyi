# SPDX-License-Identifier: GPL-2.0-or-later
from tcpha._fast.nfqueue import Queue

MARK: int

class Defragmented:
    def __init__(self, source: Queue, tap: int, mac: bytes, room: int) -> None: ...
    def fit(self, room: int) -> None: ...
    @property
    def count(self) -> int: ...
