# SPDX-License-Identifier: GPL-2.0-or-later
from tcpha._fast.datapath import FeDatapath

class Questions:
    def __init__(self, datapath: FeDatapath, seconds: float = 0, doubtful: bool = False,
                 backend: int = -1) -> None: ...
    def find(self) -> int: ...
