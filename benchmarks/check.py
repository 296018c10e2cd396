"""Are new runs worse than the stored ones? python -m benchmarks check RUNS --against benchmarks/results/classic

Compares the mean over seeds of train_last100 for each environment and algorithm. There are two kinds of a real drop:
the interval of the difference lies below zero and the difference exceeds a tolerance; or the new mean is back at the
random policy's, and no stored seed was there. A cell in which a random policy would pass proves nothing and is called
blind.

The intervals are percentile bootstraps of 1 - 0.05 / cells (Bonferroni: 95% for the whole table). Resampling a few
seeds gives intervals that are too narrow. So they are stretched about the difference: by the spread that resampling n
seeds loses, sqrt(n / (n - 1)), and by Student's quantile over the normal one (as Hesterberg 2015, arXiv 1411.5279, does
for one sample). In simulations of 12 cells, fresh seeds of the same code raise a false alarm in about one table of 25
with 5 seeds against 5 (without the stretching in one of four), of 40 with 10 against 10, of eight with 3 against 10.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.jobs import UsageError, check_range, require
from benchmarks.records import Run, rank, read_runs, read_scores
from benchmarks.report import game_of, number, score_range
from benchmarks.stats import difference

FAILED = ("failed", "diverged")
REPETITIONS = 20_000  # of a bootstrap; Bonferroni makes the tails thin


@dataclass
class Options:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """run directories, or folders of them"""
    against: str
    """folder with the scores.csv of a report, such as benchmarks/results/classic"""
    tolerance: float = 0.05
    """drop that is accepted, as a part of the stored score's distance from the random policy's score; where the latter
    is not known, as a part of the stored score or of the spread of its seeds, whichever is larger"""
    fewer_seeds: bool = False
    """accept that stored seeds are absent or not finished in RUNS; failed runs still count"""
    seed: int = 0
    """seed of the bootstrap"""


@dataclass(frozen=True)
class Score:
    """What counts of a run. score is its train_last100, and nan where the run was not completed."""

    env_id: str
    algo: str
    seed: int
    status: str
    total_timesteps: int
    score: float
    key: str


Cells = dict[tuple[str, str], dict[int, Score]]  # (environment, algorithm) -> seed -> score


# ------------------------------------------------------------------------------------------------------ reading
def score_of(run: Run) -> Score:
    """The score of a run, with the seven digits of a scores.csv."""
    score = float(f"{run.scores['train_last100']:.7g}") if run.done else math.nan
    return Score(run.env_id, run.algo, run.seed, run.status, run.budget, score, run.key)


def by_seed(scores: Iterable[Score]) -> Cells:
    cells: Cells = defaultdict(dict)
    for score in scores:
        cells[score.env_id, score.algo][score.seed] = score
    return dict(cells)


def cell_of(cell: dict[int, Score]) -> tuple[str, str]:
    """Its environment and algorithm."""
    run = next(iter(cell.values()))
    return run.env_id, run.algo


def finished(cell: dict[int, Score]) -> np.ndarray:
    """Scores (seeds,) of the runs that have one."""
    return np.array([run.score for run in cell.values() if not math.isnan(run.score)])


# --------------------------------------------------------------------------------------------------- statistics
def interval(old: np.ndarray, new: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Bootstrap interval of mean(new) - mean(old), stretched for few seeds; nan where a side has only one."""
    from scipy.stats import norm, t  # of an extra; main says so

    if min(len(old), len(new)) < 2:
        return math.nan, math.nan
    ends = difference(old, new, np.random.default_rng(seed), repetitions=REPETITIONS, confidence=confidence)
    resampled = old.var() / len(old) + new.var() / len(new)
    if resampled == 0:
        return ends
    unbiased = old.var(ddof=1) / len(old) + new.var(ddof=1) / len(new)
    tail, here = (1 - confidence) / 2, new.mean() - old.mean()
    student = t.isf(tail, len(old) + len(new) - 2) / norm.isf(tail)
    low, high = (float(here + (end - here) * student * math.sqrt(unbiased / resampled)) for end in ends)
    return low, high


