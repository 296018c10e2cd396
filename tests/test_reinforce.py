"""The method of reinforce.py against slow loops, torch, numpy and whole enumerations."""

import copy
import csv
import math
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from test_method import ACTION_SPACES, SIX_NUMBERS, Clock, Step, close, torch_log_prob, torch_policy
from test_probes import Probe
from torch import nn

import reinforce

every_action_space = pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
both_kinds = pytest.mark.parametrize("kind", ["discrete", "box"])
every_baseline = pytest.mark.parametrize("baseline", ["none", "mean", "value"])
every_return = pytest.mark.parametrize("returns", ["full", "to-go"])

SETTING = "--num-envs 3 --num-steps 20 --learning-rate 1e-2 --gamma 0.9 --returns to-go --baseline value --ent-coef 0"
SETTING += " --no-norm-adv --max-grad-norm 1e9 --value-learning-rate 3e-3 --value-steps 16 --value-batch-size 16"
SETTING += " --no-norm-reward --log-std-init 0 --device cpu --compile off"
SETTING = SETTING.split()  # for the defaults are free to change


class Dice(Clock):
    """A Clock whose episodes end by chance, and sooner for some actions."""

    def step(self, action):
        before = self.observe().copy()
        self.time, self.age, reward = self.time + 1, self.age + 1, self.np_random.normal(1.0, 3.0)
        ended = self.np_random.random() < (0.3 if np.ravel(action)[0] > 0 else 0.05)
        how = self.np_random.integers(3)
        terminated, truncated = bool(ended and how != 1), bool(ended and how != 0)
        self.log.append(Step(before, np.copy(action), reward, self.observe().copy(), terminated, truncated))
        return self.observe(), reward, terminated, truncated, {}


class Script(gym.Env):
    """Its k-th episode pays 1 at once and is over after 1 or 9 steps, as bit k of its number says."""

    observation_space, action_space, number = Box(-1, 1, (1,)), Discrete(2), 0
    episode, bits = -1, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.time, self.bit = 0, self.number >> self.episode & 1
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.time += 1
        self.bits.append(self.bit)
        return np.ones(1, np.float32), float(self.time == 1), self.time == (9 if self.bit else 1), False, {}


gym.register("Dice-v0", entry_point=Dice)
gym.register("Script-v0", entry_point=Script)


class Recorder:
    """An optimizer that only remembers."""

    def step(self, grad: torch.Tensor, learning_rate: float) -> None:
        self.grad, self.learning_rate = grad.clone(), learning_rate


class Learner:
    """What train sets up before its loop, without a run directory."""

    def __init__(self, *flags: str, **env_options):
        self.args = reinforce.parse_args([*SETTING, *flags])
        self.envs = reinforce.make_envs(self.args, self.args.num_envs, self.args.seed, **env_options)
        self.rng = reinforce.Rng(self.args.seed, "cpu")
        self.player = reinforce.Player(self.envs, self.args, self.rng)
        self.agent = reinforce.make_agent(self.envs, self.args)
        self.policy_optimizer = reinforce.Adam(reinforce.flatten_parameters(self.agent.policy_parameters()))
        self.value_optimizer = reinforce.Adam(reinforce.flatten_parameters(self.agent.critic.parameters()))
        self.gradient = reinforce.make_gradient(self.agent, self.args)

    def rollout(self) -> reinforce.Batch:
        for env in self.envs.envs.envs:
            env.unwrapped.log = []
        return reinforce.rollout(self.agent, self.player, self.args)

    def update(self, batch: reinforce.Batch, policy_optimizer=None, learning_rate: float = 1e-2) -> dict[str, float]:
        optimizers = (policy_optimizer or self.policy_optimizer, self.value_optimizer)
        logged = reinforce.update(self.agent, *optimizers, self.gradient, batch, learning_rate, self.rng, self.args)
        return {name: value.item() for name, value in logged.items()}

    def fit_value(self, batch: reinforce.Batch, gradient=None) -> dict[str, torch.Tensor]:
        return reinforce.fit_value(self.value_optimizer, gradient or self.gradient, batch, self.rng, self.args)

    def policy_gradients(self, batch: reinforce.Batch) -> tuple[torch.Tensor, ...]:
        return reinforce.policy_gradients(self.agent, batch, self.args)

    def torch_gradients(self, batch: reinforce.Batch, psi: torch.Tensor, ent_coef: float = 0.0) -> torch.Tensor:
        """sum of grad log pi psi / num_steps of each environment, by torch alone."""
        policy = torch_policy(self.agent, self.agent.features(batch.obs))
        terms = torch_log_prob(policy, batch.actions) * psi + ent_coef * sum(x.entropy() for x in policy)
        ends = np.cumsum([0, *batch.lengths])
        sums = [terms[begin:end].sum() / self.args.num_steps for begin, end in pairwise(ends)]
        parameters = self.agent.policy_parameters()
        rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in sums]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            nn.utils.parameters_to_vector(x).detach().clone()
            for x in (self.agent.policy_parameters(), self.agent.critic.parameters())
        )

    def episodes(self) -> list[list[tuple[int, list[Step]]]]:
        """All that each environment played, waiting or not, episode by episode, with the step that it began in."""
        result = []
        for env in self.envs.envs.envs:
            begin, cut = 0, []
            for t, step in enumerate(env.unwrapped.log):
                if step.terminated or step.truncated or t + 1 == len(env.unwrapped.log):
                    cut.append((begin, env.unwrapped.log[begin : t + 1]))
                    begin = t + 1
            result.append(cut)
        return result

    def expected(self) -> list[list[list[Step]]]:
        """For each environment the episodes that a batch must hold."""
        return [[steps for begin, steps in cut if begin < self.args.num_steps] for cut in self.episodes()]

    def expected_rows(self, field: str) -> np.ndarray:
        return np.array([getattr(step, field) for env in self.expected() for episode in env for step in episode])


