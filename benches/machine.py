"""What this machine is: versions, devices, and which kernels can run on them."""

from __future__ import annotations

import platform

import torch

from cfsfl_fast import backends

print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
for device in ("cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))):
    where = torch.device(device)
    if where.type == "cuda":
        found = torch.cuda.get_device_properties(where)
        print(f"{device}: {found.name}, {found.total_memory >> 20} MB, sm_{found.major}{found.minor}")
    for backend in backends.BACKENDS[1:]:
        print(f"  {device} {backend:<10} {backends.why_not(backend, where) or 'can run'}")
