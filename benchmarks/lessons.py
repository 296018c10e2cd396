"""What the scripts teach, one command a lesson: python -m benchmarks.lessons LESSON [--seeds N] [--out FILE]

    variance     reinforce.py: the variance of the gradient with each pair of --returns and --baseline
    async        a3c.py against a2c.py on the same two cores, against steps and against seconds: CartPole
    async-breakout    the same: Breakout
    accuracy     grpo_toy.py: GRPO against the verifier
    methods      every --method, with its defaults
    gdpo         GDPO against GRPO, rewards of unequal scale
    equal        the same rewards on one scale
    conditions   easy rewards with and without a condition
    hacking      two proxies, beta 0 and 0.1
    collapse     the advantages of (0, 1) and of (0, 2), printed by group_advantages
    scores       rlhf_toy.py: what the reward model says and what is true, beta 0, 0.05 and 0.2
    road         RLHF-PPO, GRPO, RLOO and best-of-n against the verifier, by completions sampled
    margins      dpo_toy.py: the log-probabilities of both answers while their margin rises
    preferences  every --loss and several beta, from a weak and from the default warm start
    offline      preferences offline against GRPO online, by tokens sampled

Starts the runs, one thread each, two at a time. Those of the lessons async run one at a time, for each has both cores.
A run is known by the script's text, its flags and its seed: a complete one is kept, one that was cut off goes on.
Prints a table, and writes FILE.png and FILE.csv (default: benchmarks/results/SCRIPT_LESSON).
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import comb
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.figures import OTHERS, PALETTE, plt
from benchmarks.jobs import ROOT, Job, as_flags, out_of_range
from benchmarks.run import Options, run_all

Flags = dict[str, Any]
Series = list[dict[str, float]]  # a run: what was measured in each iteration
Results = dict[str, list[Series]]  # by arm, one for each seed


@dataclass(frozen=True)
class Lesson:
    arms: dict[str, Flags]
    """flags of each arm; the key "script" replaces the lesson's script, and "num-threads" the one thread"""
    panels: tuple[str, ...]
    """columns of read_run, drawn over iterations, or over x where one is written "y against x" """
    goals: bool = False
    """whether the table has the iterations to the GOALS, and not the first and last values of the panels"""
    seeds: int = 3
    at_a_time: int = 2
    """runs"""
    script: str = "grpo_toy"
    env_id: str = ""
    model_of: str = ""
    """the lesson whose first arm has trained the models that the runs begin with, seed by seed"""
    best_of_n: str = ""
    """the arm whose warm starts also answer many times, and are judged by the best answer"""


