"""Runs a suite: every cell of environments, algorithms and seeds that is not done yet, each in a process of its own.

The truth is in the run directories. So the command can be killed and given again at any moment, on one machine or on
several that share the folder.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.arguments import Arguments, arguments_of
from benchmarks.jobs import (
    Children,
    Job,
    UsageError,
    check_range,
    command_of,
    cores,
    default_is,
    end_of_log,
    execute,
    is_atari,
    is_orphan,
    is_running,
    log_of,
    make_folder,
    near_miss,
    progress_of,
    read_json,
    read_value,
    require,
    status_of,
)
from benchmarks.suite import (
    Suite,
    damage_of,
    jobs_of,
    left_out,
    options_of,
    read_suite,
    script_of,
    suite_file,
    tables_of,
    wrong,
)

OF_SUITE = default_is("those of the suite")


@dataclass
class Options:
    suite: Annotated[str, tyro.conf.Positional]
    """name of a suite in benchmarks/suites, or a TOML file"""
    algos: Annotated[tuple[str, ...], OF_SUITE] = ()
    """scripts (ppo, path/to/my_ppo.py), peers (sb3:ppo, sb3:a2c, sb3:trpo, sb3:sac, random), variants of the suite"""
    env_ids: Annotated[tuple[str, ...], OF_SUITE] = ()
    """environments"""
    seeds: Annotated[int, OF_SUITE] = 0
    """seeds of each cell, from 1 on"""
    total_timesteps: Annotated[int, OF_SUITE] = 0
    """steps of each run"""
    eval_episodes: Annotated[int, OF_SUITE] = -1
    """episodes of each of the two evaluations after a run; 0 for none"""
    workers: int = 1
    """runs at the same time"""
    threads: int = 0
    """threads of an Atari run (0: all cores of this machine divided by the workers, 1 on a cluster); other runs take
    one"""
    runs_dir: Annotated[str, default_is("runs/SUITE")] = ""
    """folder of the run directories"""
    retry: bool = False
    """also go on with runs that failed"""
    dry_run: bool = False
    """print the commands and start nothing"""
    backend: Literal["local", "slurm", "ray"] = "local"
    """where the runs go: this machine, an array of Slurm jobs, a cluster that runs Ray"""
    backend_args: tuple[str, ...] = ()
    """NAME=VALUE of the backend: parameters of submitit for slurm (partition=long time=240), address=... for ray"""


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Runs the suite; 0 when every run is done, 1 when one failed, 128 + signal when it was stopped."""
    suite, runs_dir, jobs = plan(options)
    for reason in left_out(suite):
        print(f"left out: {reason}")
    if options.dry_run:
        for job in jobs:
            print(f"{status_of(job, runs_dir):8} {shlex.join(job.start(runs_dir))}")
        return 0
    try:
        make_folder(runs_dir)
        note_cells(suite, jobs, runs_dir)
    except OSError as error:
        raise UsageError(
            f"{runs_dir} cannot be a folder of runs ({error.strerror}); choose another --runs-dir."
        ) from None
    return run_all(jobs, runs_dir, options)


def note_cells(suite: Suite, jobs: list[Job], runs_dir: Path) -> None:
    """Writes suite.json: what was asked for, so that a report can say what is missing.

    Earlier cells stay, except those of another text or other flags of an algorithm that is asked for again.
    """
    with open(runs_dir / ".suite.lock", "wb") as guard:  # two terminals do not lose each other's cells
        fcntl.flock(guard, fcntl.LOCK_EX)
        write_cells(suite, jobs, runs_dir)


