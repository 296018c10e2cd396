# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.13",
#     "gymnasium[classic-control,mujoco]>=1.4",
#     "mujoco>=3.11,<3.16",
#     "ale-py>=0.12",
#     "tyro>=1.0",
#     "tensorboard>=2.20",
#     "wandb>=0.27",
#     "numpy>=2.0",
# ]
# ///
"""A2C: advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783, its workers in step with each other), in one file.

Play num_steps steps in num_envs environments. Then take one gradient step on all of them and throw them away:

    L(theta) = E[ -log pi(a|s) A + c1 (R - V(s))^2 / 2 - c2 S[pi](s) ],  A = R - V(s),  no gradient through A and R

R_t = r_t + gamma r_{t+1} + ... + gamma^k V(s_{t+k}) is the n-step return up to the end of the rollout, or of the
episode, if that comes first. With `--gae-lambda` below 1, A is the generalized advantage estimate (arXiv 1506.02438)
and R = A + V. A2C is PPO with one epoch of one minibatch: there the ratio is 1 and nothing is clipped, so the gradients
agree (Huang et al. 2022, arXiv 2205.09123).

    python a2c.py --env-id CartPole-v1
    python a2c.py --env-id HalfCheetah-v5 --seed 2          python a2c.py --help --env-id HalfCheetah-v5
    python a2c.py --resume runs/<run>                       python a2c.py --evaluate runs/<run>

Departures from the paper:
- The environments wait for each other, so no gradient is stale; A3C's workers run free.
- Lambda is 0.95. Adam replaces RMSprop on MuJoCo and Atari, where it learns faster. There is no LSTM; c1 is 0.5.
- The global norm of the gradient is clipped, and weights start orthogonal.
- On MuJoCo networks and rollouts are not the paper's, and observations, rewards and advantages are normalised.
- An episode that a time limit cuts did not end there, so its last state is bootstrapped (arXiv 1712.00378).

The upper half of this file is the method. The lower half is the same text in every script of this family.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

gym.register_envs(ale_py)


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # any registered environment; package:Env-v0 imports the package first
    seed: int = 1  # seed of weights, actions and environments
    total_timesteps: int = 200_000  # environment steps of the whole run, rounded down to whole batches
    learning_rate: float = 2e-3  # step size of the optimizer
    anneal_lr: bool = True  # let the step size fall linearly to zero
    num_envs: int = 8  # environments played side by side
    num_steps: int = 5  # steps per environment and update (the paper's t_max)
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # the paper's RMSprop, or Adam
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the generalized advantage estimate; 1 is the paper's n-step return
    norm_adv: bool = False  # standardise the advantages of each batch
    ent_coef: float = 0.0  # c2, weight of the entropy bonus
    vf_coef: float = 0.5  # c1, weight of half the squared value error
    max_grad_norm: float = 0.5  # bound on the gradient's global norm
    log_std_init: float = 0.0  # logarithm of the deviation that Gaussian policies start with
    norm_obs: bool = False  # normalise observations by their running mean and deviation
    norm_reward: bool = False  # divide rewards by the running deviation of the discounted return
    clip_reward: bool = False  # learn from the sign of the reward; reported returns stay raw
    log_interval: int = 100  # updates whose means make a row of progress.csv and a point in TensorBoard


# Where a family of environments departs from the defaults above; an explicit flag wins over both. "continuous" is
# classic control with real-valued actions.
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "classic": dict(),
    "continuous": dict(gamma=0.9, norm_obs=True, norm_reward=True),
    "box2d": dict(total_timesteps=1_000_000, num_envs=16),
    "mujoco": dict(total_timesteps=1_000_000, num_steps=64, optimizer="adam", learning_rate=3e-3, norm_adv=True,
                   log_interval=10, norm_obs=True, norm_reward=True),
    "atari": dict(total_timesteps=10_000_000, num_envs=16, optimizer="adam", learning_rate=5e-4, ent_coef=0.01,
                  clip_reward=True),
}
POSITIVE = ("total_timesteps", "learning_rate", "num_envs", "num_steps", "gamma", "max_grad_norm", "log_interval")
AT_MOST_ONE = ("gamma", "gae_lambda")
ANY_SIGN = ("log_std_init",)
# fmt: on


class Agent(nn.Module):
    """Actor, critic and normalisers for a pair of spaces. Observations come raw, (batch, *space.shape).

    Actor and critic have an MLP each. For images they share the convolutions if share_body, else they have their own.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: RunArgs, share_body: bool = True):
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.continuous = isinstance(action_space, gym.spaces.Box)
        self.image = is_image(observation_space)
        self.one_hot = isinstance(observation_space, gym.spaces.Discrete)
        self.obs_norm = RunningNorm(observation_space.shape) if args.norm_obs else None
        self.return_norm = RunningNorm(())
        if self.continuous:
            outputs = math.prod(action_space.shape)
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))
        else:
            self.choices, impossible = choices_of(action_space)
            self.register_buffer("impossible", impossible, persistent=False)
            outputs = math.prod(self.choices)
        self.body = nn.Identity()
        if self.image and share_body:
            self.body = NatureCNN(observation_space.shape, args.bf16 == "on")
            self.actor = layer_init(nn.Linear(512, outputs), 0.01)
            self.critic = layer_init(nn.Linear(512, 1), 1.0)
        elif self.image:
            shape, bf16 = observation_space.shape, args.bf16 == "on"
            self.actor = nn.Sequential(NatureCNN(shape, bf16), layer_init(nn.Linear(512, outputs), 0.01))
            self.critic = nn.Sequential(NatureCNN(shape, bf16), layer_init(nn.Linear(512, 1), 1.0))
        else:
            inputs = int(observation_space.n) if self.one_hot else math.prod(observation_space.shape)
            self.actor = MLP(inputs, outputs, 0.01)
            self.critic = MLP(inputs, 1, 1.0)

    @property
    def device(self) -> torch.device:
        return self.return_norm.count.device

    def features(self, obs: Tensor) -> Tensor:
        """What actor and critic see of raw observations."""
        if self.image:
            return self.body(obs)
        if self.one_hot:
            return F.one_hot(obs - int(self.observation_space.start), int(self.observation_space.n)).float()
        if self.obs_norm:
            obs = self.obs_norm(obs)
        return obs.flatten(1)

    def actor_head(self, features: Tensor) -> Tensor:
        """Means (batch, dims), or logits (batch, components, choices)."""
        if self.continuous:
            return self.actor(features)
        logits = self.actor(features).view(-1, *self.choices)
        return logits if self.impossible is None else logits.masked_fill(self.impossible, -1e9)

    def policy(self, features: Tensor) -> Policy:
        """pi(.|s)."""
        if self.continuous:
            return Gaussian(self.actor_head(features), self.log_std)
        return Categorical(self.actor_head(features))

    def value(self, features: Tensor) -> Tensor:
        """V(s), (batch,)."""
        return self.critic(features).squeeze(-1)

    def policy_parameters(self) -> list[nn.Parameter]:
        """All that pi depends on."""
        deviation = [self.log_std] if self.continuous else []
        return [*self.body.parameters(), *self.actor.parameters(), *deviation]


