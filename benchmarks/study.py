"""A study of benchmarks.sweep: its trials in the storage, the final check of the winner, and the report."""

import csv
import fcntl
import json
import math
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks import run, stats
from benchmarks.check import interval
from benchmarks.jobs import OWNER, UsageError, as_flags, read_json, status_of
from benchmarks.plan import FAILURE, FLOOR, TUNING, Plan
from benchmarks.space import values_of
from benchmarks.suite import jobs_of, read_suite

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:  # of an extra; make_plan says so
    optuna = None

ENOUGH = 5  # finished trials, before one is stopped early
SILENCE = 600.0  # seconds after which a worker that gives no sign of life is dead


# -------------------------------------------------------------------------------------------------------- study
@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, of the processes that share the folder."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class JournalLock:
    """Optuna's own locks are files that stay behind when a process is killed, and with a relative path the next process
    waits for ever (5.0.0); this one goes with its process.
    """

    def __init__(self, path: Path):
        self.path = path

    def acquire(self) -> bool:
        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def open_study(plan: Plan) -> Any:
    """Creates the study, with the script's defaults as its first trials, or joins it; raises UsageError."""
    options, folder, storages = plan.options, plan.runs_dir, optuna.storages
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(3):
        try:
            if "://" in options.storage:
                storage = storages.RDBStorage(options.storage, engine_kwargs={"pool_pre_ping": True})
            else:
                journal = Path(options.storage or folder / "journal.log")
                journal.parent.mkdir(parents=True, exist_ok=True)
                lock = JournalLock(journal.with_name(f"{journal.name}.lock"))
                storage = storages.JournalStorage(storages.journal.JournalFileBackend(str(journal), lock))
            folder.mkdir(parents=True, exist_ok=True)
            break
        except Exception as error:  # of the URL, a driver that is not installed, the server, the file
            if attempt == 2 or isinstance(error, (ImportError, OSError)):
                reason = " ".join(str(error.__cause__ or error).split())[:300]
                if isinstance(error, ImportError):
                    reason += f"; install {error.name}"
                raise UsageError(f"the storage {options.storage or folder} cannot be used: {reason}") from None
            time.sleep(1.0)  # several machines at once may be creating the tables
    with locked(folder):
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
    else:  # whoever created it was killed there
        study.set_user_attr("identity", plan.identity)
    begun = study.user_attrs.get("identity", {})
    if other := [what for what, value in plan.identity.items() if begun.get(what) != value]:
        raise UsageError(f"study {options.study} was begun with another {', '.join(other)}; choose another --study.")
    owners = [trial.user_attrs.get("owner") for trial in study.trials if trial.state == TrialState.RUNNING]
    if options.storage.startswith("sqlite") and any(owner and is_alive(study, owner) for owner in owners):
        raise UsageError("another process works on this study, and SQLite locks; take a journal file or a server.")
    return study


def is_alive(study: Any, owner: str) -> bool:
    """Whether the process "host pid" gave a sign of life lately and, where it can be seen from here, exists."""
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
    """Ends a trial that nobody works on, and queues what it was, with the runs that it has, for whoever is next."""
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
        groups.setdefault(key.split()[0], []).extend([] if known[what] is None else [known[what]])
    return {env_id: fmean(group) if group else None for env_id, group in groups.items()}


def mean_score(runs: dict[str, dict[str, Any]]) -> float:
    """What a trial is judged by: the mean over environments of the mean score over seeds."""
    return fmean(by_environment(runs, "score").values())


def is_bad(runs: dict[str, Any], others: list[dict[str, Any]], quantile: float, envs: int) -> bool:
    """Whether a trial, by the runs {"environment seed": ...} that it has, is below a quantile of finished trials.

    They are compared over the same environments and seeds, and not before each environment had a run. Runs are judged
    whole: halfway, the learning rate is still high, and a slow start says little.
    """
    if len(others) < ENOUGH or len(by_environment(runs, "score")) < envs:
        return False
    theirs = sorted(mean_score({key: other[key] for key in runs}) for other in others)
    return mean_score(runs) < theirs[min(int(quantile * len(theirs)), len(theirs) - 1)]


