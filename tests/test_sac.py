"""The method of sac.py against oracles that do not share its code: scipy, torch, by hand, Stable-Baselines3."""

import copy
import math
import types
from decimal import Decimal, localcontext
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box
from scipy import integrate, stats
from test_method import close
from test_probes import Probe
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import sac

SETTING = "--device cpu --compile off --bf16 off --total-timesteps 300 --learning-starts 50 --batch-size 16"
SETTING += " --log-interval 50 --policy-lr 3e-4 --q-lr 3e-4 --tau 0.005 --gamma 0.99 --policy-frequency 1"
SETTING += " --target-network-frequency 1 --updates-per-step 1 --alpha 1 --autotune"
SETTING = SETTING.split()  # for the defaults are free to change


class Setup:
    """What train sets up before its loop, without a run directory."""

    def __init__(self, folder: Path, *flags: str, **env_options):
        self.args = args = sac.parse_args([*SETTING, *flags])
        self.envs = sac.make_envs(args, args.num_envs, args.seed, **env_options)
        self.rng = sac.settle(args, self.envs)
        self.agent = sac.make_agent(self.envs, args)
        self.player = sac.Player(self.envs, args, self.rng)
        self.replay = sac.Replay(self.agent, args, args.total_timesteps // args.num_envs * args.num_envs, folder)
        self.learner = sac.Learner(self.agent, self.replay, args)

    def play(self, steps: int) -> None:
        for _ in range(steps):
            self.player.step(self.agent, self.replay)

    def update(self, batch: sac.Batch, number: int) -> dict[str, torch.Tensor]:
        return sac.update(self.learner, batch, number, self.rng, self.args)

    def log(self, field: str) -> np.ndarray:
        """What the environments saw, (steps of their lives, num_envs, ...)."""
        return np.stack([[getattr(step, field) for step in env.unwrapped.log] for env in self.envs.envs.envs], axis=1)


def made(folder: Path, *flags: str, action_space: gym.Space | None = None) -> Setup:
    return Setup(folder, "--env-id", "Clock-v0", *flags, action_space=action_space or Box(-2, 4, (2,)))


def random_batch(size: int, observed: int, acted: int, dtype=torch.float32) -> sac.Batch:
    obs, next_obs = torch.randn(2, size, observed, dtype=dtype)
    ended = (torch.arange(size) % 3 == 0).to(dtype)
    return sac.Batch(obs, torch.rand(size, acted, dtype=dtype) * 2 - 1, torch.randn(size, dtype=dtype), next_obs, ended)


# ------------------------------------------------------------------------------------------------ target and losses
def test_target_by_hand():
    """Of two targets the smaller one, less alpha log pi; no future after a termination."""
    found = sac.soft_q_target(
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        terminations=torch.tensor([0.0, 1.0, 0.0]),
        next_q=torch.tensor([[10.0, 10.0, 5.0], [4.0, 20.0, 7.0]]),
        next_logprob=torch.tensor([2.0, 2.0, -3.0]),
        alpha=0.5,
        gamma=0.9,
    )
    close(found, torch.tensor([1 + 0.9 * (4 - 1), 2.0, 3 + 0.9 * (5 + 1.5)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["next_q", "next_logprob"])
def test_nothing_of_a_terminated_state_gets_into_the_target(bad, where):
    next_q, next_logprob = torch.ones(2, 2), torch.ones(2)
    (next_q if where == "next_q" else next_logprob)[..., 0] = bad
    found = sac.soft_q_target(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 0.0]), next_q, next_logprob, 1.0, 0.5)
    close(found, torch.tensor([3.0, 3.0]))


def test_losses_by_hand():
    close(sac.q_loss(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 4.0])), 0.5 * (1 + 4 + 1 + 0) / 2)
    logprob, q = torch.tensor([1.0, -2.0]), torch.tensor([[3.0, 5.0], [2.0, 9.0]])
    close(sac.actor_loss(logprob, q, 0.5), ((0.5 - 2) + (-1 - 5)) / 2)
    close(sac.temperature_loss(torch.tensor(0.7), logprob, -3.0), -(0.7 * (1 - 3) + 0.7 * (-2 - 3)) / 2)


def test_target_that_would_be_broadcast_is_no_target():
    with pytest.raises(AssertionError):
        sac.q_loss(torch.zeros(2, 4), torch.zeros(4, 1))
    with pytest.raises(AssertionError):
        sac.q_loss(torch.zeros(2, 4), torch.zeros(1))


# ------------------------------------------------------------------------------------------------------- squashing
def squashed_at(actions: np.ndarray, mean: float, std: float) -> np.ndarray:
    """log pi at actions, as squash has it."""
    noise = torch.from_numpy(np.atleast_1d((np.arctanh(actions) - mean) / std)).reshape(-1, 1)
    ones = torch.ones_like(noise)
    found, logprob = sac.squash(mean * ones, math.log(std) * ones, noise)
    close(found.squeeze(1), torch.from_numpy(np.atleast_1d(actions)))
    return logprob.numpy()


GAUSSIANS = [(0.0, 1.0), (0.7, 0.3), (-2.0, 0.5), (0.3, 3.0)]


