"""The lesson of REINFORCE in one picture: python -m benchmarks.variance OUT [--seeds 3] [--runs-dir runs]

Trains reinforce.py on CartPole-v1 with each pair of --returns and --baseline and draws, from the progress.csv of the
runs, the variance of the gradient estimate and its signal-to-noise ratio against how good the policy was, and the
return against steps. Compare variances at equal return: they grow with it. Writes OUT.png, and OUT.csv with the points
of the first two panels, geometric means over the batches of an interval of returns.
"""

import argparse
import csv
import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
COLORS = {"none": "#D55E00", "mean": "#009E73", "value": "#0072B2"}
EDGES = np.array([15, 20, 30, 45, 70, 100, 150, 220, 300, 400, 475])  # of mean returns; at 500 all are equal


def read(path: Path) -> np.ndarray:
    """Columns of progress.csv: step, mean return, variance and signal-to-noise ratio of the gradient."""
    columns = ("global_step", "charts/episodic_return", "losses/grad_variance", "losses/grad_snr")
    with open(path / "progress.csv", newline="") as file:
        return np.array([[float(row[column]) for column in columns] for row in csv.DictReader(file)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="figure and table without their endings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--total-timesteps", type=int, default=300_000)
    asked = parser.parse_args()
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 3.6), layout="constrained")
    table = []
    for returns, baseline in product(("full", "to-go"), COLORS):
        runs = []
        for seed in range(1, asked.seeds + 1):
            path = asked.runs_dir / f"variance__{returns}__{baseline}__{seed}"
            if not (path / "summary.json").exists():
                command = [sys.executable, str(ROOT / "reinforce.py"), "--returns", returns, "--baseline", baseline]
                command += ["--seed", str(seed), "--runs-dir", str(asked.runs_dir), "--run-name", path.name]
                command += ["--total-timesteps", str(asked.total_timesteps)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            runs.append(read(path))
        rows = np.concatenate(runs)
        bins = [rows[(low <= rows[:, 1]) & (rows[:, 1] < high)] for low, high in zip(EDGES, EDGES[1:])]
        points = np.array([np.exp(np.log(part[:, 1:]).mean(0)) for part in bins if len(part) > 2])
        style = dict(color=COLORS[baseline], linestyle="--" if returns == "full" else "-", linewidth=1.8)
        label = f"{returns}, {baseline}"
        axes[0].plot(points[:, 0], points[:, 1], label=label, **style)
        axes[1].plot(points[:, 0], points[:, 2], **style)
        grid = np.linspace(max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs), 200)
        curve = np.mean([np.interp(grid, run[:, 0], run[:, 1]) for run in runs], 0)
        axes[2].plot(grid / 1e3, curve, **style)
        table += [dict(returns=returns, baseline=baseline, mean_return=x, variance=v, snr=s) for x, v, s in points]
        print(f"{label}: {', '.join(f'{v:,.3g} at return {x:.0f}' for x, v, _ in points)}", flush=True)
    for axis, title in zip(axes, ("variance of the gradient", "its signal-to-noise ratio", "return")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("mean return of the batch" if axis is not axes[2] else "thousand environment steps")
        axis.grid(alpha=0.25)
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.set_xscale("log")
        axis.set_xticks([25, 50, 100, 200, 400], labels=["25", "50", "100", "200", "400"])
        axis.minorticks_off()
    axes[0].legend(fontsize=8, title="returns, baseline", title_fontsize=8)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out.with_suffix(".png"), dpi=110)
    with open(asked.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
