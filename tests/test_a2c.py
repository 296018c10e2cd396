"""The method of a2c.py against ppo.py, brute force, torch and Stable-Baselines3."""

import copy
import csv
import math

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import test_method
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from test_method import ACTION_SPACES, brute_force_gae, close, torch_log_prob, torch_policy
from test_probes import Probe
from torch import nn

import a2c

every_action_space = pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)


SETTING = "--learning-rate 7e-4 --gamma 0.99 --gae-lambda 1 --optimizer rmsprop --no-norm-adv --ent-coef 0"
SETTING += " --vf-coef 0.5 --max-grad-norm 0.5 --log-std-init 0 --device cpu --compile off"
SETTING = SETTING.split()  # for the defaults are free to change


class Learner:
    """What train sets up before its loop, without a run directory."""

    def __init__(self, *flags: str, **env_options):
        self.args = a2c.parse_args([*SETTING, *flags])
        self.envs = a2c.make_envs(self.args, self.args.num_envs, self.args.seed, **env_options)
        self.rng = a2c.Rng(self.args.seed, "cpu")
        self.player = a2c.Player(self.envs, self.args, self.rng)
        self.agent = a2c.make_agent(self.envs, self.args)
        optimizer = a2c.RMSprop if self.args.optimizer == "rmsprop" else a2c.Adam
        self.optimizer = optimizer(a2c.flatten_parameters(self.agent.parameters()))
        self.gradient = a2c.make_gradient(self.agent, self.args)

    def play(self) -> a2c.Steps:
        return self.player.play(self.agent)

    @torch.no_grad()
    def estimate(self, steps: a2c.Steps) -> a2c.Batch:
        return a2c.estimate(self.agent, steps, self.args)

    def update(self, steps: a2c.Steps, learning_rate: float = 0.01) -> dict[str, torch.Tensor]:
        return a2c.update(self.optimizer, self.gradient, steps, learning_rate)

    def log(self, field: str) -> torch.Tensor:
        """What the Clocks saw in the latest steps, (num_steps, num_envs, ...)."""
        logs = [env.unwrapped.log[-self.args.num_steps :] for env in self.envs.envs.envs]
        return torch.from_numpy(np.stack([[getattr(step, field) for step in log] for log in logs], axis=1))

    @torch.no_grad()
    def targets(self, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages and returns of the latest steps, by brute force."""
        obs, successors = self.log("obs"), self.log("successor")
        values, next_values = (
            self.agent.value(self.agent.features(x.flatten(0, 1))).view(x.shape[:2]) for x in (obs, successors)
        )
        columns = (self.log(name) for name in ("terminated", "truncated"))
        advantages = brute_force_gae(self.log("reward"), values, next_values, *columns, gamma, gae_lambda)
        return torch.from_numpy(advantages).float(), values + torch.from_numpy(advantages).float()


CLOCK = ("--env-id", "Clock-v0", "--num-envs", "3", "--num-steps", "5")


def clock_learner(action_space: gym.Space, *flags: str) -> Learner:
    """An agent that is far from a fresh one, three steps into its environments' second episodes."""
    learner = Learner(*CLOCK, *flags, action_space=action_space)
    for parameter in learner.agent.parameters():
        nn.init.normal_(parameter, std=0.3)
    learner.play()
    learner.play()
    return learner


# ------------------------------------------------------------------------------------------- A2C is PPO in one step
def side_by_side(action_space: gym.Space, flags: tuple[str, ...], ppo_flags: tuple[str, ...]) -> list[float]:
    """The largest difference between the weights of a2c.py and of ppo.py after each of 20 iterations."""
    same = (*CLOCK, "--gae-lambda", "1", "--max-grad-norm", "0.5", "--ent-coef", "0.01", "--vf-coef", "0.7", *flags)
    mine = Learner(*same, "--optimizer", "adam", action_space=action_space)
    one_step = ("--num-minibatches", "1", "--update-epochs", "1", "--no-norm-adv")
    other = test_method.Learner(*same, *one_step, *ppo_flags, action_space=action_space)
    for parameter in mine.agent.parameters():
        nn.init.normal_(parameter, std=0.3)
    other.agent.load_state_dict(mine.agent.state_dict())
    before, differences = mine.optimizer.parameters.clone(), []
    for iteration in range(20):
        mine.rng.torch.manual_seed(iteration)  # for ppo.py draws the order of its rows, too
        mine.update(mine.play())
        other.rng.torch.manual_seed(iteration)
        other.update(other.rollout(), learning_rate=0.01)
        differences.append((mine.optimizer.parameters - other.optimizer.parameters).abs().max().item())
    for name in ("terminated", "truncated"):
        assert any(getattr(step, name) for step in mine.envs.envs.envs[0].unwrapped.log)
    assert (mine.optimizer.parameters - before).abs().max() > 0.05
    return differences


@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])
@pytest.mark.parametrize("gae_lambda", ["1", "0.95"])
def test_ppo_with_one_epoch_of_one_minibatch_takes_the_same_steps(kind, gae_lambda):
    """Huang et al. 2022: the ratio is one, so nothing is clipped and the gradients are the same."""
    assert max(side_by_side(ACTION_SPACES[kind], ("--gae-lambda", gae_lambda), ())) < 1e-4


