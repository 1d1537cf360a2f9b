"""CSR rows of items as operations take them.

Rows may have room: entries behind offsets[-1], which belong to no row, hold the item id M and any finite weight. No
operation looks at them (`tests/test_room.py`). On a CPU they are cut off here; on a device that would mean waiting for
it, and the implementations step over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfsfl_fast import library
from cfsfl_fast.compiling import through_operators

CSR = tuple[Tensor, Tensor]
"""items [E] int64, offsets [B + 1] int64."""


def bounded(items: Tensor, offsets: Tensor, backend: str) -> CSR:
    """On a CPU, the rows without the entries behind the last one."""
    if through_operators(backend) or torch.compiler.is_compiling():  # no data, or operators see to it
        return items, offsets
    return library.without_room(items, offsets)
