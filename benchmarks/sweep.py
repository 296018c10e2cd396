"""Searches the hyperparameters of a script, over environments and seeds, with Optuna.

Each (trial, environment, seed) is a process of the unmodified script and an ordinary run directory. What is known of a
trial is in the storage. So the same command in another terminal, or on another node, takes a part of the trials, and
after a kill it goes on. A free worker takes the next run of the oldest trial in progress before another one:
trials end early, and the sampler has seen their scores when it proposes the next.
"""

import math
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.arguments import arguments_of
from benchmarks.conclusion import conclude
from benchmarks.jobs import (
    OWNER,
    Children,
    Job,
    UsageError,
    end_of_log,
    execute,
    log_of,
    progress_of,
    read_value,
    status_of,
)
from benchmarks.plan import Options, Plan, make_plan
from benchmarks.space import distributions_of, values_of, write_wandb
from benchmarks.study import (
    SILENCE,
    best_of,
    by_environment,
    finished,
    hand_back,
    is_alive,
    is_bad,
    locked,
    mean_score,
    number_of,
    open_study,
    show,
)

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:  # of an extra; make_plan says so
    optuna = None


# ------------------------------------------------------------------------------------------------------- trials
@dataclass
class TrialInProgress:
    """A trial of this process."""

    trial: Any
    jobs: list[Job]
    runs: dict[str, dict[str, Any]]
    """what came out, by "environment seed" """
    todo: deque[Job]
    children: Children = field(default_factory=Children)
    busy: int = 0
    over: bool = False

    def __str__(self) -> str:
        return f"trial {number_of(self.trial)}"

    def end(self) -> None:
        """Stops what still runs; it saves, and does not count."""
        self.over = True
        self.todo.clear()
        self.children.stop()


