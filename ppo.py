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
"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), in one file.

Play num_steps steps in num_envs environments with the policy pi_old. Then, for a few epochs over minibatches of that
batch, climb the clipped surrogate (eq. 7) minus the value error plus an entropy bonus (eq. 9):

    L(theta) = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - c1 (V(s) - R)^2 / 2 + c2 S[pi](s) ], r = pi(a|s) / pi_old(a|s)

A is the generalized advantage estimate (arXiv 1506.02438) and R = A + V_old(s). `--objective` replaces the first term
by the paper's other surrogates: kl-fixed and kl-adaptive (eq. 8, section 4), or none (eq. 6).

    python ppo.py --env-id CartPole-v1
    python ppo.py --env-id HalfCheetah-v5 --seed 2          python ppo.py --help --env-id HalfCheetah-v5
    python ppo.py --resume runs/<run>                       python ppo.py --evaluate runs/<run>

Departures from the paper:
- Advantages are standardised in each minibatch, and on MuJoCo computed again before each epoch but the first.
- On MuJoCo and classic control with real-valued actions inputs are normalised, rewards too; the deviation is planned.
- The global norm of the gradient is clipped, weights start orthogonal, c1 is 0.5, and the squared error is halved.
- The learning rate anneals in every family, eps in none; the paper anneals both, on Atari only. Atari takes 4 epochs.
- An episode that a time limit cuts did not end there, so its last state is bootstrapped (arXiv 1712.00378).

The upper half of this file is the method. From the lower half it uses `Player`, which plays environments and returns
`Steps`, the policies `Categorical` and `Gaussian`, `compile_for`, and `Run`, which logs, saves and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

if __name__ == "__main__" and "__file__" in globals():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams, scalar, text


@dataclass
class Args:
    """The arguments of the method and the environment. RunArgs, below, adds those of a run: device, resume, ..."""

    env_id: str = "CartPole-v1"  # any registered environment; package:Env-v0 imports the package first
    seed: int = 1  # seed of weights, actions, minibatches and environments
    total_timesteps: int = 200_000  # environment steps of the whole run, rounded down to whole batches
    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # let the step size fall linearly to zero
    num_envs: int = 8  # environments played side by side
    num_steps: int = 128  # steps per environment and iteration (the paper's T)
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 10  # epochs over each batch (the paper's K)
    recompute_advantages: bool = False  # estimate them again, with the present V, before each epoch but the first
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the generalized advantage estimate
    norm_adv: bool = True  # standardise the advantages of each minibatch
    objective: Literal["clip", "kl-fixed", "kl-adaptive", "none"] = "clip"  # clipped (eq. 7), KL penalty (8), plain (6)
    clip_coef: float = 0.2  # eps of the clipped surrogate and of --clip-vloss
    clip_vloss: bool = False  # also clip how far a value moves from its old estimate
    kl_beta: float = 1.0  # beta of the KL penalty; the first one of kl-adaptive
    kl_target: float = 0.01  # d_targ of kl-adaptive
    target_kl: float | None = None  # end the epochs when approx_kl exceeds this, before the next step
    ent_coef: float = 0.0  # c2, weight of the entropy bonus
    vf_coef: float = 0.5  # c1, weight of half the squared value error
    max_grad_norm: float = 0.5  # bound on the gradient's global norm
    log_std_init: float = 0.0  # initial log standard deviation of Gaussian policies
    log_std_end: float | None = None  # what it falls to, linearly over the run; None: it is learned instead
    norm_obs: bool = False  # normalise observations by their running mean and standard deviation
    norm_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    clip_reward: bool = False  # learn from the sign of the reward; reported returns stay raw


# Where a family departs from these defaults. "continuous": classic control with Box actions. "classic": also your own.
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "classic": dict(),
    "continuous": dict(log_std_end=-1.0, norm_obs=True, norm_reward=True),
    "box2d": dict(total_timesteps=1_000_000, num_envs=16, num_steps=256, learning_rate=3e-4, gamma=0.999,
                  gae_lambda=0.98),
    "mujoco": dict(total_timesteps=1_000_000, num_steps=256, num_minibatches=16, learning_rate=5e-4,
                   recompute_advantages=True, log_std_init=-1.0, log_std_end=-2.0, norm_obs=True, norm_reward=True),
    "atari": dict(total_timesteps=10_000_000, update_epochs=4, learning_rate=2.5e-4, clip_coef=0.1, ent_coef=0.01,
                  clip_reward=True),
}
# Bounds of numbers. One in none of the three must be 0 or more.
POSITIVE = ("total_timesteps", "learning_rate", "num_envs", "num_steps", "num_minibatches", "update_epochs", "gamma",
            "clip_coef", "kl_beta", "kl_target", "target_kl", "max_grad_norm")
AT_MOST_ONE = ("gamma", "gae_lambda")
ANY_SIGN = ("log_std_init", "log_std_end")
# fmt: on


class Agent(nn.Module):
    """Actor, critic and normalisers for a pair of spaces. Observations come raw, (batch, *space.shape).

    Actor and critic have an MLP each. For images they share the convolutions if share_body, else they have their own.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: RunArgs, share_body: bool):
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.continuous = isinstance(action_space, gym.spaces.Box)
        self.image = is_image(observation_space)
        self.one_hot = isinstance(observation_space, gym.spaces.Discrete)
        self.obs_norm = RunningNorm(observation_space.shape, observation_space.dtype) if args.norm_obs else None
        self.return_norm = RunningNorm(())
        if self.continuous:
            outputs = math.prod(action_space.shape)
            log_std = torch.full((outputs,), float(args.log_std_init))
            self.log_std = nn.Parameter(log_std) if args.log_std_end is None else nn.Buffer(log_std)
        else:
            self.choices, impossible = choices_of(action_space)  # a component of few choices is padded
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
            inputs = math.prod(observation_space.shape)
            if self.one_hot:
                self.start, inputs = int(observation_space.start), int(observation_space.n)
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
            return F.one_hot(obs - self.start, self.actor.first.in_features).float()
        if self.obs_norm:
            obs = self.obs_norm(obs)
        return obs.reshape(len(obs), -1)

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
        """All learned parameters of pi. The agent's own one is log_std, if that is learned."""
        return [*self.body.parameters(), *self.actor.parameters(), *self.parameters(recurse=False)]


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
    future. A truncated one has, so its TD error bootstraps. At both the sum over later TD errors stops.
    """
    terminations = terminations.bool()
    ended = terminations | truncations.bool()
    successors = torch.where(terminations, 0.0, next_values)  # not a product, because 0 * NaN is NaN
    deltas = rewards + gamma * successors - values
    decay = gamma * gae_lambda * (~ended).to(deltas)
    advantages = []
    later = torch.zeros_like(deltas[0])
    for delta, discount in zip(deltas.flip(0), decay.flip(0)):
        later = delta + discount * later
        advantages.append(later)
    advantages = torch.stack(advantages[::-1])
    return advantages, advantages + values


@torch.no_grad()
def estimate(agent: Agent, steps: Steps, args: Args) -> Batch:
    """pi_old, V and advantages of the steps that were played, for all states at once."""
    values = agent.value(steps.features).view(-1, args.num_envs)  # (num_steps + 1, num_envs)
    next_values = torch.where(steps.truncations, steps.final_values, values[1:])  # V of the true successors
    values = values[:-1]
    advantages, returns = compute_gae(
        steps.rewards, values, next_values, steps.terminations, steps.truncations, args.gamma, args.gae_lambda
    )
    old_policy = agent.policy(steps.features[: values.numel()])
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


def rollout(agent: Agent, player: Player, args: Args) -> Batch:
    """Plays num_steps steps in each environment."""
    return estimate(agent, player.play(agent), args)


def surrogate_objective(ratio: Tensor, advantages: Tensor, kl: Tensor, kl_beta: Tensor | float, args: Args) -> Tensor:
    """The policy's objective, to be maximised. ratio, advantages and kl = KL(pi_old || pi) are (batch,)."""
    surrogate = ratio * advantages  # L^CPI, eq. 6
    if args.objective == "clip":
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * advantages
        surrogate = torch.min(surrogate, clipped)  # L^CLIP, eq. 7
    elif args.objective.startswith("kl"):
        surrogate = surrogate - kl_beta * kl  # L^KLPEN, eq. 8
    return surrogate.mean()


def value_objective(values: Tensor, old_values: Tensor, returns: Tensor, args: Args) -> Tensor:
    """Half the mean squared error of V, all (batch,).

    With --clip-vloss a state counts the larger error, of V or of V clipped to within clip_coef of its old estimate.
    """
    assert values.shape == old_values.shape == returns.shape
    error = (values - returns) ** 2
    if args.clip_vloss:
        clipped = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


def adapt_beta(beta: Tensor | float, kl: float, kl_target: float) -> Tensor | float:
    """The KL penalty of the next update (section 4), from the mean KL(pi_old || pi) that this one led to."""
    if kl < kl_target / 1.5:
        return beta / 2
    if kl > kl_target * 1.5:
        return beta * 2
    return beta


