"""The functions of ppo.py against oracles that do not share its code: brute force, torch, numpy, Stable-Baselines3."""

import copy
import csv
import io
import math
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from stable_baselines3.common.buffers import RolloutBuffer

import ppo

ACTION_SPACES = {
    "discrete": Discrete(4),
    "shifted": Discrete(4, start=5),
    "multidiscrete": MultiDiscrete([3, 3]),
    "uneven": MultiDiscrete([2, 5, 3], start=[7, 0, -1]),
    "box": Box(np.float32([-1, -2, -0.1]), np.float32([1, 0.5, 0.1])),
}
SIX_NUMBERS = Box(-1, 1, (6,))
every_action_space = pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)


class Step(NamedTuple):
    obs: np.ndarray
    action: np.ndarray
    reward: float
    successor: np.ndarray
    terminated: bool
    truncated: bool


class Clock(gym.Env):
    """Shows its age and the time in the episode, which ends by termination, truncation or both in turn; keeps a log."""

    observation_space = Box(-np.inf, np.inf, (2,))

    def __init__(self, action_space: gym.Space, one_buffer: bool = False):
        self.action_space, self.age, self.episode, self.log = action_space, 0, -1, []
        self.buffer = np.zeros(2, dtype=np.float32) if one_buffer else None

    def observe(self) -> np.ndarray:
        now = np.float32([0.01 * self.age, self.time])
        if self.buffer is None:
            return now
        self.buffer[:] = now
        return self.buffer

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)), action
        before = self.observe().copy()
        self.time, self.age, reward = self.time + 1, self.age + 1, self.np_random.normal(scale=3.0)
        ended = self.time == 3 + self.episode % 2
        terminated, truncated = ended and self.episode % 3 != 1, ended and self.episode % 3 != 0
        self.log.append(Step(before, np.copy(action), reward, self.observe().copy(), terminated, truncated))
        return self.observe(), reward, terminated, truncated, {}


class Labels(Clock):
    """A Clock that shows labels from -1 to 2 instead."""

    observation_space = Discrete(4, start=-1)

    def observe(self) -> np.ndarray:
        return np.array((self.age + 2 * self.episode) % 4 - 1)


class Picture(Clock):
    """A Clock that shows a grey picture, brighter with its age."""

    observation_space = Box(0, 255, (3, 40, 48), np.uint8)

    def observe(self) -> np.ndarray:
        return np.full((3, 40, 48), 10 * self.age + self.time, np.uint8)


gym.register("Clock-v0", entry_point=Clock)
gym.register("Picture-v0", entry_point=Picture)
gym.register("Labels-v0", entry_point=Labels)


class Learner:
    """What train sets up before its loop, without a run directory."""

    def __init__(self, *flags: str, **env_options):
        self.args = ppo.parse_args(["--device", "cpu", "--compile", "off", *flags])
        self.envs = ppo.make_envs(self.args, self.args.num_envs, self.args.seed, **env_options)
        self.rng = ppo.Rng(self.args.seed, "cpu")
        self.player = ppo.Player(self.envs, self.args, self.rng)
        self.agent = ppo.make_agent(self.envs, self.args)
        self.optimizer = ppo.Adam(ppo.flatten_parameters(self.agent.parameters()))
        self.gradient = ppo.make_gradient(self.agent, self.args)
        self.kl_beta = torch.tensor(self.args.kl_beta)

    def rollout(self) -> ppo.Batch:
        return ppo.rollout(self.agent, self.player, self.args)

    def update(self, batch: ppo.Batch, learning_rate: float = 1e-3, gradient=None) -> dict[str, torch.Tensor]:
        gradient = gradient or self.gradient
        return ppo.update(
            self.agent, self.player, self.optimizer, gradient, batch, learning_rate, self.kl_beta, self.rng, self.args
        )

    def log(self, field: str) -> np.ndarray:
        """What the Clocks saw, (steps of their lives, num_envs, ...)."""
        return np.stack([[getattr(step, field) for step in env.unwrapped.log] for env in self.envs.envs.envs], axis=1)


def clock_learner(action_space: gym.Space, *flags: str, env_id: str = "Clock-v0", **options) -> Learner:
    small = ["--env-id", env_id, "--num-envs", "3", "--num-steps", "20"]
    return Learner(*small, *flags, action_space=action_space, **options)


def random_agent(action_space: gym.Space, *flags: str, observation_space: gym.Space = SIX_NUMBERS) -> ppo.Agent:
    """An agent far from the near uniform policy of a fresh one."""
    agent = ppo.Agent(observation_space, action_space, ppo.parse_args(["--device", "cpu", *flags]), share_body=True)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return agent


def torch_policy(agent: ppo.Agent, features: torch.Tensor) -> list[torch.distributions.Distribution]:
    """The policy as torch has it, a distribution for each component or dimension of an action."""
    head = agent.actor(features)
    if agent.continuous:
        return [torch.distributions.Normal(mean, std) for mean, std in zip(head.T, agent.log_std.exp())]
    nvec = np.atleast_1d(getattr(agent.action_space, "nvec", getattr(agent.action_space, "n", None)))
    rows = head.reshape(len(head), len(nvec), -1)
    return [torch.distributions.Categorical(logits=rows[:, i, :n]) for i, n in enumerate(nvec)]


def torch_log_prob(policy: list[torch.distributions.Distribution], actions: torch.Tensor) -> torch.Tensor:
    return sum(component.log_prob(column) for component, column in zip(policy, actions.unbind(-1)))


def torch_kl(old: list[torch.distributions.Distribution], new: list[torch.distributions.Distribution]) -> torch.Tensor:
    return sum(torch.distributions.kl_divergence(p, q) for p, q in zip(old, new))


def close(actual, expected, **tolerance) -> None:
    """Equal up to float error, of any two types."""
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), check_dtype=False, **tolerance)


# ----------------------------------------------------------------------------- generalized advantage estimate
def brute_force_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda) -> np.ndarray:
    """The definition: the sum over k of (gamma lambda)^k times the TD error k steps later, up to the episode's end."""
    advantages = np.zeros(np.shape(rewards))
    for t, n in np.ndindex(advantages.shape):
        for k in range(t, len(advantages)):
            future = 0.0 if terminations[k][n] else gamma * next_values[k][n]
            advantages[t, n] += (gamma * gae_lambda) ** (k - t) * (rewards[k][n] + future - values[k][n])
            if terminations[k][n] or truncations[k][n]:
                break
    return advantages


def random_steps(num_steps: int = 40, num_envs: int = 5) -> tuple[torch.Tensor, ...]:
    """Rewards, values, next_values, terminations, truncations."""
    numbers = torch.randn(3, num_steps, num_envs, dtype=torch.float64)
    flags = torch.rand(2, num_steps, num_envs) < 0.2
    assert (flags[0] & flags[1]).any() and (flags[0] & ~flags[1]).any() and (flags[1] & ~flags[0]).any()
    return *numbers, *flags


@pytest.mark.parametrize("flag_type", [torch.bool, torch.float32])
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_equals_the_sum_that_defines_it(flag_type, gamma, gae_lambda):
    rewards, values, next_values, terminations, truncations = random_steps()
    expected = brute_force_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda)
    flags = terminations.to(flag_type), truncations.to(flag_type)
    advantages, returns = ppo.compute_gae(rewards, values, next_values, *flags, gamma, gae_lambda)
    close(advantages, expected)
    close(returns, expected + values.numpy())