def write_cells(suite: Suite, jobs: list[Job], runs_dir: Path) -> None:
    """As note_cells; the caller holds the lock."""
    earlier = read_json(runs_dir / "suite.json")
    keys = ("env_id", "algo", "seed", "name", "recipe")
    asked = [{key: getattr(job, key) for key in keys} for job in jobs]
    recipes = {(job.env_id, job.algo): job.recipe for job in jobs}

    def stays(cell: dict[str, Any]) -> bool:
        now = recipes.get((cell["env_id"], cell["algo"]))
        return now is None or "recipe" not in cell or cell["recipe"] == now

    kept = filter(stays, earlier.get("cells", []))
    cells = {(cell["env_id"], cell["algo"], cell["seed"]): cell for cell in [*kept, *asked]}
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    note = {
        "name": suite.name,
        "description": suite.description,
        "commands": list(dict.fromkeys([*earlier.get("commands", []), command])),
        "published": suite.published,
        "normalise": suite.normalise,
        "cells": list(cells.values()),
    }
    temporary = runs_dir / f".suite.json.{os.getpid()}"
    temporary.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, runs_dir / "suite.json")


def plan(options: Options) -> tuple[Suite, Path, list[Job]]:
    """The suite with what the command line changes of it, the folder of the runs, and the jobs."""
    suite = read_suite(options.suite)
    check_range(options, 1, "workers")
    check_range(options, 0, "seeds", "total_timesteps", "threads")
    if options.eval_episodes != -1:
        check_range(options, 0, "eval_episodes")
    suite = replace(
        suite,
        algos=list(options.algos) or suite.algos,
        envs=list(options.env_ids) or suite.envs,
        seeds=options.seeds or suite.seeds,
        eval_episodes=suite.eval_episodes if options.eval_episodes < 0 else options.eval_episodes,
    )
    jobs = jobs_of(suite, threads_of(options, suite), options.total_timesteps)
    for package, peers in (("stable_baselines3", ("sb3:ppo", "sb3:a2c", "sb3:sac")), ("sb3_contrib", ("sb3:trpo",))):
        if peer := next((job.command[-1] for job in jobs if job.command[-1] in peers), None):
            require(peer, "peers", package)
    check_flags(options.suite, suite)
    runs_dir = Path(options.runs_dir or f"runs/{suite.name}")
    check_folder(jobs, runs_dir)
    return suite, runs_dir, jobs


