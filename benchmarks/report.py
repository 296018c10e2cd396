"""Turns run directories into a report: learning curves, tables beside published numbers, aggregates with intervals.

Scores are named and fixed. `train_last100` is the mean return of the last 100 training episodes of a run, `eval` that
of its last policy in episodes of their own with frozen normalisers, with the most likely and with sampled actions.
Never the best over training.
"""

import base64
import csv
import html
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from benchmarks import stats
from benchmarks.jobs import UsageError, check_range, default_is, is_atari, make_folder, printable, read_json, require
from benchmarks.records import MEASURES, ORIGIN, Run, group_by, is_stored, rank, read_notes, read_runs, readable_part

REFERENCES = Path(__file__).resolve().parent / "references"
AGGREGATES = {  # by their titles
    "median": stats.aggregate_median,
    "IQM": stats.aggregate_iqm,
    "mean": stats.aggregate_mean,
    "optimality gap": stats.aggregate_optimality_gap,
}
PICTURES = ("curves.png", "curves_time.png", "aggregates.png", "profiles.png")
ABOUT_CURVES = """\
Thin lines are seeds, thick ones their {centre} with its 95% bootstrap interval over seeds, point by point. Every \
point is the mean return of the last 100 training episodes. Against time, a thick line stands where the median seed \
had got to those steps, on a logarithmic axis where algorithms differ much; times are those of the machine with \
whatever else ran on it. A cross ends a run that did not complete.

"""
ABOUT_SCORES = """
Mean over seeds and its 95% bootstrap interval, which with few seeds is too narrow: with 5 it holds the truth in about \
82% of cases, with 10 in 89%; with 3 it is their least and largest score (75%). `train_last100` is the mean return of \
the last 100 training episodes; the area under the curve is its average over the run; eval plays the last policy, \
normalisers frozen, with the most likely and with sampled actions, on seeds that are the same for every run of the \
scripts (a peer's library draws its own). Steps/s are the median and the range. Runs that failed or did not end are \
counted, and are in no score.

"""
STYLE = (  # of the page
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem}tr:hover{background:#f5f5f5}code{font-size:.85em}"
)


