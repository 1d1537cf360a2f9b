"""Interactions from files to training and held-out users: readers, the protocol, prepared data, synthetic data."""

from cfsfl_fast.datasets.columns import write_columns
from cfsfl_fast.datasets.dataset import Dataset, HeldOut
from cfsfl_fast.datasets.events import Events
from cfsfl_fast.datasets.generator import synthetic, synthetic_blocks, synthetic_dataset
from cfsfl_fast.datasets.histories import ItemIndex, read_histories
from cfsfl_fast.datasets.matrices import matrix_events
from cfsfl_fast.datasets.prepared import is_prepared, load_source, open_dataset, prepare, save_dataset
from cfsfl_fast.datasets.protocol import PRESETS, Protocol, split_events
from cfsfl_fast.datasets.readers import FORMATS, read_events

__all__ = [
    "FORMATS",
    "PRESETS",
    "Dataset",
    "Events",
    "HeldOut",
    "ItemIndex",
    "Protocol",
    "is_prepared",
    "load_source",
    "matrix_events",
    "open_dataset",
    "prepare",
    "read_events",
    "read_histories",
    "save_dataset",
    "split_events",
    "synthetic",
    "synthetic_blocks",
    "synthetic_dataset",
    "write_columns",
]