def ppo_loss(agent: Agent, batch: Batch, kl_beta: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus eq. 9, and the statistics to log."""
    features = agent.features(batch.obs)
    policy = agent.policy(features)
    values = agent.value(features)
    logratio = policy.log_prob(batch.actions) - batch.logprobs
    ratio = logratio.exp()
    advantages = standardise(batch.advantages) if args.norm_adv else batch.advantages
    kl = batch.old_policy.kl(policy) if args.objective.startswith("kl") else torch.zeros_like(ratio)

    policy_loss = -surrogate_objective(ratio, advantages, kl, kl_beta, args)
    value_loss = value_objective(values, batch.values, batch.returns, args)
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": ((ratio - 1) - logratio).mean(),  # the mean of -log r estimates the same, but can be negative
        "old_approx_kl": -logratio.mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }


def make_gradient(agent: Agent, args: RunArgs) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """gradient(batch, rows, kl_beta) -> (gradient (parameters,) clipped to max_grad_norm, what to log)."""
    parameters = list(agent.parameters())

    def gradient(batch: Batch, rows: Tensor, kl_beta: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        minibatch = Batch(*(column[rows] for column in batch))  # a policy is sliced like a tensor
        loss, stats = ppo_loss(agent, minibatch, kl_beta, args)
        grad, norm = clip_norm(flat_grad(loss, parameters), args.max_grad_norm)
        stats["grad_norm"] = norm
        return grad, {name: value.detach() for name, value in stats.items()}

    def example() -> tuple[Batch, Tensor, Tensor]:
        batch = estimate(agent, example_steps(agent, args), args)
        rows = torch.arange(len(batch.obs) // args.num_minibatches, device=agent.device)
        return batch, rows, torch.tensor(args.kl_beta, device=agent.device)

    calls = args.total_timesteps // (args.num_envs * args.num_steps) * args.update_epochs * args.num_minibatches
    return compile_for(example, gradient, args, calls > 40_000 and not agent.image)


def update(
    agent: Agent,
    player: Player,
    optimizer: Adam,
    gradient: Callable,
    batch: Batch,
    learning_rate: float,
    kl_beta: Tensor,
    rng: Rng,
    args: Args,
) -> dict[str, Tensor]:
    """K epochs of minibatch steps. Returns the means over them of what to log."""
    stats = []
    variances = value_variances(batch.returns, batch.values)
    for epoch in range(args.update_epochs):
        if args.recompute_advantages and epoch > 0:
            present = estimate(agent, player.look_again(agent), args)
            batch = batch._replace(advantages=present.advantages, returns=present.returns)  # pi_old stays
        for rows in rng.permutation(len(batch.obs)).chunk(args.num_minibatches):
            grad, minibatch_stats = gradient(batch, rows, kl_beta)
            stats.append(minibatch_stats)
            if args.target_kl is not None and minibatch_stats["approx_kl"].item() > args.target_kl:
                return mean_of(stats) | variances
            optimizer.step(grad, learning_rate)
    return mean_of(stats) | variances


@torch.no_grad()
def mean_kl(agent: Agent, batch: Batch) -> float:
    """E[KL(pi_old || pi)] over the batch, for adapt_beta."""
    return batch.old_policy.kl(agent.policy(agent.features(batch.obs))).mean().item()


def make_agent(envs: Environments, args: RunArgs) -> Agent:
    """Actor and critic share the convolutions."""
    return Agent(envs.single_observation_space, envs.single_action_space, args, share_body=True).to(args.device)


def train(args: RunArgs) -> Path:
    """Trains for total_timesteps, or goes on with the run args.resume. Returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = Start()
    check_args(args)
    check_batch(args)
    with make_envs(args, args.num_envs, args.seed) as envs:
        rng = settle(args, envs)
        agent = make_agent(envs, args)
        player = Player(envs, args, rng)
        optimizer = Adam(flatten_parameters(agent.parameters()))
        gradient = make_gradient(agent, args)
        kl_beta = torch.tensor(args.kl_beta, device=args.device)  # a tensor, because a graph would keep a number
        learner = {"agent": agent, "optimizer": optimizer, "player": player, "rng": rng, "kl_beta": kl_beta}
        total = args.total_timesteps // (args.num_envs * args.num_steps) * (args.num_envs * args.num_steps)
        with Run(args, total, started, **learner) as run:
            for _ in run.iterations():
                learning_rate = args.learning_rate * run.part_left() if args.anneal_lr else args.learning_rate
                anneal_log_std(agent, run.part_left(), args)
                batch = rollout(agent, player, args)
                losses = update(agent, player, optimizer, gradient, batch, learning_rate, kl_beta, rng, args)
                charts = {"learning_rate": learning_rate}
                if args.objective.startswith("kl"):
                    charts["kl_beta"] = kl_beta.item()
                if args.objective == "kl-adaptive":
                    kl_beta.copy_(adapt_beta(kl_beta, mean_kl(agent, batch), args.kl_target))
                if agent.obs_norm:
                    agent.obs_norm.update(batch.obs)
                run.log(len(batch.obs), player.finished, losses=losses, charts=charts)
        return run.path


# ==== The machine room: "shared" sections are the same text in every script that has them ====
# ==== shared: run flags ====
SCRIPT = Path(os.path.abspath(globals().get("__file__", "notebook")))


@dataclass
class RunArgs(Args):
    """All arguments of the command line: those of the method and the environment, and those of the run."""

    exp_name: str = SCRIPT.stem  # name of the experiment, a part of the run's name
    runs_dir: str = "runs"  # folder of all runs
    run_name: str = ""  # folder of this run in runs-dir (default: {env_id}__{exp_name}__{seed}__{time})
    resume: str = ""  # run directory to go on with, from its newest good checkpoint, with its own arguments
    evaluate: str = ""  # run directory, or one of its checkpoints, to load and play instead of training
    eval_episodes: int = 10  # episodes that --evaluate plays
    eval_seed: int = 1_000_000  # seed of environments and actions in --evaluate
    eval_stochastic: bool = False  # let --evaluate sample actions instead of taking the most likely ones
    eval_max_steps: int = 100_000  # steps after which --evaluate takes an episode for one that never ends
    capture_video: bool = False  # film the first environment of --evaluate, or of an evaluation after the training
    checkpoint_interval: int = 0  # iterations from a checkpoint to the next (0: about a twentieth of the run)
    keep_checkpoints: bool = False  # keep all checkpoints, not only the newest two, to evaluate along the run
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "lineage"  # project of --track
    wandb_entity: str | None = None  # team of --track
    scale_actions: Literal["auto", "on", "off"] = "auto"  # from -1..1 to the box (auto: where it is far from -1..1)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cpu for the MLP; for the CNN cuda, where there is one
    num_threads: int = 0  # CPU threads of torch and of the Atari emulators (0: one for the MLP, all cores for the CNN)
    compile: Literal["auto", "on", "off"] = "auto"  # compile the gradient (auto: MLP, in runs long enough to win)
    bf16: Literal["auto", "on", "off"] = "auto"  # bfloat16 in the CNN (auto: where that is native) or SAC (auto: off)


METRICS = ("charts/train_last100", "eval/episodic_return")  # of the HParams tab
PRESET = "env_id"  # the argument that picks a row of FAMILIES


def preset(env_id: str) -> dict[str, Any]:
    """An environment and its row of FAMILIES."""
    return {"env_id": env_id, **FAMILIES[environment_family(env_id)]}


# ==== shared: command line ====
class UsageError(Exception):
    """The configuration is wrong: one sentence, exit status 2, nothing created."""


class Failed(Exception):
    """A number is NaN or infinite (status "diverged"), or something raised ("failed"): exit status 1."""

    def __init__(self, message: str, status: str = "diverged"):
        super().__init__(message)
        self.status = status


class Stopped(BaseException):
    """A signal ends the run: exit status 128 + signal. No environment may take it for an error of its own."""

    status = "interrupted"


# Arguments that may differ from those of the run when it is resumed or evaluated.
MACHINE = ("device", "num_threads", "compile")
MAY_DIFFER = ("resume", "keep_checkpoints", "capture_video", "track", "wandb_project_name", "wandb_entity", *MACHINE)


def parse_args(argv: list[str] | None = None) -> RunArgs:
    """The command line, over the defaults of its preset. With --resume or --evaluate, over the arguments of the run."""
    argv = own_arguments() if argv is None else argv
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = vars(RunArgs())[PRESET]
    peek.add_argument(f"--{PRESET.replace('_', '-')}", f"--{PRESET}", nargs="?", default=default, const=default)
    peek.add_argument("--resume", nargs="?", type=Path)
    peek.add_argument("--evaluate", nargs="?", type=Path)
    asked = vars(peek.parse_known_args(argv)[0])
    if asked["resume"] and asked["evaluate"]:
        raise UsageError("--resume trains and --evaluate plays; give one of them.")
    if asked["resume"] and asked["resume"].is_file():
        raise UsageError(f"--resume takes a run directory, here {run_dir_of(asked['resume'])}.")
    run = asked["resume"] or asked["evaluate"]
    if not run:
        return parse_flags(argv, RunArgs(**preset(asked[PRESET])))
    saved = read_config(run)[0]
    args = parse_flags(argv, saved)
    changed = [name for name, value in vars(saved).items() if value != vars(args)[name] and name not in MAY_DIFFER]
    if asked["evaluate"]:
        changed = [name for name in changed if not name.startswith("eval")]
    if changed:
        difference = ", ".join(f"{name} {vars(saved)[name]!r} -> {vars(args)[name]!r}" for name in changed)
        goes_on = "--resume goes on with" if asked["resume"] else "--evaluate goes by"
        raise UsageError(f"{goes_on} the arguments of the run, and these differ: {difference}.")
    return args


def own_arguments() -> list[str]:
    """What this script was started with; nothing where it was imported, or pasted into a notebook with its own argv."""
    started = Path(sys.argv[0])
    return sys.argv[1:] if SCRIPT.is_file() and started.is_file() and started.samefile(SCRIPT) else []


def sentence_of(box: str) -> str:
    """What tyro says of an error, in a box, as one sentence."""
    lines = [line.strip() for line in box.splitlines()]
    rules = [n for n, line in enumerate(lines) if line and not line.strip("-")]  # around the message
    message = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines)
    flag, _, reason = message.removeprefix("Error parsing ").partition(": ")
    takes = next((line for line in lines if line.startswith(f"{flag} ")), "")
    if takes and "'" in reason:
        for kind, words in (("{None}|", ""), ("FLOAT", "a number"), ("INT", "a whole number")):
            takes = takes.replace(kind, words)
        message = f"{takes.replace(' ', ' takes ', 1)}, not {reason.split(chr(39))[-2]!r}"
    if "Perhaps you meant:" in lines:
        near = lines[lines.index("Perhaps you meant:") + 1].split()[0]
        return f"{message}; did you mean {near}?"
    return f"{message.rstrip('.')}."


PARSING = threading.Lock()  # because what tyro prints is caught for the whole process


def parse_flags(argv: list[str], default: RunArgs) -> RunArgs:
    """The flags over the defaults. Raises UsageError with one sentence, where tyro alone would draw a box."""
    if {"-h", "--help"} & set(argv):
        return tyro.cli(RunArgs, args=argv, default=default)
    box = io.StringIO()
    try:
        with PARSING, contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            args, unknown = tyro.cli(RunArgs, args=argv, default=default, return_unknown_args=True)
    except SystemExit as leaving:
        if not leaving.code:  # it has printed what was asked for
            print(box.getvalue(), end="")
            raise
        raise UsageError(sentence_of(box.getvalue())) from None
    if unknown:
        known = [f"--{no}{field.name.replace('_', '-')}" for field in fields(RunArgs) for no in ("", "no-")]
        near = difflib.get_close_matches(unknown[0].partition("=")[0].replace("_", "-"), known, n=1)
        would = f"did you mean {near[0]}?" if near else "--help lists the flags."
        raise UsageError(f"{unknown[0]!r} is no flag and no value of one; {would}")
    return args


