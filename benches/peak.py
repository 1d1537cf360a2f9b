"""What a command takes: seconds, and its most memory, alone and with the pages of files that it has mapped.

python benches/peak.py cfsfl prepare ...   runs it, then prints one line of json to stderr

Anonymous memory is what a process cannot do without. Pages of mapped files count as resident while they are cached, and
the system takes them back whenever it needs the room.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

EVERY = 0.05
"""Seconds between two looks."""


def main(command: list[str]) -> int:
    """Runs a command to its end and gives its exit status."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    most = {"RssAnon": 0, "VmRSS": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], 1024 * int(value.split()[0]))
        time.sleep(EVERY)
    status = process.wait()
    found = {"seconds": time.perf_counter() - began, "anonymous": most["RssAnon"], "resident": most["VmRSS"]}
    print(json.dumps(found), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
