"""The statistics against hand cases, brute force, scipy, numbers computed with rliable, and simulated data."""

import itertools
import warnings

import numpy as np
import pytest
import scipy.stats

from benchmarks import stats
from benchmarks.stats import aggregate_iqm, aggregate_mean, aggregate_median, aggregate_optimality_gap

AGGREGATES = [aggregate_mean, aggregate_median, aggregate_iqm, aggregate_optimality_gap]
# one line per environment; 21 runs are no multiple of 4, and there are ties within and between the two
OLD = [
    np.array([0.12, 0.33, 0.05, 0.41, 0.27, 0.19, 0.33]),
    np.array([0.95, 0.88, 1.04, 0.97, 0.91, 0.99, 0.20]),
    np.array([1.30, 1.75, 0.60, 2.10, 1.30, 0.95, 1.62]),
]
NEW = [
    np.array([0.30, 0.33, 0.22, 0.25, 0.10]),
    np.array([0.93, 0.90, 1.01, 0.85, 0.60]),
    np.array([1.10, 1.30, 1.05, 1.30, 0.90]),
]
# values and 95% intervals (50,000 repetitions) of these by rliable 1.2.0, in the order of AGGREGATES
RLIABLE_OLD = [0.8219047619047619, 0.8485714285714286, 0.76, 0.32619047619047625]
RLIABLE_NEW = [0.7426666666666667, 0.858, 0.7633333333333333, 0.308]
RLIABLE_LOW = [0.68428571, 0.62428571, 0.60454545, 0.25809524]
RLIABLE_HIGH = [0.95380952, 0.98428571, 0.90727273, 0.41428571]
TAUS = [0, 0.2, 0.33, 0.9, 1.3, 2.0]
RLIABLE_PROFILE = [1.0, 0.8095238095238095, 0.6666666666666666, 0.5238095238095238, 0.14285714285714285, 0.047619047619]
RLIABLE_IMPROVEMENT, RLIABLE_IMPROVEMENT_INTERVAL = 0.619047619047619, (0.42857143, 0.8)
UNEQUAL = [np.array([0.1, 0.9]), np.array([0.2, 0.4, 0.6, 1.8]), np.array([0.5, 0.7, 3.0])]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(1)


# Aggregates


def test_iqm_by_hand():
    assert stats.iqm([100, 1, 2, -50]) == 1.5
    assert stats.iqm([3, 1, 2]) == 2  # a quarter of three numbers is less than one: none goes
    assert stats.iqm([7]) == 7
    assert stats.iqm([9, 0, 4, 5, 6]) == 5


@pytest.mark.parametrize("n", range(1, 14))
def test_iqm_is_scipys_trimmed_mean(n, rng):
    x = rng.normal(size=(6, n)).round(1)
    assert stats.iqm(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25, axis=1))
    assert stats.iqm(x.T, axis=0) == pytest.approx(scipy.stats.trim_mean(x, 0.25, axis=1))


def test_weights_of_iqm_are_repetitions(rng):
    for _ in range(20):
        x, weights = rng.normal(size=6), rng.integers(1, 5, size=6)
        assert stats.iqm(x, weights=weights) == pytest.approx(scipy.stats.trim_mean(np.repeat(x, weights), 0.25))


@pytest.mark.parametrize("i", range(4))
def test_aggregates_are_rliables(i):
    assert AGGREGATES[i](OLD) == pytest.approx(RLIABLE_OLD[i])
    assert AGGREGATES[i](NEW) == pytest.approx(RLIABLE_NEW[i])


def test_aggregates_of_unequal_seeds_by_hand():
    assert aggregate_mean(UNEQUAL) == pytest.approx((0.5 + 0.75 + 1.4) / 3)
    assert aggregate_median(UNEQUAL) == pytest.approx(0.75)
    assert aggregate_optimality_gap(UNEQUAL) == pytest.approx((0.5 + (0.8 + 0.6 + 0.4) / 4 + (0.5 + 0.3) / 3) / 3)
    pooled = np.concatenate([np.repeat(UNEQUAL[0], 6), np.repeat(UNEQUAL[1], 3), np.repeat(UNEQUAL[2], 4)])
    assert aggregate_iqm(UNEQUAL) == pytest.approx(scipy.stats.trim_mean(pooled, 0.25))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_more_seeds_of_the_same_scores_change_nothing(aggregate):
    repeated = [UNEQUAL[0], np.tile(UNEQUAL[1], 5), UNEQUAL[2]]
    assert aggregate(repeated) == pytest.approx(aggregate(UNEQUAL))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_order_of_seeds_and_environments_does_not_matter(aggregate, rng):
    for order in itertools.permutations(range(3)):
        assert aggregate([rng.permutation(UNEQUAL[i]) for i in order]) == pytest.approx(aggregate(UNEQUAL))