def check_args(args: RunArgs) -> None:
    """Raises UsageError for the first number that cannot work, and says what would; and where --track cannot log."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and (must := bound_broken(name, number)):
                raise UsageError(f"--{name.replace('_', '-')} is {number}, but must be {must}.")
    if args.num_threads > cores():
        if not args.resume and not args.evaluate:
            raise UsageError(
                f"--num-threads is {args.num_threads}, but this process may use {cores()} cores; ask for fewer."
            )
        args.num_threads = 0  # the run was made on a larger machine
    mode, modes = os.environ.get("WANDB_MODE", "online"), ("online", "offline", "shared", "disabled", "dryrun", "run")
    if args.track and mode not in modes:
        raise UsageError(f"WANDB_MODE is {mode!r}, but must be one of {', '.join(modes)}.")
    if args.track and not args.evaluate and mode == "online":
        import wandb

        try:
            problem = "" if wandb.login(prompt=False) else "wandb is not logged in"
        except Exception as error:
            problem = f"wandb cannot log in ({one_line(error)})"
        if problem:
            raise UsageError(f"--track: {problem}; run wandb login, or set WANDB_MODE=offline.")


def bound_broken(name: str, number: float) -> str:
    """What an argument must be and is not, or ""."""
    if not math.isfinite(number):
        return "a finite number"
    if abs(number) > 1e30 and isinstance(number, float):
        return "at most 1e30"
    if name == "num_envs" and number > 2**16:
        return "at most 65,536"
    if number > 2**53 and isinstance(number, int):
        return "at most 2**53"
    if name in (*POSITIVE, "eval_episodes", "eval_max_steps", "eval_prompts", "eval_interval") and number <= 0:
        return "greater than 0"
    if name in AT_MOST_ONE and number > 1:
        return "at most 1"
    if name not in ANY_SIGN and number < 0:
        return "0 or more"
    return "less than 2**32" if name in ("seed", "eval_seed") and number >= 2**32 else ""


def affinity() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """Processor cores that this process may use, by its affinity and by the share that its cgroups grant."""
    count = affinity()
    for quota, period in cgroups("cpu.max", "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if quota not in ("max", "-1"):
            count = min(count, int(quota) // int(period))
    return max(count, 1)


def memory() -> int:
    """Bytes that this process may fill."""
    limits = [int(limit) for (limit,) in cgroups("memory.max", "memory", "memory.limit_in_bytes") if limit != "max"]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cgroups(name: str, controller: str, *old_names: str) -> list[list[str]]:
    """The words of a file, in all control groups around this process. Version 1 has other folders and file names."""
    root, mine = CGROUPS
    found = []
    for line in mine.read_text(encoding="utf-8").splitlines() if mine.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / controller if controllers else root
        folder = folder / path.lstrip("/")
        names = old_names if controllers else [name]
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError):
                found.append(" ".join((level / name).read_text(encoding="utf-8") for name in names).split())
    return found


def check_memory(needed: Callable[[int], float], what: str, flag: str, size: int) -> None:
    """Raises UsageError where size, the value of a flag, needs more bytes than there are."""
    if needed(size) <= memory():
        return
    most = size
    while most > 1 and needed(most) > memory():
        most //= 2
    sizes = f"{needed(size) / 2**30:,.0f} GiB of memory, and there are {memory() / 2**30:,.0f}"
    would = f"{flag} {most} would fit" if needed(most) <= memory() else "its other sizes are too large, too"
    raise UsageError(f"{what} would take {sizes}; {would}.")


def say(line: str, end: str = "\n", stream: str = "stdout") -> None:
    """Prints. A reader that is gone, full or stalled must neither end the run nor hold it up."""
    file = getattr(sys, stream)  # None where it was closed
    try:
        ready = select.select([], [file], [], 0)[1]
    except (OSError, ValueError, TypeError, AttributeError):  # no file, as in a notebook
        ready = file is not None
    try:
        if ready:
            print(line, end=end, file=file, flush=True)
    except UnicodeEncodeError:
        say(ascii(line)[1:-1], end, stream)
    except BlockingIOError:
        pass
    except Exception:  # somebody may have put anything in its place
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))


def warn(line: str) -> None:
    """Prints on stderr."""
    say(line, stream="stderr")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


# ==== shared: environments ====
gym.register_envs(ale_py)


def environment_family(env_id: str) -> str:
    """The row of FAMILIES for a registered id. Raises UsageError, with the near miss, for any other."""
    module, _, name = env_id.rpartition(":")
    flag = f"--env-id {env_id if env_id and env_id.isprintable() else repr(env_id)}"
    if module.startswith("."):
        raise UsageError(f"{flag} begins with a relative name; name a module from the top, as in package:Env-v0.")
    try:
        if module:
            importlib.import_module(module)
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:  # a module can raise anything, and exit
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            where = f"{sys.path[0] or 'the current folder'}, PYTHONPATH and what is installed"
            how = f"Python looked in {where}; install it, or put its folder on PYTHONPATH."
            raise UsageError(f"{flag}: {error}. {how}") from None
        raise UsageError(f"{flag}: {module} cannot be imported, it raised {what_happened(error)}.") from None
    try:
        entry_point = str(gym.spec(name).entry_point)
    except gym.error.Error:
        near = (difflib.get_close_matches(name, gym.registry, n=1) or ["one of gymnasium.registry"])[0]
        raise UsageError(f"{flag} is not registered in gymnasium; did you mean {near}?") from None
    families = {
        "ale_py": "atari",
        "gymnasium.envs.box2d": "box2d",
        "gymnasium.envs.mujoco": "mujoco",
        "gymnasium.envs.classic_control.pendulum": "continuous",
        "gymnasium.envs.classic_control.continuous_": "continuous",
    }
    return next((family for home, family in families.items() if entry_point.startswith(home)), "classic")


def what_happened(error: BaseException) -> str:
    """Type, text and place of an error that was raised."""
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    try:
        text = f"{type(error).__name__}: {one_line(error)[:300]}".removesuffix(": ")
    except Exception:  # of an error that has no text
        text = type(error).__name__
    return f"{text} ({place.tb_frame.f_code.co_filename}:{place.tb_lineno})"


def brief(space: gym.Space) -> str:
    """A space without its bounds."""
    return f"Box{space.shape}" if isinstance(space, gym.spaces.Box) else " ".join(str(space).split())[:80]


# What the functions of an environment return, and the moments at which that is looked at, for each environment once.
STEP = ("observation", "reward", "terminated", "truncated", "info")
RESET = ("observation", "info")
NEXT = {"first reset": "first step", "first step": "first end of an episode", "first end of an episode": "second reset"}


def broken_promise(space: gym.Space, result: Any, names: tuple[str, ...]) -> str:
    """What an environment returned, and what its API or its observation space promises instead; "" if it kept that."""
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        return f"{described(result)}, not ({', '.join(names)})"
    for name, x in zip(names, result):
        if name == "observation":
            kept, promise = fits(space, x), f"{brief(space)} of {space.dtype}"
        elif name == "info":
            kept, promise = isinstance(x, dict), "a dict"
        else:
            kept, promise = array_of(x).dtype.kind in "biuf" and not array_of(x).shape, "a number"
            if name != "reward":
                kept, promise = kept and x in (0, 1), "True or False"
        if not kept:
            return f"{described(x)} as {name}, not {promise}"
    return ""


def fits(space: gym.Space, obs: Any) -> bool:
    """Whether an observation has the shape of its space, and values that its dtype can hold.

    Bounds of a Box are not looked at. Environments break them, and nothing here depends on them.
    """
    x = array_of(obs)
    if x.shape != space.shape or x.dtype.kind not in "biuf":
        return False
    if isinstance(space, gym.spaces.Discrete):
        return x.dtype.kind in "iu" and bool(space.start <= x < space.start + space.n)
    return space.dtype.kind == "f" or (x.dtype.kind != "f" and bool((x.astype(space.dtype) == x).all()))


def array_of(x: Any) -> np.ndarray:
    """x as an array; one of an object where it is none, such as lists of unequal lengths."""
    try:
        return np.asarray(x)
    except Exception:
        return np.array(None)


def described(x: Any) -> str:
    """What something is, in a few words."""
    if isinstance(x, np.ndarray) and x.shape:
        values = f" from {x.min()} to {x.max()}" if x.size and x.dtype.kind in "biuf" else ""
        return f"an array {x.shape} of {x.dtype}{values}"
    if isinstance(x, (tuple, list, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return " ".join(repr(x).split())[:80]


class SyncEnvs:
    """Environments that step one after the other.

    Eight of CartPole take 110 us, with the seeded resets; in gymnasium's SyncVectorEnv they took 158 us.
    """

    def __init__(self, envs: list[gym.Env], env_id: str):
        self.envs = envs
        self.env_id = env_id
        self.num_envs = len(envs)
        self.single_observation_space = envs[0].observation_space
        self.single_action_space = envs[0].action_space
        self.obs = np.zeros((len(envs), *envs[0].observation_space.shape), dtype=envs[0].observation_space.dtype)
        self.unchecked = dict.fromkeys(range(len(envs)), "first reset")  # the next moment to look at what is returned
        self.closed = False

    def reset(self, seed: np.ndarray, options: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
        """Resets, with a seed for each, the environments where options["reset_mask"] is true."""
        for n, one in zip(np.flatnonzero(options["reset_mask"]).tolist(), seed.tolist()):
            try:
                result = self.envs[n].reset(seed=one)
                if n in self.unchecked:
                    self.check(n, result, RESET)
                self.obs[n], _ = result
            except BaseException as error:
                raise self.failure(n, error, RESET) from error
        return self.obs, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        rewards = np.zeros(self.num_envs)
        terminations, truncations = np.zeros((2, self.num_envs), dtype=bool)
        for n, action in enumerate(actions):
            try:
                result = self.envs[n].step(action)
                if self.unchecked:
                    self.check(n, result, STEP)
                self.obs[n], rewards[n], terminations[n], truncations[n], _ = result
            except BaseException as error:
                raise self.failure(n, error, STEP) from error
        return self.obs, rewards, terminations, truncations, {}

    def picture(self) -> np.ndarray:
        """The first environment, (height, width, 3)."""
        try:
            frame = self.envs[0].render()
        except BaseException as error:
            raise self.failure(0, error, ()) from error
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3:
            return frame
        promise = "an array (height, width, 3) of uint8"
        raise Failed(f"environment 0 of {self.env_id} rendered {described(frame)}, not {promise}", "failed")

    def check(self, n: int, result: Any, names: tuple[str, ...]) -> None:
        """Raises Failed for a broken promise, if this is the next moment of environment n to look."""
        moment = self.unchecked.get(n)
        if moment is None or moment.endswith("reset") != (names is RESET):
            return
        if moment == "first end of an episode" and not (result[2] or result[3]):
            return
        if broken := broken_promise(self.single_observation_space, result, names):
            raise Failed(f"environment {n} of {self.env_id} returned at its {moment} {broken}", "failed")
        self.unchecked[n] = NEXT.get(moment)
        if not self.unchecked[n]:
            del self.unchecked[n]

    def failure(self, n: int, error: BaseException, names: tuple[str, ...]) -> Failed:
        """What to raise where environment n raised an error: one sentence, but a signal as it is."""
        if isinstance(error, (Failed, Stopped, KeyboardInterrupt)):
            raise error
        what = what_happened(error)
        if "unpack" in what:  # gymnasium's wrappers take apart what comes, and fail before it is looked at here
            what += f"; what must be returned is ({', '.join(names)})"
        return Failed(f"environment {n} of {self.env_id} raised {what}", "failed")

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            close_all(self.envs, self.env_id)


def close_all(envs: list[gym.Env], env_id: str) -> None:
    """Closes environments. An error in one must neither keep the others open nor hide how the run ended."""
    problems = []

    def close(env: gym.Env) -> None:
        try:
            env.close()
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException as error:
            problems.append(what_happened(error))

    with contextlib.ExitStack() as exits:  # it goes on after a signal, too
        for env in envs:
            exits.callback(close, env)
    if problems:
        warn(f"An environment of {env_id} could not be closed; it raised {problems[0]}.")


RESEED = 10_000


class Environments:
    """Environments side by side. An episode begins in the step in which the one before it ended.

    Every episode has a seed of its own, from (seed, environment, number of the seed). This seed and the actions since
    are enough to rebuild an environment. A game of Atari has one only where the last seed is RESEED steps ago: it makes
    ale_py read the game again, in 120 ms instead of 11.
    """

    def __init__(self, envs: SyncEnvs | gym.vector.VectorEnv, seed: int):
        self.envs = envs
        self.seed = seed
        self.num_envs = envs.num_envs
        self.single_observation_space = envs.single_observation_space
        self.single_action_space = envs.single_action_space
        self.atari = not isinstance(envs, SyncEnvs)
        self.reseed_after = RESEED if self.atari else 0
        self.numbers = np.zeros(envs.num_envs, dtype=np.int64)  # of the seeds, from 1
        self.played = np.zeros(envs.num_envs, dtype=np.int64)  # steps since then
        self.scale: tuple[np.ndarray, np.ndarray] | None = None  # of actions, for to_env

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self.envs.close()

    def reset(self) -> np.ndarray:
        """Begins an episode in all environments. Returns the observations."""
        return self.begin(np.ones(self.num_envs, dtype=bool))

    def begin(self, where: np.ndarray) -> np.ndarray:
        """Begins a seeded episode where (num_envs,) is true. Returns the observations of all environments."""
        self.numbers += where
        self.played[where] = 0
        roots = [(self.seed, n, self.numbers[n]) for n in np.flatnonzero(where)]
        seeds = np.array([np.random.SeedSequence(root).generate_state(1)[0] // 2 for root in roots], dtype=np.int64)
        with as_before():
            obs, info = self.envs.reset(seed=seeds, options={"reset_mask": where})
        self.clock = info.get("episode_frame_number")
        return obs

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns observations, rewards, terminations, truncations, over, and final observations where one ended.

        over says where an episode of the environment ended. On Atari that is a game: a lost life is a termination, too,
        but the game's clock turns back only after its end.
        """
        obs, rewards, terminations, truncations, info = self.envs.step(actions)
        self.played += 1
        over = terminations | truncations
        final_obs = obs
        if self.atari:
            final_obs = info.get("final_obs")
            over = over & (info["episode_frame_number"] < self.clock)
            self.clock = info["episode_frame_number"]
        if over.any():
            final_obs = final_obs.copy()
            reseed = over & (self.played >= self.reseed_after)
            obs = self.begin(reseed) if reseed.any() else obs
        return obs, rewards, terminations, truncations, over, final_obs


def make_envs(args: RunArgs, num_envs: int, seed: int, **options: Any) -> Environments:
    """The environments of a run. Raises UsageError for a missing extra and for spaces that networks cannot take."""
    if environment_family(args.env_id) == "atari":
        return Environments(make_atari(args, num_envs, **options), seed)
    set_seeds(seed)  # a constructor may draw random numbers
    envs: list[gym.Env] = []
    try:
        with warnings.catch_warnings():  # about versions that are out of date and bounds that are cast to float32
            warnings.simplefilter("ignore")
            with as_before():
                for _ in range(num_envs):
                    envs.append(gym.make(args.env_id, disable_env_checker=True, **options))
        check_spaces(args.env_id, envs)
        return Environments(SyncEnvs(envs, args.env_id), seed)
    except BaseException as error:  # an extra that is missing, or whatever a constructor raises
        close_all(envs, args.env_id)
        if isinstance(error, (UsageError, Stopped, KeyboardInterrupt)):
            raise
        raise UsageError(f"--env-id {args.env_id} cannot be made, it raised {what_happened(error)}.") from None


def numbers_of(space: gym.Space) -> int:
    """Inputs or outputs of an MLP for a space."""
    if isinstance(space, gym.spaces.Box):
        return math.prod(space.shape)
    return math.prod(space.shape) * int(np.max(space.nvec if isinstance(space, gym.spaces.MultiDiscrete) else space.n))


class as_before(contextlib.ContextDecorator):
    """Takes back what environments have changed for all of the process: how torch and numpy compute."""

    def __enter__(self) -> None:
        self.torch = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
        self.numpy = np.geterr()

    def __exit__(self, *error: Any) -> None:
        if (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) != self.torch:
            torch.set_default_dtype(self.torch[0])
            torch.set_grad_enabled(self.torch[1])
            torch.set_num_threads(self.torch[2])
        if np.geterr() != self.numpy:
            np.seterr(**self.numpy)


