"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), in one file.

Play num_steps steps in num_envs environments with the policy pi_old, then climb, for a few epochs over
minibatches of that batch, the clipped surrogate (eq. 7) minus the value error plus an entropy bonus (eq. 9):

    L(theta) = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - c1 (V(s) - R)^2 / 2 + c2 S[pi](s) ],   r = pi(a|s) / pi_old(a|s)

with A the generalized advantage estimate (arXiv 1506.02438) and R = A + V_old(s). `--objective` puts the other
surrogates of the paper in the place of the first term: kl-fixed and kl-adaptive (eq. 8, section 4) and none (eq. 6).

    python ppo.py --env-id CartPole-v1
    python ppo.py --env-id HalfCheetah-v5 --seed 2
    python ppo.py --env-id BreakoutNoFrameskip-v4
    python ppo.py --evaluate runs/<run>         python ppo.py --resume runs/<run>         python ppo.py --help --env-id Hopper-v5

Departures from the paper: advantages are normalised per minibatch, the gradient is clipped by its global norm, weights
start orthogonal, actor and critic are separate networks for vector observations (c1 then only scales the critic's
gradient against the clip), Atari has 4 epochs and a constant clip range, and an episode that a time limit cuts is
bootstrapped with the value of its last state, because it did not end there (Pardo et al. 2018, arXiv 1712.00378).
"""

import argparse
import csv
import difflib
import importlib.metadata
import importlib.util
import io
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
import traceback
import uuid
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


# ---------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # Run
    exp_name: str = Path(__file__).stem
    """name of the experiment, a part of the run's name"""
    seed: int = 1
    """seed of everything: weights, actions, minibatches, environments"""
    runs_dir: str = "runs"
    """folder of all runs"""
    run_name: str = ""
    """folder of this run inside runs-dir (default: {env_id}__{exp_name}__{seed}__{time})"""
    resume: str = ""
    """run directory to go on with, from its newest good checkpoint and with its own arguments"""
    evaluate: str = ""
    """run directory (or one checkpoint file) to load and play instead of training"""
    eval_episodes: int = 10
    """episodes that --evaluate plays"""
    eval_seed: int = 1_000_000
    """seed of the environments and actions of --evaluate"""
    eval_stochastic: bool = False
    """sample the actions of --evaluate instead of taking the most likely ones"""
    capture_video: bool = False
    """with --evaluate: write the episodes of the first environment as mp4 into the run directory"""
    checkpoint_interval: int = 0
    """iterations between checkpoints; environments restart there, so that resume is exact (0: a twentieth of the run)"""
    track: bool = False
    """log to Weights & Biases too (offline where WANDB_MODE=offline)"""
    wandb_project_name: str = "lineage"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cpu for the MLP, cuda for the CNN where there is one"""
    num_threads: int = 0
    """CPU threads of torch and of the Atari emulators (0: one for the MLP, all cores for the CNN)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the gradient of a minibatch (auto: for the MLP, where the run is long enough to earn the 10 s back)"""
    bf16: Literal["auto", "on", "off"] = "auto"
    """run the CNN's layers in bfloat16 (auto: where the processor multiplies it natively)"""

    # Environment
    env_id: str = "CartPole-v1"
    """any registered environment with supported spaces; package:Env-v0 imports the package first"""
    num_envs: int = 8
    """environments played side by side"""
    norm_obs: bool = False
    """normalise observations by their running mean and deviation"""
    norm_reward: bool = False
    """divide rewards by the running deviation of the discounted return"""
    clip_reward: bool = False
    """learn from the sign of the reward (DQN's protocol for Atari); reported returns stay raw"""

    # Algorithm
    total_timesteps: int = 200_000
    """environment steps of the whole run"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    anneal_lr: bool = True
    """let the step size fall linearly to zero"""
    num_steps: int = 128
    """steps per environment between two updates (the paper's horizon T)"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimate"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 10
    """epochs over each batch (K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    objective: Literal["clip", "kl-fixed", "kl-adaptive", "none"] = "clip"
    """surrogate: clipped (eq. 7), KL penalty with fixed or adaptive beta (eq. 8), or plain importance sampling (eq. 6)"""
    clip_coef: float = 0.2
    """eps of the clipped surrogate, and of --clip-vloss"""
    kl_beta: float = 1.0
    """beta of the KL penalty; where kl-adaptive starts"""
    kl_target: float = 0.01
    """d_targ of kl-adaptive"""
    clip_vloss: bool = False
    """clip the step of the value around its old estimate, too"""
    ent_coef: float = 0.0
    """c2, weight of the entropy bonus"""
    vf_coef: float = 0.5
    """c1, weight of the value error"""
    max_grad_norm: float = 0.5
    """bound of the gradient's global norm"""
    target_kl: float | None = None
    """stop the epochs before a step that starts further than this from the old policy"""
    log_std_init: float = 0.0
    """logarithm of the deviation with which Gaussian policies start"""


# What an environment family runs with where its row differs from Args; an explicit flag wins.
FAMILIES: dict[str, dict[str, Any]] = {
    "classic": {},
    "box2d": dict(total_timesteps=1_000_000, num_envs=16, num_steps=256, gamma=0.999, gae_lambda=0.98, learning_rate=3e-4),
    "mujoco": dict(
        total_timesteps=1_000_000,
        num_envs=8,
        num_steps=256,
        num_minibatches=32,
        update_epochs=10,
        learning_rate=3e-4,
        norm_obs=True,
        norm_reward=True,
    ),
    "atari": dict(
        total_timesteps=10_000_000,
        num_envs=8,
        num_steps=128,
        num_minibatches=4,
        update_epochs=4,
        learning_rate=2.5e-4,
        clip_coef=0.1,
        ent_coef=0.01,
        clip_reward=True,
    ),
}


class UsageError(Exception):
    """The configuration is wrong: one sentence, exit status 2, nothing created."""


class Diverged(Exception):
    """A loss, gradient, observation or reward is NaN or infinite: exit status 1."""


class EnvironmentFailed(Exception):
    """An environment raised: exit status 1."""


class Stopped(Exception):
    """A signal ended the run after its iteration was saved: exit status 128 + signal."""


def environment_family(env_id: str) -> str:
    """The row of FAMILIES for a registered environment id; raises UsageError, with the near miss, for an unknown one."""
    module, _, name = env_id.rpartition(":")
    try:
        import ale_py

        gym.register_envs(ale_py)
        if module:
            __import__(module)
        entry_point = str(gym.spec(name).entry_point)
    except ModuleNotFoundError as error:
        raise UsageError(f"--env-id {env_id}: there is no module {error.name!r}; install it or drop the prefix.") from None
    except gym.error.Error:
        near = difflib.get_close_matches(name, list(gym.registry), n=1, cutoff=0)[0]
        raise UsageError(f"--env-id {env_id} is not registered in gymnasium; did you mean {near}?") from None
    return next((f for f in ("box2d", "mujoco") if f in entry_point), "atari" if "ale_py" in entry_point else "classic")


def parse_args(argv: list[str] | None = None) -> Args:
    """Args from the command line, over the run's own (--resume, --evaluate) or the environment family's defaults."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env-id", "--env_id", default=Args.env_id)
    peek.add_argument("--resume", type=Path)
    peek.add_argument("--evaluate", type=Path)
    asked = peek.parse_known_args(argv)[0]
    if path := asked.resume or asked.evaluate:
        saved = Args(**read_config(path.parent.parent if path.is_file() else path)["args"])
    else:
        saved = Args(env_id=asked.env_id, **FAMILIES[environment_family(asked.env_id)])
    args = tyro.cli(Args, args=argv, default=saved)
    harmless = ("resume", "track", "wandb_project_name", "wandb_entity", "capture_video")
    changes = [(k, v, vars(args)[k]) for k, v in vars(saved).items() if v != vars(args)[k] and k not in harmless]
    if asked.resume and changes:
        difference = "; ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changes)
        raise UsageError(f"--resume goes on with the run's own arguments, but these differ: {difference}.")
    return args


def check_args(args: Args) -> None:
    """Raises UsageError at the first argument that cannot work, with one that would."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be a finite number.")
    positive = "num_envs num_steps num_minibatches update_epochs total_timesteps learning_rate gamma clip_coef kl_beta"
    for name in (positive + " kl_target max_grad_norm target_kl eval_episodes").split():
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be greater than 0.")
    for name in ("ent_coef", "vf_coef", "gae_lambda", "seed", "eval_seed", "num_threads", "checkpoint_interval"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative.")
    for name in ("gamma", "gae_lambda"):
        if getattr(args, name) > 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at most 1.")
    batch = args.num_envs * args.num_steps
    fitting = [n for n in range(1, batch // 2 + 1) if batch % n == 0]
    if args.num_minibatches not in fitting:
        near = sorted(sorted(fitting, key=lambda n: abs(n - args.num_minibatches))[:3])
        raise UsageError(
            f"--num-minibatches {args.num_minibatches} does not cut a batch of {args.num_envs} x {args.num_steps} = {batch} "
            + (f"steps into equal parts of 2 or more; {', '.join(map(str, near))} would." if near else "step into parts.")
        )
    if args.total_timesteps < batch:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} is less than one batch of {args.num_envs} x {args.num_steps} = "
            f"{batch} steps, so nothing would be trained; ask for {batch} or more."
        )


# ------------------------------------------------------------------------------------------------- environments
def make_envs(args: Args, num_envs: int, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """The vector environment of a run, resetting in the step that ends an episode (SAME_STEP).

    Raises UsageError for a missing extra or a space that the networks cannot take.
    """
    mode = gym.vector.AutoresetMode.SAME_STEP
    if environment_family(args.env_id) == "atari":
        game, old = args.env_id.removeprefix("ALE/").removesuffix("-v5"), args.env_id.endswith("NoFrameskip-v4")
        if not old and args.env_id != f"ALE/{game}-v5" or "-ram" in game:
            raise UsageError(f"--env-id {args.env_id}: the Atari ids are ALE/<Game>-v5 and <Game>NoFrameskip-v4.")
        # Two protocols: sticky actions and nothing else (Machado et al. 2018, arXiv 1709.06009), or that of the PPO paper:
        # random no-ops, fire to start, a lost life ends the episode for the learner but not the game.
        options = dict(
            repeat_action_probability=0.0 if old else 0.25,
            noop_max=30 if old else 0,
            use_fire_reset=old,
            life_loss_info=old,
            episodic_life=False,
            reward_clipping=False,
            frameskip=4,
            maxpool=True,
            max_num_frames_per_episode=108_000,
            full_action_space=False,
            autoreset_mode=mode,
            num_threads=min(num_envs, args.num_threads or os.cpu_count() or 1),
        )
        if render_mode:  # colour twin of the same games
            options |= dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
        envs = gym.make_vec("ALE/" + game.removesuffix("NoFrameskip-v4") + "-v5", num_envs, **options)
    else:
        try:
            with warnings.catch_warnings():  # of versions that are out of date, and of bounds cast to float32
                warnings.simplefilter("ignore")
                envs = gym.make_vec(
                    args.env_id,
                    num_envs,
                    vectorization_mode="sync",
                    vector_kwargs=dict(autoreset_mode=mode, copy=False),
                    disable_env_checker=True,
                    render_mode=render_mode,
                )
        except (gym.error.Error, ImportError) as error:
            raise UsageError(f"--env-id {args.env_id} cannot be made: {' '.join(str(error).split())}") from None
    observations, actions = envs.single_observation_space, envs.single_action_space
    spaces = gym.spaces
    if not isinstance(observations, (spaces.Box, spaces.Discrete)):
        raise UsageError(f"--env-id {args.env_id} observes {observations}; supported are Box and Discrete observations.")
    if not isinstance(actions, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete)) or actions.dtype.kind not in "if":
        raise UsageError(f"--env-id {args.env_id} takes {actions}; supported are Box, Discrete, MultiDiscrete actions.")
    return envs


def reset_seeds(args: Args, iteration: int) -> list[int]:
    """A seed per environment from (seed, iteration): where a resumed run starts, every run starts anew."""
    seeds = np.random.SeedSequence([args.seed, iteration]).generate_state(args.num_envs)
    return [int(seed) % 2**31 for seed in seeds]


def reset_envs(envs: gym.vector.VectorEnv, seeds: list[int]) -> np.ndarray:
    """First observations (num_envs, ...); ALE wants its seeds as an array."""
    atari = not isinstance(envs, gym.vector.SyncVectorEnv)
    return envs.reset(seed=np.array(seeds) if atari else seeds)[0]


class Episodes:
    """Counts the raw return and the length of the episodes in play; on Atari these are whole games."""

    def __init__(self, num_envs: int):
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.frames = np.zeros(num_envs, dtype=np.int64)
        self.discounted = np.zeros(num_envs)  # for scale_rewards

    def step(self, rewards: np.ndarray, ended: np.ndarray, info: dict) -> list[tuple[int, float, int]]:
        """Adds one step, all arrays (num_envs,); returns (environment, return, length) of each finished episode."""
        self.returns += rewards
        self.lengths += 1
        if "episode_frame_number" in info:  # ALE plays on after a lost life: only a new game turns its clock back
            ended = ended & (info["episode_frame_number"] < self.frames)
            self.frames = info["episode_frame_number"]
        if not ended.any():
            return []
        finished = [(int(n), float(self.returns[n]), int(self.lengths[n])) for n in np.flatnonzero(ended)]
        self.returns[ended] = 0.0
        self.lengths[ended] = 0
        return finished


# ----------------------------------------------------------------------------------------------------- networks
class RunningNorm(nn.Module):
    """Mean and variance of everything seen, as buffers, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # float32 copies for the forward pass
        self.register_buffer("scale", torch.ones(shape))

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Takes in x (rows, *shape)."""
        x = x.double()
        n, total, delta = len(x), self.count + len(x), x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(squares / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.shift) * self.scale).clamp(-10.0, 10.0)


