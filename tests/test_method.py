"""The functions of ppo.py against oracles that do not share its code: brute force, torch, numpy, Stable-Baselines3."""

import copy
import csv
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


gym.register("Clock-v0", entry_point=Clock)
gym.register("Labels-v0", entry_point=Labels)


class Player:
    """What train sets up before its loop, without a run directory."""

    def __init__(self, *flags: str, **env_options):
        self.args = ppo.parse_args(["--device", "cpu", "--compile", "off", *flags])
        self.envs = ppo.make_envs(self.args, self.args.num_envs, **env_options)
        self.agent = ppo.Agent(self.envs.single_observation_space, self.envs.single_action_space, self.args)
        self.optimizer = ppo.Adam(ppo.flatten_parameters(self.agent.parameters()))
        self.gradient = ppo.make_gradient(self.agent, self.args)
        self.episodes = ppo.Episodes(self.args.num_envs)
        self.obs, self.info = ppo.reset_envs(self.envs, self.args.seed, 1)

    def rollout(self) -> ppo.Batch:
        result = ppo.rollout(self.agent, self.envs, self.obs, self.info, self.episodes, self.args)
        batch, self.obs, self.info, self.finished = result
        return batch

    def update(self, batch: ppo.Batch, learning_rate: float = 1e-3, gradient=None) -> dict[str, float]:
        gradient = gradient or self.gradient
        return ppo.update(self.agent, self.optimizer, gradient, batch, learning_rate, self.args.kl_beta, self.args)

    def log(self, field: str) -> np.ndarray:
        """What the Clocks saw, (steps of their lives, num_envs, ...)."""
        return np.stack([[getattr(step, field) for step in env.unwrapped.log] for env in self.envs.envs], axis=1)


def clock_player(action_space: gym.Space, *flags: str, env_id: str = "Clock-v0", **options) -> Player:
    small = ["--env-id", env_id, "--num-envs", "3", "--num-steps", "20"]
    return Player(*small, *flags, action_space=action_space, **options)