@pytest.mark.parametrize("mean, std", GAUSSIANS)
def test_density_of_an_action_is_the_slope_of_its_distribution_function(mean, std):
    actions, h = np.linspace(-0.999, 0.999, 401), 1e-6
    above, below = (stats.norm.cdf(np.arctanh(actions + sign * h), mean, std) for sign in (1, -1))
    np.testing.assert_allclose(np.exp(squashed_at(actions, mean, std)), (above - below) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mean, std", GAUSSIANS)
def test_density_of_all_actions_is_one(mean, std):
    """Up to the ends, where it is not finite."""
    edge = 1 - 1e-9
    inside = np.diff(stats.norm.cdf(np.arctanh([-edge, edge]), mean, std)).item()
    points = np.tanh(mean + std * np.arange(-6, 6.5, 0.5))
    points = np.unique(np.clip([-edge, *points, edge], -edge, edge))
    pieces = [
        integrate.quad(lambda a: np.exp(squashed_at(np.array(a), mean, std)).item(), *ends)[0]
        for ends in zip(points, points[1:])
    ]
    assert sum(pieces) == pytest.approx(inside, abs=1e-7)


@pytest.mark.parametrize("u", [-50.0, -20.0, -9.0, -1.0, 0.0, 1.0, 9.0, 20.0, 50.0])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_log_probability_of_far_tails_is_exact_and_has_a_gradient(u, dtype, rtol):
    with localcontext(prec=80):  # log(1 - tanh(u)^2) = -2 log cosh(u)
        slope = float(-2 * ((Decimal(u).exp() + Decimal(-u).exp()) / 2).ln())
    mean, log_std = torch.tensor([[u / 2]], dtype=dtype), torch.tensor([[0.3]], dtype=dtype)
    noise = (u - mean) / log_std.exp()
    mean.requires_grad_(), log_std.requires_grad_()
    action, logprob = sac.squash(mean, log_std, noise)
    expected = stats.norm.logpdf(noise.item()) - log_std.item() - slope
    assert logprob.item() == pytest.approx(expected, rel=rtol, abs=10 * rtol)
    assert abs(action.item()) <= 1
    grads = torch.autograd.grad(logprob.sum(), [mean, log_std])  # d logprob / du = 2 tanh(u), of -log slope alone
    close(grads[0], 2 * torch.tanh(mean + log_std.exp() * noise).detach(), rtol=1e-4, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


def test_log_probability_of_an_action_is_the_sum_over_its_numbers_and_no_noise_is_the_mean():
    mean, log_std, noise = torch.randn(3, 5, 4).double()
    actions, logprob = sac.squash(mean, log_std, noise)
    each = [sac.squash(mean[:, [i]], log_std[:, [i]], noise[:, [i]])[1] for i in range(4)]
    close(logprob, sum(each))
    assert logprob.shape == (5,) and actions.shape == (5, 4)
    close(sac.squash(mean, log_std, torch.zeros_like(noise))[0], mean.tanh())


def test_log_probability_is_that_of_stable_baselines3():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

    mean, log_std, noise = torch.randn(3, 200, 3).double()
    log_std = log_std.clamp(-2, 0)  # where their log(1 - tanh^2) is precise
    actions, logprob = sac.squash(mean, log_std, noise)
    theirs = SquashedDiagGaussianDistribution(3, epsilon=0).proba_distribution(mean, log_std)
    assert actions.abs().max() > 0.99
    close(logprob, theirs.log_prob(actions, mean + log_std.exp() * noise), rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- gradients
class Tiny(nn.Module):
    """Smooth networks side by side in float64, with so few parameters that each can be moved."""

    def __init__(self, copies: int, inputs: int, outputs: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(copies, inputs, 4).double())
        self.w2 = nn.Parameter(torch.randn(copies, 4, outputs).double())
        self.b2 = nn.Parameter(torch.randn(copies, 1, outputs).double())

    def forward(self, x):
        return torch.tanh(x @ self.w1) @ self.w2 + self.b2


class Small:
    """Three numbers, two actions, 30 states."""

    def __init__(self, folder: Path, *flags: str):
        self.args = sac.parse_args([*SETTING, "--alpha", "0.3", *flags])
        self.agent = agent = sac.Agent(Box(-1, 1, (3,)), Box(-1, 1, (2,)), self.args)
        agent.actor, agent.q, agent.q_target = Tiny(1, 3, 4), Tiny(2, 5, 1), Tiny(2, 5, 1)
        agent.double()
        self.learner = sac.Learner(agent, sac.Replay(agent, self.args, 300, folder), self.args)
        self.batch = random_batch(30, 3, 2, torch.float64)
        self.noise = torch.randn(30, 2).double()

    def sample(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's actions and their log-probabilities, by torch alone."""
        mean, log_std = self.agent.actor(obs)[0].split(2, dim=1)
        log_std = log_std.clamp(-20, 2)
        u = mean + self.noise * log_std.exp()
        policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        actions = policy.transforms[0](u)
        return actions, policy.log_prob(actions).sum(1)

    def both(self, network: nn.Module, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([obs, actions], dim=1))[..., 0]

    @torch.no_grad()
    def q_loss(self) -> float:
        batch, y = self.batch, []
        actions, logprob = self.sample(batch.next_obs)
        one, other = self.both(self.agent.q_target, batch.next_obs, actions)
        for i in range(30):
            future = 0 if batch.terminations[i] else min(one[i], other[i]) - 0.3 * logprob[i]
            y.append(batch.rewards[i] + 0.99 * future)
        q = self.both(self.agent.q, batch.obs, batch.actions)
        return sum((q[k][i] - y[i]) ** 2 / 2 / 30 for k in range(2) for i in range(30)).item()

    @torch.no_grad()
    def actor_loss(self) -> float:
        actions, logprob = self.sample(self.batch.obs)
        one, other = self.both(self.agent.q, self.batch.obs, actions)
        return (0.3 * logprob - torch.minimum(one, other)).mean().item()


def finite_differences(loss, theta: torch.Tensor, h: float = 1e-6) -> torch.Tensor:
    grad = torch.zeros_like(theta)
    for i in range(len(theta)):
        was = theta[i].item()
        values = []
        for there in (was + h, was - h):
            theta[i] = there
            values.append(loss())
        theta[i] = was
        grad[i] = (values[0] - values[1]) / (2 * h)
    return grad


def test_q_gradient_is_that_of_finite_differences(tmp_path):
    small = Small(tmp_path)
    grad, told = small.learner.q_gradient(small.batch, small.noise)
    close(told["qf_loss"].item(), small.q_loss())
    close(told["qf_values"], small.both(small.agent.q, small.batch.obs, small.batch.actions).mean())
    close(grad, finite_differences(small.q_loss, small.learner.q_optimizer.parameters), rtol=1e-5, atol=1e-7)
    assert grad.norm() > 0.1


def test_actor_gradient_goes_through_the_action_as_in_finite_differences(tmp_path):
    small = Small(tmp_path)
    grad, alpha_grad, told = small.learner.actor_gradient(small.batch.obs, small.noise)
    close(told["actor_loss"].item(), small.actor_loss())
    close(grad, finite_differences(small.actor_loss, small.learner.actor_optimizer.parameters), rtol=1e-5, atol=1e-7)
    assert grad.norm() > 0.1
    logprob = small.sample(small.batch.obs)[1].mean()
    close(told["entropy"], -logprob)
    close(alpha_grad, -(logprob - 2).reshape(1))  # of -log alpha (log pi + H) with H = -2
    close(told["alpha"], torch.tensor(0.3))


def test_gradients_leave_all_parameters_alone_and_the_steps_move_their_own(tmp_path):
    small = Small(tmp_path)
    learner, parts = small.learner, ("actor", "q", "q_target", "log_alpha")

    def snapshot():
        return {name: copy.deepcopy(getattr(small.agent, name)) for name in parts}

    def moved(before):
        now = snapshot()
        flat = {name: [x.clone() for x in nn.ParameterList([p] if isinstance(p, nn.Parameter) else p.parameters())]
                for name, p in now.items()}  # fmt: skip
        was = {name: [p] if isinstance(p, nn.Parameter) else list(p.parameters()) for name, p in before.items()}
        return {name for name in parts if not all(map(torch.equal, flat[name], was[name]))}

    before = snapshot()
    q_grad, _ = learner.q_gradient(small.batch, small.noise)
    actor_grad, alpha_grad, _ = learner.actor_gradient(small.batch.obs, small.noise)
    assert moved(before) == set() and all(p.grad is None for p in small.agent.parameters())
    assert (len(q_grad), len(actor_grad), len(alpha_grad)) == (2 * (20 + 4 + 1), 12 + 16 + 4, 1)
    for optimizer, grad, name in (
        (learner.q_optimizer, q_grad, "q"),
        (learner.actor_optimizer, actor_grad, "actor"),
        (learner.alpha_optimizer, alpha_grad, "log_alpha"),
    ):
        before = snapshot()
        optimizer.step(grad, 1e-3)
        assert moved(before) == {name}


def test_gradient_of_the_actor_loss_is_reparameterised():
    """In a case that can be worked out: Q(a) = a, no entropy; d/dmean of -tanh(mean + std noise) is -(1 - a^2)."""
    mean, log_std = torch.tensor([[0.4]]).requires_grad_(), torch.tensor([[-0.5]]).requires_grad_()
    noise = torch.tensor([[1.3]])
    a, logprob = sac.squash(mean, log_std, noise)
    grads = torch.autograd.grad(sac.actor_loss(logprob, a.T.repeat(2, 1), 0.0), [mean, log_std])
    a, slope = a.item(), 1 - a.item() ** 2
    assert grads[0].item() == pytest.approx(-slope, rel=1e-5)
    assert grads[1].item() == pytest.approx(-slope * math.exp(-0.5) * 1.3, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ temperature
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
@pytest.mark.parametrize("spread", [-6.0, 0.0])
def test_alpha_rises_while_the_entropy_is_below_minus_the_dimension_and_falls_above(spread, shape, tmp_path):
    setup = made(tmp_path, action_space=Box(-1, 1, shape))
    dims = math.prod(shape)
    with torch.no_grad():
        setup.agent.actor.last.weight.zero_()
        setup.agent.actor.last.bias[..., :dims] = 0
        setup.agent.actor.last.bias[..., dims:] = spread
    before = setup.agent.log_alpha.item()
    _, grad, told = setup.learner.actor_gradient(torch.randn(256, 2), torch.randn(256, dims))
    close(grad, (told["entropy"] + dims).reshape(1), rtol=1e-5, atol=1e-5)
    told = setup.update(random_batch(16, 2, dims), 1)
    below = told["entropy"].item() < -dims
    assert below == (spread == -6.0)
    assert (setup.agent.log_alpha.item() > before) == below
    assert abs(setup.agent.log_alpha.item() - before) == pytest.approx(3e-4, rel=1e-3)  # Adam's first step is the rate


def test_fixed_alpha_stays_and_is_the_alpha_of_the_losses(tmp_path):
    setup = made(tmp_path, "--no-autotune", "--alpha", "0.2")
    for number in range(1, 4):
        told = setup.update(random_batch(16, 2, 2), number)
    assert setup.agent.log_alpha.item() == pytest.approx(math.log(0.2)) and told["alpha"].item() == pytest.approx(0.2)
    batch, noise = random_batch(16, 2, 2), torch.randn(16, 2)
    losses = []
    for alpha in (0.2, 5.0):
        with torch.no_grad():
            setup.agent.log_alpha.fill_(math.log(alpha))
        losses.append(setup.learner.actor_gradient(batch.obs, noise)[2])
    assert (losses[1]["actor_loss"] - losses[0]["actor_loss"]).item() == pytest.approx(
        4.8 * -losses[0]["entropy"].item(), rel=1e-4
    )


# ----------------------------------------------------------------------------------------------------------- update
def linear_of(layers: sac.Layers, copy: int, part: slice = slice(None)) -> dict[str, torch.Tensor]:
    """A copy of layers as nn.Linear names and shapes it."""
    weight, bias = layers.weight.detach()[copy], layers.bias.detach()[copy, 0]
    return {"weight": weight.T[part].clone(), "bias": bias[part].clone()}


def load_linears(sequence, network: sac.Network, copy: int) -> None:
    for linear, layers in zip([x for x in sequence if isinstance(x, nn.Linear)], network.children()):
        linear.load_state_dict(linear_of(layers, copy))


@pytest.mark.parametrize("autotune", [True, False])
def test_updates_are_those_of_stable_baselines3(autotune, tmp_path, monkeypatch):
    """The same weights, batches and noise: losses of three updates, and all parameters after them.

    Their order is: noise of the policy, temperature, noise of the target, Q, policy. Each loss takes the alpha of
    before the step in both, so the order makes no difference.
    """
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    flags = ["--q-lr", "1e-3", "--policy-lr", "1e-3", "--tau", "0.1", "--alpha", "0.4"]
    flags += [] if autotune else ["--no-autotune"]
    setup = made(tmp_path, *flags, action_space=Box(-1, 1, (2,)))
    agent = setup.agent
    env = gym.make("Clock-v0", action_space=Box(-1, 1, (2,)))
    sizes = dict(policy_kwargs={"net_arch": [256, 256]}, batch_size=32, buffer_size=10, device="cpu")
    rates = dict(learning_rate=1e-3, tau=0.1, gamma=0.99, ent_coef="auto_0.4" if autotune else 0.4)
    theirs = SAC("MlpPolicy", env, **sizes, **rates)
    logged = {}
    logger = Logger(None, [])
    monkeypatch.setattr(logger, "record", lambda key, value, **options: logged.__setitem__(key, value))
    theirs.set_logger(logger)

    load_linears(theirs.actor.latent_pi, agent.actor, 0)
    theirs.actor.mu.load_state_dict(linear_of(agent.actor.last, 0, slice(0, 2)))
    theirs.actor.log_std.load_state_dict(linear_of(agent.actor.last, 0, slice(2, 4)))
    for k in range(2):
        load_linears(theirs.critic.q_networks[k], agent.q, k)
        load_linears(theirs.critic_target.q_networks[k], agent.q_target, k)

    for number in range(1, 4):
        batch, of_target, of_policy = random_batch(32, 2, 2), torch.randn(32, 2), torch.randn(32, 2)
        ours, others = iter([of_target, of_policy]), iter([of_policy, of_target])
        monkeypatch.setattr(sac, "action_noise", lambda *arguments, ours=ours: next(ours))
        monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *a, others=others, **b: next(others))
        columns = (batch.obs, batch.actions, batch.next_obs, batch.terminations[:, None], batch.rewards[:, None])
        samples = ReplayBufferSamples(*columns)
        theirs.replay_buffer = types.SimpleNamespace(sample=lambda *a, samples=samples, **b: samples)
        alpha = agent.log_alpha.exp().item()
        told = setup.update(batch, number)
        theirs.train(gradient_steps=1, batch_size=32)
        assert told["qf_loss"].item() == pytest.approx(logged["train/critic_loss"], rel=1e-4, abs=1e-4)
        assert told["actor_loss"].item() == pytest.approx(logged["train/actor_loss"], rel=1e-4, abs=1e-4)
        assert told["alpha"].item() == pytest.approx(logged["train/ent_coef"], rel=1e-5) and alpha == told["alpha"]
        assert next(ours, None) is None and next(others, None) is None

    def agree(layers, copy, linear, part=slice(None)):
        """All, but for the few whose gradient is so near 0 that Adam makes a step of its rounding."""
        for name, mine in linear_of(layers, copy, part).items():
            apart = (mine - getattr(linear, name).detach()).abs()
            assert apart.max() < 1e-3 and (apart > 1e-5).float().mean() < 1e-3, name

    for k in range(2):
        for network, sequence in ((agent.q, theirs.critic), (agent.q_target, theirs.critic_target)):
            linears = [x for x in sequence.q_networks[k] if isinstance(x, nn.Linear)]
            for layers, linear in zip(network.children(), linears):
                agree(layers, k, linear)
    agree(agent.actor.last, 0, theirs.actor.mu, slice(0, 2))
    agree(agent.actor.last, 0, theirs.actor.log_std, slice(2, 4))
    for layers, linear in zip(agent.actor.children(), theirs.actor.latent_pi[::2]):
        agree(layers, 0, linear)
    if autotune:
        close(agent.log_alpha.detach().reshape(1), theirs.log_ent_coef.detach(), rtol=1e-4, atol=1e-6)


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in network.parameters()])


def test_targets_begin_as_both_q_and_follow_them_by_polyak_averages(tmp_path):
    setup = made(tmp_path, "--tau", "0.25", "--q-lr", "1e-2")
    average = flat(setup.agent.q)
    assert torch.equal(average, flat(setup.agent.q_target)) and not torch.equal(*setup.agent.q.first.weight)
    for number in range(1, 5):
        setup.update(random_batch(16, 2, 2), number)
        average = 0.75 * average + 0.25 * flat(setup.agent.q)
        close(flat(setup.agent.q_target), average, rtol=1e-5, atol=1e-6)
    assert (average - flat(setup.agent.q)).abs().max() > 1e-3


@pytest.mark.parametrize("policy_frequency, target_frequency", [(1, 1), (2, 3), (3, 2)])
def test_frequencies_are_kept_and_the_policy_takes_as_many_steps_as_q(policy_frequency, target_frequency, tmp_path):
    flags = ["--policy-frequency", str(policy_frequency), "--target-network-frequency", str(target_frequency)]
    setup = made(tmp_path, *flags)
    noises, actor_gradient = [], setup.learner.actor_gradient
    setup.learner.actor_gradient = lambda obs, noise: (noises.append(noise), actor_gradient(obs, noise))[1]
    for number in range(1, 13):
        actor, targets, count = flat(setup.agent.actor), flat(setup.agent.q_target), len(noises)
        told = setup.update(random_batch(16, 2, 2), number)
        of_policy, of_targets = number % policy_frequency == 0, number % target_frequency == 0
        assert ("actor_loss" in told, not torch.equal(actor, flat(setup.agent.actor))) == (of_policy, of_policy)
        assert len(noises) - count == policy_frequency * of_policy
        assert torch.equal(targets, flat(setup.agent.q_target)) != of_targets
    optimizers = [setup.learner.q_optimizer, setup.learner.actor_optimizer, setup.learner.alpha_optimizer]
    assert [optimizer.t.item() for optimizer in optimizers] == [12, 12, 12]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 12


@pytest.mark.parametrize("num_envs", [1, 3, 64])
@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 1.0, 2.5])
def test_ratio_of_updates_to_steps_is_kept_and_each_number_comes_once(num_envs, ratio):
    args = sac.parse_args(["--num-envs", str(num_envs), "--updates-per-step", str(ratio)])
    numbers = []
    for steps in range(num_envs, 200 * num_envs, num_envs):
        numbers += sac.updates_due(steps, args)
        assert len(numbers) == int(steps * ratio)
    assert numbers == list(range(1, len(numbers) + 1))


