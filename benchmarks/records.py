"""Reads runs for report and check, from run directories and from what an earlier report has stored of them.

A damaged run is named and left out; it never ends the command.
"""

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stats
from benchmarks.jobs import UsageError, read_json

SECONDARY = (  # arguments that do not make another algorithm of a script
    *("env_id", "exp_name", "seed", "runs_dir", "run_name", "resume", "checkpoint_interval", "capture_video"),
    *("evaluate", "eval_episodes", "eval_seed", "eval_stochastic", "track", "wandb_project_name", "wandb_entity"),
    *("device", "num_threads", "compile", "bf16"),
)
ORDER = ("ppo", "trpo", "a2c", "reinforce", "sb3:ppo", "sb3:trpo", "sb3:a2c", "random")  # in tables and figures
MEASURES = ("train_last100", "train_auc", "eval_deterministic", "eval_stochastic", "sps", "wall_time")
STORED = ", stored"  # ends the name of an algorithm of which there are newer runs, too
ORIGIN = ("commit", "versions", "hardware", "threads")


@dataclass
class Run:
    """A run: what it is, how it ended, its scores and its learning curve."""

    path: Path
    """run directory, or folder of stored results"""
    env_id: str
    algo: str
    """exp_name, with the arguments in which runs of one name differ"""
    seed: int
    status: str
    """completed, interrupted, diverged, failed, unfinished: no summary.json, so killed or still running, or damaged:
    completed, but its files do not agree"""
    budget: int
    """environment steps that were asked for"""
    global_step: int | None
    key: str
    """the harness's hash of script text, environment, seed and flags; "" for a run that was started by hand"""
    scores: dict[str, float] = field(repr=False)
    """MEASURES -> value, nan where there is none. train_last100 is the mean return of the last 100 training episodes,
    train_auc its average over the run, eval_... the mean return of the last policy in the two evaluations"""
    origin: dict[str, str] = field(repr=False)
    """ORIGIN -> text"""
    steps: np.ndarray = field(default_factory=partial(np.empty, 0), repr=False)
    seconds: np.ndarray = field(default_factory=partial(np.empty, 0), repr=False)
    returns: np.ndarray = field(default_factory=partial(np.empty, 0), repr=False)
    """of the training episodes in the order in which they ended; of stored results, the points of the curve"""
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    command: list[str] = field(default_factory=list, repr=False)
    stored: bool = False

    @property
    def done(self) -> bool:
        return self.status == "completed"

    def curve(self, grid: np.ndarray) -> np.ndarray:
        """Mean return of the last 100 training episodes at each step of the grid (points,); nan before the first."""
        if self.stored:  # a hundred points of it
            return np.interp(grid, self.steps, self.returns, left=np.nan)
        return stats.curve_on_grid(self.steps, self.returns, grid)


def read_episodes(path: Path) -> tuple[np.ndarray, int]:
    """(rows of step, seconds, return and length as float (episodes, 4), number of rows that cannot be read)."""
    rows, damaged = [], 0
    with open(path, errors="replace") as file:
        for row in (line.strip().split(",") for line in file):
            if row[0] in ("global_step", ""):
                continue
            try:
                step, seconds, ret, length = map(float, row)
                if not math.isfinite(step + seconds):
                    raise ValueError
                rows.append((step, seconds, ret, length))
            except ValueError:
                damaged += 1
    return np.array(rows, dtype=float).reshape(-1, 4), damaged


def key_of(path: Path) -> str:
    """The key at the end of the name of a run directory that the harness has made; "" for all other names."""
    found = re.search(r"__\d+__([0-9a-f]{10})$", path.name)
    return found[1] if found else ""


def read_run(path: Path) -> tuple[Run | None, str]:
    """A run directory, or None, and a sentence about what is wrong with it, or ""."""
    try:
        return read_run_directory(path)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        return None, f"{path} has a value that makes no sense ({error}); left out."


