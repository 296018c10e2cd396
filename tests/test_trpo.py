"""The method of trpo.py against oracles that do not share its code: dense Hessians, torch, sb3-contrib."""

import copy
import csv
import math
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium.spaces import Box, Discrete
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.logger import Logger
from test_method import ACTION_SPACES, SIX_NUMBERS, check_targets, close, torch_kl, torch_log_prob, torch_policy
from test_probes import Probe
from torch import nn

import trpo

every_action_space = pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
IMAGES = Box(0, 255, (1, 36, 36), np.uint8)


class Pictures(gym.Env):
    """Noise to look at and noise to earn, in episodes of seven steps."""

    observation_space = IMAGES

    def __init__(self, action_space: gym.Space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.integers(0, 256, (1, 36, 36), np.uint8), {}

    def step(self, action):
        self.time += 1
        obs = self.np_random.integers(0, 256, (1, 36, 36), np.uint8)
        return obs, self.np_random.normal(), self.time == 7, False, {}


gym.register("Pictures-v0", entry_point=Pictures)


SETTING = "--gamma 0.99 --gae-lambda 0.95 --max-kl 0.01 --cg-iters 10 --cg-damping 0.1 --fisher-fraction 1"
SETTING += " --line-search-steps 10 --line-search-shrink 0.8 --learning-rate 1e-3 --update-epochs 10"
SETTING += " --num-minibatches 4 --norm-adv --log-std-init 0 --device cpu --compile off"
SETTING = SETTING.split()  # for the defaults are free to change


class Learner:
    """What train sets up before its loop, without a run directory."""

    def __init__(self, *flags: str, **env_options):
        self.args = trpo.parse_args([*SETTING, *flags])
        self.envs = trpo.make_envs(self.args, self.args.num_envs, self.args.seed, **env_options)
        self.rng = trpo.Rng(self.args.seed, "cpu")
        self.player = trpo.Player(self.envs, self.args, self.rng)
        self.agent = trpo.make_agent(self.envs, self.args)
        self.theta = trpo.flatten_parameters(self.agent.policy_parameters())
        self.optimizer = trpo.Adam(trpo.flatten_parameters(self.agent.critic.parameters()))
        self.gradient = trpo.make_gradient(self.agent, self.args)

    def rollout(self) -> trpo.Batch:
        return trpo.rollout(self.agent, self.player, self.args)

    def features(self, batch: trpo.Batch) -> torch.Tensor:
        return self.agent.features(batch.obs)

    def update_policy(self, batch: trpo.Batch) -> dict[str, float]:
        return trpo.update_policy(self.agent, self.theta, self.features(batch), batch, self.rng, self.args)

    def update(self, batch: trpo.Batch, learning_rate: float = 1e-3, gradient=None) -> dict[str, float]:
        gradient = gradient or self.gradient
        return trpo.update(self.agent, self.theta, self.optimizer, gradient, batch, learning_rate, self.rng, self.args)

    def fit_value(self, batch: trpo.Batch, learning_rate: float = 1e-3, gradient=None) -> dict[str, float]:
        """An update whose policy stays where it is."""
        with mock.patch.object(trpo, "update_policy", lambda *arguments: {}):
            return self.update(batch, learning_rate, gradient)

    def search(self, batch: trpo.Batch, step: torch.Tensor, *flags: str) -> dict[str, float]:
        args = trpo.parse_args([*SETTING, *flags])
        return trpo.line_search(self.agent, self.theta, step, self.features(batch), batch, args)

    def log(self, field: str) -> np.ndarray:
        return np.stack([[getattr(step, field) for step in env.unwrapped.log] for env in self.envs.envs.envs], axis=1)


def clock_learner(action_space: gym.Space, *flags: str) -> Learner:
    return Learner("--env-id", "Clock-v0", "--num-envs", "3", "--num-steps", "20", *flags, action_space=action_space)


SMALL = ("--num-envs", "4", "--num-steps", "64")
GAMES = {
    "discrete": ("--env-id", "CartPole-v1", *SMALL),
    "box": ("--env-id", "Pendulum-v1", "--norm-obs", "--norm-reward", "--log-std-end", "None", *SMALL),
}
every_game = pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)


