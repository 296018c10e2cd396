"""Reads runs for report and check, from run directories and from what an earlier report has stored of them.

A damaged run is named and left out; it never ends the command.
"""

import contextlib
import csv
import fcntl
import io
import itertools
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stats
from benchmarks.jobs import MOST, UsageError, printable, read_json, shortened
from benchmarks.suite import NOTE_KEYS, damage_of, damage_of_cell

SECONDARY = (  # arguments that do not make another algorithm of a script
    *("env_id", "exp_name", "seed", "runs_dir", "run_name", "resume", "checkpoint_interval", "keep_checkpoints"),
    *("capture_video", "evaluate", "eval_episodes", "eval_seed", "eval_stochastic"),
    *("track", "wandb_project_name", "wandb_entity", "device", "num_threads", "compile", "buffer_in_memory"),
)
ORDER = (  # in tables and figures
    *("ppo", "trpo", "a2c", "a3c", "reinforce", "sac", "sb3:ppo", "sb3:trpo", "sb3:a2c", "sb3:sac", "random"),
)
MEASURES = ("train_last100", "train_auc", "eval_deterministic", "eval_stochastic", "sps", "wall_time")
STORED = ", stored"  # ends the name of an algorithm of which there are newer runs, too
ORIGIN = ("commit", "versions", "hardware", "threads")
LOCK = "lock"  # in a run directory; who trains the run holds a lock on it
NUMBER = (int, float)
LARGEST = 1e150  # a score beyond it is none: its square is infinite
FIELDS = {  # what the JSON files of a run hold, where they hold it
    "config.json": {
        **{"args.seed": NUMBER, "args.total_timesteps": NUMBER, "args.exp_name": (str, *NUMBER)},
        **{"git_commit": str, "versions": dict, "command": list},
    },
    "summary.json": {
        **{"status": str, "error": str, "global_step": NUMBER, "train_last100": NUMBER, "sps": NUMBER},
        **{"wall_time": NUMBER, "eval": dict, "eval.deterministic": dict, "eval.stochastic": dict},
        **{"eval.deterministic.mean": NUMBER, "eval.stochastic.mean": NUMBER},
    },
}


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
    """completed, interrupted, diverged, failed, running: being trained now, unfinished: no summary.json, so killed,
    or damaged: completed, but its files cannot be trusted"""
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
    head, _, rest = path.read_bytes().partition(b"\n")
    lines, rows, damaged = io.BytesIO(rest if head.startswith(b"global_step,") else head + b"\n" + rest), None, 0
    if rest.strip():
        with contextlib.suppress(ValueError):  # a million rows in half a second
            rows = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
    if rows is None or rows.shape[1] != 4:
        rows, damaged = read_slowly(lines)
    finite = np.isfinite(rows[:, 0] + rows[:, 1])
    return rows[finite], damaged + int((~finite).sum())


def read_slowly(file: io.BytesIO) -> tuple[np.ndarray, int]:
    """As read_episodes, row by row."""
    rows, damaged = [], 0
    file.seek(0)
    for line in file.read().decode(errors="replace").splitlines():
        try:
            step, seconds, ret, length = map(float, line.split(","))
            rows.append((step, seconds, ret, length))
        except ValueError:
            damaged += bool(line.strip()) and not line.startswith("global_step,")
    return np.array(rows, dtype=float).reshape(-1, 4), damaged


def key_of(path: Path) -> str:
    """The key at the end of the name of a run directory that the harness has made; "" for all other names."""
    found = re.search(r"__\d+__([0-9a-f]{10})$", path.name)
    return found[1] if found else ""