def read_run_directory(path: Path) -> tuple[Run | None, str]:
    """As read_run; raises ValueError, TypeError or AttributeError where a JSON file holds what it should not."""
    config = read_json(path / "config.json")
    arguments = config.get("args")
    if not isinstance(arguments, dict):
        return None, f"{path} has no readable config.json; left out."
    if not isinstance(arguments.get("env_id"), str) or "seed" not in arguments:
        return None, f"{path} is no run in an environment; left out."
    try:
        rows, damage = read_sorted_episodes(path)
    except OSError:
        return None, f"{path} has no episodes.csv; left out."
    summary = read_json(path / "summary.json")
    if not summary and (path / "summary.json").exists():
        damage = damage or f"{path} has a damaged summary.json and counts as unfinished."
    budget = int(arguments.get("total_timesteps") or 0)
    run = Run(
        path=path,
        env_id=arguments["env_id"],
        algo=str(arguments.get("exp_name") or "?"),
        seed=int(arguments["seed"]),
        status=str(summary.get("status", "unfinished")),
        budget=budget,
        global_step=int(summary["global_step"]) if "global_step" in summary else None,
        key=key_of(path),
        scores=scores_of(rows, summary, budget),
        origin=origin_of(config),
        steps=rows[:, 0],
        seconds=np.maximum.accumulate(rows[:, 1]),
        returns=rows[:, 2],
        arguments=arguments,
        command=[str(part) for part in config.get("command") or []],
    )
    told = summary.get("train_last100")
    if run.done and told is not None and not np.isclose(run.scores["train_last100"], told, rtol=1e-3):
        run.status = "damaged"
    return run, problem_of(run, summary, damage)


def read_sorted_episodes(path: Path) -> tuple[np.ndarray, str]:
    """The rows of a run's episodes.csv as in read_episodes, and a sentence about what is wrong with them, or ""."""
    rows, damaged = read_episodes(path / "episodes.csv")
    if (np.diff(rows[:, 0]) < 0).any():
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return rows, f"{path}: episodes.csv is out of order and was sorted."
    if damaged:
        return rows, f"{path}: {damaged} rows of episodes.csv cannot be read and are left out."
    return rows, ""


def scores_of(rows: np.ndarray, summary: dict[str, Any], budget: int) -> dict[str, float]:
    """MEASURES of a run, nan where there is none."""
    scores = dict.fromkeys(MEASURES, np.nan)
    if len(rows):
        scores["train_last100"] = float(rows[-100:, 2].mean())
        scores["train_auc"] = stats.area_under_curve(rows[:, 0], rows[:, 2], budget)
    evaluations = summary.get("eval") or {}
    for kind in ("deterministic", "stochastic"):
        scores[f"eval_{kind}"] = float((evaluations.get(kind) or {}).get("mean", np.nan))
    for name in ("sps", "wall_time"):
        scores[name] = float(summary.get(name) or np.nan)
    return scores


def origin_of(config: dict[str, Any]) -> dict[str, str]:
    """ORIGIN of a run, from its config.json."""
    commit = (config.get("git_commit") or "unknown")[:10]
    if config.get("git_dirty"):
        commit += " (changed)"
    return {
        "commit": commit,
        "versions": ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items()),
        "hardware": str(config.get("hardware")),
        "threads": str(config.get("threads")),
    }


def problem_of(run: Run, summary: dict[str, Any], damage: str) -> str:
    """What matters most of a run's problems, which may be the damage to its files; "" if there are none."""
    if run.status == "damaged":
        found = f"{run.scores['train_last100']:,.2f}" if len(run.returns) else "no episode"
        told = summary["train_last100"]
        return f"{run.path}: summary.json says train_last100 {told}, episodes.csv has {found}; it is in no score."
    if run.status in ("failed", "diverged"):
        return f"{run.path} {run.status}: {summary.get('error', 'no reason given')}"
    if run.done:
        return damage if len(run.returns) else f"{run.path} completed without a finished episode."
    reached = int(summary.get("global_step") or (run.steps[-1] if len(run.steps) else 0))
    return damage or f"{run.path} is {run.status}, at step {reached:,} of {run.budget:,}."


