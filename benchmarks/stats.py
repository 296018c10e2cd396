"""Statistics of the reports: aggregates over environments, bootstrap intervals, learning curves on a grid.

Scores come as one array (seeds,) per environment; numbers of seeds may differ, and every environment counts the same.
The measures are those of Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (arXiv 2108.13264).
Functions reduce the last axis, so the same ones serve a bootstrap, which puts an axis of repetitions in front. A nan
score is never left out: what depends on it is nan.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Interval = tuple[np.ndarray, np.ndarray]  # low and high; of a single number, two floats


def iqm(x: np.ndarray, axis: int = -1, weights: np.ndarray | None = None) -> np.ndarray:
    """Interquartile mean along an axis: the mean of what is left without the lowest and the highest quarter.

    Of n numbers, floor(n / 4) go on each side: scipy.stats.trim_mean(x, 0.25), which rliable uses. Integer weights (n,)
    count a number several times, as if it were repeated.
    """
    x = np.moveaxis(np.asarray(x), axis, -1)
    weights = np.ones(x.shape[-1], int) if weights is None else np.asarray(weights)
    total, cut = weights.sum(), weights.sum() // 4
    order = x.argsort(-1)
    counted = weights[order].cumsum(-1).clip(cut, total - cut)
    kept = np.diff(counted, prepend=cut)  # how often each number is in the middle half; 0 * nan is nan, as it should be
    return (kept * np.take_along_axis(x, order, -1)).sum(-1) / (total - 2 * cut)


def checked(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The scores as arrays, none empty."""
    scores = [np.asarray(runs) for runs in scores]
    if not scores or any(runs.shape[-1] == 0 for runs in scores):
        raise ValueError("an environment without a score cannot be in an aggregate")
    return scores