# ---------------------------------------------------------------------------------------------------- the method
class Batch(NamedTuple):
    """A rollout, flattened to (num_steps * num_envs, ...)."""

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor
    old_policy: Policy  # pi_old(.|s)


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    truncations: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimate (arXiv 1506.02438, eq. 16), and the returns advantages + values.

    All tensors are (num_steps, num_envs), and the flags belong to step t. next_values[t] is V of the true successor of
    step t: of the final observation where an episode ended, not of the one after the reset. A terminated state has no
    future. A truncated one has, so its TD error bootstraps. Neither passes on later errors, of another episode.
    """
    terminations = terminations.bool()
    ended = terminations | truncations.bool()
    successors = torch.where(terminations, 0.0, next_values)  # not a product, because 0 * NaN is NaN
    deltas = rewards + gamma * successors - values
    decay = gamma * gae_lambda * (~ended).to(deltas)
    advantages = [torch.zeros_like(deltas[0])]
    for delta, discount in zip(deltas.flip(0), decay.flip(0)):
        advantages.append(torch.addcmul(delta, discount, advantages[-1]))
    advantages = torch.stack(advantages[:0:-1])
    return advantages, advantages + values


def standardise(x: Tensor) -> Tensor:
    """(x - mean) / deviation. In double precision, because rounding must not make advantages of equal numbers."""
    return (x - x.mean()) / (x.std() + 1e-8)


def a2c_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above, and what to log of it."""
    features = agent.features(batch.obs)
    policy = agent.policy(features)
    values = agent.value(features)
    log_prob = policy.log_prob(batch.actions)
    advantages = standardise(batch.advantages) if args.norm_adv else batch.advantages
    assert values.shape == batch.returns.shape and log_prob.shape == advantages.shape

    policy_loss = -(log_prob * advantages).mean()
    value_loss = 0.5 * ((values - batch.returns) ** 2).mean()
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}