def dice_learner(action_space: gym.Space, *flags: str) -> Learner:
    """An agent that is far from a fresh one."""
    learner = Learner("--env-id", "Dice-v0", *flags, action_space=action_space)
    for parameter in learner.agent.parameters():
        nn.init.normal_(parameter, std=0.3)
    return learner


def slow_returns(rewards, terminated, truncated, next_values, gamma: float, kind: str) -> np.ndarray:
    """Of a single environment, by the definition: what follows in the episode, or all of it from its begin."""
    result, begin, steps = np.zeros(len(rewards)), 0, len(rewards)
    for t in range(steps):
        end = next((k for k in range(t, steps) if terminated[k] or truncated[k]), steps - 1)
        first = t if kind == "to-go" else begin
        result[t] = sum(gamma ** (k - first) * rewards[k] for k in range(first, end + 1))
        if truncated[end] and not terminated[end]:
            result[t] += gamma ** (end + 1 - first) * next_values[end]
        begin = t + 1 if t == end else begin
    return result


# ------------------------------------------------------------------------------------------- returns and baselines
@every_return
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_equal_a_slow_loop_over_each_episode(returns, gamma):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 30, 4))
    terminated, truncated = rng.random((2, 30, 4)) < 0.2
    assert (terminated & truncated).any() and (truncated & ~terminated).any()
    values[terminated] = np.nan  # as only the truncated need one
    tensors = [torch.from_numpy(x) for x in (rewards, terminated, truncated, values)]
    found = reinforce.compute_returns(*tensors, gamma, returns)
    for n in range(4):
        columns = (x[:, n] for x in (rewards, terminated, truncated, values))
        close(found[:, n], slow_returns(*columns, gamma, returns))


def test_returns_of_a_few_steps_by_hand():
    """Two episodes, the second cut by a time limit where V is 40, or where the task ended in the same step."""
    rewards, values = torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.full((4, 1), 40.0)
    ends = torch.tensor([[False], [True], [False], [False]])
    cut = torch.tensor([[False], [False], [False], [True]])
    for terminated, truncated, to_go, full in (
        (ends, cut, [2, 2, 18, 28], [2, 2, 18, 18]),
        (ends | cut, cut, [2, 2, 8, 8], [2, 2, 8, 8]),
    ):
        for kind, expected in (("to-go", to_go), ("full", full)):
            found = reinforce.compute_returns(rewards, terminated, truncated, values, 0.5, kind)
            close(found.flatten(), expected)


def test_psi_is_the_return_less_nothing_its_mean_or_the_value():
    returns, values = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([5.0, 0.0, 1.0])
    for baseline, expected in dict(none=[1, 2, 6], mean=[-2, -1, 3], value=[-4, 2, 5]).items():
        close(reinforce.subtract_baseline(returns, values, baseline), expected)