class Filled:
    """A buffer of so many rows."""

    def __init__(self, rows: int):
        self.rows = rows

    def __len__(self):
        return self.rows


@pytest.mark.parametrize("num_envs", [1, 3, 7, 80])
def test_iterations_take_all_steps_once_and_the_first_one_fills_the_buffer(num_envs):
    args = sac.parse_args(f"--num-envs {num_envs} --learning-starts 50 --log-interval 20".split())
    total, taken, lengths = 1000 // num_envs * num_envs, 0, []
    while taken < total:
        steps = list(sac.steps_of_iteration(taken, Filled(taken), total, args))
        assert steps == list(range(taken + num_envs, steps[-1] + 1, num_envs))
        lengths.append(steps[-1] - taken)
        taken = steps[-1]
    assert taken == total
    assert 50 + 20 <= lengths[0] < 70 + num_envs and all(20 <= length < 20 + num_envs for length in lengths[1:-1])


# ----------------------------------------------------------------------------------------------------------- buffer
def assert_rows_are_what_was_played(setup: Setup, first: int, last: int) -> None:
    """Rows first to last of all that were put in, environment by environment, against the environments' own logs."""
    n, space = setup.args.num_envs, setup.agent.action_space
    rows = setup.replay.rows[np.arange(first, last) % setup.replay.length]
    batch = setup.replay.batch(torch.from_numpy(np.array(rows)))
    columns = {"obs": batch.obs, "successor": batch.next_obs, "reward": batch.rewards, "terminated": batch.terminations}
    for field, column in columns.items():
        log = setup.log(field).astype(np.float32)
        log = log.reshape(len(log) * n, *log.shape[2:])[first:last]
        np.testing.assert_array_equal(column.numpy(), log, err_msg=field)
    low, high = space.low.reshape(-1), space.high.reshape(-1)
    actions = setup.log("action")
    actions = actions.reshape(len(actions) * n, -1)[first:last]
    np.testing.assert_allclose(low + (batch.actions.numpy() + 1) / 2 * (high - low), actions, rtol=1e-5, atol=1e-5)