def test_gae_equals_stable_baselines3():
    rewards, values, _, terminations, _ = random_steps()
    last_value = torch.randn(5, dtype=torch.float64)
    buffer = RolloutBuffer(40, Box(-1, 1, (1,)), Discrete(2), "cpu", gae_lambda=0.9, gamma=0.97, n_envs=5)
    starts = np.concatenate([np.zeros((1, 5)), terminations[:-1]])  # SB3's flag of a step: did the one before it end?
    buffer.rewards, buffer.values, buffer.episode_starts = rewards.numpy(), values.numpy(), starts
    buffer.compute_returns_and_advantage(last_value, terminations[-1].numpy())
    next_values, never = torch.cat([values[1:], last_value[None]]), torch.zeros_like(terminations)
    advantages, returns = ppo.compute_gae(rewards, values, next_values, terminations, never, 0.97, 0.9)
    close(advantages, buffer.advantages, rtol=1e-5, atol=1e-5)
    close(returns, buffer.returns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gae_ignores_a_bad_value_of_a_terminal_state(bad):
    rewards, values, next_values, terminations, truncations = random_steps()
    spoilt = next_values.masked_fill(terminations, bad)
    expected = ppo.compute_gae(rewards, values, next_values, terminations, truncations, 0.99, 0.95)
    found = ppo.compute_gae(rewards, values, spoilt, terminations, truncations, 0.99, 0.95)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(1)


def test_gae_bootstraps_a_truncated_step_and_cuts_there():
    advantages, _ = ppo.compute_gae(
        column(1, 50), column(2, 3), column(7, 9), column(0, 0), column(1, 0), gamma=0.5, gae_lambda=0.8
    )
    assert advantages[0].item() == 1 + 0.5 * 7 - 2


def test_gae_does_not_bootstrap_a_terminated_step_even_if_it_is_truncated_too():
    for truncated in (0, 1):
        advantages, _ = ppo.compute_gae(
            column(1, 50), column(2, 3), column(7, 9), column(1, 0), column(truncated, 0), gamma=0.5, gae_lambda=0.8
        )
        assert advantages[0].item() == 1 - 2


def test_gae_bootstraps_the_last_step():
    no = column(0)
    assert ppo.compute_gae(column(1), column(2), column(7), no, no, 0.5, 0.8)[0].item() == 1 + 0.5 * 7 - 2


# --------------------------------------------------------------------------------------------------- policies
@every_action_space
def test_log_prob_entropy_and_kl_equal_torch(action_space):
    agent, other = random_agent(action_space), random_agent(action_space)
    features = torch.randn(50, 6)
    policy, other_policy = agent.policy(features), other.policy(features)
    expected, other_expected = torch_policy(agent, features), torch_policy(other, features)
    actions = torch.stack([component.sample() for component in expected], dim=-1)
    close(policy.log_prob(actions), torch_log_prob(expected, actions))
    close(policy.entropy(), sum(component.entropy() for component in expected))
    close(policy.kl(other_policy), torch_kl(expected, other_expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(policy.kl(other_policy), other_policy.kl(policy))


@every_action_space
def test_rows_of_a_policy_are_the_policy_of_those_rows(action_space):
    """So pi_old of a minibatch is a part of that of the batch."""
    agent, features = random_agent(action_space), torch.randn(50, 6)
    policy, rows = agent.policy(features), torch.randperm(50)[:20]
    part, expected = policy[rows], agent.policy(features[rows])
    actions = torch.stack([component.sample() for component in torch_policy(agent, features[rows])], dim=-1)
    close(part.kl(expected), torch.zeros(20))
    close(part.log_prob(actions), expected.log_prob(actions))
    close(part.entropy(), expected.entropy())


@every_action_space
def test_an_optimizer_that_moves_the_weights_in_place_does_not_move_an_old_policy(action_space):
    agent, features = random_agent(action_space), torch.randn(50, 6)
    with torch.no_grad():
        old = agent.policy(features)
        before = old.entropy().clone()
        for parameter in agent.parameters():
            parameter += 0.5
    close(old.entropy(), before)
    if agent.continuous:
        assert (agent.policy(features).entropy() - before).abs().min() > 0.1


@every_action_space
def test_sampled_actions_have_the_distribution_of_the_policy(action_space):
    agent, samples = random_agent(action_space), 40_000
    features = torch.randn(1, 6).expand(samples, 6)
    with torch.no_grad():
        actions = ppo.act(agent, features, ppo.action_noise(agent, ppo.Rng(0, "cpu"), samples))
        policy = torch_policy(agent, features[:1])
    for column, component in zip(actions.unbind(-1), policy):
        if agent.continuous:
            close(column.mean(), component.mean[0], rtol=0, atol=0.03)
            close(column.std(), component.stddev[0], rtol=0.03, atol=0)
        else:
            frequencies = column.bincount(minlength=component.probs.shape[1]) / samples
            close(frequencies, component.probs[0], rtol=0, atol=0.015)


@every_action_space
def test_zero_noise_gives_the_mode(action_space):
    agent, features = random_agent(action_space), torch.randn(50, 6)
    modes = torch.stack([component.mode for component in torch_policy(agent, features)], dim=-1)
    noise = torch.zeros_like(ppo.action_noise(agent, ppo.Rng(0, "cpu"), 50))
    close(ppo.act(agent, features, noise), modes)


@pytest.mark.parametrize("norm", ["--norm-obs", "--no-norm-obs"])
@pytest.mark.parametrize(
    "observation_space", [SIX_NUMBERS, Box(-1, 1, (2, 3)), Box(-1, 1, ())], ids=["vector", "matrix", "scalar"]
)
@pytest.mark.parametrize("kind", ["discrete", "shifted", "multidiscrete", "box"])
def test_numpy_actor_equals_act(kind, observation_space, norm):
    agent = random_agent(ACTION_SPACES[kind], norm, observation_space=observation_space)
    obs = 3 * torch.randn(50, *observation_space.shape) + 1
    if agent.obs_norm:
        agent.obs_norm.update(obs[:25] * 0.1)  # so that some are beyond 10 deviations
    actor, noise = ppo.numpy_actor(agent), ppo.action_noise(agent, ppo.Rng(0, "cpu"), 50).detach()
    with torch.no_grad():
        close(actor(obs.numpy(), noise.numpy()), ppo.act(agent, agent.features(obs), noise), rtol=1e-4, atol=1e-4)
        for parameter in agent.actor.parameters():
            parameter.mul_(0.5)
        close(actor(obs.numpy(), noise.numpy()), ppo.act(agent, agent.features(obs), noise), rtol=1e-4, atol=1e-4)


@every_action_space
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_environments_get_the_stored_actions_shifted_and_clipped(env_id, action_space):
    """And the log-probabilities are those of the actions as they were sampled."""
    learner = clock_learner(action_space, "--log-std-init", "1", env_id=env_id)
    batch = learner.rollout()
    stored, given = batch.actions.numpy().reshape(20, 3, -1), learner.log("action").reshape(20, 3, -1)
    if isinstance(action_space, Box):
        assert (stored < action_space.low).any() and (stored > action_space.high).any()
        close(given, stored.clip(action_space.low, action_space.high))
    else:
        close(given, stored + action_space.start)
        assert len(np.unique(given)) > 2
    with torch.no_grad():
        policy = torch_policy(learner.agent, learner.agent.features(batch.obs))
    close(batch.logprobs, torch_log_prob(policy, batch.actions))


def test_discrete_observations_are_one_hot_from_their_start():
    agent = random_agent(Discrete(2), observation_space=Discrete(4, start=-1))
    close(agent.features(torch.tensor([-1, 0, 2])), torch.eye(4)[[0, 1, 3]])


def test_images_may_have_their_channels_first_or_last():
    first = random_agent(Discrete(2), observation_space=Box(0, 255, (3, 40, 48), np.uint8))
    last = random_agent(Discrete(2), observation_space=Box(0, 255, (40, 48, 3), np.uint8))
    last.load_state_dict(first.state_dict())
    images = torch.randint(0, 256, (5, 3, 40, 48), dtype=torch.uint8)
    close(last.features(images.permute(0, 2, 3, 1)), first.features(images))
    close(first.features(images), first.body.layers(images.double().float() / 255))


# ------------------------------------------------------------------------------------------------- objectives
def objective(name: str, ratio: float, advantage: float, kl: float = 0.0, beta: float = 1.0) -> tuple[float, float]:
    """The surrogate of one action, and its slope in the ratio."""
    args = ppo.parse_args(["--objective", name, "--clip-coef", "0.2"])
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value = ppo.surrogate_objective(r, torch.tensor([advantage]), torch.tensor([kl]), beta, args)
    return value.item(), torch.autograd.grad(value, r)[0].item()


@pytest.mark.parametrize(
    "ratio, advantage, value",
    [(1.5, 2.0, 1.2 * 2.0), (0.5, -2.0, 0.8 * -2.0)],
    ids=["good action, likely enough", "bad action, unlikely enough"],
)
def test_clipping_stops_the_gain_and_the_slope(ratio, advantage, value):
    assert objective("clip", ratio, advantage) == (pytest.approx(value), 0.0)


@pytest.mark.parametrize(
    "ratio, advantage", [(0.5, 2.0), (1.5, -2.0), (1.1, 2.0), (0.9, 2.0), (1.1, -2.0), (0.9, -2.0)]
)
def test_clipping_leaves_the_pessimistic_side_and_the_inside_alone(ratio, advantage):
    assert objective("clip", ratio, advantage) == (pytest.approx(ratio * advantage), advantage)


@pytest.mark.parametrize("ratio, advantage", [(1.5, 2.0), (0.5, -2.0), (0.5, 2.0), (1.5, -2.0)])
def test_no_objective_but_clip_clips(ratio, advantage):
    assert objective("none", ratio, advantage, kl=3.0) == (ratio * advantage, advantage)
    for name in ("kl-fixed", "kl-adaptive"):
        assert objective(name, ratio, advantage, kl=3.0, beta=0.5) == (ratio * advantage - 0.5 * 3.0, advantage)


def test_surrogate_is_a_mean():
    args = ppo.parse_args(["--objective", "kl-fixed"])
    ratio, advantages, kl = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]), torch.tensor([0.2, 0.4])
    close(ppo.surrogate_objective(ratio, advantages, kl, 10.0, args), torch.tensor((3 - 2) / 2 - 10 * 0.3))


def value_error(values: float, old: float, returns: float, *flags: str) -> tuple[float, float]:
    """The value objective of two equal states, and its slope in each value times two."""
    values, old, returns = (torch.full((2,), x, dtype=torch.float64) for x in (values, old, returns))
    error = ppo.value_objective(values.requires_grad_(), old, returns, ppo.parse_args(["--clip-coef", "0.2", *flags]))
    return error.item(), 2 * torch.autograd.grad(error, values)[0][0].item()


def test_value_objective_is_half_the_mean_squared_error():
    assert value_error(1.0, 0.0, 3.0) == (2.0, -2.0)


def test_value_clipping_stops_a_step_that_went_far_enough_but_not_one_that_went_astray():
    assert value_error(1.0, 0.0, 2.0, "--clip-vloss") == (pytest.approx(1.8**2 / 2), 0.0)
    assert value_error(1.0, 0.0, 0.0, "--clip-vloss") == (0.5, 1.0)
    assert value_error(0.1, 0.0, 2.0, "--clip-vloss") == (pytest.approx(1.9**2 / 2), pytest.approx(-1.9))


@pytest.mark.parametrize(
    "kl, factor", [(0.0, 0.5), (0.0199, 0.5), (0.02, 1), (0.03, 1), (0.045, 1), (0.0451, 2), (9.0, 2)]
)
def test_beta_is_halved_below_and_doubled_above_a_band_around_the_target(kl, factor):
    assert ppo.adapt_beta(3.0, kl, 0.03) == 3.0 * factor


# ------------------------------------------------------------------------------------------------ loss and gradient
PURE = ("--ent-coef", "0", "--vf-coef", "0", "--max-grad-norm", "1e9", "--num-envs", "2", "--num-steps", "64")


@pytest.mark.parametrize("objective", ["clip", "kl-fixed", "none"])
@pytest.mark.parametrize(
    "env", [("--env-id", "CartPole-v1"), ("--env-id", "Pendulum-v1", "--log-std-end", "None")], ids=lambda x: x[1]
)
def test_the_first_minibatch_has_ratio_one_and_the_policy_gradient(env, objective):
    learner = Learner(*env, "--objective", objective, *PURE)
    first = learner.rollout()
    learner.update(first)
    if learner.agent.obs_norm:
        learner.agent.obs_norm.update(first.obs)
    batch = learner.rollout()
    rows = torch.randperm(128)[:32]
    gradient, stats = learner.gradient(batch, rows, torch.tensor(1.0))
    assert abs(stats["approx_kl"]) < 1e-6 and abs(stats["old_approx_kl"]) < 1e-6 and stats["clipfrac"] == 0

    features = batch.obs
    if learner.agent.obs_norm:
        mean, variance = first.obs.mean(0), first.obs.var(0, correction=0)
        features = ((batch.obs - mean) / variance.sqrt()).clamp(-10, 10)
    log_probs = torch_log_prob(torch_policy(learner.agent, features[rows]), batch.actions[rows])
    close(batch.logprobs[rows], log_probs, rtol=1e-4, atol=1e-4)
    advantages = batch.advantages[rows]
    advantages = (advantages - advantages.mean()) / advantages.std()
    (-(advantages * log_probs).mean()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.agent.parameters()]
    close(gradient, torch.cat([grad.flatten() for grad in grads]), rtol=1e-3, atol=1e-5)
    assert gradient.norm() > 1e-3


@every_action_space
def test_the_kl_penalty_is_beta_times_the_kl_of_the_old_from_the_new_policy(action_space):
    learner = clock_learner(action_space, "--objective", "kl-fixed", "--no-norm-adv")
    batch = learner.rollout()
    old = torch_policy(copy.deepcopy(learner.agent), learner.agent.features(batch.obs))
    for parameter in learner.agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    new = torch_policy(learner.agent, learner.agent.features(batch.obs))
    free, penalised = (ppo.ppo_loss(learner.agent, batch, torch.tensor(beta), learner.args)[0] for beta in (0.0, 2.0))
    close(penalised - free, 2 * torch_kl(old, new).mean(), rtol=1e-3, atol=1e-5)


def test_loss_is_policy_loss_plus_value_error_minus_entropy_bonus():
    learner = clock_learner(Discrete(4), "--vf-coef", "0.7", "--ent-coef", "0.3")
    loss, stats = ppo.ppo_loss(learner.agent, learner.rollout(), torch.tensor(1.0), learner.args)
    close(loss, stats["policy_loss"] + 0.7 * stats["value_loss"] - 0.3 * stats["entropy"])


def test_kl_estimates_and_clip_fraction():
    learner = clock_learner(Discrete(4))
    batch = learner.rollout()
    shift = torch.where(torch.arange(60) < 15, math.log(1.3), math.log(1.15))  # a quarter is outside the range
    shifted = batch._replace(logprobs=batch.logprobs - shift)
    _, stats = ppo.ppo_loss(learner.agent, shifted, torch.tensor(1.0), learner.args)
    logs = 0.25 * math.log(1.3) + 0.75 * math.log(1.15)
    assert stats["approx_kl"].item() == pytest.approx(0.25 * 0.3 + 0.75 * 0.15 - logs, abs=1e-5)
    assert stats["old_approx_kl"].item() == pytest.approx(-logs, abs=1e-5)
    assert stats["clipfrac"].item() == 0.25


@every_action_space
def test_the_entropy_bonus_raises_the_entropy(action_space):
    learner = clock_learner(action_space, "--ent-coef", "1", "--vf-coef", "0")
    torch.nn.init.normal_(learner.agent.actor.last.weight, std=0.3)
    batch = learner.rollout()
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages))

    def entropy() -> float:
        with torch.no_grad():
            return learner.agent.policy(learner.agent.features(batch.obs)).entropy().mean().item()

    before = entropy()
    learner.update(batch)
    assert entropy() > before