class RMSprop:
    """RMSprop (Hinton 2012) on one vector, as TensorFlow had it when A3C was published.

    eps stands inside the root and the mean square starts at one, so that the first steps are small. With torch's
    variant (outside, zero) A2C is less stable.
    """

    def __init__(self, parameters: Tensor, decay: float = 0.99, eps: float = 1e-5):
        self.parameters = parameters
        self.decay = decay
        self.eps = eps
        self.v = torch.ones_like(parameters)

    @torch.no_grad()
    def step(self, grad: Tensor, learning_rate: float) -> None:
        self.v.mul_(self.decay).addcmul_(grad, grad, value=1 - self.decay)
        self.parameters.addcdiv_(grad, (self.v + self.eps).sqrt_(), value=-learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.v.copy_(state["v"])


def make_gradient(agent: Agent, args: RunArgs) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """gradient(steps) -> (gradient (parameters,) clipped to max_grad_norm, what to log).

    The estimate is a part of the compiled graph, because outside of it would take longer than the gradient itself.
    """
    parameters = list(agent.parameters())

    def gradient(steps: Steps) -> tuple[Tensor, dict[str, Tensor]]:
        batch = estimate(agent, steps, args)
        loss, stats = a2c_loss(agent, batch, args)
        grad, norm = clip_norm(flat_grad(loss, parameters), args.max_grad_norm)
        stats |= {"grad_norm": norm, **value_variances(batch.returns, batch.values)}
        return grad, {name: value.detach() for name, value in stats.items()}

    def example() -> tuple[Steps]:
        return (example_steps(agent, args),)

    calls = args.total_timesteps // (args.num_envs * args.num_steps)
    return compile_for(example, gradient, args, calls > 12_000 and not agent.image)


@torch.no_grad()
def estimate(agent: Agent, steps: Steps, args: Args) -> Batch:
    """pi_old, V and advantages of the steps that were played, for all states at once."""
    features = features_of(agent, steps)
    values = agent.value(features).view(-1, args.num_envs)  # (num_steps + 1, num_envs)
    next_values = torch.where(steps.truncations, steps.final_values, values[1:])
    values = values[:-1]
    advantages, returns = compute_gae(
        steps.rewards, values, next_values, steps.terminations, steps.truncations, args.gamma, args.gae_lambda
    )
    old_policy = agent.policy(features)[: values.numel()]
    actions = steps.actions.flatten(0, 1)
    return Batch(
        obs=steps.observations[:-1].flatten(0, 1),
        actions=actions,
        logprobs=old_policy.log_prob(actions),
        advantages=advantages.flatten(),
        returns=returns.flatten(),
        values=values.flatten(),
        old_policy=old_policy,
    )


def update(optimizer: Adam | RMSprop, gradient: Callable, steps: Steps, learning_rate: float) -> dict[str, Tensor]:
    """One gradient step. Returns what to log."""
    grad, stats = gradient(steps)
    optimizer.step(grad, learning_rate)
    return stats


def check_batch(args: Args) -> None:
    """Raises UsageError where there is nothing to standardise an advantage by."""
    if args.norm_adv and args.num_envs * args.num_steps < 2:
        raise UsageError("--norm-adv needs a batch of 2 steps or more; use --num-steps 2, or --no-norm-adv.")


def train(args: RunArgs) -> Path:
    """Trains for total_timesteps, or goes on with the run args.resume. Returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = time.perf_counter()
    check_args(args)
    check_batch(args)
    envs = make_envs(args, args.num_envs)
    settle(args, envs)
    player = Player(envs, args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
    parameters = flatten_parameters(agent.parameters())
    optimizer = RMSprop(parameters) if args.optimizer == "rmsprop" else Adam(parameters)
    gradient = make_gradient(agent, args)

    batch_size = args.num_envs * args.num_steps
    total = args.total_timesteps // batch_size * batch_size
    interval = args.checkpoint_interval or max(math.ceil(2_000 / args.num_steps), math.ceil(total / batch_size / 20))
    with Run(args, total, started, interval, args.log_interval, agent=agent, optimizer=optimizer) as run:
        first = run.iteration + 1
        for iteration in run.iterations():
            if iteration == first or (iteration - 1) % interval == 0:
                player.restart(iteration)
            learning_rate = args.learning_rate * run.part_left() if args.anneal_lr else args.learning_rate
            steps = player.play(agent)
            stats = update(optimizer, gradient, steps, learning_rate)
            if agent.obs_norm:
                agent.obs_norm.update(steps.observations[:-1].flatten(0, 1))
            run.log(batch_size, player.finished, losses=stats, charts={"learning_rate": learning_rate})
    return run.path


# ==================================================================================================================
# The machine room. Each section below is the same text in every script that has it; tools/shared.py keeps it so.
# ==================================================================================================================


# ==== shared: run flags ====
@dataclass
class RunArgs(Args):
    """All arguments of the command line: those of the method and the environment, and those of the run."""

    exp_name: str = Path(globals().get("__file__", "notebook")).stem  # name of the experiment, a part of the run's name
    runs_dir: str = "runs"  # folder of all runs
    run_name: str = ""  # folder of this run in runs-dir (default: {env_id}__{exp_name}__{seed}__{time})
    resume: str = ""  # run directory to go on with, from its newest good checkpoint, with its own arguments
    evaluate: str = ""  # run directory, or one of its checkpoints, to load and play instead of training
    eval_episodes: int = 10  # episodes that --evaluate plays
    eval_seed: int = 1_000_000  # seed of environments and actions in --evaluate
    eval_stochastic: bool = False  # let --evaluate sample actions instead of taking the most likely ones
    capture_video: bool = False  # film the first environment of --evaluate, or of an evaluation after the training
    checkpoint_interval: int = 0  # iterations from a checkpoint to the next (0: about a twentieth of the run)
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "lineage"  # project of --track
    wandb_entity: str | None = None  # team of --track
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cpu for the MLP; for the CNN cuda, where there is one
    num_threads: int = 0  # CPU threads of torch and of the Atari emulators (0: one for the MLP, all cores for the CNN)
    compile: Literal["auto", "on", "off"] = "auto"  # compile the gradient (auto: MLP, in runs long enough to win)
    bf16: Literal["auto", "on", "off"] = "auto"  # run the CNN in bfloat16 (auto: where the processor multiplies it)


METRICS = ("charts/train_last100", "eval/episodic_return")  # of the HParams tab
PRESET = "env_id"  # the argument that picks a row of FAMILIES


def preset(env_id: str) -> dict[str, Any]:
    """The row of FAMILIES for an environment."""
    return FAMILIES[environment_family(env_id)]


# ==== shared: command line ====
class UsageError(Exception):
    """The configuration is wrong: one sentence, exit status 2, nothing created."""


class Failed(Exception):
    """A number is NaN or infinite (status "diverged"), or something raised ("failed"): exit status 1."""

    def __init__(self, message: str, status: str = "diverged"):
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """A signal ended the run after its iteration was saved: exit status 128 + signal."""

    status = "interrupted"


# What may differ from the run's own arguments when it is resumed or evaluated.
MACHINE = ("device", "num_threads", "compile")
HARMLESS = ("resume", "capture_video", "track", "wandb_project_name", "wandb_entity", *MACHINE)


def parse_args(argv: list[str] | None = None) -> RunArgs:
    """The command line, over the defaults of its preset. With --resume or --evaluate, over the arguments of the run."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = vars(RunArgs())[PRESET]
    peek.add_argument(f"--{PRESET.replace('_', '-')}", f"--{PRESET}", nargs="?", default=default, const=default)
    peek.add_argument("--resume", nargs="?", type=Path)
    peek.add_argument("--evaluate", nargs="?", type=Path)
    asked = vars(peek.parse_known_args(argv)[0])
    if asked["resume"] and asked["resume"].is_file():
        raise UsageError(f"--resume takes a run directory, here {run_dir_of(asked['resume'])}.")
    run = asked["resume"] or asked["evaluate"]
    if not run:
        return tyro.cli(RunArgs, args=argv, default=RunArgs(**{PRESET: asked[PRESET]} | preset(asked[PRESET])))
    saved = read_config(run)[0]
    args = tyro.cli(RunArgs, args=argv, default=saved)
    changed = [name for name, value in vars(saved).items() if value != vars(args)[name] and name not in HARMLESS]
    if asked["evaluate"]:
        changed = [name for name in changed if not name.startswith("eval")]
    if changed:
        difference = ", ".join(f"{name} {vars(saved)[name]!r} -> {vars(args)[name]!r}" for name in changed)
        goes_on = "--resume goes on with" if asked["resume"] else "--evaluate goes by"
        raise UsageError(f"{goes_on} the arguments of the run, and these differ: {difference}.")
    return args


def check_args(args: RunArgs) -> None:
    """Raises UsageError for the first number that cannot work, and says what would; and where --track cannot log."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and (must := bound_broken(name, number)):
                raise UsageError(f"--{name.replace('_', '-')} is {number}, but must be {must}.")
    if args.track and not args.evaluate and os.environ.get("WANDB_MODE", "online") == "online":
        check_login()


def bound_broken(name: str, number: float) -> str:
    """What an argument must be and is not, or ""."""
    if not math.isfinite(number):
        return "a finite number"
    if name in (*POSITIVE, "eval_episodes", "eval_prompts", "eval_interval") and number <= 0:
        return "greater than 0"
    if name in AT_MOST_ONE and number > 1:
        return "at most 1"
    if name not in ANY_SIGN and number < 0:
        return "0 or more"
    if name in ("seed", "eval_seed") and number >= 2**32:
        return "less than 2**32"
    return ""


def check_login() -> None:
    """Raises UsageError unless wandb can log in."""
    import wandb

    try:
        problem = "" if wandb.login(prompt=False) else "wandb is not logged in"
    except Exception as error:
        problem = f"wandb cannot log in ({one_line(error)})"
    if problem:
        raise UsageError(f"--track: {problem}; run wandb login, or set WANDB_MODE=offline.")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


# ==== shared: environments ====
def environment_family(env_id: str) -> str:
    """The row of FAMILIES for a registered id. Raises UsageError, with the near miss, for any other."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry_point = str(gym.spec(name).entry_point)
    except ImportError as error:
        raise UsageError(f"--env-id {env_id}: {error}; install it, or drop the prefix.") from None
    except gym.error.Error:
        near = (difflib.get_close_matches(name, gym.registry, n=1) or ["one of gymnasium.registry"])[0]
        raise UsageError(f"--env-id {env_id} is not registered in gymnasium; did you mean {near}?") from None
    families = {
        "ale_py": "atari",
        "gymnasium.envs.box2d": "box2d",
        "gymnasium.envs.mujoco": "mujoco",
        "gymnasium.envs.classic_control.pendulum": "continuous",
        "gymnasium.envs.classic_control.continuous_": "continuous",
    }
    return next((family for home, family in families.items() if entry_point.startswith(home)), "classic")


class Bare(gym.Wrapper):
    """An environment without its info, which is slow to merge, that says which one it is when it raises."""

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index = index

    def step(self, action: Any) -> tuple:
        try:
            obs, reward, terminated, truncated, _ = self.env.step(action)
        except Exception as error:
            raise Failed(f"environment {self.index} raised {error!r}", "failed") from error
        if terminated or truncated:
            obs = np.copy(obs)  # the reset that follows may reuse the array
        return obs, reward, terminated, truncated, {}

    def reset(self, **options: Any) -> tuple:
        try:
            return self.env.reset(**options)[0], {}
        except Exception as error:
            raise Failed(f"environment {self.index} raised {error!r}", "failed") from error


def make_envs(args: RunArgs, num_envs: int, **options: Any) -> gym.vector.VectorEnv:
    """The vector environment of a run. It resets in the step that ends an episode (SAME_STEP).

    Raises UsageError for a missing extra and for spaces that the networks cannot take.
    """
    if environment_family(args.env_id) == "atari":
        return make_atari(args, num_envs, **options)
    index = itertools.count()
    try:
        with warnings.catch_warnings():  # about versions that are out of date and bounds that are cast to float32
            warnings.simplefilter("ignore")
            envs = gym.make_vec(
                args.env_id,
                num_envs,
                vectorization_mode="sync",
                vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP, "copy": False},
                wrappers=[lambda env: Bare(env, next(index))],
                disable_env_checker=True,
                **options,
            )
    except Exception as error:  # an extra that is missing, or whatever a constructor raises
        raise UsageError(f"--env-id {args.env_id} cannot be made: {one_line(error)}") from None
    observations, actions = envs.single_observation_space, envs.single_action_space
    if not isinstance(observations, (gym.spaces.Box, gym.spaces.Discrete)):
        raise UsageError(f"--env-id {args.env_id} observes {observations}; Box and Discrete are supported.")
    if not isinstance(actions, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        raise UsageError(f"--env-id {args.env_id} acts in {actions}; Box, Discrete and MultiDiscrete are supported.")
    return envs


def make_atari(args: RunArgs, num_envs: int, **options: Any) -> gym.vector.VectorEnv:
    """ALE's own vector environment, with one of two protocols.

    ALE/<Game>-v5 has sticky actions and nothing else (Machado et al. 2018, arXiv 1709.06009). <Game>NoFrameskip-v4 is
    the PPO paper's: random no-ops, fire to start, and a lost life ends the episode for the learner, not the game.
    """
    paper = args.env_id.endswith("NoFrameskip-v4")
    game = "ALE/" + args.env_id.removeprefix("ALE/").removesuffix("-v5").removesuffix("NoFrameskip-v4") + "-v5"
    if (not paper and args.env_id != game) or "-ram" in game:
        raise UsageError(f"--env-id {args.env_id}: Atari games are ALE/<Game>-v5 or <Game>NoFrameskip-v4.")
    settings = {
        "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
        "num_threads": min(num_envs, args.num_threads or os.cpu_count() or 1),
        "repeat_action_probability": 0.0 if paper else 0.25,
        "noop_max": 30 if paper else 0,
        "use_fire_reset": paper,
        "life_loss_info": paper,
        "episodic_life": False,
        "reward_clipping": False,
        "frameskip": 4,
        "maxpool": True,
        "max_num_frames_per_episode": 108_000,
        "full_action_space": False,
    }
    return gym.make_vec(game, num_envs, **settings | options)


def reset_envs(envs: gym.vector.VectorEnv, seed: int, iteration: int) -> tuple[np.ndarray, dict]:
    """First observations and info; seeds come from (seed, iteration), so a resumed run starts as this one goes on."""
    seeds = np.random.SeedSequence([seed, iteration]).generate_state(envs.num_envs).astype(np.int64) % 2**31
    return envs.reset(seed=seeds.tolist() if isinstance(envs, gym.vector.SyncVectorEnv) else seeds)


def whole_games(ended: np.ndarray, info: dict, clock: np.ndarray | None) -> np.ndarray:
    """Which of ended (num_envs,) are whole games: ALE also ends at a lost life, but its clock only turns back after."""
    return ended if clock is None else ended & (info["episode_frame_number"] < clock)


def settle(args: RunArgs, envs: gym.vector.VectorEnv) -> None:
    """Decides what is "auto" for this network and machine, and sets threads and seeds.

    Raises UsageError for what cannot be.
    """
    batch = args.num_envs * args.num_steps
    if args.total_timesteps < batch:
        size = f"{args.num_envs} x {args.num_steps} = {batch}"
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} is less than one batch, {size}; ask for {batch} or more."
        )
    image = is_image(envs.single_observation_space)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    if args.norm_obs and (image or not isinstance(envs.single_observation_space, gym.spaces.Box)):
        raise UsageError(f"--norm-obs is for vector observations, not those of {args.env_id}; use --no-norm-obs.")
    if args.capture_video and importlib.util.find_spec("moviepy") is None:
        raise UsageError("--capture-video needs moviepy; install it with: pip install moviepy")
    if args.device == "auto":
        args.device = "cuda" if image and torch.cuda.is_available() else "cpu"
    if args.bf16 == "auto":
        if args.device == "cpu":
            native = torch.cpu.get_capabilities().get("avx512_bf16", False)
        else:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        args.bf16 = "on" if image and native else "off"
    if not args.num_threads:
        args.num_threads = (os.cpu_count() or 1) if image else 1
    torch.set_num_threads(args.num_threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)