OFTEN = {"eval-interval": 2}
SLOWLY = {"learning-rate": 2e-4, "max-steps": 100}  # a quarter of the default, which sets the arms further apart
ALL = SLOWLY | {"rewards": ["correct", "format", "length"]}
EQUAL = SLOWLY | {"rewards": ["exact", "format", "length"]}
GDPO = {"multi-objective-aggregation": "normalize_then_sum"}
RAW = {"num-envs": 32, "norm-reward": False}  # so that the variance is that of a gradient of plain rewards
NO_DEVIATION = {"scale-rewards": "none"}
WEIGHTED = EQUAL | GDPO | {"reward-weights": [1, 2, 2]}
PROXY = {"max-steps": 120, "rewards": ["format", "length"]}
RISING = {"max-steps": 120, "rewards": "rising"}
BETAS = (0.0, 0.05, 0.2)
METHODS = ("grpo", "dr_grpo", "dapo", "gspo", "gdpo", "rloo", "cispo", "sapo", "reinforce_pp")
LOSSES = ("dpo", "ipo", "kto", "orpo")
QUARTER = {"num-prompts": 1024}  # of the default, which sets the losses further apart
WARM_STARTS = {"weak": 140, "default": 300}  # steps of --sft-steps
FIVE = {"num-steps": 5, "total-timesteps": 300_000}
BREAKOUT = {"num-steps": 5, "total-timesteps": 1_000_000, "learning-rate": 5e-4}
RACE = ("return of the last 100 episodes", "return of the last 100 episodes against seconds")
SHARES = ("right format", "right answer", "short enough")
LESSONS = {
    "variance": Lesson(
        {
            f"{returns}, {baseline}": RAW | {"returns": returns, "baseline": baseline, "total-timesteps": 300_000}
            for returns, baseline in product(("full", "to-go"), ("none", "mean", "value"))
        },
        panels=("variance of the gradient", "its signal-to-noise ratio", "return"),
        seeds=2,
        script="reinforce",
        env_id="CartPole-v1",
    ),
    "async": Lesson(
        {
            "A2C, 8 environments": FIVE | {"script": "a2c", "num-envs": 8},
            "A3C, 2 workers of 4": FIVE | {"num-workers": 2, "num-envs": 4},
            "A3C, 8 workers": FIVE | {"num-workers": 8, "num-envs": 1},
            "A3C, 8 workers, 20 steps": FIVE | {"num-workers": 8, "num-envs": 1, "num-steps": 20},
        },
        panels=RACE,
        at_a_time=1,
        script="a3c",
        env_id="CartPole-v1",
    ),
    "async-breakout": Lesson(
        {
            "A2C, 16 environments": BREAKOUT | {"script": "a2c", "num-envs": 16, "num-threads": 2},
            "A3C, 2 workers of 8": BREAKOUT | {"num-workers": 2, "num-envs": 8},
            "A3C, 16 workers, 20 steps": BREAKOUT
            | {"num-workers": 16, "num-envs": 1, "num-steps": 20, "learning-rate": 1e-4},
        },
        panels=RACE,
        at_a_time=1,
        script="a3c",
        env_id="BreakoutNoFrameskip-v4",
    ),
    "accuracy": Lesson(
        {"GRPO": OFTEN | {"method": "grpo"}}, panels=("accuracy", "accuracy, greedy", "pass@8"), seeds=5
    ),
    "methods": Lesson(
        {name: OFTEN | {"method": name} for name in METHODS},
        panels=("accuracy", "accuracy, greedy", "tokens per completion"),
    ),
    "gdpo": Lesson(
        {
            "GRPO": ALL,
            "GDPO": ALL | GDPO,
            "GRPO without deviation": ALL | NO_DEVIATION,
            "GRPO, weights 1 5 5": ALL | {"reward-weights": [1, 5, 5]},
        },
        panels=SHARES,
        goals=True,
    ),
    "equal": Lesson(
        {"GRPO": EQUAL, "GDPO": EQUAL | GDPO, "GRPO without deviation": EQUAL | NO_DEVIATION}, panels=SHARES, goals=True
    ),
    "conditions": Lesson(
        {"plain": WEIGHTED, "conditioned": WEIGHTED | {"condition": ["format:exact>=1", "length:exact>=1"]}},
        panels=("right answer", "right format", "short enough"),
        goals=True,
    ),
    "hacking": Lesson(
        {
            "format + length, beta 0": PROXY | {"beta": 0},
            "format + length, beta 0.1": PROXY | {"beta": 0.1},
            "digits do not fall, beta 0": RISING | {"beta": 0},
            "digits do not fall, beta 0.1": RISING | {"beta": 0.1},
        },
        panels=("reward", "accuracy", "KL from the start"),
        model_of="accuracy",
    ),
    "scores": Lesson(
        {f"beta {beta:g}": OFTEN | {"reward": "model", "beta": beta} for beta in BETAS},
        panels=("score", "accuracy", "KL of a completion", "accuracy against root of the KL"),
        script="rlhf_toy",
    ),
    "road": Lesson(
        {
            "RLHF-PPO": OFTEN | {"reward": "verifier"},
            "GRPO": OFTEN | {"script": "grpo_toy", "method": "grpo"},
            "RLOO": OFTEN | {"script": "grpo_toy", "method": "rloo"},
        },
        panels=("accuracy against completions sampled", "accuracy against seconds", "accuracy, greedy"),
        script="rlhf_toy",
        best_of_n="RLHF-PPO",
    ),
    "margins": Lesson(
        {f"beta {beta:g}": {"loss": "dpo", "beta": beta} for beta in (0.03, 0.1, 0.3, 1.0)},
        panels=("log-probability of the chosen", "log-probability of the rejected", "margin", "accuracy"),
        script="dpo_toy",
    ),
    "preferences": Lesson(
        {
            f"{loss}, beta {beta:g}, {start} start": QUARTER
            | {"loss": loss, "beta": beta, "sft-steps": WARM_STARTS[start]}
            for start in WARM_STARTS
            for loss, beta in (*product(LOSSES, (0.1, 0.5, 2.0)), ("sft", 1.0))
        },
        panels=("accuracy", "accuracy, greedy"),
        script="dpo_toy",
    ),
    "offline": Lesson(
        {
            f"{loss}, {prompts} prompts": {"loss": loss, "num-prompts": prompts}
            for loss, prompts in product(("dpo", "sft"), (256, 1024, 4096))
        }
        | {"grpo": OFTEN | {"script": "grpo_toy", "method": "grpo"}},
        panels=("accuracy", "accuracy, greedy"),
        script="dpo_toy",
    ),
}
GOALS = {"90% right format": ("right format", 0.9), "80% right answers": ("right answer", 0.8)}
COLUMNS = {  # of progress.csv
    "global_step": "step",
    "reward": "reward",
    "completions/mean_length": "tokens per completion",
    "kl/k1": "KL from the start",
    "objective/scores": "score",
    "objective/kl": "KL of a completion",
    "logps/chosen": "log-probability of the chosen",
    "logps/rejected": "log-probability of the rejected",
    "rewards/margins": "margin",
    "wall_time": "seconds",
    "eval/accuracy": "accuracy",
    "eval/accuracy_greedy": "accuracy, greedy",
    "eval/pass@8": "pass@8",
    "eval/format": "right format, held out",
    "rewards/exact/mean": "right answer",
    "rewards/correct/mean": "right answer",  # pays -3 or 3, see read_run
    "rewards/format/mean": "right format",
    "rewards/length/mean": "short enough",
    "losses/grad_variance": "variance of the gradient",
    "losses/grad_snr": "its signal-to-noise ratio",
    "charts/episodic_return": "return",
    "charts/train_last100": "return of the last 100 episodes",
}
BOUNDED = {*SHARES, "accuracy", "accuracy, greedy", "pass@8", "right format, held out"}  # between 0 and 1
EDGES = (15, 20, 30, 45, 70, 100, 150, 220, 300, 400, 475)  # of mean returns; at 500 all arms are equal
BASELINES = {"none": PALETTE[1], "mean": PALETTE[2], "value": PALETTE[0]}