def test_the_value_loss_moves_values_to_the_returns_and_leaves_the_policy_alone():
    learner = clock_learner(Discrete(4))
    batch = learner.rollout()
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages), returns=batch.values + 1.0)
    learner.update(batch)
    with torch.no_grad():
        features = learner.agent.features(batch.obs)
        policy, values = learner.agent.policy(features), learner.agent.value(features)
    assert (batch.returns - values).square().mean() < 0.5
    close(policy.log_prob(batch.actions), batch.logprobs)


@pytest.mark.parametrize("bound", ["0.01", "1e6"])
def test_gradient_clipping_equals_torch(bound):
    learner = clock_learner(ACTION_SPACES["box"], "--max-grad-norm", bound)
    batch, rows = learner.rollout(), torch.arange(60)
    gradient, stats = learner.gradient(batch, rows, torch.tensor(1.0))
    ppo.ppo_loss(learner.agent, batch, torch.tensor(1.0), learner.args)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(learner.agent.parameters(), float(bound))
    assert 0.01 < norm < 1e6
    close(gradient, torch.cat([p.grad.flatten() for p in learner.agent.parameters()]), rtol=1e-4, atol=1e-7)
    close(stats["grad_norm"], norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("planned", [(), ("--log-std-end", "-2")], ids=["learned", "planned"])
def test_compiled_gradients_are_the_eager_ones_and_each_agent_has_its_own(planned):
    """Two agents in one process; weights, normaliser, deviation and beta change between calls of what is compiled."""
    flags = ("--env-id", "Clock-v0", "--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--norm-obs")
    flags += ("--objective", "kl-adaptive", "--ent-coef", "0.1", "--clip-vloss", *planned)
    learners = [Learner(*flags, action_space=ACTION_SPACES["box"]) for _ in range(2)]
    batches = [learner.rollout() for learner in learners]
    compiled = []
    for learner in learners:
        learner.args.compile = "on"
        compiled.append(ppo.make_gradient(learner.agent, learner.args))
    for beta in (0.5, 2.0):
        for learner, fast, batch in zip(learners, compiled, batches):
            rows = torch.randperm(16)[:8]
            eager_gradient, eager_stats = learner.gradient(batch, rows, torch.tensor(beta))
            gradient, stats = fast(batch, rows, torch.tensor(beta))
            close(gradient, eager_gradient, rtol=1e-3, atol=1e-5)
            assert stats.keys() == eager_stats.keys()
            for name, value in stats.items():
                close(value, eager_stats[name], rtol=1e-3, atol=1e-5, msg=name)
            learner.optimizer.step(gradient, 0.03)
            learner.agent.obs_norm.update(batch.obs)
            ppo.anneal_log_std(learner.agent, 0.5, learner.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_adam_equals_torch(fused, dtype):
    """To the bit where torch takes the same kernel."""
    vector = torch.randn(30, dtype=dtype)
    reference = torch.nn.Parameter(vector.clone())
    adam, torch_adam = ppo.Adam(vector), torch.optim.Adam([reference], eps=1e-5, fused=fused)
    for step in range(50):
        reference.grad = torch.randn(30, dtype=dtype) * torch.logspace(-6, 2, 30, dtype=dtype)
        torch_adam.param_groups[0]["lr"] = rate = 0.01 / (1 + step)
        torch_adam.step()
        adam.step(reference.grad, rate)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    close(vector, reference.data, rtol=max(tolerance, 1e-4 * (dtype == torch.float32)), atol=tolerance)
    state = torch_adam.state[reference]
    pairs = (
        (vector, reference.data),
        (adam.m, state["exp_avg"]),
        (adam.v, state["exp_avg_sq"]),
        (adam.t, state["step"]),
    )
    if fused:
        assert all(torch.equal(*pair) for pair in pairs)
    assert adam.t == 50


def test_adam_goes_on_from_its_state():
    one, gradients = torch.ones(5), torch.randn(4, 5)
    first = ppo.Adam(one)
    first.step(gradients[0], 0.1), first.step(gradients[1], 0.1)
    two = one.clone()
    second = ppo.Adam(two)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[2:]:
        first.step(gradient, 0.1), second.step(gradient, 0.1)
    assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------------ update
def test_update_uses_every_row_once_per_epoch_and_logs_means():
    learner = clock_learner(Discrete(4), "--num-minibatches", "3", "--update-epochs", "5")
    batch, calls = learner.rollout(), []

    def watched(batch, rows, beta):
        gradient, stats = learner.gradient(batch, rows, beta)
        calls.append((rows, stats))
        return gradient, stats

    logged = learner.update(batch, gradient=watched)
    rows = torch.stack([rows for rows, _ in calls]).view(5, 60)
    close(rows.sort().values, torch.arange(60).expand(5, 60))
    assert len(rows.unique(dim=0)) == 5
    assert learner.optimizer.t == 15
    names = {"policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac", "grad_norm"}
    assert logged.keys() == names | {"returns_variance", "residual_variance"}
    for name in names:
        mean = np.mean([stats[name].item() for _, stats in calls])
        assert logged[name].item() == pytest.approx(mean, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("flags", [(), ("--recompute-advantages",)], ids=["once", "recomputed"])
def test_every_epoch_but_the_first_has_advantages_of_its_own_where_asked(flags):
    """The old policy and the old values stay, and the explained variance is that of the old values."""
    learner = clock_learner(Discrete(4), "--num-minibatches", "2", "--update-epochs", "3", *flags)
    batch, seen = learner.rollout(), []

    def watched(present, rows, beta):
        seen.append((present, estimate_again(learner)))
        return learner.gradient(present, rows, beta)

    logged = learner.update(batch, gradient=watched)
    assert len(seen) == 6 and all(present is batch for present, _ in seen[: 2 if flags else 6])
    if flags:
        for (first, expected), (second, _) in (seen[2:4], seen[4:6]):
            assert first is second and first.old_policy is batch.old_policy
            assert torch.equal(first.advantages, expected.advantages) and torch.equal(first.returns, expected.returns)
            assert (first.advantages != batch.advantages).any()
            for name in ("obs", "actions", "logprobs", "values"):
                assert getattr(first, name) is getattr(batch, name), name
    assert logged["returns_variance"].item() == pytest.approx(batch.returns.numpy().var(), rel=1e-4)
    close(logged["residual_variance"], (batch.returns - batch.values).var(correction=0), rtol=1e-4, atol=1e-6)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    learner = clock_learner(Discrete(4))
    batch = learner.rollout()
    for values, expected in ((batch.returns, 1.0), (torch.zeros(60), 0.0), (-batch.returns, -3.0)):
        logged = learner.update(batch._replace(values=values))
        explained = 1 - logged["residual_variance"] / logged["returns_variance"]  # as Run.write_row has it
        assert explained.item() == pytest.approx(expected, abs=1e-5)
        assert logged["returns_variance"].item() == pytest.approx(batch.returns.numpy().var(), rel=1e-4)


def test_target_kl_stops_before_the_first_step():
    learner = clock_learner(Discrete(4), "--target-kl", "0.7")
    batch, before = learner.rollout(), learner.optimizer.parameters.clone()
    learner.update(batch._replace(logprobs=batch.logprobs - 1.0))  # the estimate is e - 2 = 0.718
    assert learner.optimizer.t == 0 and torch.equal(learner.optimizer.parameters, before)


def test_target_kl_lets_no_step_start_too_far_away():
    learner = clock_learner(Discrete(4), "--target-kl", "0.02")
    batch, estimates = learner.rollout(), []

    def watched(batch, rows, beta):
        gradient, stats = learner.gradient(batch, rows, beta)
        estimates.append(stats["approx_kl"].item())
        return gradient, stats

    learner.update(batch, learning_rate=0.01, gradient=watched)
    assert max(estimates[:-1]) <= 0.02 < estimates[-1]
    assert 1 <= learner.optimizer.t == len(estimates) - 1 < 40


@every_action_space
def test_mean_kl_equals_torch(action_space):
    learner = clock_learner(action_space, "--num-steps", "500")
    batch = learner.rollout()
    old = torch_policy(copy.deepcopy(learner.agent), learner.agent.features(batch.obs))
    for parameter in learner.agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = torch_kl(old, torch_policy(learner.agent, learner.agent.features(batch.obs))).mean().item()
    assert ppo.mean_kl(learner.agent, batch) == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ rollout
@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])  # uneven takes the path without numpy_actor
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_rows_of_the_batch_are_the_steps_of_the_environments(kind, env_id):
    learner = clock_learner(ACTION_SPACES[kind], env_id=env_id)
    for part in range(2):
        batch = learner.rollout()
        steps = slice(20 * part, 20 * part + 20)
        assert len(learner.log("obs")) == steps.stop
        assert all(len(column) == 60 for column in (*batch[:-1], batch.old_policy.entropy()))
        close(batch.obs, learner.log("obs")[steps].reshape(60, *batch.obs.shape[1:]))


@pytest.mark.parametrize("flags", [(), ("--clip-reward",)], ids=["raw", "clip_reward"])
@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_targets_come_from_the_true_successors(env_id, kind, flags):
    """Of an ended episode that is its final observation, although the environment shows that of the reset."""
    check_targets(clock_learner(ACTION_SPACES[kind], *flags, env_id=env_id))


def test_targets_come_from_the_true_successors_of_an_environment_that_reuses_its_array():
    """Its final observation must be copied before the reset overwrites it."""
    check_targets(clock_learner(Discrete(4), one_buffer=True))


def check_targets(learner: Learner) -> None:
    def value(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            flat = torch.from_numpy(obs.reshape(60, *obs.shape[2:]))
            return learner.agent.value(learner.agent.features(flat)).view(20, 3).numpy()

    for part in range(2):
        batch, steps = learner.rollout(), slice(20 * part, 20 * part + 20)
        names = ("reward", "obs", "successor", "terminated", "truncated")
        rewards, obs, successors, *flags = (learner.log(name)[steps] for name in names)
        assert (flags[1] & ~flags[0]).any() and (flags[0] & ~flags[1]).any() and (flags[0] & flags[1]).any()
        rewards = np.sign(rewards) if learner.args.clip_reward else rewards
        values = value(obs)
        expected = brute_force_gae(rewards, values, value(successors), *flags, 0.99, 0.95)
        close(batch.values, values.flatten(), rtol=1e-4, atol=1e-5)
        close(batch.advantages, expected.flatten(), rtol=1e-4, atol=1e-4)
        close(batch.returns, (expected + values).flatten(), rtol=1e-4, atol=1e-4)


def estimate_again(learner: Learner) -> ppo.Batch:
    return ppo.estimate(learner.agent, learner.player.look_again(learner.agent), learner.args)


@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_recomputed_advantages_are_those_of_the_present_critic(env_id):
    """Of the last observation of a truncated episode as well."""
    learner = clock_learner(Discrete(4), "--norm-reward", env_id=env_id)
    learner.rollout()
    batch = learner.rollout()
    again = estimate_again(learner)
    assert all(torch.equal(*pair) for pair in zip(batch[:-1], again[:-1]))  # as long as nothing has moved
    for parameter in learner.agent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    again = estimate_again(learner)
    assert (again.advantages - batch.advantages).abs().min() > 0

    def value(name: str) -> np.ndarray:
        obs = torch.from_numpy(learner.log(name)[20:].reshape(60, *batch.obs.shape[1:]))
        with torch.no_grad():
            return learner.agent.value(learner.agent.features(obs)).view(20, 3).numpy()

    values, flags = value("obs"), [learner.log(name)[20:] for name in ("terminated", "truncated")]
    rewards = learner.player.played.rewards.numpy()
    assert (flags[1] & ~flags[0]).any()
    expected = brute_force_gae(rewards, values, value("successor"), *flags, 0.99, 0.95)
    close(again.advantages, expected.flatten(), rtol=1e-4, atol=1e-4)
    close(again.returns, (expected + values).flatten(), rtol=1e-4, atol=1e-4)


def test_looking_again_at_images_goes_through_the_present_convolutions():
    learner = Learner("--env-id", "Picture-v0", "--num-envs", "2", "--num-steps", "8", action_space=Discrete(2))
    learner.rollout()
    steps, final_obs = learner.player.played, learner.player.final_obs
    assert final_obs
    for parameter in learner.agent.parameters():
        parameter.data *= 1.5
    again = learner.player.look_again(learner.agent)
    with torch.no_grad():
        features = learner.agent.features(steps.observations.flatten(0, 1))
        for place, obs in final_obs.items():
            value = learner.agent.value(learner.agent.features(torch.from_numpy(obs)[None]))
            close(again.final_values[place], value[0])
    close(again.features, features)
    assert (features != steps.features).any() and (again.final_values != steps.final_values).sum() == len(final_obs)
    assert again.rewards is steps.rewards and again.actions is steps.actions


def test_finished_episodes_report_raw_returns():
    learner = clock_learner(Discrete(4), "--clip-reward", "--norm-reward")
    found, expected, sums = [], [], np.zeros((3, 2))
    for part in range(3):
        learner.rollout()
        found += [(60 * part + step, ret, length, env) for step, ret, length, env in learner.player.finished]
    rewards, ended = learner.log("reward"), learner.log("terminated") | learner.log("truncated")
    for t, n in np.ndindex(rewards.shape):
        sums[n] += rewards[t, n], 1
        if ended[t, n]:
            expected.append((3 * (t + 1), pytest.approx(sums[n, 0]), sums[n, 1], n))
            sums[n] = 0
    assert found == expected


def test_episodes_equal_a_slow_loop_over_several_rollouts():
    rng, episodes = np.random.default_rng(0), ppo.Episodes(make_envs("CartPole-v1", 4))
    current, ended = [[] for _ in range(4)], [[] for _ in range(4)]
    for num_steps in (1, 7, 30, 2):
        rewards, over = rng.normal(size=(num_steps, 4)), rng.random((num_steps, 4)) < 0.15
        actions, expected = rng.integers(0, 9, (num_steps, 4, 2)), []
        for t, n in np.ndindex(num_steps, 4):
            current[n].append((actions[t, n].tolist(), rewards[t, n]))
            if over[t, n]:
                total = pytest.approx(sum(reward for _, reward in current[n]))
                expected.append(((t + 1) * 4, total, len(current[n]), n))
                ended[n], current[n] = current[n], []
        assert episodes.collect(actions, rewards, over) == expected
        state = episodes.state_dict()
        for name, held in (("ended", ended), ("in_play", current)):
            for pair, steps in zip(state[name], held, strict=True):
                assert [(action.tolist(), reward.item()) for action, reward in zip(*pair)] == steps


def test_a_bad_number_is_traced_to_its_environment_and_step():
    observations, rewards = torch.zeros(5, 3, 2), np.zeros((4, 3))
    ppo.check_finite(observations, rewards, {(1, 2): np.zeros(2)})
    observations[2, 1, 0] = math.nan
    with pytest.raises(ppo.Failed, match="the observation of environment 1 in step 2 "):
        ppo.check_finite(observations, rewards, {})
    rewards[3, 2] = math.inf
    with pytest.raises(ppo.Failed, match="reward of environment 2 in step 3 "):
        ppo.check_finite(torch.zeros(5, 3, 2), rewards, {})
    final_obs = {(0, 1): np.zeros(2), (3, 0): np.float32([0, -math.inf])}
    with pytest.raises(ppo.Failed, match="last observation of environment 0 in step 3 "):
        ppo.check_finite(torch.zeros(5, 3, 2), np.zeros((4, 3)), final_obs)


@every_action_space
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0", "ALE/Pong-v5"])
def test_example_steps_are_like_real_ones(env_id, action_space):
    if env_id == "ALE/Pong-v5" and action_space != Discrete(4):
        pytest.skip("its actions are its own")
    if env_id == "ALE/Pong-v5":
        learner = Learner("--env-id", env_id, "--num-envs", "2", "--num-steps", "3", "--num-minibatches", "1")
    else:
        learner = clock_learner(action_space, env_id=env_id)
    real, example = learner.player.play(learner.agent), ppo.example_steps(learner.agent, learner.args)
    for name, theirs, ours in zip(real._fields, real, example):
        assert (theirs is None) == (ours is None), name
        if ours is not None:
            assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device), name
    tensors = [x for x in example if x is not None]
    assert len({id(x) for x in tensors}) == len(tensors)  # the same tensor twice would be compiled as one
    assert learner.envs.single_observation_space.contains(example.observations[0, 0].numpy())


# ------------------------------------------------------------------------------------------------- environments
@pytest.fixture
def every_game_has_a_seed(monkeypatch):
    """As if a seed cost ale_py nothing."""
    monkeypatch.setattr(ppo, "RESEED", 0)


GAMES = ["BreakoutNoFrameskip-v4", "ALE/Breakout-v5", "PongNoFrameskip-v4", "ALE/Pong-v5"]
OFTEN = ("BreakoutNoFrameskip-v4", "ALE/Pong-v5")  # the paper's protocol and today's; the others are slow
EVERY_GAME = [pytest.param(x, marks=[] if x in OFTEN else pytest.mark.slow) for x in GAMES]


def make_envs(env_id: str, num_envs: int, seed: int = 1, **options) -> ppo.Environments:
    return ppo.make_envs(ppo.parse_args(["--env-id", env_id, "--num-threads", "1"]), num_envs, seed, **options)


class Games:
    """Stands in for ALE's environments: plays what it is told, and remembers what it was asked to begin."""

    num_envs, single_observation_space, single_action_space = 4, None, None

    def __init__(self, *script: tuple):
        self.script, self.begun, self.seeds = list(script), [], []

    def reset(self, seed: np.ndarray, options: dict):
        self.begun.append(options["reset_mask"].tolist())
        self.seeds.append(seed.tolist())
        return np.full(4, -1.0), {"episode_frame_number": np.where(options["reset_mask"], 0, 100)}

    def step(self, actions):
        terminations, clock = self.script.pop(0)
        info = {"episode_frame_number": np.array(clock), "final_obs": np.arange(4.0)}
        return np.full(4, -2.0), np.zeros(4), np.array(terminations), np.zeros(4, bool), info


def test_a_game_is_over_where_its_clock_turned_back(every_game_has_a_seed):
    """And a termination without that is a lost life, after which the game goes on."""
    games = Games(([False] * 4, [100] * 4), ([True, True, False, False], [104, 7, 104, 104]))
    envs = ppo.Environments(games, seed=3)
    envs.reset()
    obs, *_, over, _ = envs.step(np.zeros(4))
    assert not over.any() and (obs == -2).all() and games.begun == [[True] * 4]
    obs, _, terminations, _, over, final_obs = envs.step(np.zeros(4))
    assert terminations.tolist() == [True, True, False, False] and over.tolist() == [False, True, False, False]
    assert games.begun[1:] == [[False, True, False, False]] and len(games.seeds[1]) == 1
    assert (obs == -1).all() and final_obs.tolist() == [0, 1, 2, 3]
    assert envs.numbers.tolist() == [1, 2, 1, 1] and len({*games.seeds[0], *games.seeds[1]}) == 5


def test_atari_games_of_the_paper_go_on_after_a_lost_life(every_game_has_a_seed):
    envs, rng, infos = make_envs("BreakoutNoFrameskip-v4", 2), np.random.default_rng(0), []
    for name in ("reset", "step"):
        function = getattr(envs.envs, name)

        def watched(*args, function=function, **options):
            result = function(*args, **options)
            infos.append(result[-1])
            return result

        setattr(envs.envs, name, watched)
    envs.reset()
    lost, games = np.zeros(2, int), np.zeros(2, int)
    for _ in range(600):
        lives = infos[-1]["lives"].copy()
        infos.clear()
        _, _, terminations, _, over, _ = envs.step(rng.integers(0, 4, 2))
        assert len(infos) == 1 + over.any()
        assert (over == (infos[0]["lives"] > lives)).all()  # all five are back
        assert (terminations == (infos[0]["lives"] != lives)).all()
        assert (infos[-1]["lives"] == infos[0]["lives"]).all()
        lost, games = lost + terminations, games + over
    assert (games >= 1).all() and (lost // 5 == games).all()
    assert (envs.numbers == games + 1).all()


def played(env_id: str, seed: int = 1, shift: int = 0, num_envs: int = 2, frames: int = 480) -> tuple[dict, dict]:
    """(environment, number of the episode) -> the step that it begins in, and all that is seen of it.

    All episodes get the same actions, those of the first ones shifted. Games are cut after some frames.
    """
    limit = {"max_num_frames_per_episode": frames} if env_id in GAMES else {}
    envs, steps = make_envs(env_id, num_envs, seed, **limit), 300
    choices = envs.single_action_space.n
    table, begins, seen = np.random.default_rng(0).integers(0, choices, steps), {}, {}
    obs = envs.reset()
    for t in range(steps):
        actions = np.zeros(num_envs, dtype=np.int64)
        for n, number in enumerate(envs.numbers.tolist()):
            begin = begins.setdefault((n, number), t)
            seen.setdefault((n, number), []).append(obs[n].tobytes())
            actions[n] = (table[t - begin] + shift * (number == 1)) % choices
        before = envs.numbers.tolist()
        obs, rewards, terminations, truncations, _, _ = envs.step(actions)
        for n, number in enumerate(before):
            seen[n, number].append((rewards[n], terminations[n], truncations[n]))
    return begins, seen


@pytest.mark.parametrize("env_id", ["CartPole-v1", *GAMES])
def test_every_episode_has_a_seed_of_its_own_whatever_came_before(env_id, every_game_has_a_seed):
    """It goes as (seed, environment, number) say, whenever it begins."""
    begins, seen = played(env_id)
    other_begins, other_seen = played(env_id, shift=1, num_envs=3, frames=400)
    both = [key for key in seen if key in other_seen and key[1] >= 2]
    assert {n for n, _ in both} == {0, 1} and any(begins[key] != other_begins[key] for key in both)
    for key in both:
        length = min(len(seen[key]), len(other_seen[key])) - 1  # without the step where one of them is cut
        assert length >= 1 and seen[key][:length] == other_seen[key][:length], key

    _, reseeded = played(env_id, seed=2)
    episodes = [*seen.values(), *reseeded.values()]  # the paper's protocol knows only 30 beginnings
    distinct = {tuple(episode[:100]) for episode in episodes if len(episode) > 10}
    assert len(distinct) > 0.8 * sum(len(episode) > 10 for episode in episodes)
    if env_id == "CartPole-v1":
        assert len({episode[0] for episode in episodes}) == len(episodes)


def test_the_last_observation_of_a_truncated_episode_is_not_that_after_the_reset():
    envs = clock_learner(Discrete(4)).envs
    kinds = set()
    for _ in range(40):
        obs, _, terminations, truncations, over, final_obs = envs.step(np.zeros(3, dtype=np.int64))
        assert (over == terminations | truncations).all()
        for n in np.flatnonzero(over):
            close(final_obs[n], envs.envs.envs[n].unwrapped.log[-1].successor)
            assert obs[n, 1] == 0 and final_obs[n, 1] >= 3  # the time in the episode
            kinds.add((bool(terminations[n]), bool(truncations[n])))
        assert (over == (obs[:, 1] == 0)).all()
    assert kinds == {(True, False), (False, True), (True, True)}


@pytest.mark.parametrize("env_id", EVERY_GAME)
def test_the_last_observation_of_a_truncated_game_is_that_of_a_game_that_goes_on(env_id, every_game_has_a_seed):
    """But for ALE, which leaves the step's very last frame out where the game is over: some pixels of the fourth."""
    limited, twin = make_envs(env_id, 2, max_num_frames_per_episode=200), make_envs(env_id, 2)
    begin = limited.reset()
    assert (begin == twin.reset()).all()
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(0, limited.single_action_space.n, 2)
        obs, _, _, truncations, over, final_obs = limited.step(actions)
        true_obs, _, _, _, twin_over, _ = twin.step(actions)
        assert not twin_over.any() and (over >= truncations).all()
        for n in np.flatnonzero(truncations):
            assert limited.numbers[n] == 2
            assert (final_obs[n, :3] == true_obs[n, :3]).all() and (final_obs[n, 3] != true_obs[n, 3]).mean() < 0.01
            assert (obs[n, :3] != true_obs[n, :3]).mean() > 0.2
        if truncations.any():
            return
    pytest.fail("no time limit within 60 steps")


# -------------------------------------------------------------------------------------- environments come back
@pytest.mark.parametrize("reseed", [300, 10_000])
@pytest.mark.parametrize("env_id", EVERY_GAME)
def test_games_since_the_last_seed_come_back_and_go_on_the_same(env_id, reseed, monkeypatch):
    """Several games lie between two seeds, and the next ones too are as they would have been."""
    monkeypatch.setattr(ppo, "RESEED", reseed)
    args = ppo.parse_args(["--env-id", env_id, "--num-envs", "2", "--num-threads", "1"])
    one, other = (ppo.Player(ppo.make_envs(args, 2, 7), args, ppo.Rng(7, "cpu")) for _ in range(2))
    rng, games = np.random.default_rng(7), 0
    for _ in range(4):
        actions, rewards = rng.integers(0, 4, (225, 2, 1)), np.zeros((225, 2))
        over = np.zeros((225, 2), dtype=bool)
        for t in range(225):
            one.obs, rewards[t], _, _, over[t], _ = one.envs.step(actions[t, :, 0])
        games += len(one.episodes.collect(actions, rewards, over))
    assert games and (one.envs.numbers > 1).any() == (reseed == 300)
    other.load_state_dict(one.state_dict())
    assert other.inexact == "" and (other.envs.numbers == one.envs.numbers).all()
    assert other.episodes.begun == one.episodes.begun
    for actions in rng.integers(0, 4, (250, 2)):
        for mine, theirs in zip(one.envs.step(actions)[:5], other.envs.step(actions)[:5]):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    "env_id, num_steps",
    [("CartPole-v1", 100), ("Pendulum-v1", 90), ("HalfCheetah-v5", 400)]
    + [pytest.param("ALE/Breakout-v5", 100, marks=pytest.mark.slow), ("BreakoutNoFrameskip-v4", 100)],
)
def test_a_player_comes_back_bit_for_bit(env_id, num_steps):
    """In the middle of later episodes, and goes on beyond their end as if it had never stopped."""
    flags = ("--env-id", env_id, "--num-envs", "2", "--num-steps", str(num_steps), "--num-minibatches", "1")
    first, second = Learner(*flags), Learner(*flags)
    finished = []
    for _ in range(3):
        first.rollout()
        finished += first.player.finished
    assert {episode.env for episode in finished} == {0, 1}
    buffer = io.BytesIO()
    torch.save(first.player.state_dict(), buffer)
    buffer.seek(0)
    second.rollout()  # what it did before must not matter
    second.agent.load_state_dict(first.agent.state_dict())
    second.player.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.player.inexact == ""
    assert np.array_equal(first.player.obs, second.player.obs)
    assert np.array_equal(first.envs.numbers, second.envs.numbers)
    for part in range(3):
        steps = []
        for learner in (first, second):
            learner.rng.torch.manual_seed(part)
            steps.append(learner.player.play(learner.agent))
        for name, one, two in zip(steps[0]._fields, *steps):
            assert (one is None and two is None) or torch.equal(one, two), name
        assert first.player.finished == second.player.finished
        finished = [*finished, *first.player.finished] if part else first.player.finished
    assert {episode.env for episode in finished} == {0, 1}


class Stubborn(Clock):
    """A Clock with episodes of four steps whose age, which no reset takes back, shows in what it says or pays."""

    def __init__(self, where: str):
        self.where = where
        super().__init__(Discrete(4))

    def observe(self) -> np.ndarray:
        return np.float32([0.01 * self.age if self.where == "observations" else 0.0, self.time])

    def step(self, action):
        self.time, self.age, reward = self.time + 1, self.age + 1, self.np_random.normal()
        return self.observe(), reward + 0.01 * self.age * (self.where == "rewards"), self.time == 4, False, {}


gym.register("Stubborn-v0", entry_point=Stubborn)


@pytest.mark.parametrize("where, problem", [("observations", "an environment"), ("rewards", "environment 0")])
def test_an_environment_that_does_not_come_back_is_named_and_all_begin_new_episodes(where, problem):
    flags = ("--env-id", "Stubborn-v0", "--num-envs", "3", "--num-steps", "22", "--norm-reward")
    first, second = (Learner(*flags, where=where) for _ in range(2))
    first.rollout()
    assert (first.envs.numbers == 6).all()
    second.player.load_state_dict(copy.deepcopy(first.player.state_dict()))
    assert second.player.inexact == f"{problem} does not repeat its {where}"
    assert (second.player.obs[:, 1] == 0).all() and (second.player.discounted == 0).all()
    assert (second.envs.numbers == 7).all()
    assert not any(second.player.episodes.in_play) and not any(second.player.episodes.ended)
    second.rollout()
    assert {episode.length for episode in second.player.finished} == {4}


def test_an_episode_that_is_too_long_to_hold_is_not_brought_back(monkeypatch):
    monkeypatch.setattr(ppo, "LONGEST", 100)
    first, second = (Learner("--env-id", "Pendulum-v1", "--num-envs", "2", "--num-steps", "128") for _ in range(2))
    first.rollout()
    state = first.player.state_dict()
    assert state["episodes"]["in_play"] == []
    second.player.load_state_dict(state)
    assert second.player.inexact == "an episode in play has more than 100 steps, too many for a checkpoint"
    assert (second.envs.numbers == 2).all()


# -------------------------------------------------------------------------------------------------- normalisers
def test_running_norm_equals_numpy_over_all_data():
    rng, norm = np.random.default_rng(0), ppo.RunningNorm((3,))
    parts = [rng.normal([0, 1e4, -3], [1, 0.5, 20], size=(rows, 3)) for rows in (1, 50, 2, 400)]
    for part in parts:
        norm.update(torch.from_numpy(part))
    data = np.concatenate(parts)
    close(norm.mean, data.mean(0))
    close(norm.var, data.var(0))
    assert norm.count.item() == len(data)
    x = torch.from_numpy(data[:5] + np.array([[0], [0], [0], [0], [1e3]])).float()
    expected = (x.double().numpy() - data.mean(0)) / np.sqrt(data.var(0) + 1e-8)
    close(norm(x), expected.clip(-10, 10), rtol=1e-3, atol=2e-3)
    assert norm(x).max() == 10


def test_rollout_and_update_leave_the_observation_norm_alone():
    """Or else pi_old would not be the policy that acted."""
    learner = clock_learner(Discrete(4), "--norm-obs")
    learner.agent.obs_norm.update(torch.randn(10, 2))
    before = copy.deepcopy(learner.agent.obs_norm.state_dict())
    learner.update(learner.rollout())
    for name, buffer in learner.agent.obs_norm.state_dict().items():
        assert torch.equal(buffer, before[name])


def test_rewards_are_scaled_by_the_deviation_of_all_discounted_returns_so_far():
    rng, norm, running = np.random.default_rng(0), ppo.RunningNorm(()), np.zeros(3)
    carried, seen = [0.0, 0.0, 0.0], []
    for num_steps in (20, 30):
        rewards, ended = rng.standard_cauchy((num_steps, 3)), rng.random((num_steps, 3)) < 0.1
        for t, n in np.ndindex(num_steps, 3):
            carried[n] = 0.9 * carried[n] + rewards[t, n]
            seen.append(carried[n])
            if ended[t, n]:
                carried[n] = 0.0
        scaled = ppo.scale_rewards(norm, rewards, ended, running, 0.9)
        close(scaled, (rewards / np.std(seen)).clip(-10, 10), rtol=1e-5, atol=1e-6)


def test_rollout_learns_from_scaled_rewards():
    learner = clock_learner(Discrete(4), "--norm-reward", "--gamma", "0.9", "--gae-lambda", "0")
    norm, running = ppo.RunningNorm(()), np.zeros(3)
    for part in range(2):
        batch, steps = learner.rollout(), slice(20 * part, 20 * part + 20)
        ended = learner.log("terminated") | learner.log("truncated")
        scaled = ppo.scale_rewards(norm, learner.log("reward")[steps], ended[steps], running, 0.9)
        terminated = torch.from_numpy(learner.log("terminated")[steps])
        close(batch.returns.view(20, 3)[terminated], scaled[terminated.numpy()], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- whole runs
def tiny_run(folder, *flags: str):
    """Eight iterations on CartPole, and the last checkpoint of them."""
    tiny = ["--num-envs", "2", "--num-steps", "32", "--total-timesteps", "512", "--compile", "off"]
    run_dir = ppo.train(ppo.parse_args([*tiny, "--runs-dir", str(folder), *flags]))
    return run_dir, ppo.load_checkpoint(run_dir)


def progress(run_dir, tag: str) -> list[float]:
    with open(run_dir / "progress.csv") as file:
        return [float(row[tag]) for row in csv.DictReader(file)]


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(tmp_path):
    weights = {}
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        _, checkpoint = tiny_run(tmp_path, "--seed", seed, "--run-name", name)
        weights[name] = torch.cat([x.flatten().float() for x in checkpoint["agent"].values()])
        torch.rand(7), np.random.rand(7)  # what happened before in the process must not matter
    assert torch.equal(weights["first"], weights["again"])
    assert not torch.equal(weights["first"], weights["other"])


@pytest.mark.parametrize("kl_target, factor", [("1e-9", 2), ("1e9", 0.5)])
def test_kl_adaptive_moves_beta_each_iteration_and_logs_it(tmp_path, kl_target, factor):
    flags = ("--objective", "kl-adaptive", "--kl-beta", "3", "--kl-target", kl_target)
    run_dir, checkpoint = tiny_run(tmp_path, *flags)
    assert progress(run_dir, "charts/kl_beta") == [3 * factor**i for i in range(8)]
    assert checkpoint["kl_beta"].item() == 3 * factor**8


@pytest.mark.parametrize("flag, last", [("--anneal-lr", 1 / 8), ("--no-anneal-lr", 1)])
def test_learning_rate_falls_linearly_or_stays(tmp_path, flag, last):
    run_dir, _ = tiny_run(tmp_path, "--learning-rate", "0.01", flag)
    assert progress(run_dir, "charts/learning_rate") == pytest.approx(np.linspace(0.01, 0.01 * last, 8))


def test_evaluation_plays_with_the_normaliser_of_the_run_and_never_updates_it(tmp_path, monkeypatch):
    run_dir, checkpoint = tiny_run(tmp_path, "--env-id", "Pendulum-v1", "--norm-obs", "--norm-reward")
    monkeypatch.setattr(ppo.RunningNorm, "update", lambda self, x: pytest.fail("evaluation updated a normaliser"))
    args = ppo.parse_args(["--evaluate", str(run_dir), "--eval-episodes", "1"])
    found = ppo.evaluate(args)

    weights = checkpoint["agent"]
    mean, deviation = weights["obs_norm.mean"], (weights["obs_norm.var"] + 1e-8).sqrt()
    assert weights["obs_norm.count"] == 512 and not torch.allclose(deviation, torch.ones(3, dtype=torch.float64))
    envs, expected, over = ppo.make_envs(args, 1, args.eval_seed), 0.0, [False]
    obs = envs.reset()
    while not over[0]:
        x = ((torch.from_numpy(obs) - mean) / deviation).clamp(-10, 10).float()
        for layer in ("first", "second"):
            x = torch.tanh(x @ weights[f"actor.{layer}.weight"].T + weights[f"actor.{layer}.bias"])
        action = x @ weights["actor.last.weight"].T + weights["actor.last.bias"]
        obs, rewards, _, _, over, _ = envs.step(action.clamp(-2, 2).numpy())
        expected += rewards[0]
    assert found == [pytest.approx(expected, rel=1e-3)]