def read_scores(path: Path) -> list[Run]:
    """The runs of a scores.csv as the report writes it, without curves; raises UsageError with line and column."""
    path = path / "scores.csv" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"there is no {path}; python -m benchmarks report RUNS --out DIR writes one.")

    def steps(text: str) -> int | None:
        return int(text) if text else None

    columns = dict(env_id=str, algo=str, seed=int, status=str, total_timesteps=int, global_step=steps, key=str)
    runs = []
    with open(path, newline="", errors="replace") as file:
        rows = csv.DictReader(file)
        for row in rows:
            name = ""
            try:
                values, scores = {}, {}
                for name, kind in columns.items():
                    values[name] = kind(row[name] if row[name] is not None else "")
                for name in MEASURES:
                    scores[name] = float(row[name] or "nan")
            except (KeyError, ValueError):
                raise UsageError(f"{path}, line {rows.line_num}: {name} is {row.get(name)!r}.") from None
            origin = {name: row.get(name) or "unknown" for name in ORIGIN}
            values["budget"] = values.pop("total_timesteps")
            runs.append(Run(path.parent, **values, scores=scores, origin=origin, stored=True))
    if not runs:
        raise UsageError(f"{path} has no rows.")
    return runs


def read_stored(folder: Path) -> list[Run]:
    """The runs that a report has stored in a folder, with their curves; raises UsageError with file and line."""
    runs, path, points = read_scores(folder), folder / "curves.csv", defaultdict(list)
    if not path.is_file():
        raise UsageError(f"there is no {path}, which belongs to {folder / 'scores.csv'}.")
    with open(path, newline="", errors="replace") as file:
        rows = csv.DictReader(file)
        for row in rows:
            try:
                point = [float(row[name]) for name in ("step", "wall_time", "return_last100")]
                points[row["env_id"], row["algo"], row["seed"]].append(point)
            except (KeyError, ValueError, TypeError):
                raise UsageError(f"{path}, line {rows.line_num} is no point of a curve.") from None
    for run in runs:
        curve = np.array(points[run.env_id, run.algo, str(run.seed)], dtype=float).reshape(-1, 3)
        run.steps, run.seconds, run.returns = curve.T
    return runs


def is_stored(path: Path) -> bool:
    """Whether a folder is what a report has written, and no run directory."""
    return (path / "scores.csv").is_file() and not (path / "config.json").exists()


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories at the paths, or one or two folders below them, and the folders of stored results.

    Raises UsageError where there are none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; give run directories, folders of them, or stored results.")
        if (path / "config.json").exists():
            found.append(path)
            continue
        marks = ("config.json", "summary.json", "episodes.csv")
        below = {file.parent for mark in marks for depth in ("*", "*/*") for file in path.glob(f"{depth}/{mark}")}
        if not below and is_stored(path):
            below = {path}
        found += sorted(below)
    if not found:
        raise UsageError(f"there is no run directory in {', '.join(map(str, paths))}.")
    return list(dict.fromkeys(found))


def read_notes(paths: list[Path]) -> dict[Path, dict[str, Any]]:
    """What `run` has noted in suite.json, by the folders at or below the paths that have one, less what is damaged."""
    kinds = dict(name=str, description=str, commands=list, published=list, normalise=bool, cells=list)
    notes: dict[Path, dict[str, Any]] = {}
    for file in sorted({file for path in paths for depth in ("", "*/") for file in path.glob(f"{depth}suite.json")}):
        note = {name: value for name, value in read_json(file).items() if isinstance(value, kinds.get(name, ()))}
        note["cells"] = [cell for cell in note.get("cells", []) if is_cell(cell)]
        notes[file.parent] = note
    return notes


def is_cell(cell: Any) -> bool:
    """Whether a part of suite.json is a cell as `run` notes it."""
    kinds = dict(env_id=str, algo=str, name=str, seed=int)
    return isinstance(cell, dict) and all(isinstance(cell.get(name), kind) for name, kind in kinds.items())


