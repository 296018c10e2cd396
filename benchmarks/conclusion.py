"""What comes after the trials of a sweep: the report, and the final check of the winner on fresh seeds."""

import csv
import json
import math
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import run, stats
from benchmarks.check import interval
from benchmarks.jobs import OWNER, as_flags, make_folder, read_value
from benchmarks.plan import FAILURE, FLOOR, TUNING, Plan
from benchmarks.report import literal
from benchmarks.space import values_of
from benchmarks.study import best_of, by_environment, finished, is_alive, locked, number_of, show
from benchmarks.suite import jobs_of, read_suite

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:  # of an extra; make_plan says so
    optuna = None

FEW = 10  # trials, before the importance of parameters is worth showing


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
    make_folder(path.parent)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def final_check(plan: Plan, winner: Any) -> tuple[int, list[str]]:
    """Runs the default and the winner on seeds that no trial has seen; the exit status, and a table in Markdown."""
    folder, suite = plan.runs_dir / f"final-{number_of(winner):04}", plan.out / "winner.toml"
    make_folder(folder)
    shutil.copy(suite, folder / suite.name)
    jobs, workers = jobs_of(read_suite(str(suite)), plan.threads), plan.options.workers
    print(f"final check: the default and trial {number_of(winner)}, fresh seeds 1 to {plan.options.final_seeds}")
    status = run.run_all(jobs, folder, run.Options(suite=str(suite), workers=workers))
    if status > 1:
        return status, []
    values: dict[str, dict[str, list[float | None]]] = {"default": {}, "winner": {}}
    for job in jobs:
        summary = folder / job.name / "summary.json"
        trained = read_value(summary, "status", kind=str) == "completed"
        value = read_value(summary, "train_last100") if trained else None
        values[job.algo].setdefault(job.env_id, []).append(value)
    return status, compare(plan, values["default"], values["winner"])


def filled(plan: Plan, default: list[float | None], winner: list[float | None], env_id: str) -> list[np.ndarray]:
    """Returns of both with a number for the runs that failed.

    The number is the lowest return of all, and at most the return that counts as 0; nan where no return counts as 0.
    """
    known = [value for value in [*default, *winner] if value is not None]
    lowest = min([plan.bounds[env_id][0], *known]) if env_id in plan.bounds else math.nan
    return [np.array([lowest if value is None else value for value in values]) for values in (default, winner)]


def compare(plan: Plan, default: dict[str, list[float | None]], winner: dict[str, list[float | None]]) -> list[str]:
    """Means, their difference, and 95% bootstrap intervals of them, as a table in Markdown; None is a failed run."""
    rng = np.random.default_rng(0)
    pairs = {env_id: filled(plan, default[env_id], winner[env_id], env_id) for env_id in default}
    lines = ["| environment | default | winner | difference | the winner is |", "|---|---|---|---|---|"]
    lines += [comparison(env_id, [old], [new], rng) for env_id, (old, new) in pairs.items()]
    if len(default) > 1:
        sides = [
            [np.array([plan.score(env_id, value) for value in values]) for env_id, values in side.items()]
            for side in (default, winner)
        ]
        lines.append(comparison("all, normalised", *sides, rng))
    lines += ["", "Intervals of means of few seeds are too narrow; those of the differences make up for it."]
    for env_id in default:
        failed = [f"{side[env_id].count(None)} of {len(side[env_id])}" for side in (default, winner)]
        if None in default[env_id] + winner[env_id]:
            lines += [f"On {env_id} {failed[0]} runs of the default and {failed[1]} of the winner failed and count as"]
            lines += [f"{show(min(map(np.min, pairs[env_id])))}."]
    return lines


def comparison(name: str, old: list[np.ndarray], new: list[np.ndarray], rng: np.random.Generator) -> str:
    """A row of the table; scores (seeds,) of each environment.

    The verdict goes by the interval of the difference, which is stretched for few seeds (benchmarks.check). Over
    several environments it is the difference of means over environments, one for each seed.
    """
    cells = []
    for scores in (old, new):
        ends = stats.bootstrap(scores, stats.aggregate_mean, rng)
        cells.append(show(stats.aggregate_mean(scores)) + brackets(ends))
    low, high = interval(np.mean(old, axis=0), np.mean(new, axis=0), 0.95, 0)
    if math.isnan(low):
        verdict = "unknown"
    elif low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    else:
        verdict = "not shown to differ"
    difference = show(stats.aggregate_mean(new) - stats.aggregate_mean(old)) + brackets((low, high))
    return f"| {name} | {' | '.join(cells)} | {difference} | {verdict} |"


def brackets(ends: tuple[float, float]) -> str:
    """An interval behind its number; "" where there is none."""
    return f" [{show(ends[0])}, {show(ends[1])}]" if np.isfinite(ends).all() else ""