# ==== shared: networks and policies ====
class RunningNorm(nn.Module):
    """Mean and variance of all that was seen, merged batch by batch (Chan et al. 1979), as buffers."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # mean and 1 / deviation in float32, for the forward pass
        self.register_buffer("scale", torch.ones(shape))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Takes in x (rows, *shape)."""
        x = x.double()
        total = self.count + len(x)
        delta = x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.shift) * self.scale).clamp(-10.0, 10.0)


class Categorical:
    """Policy over (Multi)Discrete actions: logits (batch, components, choices), actions (batch, components)."""

    def __init__(self, logits: Tensor):
        self.log_probs = F.log_softmax(logits, dim=-1)

    def __getitem__(self, rows: Tensor | slice) -> Categorical:
        return Categorical(self.log_probs[rows])

    def detach(self) -> Categorical:
        return Categorical(self.log_probs.detach())

    def log_prob(self, actions: Tensor) -> Tensor:
        return self.log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum((-2, -1))

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other), (batch,)."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum((-2, -1))


class Gaussian:
    """Policy over Box actions: mean and actions (batch, dims), with a deviation that no state changes."""

    def __init__(self, mean: Tensor, log_std: Tensor):
        self.mean = mean
        self.log_std = log_std.expand_as(mean).clone()  # a copy, because an optimizer changes log_std in place

    def __getitem__(self, rows: Tensor | slice) -> Gaussian:
        return Gaussian(self.mean[rows], self.log_std[rows])

    def detach(self) -> Gaussian:
        return Gaussian(self.mean.detach(), self.log_std.detach())

    def log_prob(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other), (batch,)."""
        z2 = ((2 * self.log_std).exp() + (self.mean - other.mean) ** 2) * (-2 * other.log_std).exp()
        return (other.log_std - self.log_std + 0.5 * z2 - 0.5).sum(-1)


Policy = Categorical | Gaussian


def layer_init(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Linear | nn.Conv2d:
    """Orthogonal weights and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Two hidden layers of 64 tanh."""

    def __init__(self, inputs: int, outputs: int, gain: float):
        super().__init__()
        self.first = layer_init(nn.Linear(inputs, 64))
        self.second = layer_init(nn.Linear(64, 64))
        self.last = layer_init(nn.Linear(64, outputs), gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class NatureCNN(nn.Module):
    """Bytes (batch, *shape) to 512 features, by three convolutions (Mnih et al. 2015). Channels come first or last."""

    def __init__(self, shape: tuple[int, ...], bf16: bool):
        super().__init__()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.channels_last = shape[2] < shape[0]
        channels, height, width = (shape[2], *shape[:2]) if self.channels_last else shape
        layers = [layer_init(nn.Conv2d(channels, 32, 8, stride=4)), nn.ReLU()]
        layers += [layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU()]
        layers += [layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten()]
        size = nn.Sequential(*layers)(torch.zeros(1, channels, height, width)).shape[1]
        self.layers = nn.Sequential(*layers, layer_init(nn.Linear(size, 512)), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.layers(x.to(self.dtype) / 255).float()


def is_image(space: gym.Space) -> bool:
    """Bytes in three dimensions, two of them large enough for the convolutions."""
    return space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


def choices_of(space: gym.spaces.Discrete | gym.spaces.MultiDiscrete) -> tuple[tuple[int, int], Tensor | None]:
    """(components, most choices of a component), and which of these choices a component lacks, if any."""
    nvec = torch.tensor(space.nvec if isinstance(space, gym.spaces.MultiDiscrete) else space.n).flatten()
    most = int(nvec.max())
    lacking = torch.arange(most) >= nvec.unsqueeze(-1)
    return (len(nvec), most), lacking if lacking.any() else None


# ==== shared: acting ====
class Episode(NamedTuple):
    """A finished training episode."""

    step: int  # environment steps from the beginning of the rollout to its end
    episodic_return: float  # raw
    length: int
    env: int


def obs_dtype(space: gym.Space) -> torch.dtype:
    """What raw observations are stored as."""
    if is_image(space):
        return torch.uint8
    return torch.int64 if isinstance(space, gym.spaces.Discrete) else torch.float32


def example_obs(agent: Agent, *batch: int) -> Tensor:
    """Valid observations (*batch, *space.shape), to try or compile something on."""
    space = agent.observation_space
    start = int(space.start) if agent.one_hot else 0
    return torch.full((*batch, *space.shape), start, dtype=obs_dtype(space), device=agent.device)


def action_noise(agent: Agent, *batch: int) -> Tensor:
    """What makes actions random: normal noise of the policy's deviation, or Gumbel noise for logits."""
    if agent.continuous:
        return torch.randn(*batch, len(agent.log_std), device=agent.device) * agent.log_std.exp()
    return -torch.empty(*batch, *agent.choices, device=agent.device).exponential_().log_()


def act(agent: Agent, features: Tensor, noise: Tensor) -> Tensor:
    """A sample of the policy, (batch, dims or components). It is the mode where the noise is zero."""
    noisy = agent.actor_head(features) + noise
    return noisy if agent.continuous else noisy.argmax(-1)


def numpy_actor(agent: Agent) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """act(agent, features(obs), noise) in numpy, for an MLP on the CPU. None where there is no such shortcut.

    It takes a quarter of the time of torch for a few rows. Weights and normaliser are read in place.
    """
    if agent.image or agent.one_hot or agent.device.type != "cpu" or getattr(agent, "impossible", None) is not None:
        return None
    layers = [agent.actor.first, agent.actor.second, agent.actor.last]
    (w1, b1), (w2, b2), (w3, b3) = ((x.weight.detach().numpy().T, x.bias.detach().numpy()) for x in layers)
    norm = agent.obs_norm
    shift, scale = (norm.shift.numpy(), norm.scale.numpy()) if norm else (0.0, 1.0)

    def actor(x: np.ndarray, noise: np.ndarray) -> np.ndarray:
        if norm:
            x = np.minimum(np.maximum((x - shift) * scale, -10.0), 10.0)
        x = np.tanh(x.reshape(len(x), -1) @ w1 + b1)
        x = np.tanh(x @ w2 + b2)
        noisy = (x @ w3 + b3).reshape(noise.shape) + noise
        return noisy if agent.continuous else noisy.argmax(-1)

    return actor


def to_env(space: gym.Space, actions: np.ndarray) -> np.ndarray:
    """Actions (batch, ...) as environments take them. What lies outside of the box is clipped only here."""
    actions = actions.reshape(-1, *space.shape)
    if isinstance(space, gym.spaces.Box):
        return np.minimum(np.maximum(actions, space.low), space.high)
    return actions + space.start