@pytest.mark.parametrize("aggregate", [*AGGREGATES, lambda scores: stats.performance_profile(scores, TAUS)])
def test_leading_axes_are_repetitions(aggregate, rng):
    batch = [rng.normal(size=(4, 5, n)) for n in (3, 2, 4)]
    each = [[aggregate([runs[i, j] for runs in batch]) for j in range(5)] for i in range(4)]
    assert np.array_equal(aggregate(batch), each)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_nan_score_is_not_left_out(aggregate, rng):
    scores = [*UNEQUAL, np.array([0.3, np.nan, 0.4])]
    assert np.isnan(aggregate(scores))
    assert np.isnan(stats.bootstrap(scores, aggregate, rng)).all()


def test_environment_without_a_score_is_an_error(rng):
    for scores in ([], [OLD[0], np.array([])]):
        for aggregate in AGGREGATES:
            with pytest.raises(ValueError, match="without a score"):
                aggregate(scores)
        with pytest.raises(ValueError, match="without a score"):
            stats.bootstrap(scores, aggregate_mean, rng)


# Bootstrap


@pytest.mark.parametrize("i", range(4))
def test_intervals_are_rliables(i, rng):
    low, high = stats.bootstrap(OLD, AGGREGATES[i], rng, repetitions=20_000)
    assert (low, high) == pytest.approx((RLIABLE_LOW[i], RLIABLE_HIGH[i]), abs=0.012)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("scores", [OLD[1:2], UNEQUAL])
def test_interval_is_scipys(scores, confidence, rng):
    def mean_of_means(*samples, axis):
        return np.mean([sample.mean(axis) for sample in samples], axis=0)

    settings = dict(n_resamples=20_000, method="percentile", rng=np.random.default_rng(2), confidence_level=confidence)
    expected = scipy.stats.bootstrap(scores, mean_of_means, **settings).confidence_interval
    low, high = stats.bootstrap(scores, aggregate_mean, rng, repetitions=20_000, confidence=confidence)
    assert (low, high) == pytest.approx(expected, abs=0.04 * (expected.high - expected.low))


def test_interval_of_two_seeds_by_enumeration(rng):
    """Means of (0, 1): 0 and 1 with probability 1/4 each, 0.5 with 1/2."""
    assert stats.bootstrap([np.array([0, 1])], aggregate_mean, rng, confidence=0.6) == (0, 1)
    assert stats.bootstrap([np.array([0, 1])], aggregate_mean, rng, confidence=0.4) == (0.5, 0.5)


def test_interval_covers_the_truth_as_often_as_it_says(rng):
    """Environments of very different level and number of seeds: resampling across them would cover always."""
    levels, sizes = np.array([0.0, 50.0, -200.0]), (20, 30, 40)
    for confidence in (0.6, 0.95):
        covered = 0
        for _ in range(600):
            scores = [rng.normal(level, 1, size) for level, size in zip(levels, sizes)]
            low, high = stats.bootstrap(scores, aggregate_mean, rng, repetitions=400, confidence=confidence)
            covered += low <= levels.mean() <= high
        assert covered / 600 == pytest.approx(confidence, abs=0.04)


def test_coverage_with_few_seeds_is_as_the_docstring_says(rng):
    for seeds, said in ((3, 75), (5, 82), (10, 89), (20, 92)):
        assert f"{said}% " in stats.bootstrap.__doc__.replace("\n", " ")
        intervals = [stats.bootstrap([rng.normal(size=seeds)], aggregate_mean, rng, 400) for _ in range(1000)]
        covered = np.mean([low <= 0 <= high for low, high in intervals])
        assert covered == pytest.approx(said / 100, abs=0.035)


