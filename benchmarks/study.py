"""A study of benchmarks.sweep: its trials in the storage, who works on them, and what they are worth."""

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.jobs import OWNER, UsageError, make_folder
from benchmarks.plan import Plan

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:  # of an extra; make_plan says so
    optuna = None

ENOUGH = 5  # finished trials, before one is stopped early
SILENCE = 600.0  # seconds after which a worker that gives no sign of life is dead


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, of the processes that share the folder."""
    with open(folder / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JournalLock:
    """A lock of the journal that goes with its process.

    Optuna's own locks are files that stay behind when a process is killed, and with a relative path the next process
    waits for ever (5.0.0).
    """

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        self.file = open(self.path, "wb")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def open_study(plan: Plan) -> Any:
    """Creates the study, with the script's defaults as its first trials, or joins it; raises UsageError."""
    options = plan.options
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_storage(plan)
    with locked(plan.runs_dir):
        try:
            study = optuna.create_study(storage=storage, study_name=options.study, direction="maximize")
            for params in plan.defaults:
                study.enqueue_trial(params)
            study.set_user_attr("identity", plan.identity)
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=options.study)
    for _ in range(30):  # another machine may be between the lines above
        if "identity" in study.user_attrs:
            break
        time.sleep(1.0)
    else:  # its creator was killed there
        study.set_user_attr("identity", plan.identity)
    begun = study.user_attrs.get("identity", {})
    if other := [what for what, value in plan.identity.items() if begun.get(what) != value]:
        raise UsageError(f"study {options.study} was begun with another {', '.join(other)}; choose another --study.")
    owners = [trial.user_attrs.get("owner") for trial in study.trials if trial.state == TrialState.RUNNING]
    if options.storage.startswith("sqlite") and any(owner and is_alive(study, owner) for owner in owners):
        raise UsageError("another process works on this study, and SQLite locks; take a journal file or a server.")
    return study


def open_storage(plan: Plan) -> Any:
    """The storage of the study, in which it may exist or not; makes the folder of the runs. Raises UsageError."""
    where = plan.options.storage
    for attempt in range(3):
        try:
            make_folder(plan.runs_dir)
            storage = new_storage(where, plan.runs_dir / "journal.log")
            return storage
        except Exception as error:  # of the URL, a driver that is not installed, the server, the file
            if attempt == 2 or isinstance(error, (ImportError, OSError)):
                reason = " ".join(str(error.__cause__ or error).split())[:300]
                if isinstance(error, ImportError):
                    reason += f"; install {error.name}"
                raise UsageError(f"the storage {where or plan.runs_dir} cannot be used: {reason}") from None
            time.sleep(1.0)  # several machines at once may be creating the tables


def new_storage(where: str, default: Path) -> Any:
    """Optuna's storage at a URL or in a file; raises whatever the storage raises."""
    if "://" in where:
        return optuna.storages.RDBStorage(where, engine_kwargs={"pool_pre_ping": True})
    path = Path(where or default)
    make_folder(path.parent)
    lock = JournalLock(path.with_name(f"{path.name}.lock"))
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock))


def is_alive(study: Any, owner: str) -> bool:
    """Whether the process "host pid" gave a sign of life lately. On this machine it must also exist."""
    host, pid = owner.split()
    if host == OWNER.split()[0]:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists, as another user's
    return time.time() - study.user_attrs.get(f"seen {owner}", 0) < SILENCE


def hand_back(study: Any, trial: Any) -> None:
    """Ends a trial that nobody works on, and queues its parameters and the runs that it has for the next worker."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):  # somebody else was faster
        return
    known = {key: trial.user_attrs[key] for key in ("number", "runs") if key in trial.user_attrs}
    study.enqueue_trial(trial.params, user_attrs=known)


def number_of(trial: Any) -> int:
    """The number of a trial, which stays when it is handed on; Optuna gives it another one then."""
    return trial.user_attrs.get("number", trial.number)


def finished(study: Any) -> list[Any]:
    """Trials that have ended, with all runs or stopped early."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in states]


def best_of(study: Any) -> Any:
    """The trial with the highest score of those that have all their runs; None before there is one."""
    trials = [trial for trial in finished(study) if trial.state == TrialState.COMPLETE]
    return max(trials, key=lambda trial: trial.value, default=None)


def by_environment(runs: dict[str, dict[str, Any]], what: str) -> dict[str, float | None]:
    """Mean over seeds of "score" or "value", by environment; None where no run has one."""
    groups: dict[str, list[float]] = {}
    for key, known in runs.items():
        group = groups.setdefault(key.split()[0], [])
        if known[what] is not None:
            group.append(known[what])
    return {env_id: fmean(group) if group else None for env_id, group in groups.items()}


def mean_score(runs: dict[str, dict[str, Any]]) -> float:
    """What a trial is judged by: the mean over environments of the mean score over seeds."""
    return fmean(by_environment(runs, "score").values())


def is_bad(runs: dict[str, Any], others: list[dict[str, Any]], quantile: float, envs: int) -> bool:
    """Whether a trial with these runs, {"environment seed": ...}, is below a quantile of finished trials.

    Trials are compared over the same environments and seeds, and not before each environment had a run. Runs are judged
    whole: halfway, the learning rate is still high, and a slow start says little.
    """
    if len(others) < ENOUGH or len(by_environment(runs, "score")) < envs:
        return False
    theirs = sorted(mean_score({key: other[key] for key in runs}) for other in others)
    return mean_score(runs) < theirs[min(int(quantile * len(theirs)), len(theirs) - 1)]


def show(number: float | None) -> str:
    """A score or a return for people."""
    if number is None or not math.isfinite(number):
        return "-"
    return f"{number:,.1f}" if abs(number) >= 10 else f"{number:,.3f}"