def read_run(path: Path) -> tuple[Run | None, str]:
    """A run directory, or None, and a sentence about what is wrong with it, or ""."""
    config, summary = read_json(path / "config.json"), read_json(path / "summary.json")
    arguments = config.get("args")
    if not isinstance(arguments, dict):
        return None, f"{path} has no readable config.json; left out."
    if not isinstance(arguments.get("env_id"), str) or arguments.get("seed") is None:
        return None, f"{path} is no run in an environment; left out."
    for name, content in (("config.json", config), ("summary.json", summary)):
        if misfit := misfit_of(content, FIELDS[name]):
            return None, f"{path} has a value that makes no sense ({name}: {misfit}); left out."
    try:
        rows, unreadable = read_episodes(path / "episodes.csv")
        distrust = distrust_of(path, rows, arguments)
    except OSError as error:
        return None, f"{path} has no episodes.csv that can be read ({error.strerror}); left out."
    rows, damage = rows[np.argsort(rows[:, 0], kind="stable")], ""
    if unreadable:
        damage = f"{path}: {unreadable} rows of episodes.csv cannot be read and are left out; the rest counts."
    if not summary and os.path.lexists(path / "summary.json"):
        damage = f"{path} has a damaged summary.json and counts as unfinished."
    budget = int(arguments.get("total_timesteps") or 0)
    run = Run(
        path=path,
        env_id=printable(arguments["env_id"]),
        algo=printable(str(arguments.get("exp_name") or "?")),
        seed=int(arguments["seed"]),
        status=printable(summary.get("status") or "unfinished"),
        budget=budget,
        global_step=int(summary["global_step"]) if summary.get("global_step") is not None else None,
        key=key_of(path),
        scores=scores_of(rows, summary, budget),
        origin=origin_of(config),
        steps=rows[:, 0],
        seconds=np.maximum.accumulate(rows[:, 1]),
        returns=rows[:, 2],
        arguments=arguments,
        command=[str(part) for part in config.get("command") or []],
    )
    if run.done:
        distrust = distrust or disagreement(run, summary)
        run.status = "damaged" if distrust else run.status
    elif is_in_training(path):
        run.status, damage = "running", f"{path} is being trained at this moment; it is in no score."
    if distrust:
        damage = f"{path}: {distrust}; it is in no score."
    return run, problem_of(run, summary, damage)


def misfit_of(content: dict[str, Any], fields: dict[str, Any]) -> str:
    """The first field that is not what it should be, and what it is; "" if there is none. Fields may be missing."""
    for place, kind in fields.items():
        value: Any = content
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        good = value is None or isinstance(value, kind) and not isinstance(value, bool)
        if good and isinstance(value, (int, float)):
            most = MOST["seed"] if key == "seed" else MOST["total_timesteps"]
            good = key not in ("seed", "total_timesteps", "global_step") or 0 <= value <= most
        if not good:
            return f"{place} is {shortened(value)}"
    return ""


def distrust_of(path: Path, rows: np.ndarray, arguments: dict[str, Any]) -> str:
    """Why the files of a run cannot be trusted, or ""; rows are those of episodes.csv. Raises OSError."""
    for name in ("episodes.csv", "progress.csv"):
        if os.path.isfile(path / name) and has_nul(path / name):
            return f"{name} has NUL bytes, so that a part of it is lost"
    if (np.diff(rows[:, 0]) < 0).any():
        return "global_step goes back in episodes.csv, as when two processes write it"
    beside = arguments.get("num_envs", arguments.get("n_envs"))
    ends = np.unique(rows[:, 0], return_counts=True)[1]
    if isinstance(beside, int) and len(ends) and ends.max() > max(beside, 1):
        return "more episodes end in one step of episodes.csv than there are environments: two processes wrote it"
    if os.path.isfile(path / "progress.csv") and (np.diff(read_steps(path / "progress.csv")) <= 0).any():
        return "global_step goes back or repeats in progress.csv, as when two processes write it"
    return ""


def has_nul(path: Path) -> bool:
    with open(path, "rb") as file:
        return any(b"\0" in block for block in iter(lambda: file.read(2**20), b""))


def read_steps(path: Path) -> np.ndarray:
    """The first column of a progress.csv, of whole rows only."""
    with open(path, "rb") as file:
        steps = [line.partition(b",")[0] for line in file if line.endswith(b"\n")]
    return np.array([step for step in steps if step.isdigit() and len(step) < 16], dtype=np.bytes_).astype(np.int64)


def disagreement(run: Run, summary: dict[str, Any]) -> str:
    """In what the summary.json of a completed run differs from its episodes.csv; "" if in nothing."""
    found = run.scores["train_last100"]
    told = summary.get("train_last100", found)
    if told is None and len(run.returns) or told is not None and not np.isclose(found, told, rtol=1e-3, equal_nan=True):
        here = f"{found:,.2f}" if len(run.returns) else "no episode"
        return f"summary.json says train_last100 {told}, episodes.csv has {here}"
    if run.global_step is not None and len(run.steps) and run.steps[-1] > run.global_step:
        return f"summary.json ends at step {run.global_step:,}, episodes.csv at {run.steps[-1]:,.0f}"
    return ""