# --------------------------------------------------------------------------------------------------------- runs
def jobs_of(lesson: Lesson, seeds: Iterable[int], runs_dir: Path) -> dict[str, list[Job]]:
    """The runs of each arm. Arms of two lessons that have the same flags share their runs."""
    jobs: dict[str, list[Job]] = {arm: [] for arm in lesson.arms}
    for seed in seeds:
        models: Flags = {}
        if lesson.model_of:
            (trained, *_) = jobs_of(LESSONS[lesson.model_of], [seed], runs_dir).values()
            models = {"init-from": runs_dir / trained[0].name}
        for arm, flags in lesson.arms.items():
            path = ROOT / f"{flags.get('script', lesson.script)}.py"
            threads = flags.get("num-threads", 1)
            flags = {name: value for name, value in flags.items() if name not in ("script", "num-threads")}
            jobs[arm].append(
                Job(
                    algo=" ".join(as_flags(flags)).replace("--", ""),
                    command=(sys.executable, str(path)),
                    text=path.read_text(encoding="utf-8"),
                    env_id=lesson.env_id,
                    seed=seed,
                    flags=as_flags(flags | models),
                    eval_episodes=0,
                    threads=threads,
                )
            )
    return jobs


def run_lesson(lesson: Lesson, seeds: Iterable[int], runs_dir: Path) -> tuple[int, Results]:
    """The exit status, and what was measured; runs what is not done yet."""
    if lesson.model_of:
        status, _ = run_lesson(LESSONS[lesson.model_of], seeds, runs_dir)
        if status:
            return status, {}
    jobs = jobs_of(lesson, seeds, runs_dir)
    by_seed = [job for row in zip(*jobs.values()) for job in row]
    if status := run_all(by_seed, runs_dir, Options(suite=lesson.script, workers=lesson.at_a_time, retry=True)):
        return status, {}
    results = {arm: [read_run(runs_dir / job.name) for job in row] for arm, row in jobs.items()}
    if lesson.best_of_n:
        results["best of n"] = [best_of_n(runs_dir / job.name) for job in jobs[lesson.best_of_n]]
    return 0, results