BUFFERS = {
    "file": "",
    "memory": "--buffer-in-memory",
    "three environments": "--num-envs 3",
    "wrapped file": "--buffer-size 60 --checkpoint-interval 1 --log-interval 10 --learning-starts 20",
    "wrapped memory": "--buffer-size 60 --buffer-in-memory",
    "wrapped, of three environments": "--num-envs 3 --buffer-size 61 --buffer-in-memory",
}


@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffer_returns_what_went_in(kind, one_buffer, tmp_path, monkeypatch):
    """Also where the environments write all observations into one array, and the policy acts after the uniform steps.

    The Clock's episodes end by termination, truncation or both, so that the last observation is not that of a reset.
    """
    monkeypatch.setattr(sac.Replay, "GROWTH", 7)
    options = dict(action_space=Box(np.float32([-2, 0]), np.float32([4, 0.5])), one_buffer=one_buffer)
    setup = Setup(tmp_path, "--env-id", "Clock-v0", *BUFFERS[kind].split(), **options)
    setup.play(setup.replay.total // setup.args.num_envs)
    assert setup.replay.count == setup.replay.total == 300
    assert ("wrapped" in kind) == (setup.replay.length < 300)
    assert_rows_are_what_was_played(setup, 300 - setup.replay.length, 300)
    ends = [setup.log(field).any() for field in ("terminated", "truncated")]
    assert all(ends) and (setup.log("terminated") & setup.log("truncated")).any()
    assert setup.replay.path.exists() == ("--buffer-in-memory" not in BUFFERS[kind])


def test_target_looks_beyond_a_time_limit_and_not_beyond_an_end(tmp_path):
    """From the environment to the target, through the buffer."""
    setup = made(tmp_path, "--num-envs", "2", "--no-autotune", "--alpha", "0.1")
    setup.play(150)
    with torch.no_grad():
        q = setup.agent.q_target
        q.last.weight.zero_(), q.last.bias.fill_(100.0)
    terminated, truncated = (setup.log(field).reshape(-1) for field in ("terminated", "truncated"))
    rewards = setup.log("reward").reshape(-1)
    for here, there in ((terminated, False), (truncated & ~terminated, True), (~terminated & ~truncated, True)):
        assert here.sum() > 20
        batch = setup.replay.batch(torch.from_numpy(np.array(setup.replay.rows[:300][here])))
        with torch.no_grad():
            actions, logprob = sac.squash(*setup.agent.policy(batch.next_obs), torch.randn(len(batch.obs), 2))
            q = setup.agent.q_values(setup.agent.q_target, batch.next_obs, actions)
        y = sac.soft_q_target(batch.rewards, batch.terminations, q, logprob, 0.1, 0.99)
        expected = rewards[here] + there * 0.99 * (100 - 0.1 * logprob.numpy())
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("size, count", [(50, 30), (50, 50), (50, 120), (300, 240)])
@pytest.mark.parametrize("kind", ["", "--buffer-in-memory"])
def test_batches_are_uniform_over_the_newest_steps(size, count, kind, tmp_path):
    flags = f"--buffer-size {size} --learning-starts 10 --log-interval 10 --checkpoint-interval 1 {kind}"
    setup = made(tmp_path, *flags.split())
    setup.play(count)
    ages = np.concatenate([setup.replay.sample(100, setup.rng).obs[:, 0].numpy() for _ in range(200)])
    numbers, counts = np.unique(np.rint(100 * ages).astype(int), return_counts=True)
    assert numbers.tolist() == list(range(max(count - size, 0), count))  # the Clock shows its age
    assert stats.chisquare(counts).pvalue > 1e-3


def resumed(setup: Setup) -> sac.Replay:
    """A buffer as a new process has it after it has loaded a checkpoint."""
    replay = sac.Replay(setup.agent, setup.args, setup.replay.total, setup.replay.folder)
    replay.load_state_dict(setup.replay.state_dict())
    return replay


RING = "--buffer-size 60 --checkpoint-interval 1 --log-interval 10 --learning-starts 20"  # 110 rows


@pytest.mark.parametrize("flags", ["", RING, f"--num-envs 3 {RING}"])
@pytest.mark.parametrize("steps", [10, 40, 70, 90])
def test_buffer_of_a_resumed_run_draws_what_the_other_one_would_have(steps, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sac.Replay, "GROWTH", 16)
    setup = made(tmp_path, *flags.split())
    setup.play(steps)
    other = resumed(setup)
    assert len(other) == len(setup.replay) > 0 and other.inexact == ""
    again = sac.Rng(1, "cpu"), sac.Rng(1, "cpu")
    batches = [replay.sample(200, rng) for replay, rng in zip((setup.replay, other), again)]
    assert all(map(torch.equal, *batches))
    setup.replay = other
    setup.play(10)  # and it goes on where the other one was
    assert_rows_are_what_was_played(setup, max(other.count - other.length, 0), other.count)


@pytest.mark.parametrize("flags", ["", RING])
def test_rows_that_are_newer_than_the_checkpoint_do_not_matter(flags, tmp_path):
    setup = made(tmp_path, *flags.split())
    setup.play(150)
    state = setup.replay.state_dict()
    before = setup.replay.sample(200, sac.Rng(1, "cpu"))
    setup.play(30)
    other = sac.Replay(setup.agent, setup.args, setup.replay.total, tmp_path)
    other.load_state_dict(state)
    assert all(map(torch.equal, before, other.sample(200, sac.Rng(1, "cpu"))))


def test_file_that_is_not_what_it_was_is_no_buffer(tmp_path):
    setup = made(tmp_path, *RING.split())
    setup.play(150)
    state, path = setup.replay.state_dict(), setup.replay.path
    content, row = path.read_bytes(), 4 * setup.replay.width
    other = sac.Replay(setup.agent, setup.args, 300, tmp_path)
    for n in range(setup.replay.length):  # every row that can be drawn counts, and no other
        drawable = (150 - 1 - n) % setup.replay.length < 60
        path.write_bytes(content[: n * row + 5] + bytes([content[n * row + 5] ^ 1]) + content[n * row + 6 :])
        if drawable:
            with pytest.raises(ValueError, match="replay.bin is not what it was at the checkpoint"):
                other.load_state_dict(state)
        else:
            other.load_state_dict(state)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="replay.bin is shorter than it was at the checkpoint"):
        other.load_state_dict(state)
    path.unlink()
    with pytest.raises(ValueError, match="replay.bin is shorter than it was"):
        other.load_state_dict(state)


