"""Learning curves and scores of finished runs: python -m benchmarks.curves OUT RUN [RUN ...]

Reads run directories. Writes OUT.png (a panel per environment: return of the last 100 training episodes against steps,
a thin line per seed and, per exp_name, their mean) and OUT.csv (one row per run), and prints train_last100 of each.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def read_run(path: Path) -> dict:
    """What the figure and the table need of one run directory."""
    config, summary = (json.loads((path / f"{name}.json").read_text()) for name in ("config", "summary"))
    steps, returns = np.loadtxt(path / "episodes.csv", delimiter=",", skiprows=1, usecols=(0, 2), ndmin=2).T
    sums = np.concatenate([[0.0], returns.cumsum()])
    begin = np.maximum(np.arange(1, len(sums)) - 100, 0)
    curve = (sums[1:] - sums[begin]) / (np.arange(1, len(sums)) - begin)
    row = {"env_id": config["args"]["env_id"], "exp_name": config["args"]["exp_name"], "seed": config["args"]["seed"]}
    row |= {key: summary[key] for key in ("status", "global_step", "train_last100", "sps", "wall_time")}
    return {"row": row, "steps": steps, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="figure and table without their endings")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    asked = parser.parse_args()
    runs = [read_run(path) for path in asked.runs]
    panels = sorted({run["row"]["env_id"] for run in runs})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    names = sorted({run["row"]["exp_name"] for run in runs})
    for axis, env_id in zip(axes[0], panels):
        for name, color in zip(names, COLORS):
            group = [run for run in runs if run["row"]["env_id"] == env_id and run["row"]["exp_name"] == name]
            if not group:
                continue
            scores = [run["row"]["train_last100"] for run in group]
            grid = np.linspace(max(run["steps"][0] for run in group), min(run["steps"][-1] for run in group), 300)
            curves = np.array([np.interp(grid, run["steps"], run["curve"]) for run in group])
            for curve in curves:
                axis.plot(grid / 1e6, curve, color=color, alpha=0.35, linewidth=0.8)
            seeds = f"{len(group)} seed{'s' * (len(group) > 1)}"
            axis.plot(grid / 1e6, curves.mean(0), color=color, linewidth=2, label=f"{name}, {seeds}")
            deviation = f" +- {np.std(scores, ddof=1):,.1f}" if len(group) > 1 else ""
            each = ", ".join(f"{score:,.1f}" for score in scores)
            print(f"{env_id}, {name}: train_last100 {np.mean(scores):,.1f}{deviation} ({seeds}: {each})")
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("million environment steps")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("return, last 100 episodes")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out.with_suffix(".png"), dpi=110)
    with open(asked.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(runs[0]["row"]))
        writer.writeheader()
        writer.writerows(run["row"] for run in runs)


if __name__ == "__main__":
    main()