@dataclass
class Options:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run directories, folders of them, or what an earlier report has stored, such as benchmarks/results/classic"""
    out: Annotated[str, default_is('"report" in the folder of the runs')] = ""
    """folder of the report"""
    statistic: Literal["mean", "iqm"] = "mean"
    """centre of the learning curves"""
    title: Annotated[str, default_is("the suite's name")] = ""
    """title of the report"""
    seed: int = 0
    """seed of the bootstrap"""


class Matrix(NamedTuple):
    """What `run` has noted about a suite, in suite.json; empty for runs that were started by hand."""

    name: str = ""
    description: str = ""
    published: list[str] = []
    normalise: bool = True
    commands: list[str] = []
    example: str = ""


def read_matrix(paths: list[Path]) -> Matrix:
    """The notes of all folders, and those in stored results, as one. Notes on several suites have no common title."""
    notes = list(read_notes(paths).values()) + [stored_note(path) for path in filter(is_stored, paths)]
    named = [note for note in notes if note.get("name")]
    suites = sorted({str(note["name"]) for note in named})
    name = description = ""
    if len(suites) == 1:
        name, description = suites[0], str(named[0].get("description", ""))
    elif suites:
        description = f"Runs of the suites {', '.join(suites)}."

    def union(key: str) -> list[str]:
        return list(dict.fromkeys(str(item) for note in notes for item in note.get(key, [])))

    return Matrix(
        name=name,
        description=description,
        published=union("published"),
        normalise=all(note.get("normalise", True) for note in notes),
        commands=union("commands"),
        example=next((note["example"] for note in notes if note.get("example")), ""),
    )


def stored_note(path: Path) -> dict[str, Any]:
    """What an earlier report has noted about its suite, in the form of suite.json."""
    facts = read_json(path / "provenance.json")
    suite, commands = facts.get("suite"), facts.get("started by")
    note = {"commands": commands if isinstance(commands, list) else []}
    return readable_part(note | (suite if isinstance(suite, dict) else {})) | {"example": str(facts.get("example", ""))}


# --------------------------------------------------------------------------------------------------- references
@cache
def read_reference(name: str) -> list[dict[str, str]]:
    with open(REFERENCES / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def game_of(env_id: str) -> str:
    """ALE/Pong-v5 and PongNoFrameskip-v4 -> Pong, Hopper-v4 -> Hopper: what different versions have in common."""
    return re.sub(r"(NoFrameskip)?-v\d+$", "", env_id.removeprefix("ALE/"))


def same_protocol(env_id: str, published: str) -> bool:
    """Whether both are the same task. Games must also agree on sticky actions, which those of ALE/ have."""
    if is_atari(env_id) and env_id.startswith("ALE/") != published.startswith("ALE/"):
        return False
    return game_of(env_id) == game_of(published)


def score_range(env_id: str) -> tuple[float, float, str] | None:
    """(score that counts as 0, score that counts as 1, whose that is), fixed for all reports; None if unknown.

    0 is a random policy's. On Atari 1 is a human player's, elsewhere see benchmarks/references/normalisation.csv.
    """
    if is_atari(env_id):
        for row in read_reference("atari_random_human"):
            if row["game"] == game_of(env_id):
                return float(row["random"]), float(row["human"]), "a human player (DQN Zoo)"
        return None
    for row in read_reference("normalisation"):
        if row["env_id"] == env_id:
            return float(row["low"]), float(row["high"]), row["source"]
    return None


# --------------------------------------------------------------------------------------------------------- text
def literal(text: str) -> str:
    """Text from outside, as it stands there: no tag, link, picture or emphasis begins in it, in Markdown or HTML."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    marks = r"[\\`*\[\]]|(?<!\w)_+|_+(?!\w)|^[#>+-]"
    return re.sub(marks, lambda found: "".join(f"\\{mark}" for mark in found[0]), text)


def code(text: str) -> str:
    """Text from outside as code, whatever it holds."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


# ------------------------------------------------------------------------------------------------------- scores
def cells_of(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """(environment, algorithm) -> its runs, in the order of figures and tables."""
    cells = group_by(runs, "env_id", "algo")
    return dict(sorted(cells.items(), key=lambda item: (item[0][0], rank(item[0][1]))))


def scores(runs: list[Run], measure: str) -> np.ndarray:
    """Scores (seeds,) of the completed runs by one of MEASURES."""
    return np.array([run.scores[measure] for run in runs if run.done])


def counted(count: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: float) -> str:
    """Four digits or so, for a table."""
    if not np.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def score_cell(runs: list[Run], measure: str, rng: np.random.Generator) -> str:
    """Mean and 95% interval over seeds; only the mean where there is one seed. Says what is missing instead."""
    values = scores(runs, measure)
    if not len(values):
        return "-"
    if lacking := int((~np.isfinite(values)).sum()):
        what = "not evaluated" if measure.startswith("eval") else "no episode"
        return what if lacking == len(values) else f"{lacking} of {len(values)} {what}"
    low, high = stats.bootstrap([values], stats.aggregate_mean, rng)
    return number(values.mean()) + (f" [{number(low)}, {number(high)}]" if np.isfinite(low) else "")


def table(header: Sequence[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = [rows[0], ["---", *["---:"] * (len(header) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def seeds_column(runs: list[Run], missing: int) -> str:
    """ "5", or "4 of 5 (1 failed)"."""
    done = sum(run.done for run in runs)
    others = Counter(run.status for run in runs if not run.done)
    if missing:
        others["missing"] = missing
    if not others:
        return str(done)
    return f"{done} of {len(runs) + missing} ({', '.join(f'{n} {literal(status)}' for status, n in others.items())})"


def score_table(cells: dict, missing: dict[tuple[str, str], list[int]], rng: np.random.Generator) -> str:
    header = ("environment", "algorithm", "steps", "seeds", "train_last100", "area under curve")
    header += ("eval, deterministic", "eval, stochastic", "steps/s")
    measures = ("train_last100", "train_auc", "eval_deterministic", "eval_stochastic")
    rows = []
    for key in sorted({*cells, *missing}, key=lambda key: (key[0], rank(key[1]))):
        runs = cells.get(key, [])
        row = [*map(literal, key), steps_column(runs), seeds_column(runs, len(missing.get(key, [])))]
        row += [score_cell(runs, measure, rng) for measure in measures]
        rows.append([*row, speed_column(runs)])
    return table(header, rows)


def steps_column(runs: list[Run]) -> str:
    """The budget, or the least and the largest one."""
    budgets = sorted({run.budget for run in runs})
    return " to ".join(f"{budget:,}" for budget in dict.fromkeys([*budgets[:1], *budgets[-1:]])) or "-"


def speed_column(runs: list[Run]) -> str:
    """Median and range of the completed runs' steps per second."""
    sps = np.round(scores(runs, "sps"))
    sps = sps[np.isfinite(sps)]
    return f"{np.median(sps):,.0f} ({sps.min():,.0f} to {sps.max():,.0f})" if len(sps) else "-"


def published_table(cells: dict, sources: list[str]) -> str:
    """Our scores beside published ones, each with its own protocol; "" where there is nothing to put beside them."""
    protocols = {row["source_key"]: row for row in read_reference("sources")}
    rows = []
    for (env_id, algo), runs in cells.items():
        if not len(scores(runs, "train_last100")):
            continue
        for row in published_rows(env_id, algo, runs[0].budget, sources):
            rows.append([*published_row(env_id, algo, runs, row), protocols[row["source_key"]]["title"]])
    if not rows:
        return ""
    header = ("cell", "our train_last100", "our eval", "published", "difference", "what it measures", "steps", "seeds")
    text = table([*header, "version", "source"], rows)
    used = {row[-1] for row in rows}
    notes = [source for source in protocols.values() if source["title"] in used]
    return text + "\n" + "".join(f"- {note['title']}: {note['protocol_in_one_sentence']}\n" for note in notes)


def published_rows(env_id: str, algo: str, budget: int, sources: list[str]) -> list[dict[str, str]]:
    """The published scores to put beside a cell.

    A suite names the sources. Without sources only the same environment id and the same measure count. Of a source that
    has a row for our number of steps, only that one is shown.
    """
    found = []
    for row in read_reference("published"):
        if sources:
            wanted = row["source_key"] in sources
        else:
            wanted = row["statistic"] == "train_last100" and row["env_id"] == env_id
        if wanted and row["algo"] == algo and same_protocol(env_id, row["env_id"]):
            found.append(row)
    equal = {row["source_key"] for row in found if same_steps(row, budget)}
    return [row for row in found if row["source_key"] not in equal or same_steps(row, budget)]


def same_steps(row: dict[str, str], budget: int) -> bool:
    """Whether a published score is one after our number of steps."""
    return float(row["env_steps"] or 0) == budget


def published_row(env_id: str, algo: str, runs: list[Run], row: dict[str, str]) -> list[str]:
    """A row of the table but for its source.

    A difference is taken only from the same measure in the same version of the environment after the same number of
    steps.
    """
    budget, published = runs[0].budget, float(row["score"])
    ours, evaluated = (scores(runs, measure).mean() for measure in ("train_last100", "eval_deterministic"))
    measured = np.nan
    if same_steps(row, budget) and row["env_id"] in (env_id, game_of(env_id)):
        if row["statistic"] == "train_last100":
            measured = ours
        elif row["statistic"] in ("final_eval", "eval_deterministic_single_run"):
            measured = evaluated
    sign = "+" if measured > published else ""
    score = f"**{number(published)}**"
    if row["spread"]:
        score += f" ± {number(float(row['spread']))} ({row['spread_kind'].replace('_', ' ')})"
    return [
        literal(f"{env_id} {algo}"),
        f"{number(ours)} ({budget:,} steps)",
        number(evaluated) if np.isfinite(evaluated) else "not evaluated",
        score,
        sign + number(measured - published),
        row["statistic"],
        f"{int(float(row['env_steps'])):,}" if row["env_steps"] else "-",
        row["seeds"] or "-",
        row["env_id"],
    ]


def table_of_ppo_paper(cells: dict) -> str:
    """Table 1 of the PPO paper (arXiv 1707.06347) with ours beside it; "" for runs that are not of its settings.

    As there, 0 is the random policy and 1 the best run in an environment, so the scale depends on who is compared.
    """
    paper = {row["setting"]: row["normalized_score"] for row in read_reference("ppo_paper_table1")}
    runs = {key: scores(group, "train_last100") for key, group in cells.items() if key[1] in paper}
    runs = {key: values for key, values in runs.items() if len(values) and score_range(key[0])}
    ours: dict[str, list[float]] = {}
    for (env_id, setting), values in runs.items():
        low = score_range(env_id)[0]
        best = max(other.max() for (env, _), other in runs.items() if env == env_id)
        ours.setdefault(setting, []).extend((values - low) / (best - low) if best > low else values * np.nan)
    known = [setting for setting in paper if setting in ours]
    rows = [[name, normal(np.mean(ours[name])), str(len(ours[name])), paper[name]] for name in known]
    return table(["setting", "ours", "runs", "paper, 21 runs"], rows) if rows else ""


def usual_budget(cells: dict, env_id: str) -> int:
    """The budget of most algorithms with a completed run in an environment; of two as many, that of more runs."""
    budgets = [[run.budget for run in runs if run.done] for (env, _), runs in cells.items() if env == env_id]
    algos = Counter(budget for cell in budgets for budget in set(cell))
    runs = Counter(budget for cell in budgets for budget in cell)
    return max(algos, key=lambda budget: (algos[budget], runs[budget], budget), default=0)


def normalised(cells: dict, measure: str) -> tuple[dict[str, list[np.ndarray]], list[str], list[str]]:
    """(algorithm -> scores (seeds,) per environment, environments, what is left out and why), on the fixed 0-1 scale.

    All algorithms are judged by the same environments, those that every algorithm has. An algorithm that lacks more
    than half of the environments, or half of those that another has, is left out instead: SAC cannot play them all.
    """
    have, notes = normalised_cells(cells, measure)
    for algo in dict.fromkeys(algo for _, algo in cells):
        if algo not in have:
            what = "has no score that counts in any of these environments and is in no aggregate."
            notes.append(f"{literal(algo)} {what}")
    everywhere = sorted({env_id for per_env in have.values() for env_id in per_env})
    one_has_all = any(len(per_env) == len(everywhere) for per_env in have.values())
    for algo in list(have):
        if 2 * len(have[algo]) < len(everywhere) + one_has_all:
            what = f"has {len(have[algo])} of {len(everywhere)} environments and is in no aggregate."
            notes.append(f"{literal(algo)} {what}")
            del have[algo]
    common = [env_id for env_id in everywhere if all(env_id in per_env for per_env in have.values())]
    lacking = [env_id for env_id in everywhere if env_id not in common]
    notes += [f"{literal(env_id)} is in no aggregate, because not all have it." for env_id in lacking]
    counts = {algo: {len(have[algo][env_id]) for env_id in common} for algo in have}
    if len(set().union(*counts.values())) > 1:
        each = ", ".join(f"{literal(algo)} {'-'.join(map(str, sorted(count)))}" for algo, count in counts.items())
        notes.append(f"Numbers of seeds differ ({each}); every environment counts the same all the same.")
    return {algo: [per_env[env_id] for env_id in common] for algo, per_env in have.items()}, common, notes


def normalised_cells(cells: dict, measure: str) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """(algorithm -> environment -> scores (seeds,) on the 0-1 scale, what does not count and why).

    In an environment only runs of one budget count, that of most algorithms.
    """
    ranges = {env_id: score_range(env_id) for env_id, _ in cells}
    unknown = [env_id for env_id, known in ranges.items() if not known]
    notes = [f"{literal(env_id)} has no fixed 0 and 1, so it is in no aggregate." for env_id in unknown]
    have: dict[str, dict[str, np.ndarray]] = {}
    for (env_id, algo), runs in cells.items():
        values, usual, budget = scores(runs, measure), usual_budget(cells, env_id), runs[0].budget
        if len(values) and budget != usual:
            both = f"{budget:,} steps of {literal(env_id)}, not {usual:,}"
            notes.append(f"{literal(algo)} has {both}, and does not count there.")
        elif ranges[env_id] and len(values) and np.isfinite(values).all():
            low, high, _ = ranges[env_id]
            have.setdefault(algo, {})[env_id] = (values - low) / (high - low)
    return have, notes


# ----------------------------------------------------------------------------------------------------- the report
def provenance(runs: list[Run], matrix: Matrix) -> dict[str, Any]:
    """What ran: suite, commands and, each with the number of runs, commits, versions, hardware and threads."""
    return {
        "runs": len(runs),
        "suite": {name: getattr(matrix, name) for name in ("name", "description", "published", "normalise")},
        "started by": matrix.commands,
        **{name: dict(Counter(run.origin[name] for run in runs).most_common()) for name in ORIGIN},
        "example": next((plain_command(run) for run in runs if run.command), matrix.example),
    }


def plain_command(run: Run) -> str:
    """The command that started a run, without the folders of interpreter and script; of a module with -m."""
    name = [Path(part).name for part in run.command[1:2]]
    if name and Path(run.command[1]).parent.name == "benchmarks":
        name = ["-m", f"benchmarks.{Path(name[0]).stem}"]
    return shlex.join(["python", *name, *run.command[2:]])


def caption(facts: dict[str, Any]) -> str:
    """One line of provenance, to stand below a figure."""
    commit, versions, hardware = (first_of(facts[name]) for name in ("commit", "versions", "hardware"))
    line = f"{counted(facts['runs'], 'run')}; commit {commit}; {versions}; {hardware}"
    line += f"; threads per run {', '.join(facts['threads'])}"
    return f"*{literal(line)}.*" + "".join(f" {code(command)}" for command in facts["started by"])


def first_of(texts: dict[str, int]) -> str:
    """The most frequent of several texts, and how many others there are."""
    first = next(iter(texts), "-")
    return f"{first} and {len(texts) - 1} more" if len(texts) > 1 else first


def write_scores(runs: list[Run], path: Path) -> None:
    """One row per run, for `check`, for later reports and for readers who want the numbers."""
    header = ("env_id", "algo", "seed", "status", "total_timesteps", "global_step", *MEASURES, "key", *ORIGIN)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for run in runs:
            measured = ["" if np.isnan(run.scores[name]) else f"{run.scores[name]:.7g}" for name in MEASURES]
            row = [run.env_id, run.algo, run.seed, run.status, run.budget, run.global_step]
            writer.writerow([*row, *measured, run.key, *run.origin.values()])


def write_curves(runs: list[Run], path: Path, points: int = 100) -> None:
    """The learning curve of each run: its running mean return of 100 episodes, at `points` steps up to its budget.

    The last point is at the end of the run. Runs consist of whole batches, so that may be before or behind the budget.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "algo", "seed", "step", "wall_time", "return_last100"])
        for run in runs:
            if not len(run.returns):
                continue
            grid = np.linspace(run.budget / points, run.budget, points).round()
            end = max(run.steps[-1], run.global_step or 0)
            grid = np.append(grid[grid < end], end)
            values = run.curve(grid)
            times = np.interp(grid, run.steps, run.seconds)
            for step, seconds, value in zip(grid, times, values):
                if np.isfinite(value):
                    writer.writerow([run.env_id, run.algo, run.seed, int(step), f"{seconds:.1f}", f"{value:.5g}"])


def to_html(markdown_text: str, folder: Path, title: str) -> str:
    """One page with its pictures inside. HTML and links in the text are no HTML and no links in the page."""
    import markdown

    def embed(match: re.Match) -> str:
        if match[2] not in PICTURES:
            return "<img"
        picture = base64.b64encode((folder / match[2]).read_bytes()).decode()
        return f'<img alt="{match[1]}" src="data:image/png;base64,{picture}"'

    page = markdown.Markdown(extensions=["tables", "fenced_code"])
    page.preprocessors.deregister("html_block")
    page.parser.blockprocessors.deregister("reference")
    for name in ("html", "link", "reference", "short_reference", "autolink", "automail"):
        page.inlinePatterns.deregister(name)
    for name in ("image_reference", "short_image_ref"):
        page.inlinePatterns.deregister(name)
    body = re.sub(r'<img alt="([^"]*)" src="([^"]*)"', embed, page.convert(markdown_text))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(printable(title))}</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Writes report.md, report.html, figures, scores.csv, curves.csv and provenance.json; 1 if no run is readable."""
    require("a report", "bench", "markdown", "matplotlib")
    check_range(options, 0, "seed")
    paths = [Path(path) for path in options.runs]
    if not paths:
        raise UsageError("give run directories, or folders of them: python -m benchmarks report runs/smoke")
    out = Path(options.out) if options.out else (paths[0] if len(paths) == 1 else Path()) / "report"
    if os.path.exists(out / "trials.csv"):
        raise UsageError(f"{out} is the report of a sweep; choose another --out.")
    runs, problems, missing = read_runs(paths)
    matrix = read_matrix(paths)
    if not runs:
        print("\n".join(problems), file=sys.stderr)
        print("error: none of these run directories can be read.", file=sys.stderr)
        return 1
    rng = np.random.default_rng(options.seed)
    try:
        make_folder(out)
        text = write_report(runs, problems, missing, matrix, options, out, rng)
        (out / "report.md").write_text(text, encoding="utf-8")
        (out / "report.html").write_text(
            to_html(text, out, options.title or matrix.name or "Learning curves"), encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another --out.") from None
    for problem in problems:
        print(problem)
    done, absent = sum(run.done for run in runs), sum(map(len, missing.values()))
    line = f"{done} of {len(runs) + absent} runs are complete"
    if absent:
        line += f", {absent} are missing"
    print(f"{line}; {out / 'report.html'}")
    return 0


def write_report(
    runs: list[Run],
    problems: list[str],
    missing: dict[tuple[str, str], list[int]],
    matrix: Matrix,
    options: Options,
    out: Path,
    rng: np.random.Generator,
) -> str:
    """Writes everything but the report itself to out, and returns the report in Markdown."""
    from benchmarks import figures

    cells, facts = cells_of(runs), provenance(runs, matrix)
    write_scores(runs, out / "scores.csv")
    write_curves(runs, out / "curves.csv")
    (out / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    below = f"\n\n{caption(facts)}\n"
    text = opening(runs, cells, missing, matrix, options.title)
    text += "\n\n## Learning curves\n\n"
    for against, name in (("steps", "curves"), ("time", "curves_time")):
        figures.draw_curves(cells, out / f"{name}.png", against, options.statistic, rng)
        text += f"![Learning curves against {against}]({name}.png){below}\n"
    text += ABOUT_CURVES.format(centre={"mean": "mean", "iqm": "interquartile mean"}[options.statistic])
    text += f"## Scores\n\n{score_table(cells, missing, rng)}\n{ABOUT_SCORES}"
    if beside := published_table(cells, matrix.published):
        text += f"## Beside published numbers\n\n{beside}\n"
        text += "Published numbers are other people's, under their protocol.\n\n"
    if beside := table_of_ppo_paper(cells):
        text += f"## Table 1 of the PPO paper\n\n{beside}\n"
        text += "0 is a random policy, 1 the best run in each environment.\n\n"
    if matrix.normalise:
        text += aggregates(cells, out, below, rng)
    if problems:
        text += "## Problems\n\n" + "".join(f"- {literal(problem)}\n" for problem in problems) + "\n"
    text += "## Provenance\n\n```json\n" + json.dumps(facts, indent=2) + "\n```\n"
    return text


def opening(runs: list[Run], cells: dict, missing: dict[tuple[str, str], list[int]], matrix: Matrix, title: str) -> str:
    """The title, what the suite is about, and what of it is here."""
    text = f"# {literal(title or matrix.name or 'Learning curves')}\n\n"
    if matrix.description:
        text += f"The suite: {literal(matrix.description)}\n\n" if matrix.name else f"{literal(matrix.description)}\n\n"
    status = Counter(run.status for run in runs)
    if absent := sum(map(len, missing.values())):
        status["missing"] = absent
    ended = ", ".join(f"{n} {literal(name)}" for name, n in status.items())
    envs, algos = ({key[part] for key in [*cells, *missing]} for part in (0, 1))
    names = ", ".join(code(algo) for algo in sorted(algos, key=rank))
    text += f"Here: {counted(len(runs), 'run')} ({ended}) of {names} in {counted(len(envs), 'environment')};"
    text += f" {date.today()}."
    for folder, count in Counter(str(run.path) for run in runs if run.stored).items():
        text += f" Stored in {literal(folder)} already: {count}."
    return text


def aggregates(cells: dict, out: Path, below: str, rng: np.random.Generator) -> str:
    """The section on scores over all environments; "" where no environment has a fixed 0 and 1."""
    from benchmarks import figures

    by_algo, envs, notes = normalised(cells, "train_last100")
    if not envs:
        return ""
    intervals = {
        (algo, name): stats.bootstrap(values, aggregate, rng)
        for algo, values in by_algo.items()
        for name, aggregate in AGGREGATES.items()
    }
    algos = sorted(by_algo, key=rank)
    everyone = sorted({algo for _, algo in cells})
    figures.draw_aggregates(by_algo, AGGREGATES, intervals, everyone, out / "aggregates.png")
    figures.draw_profiles(by_algo, everyone, out / "profiles.png", rng)
    rows = []
    for algo in algos:
        points = [aggregate(by_algo[algo]) for aggregate in AGGREGATES.values()]
        rows.append([literal(algo), *[point(value, intervals[algo, name]) for name, value in zip(AGGREGATES, points)]])
    scale = "; ".join("{}: {:,.6g} to {:,.6g}, {}".format(literal(env_id), *score_range(env_id)) for env_id in envs)
    text = f"## Over {counted(len(envs), 'environment')}\n\n"
    names = [*map(literal, algos)]
    text += f"![Aggregates](aggregates.png){below}\n{table(['algorithm', *AGGREGATES], rows)}\n"
    text += f"![Performance profiles](profiles.png){below}\n"
    text += "Scores are `train_last100` on a fixed scale from 0, a random policy, to 1, which is stated for each"
    text += f" environment. {scale}. Intervals come from a bootstrap of seeds within"
    text += " environments (Agarwal et al. 2021, arXiv 2108.13264).\n\n"
    text += "".join(f"{note}\n\n" for note in notes)
    if len(algos) > 1:
        text += "Probability that a run of the row's algorithm scores higher than one of the column's:\n\n"
        text += f"{improvement_table(by_algo, algos, rng)}\n"
    if any(map(is_atari, envs)):
        rows = [
            [literal(env_id), *[f"{by_algo[algo][n].mean():.0%}" for algo in algos]] for n, env_id in enumerate(envs)
        ]
        text += "Human-normalised scores (0 is a random player, 100% a human one):\n\n"
        text += f"{table(['game', *names], rows)}\n"
    return text


def normal(value: float) -> str:
    """A normalised score."""
    return f"{value:.2f}" if np.isfinite(value) else "-"


def point(value: float, interval: tuple[float, float]) -> str:
    """A normalised score, with its interval if there is one."""
    return normal(value) + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if np.isfinite(interval[0]) else "")


def improvement_table(by_algo: dict[str, list[np.ndarray]], algos: list[str], rng: np.random.Generator) -> str:
    """The probability of improvement of each algorithm over each other one, with intervals."""
    rows = []
    for row in algos:
        cells = []
        for column in algos:
            if row == column:
                cells.append("")
                continue
            both = by_algo[row], by_algo[column]
            cells.append(point(stats.probability_of_improvement(*both), stats.improvement_interval(*both, rng)))
        rows.append([literal(row), *cells])
    return table(["", *map(literal, algos)], rows)