@pytest.mark.parametrize(
    "ppo_flags",
    [("--update-epochs", "2"), ("--gae-lambda", "0.9"), ("--ent-coef", "0.02"), ("--max-grad-norm", "0.4")],
    ids=lambda flags: flags[0],
)
def test_ppo_with_any_other_setting_does_not(ppo_flags):
    assert side_by_side(Discrete(4), (), ppo_flags)[-1] > 1e-3


# ------------------------------------------------------------------------------------------------------ RMSprop
def test_rmsprop_equals_its_equations():
    x, rng = np.full(4, 0.5), np.random.default_rng(0)
    vector, mean_square = torch.from_numpy(x.copy()), np.ones(4)
    optimizer = a2c.RMSprop(vector)
    for step in range(30):
        g, rate = rng.normal(size=4) * [1e-4, 1e-2, 1, 100], 0.1 / (step + 1)
        mean_square = 0.99 * mean_square + 0.01 * g**2
        x -= rate * g / np.sqrt(mean_square + 1e-5)
        optimizer.step(torch.from_numpy(g), rate)
    close(vector, x)
    close(optimizer.state_dict()["v"], mean_square)


def test_rmsprop_equals_stable_baselines3_and_not_torch():
    gradients = torch.randn(30, 50) * torch.logspace(-5, 1, 50)
    vector, references = torch.ones(50), [nn.Parameter(torch.ones(50)) for _ in range(2)]
    classes = (RMSpropTFLike, torch.optim.RMSprop)
    others = [which([x], lr=0.01, alpha=0.99, eps=1e-5) for which, x in zip(classes, references)]
    optimizer = a2c.RMSprop(vector)
    for gradient in gradients:
        optimizer.step(gradient, 0.01)
        for other, reference in zip(others, references):
            reference.grad = gradient.clone()
            other.step()
    close(vector, references[0].data, rtol=1e-6, atol=1e-6)
    assert (vector - references[1]).abs().max() > 0.01


@pytest.mark.parametrize("which", [a2c.RMSprop, a2c.Adam])
def test_an_optimizer_goes_on_from_its_state(which):
    one, gradients = torch.ones(5), torch.randn(4, 5)
    first = which(one)
    first.step(gradients[0], 0.1), first.step(gradients[1], 0.1)
    two = one.clone()
    second = which(two)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[2:]:
        first.step(gradient, 0.1), second.step(gradient, 0.1)
    assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------ loss and targets