@every_baseline
@every_return
@both_kinds
def test_psi_and_targets_of_a_rollout_follow_from_what_was_seen(kind, returns, baseline):
    """Truncated episodes go on with V of their last observation only where a V is learned; V always learns to go."""
    learner = dice_learner(ACTION_SPACES[kind], "--returns", returns, "--baseline", baseline, "--norm-obs")
    learner.agent.obs_norm.update(torch.randn(10, 2) + 1)
    bootstrapped = 0
    for _ in range(3):
        batch = learner.rollout()
        names = ("reward", "terminated", "truncated")
        rows = [learner.expected_rows(name) for name in names]
        obs, successors = (torch.from_numpy(learner.expected_rows(name)) for name in ("obs", "successor"))
        with torch.no_grad():
            values, next_values = (learner.agent.value(learner.agent.features(x)).numpy() for x in (obs, successors))
        future = next_values if baseline == "value" else np.zeros_like(next_values)
        close(batch.returns, slow_returns(*rows, future, 0.9, "to-go"), rtol=1e-4, atol=1e-4)
        weighed = slow_returns(*rows, future, 0.9, returns)
        weighed -= {"none": 0.0, "mean": weighed.mean(), "value": values}[baseline]
        close(batch.psi, weighed, rtol=1e-4, atol=1e-4)
        bootstrapped += (rows[2] & ~rows[1]).sum()
    assert bootstrapped > 3


# ------------------------------------------------------------------------------------------------ whole episodes
@every_action_space
def test_a_batch_is_exactly_the_episodes_that_began_in_the_first_steps(action_space):
    learner, waited = dice_learner(action_space, "--num-steps", "8"), 0
    for _ in range(4):
        batch = learner.rollout()
        close(batch.obs, learner.expected_rows("obs"))
        assert batch.lengths == [sum(map(len, env)) for env in learner.expected()]
        assert len(batch.obs) == len(batch.actions) == len(batch.psi) == sum(batch.lengths)
        taken = reinforce.to_env(action_space, batch.actions.numpy())
        close(taken, learner.expected_rows("action").reshape(taken.shape))

        time = max(batch.lengths)  # all play until the last one is through
        assert learner.player.steps == 3 * time
        assert all(sum(len(steps) for _, steps in env) == time for env in learner.episodes())
        done = []
        for n, env in enumerate(learner.expected()):
            ends = np.cumsum([len(episode) for episode in env])
            done += [(3 * end, sum(s.reward for s in e), len(e), n) for end, e in zip(ends, env)]
        done.sort(key=lambda episode: (episode[0], episode[3]))
        assert learner.player.finished == [(step, pytest.approx(ret), length, n) for step, ret, length, n in done]
        for env in learner.expected():
            assert all(episode[-1].terminated or episode[-1].truncated for episode in env)
        waited += 3 * time - sum(batch.lengths)
    assert waited > 5


def test_no_episode_that_begins_after_the_first_steps_is_taken():
    """Episodes of one step each: every batch is num_steps of them and nobody waits."""
    gym.register("Probe-v0", entry_point=lambda: Probe(lambda seen, action, last: 1.0))
    try:
        learner = Learner("--env-id", "Probe-v0", "--num-steps", "8")
    finally:
        del gym.registry["Probe-v0"]
    batch = learner.rollout()
    assert batch.lengths == [8, 8, 8] and learner.player.steps == 24 and len(learner.player.finished) == 24