def aggregate_mean(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over environments of the mean over seeds; of one environment, the mean. (..., seeds) each -> (...)."""
    return np.mean([runs.mean(-1) for runs in checked(scores)], axis=0)


def aggregate_median(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Median over environments of the mean over seeds. (..., seeds) each -> (...)."""
    return np.median([runs.mean(-1) for runs in checked(scores)], axis=0)


def aggregate_iqm(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Interquartile mean over the runs of all environments. (..., seeds) each -> (...).

    With equal numbers of seeds these are the pooled runs, as in the paper. Where they differ, the runs of every
    environment are repeated to their least common multiple first: more seeds make an environment's share more certain,
    not larger.
    """
    scores = checked(scores)
    seeds = np.array([runs.shape[-1] for runs in scores])
    return iqm(np.concatenate(scores, -1), weights=np.repeat(np.lcm.reduce(seeds) // seeds, seeds))


def aggregate_optimality_gap(scores: Sequence[np.ndarray], gamma: float = 1.0) -> np.ndarray:
    """How far runs stay below gamma: mean over environments and seeds of max(0, gamma - score); lower is better.

    The same as the paper's gamma - mean(min(score, gamma)). (..., seeds) each -> (...).
    """
    return aggregate_mean([np.maximum(gamma - runs, 0) for runs in checked(scores)])


def performance_profile(scores: Sequence[np.ndarray], taus: np.ndarray) -> np.ndarray:
    """Share of runs with a score above each tau, mean over environments. (..., seeds) each -> (..., taus)."""
    # heaviside(x, 0) is x > 0, and nan of nan
    above = [np.heaviside(runs[..., None, :] - np.asarray(taus)[:, None], 0) for runs in checked(scores)]
    return np.mean([runs.mean(-1) for runs in above], axis=0)


def probability_of_improvement(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 of a run of x and a run of y in the same environment, mean over environments.

    The Mann-Whitney U statistic over the number of pairs. (..., seeds) each -> (...).
    """
    pairs = [np.sign(a[..., :, None] - b[..., None, :]) for a, b in zip(checked(x), checked(y), strict=True)]
    return np.mean([(1 + sign.mean((-2, -1))) / 2 for sign in pairs], axis=0)


def bootstrap(
    scores: Sequence[np.ndarray],
    statistic: Callable[[list[np.ndarray]], np.ndarray],
    rng: np.random.Generator,
    repetitions: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval (low, high) of a statistic, from resampling the seeds within each environment.

    Each array (seeds,) becomes one (repetitions, seeds); the statistic takes their list and gives (repetitions, ...).
    One seed says nothing about the spread between seeds: if an environment has only one, the interval is nan.
    Few seeds say too little: of normal scores, the 95% interval of the mean holds the truth in 75% of cases with 3
    seeds, 82% with 5, 89% with 10, 92% with 20. Seeds that all score the same give an interval without width.
    """
    scores = checked(scores)
    if min(len(runs) for runs in scores) < 2:
        unknown = np.full(np.shape(statistic(scores)), np.nan)[()]
        return unknown, unknown
    resampled = [runs[rng.integers(len(runs), size=(repetitions, len(runs)))] for runs in scores]
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(resampled), [tail, 1 - tail], axis=0)
    return low, high


def bootstrap_curves(
    curves: np.ndarray,
    rng: np.random.Generator,
    statistic: str = "mean",
    repetitions: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Band (low, high), each (points,), of the mean or the iqm of curves (seeds, points); it holds point by point.

    Whole seeds are resampled. A point is nan where the curve of any seed is: a band over fewer seeds would jump.
    """
    reduce = {"mean": np.mean, "iqm": iqm}[statistic]

    def reduced(seeds: list[np.ndarray]) -> np.ndarray:
        """(..., points) from the numbers of the drawn seeds (..., seeds); point by point, which saves memory."""
        return np.stack([reduce(values[seeds[0]], axis=-1) for values in np.asarray(curves).T], axis=-1)

    return bootstrap([np.arange(len(curves))], reduced, rng, repetitions, confidence)


def profile_band(scores: Sequence[np.ndarray], taus: np.ndarray, rng: np.random.Generator, **options) -> Interval:
    """Band (low, high), each (taus,), of performance_profile; options as in bootstrap."""
    return bootstrap(scores, lambda drawn: performance_profile(drawn, taus), rng, **options)


def improvement_interval(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray], rng: np.random.Generator, **options
) -> Interval:
    """Interval (low, high) of probability_of_improvement, both sides resampled; options as in bootstrap."""
    both = [*x, *y]
    return bootstrap(both, lambda drawn: probability_of_improvement(drawn[: len(x)], drawn[len(x) :]), rng, **options)


def difference(old: np.ndarray, new: np.ndarray, rng: np.random.Generator, **options) -> Interval:
    """Interval (low, high) of mean(new) - mean(old) of the scores (seeds,) in one environment, both resampled."""
    return bootstrap([old, new], lambda drawn: drawn[1].mean(-1) - drawn[0].mean(-1), rng, **options)


def running_mean(steps: np.ndarray, returns: np.ndarray, window: int) -> np.ndarray:
    """Entry k: mean of the last `window` of the first k episodes, or of all k where they are fewer. -> (episodes + 1,)

    Entry 0 is nan. Every window is summed for itself, so that a nan return spoils only the windows that hold it.
    """
    if not (np.diff(steps) >= 0).all():
        raise ValueError("the steps at which episodes finished are not sorted")
    sums = sliding_window_view(np.concatenate([np.zeros(window), returns]), window).sum(-1)
    counts = np.minimum(np.arange(len(sums), dtype=float), window)
    counts[0] = np.nan
    return sums / counts


def curve_on_grid(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray, window: int = 100) -> np.ndarray:
    """Mean return of the last `window` episodes that had finished at or before each step of the grid. -> (points,)

    Where fewer episodes have finished, the mean is over these; before the first one it is nan. steps (episodes,), which
    are sorted, and returns (episodes,) are the columns of episodes.csv. At the last step of a run the mean is its
    train_last100, and it stays so behind the last episode: the caller knows where the run ended.
    """
    return running_mean(steps, returns, window)[np.searchsorted(steps, grid, side="right")]


def area_under_curve(steps: np.ndarray, returns: np.ndarray, budget: float, window: int = 100) -> float:
    """Average of curve_on_grid over all steps from the first finished episode to the budget: a return.

    The curve is a staircase, so the sum is exact: each value counts for the steps until the next episode finishes, the
    last one for those until the budget. Episodes behind the budget do not count; nan if none had finished by then.
    """
    steps, returns = np.asarray(steps), np.asarray(returns)
    returns, steps = returns[steps <= budget], steps[steps <= budget]
    values = running_mean(steps, returns, window)
    if not len(steps) or steps[0] == budget:
        return float(values[-1])
    return float((values[1:] * np.diff(steps, append=budget)).sum() / (budget - steps[0]))
