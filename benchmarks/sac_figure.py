"""SAC along its runs: python -m benchmarks.sac_figure RUNS_DIR [--out benchmarks/results/sac]

RUNS_DIR holds run directories of sac.py, and of ppo.py and trpo.py on HalfCheetah to compare with. Those of sac.py were
made with --keep-checkpoints, and `python -m benchmarks evaluate` has evaluated their checkpoints. Draws

    a panel for each environment: mean return of the evaluations of SAC against steps, and the published curve
    HalfCheetah: running mean return of 20 training episodes of SAC, PPO and TRPO against steps and wall-clock time
    Hopper: the same of SAC with other step sizes, and in bfloat16

Writes OUT.png and OUT.csv, which has all points, with env_id, algo, seed, step, wall_time, kind and return. Runs whose
points are in OUT.csv already, and that RUNS_DIR does not hold, stay in it: seeds may be trained on several days.
"""

import argparse
import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import PALETTE, new_figure, save_figure

ENVS = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
NAMES = {"sac": "SAC", "ppo": "PPO", "trpo": "TRPO"}  # with their defaults
VARIANTS = {"sac": "default", "sac bf16": "bfloat16", "sac 3e-4": "step size 3e-4", "sac 3e-4 bf16": "3e-4, bfloat16"}
COLORS = dict(zip(NAMES | VARIANTS, PALETTE))
STEP_SIZE = 1e-3  # the default on MuJoCo
EPISODES = 20  # of a running mean
EVERY = 10_000  # steps from a point of a training curve to the next

Points = list[dict[str, Any]]


def read_table(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]