LAYOUTS = [(envs, interval, log, starts, total) for envs in (1, 3, 64) for interval in (0, 1, 3)
           for log in (1, 50, 65) for starts in (1, 40) for total in (700, 5000)]  # fmt: skip


def test_ring_is_long_enough_for_the_two_newest_checkpoints_whenever_it_is_killed(tmp_path):
    """Iterations and checkpoints are counted out, for many shapes of a run."""
    agent = types.SimpleNamespace(observation_space=Box(-1, 1, (1,)), action_space=Box(-1, 1, (1,)), device=None)
    for envs, interval, log, starts, total in LAYOUTS:
        flags = f"--num-envs {envs} --checkpoint-interval {interval} --log-interval {log} --learning-starts {starts}"
        args = sac.parse_args([*flags.split(), "--buffer-size", "40", "--total-timesteps", str(total)])
        total = total // envs * envs
        ring = sac.Replay(agent, args, total, tmp_path).length
        taken, iteration, saved = 0, 0, [0, 0]
        while taken < total:
            before, taken = taken, sac.steps_of_iteration(taken, Filled(min(taken, 40)), total, args)[-1]
            iteration += 1
            # Until the next checkpoint is saved, the ring must hold what both of the last ones could draw.
            assert not saved[0] or taken - max(saved[0] - 40, 0) <= ring, (flags, total, ring)
            due = iteration % interval == 0 if interval else 20 * taken // total > 20 * before // total
            saved = [saved[1], taken] if due else saved