def is_drop(old: np.ndarray, new: np.ndarray, random: float, high: float, tolerance: float) -> bool:
    """Whether new scores are really lower. high is the upper end of the interval; random is nan if not known."""
    known = math.isfinite(random)
    scale = abs(old.mean() - random) if known else max(abs(old.mean()), np.ptp(old))
    floor = random + tolerance * scale
    back_at_random = known and old.min() > floor >= new.mean()
    return bool(old.mean() - new.mean() > tolerance * scale and (high < 0 or back_at_random))


# --------------------------------------------------------------------------------------------------- comparison
def list_of(seeds: Iterable[int]) -> str:
    seeds = sorted(seeds)
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def match(stored: Cells, fresh: Cells) -> tuple[list[tuple[str, str]], list[str]]:
    """(cells to compare, a sentence about each of the others); takes runs of other budgets out of fresh."""
    both, others = [], []
    for name, runs in fresh.items():
        env_id, algo = name
        if name not in stored:
            versions = {env for env, other in stored if other == algo and game_of(env) == game_of(env_id)}
            hint = f" ({', '.join(sorted(versions))} is another environment)" if versions else ""
            others.append(f"{env_id} {algo}: nothing is stored{hint}")
            continue
        budgets = {run.total_timesteps for run in stored[name].values()}
        if strange := {run.total_timesteps for run in runs.values()} - budgets:
            asked, kept = (", ".join(f"{n:,}" for n in sorted(numbers)) for numbers in (strange, budgets))
            others.append(f"{env_id} {algo}: runs of {asked} steps; the stored ones have {kept}")
            fresh[name] = runs = {seed: run for seed, run in runs.items() if run.total_timesteps in budgets}
        if runs:
            both.append(name)
    both.sort(key=lambda name: (name[0], rank(name[1])))
    others += [f"{' '.join(name)}: not in RUNS" for name in stored if name not in fresh]
    return both, others


def missing_runs(stored: dict[int, Score], fresh: dict[int, Score], fewer_seeds: bool) -> list[str]:
    """A phrase for every way in which stored seeds have no score in RUNS, and for every run that fails only now."""
    seeds = defaultdict(list)
    for seed in sorted({*stored, *fresh}):
        before, after = stored.get(seed), fresh.get(seed)
        status = after.status if after else "absent"
        if status in FAILED:
            missing = not before or before.status not in FAILED
        else:
            had, has = (run is not None and not math.isnan(run.score) for run in (before, after))
            missing = had and not has and (status == "completed" or not fewer_seeds)
        if missing:
            what = "completed without a finished episode" if status == "completed" else status
            seeds[what].append(seed)
    return [f"{list_of(numbers)} {what}" for what, numbers in seeds.items()]


def identical(old: dict[int, Score], new: dict[int, Score]) -> list[int]:
    """Seeds that score as before, in all digits stored."""
    return [seed for seed, run in new.items() if seed in old and old[seed].score == run.score]


def compare(old: dict[int, Score], new: dict[int, Score], confidence: float, options: Options) -> tuple[str, list[str]]:
    """(verdict, row of the table) of a cell; the verdict is DROP, ok, identical, or why there is none."""
    before, after, same = finished(old), finished(new), len(identical(old, new))
    env_id, algo = cell_of(old)
    if not len(before) or not len(after):
        means = [number(scores.mean()) if len(scores) else "-" for scores in (before, after)]
        return "no score", [env_id, algo, f"{len(before)}, {len(after)}", *means, "-", "no score"]
    random = (score_range(env_id) or [math.nan])[0]
    low, high = interval(before, after, confidence, options.seed)
    change, comments = number(after.mean() - before.mean()), []
    if same == len(after):
        verdict = "identical"
    elif is_drop(before, after, random, high, options.tolerance):
        verdict = "DROP"
    elif math.isnan(high):
        verdict = "too few seeds"
    else:
        verdict = "ok"
        if high < 0:
            comments.append("lower within the tolerance")
        if low > 0:
            comments.append("higher")
    if verdict != "identical":
        if same:
            comments.append(f"{same} identical")
        if math.isfinite(low):
            change += f" [{number(low)}, {number(high)}]"
    if is_blind(before, len(after), random, confidence, options):
        comments.append("blind")
    row = [env_id, algo, f"{len(before)}, {len(after)}", number(before.mean()), number(after.mean()), change]
    return verdict, [*row, ", ".join([verdict, *comments])]