# ------------------------------------------------------------------------------------------------------- report
def write_report(plan: Plan, study: Any, check: list[str]) -> None:
    """report.md, trials.csv and the figures."""
    trials = finished(study)
    trials.sort(key=lambda trial: (trial.state != TrialState.COMPLETE, -trial.value))
    rows = [row_of(plan, trial) for trial in trials]
    with open(plan.out / "trials.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(plan, sorted((trial for trial in trials if math.isfinite(trial.value)), key=number_of))
    lines = [*opening(plan, rows), *about_winner(plan, best_of(study))]
    if check:
        lines += [f"## Final check: {plan.options.final_seeds} seeds each, 95% bootstrap intervals", "", *check, ""]
    lines += ["## Trials", "", "![score by trial](history.png)", "", "![score by parameter](parameters.png)", ""]
    if len(rows) >= FEW:
        lines += ["![importance](importance.png)", ""]
    lines += [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    numbers = ("score", *plan.options.env_ids)
    cells = [[show(v) if k in numbers else literal(str(v)).replace("|", "\\|") for k, v in row.items()] for row in rows]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    (plan.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def row_of(plan: Plan, trial: Any) -> dict[str, Any]:
    """A row of trials.csv."""
    runs = trial.user_attrs["runs"]
    values = by_environment(runs, "value")
    return {
        "trial": number_of(trial),
        "score": trial.value,
        "state": "finished" if trial.state == TrialState.COMPLETE else "stopped early",
        "runs": len(runs),
        "failed": sum(known["value"] is None for known in runs.values()),
        **{env_id: values.get(env_id) for env_id in plan.options.env_ids},
        **values_of(plan.space, trial.params),
    }


def opening(plan: Plan, rows: list[dict[str, Any]]) -> list[str]:
    """The title, and what the scores are."""
    options = plan.options
    early, failed = sum(row["state"] == "stopped early" for row in rows), sum(row["failed"] for row in rows)
    if plan.bounds:
        scale = "; ".join(f"{env_id}: {low:g} is 0, {high:g} is 1" for env_id, (low, high) in plan.bounds.items())
        about = f"Scores are normalised ({scale}) and cut off at {FLOOR:g}; a failed run scores {FAILURE:g}."
    else:
        about = "A failed run scores lowest of all."
    return [
        f"# Study {options.study}: {options.script} on {', '.join(options.env_ids)}",
        "",
        f"{len(rows)} trials, {early} of them stopped early; {failed} failed runs. The script's defaults come first,",
        "as near as the space has them.",
        "",
        "The score of a run is the mean return of its last 100 training episodes, and that of a trial its mean over",
        f"environments and over the seeds {TUNING + 1} to {TUNING + options.seeds}.",
        about,
    ]


def about_winner(plan: Plan, winner: Any) -> list[str]:
    """The commands that run the winner."""
    flags = as_flags(plan.space.fixed | values_of(plan.space, winner.params))
    # in the folder of the final check, so that the runs of the check stay done
    folder = plan.runs_dir / f"final-{number_of(winner):04}"
    again = ["python", "-m", "benchmarks", "run", str(plan.out / "winner.toml"), "--runs-dir", str(folder)]
    return [
        "",
        f"## Winner: trial {number_of(winner)}",
        "",
        "```",
        *[shlex.join([*plan.shown, "--env-id", env_id, *flags]) for env_id in plan.options.env_ids],
        "```",
        "",
        f"Or both, default and winner: `{shlex.join(again)}`. The winner's score is the highest",
        "of many noisy ones, and so too high; the final check, on fresh seeds, is what to believe.",
        "",
    ]


def importances(trials: list[Any]) -> dict[str, float]:
    """Share of each parameter in what sets the best trials apart (PED-ANOVA, arXiv 2304.10255), the largest first.

    Trials that were stopped early count with their mean so far: they are the bad part of the space. Empty for fewer
    than FEW trials.
    """
    if len(trials) < FEW:
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
    from benchmarks.figures import PALETTE

    looks = {"finished": (TrialState.COMPLETE, PALETTE[0], "o"), "stopped early": (TrialState.PRUNED, PALETTE[5], "x")}
    label = "score" if plan.bounds else "return, last 100 episodes"
    draw_history(trials, looks, label, plan.out / "history.png")
    shares = importances(trials)
    if shares:
        draw_importance(shares, plan.out / "importance.png")
    draw_parameters(plan, trials, list(shares or plan.space.params), looks, label)


def draw_history(trials: list[Any], looks: dict[str, tuple], label: str, path: Path) -> None:
    """The score of each trial, and the best so far."""
    from benchmarks.figures import PALETTE, plt, save_figure

    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, (state, color, marker) in looks.items():
        if points := [(number_of(trial), trial.value) for trial in trials if trial.state == state]:
            axis.scatter(*zip(*points), color=color, marker=marker, s=24, label=name)
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    numbers, best = [number_of(trial) for trial in whole], np.maximum.accumulate([trial.value for trial in whole])
    axis.step(numbers, best, where="post", color=PALETTE[2], label="best so far", zorder=0)
    axis.set(xlabel="trial", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_importance(shares: dict[str, float], path: Path) -> None:
    """A bar for each parameter."""
    from benchmarks.figures import PALETTE, plt, save_figure

    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.3 * len(shares)), layout="constrained")
    bars = axis.barh(list(shares), list(shares.values()), color=PALETTE[0])
    axis.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="share in what sets the best trials apart", xlim=(0, 1.1 * max(shares.values())))
    save_figure(figure, path)


def draw_parameters(plan: Plan, trials: list[Any], flags: list[str], looks: dict[str, tuple], label: str) -> None:
    """A panel for each parameter: the score of each trial against its value."""
    from benchmarks.figures import new_figure, save_figure

    columns = min(4, len(flags))
    figure, axes = new_figure(math.ceil(len(flags) / columns), columns, 2.6, 2.2)
    for axis, flag in zip(axes.flat, flags):
        table = plan.space.params[flag]
        for state, color, marker in looks.values():
            points = [(trial.params[flag], trial.value) for trial in trials if trial.state == state]
            if "choices" in table:
                points = [(table["choices"].index(choice), value) for choice, value in points]
            axis.scatter([x for x, _ in points], [y for _, y in points], color=color, marker=marker, s=16)
        set_range(axis, table)
        axis.set_title(flag, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(flags) :]:
        axis.remove()
    figure.supylabel(label, fontsize=9)
    save_figure(figure, plan.out / "parameters.png")


def set_range(axis: Any, table: dict[str, Any]) -> None:
    """Makes the axis of a parameter span its table of the space."""
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