# --------------------------------------------------------------------------------------------------------- networks
def stack_of(network: sac.Network, copy: int) -> nn.Sequential:
    first, second, last = ((layers.weight.shape[1], layers.weight.shape[2]) for layers in network.children())
    stack = nn.Sequential(nn.Linear(*first), nn.ReLU(), nn.Linear(*second), nn.ReLU(), nn.Linear(*last))
    load_linears(stack, network, copy)
    return stack


def test_networks_side_by_side_are_those_that_run_one_after_the_other():
    network, x = sac.Network(2, 7, 3, False), torch.randn(33, 7)
    stacks = [stack_of(network, k) for k in range(2)]
    found, expected = network(x), torch.stack([stack(x) for stack in stacks])
    close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.01
    weights = torch.randn_like(found)  # and their gradients do not mix
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for k, stack in enumerate(stacks):
        linears = [x for x in stack if isinstance(x, nn.Linear)]
        for layers, linear in zip(network.children(), linears):
            close(layers.weight.grad[k].T, linear.weight.grad, rtol=1e-4, atol=1e-5)
            close(layers.bias.grad[k, 0], linear.bias.grad, rtol=1e-4, atol=1e-5)
    assert [tuple(layers.weight.shape[1:]) for layers in network.children()] == [(7, 256), (256, 256), (256, 3)]