def check_spaces(env_id: str, envs: list[gym.Env]) -> None:
    """Raises UsageError for spaces that networks cannot take."""
    observations, actions = envs[0].observation_space, envs[0].action_space
    if not isinstance(observations, (gym.spaces.Box, gym.spaces.Discrete)):
        raise UsageError(f"--env-id {env_id} observes {observations}; Box and Discrete are supported.")
    if not isinstance(actions, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        raise UsageError(f"--env-id {env_id} acts in {actions}; Box, Discrete and MultiDiscrete are supported.")
    for name, space in (("observes", observations), ("acts in", actions)):
        if not math.prod(space.shape):
            raise UsageError(f"--env-id {env_id} {name} {space}, which is empty; one number at least is needed.")
        if not space.dtype.isnative or space.dtype.itemsize > 8:
            raise UsageError(f"--env-id {env_id} {name} {space} of {space.dtype.str}; torch has no such numbers.")
        if numbers_of(space) * 64 * 32 > memory():  # 64 weights each, of 4 bytes, with gradients and moments
            raise UsageError(f"--env-id {env_id} {name} {space}; a network for that does not fit into the memory.")
    for n, env in enumerate(envs):
        if (env.observation_space, env.action_space) != (observations, actions):
            raise UsageError(f"environment {n} of --env-id {env_id} has other spaces than environment 0.")


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
        "num_threads": min(num_envs, args.num_threads or cores()),
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


def prepare(args: RunArgs, image: bool) -> Rng:
    """Decides device and threads, and sets the seeds. Returns the run's random numbers."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    if args.capture_video and importlib.util.find_spec("moviepy") is None:
        raise UsageError("--capture-video needs moviepy; install it with: pip install moviepy")
    if args.device == "auto":
        args.device = "cuda" if image and torch.cuda.is_available() else "cpu"
    if not args.num_threads:
        args.num_threads = cores() if image else 1
    torch.set_num_threads(args.num_threads)
    set_seeds(args.seed)
    return Rng(args.seed, args.device)


def set_seeds(seed: int) -> None:
    """Seeds the random numbers of the process, from which environments of others may draw."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ==== shared: settling ====
def check_batch(args: RunArgs) -> None:
    """Raises UsageError unless the budget has a batch, cut in equal minibatches that can be standardised."""
    batch, parts = args.num_envs * args.num_steps, vars(args).get("num_minibatches", 1)
    size = f"{args.num_envs} x {args.num_steps} = {batch}"
    if args.total_timesteps < batch:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} is less than one batch, {size}; ask for {batch} or more."
        )
    if batch % parts or (args.norm_adv and batch < 2 * parts):
        divisors = [n for n in range(1, min(batch // 2, 10_000) + 1) if batch % n == 0]
        fits = sorted(divisors, key=lambda n: abs(n - parts))[:3]
        would = f"--num-minibatches {' or '.join(map(str, fits))}" if fits else "a larger --num-steps"
        raise UsageError(f"a batch of {size} has no {parts} equal parts of 2 or more; {would} would do.")


def settle(args: RunArgs, envs: Environments) -> Rng:
    """Decides what is "auto" for this network and machine. Returns the run's random numbers.

    Raises UsageError for what cannot be.
    """
    image = is_image(envs.single_observation_space)
    if args.norm_obs and (image or not isinstance(envs.single_observation_space, gym.spaces.Box)):
        raise UsageError(f"--norm-obs is for vector observations, not those of {args.env_id}; use --no-norm-obs.")
    rng = prepare(args, image)
    if args.bf16 == "on" and not image and not args.resume and not args.evaluate:
        raise UsageError(f"--bf16 on is for the CNN, and {args.env_id} has no images; use --bf16 auto.")
    if args.bf16 == "auto":
        if args.device == "cpu":
            native = torch.cpu.get_capabilities().get("avx512_bf16", False)
        else:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        args.bf16 = "on" if image and native else "off"
    if args.scale_actions == "auto":
        args.scale_actions = "on" if is_far(envs.single_action_space) else "off"
    if args.scale_actions == "on":
        if not bounded(envs.single_action_space).any():
            raise UsageError(f"--scale-actions on: the actions of {args.env_id} have no bounds to scale to; use off.")
        envs.scale = middle_and_half(envs.single_action_space)
    space = envs.single_observation_space
    row = 2000 + 8 * (numbers_of(space) + numbers_of(envs.single_action_space))  # bytes; CartPole took 900 to 3,000
    what = f"a rollout of {args.num_envs} x {args.num_steps} steps"
    if not args.evaluate:  # which plays no rollout
        check_memory(lambda num_steps: row * args.num_envs * num_steps, what, "--num-steps", args.num_steps)
    return rng


# ==== shared: networks and policies ====
class RunningNorm(nn.Module):
    """Mean and variance of all that was seen, merged batch by batch (Chan et al. 1979), as buffers.

    It normalises in double precision what has a dtype that float32 cannot hold: large numbers that differ little.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype = np.float32):
        super().__init__()
        exact = torch.float32 if np.can_cast(dtype, np.float32) else torch.float64
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape, dtype=exact))  # mean and 1 / deviation, for the forward pass
        self.register_buffer("scale", torch.ones(shape, dtype=exact))

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
        return ((x - self.shift) * self.scale).clamp(-10.0, 10.0).float()


class Categorical:
    """Policy over (Multi)Discrete actions: logits (batch, components, choices), actions (batch, components)."""

    def __init__(self, logits: Tensor):
        self.log_probs = F.log_softmax(logits, dim=-1)

    def __getitem__(self, rows: Tensor | slice) -> Categorical:
        return Categorical(self.log_probs[rows])

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

    def log_prob(self, actions: Tensor) -> Tensor:
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other), (batch,)."""
        z2 = ((2 * self.log_std).exp() + (self.mean - other.mean) ** 2) * (-2 * other.log_std).exp()
        return (other.log_std - self.log_std + 0.5 * z2 - 0.5).sum(-1)


def anneal_log_std(agent: Agent, part_left: float, args: Args) -> None:
    """With --log-std-end, sets the log deviation of this moment. part_left falls from 1 to 0 over the run."""
    if agent.continuous and args.log_std_end is not None:
        agent.log_std.fill_(args.log_std_end + (args.log_std_init - args.log_std_end) * part_left)


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
    large = [size >= 36 for size in space.shape]
    return space.dtype == np.uint8 and len(large) == 3 and large[1] and (large[0] or large[2])


def choices_of(space: gym.spaces.Discrete | gym.spaces.MultiDiscrete) -> tuple[tuple[int, int], Tensor | None]:
    """(components, most choices of a component), and which of these choices a component lacks, if any."""
    nvec = space.nvec if isinstance(space, gym.spaces.MultiDiscrete) else space.n
    nvec = torch.from_numpy(np.array(nvec, dtype=np.int64).flatten())
    most = int(nvec.max())
    lacking = torch.arange(most) >= nvec.unsqueeze(-1)
    return (len(nvec), most), lacking if lacking.any() else None


# ==== shared: episodes ====
LONGEST = 1_000_000  # steps of an episode whose actions a checkpoint still holds
UNBOUNDED = 1e9  # a bound beyond this is none: it is the largest number of a dtype


class Episode(NamedTuple):
    """A finished training episode."""

    step: int  # steps of all environments from the start of the rollout to the end of this episode
    episodic_return: float  # raw
    length: int
    env: int


class Episodes:
    """What was played since the last seed of each environment, and since the seed before it, across rollouts.

    To resume, both are played again: the last to rebuild the environment, and the one before to notice an environment
    that remembers earlier episodes. (ale_py does not: a seed makes it read the game again.)
    """

    def __init__(self, envs: Environments):
        self.envs = envs
        self.ended: list[list] = [[] for _ in range(envs.num_envs)]  # parts (actions, rewards) of what was played
        self.in_play: list[list] = [[] for _ in range(envs.num_envs)]
        self.begun = [0] * envs.num_envs  # steps from the last seed to the beginning of the episode in play

    def collect(self, actions: np.ndarray, rewards: np.ndarray, over: np.ndarray) -> list[Episode]:
        """Takes in a rollout, (num_steps, num_envs, ...). Returns the episodes that ended in it."""
        num_envs = self.envs.num_envs
        found = []
        begins = [0] * num_envs
        for t, n in np.argwhere(over).tolist():
            part = slice(begins[n], t + 1)
            self.in_play[n].append((actions[part, n], rewards[part, n]))
            since_seed = np.concatenate([rewards for _, rewards in self.in_play[n]])
            paid = since_seed[self.begun[n] :]
            found.append(Episode((t + 1) * num_envs, float(paid.sum()), len(paid), n))
            begins[n] = t + 1
            self.begun[n] = len(since_seed)
            if len(since_seed) >= self.envs.reseed_after:
                self.ended[n] = [] if self.envs.atari else self.in_play[n]
                self.in_play[n] = []
                self.begun[n] = 0
        for n, begin in enumerate(begins):
            self.in_play[n].append((actions[begin:, n], rewards[begin:, n]))
        return found

    def state_dict(self) -> dict[str, Any]:
        """For each environment the actions and rewards since both seeds, unless one is longer than LONGEST."""
        state: dict[str, Any] = {"numbers": torch.from_numpy(self.envs.numbers.copy()), "begun": [*self.begun]}
        state["too_long"] = False
        for name, played in (("ended", self.ended), ("in_play", self.in_play)):
            joined = [[np.concatenate(column) for column in zip(*parts)] for parts in played]
            state["too_long"] |= any(len(rewards) > LONGEST for _, rewards in filter(None, joined))
            state[name] = [[torch.from_numpy(x) for x in pair] for pair in joined]
        return state | {"ended": [], "in_play": []} if state["too_long"] else state

    def load_state_dict(self, state: dict[str, Any], obs: Tensor) -> tuple[np.ndarray, str]:
        """Plays the episodes of state again, to end with obs. Returns the observations, and what is not as it was.

        If something is not, all environments have begun new episodes.
        """
        numbers = state["numbers"].numpy()
        self.begun = [*state["begun"]]
        for name in ("ended", "in_play"):
            setattr(self, name, [[tuple(x.numpy() for x in pair)] if pair else [] for pair in state[name]])
        try:
            if state["too_long"]:
                raise Failed(f"an episode in play has more than {LONGEST:,} steps, too many for a checkpoint")
            replayed = self.replay(numbers)
            if np.array_equal(replayed, obs.numpy()) and (self.envs.numbers == numbers).all():
                return replayed, ""
            problem = "an environment does not repeat its observations"
        except Failed as error:
            problem = str(error)
        self.__init__(self.envs)
        self.envs.numbers[:] = numbers
        return self.envs.reset(), problem

    def replay(self, numbers: np.ndarray) -> np.ndarray:
        """Plays both episodes of each environment. Returns the observations; raises Failed for another reward.

        Environments begin one after the other, so that all are through at the same time.
        """
        parts = [[*ended, *in_play] for ended, in_play in zip(self.ended, self.in_play)]
        actions = [np.concatenate([part[0] for part in one]) if one else [] for one in parts]
        rewards = [np.concatenate([part[1] for part in one]) if one else [] for one in parts]
        steps = max(map(len, actions))
        waiting = steps - np.array([len(one) for one in actions])
        first = numbers - np.array([len(ended) for ended in self.ended])  # number of the seed to begin with
        idle = next((one[0] for one in actions if len(one)), None)  # the action of those that have not begun
        for t in range(steps + 1):
            if (waiting == t).any():
                self.envs.numbers[waiting == t] = first[waiting == t] - 1
                obs = self.envs.begin(waiting == t)
            if t == steps:
                return obs
            now = [one[t - wait] if t >= wait else idle for one, wait in zip(actions, waiting)]
            obs, paid, *_ = self.envs.step(to_env(self.envs.single_action_space, np.stack(now), self.envs.scale))
            for n in np.flatnonzero(waiting <= t):
                if paid[n] != rewards[n][t - waiting[n]]:
                    raise Failed(f"environment {n} does not repeat its rewards")


def to_env(space: gym.Space, actions: np.ndarray, scale: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Actions (batch, ...) as environments take them, in the space and of its dtype.

    Only here are they scaled by middle and half of the box, clipped to it, and rounded where it is one of integers.
    """
    actions = actions.reshape(-1, *space.shape)
    if not isinstance(space, gym.spaces.Box):
        return (actions + space.start).astype(space.dtype, copy=False)
    if scale:
        actions = scale[0] + actions * scale[1]
    actions = np.minimum(np.maximum(actions, space.low), space.high)
    if space.dtype.kind in "iu":
        with np.errstate(invalid="ignore"):  # the largest integer is a larger float, which would become the smallest
            return np.where(actions < space.high, np.rint(actions).astype(space.dtype), space.high)
    return actions.astype(space.dtype, copy=False)


def bounded(space: gym.Space) -> np.ndarray:
    """Where a box has a lower and an upper bound; False for other spaces."""
    if not isinstance(space, gym.spaces.Box):
        return np.zeros(1, dtype=bool)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return np.maximum(-low, high) < UNBOUNDED


def middle_and_half(space: gym.spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half width of a box where it has both bounds, 0 and 1 where it has not."""
    low, high = (np.where(bounded(space), x.astype(np.float64), y) for x, y in ((space.low, -1), (space.high, 1)))
    return (low + high) / 2, (high - low) / 2


def is_far(space: gym.Space) -> bool:
    """Whether a policy that begins with a mean near 0 and a deviation near 1 has too little to learn from.

    That is so where it seldom comes near a bound, where it is always clipped to both, and where it does not meet the
    box at all. Classic control, MuJoCo and Box2D are not far.
    """
    if not bounded(space).any():
        return False
    middle, half = middle_and_half(space)
    wide, narrow, elsewhere = abs(middle) + half > 5, (half > 0) & (half < 0.1), abs(middle) > half + 1
    return bool((wide | narrow | elsewhere).any())


def understood(agent: Agent, envs: Environments) -> list[str]:
    """How observations are read and actions are made, and warnings of what is known not to learn."""
    space, actions = agent.observation_space, agent.action_space
    reads = "an image through a CNN"
    if not agent.image:
        numbers = f"{agent.actor.first.in_features:,} {'normalised ' if agent.obs_norm else ''}numbers"
        reads = f"{numbers} through an MLP"
    scaled = ", scaled to it" if envs.scale else ""
    lines = [f"observes {brief(space)} as {reads}, acts in {brief(actions)}{scaled}"]
    if not agent.image and sum(size >= 16 for size in space.shape) >= 2:
        takes = "the CNN takes uint8 in three dimensions, two of them 36 or more"
        lines.append(f"warning: an MLP is not known to learn from pixels; {takes}.")
    if is_far(actions) and not envs.scale:
        bounds = f"{actions.low.min():g} to {actions.high.max():g}"
        lines.append(f"warning: actions from {bounds} are not known to learn unscaled; use --scale-actions on.")
    return lines


def lost_in_float32(observations: np.ndarray) -> list[str]:
    """A warning if float32 makes most values equal that differ in some component of (rows, *shape)."""
    ordered = np.sort(observations.reshape(len(observations), -1), axis=0)
    differ = np.diff(ordered, axis=0) != 0
    lost = differ & (np.diff(ordered.astype(np.float32), axis=0) == 0)
    count = int((2 * lost.sum(0) > differ.sum(0)).sum())
    line = (
        f"warning: the network sees float32, which makes equal most values of {count} of {ordered.shape[1]} components"
    )
    return [f"{line} of the observations; use --norm-obs, which normalises in double precision."] if count else []


def check_finite(observations: Tensor, rewards: np.ndarray, final_obs: dict[tuple[int, int], np.ndarray]) -> None:
    """Raises Failed for the first NaN or infinity; observations and rewards are (steps, num_envs, ...)."""
    for name, x in (("observation", observations), ("reward", torch.from_numpy(rewards))):
        if x.is_floating_point() and not x.isfinite().all():
            step, env = (~x.isfinite()).nonzero()[0, :2].tolist()
            raise Failed(f"the {name} of environment {env} in step {step} of the rollout is NaN or infinite")
    for (step, env), x in final_obs.items():
        if not np.isfinite(x).all():
            raise Failed(f"the last observation of environment {env} in step {step} of the rollout is NaN or infinite")


# ==== shared: acting ====
def obs_dtype(agent: Agent) -> torch.dtype:
    """What raw observations are stored as."""
    if agent.image:
        return torch.uint8
    if agent.one_hot:
        return torch.int64
    return agent.obs_norm.shift.dtype if agent.obs_norm else torch.float32


def example_obs(agent: Agent, *batch: int) -> Tensor:
    """Valid observations (*batch, *space.shape), to try or compile something on."""
    space = agent.observation_space
    start = agent.start if agent.one_hot else 0
    return torch.full((*batch, *space.shape), start, dtype=obs_dtype(agent), device=agent.device)


def action_noise(agent: Agent, rng: Rng, *batch: int) -> Tensor:
    """What makes actions random: normal noise of the policy's deviation, or Gumbel noise for logits."""
    if agent.continuous:
        shape = (*batch, len(agent.log_std))
        noise = torch.randn(shape, generator=rng.torch, dtype=torch.float32, device=agent.device)
        return noise * agent.log_std.exp()
    noise = torch.empty(*batch, *agent.choices, dtype=torch.float32, device=agent.device)
    return -noise.exponential_(generator=rng.torch).log_()


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
            x = np.minimum(np.maximum((x - shift) * scale, -10.0), 10.0).astype(np.float32, copy=False)
        x = np.tanh(x.reshape(len(x), -1) @ w1 + b1)
        x = np.tanh(x @ w2 + b2)
        noisy = (x @ w3 + b3).reshape(noise.shape) + noise
        return noisy if agent.continuous else noisy.argmax(-1)

    return actor


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
    values = torch.zeros(shape, dtype=torch.float32, device=agent.device)
    if final_obs:
        obs = torch.from_numpy(np.stack(list(final_obs.values()))).to(agent.device, obs_dtype(agent))
        values[tuple(zip(*final_obs))] = agent.value(agent.features(obs))
    return values


# ==== shared: playing ====
class Steps(NamedTuple):
    """What was played, (num_steps, num_envs, ...) and on the agent's device. Flags belong to step t, after it."""

    observations: Tensor  # one more than steps: also what came after the last one
    features: Tensor  # of these observations, flattened
    actions: Tensor
    rewards: Tensor  # as the method learns from them
    terminations: Tensor
    truncations: Tensor
    final_values: Tensor  # V of the last observation where an episode was truncated, zero elsewhere


class Player:
    """Plays the environments of a run, and owns what goes on from one rollout to the next."""

    def __init__(self, envs: Environments, args: RunArgs, rng: Rng):
        self.envs = envs
        self.args = args
        self.rng = rng
        self.obs = envs.reset()
        self.episodes = Episodes(envs)
        self.discounted = np.zeros(envs.num_envs)  # return so far, for scale_rewards
        self.finished: list[Episode] = []  # in the last rollout
        self.played: Steps | None = None  # the last rollout
        self.final_obs: dict[tuple[int, int], np.ndarray] = {}  # where it was truncated, by step and environment
        self.first = True  # the next rollout is the first one
        self.inexact = ""  # why a resumed run is not the one that stopped

    @as_before()
    @torch.no_grad()
    def play(self, agent: Agent) -> Steps:
        """Plays num_steps steps on in every environment."""
        num_steps, num_envs = shape = self.args.num_steps, self.envs.num_envs
        dtype = obs_dtype(agent)
        raw: list[np.ndarray] | None = None  # observations of the first rollout, where float32 may lose something
        if self.first:
            for line in understood(agent, self.envs):
                say(line)
            raw = [] if dtype == torch.float32 and not np.can_cast(self.obs.dtype, np.float32) else None
            self.first = False
        observations = torch.empty((num_steps + 1, *self.obs.shape), dtype=dtype, device=agent.device)
        noise = action_noise(agent, self.rng, num_steps, num_envs)
        actions = np.zeros(noise.shape[:3], dtype=np.float32 if agent.continuous else np.int64)
        rewards = np.zeros(shape)
        terminations, truncations, over = np.zeros((3, *shape), dtype=bool)
        features: list[Tensor] = []
        final_obs: dict[tuple[int, int], np.ndarray] = {}  # where an episode was truncated, by step and environment
        actor = numpy_actor(agent)
        if actor:
            observations_in_numpy, noise = observations.numpy(), noise.numpy()
        for t in range(num_steps):
            if raw is not None:
                raw.append(self.obs.copy())
            if actor:
                observations_in_numpy[t] = self.obs
                actions[t] = actor(observations_in_numpy[t], noise[t])
            else:
                observations[t].copy_(torch.from_numpy(self.obs))
                features.append(agent.features(observations[t]))
                actions[t] = act(agent, features[t], noise[t]).cpu().numpy()
            try:
                step = self.envs.step(to_env(agent.action_space, actions[t], self.envs.scale))
            except Failed as error:
                check_finite(observations[: t + 1], rewards[:t], final_obs)
                raise Failed(f"in step {t} of the rollout {error}", error.status) from error
            self.obs, rewards[t], terminations[t], truncations[t], over[t], last = step
            if truncations[t].any():
                for n in np.flatnonzero(truncations[t] & ~terminations[t]):
                    final_obs[t, n] = last[n]
        observations[-1].copy_(torch.from_numpy(self.obs))
        check_finite(observations, rewards, final_obs)
        for line in lost_in_float32(np.concatenate(raw)) if raw else []:
            say(line)
        features.append(agent.features(observations.flatten(0, 1) if actor else observations[-1]))
        self.finished = self.episodes.collect(actions, rewards, over)
        if self.args.clip_reward:
            rewards = np.sign(rewards)
        if self.args.norm_reward:
            ended = terminations | truncations
            rewards = scale_rewards(agent.return_norm, rewards, ended, self.discounted, self.args.gamma)
        self.final_obs = final_obs
        self.played = Steps(
            observations=observations,
            features=torch.cat(features),
            actions=torch.from_numpy(actions).to(agent.device),
            rewards=torch.from_numpy(rewards.astype(np.float32)).to(agent.device),
            terminations=torch.from_numpy(terminations).to(agent.device),
            truncations=torch.from_numpy(truncations).to(agent.device),
            final_values=values_at(agent, final_obs, shape),
        )
        return self.played

    @torch.no_grad()
    def look_again(self, agent: Agent) -> Steps:
        """The steps of the last rollout, with features and final values of the present networks."""
        features = agent.features(self.played.observations.flatten(0, 1))
        final_values = values_at(agent, self.final_obs, self.played.rewards.shape)
        return self.played._replace(features=features, final_values=final_values)

    def state_dict(self) -> dict[str, Any]:
        return {
            "obs": torch.from_numpy(np.copy(self.obs)),
            "discounted": torch.from_numpy(self.discounted),
            "episodes": self.episodes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Plays the saved episodes again. Where they are not what they were, begins new ones."""
        self.obs, self.inexact = self.episodes.load_state_dict(state["episodes"], state["obs"])
        if not self.inexact:
            self.discounted = state["discounted"].numpy()


def standardise(x: Tensor) -> Tensor:
    """(x - mean) / standard deviation. In double precision, because rounding would make equal advantages differ."""
    x = x.double()
    return ((x - x.mean()) / (x.std() + 1e-8)).float()


def example_steps(agent: Agent, args: RunArgs) -> Steps:
    """Steps of the right shapes, to compile something for them."""
    shape = (args.num_steps, args.num_envs)
    observations = example_obs(agent, args.num_steps + 1, args.num_envs)
    with torch.no_grad():
        features = agent.features(observations.flatten(0, 1))
        actions = act(agent, features[args.num_envs :], torch.zeros((), device=agent.device)).unflatten(0, shape)
    # Not one tensor three times, because that would be compiled as one input.
    rewards, final_values = torch.zeros(2, *shape, device=agent.device).unbind()
    terminations, truncations = torch.zeros(2, *shape, dtype=torch.bool, device=agent.device).unbind()
    return Steps(observations, features, actions, rewards, terminations, truncations, final_values)


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
    """Adam (arXiv 1412.6980) on one vector, by the kernel of torch.optim.Adam(fused=True).

    Without the optimizer around it a step takes 8 us instead of 71 us for an MLP, a tenth of a minibatch.
    """

    def __init__(self, parameters: Tensor, eps: float = 1e-5):
        self.parameters = parameters
        self.eps = eps
        self.m = torch.zeros_like(parameters)
        self.v = torch.zeros_like(parameters)
        self.t = torch.zeros((), device=parameters.device)  # steps

    @torch.no_grad()
    def step(self, grad: Tensor, learning_rate: float) -> None:
        self.t += 1
        vectors = ([self.parameters], [grad], [self.m], [self.v], [], [self.t])
        options = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        torch._fused_adam_(*vectors, lr=learning_rate, eps=self.eps, **options)

    def state_dict(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v, "t": self.t}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, x in state.items():
            getattr(self, name).copy_(x)


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
    say("torch cannot compile here (is there a C++ compiler?), so updates take three times as long.")
    args.compile = "off"
    return function


def mean_of(stats: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each statistic over minibatches."""
    return {name: torch.stack([one[name] for one in stats]).mean() for name in stats[0]}


def value_variances(returns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """What Run.log makes the explained variance of, 1 - Var[R - V] / Var[R]."""
    return {"returns_variance": returns.var(correction=0), "residual_variance": (returns - values).var(correction=0)}


# ==== shared: run directory ====
STARTED_IN: list[str] = []  # the current folder when main began, because an environment may go to another


def here() -> str:
    """The folder that relative paths are meant from; "" where it was deleted."""
    try:
        return STARTED_IN[-1] if STARTED_IN else os.getcwd()
    except OSError:
        return ""


def shown(path: Path) -> str:
    """A path as it would be typed where main began."""
    return str(path.relative_to(here()) if here() and path.is_relative_to(here()) else path)


class Start:
    """When and where a training began, which has to be known before anything runs that is not ours."""

    def __init__(self) -> None:
        self.clock = time.perf_counter()
        self.folder = here()


def set_handlers(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Lets handler take SIGINT and SIGTERM. Returns what took them before; in a thread, which gets no signals, {}."""
    try:
        return {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        return {}


def put_back(handlers: dict[int, Any]) -> None:
    """Gives signals back to those who took them before."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler or signal.SIG_DFL)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary neighbour, then puts it in the place of path: there is always the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        # What is there is written over and not emptied first, so that a reserved file keeps its place on a full disk.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json_bytes(content))


def run_dir_of(path: Path) -> Path:
    """The run directory that path is, or that the checkpoint path belongs to."""
    return path.parent.parent if path.is_file() else path


def is_a(kind: Any, value: Any) -> bool:
    """Whether value is of the type that an annotation says."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_a(get_args(kind)[0], one) for one in value)
    if get_args(kind):  # float | None
        return any(is_a(one, value) for one in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,)) and value == value  # NaN is not


def read_config(path: Path) -> tuple[RunArgs, dict[str, Any]]:
    """The arguments of a run, and all of its config.json. Raises UsageError, with the reason, where that cannot be."""
    file = run_dir_of(Path(here(), path)) / "config.json"
    kinds = get_type_hints(RunArgs, globals())
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        saved = dict(config["args"])
        wrong = [f"its config.json has an argument {name}" for name in saved if name not in kinds]
        wrong += [f"its config.json has no argument {name}" for name in kinds if name not in saved]
        for name, value in saved.items():
            if not wrong and not is_a(kinds[name], value):
                kind = kinds[name].__name__ if isinstance(kinds[name], type) else kinds[name]
                must = f"be of the type {str(kind).removeprefix('typing.')}"
                raise UsageError(f"{shown(file)} is damaged: {name} is {json.dumps(value)}, but must {must}.")
        if not wrong:
            return RunArgs(**saved), config
        problem = wrong[0]
    except (FileNotFoundError, NotADirectoryError):
        problem = "it has no config.json"
    except OSError as error:
        problem = f"its config.json cannot be read ({error.strerror})"
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        problem = "its config.json is damaged"
    except (ValueError, TypeError, KeyError):
        problem = "its config.json holds no arguments"
    raise UsageError(f"{path} is no run directory of this script: {problem}.")


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of a run directory; {} while there is none, or none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    packages = [name for name in ("torch", "gymnasium", "numpy", "mujoco", "ale_py") if importlib.util.find_spec(name)]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def text_of(file: str | Path | None) -> str | None:
    """The checksum of a program's text; None where that is in no file, as in a notebook."""
    try:
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except OSError:
        return None


def file_of_environment(env_id: str) -> str | None:
    """Where the class of an environment, or the function that makes it, is written."""
    maker = importlib.import_module("gymnasium").spec(env_id.rpartition(":")[2]).entry_point
    module = maker.partition(":")[0] if isinstance(maker, str) else getattr(maker, "__module__", None)
    return getattr(sys.modules.get(module), "__file__", None)


def processor() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name") or os.uname().machine)


# Arguments that have no part in what a run computes, besides those of its evaluations.
NO_PART = ("exp_name", "runs_dir", "run_name", "checkpoint_interval", "cache_warm_start", *MAY_DIFFER)
MATH_LIBRARIES = ("ATEN_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "OMP_", "NPY_")  # what their variables begin with


def conditions(args: RunArgs) -> dict[str, Any]:
    """What must be the same for the same bits."""
    taking_part = {name: x for name, x in vars(args).items() if name not in NO_PART and not name.startswith("eval")}
    texts = {"script": text_of(SCRIPT)}
    if "env_id" in taking_part:
        texts["environment's code"] = text_of(file_of_environment(args.env_id))
    return {
        **versions(),
        **{name: vars(args).get(name) for name in MACHINE},
        **{name: value for name, value in os.environ.items() if name.startswith(MATH_LIBRARIES)},
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "number of cores": affinity(),  # numpy multiplies large batches on all of them
        **texts,
        "arguments": json.loads(json.dumps(taking_part)),  # as config.json gives them back
    }


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of two conditions is not the same, and what cannot be compared."""
    names = [name for name in {**was, **now} if name != "arguments"]
    found = [f"another {name}" for name in names if was.get(name) != now.get(name)]
    found += [f"no file with the {name}" for name in ("script", "environment's code") if now.get(name, "") is None]
    one, other = was["arguments"], now["arguments"]
    changed = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return found + [f"another {name} ({one.get(name)}, now {other.get(name)})" for name in changed]


def git(*command: str) -> str | None:
    """What git says in the folder of this file; None where there is no git, no repository or no file."""
    if not shutil.which("git") or not SCRIPT.is_file():
        return None
    try:
        done = subprocess.run(["git", *command], cwd=SCRIPT.resolve().parent, capture_output=True)
    except OSError:
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def folder_of(args: RunArgs) -> Path:
    """The folder of a new run, from where it is started. Raises UsageError where there can be none of that name."""
    parts = (vars(args).get("env_id"), args.exp_name, args.seed, time.strftime("%Y%m%d-%H%M%S"))
    name = args.run_name or "__".join(str(part) for part in parts if part is not None)
    name = name.replace("/", "-").replace(":", "-")
    length = len(os.fsencode(name)) if name.isprintable() else 0
    if not length or name in (".", "..") or not name.strip():
        raise UsageError(f"{ascii(name)} cannot be the name of a run; choose another --run-name.")
    if length > 255:
        raise UsageError(f"the name of the run has {length} bytes; choose a --run-name of at most 255.")
    if "\0" in args.runs_dir or args.runs_dir.encode(errors="ignore").decode() != args.runs_dir:
        raise UsageError(f"--runs-dir {ascii(args.runs_dir)} is no text; choose another.")
    return Path(args.runs_dir, name)


def create_run_dir(args: RunArgs, start: str = "") -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json; or leaves nothing behind."""
    path = Path(start or here(), folder_of(args))
    above = [folder for folder in path.parents if not os.path.lexists(folder)]
    mine = None
    try:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if args.run_name:
                way_out = f"choose another --run-name, or go on with --resume {shown(path)}"
                raise UsageError(f"{shown(path)} exists; {way_out}.") from None
            path = path.with_name(f"{path.name}-{os.urandom(2).hex()}")  # another run was started in this second
            path.mkdir()
        mine = path
        (path / "checkpoints").mkdir()
        changes = git("status", "--porcelain")
        config = {
            "args": asdict(args),
            # In a notebook there is none: sys.argv is that of its kernel.
            "command": [sys.executable, *sys.argv] if hasattr(sys.modules["__main__"], "__file__") else None,
            "seed": args.seed,
            "versions": versions(),
            "script": text_of(SCRIPT),
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": None if changes is None else bool(changes),
            "hardware": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
            "threads": args.num_threads,
            "wandb_id": os.urandom(4).hex(),
        }
        write_json(path / "config.json", config)
        return path
    except BaseException as error:
        if mine:
            shutil.rmtree(mine, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            way_out = "choose another --runs-dir or --run-name"
            raise UsageError(f"{shown(path)} cannot be made ({error.strerror}); {way_out}.") from None
        raise


class Lock:
    """Keeps a run directory to one writer. The kernel releases it when the process dies."""

    held: dict[str, Lock] = {}  # by this process, whose threads are one to the kernel

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.path = folder / "lock"
        for _ in range(20):  # a second, because an evaluation holds it only while it writes
            if self.taken():
                return
            time.sleep(0.05)
        raise UsageError(f"{shown(folder)} is in use: another process trains or evaluates it; wait for its end.")

    def taken(self) -> bool:
        """Takes it where nobody has it. A lock of this kind works over NFS, and no child inherits it."""
        if self.held.setdefault(self.folder, self) is not self:
            return False
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            del self.held[self.folder]
            raise UsageError(f"{shown(self.path)} cannot be opened ({error.strerror}).") from None
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            return False
        except OSError:
            warn(f"The file system of {shown(self.path)} has no locks: nothing keeps another process out of this run.")
        return True

    def release(self) -> None:
        os.close(self.file)
        del self.held[self.folder]

    def lost(self) -> bool:
        """Whether the run directory is no longer where it was, or another one has its place."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.file))
        except OSError:
            return not self.path.parent.is_dir()


class Table:
    """A csv file of a run. It counts its bytes and sums them up, so that a checkpoint can say what has to be in it."""

    def __init__(self, path: Path, content: bytes = b""):
        self.file = open(path, "ab")
        self.file.truncate(len(content))  # what came after the checkpoint will come again
        self.size = len(content)
        self.checksum = hashlib.sha256(content)

    def write(self, text: str) -> None:
        content = text.encode()
        self.file.write(content)
        self.size += len(content)
        self.checksum.update(content)

    def rows(self, rows: Iterable[list[Any]]) -> None:
        csv.writer(self).writerows(rows)

    def sync(self) -> list[Any]:
        """Puts all on the disk, so that it outlives a power cut. Returns what a checkpoint says of it."""
        if not os.path.samestat(os.stat(self.file.name), os.fstat(self.file.fileno())):
            raise Failed(f"{shown(Path(self.file.name))} was replaced", "failed")
        self.file.flush()
        os.fsync(self.file.fileno())
        return [self.size, self.checksum.hexdigest()]


def read_table(path: Path, size: int, checksum: str) -> bytes:
    """What a csv file held at a checkpoint. Raises UsageError where it does not begin with that."""
    try:
        content = path.read_bytes()[:size]
        problem = "is not what it was at the checkpoint"
        if len(content) < size:
            problem = "is shorter than it was at the checkpoint"
        if hashlib.sha256(content).hexdigest() == checksum:
            return content
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UsageError(f"{shown(path)} {problem}; restore it, or start a new run.")


class TensorBoard:
    """A file of TensorBoard, written without the thread of its own writer, which prints a traceback on a full disk."""

    def __init__(self, path: Path, goes_on_from: int | None = None):
        name = f"events.out.tfevents.{int(time.time()):010}.{os.uname().nodename}.{os.getpid()}.{os.urandom(4).hex()}"
        self.file = open(path / name, "xb")
        self.records = RecordWriter(self.file)
        self.add(0, file_version="brain.Event:2")
        if goes_on_from is not None:  # what another file has of later steps is not shown
            self.add(goes_on_from + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        self.records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def close(self) -> None:
        self.file.close()


class Log:
    """episodes.csv and progress.csv of a run, and their views in TensorBoard and Weights & Biases.

    A view that fails is given up. `lost` says so, until the run has shown that it can go on.
    """

    def __init__(self, path: Path, args: RunArgs, state: dict[str, Any] | None, tables: dict[str, bytes]):
        self.waiting: list[tuple[str, float, int]] = []  # for TensorBoard
        self.handed_over = 0.0
        self.first_row: dict[str, Any] = {}  # that of step 0, which does not have all columns
        self.lost: list[str] = []
        self.tables = {name: Table(path / f"{name}.csv", tables.get(name, b"")) for name in ("episodes", "progress")}
        self.columns = next(csv.reader([tables.get("progress", b"").split(b"\n")[0].decode()]))
        self.tensorboard = self.wandb = None
        names = [field.name for field in fields(Args) if field.name in vars(args)]  # of the method and the environment
        swept = {name: vars(args)[name] for name in names}
        with self.view("tensorboard"):
            self.tensorboard = TensorBoard(path, state["global_step"] if state else None)
        if not state:
            self.tables["episodes"].rows([["global_step", "wall_time", "return", "length"]])
            self.text("hyperparameters", [("name", "value"), *vars(args).items()], 0)
            if self.tensorboard:
                with self.view("tensorboard"):
                    self.hparams(swept)
        if args.track:
            with self.view("wandb"):
                import wandb

                names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": path.name}
                identity = json.loads((path / "config.json").read_text(encoding="utf-8"))["wandb_id"]
                self.wandb = wandb.init(id=identity, resume="allow", config=swept, dir=path, **names)

    @contextlib.contextmanager
    def view(self, name: str) -> Iterator[None]:
        """What fails in a view must not end the run, because the files tell the same."""
        try:
            yield
        except Exception as error:
            setattr(self, name, None)
            title = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}[name]
            self.lost.append(
                f"{title} is given up, and the run goes on without it: {one_line(error)[:300] or type(error).__name__}"
            )

    def hparams(self, swept: dict[str, Any]) -> None:
        """The HParams tab. It shows those first that are marked as different, by their names: what is no default."""
        default = vars(RunArgs(**preset(swept[PRESET]))) | {PRESET: vars(RunArgs())[PRESET]}
        plain = {name: x if type(x) in (int, float) else str(x) for name, x in swept.items()}
        experiment, *session = hparams(plain, dict.fromkeys(METRICS, 0.0))
        content = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(content.content)
        for info in data.experiment.hparam_infos:
            info.differs = swept[info.name] != default[info.name]
        content.content = data.SerializeToString()
        for summary in (experiment, *session):
            self.tensorboard.add(0, summary=summary)

    def row(self, step: int, columns: dict[str, Any], values: dict[str, float]) -> None:
        """A row of progress.csv. The values go to TensorBoard and wandb, too; NaN stands for none."""
        row = columns | values
        row = {name: "" if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()}
        rows = [row]
        if not step:
            self.first_row = row
            rows = []
        elif not self.columns:
            self.columns = list(row | self.first_row)
            head = dict(zip(self.columns, self.columns))
            rows = [head, self.first_row, row] if self.first_row else [head, row]
        self.tables["progress"].rows([one.get(name, "") for name in self.columns] for one in rows)
        for table in self.tables.values():
            table.file.flush()
        values = {tag: value for tag, value in values.items() if not math.isnan(value)}
        self.waiting += [(tag, value, step) for tag, value in values.items()]
        if time.perf_counter() - self.handed_over > 2.0:
            self.hand_over()
        with self.view("wandb"):
            if self.wandb and (not step or step > self.wandb.step):  # it refuses what a killed run has sent already
                self.wandb.log(values, step=step)

    def text(self, tag: str, table: list[Any], step: int) -> None:
        """A table, its head first, as text in TensorBoard."""
        lines = ["|".join(str(cell) for cell in row) for row in table]
        lines.insert(1, "|".join("-" for _ in table[0]))
        if self.tensorboard:
            with self.view("tensorboard"):
                self.tensorboard.add(step, summary=text(tag, "".join(f"|{line}|\n" for line in lines)))

    def hand_over(self) -> None:
        """Gives TensorBoard what is waiting."""
        if self.tensorboard:
            with self.view("tensorboard"):
                for tag, value, step in self.waiting:
                    self.tensorboard.add(step, summary=scalar(tag, value))
                self.tensorboard.file.flush()
        self.waiting = []
        self.handed_over = time.perf_counter()

    def tell(self) -> None:
        """Says which views are lost."""
        for line in self.lost:
            warn(line)
        self.lost = []

    def close(self) -> None:
        self.hand_over()
        for file in (*(table.file for table in self.tables.values()), getattr(self.tensorboard, "file", None)):
            with contextlib.suppress(OSError):  # all that counts was put on the disk before
                if file:
                    file.close()

    def finish_wandb(self, exit_code: int) -> None:
        if self.wandb:
            with self.view("wandb"):
                self.wandb.finish(exit_code=exit_code)


class Progress:
    """One line that renews itself on a terminal; a line every five seconds elsewhere."""

    def __init__(self) -> None:
        try:
            self.terminal = sys.stdout.isatty()
        except (AttributeError, ValueError):  # it is None or closed, or something of a notebook
            self.terminal = False
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
            bar = f"[{'#' * int(10 * part):.<10}]"
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{(bar + line if len(bar + line) <= width else line)[:width]}\x1b[K"
        say(line, "" if self.open else "\n")

    def end(self) -> None:
        """What follows is printed on a line of its own."""
        if self.open:
            say("")
        self.open = False


class Rng:
    """A run's own random numbers. The global ones of Python, numpy and torch are anybody's, also an environment's."""

    def __init__(self, seed: int | str, device: str):
        self.python = random.Random(seed)
        self.torch = torch.Generator(device).manual_seed(self.python.getrandbits(63))

    def permutation(self, n: int) -> Tensor:
        """0 to n - 1 in random order."""
        return torch.randperm(n, generator=self.torch, device=self.torch.device)

    def integers(self, n: int, count: int) -> Tensor:
        """count numbers from 0 to n - 1."""
        return torch.randint(n, (count,), generator=self.torch, device=self.torch.device)

    def state_dict(self) -> dict[str, Any]:
        version, keys, gauss = self.python.getstate()
        return {"python": [version, list(keys), gauss], "torch": self.torch.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, keys, gauss = state["python"]
        self.python.setstate((version, tuple(keys), gauss))
        if len(state["torch"]) == len(self.torch.get_state()):  # a GPU's state has another form than a processor's
            self.torch.set_state(state["torch"])


KEPT = ("iteration", "global_step", "last_returns", "best", "notes", "gathered", "episodes")  # in every checkpoint


class Run:
    """What a run is: its directory, iterations, checkpoints, signals, and how it ends.

    Progress is counted in steps, up to total. learner are the parts that a checkpoint saves, by name: tensors, and
    objects with a state_dict.
    """

    def __init__(
        self, args: RunArgs, total: int, started: Start, log_interval: int = 1, unit: str = "steps", **learner
    ):
        self.args = args
        self.total = total
        self.started = started
        self.log_interval = log_interval
        self.unit = unit
        self.learner = learner
        self.iteration = 0
        self.global_step = self.first_step = 0
        self.last_returns: list[float] = []  # of the last 100 training episodes
        self.best = -math.inf
        self.notes: dict[str, Any] = {}  # what else summary.json tells
        self.earlier_time = 0.0  # seconds of training in earlier sessions
        self.headline = ""  # what else the progress line tells
        self.outcome = ""  # what else the last line tells
        self.gathered: list[dict[str, float]] = []  # values of the iterations since the last row
        self.episodes: list[list[float]] = []  # return and length of what ended since the last row
        self.signals: list[int] = []
        self.leaving = self.complete = False
        self.process = os.getpid()
        self.conditions = conditions(args)
        self.progress = Progress()
        self.how = ""  # it goes on
        self.handlers: dict[int, Any] = {}
        self.lock = self.files = None
        self.tables: dict[str, bytes] = {}  # what the csv files hold
        self.start_clock()

    def __enter__(self) -> Run:
        try:
            self.begin()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def take_signal(self, signum: int, frame: Any) -> None:
        """The first one lets the iteration finish, the second lets all that is open close, the third nothing."""
        self.signals.append(signum)
        if len(self.signals) > 2:
            os._exit(128 + signum)
        if len(self.signals) == 2 and not self.leaving:
            raise Stopped(signum)

    def begin(self) -> None:
        """Makes the run directory, or goes on in it. Raises UsageError before anything is changed."""
        state = None
        if self.args.resume:
            self.path = Path(self.started.folder, self.args.resume)
            self.lock = Lock(self.path)
            expected = self.state()
            state = load_checkpoint(self.path, lambda state: self.restore(state, expected))
            self.handlers = set_handlers(self.take_signal)
        else:
            self.handlers = set_handlers(self.take_signal)
            self.path = create_run_dir(self.args, self.started.folder)
            self.lock = Lock(self.path)
        self.first_step = self.global_step
        self.complete = self.global_step >= self.total and read_summary(self.path).get("status") == "completed"
        if self.complete:
            say(f"{shown(self.path)} is complete; there is nothing left to train.")
            return
        for file in (self.path / "checkpoints").glob("step_*.pt") if state else ():
            if file.name > f"step_{self.global_step:012}.pt":  # it was left out, and the run takes another course now
                file.replace(file.with_suffix(".unused"))
        with open(self.path / "summary.json.tmp", "wb") as file:  # so that a full disk has room for the summary
            file.write(b" " * 16384)
        self.files = Log(self.path, self.args, state, self.tables)
        self.tables = {}
        compiled = ", compiled" if vars(self.args).get("compile") == "on" else ""
        say(f"{shown(self.path)} ({self.args.device}, threads: {self.args.num_threads}{compiled})")
        if state:
            say(f"goes on from step {self.global_step:,}, {self.how}")
        self.start_clock()
        if not state:
            self.save()

    def start_clock(self) -> None:
        """Training begins here; what was before is start-up."""
        self.begun = time.perf_counter()
        self.startup_time = self.begun - self.started.clock

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, but for the files."""
        kind, keys, *position = np.random.get_state()
        return {
            **{name: part if isinstance(part, Tensor) else part.state_dict() for name, part in self.learner.items()},
            **{name: getattr(self, name) for name in KEPT},
            "wall_time": self.wall_time(),
            "total": self.total,
            "conditions": self.conditions,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.args.device == "cuda" else [],
            "numpy_rng": [kind, keys.tolist(), *position],
            "python_rng": random.getstate(),
        }

    def restore(self, state: dict[str, Any], expected: dict[str, Any]) -> None:
        """Puts back what save has written. Raises ValueError where that has not the form expected.

        Whatever is put back here is put back again by the next checkpoint that is tried.
        """
        if problem := misfit(expected | {"conditions": {}, "csv": {"episodes": [], "progress": []}}, state):
            raise ValueError(problem)
        self.tables = {name: read_table(self.path / f"{name}.csv", *what) for name, what in state["csv"].items()}
        for name, part in self.learner.items():
            if isinstance(part, Tensor):
                part.copy_(state[name])
            else:
                part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):  # it takes in anything
                for parameter, values in part.state.items():
                    if any(x.shape not in ((), parameter.shape) for x in values.values()):
                        raise ValueError(f"{name} has other shapes")
        for name in KEPT:
            setattr(self, name, state[name])
        numbers = [self.last_returns, self.episodes, *(list(values.values()) for values in self.gathered)]
        for some in numbers:
            np.array(some, dtype=float)  # raises where they are none
        self.total = self.total or state["total"]  # it may be known only after the start
        self.earlier_time = state["wall_time"]
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and self.args.device == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        np.random.set_state(tuple(state["numpy_rng"]))
        version, keys, gauss = state["python_rng"]
        random.setstate((version, tuple(keys), gauss))
        differs = [part.inexact for part in self.learner.values() if getattr(part, "inexact", "")]
        differs += differences(state["conditions"], self.conditions)
        differs += ["a GPU does not repeat itself bit for bit"] if self.args.device == "cuda" else []
        self.how = f"but not exactly: {', '.join(differs)}" if differs else "exactly as if it had never stopped"

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are left. After each comes what is due: a row, a checkpoint, the end."""
        while self.global_step < self.total:
            self.iteration += 1
            before = self.global_step
            yield self.iteration
            last, stop = self.global_step >= self.total, bool(self.signals)
            if self.args.checkpoint_interval:
                due = self.iteration % self.args.checkpoint_interval == 0
            else:
                due = 20 * self.global_step // self.total > 20 * before // self.total
            if last or self.iteration % self.log_interval == 0:
                self.write_row()
            if due or last or stop:
                self.save(best=due or last)
            if stop and not last:
                raise Stopped(self.signals[0])

    def part_left(self) -> float:
        """The part of the budget that is left, from 1 to 0."""
        return 1 - self.global_step / self.total

    def log(self, steps: int, episodes: list, values: dict[str, Any] | None = None, **groups: dict[str, Any]) -> None:
        """Takes in an iteration: its steps, episodes (step, return, length, ...), and values by their tags.

        The name of a group comes before the names of its values. Raises Failed for the first that is not finite.
        """
        tagged = dict(values or {})
        for group, members in groups.items():
            tagged |= {f"{group}/{name}": value for name, value in members.items()}
        numbers = [torch.as_tensor(value, dtype=torch.float64, device=self.args.device) for value in tagged.values()]
        self.gathered.append(dict(zip(tagged, torch.stack(numbers).tolist())))  # stacked, to read a GPU once
        for tag, number in self.gathered[-1].items():
            if not math.isfinite(number):
                raise Failed(f"{tag.removeprefix('losses/')} is {number}")
        if episodes:
            now = f"{self.wall_time():.3f}"
            rows = [[self.global_step + step, now, *rest[:2]] for step, *rest in episodes]
            self.files.tables["episodes"].rows(rows)
            self.episodes += [row[2:] for row in rows]
            self.last_returns = (self.last_returns + [row[2] for row in rows])[-100:]
        self.global_step += steps

    def write_row(self) -> None:
        """A row of progress.csv, with the means over the iterations since the last one."""
        means = {tag: float(np.mean([values[tag] for values in self.gathered])) for tag in self.gathered[-1]}
        if "losses/returns_variance" in means:
            variance = means.pop("losses/returns_variance")
            residual = means.pop("losses/residual_variance")
            means["losses/explained_variance"] = 1 - residual / variance if variance else math.nan
        returns, lengths = np.mean(self.episodes, 0).tolist() if self.episodes else (math.nan, math.nan)
        score = math.nan if self.score() is None else self.score()
        sps = self.sps()
        charts = {"episodic_return": returns, "episodic_length": lengths, "train_last100": score, "SPS": sps}
        values = {f"charts/{name}": value for name, value in charts.items()} | means
        columns = {"global_step": self.global_step, "wall_time": f"{self.wall_time():.3f}", "sps": sps}
        self.files.row(self.global_step, columns, values)
        self.gathered = []
        self.episodes = []
        line = f"{self.unit} {min(self.global_step / self.total, 1):4.0%}"
        if self.global_step and sps > 0:
            seconds = int(max(self.total - self.global_step, 0) / sps)
            left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
            line += f" {sps:>7,.0f}/s  return {'-' if math.isnan(score) else f'{score:,.1f}':>9}  {left}"
        self.progress.show(line + self.headline, self.global_step, self.total)

    def score(self) -> float | None:
        """Mean return of the last 100 training episodes."""
        return float(np.mean(self.last_returns)) if self.last_returns else None

    def wall_time(self) -> float:
        """Seconds of training, with earlier sessions, without start-up and compilation."""
        return self.earlier_time + time.perf_counter() - self.begun

    def sps(self) -> float:
        """Steps per second of this session, or of those before it where this one had nothing left to train."""
        steps, seconds = self.global_step - self.first_step, time.perf_counter() - self.begun
        if self.first_step >= self.total:
            steps, seconds = self.first_step, self.earlier_time
        return steps / seconds if steps and seconds > 0 else math.nan

    def save(self, best: bool = True) -> None:
        """Writes checkpoints/step_*.pt, of which two stay, and best.pt where the last 100 episodes were the best.

        best is false for a checkpoint that a signal forces: it must not change what the run leaves behind.
        """
        score = self.score()
        better = best and score is not None and score > self.best
        if better:
            self.best = score
        if self.lock.lost():
            raise Failed(f"{shown(self.path)} was moved, replaced or deleted", "failed")
        self.files.hand_over()
        state = self.state() | {"csv": {name: table.sync() for name, table in self.files.tables.items()}}
        buffer, folder = io.BytesIO(), self.path / "checkpoints"
        torch.save(state, buffer)
        if better:  # first, because the other one says that it is done
            write_atomically(folder / "best.pt", buffer.getbuffer())
        write_atomically(folder / f"step_{self.global_step:012}.pt", buffer.getbuffer())
        for old in [] if self.args.keep_checkpoints else sorted(folder.glob("step_*.pt"))[:-2]:
            old.unlink(missing_ok=True)
        self.files.tell()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Tells how the run has ended, in summary.json first."""
        self.leaving = True
        if os.getpid() != self.process:  # a child that an environment has forked must not end the run
            return
        try:
            if self.lock and not self.complete and (self.files or not self.args.resume):
                self.finish(error)
        finally:
            if self.lock:
                self.lock.release()
            put_back(self.handlers)

    def finish(self, error: BaseException | None) -> None:
        """Writes summary.json. Raises Failed for an error, with when it happened and where the run can go on."""
        self.progress.end()
        status = error.status if isinstance(error, (Failed, Stopped)) else "failed" if error else "completed"
        if isinstance(error, KeyboardInterrupt):  # Ctrl-C, where an environment has taken our handler away
            status = "interrupted"
        unit = 2**20 if sys.platform == "darwin" else 2**10
        summary = {
            "status": status,
            "global_step": self.global_step,
            "wall_time": self.wall_time(),
            "sps": 0.0 if math.isnan(self.sps()) else self.sps(),
            "startup_time": self.startup_time,
            "train_last100": self.score(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            **self.notes,
        }
        if evaluations := read_summary(self.path).get("eval"):
            summary["eval"] = evaluations
        if self.files:
            self.files.close()  # first, because an environment may have left no other file descriptors
        message = ""
        if status in ("diverged", "failed"):
            message = summary["error"] = f"iteration {self.iteration}: {self.explain(error)}"
        problem = self.write_summary(summary)
        if self.files:
            self.files.finish_wandb(int(status != "completed"))
        if message:
            raise Failed(message, status) from error
        if self.files:
            self.files.tell()
        if problem:
            warn(f"summary.json of {shown(self.path)} cannot be written ({problem}).")
        if problem and not error:
            raise Failed(f"all is trained, but make room and go on with --resume {shown(self.path)}", "failed")
        say(f"{status} after {self.global_step:,} {self.unit}{self.outcome}: {shown(self.path)}")

    def explain(self, error: BaseException) -> str:
        """What went wrong, the newest good checkpoint, and the traceback, if there is more to it than the message."""
        root = error
        while isinstance(root, Failed) and root.__cause__:
            root = root.__cause__
        expected = isinstance(error, (Failed, UsageError, OSError))
        text = f"{'' if expected else type(error).__name__ + ': '}{one_line(error)[:500]}".rstrip(": ")
        good = None
        with contextlib.suppress(OSError):
            files = sorted((self.path / "checkpoints").glob("step_*.pt"), reverse=True)
            good = next((file for file in files if not damage_of(file)), None)
        text += f"; the last good checkpoint is {shown(good) if good else 'none'}"
        if not isinstance(root, (Failed, UsageError)) and not (root is error and expected):
            import traceback

            with contextlib.suppress(OSError):
                lines = "".join(traceback.format_exception(error))
                (self.path / "error.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
                text += f", and the traceback is in {shown(self.path / 'error.txt')}"
        return f"{text}."

    def write_summary(self, summary: dict[str, Any]) -> str:
        """Returns what prevents it, or "". Where it cannot be done well, on a full disk, it is done somehow."""
        problem = "the run directory was moved, replaced or deleted" if self.lock.lost() else ""
        for write in () if problem else (write_atomically, Path.write_bytes):
            try:
                write(self.path / "summary.json", json_bytes(summary))
                return ""
            except OSError as error:
                problem = one_line(error)
        return problem


def misfit(mine: Any, theirs: Any, name: str = "it") -> str:
    """Where theirs, from a checkpoint, has another form than mine; "" if nowhere. What is empty may hold anything."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine.keys() - theirs.keys(), *theirs.keys() - mine.keys()] if mine else []:
            return f"{name} {'lacks' if key in mine else 'has'} {key}"
        for key in mine:
            if problem := misfit(mine[key], theirs[key], f"{name}.{key}".removeprefix("it.")):
                return problem
        return ""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        of_any_length = mine.dtype == theirs.dtype == torch.uint8 and mine.dim() == theirs.dim() == 1  # a random state
        forms = [f"{tuple(x.shape)} {x.dtype}".replace("torch.", "") for x in (mine, theirs)]
        return "" if of_any_length or forms[0] == forms[1] else f"{name} is {forms[1]} and not {forms[0]}"
    numbers = all(isinstance(x, (int, float)) for x in (mine, theirs))
    return "" if numbers or type(mine) is type(theirs) else f"{name} is a {type(theirs).__name__}"


def damage_of(file: Path) -> str:
    """Why a checkpoint cannot be read, or ""."""
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()  # torch does not look at the checksums
            return f"is corrupt ({part} has a wrong checksum)" if part else ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except Exception as error:  # damage can surface as almost anything
        return f"is corrupt ({type(error).__name__})"


def load_checkpoint(path: Path, use: Callable[[dict[str, Any]], Any] = bool) -> dict[str, Any]:
    """The newest checkpoint of a run directory that is good, or the file given; use is called with it.

    One that cannot be read, or that use raises for, is named and the one before it taken; none starts afresh.
    """
    path = Path(here(), path)
    for file in [path] if path.is_file() else sorted((path / "checkpoints").glob("step_*.pt"), reverse=True):
        problem = damage_of(file)
        if not problem:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                problem = f"is not a checkpoint ({type(error).__name__})"
        if not problem:
            try:
                use(state)
                return state
            except (UsageError, Failed):
                raise
            except Exception as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                problem = f"is not a checkpoint of this run ({kind}{one_line(error)[:200]})"
        if path.is_file():
            raise UsageError(f"{shown(file)} {problem}.")
        warn(f"{shown(file)} {problem}, so it is left out.")
    raise UsageError(f"{shown(path)} has no checkpoint that can be used. If it ended while it started, start it again.")


def record_evaluation(path: Path, result: dict[str, Any], values: dict[str, float], step: int) -> None:
    """Adds an evaluation of a run that has ended to its summary.json, and the values by their tags to TensorBoard.

    That it cannot is said, and is no reason to fail: the result was printed.
    """
    folder, lock = run_dir_of(Path(here(), path)), None
    try:
        lock = Lock(folder)
        summary = read_summary(folder)
        if not summary:
            raise UsageError("the run has not ended.")
        before = summary.get("eval")
        summary["eval"] = (before if isinstance(before, dict) else {}) | result
        write_json(folder / "summary.json", summary)
        with contextlib.closing(TensorBoard(folder)) if values else contextlib.nullcontext() as writer:
            for tag, value in values.items():
                writer.add(step, summary=scalar(tag, value))
    except (UsageError, OSError) as error:
        warn(f"The result is not in summary.json and TensorBoard of {shown(folder)}: {one_line(error)}")
    finally:
        if lock:
            lock.release()


# ==== shared: evaluation ====
class Camera(Environments):
    """Environments that film the first one. Atari's emulators cannot render, so twins play the same games in colour."""

    def __init__(self, envs: Environments, args: RunArgs, name: str, episodes: int):
        super().__init__(envs.envs, envs.seed)
        self.scale = envs.scale
        self.path = run_dir_of(Path(args.evaluate)) / "videos"
        self.name = name
        self.left = self.episodes = episodes  # to film
        self.frames: list[np.ndarray] = []
        colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
        self.twins = make_envs(args, self.num_envs, self.seed, **colour) if self.atari else None

    def close(self) -> None:
        super().close()
        if self.twins:
            self.twins.close()

    def reset(self) -> np.ndarray:
        if self.twins:
            self.twin_obs = self.twins.reset()
        return super().reset()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.left:
            self.frames.append(self.twin_obs[0, -1].copy() if self.twins else self.envs.picture())
        if self.twins:
            self.twin_obs = self.twins.step(actions)[0]
        outcome = super().step(actions)
        if outcome[4][0] and self.frames:
            from moviepy import ImageSequenceClip

            self.left -= 1
            self.path.mkdir(exist_ok=True)
            path = self.path / f"{self.name}_episode_{self.episodes - self.left}.mp4"
            ImageSequenceClip(self.frames, fps=30).write_videofile(str(path), logger=None)
            self.frames = []
        return outcome


@torch.no_grad()
def play_episodes(agent: Agent, envs: Environments, shares: list[int], args: RunArgs) -> tuple[list[float], str]:
    """Plays shares[n] episodes in environment n. Returns their raw returns, and which episode did not end, or ""."""
    rng, progress = Rng(args.eval_seed, args.device), Progress()
    actor, dtype = numpy_actor(agent), str(obs_dtype(agent)).removeprefix("torch.")
    returns: list[list[float]] = [[] for _ in shares]
    paid, lasted = np.zeros((2, envs.num_envs))  # of the episodes in play
    still = torch.zeros_like(action_noise(agent, rng, envs.num_envs))
    steps, endless = 0, ""
    begun = time.perf_counter()
    obs = envs.reset()
    while not endless and any(len(played) < share for played, share in zip(returns, shares)):
        noise = action_noise(agent, rng, envs.num_envs) if args.eval_stochastic else still
        x = obs.astype(dtype)
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            n = np.argwhere(~np.isfinite(x))[0, 0]
            raise Failed(f"the observation of environment {n} of {args.env_id} is NaN or infinite")
        if actor:
            actions = actor(x, noise.numpy())
        else:
            actions = act(agent, agent.features(torch.from_numpy(x).to(agent.device)), noise).cpu().numpy()
        obs, rewards, _, _, over, _ = envs.step(to_env(agent.action_space, actions, envs.scale))
        steps += envs.num_envs
        paid += rewards
        lasted += 1
        for n in np.flatnonzero(over):
            returns[n].append(float(paid[n]))
            paid[n] = lasted[n] = 0
        for n in np.flatnonzero(lasted >= args.eval_max_steps):
            if len(returns[n]) < shares[n] and not endless:
                where = f"environment {n} of {args.env_id}"
                endless = f"an episode of {where} did not end within {args.eval_max_steps:,} steps (--eval-max-steps)"
        if time.perf_counter() - begun > 5:  # a short evaluation shows nothing
            done = sum(min(len(played), share) for played, share in zip(returns, shares))
            progress.show(f"of {args.eval_episodes:,} episodes, {steps:,} steps", done, args.eval_episodes)
    progress.end()
    return [score for played, share in zip(returns, shares) for score in played[:share]], endless


def evaluate(args: RunArgs) -> list[float]:
    """Plays eval_episodes with the run args.evaluate, its normalisers frozen. Returns the raw returns.

    Where the run has ended, the result goes to its summary.json and, as eval/episodic_return, to TensorBoard. Raises
    Failed where an episode does not end. Those that did are told, but not recorded, because they are the short ones.
    """
    check_args(args)
    args = replace(args, evaluate=str(Path(here(), args.evaluate)))  # before an environment goes to another folder
    path, num_envs = Path(args.evaluate), min(args.eval_episodes, 8)
    # Each environment plays its share of the episodes, because the first ones to end are the shortest.
    shares = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]
    rendered = args.capture_video and environment_family(args.env_id) != "atari"
    with make_envs(args, num_envs, args.eval_seed, **{"render_mode": "rgb_array"} if rendered else {}) as envs:
        settle(args, envs)
        agent = make_agent(envs, args)
        state = load_checkpoint(path, lambda state: agent.load_state_dict(state["agent"]))
        if args.capture_video:
            envs = Camera(envs, args, f"iteration_{state['iteration']}", shares[0])
        with envs:  # the camera has environments of its own to close
            scores, endless = play_episodes(agent, envs, shares, args)
    kind = "stochastic" if args.eval_stochastic else "deterministic"
    result = {name: float(getattr(np, name)(scores)) for name in ("mean", "std", "min", "max") if scores}
    if scores:
        say(f"{len(scores)} {kind} episodes: {', '.join(f'{name} {value:,.2f}' for name, value in result.items())}")
    if endless:
        ended = f"{len(scores)} of {args.eval_episodes} episodes ended, and nothing is recorded"
        raise Failed(f"{endless}; {ended}.", "failed")
    if not np.isfinite(scores).all():
        raise Failed(f"{args.env_id}: a return is NaN or infinite", "failed")
    result |= {"episodes": len(scores), "seed": args.eval_seed}
    result |= {name: state[name] for name in ("iteration", "global_step")}
    record_evaluation(path, {kind: result}, {"eval/episodic_return": result["mean"]}, state["global_step"])
    return scores


# ==== shared: main ====
def main(argv: list[str] | None = None) -> int:
    """The command line. The exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""

    def leave(signum: int, frame: Any) -> None:
        raise Stopped(signum)

    for fd in range(3):  # one that was closed would be given to the next file, and foreign code prints into it
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    handlers = set_handlers(leave)
    STARTED_IN.append(here())
    try:
        args = parse_args(argv)
        try:
            path = args.evaluate or str(train(args))
            if args.evaluate or vars(args).get("capture_video"):
                evaluate(replace(args, evaluate=path))
        except SystemExit as error:  # of an environment, say
            raise Failed(f"something has called sys.exit({error.code!r})", "failed") from error
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 130
    except (UsageError, Failed, OSError) as error:
        warn(f"error: {one_line(error)}")
        return 2 if isinstance(error, UsageError) else 1
    finally:
        STARTED_IN.pop()
        put_back(handlers)


if __name__ == "__main__":
    status = main()
    if SCRIPT.is_file():  # a notebook would show the exit as an error
        sys.exit(status)
