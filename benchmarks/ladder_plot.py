"""MFU by length of the sequence, from result files of `long_context.py --cases ladder`.

python benchmarks/ladder_plot.py benchmarks/results/long_context_ladder.json --out docs/ladder.png
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


def rungs(files: list[Path]) -> dict[str, dict[int, dict[str, float]]]:
    """By model and tokens; of a length that is there twice the last."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            for rung in row.get("rungs", []):
                found[row["model"]][rung["tokens"]] = rung
    return found


def draw(found: dict[str, dict[int, dict[str, float]]], png: Path, title: str) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for model, by_tokens in sorted(found.items()):
        tokens = sorted(by_tokens)
        axes.plot(tokens, [100 * by_tokens[n]["mfu"] for n in tokens], "o-", label=model)
        for n in tokens:
            axes.annotate(
                f"{by_tokens[n]['gpu_GiB']:.0f} GiB", (n, 100 * by_tokens[n]["mfu"]), xytext=(0, 6),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:.0f}K" if n < 2**20 else "1M"))
    axes.set_ylim(0, 50)
    axes.set(xlabel="tokens of one sequence", ylabel="MFU, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="One sequence, at most 24 GiB of GPU memory (reserved: at the points)")
    args = parser.parse_args()
    draw(rungs(args.files), args.out, args.title)


if __name__ == "__main__":
    main()