def test_short_episodes_are_not_favoured():
    """All 16 fates of four coins, each an environment: every episode pays 1, so no action is worth more than another.

    By Wald's identity the sum of the terms is zero in expectation. Without the episodes unfinished it is not.
    """
    learner = Learner(
        "--env-id", "Script-v0", "--num-envs", "16", "--num-steps", "4", "--baseline", "none", "--gamma", "1"
    )
    nn.init.zeros_(learner.agent.actor.last.weight)  # both actions are equally likely
    for n, env in enumerate(learner.envs.envs.envs):
        env.unwrapped.number, env.unwrapped.episode, env.unwrapped.bits = n, -1, []
    batch = learner.rollout()
    bits = [env.unwrapped.bits[:length] for env, length in zip(learner.envs.envs.envs, batch.lengths)]
    batch = batch._replace(actions=torch.tensor(sum(bits, [])).unsqueeze(-1))
    assert {length for _, _, length, _ in learner.player.finished} == {1, 9}

    grads, *_ = learner.policy_gradients(batch)
    assert grads.norm() > 0.1
    close(grads.mean(0), torch.zeros_like(grads[0]), rtol=0, atol=1e-6)
    lengths = [length for _, _, length, _ in learner.player.finished]
    assert lengths.count(1) == lengths.count(9) == 15

    psi, begin = batch.psi.clone(), 0
    for length in batch.lengths:
        psi[begin + (length - 9 if length > 4 else length) : begin + length] = 0  # what is unfinished after step 4
        begin += length
    assert psi.sum() == lengths.count(1)
    biased, *_ = learner.policy_gradients(batch._replace(psi=psi))
    assert biased.mean(0).norm() > 0.1


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_rewards_are_scaled_by_the_returns_of_played_steps_alone(gamma):
    flags = ("--baseline", "none", "--gamma", str(gamma))
    learner = dice_learner(Discrete(4), *flags, "--norm-reward")
    seen = []
    for _ in range(3):
        batch = learner.rollout()
        assert learner.player.steps > len(batch.psi)
        rows = [learner.expected_rows(name) for name in ("reward", "terminated", "truncated")]
        running = 0.0
        for reward, terminated, truncated in zip(*rows):
            running = gamma * running + reward
            seen.append(running)
            running = 0.0 if terminated or truncated else running
        scaled = (rows[0] / np.std(seen)).clip(-10, 10)
        close(batch.psi, slow_returns(scaled, *rows[1:], np.zeros(len(scaled)), gamma, "to-go"), rtol=1e-4, atol=1e-4)
        close(learner.agent.return_norm.count, len(seen))
        totals = [ret for _, ret, _, _ in learner.player.finished]
        assert sum(totals) == pytest.approx(rows[0].sum())  # recorded raw


def test_rewards_are_clipped_to_their_sign_but_recorded_raw():
    learner = dice_learner(Discrete(4), "--clip-reward", "--baseline", "none")
    batch = learner.rollout()
    rows = [learner.expected_rows(name) for name in ("reward", "terminated", "truncated")]
    close(
        batch.psi,
        slow_returns(np.sign(rows[0]), *rows[1:], np.zeros(len(batch.psi)), 0.9, "to-go"),
        rtol=1e-4,
        atol=1e-4,
    )
    assert sum(ret for _, ret, _, _ in learner.player.finished) == pytest.approx(rows[0].sum())


def test_an_episode_that_never_ends_is_named(monkeypatch):
    gym.register("Probe-v0", entry_point=lambda: Probe(lambda seen, action, last: 1.0, length=10**9))
    monkeypatch.setattr(reinforce, "ENDLESS", 30)
    try:
        learner = Learner("--env-id", "Probe-v0")
    finally:
        del gym.registry["Probe-v0"]
    with pytest.raises(reinforce.Failed, match="environment 0 of Probe-v0 lasts for more than 30 steps") as failed:
        learner.rollout()
    assert failed.value.status == "failed"
    assert dice_learner(Discrete(4)).rollout() is not None


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", pytest.param("BreakoutNoFrameskip-v4", marks=pytest.mark.slow)]
)
def test_a_player_comes_back_bit_for_bit(env_id):
    """Although every rollout begins with a reset, which leaves episodes unfinished where an environment waited."""
    flags = ("--env-id", env_id, "--num-envs", "2", "--num-steps", "30")
    first, second, waited = Learner(*flags), Learner(*flags), 0
    for _ in range(2):
        batch = reinforce.rollout(first.agent, first.player, first.args)
        waited += first.player.steps - sum(batch.lengths)
    assert waited > 0 or env_id == "Pendulum-v1"
    reinforce.rollout(second.agent, second.player, second.args)  # what it did before must not matter
    second.agent.load_state_dict(first.agent.state_dict())
    second.player.load_state_dict(copy.deepcopy(first.player.state_dict()))
    assert second.player.inexact == "" and np.array_equal(first.player.obs, second.player.obs)
    assert np.array_equal(first.envs.numbers, second.envs.numbers)
    batches = []
    for learner in (first, second):
        learner.rng.torch.manual_seed(5)
        batches.append(reinforce.rollout(learner.agent, learner.player, learner.args))
    for name, one, two in zip(batches[0]._fields, *batches):
        assert one == two if name == "lengths" else torch.equal(one, two), name
    assert first.player.finished == second.player.finished and first.player.steps == second.player.steps