def is_in_training(path: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        with open(path / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
        return True
    except OSError:  # there is none, or the file system knows no locks
        return False


def scores_of(rows: np.ndarray, summary: dict[str, Any], budget: int) -> dict[str, float]:
    """MEASURES of a run, nan where there is none."""
    scores = dict.fromkeys(MEASURES, np.nan)
    if len(rows):
        scores["train_last100"] = float(rows[-100:, 2].mean())
        scores["train_auc"] = stats.area_under_curve(rows[:, 0], rows[:, 2], budget)
    evaluations = summary.get("eval") or {}
    for kind in ("deterministic", "stochastic"):
        evaluation = evaluations.get(kind) or {}
        if evaluation.get("global_step") in (None, summary.get("global_step")):  # not that of an earlier checkpoint
            scores[f"eval_{kind}"] = finite(evaluation.get("mean"))
    for name in ("sps", "wall_time"):
        scores[name] = finite(summary.get(name) or None)
    return scores


def finite(value: float | None) -> float:
    """The number, nan where there is none, or none that could be averaged."""
    return float(value) if value is not None and abs(value) < LARGEST else np.nan


def origin_of(config: dict[str, Any]) -> dict[str, str]:
    """ORIGIN of a run, from its config.json."""
    commit = (config.get("git_commit") or "unknown")[:10]
    if config.get("git_dirty"):
        commit += " (changed)"
    origin = {
        "commit": commit,
        "versions": ", ".join(f"{name} {version}" for name, version in (config.get("versions") or {}).items()),
        "hardware": str(config.get("hardware")),
        "threads": str(config.get("threads")),
    }
    return {name: printable(text) for name, text in origin.items()}


def problem_of(run: Run, summary: dict[str, Any], damage: str) -> str:
    """What matters most of a run's problems, which may be the damage to its files; "" if there are none."""
    if run.status in ("damaged", "running"):
        return damage
    if run.status in ("failed", "diverged"):
        return f"{run.path} {run.status}: {summary.get('error', 'no reason given')}"
    if run.done:
        return damage if len(run.returns) else f"{run.path} completed without a finished episode."
    reached = int(summary.get("global_step") or (run.steps[-1] if len(run.steps) else 0))
    return damage or f"{run.path} is {run.status}, at step {reached:,} of {run.budget:,}."


def read_scores(path: Path) -> list[Run]:
    """The runs of a scores.csv as the report writes it, without curves; raises UsageError with line and column."""
    path = path / "scores.csv" if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}; python -m benchmarks report RUNS --out DIR writes one.")

    def whole(text: str, most: int = MOST["total_timesteps"]) -> int:
        if not 0 <= (number := int(text)) <= most:
            raise ValueError
        return number

    def steps(text: str) -> int | None:
        return whole(text) if text else None

    def seed(text: str) -> int:
        return whole(text, MOST["seed"])

    columns = dict(env_id=printable, algo=printable, seed=seed, status=printable)
    columns |= dict(total_timesteps=whole, global_step=steps, key=printable)
    runs, known = [], set()
    (_, header), *lines = read_rows(path)
    for line, cells in lines:
        row, name = dict(itertools.zip_longest(header, cells[: len(header)])), ""
        try:
            values, scores = {}, {}
            for name, kind in columns.items():
                values[name] = kind(row[name] if row[name] is not None else "")
            for name in MEASURES:
                scores[name] = float(row[name] or "nan")
                if abs(scores[name]) >= LARGEST:
                    raise ValueError
        except (KeyError, ValueError):
            raise UsageError(f"{path}, line {line}: {name} is {shortened(row.get(name))}.") from None
        cell = values["env_id"], values["algo"], values["seed"]
        if cell in known:
            raise UsageError(f"{path}, line {line}: {cell[0]} {cell[1]} seed {cell[2]} is there twice.")
        known.add(cell)
        origin = {name: printable(row.get(name) or "unknown") for name in ORIGIN}
        values["budget"] = values.pop("total_timesteps")
        runs.append(Run(path.parent, **values, scores=scores, origin=origin, stored=True))
    if not runs:
        raise UsageError(f"{path} has no rows.")
    return runs


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV file with their numbers, the header first; raises UsageError where it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            lines = csv.reader(file)
            yield 1, next(lines, [])
            yield from ((lines.line_num, line) for line in lines if line)
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def read_stored(folder: Path) -> list[Run]:
    """The runs that a report has stored in a folder, with their curves; raises UsageError with file and line."""
    runs, path, points = read_scores(folder), folder / "curves.csv", defaultdict(list)
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}, which belongs to {folder / 'scores.csv'}.")
    rows, names = read_rows(path), ("env_id", "algo", "seed", "step", "wall_time", "return_last100")
    _, header = next(rows)
    places = [header.index(name) if name in header else len(header) for name in names]  # beyond every line
    for line, cells in rows:
        try:
            env_id, algo, seed, step, seconds, value = [cells[place] for place in places]
            point = float(step), float(seconds), float(value)
            if not math.isfinite(sum(point)):
                raise ValueError
            points[env_id, algo, seed].extend(point)
        except (IndexError, ValueError):
            raise UsageError(f"{path}, line {line} is no point of a curve.") from None
    points = {(printable(env_id), printable(algo), seed): curve for (env_id, algo, seed), curve in points.items()}
    for run in runs:
        curve = np.array(points.get((run.env_id, run.algo, str(run.seed)), ()), dtype=float).reshape(-1, 3)
        if (np.diff(curve[:, 0]) < 0).any():
            raise UsageError(f"{path}: the steps of {run.env_id} {run.algo} seed {run.seed} go back.")
        run.steps, run.seconds, run.returns = curve.T
    return runs


