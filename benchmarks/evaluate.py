"""Evaluates runs along their training: every checkpoint that a run with --keep-checkpoints has left.

Each is played by the run's own script, as by its --evaluate, with the same numbers: most likely actions, normalisers
frozen. A checkpoint and config.json stand in a folder of their own for that. So nothing of the run is changed but
RUN_DIR/evaluations.csv, which has the results, and it may still be training.
"""

import csv
import fcntl
import io
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from benchmarks.arguments import import_script
from benchmarks.jobs import PEERS, ROOT, UsageError, check_range, command_of, keeps_contract, read_json, read_value

COLUMNS = ("step", "mean", "std", "min", "max", "episodes", "seed")
Rows = dict[tuple[int, int, int], dict[str, float]]  # by step, episodes and seed


@dataclass
class Options:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run directories, of scripts or peers"""
    episodes: int = 10
    """episodes that each checkpoint plays"""
    every: int = 1
    """only checkpoints at a multiple of so many steps"""
    jobs: int = 1
    """checkpoints evaluated at the same time"""


class Task(NamedTuple):
    """A checkpoint to evaluate."""

    run: Path
    script: Path
    step: int
    episodes: int

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / f"step_{self.step:012}.pt"


def evaluate(task: Task) -> tuple[dict[str, Any], str]:
    """The result of a checkpoint, as the script records it, and what it says on stderr."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(said):
        run = Path(folder)
        config = read_json(task.run / "config.json")
        config["args"] |= {"capture_video": False} if "capture_video" in config["args"] else {}
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (run / "summary.json").write_text('{"status": "completed"}', encoding="utf-8")  # the result goes there
        (run / "checkpoints").mkdir()
        checkpoint = run / "checkpoints" / task.checkpoint.name
        checkpoint.symlink_to(task.checkpoint)
        if task.script == command_of("random")[1]:
            from benchmarks import peers as script
        else:
            script = import_script(task.script, task.script.read_text(encoding="utf-8"))
        script.main(["--evaluate", str(checkpoint), "--eval-episodes", str(task.episodes), "--no-eval-stochastic"])
        result = read_value(run / "summary.json", "eval", "deterministic", kind=dict) or {}
        return result, said.getvalue().replace(folder, str(task.run))


def script_of(run: Path, config: dict[str, Any]) -> Path:
    """The file that has trained a run: that of its command, or the one here of the same name. Raises UsageError."""
    if config["args"].get("algo") in PEERS:
        return command_of("random")[1]
    command, name = config.get("command"), Path(f"{config['args'].get('exp_name')}.py")
    words = [word for word in command or [] if isinstance(word, str) and word.endswith(".py")][:1]
    for path in (*map(Path, words), *(ROOT / Path(word).name for word in words), ROOT / name):
        if path.is_file() and keeps_contract(path):
            return path.resolve()
    raise UsageError(f"{run}: the script that has trained it, {words[0] if words else name}, is not there.")


def tasks_of(run: Path, options: Options) -> list[Task]:
    """The evaluations of a run that are missing. Raises UsageError where there is nothing to evaluate."""
    config, seed = read_json(run / "config.json"), read_value(run / "config.json", "args", "eval_seed", kind=int)
    if seed is None or read_value(run / "config.json", "args", "env_id", kind=str) is None:
        raise UsageError(f"{run} is no run in an environment: it has no config.json with its arguments.")
    script, done = script_of(run, config), read_rows(run)
    names = [path.stem.removeprefix("step_") for path in (run / "checkpoints").glob("step_*.pt")]
    steps = sorted(int(name) for name in names if name.isdigit())
    if not (asked := [step for step in steps if step % options.every == 0]):
        there = f"its steps are {', '.join(f'{step:,}' for step in steps[:5])}..." if steps else "it has none at all"
        raise UsageError(f"{run} has no checkpoint at a multiple of {options.every:,} steps; {there}.")
    tasks = [Task(run, script, step, options.episodes) for step in asked]
    return [task for task in tasks if (task.step, task.episodes, seed) not in done]


def read_rows(run: Path) -> Rows:
    """What evaluations.csv holds; raises UsageError where that is something else."""
    try:
        with open(run / "evaluations.csv", newline="", encoding="utf-8") as file:
            found = [{name: float(row[name]) for name in COLUMNS} for row in csv.DictReader(file)]
        return {tuple(int(row[name]) for name in ("step", "episodes", "seed")): row for row in found}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error):
        raise UsageError(f"{run}/evaluations.csv cannot be read as evaluations; move it away.") from None


def add_row(task: Task, result: dict[str, Any]) -> None:
    """Puts a result into evaluations.csv, in the order of the steps. A second command may do so at the same time."""
    row = {"step": task.step} | {name: result[name] for name in COLUMNS[1:]}
    temporary, folder = task.run / ".evaluations.csv", os.open(task.run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = read_rows(task.run) | {(task.step, result["episodes"], result["seed"]): row}
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            for key in sorted(rows):
                writer.writerow(rows[key] | dict(zip(("step", "episodes", "seed"), key)))
        temporary.replace(task.run / "evaluations.csv")
    finally:
        os.close(folder)


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Evaluates the checkpoints of runs that were trained with --keep-checkpoints, into RUN_DIR/evaluations.csv.

    What is in that file already is not repeated. The exit status is 1 where a checkpoint cannot be evaluated.
    """
    check_range(options, 1, "episodes", "every", "jobs")
    if not options.runs:
        raise UsageError("evaluate takes one or more run directories.")
    runs = dict.fromkeys(Path(run).resolve() for run in options.runs)
    tasks = [task for run in runs for task in tasks_of(run, options)]
    status, context = 0, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(options.jobs, max(len(tasks), 1)), context) as pool:
        waiting = {pool.submit(evaluate, task): task for task in tasks}
        for future in as_completed(waiting):
            task, error = waiting[future], future.exception()  # of a process that was killed, too
            result, said = ({}, repr(error)) if error else future.result()
            if result:
                add_row(task, result)
                print(f"{task.run.name} step {task.step:,}: mean {result['mean']:,.2f}", flush=True)
            else:
                status = 1
                print(f"error: {task.checkpoint}: {' '.join(said.split()).removeprefix('error: ')}", file=sys.stderr)
    print(f"{len(tasks)} evaluations were missing" + (", and some still are" if status else ""))
    return status