class Small:
    """Six numbers, 40 states, float64, and so few parameters that a dense Hessian is no trouble."""

    def __init__(self, action_space: gym.Space, *flags: str):
        self.args = trpo.parse_args([*SETTING, *flags])
        self.rng = trpo.Rng(0, "cpu")
        self.agent = trpo.Agent(SIX_NUMBERS, action_space, self.args, share_body=False)
        outputs = self.agent.actor.last.out_features
        self.agent.actor = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, outputs))
        self.agent.double()
        for parameter in self.agent.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.theta = trpo.flatten_parameters(self.agent.policy_parameters())
        self.features, advantages = torch.randn(40, 6).double(), torch.randn(40).double()
        with torch.no_grad():
            self.old, policy = torch_policy(self.agent, self.features), self.agent.policy(self.features)
        actions = torch.stack([component.sample() for component in self.old], dim=-1)
        logprobs = torch_log_prob(self.old, actions).detach()
        self.batch = trpo.Batch(self.features, actions, logprobs, advantages, *2 * [advantages], policy)

    def update_policy(self) -> dict[str, float]:
        return trpo.update_policy(self.agent, self.theta, self.features, self.batch, self.rng, self.args)

    def at(self, theta: torch.Tensor) -> list[torch.distributions.Distribution]:
        """The policy of a parameter vector, by torch alone and differentiable in the vector."""
        twin = copy.deepcopy(self.agent)
        owners = [(layer, name) for layer in twin.actor for name in ("weight", "bias") if hasattr(layer, name)]
        for owner, name in owners + ([(twin, "log_std")] if twin.continuous else []):
            shape = getattr(owner, name).shape
            part, theta = theta[: shape.numel()], theta[shape.numel() :]
            delattr(owner, name)
            setattr(owner, name, part.view(shape))
        assert len(theta) == 0
        return torch_policy(twin, self.features)

    def mean_kl(self, theta: torch.Tensor) -> torch.Tensor:
        return torch_kl(self.old, self.at(theta)).mean()

    def surrogate(self, theta: torch.Tensor) -> torch.Tensor:
        ratio = (torch_log_prob(self.at(theta), self.batch.actions) - self.batch.logprobs).exp()
        return (ratio * self.batch.advantages).mean()

    def fisher(self) -> torch.Tensor:
        return torch.autograd.functional.hessian(self.mean_kl, self.theta.clone())

    def policy_gradient(self) -> torch.Tensor:
        """E[grad log pi(a|s) A]."""
        theta = self.theta.clone().requires_grad_()
        log_prob = torch_log_prob(self.at(theta), self.batch.actions)
        return torch.autograd.grad((log_prob * self.batch.advantages).mean(), theta)[0]


def applied(product, size: int) -> torch.Tensor:
    """The matrix of a linear function."""
    return torch.stack([product(row) for row in torch.eye(size).double()])


def positive_definite(size: int) -> torch.Tensor:
    root = torch.randn(size, size).double()
    return root @ root.T / size + 0.1 * torch.eye(size).double()


# ------------------------------------------------------------------------------------------------ Fisher matrix
@every_action_space
def test_fisher_vector_product_is_the_hessian_of_the_mean_kl_at_the_old_policy(action_space):
    small = Small(action_space)
    found = applied(trpo.fisher_vector_product(small.agent, small.features, 0.0), len(small.theta))
    close(found, small.fisher())
    assert found.norm() > 0.1
    if small.agent.continuous:  # the deviations' own block, by hand
        close(found[-3:, -3:], 2 * torch.eye(3).double())


@every_action_space
def test_there_the_kl_and_its_gradient_are_zero(action_space):
    """So that the Hessian is all there is to second order, unless nothing is cut from the graph."""
    small = Small(action_space)
    theta = small.theta.clone().requires_grad_()
    close(small.mean_kl(theta), 0.0)
    close(torch.autograd.grad(small.mean_kl(theta), theta)[0], torch.zeros_like(theta))
    policy = small.agent.policy(small.features)
    kl = small.batch.old_policy.kl(policy).mean()
    close(kl, 0.0)
    close(trpo.flat_grad(kl, small.agent.policy_parameters()), torch.zeros_like(theta))


@every_action_space
def test_fisher_matrix_is_symmetric_and_has_no_negative_curvature_and_damping_lifts_it(action_space):
    small = Small(action_space)
    bare, damped = (
        applied(trpo.fisher_vector_product(small.agent, small.features, damping), len(small.theta))
        for damping in (0.0, 0.3)
    )
    close(bare, bare.T)
    assert torch.linalg.eigvalsh(bare).min() > -1e-12
    close(damped, bare + 0.3 * torch.eye(len(bare)))