def read_run(run: Path) -> Series:
    """COLUMNS of each iteration, under their names there; what was not measured in one is missing.

    With them come the completions that were sampled in training until then, and all tokens that were sampled.
    """
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lengths: dict[float, list[int]] = {}
    with open(run / "episodes.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            lengths.setdefault(float(row["global_step"]), []).append(int(float(row["length"])))
    series, completions, tokens = [], 0, summary.get("tokens_sampled", 0)
    with open(run / "progress.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            point = {COLUMNS[name]: float(value) for name, value in row.items() if value and name in COLUMNS}
            if row.get("rewards/correct/mean"):
                point["right answer"] = (point["right answer"] + 3) / 6
            completions += len(lengths.get(point["step"], []))
            tokens += sum(lengths.get(point["step"], []))
            point |= {"completions sampled": completions, "tokens sampled": tokens}
            if "KL of a completion" in point:
                point["root of the KL"] = max(point["KL of a completion"], 0) ** 0.5
            series.append(point)
    return series


def best_of_n(run: Path, most: int = 128) -> Series:
    """Accuracy if the verifier picks the best of n answers of a run's warm start, n = 1, 2, 4 ... most, per held-out
    prompt. All n are counted as sampled. Each point is the mean over all choices of n among most answers.
    """
    import rlhf_toy as toy

    args = toy.read_config(run)[0]
    model, rng = toy.GPT(args), toy.Rng(toy.EVAL_SEED, "cpu")
    model.load_state_dict(toy.load_checkpoint(run)["reference"])
    prompts = toy.sample_prompts(args.eval_prompts, args.num_digits, rng, held_out=True)
    answers = toy.generate(model, toy.encode_prompts(prompts, "cpu"), most, rng, args)
    texts = toy.decode(answers, toy.completion_mask(answers))
    wrong = [
        sum(not toy.is_right(prompt, text) for text in texts[i * most :][:most]) for i, prompt in enumerate(prompts)
    ]
    return [
        {
            "step": n,
            "completions sampled": n * len(prompts),
            "accuracy": mean(1 - comb(count, n) / comb(most, n) for count in wrong),
        }
        for n in (2**k for k in range(most.bit_length()))
    ]


# ------------------------------------------------------------------------------------------- the language scripts
def first(series: Series, name: str, threshold: float) -> float | None:
    """The first iteration in which something is that high."""
    return next((point["step"] for point in series if point.get(name, -1.0) >= threshold), None)


def print_table(lesson: Lesson, results: Results) -> None:
    """A line per arm, a number per seed: iterations to a share, or what came out at the end."""
    for arm, seeds in results.items():
        cells: dict[str, list[str]] = {}
        if lesson.goals:
            for goal, (name, threshold) in GOALS.items():
                steps = [first(series, name, threshold) for series in seeds]
                cells[f"iterations to {goal}"] = ["never" if step is None else f"{step:g}" for step in steps]
        else:
            for name in dict.fromkeys(panel.partition(" against ")[0] for panel in lesson.panels):
                curves = [[point[name] for point in series if name in point] for series in seeds]
                cells[name] = [f"{values[0]:.3f} -> {values[-1]:.3f}" for values in curves if values]
        print(f"{arm}: " + "; ".join(f"{name} {', '.join(row)}" for name, row in cells.items()))


def draw_curves(lesson: Lesson, results: Results, figure: Any, axes: np.ndarray) -> None:
    """A panel per quantity: a thin line per seed, and the mean at equal iterations."""
    for axis, panel in zip(axes, lesson.panels):
        name, _, x = panel.partition(" against ")
        x = x or "step"
        for (arm, seeds), color in zip(results.items(), (*PALETTE, *OTHERS[1:])):
            curves = [
                {point["step"]: (point[x], point[name]) for point in series if name in point and x in point}
                for series in seeds
            ]
            common = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not common:
                continue
            for curve in curves:
                axis.plot(*zip(*curve.values()), color=color, alpha=0.3, linewidth=0.8)
            means = np.mean([[curve[step] for step in common] for curve in curves], 0)
            axis.plot(*means.T, color=color, label=arm)
        unit = "steps" if lesson.env_id else "iterations"
        axis.set_xlabel(f"{unit if x == 'step' else x} ({len(seeds)} seeds)")
        axis.locator_params(axis="x", nbins=5)
        if name in BOUNDED:
            axis.set_ylim(-0.03, 1.03)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(results), 5), fontsize=8
    )


