"""What grpo_toy.py teaches, one command a lesson: python -m benchmarks.lessons LESSON [--seeds 3] [--out FILE]

    accuracy     GRPO against the verifier, seeds 1 to 5            methods    every --method, with its defaults
    gdpo         GDPO against GRPO, rewards of unequal scale        equal      the same rewards on one scale
    conditions   easy rewards with and without a condition          hacking    two proxies, beta 0 and 0.1
    collapse     the advantages of (0, 1) and of (0, 2), printed by group_advantages

Starts the script, one thread each, two at a time. A run is named after its flags and seed; one that is complete is
kept, one that was cut off goes on. Prints a table, and writes FILE.png and FILE.csv (default:
benchmarks/results/grpo_LESSON).
"""

import argparse
import csv
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch

from benchmarks.figures import PALETTE, plt

ROOT = Path(__file__).parent.parent
OFTEN = "--eval-interval 2"
SLOWLY = "--learning-rate 2e-4 --max-steps 100"  # a quarter of the default, which sets the arms further apart
ALL = f"--rewards correct format length {SLOWLY}"
EQUAL = f"--rewards exact format length {SLOWLY}"
GDPO = "--reward-aggregation normalize_then_sum"
HACK = "--max-steps 120 --init-from {trained}"
LESSONS = {  # arm -> flags
    "accuracy": {"GRPO": f"--method grpo {OFTEN}"},
    "methods": {name: f"--method {name} {OFTEN}" for name in ("grpo", "dr_grpo", "dapo", "gspo", "gdpo")},
    "gdpo": {
        "GRPO": ALL,
        "GDPO": f"{ALL} {GDPO}",
        "GRPO without deviation": f"{ALL} --scale-rewards none",
        "GRPO, weights 1 5 5": f"{ALL} --reward-weights 1 5 5",
    },
    "equal": {"GRPO": EQUAL, "GDPO": f"{EQUAL} {GDPO}", "GRPO without deviation": f"{EQUAL} --scale-rewards none"},
    "conditions": {
        "plain": f"{EQUAL} {GDPO} --reward-weights 1 2 2",
        "conditioned": f"{EQUAL} {GDPO} --reward-weights 1 2 2 --condition format:exact>=1 length:exact>=1",
    },
    "hacking": {
        "format + length, beta 0": f"{HACK} --rewards format length --beta 0",
        "format + length, beta 0.1": f"{HACK} --rewards format length --beta 0.1",
        "digits do not fall, beta 0": f"{HACK} --rewards rising --beta 0",
        "digits do not fall, beta 0.1": f"{HACK} --rewards rising --beta 0.1",
    },
}
PANELS = {  # of each figure; see read_run
    "accuracy": ("accuracy", "accuracy, greedy", "pass@8"),
    "methods": ("accuracy", "accuracy, greedy", "tokens per completion"),
    "gdpo": ("right format", "right answer", "short enough"),
    "equal": ("right format", "right answer", "short enough"),
    "conditions": ("right answer", "right format", "short enough"),
    "hacking": ("reward", "accuracy", "KL from the start"),
}


def name_of(flags: str, seed: int) -> str:
    """The name of a run: other flags are another run."""
    return f"{re.sub('[^A-Za-z0-9.]+', '_', flags).strip('_')}__{seed}"