def test_layers_begin_as_those_of_torch():
    torch.manual_seed(3)
    layers = sac.Layers(2, 5, 4)
    torch.manual_seed(3)
    for k in range(2):
        linear = nn.Linear(5, 4)
        assert torch.equal(layers.weight[k].T, linear.weight) and torch.equal(layers.bias[k, 0], linear.bias)


def test_bf16_multiplies_in_bfloat16_and_is_near_float32():
    exact, rounded, x = sac.Network(2, 7, 3, False), sac.Network(2, 7, 3, True), torch.randn(500, 7)
    rounded.load_state_dict(exact.state_dict())
    found = rounded(x)
    assert found.dtype == torch.float32 and all(p.dtype == torch.float32 for p in rounded.parameters())
    error = (found - exact(x)).abs()
    assert 0 < error.max() < 0.02 and error.mean() < 0.003 * exact(x).abs().mean() + 0.003
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(net(x).square().sum(), list(net.parameters()))])
        for net in (exact, rounded)
    ]
    assert F.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize("bf16", ["on", "off"])
@pytest.mark.parametrize("shape", [(1,), (2, 2)])
def test_numpy_policy_is_that_of_torch_also_after_the_weights_have_moved(shape, bf16, tmp_path):
    setup = made(tmp_path, "--bf16", bf16, "--policy-lr", "1e-2", action_space=Box(-1, 1, shape))
    actor, dims = sac.numpy_actor(setup.agent), math.prod(shape)
    for number in range(1, 4):
        obs, noise = torch.randn(50, 2) * 10, torch.randn(50, dims)
        found = torch.from_numpy(actor(obs.numpy(), noise.numpy()))
        with torch.no_grad():
            expected = sac.act(setup.agent, setup.agent.features(obs), noise)
        assert found.dtype == torch.float32
        close(found, expected, rtol=0, atol=1e-5 if bf16 == "off" else 0.05)
        setup.update(random_batch(16, 2, dims), number)


def test_deviation_is_kept_within_its_bounds(tmp_path):
    setup = made(tmp_path, action_space=Box(-1, 1, (2,)))
    with torch.no_grad():
        setup.agent.actor.last.weight.zero_()
        setup.agent.actor.last.bias[0, 0] = torch.tensor([0.1, 0.2, -1000.0, 1000.0])
        mean, log_std = setup.agent.policy(torch.randn(3, 2))
    assert mean[0].tolist() == pytest.approx([0.1, 0.2]) and log_std.tolist() == [[-20, 2]] * 3
    with np.errstate(all="raise", under="ignore"):
        found = sac.numpy_actor(setup.agent)(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))
    close(torch.from_numpy(found), torch.tensor([[math.tanh(0.1), math.tanh(0.2 + math.exp(2))]]), rtol=1e-5, atol=0)