def read_runs(paths: list[Path]) -> tuple[list[Run], list[str], dict[tuple[str, str], list[int]]]:
    """The runs of the paths, sentences about what is wrong with some, and what is missing.

    A sentence is about runs that are damaged, unfinished, failed or doubled. What is missing is (environment,
    algorithm) -> seeds that `run` was asked for and of which there is no run.

    Runs of one name in one environment that differ in an argument are told apart by it: "ppo, learning_rate=0.001".
    suite.json says which run of a cell was asked for last. Other runs of the harness do not stand in for it, unless a
    path names them. Runs made by hand do if it is missing. Without suite.json the later run of a cell counts.
    """
    found = find_runs(paths)
    asked = {folder / cell["name"]: cell for folder, note in read_notes(paths).items() for cell in note["cells"]}
    runs, problems = read_directories(found, paths, asked)
    missing = missing_seeds(runs, asked)
    for group in group_by(runs, "env_id", "algo").values():
        tell_apart(group)
    kept, older = [], []
    for group in group_by(runs, "env_id", "algo", "seed").values():
        *others, newest = sorted(group, key=lambda run: (run.path in asked, (run.path / "config.json").stat().st_mtime))
        kept.append(newest)
        older += [run.path.name for run in others]
    if older:  # flags of the machine, or started twice by hand
        problems.append(f"Left out, because another run is the same cell and was asked for later: {', '.join(older)}.")
    taken = {run.algo for run in kept} | {cell["algo"] for cell in asked.values()}
    kept += columns_of_stored(filter(is_stored, found), kept, taken)
    kept.sort(key=lambda run: (run.env_id, run.algo, run.seed))
    return kept, problems, missing


def read_directories(
    found: list[Path], named: list[Path], asked: dict[Path, dict[str, Any]]
) -> tuple[list[Run], list[str]]:
    """The runs of the run directories that were found, less those that suite.json has replaced, and the problems."""
    runs, problems, replaced = [], [], []
    last = {(path.parent, path.name.rpartition("__")[0]): path for path in asked}  # a name without its key is a cell
    for path in found:
        if is_stored(path):
            continue
        run, problem = read_run(path)
        newest = last.get((path.parent, path.name.rpartition("__")[0]), path)
        if run and run.key and path != newest and path not in named:
            replaced.append(path.name)
            continue
        if run:
            runs.append(run)
        if problem:
            problems.append(problem)
    if replaced:
        names = ", ".join(replaced[:3])
        if len(replaced) > 3:
            names += f" and {len(replaced) - 3} more"
        problems.append(f"Left out, because another script text or other flags were asked for later: {names}.")
    return runs, problems


def missing_seeds(runs: list[Run], asked: dict[Path, dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """(environment, algorithm) -> seeds that were asked for and of which there is no run, not even one by hand."""
    there = {run.path for run in runs}
    by_hand = {(run.path.parent, run.env_id, run.algo, run.seed) for run in runs if not run.key}
    missing: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path, cell in asked.items():
        env_id, algo, seed = cell["env_id"], cell["algo"], cell["seed"]
        if path not in there and (path.parent, env_id, algo, seed) not in by_hand:
            missing[env_id, algo].append(seed)
    return dict(missing)


def columns_of_stored(folders: Iterable[Path], fresh: list[Run], taken: set[str]) -> list[Run]:
    """The runs of folders of stored results, without cells of which fresh has the very same runs, by name and key.

    An algorithm whose name is taken becomes a column of its own, "ppo, stored": the two are of different script texts
    or flags, and must not be in one mean.
    """
    columns: list[Run] = []

    def identity(run: Run) -> tuple:
        return run.env_id, run.algo.split(",")[0], run.seed, run.key  # the key covers what follows the comma

    for folder in folders:
        same = {identity(run) for run in [*fresh, *columns] if run.done and run.key}
        runs = []
        for cell in group_by(read_stored(folder), "env_id", "algo").values():
            if not all(identity(run) in same for run in cell):
                runs += cell
        taken = taken | {run.algo for run in columns}
        for (algo,), group in sorted(group_by(runs, "algo").items()):
            while algo in taken:
                algo += STORED
            taken.add(algo)
            for run in group:
                run.algo = algo
        columns += runs
    return columns


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
        arguments = run.arguments.items()
        return tuple(sorted((name, str(value)) for name, value in arguments if name not in SECONDARY))

    count = Counter(map(identity, group))
    usual = dict(count.most_common(1)[0][0])
    for run in group:
        changed = [f"{name}={value}" for name, value in identity(run) if usual.get(name) != value]
        run.algo = ", ".join([run.algo, *changed])