def check_finite(observations: Tensor, rewards: np.ndarray) -> None:
    """Raises Failed for the first NaN or infinity in observations or rewards, (steps, num_envs, ...)."""
    for name, x in (("observation", observations), ("reward", torch.from_numpy(rewards))):
        if x.is_floating_point() and not x.isfinite().all():
            step, env = (~x.isfinite()).nonzero()[0, :2].tolist()
            raise Failed(f"the {name} of environment {env} in step {step} of the rollout is NaN or infinite")


def scale_rewards(
    norm: RunningNorm, rewards: np.ndarray, ended: np.ndarray, running: np.ndarray, gamma: float
) -> np.ndarray:
    """Rewards over the deviation of the discounted return, which norm takes in. running (num_envs,) is carried on."""
    returns = np.empty_like(rewards)
    for t in range(len(rewards)):
        running[:] = running * gamma + rewards[t]
        returns[t] = running
        running[ended[t]] = 0.0
    norm.update(torch.from_numpy(returns).flatten().to(norm.count.device))
    return (rewards * norm.scale.item()).clip(-10.0, 10.0)


def values_at(agent: Agent, final_obs: dict[tuple[int, int], np.ndarray], shape: tuple[int, int]) -> Tensor:
    """V of the last observation where an episode was truncated, and zero elsewhere, (num_steps, num_envs)."""
    values = torch.zeros(shape, device=agent.device)
    if final_obs:
        obs = torch.from_numpy(np.stack(list(final_obs.values()))).to(agent.device, obs_dtype(agent.observation_space))
        values[tuple(zip(*final_obs))] = agent.value(agent.features(obs))
    return values


# ==== shared: playing ====
class Steps(NamedTuple):
    """What was played, (num_steps, num_envs, ...) and on the agent's device. Flags belong to step t, after it."""

    observations: Tensor  # one more than steps: also what came after the last one
    features: Tensor | None  # of all steps, flattened, where acting has computed them in torch
    actions: Tensor
    rewards: Tensor  # as the method learns from them
    terminations: Tensor
    truncations: Tensor
    final_values: Tensor  # V of the last observation where an episode was truncated, zero elsewhere


class Player:
    """Plays the environments of a run, and owns what goes on from one rollout to the next."""

    def __init__(self, envs: gym.vector.VectorEnv, args: RunArgs):
        self.envs = envs
        self.args = args
        self.finished: list[Episode] = []  # in the last rollout

    def restart(self, iteration: int) -> None:
        self.obs, self.info = reset_envs(self.envs, self.args.seed, iteration)
        self.returns = np.zeros(self.envs.num_envs)
        self.lengths = np.zeros(self.envs.num_envs, dtype=np.int64)
        self.discounted = np.zeros(self.envs.num_envs)

    @torch.no_grad()
    def play(self, agent: Agent) -> Steps:
        """Plays num_steps steps on in every environment."""
        num_steps, num_envs = shape = self.args.num_steps, self.envs.num_envs
        dtype = obs_dtype(agent.observation_space)
        observations = torch.empty((num_steps + 1, *self.obs.shape), dtype=dtype, device=agent.device)
        noise = action_noise(agent, num_steps, num_envs)
        actions = np.zeros(noise.shape[:3], dtype=np.float32 if agent.continuous else np.int64)
        rewards = np.zeros(shape)
        terminations, truncations, finished = np.zeros((3, *shape), dtype=bool)
        features: list[Tensor] = []
        final_obs: dict[tuple[int, int], np.ndarray] = {}
        actor = numpy_actor(agent)
        if actor:
            observations_in_numpy, noise = observations.numpy(), noise.numpy()
        for t in range(num_steps):
            if actor:
                observations_in_numpy[t] = self.obs
                actions[t] = actor(observations_in_numpy[t], noise[t])
            else:
                observations[t].copy_(torch.from_numpy(self.obs))
                features.append(agent.features(observations[t]))
                actions[t] = act(agent, features[t], noise[t]).cpu().numpy()
            clock = self.info.get("episode_frame_number")
            try:
                step = self.envs.step(to_env(agent.action_space, actions[t]))
            except Failed as error:
                check_finite(observations[: t + 1], rewards[:t])
                raise Failed(f"{error} in step {t} of the rollout", error.status) from error
            self.obs, rewards[t], terminations[t], truncations[t], self.info = step
            if "final_obs" in self.info:
                finished[t] = whole_games(terminations[t] | truncations[t], self.info, clock)
                for n in np.flatnonzero(truncations[t] & ~terminations[t]):
                    final_obs[t, n] = self.info["final_obs"][n]
                    if dtype == torch.float32 and not np.isfinite(final_obs[t, n]).all():
                        where = f"environment {n} in step {t} of the rollout"
                        raise Failed(f"the last observation of {where} is NaN or infinite")
        observations[-1].copy_(torch.from_numpy(self.obs))
        check_finite(observations, rewards)
        self.finished = self.collect(rewards, finished)
        if self.args.clip_reward:
            rewards = np.sign(rewards)
        if self.args.norm_reward:
            ended = terminations | truncations
            rewards = scale_rewards(agent.return_norm, rewards, ended, self.discounted, self.args.gamma)
        return Steps(
            observations=observations,
            features=torch.cat(features) if features else None,
            actions=torch.from_numpy(actions).to(agent.device),
            rewards=torch.from_numpy(rewards.astype(np.float32)).to(agent.device),
            terminations=torch.from_numpy(terminations).to(agent.device),
            truncations=torch.from_numpy(truncations).to(agent.device),
            final_values=values_at(agent, final_obs, shape),
        )

    def collect(self, rewards: np.ndarray, finished: np.ndarray) -> list[Episode]:
        """The episodes that finished; rewards and flags are (num_steps, num_envs). What goes on is counted."""
        num_steps, num_envs = rewards.shape
        episodes = []
        begin = np.zeros(num_envs, dtype=np.int64)
        for t, n in np.argwhere(finished):
            total = self.returns[n] + rewards[begin[n] : t + 1, n].sum()
            length = self.lengths[n] + t + 1 - begin[n]
            episodes.append(Episode((int(t) + 1) * num_envs, float(total), int(length), int(n)))
            self.returns[n] = 0.0
            self.lengths[n] = 0
            begin[n] = t + 1
        self.returns += [rewards[begin[n] :, n].sum() for n in range(num_envs)]
        self.lengths += num_steps - begin
        return episodes


def features_of(agent: Agent, steps: Steps) -> Tensor:
    """What actor and critic see of all num_steps + 1 observations, flattened."""
    if steps.features is None:
        return agent.features(steps.observations.flatten(0, 1))
    return torch.cat([steps.features, agent.features(steps.observations[-1])])


def example_steps(agent: Agent, args: RunArgs) -> Steps:
    """Steps of the right shapes, to compile something for them."""
    shape = (args.num_steps, args.num_envs)
    zeros = torch.zeros(shape, device=agent.device)
    observations = example_obs(agent, args.num_steps + 1, args.num_envs)
    with torch.no_grad():
        features = agent.features(observations[:-1].flatten(0, 1))
        actions = act(agent, features, torch.zeros((), device=agent.device)).unflatten(0, shape)
    never = torch.zeros(shape, dtype=torch.bool, device=agent.device)
    acted_in_torch = numpy_actor(agent) is None
    # Clones, because a tensor that is given twice would be compiled as one input.
    return Steps(
        observations, features if acted_in_torch else None, actions, zeros, never, never.clone(), zeros.clone()
    )


# ==== shared: optimising ====
def flatten_parameters(parameters: Iterable[nn.Parameter]) -> Tensor:
    """One vector of which all parameters become views: clipping and a step are then a handful of operations."""
    parameters = list(parameters)
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector, parameters)
    return vector


def flat_grad(output: Tensor, parameters: list[nn.Parameter], **options: bool) -> Tensor:
    """The gradient of a number as one vector."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(output, parameters, **options)])


def clip_norm(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient, shrunk to max_norm where it is longer, and its norm."""
    norm = grad.norm()
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