def run_script(flags: str, seed: int, runs: Path) -> Path:
    """A finished run with these flags and seed; says what is started, and ends the program where a run fails."""
    run = runs / name_of(flags, seed)
    if (run / "summary.json").exists() and json.loads((run / "summary.json").read_text())["status"] == "completed":
        print(f"kept: {run}", flush=True)
        return run
    start = f"--runs-dir {runs} --run-name {run.name} --seed {seed} --num-threads 1 {flags}"
    flags = ["--resume", str(run)] if (run / "checkpoints").exists() else start.split()
    print(shlex.join(["python", "grpo_toy.py", *flags]), flush=True)
    script = [sys.executable, str(ROOT / "grpo_toy.py"), *flags]
    done = subprocess.run(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{run.name}: {done.stderr.strip()}")
    return run


def read_run(run: Path) -> list[dict[str, float]]:
    """What the figures and tables need of each iteration; what was not measured in one is missing."""
    names = {
        "global_step": "step",
        "reward": "reward",
        "completions/mean_length": "tokens per completion",
        "kl/k1": "KL from the start",
    }
    names |= {"eval/accuracy": "accuracy", "eval/accuracy_greedy": "accuracy, greedy", "eval/pass@8": "pass@8"}
    names |= {"rewards/exact/mean": "right answer", "rewards/format/mean": "right format"}
    names |= {"rewards/length/mean": "short enough", "eval/format": "right format, held out"}
    with open(run / "progress.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    series = [{names[key]: value for key, value in row.items() if key in names} for row in rows]
    for point, row in zip(series, rows):
        if "rewards/correct/mean" in row:
            point["right answer"] = (row["rewards/correct/mean"] + 3) / 6
    return series


def first(series: list[dict[str, float]], name: str, threshold: float) -> float | None:
    """The first iteration in which something is that high."""
    return next((point["step"] for point in series if point.get(name, -1.0) >= threshold), None)


def print_table(lesson: str, results: dict[str, list[list[dict[str, float]]]]) -> None:
    """A line per arm, a number per seed: iterations to a share, or what came out at the end."""
    for arm, seeds in results.items():
        if lesson in ("gdpo", "equal", "conditions"):
            goals = {"90% right format": ("right format", 0.9), "80% right answers": ("right answer", 0.8)}
            found = {f"iterations to {goal}": [first(series, *at) for series in seeds] for goal, at in goals.items()}
            cells = {name: ["never" if step is None else f"{step:g}" for step in row] for name, row in found.items()}
        else:
            found = {name: [[p[name] for p in s if name in p] for s in seeds] for name in PANELS[lesson]}
            cells = {name: [f"{y[0]:.3f} -> {y[-1]:.3f}" for y in row] for name, row in found.items()}
        print(f"{arm}: " + "; ".join(f"{name} {', '.join(row)}" for name, row in cells.items()))


def print_collapse() -> None:
    """Lesson 5, from the function that the script trains with."""
    sys.path.insert(0, str(ROOT))
    from grpo_toy import group_advantages

    print("two completions, two rewards each            GRPO            GRPO without deviation  GDPO")
    groups = {"(0, 1)": [[0, 0], [1, 0]], "(0, 2)": [[0, 0], [1, 1]]}
    both = torch.tensor(list(groups.values()), dtype=torch.float32)
    settings = [("sum_then_normalize", "group"), ("sum_then_normalize", "none"), ("normalize_then_sum", "group")]
    columns = [group_advantages(both, torch.ones(2), *setting) for setting in settings]
    for i, (name, rewards) in enumerate(groups.items()):
        cells = "".join(f"{f'{low:+.3f} {high:+.3f}':24}" for low, high in (column[i].tolist() for column in columns))
        print(f"{' and '.join(map(str, rewards)):20} sums {name:14} {cells}")


def draw(lesson: str, results: dict[str, list[list[dict[str, float]]]], out: Path) -> None:
    """A panel per quantity: a thin line per seed, and the mean."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, name in zip(axes, PANELS[lesson]):
        for (arm, seeds), color in zip(results.items(), PALETTE):
            curves = [[(point["step"], point[name]) for point in series if name in point] for series in seeds]
            for curve in curves:
                axis.plot(*zip(*curve), color=color, alpha=0.3, linewidth=0.8)
            steps = [step for step, _ in curves[0]]
            axis.plot(steps, [mean(v) for v in zip(*([y for _, y in c] for c in curves))], color=color, label=arm)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"iterations ({len(seeds)} seeds)")
        axis.grid(alpha=0.25)
        if name not in ("tokens per completion", "KL from the start", "reward"):
            axis.set_ylim(-0.03, 1.03)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(results), fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", choices=[*LESSONS, "collapse"])
    parser.add_argument("--seeds", type=int, help="how many (default: 3; accuracy: 5)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="figure and table without their endings")
    asked = parser.parse_args()
    if asked.lesson == "collapse":
        return print_collapse()
    seeds = range(1, 1 + ((5 if asked.lesson == "accuracy" else 3) if asked.seeds is None else asked.seeds))
    if not seeds:
        parser.error("--seeds must be 1 or more")
    out = asked.out or ROOT / "benchmarks" / "results" / f"grpo_{asked.lesson}"
    out.parent.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor(2) as pool:
        trained = {}
        if asked.lesson == "hacking":  # the model that is to hack is the one that the first lesson trained
            jobs = [pool.submit(run_script, LESSONS["accuracy"]["GRPO"], seed, asked.runs_dir) for seed in seeds]
            trained = {seed: job.result() for seed, job in zip(seeds, jobs)}
        futures = {arm: [] for arm in LESSONS[asked.lesson]}
        for seed in seeds:
            for arm, flags in LESSONS[asked.lesson].items():
                futures[arm].append(
                    pool.submit(run_script, flags.format(trained=trained.get(seed)), seed, asked.runs_dir)
                )
        try:
            results = {arm: [read_run(future.result()) for future in row] for arm, row in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print_table(asked.lesson, results)
    draw(asked.lesson, results, out)
    names = dict.fromkeys(name for row in results.values() for series in row for point in series for name in point)
    with open(out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", "seed", *names])
        writer.writeheader()
        for arm, row in results.items():
            for seed, series in zip(seeds, row):
                rounded = ({name: round(value, 4) for name, value in point.items()} for point in series)
                writer.writerows({"arm": arm, "seed": seed} | point for point in rounded)


if __name__ == "__main__":
    main()