# ------------------------------------------------------------------------------------------------- the estimator
@every_action_space
@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1024, 7])
def test_the_estimate_is_the_mean_over_environments_of_the_sum_of_grad_log_pi_psi(
    action_space, ent_coef, rows, monkeypatch
):
    monkeypatch.setattr(reinforce, "ROWS", rows)
    learner = dice_learner(action_space, "--norm-obs", "--ent-coef", str(ent_coef))
    learner.agent.obs_norm.update(torch.randn(10, 2) + 1)
    batch = learner.rollout()
    grads, objective, entropy = learner.policy_gradients(batch)
    expected = learner.torch_gradients(batch, batch.psi, ent_coef)
    close(grads, expected, rtol=1e-3, atol=1e-3)
    assert len({*batch.lengths}) > 1 and expected.norm() > 1

    with torch.no_grad():
        policy = torch_policy(learner.agent, learner.agent.features(batch.obs))
        close(objective, (torch_log_prob(policy, batch.actions) * batch.psi).sum() / 60, rtol=1e-4, atol=1e-4)
        close(entropy, sum(x.entropy() for x in policy).mean(), rtol=1e-4, atol=1e-5)

    mean, variance, snr = reinforce.gradient_statistics(grads)
    close(mean, grads.numpy().mean(0), rtol=1e-4, atol=1e-5)
    close(variance, np.trace(np.cov(grads.numpy().T)) / 3, rtol=1e-4, atol=0)
    close(snr, (grads.numpy().mean(0) ** 2).sum() / variance.item(), rtol=1e-4, atol=0)


def test_the_variance_of_the_estimate_is_that_of_many_estimates():
    grads = torch.randn(3000, 8, 5) * torch.arange(5) + 1
    means, variances, ratios = zip(*map(reinforce.gradient_statistics, grads))
    assert np.mean(variances) == pytest.approx(torch.stack(means).var(0).sum().item(), rel=0.05)
    assert reinforce.gradient_statistics(torch.zeros(4, 5))[2] == 0
    noise = [reinforce.gradient_statistics(x)[2].item() for x in torch.randn(1000, 8, 50)]
    assert np.mean(noise) == pytest.approx(1, abs=0.1)


class Enumeration:
    """Two steps, two actions, hence four trajectories, each an environment of its own."""

    def __init__(self, returns: str, baseline: str, gamma: float = 1.0):
        args = [*SETTING, "--num-envs", "4", "--num-steps", "2", "--returns", returns, "--baseline", baseline]
        self.args = reinforce.parse_args(args)
        self.agent = reinforce.Agent(SIX_NUMBERS, Discrete(2), self.args, share_body=False)
        for parameter in self.agent.parameters():
            nn.init.normal_(parameter, std=0.3)
        states = torch.randn(3, 6)  # the first, and the ones where action 0 and action 1 lead
        self.actions = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        self.obs = torch.stack([states[[0, 1 + first]] for first, _ in self.actions.tolist()])
        self.rewards = torch.tensor([[3.0, 1.0], [3.0, 2.0], [1.0, 6.0], [1.0, -1.0]])
        ends = torch.tensor([[False] * 4, [True] * 4])
        columns = (self.rewards.T, ends, ~ends & False, torch.zeros(2, 4), gamma, returns)
        weights = reinforce.compute_returns(*columns).T.flatten()
        with torch.no_grad():
            values = self.agent.value(self.obs.flatten(0, 1))
        psi = reinforce.subtract_baseline(weights, values, baseline)
        rows = (self.obs.flatten(0, 1), self.actions.reshape(8, 1), psi, psi, psi)
        self.grads = 2 * reinforce.policy_gradients(self.agent, reinforce.Batch(*rows, [2] * 4), self.args)[0]
        policy = torch.distributions.Categorical(logits=self.agent.actor(self.obs.flatten(0, 1)))
        self.probabilities = policy.log_prob(self.actions.flatten()).view(4, 2).sum(1).exp()
        close(self.probabilities.sum().item(), 1.0)

    def expectation(self) -> torch.Tensor:
        return (self.probabilities.detach() @ self.grads).detach()

    def variance(self) -> float:
        deviations = (self.grads - self.expectation()).square().sum(1)
        return (self.probabilities.detach() @ deviations).item()

    def analytic(self) -> torch.Tensor:
        """Gradient of the expected return, by autograd through the probability of each trajectory."""
        expected_return = self.probabilities @ self.rewards.sum(1)
        return torch.cat([g.flatten() for g in torch.autograd.grad(expected_return, self.agent.policy_parameters())])


@every_return
@pytest.mark.parametrize("baseline", ["none", "value"])
def test_its_expectation_over_all_trajectories_is_the_gradient_of_the_expected_return(returns, baseline):
    enumeration = Enumeration(returns, baseline)
    exact = enumeration.analytic()
    close(enumeration.expectation(), exact, rtol=1e-4, atol=1e-5)
    assert exact.norm() > 0.1 and enumeration.variance() > 0.1