def threads_of(options: Options, suite: Suite) -> int:
    """Threads of an Atari run, 0 where there is none. Raises UsageError for a backend that cannot be used."""
    local = options.backend == "local" and not options.backend_args
    if not local:
        from benchmarks import backends

        backends.check(options)
    if not any(map(is_atari, suite.envs)):
        return options.threads
    if local and options.threads > cores():
        raise UsageError(f"--threads is {options.threads}, but this process may use {cores()} cores.")
    if options.threads:
        return options.threads
    return max(1, cores() // options.workers) if local else 1


def check_folder(jobs: list[Job], runs_dir: Path) -> None:
    """Raises UsageError where the folder of the runs holds what this command cannot have written."""
    for folder in (runs_dir, runs_dir / "logs", *(runs_dir / job.name for job in jobs)):
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise UsageError(f"{folder} is no folder; move it away, or choose another --runs-dir.")
    for job in jobs:
        if os.path.lexists(log := log_of(job, runs_dir)) and not os.path.isfile(log):
            raise UsageError(f"{log} is no file; move it away, or choose another --runs-dir.")
    file = runs_dir / "suite.json"
    if os.path.lexists(file) and (damage := damage_of(file)):
        raise UsageError(f"{file}: {damage}; mend it, or move it away.")


def check_flags(file: str, suite: Suite) -> None:
    """Raises UsageError for a flag of the suite that a script does not have, or a value that it does not take.

    Each script is asked once: environments change the defaults, not the flags. A script without flags in the suite is
    not asked.
    """
    known: dict[tuple[str, bool], Arguments] = {}
    for algo in suite.algos:
        script = script_of(suite, algo)
        for env_id in suite.envs:
            options = options_of(suite, env_id, algo)
            whose = (script, options.get("hyperparameters") == "ours")
            if options and whose not in known:
                known[whose] = arguments_of(script, env_id, ours=whose[1])
            for place, flags in tables_of(suite, env_id, algo):
                for name, value in flags.items():
                    if problem := misfit(known[whose], name.replace("_", "-"), value):
                        who = Path(command_of(script)[0][-1]).name
                        raise wrong(suite_file(file), *place, name, what=f"{who} {problem}")


def misfit(arguments: Arguments, name: str, value: Any) -> str:
    """What is wrong with a flag and its value, for the end of a sentence; "" if nothing is."""
    if name not in arguments and value is True:
        name = name.removeprefix("no-")
    if name not in arguments:
        return f"has no such flag; {near_miss(name, arguments, 'see its --help.')}"
    return arguments[name].misfit(value)


class Local:
    """Runs jobs on this machine, so many at a time; results gathers what became of each, by its name."""

    def __init__(self, jobs: list[Job], runs_dir: Path, options: Options):
        self.results: dict[str, str] = {}
        self.children, self.guard = Children(), threading.Lock()
        running = [job for job in jobs if status_of(job, runs_dir) == "running"]
        # A run that a killed harness has left behind takes a worker, so that there are no more runs than asked for.
        orphans = [job for job in running if is_orphan(job, runs_dir)]
        free = [job for job in jobs if job not in running]
        self.queue = deque((job, job in orphans) for job in orphans + free)
        self.later = deque((job, True) for job in running if job not in orphans)  # of another harness

        def work() -> None:
            while True:
                with self.guard:
                    if not (queue := self.queue or self.later):
                        return
                    job, wait = queue.popleft()
                try:
                    result = execute(job, runs_dir, self.children, options.retry, wait)
                except OSError as error:  # a full disk, say
                    print(f"error: {job.name}: {error}", file=sys.stderr)
                    result = "failed"
                with self.guard:
                    if result == "running" and not wait:
                        self.later.append((job, True))
                    else:
                        self.results[job.name] = result

        workers = min(options.workers, len(jobs))
        self.threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Lets every run finish its iteration and save; asked again, they end at once."""
        with self.guard:
            self.queue.clear()
            self.later.clear()
        self.children.stop()

    def is_finished(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)


class View:
    """What is done, running and failed: a few lines that renew themselves on a terminal, else a line per event."""

    def __init__(self, jobs: list[Job], runs_dir: Path):
        self.jobs, self.runs_dir, self.terminal = jobs, runs_dir, sys.stdout.isatty()
        self.drawn, self.printed, self.begun = 0, time.monotonic(), time.monotonic()
        self.known: dict[str, str] = {}
        self.steps = {job.name: progress_of(job, runs_dir)[0] for job in jobs}
        self.first = sum(self.steps.values())

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.erase()
        print(line, flush=True)

    def erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
            self.drawn = 0

    def update(self, results: dict[str, str]) -> None:
        """Says what has started and ended since the last time, and renews the lines of what is running."""
        running = []
        for job in self.jobs:
            before = self.known.get(job.name)
            if before in ("done", "failed", "interrupted"):
                continue
            status = results.get(job.name) or ("running" if is_running(job, self.runs_dir) else "waiting")
            if status == "running":
                running.append(job)
            if status != "waiting":
                self.steps[job.name] = progress_of(job, self.runs_dir)[0]
            if status == before:
                continue
            self.known[job.name] = status
            if status == "done":
                score = read_value(self.runs_dir / job.name / "summary.json", "train_last100")
                self.say(f"done     {job}: " + ("-" if score is None else f"{score:,.1f}"))
            elif status == "failed":
                end = "".join(f"\n    {line}" for line in end_of_log(job, self.runs_dir).splitlines())
                self.say(f"FAILED   {job}: the end of {log_of(job, self.runs_dir)}:{end}")
            elif status == "running" and not self.terminal:
                self.say(f"running  {job}")
        self.draw(running)

    def draw(self, running: list[Job]) -> None:
        """The line of totals, on a terminal with a line for each run; elsewhere once a minute."""
        if time.monotonic() - self.printed < (0.0 if self.terminal else 60.0):
            return
        self.printed = time.monotonic()
        count, steps = Counter(self.known.values()), sum(self.steps.values())
        # a run that goes on may first go back to its checkpoint
        rate = max(steps - self.first, 0) / (time.monotonic() - self.begun)
        line = f"{count['done']} of {len(self.jobs)} done, {len(running)} running, {count['failed']} failed"
        line += f"  {rate:,.0f} steps/s"
        budgets = {job.name: budget_of(job, self.runs_dir) for job in self.jobs}
        if rate > 0 and all(budgets.values()):
            unfinished = [name for name, status in self.known.items() if status in ("waiting", "running")]
            seconds = int(sum(max(budgets[name] - self.steps[name], 0) for name in unfinished) / rate)
            line += f"  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        lines = [line]
        if self.terminal:
            lines += [self.bar(job, budgets[job.name]) for job in running]
            columns, rows = shutil.get_terminal_size()
            lines = [line[: columns - 1] for line in lines[: rows - 1]]
        self.erase()
        print("\n".join(lines), flush=True)
        self.drawn = len(lines) if self.terminal else 0

    def bar(self, job: Job, budget: int) -> str:
        """The line of a run that is going on; the budget is 0 where it is not known."""
        done, sps = progress_of(job, self.runs_dir)
        part = min(done / budget, 1.0) if budget else 0.0
        return f"  [{'#' * int(10 * part):.<10}] {part:4.0%} {sps:>7,.0f}/s  {job.env_id} {job.algo} {job.seed}"


def budget_of(job: Job, runs_dir: Path) -> int:
    """Steps of a whole run. They are 0, unknown, before the start of a run with the script's default."""
    if "--total-timesteps" in job.flags:
        return int(job.flags[job.flags.index("--total-timesteps") + 1])
    return read_value(runs_dir / job.name / "config.json", "args", "total_timesteps", kind=int) or 0


def run_all(jobs: list[Job], runs_dir: Path, options: Options) -> int:
    """Runs jobs to their end and says what became of them; the exit status."""
    over = ("done",) if options.retry else ("done", "failed")
    earlier = {job.name: status for job in jobs if (status := status_of(job, runs_dir)) in over}
    jobs_left = [job for job in jobs if job.name not in earlier]
    signals: list[int] = []
    handlers = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        if options.backend == "local" or not jobs_left:
            backend = Local(jobs_left, runs_dir, options)
        else:
            from benchmarks import backends

            backend = backends.start(jobs_left, runs_dir, options)
        view, heard = View(jobs, runs_dir), 0
        view.known = {name: status for name, status in earlier.items() if status == "done"}  # no news
        while not backend.is_finished():
            view.update(earlier | backend.results)
            while heard < len(signals):
                heard += 1
                view.say("stops: every run finishes its iteration and saves; a second signal ends them at once")
                backend.stop()
            until = time.monotonic() + 1.0
            while time.monotonic() < until and heard == len(signals) and not backend.is_finished():
                time.sleep(0.05)
        results = earlier | backend.results
        view.update(results)
        view.erase()
    except BrokenPipeError:  # nobody reads on; every run saves and ends
        backend.stop()
        while not backend.is_finished():
            time.sleep(0.1)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    count = Counter(results.values())
    left = len(jobs) - count["done"] - count["failed"]
    line = f"{count['done']} of {len(jobs)} runs are done"
    if count["failed"]:
        line += f", {count['failed']} failed"
    if "failed" in earlier.values():
        line += " (--retry goes on with those)"
    if left:
        line += f", {left} are left, and the same command goes on"
    print(f"{line}: {runs_dir}")
    if signals and left:
        return 128 + signals[0]
    return 0 if count["done"] == len(jobs) else 1