def random_agent(action_space: gym.Space, *flags: str, observation_space: gym.Space = SIX_NUMBERS) -> ppo.Agent:
    """An agent far from the near uniform policy of a fresh one."""
    agent = ppo.Agent(observation_space, action_space, ppo.parse_args(["--device", "cpu", *flags]))
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
    (policy, _), (other_policy, _) = agent(features), other(features)
    expected, other_expected = torch_policy(agent, features), torch_policy(other, features)
    actions = torch.stack([component.sample() for component in expected], dim=-1)
    close(policy.log_prob(actions), torch_log_prob(expected, actions))
    close(policy.entropy(), sum(component.entropy() for component in expected))
    close(policy.kl(other_policy), torch_kl(expected, other_expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(policy.kl(other_policy), other_policy.kl(policy))


@every_action_space
def test_a_policy_comes_back_from_its_parameters(action_space):
    """So is pi_old rebuilt from the batch."""
    policy, _ = random_agent(action_space)(torch.randn(50, 6))
    close(type(policy)(*policy.parameters).kl(policy), torch.zeros(50))


@every_action_space
def test_sampled_actions_have_the_distribution_of_the_policy(action_space):
    agent, samples = random_agent(action_space), 40_000
    features = torch.randn(1, 6).expand(samples, 6)
    with torch.no_grad():
        actions = agent.act(features, agent.noise(samples))
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
    noise = torch.zeros_like(agent.noise(50))
    close(agent.act(features, noise), modes)


@pytest.mark.parametrize("norm", ["--norm-obs", "--no-norm-obs"])
@pytest.mark.parametrize(
    "observation_space", [SIX_NUMBERS, Box(-1, 1, (2, 3)), Box(-1, 1, ())], ids=["vector", "matrix", "scalar"]
)
@pytest.mark.parametrize("kind", ["discrete", "shifted", "multidiscrete", "box"])
def test_numpy_act_equals_act(kind, observation_space, norm):
    agent = random_agent(ACTION_SPACES[kind], norm, observation_space=observation_space)
    obs = 3 * torch.randn(50, *observation_space.shape) + 1
    if agent.obs_norm:
        agent.obs_norm.update(obs[:25] * 0.1)  # so that some are beyond 10 deviations
    fast_act, noise = agent.numpy_act(), agent.noise(50).detach()
    with torch.no_grad():
        close(fast_act(obs.numpy(), noise.numpy()), agent.act(agent.features(obs), noise), rtol=1e-4, atol=1e-4)
        for parameter in agent.actor.parameters():
            parameter.mul_(0.5)
        close(fast_act(obs.numpy(), noise.numpy()), agent.act(agent.features(obs), noise), rtol=1e-4, atol=1e-4)


@every_action_space
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_environments_get_the_stored_actions_shifted_and_clipped(env_id, action_space):
    """And the log-probabilities are those of the actions as they were sampled."""
    player = clock_player(action_space, "--log-std-init", "1", env_id=env_id)
    batch = player.rollout()
    stored, given = batch.actions.numpy().reshape(20, 3, -1), player.log("action").reshape(20, 3, -1)
    if isinstance(action_space, Box):
        assert (stored < action_space.low).any() and (stored > action_space.high).any()
        close(given, stored.clip(action_space.low, action_space.high))
    else:
        close(given, stored + action_space.start)
        assert len(np.unique(given)) > 2
    with torch.no_grad():
        policy = torch_policy(player.agent, player.agent.features(batch.obs))
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
    close(first.features(images), first.body(images.double().float() / 255))


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
    "env", [("--env-id", "CartPole-v1"), ("--env-id", "Pendulum-v1", "--norm-obs", "--norm-reward")], ids=lambda x: x[1]
)
def test_the_first_minibatch_has_ratio_one_and_the_policy_gradient(env, objective):
    player = Player(*env, "--objective", objective, *PURE)
    first = player.rollout()
    player.update(first)
    if player.agent.obs_norm:
        player.agent.obs_norm.update(first.obs)
    batch = player.rollout()
    rows = torch.randperm(128)[:32]
    gradient, stats = player.gradient(batch, rows, torch.tensor(1.0))
    stats = dict(zip(ppo.STATS, stats.tolist()))
    assert abs(stats["approx_kl"]) < 1e-6 and abs(stats["old_approx_kl"]) < 1e-6 and stats["clipfrac"] == 0

    features = batch.obs
    if player.agent.obs_norm:
        mean, variance = first.obs.mean(0), first.obs.var(0, correction=0)
        features = ((batch.obs - mean) / variance.sqrt()).clamp(-10, 10)
    log_probs = torch_log_prob(torch_policy(player.agent, features[rows]), batch.actions[rows])
    close(batch.logprobs[rows], log_probs, rtol=1e-4, atol=1e-4)
    advantages = batch.advantages[rows]
    advantages = (advantages - advantages.mean()) / advantages.std()
    (-(advantages * log_probs).mean()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in player.agent.parameters()]
    close(gradient, torch.cat([grad.flatten() for grad in grads]), rtol=1e-3, atol=1e-5)
    assert gradient.norm() > 1e-3


@every_action_space
def test_the_kl_penalty_is_beta_times_the_kl_of_the_old_from_the_new_policy(action_space):
    player = clock_player(action_space, "--objective", "kl-fixed", "--no-norm-adv")
    batch = player.rollout()
    old = torch_policy(copy.deepcopy(player.agent), player.agent.features(batch.obs))
    for parameter in player.agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    new = torch_policy(player.agent, player.agent.features(batch.obs))
    free, penalised = (ppo.ppo_loss(player.agent, batch, torch.tensor(beta), player.args)[0] for beta in (0.0, 2.0))
    close(penalised - free, 2 * torch_kl(old, new).mean(), rtol=1e-3, atol=1e-5)


def test_loss_is_policy_loss_plus_value_error_minus_entropy_bonus():
    player = clock_player(Discrete(4), "--vf-coef", "0.7", "--ent-coef", "0.3")
    loss, (policy_loss, value_loss, entropy, *_) = ppo.ppo_loss(
        player.agent, player.rollout(), torch.tensor(1.0), player.args
    )
    close(loss, policy_loss + 0.7 * value_loss - 0.3 * entropy)


def test_kl_estimates_and_clip_fraction():
    player = clock_player(Discrete(4))
    batch = player.rollout()
    shift = torch.where(torch.arange(60) < 15, math.log(1.3), math.log(1.15))  # a quarter is outside the range
    shifted = batch._replace(logprobs=batch.logprobs - shift)
    stats = dict(zip(ppo.STATS, ppo.ppo_loss(player.agent, shifted, torch.tensor(1.0), player.args)[1]))
    logs = 0.25 * math.log(1.3) + 0.75 * math.log(1.15)
    assert stats["approx_kl"].item() == pytest.approx(0.25 * 0.3 + 0.75 * 0.15 - logs, abs=1e-5)
    assert stats["old_approx_kl"].item() == pytest.approx(-logs, abs=1e-5)
    assert stats["clipfrac"].item() == 0.25


@every_action_space
def test_the_entropy_bonus_raises_the_entropy(action_space):
    player = clock_player(action_space, "--ent-coef", "1", "--vf-coef", "0")
    torch.nn.init.normal_(player.agent.actor.last.weight, std=0.3)
    batch = player.rollout()
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages))

    def entropy() -> float:
        with torch.no_grad():
            return player.agent(player.agent.features(batch.obs))[0].entropy().mean().item()

    before = entropy()
    player.update(batch)
    assert entropy() > before