def test_same_generator_same_interval_and_the_global_one_is_not_touched():
    before = np.random.get_state()[1].copy()
    first, again, other = (stats.bootstrap(OLD, aggregate_iqm, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert np.array_equal(before, np.random.get_state()[1])


def test_one_seed_has_no_interval(rng):
    one, several = np.array([0.7]), np.array([0.5, 0.6, 0.7])
    for scores in ([one], [one, several], [several, several, one]):
        assert np.isnan(stats.bootstrap(scores, aggregate_mean, rng)).all()
    assert np.isnan(stats.difference(one, several, rng)).all()
    assert np.isnan(stats.difference(several, one, rng)).all()
    assert np.isnan(stats.improvement_interval([several], [one], rng)).all()
    low, high = stats.profile_band([one], TAUS, rng)
    assert low.shape == high.shape == (len(TAUS),) and np.isnan([low, high]).all()
    low, high = stats.bootstrap_curves(np.ones((1, 4)), rng)
    assert low.shape == high.shape == (4,) and np.isnan([low, high]).all()


# Curves over seeds


@pytest.mark.parametrize("name, statistic", [("mean", np.mean), ("iqm", stats.iqm)])
def test_band_of_curves_is_the_interval_at_each_point(name, statistic, rng):
    curves = rng.normal(size=(9, 6)) * np.arange(1, 7)
    low, high = stats.bootstrap_curves(curves, np.random.default_rng(5), name)
    for point in range(6):
        scores = [curves[:, point]]
        expected = stats.bootstrap(scores, lambda drawn: statistic(drawn[0], axis=-1), np.random.default_rng(5))
        assert (low[point], high[point]) == expected


def test_curves_are_resampled_as_whole_seeds(rng):
    curves = rng.normal(size=(8, 1)) + np.arange(5)
    low, high = stats.bootstrap_curves(curves, rng)
    assert low - np.arange(5) == pytest.approx(np.full(5, low[0]), abs=1e-12)
    assert high - np.arange(5) == pytest.approx(np.full(5, high[0]), abs=1e-12)


def test_confidence_and_repetitions_of_the_band_are_used(rng):
    curves = rng.normal(size=(10, 3))
    narrow, wide = (stats.bootstrap_curves(curves, rng, confidence=confidence) for confidence in (0.5, 0.99))
    assert (wide[0] < narrow[0]).all() and (narrow[1] < wide[1]).all()
    low, high = stats.bootstrap_curves(curves, rng, repetitions=1)
    assert np.array_equal(low, high)


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_band_is_nan_where_a_seed_is(statistic, rng):
    curves = rng.normal(size=(5, 4))
    curves[2, 0] = curves[4, 3] = np.nan
    low, high = stats.bootstrap_curves(curves, rng, statistic)
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False, False, True]


# Profiles, probability of improvement, difference


def test_profile_is_rliables_and_counts_each_environment_the_same():
    assert stats.performance_profile(OLD, TAUS) == pytest.approx(RLIABLE_PROFILE)
    assert stats.performance_profile(UNEQUAL, [0.6]) == pytest.approx((1 / 2 + 1 / 4 + 2 / 3) / 3)
    assert np.isnan(stats.performance_profile([*OLD, np.array([1, np.nan])], TAUS)).all()


def test_band_of_the_profile_is_that_of_each_share():
    low, high = stats.profile_band(UNEQUAL, TAUS, np.random.default_rng(5), repetitions=500, confidence=0.8)
    for i, tau in enumerate(TAUS):
        above = [(runs > tau).astype(float) for runs in UNEQUAL]
        expected = stats.bootstrap(above, aggregate_mean, np.random.default_rng(5), repetitions=500, confidence=0.8)
        assert (low[i], high[i]) == pytest.approx(expected)


def test_probability_of_improvement_is_rliables_and_scipys(rng):
    assert stats.probability_of_improvement(OLD, NEW) == pytest.approx(RLIABLE_IMPROVEMENT)
    x, y = ([rng.integers(0, 4, size=n) for n in sizes] for sizes in ((3, 6, 2), (5, 1, 2)))
    each = [scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y)]
    assert stats.probability_of_improvement(x, y) == pytest.approx(np.mean(each))


def test_probability_of_improvement_by_hand():
    assert stats.probability_of_improvement([[3, 4]], [[1, 2]]) == 1
    assert stats.probability_of_improvement([[1, 2]], [[3, 4]]) == 0
    assert stats.probability_of_improvement([[1, 2]], [[1]]) == 0.75
    assert stats.probability_of_improvement(OLD, OLD) == pytest.approx(0.5)
    assert stats.probability_of_improvement([[3, 4], [0]], [[1, 2], [5, 6, 7, 8]]) == 0.5  # not by number of pairs
    assert np.isnan(stats.probability_of_improvement([[1, np.nan]], [[1, 2]]))
    with pytest.raises(ValueError):
        stats.probability_of_improvement(OLD, OLD[:2])


