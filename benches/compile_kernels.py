"""Compiles the kernels of the benches' models into Triton's cache, in processes at the same time: a kernel takes
seconds, and a bench that waited for each in turn would have no time left.

python benches/compile_kernels.py [--rehearse]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
from problems import CONFIG, ITEMS, histories

from cfsfl_fast import CFSFL, CFSFLConfig
from cfsfl_fast.graphs import capacity
from cfsfl_fast.updates import Optimisers, Updates

WORK = (("inference", "recommender"), ("reward", "joint"))
PRECISIONS = ("fp32", "tf32", "bf16")
USERS = (500, 4096)


def launch_all(what: str, precision: str, device: torch.device, shape: str) -> None:
    """Runs once what the benches run: `what` is inference or a stage's update, for each preset's reading."""
    n_items = ITEMS[shape]
    x = histories(n_items).to(device)
    for config in (CONFIG, CFSFLConfig.preset("paper").resolved(len(x))):
        made = CFSFL.from_config(n_items, config, precision=precision, graphs=True).to(device)
        for n_users in USERS if shape != "tiny" else (8,):
            users = (torch.arange(n_users) % len(x)).to(device)
            if what == "inference":
                with torch.no_grad():
                    made.eval()(x.take(users))
                made.recommend(x.take(users), 100, batch_size=n_users)
            else:
                updates = Updates(made.train(), x, Optimisers(made, what), what)
                updates.begin(1, (0, 1, 2), capacity(int(x.host_counts[users.cpu()].sum())))
                updates(users, users)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="at a tiny size on the CPU")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="a precision and what to run, in this process")
    given = parser.parse_args()
    if given.only:
        device = torch.device("cpu" if given.rehearse else "cuda")
        precision, *work = given.only
        for what in work:
            launch_all(what, precision, device, "tiny" if given.rehearse else "ml-20m")
        return 0
    flags = ["--rehearse"] if given.rehearse else []
    todo = [[precision, *work] for precision in PRECISIONS for work in WORK]
    if given.rehearse:
        todo = [["fp32", "inference", "joint"]]
    running = [subprocess.Popen([sys.executable, __file__, *flags, "--only", *words]) for words in todo]
    failed = [" ".join(words) for words, process in zip(todo, running, strict=True) if process.wait()]
    print(f"{len(todo) - len(failed)} of {len(todo)} ran", *failed, sep="; not ")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