@every_action_space
def test_gradient_of_the_surrogate_at_the_old_parameters_is_the_policy_gradient(action_space):
    small = Small(action_space)
    objective = trpo.surrogate_objective(small.agent.policy(small.features), small.batch)
    close(objective, small.batch.advantages.mean())  # the ratio is one
    close(trpo.flat_grad(objective, small.agent.policy_parameters()), small.policy_gradient())


@every_action_space
def test_the_surrogate_elsewhere_is_the_mean_of_ratio_times_advantage(action_space):
    small = Small(action_space)
    small.theta += 0.1 * torch.randn_like(small.theta)
    found = trpo.surrogate_objective(small.agent.policy(small.features), small.batch)
    close(found, small.surrogate(small.theta))
    assert abs(found - small.batch.advantages.mean()) > 1e-3


# ------------------------------------------------------------------------------------------- conjugate gradients
def test_conjugate_gradients_equal_a_dense_solve():
    matrix, b = positive_definite(30), torch.randn(30).double()
    x, residual = trpo.conjugate_gradients(lambda v: matrix @ v, b, 60, tolerance=1e-24)
    close(x, torch.linalg.solve(matrix, b))
    assert residual < 1e-11 * b.norm()


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_conjugate_gradients_stop_after_their_iterations_with_the_true_residual(iterations):
    matrix, b, calls = positive_definite(30), torch.randn(30).double(), []
    x, residual = trpo.conjugate_gradients(lambda v: calls.append(v) or matrix @ v, b, iterations)
    assert len(calls) == iterations
    close(residual, (b - matrix @ x).norm())
    assert residual > 1e-3
    torch.manual_seed(1)
    close(x, conjugate_gradient_solver(lambda v: matrix @ v, b, iterations), rtol=0, atol=2e-3)


def test_conjugate_gradients_stop_early_where_the_relative_residual_is_small():
    matrix, b = positive_definite(30), 1e-6 * torch.randn(30).double()
    x, residual = trpo.conjugate_gradients(lambda v: matrix @ v, b, 1000)
    close(residual, (b - matrix @ x).norm(), rtol=1e-3, atol=0)
    assert 1e-9 * b.norm() < residual <= 1e-5 * b.norm()


def test_conjugate_gradients_of_nothing_and_of_a_singular_matrix_are_finite():
    zero, b = torch.zeros(5), torch.ones(5)
    for product in (torch.zeros_like, lambda v: -v):
        x, residual = trpo.conjugate_gradients(product, b, 10)
        assert torch.equal(x, zero) and residual == b.norm()
    x, residual = trpo.conjugate_gradients(lambda v: 2 * v, zero, 10)
    assert torch.equal(x, zero) and residual == 0


@pytest.mark.parametrize("cg_iters", [3, 60])
def test_the_step_is_along_the_solution_and_ends_on_the_border(cg_iters):
    matrix, g = positive_definite(30), torch.randn(30).double()
    args = trpo.parse_args([*SETTING, "--max-kl", "0.03", "--cg-iters", str(cg_iters)])
    step, residual = trpo.trust_region_step(lambda v: matrix @ v, g, args)
    close(0.5 * step @ matrix @ step, 0.03)
    assert g @ step > 0
    direction = step * (g @ step) / (step @ matrix @ step)  # where conjugate gradients end, g's = s'Hs
    close(residual, (g - matrix @ direction).norm() / g.norm(), rtol=1e-3, atol=1e-6)
    if cg_iters == 60:
        exact = torch.linalg.solve(matrix, g)
        close(step, exact * (0.06 / (g @ exact)).sqrt(), rtol=1e-4, atol=1e-5)
    else:
        assert residual > 1e-3


def test_no_curvature_and_no_gradient_give_no_step():
    args = trpo.parse_args(SETTING)
    for product, gradient in ((torch.zeros_like, torch.ones(5)), (lambda v: 2 * v, torch.zeros(5))):
        assert torch.equal(trpo.trust_region_step(product, gradient, args)[0], torch.zeros(5))


def test_a_tiny_gradient_gives_a_step_to_the_border_all_the_same():
    """As that of a policy which is all but sure of its actions; its square is hardly a number any more."""
    args = trpo.parse_args([*SETTING, "--max-kl", "0.05"])
    step, residual = trpo.trust_region_step(lambda v: 2 * v, torch.full((5,), 1e-21), args)
    assert residual.isfinite()
    close(step @ step, 0.05, rtol=0.01, atol=0)