def read_run(run: Path) -> Points:
    """Its evaluations, and the running mean return of its training episodes at every EVERY steps."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    args = config["args"]
    algo = args["exp_name"]
    if algo == "sac":
        step_size = np.format_float_scientific(args["policy_lr"], trim="-", exp_digits=1)
        algo += "" if args["policy_lr"] == STEP_SIZE else f" {step_size}"
        algo += " bf16" if args["bf16"] == "on" else ""
    names = {"env_id": args["env_id"], "algo": algo, "seed": args["seed"]}
    episodes = read_table(run / "episodes.csv")
    steps = np.array([row["global_step"] for row in episodes])
    times, returns = (np.array([row[name] for row in episodes]) for name in ("wall_time", "return"))
    points = []
    evaluations = read_table(run / "evaluations.csv")
    kinds = [(row.get("episodes"), row.get("seed")) for row in evaluations]
    most = max(kinds, key=kinds.count, default=None)  # others are not of the same curve
    for row in (row for row, kind in zip(evaluations, kinds) if kind == most):
        past = np.searchsorted(steps, row["step"], "right") - 1
        time = times[past] if past >= 0 else 0.0
        points.append(names | {"step": int(row["step"]), "wall_time": time, "kind": "eval", "return": row["mean"]})
    for step in range(EVERY, int(steps.max(initial=0)) + 1, EVERY):
        past = int(np.searchsorted(steps, step, "right"))
        if past >= EPISODES:
            mean = float(returns[past - EPISODES : past].mean())
            points.append(names | {"step": step, "wall_time": times[past - 1], "kind": "train", "return": mean})
    return points


def read_points(path: Path) -> Points:
    """The points of an earlier OUT.csv; none where there is no such file."""
    if not path.exists():
        return []
    kinds = {"seed": int, "step": int, "wall_time": float, "return": float}
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: kinds.get(name, str)(x) for name, x in row.items()} for row in csv.DictReader(file)]


def join(stored: Points, new: Points) -> Points:
    """The new points, and the stored ones of runs that are not among the new."""

    def run_of(point: dict[str, Any]) -> tuple[str, str, int]:
        return point["env_id"], point["algo"], point["seed"]

    made_again = {run_of(point) for point in new}
    kept = [point for point in stored if run_of(point) not in made_again]
    return sorted(kept + new, key=run_of)


def curves(points: Points, **chosen: Any) -> Iterator[Points]:
    """The points of each seed that have these values."""
    found = [point for point in points if all(point[name] == value for name, value in chosen.items())]
    for seed in sorted({point["seed"] for point in found}):
        yield sorted((point for point in found if point["seed"] == seed), key=lambda point: point["step"])


def draw_curves(axis: Any, seeds: list[Points], against: str, name: str, color: str, per: float = 1.0) -> None:
    """A thin line per seed, and the mean over all seeds where all of them have a point."""
    for curve in seeds:
        axis.plot(
            [p[against] / per for p in curve], [p["return"] for p in curve], color=color, alpha=0.3, linewidth=0.8
        )
    common = sorted(set.intersection(*({p["step"] for p in curve} for curve in seeds)))
    both = [[[p[against] / per, p["return"]] for p in curve if p["step"] in common] for curve in seeds]
    axis.plot(*np.mean(both, 0).T, color=color, linewidth=2, label=f"{name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}")


def draw(points: Points, published: list[dict[str, str]], path: Path) -> None:
    figure, axes = new_figure(2, 3, 4.2, 3.4)
    for axis, env_id in zip(axes[0], ENVS):
        last = 0
        if seeds := list(curves(points, env_id=env_id, algo="sac", kind="eval")):
            draw_curves(axis, seeds, "step", "sac.py", COLORS["sac"])
            last = max(curve[-1]["step"] for curve in seeds)
        rows = [row for row in published if row["env_id"].split("-")[0] == env_id.split("-")[0]]
        x, y, spread = (
            np.array([float(row[name]) for row in rows if float(row["env_steps"]) <= last])
            for name in ("env_steps", "score", "spread")
        )
        axis.plot(x, y, color="black", linestyle="--", label="published (tianshou, -v3, 10 seeds)")
        axis.fill_between(x, y - spread, y + spread, color="black", alpha=0.1, linewidth=0)
        axis.set(title=env_id, xlabel="steps", ylabel="evaluated return")
    for axis, against, per, label in (
        (axes[1, 0], "step", 1, "steps"),
        (axes[1, 1], "wall_time", 60, "minutes, one thread"),
    ):
        for algo, name in NAMES.items():
            if seeds := list(curves(points, env_id=ENVS[0], algo=algo, kind="train")):
                draw_curves(axis, seeds, against, name, COLORS[algo], per)
        axis.set(title=f"{ENVS[0]}, in training", xlabel=label, ylabel=f"return, {EPISODES} episodes")
        if against == "wall_time":
            axis.set(xscale="log")
            axis.set_xticks((0.2, 1, 5, 20, 80), labels=("0.2", "1", "5", "20", "80"))
            axis.minorticks_off()
    for algo, name in VARIANTS.items():
        if seeds := list(curves(points, env_id=ENVS[1], algo=algo, kind="train")):
            draw_curves(axes[1, 2], seeds, "step", name, COLORS[algo])
    axes[1, 2].set(title=f"{ENVS[1]}, in training", xlabel="steps", ylabel=f"return, {EPISODES} episodes")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        if axis.get_xscale() == "linear":
            axis.locator_params(axis="x", nbins=5)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def print_table(points: Points) -> None:
    """Mean and seeds of the evaluations, by environment and step."""
    for env_id, algo in itertools.product(ENVS, VARIANTS):
        found: dict[int, list[float]] = {}
        for curve in curves(points, env_id=env_id, algo=algo, kind="eval"):
            for point in curve:
                found.setdefault(point["step"], []).append(point["return"])
        for step, returns in sorted(found.items()):
            seeds = ", ".join(f"{x:,.0f}" for x in returns)
            print(f"{env_id:15} {VARIANTS[algo]:14} {step:>9,} {np.mean(returns):8,.0f}  ({seeds})")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--out", type=Path, default=here / "results" / "sac", help="figure and table without endings")
    asked = parser.parse_args(argv)
    runs = sorted(path.parent for path in asked.runs_dir.glob("*/config.json"))
    if not runs:
        parser.error(f"{asked.runs_dir} holds no run directories")
    table = asked.out.with_suffix(".csv")
    new = [read_run(run) for run in runs]
    names = [(curve[0]["env_id"], curve[0]["algo"], curve[0]["seed"]) for curve in new if curve]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"{asked.runs_dir} has more than one run of {', '.join(map(str, twice))}; keep one of each")
    points = join(read_points(table), [point for curve in new for point in curve])
    with open(here / "references" / "sac_curves.csv", newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    draw(points, published, asked.out.with_suffix(".png"))
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(points[0]))
        writer.writeheader()
        writer.writerows({key: f"{x:.1f}" if isinstance(x, float) else x for key, x in row.items()} for row in points)
    print_table(points)


if __name__ == "__main__":
    main()