def test_the_value_loss_moves_values_to_the_returns_and_leaves_the_policy_alone():
    player = clock_player(Discrete(4))
    batch = player.rollout()
    batch = batch._replace(advantages=torch.zeros_like(batch.advantages), returns=batch.values + 1.0)
    player.update(batch)
    with torch.no_grad():
        policy, values = player.agent(player.agent.features(batch.obs))
    assert (batch.returns - values).square().mean() < 0.5
    close(policy.log_prob(batch.actions), batch.logprobs)


@pytest.mark.parametrize("bound", ["0.01", "1e6"])
def test_gradient_clipping_equals_torch(bound):
    player = clock_player(ACTION_SPACES["box"], "--max-grad-norm", bound)
    batch, rows = player.rollout(), torch.arange(60)
    gradient, stats = player.gradient(batch, rows, torch.tensor(1.0))
    ppo.ppo_loss(player.agent, batch, torch.tensor(1.0), player.args)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(player.agent.parameters(), float(bound))
    assert 0.01 < norm < 1e6
    close(gradient, torch.cat([p.grad.flatten() for p in player.agent.parameters()]), rtol=1e-4, atol=1e-7)
    close(stats[ppo.STATS.index("grad_norm")], norm, rtol=1e-4, atol=0)


def test_compiled_gradients_are_the_eager_ones_and_each_agent_has_its_own():
    """Two agents in one process; weights, normaliser and beta change between calls of what was compiled once."""
    flags = ("--env-id", "Clock-v0", "--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--norm-obs")
    flags += ("--objective", "kl-adaptive", "--ent-coef", "0.1", "--clip-vloss")
    players = [Player(*flags, action_space=ACTION_SPACES["box"]) for _ in range(2)]
    batches = [player.rollout() for player in players]
    compiled = []
    for player in players:
        player.args.compile = "on"
        compiled.append(ppo.make_gradient(player.agent, player.args))
    for beta in (0.5, 2.0):
        for player, fast, batch in zip(players, compiled, batches):
            rows = torch.randperm(16)[:8]
            eager_gradient, eager_stats = player.gradient(batch, rows, torch.tensor(beta))
            gradient, stats = fast(batch, rows, torch.tensor(beta))
            close(gradient, eager_gradient, rtol=1e-3, atol=1e-5)
            close(stats, eager_stats, rtol=1e-3, atol=1e-5)
            player.optimizer.step(gradient, 0.03)
            player.agent.obs_norm.update(batch.obs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_equals_torch(dtype):
    vector = torch.randn(30, dtype=dtype)
    reference = torch.nn.Parameter(vector.clone())
    adam, torch_adam = ppo.Adam(vector), torch.optim.Adam([reference], eps=1e-5)
    for step in range(50):
        reference.grad = torch.randn(30, dtype=dtype) * torch.logspace(-6, 2, 30, dtype=dtype)
        torch_adam.param_groups[0]["lr"] = rate = 0.01 / (1 + step)
        torch_adam.step()
        adam.step(reference.grad, rate)
    close(
        vector,
        reference.data,
        rtol=1e-12 if dtype == torch.float64 else 1e-4,
        atol=1e-12 if dtype == torch.float64 else 1e-6,
    )


# ------------------------------------------------------------------------------------------------------ update
def test_update_uses_every_row_once_per_epoch_and_logs_means():
    player = clock_player(Discrete(4), "--num-minibatches", "3", "--update-epochs", "5")
    batch, calls = player.rollout(), []

    def watched(batch, rows, beta):
        gradient, stats = player.gradient(batch, rows, beta)
        calls.append((rows, stats))
        return gradient, stats

    logged = player.update(batch, gradient=watched)
    rows = torch.stack([rows for rows, _ in calls]).view(5, 60)
    close(rows.sort().values, torch.arange(60).expand(5, 60))
    assert len(rows.unique(dim=0)) == 5
    assert player.optimizer.t == 15
    means = torch.stack([stats for _, stats in calls]).mean(0)
    for name, mean in zip(ppo.STATS, means.tolist()):
        assert logged[f"losses/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-7)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    player = clock_player(Discrete(4))
    batch = player.rollout()
    for values, expected in ((batch.returns, 1.0), (torch.zeros(60), 0.0), (-batch.returns, -3.0)):
        logged = player.update(batch._replace(values=values))
        assert logged["losses/explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_target_kl_stops_before_the_first_step():
    player = clock_player(Discrete(4), "--target-kl", "0.7")
    batch, before = player.rollout(), player.optimizer.parameters.clone()
    player.update(batch._replace(logprobs=batch.logprobs - 1.0))  # the estimate is e - 2 = 0.718
    assert player.optimizer.t == 0 and torch.equal(player.optimizer.parameters, before)


def test_target_kl_lets_no_step_start_too_far_away():
    player = clock_player(Discrete(4), "--target-kl", "0.02")
    batch, estimates = player.rollout(), []

    def watched(batch, rows, beta):
        gradient, stats = player.gradient(batch, rows, beta)
        estimates.append(stats[ppo.STATS.index("approx_kl")].item())
        return gradient, stats

    player.update(batch, learning_rate=0.01, gradient=watched)
    assert max(estimates[:-1]) <= 0.02 < estimates[-1]
    assert 1 <= player.optimizer.t == len(estimates) - 1 < 40


@every_action_space
def test_mean_kl_equals_torch(action_space):
    player = clock_player(action_space, "--num-steps", "500")  # 1,500 rows: more than one chunk
    batch = player.rollout()
    old = torch_policy(copy.deepcopy(player.agent), player.agent.features(batch.obs))
    for parameter in player.agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = torch_kl(old, torch_policy(player.agent, player.agent.features(batch.obs))).mean().item()
    assert ppo.mean_kl(player.agent, batch) == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ rollout
@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])  # uneven takes the path without numpy_act
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_rows_of_the_batch_are_the_steps_of_the_environments(kind, env_id):
    player = clock_player(ACTION_SPACES[kind], env_id=env_id)
    for part in range(2):
        batch = player.rollout()
        steps = slice(20 * part, 20 * part + 20)
        assert len(player.log("obs")) == steps.stop
        assert all(len(column) == 60 for column in (*batch[:-1], *batch.old_policy))
        close(batch.obs, player.log("obs")[steps].reshape(60, *batch.obs.shape[1:]))


@pytest.mark.parametrize("flags", [(), ("--clip-reward",)], ids=["raw", "clip_reward"])
@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])
@pytest.mark.parametrize("env_id", ["Clock-v0", "Labels-v0"])
def test_targets_come_from_the_true_successors(env_id, kind, flags):
    """Of an ended episode that is its final observation, although the environment shows that of the reset."""
    check_targets(clock_player(ACTION_SPACES[kind], *flags, env_id=env_id))