def test_agent_comes_back_from_a_file(tmp_path):
    setup, other = made(tmp_path, "--alpha", "0.3"), made(tmp_path, "--seed", "9")
    setup.update(random_batch(16, 2, 2), 1)
    torch.save(setup.agent.state_dict(), tmp_path / "agent.pt")
    assert other.agent.log_alpha != setup.agent.log_alpha
    other.agent.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    batch, noise = random_batch(16, 2, 2), torch.randn(16, 2)
    one, two = (agent.learner.q_gradient(batch, noise) for agent in (setup, other))
    assert torch.equal(one[0], two[0])  # of both Q, the targets, the policy and alpha; flat vectors stay in place
    one, two = (agent.learner.actor_gradient(batch.obs, noise) for agent in (setup, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


RARE = ("--bf16 on", "--bf16 off --policy-frequency 2 --no-autotune")


@pytest.mark.parametrize("flags", ["--bf16 off", *(pytest.param(flags, marks=pytest.mark.slow) for flags in RARE)])
def test_compiled_updates_are_those_without(flags, tmp_path):
    flags = [*flags.split(), "--alpha", "0.2", "--q-lr", "1e-3", "--tau", "0.1"]
    agents = [made(tmp_path, *flags, "--compile", compiled) for compiled in ("on", "off")]
    assert [setup.args.compile for setup in agents] == ["on", "off"]
    rngs = sac.Rng(5, "cpu"), sac.Rng(5, "cpu")
    near = dict(rtol=1e-3, atol=1e-4) if "--bf16 off" in " ".join(flags) else dict(rtol=0.05, atol=0.02)
    for number in range(1, 7):
        columns = [x.reshape(16, -1) for x in random_batch(16, 2, 2)]
        batch = agents[0].replay.batch(torch.cat(columns, dim=1))  # columns of one array, as they are compiled for
        told = [sac.update(setup.learner, batch, number, rng, setup.args) for setup, rng in zip(agents, rngs)]
        assert told[0].keys() == told[1].keys()
        for name in told[0]:
            close(told[0][name], told[1][name], **near)
    assert flat(agents[0].agent).norm() > 1
    for name in ("actor", "q", "q_target"):
        close(flat(getattr(agents[0].agent, name)), flat(getattr(agents[1].agent, name)), rtol=0, atol=5e-3)


# ----------------------------------------------------------------------------------------------- probe environments
def trained(folder: Path, *flags: str, action_space: gym.Space, **probe) -> sac.Agent:
    """Trains on Probe(action_space=..., **probe) and returns the agent of the newest checkpoint."""
    gym.register("Probe-v0", entry_point=lambda: Probe(action_space=action_space, **probe))
    quick = "--env-id Probe-v0 --q-lr 3e-3 --policy-lr 3e-3 --tau 0.1 --learning-starts 50 --batch-size 64"
    try:
        argv = [*SETTING, *quick.split(), "--run-name", "probe", "--runs-dir", str(folder), *flags]
        args = sac.parse_args(argv)
        checkpoint = sac.load_checkpoint(sac.train(args))
        with sac.make_envs(args, 1, 0) as envs:
            agent = sac.make_agent(envs, args)
    finally:
        del gym.registry["Probe-v0"]
    agent.load_state_dict(checkpoint["agent"])
    return agent


@torch.no_grad()
def q_of(agent: sac.Agent, action: float, seen: float = 1.0) -> list[float]:
    return agent.q_values(agent.q, torch.tensor([[seen]]), torch.tensor([[action]])).flatten().tolist()


def entropy_of(mean: float, std: float) -> float:
    """Of tanh of a Gaussian."""
    logprob = lambda u: stats.norm.logpdf(u, mean, std) + 2 * np.log(np.cosh(u))  # noqa: E731
    u = np.linspace(mean - 8 * std, mean + 8 * std, 20_001)
    return -integrate.trapezoid(stats.norm.pdf(u, mean, std) * logprob(u), u)


def test_q_of_a_constant_reward_is_the_soft_value(tmp_path):
    """All actions are equal, so the best policy is the most random one, and Q = r + gamma (Q + alpha H)."""
    flags = ["--no-autotune", "--alpha", "0.5", "--gamma", "0.5", "--total-timesteps", "500"]
    agent = trained(tmp_path, *flags, action_space=Box(-1, 1, (1,)), reward=lambda *_: 1.0, length=5, truncates=True)
    most = max(entropy_of(0.0, std) for std in np.linspace(0.5, 1.5, 101))
    assert 0.5 < most < math.log(2)
    for action in (-0.9, 0.0, 0.9):
        assert q_of(agent, action) == pytest.approx([(1 + 0.5 * 0.5 * most) / (1 - 0.5)] * 2, abs=0.06)
    with torch.no_grad():
        mean, log_std = agent.policy(torch.tensor([[1.0]]))
    assert entropy_of(mean.item(), log_std.exp().item()) == pytest.approx(most, abs=0.05)


def test_q_of_a_last_step_is_the_reward_alone(tmp_path):
    """The entropy after an end counts nothing, nor that of the action itself."""
    flags = ["--no-autotune", "--alpha", "5", "--total-timesteps", "350"]
    agent = trained(
        tmp_path, *flags, action_space=Box(-1, 1, (1,)), reward=lambda seen, action, last: seen, random=True
    )
    for seen in (1.0, -1.0):
        assert q_of(agent, 0.3, seen) == pytest.approx([seen] * 2, abs=0.05)


def test_policy_goes_to_the_action_that_pays(tmp_path):
    """In a box that is far from -1 to 1: the best action is 5, which is 0.6 of the way from the middle."""
    flags = ["--no-autotune", "--alpha", "0.01", "--total-timesteps", "500"]
    agent = trained(
        tmp_path, *flags, action_space=Box(-3, 7, (1,)), reward=lambda seen, action, last: -((action - 5) ** 2) / 10
    )
    with torch.no_grad():
        mean, log_std = agent.policy(torch.tensor([[1.0]]))
    assert 2 + 5 * torch.tanh(mean).item() == pytest.approx(5, abs=0.5)
    assert q_of(agent, 0.6) == pytest.approx([0, 0], abs=0.15)


class Recorder(gym.Env):
    """Keeps what it is given."""

    given: list[np.ndarray] = []

    def __init__(self, low=-1.0, high=1.0, shape=(1,), dtype=np.float32):
        self.observation_space = Box(-np.inf, np.inf, (3,), dtype)
        self.action_space = Box(np.broadcast_to(np.float32(low), shape), np.broadcast_to(np.float32(high), shape))
        self.dtype = dtype

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=3).astype(self.dtype), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        Recorder.given.append(action)
        self.t += 1
        return self.np_random.normal(size=3).astype(self.dtype), float(action.sum()), False, self.t == 10, {}


gym.register("Recorder-v0", entry_point=Recorder)
BOXES = {
    "asymmetric": dict(low=-3.0, high=7.0),
    "each its own": dict(low=[-3.0, 0.0, 100.0], high=[7.0, 0.1, 101.0], shape=(3,)),
    "a matrix": dict(low=[[-2.0, -1.0], [0.0, 5.0]], high=[[2.0, 3.0], [1.0, 6.0]], shape=(2, 2)),
    "float64": dict(dtype=np.float64),
}


@pytest.mark.parametrize("kind", BOXES)
def test_actions_are_within_the_box_and_reach_its_ends(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, "given", [])
    setup = Setup(tmp_path, "--env-id", "Recorder-v0", **BOXES[kind])
    space = setup.agent.action_space
    setup.play(50)
    uniform = np.stack(Recorder.given)
    assert (uniform.min(0) < space.low + 0.15 * (space.high - space.low)).all()
    assert (uniform.max(0) > space.high - 0.15 * (space.high - space.low)).all()
    ends = [space.low, space.high]
    for end, extreme in zip(ends, (-50.0, 50.0)):  # the environment asserts that they are within
        with torch.no_grad():
            setup.agent.actor.last.weight.zero_()
            setup.agent.actor.last.bias[...] = extreme
            setup.agent.actor.last.bias[..., math.prod(space.shape) :] = -20
        setup.play(1)
        np.testing.assert_array_equal(Recorder.given[-1], end)
        assert Recorder.given[-1].shape == space.shape and Recorder.given[-1].dtype == space.dtype
    setup.play(20)
    batch = setup.replay.sample(16, setup.rng)
    told = setup.update(batch, 1)
    assert batch.actions.shape == (16, math.prod(space.shape)) and batch.actions.abs().max() <= 1
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in (*batch, *told.values()))


def test_first_actions_are_uniform_and_the_later_ones_those_of_the_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, "given", [])
    setup = Setup(tmp_path, "--env-id", "Recorder-v0", "--learning-starts", "250", low=-3.0, high=7.0)
    with torch.no_grad():
        setup.agent.actor.last.weight.zero_()
        setup.agent.actor.last.bias[0, 0] = torch.tensor([0.5, -20.0])
    setup.play(260)
    given = np.concatenate(Recorder.given)
    assert stats.kstest(given[:250], stats.uniform(-3, 10).cdf).pvalue > 1e-3
    np.testing.assert_allclose(given[250:], 2 + 5 * math.tanh(0.5), rtol=1e-5)