class Sweep:
    """The trials of this process. Threads execute runs; only the main thread talks to the storage."""

    def __init__(self, plan: Plan, study: Any):
        self.plan, self.study, self.folder = plan, study, plan.runs_dir / "trials"
        self.in_progress: list[TrialInProgress] = []
        self.futures: dict[Future, tuple[TrialInProgress, Job]] = {}
        self.begun, self.before = time.monotonic(), len(finished(study))
        self.count, self.drawn, self.beaten = self.before, time.monotonic(), -math.inf

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        print(("\r\x1b[K" if sys.stdout.isatty() else "") + line, flush=True)

    def draw(self) -> None:
        """What runs now: a line that renews itself on a terminal, one every minute elsewhere."""
        terminal = sys.stdout.isatty()
        if time.monotonic() - self.drawn < (0.5 if terminal else 60.0):
            return
        self.drawn = time.monotonic()
        running = ", ".join(f"{work} has {len(work.runs)} of {len(work.jobs)} runs" for work in self.in_progress)
        rate = sum(progress_of(job, self.folder)[1] for _, job in self.futures.values())
        line = f"{self.count} of {self.plan.options.trials} trials; {running or 'others run'}; {rate:,.0f} steps/s"
        if terminal:
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", flush=True)
        else:
            print(line, flush=True)

    def claim(self) -> None:
        """Takes a trial that waits, or one whose worker is dead, or a new one; none where all are taken."""
        with locked(self.plan.runs_dir):
            self.free_trials_of_the_dead()
            trial = self.ask()
        if not trial:
            return
        jobs = self.plan.jobs(f"trial-{number_of(trial):04}", values_of(self.plan.space, trial.params))
        if jobs[0].text != self.plan.text:
            raise UsageError(f"{self.plan.options.script} has changed since the study began; choose another --study.")
        runs = trial.user_attrs.get("runs", {})
        todo = [job for job in jobs if f"{job.env_id} {job.seed}" not in runs]
        todo.sort(key=lambda job: status_of(job, self.folder) != "running")  # a killed worker has left it running
        self.in_progress.append(TrialInProgress(trial, jobs, runs, deque(todo)))
        if runs:
            self.end_if_decided(self.in_progress[-1])

    def free_trials_of_the_dead(self) -> None:
        """Hands back the trials whose workers are gone; an owner is missing for an instant after a trial begins."""
        mine = [work.trial.number for work in self.in_progress]
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != TrialState.RUNNING or trial.number in mine:
                continue
            owner = trial.user_attrs.get("owner")
            if owner:
                gone = owner == OWNER or not is_alive(self.study, owner)
            else:
                gone = (datetime.now() - trial.datetime_start).total_seconds() > 60
            if gone:
                self.say(f"trial {number_of(trial)} goes on; who worked on it is gone")
                hand_back(self.study, trial)

    def ask(self) -> Any:
        """A trial of the study, which waits or is new; None where all are taken."""
        study, options = self.study, self.plan.options
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        if TrialState.WAITING not in states and len(states) - states.count(TrialState.FAIL) >= options.trials:
            return None
        # Seeded by the number of trials so far: another try draws the same, another worker does not. On a database the
        # process counts too: machines that share no folder, and so no lock, may see the same number.
        so_far = len(states) - states.count(TrialState.FAIL) - states.count(TrialState.WAITING)
        process = OWNER.encode() if "://" in options.storage else b""
        seed = np.random.SeedSequence([options.sampler_seed, so_far, *process]).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate is experimental in some versions
            study.sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=int(seed))
        trial = study.ask(distributions_of(self.plan.space))
        trial.set_user_attr("owner", OWNER)
        trials = study.get_trials(deepcopy=False)
        older = sum(other.number < trial.number and other.state != TrialState.FAIL for other in trials)
        if older >= options.trials:  # a machine that does not share the folder, and so the lock, was faster
            study.tell(trial, state=TrialState.FAIL)
            return None
        if "number" not in trial.user_attrs:
            trial.set_user_attr("number", older)
        return trial

    def next_run(self) -> tuple[TrialInProgress, Job] | None:
        """A run of the oldest trial. Trials that wait are taken first: runs of theirs may still be going on."""
        waits = any(trial.state == TrialState.WAITING for trial in self.study.get_trials(deepcopy=False))
        if (
            waits
            and len(self.in_progress) < self.plan.options.workers
            or not any(work.todo for work in self.in_progress)
        ):
            self.claim()
        work = next((work for work in self.in_progress if work.todo), None)
        return (work, work.todo.popleft()) if work else None

    def record(self, work: TrialInProgress, job: Job, result: str) -> None:
        """Takes down what came out of a run. A run that failed or finished no episode has no value."""
        run = self.folder / job.name
        value = read_value(run / "summary.json", "train_last100") if result == "done" else None
        value = value if value is not None and math.isfinite(value) else None
        if value is None:
            end = "".join(f"\n    {line}" for line in end_of_log(job, self.folder).splitlines())
            what = f"{work} {job.env_id} seed {job.seed}"
            self.say(f"FAILED   {what}: the end of {log_of(job, self.folder)}:{end}")
        status = "refused" if result == "failed" and not run.exists() else result  # wrong usage creates nothing
        known = dict(status=status, value=value, score=self.plan.score(job.env_id, value), run=job.name)
        work.runs[f"{job.env_id} {job.seed}"] = known
        try:
            work.trial.set_user_attr("runs", work.runs)
            self.end_if_decided(work)
        except optuna.exceptions.UpdateFinishedTrialError:
            self.say(f"{work} was taken over, because this process was silent for too long")
            work.end()

    def end_if_decided(self, work: TrialInProgress) -> None:
        """Ends a trial that has all its runs, or is bad; raises UsageError where the script refuses to start at all."""
        runs, whole, options = work.runs, len(work.runs) == len(work.jobs), self.plan.options
        if whole and all(run["status"] == "refused" for run in runs.values()) and not any(self.folder.glob("*__*")):
            raise UsageError(f"no run of {work} has started:\n{end_of_log(work.jobs[-1], self.folder)}")
        others = [trial.user_attrs["runs"] for trial in finished(self.study) if trial.state == TrialState.COMPLETE]
        bad = not whole and options.prune > 0 and is_bad(runs, others, options.prune, len(options.env_ids))
        work.trial.report(mean_score(runs), step=len(runs))  # the sampler ranks trials stopped early by it
        if whole:
            self.study.tell(work.trial, mean_score(runs))
        elif bad:
            self.study.tell(work.trial, state=TrialState.PRUNED)
        else:
            return
        work.end()
        self.count = len(finished(self.study))
        self.say_result(work, whole)

    def say_result(self, work: TrialInProgress, whole: bool) -> None:
        """What a trial that has ended has scored, the best so far, and how long the others will take."""
        runs, trials, best = work.runs, self.plan.options.trials, best_of(self.study)
        line = f"{work}: {show(mean_score(runs))}"
        if not whole:
            line += f", stopped after {len(runs)} of {len(work.jobs)} runs"
        line += f" ({', '.join(f'{env_id} {show(value)}' for env_id, value in by_environment(runs, 'value').items())})"
        if best:
            line += f"; best {show(best.value)}, trial {number_of(best)}"
        rate = (time.monotonic() - self.begun) / (self.count - self.before)
        seconds = int(rate * max(trials - self.count, 0))
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        self.say(f"{line}; {self.count} of {trials}, {left}")

    def run(self) -> int:
        """Works until all trials are finished, here or elsewhere; 0, or 128 + the signal that stopped it."""
        signals: list[int] = []
        handlers = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
        pool, obeyed = ThreadPoolExecutor(self.plan.options.workers), 0
        try:
            while True:
                if time.monotonic() - self.beaten > SILENCE / 10:
                    self.study.set_user_attr(f"seen {OWNER}", time.time())
                    self.beaten = time.monotonic()
                while not signals and len(self.futures) < self.plan.options.workers and (found := self.next_run()):
                    self.futures[pool.submit(execute, found[1], self.folder, found[0].children)] = found
                    found[0].busy += 1
                if len(signals) > obeyed:
                    obeyed = len(signals)
                    self.say("stops: every run finishes its iteration and saves; again, and they end at once")
                    for work in self.in_progress:
                        work.children.stop()
                if not self.futures:
                    if signals:
                        return 128 + signals[0]
                    if all(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False)):
                        return 0
                    time.sleep(0.5)  # others have the last trials
                for future in wait(self.futures, 0.5, FIRST_COMPLETED).done:
                    work, job = self.futures.pop(future)
                    work.busy -= 1
                    result = future.result()
                    if result in ("done", "failed") and not work.over:
                        self.record(work, job, result)
                    elif not work.over and not signals:  # somebody else stopped the process
                        work.todo.appendleft(job)
                self.in_progress = [work for work in self.in_progress if work.busy or not work.over]
                self.draw()
        finally:
            for work in self.in_progress:
                work.children.stop()
            pool.shutdown()
            with locked(self.plan.runs_dir):
                for work in self.in_progress:
                    if not work.over:
                        hand_back(self.study, work.trial)
            for number, handler in handlers.items():
                signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------------- main