# ------------------------------------------------------------------------------------------- the policy's update
@every_action_space
@pytest.mark.parametrize("damping", [0.02, 0.5])
def test_without_line_search_the_update_is_the_natural_gradient_of_a_dense_solve(action_space, damping):
    flags = ("--line-search-steps", "0", "--cg-iters", "500", "--max-kl", "0.02", "--cg-damping", str(damping))
    small = Small(action_space, *flags)
    before, g = small.theta.clone(), small.policy_gradient()
    damped = small.fisher() + damping * torch.eye(len(before))
    direction = torch.linalg.solve(damped, g)
    step = direction * (2 * 0.02 / (g @ direction)).sqrt()
    stats = small.update_policy()
    close(small.theta - before, step, rtol=1e-3, atol=1e-5)
    close(nn.utils.parameters_to_vector(small.agent.policy_parameters()), small.theta)  # they are views of it

    entropy = sum(component.entropy() for component in small.old).mean()
    expected = dict(policy_loss=-small.surrogate(before), entropy=entropy, grad_norm=g.norm())
    expected |= dict(kl=small.mean_kl(before + step), surrogate_expected=g @ step, step_fraction=1, line_search_steps=1)
    expected |= dict(surrogate_improvement=small.surrogate(before + step) - small.surrogate(before))
    for name, value in expected.items():
        close(stats.pop(name), value, rtol=1e-3, atol=1e-6, msg=name)
    assert 0 <= stats.pop("cg_residual") <= 1e-5 and not stats


@every_action_space
def test_half_the_damped_curvature_of_a_real_step_is_the_radius(action_space, monkeypatch):
    """Before backtracking, on the networks and numbers of a run, with few conjugate gradients."""
    learner = clock_learner(action_space, "--cg-iters", "4")
    batch, steps, line_search = learner.rollout(), [], trpo.line_search
    monkeypatch.setattr(
        trpo,
        "line_search",
        lambda agent, theta, step, *rest: steps.append(step) or line_search(agent, theta, step, *rest),
    )
    twin, before = copy.deepcopy(learner.agent), learner.theta.clone()
    stats = learner.update_policy(batch)
    (step,) = steps
    close(learner.theta, before + stats["step_fraction"] * step, rtol=0, atol=1e-6)

    with torch.no_grad():
        twin, features, h = twin.double(), learner.features(batch).double(), 1e-3
        old = torch_policy(twin, features)
        nn.utils.vector_to_parameters(before.double() + h * step.double(), twin.policy_parameters())
        curvature = 2 * torch_kl(old, torch_policy(twin, features)).mean() / h**2 + 0.1 * step @ step
    close(0.5 * curvature, 0.01, rtol=0.02, atol=0)


@every_game
@pytest.mark.parametrize("max_kl", [0.01, 0.5])
def test_every_accepted_update_keeps_to_the_region_and_raises_the_surrogate(game, max_kl):
    learner, accepted = Learner(*game, "--max-kl", str(max_kl), "--cg-damping", "0.01"), []
    for _ in range(8):
        batch, before = learner.rollout(), learner.theta.clone()
        features = learner.features(batch)
        with torch.no_grad():
            old = torch_policy(copy.deepcopy(learner.agent), features)
            close(batch.logprobs, torch_log_prob(old, batch.actions), rtol=1e-4, atol=1e-5)
        stats = learner.update(batch)
        with torch.no_grad():
            new = torch_policy(learner.agent, features)
            kl, log_ratio = torch_kl(old, new).mean().item(), torch_log_prob(new, batch.actions) - batch.logprobs
            improvement = ((log_ratio.exp() - 1) * batch.advantages).mean().item()
        assert stats["kl"] == pytest.approx(kl, rel=1e-2, abs=1e-5)
        assert stats["surrogate_improvement"] == pytest.approx(improvement, rel=1e-2, abs=1e-5)
        assert stats["surrogate_expected"] > 0
        if stats["step_fraction"] > 0:
            assert kl <= max_kl * (1 + 1e-4) and improvement > 0
            assert stats["step_fraction"] == pytest.approx(0.8 ** (stats["line_search_steps"] - 1))
            accepted.append(stats["step_fraction"])
        else:
            assert torch.equal(learner.theta, before)
        if learner.agent.obs_norm:
            learner.agent.obs_norm.update(batch.obs)
    assert len(accepted) >= 6
    assert max_kl == 0.01 or min(accepted) < 1  # the search had something to do


