"""Reads run directories for report and check, and takes what is damaged for what it is: said, left out, never fatal."""

import csv
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.jobs import UsageError, read_json

# arguments that do not make another algorithm of a script
SECONDARY = "seed runs_dir run_name resume evaluate capture_video checkpoint_interval track wandb_project_name"
SECONDARY += " wandb_entity device num_threads compile bf16 env_id exp_name eval_episodes eval_seed eval_stochastic"
ORDER = ("ppo", "trpo", "a2c", "reinforce", "sb3:ppo", "sb3:trpo", "sb3:a2c", "random")  # in tables and figures


@dataclass
class Run:
    """One run directory: what it is, how it ended, and its training episodes in the order in which they ended."""

    path: Path
    env_id: str
    algo: str
    """exp_name, with the arguments in which runs of one name differ"""
    seed: int
    status: str
    """completed, interrupted, diverged, failed, unfinished: no summary.json, so killed or still running, or damaged:
    completed, but its files do not agree"""
    config: dict[str, Any] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    steps: np.ndarray = field(repr=False)
    seconds: np.ndarray = field(repr=False)
    returns: np.ndarray = field(repr=False)

    @property
    def budget(self) -> int:
        """Environment steps that were asked for."""
        return int(self.config["args"].get("total_timesteps") or 0)

    @property
    def done(self) -> bool:
        return self.status == "completed"

    def evaluation(self, kind: str) -> float:
        """Mean return of the evaluation of the last policy, "deterministic" or "stochastic"; nan if there is none."""
        return float(((self.summary.get("eval") or {}).get(kind) or {}).get("mean", np.nan))

    @property
    def train_last100(self) -> float:
        """Mean return of the last 100 training episodes; nan if none has ended."""
        return float(self.returns[-100:].mean()) if len(self.returns) else np.nan


def read_episodes(path: Path) -> tuple[np.ndarray, int]:
    """(rows of step, seconds, return and length as float (episodes, 4), number of rows that cannot be read)."""
    rows, damaged = [], 0
    with open(path, newline="", errors="replace") as file:
        for row in csv.reader(line.replace("\0", "?") for line in file):
            if row[:1] == ["global_step"] or not row:
                continue
            try:
                step, seconds, ret, length = map(float, row)
                rows.append((step, seconds, ret, length))
            except ValueError:
                damaged += 1
    return np.array(rows, dtype=float).reshape(-1, 4), damaged


def read_run(path: Path) -> tuple[Run | None, str]:
    """A run directory, or None, and a sentence about what is wrong with it, or ""."""
    try:
        return read_run_directory(path)
    except (ValueError, TypeError, AttributeError) as error:
        return None, f"{path} has a value that makes no sense ({error}); left out."


