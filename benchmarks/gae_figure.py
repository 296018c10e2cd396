"""Bias and variance of GAE against lambda: python -m benchmarks.gae_figure [--out benchmarks/results/gae]

A random walk small enough that its true advantages are known: states 0 to 10, a reward of 1 at state 10, both ends
terminate, nothing is discounted, and every reward is noisy. `ppo.compute_gae` estimates the advantage at every step of
many episodes, with three value functions: the exact one of its gamma, that one with errors, and V = 0, as of a network
that has learned nothing. For every state-action pair:

    bias = mean error, less its mean over the actions of the state (weighted by the policy)
    deviation = standard deviation of one estimate
    error of a mean of n estimates = sqrt(bias^2 + deviation^2 / n)

The figure shows their root mean squares over the pairs; a dot marks the smallest error of a curve. The bias leaves out
what all actions of a state share. That is a baseline, and does not change the policy gradient on average. Writes
OUT.png and OUT.csv.
"""

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import ppo
from benchmarks.figures import PALETTE, new_figure, save_figure

END = 10  # states are 0 to END, and both ends are terminal
STATES = np.arange(1, END)  # the others, from which one acts
RIGHT = np.array([0.2, 0.8])  # probability of a move to the right after action 0 (left) and 1 (right)
POLICY = np.array([0.45, 0.55])  # probability of the two actions, in every state
NOISE = 0.2  # standard deviation of every reward
ERRORS = np.pad(0.1 * np.random.default_rng(0).standard_normal(len(STATES)), 1)  # of the second value function

GAMMAS = (1.0, 0.97, 0.9)
LAMBDAS = (*np.arange(0, 80, 5) / 100, *np.arange(80, 99, 2) / 100, 0.99, 1.0)
VALUES = {"exact": "V exact", "errors": "V with errors", "zero": "V = 0"}
TAIL = 400  # last steps, which only complete the estimates of earlier ones
BATCH = 100  # n of the last column: about the estimates per pair in a batch of 2,048 steps


class Steps(NamedTuple):
    """What was played, all (num_steps, num_envs); the last TAIL steps are not judged."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    successors: np.ndarray


def true_values(gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """V (states,) and Q (states, actions) of POLICY at this discount; both are 0 at the ends."""
    transitions = np.zeros((END + 1, 2, END + 1))  # p(successor | state, action)
    transitions[STATES, :, STATES + 1] = RIGHT
    transitions[STATES, :, STATES - 1] = 1 - RIGHT
    rewards = transitions[:, :, END]
    of_policy = np.einsum("a,sat->st", POLICY, transitions)
    values = np.linalg.solve(np.eye(END + 1) - gamma * of_policy, rewards @ POLICY)
    return values, rewards + gamma * transitions @ values


def true_advantages() -> np.ndarray:
    """A of the problem itself, which does not discount, (STATES, actions)."""
    values, action_values = true_values(1.0)
    return (action_values - values[:, None])[STATES]


def value_function(name: str, gamma: float) -> np.ndarray:
    exact = true_values(gamma)[0]
    return {"exact": exact, "errors": exact + ERRORS, "zero": 0 * exact}[name]


def play(num_steps: int, num_envs: int, rng: np.random.Generator) -> Steps:
    """Episodes one after the other, each from a random state; num_steps to be judged, and the TAIL."""
    state, steps = rng.choice(STATES, num_envs), []
    for _ in range(num_steps + TAIL):
        action = (rng.random(num_envs) < POLICY[1]).astype(int)
        successor = state + np.where(rng.random(num_envs) < RIGHT[action], 1, -1)
        reward = (successor == END) + NOISE * rng.standard_normal(num_envs)
        steps.append((state, action, reward, successor))
        state = np.where(successor % END == 0, rng.choice(STATES, num_envs), successor)
    return Steps(*map(np.stack, zip(*steps)))


def estimate(steps: Steps, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """GAE of the judged steps, (num_steps, num_envs)."""
    terminations = torch.from_numpy(steps.successors % END == 0)
    assert terminations[-TAIL:].any(0).all(), "an episode is longer than the tail"
    rewards, now, then = map(torch.from_numpy, (steps.rewards, values[steps.states], values[steps.successors]))
    never = torch.zeros_like(terminations)
    return ppo.compute_gae(rewards, now, then, terminations, never, gamma, gae_lambda)[0][:-TAIL].numpy()


def moments(steps: Steps, advantages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the estimates of each pair, (STATES, actions)."""
    size, pairs = 2 * len(STATES), (2 * (steps.states - 1) + steps.actions)[:-TAIL].ravel()
    counts = np.bincount(pairs, minlength=size)
    mean = np.bincount(pairs, advantages.ravel(), size) / counts
    variance = np.bincount(pairs, (advantages.ravel() - mean[pairs]) ** 2, size) / counts
    return mean.reshape(-1, 2), np.sqrt(variance).reshape(-1, 2)