class Adam:
    """Adam (arXiv 1412.6980) on one vector: torch.optim.Adam needs three times as long for so few numbers."""

    def __init__(self, parameters: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-5):
        self.parameters = parameters
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.t = 0
        self.m = torch.zeros_like(parameters)
        self.v = torch.zeros_like(parameters)

    @torch.no_grad()
    def step(self, grad: Tensor, learning_rate: float) -> None:
        self.t += 1
        self.m.lerp_(grad, 1 - self.beta1)
        self.v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        deviation = (self.v / (1 - self.beta2**self.t)).sqrt_().add_(self.eps)
        self.parameters.addcdiv_(self.m, deviation, value=-learning_rate / (1 - self.beta1**self.t))

    def state_dict(self) -> dict[str, Any]:
        return {"m": self.m, "v": self.v, "t": self.t}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.m.copy_(state["m"])
        self.v.copy_(state["v"])
        self.t = state["t"]


def compile_for(example: Callable[[], tuple], function: Callable, args: RunArgs, worth_it: bool) -> Callable:
    """function as one graph for arguments of the shapes of example(), or function itself if args.compile is "off".

    Decides args.compile = "auto". Raises UsageError where "on" was asked for and fails.
    """
    asked = args.compile
    if asked == "auto":
        args.compile = "on" if worth_it and args.device == "cpu" else "off"
    if args.compile == "off":
        return function
    # Every call has the same shapes, so the checks before each are left out, a seventh of its time. The code object is
    # copied because what was compiled belongs to it, and another agent in this process must not be given ours.
    function.__code__ = function.__code__.replace()
    torch._dynamo.config.trace_autograd_ops = True  # loss, gradient and clipping in one graph
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    with torch.random.fork_rng(devices=[]):  # compiling, or not, must not change the run
        try:  # now rather than in the first iteration
            compiled(*example())
            return compiled
        except Exception as error:  # no compiler, no headers, ...
            if asked == "on":
                reason = one_line(error)[:200]
                raise UsageError(f"--compile on fails here ({reason}); use --compile off.") from None
    print("torch cannot compile here (is there a C++ compiler?), so updates take three times as long.")
    args.compile = "off"
    return function