def draw_preferences(lesson: Lesson, results: Results, figure: Any, axes: np.ndarray) -> None:
    """Accuracy at the end against beta, a panel for each warm start; fine-tuning on the chosen is a dashed line."""
    for axis, (start, steps) in zip(axes, WARM_STARTS.items()):
        for loss, color in zip((*LOSSES, "sft"), PALETTE):
            arms = [arm for arm, flags in lesson.arms.items() if flags["loss"] == loss and flags["sft-steps"] == steps]
            betas = [lesson.arms[arm]["beta"] for arm in arms]
            ends = np.array([[series[-1]["accuracy"] for series in results[arm]] for arm in arms])
            if loss == "sft":
                axis.axhline(ends.mean(), color=color, linestyle="--", label=loss)
                continue
            axis.plot(betas, ends.mean(1), color=color, marker="o", label=loss)
            axis.plot(betas, ends, color=color, marker=".", linestyle="", alpha=0.4)
        before = np.mean([series[0]["accuracy"] for arm in arms for series in results[arm]])
        axis.axhline(before, color="#888888", linestyle=":", label="before")
        axis.set(title=f"{start} warm start ({steps} steps)", xscale="log", xlabel="beta", ylabel="accuracy")
        axis.set_ylim(-0.03, 1.03)
        axis.set_xticks((0.1, 0.5, 2.0), labels=["0.1", "0.5", "2"])
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)


def draw_offline(lesson: Lesson, results: Results, figure: Any, axes: np.ndarray) -> None:
    """The end of the offline runs, a point for each number of prompts, beside the curves of the online ones."""
    for axis, name in zip(axes, lesson.panels):
        ends: dict[str, list[list[tuple[float, float]]]] = {}
        for arm, seeds in results.items():
            curves = [[(point["tokens sampled"], point[name]) for point in series if name in point] for series in seeds]
            if "loss" in lesson.arms[arm]:
                ends.setdefault(lesson.arms[arm]["loss"], []).append([curve[-1] for curve in curves])
                continue
            for curve in curves:
                axis.plot(*zip(*curve), color=PALETTE[0], alpha=0.3, linewidth=0.8)
            axis.plot(*np.mean(list(zip(*curves)), 1).T, color=PALETTE[0], label=f"{arm}, online")
        for (loss, points), color in zip(ends.items(), PALETTE[1:]):
            axis.plot(*np.mean(points, 1).T, color=color, marker="o", label=f"{loss}, offline")
            axis.plot(*np.reshape(points, (-1, 2)).T, color=color, marker=".", linestyle="", alpha=0.4)
        axis.set(xlabel="tokens sampled", xscale="log", ylim=(-0.03, 1.03))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


DRAW = {"preferences": draw_preferences, "offline": draw_offline}  # all others are curves


def rows_of(results: Results) -> list[dict[str, Any]]:
    """All that was measured, for the CSV file."""
    rows = []
    for arm, seeds in results.items():
        for seed, series in enumerate(seeds, 1):
            rows += [{"arm": arm, "seed": seed} | {k: round(v, 4) for k, v in point.items()} for point in series]
    return rows


# ------------------------------------------------------------------------------------- variance of reinforce.py
def binned(lesson: Lesson, seeds: list[Series]) -> np.ndarray:
    """Mean return, variance and signal-to-noise ratio, geometric means over the batches of an interval of returns.

    Variances are compared at equal return: they grow with it. Intervals with fewer than three batches are left out.
    """
    variance, ratio, returns = lesson.panels
    rows = np.array([[point[returns], point[variance], point[ratio]] for series in seeds for point in series])
    bins = [rows[(low <= rows[:, 0]) & (rows[:, 0] < high)] for low, high in zip(EDGES, EDGES[1:])]
    return np.array([np.exp(np.log(part).mean(0)) for part in bins if len(part) > 2]).reshape(-1, 3)


