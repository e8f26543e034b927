from __future__ import annotations
from typing import NamedTuple
PAGE_BYTES = 2 << 20
class Handle(NamedTuple):
    fd: int
    offset: int