def test_interval_of_improvement_is_rliables(rng):
    low, high = stats.improvement_interval(OLD, NEW, rng, repetitions=20_000)
    assert (low, high) == pytest.approx(RLIABLE_IMPROVEMENT_INTERVAL, abs=0.012)


def test_difference_is_new_less_old_with_both_resampled(rng):
    old, new = rng.normal(5, 2, size=12), rng.normal(9, 1, size=5)
    settings = dict(n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    oracle = scipy.stats.bootstrap((old, new), lambda a, b, axis: b.mean(axis) - a.mean(axis), **settings)
    expected = oracle.confidence_interval
    low, high = stats.difference(old, new, rng, repetitions=20_000)
    assert (low, high) == pytest.approx(expected, abs=0.04 * (expected.high - expected.low))
    assert low > 0
    narrow = stats.difference(old, new, rng, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


# Curves of one run

STEPS, RETURNS = np.array([10, 20, 20, 50]), np.array([1.0, 3.0, 8.0, 10.0])


def test_curve_on_grid_by_hand():
    assert np.isnan(stats.curve_on_grid(STEPS, RETURNS, [0, 9.9])).all()
    grid = [10, 19, 20, 49, 50, 1000]
    assert stats.curve_on_grid(STEPS, RETURNS, grid, 2).tolist() == [1, 1, 5.5, 5.5, 9, 9]
    assert stats.curve_on_grid(STEPS, RETURNS, grid, 1).tolist() == [1, 1, 8, 8, 10, 10]
    assert stats.curve_on_grid(STEPS, RETURNS, grid).tolist() == [1, 1, 4, 4, 5.5, 5.5]


def test_curve_and_area_against_brute_force(rng):
    for episodes, window in itertools.product((1, 5, 60), (1, 4, 100)):
        steps, returns = np.sort(rng.integers(1, 90, size=episodes)), rng.normal(size=episodes)
        finished = [returns[steps <= step][-window:] for step in range(120)]
        expected = [values.mean() if len(values) else np.nan for values in finished]
        assert stats.curve_on_grid(steps, returns, np.arange(120), window) == pytest.approx(expected, nan_ok=True)
        for budget in (steps[0] + 1, 45, 119):
            if budget > steps[0]:
                area = stats.area_under_curve(steps, returns, budget, window)
                assert area == pytest.approx(np.mean(expected[steps[0] : budget]))


def test_window_is_100_episodes_as_in_train_last100(rng):
    steps, returns = np.arange(1, 1001), rng.normal(size=1000)
    assert stats.curve_on_grid(steps, returns, [1000]) == pytest.approx([returns[-100:].mean()])
    assert stats.area_under_curve(steps, returns, 1000) == stats.area_under_curve(steps, returns, 1000, window=100)


def test_area_by_hand():
    assert stats.area_under_curve(STEPS, RETURNS, 60, window=2) == pytest.approx((10 * 1 + 30 * 5.5 + 10 * 9) / 50)
    assert stats.area_under_curve(STEPS, RETURNS, 30, window=2) == pytest.approx((10 * 1 + 10 * 5.5) / 20)
    assert stats.area_under_curve(STEPS, RETURNS, 10) == 1
    assert stats.area_under_curve(np.array([20, 20]), np.array([1.0, 2.0]), 20) == 1.5
    assert stats.area_under_curve(STEPS, np.full(4, -7.0), 1e6) == -7
    assert isinstance(stats.area_under_curve(STEPS, RETURNS, 60), float)


def test_no_finished_episode_is_nan():
    nothing = np.array([])
    assert np.isnan(stats.curve_on_grid(nothing, nothing, [0, 5])).all()
    assert np.isnan(stats.area_under_curve(nothing, nothing, 100))
    assert np.isnan(stats.area_under_curve(STEPS, RETURNS, 9))


def test_nan_return_spoils_only_the_windows_that_hold_it():
    returns = np.array([1.0, np.nan, 8.0, 10.0])
    curve = stats.curve_on_grid(np.arange(4), returns, np.arange(4), window=2)
    assert np.isnan(curve).tolist() == [False, True, True, False] and curve[3] == 9
    assert np.isnan(stats.area_under_curve(np.arange(4), returns, 4, window=2))
    assert stats.area_under_curve(np.arange(4), returns, 0.5, window=2) == 1  # later episodes do not count


def test_unsorted_steps_are_an_error():
    for steps in ([1, 3, 2], [1, np.nan, 2]):
        with pytest.raises(ValueError, match="not sorted"):
            stats.curve_on_grid(np.array(steps), np.ones(3), [5])
