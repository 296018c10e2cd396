"""The figures that show what ppo.py computes: the curves against the paper's formulas, the small problem of the GAE
figure against oracles of its own, and both commands."""

import csv
from dataclasses import replace

import numpy as np
import pytest

import ppo
from benchmarks import clip_figure, gae_figure

EPS = ppo.Args.clip_coef


# ----------------------------------------------------------------------------------------------- clipped objective
@pytest.mark.parametrize("advantage", [1.0, -1.0, 2.5])
def test_the_clipped_curve_is_the_papers_and_its_gradient_vanishes_where_the_paper_says(advantage):
    r = clip_figure.RATIOS
    values, slopes = clip_figure.surrogate(r, advantage, ppo.Args())
    np.testing.assert_allclose(values, np.minimum(r * advantage, np.clip(r, 1 - EPS, 1 + EPS) * advantage))
    flat = r > 1 + EPS if advantage > 0 else r < 1 - EPS
    np.testing.assert_array_equal(slopes, np.where(flat, 0.0, advantage))


def test_the_other_curve_is_not_clipped():
    values, slopes = clip_figure.surrogate(clip_figure.RATIOS, -1.0, replace(ppo.Args(), objective="none"))
    np.testing.assert_array_equal(values, -clip_figure.RATIOS)
    np.testing.assert_array_equal(slopes, -1.0)


# ------------------------------------------------------------------------------------- generalized advantage estimate
UP = gae_figure.POLICY @ gae_figure.RIGHT  # probability of a step to the right
INSIDE = range(1, gae_figure.END)


@pytest.fixture(scope="module")
def steps() -> gae_figure.Steps:
    return gae_figure.play(400, 200, np.random.default_rng(7))


