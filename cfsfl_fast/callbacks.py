"""What may be called after every epoch, beside the log: `fit(..., on_epoch=...)`, `Run(..., on_epoch=...)`."""

from __future__ import annotations

import os
from typing import Any

from cfsfl_fast.stages import Epoch


class TensorBoard:
    """Writes every epoch's figures for TensorBoard: STAGE/loss, STAGE/NDCG@100 ... over the epochs of the stage.

    Args:
        folder: of the event files; made with the first epoch.

    Raises:
        ImportError: TensorBoard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoard is missing ({error}): pip install 'cfsfl-fast[tensorboard]'") from error
        self._open, self._folder = SummaryWriter, os.fspath(folder)
        self._writer: Any = None

    def __call__(self, record: Epoch) -> None:
        """Writes one epoch; it is on the disk when this returns."""
        self._writer = self._writer or self._open(self._folder)  # a run that is refused leaves no folder behind
        values = {**record.figures, **{name: found.value for name, found in (record.validation or {}).items()}}
        for name, value in values.items():
            self._writer.add_scalar(f"{record.stage}/{name}", value, record.epoch)
        self._writer.flush()