@pytest.mark.parametrize("kind", ["discrete", "uneven", "box"])
def test_returns_are_n_step_returns_up_to_the_end_of_rollout_or_episode(kind):
    """With the value of the state that was truly reached at the end, be it for a time limit, but of no terminal one."""
    learner = clock_learner(ACTION_SPACES[kind], "--gamma", "0.9")
    seen = set()
    for _ in range(9):
        steps = learner.play()
        names = ("reward", "successor", "terminated", "truncated")
        rewards, successors, terminated, truncated = (learner.log(name).numpy() for name in names)
        expected = np.zeros((5, 3))
        for t, n in np.ndindex(5, 3):
            end = next((k for k in range(t, 5) if terminated[k, n] or truncated[k, n]), 4)
            expected[t, n] = sum(0.9 ** (k - t) * rewards[k, n] for k in range(t, end + 1))
            if not terminated[end, n]:
                with torch.no_grad():
                    future = learner.agent.value(learner.agent.features(torch.from_numpy(successors[end, n])[None]))
                expected[t, n] += 0.9 ** (end + 1 - t) * future.item()
            seen.add((bool(terminated[end, n]), bool(truncated[end, n]), end == 4))
        batch = learner.estimate(steps)
        close(batch.returns.view(5, 3), expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            close(batch.values, learner.agent.value(learner.agent.features(learner.log("obs").flatten(0, 1))))
    assert len(seen) >= 5  # the rollout ended within episodes and with them


@every_action_space
@pytest.mark.parametrize("gae_lambda, norm", [(1.0, "--no-norm-adv"), (0.9, "--no-norm-adv"), (0.9, "--norm-adv")])
def test_gradient_is_that_of_policy_value_and_entropy_by_torch_with_constant_targets(action_space, gae_lambda, norm):
    flags = ("--vf-coef", "0.7", "--ent-coef", "0.3", "--max-grad-norm", "1e9", "--gae-lambda", str(gae_lambda), norm)
    learner = clock_learner(action_space, *flags)
    agent, steps = learner.agent, learner.play()
    advantages, returns = learner.targets(0.99, gae_lambda)
    close(learner.estimate(steps).returns.view(5, 3), returns, rtol=1e-4, atol=1e-4)
    found, logged = learner.gradient(steps)

    if norm == "--norm-adv":
        advantages = (advantages - advantages.mean()) / advantages.std()
    features = agent.features(learner.log("obs").flatten(0, 1))
    policy, values = torch_policy(agent, features), agent.critic(features)[:, 0]
    policy_loss = -(torch_log_prob(policy, steps.actions.flatten(0, 1)) * advantages.flatten()).mean()
    value_loss = nn.functional.mse_loss(values, returns.flatten()) / 2
    entropy = sum(component.entropy() for component in policy).mean()
    (policy_loss + 0.7 * value_loss - 0.3 * entropy).backward()
    expected = torch.cat([p.grad.flatten() for p in agent.parameters()])
    close(found, expected, rtol=1e-3, atol=1e-4)
    errors = returns.flatten() - values
    expected_stats = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, grad_norm=expected.norm())
    expected_stats |= dict(returns_variance=returns.var(correction=0), residual_variance=errors.var(correction=0))
    assert logged.keys() == expected_stats.keys()
    for name, value in expected_stats.items():
        close(logged[name], value.detach(), rtol=1e-3, atol=1e-4, msg=name)
    close(logged["grad_norm"], expected.norm(), rtol=1e-3, atol=0)
    assert not any(value.requires_grad for value in logged.values())


def test_the_policy_loss_moves_no_value_and_the_value_loss_no_policy():
    for flags, still in ((("--vf-coef", "0"), "critic"), ((), "actor")):
        learner = clock_learner(ACTION_SPACES["box"], *flags)
        steps = learner.play()
        if still == "actor":
            learner.args.gae_lambda = 0.0
            with torch.no_grad():  # no advantages: the rewards are what the critic takes them to be
                obs, successors = (learner.log(name).flatten(0, 1) for name in ("obs", "successor"))
                values, next_values = (
                    learner.agent.value(learner.agent.features(x)).view(5, 3) for x in (obs, successors)
                )
                alive = ~learner.log("terminated")
                steps = steps._replace(rewards=values - 0.99 * next_values * alive + 0.0)
        before = {name: x.clone() for name, x in learner.agent.named_parameters()}
        learner.update(steps)
        moved = {name for name, x in learner.agent.named_parameters() if (x - before[name]).abs().max() > 1e-6}
        assert bool(moved) == (still == "critic") and not any(name.startswith(still) for name in moved)