def mean_of(stats: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each statistic over minibatches."""
    return {name: torch.stack([one[name] for one in stats]).mean() for name in stats[0]}


def value_variances(returns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """What Run.log makes the explained variance of, 1 - Var[R - V] / Var[R]."""
    return {"returns_variance": returns.var(correction=0), "residual_variance": (returns - values).var(correction=0)}


# ==== shared: run directory ====
def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary neighbour, then puts it in the place of path: there is always the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def run_dir_of(path: Path) -> Path:
    """The run directory that path is, or that the checkpoint path belongs to."""
    return path.parent.parent if path.is_file() else path


def read_config(path: Path) -> tuple[RunArgs, dict[str, Any]]:
    """The arguments of a run, and all of its config.json. Raises UsageError where there is no such file."""
    try:
        config = json.loads((run_dir_of(path) / "config.json").read_text(encoding="utf-8"))
        return RunArgs(**config["args"]), config
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} is no run directory of this script: it has no config.json with its arguments."
        ) from None


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of a run directory; {} while there is none, or none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError):
        return {}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "gymnasium", "numpy", "mujoco", "ale-py"):
        if importlib.util.find_spec(name.replace("-", "_")):
            found[name] = importlib.metadata.version(name)
    return found


def git(*command: str) -> str | None:
    """What git says in the folder of this file; None where there is no git or no repository."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def create_run_dir(args: RunArgs) -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json."""
    parts = (vars(args).get("env_id"), args.exp_name, args.seed, time.strftime("%Y%m%d-%H%M%S"))
    name = args.run_name or "__".join(str(part) for part in parts if part is not None)
    path = first = Path(args.runs_dir) / name.replace("/", "-").replace(":", "-")
    while True:
        try:
            path.mkdir(parents=True)
            break
        except OSError as error:
            if not path.exists():
                raise UsageError(f"{path} cannot be made ({error.strerror}); choose another --runs-dir.") from None
            if args.run_name:
                raise UsageError(f"{path} exists; choose another --run-name, or go on with --resume {path}.") from None
            path = first.with_name(f"{first.name}-{uuid.uuid4().hex[:4]}")
    (path / "checkpoints").mkdir()
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    changes = git("status", "--porcelain")
    config = {
        "args": asdict(args),
        "command": [sys.executable, *sys.argv],
        "seed": args.seed,
        "versions": versions(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "threads": args.num_threads,
        "wandb_id": uuid.uuid4().hex[:8],
    }
    write_json(path / "config.json", config)
    return path


class Log:
    """episodes.csv and progress.csv of a run, and their views in TensorBoard and Weights & Biases."""

    def __init__(self, path: Path, args: RunArgs, resumed_at: int | None, sizes: dict[str, int]):
        self.path = path
        self.waiting: list[tuple[str, float, int]] = []  # for TensorBoard
        self.handed_over = 0.0
        self.first_row: dict[str, Any] = {}  # of step 0, which has not all columns
        self.files = {name: open(path / f"{name}.csv", "a+", newline="", encoding="utf-8") for name in sizes}
        for name, file in self.files.items():
            file.truncate(sizes[name])  # what came after the checkpoint will come again
        self.files["progress"].seek(0)
        self.columns = next(csv.reader(self.files["progress"]), None)
        if resumed_at is None:
            self.write("episodes", [["global_step", "wall_time", "return", "length"]])
        self.tensorboard = SummaryWriter(path, purge_step=None if resumed_at is None else resumed_at + 1)
        arguments = {field.name: vars(args)[field.name] for field in fields(Args)}  # of the method and environment
        if resumed_at is None:
            self.text("hyperparameters", [("name", "value"), *vars(args).items()], 0)
            plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in arguments.items()}
            for summary in hparams(plain, dict.fromkeys(METRICS, 0.0)):
                self.tensorboard.file_writer.add_summary(summary)
        self.wandb = None
        if args.track:
            import wandb

            self.wandb = wandb.init(
                id=read_config(path)[1]["wandb_id"],
                resume="allow",
                config=arguments,
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                name=path.name,
                dir=path,
            )

    def write(self, name: str, rows: list) -> None:
        csv.writer(self.files[name]).writerows(rows)
        self.files[name].flush()

    def row(self, step: int, columns: dict[str, Any], values: dict[str, float]) -> None:
        """A row of progress.csv; the values go to TensorBoard and wandb, too."""
        row = columns | {tag: "" if math.isnan(value) else value for tag, value in values.items()}
        if not self.columns and not step:
            self.first_row = row
        elif not self.columns:
            self.columns = list(row | self.first_row)
            first = [[self.first_row.get(column, "") for column in self.columns]] if self.first_row else []
            self.write("progress", [self.columns, *first])
        if step:
            self.write("progress", [[row.get(column, "") for column in self.columns]])
        values = {tag: value for tag, value in values.items() if not math.isnan(value)}
        self.waiting += [(tag, value, step) for tag, value in values.items()]
        if time.perf_counter() - self.handed_over > 2.0:  # not more often: its thread gets in the way of this one
            self.hand_over()
        if self.wandb and (not step or step > self.wandb.step):  # it refuses what a killed run has sent already
            self.wandb.log(values, step=step)

    def text(self, tag: str, table: list[Any], step: int) -> None:
        """A table, its head first, as text in TensorBoard."""
        head, *rows = ["|".join(str(cell) for cell in row) for row in table]
        lines = [head, "|".join("-" for _ in table[0]), *rows]
        self.tensorboard.add_text(tag, "".join(f"|{line}|\n" for line in lines), step)

    def hand_over(self) -> None:
        """Gives TensorBoard what is waiting."""
        for scalar in self.waiting:
            self.tensorboard.add_scalar(*scalar)
        self.tensorboard.flush()
        self.waiting = []
        self.handed_over = time.perf_counter()

    def sync(self) -> dict[str, int]:
        """Puts all on the disk; returns the sizes of the files."""
        self.hand_over()
        for file in self.files.values():
            os.fsync(file.fileno())
        return {name: (self.path / f"{name}.csv").stat().st_size for name in self.files}

    def close(self) -> None:
        self.hand_over()
        for file in (*self.files.values(), self.tensorboard):
            file.close()


class Progress:
    """One line that renews itself on a terminal; a line every five seconds elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.printed = 0.0
        self.open = False  # the line may be renewed

    def show(self, line: str, done: int, total: int) -> None:
        part = min(done / total, 1.0)
        if time.perf_counter() - self.printed < (0.1 if self.terminal else 5.0) and part < 1:
            return
        self.printed = time.perf_counter()
        self.open = self.terminal and part < 1
        line = f"{done:>11,} {line}"
        if self.terminal:
            line = f"\r[{'#' * int(10 * part):.<10}]{line}\x1b[K"
        print(line, end="" if self.open else "\n", flush=True)

    def end(self) -> None:
        """What follows is printed on a line of its own."""
        if self.open:
            print()
        self.open = False


class Run:
    """What a run is: its directory, iterations, checkpoints, signals, and how it ends.

    learner is what a checkpoint holds, by name: tensors, and whatever has a state_dict. A step is what total counts.
    """

    def __init__(
        self,
        args: RunArgs,
        total: int,
        started: float,
        interval: int = 0,
        log_interval: int = 1,
        unit: str = "steps",
        **learner,
    ):
        self.args = args
        self.total = total
        self.started = started
        self.interval = interval
        self.log_interval = log_interval
        self.unit = unit
        self.learner = learner
        self.iteration = 0
        self.global_step = 0
        self.earlier_time = 0.0  # seconds of training in earlier sessions
        self.last_returns: list[float] = []  # of the last 100 training episodes
        self.best = -math.inf
        self.notes: dict[str, Any] = {}  # what else summary.json tells
        self.headline = ""  # what else the progress line tells
        self.gathered: list[dict[str, float]] = []  # values of the iterations since the last row
        self.episodes: list[tuple[float, int]] = []  # return and length of those that ended since the last row
        self.signals: list[int] = []
        self.progress = Progress()
        self.complete = False
        sizes = {"episodes": 0, "progress": 0}
        if args.resume:
            self.path = Path(args.resume)
            state = load_checkpoint(self.path)
            self.restore(state)
            self.complete = self.global_step >= total and read_summary(self.path).get("status") == "completed"
            sizes = state["csv_bytes"]
        else:
            self.path = create_run_dir(args)
        self.first_step = self.global_step
        if self.complete:
            print(f"{self.path} is complete; there is nothing left to train.")
            return
        self.log_files = Log(self.path, args, self.global_step if args.resume else None, sizes)
        machine = f"{args.device}, threads: {args.num_threads}"
        if vars(args).get("compile") == "on":
            machine += ", compiled"
        print(f"{self.path} ({machine})")
        if args.resume:
            print(f"goes on from step {self.global_step:,}, {self.how_exactly(state)}")
        self.start_clock()

    def start_clock(self) -> None:
        """Training begins here; what was before is start-up."""
        self.begun = time.perf_counter()
        self.startup_time = self.begun - self.started

    def restore(self, state: dict[str, Any]) -> None:
        """Puts back what save has written."""
        for name, part in self.learner.items():
            if isinstance(part, Tensor):
                part.copy_(state[name])
            else:
                part.load_state_dict(state[name])
        for name in ("iteration", "global_step", "last_returns", "best", "notes"):
            setattr(self, name, state[name])
        self.earlier_time = state["wall_time"]
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and self.args.device == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        np.random.set_state(tuple(state["numpy_rng"]))
        version, keys, gauss = state["python_rng"]
        random.setstate((version, tuple(keys), gauss))

    def how_exactly(self, state: dict[str, Any]) -> str:
        saved, here = vars(read_config(self.path)[0]), vars(self.args)
        same = all(saved.get(name) == here.get(name) for name in ("device", "compile", "num_threads"))
        if same and here["device"] == "cpu" and state["exact"] and state["versions"] == versions():
            return "exactly as if it had never stopped"
        return "validly, but not bit for bit as without the stop"

    def __enter__(self) -> Run:
        def remember(signum: int, frame: Any) -> None:
            if self.signals:
                os._exit(128 + signum)  # a second signal does not wait for the iteration
            self.signals.append(signum)

        self.handlers = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
        if not self.args.resume:
            self.save(True)
        return self

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are left. After each comes what is due: a row, a checkpoint, the end."""
        while self.global_step < self.total and not self.complete:
            self.iteration += 1
            before = self.global_step
            yield self.iteration
            last, stop = self.global_step >= self.total, bool(self.signals)
            due = last or stop or self.checkpoint_is_due(before)
            if due or self.iteration % self.log_interval == 0:
                self.write_row()
            if due:
                self.save(self.checkpoint_is_due(before) or last)
            if stop and not last:
                raise Stopped(self.signals[0])

    def checkpoint_is_due(self, step_before: int) -> bool:
        if self.args.checkpoint_interval:
            return self.iteration % self.args.checkpoint_interval == 0
        if self.interval:
            return self.iteration % self.interval == 0
        return 20 * self.global_step // self.total > 20 * step_before // self.total

    def part_left(self) -> float:
        """The part of the budget that is left, from 1 to 0."""
        return 1 - self.global_step / self.total

    def log(self, steps: int, episodes: list, values: dict[str, Any] | None = None, **groups: dict[str, Any]) -> None:
        """Takes in an iteration: its steps, episodes (step, return, length, ...), and values by their tags.

        A group of values gets its name before theirs. Raises Failed for the first value that is not finite.
        """
        tagged = dict(values or {})
        for group, members in groups.items():
            tagged |= {f"{group}/{name}": value for name, value in members.items()}
        numbers = dict(zip(tagged, torch.stack([torch.as_tensor(x).float() for x in tagged.values()]).tolist()))
        for tag, value in numbers.items():
            if not math.isfinite(value):
                raise Failed(f"{tag.removeprefix('losses/')} is {value}")
        self.gathered.append(numbers)
        now = f"{self.wall_time():.3f}"
        self.log_files.write("episodes", [[self.global_step + step, now, *rest[:2]] for step, *rest in episodes])
        self.episodes += [(rest[0], rest[1]) for _, *rest in episodes]
        self.last_returns = (self.last_returns + [rest[0] for _, *rest in episodes])[-100:]
        self.global_step += steps

    def write_row(self) -> None:
        """A row of progress.csv, with the means over the iterations since the last one."""
        means = {tag: float(np.mean([values[tag] for values in self.gathered])) for tag in self.gathered[-1]}
        if "losses/returns_variance" in means:
            variance = means.pop("losses/returns_variance")
            residual = means.pop("losses/residual_variance")
            means["losses/explained_variance"] = 1 - residual / variance if variance else math.nan
        returns, lengths = np.mean(self.episodes, 0).tolist() if self.episodes else (math.nan, math.nan)
        score = self.score()
        values = {
            "charts/episodic_return": returns,
            "charts/episodic_length": lengths,
            "charts/train_last100": math.nan if score is None else score,
            "charts/SPS": self.sps(),
        }
        columns = {"global_step": self.global_step, "wall_time": f"{self.wall_time():.3f}", "sps": self.sps()}
        columns["sps"] = values["charts/SPS"]
        self.log_files.row(self.global_step, columns, values | means)
        self.gathered = []
        self.episodes = []
        self.show_progress()

    def show_progress(self) -> None:
        seconds = int(max(self.total - self.global_step, 0) / max(self.sps(), 1e-9))
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        score = "-" if self.score() is None else f"{self.score():,.1f}"
        part = min(self.global_step / self.total, 1.0)
        line = f"{self.unit} {part:4.0%} {self.sps():>7,.0f}/s  return {score:>9}  {left}{self.headline}"
        self.progress.show(line, self.global_step, self.total)

    def score(self) -> float | None:
        """Mean return of the last 100 training episodes."""
        return float(np.mean(self.last_returns)) if self.last_returns else None

    def wall_time(self) -> float:
        """Seconds of training, with earlier sessions, without start-up and compilation."""
        return self.earlier_time + time.perf_counter() - self.begun

    def sps(self) -> float:
        """Steps per second of this session, or of those before it where this one had nothing left to train."""
        if self.first_step >= self.total:
            return self.first_step / self.earlier_time
        return (self.global_step - self.first_step) / (time.perf_counter() - self.begun)

    def save(self, exact: bool) -> None:
        """Writes checkpoints/step_*.pt, of which two stay, and best.pt where the last 100 episodes were the best."""
        better = self.score() is not None and self.score() > self.best
        if better:
            self.best = self.score()
        kind, keys, *position = np.random.get_state()
        state = {name: part if isinstance(part, Tensor) else part.state_dict() for name, part in self.learner.items()}
        state |= {
            "exact": exact,
            "csv_bytes": self.log_files.sync(),
            "iteration": self.iteration,
            "global_step": self.global_step,
            "wall_time": self.wall_time(),
            "last_returns": self.last_returns,
            "best": self.best,
            "notes": self.notes,
            "total": self.total,
            "versions": versions(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.args.device == "cuda" else [],
            "numpy_rng": [kind, keys.tolist(), *position],
            "python_rng": random.getstate(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        folder = self.path / "checkpoints"
        if better:  # first, because the other one says that it is done
            write_atomically(folder / "best.pt", buffer.getbuffer())
        write_atomically(folder / f"step_{self.global_step:012}.pt", buffer.getbuffer())
        for old in sorted(folder.glob("step_*.pt"))[:-2]:
            old.unlink()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        """Writes summary.json. Of an error it says when it happened and where the run can go on."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if self.complete:
            return
        self.progress.end()
        status = getattr(error, "status", "failed") if error else "completed"
        message = ""
        if status in ("diverged", "failed"):
            newest = max((self.path / "checkpoints").glob("step_*.pt"), default="none")
            message = f"iteration {self.iteration}: {error}; the last good checkpoint is {newest}."
        try:
            write_json(self.path / "summary.json", self.summary(status, message))
            self.log_files.close()
        except OSError:  # a full disk again
            if not error:
                raise
        if self.log_files.wandb:
            self.log_files.wandb.finish(exit_code=int(status != "completed"))
        if isinstance(error, (Failed, OSError)):
            raise Failed(message, status) from error
        print(f"{status} after {self.global_step:,} {self.unit}{self.headline}: {self.path}")

    def summary(self, status: str, message: str) -> dict[str, Any]:
        """What summary.json tells. The evaluations that are there stay."""
        unit = 2**20 if sys.platform == "darwin" else 2**10
        summary = {
            "status": status,
            "global_step": self.global_step,
            "wall_time": self.wall_time(),
            "sps": self.sps(),
            "startup_time": self.startup_time,
            "train_last100": self.score(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            **self.notes,
        }
        if evaluations := read_summary(self.path).get("eval"):
            summary["eval"] = evaluations
        if message:
            summary["error"] = message
        return summary


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The newest good checkpoint of a run directory, or the file given; a corrupt one is named, none starts afresh."""
    for file in [path] if path.is_file() else sorted((path / "checkpoints").glob("step_*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch does not look at the checksums
                    raise ValueError(f"{damaged} has a wrong checksum")
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damage can surface as almost anything
            print(f"{file} is corrupt and left out ({type(error).__name__}).", file=sys.stderr)
    raise UsageError(f"{path} has no readable checkpoint.")


# ==== shared: evaluation ====
class Camera:
    """Films the first environment. Atari's emulators cannot render, so a twin plays the same game in colour."""

    def __init__(self, args: RunArgs, envs: gym.vector.VectorEnv, folder: Path):
        self.envs = envs
        self.folder = folder
        self.frames: list[np.ndarray] = []
        self.twins = None
        if environment_family(args.env_id) == "atari":
            self.twins = make_envs(args, envs.num_envs, grayscale=False, img_height=210, img_width=160, stack_num=1)
            self.twin_obs, _ = reset_envs(self.twins, args.eval_seed, 0)

    def film(self, actions: np.ndarray) -> None:
        """Takes the picture before these actions."""
        if self.twins:
            self.frames.append(self.twin_obs[0, -1])
            self.twin_obs = self.twins.step(actions)[0]
        else:
            self.frames.append(self.envs.envs[0].render())

    def write(self, name: str) -> None:
        """Writes an episode as an mp4."""
        from moviepy import ImageSequenceClip

        self.folder.mkdir(exist_ok=True)
        ImageSequenceClip(self.frames, fps=30).write_videofile(str(self.folder / f"{name}.mp4"), logger=None)
        self.frames = []


@torch.no_grad()
def evaluate(args: RunArgs) -> list[float]:
    """Plays eval_episodes with the run args.evaluate, its normalisers frozen. Returns the raw returns.

    Where the run has ended, the result goes to its summary.json and, as eval/episodic_return, to TensorBoard.
    """
    check_args(args)
    path, num_envs = Path(args.evaluate), min(args.eval_episodes, 8)
    options = {}
    if args.capture_video and environment_family(args.env_id) != "atari":
        options["render_mode"] = "rgb_array"
    envs = make_envs(args, num_envs, **options)
    settle(args, envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
    state, folder = load_checkpoint(path), run_dir_of(path)
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError:
        raise UsageError(f"{path} was trained on other spaces than those of --env-id {args.env_id}.") from None
    camera = Camera(args, envs, folder / "videos") if args.capture_video else None
    returns = play_episodes(agent, envs, camera, args, f"iteration_{state['iteration']}")
    kind = "stochastic" if args.eval_stochastic else "deterministic"
    result = {name: float(getattr(np, name)(returns)) for name in ("mean", "std", "min", "max")}
    print(f"{len(returns)} {kind} episodes: {', '.join(f'{name} {value:,.2f}' for name, value in result.items())}")
    if summary := read_summary(folder):
        result |= {"episodes": len(returns), "seed": args.eval_seed, "iteration": state["iteration"]}
        summary["eval"] = summary.get("eval", {}) | {kind: result}
        write_json(folder / "summary.json", summary)
        with SummaryWriter(folder) as writer:
            writer.add_scalar("eval/episodic_return", result["mean"], state["global_step"])
    return returns


def play_episodes(
    agent: Agent, envs: gym.vector.VectorEnv, camera: Camera | None, args: RunArgs, name: str
) -> list[float]:
    """The raw returns of eval_episodes. Each environment plays its share, because the first to end are the shortest."""
    num_envs = envs.num_envs
    shares = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    running = np.zeros(num_envs)
    torch.manual_seed(args.eval_seed)
    obs, info = reset_envs(envs, args.eval_seed, 0)
    while any(len(played) < share for played, share in zip(returns, shares)):
        noise = action_noise(agent, num_envs) * float(args.eval_stochastic)
        features = agent.features(torch.from_numpy(obs).to(agent.device, obs_dtype(agent.observation_space)))
        actions = to_env(agent.action_space, act(agent, features, noise).cpu().numpy())
        filming = camera and len(returns[0]) < shares[0]
        if filming:
            camera.film(actions)
        clock = info.get("episode_frame_number")
        obs, rewards, terminations, truncations, info = envs.step(actions)
        running += rewards
        for n in np.flatnonzero(whole_games(terminations | truncations, info, clock)):
            returns[n].append(float(running[n]))
            running[n] = 0.0
            if filming and n == 0:
                camera.write(f"{name}_episode_{len(returns[0])}")
    return [total for played, share in zip(returns, shares) for total in played[:share]]


# ==== shared: main ====
def main(argv: list[str] | None = None) -> int:
    """The command line. The exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""
    try:
        args = parse_args(argv)
        path = args.evaluate or str(train(args))
        if args.evaluate or vars(args).get("capture_video"):
            evaluate(replace(args, evaluate=path))
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 130
    except (UsageError, Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