def bias_of(mean: np.ndarray) -> np.ndarray:
    """The error of mean estimates, less what the actions of a state share, (STATES, actions)."""
    error = mean - true_advantages()
    return error - (error @ POLICY)[:, None]


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


def measure(steps: Steps) -> list[dict]:
    """A row for each value function, gamma and lambda."""
    rows = []
    for name in VALUES:
        for gamma in GAMMAS:
            values = value_function(name, gamma)
            for gae_lambda in LAMBDAS:
                mean, deviations = moments(steps, estimate(steps, values, gamma, gae_lambda))
                bias, deviation = root_mean_square(bias_of(mean)), root_mean_square(deviations)
                errors = {f"error_of_{n}": np.hypot(bias, deviation / n**0.5) for n in (1, BATCH)}
                row = {"values": name, "gamma": gamma, "lambda": gae_lambda, "bias": bias, "deviation": deviation}
                rows.append(row | errors)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    best = f"error_of_{BATCH}"
    columns = {"bias": "bias", "deviation": "deviation", best: f"error of a mean of {BATCH} estimates"}
    figure, axes = new_figure(len(VALUES), len(columns), 3.1, 2.0)
    for line, (name, label) in zip(axes, VALUES.items()):
        for axis, column in zip(line, columns):
            for gamma, color, style in zip(GAMMAS, PALETTE, ("-", "--", ":")):
                curve = [row for row in rows if (row["values"], row["gamma"]) == (name, gamma)]
                x, y = (np.array([row[key] for row in curve]) for key in ("lambda", column))
                dots = {"marker": "o", "markersize": 6, "markevery": [int(y.argmin())]} if column == best else {}
                axis.plot(x, y, color=color, linestyle=style, linewidth=2, label=f"gamma = {gamma:g}", **dots)
            axis.grid(alpha=0.25)
            axis.set_xticks(np.linspace(0, 1, 6), labels=["0", "0.2", "0.4", "0.6", "0.8", "1"])
        line[0].set_ylabel(label, fontsize=11)
    for column, title in zip(axes.T, columns.values()):
        top = max(axis.get_ylim()[1] for axis in column)
        for axis in column:
            axis.set(ylim=(0, top), xlim=(0, 1.02))
            axis.locator_params(axis="y", nbins=5)
        column[0].set_title(title, fontsize=11)
        column[-1].set_xlabel("lambda")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(GAMMAS), frameon=False, fontsize=10)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "gae", help="figure and table without their endings")
    parser.add_argument("--steps", type=int, default=2000, help="steps to judge in each environment")
    parser.add_argument("--envs", type=int, default=400, help="environments")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args(argv)
    if min(asked.steps, asked.envs) < 1 or asked.seed < 0:
        parser.error("--steps and --envs must be 1 or more, --seed 0 or more")
    torch.set_num_threads(1)
    rows = measure(play(asked.steps, asked.envs, np.random.default_rng(asked.seed)))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, asked.out.with_suffix(".png"))
    with open(asked.out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)


if __name__ == "__main__":
    main()