@pytest.mark.parametrize("bound", ["0.01", "1e6"])
def test_gradient_clipping_equals_torch(bound):
    learner = clock_learner(ACTION_SPACES["box"], "--max-grad-norm", bound)
    steps = learner.play()
    gradient, stats = learner.gradient(steps)
    a2c.a2c_loss(learner.agent, learner.estimate(steps), learner.args)[0].backward()
    parameters = list(learner.agent.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    norm = nn.utils.clip_grad_norm_(parameters, float(bound))
    assert 0.01 < norm < 1e6
    close(gradient, torch.cat([p.grad.flatten() for p in parameters]), rtol=1e-4, atol=1e-7)
    close(stats["grad_norm"], norm, rtol=1e-4, atol=0)


def test_norm_adv_standardises_over_the_batch():
    """So the scale of rewards and values is out of the policy's gradient."""
    gradients = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        learner = clock_learner(Discrete(4), "--norm-adv", "--vf-coef", "0", "--max-grad-norm", "1e9")
        learner.agent.critic.last.weight.data *= scale
        learner.agent.critic.last.bias.data *= scale
        steps = learner.play()
        steps = steps._replace(rewards=scale * steps.rewards)
        gradients.append(learner.gradient(steps)[0])
    close(*gradients, rtol=1e-3, atol=1e-5)
    assert gradients[0].norm() > 0.1


def test_equal_advantages_are_standardised_to_nothing():
    learner = clock_learner(Discrete(4), "--norm-adv", "--vf-coef", "0", "--gae-lambda", "0")
    for parameter in learner.agent.critic.parameters():
        nn.init.zeros_(parameter)
    steps = learner.play()
    for reward in (0.0, 1.0, 0.1, 1e4 / 3):
        equal = steps._replace(rewards=torch.full((5, 3), reward))
        gradient, _ = learner.gradient(equal)
        assert torch.equal(gradient, torch.zeros_like(gradient)), reward


@pytest.mark.parametrize("kind, norm", [("box", "--norm-obs"), ("uneven", "--no-norm-obs")])
def test_the_compiled_gradient_is_the_eager_one(kind, norm):
    """Although no call resembles the one that was compiled, whose numbers were all zero."""
    flags = (norm, "--norm-adv", "--ent-coef", "0.1", "--num-steps", "3")
    learner = clock_learner(ACTION_SPACES[kind], *flags)
    learner.args.compile = "on"
    compiled = a2c.make_gradient(learner.agent, learner.args)
    for _ in range(3):
        steps = learner.play()
        (gradient, stats), (eager_gradient, eager_stats) = compiled(steps), learner.gradient(steps)
        close(gradient, eager_gradient, rtol=1e-3, atol=1e-5)
        assert stats.keys() == eager_stats.keys()
        for name, value in stats.items():
            close(value, eager_stats[name], rtol=1e-3, atol=1e-5, msg=name)
        learner.optimizer.step(torch.ones_like(gradient), 0.01)
        if learner.agent.obs_norm:
            learner.agent.obs_norm.update(steps.observations.flatten(0, 1))


# ------------------------------------------------------------------------------------------------------- update
@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_updates_equal_stable_baselines3(kind):
    env_id = {"discrete": "CartPole-v1", "box": "Pendulum-v1"}[kind]
    plain = [
        "--optimizer",
        "rmsprop",
        "--no-norm-adv",
        "--log-std-end",
        "None",
        "--ent-coef",
        "0.02",
        "--vf-coef",
        "0.5",
    ]
    learner = Learner("--env-id", env_id, "--num-envs", "4", "--num-steps", "8", *plain)
    optimizer = dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(alpha=0.99, eps=1e-5))
    settings = dict(n_steps=32, learning_rate=0.03, ent_coef=0.02, vf_coef=0.25, max_grad_norm=0.5, device="cpu")
    model = stable_baselines3.A2C("MlpPolicy", env_id, policy_kwargs=optimizer, **settings)  # no half in its value loss
    model.set_logger(Logger(None, []))
    agent, body, policy = learner.agent, model.policy.mlp_extractor, model.policy
    pairs = [(body.policy_net[0], agent.actor.first), (body.policy_net[2], agent.actor.second)]
    pairs += [(policy.action_net, agent.actor.last), (policy.value_net, agent.critic.last)]
    pairs += [(body.value_net[0], agent.critic.first), (body.value_net[2], agent.critic.second)]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    if kind == "box":
        policy.log_std.data.copy_(agent.log_std)
    for _ in range(3):
        before, steps = learner.optimizer.parameters.clone(), learner.play()
        buffer = model.rollout_buffer
        buffer.reset()
        buffer.observations[:, 0] = steps.observations[:-1].flatten(0, 1)
        buffer.actions[:, 0] = steps.actions.flatten(0, 1)
        batch = learner.estimate(steps)
        learner.update(steps, learning_rate=0.03)
        for name in ("returns", "values", "advantages"):
            getattr(buffer, name)[:, 0] = getattr(batch, name)
        buffer.full = True
        model.train()
        assert (learner.optimizer.parameters - before).abs().max() > 1e-3
        for theirs, ours in pairs:
            for found, expected in zip(ours.parameters(), theirs.parameters()):
                close(found.data, expected.data, rtol=1e-3, atol=1e-5)
        if kind == "box":
            close(agent.log_std.data, policy.log_std.data, rtol=1e-3, atol=1e-5)
            assert (agent.log_std != 0).all()