def test_targets_come_from_the_true_successors_of_an_environment_that_reuses_its_array():
    """Its final observation must be copied before the reset overwrites it."""
    check_targets(clock_player(Discrete(4), one_buffer=True))


def check_targets(player: Player) -> None:
    def value(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            flat = torch.from_numpy(obs.reshape(60, *obs.shape[2:]))
            return player.agent.value(player.agent.features(flat)).view(20, 3).numpy()

    for part in range(2):
        batch, steps = player.rollout(), slice(20 * part, 20 * part + 20)
        names = ("reward", "obs", "successor", "terminated", "truncated")
        rewards, obs, successors, *flags = (player.log(name)[steps] for name in names)
        assert (flags[1] & ~flags[0]).any() and (flags[0] & ~flags[1]).any() and (flags[0] & flags[1]).any()
        rewards = np.sign(rewards) if player.args.clip_reward else rewards
        values = value(obs)
        expected = brute_force_gae(rewards, values, value(successors), *flags, 0.99, 0.95)
        close(batch.values, values.flatten(), rtol=1e-4, atol=1e-5)
        close(batch.advantages, expected.flatten(), rtol=1e-4, atol=1e-4)
        close(batch.returns, (expected + values).flatten(), rtol=1e-4, atol=1e-4)


def test_finished_episodes_report_raw_returns():
    player = clock_player(Discrete(4), "--clip-reward", "--norm-reward")
    found, expected, sums = [], [], np.zeros((3, 2))
    for part in range(3):
        player.rollout()
        found += [(60 * part + step, ret, length, env) for step, ret, length, env in player.finished]
    rewards, ended = player.log("reward"), player.log("terminated") | player.log("truncated")
    for t, n in np.ndindex(rewards.shape):
        sums[n] += rewards[t, n], 1
        if ended[t, n]:
            expected.append((3 * (t + 1), pytest.approx(sums[n, 0]), sums[n, 1], n))
            sums[n] = 0
    assert found == expected


def test_episodes_equal_a_slow_loop_over_several_rollouts():
    rng, episodes = np.random.default_rng(0), ppo.Episodes(4)
    current = [[] for _ in range(4)]
    for num_steps in (1, 7, 30, 2):
        rewards, finished = rng.normal(size=(num_steps, 4)), rng.random((num_steps, 4)) < 0.15
        expected = []
        for t, n in np.ndindex(num_steps, 4):
            current[n].append(rewards[t, n])
            if finished[t, n]:
                expected.append(((t + 1) * 4, pytest.approx(sum(current[n])), len(current[n]), n))
                current[n] = []
        assert episodes.collect(rewards, finished) == expected


def test_a_game_is_over_where_its_clock_turned_back():
    ended, clock = np.array([True, True, False, False]), np.array([100, 100, 100, 100])
    later = dict(episode_frame_number=np.array([104, 7, 104, 104]))
    assert ppo.whole_games(ended, later, clock).tolist() == [False, True, False, False]
    assert ppo.whole_games(ended, {}, None) is ended


def test_atari_games_of_the_paper_go_on_after_a_lost_life():
    args = ppo.parse_args(["--env-id", "BreakoutNoFrameskip-v4", "--num-threads", "1"])
    envs = ppo.make_envs(args, 2)
    _, info = ppo.reset_envs(envs, 1, 1)
    lives, lost, games, rng = info["lives"].copy(), np.zeros(2, int), np.zeros(2, int), np.random.default_rng(0)
    for _ in range(600):
        clock = info["episode_frame_number"]
        _, _, terminations, truncations, info = envs.step(rng.integers(0, 4, 2))
        over = ppo.whole_games(terminations | truncations, info, clock)
        assert (over == (info["lives"] > lives)).all()  # all five are back
        assert (terminations == (info["lives"] != lives)).all()
        lives, lost, games = info["lives"].copy(), lost + terminations, games + over
    assert (games >= 1).all() and (lost // 5 == games).all()


def test_a_bad_number_is_traced_to_its_environment_and_step():
    observations, rewards = torch.zeros(5, 3, 2), np.zeros((4, 3))
    ppo.check_finite(observations, rewards)
    observations[2, 1, 0] = math.nan
    with pytest.raises(ppo.Failed, match="observation of environment 1 in step 2 "):
        ppo.check_finite(observations, rewards)
    rewards[3, 2] = math.inf
    with pytest.raises(ppo.Failed, match="reward of environment 2 in step 3 "):
        ppo.check_finite(torch.zeros(5, 3, 2), rewards)


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
    player = clock_player(Discrete(4), "--norm-obs")
    player.agent.obs_norm.update(torch.randn(10, 2))
    before = copy.deepcopy(player.agent.obs_norm.state_dict())
    player.update(player.rollout())
    for name, buffer in player.agent.obs_norm.state_dict().items():
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
    player = clock_player(Discrete(4), "--norm-reward", "--gamma", "0.9", "--gae-lambda", "0")
    norm, running = ppo.RunningNorm(()), np.zeros(3)
    for part in range(2):
        batch, steps = player.rollout(), slice(20 * part, 20 * part + 20)
        ended = player.log("terminated") | player.log("truncated")
        scaled = ppo.scale_rewards(norm, player.log("reward")[steps], ended[steps], running, 0.9)
        terminated = torch.from_numpy(player.log("terminated")[steps])
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
    assert checkpoint["kl_beta"] == 3 * factor**8


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
    envs, expected, over = ppo.make_envs(args, 1), 0.0, False
    obs, _ = ppo.reset_envs(envs, args.eval_seed, 0)
    while not over:
        x = ((torch.from_numpy(obs) - mean) / deviation).clamp(-10, 10).float()
        for layer in ("first", "second"):
            x = torch.tanh(x @ weights[f"actor.{layer}.weight"].T + weights[f"actor.{layer}.bias"])
        action = x @ weights["actor.last.weight"].T + weights["actor.last.bias"]
        obs, rewards, terminations, truncations, _ = envs.step(action.clamp(-2, 2).numpy())
        expected, over = expected + rewards[0], terminations[0] or truncations[0]
    assert found == [pytest.approx(expected, rel=1e-3)]