def show(number: float | None) -> str:
    """A score or a return for people."""
    return "-" if number is None or not math.isfinite(number) else f"{number:,.{1 if abs(number) >= 10 else 3}f}"


# -------------------------------------------------------------------------------------------------- final check
def conclude(plan: Plan, study: Any) -> int:
    """After the trials: the report, the final check, the report with the check in it; the exit status."""
    winner, check, status = best_of(study), [], 0
    if all(known["value"] is None for known in winner.user_attrs["runs"].values()):
        print(f"error: every run of every trial failed; {plan.runs_dir / 'trials' / 'logs'} says why.", file=sys.stderr)
        return 1
    with locked(plan.runs_dir):
        write_suite(plan, winner, plan.out / "winner.toml")
        write_report(plan, study, check)
        owner = study.user_attrs.get("final", OWNER)
        if owner.split()[0] != OWNER.split()[0] and is_alive(study, owner):
            print(f"all trials are finished; {owner} makes the final check")
            return 0
        study.set_user_attr("final", OWNER)
    if plan.options.final_seeds:
        status, check = final_check(plan, winner)
        if status > 1:
            return status
        with locked(plan.runs_dir):
            write_report(plan, study, check)
    print("\n".join([*check, str(plan.out / "report.md")]))
    return status


def write_suite(plan: Plan, winner: Any, path: Path) -> None:
    """The default and the winner as a suite, for python -m benchmarks run PATH."""
    options = plan.options
    lines = [f"# The default, and the winner of the study {options.study}: trial {number_of(winner)}."]
    lines += [f"envs = {json.dumps(options.env_ids)}", 'algos = ["default", "winner"]']
    lines += [f"seeds = {options.final_seeds or 5}", f"eval_episodes = {options.eval_episodes}"]
    for name, flags in (("default", {}), ("winner", values_of(plan.space, winner.params))):
        lines += ["", f"[variants.{name}]", f"algo = {json.dumps(plan.algo)}", "", f"[variants.{name}.flags]"]
        lines += [f"{flag} = {json.dumps(value)}" for flag, value in (plan.space.fixed | flags).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def final_check(plan: Plan, winner: Any) -> tuple[int, list[str]]:
    """Runs the default and the winner on seeds that no trial has seen; the exit status, and a table in Markdown."""
    folder, suite = plan.runs_dir / f"final-{number_of(winner):04}", plan.out / "winner.toml"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(suite, folder / suite.name)
    jobs, workers = jobs_of(read_suite(str(suite)), plan.threads), plan.options.workers
    print(f"final check: the default and trial {number_of(winner)}, fresh seeds 1 to {plan.options.final_seeds}")
    status = run.run_all(jobs, folder, run.Options(suite=str(suite), workers=workers))
    if status > 1:
        return status, []
    values: dict[str, dict[str, list[float | None]]] = {"default": {}, "winner": {}}
    for job in jobs:
        done = status_of(job, folder) == "done"
        value = read_json(folder / job.name / "summary.json")["train_last100"] if done else None
        values[job.algo].setdefault(job.env_id, []).append(value)
    return status, compare(plan, values["default"], values["winner"])


def filled(plan: Plan, default: list[float | None], winner: list[float | None], env_id: str) -> list[np.ndarray]:
    """Returns of both with a number for the runs that failed: the lowest of all, and that which counts as 0 at most;
    nan where no return counts as 0."""
    known = [value for value in [*default, *winner] if value is not None]
    lowest = min([plan.bounds[env_id][0], *known]) if env_id in plan.bounds else math.nan
    return [np.array([lowest if value is None else value for value in values]) for values in (default, winner)]


def compare(plan: Plan, default: dict[str, list[float | None]], winner: dict[str, list[float | None]]) -> list[str]:
    """Means, their difference, and 95% bootstrap intervals of them, as a table in Markdown; None is a failed run.

    The interval of a difference, which the verdict is by, is stretched for few seeds (benchmarks.check). Over several
    environments it is that of means over environments, one for each seed.
    """
    rng, mean = np.random.default_rng(0), stats.aggregate_mean

    def row(name: str, old: list[np.ndarray], new: list[np.ndarray]) -> str:
        cells = []
        for scores in (old, new):
            low, high = stats.bootstrap(scores, mean, rng)
            cells.append(f"{show(mean(scores))} [{show(low)}, {show(high)}]")
        low, high = interval(np.mean(old, axis=0), np.mean(new, axis=0), 0.95, 0)
        verdict = (
            "better" if low > 0 else "worse" if high < 0 else "unknown" if math.isnan(low) else "not shown to differ"
        )
        return (
            f"| {name} | {' | '.join(cells)} | {show(mean(new) - mean(old))} [{show(low)}, {show(high)}] | {verdict} |"
        )

    lines = ["| environment | default | winner | difference | the winner is |", "|---|---|---|---|---|"]
    pairs = {env_id: filled(plan, default[env_id], winner[env_id], env_id) for env_id in default}
    lines += [row(env_id, [old], [new]) for env_id, (old, new) in pairs.items()]
    if len(default) > 1:
        sides = [
            [np.array([plan.score(env_id, value) for value in values]) for env_id, values in side.items()]
            for side in (default, winner)
        ]
        lines.append(row("all, normalised", *sides))
    lines += ["", "Intervals of means of few seeds are too narrow; those of the differences make up for it."]
    for env_id in default:
        failed = [f"{side[env_id].count(None)} of {len(side[env_id])}" for side in (default, winner)]
        if None in default[env_id] + winner[env_id]:
            lines += [f"On {env_id} {failed[0]} runs of the default and {failed[1]} of the winner failed and count as"]
            lines += [f"{show(min(map(np.min, pairs[env_id])))}."]
    return lines


# ------------------------------------------------------------------------------------------------------- report
def write_report(plan: Plan, study: Any, check: list[str]) -> None:
    """report.md, trials.csv and the figures."""
    options, winner, trials = plan.options, best_of(study), finished(study)
    trials.sort(key=lambda trial: (trial.state != TrialState.COMPLETE, -trial.value))
    rows = []
    for trial in trials:
        runs, whole = trial.user_attrs["runs"], trial.state == TrialState.COMPLETE
        row = {"trial": number_of(trial), "score": trial.value, "state": "finished" if whole else "stopped early"}
        row |= {"runs": len(runs), "failed": sum(known["value"] is None for known in runs.values())}
        row |= {env_id: by_environment(runs, "value").get(env_id) for env_id in options.env_ids}
        rows.append(row | values_of(plan.space, trial.params))
    with open(plan.out / "trials.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    flags = as_flags(plan.space.fixed | values_of(plan.space, winner.params))
    early, failed = sum(row["state"] == "stopped early" for row in rows), sum(row["failed"] for row in rows)
    scale = "; ".join(f"{env_id}: {low:g} is 0, {high:g} is 1" for env_id, (low, high) in plan.bounds.items())
    lines = [f"# Study {options.study}: {options.script} on {', '.join(options.env_ids)}", ""]
    lines += [
        f"{len(trials)} trials, {early} of them stopped early; {failed} failed runs. The script's defaults come first,"
    ]
    lines += ["as near as the space has them.", ""]
    lines += [
        "The score of a run is the mean return of its last 100 training episodes, and that of a trial its mean over"
    ]
    lines += [f"environments and over the seeds {TUNING + 1} to {TUNING + options.seeds}."]
    lines += [
        f"Scores are normalised ({scale}) and cut off at {FLOOR:g}; a failed run scores {FAILURE:g}."
        if scale
        else "A failed run scores lowest of all."
    ]
    again = ["python", "-m", "benchmarks", "run", str(plan.out / "winner.toml")]
    again += ["--runs-dir", str(plan.runs_dir / f"final-{number_of(winner):04}")]  # what the check has done stays done
    lines += ["", f"## Winner: trial {number_of(winner)}", "", "```"]
    lines += [shlex.join([*plan.shown, "--env-id", env_id, *flags]) for env_id in options.env_ids]
    lines += ["```", "", f"Or both, default and winner: `{shlex.join(again)}`. The winner's score is the highest"]
    lines += ["of many noisy ones, and so too high; the final check, on fresh seeds, is what to believe.", ""]
    lines += [f"## Final check: {options.final_seeds} seeds each, 95% bootstrap intervals", "", *check, ""] * bool(
        check
    )
    lines += ["## Trials", "", "![score by trial](history.png)", "", "![score by parameter](parameters.png)", ""]
    lines += ["![importance](importance.png)", ""] * (len(rows) >= 10)
    lines += [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    numbers = ("score", *options.env_ids)
    lines += [f"| {' | '.join(show(v) if k in numbers else str(v) for k, v in row.items())} |" for row in rows]
    draw(plan, sorted((trial for trial in trials if math.isfinite(trial.value)), key=number_of))
    (plan.out / "report.md").write_text("\n".join(lines) + "\n")


def importances(trials: list[Any]) -> dict[str, float]:
    """Share of each parameter in what sets the best trials apart (PED-ANOVA, arXiv 2304.10255), the largest first.

    Trials that were stopped early count with their mean so far: without them the bad part of the space were missing.
    Empty for fewer than ten trials.
    """
    if len(trials) < 10:
        return {}
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(optuna.create_trial(params=trial.params, distributions=trial.distributions, value=trial.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PED-ANOVA is experimental in some versions
        best = max(0.1, min(0.5, 5 / len(trials)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def draw(plan: Plan, trials: list[Any]) -> None:
    """history.png: score by trial; importance.png; parameters.png: score by parameter, the most important one first."""
    from benchmarks.figures import PALETTE, new_figure, plt, save_figure

    looks = {"finished": (TrialState.COMPLETE, PALETTE[0], "o"), "stopped early": (TrialState.PRUNED, PALETTE[5], "x")}
    label = "score" if plan.bounds else "return, last 100 episodes"
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, (state, color, marker) in looks.items():
        if points := [(number_of(trial), trial.value) for trial in trials if trial.state == state]:
            axis.scatter(*zip(*points), color=color, marker=marker, s=24, label=name)
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = np.maximum.accumulate([trial.value for trial in whole])
    axis.step(
        [number_of(trial) for trial in whole], best, where="post", color=PALETTE[2], label="best so far", zorder=0
    )
    axis.set(xlabel="trial", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, plan.out / "history.png")

    flags = list(plan.space.params)
    if shares := importances(trials):
        flags = list(shares)
        figure, axis = plt.subplots(figsize=(7, 0.7 + 0.3 * len(flags)), layout="constrained")
        bars = axis.barh(flags, list(shares.values()), color=PALETTE[0])
        axis.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="share in what sets the best trials apart", xlim=(0, 1.1 * max(shares.values())))
        save_figure(figure, plan.out / "importance.png")

    columns = min(4, len(flags))
    figure, axes = new_figure(math.ceil(len(flags) / columns), columns, 2.6, 2.2)
    for axis, flag in zip(axes.flat, flags):
        table = plan.space.params[flag]
        for state, color, marker in looks.values():
            points = [(trial.params[flag], trial.value) for trial in trials if trial.state == state]
            if "choices" in table:
                points = [(table["choices"].index(choice), value) for choice, value in points]
            axis.scatter([x for x, _ in points], [y for _, y in points], color=color, marker=marker, s=16)
        if "choices" in table:
            axis.set_xticks(range(len(table["choices"])), map(str, table["choices"]))
            axis.set_xlim(-0.5, len(table["choices"]) - 0.5)
        elif table.get("log"):
            margin = (table["high"] / table["low"]) ** 0.04
            axis.set(xscale="log", xlim=(table["low"] / margin, table["high"] * margin))
            ticks = np.geomspace(table["low"], table["high"], 3)
            axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axis.minorticks_off()
        else:
            margin = 0.04 * (table["high"] - table["low"])
            axis.set_xlim(table["low"] - margin, table["high"] + margin)
        axis.set_title(flag, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(flags) :]:
        axis.remove()
    figure.supylabel(label, fontsize=9)
    save_figure(figure, plan.out / "parameters.png")