def mean_and_standard_error(steps: gae_figure.Steps, advantages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the estimates of each pair, from 20 groups of environments, which are independent where steps are not."""
    groups = np.array_split(np.arange(advantages.shape[1]), 20)
    parts = [gae_figure.Steps(*(x[:, group] for x in steps)) for group in groups]
    means = np.stack([gae_figure.moments(part, advantages[:, group])[0] for part, group in zip(parts, groups)])
    return means.mean(0), means.std(0, ddof=1) / 20**0.5


def test_undiscounted_values_are_the_gamblers_ruin():
    odds = (1 - UP) / UP
    ruin = (1 - odds ** np.arange(gae_figure.END)) / (1 - odds**gae_figure.END)
    np.testing.assert_allclose(gae_figure.true_values(1.0)[0][:-1], ruin, atol=1e-12)


@pytest.mark.parametrize("gamma", gae_figure.GAMMAS)
def test_values_satisfy_the_bellman_equation(gamma):
    values, action_values = gae_figure.true_values(gamma)
    assert values[0] == values[gae_figure.END] == 0
    for state in INSIDE:
        for action, right in enumerate(gae_figure.RIGHT):
            reward = right if state + 1 == gae_figure.END else 0.0
            future = right * values[state + 1] + (1 - right) * values[state - 1]
            assert action_values[state, action] == pytest.approx(reward + gamma * future)
        assert values[state] == pytest.approx(gae_figure.POLICY @ action_values[state])


def test_returns_of_played_episodes_average_to_the_true_action_values(steps):
    """With V = 0, gamma = 1 and lambda = 1 the estimate is the return that followed: here added up without GAE."""
    returns, total = np.zeros(steps.rewards.shape), np.zeros(steps.rewards.shape[1])
    for t in reversed(range(len(returns))):
        total = steps.rewards[t] + np.where(steps.successors[t] % gae_figure.END == 0, 0, total)
        returns[t] = total
    returns = returns[: -gae_figure.TAIL]
    mean, error = mean_and_standard_error(steps, returns)
    assert (abs(mean - gae_figure.true_values(1.0)[1][1:-1]) < 5 * error).all()
    zeros = gae_figure.value_function("zero", 1.0)
    np.testing.assert_allclose(gae_figure.estimate(steps, zeros, 1.0, 1.0), returns, atol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.9, 1.0])
def test_with_the_exact_value_function_every_lambda_is_unbiased(steps, gae_lambda):
    advantages = gae_figure.estimate(steps, gae_figure.value_function("exact", 1.0), 1.0, gae_lambda)
    mean, error = mean_and_standard_error(steps, advantages)
    assert (abs(mean - gae_figure.true_advantages()) < 5 * error).all()
    assert error.max() < 0.1


def test_values_of_zero_and_lambda_zero_have_the_bias_of_the_next_reward(steps):
    """The estimate is the reward alone, so the bias is p (V(s + 1) - V(s - 1)) of what it does not see, where p is how
    much likelier than on average the action moves right."""
    values = gae_figure.true_values(1.0)[0]
    more_right = gae_figure.RIGHT - UP
    unseen = np.array([values[state + 1] - values[state - 1] for state in INSIDE])  # at the end 0 - V(8): 1 was seen
    by_hand = -unseen[:, None] * more_right
    mean, error = mean_and_standard_error(steps, gae_figure.estimate(steps, np.zeros(11), 1.0, 0.0))
    assert (abs(gae_figure.bias_of(mean) - by_hand) < 5 * error).all()
    assert gae_figure.root_mean_square(by_hand) > 10 * error.max()


@pytest.mark.parametrize("name", gae_figure.VALUES)
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.8), (0.9, 0.0), (0.97, 0.9)])
def test_mean_estimates_are_those_of_the_definition(steps, name, gamma, gae_lambda):
    """The sum over l of (gamma lambda)^l E[delta l steps later], by powers of the transition matrix."""
    v = gae_figure.value_function(name, gamma)
    delta = np.zeros((11, 2))
    move = np.zeros((11, 11))
    for state in INSIDE:
        move[state, state + 1], move[state, state - 1] = UP, 1 - UP
        for action, right in enumerate(gae_figure.RIGHT):
            reward = right * (state + 1 == 10)
            delta[state, action] = reward + gamma * (right * v[state + 1] + (1 - right) * v[state - 1]) - v[state]
    later = sum((gamma * gae_lambda) ** n * np.linalg.matrix_power(move, n) for n in range(400)) @ (
        delta @ gae_figure.POLICY
    )
    to_the_right, to_the_left = later[2:, None], later[:-2, None]
    mean_later = gae_figure.RIGHT * to_the_right + (1 - gae_figure.RIGHT) * to_the_left
    expected = delta[1:-1] + gamma * gae_lambda * mean_later
    mean, error = mean_and_standard_error(steps, gae_figure.estimate(steps, v, gamma, gae_lambda))
    assert (abs(mean - expected) < 5 * error).all()


# ------------------------------------------------------------------------------------------------------- commands
def test_the_clip_command_writes_its_figure(tmp_path):
    clip_figure.main(["--out", str(tmp_path / "new" / "clip")])
    assert (tmp_path / "new" / "clip.png").read_bytes().startswith(b"\x89PNG")


def test_the_gae_command_writes_figure_and_table_and_they_show_what_the_page_says(tmp_path):
    gae_figure.main(["--out", str(tmp_path / "new" / "gae"), "--steps", "60", "--envs", "60"])
    assert (tmp_path / "new" / "gae.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "new" / "gae.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(gae_figure.GAMMAS) * len(gae_figure.LAMBDAS)
    row = {(row["values"], float(row["gamma"]), float(row["lambda"])): row for row in rows}

    def number(column: str, *key) -> float:
        return float(row[key][column])

    for values in gae_figure.VALUES:
        for gamma in gae_figure.GAMMAS:
            assert number("deviation", values, gamma, 1.0) > 1.5 * number("deviation", values, gamma, 0.0)
        assert number("deviation", values, 0.9, 1.0) < number("deviation", values, 1.0, 1.0)
    assert number("bias", "zero", 1.0, 0.94) < number("bias", "zero", 1.0, 0.5) < number("bias", "zero", 1.0, 0.0)
    assert number("bias", "exact", 1.0, 0.0) < 0.02 < number("bias", "exact", 0.9, 0.0)