@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])
def test_nothing_to_gain_changes_nothing(kind):
    learner = clock_learner(ACTION_SPACES[kind])
    batch, before = learner.rollout(), learner.theta.clone()
    stats = learner.update(batch._replace(advantages=torch.zeros(60)))
    assert torch.equal(learner.theta, before)
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["kl"] == stats["surrogate_improvement"] == stats["grad_norm"] == 0


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e4 / 3])
def test_equal_advantages_of_a_whole_batch_change_nothing(reward):
    """Standardised, they are zero; what rounding leaves of them must not be blown up."""
    gym.register("Probe-v0", entry_point=lambda: Probe(lambda seen, action, last: reward))
    try:
        learner = Learner("--env-id", "Probe-v0", "--num-envs", "3", "--num-steps", "37", "--num-minibatches", "1")
    finally:
        del gym.registry["Probe-v0"]
    before = learner.theta.clone()
    learner.update_policy(learner.rollout())
    assert torch.equal(learner.theta, before)


@every_action_space
@pytest.mark.parametrize("why", ["it falls", "it goes too far", "it is NaN"])
def test_a_failed_line_search_restores_the_parameters_to_the_bit(action_space, why):
    learner = clock_learner(action_space)
    nn.init.normal_(learner.agent.actor.last.weight, std=0.3)
    batch, before = learner.rollout(), learner.theta.clone()
    gradient = trpo.flat_grad(
        trpo.surrogate_objective(learner.agent.policy(learner.features(batch)), batch),
        learner.agent.policy_parameters(),
    )
    step = {"it falls": -0.01 * gradient, "it goes too far": 0.1 * gradient, "it is NaN": math.nan * gradient}[why]
    max_kl = "1e-7" if why == "it goes too far" else "0.01"
    stats = learner.search(batch, step, "--max-kl", max_kl, "--line-search-steps", "7")
    assert torch.equal(learner.theta, before)
    expected = dict(kl=0.0, surrogate_improvement=0.0, step_fraction=0.0, line_search_steps=7)
    assert stats == expected
    if why == "it goes too far":  # what is refused for its KL alone would have paid
        stats = learner.search(batch, step, "--max-kl", "0.5", "--line-search-steps", "1")
        assert stats["surrogate_improvement"] > 0 and stats["kl"] > 1e-7 and stats["step_fraction"] == 1


@every_action_space
def test_the_line_search_takes_the_longest_step_that_keeps_both_promises(action_space):
    small = Small(action_space)
    before, found = small.theta.clone(), []
    for length in (0.003, 0.1, 1.0, 30.0):
        for max_kl in (0.003, 0.03, 0.3):
            small.theta.copy_(before)
            step, shrink = length * small.policy_gradient(), 0.6
            args = trpo.parse_args([*SETTING, "--max-kl", str(max_kl), "--line-search-shrink", "0.6"])
            stats = trpo.line_search(small.agent, small.theta, step, small.features, small.batch, args)
            for k in range(10):
                there = before + shrink**k * step
                kl, gain = small.mean_kl(there), small.surrogate(there) - small.surrogate(before)
                if kl <= max_kl and gain > 0:
                    break
            else:
                assert torch.equal(small.theta, before)
                continue
            close(small.theta, there)
            close((stats["kl"], stats["surrogate_improvement"]), (kl.item(), gain.item()))
            assert (stats["step_fraction"], stats["line_search_steps"]) == (pytest.approx(shrink**k), k + 1)
            found.append(k)
    assert min(found) == 0 and max(found) > 3


def test_no_line_search_takes_the_full_step_unseen():
    """Be it down the hill and out of the region."""
    learner = clock_learner(Discrete(4), "--line-search-steps", "0")
    batch, before = learner.rollout(), learner.theta.clone()
    direction = -trpo.flat_grad(
        trpo.surrogate_objective(learner.agent.policy(learner.features(batch)), batch),
        learner.agent.policy_parameters(),
    )
    step = 30 * direction
    stats = learner.search(batch, step, "--line-search-steps", "0")
    assert torch.equal(learner.theta, before + step)
    assert stats["kl"] > 0.01 and stats["surrogate_improvement"] < 0 and stats["step_fraction"] == 1


