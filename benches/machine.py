"""What this machine is: versions, devices, and which kernels can run on them.

python benches/machine.py [--json]
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys

import torch
from conftest import commit, processor

from cfsfl_fast import backends


def facts() -> dict[str, object]:
    """Versions, devices and the commit."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    return {
        "device": gpus[0] if gpus else processor(),
        "gpus": len(gpus),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
    }


def main() -> None:
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(facts()))
        return
    print("\n".join(f"{name}: {value}" for name, value in facts().items()))
    for device in ("cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))):
        where = torch.device(device)
        if where.type == "cuda":
            found = torch.cuda.get_device_properties(where)
            print(f"{device}: {found.name}, {found.total_memory >> 20} MB, sm_{found.major}{found.minor}")
        for backend in backends.BACKENDS[1:]:
            print(f"  {device} {backend:<10} {backends.why_not(backend, where) or 'can run'}")


if __name__ == "__main__":
    main()