class Categorical:
    """Policy over Discrete and MultiDiscrete actions: logits (batch, components, choices), actions (batch, components)."""

    def __init__(self, logits: torch.Tensor):
        self.log_probs = F.log_softmax(logits, dim=-1)

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return (self.log_probs,)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        return self.log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> torch.Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum((-2, -1))

    def kl(self, other: "Categorical") -> torch.Tensor:
        """KL(self || other), (batch,)."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum((-2, -1))


class Gaussian:
    """Policy over Box actions: diagonal, the deviation does not depend on the state; mean and actions (batch, dims)."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std.expand_as(mean)

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return self.mean, self.log_std

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: "Gaussian") -> torch.Tensor:
        """KL(self || other), (batch,)."""
        var, other_var = (2 * self.log_std).exp(), (2 * other.log_std).exp()
        return (other.log_std - self.log_std + (var + (self.mean - other.mean) ** 2) / (2 * other_var) - 0.5).sum(-1)


def layer_init(layer: nn.Linear | nn.Conv2d, std: float = math.sqrt(2)) -> nn.Linear | nn.Conv2d:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    hidden = [layer_init(nn.Linear(inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
    return nn.Sequential(*hidden, layer_init(nn.Linear(64, outputs), std))


def nature_cnn(channels: int, height: int, width: int) -> nn.Sequential:
    """The network of Mnih et al. 2015: three convolutions and 512 features."""
    convolutions = nn.Sequential(
        layer_init(nn.Conv2d(channels, 32, 8, stride=4)),
        nn.ReLU(),
        layer_init(nn.Conv2d(32, 64, 4, stride=2)),
        nn.ReLU(),
        layer_init(nn.Conv2d(64, 64, 3, stride=1)),
        nn.ReLU(),
        nn.Flatten(),
    )
    size = convolutions(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(*convolutions, layer_init(nn.Linear(size, 512)), nn.ReLU())


def is_image(space: gym.Space) -> bool:
    return space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


class Agent(nn.Module):
    """Actor, critic and normalisers of one pair of spaces; every observation comes in raw, (batch, *space.shape)."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.observations, self.actions, self.bf16 = observation_space, action_space, args.bf16 == "on"
        self.obs_norm = RunningNorm(observation_space.shape) if args.norm_obs else nn.Identity()
        self.return_norm = RunningNorm(())
        if isinstance(action_space, gym.spaces.Box):
            outputs = math.prod(action_space.shape)
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))
            self.register_buffer("low", torch.tensor(action_space.low).flatten(), persistent=False)
            self.register_buffer("high", torch.tensor(action_space.high).flatten(), persistent=False)
        else:  # one row of logits per component, those that a component does not have at minus infinity
            nvec = np.atleast_1d(getattr(action_space, "nvec", getattr(action_space, "n", None))).flatten()
            self.choices, outputs = (len(nvec), int(nvec.max())), len(nvec) * int(nvec.max())
            missing = torch.arange(int(nvec.max())) >= torch.tensor(nvec).unsqueeze(-1)
            self.register_buffer("missing", missing if missing.any() else None, persistent=False)
        if is_image(observation_space):
            shape, self.channels_last = observation_space.shape, observation_space.shape[2] < observation_space.shape[0]
            self.body = nature_cnn(*((shape[2], *shape[:2]) if self.channels_last else shape))
            self.actor, self.critic = layer_init(nn.Linear(512, outputs), 0.01), layer_init(nn.Linear(512, 1), 1.0)
        else:
            discrete = isinstance(observation_space, gym.spaces.Discrete)
            inputs = int(observation_space.n) if discrete else math.prod(observation_space.shape)
            self.body, self.actor, self.critic = None, mlp(inputs, outputs, 0.01), mlp(inputs, 1, 1.0)

    @property
    def device(self) -> torch.device:
        return self.return_norm.count.device

    @property
    def obs_dtype(self) -> torch.dtype:
        """How rollouts keep observations: bytes for images, integers for Discrete, float32 otherwise."""
        if isinstance(self.observations, gym.spaces.Discrete):
            return torch.int64
        return torch.float32 if self.body is None else torch.uint8

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        """What actor and critic see of raw observations."""
        if isinstance(self.observations, gym.spaces.Discrete):
            return F.one_hot(obs - int(self.observations.start), int(self.observations.n)).float()
        if self.body is None:
            return self.obs_norm(obs).flatten(1)
        if self.channels_last:
            obs = obs.permute(0, 3, 1, 2)
        with self.autocast():
            pixels = self.obs_norm(obs.to(torch.bfloat16 if self.bf16 else torch.float32) / 255)
            return self.body(pixels).float()

    def policy(self, features: torch.Tensor) -> Categorical | Gaussian:
        if isinstance(self.actions, gym.spaces.Box):
            return Gaussian(self.actor(features), self.log_std)
        logits = self.actor(features).view(-1, *self.choices)
        return Categorical(logits if self.missing is None else logits.masked_fill(self.missing, -1e9))

    def forward(self, obs: torch.Tensor) -> tuple[Categorical | Gaussian, torch.Tensor]:
        """pi(.|s) and V(s) (batch,)."""
        return self.heads(self.features(obs))

    def heads(self, features: torch.Tensor) -> tuple[Categorical | Gaussian, torch.Tensor]:
        return self.policy(features), self.critic(features).squeeze(-1)

    def noise(self, *batch: int) -> torch.Tensor:
        """What makes actions random: Gumbel noise for logits, standard normal for Gaussians."""
        if isinstance(self.actions, gym.spaces.Box):
            return torch.randn(*batch, *self.log_std.shape, device=self.device)
        return -torch.empty(*batch, *self.choices, device=self.device).exponential_().log_()

    def act(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of the policy (batch, components), or its mode where the noise is zero."""
        policy = self.policy(features)
        if isinstance(policy, Gaussian):
            return policy.mean + policy.log_std.exp() * noise
        return (policy.log_probs + noise).argmax(-1)

    def to_env(self, actions: torch.Tensor) -> np.ndarray:
        """Actions as the environments take them; what lies outside the box is clipped only here."""
        if isinstance(self.actions, gym.spaces.Box):
            actions = actions.clamp(self.low, self.high).view(-1, *self.actions.shape)
            return actions.cpu().numpy().astype(self.actions.dtype, copy=False)
        return actions.cpu().numpy().reshape(-1, *self.actions.shape) + self.actions.start


# --------------------------------------------------------------------------------------------------- the method
class Batch(NamedTuple):
    """A rollout, flattened to (num_steps * num_envs, ...); pi_old and V_old are those of the network that played it."""

    obs: torch.Tensor
    actions: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor
    old_policy: tuple[torch.Tensor, ...]


STATS = ("policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac", "grad_norm")


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminations: torch.Tensor,
    truncations: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimate (arXiv 1506.02438, eq. 16) and the returns advantages + values.

    All tensors are (num_steps, num_envs). next_values[t] is V of the true successor of step t: of the final observation
    where an episode ended, not of the one after its reset. The flags belong to step t. A termination has no future; a
    truncation has one, so its error bootstraps, but neither lets later errors through: they are of another episode.
    """
    terminations, ended = terminations.bool(), terminations.bool() | truncations.bool()
    successors = torch.where(terminations, 0.0, next_values)  # where, for 0 * NaN is NaN
    deltas = rewards + gamma * successors - values
    decay = torch.where(ended, 0.0, gamma * gae_lambda).to(deltas.dtype)
    advantages, advantage = [], torch.zeros_like(deltas[0])
    for delta, discount in zip(deltas.flip(0), decay.flip(0)):
        advantage = torch.addcmul(delta, discount, advantage)
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1])
    return advantages, advantages + values


def surrogate_objective(
    ratio: torch.Tensor, advantages: torch.Tensor, kl: torch.Tensor, objective: str, clip_coef: float, kl_beta: torch.Tensor
) -> torch.Tensor:
    """Mean of the surrogate that the policy climbs; ratio, advantages and kl = KL(pi_old || pi) are (batch,)."""
    surrogate = ratio * advantages  # L^CPI, eq. 6
    if objective == "clip":
        clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages
        surrogate = torch.min(surrogate, clipped)  # L^CLIP, eq. 7
    elif objective in ("kl-fixed", "kl-adaptive"):
        surrogate = surrogate - kl_beta * kl  # L^KLPEN, eq. 8
    return surrogate.mean()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_coef: float | None
) -> torch.Tensor:
    """Half the mean squared error of V, all (batch,); with clip_coef the larger of it and that of the clipped step."""
    assert values.shape == old_values.shape == returns.shape
    error = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


def adapt_beta(beta: float, kl: float, kl_target: float) -> float:
    """The adaptive penalty of section 4, after each policy update."""
    if kl < kl_target / 1.5:
        return beta / 2
    return beta * 2 if kl > kl_target * 1.5 else beta


def ppo_loss(agent: Agent, batch: Batch, args: Args, kl_beta: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Eq. 9 with the sign of a loss, and the first six of STATS."""
    policy, values = agent(batch.obs)
    logratio = policy.log_prob(batch.actions) - batch.logprobs
    ratio = logratio.exp()
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    kl = type(policy)(*batch.old_policy).kl(policy) if args.objective.startswith("kl") else torch.zeros_like(ratio)
    policy_loss = -surrogate_objective(ratio, advantages, kl, args.objective, args.clip_coef, kl_beta)
    v_loss = value_loss(values, batch.values, batch.returns, args.clip_coef if args.clip_vloss else None)
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * v_loss - args.ent_coef * entropy
    approx_kl = ((ratio - 1) - logratio).mean()  # never negative, unlike the mean of -log r (Schulman 2020)
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, [policy_loss, v_loss, entropy, approx_kl, -logratio.mean(), clipfrac]


class Adam:
    """Adam (arXiv 1412.6980) of one vector; torch.optim.Adam takes four times as long for so few numbers."""

    def __init__(self, parameters: torch.Tensor, eps: float = 1e-5):
        self.parameters, self.eps, self.steps = parameters, eps, 0
        self.m, self.v = torch.zeros_like(parameters), torch.zeros_like(parameters)

    @torch.no_grad()
    def step(self, grad: torch.Tensor, learning_rate: float, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.steps += 1
        self.m.lerp_(grad, 1 - beta1)
        self.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        deviation = (self.v / (1 - beta2**self.steps)).sqrt_().add_(self.eps)
        self.parameters.addcdiv_(self.m, deviation, value=-learning_rate / (1 - beta1**self.steps))

    def state_dict(self) -> dict[str, Any]:
        return dict(m=self.m, v=self.v, steps=self.steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.m.copy_(state["m"]), self.v.copy_(state["v"])


def flatten_parameters(module: nn.Module) -> torch.Tensor:
    """One vector of all parameters, which become views of it: clipping and Adam are then a few operations each."""
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector, module.parameters())
    return vector


def make_gradient(agent: Agent, args: Args):
    """gradient(batch, rows, kl_beta) -> (gradient (parameters,) clipped to max_grad_norm, STATS as one tensor)."""
    parameters = list(agent.parameters())

    def gradient(batch: Batch, rows: torch.Tensor, kl_beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        minibatch = Batch(*(x[rows] for x in batch[:-1]), tuple(x[rows] for x in batch.old_policy))
        loss, stats = ppo_loss(agent, minibatch, args, kl_beta)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        norm = grad.norm()
        return grad * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), torch.stack([*stats, norm]).detach()

    if args.compile == "on":
        torch._dynamo.config.trace_autograd_ops = True  # forward, backward and clipping become one graph
        return torch.compile(gradient, fullgraph=True, dynamic=False)
    return gradient


def check_finite(observations: torch.Tensor, rewards: np.ndarray) -> None:
    """Raises Diverged with the first step (steps, environments, ...) whose observation or reward is NaN or infinite."""
    bad = {"reward": ~np.isfinite(rewards)}
    if observations.is_floating_point() and not observations.isfinite().all():
        bad["observation"] = ~observations.isfinite().flatten(2).all(-1).cpu().numpy()
    for quantity, where in bad.items():
        if where.any():
            step, env = np.argwhere(where)[0]
            raise Diverged(f"the {quantity} of environment {env} in step {step} of the rollout is NaN or infinite")


def failed_environment(error: Exception) -> str:
    """Which environment raised, from the frame of gymnasium's loop over them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if "sync_vector_env" in frame.f_code.co_filename]
    return f"environment {frames[0].f_locals.get('i')}" if frames else "the vector environment"


def scale_rewards(norm: RunningNorm, rewards: np.ndarray, ended: np.ndarray, running: np.ndarray, gamma: float) -> np.ndarray:
    """Rewards over the deviation of the discounted return, which norm follows; running (num_envs,) is carried along."""
    returns = np.empty_like(rewards)
    for t in range(len(rewards)):
        running[:] = running * gamma + rewards[t]
        returns[t] = running
        running[ended[t]] = 0.0
    norm.update(torch.from_numpy(returns).flatten().to(norm.count.device))
    return (rewards * float(norm.scale)).clip(-10.0, 10.0)


@torch.no_grad()
def rollout(
    agent: Agent, envs: gym.vector.VectorEnv, obs: np.ndarray, episodes: Episodes, args: Args
) -> tuple[Batch, np.ndarray, list[tuple[int, float, int]]]:
    """Plays num_steps steps from obs; returns the batch, the next observations, (steps, return, length) per episode."""
    shape, device, finished, final_obs = (args.num_steps, args.num_envs), agent.device, [], {}
    observations = torch.empty((args.num_steps + 1, *obs.shape), dtype=agent.obs_dtype, device=device)
    features, actions, rewards = [], [], np.empty(shape)
    terminations, truncations = np.empty(shape, dtype=bool), np.empty(shape, dtype=bool)
    for t, noise in enumerate(agent.noise(*shape)):
        observations[t].copy_(torch.from_numpy(obs))
        features.append(agent.features(observations[t]))
        actions.append(agent.act(features[t], noise))
        try:
            obs, rewards[t], terminations[t], truncations[t], info = envs.step(agent.to_env(actions[t]))
        except Exception as error:
            check_finite(observations[: t + 1], rewards[:t])
            raise EnvironmentFailed(f"{failed_environment(error)} raised in step {t} of its rollout: {error!r}") from error
        ended = terminations[t] | truncations[t]
        finished += [((t + 1) * args.num_envs, *e[1:]) for e in episodes.step(rewards[t], ended, info)]
        if truncations[t].any():
            final_obs |= {(t, n): info["final_obs"][n] for n in np.flatnonzero(truncations[t] & ~terminations[t])}
    observations[-1].copy_(torch.from_numpy(obs))
    check_finite(observations, rewards)

    features.append(agent.features(observations[-1]))
    policy, values = agent.heads(torch.cat(features))  # pi_old and V_old of the whole batch at once, which is faster
    values = values.view(-1, args.num_envs)
    old_policy = tuple(parameter[: -args.num_envs] for parameter in policy.parameters())
    actions = torch.cat(actions)
    logprobs = type(policy)(*old_policy).log_prob(actions)
    next_values = values[1:].clone()
    if final_obs:
        final = torch.from_numpy(np.stack(list(final_obs.values()))).to(device, agent.obs_dtype)
        next_values[tuple(zip(*final_obs))] = agent(final)[1]
    rewards = np.sign(rewards) if args.clip_reward else rewards
    if args.norm_reward:
        rewards = scale_rewards(agent.return_norm, rewards, terminations | truncations, episodes.discounted, args.gamma)
    advantages, returns = compute_gae(
        torch.from_numpy(rewards).to(device, torch.float32),
        values[:-1],
        next_values,
        torch.from_numpy(terminations).to(device),
        torch.from_numpy(truncations).to(device),
        args.gamma,
        args.gae_lambda,
    )
    flat = [x.flatten(0, 1) for x in (advantages, returns, values[:-1])]
    return Batch(observations[:-1].flatten(0, 1), actions, logprobs, *flat, old_policy), obs, finished


def update(
    agent: Agent, optimizer: Adam, gradient, batch: Batch, args: Args, learning_rate: float, kl_beta: float
) -> dict[str, float]:
    """K epochs of minibatch steps on the loss; returns the means of STATS over the minibatches by their tags."""
    stats, beta = [], torch.tensor(kl_beta, device=agent.device)
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(batch.values), device=agent.device).chunk(args.num_minibatches):
            grad, minibatch_stats = gradient(batch, rows, beta)
            stats.append(minibatch_stats)
            if args.target_kl and minibatch_stats[STATS.index("approx_kl")] > args.target_kl:
                return summarise(stats, batch)
            optimizer.step(grad, learning_rate)
    return summarise(stats, batch)


def summarise(stats: list[torch.Tensor], batch: Batch) -> dict[str, float]:
    """Means over the minibatches under their TensorBoard tags, and how much of the returns V_old explained."""
    explained = 1 - (batch.returns - batch.values).var() / batch.returns.var()
    means = torch.cat([torch.stack(stats).mean(0), explained.unsqueeze(0)]).tolist()
    return {f"losses/{name}": value for name, value in zip((*STATS, "explained_variance"), means)}


@torch.no_grad()
def mean_kl(agent: Agent, batch: Batch) -> float:
    """E[KL(pi_old || pi)] over the batch: what adapt_beta is told."""
    chunks = zip(batch.obs.split(1024), zip(*(p.split(1024) for p in batch.old_policy)))
    kls = [type(policy)(*old).kl(policy) for policy, old in ((agent(obs)[0], old) for obs, old in chunks)]
    return torch.cat(kls).mean().item()


# ------------------------------------------------------------------------------------------- the run directory
def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary neighbour and puts it in the place of path: at any moment there is the old file or the new."""
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


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a run directory; raises UsageError where there is none."""
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no run directory: its config.json cannot be read ({error}).") from None


def versions() -> dict[str, str]:
    packages = ("torch", "gymnasium", "numpy", "mujoco", "ale-py")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def create_run_dir(args: Args) -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json."""
    name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    path = first = Path(args.runs_dir) / name.replace("/", "-").replace(":", "-")
    while True:
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            if args.run_name:
                raise UsageError(f"{path} exists; choose another --run-name, or go on with --resume {path}.") from None
            path = first.with_name(f"{first.name}-{uuid.uuid4().hex[:4]}")

    def git(*command: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True) if shutil.which("git") else None
        return done.stdout.strip() if done and done.returncode == 0 else None

    config = dict(
        args=asdict(args),
        command=[sys.executable, *sys.argv],
        seed=args.seed,
        git_commit=git("rev-parse", "HEAD"),
        git_dirty=bool(git("status", "--porcelain")),
        versions=versions(),
        hardware=torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        threads=torch.get_num_threads(),
        wandb_id=uuid.uuid4().hex[:8],
    )
    write_json(path / "config.json", config)
    (path / "checkpoints").mkdir()
    return path


def cpu_name() -> str:
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


class Run:
    """The files of a run directory and their views: TensorBoard, wandb, the progress line."""

    def __init__(self, args: Args, state: dict[str, Any] | None, started: float):
        self.path = path = Path(args.resume) if state else create_run_dir(args)
        self.args, self.signals = args, []
        self.total = args.total_timesteps // (args.num_envs * args.num_steps) * args.num_envs * args.num_steps
        saved = state or dict(global_step=0, wall_time=0.0, last_returns=[], best=None, csv_bytes={})
        self.global_step = self.first_step = saved["global_step"]
        self.earlier_time, self.last_returns, self.best = saved["wall_time"], list(saved["last_returns"]), saved["best"]
        self.tags = ["charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate"]
        self.tags += [f"losses/{name}" for name in (*STATS, "explained_variance")]
        self.tags += ["charts/kl_beta"] if args.objective.startswith("kl") else []
        self.episodes = self.open_csv("episodes.csv", ["global_step", "wall_time", "return", "length"], saved["csv_bytes"])
        self.progress = self.open_csv("progress.csv", ["global_step", "wall_time", "sps", *self.tags], saved["csv_bytes"])
        self.wandb = None
        if args.track:
            import wandb

            config = read_config(path)
            self.wandb = wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=config["wandb_id"],
                name=path.name,
                resume="allow",
                config=config["args"],
                dir=path,
                settings=wandb.Settings(silent=True),
            )
        self.writer = SummaryWriter(path, purge_step=self.first_step + 1 if state else None)
        if state is None:
            table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
            plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in asdict(args).items()}
            for summary in hparams(plain, {"charts/episodic_return": 0}):
                self.writer.file_writer.add_summary(summary)
        self.printed, self.begun = 0.0, time.perf_counter()
        self.startup_time = self.begun - started

    def __enter__(self) -> "Run":
        def remember(signum: int, frame) -> None:
            if self.signals:
                os._exit(128 + signum)  # the second one does not wait for the iteration
            self.signals.append(signum)

        self.handlers = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        status = {None: "completed", Stopped: "interrupted", Diverged: "diverged"}.get(kind, "failed")
        if status in ("diverged", "failed"):
            newest = max((self.path / "checkpoints").glob("step_*.pt"), default="none")
            error.args = (f"after step {self.global_step}: {error}; the last good checkpoint is {newest}",)
        self.finish(status, str(error) if error else None)

    def open_csv(self, name: str, columns: list[str], lengths: dict[str, int]):
        """Opens a CSV file to append, cut to what it held at the checkpoint."""
        path = self.path / name
        file = open(path, "a", newline="")
        file.truncate(lengths.get(name, 0))
        if not lengths:
            csv.writer(file).writerow(columns)
        return file

    def wall_time(self) -> float:
        """Seconds of training, earlier sessions included, start-up and compilation left out."""
        return self.earlier_time + time.perf_counter() - self.begun

    def sps(self) -> float:
        """Steps per second of this session."""
        return (self.global_step - self.first_step) / max(time.perf_counter() - self.begun, 1e-9)

    def log(self, iteration: int, episodes: list, values: dict[str, float]) -> None:
        """Records an iteration: its finished episodes (steps into it, return, length) and a value per tag."""
        first, seconds = self.global_step, self.wall_time()
        self.global_step = iteration * self.args.num_envs * self.args.num_steps
        csv.writer(self.episodes).writerows((first + step, f"{seconds:.3f}", *rest) for step, *rest in episodes)
        self.last_returns = (self.last_returns + [ret for _, ret, _ in episodes])[-100:]
        if episodes:
            values["charts/episodic_return"] = float(np.mean([ret for _, ret, _ in episodes]))
            values["charts/episodic_length"] = float(np.mean([length for _, _, length in episodes]))
        values["charts/SPS"] = self.sps()
        row = [values.get(tag, "") for tag in self.tags]
        csv.writer(self.progress).writerow([self.global_step, f"{seconds:.3f}", f"{self.sps():.1f}", *row])
        self.episodes.flush(), self.progress.flush()
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, self.global_step)
        if self.wandb:
            self.wandb.log(values, step=self.global_step)
        self.print_progress(last=self.global_step >= self.total)

    def print_progress(self, last: bool) -> None:
        """One line that renews itself on a terminal, a line every few seconds elsewhere."""
        terminal = sys.stdout.isatty()
        if time.perf_counter() - self.printed < (0.1 if terminal else 5) and not last:
            return
        self.printed, part = time.perf_counter(), self.global_step / self.total
        left = int((self.total - self.global_step) / max(self.sps(), 1e-9))
        ret = f"{np.mean(self.last_returns):,.1f}" if self.last_returns else "-"
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        text = f"{self.global_step:>11,} steps {part:4.0%} {self.sps():>7,.0f}/s  return {ret:>9}  {clock} left"
        bar = "[" + ("#" * int(part * 12)).ljust(12, ".") + "] "
        print(f"\r{bar}{text}" if terminal else text, end="" if terminal and not last else "\n", flush=True)

    def finish(self, status: str, error: str | None = None) -> None:
        """Writes summary.json and closes everything."""
        if self.printed and sys.stdout.isatty() and self.global_step < self.total:
            print()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        summary = dict(
            status=status,
            global_step=self.global_step,
            wall_time=self.wall_time(),
            sps=self.sps(),
            startup_time=self.startup_time,
            train_last100=float(np.mean(self.last_returns)) if self.last_returns else None,
            episodes_in_last100=len(self.last_returns),
            peak_memory_mb=memory,
        )
        write_json(self.path / "summary.json", summary | (dict(error=error) if error else {}))
        self.episodes.close(), self.progress.close(), self.writer.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if status == "completed" else 1)


# ------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(run: Run, agent: Agent, optimizer: Adam, iteration: int, exact: bool, kl_beta: float) -> None:
    """Writes checkpoints/step_*.pt, keeps the two newest, and best.pt, the one with the best last 100 episodes."""
    score = float(np.mean(run.last_returns)) if run.last_returns else None
    better = score is not None and (run.best is None or score >= run.best)
    run.best = score if better else run.best
    kind, keys, *position = np.random.get_state()
    state = dict(
        iteration=iteration,
        exact=exact,
        global_step=run.global_step,
        total_timesteps=run.args.total_timesteps,
        agent=agent.state_dict(),
        optimizer=optimizer.state_dict(),
        kl_beta=kl_beta,
        torch_rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state() if run.args.device == "cuda" else None,
        numpy_rng=(kind, keys.tolist(), *position),
        python_rng=random.getstate(),
        wall_time=run.wall_time(),
        last_returns=run.last_returns,
        best=run.best,
        csv_bytes={name: (run.path / name).stat().st_size for name in ("episodes.csv", "progress.csv")},
        versions=versions(),
    )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder = run.path / "checkpoints"
    write_atomically(folder / f"step_{run.global_step:012}.pt", buffer.getbuffer())
    if better:
        write_atomically(folder / "best.pt", buffer.getbuffer())
    for old in sorted(folder.glob("step_*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The newest good checkpoint of a run directory (or the given file); names a corrupt one, never starts afresh."""
    files = [path] if path.is_file() else sorted((path / "checkpoints").glob("step_*.pt"), reverse=True)
    for file in files:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes torch raise
            print(f"{file} cannot be read ({type(error).__name__}), trying the one before.", file=sys.stderr)
    raise UsageError(f"{path} has no readable checkpoint.")


def restore(state: dict[str, Any], agent: Agent, optimizer: Adam) -> None:
    """Puts weights, normalisers, optimizer and random states of a checkpoint back."""
    agent.load_state_dict(state["agent"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    kind, keys, *position = state["numpy_rng"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))
    version, keys, gauss = state["python_rng"]
    random.setstate((version, tuple(keys), gauss))


# ---------------------------------------------------------------------------------------- evaluate, train, main
def resolve(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Turns every "auto" into what was measured to be fastest for this network and machine; sets the threads."""
    image, cuda = is_image(envs.single_observation_space), torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch sees no CUDA device here; --device cpu would work.")
    if args.norm_obs and (image or not isinstance(envs.single_observation_space, gym.spaces.Box)):
        raise UsageError("--norm-obs is for vector observations; --no-norm-obs would work.")
    if args.device == "auto":
        args.device = "cuda" if image and cuda else "cpu"
    if args.bf16 == "auto":
        native = args.device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        args.bf16 = "on" if image and native else "off"
    compiler = args.device == "cuda" or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    if args.compile == "auto":
        steps = args.total_timesteps // (args.num_envs * args.num_steps) * args.update_epochs * args.num_minibatches
        args.compile = "on" if not image and compiler and steps > 40_000 else "off"
    if args.compile == "on" and not compiler:
        raise UsageError("--compile on needs a C++ compiler and finds none; install g++, or use --compile off.")
    args.num_threads = args.num_threads or ((os.cpu_count() or 1) if image else 1)
    torch.set_num_threads(args.num_threads)


@torch.no_grad()
def evaluate(path: Path, args: Args) -> list[float]:
    """Plays args.eval_episodes with the newest checkpoint of a run, normalisers frozen; returns the raw returns.

    The result goes to summary.json, where the run has ended, and to TensorBoard as eval/episodic_return.
    """
    if args.capture_video and importlib.util.find_spec("moviepy") is None:
        raise UsageError('--capture-video needs moviepy; install it with: pip install "lineage-rl[video]"')
    num_envs, run_dir = min(args.eval_episodes, 8), path.parent.parent if path.is_file() else path
    envs = make_envs(args, num_envs, "rgb_array" if args.capture_video else None)
    resolve(args, envs)
    torch.manual_seed(args.eval_seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
    state = load_checkpoint(path)
    agent.load_state_dict(state["agent"])
    obs, episodes = reset_envs(envs, [args.eval_seed + i for i in range(num_envs)]), Episodes(num_envs)
    returns = [[] for _ in range(num_envs)]
    quota = [len(range(i, args.eval_episodes, num_envs)) for i in range(num_envs)]  # fixed shares, or short ones win
    while any(len(played) < share for played, share in zip(returns, quota)):
        noise = agent.noise(num_envs) * float(args.eval_stochastic)
        features = agent.features(torch.from_numpy(obs).to(agent.device, agent.obs_dtype))
        actions = agent.act(features, noise)
        obs, rewards, terminations, truncations, info = envs.step(agent.to_env(actions))
        for n, ret, _ in episodes.step(rewards, terminations | truncations, info):
            returns[n].append(ret)
    returns = [ret for played, share in zip(returns, quota) for ret in played[:share]]
    kind = "stochastic" if args.eval_stochastic else "deterministic"
    result = dict(mean=np.mean(returns), std=np.std(returns), min=np.min(returns), max=np.max(returns))
    print(f"{len(returns)} {kind} episodes at step {state['global_step']:,}: ", end="")
    print("  ".join(f"{name} {value:,.2f}" for name, value in result.items()))
    if (run_dir / "summary.json").exists():
        summary = json.loads((run_dir / "summary.json").read_text())
        result = {k: float(v) for k, v in result.items()} | dict(episodes=len(returns), global_step=state["global_step"])
        summary["eval"] = summary.get("eval", {}) | {kind: result | dict(seed=args.eval_seed)}
        write_json(run_dir / "summary.json", summary)
        with SummaryWriter(run_dir) as writer:
            writer.add_scalar("eval/episodic_return", result["mean"], state["global_step"])
    return returns


def train(args: Args) -> Path:
    """Trains for total_timesteps, or goes on with the run args.resume; returns the run directory.

    Raises UsageError before anything is created, then Diverged, EnvironmentFailed, OSError, or Stopped after a signal.
    """
    started = time.perf_counter()
    check_args(args)
    envs = make_envs(args, args.num_envs)
    resolve(args, envs)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
    optimizer = Adam(flatten_parameters(agent))
    gradient = make_gradient(agent, args)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    interval = args.checkpoint_interval or max(10, math.ceil(num_iterations / 20))
    state = load_checkpoint(Path(args.resume)) if args.resume else None
    if state:
        restore(state, agent, optimizer)
    done, kl_beta = (state["iteration"], state["kl_beta"]) if state else (0, args.kl_beta)
    with Run(args, state, started) as run:
        if not state:
            save_checkpoint(run, agent, optimizer, 0, True, kl_beta)
        for iteration in range(done + 1, num_iterations + 1):
            if iteration == done + 1 or (iteration - 1) % interval == 0:  # after a checkpoint, as a resumed run would
                obs, episodes = reset_envs(envs, reset_seeds(args, iteration)), Episodes(args.num_envs)
            learning_rate = args.learning_rate * (1 - (iteration - 1) / num_iterations if args.anneal_lr else 1)
            batch, obs, finished = rollout(agent, envs, obs, episodes, args)
            stats = update(agent, optimizer, gradient, batch, args, learning_rate, kl_beta)
            if args.norm_obs:
                agent.obs_norm.update(batch.obs)
            if args.objective == "kl-adaptive":
                kl_beta = adapt_beta(kl_beta, mean_kl(agent, batch), args.kl_target)
            if not all(map(math.isfinite, stats.values())):
                raise Diverged(f"iteration {iteration}: {stats}")
            run.log(iteration, finished, {"charts/learning_rate": learning_rate} | stats)
            if iteration % interval == 0 or iteration == num_iterations or run.signals:
                save_checkpoint(run, agent, optimizer, iteration, iteration % interval == 0, kl_beta)
            if run.signals and iteration < num_iterations:
                raise Stopped(run.signals[0])
    return run.path


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 trained, 1 diverged or crashed, 2 usage, 128 + signal."""
    try:
        args = parse_args(argv)
        evaluate(Path(args.evaluate), args) if args.evaluate else train(args)
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 130
    except (UsageError, Diverged, EnvironmentFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
