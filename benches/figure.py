"""The README's figure from the saved rows: python benches/figure.py [RESULTS] > docs/speed.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CASES = [
    ("bench_training", "update of stage 3, M=20108 B=500 T=8", "one update of stage 3"),
    ("bench_loop", "inference, trained, M=20108 B=500 T=8", "inference, T = 8"),
    ("bench_recommend", "recommend 100, trained, M=20108 B=500 T=8", "recommend 100 items"),
]
RIVALS = [
    ("eager", "#9aa0a6", "as one would write it: 9 passes over all items, forward and backward"),
    ("torch", "#5b8def", "sparse histories, computed once; gradients of the K listed items alone"),
    ("cpp", "#0b57d0", "and kernels that skip items and users whose lists cannot have changed"),
]
LEFT, WIDTH, BAR, GAP = 170, 560, 16, 26


def figure(results: Path) -> str:
    """Horizontal bars, a group for each case, each as long as its share of eager's time."""
    parts, y = [], 20
    for _, colour, what in RIVALS:
        parts.append(f'<rect x="{LEFT}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 20}" y="{y + 10}">{what}</text>')
        y += 20
    y += 14
    for name, case, label in CASES:
        rows = [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]
        of = {row["rival"]: row for row in rows if row["case"] == case}  # of repeated rows the last
        parts.append(f'<text x="{LEFT - 10}" y="{y + 1.5 * BAR + 5:.0f}" text-anchor="end">{label}</text>')
        for rival, colour, _ in RIVALS:
            ms = of[rival]["ms"]
            length = WIDTH * ms / of["eager"]["ms"]
            times = "" if rival == "eager" else f", {of[rival]['x eager']:.1f}x"
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 11}">{ms:,.0f} ms{times}</text>')
            y += BAR
        y += GAP
    style = "text { font: 12px sans-serif; fill: #3c4043 }"
    size = f'width="{LEFT + WIDTH + 90}" height="{y - 8}"'
    back = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{style}</style>", back, *parts, "</svg>"]
    )


if __name__ == "__main__":
    print(figure(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"))