def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Searches, and checks the winner; 0, 1 when no trial or not every run of the check worked, 128 + signal."""
    plan = make_plan(options)
    if not options.export_wandb:
        return sweep(plan, open_study(plan))
    env_ids = list(plan.options.env_ids)
    known = arguments_of(options.script, env_ids[0])
    content = write_wandb(plan.space, known, plan.shown[-1], options.study, env_ids, plan.seeds)
    try:
        Path(options.export_wandb).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{options.export_wandb} cannot be written ({error.strerror}).") from None
    print(f"{options.export_wandb} is for: wandb sweep {options.export_wandb}, then wandb agent with what that prints")
    return 0


def sweep(plan: Plan, study: Any) -> int:
    """Runs what is left of the trials, and draws the conclusions; the exit status."""
    options = plan.options
    runs = f"{len(options.env_ids) * options.seeds} runs"
    print(f"study {options.study}: {options.trials} trials of {runs}; {plan.runs_dir}", flush=True)
    try:
        status = Sweep(plan, study).run()
    except optuna.exceptions.StorageInternalError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        print(f"error: the storage fails, and the same command goes on when it works again: {reason}", file=sys.stderr)
        return 1
    if status:
        print(f"{len(finished(study))} of {options.trials} trials are finished; the same command goes on")
        return status
    return conclude(plan, study)
