"""The readers under a fuzzer that follows coverage (atheris, on libFuzzer), with the oracle of test_fuzz.

    make fuzz FUZZ_SECONDS=3600                             # after pip install atheris
    python -m tests.coverage_fuzz -max_total_time=3600      # any option of libFuzzer

Ends with exit code 0 after so many inputs, or with the input in a file that something else than a refusal came of.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cfsfl_fast.datasets", "cfsfl_fast.arrays"]):
    from cfsfl_fast.datasets import load_source, read_events

from tests.test_fuzz import CSV, FORMATS, MATRICES, PACKED, TEXTS, BadError, as_dict, slow_events

SEEDS = {**{name: text.encode() for name, text in TEXTS.items()}, "any.csv": CSV.encode(), **PACKED, **MATRICES}
NAMES = sorted(SEEDS)
"""An input's first byte says which of them its rest is called."""


def feed(folder: Path, data: bytes) -> None:
    """Reads an input; anything but a refusal or the oracle's answer is an error."""
    if not data:
        return
    name, content = NAMES[data[0] % len(NAMES)], data[1:]
    path = folder / name
    path.write_bytes(content)
    expected = None
    if name in TEXTS:
        try:
            expected = slow_events(name, content)
        except BadError:
            expected = {}
    try:
        if name.endswith(".npz"):
            load_source(path).validate()
            return
        found = as_dict(read_events(path, format=FORMATS.get(name, "auto")))
    except ValueError:
        assert not expected, "what the format allows is refused"
        return
    assert expected is None or found == expected


def main() -> None:
    """Hands the seeds and the command line to libFuzzer."""
    with tempfile.TemporaryDirectory(prefix="cfsfl-fuzz-") as name:
        corpus, place = Path(name, "corpus"), Path(name, "place")
        corpus.mkdir()
        place.mkdir()
        for number, seed in enumerate(NAMES):
            (corpus / seed).write_bytes(bytes([number]) + SEEDS[seed])
        atheris.Setup([*sys.argv, "-timeout=30", "-rss_limit_mb=4096", str(corpus)], lambda data: feed(place, data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