def draw_variance(lesson: Lesson, results: Results, axes: np.ndarray) -> list[dict[str, Any]]:
    """Variance and signal-to-noise ratio against the return, and the return against steps; the points, for the CSV."""
    table = []
    for arm, seeds in results.items():
        flags, points = lesson.arms[arm], binned(lesson, seeds)
        style = {"color": BASELINES[flags["baseline"]], "linewidth": 1.8}
        style["linestyle"] = "--" if flags["returns"] == "full" else "-"
        axes[0].plot(points[:, 0], points[:, 1], label=arm, **style)
        axes[1].plot(points[:, 0], points[:, 2], **style)
        curves = [np.array([(point["step"], point["return"]) for point in series]).T for series in seeds]
        grid = np.linspace(max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves), 200)
        axes[2].plot(grid / 1e3, np.mean([np.interp(grid, *curve) for curve in curves], 0), **style)
        names = {"returns": flags["returns"], "baseline": flags["baseline"]}
        table += [names | {"mean_return": x, "variance": v, "snr": s} for x, v, s in points]
        print(f"{arm}: {', '.join(f'{v:,.3g} at return {x:.0f}' for x, v, _ in points)}")
    for axis in axes[:2]:
        axis.set(xscale="log", yscale="log", xlabel="mean return of the batch")
        axis.set_xticks([25, 50, 100, 200, 400], labels=["25", "50", "100", "200", "400"])
        axis.minorticks_off()
    axes[2].set_xlabel("thousand environment steps")
    axes[0].legend(fontsize=8, title="returns, baseline", title_fontsize=8)
    return table


# ----------------------------------------------------------------------------------------------------- collapse
def print_collapse() -> None:
    """The last lesson, from the function that grpo_toy.py trains with."""
    import torch

    from grpo_toy import group_advantages

    print("two completions, two rewards each            GRPO            GRPO without deviation  GDPO")
    groups = {"(0, 1)": [[0, 0], [1, 0]], "(0, 2)": [[0, 0], [1, 1]]}
    both = torch.tensor(list(groups.values()), dtype=torch.float32)
    settings = [("sum_then_normalize", "group"), ("sum_then_normalize", "none"), ("normalize_then_sum", "group")]
    columns = [group_advantages(both, torch.ones(2), *setting) for setting in settings]
    for i, (name, rewards) in enumerate(groups.items()):
        cells = "".join(f"{f'{low:+.3f} {high:+.3f}':24}" for low, high in (column[i].tolist() for column in columns))
        print(f"{' and '.join(map(str, rewards)):20} sums {name:14} {cells}")


# --------------------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 where a run failed, 128 + signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", choices=[*LESSONS, "collapse"])
    parser.add_argument("--seeds", type=int, help="how many (default: 3; variance: 2; accuracy: 5)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/lessons"))
    parser.add_argument("--out", type=Path, help="figure and table without their endings")
    asked = parser.parse_args(argv)
    if asked.lesson == "collapse":
        print_collapse()
        return 0
    lesson = LESSONS[asked.lesson]
    number = lesson.seeds if asked.seeds is None else asked.seeds
    if must := out_of_range("seeds", number, 1):
        parser.error(f"--seeds {must}")
    status, results = run_lesson(lesson, range(1, number + 1), asked.runs_dir)
    if status:
        return status
    count = len(lesson.panels)
    size = (12.6, 3.6) if asked.lesson == "variance" else (11 / 3 * count, 3.2)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained")
    for axis, panel in zip(axes, lesson.panels):
        axis.set_title(panel.partition(" against ")[0], fontsize=10)
        axis.grid(alpha=0.25)
    if asked.lesson == "variance":
        table = draw_variance(lesson, results, axes)
    else:
        print_table(lesson, results)
        DRAW.get(asked.lesson, draw_curves)(lesson, results, figure, axes)
        table = rows_of(results)
    out = asked.out or ROOT / "benchmarks" / "results" / f"{lesson.script.removesuffix('_toy')}_{asked.lesson}"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".png"), dpi=110)
    with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
        writer.writeheader()
        writer.writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