def test_causality_lowers_the_exact_variance():
    variances = {}
    for returns in ("full", "to-go"):
        torch.manual_seed(0)
        variances[returns] = Enumeration(returns, "none").variance()
    assert variances["to-go"] < 0.9 * variances["full"]


def test_full_and_to_go_part_where_there_is_a_discount():
    expectations = []
    for returns in ("full", "to-go"):
        torch.manual_seed(0)
        expectations.append(Enumeration(returns, "none", gamma=0.5).expectation())
    assert (expectations[0] - expectations[1]).norm() > 0.1


# ----------------------------------------------------------------------------------------------------- the update
@both_kinds
def test_a_positive_psi_makes_its_action_likelier_and_a_negative_one_less_likely(kind):
    for sign in (1.0, -1.0):
        learner = dice_learner(ACTION_SPACES[kind], "--norm-adv", "--baseline", "none")
        batch = learner.rollout()
        psi = torch.zeros_like(batch.psi)
        psi[5] = 2 * sign
        log_probs = []
        for _ in range(2):
            with torch.no_grad():
                policy = learner.agent.policy(learner.agent.features(batch.obs[5:6]))
                log_probs.append(policy.log_prob(batch.actions[5:6]).item())
            learner.update(batch._replace(psi=psi), learning_rate=1e-3)
        assert sign * (log_probs[1] - log_probs[0]) > 1e-3


@both_kinds
@every_return
@every_baseline
def test_the_step_is_up_the_torch_gradient_and_norm_adv_only_rescales_it(kind, returns, baseline):
    flags = ("--returns", returns, "--baseline", baseline)
    found = {}
    for norm in ("--no-norm-adv", "--norm-adv"):
        torch.manual_seed(0)
        learner, optimizer = dice_learner(ACTION_SPACES[kind], *flags, norm), Recorder()
        batch = learner.rollout()
        found[norm] = learner.update(batch, optimizer, learning_rate=0.123) | dict(step=-optimizer.grad)
        assert optimizer.learning_rate == 0.123
    raw, normed = found.values()
    rows, rms = learner.torch_gradients(batch, batch.psi), batch.psi.numpy().astype(np.float64)
    rms = np.sqrt((rms**2).mean())
    close(raw["step"], rows.mean(0), rtol=1e-3, atol=1e-3)
    close(normed["step"] * rms, raw["step"], rtol=1e-3, atol=1e-3)
    assert raw["grad_norm"] == pytest.approx(rows.mean(0).norm().item(), rel=1e-3)
    assert normed["grad_norm"] == pytest.approx(raw["grad_norm"] / rms, rel=1e-3)
    variance = np.trace(np.cov(rows.numpy().T)) / 3
    for values in (raw, normed):  # of psi itself, so that runs compare
        assert values["grad_variance"] == pytest.approx(variance, rel=1e-3)
        assert values["grad_snr"] == pytest.approx(rows.mean(0).square().sum().item() / variance, rel=1e-3)


@pytest.mark.parametrize("bound", [0.01, 1e6])
def test_the_gradient_is_clipped_to_max_grad_norm_and_logged_as_it_was(bound):
    learner, optimizer = dice_learner(ACTION_SPACES["box"], "--max-grad-norm", str(bound)), Recorder()
    batch = learner.rollout()
    logged = learner.update(batch, optimizer)
    raw = learner.torch_gradients(batch, batch.psi).mean(0)
    assert 0.01 < raw.norm() < 1e6
    close(-optimizer.grad, raw * min(1.0, bound / raw.norm().item()), rtol=1e-3, atol=1e-3 * min(bound, 1.0))
    assert logged["grad_norm"] == pytest.approx(raw.norm().item(), rel=1e-3)


@both_kinds
@every_baseline
def test_the_policy_s_step_leaves_the_critic_alone_and_the_fit_of_v_the_policy(kind, baseline):
    learner = dice_learner(ACTION_SPACES[kind], "--baseline", baseline)
    batch, (policy, critic) = learner.rollout(), learner.weights()
    learner.fit_value(batch)
    same_policy, moved_critic = learner.weights()
    assert torch.equal(policy, same_policy) and not torch.equal(critic, moved_critic)
    logged = learner.update(batch)
    moved_policy, critic = learner.weights()
    assert not torch.equal(policy, moved_policy)
    assert torch.equal(critic, moved_critic) == (baseline != "value")
    names = {"policy_loss", "entropy", "grad_norm", "grad_variance", "grad_snr"}
    fitted = {"value_loss", "returns_variance", "residual_variance"} if baseline == "value" else set()
    assert logged.keys() == names | fitted
    if kind == "box":
        assert (learner.agent.log_std.detach() != policy[-3:]).all()
    ours, theirs = learner.agent.policy_parameters(), list(learner.agent.critic.parameters())
    assert {*ours}.isdisjoint(theirs) and {*ours, *theirs} == {*learner.agent.parameters()}