@pytest.mark.parametrize("fraction, rows", [(1.0, 40), (0.25, 10), (0.001, 1)])
def test_fisher_fraction_draws_that_many_rows_without_repetition(fraction, rows, monkeypatch):
    small, drawn, product = Small(Discrete(4), "--fisher-fraction", str(fraction)), [], trpo.fisher_vector_product
    monkeypatch.setattr(
        trpo, "fisher_vector_product", lambda agent, x, damping: drawn.append(x) or product(agent, x, damping)
    )
    for _ in range(2):
        small.update_policy()
    numbers = [(small.features == row).all(1).nonzero().item() for row in drawn[0]]
    assert len(numbers) == len(set(numbers)) == rows
    if rows == 10:
        assert numbers != sorted(numbers) and not torch.equal(*drawn)


def test_a_gradient_that_is_not_finite_is_named_before_anything_moves():
    learner = clock_learner(Discrete(4))
    batch, before = learner.rollout(), learner.theta.clone()
    with pytest.raises(trpo.Failed, match="policy's gradient is nan"):
        learner.update(batch._replace(advantages=torch.full((60,), math.nan)))
    assert torch.equal(learner.theta, before)


@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize("max_kl", [0.01, 0.002])
def test_one_update_equals_sb3_contrib(kind, max_kl, monkeypatch):
    """Its KL is that of the new from the old policy, but the two have the same Hessian where they are equal."""
    flags = ("--cg-iters", "10", "--max-kl", str(max_kl), "--norm-adv", "--cg-damping", "0.1")
    learner = Learner(*GAMES[kind], *flags)
    nn.init.normal_(learner.agent.actor.last.weight, std=0.1)
    batch, before = learner.rollout(), learner.theta.clone()
    env_id = learner.args.env_id
    settings = dict(n_steps=256, batch_size=256, cg_max_steps=10, cg_damping=0.1, target_kl=max_kl, device="cpu")
    model = sb3_contrib.TRPO("MlpPolicy", env_id, n_critic_updates=1, **settings)
    model.set_logger(Logger(None, []))
    mlp, net = learner.agent.actor, model.policy.mlp_extractor.policy_net
    pairs = [(net[0], mlp.first), (net[2], mlp.second), (model.policy.action_net, mlp.last)]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        if kind == "box":
            model.policy.log_std.copy_(learner.agent.log_std)
    buffer = model.rollout_buffer
    buffer.observations[:, 0], buffer.actions[:, 0] = learner.features(batch), batch.actions
    for name, column in dict(
        log_probs=batch.logprobs, advantages=3 * batch.advantages + 1, returns=batch.returns, values=batch.values
    ).items():
        getattr(buffer, name)[:, 0] = column
    buffer.pos, buffer.full = 256, True
    with monkeypatch.context() as patch:  # it starts its conjugate gradients from noise
        patch.setattr(torch, "randn_like", torch.zeros_like)
        model.train()
    stats = learner.update_policy(batch)
    theirs = [
        *(p for layer, _ in pairs for p in layer.parameters()),
        *([model.policy.log_std] if kind == "box" else []),
    ]
    found, expected = learner.theta - before, nn.utils.parameters_to_vector(theirs).detach() - before
    assert model.logger.name_to_value["train/is_line_search_success"] == 1 and stats["step_fraction"] == 1
    assert (found - expected).norm() < 5e-3 * expected.norm()
    assert stats["kl"] == pytest.approx(model.logger.name_to_value["train/kl_divergence_loss"], rel=0.2)