def test_a_gradient_that_is_not_finite_is_named_before_anything_is_saved(tmp_path, monkeypatch):
    """It is read only after its step, with everything else that is logged; the last checkpoint is that before it."""
    calls, play = [], a2c.Player.play

    def spoilt(player: a2c.Player, agent: a2c.Agent) -> a2c.Steps:
        steps = play(player, agent)
        calls.append(1)
        return steps._replace(rewards=steps.rewards * math.nan) if len(calls) == 4 else steps

    monkeypatch.setattr(a2c.Player, "play", spoilt)
    tiny = "--num-envs 2 --num-steps 5 --total-timesteps 100 --checkpoint-interval 1 --run-name bad"
    with pytest.raises(a2c.Failed, match="iteration 4: policy_loss is nan; .*step_000000000030.pt"):
        a2c.train(a2c.parse_args([*SETTING, *tiny.split(), "--runs-dir", str(tmp_path)]))
    state = a2c.load_checkpoint(tmp_path / "bad")
    assert state["global_step"] == 30
    assert all(x.isfinite().all() for x in [*state["agent"].values(), *state["optimizer"].values()])


def test_a_cnn_learns_from_bytes_through_one_body():
    args = a2c.parse_args([*SETTING, "--num-envs", "2", "--num-steps", "3"])
    agent = a2c.Agent(Box(0, 255, (1, 36, 36), np.uint8), Discrete(3), args, share_body=True)
    optimizer = a2c.RMSprop(a2c.flatten_parameters(agent.parameters()))
    images, zeros = torch.randint(0, 256, (4, 2, 1, 36, 36), dtype=torch.uint8), torch.zeros(3, 2)
    features = agent.features(images.flatten(0, 1)).detach()
    steps = a2c.Steps(images, features, torch.randint(0, 3, (3, 2, 1)), torch.randn(3, 2), zeros > 0, zeros > 0, zeros)
    gradient, before = a2c.make_gradient(agent, args), copy.deepcopy(agent)
    a2c.update(optimizer, gradient, steps, 0.01)
    for (name, parameter), old in zip(agent.named_parameters(), before.parameters()):
        assert not torch.equal(parameter, old), name