def is_blind(before: np.ndarray, seeds: int, random: float, confidence: float, options: Options) -> bool:
    """Whether a random policy would pass in a cell, as far as its score is known."""
    if not math.isfinite(random):
        return False
    played = np.full(seeds, random)
    _, high = interval(before, played, confidence, options.seed)
    return not is_drop(before, played, random, high, options.tolerance)


def print_table(rows: list[list[str]]) -> None:
    """Columns under each other, the means to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust, str.ljust]
    for row in rows:
        print("  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths)).rstrip())


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Prints the comparison; 0 without a real drop, 1 with one or where runs failed or seeds are missing.

    Environments and algorithms that RUNS does not have at all are named and not judged.
    """
    check_options(options)
    stored = by_seed(map(score_of, read_scores(Path(options.against))))
    runs, problems, missing = read_runs([Path(path) for path in options.runs])
    fresh = by_seed(map(score_of, runs))
    names, others = match(stored, fresh)
    if not names:
        reasons = "; ".join([*others, *problems]).rstrip(".")
        raise UsageError(f"nothing in RUNS can be compared with {options.against}: {reasons}.")
    cells = [(stored[name], fresh[name]) for name in names]
    enough = [(old, new) for old, new in cells if min(len(finished(old)), len(finished(new))) > 1]
    tested = sum(len(identical(old, new)) < len(finished(new)) for old, new in enough)
    confidence = 1 - 0.05 / max(tested, 1)
    verdicts, rows = zip(*(compare(old, new, confidence, options) for old, new in cells))
    print_table([["environment", "algorithm", "seeds", "stored", "new", "difference", "verdict"], *rows])
    percent = f"{100 * confidence:.4g}%"
    print(f"\nMeans of train_last100, stored and new; intervals of {percent}, 95% for all cells together.")
    if any(row[-1].endswith("blind") for row in rows):
        print("blind: a random policy would pass here too.")
    absent = absent_seeds(missing, stored, names, options.fewer_seeds)
    for name, (old, new) in zip(names, cells):
        absent += [f"{' '.join(name)}: {phrase}" for phrase in missing_runs(old, new, options.fewer_seeds)]
        if other := changed_reruns(old, new):
            what = "the same script text and arguments, another score: another machine, or other versions?"
            problems.append(f"{' '.join(name)}: {list_of(other)}: {what}")
    for title, lines in (("Failed or missing", absent), ("Not compared", others), ("In RUNS", problems)):
        if lines:
            print(f"\n{title}:\n" + "\n".join(f"  {line}" for line in lines))
    drops, judged = verdicts.count("DROP"), sum(verdict in ("DROP", "ok", "identical") for verdict in verdicts)
    if not judged and not absent:
        raise UsageError("no cell has the two seeds on each side that a comparison needs.")
    line = f"\n{drops or 'none'} of {judged} cells dropped"
    if absent:
        line += ", runs failed or are missing"
    print(f"{line}.")
    return 1 if drops or absent else 0


def check_options(options: Options) -> None:
    """Raises UsageError for options that cannot work."""
    require("check", "bench", "scipy")
    if not options.runs:
        raise UsageError(
            "give run directories, or folders of them: python -m benchmarks check runs/classic --against DIR"
        )
    if not 0 <= options.tolerance < 1:
        raise UsageError(f"--tolerance is {options.tolerance}, but must be at least 0 and less than 1.")
    check_range(options, 0, "seed")


def absent_seeds(
    missing: dict[tuple[str, str], list[int]], stored: Cells, names: list[tuple[str, str]], fewer_seeds: bool
) -> list[str]:
    """A phrase for every cell of which `run` was asked for seeds that are not there.

    Seeds of a compared cell that are stored are left to missing_runs.
    """
    phrases = []
    for name, seeds in missing.items():
        if name in names:
            seeds = [seed for seed in seeds if seed not in stored[name] and not fewer_seeds]
        if seeds:
            phrases.append(f"{' '.join(name)}: {list_of(seeds)} asked for, absent")
    return phrases


def changed_reruns(old: dict[int, Score], new: dict[int, Score]) -> set[int]:
    """Seeds with the key of the stored run and another score."""
    rerun = {seed for seed, run in new.items() if run.key and seed in old and run.key == old[seed].key}
    return {seed for seed in rerun if not math.isnan(new[seed].score)} - {*identical(old, new)}