# -------------------------------------------------------------------------------------------------- the critic
@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize("sight", ["numbers", "images"])
def test_the_critic_leaves_the_policy_alone_and_the_policy_the_critic(kind, sight):
    flags = () if sight == "numbers" else ("--env-id", "Pictures-v0", "--num-steps", "8", "--num-minibatches", "2")
    learner = clock_learner(ACTION_SPACES[kind], *flags)
    agent, batch = learner.agent, learner.rollout()
    ours, theirs = agent.policy_parameters(), list(agent.critic.parameters())
    assert {*ours}.isdisjoint(theirs) and {*ours, *theirs} == {*agent.parameters()}
    if sight == "images":
        assert learner.features(batch).dtype == torch.uint8 and len(ours) == 10 + (kind == "box")

    def weights() -> tuple[torch.Tensor, torch.Tensor]:
        return nn.utils.parameters_to_vector(ours).clone(), nn.utils.parameters_to_vector(theirs).clone()

    policy, critic = weights()
    learner.fit_value(batch)
    moved_policy, moved_critic = weights()
    assert torch.equal(policy, moved_policy) and not torch.equal(critic, moved_critic)
    stats = learner.update_policy(batch)
    moved_policy, same_critic = weights()
    assert torch.equal(moved_critic, same_critic)
    assert not torch.equal(policy, moved_policy) and stats["step_fraction"] > 0
    if kind == "box":
        assert (agent.log_std != 0).all()


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_an_update_in_bfloat16_keeps_its_promises_in_float32(kind):
    flags = ("--env-id", "Pictures-v0", "--num-steps", "40", "--num-minibatches", "2", "--bf16", "on")
    learner = clock_learner(ACTION_SPACES[kind], *flags)
    batch, old = learner.rollout(), copy.deepcopy(learner.agent)
    stats, new = learner.update_policy(batch), copy.deepcopy(learner.agent)
    with torch.no_grad():
        for agent in (old, new):
            assert agent.actor[0].dtype == torch.bfloat16
            agent.actor[0].dtype = torch.float32
        old, new = (torch_policy(agent, batch.obs) for agent in (old, new))
        ratio = (torch_log_prob(new, batch.actions) - torch_log_prob(old, batch.actions)).exp()
    assert stats["kl"] == pytest.approx(torch_kl(old, new).mean().item(), rel=0.05) and stats["kl"] > 1e-3
    assert stats["surrogate_improvement"] == pytest.approx(((ratio - 1) * batch.advantages).mean().item(), rel=0.05)