# --------------------------------------------------------------------------------------------------- whole runs
def rows_of(run_dir, name: str) -> list[dict[str, str]]:
    with open(run_dir / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def test_a_logged_row_is_the_mean_of_its_updates_and_the_run_is_the_same(tmp_path, monkeypatch):
    """31 iterations. The last one ends a row too, and a checkpoint, every 10, does not."""
    runs, weights, variances, update = {}, {}, {}, a2c.update

    def watched(*arguments) -> dict[str, torch.Tensor]:
        stats = update(*arguments)
        for name, values in variances[interval].items():
            values.append(stats[f"{name}_variance"].item())
        return stats

    monkeypatch.setattr(a2c, "update", watched)
    for interval in (1, 4):
        variances[interval] = {"returns": [], "residual": []}
        tiny = ["--num-envs", "2", "--num-steps", "5", "--total-timesteps", "310", "--checkpoint-interval", "10"]
        names = ["--log-interval", str(interval), "--runs-dir", str(tmp_path), "--run-name", str(interval)]
        runs[interval] = a2c.train(a2c.parse_args([*SETTING, "--anneal-lr", *tiny, *names]))
        checkpoint = a2c.load_checkpoint(runs[interval])
        weights[interval] = torch.cat([x.flatten().float() for x in checkpoint["agent"].values()])
    assert torch.equal(weights[1], weights[4])

    every, some = (rows_of(runs[interval], "progress") for interval in (1, 4))
    assert [int(row["global_step"]) for row in every] == list(range(10, 311, 10))
    ends = [4, 8, 12, 16, 20, 24, 28, 31]
    assert [int(row["global_step"]) for row in some] == [10 * end for end in ends]
    for row, begin, end in zip(some, [0, *ends], ends):
        for name in ("policy_loss", "value_loss", "entropy", "grad_norm"):
            mean = np.mean([float(one[f"losses/{name}"]) for one in every[begin:end]])
            assert float(row[f"losses/{name}"]) == pytest.approx(mean, rel=1e-4, abs=1e-6)
        returns, residual = (np.mean(variances[4][name][begin:end]) for name in ("returns", "residual"))
        assert float(row["losses/explained_variance"]) == pytest.approx(1 - residual / returns, rel=1e-4, abs=1e-5)
        rates = 7e-4 * (1 - np.arange(begin, end) / 31)
        assert float(row["charts/learning_rate"]) == pytest.approx(rates.mean())

    episodes = [[{**row, "wall_time": ""} for row in rows_of(runs[interval], "episodes")] for interval in (1, 4)]
    assert episodes[0] == episodes[1] and len(episodes[0]) > 5
    for row, begin, end in zip(some, [0, *ends], ends):
        means = [float(one["return"]) for one in episodes[0] if 10 * begin < int(one["global_step"]) <= 10 * end]
        assert (
            row["charts/episodic_return"] == "" if not means else float(row["charts/episodic_return"]) == np.mean(means)
        )


@pytest.mark.parametrize("optimizer, names", [("rmsprop", {"v"}), ("adam", {"m", "v", "t"})])
def test_a_run_normalises_by_all_it_saw_and_keeps_the_state_of_its_optimizer(tmp_path, optimizer, names):
    tiny = f"--env-id Pendulum-v1 --norm-obs --num-envs 2 --num-steps 5 --total-timesteps 100 --optimizer {optimizer}"
    state = a2c.load_checkpoint(a2c.train(a2c.parse_args([*SETTING, *tiny.split(), "--runs-dir", str(tmp_path)])))
    assert state["agent"]["obs_norm.count"] == 100 and state["optimizer"].keys() == names
    assert not (state["optimizer"]["v"] == 1).all()


def test_the_steps_of_episodes_count_through_the_updates_of_a_row(tmp_path):
    learn(tmp_path, 2000, "--log-interval", "7", reward=lambda seen, action, last: seen, random=True)
    rows = rows_of(tmp_path / "probe", "episodes")
    assert [int(row["global_step"]) for row in rows] == [4 * (i // 4 + 1) for i in range(2000)]


def learn(folder, steps: int, *flags: str, **probe) -> a2c.Agent:
    """Trains on Probe(**probe) and returns the agent as the newest checkpoint has it."""
    gym.register("Probe-v0", entry_point=lambda: Probe(**probe))
    try:
        small = f"--env-id Probe-v0 --num-envs 4 --num-steps 5 --total-timesteps {steps}"
        fast = f"--learning-rate 1e-2 --anneal-lr --runs-dir {folder} --run-name probe"
        args = a2c.parse_args([*SETTING, *small.split(), *fast.split(), *flags])
        checkpoint = a2c.load_checkpoint(a2c.train(args))
        envs = a2c.make_envs(args, 1, 0)
    finally:
        del gym.registry["Probe-v0"]
    agent = a2c.make_agent(envs, args)
    agent.load_state_dict(checkpoint["agent"])
    return agent


@torch.no_grad()
def value(agent: a2c.Agent, seen: float) -> float:
    return agent.value(torch.tensor([[seen]])).item()


@torch.no_grad()
def probability(agent: a2c.Agent, seen: float, action: int) -> float:
    return agent.policy(torch.tensor([[seen]])).log_prob(torch.tensor([[action]])).exp().item()


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_the_policy_learns_the_action_that_pays_for_this_observation(tmp_path, optimizer):
    flags = ("--optimizer", optimizer)
    agent = learn(tmp_path, 8000, *flags, reward=lambda seen, action, last: seen * (2 * action - 1), random=True)
    assert probability(agent, 1.0, 1) > 0.95 and probability(agent, -1.0, 0) > 0.95


def test_a_gaussian_policy_learns_the_action_that_pays(tmp_path):
    agent = learn(
        tmp_path, 16_000, reward=lambda seen, action, last: -((action - 0.7) ** 2), action_space=Box(-5, 5, (1,))
    )
    with torch.no_grad():
        assert agent.actor(torch.tensor([[1.0]])).item() == pytest.approx(0.7, abs=0.2)


@pytest.mark.parametrize("gae_lambda", ["1", "0.9"])
def test_truncation_does_not_end_the_value(tmp_path, gae_lambda):
    """One state that always pays 1 is worth 1 / (1 - gamma), however often a time limit cuts in."""
    flags = ("--gamma", "0.8", "--optimizer", "adam", "--gae-lambda", gae_lambda)
    agent = learn(tmp_path, 8000, *flags, reward=lambda seen, action, last: 1.0, length=3, truncates=True)
    assert value(agent, 1.0) == pytest.approx(5.0, abs=0.3)


def test_termination_ends_the_value(tmp_path):
    """The mean over the episode's three steps of what is still to come: 1, 1.8 and 2.44."""
    agent = learn(tmp_path, 8000, "--gamma", "0.8", reward=lambda seen, action, last: 1.0, length=3)
    assert value(agent, 1.0) == pytest.approx(np.mean([1, 1.8, 2.44]), abs=0.2)
