# SPDX-License-Identifier: GPL-2.0-or-later
from collections.abc import Iterator

from tcpha._fast.be_worker import BackEnd
from tcpha._fast.datapath import FeDatapath

FLOWS: tuple[str, ...]
ADOPTED: tuple[str, ...]

class FlowRows(Iterator[bytes]):
    def __init__(self, datapath: FeDatapath, rules: list[str], servers: list[str],
                 aligned: bool = False) -> None: ...
    def __next__(self) -> bytes: ...

class AdoptedRows(Iterator[bytes]):
    def __init__(self, core: BackEnd, frontends: list[str]) -> None: ...
    def __next__(self) -> bytes: ...