def test_fit_value_equals_torch_adam_on_half_the_squared_error_and_logs_its_mean():
    learner = clock_learner(Discrete(4), "--update-epochs", "5", "--num-minibatches", "3")
    batch, twin, losses, calls = learner.rollout(), copy.deepcopy(learner.agent.critic), [], []
    reference = torch.optim.Adam(twin.parameters(), lr=0.01, eps=1e-5)

    def watched(features, returns, rows):
        calls.append(rows)
        return learner.gradient(features, returns, rows)

    logged = learner.fit_value(batch, 0.01, watched)
    features = learner.features(batch)
    rows = torch.stack(calls).view(5, 60)
    close(rows.sort().values, torch.arange(60).expand(5, 60))
    assert len(rows.unique(dim=0)) == 5
    for rows in calls:
        loss = nn.functional.mse_loss(twin(features[rows])[:, 0], batch.returns[rows]) / 2
        reference.zero_grad()
        loss.backward()
        reference.step()
        losses.append(loss.item())
    close(nn.utils.parameters_to_vector(twin.parameters()), learner.optimizer.parameters, rtol=1e-3, atol=1e-5)
    assert logged["value_loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_compiled_gradient_of_the_critic_is_the_eager_one():
    learner = clock_learner(Discrete(4), "--num-minibatches", "3")
    batch, rows = learner.rollout(), torch.randperm(60)[:20]
    learner.args.compile = "on"
    compiled = trpo.make_gradient(learner.agent, learner.args)
    for _ in range(2):
        arguments = (learner.features(batch), batch.returns, rows)
        (gradient, stats), (eager_gradient, eager_stats) = compiled(*arguments), learner.gradient(*arguments)
        close(gradient, eager_gradient, rtol=1e-4, atol=1e-5)
        assert stats.keys() == eager_stats.keys() == {"value_loss"}
        close(stats["value_loss"], eager_stats["value_loss"], rtol=1e-4, atol=1e-5)
        learner.optimizer.parameters += 0.1 * torch.randn_like(learner.optimizer.parameters)


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    learner = clock_learner(Discrete(4))
    batch = learner.rollout()
    for values, expected in ((batch.returns, 1.0), (torch.zeros(60), 0.0), (-batch.returns, -3.0)):
        logged = learner.update(batch._replace(values=values))
        explained = 1 - logged["residual_variance"] / logged["returns_variance"]  # as Run.write_row has it
        assert explained.item() == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------------------- the batch
@every_action_space
def test_targets_come_from_the_true_successors(action_space):
    check_targets(clock_learner(action_space, "--no-norm-adv"))


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_norm_adv_standardises_over_the_batch_and_touches_nothing_else(kind):
    batches = []
    for flag in ("--norm-adv", "--no-norm-adv"):
        torch.manual_seed(0)
        batches.append(clock_learner(ACTION_SPACES[kind], flag).rollout())
    standardised, raw = batches
    expected = raw.advantages.double().numpy()
    close(standardised.advantages, (expected - expected.mean()) / expected.std(ddof=1), rtol=1e-4, atol=1e-5)
    assert raw.advantages.std() > 1.5
    for name in ("obs", "actions", "logprobs", "returns", "values"):
        assert torch.equal(getattr(standardised, name), getattr(raw, name))


def test_rows_of_the_batch_are_the_steps_of_the_environments():
    learner = clock_learner(ACTION_SPACES["box"], "--norm-obs")
    learner.agent.obs_norm.update(torch.randn(10, 2))
    batch = learner.rollout()
    close(batch.obs, learner.log("obs").reshape(60, 2))
    features = learner.features(batch)
    close(features, learner.agent.obs_norm(batch.obs))
    with torch.no_grad():
        policy = torch_policy(learner.agent, features)
    close(batch.logprobs, torch_log_prob(policy, batch.actions), rtol=1e-4, atol=1e-5)
    close(batch.old_policy.mean, torch.stack([component.mean for component in policy], -1))


# --------------------------------------------------------------------------------------------------- whole runs
def learn(folder, steps: int, *flags: str, **probe) -> trpo.Agent:
    """Trains on Probe(**probe) and returns the agent as the newest checkpoint has it."""
    gym.register("Probe-v0", entry_point=lambda: Probe(**probe))
    try:
        small = f"--env-id Probe-v0 --num-envs 4 --num-steps 32 --num-minibatches 2 --total-timesteps {steps}"
        fast = "--learning-rate 1e-2 --update-epochs 4 --max-kl 0.05 --run-name probe"
        args = trpo.parse_args([*SETTING, *small.split(), *fast.split(), "--runs-dir", str(folder), *flags])
        checkpoint = trpo.load_checkpoint(trpo.train(args))
        envs = trpo.make_envs(args, 1, 0)
    finally:
        del gym.registry["Probe-v0"]
    agent = trpo.make_agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent


def test_a_run_normalises_by_all_it_saw_and_anneals_the_steps_of_the_critic(tmp_path):
    tiny = "--env-id Pendulum-v1 --norm-obs --num-envs 2 --num-steps 32 --total-timesteps 256"
    run_dir = trpo.train(trpo.parse_args([*SETTING, *tiny.split(), "--anneal-lr", "--runs-dir", str(tmp_path)]))
    state = trpo.load_checkpoint(run_dir)
    assert state["agent"]["obs_norm.count"] == 256 and state["optimizer"]["t"] == 4 * 10 * 4
    with open(run_dir / "progress.csv") as file:
        rates = [float(row["charts/learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@torch.no_grad()
def probability(agent: trpo.Agent, seen: float, action: int) -> float:
    return agent.policy(torch.tensor([[seen]])).log_prob(torch.tensor([[action]])).exp().item()


@pytest.mark.parametrize("line_search_steps", ["10", "0"])
def test_the_policy_learns_the_action_that_pays_for_this_observation(tmp_path, line_search_steps):
    flags = ("--line-search-steps", line_search_steps)
    agent = learn(tmp_path, 6000, *flags, reward=lambda seen, action, last: seen * (2 * action - 1), random=True)
    assert probability(agent, 1.0, 1) > 0.95 and probability(agent, -1.0, 0) > 0.95
    with open(tmp_path / "probe" / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6000 // 128
    if line_search_steps == "10":
        assert all(float(row["losses/kl"]) <= 0.05 for row in rows)


def test_a_gaussian_policy_learns_the_action_that_pays(tmp_path):
    agent = learn(
        tmp_path, 8000, reward=lambda seen, action, last: -((action - 0.7) ** 2), action_space=Box(-5, 5, (1,))
    )
    with torch.no_grad():
        assert agent.actor(torch.tensor([[1.0]])).item() == pytest.approx(0.7, abs=0.15)
    assert agent.log_std.item() < -0.3


def test_truncation_does_not_end_the_value(tmp_path):
    """One state that always pays 1 is worth 1 / (1 - gamma), however often a time limit cuts in."""
    flags = ("--gamma", "0.8")
    agent = learn(tmp_path, 8000, *flags, reward=lambda seen, action, last: 1.0, length=3, truncates=True)
    with torch.no_grad():
        assert agent.value(torch.tensor([[1.0]])).item() == pytest.approx(5.0, abs=0.3)