def test_fit_value_equals_torch_adam_on_half_the_squared_error_and_returns_its_mean():
    learner, losses, calls = dice_learner(Discrete(4), "--value-steps", "5", "--norm-obs"), [], []
    learner.agent.obs_norm.update(torch.randn(10, 2) + 1)
    batch, twin = learner.rollout(), copy.deepcopy(learner.agent.critic)
    reference = torch.optim.Adam(twin.parameters(), lr=3e-3, eps=1e-5)

    def watched(obs, returns):
        calls.append((obs, returns))
        return learner.gradient(obs, returns)

    found = learner.fit_value(batch, watched)
    pairs = {(*obs.tolist(), ret.item()) for obs, ret in zip(batch.obs, batch.returns)}
    assert len(calls) == 5 and len({tuple(returns.tolist()) for _, returns in calls}) == 5
    drawn = {tuple(row) for obs, _ in calls for row in obs.tolist()}
    assert len(drawn) > 30  # of about 70, at random from all of them
    for obs, returns in calls:
        assert len(obs) == 16 and {(*x.tolist(), ret.item()) for x, ret in zip(obs, returns)} <= pairs
        loss = nn.functional.mse_loss(twin(learner.agent.features(obs))[:, 0], returns) / 2
        reference.zero_grad()
        loss.backward()
        reference.step()
        losses.append(loss.item())
    close(learner.weights()[1], nn.utils.parameters_to_vector(twin.parameters()).detach(), rtol=1e-3, atol=1e-5)
    assert found["value_loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    learner = dice_learner(Discrete(4))
    batch = learner.rollout()
    for values, expected in ((batch.returns, 1.0), (torch.zeros_like(batch.returns), 0.0), (-batch.returns, -3.0)):
        logged = learner.update(batch._replace(values=values))
        explained = 1 - logged["residual_variance"] / logged["returns_variance"]  # as Run.write_row has it
        assert explained == pytest.approx(expected, abs=1e-5)


def test_no_psi_at_all_gives_no_step():
    learner = dice_learner(Discrete(4), "--norm-adv", "--baseline", "none")
    batch, (policy, _) = learner.rollout(), learner.weights()
    logged = learner.update(batch._replace(psi=torch.zeros_like(batch.psi)))
    assert torch.equal(learner.weights()[0], policy) and logged["grad_snr"] == 0


def test_a_gradient_that_is_not_finite_is_named_before_anything_is_saved(tmp_path, monkeypatch):
    """It is read only after its step, with everything else that is logged; the last checkpoint is that before it."""
    calls, rollout = [], reinforce.rollout

    def spoilt(*arguments) -> reinforce.Batch:
        batch = rollout(*arguments)
        calls.append(1)
        return batch._replace(psi=batch.psi * math.nan) if len(calls) == 3 else batch

    monkeypatch.setattr(reinforce, "rollout", spoilt)
    tiny = "--env-id CartPole-v1 --num-steps 5 --total-timesteps 1000 --checkpoint-interval 1 --run-name bad"
    with pytest.raises(reinforce.Failed, match="iteration 3: .* is nan; the last good checkpoint is .*step_.*.pt"):
        reinforce.train(reinforce.parse_args([*SETTING, *tiny.split(), "--runs-dir", str(tmp_path)]))
    state = reinforce.load_checkpoint(tmp_path / "bad")
    assert state["iteration"] == 2
    assert all(x.isfinite().all() for name in ("agent", "policy_optimizer") for x in state[name].values())


# ----------------------------------------------------------------------------------------------------- whole runs
def rows_of(run_dir, name: str) -> list[dict[str, str]]:
    with open(run_dir / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@every_baseline
def test_a_run_normalises_by_what_it_learned_from_and_without_a_baseline_never_touches_v(tmp_path, baseline):
    tiny = "--env-id CartPole-v1 --norm-obs --norm-reward --num-envs 3 --num-steps 10 --total-timesteps 200 --anneal-lr"
    flags = (*tiny.split(), "--baseline", baseline, "--checkpoint-interval", "1000", "--runs-dir", str(tmp_path))
    run_dir = reinforce.train(reinforce.parse_args([*SETTING, *flags]))
    first, last = (
        torch.load(path, weights_only=True)["agent"] for path in sorted((run_dir / "checkpoints").glob("step*.pt"))
    )
    episodes, rows = rows_of(run_dir, "episodes"), rows_of(run_dir, "progress")
    played = sum(int(row["length"]) for row in episodes)
    assert last["obs_norm.count"] == last["return_norm.count"] == played
    assert int(rows[-1]["global_step"]) >= max(180, played + 1)  # for some waited
    assert int(rows[-2]["global_step"]) < 180  # the first batch that reaches the last whole one ends the run
    assert sum(float(row["charts/episodes"]) for row in rows) == len(episodes)
    begun = [0, *(int(row["global_step"]) for row in rows[:-1])]
    rates = [1e-2 * (1 - step / 180) for step in begun]
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx(rates)
    changed = {name.split(".")[0] for name, x in last.items() if not torch.equal(x, first[name])}
    assert changed == {"actor", "obs_norm", "return_norm"} | ({"critic"} if baseline == "value" else set())


def learn(folder, steps: int, *flags: str, **probe) -> reinforce.Agent:
    """Trains on Probe(**probe) and returns the agent as the newest checkpoint has it."""
    gym.register("Probe-v0", entry_point=lambda: Probe(**probe))
    try:
        small = (
            f"--env-id Probe-v0 --num-envs 4 --num-steps 32 --total-timesteps {steps} --norm-adv --max-grad-norm 0.5"
        )
        fast = "--value-learning-rate 1e-2 --value-batch-size 64 --anneal-lr --run-name probe"
        args = reinforce.parse_args([*SETTING, *small.split(), *fast.split(), "--runs-dir", str(folder), *flags])
        checkpoint = reinforce.load_checkpoint(reinforce.train(args))
        envs = reinforce.make_envs(args, 1, 0)
    finally:
        del gym.registry["Probe-v0"]
    agent = reinforce.make_agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent


@torch.no_grad()
def value(agent: reinforce.Agent, seen: float) -> float:
    return agent.value(agent.features(torch.tensor([[seen]]))).item()


@torch.no_grad()
def probability(agent: reinforce.Agent, seen: float, action: int) -> float:
    return agent.policy(torch.tensor([[seen]])).log_prob(torch.tensor([[action]])).exp().item()


@pytest.mark.parametrize("returns, baseline", [("full", "none"), ("to-go", "mean"), ("to-go", "value")])
def test_the_policy_learns_the_action_that_pays_for_this_observation(tmp_path, returns, baseline):
    flags = ("--returns", returns, "--baseline", baseline, "--gamma", "1")
    pays = dict(reward=lambda seen, action, last: seen * (2 * action - 1), random=True, length=2)
    agent = learn(tmp_path, 3000, *flags, **pays)
    assert probability(agent, 1.0, 1) > 0.9 and probability(agent, -1.0, 0) > 0.9


def test_a_gaussian_policy_learns_the_action_that_pays(tmp_path):
    pays = dict(reward=lambda seen, action, last: -((action - 0.7) ** 2), action_space=Box(-5, 5, (1,)))
    agent = learn(tmp_path, 6000, **pays)
    with torch.no_grad():
        assert agent.actor(torch.tensor([[1.0]])).item() == pytest.approx(0.7, abs=0.2)
    assert agent.log_std.item() < -0.1


def test_truncation_does_not_end_the_value(tmp_path):
    """One state that always pays 1 is worth 1 / (1 - gamma), however often a time limit cuts in."""
    pays = dict(reward=lambda seen, action, last: 1.0, length=3, truncates=True)
    agent = learn(tmp_path, 1500, "--gamma", "0.8", "--num-steps", "16", **pays)
    assert value(agent, 1.0) == pytest.approx(5.0, abs=0.3)


@every_return
def test_termination_ends_the_value_which_is_that_of_each_step(tmp_path, returns):
    pays = dict(reward=lambda seen, action, last: 1.0, length=3, timed=True)
    agent = learn(tmp_path, 1500, "--gamma", "0.8", "--num-steps", "16", "--returns", returns, **pays)
    assert [value(agent, float(t)) for t in range(3)] == pytest.approx([2.44, 1.8, 1.0], abs=0.15)