def is_stored(path: Path) -> bool:
    """Whether a folder is what a report has written, and no run directory."""
    return os.path.isfile(path / "scores.csv") and not os.path.exists(path / "config.json")


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories at the paths, or one or two folders below them, and the folders of stored results.

    Raises UsageError where there are none.
    """
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
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
    return {file.parent: readable_part(read_json(file)) for file in find_notes(paths)}


def find_notes(paths: list[Path]) -> list[Path]:
    """Every suite.json at or below the paths."""
    return sorted({file for path in paths for depth in ("", "*/") for file in path.glob(f"{depth}suite.json")})


def readable_part(note: dict[str, Any]) -> dict[str, Any]:
    """What of a suite.json is as it should be."""
    kinds = {name: kind for name, (_, kind) in NOTE_KEYS.items()}
    part = {name: value for name, value in note.items() if isinstance(value, kinds.get(name, ()))}
    cells = [cell for cell in part.get("cells", []) if not damage_of_cell(cell)]
    part["cells"] = [cell | {key: printable(cell[key]) for key in ("env_id", "algo")} for cell in cells]
    return part


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
    for file in find_notes(paths):
        if damage := damage_of(file):
            problems.append(f"{file}: {damage}; what is damaged of it is left out.")
    missing = missing_seeds(runs, asked)
    for group in group_by(runs, "algo").values():
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
    return kept, [*map(printable, problems)], missing


def read_directories(
    found: list[Path], named: list[Path], asked: dict[Path, dict[str, Any]]
) -> tuple[list[Run], list[str]]:
    """The runs of the run directories that were found, less those that suite.json has replaced, and the problems."""
    runs, problems, replaced = [], [], []
    columns = {(path.parent, column_of(path)) for path in asked}
    for path in found:
        if is_stored(path):
            continue
        run, problem = read_run(path)
        outdated = path not in asked and (path.parent, column_of(path)) in columns
        if run and run.key and outdated and path not in named:
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


def column_of(path: Path) -> str:
    """The name of a run directory of `run` without its seed and its key."""
    return path.name.rsplit("__", 2)[0]


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


def tell_apart(runs: list[Run]) -> None:
    """Adds to the names of runs of one algorithm the arguments in which they differ from most of them.

    Only what differs within an environment counts: environments have defaults of their own. The name without an
    addition is the same setting in all environments that have it.
    """
    groups = list(group_by(runs, "env_id").values())

    def varying_in(group: list[Run]) -> list[str]:
        every = {name for run in group for name in run.arguments} - {*SECONDARY}
        return sorted(name for name in every if len({str(run.arguments.get(name)) for run in group}) > 1)

    def setting(run: Run, names: list[str]) -> tuple[str, ...]:
        return tuple(str(run.arguments.get(name)) for name in names)

    for group in groups:
        names = varying_in(group)
        there = Counter(setting(run, names) for run in group)
        everywhere = Counter(setting(run, names) for run in runs)
        usual = max(there, key=lambda one: (everywhere[one], there[one]))
        for run in group:
            triples = zip(names, setting(run, names), usual)
            changed = [printable(f"{name}={value}") for name, value, most in triples if value != most]
            run.algo = ", ".join([run.algo, *changed])
