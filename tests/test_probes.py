"""Probe environments: the smallest tasks that a whole run can fail for one reason only."""

import csv
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import ppo

TWO_ACTIONS = Discrete(2)


class Probe(gym.Env):
    """Episodes of `length` steps, ended by truncation or termination, paid by reward(seen, action, last step?).

    It shows +1 or -1 at random if `random`, else the time in the episode if `timed`, else always 1.
    """

    observation_space = Box(-np.inf, np.inf, (1,))

    def __init__(
        self,
        reward: Callable[[float, float, bool], float],
        length: int = 1,
        truncates: bool = False,
        random: bool = False,
        timed: bool = False,
        action_space: gym.Space = TWO_ACTIONS,
    ):
        self.reward, self.length, self.truncates, self.random, self.timed = reward, length, truncates, random, timed
        self.action_space = action_space

    def observe(self) -> np.ndarray:
        self.seen = self.np_random.choice([-1.0, 1.0]) if self.random else float(self.time) if self.timed else 1.0
        return np.float32([self.seen])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        last = self.time == self.length
        reward = self.reward(self.seen, float(np.asarray(action).item()), last)
        return self.observe(), reward, last and not self.truncates, last and self.truncates, {}


def learn(folder: Path, steps: int, *flags: str, **probe) -> ppo.Agent:
    """Trains on Probe(**probe) and returns the agent as the newest checkpoint has it."""
    gym.register("Probe-v0", entry_point=lambda: Probe(**probe))
    try:
        small = f"--env-id Probe-v0 --num-envs 4 --num-steps 32 --num-minibatches 2 --total-timesteps {steps}"
        fast = "--learning-rate 1e-2 --update-epochs 4 --compile off --device cpu --run-name probe"
        args = ppo.parse_args([*small.split(), *fast.split(), "--runs-dir", str(folder), *flags])
        checkpoint = ppo.load_checkpoint(ppo.train(args))
        envs = ppo.make_envs(args, 1, 0)
    finally:
        del gym.registry["Probe-v0"]
    agent = ppo.make_agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent


@torch.no_grad()
def value(agent: ppo.Agent, seen: float) -> float:
    return agent.value(agent.features(torch.tensor([[seen]]))).item()


@torch.no_grad()
def probability(agent: ppo.Agent, seen: float, action: int) -> float:
    return agent.policy(agent.features(torch.tensor([[seen]]))).log_prob(torch.tensor([[action]])).exp().item()


def test_constant_reward_is_the_value(tmp_path):
    agent = learn(tmp_path, 4000, reward=lambda seen, action, last: 1.0)
    assert value(agent, 1.0) == pytest.approx(1.0, abs=0.02)


def test_a_reward_one_step_away_is_worth_gamma(tmp_path):
    agent = learn(tmp_path, 6000, "--gamma", "0.6", reward=lambda seen, action, last: float(last), length=2, timed=True)
    assert value(agent, 1.0) == pytest.approx(1.0, abs=0.05)
    assert value(agent, 0.0) == pytest.approx(0.6, abs=0.05)


def test_the_value_depends_on_the_observation(tmp_path):
    agent = learn(tmp_path, 4000, reward=lambda seen, action, last: seen, random=True)
    assert value(agent, 1.0) == pytest.approx(1.0, abs=0.05)
    assert value(agent, -1.0) == pytest.approx(-1.0, abs=0.05)


@pytest.mark.parametrize("objective", ["clip", "kl-fixed", "kl-adaptive", "none"])
def test_the_policy_learns_the_action_that_pays(tmp_path, objective):
    agent = learn(tmp_path, 4000, "--objective", objective, reward=lambda seen, action, last: action)
    assert probability(agent, 1.0, 1) > 0.95


def test_a_gaussian_policy_learns_the_action_that_pays(tmp_path):
    agent = learn(
        tmp_path, 8000, reward=lambda seen, action, last: -((action - 0.7) ** 2), action_space=Box(-5, 5, (1,))
    )
    with torch.no_grad():
        mode = ppo.act(agent, agent.features(torch.tensor([[1.0]])), torch.zeros(1, 1)).item()
    assert mode == pytest.approx(0.7, abs=0.15)


def test_the_policy_learns_the_action_that_pays_for_this_observation(tmp_path):
    agent = learn(tmp_path, 6000, reward=lambda seen, action, last: seen * (2 * action - 1), random=True)
    assert probability(agent, 1.0, 1) > 0.95
    assert probability(agent, -1.0, 0) > 0.95


@pytest.mark.parametrize("length", [1, 3])
def test_truncation_does_not_end_the_value(tmp_path, length):
    """One state that always pays 1 is worth 1 / (1 - gamma), however often a time limit cuts in."""
    agent = learn(
        tmp_path, 12_000, "--gamma", "0.9", reward=lambda seen, action, last: 1.0, length=length, truncates=True
    )
    assert value(agent, 1.0) == pytest.approx(10.0, abs=0.5)


def test_termination_ends_the_value(tmp_path):
    """The mean over the episode's three steps of what is still to come: 1, 1.9 and 2.71."""
    flags = ("--gamma", "0.9", "--gae-lambda", "1")
    agent = learn(tmp_path, 6000, *flags, reward=lambda seen, action, last: 1.0, length=3)
    assert value(agent, 1.0) == pytest.approx(np.mean([1, 1.9, 2.71]), abs=0.2)


def test_one_step_episodes_are_all_there_is_to_every_step(tmp_path):
    """A reset that took a step of its own would leave fewer episodes than steps."""
    learn(tmp_path, 2048, reward=lambda seen, action, last: seen, random=True)
    with open(tmp_path / "probe" / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["global_step"]) for row in rows] == [4 * (i // 4 + 1) for i in range(2048)]
    assert {int(row["length"]) for row in rows} == {1}
    assert {float(row["return"]) for row in rows} == {-1.0, 1.0}