def read_run_directory(path: Path) -> tuple[Run | None, str]:
    """As read_run; raises ValueError, TypeError or AttributeError where a JSON file holds what it should not."""
    config = read_json(path / "config.json")
    arguments = config.get("args")
    if not isinstance(arguments, dict):
        return None, f"{path} has no readable config.json; left out."
    if not isinstance(arguments.get("env_id"), str) or "seed" not in arguments:
        return None, f"{path} is no run in an environment; left out."
    summary = read_json(path / "summary.json")
    status, problem = str(summary.get("status", "unfinished")), ""
    if not summary and (path / "summary.json").exists():
        problem = f"{path} has a damaged summary.json and counts as unfinished."
    try:
        rows, damaged = read_episodes(path / "episodes.csv")
    except OSError:
        return None, f"{path} has no episodes.csv; left out."
    if damaged:
        problem = f"{path}: {damaged} rows of episodes.csv cannot be read and are left out."
    if (np.diff(rows[:, 0]) < 0).any():
        problem, rows = (
            f"{path}: episodes.csv is out of order and was sorted.",
            rows[np.argsort(rows[:, 0], kind="stable")],
        )
    run = Run(
        path=path,
        env_id=arguments["env_id"],
        algo=str(arguments.get("exp_name") or "?"),
        seed=int(arguments["seed"]),
        status=status,
        config=config,
        summary=summary,
        steps=rows[:, 0],
        seconds=np.maximum.accumulate(rows[:, 1]),
        returns=rows[:, 2],
    )
    score, budget = summary.get("train_last100"), run.budget  # raises here, if ever
    if run.done and score is not None and not np.isclose(run.train_last100, score, rtol=1e-3):
        run.status = "damaged"
        found = f"{run.train_last100:,.2f}" if len(run.returns) else "no episode"
        problem = f"{path}: summary.json says train_last100 {score}, episodes.csv has {found}; it is in no score."
    elif run.done and not len(run.returns):
        problem = f"{path} completed without a finished episode."
    elif status in ("failed", "diverged"):
        problem = f"{path} {status}: {summary.get('error', 'no reason given')}"
    elif not run.done:
        reached = int(summary.get("global_step") or (run.steps[-1] if len(run.steps) else 0))
        problem = problem or f"{path} is {status}, at step {reached:,} of {budget:,}."
    return run, problem


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories that the paths are, or that lie one or two folders below them; raises UsageError."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; give run directories, or folders of them.")
        if (path / "config.json").exists():
            found.append(path)
            continue
        marks = ("config.json", "summary.json", "episodes.csv")
        below = {file.parent for mark in marks for depth in ("*", "*/*") for file in path.glob(f"{depth}/{mark}")}
        found += sorted(below)
    if not found:
        raise UsageError(f"there is no run directory in {', '.join(map(str, paths))}.")
    return list(dict.fromkeys(found))


def read_runs(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """All runs below the paths, and a sentence about each that is damaged, unfinished, failed or doubled.

    Runs of one name in one environment that differ in an argument are told apart by it: "ppo, learning_rate=0.001".
    Of two runs with the same environment, algorithm and seed the one counts that suite.json names, or the later one.
    """
    runs, problems, found = [], [], find_runs(paths)
    notes = [read_json(folder / "suite.json") for folder in {path.parent for path in found}]
    named = {cell.get("name") for note in notes for cell in note.get("cells", [])}
    for path in found:
        run, problem = read_run(path)
        runs += [run] if run else []
        problems += [problem] if problem else []
    for group in group_by(runs, "env_id", "algo").values():
        tell_apart(group)
    kept, older = [], []
    for group in group_by(runs, "env_id", "algo", "seed").values():
        *others, last = sorted(
            group, key=lambda run: (run.path.name in named, (run.path / "config.json").stat().st_mtime)
        )
        kept.append(last)
        older += [run.path.name for run in others]
    if older:  # of another script text, other flags of the machine, or started twice by hand
        problems.append(f"Left out, because another run is the same cell and was asked for later: {', '.join(older)}.")
    kept.sort(key=lambda run: (run.env_id, run.algo, run.seed))
    return kept, problems


def rank(algo: str) -> tuple[int, str]:
    """What to sort algorithms by: the known ones in their order, each followed by its variants, then all others."""
    name = algo.split(",")[0]
    return ORDER.index(name) if name in ORDER else len(ORDER), algo


def group_by(runs: list[Run], *names: str) -> dict[tuple, list[Run]]:
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(getattr(run, name) for name in names)].append(run)
    return dict(groups)


def tell_apart(group: list[Run]) -> None:
    """Adds to the names of the runs the arguments in which they differ from most of the group."""

    def identity(run: Run) -> tuple:
        arguments = run.config["args"]
        return tuple(sorted((name, str(value)) for name, value in arguments.items() if name not in SECONDARY.split()))

    count = Counter(map(identity, group))
    usual = dict(count.most_common(1)[0][0])
    for run in group:
        changed = [f"{name}={value}" for name, value in identity(run) if usual.get(name) != value]
        run.algo = ", ".join([run.algo, *changed])
