"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), in one file.

Play num_steps steps in num_envs environments with the policy pi_old; then, for a few epochs over minibatches of that
batch, climb the clipped surrogate (eq. 7) minus the value error plus an entropy bonus (eq. 9):

    L(theta) = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - c1 (V(s) - R)^2 / 2 + c2 S[pi](s) ], r = pi(a|s) / pi_old(a|s)

with A the generalized advantage estimate (arXiv 1506.02438) and R = A + V_old(s). `--objective` puts the paper's other
surrogates in the place of the first term: kl-fixed and kl-adaptive (eq. 8, section 4), or none (eq. 6).

    python ppo.py --env-id CartPole-v1
    python ppo.py --env-id HalfCheetah-v5 --seed 2          python ppo.py --help --env-id HalfCheetah-v5
    python ppo.py --resume runs/<run>                       python ppo.py --evaluate runs/<run>

Departures from the paper: advantages are normalised per minibatch and, on MuJoCo, observations and rewards by running
statistics; the gradient's global norm is clipped; weights start orthogonal; the learning rate anneals everywhere, eps
nowhere; Atari takes 4 epochs, not 3; c1 is 0.5, on half the squared error. And an episode that a time limit cuts is
bootstrapped with the value of its last state, because it did not end there (Pardo et al. 2018, arXiv 1712.00378).

In a hurry, read "the method" and `train`: the rest serves every script of this family.
"""

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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

gym.register_envs(ale_py)


# ---------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    # Run
    exp_name: str = Path(__file__).stem
    """name of the experiment, a part of the run's name"""
    seed: int = 1
    """seed of weights, actions, minibatches and environments"""
    runs_dir: str = "runs"
    """folder of all runs"""
    run_name: str = ""
    """folder of this run in runs-dir (default: {env_id}__{exp_name}__{seed}__{time})"""
    resume: str = ""
    """run directory to go on with, from its newest good checkpoint, with its own arguments"""
    evaluate: str = ""
    """run directory, or one of its checkpoints, to load and play instead of training"""
    eval_episodes: int = 10
    """episodes that --evaluate plays"""
    eval_seed: int = 1_000_000
    """seed of environments and actions in --evaluate"""
    eval_stochastic: bool = False
    """let --evaluate sample actions instead of taking the most likely ones"""
    capture_video: bool = False
    """film the first environment of --evaluate, or of an evaluation after the training, into the run directory"""
    checkpoint_interval: int = 0
    """iterations from a checkpoint, where all environments restart, to the next (0: about a twentieth of the run)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline works)"""
    wandb_project_name: str = "lineage"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cpu for the MLP; for the CNN cuda, where there is one"""
    num_threads: int = 0
    """CPU threads of torch and of the Atari emulators (0: one for the MLP, all cores for the CNN)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the gradient (auto: for the MLP, in runs long enough to win back the time it takes)"""
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
    """learn from the sign of the reward; reported returns stay raw"""

    # Algorithm
    total_timesteps: int = 200_000
    """environment steps of the whole run, rounded down to whole batches"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    anneal_lr: bool = True
    """let the step size fall linearly to zero"""
    num_steps: int = 128
    """steps per environment and iteration (the paper's T)"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimate"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 10
    """epochs over each batch (the paper's K)"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    objective: Literal["clip", "kl-fixed", "kl-adaptive", "none"] = "clip"
    """surrogate: clipped (eq. 7), with fixed or adaptive KL penalty (eq. 8), or plain importance sampling (eq. 6)"""
    clip_coef: float = 0.2
    """eps of the clipped surrogate and of --clip-vloss"""
    clip_vloss: bool = False
    """also clip how far a value moves from its old estimate"""
    kl_beta: float = 1.0
    """beta of the KL penalty; the first one of kl-adaptive"""
    kl_target: float = 0.01
    """d_targ of kl-adaptive"""
    ent_coef: float = 0.0
    """c2, weight of the entropy bonus"""
    vf_coef: float = 0.5
    """c1, weight of the value error"""
    max_grad_norm: float = 0.5
    """bound on the gradient's global norm"""
    target_kl: float | None = None
    """end the epochs before a step that would start further than this from the old policy"""
    log_std_init: float = 0.0
    """logarithm of the deviation that Gaussian policies start with"""


# Where a family of environments departs from the defaults above; an explicit flag wins over both. "continuous" is
# classic control with real-valued actions.
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "classic": dict(),
    "continuous": dict(norm_obs=True, norm_reward=True),
    "box2d": dict(total_timesteps=1_000_000, num_envs=16, num_steps=256, learning_rate=3e-4, gamma=0.999,
                  gae_lambda=0.98),
    "mujoco": dict(total_timesteps=1_000_000, num_steps=256, num_minibatches=16, learning_rate=5e-4, gae_lambda=0.9,
                   log_std_init=-0.5, norm_obs=True, norm_reward=True),
    "atari": dict(total_timesteps=10_000_000, update_epochs=4, learning_rate=2.5e-4, clip_coef=0.1, ent_coef=0.01,
                  clip_reward=True),
}
# fmt: on
POSITIVE = "num_envs num_steps num_minibatches update_epochs total_timesteps eval_episodes learning_rate gamma"
POSITIVE += " clip_coef kl_beta kl_target max_grad_norm target_kl"
AT_MOST_ONE = "gamma gae_lambda"


class UsageError(Exception):
    """The configuration is wrong: one sentence, exit status 2, nothing created."""


class Failed(Exception):
    """A number is NaN or infinite (status "diverged") or an environment raised ("failed"): exit status 1."""

    def __init__(self, message: str, status: str = "diverged"):
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """A signal ended the run after its iteration was saved: exit status 128 + signal."""


def environment_family(env_id: str) -> str:
    """The row of FAMILIES for a registered id; raises UsageError, with the near miss, for any other."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        where = str(gym.spec(name).entry_point)
    except ImportError as error:
        raise UsageError(f"--env-id {env_id}: {error}; install it, or drop the prefix.") from None
    except gym.error.Error:
        near = (difflib.get_close_matches(name, gym.registry, n=1) or ["one of gymnasium.registry"])[0]
        raise UsageError(f"--env-id {env_id} is not registered in gymnasium; did you mean {near}?") from None
    homes = {"ale_py": "atari", "gymnasium.envs.box2d": "box2d", "gymnasium.envs.mujoco": "mujoco"}
    homes |= {f"gymnasium.envs.classic_control.{name}": "continuous" for name in ("pendulum", "continuous_")}
    return next((family for home, family in homes.items() if where.startswith(home)), "classic")


def parse_args(argv: list[str] | None = None) -> Args:
    """Args from the command line, over the defaults of the environment's family or, to resume, over the run's own."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--env-id", "--env_id", nargs="?", default=Args.env_id, const=Args.env_id)
    peek.add_argument("--resume", nargs="?", type=Path)
    peek.add_argument("--evaluate", nargs="?", type=Path)
    asked = peek.parse_known_args(argv)[0]
    if asked.resume and asked.resume.is_file():
        raise UsageError(f"--resume takes a run directory, here {run_dir_of(asked.resume)}.")
    if asked.resume or asked.evaluate:
        saved, _ = read_config(asked.resume or asked.evaluate)
    else:
        saved = Args(env_id=asked.env_id, **FAMILIES[environment_family(asked.env_id)])
    args = tyro.cli(Args, args=argv, default=saved)
    harmless = ("resume", "track", "wandb_project_name", "wandb_entity", "capture_video", "device", "compile")
    changed = [name for name, value in vars(saved).items() if name not in harmless and value != vars(args)[name]]
    if asked.resume and changed:
        difference = ", ".join(f"{name} {vars(saved)[name]!r} -> {vars(args)[name]!r}" for name in changed)
        raise UsageError(f"--resume goes on with the arguments of the run, and these differ: {difference}.")
    return args


def check_args(args: Args) -> None:
    """Raises UsageError for the first argument that cannot work, and says what would."""
    for name, value in vars(args).items():
        must = ""
        if isinstance(value, float) and not math.isfinite(value):
            must = "a finite number"
        elif name in POSITIVE.split() and value is not None and value <= 0:
            must = "greater than 0"
        elif name in AT_MOST_ONE.split() and value > 1:
            must = "at most 1"
        elif isinstance(value, (int, float)) and value < 0 and name != "log_std_init":
            must = "0 or more"
        elif name in ("seed", "eval_seed") and value >= 2**32:
            must = "less than 2**32"
        if must:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, but must be {must}.")
    batch = args.num_envs * args.num_steps
    if args.total_timesteps < batch:
        size = f"{args.num_envs} x {args.num_steps} = {batch}"
        raise UsageError(
            f"--total-timesteps {args.total_timesteps} is less than one batch, {size}; ask for {batch} or more."
        )


def check_minibatches(args: Args) -> None:
    """Raises UsageError unless the minibatches are equal parts of the batch, of two rows or more."""
    batch, parts = args.num_envs * args.num_steps, args.num_minibatches
    if batch % parts or batch < 2 * parts:
        fits = sorted((n for n in range(1, batch // 2 + 1) if batch % n == 0), key=lambda n: abs(n - parts))[:3]
        would = f"--num-minibatches {' or '.join(map(str, fits))}" if fits else "a larger --num-steps"
        size = f"{args.num_envs} x {args.num_steps} = {batch}"
        raise UsageError(
            f"{parts} minibatches do not cut a batch of {size} into equal parts of 2 or more; {would} would."
        )


# ------------------------------------------------------------------------------------------------- environments
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
        # The reset that follows must not write over the final observation, should the environment reuse its array.
        return np.copy(obs) if terminated or truncated else obs, reward, terminated, truncated, {}

    def reset(self, **options: Any) -> tuple:
        try:
            return self.env.reset(**options)[0], {}
        except Exception as error:
            raise Failed(f"environment {self.index} raised {error!r}", "failed") from error


def make_envs(args: Args, num_envs: int, **options: Any) -> gym.vector.VectorEnv:
    """The vector environment of a run; it resets in the step that ends an episode (SAME_STEP).

    Raises UsageError for a missing extra and for spaces that the networks cannot take.
    """
    mode, index, spaces = gym.vector.AutoresetMode.SAME_STEP, itertools.count(), gym.spaces
    if environment_family(args.env_id) == "atari":
        # Two protocols: sticky actions and nothing else (Machado et al. 2018, arXiv 1709.06009), or the PPO paper's:
        # random no-ops, fire to start, and a lost life ends the episode for the learner while the game goes on.
        paper = args.env_id.endswith("NoFrameskip-v4")
        game = "ALE/" + args.env_id.removeprefix("ALE/").removesuffix("-v5").removesuffix("NoFrameskip-v4") + "-v5"
        if not paper and args.env_id != game or "-ram" in game:
            raise UsageError(f"--env-id {args.env_id}: Atari games are ALE/<Game>-v5 or <Game>NoFrameskip-v4.")
        protocol = dict(repeat_action_probability=0.0 if paper else 0.25, noop_max=30 if paper else 0)
        protocol |= dict(use_fire_reset=paper, life_loss_info=paper, episodic_life=False, reward_clipping=False)
        protocol |= dict(frameskip=4, maxpool=True, max_num_frames_per_episode=108_000, full_action_space=False)
        threads = min(num_envs, args.num_threads or os.cpu_count() or 1)
        return gym.make_vec(game, num_envs, autoreset_mode=mode, num_threads=threads, **protocol | options)
    options |= dict(vectorization_mode="sync", vector_kwargs=dict(autoreset_mode=mode, copy=False))
    options |= dict(disable_env_checker=True, wrappers=[lambda env: Bare(env, next(index))])
    try:
        with warnings.catch_warnings():  # about versions that are out of date and bounds that are cast to float32
            warnings.simplefilter("ignore")
            envs = gym.make_vec(args.env_id, num_envs, **options)
    except Exception as error:  # an extra that is missing, or whatever a constructor raises
        raise UsageError(f"--env-id {args.env_id} cannot be made: {' '.join(str(error).split())}") from None
    observations, actions = envs.single_observation_space, envs.single_action_space
    if not isinstance(observations, (spaces.Box, spaces.Discrete)):
        raise UsageError(f"--env-id {args.env_id} observes {observations}; Box and Discrete are supported.")
    if not isinstance(actions, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete)):
        raise UsageError(f"--env-id {args.env_id} acts in {actions}; Box, Discrete and MultiDiscrete are supported.")
    return envs


def reset_envs(envs: gym.vector.VectorEnv, seed: int, iteration: int) -> tuple[np.ndarray, dict]:
    """First observations and info; seeds come from (seed, iteration), so a resumed run starts as this one goes on."""
    seeds = np.random.SeedSequence([seed, iteration]).generate_state(envs.num_envs).astype(np.int64) % 2**31
    return envs.reset(seed=seeds.tolist() if isinstance(envs, gym.vector.SyncVectorEnv) else seeds)


def whole_games(ended: np.ndarray, info: dict, clock: np.ndarray | None) -> np.ndarray:
    """Which of ended (num_envs,) are whole games: ALE also ends at a lost life, but its clock only turns back after."""
    return ended if clock is None else ended & (info["episode_frame_number"] < clock)


class Episodes:
    """Raw return and length of the episodes in play, from one rollout to the next; on Atari they are whole games."""

    def __init__(self, num_envs: int):
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self.discounted = np.zeros(num_envs)  # for scale_rewards

    def collect(self, rewards: np.ndarray, finished: np.ndarray) -> list[tuple[int, float, int, int]]:
        """(steps, return, length, environment) of all that finished; rewards and flags are (num_steps, num_envs)."""
        done, (num_steps, num_envs) = [], rewards.shape
        begin = np.zeros(num_envs, dtype=np.int64)
        for t, n in np.argwhere(finished):
            ret, length = self.returns[n] + rewards[begin[n] : t + 1, n].sum(), self.lengths[n] + t + 1 - begin[n]
            done.append(((int(t) + 1) * num_envs, float(ret), int(length), int(n)))
            self.returns[n], self.lengths[n], begin[n] = 0.0, 0, t + 1
        self.returns += [rewards[begin[n] :, n].sum() for n in range(num_envs)]
        self.lengths += num_steps - begin
        return done


# ----------------------------------------------------------------------------------------------------- networks
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
    def update(self, x: torch.Tensor) -> None:
        """Takes in x (rows, *shape)."""
        x = x.double()
        total, delta = self.count + len(x), x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.shift) * self.scale).clamp(-10.0, 10.0)


class Categorical:
    """Policy over (Multi)Discrete actions: logits (batch, components, choices), actions (batch, components)."""

    def __init__(self, logits: torch.Tensor):
        self.log_probs = F.log_softmax(logits, dim=-1)
        self.parameters = (self.log_probs,)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        return self.log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> torch.Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum((-2, -1))

    def kl(self, other: "Categorical") -> torch.Tensor:
        """KL(self || other), (batch,)."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum((-2, -1))


class Gaussian:
    """Policy over Box actions: mean and actions (batch, dims), independent, of a deviation that no state changes."""

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor):
        self.mean, self.log_std = mean, log_std.expand_as(mean).clone()  # a copy, for Adam changes log_std in place
        self.parameters = (self.mean, self.log_std)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: "Gaussian") -> torch.Tensor:
        """KL(self || other), (batch,)."""
        z2 = ((2 * self.log_std).exp() + (self.mean - other.mean) ** 2) * (-2 * other.log_std).exp()
        return (other.log_std - self.log_std + 0.5 * z2 - 0.5).sum(-1)


def layer_init(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Linear | nn.Conv2d:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Two hidden layers of 64 tanh."""

    def __init__(self, inputs: int, outputs: int, gain: float):
        super().__init__()
        self.first, self.second = layer_init(nn.Linear(inputs, 64)), layer_init(nn.Linear(64, 64))
        self.last = layer_init(nn.Linear(64, outputs), gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def nature_cnn(channels: int, height: int, width: int) -> nn.Sequential:
    """Three convolutions and 512 features (Mnih et al. 2015)."""
    layers = [layer_init(nn.Conv2d(channels, 32, 8, stride=4)), nn.ReLU()]
    layers += [layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU()]
    layers += [layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten()]
    size = nn.Sequential(*layers)(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(*layers, layer_init(nn.Linear(size, 512)), nn.ReLU())


def is_image(space: gym.Space) -> bool:
    """Bytes in three dimensions, two of them large enough for the convolutions."""
    return space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


class Agent(nn.Module):
    """Actor, critic and normalisers for a pair of spaces; observations come raw, (batch, *space.shape)."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.observation_space, self.action_space, self.bf16 = observation_space, action_space, args.bf16 == "on"
        self.continuous, self.missing = isinstance(action_space, gym.spaces.Box), None
        if self.continuous:
            outputs = math.prod(action_space.shape)
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std_init))
        else:  # a row of logits per component; choices that a component lacks have a logit of minus infinity
            nvec = torch.tensor(getattr(action_space, "nvec", getattr(action_space, "n", None))).flatten()
            self.choices, outputs = (len(nvec), int(nvec.max())), len(nvec) * int(nvec.max())
            if nvec.min() < nvec.max():
                self.missing = (torch.arange(self.choices[1]) >= nvec.unsqueeze(-1)).to(args.device)
        self.image, self.discrete = is_image(observation_space), isinstance(observation_space, gym.spaces.Discrete)
        self.obs_dtype = torch.uint8 if self.image else torch.int64 if self.discrete else torch.float32
        shape = observation_space.shape
        if self.image:
            self.channels_last = shape[2] < shape[0]
            self.body = nature_cnn(*((shape[2], *shape[:2]) if self.channels_last else shape))
            self.actor, self.critic = layer_init(nn.Linear(512, outputs), 0.01), layer_init(nn.Linear(512, 1), 1.0)
        else:
            if self.discrete:
                self.start, self.n = int(observation_space.start), int(observation_space.n)
            inputs = self.n if self.discrete else math.prod(shape)
            self.actor, self.critic = MLP(inputs, outputs, 0.01), MLP(inputs, 1, 1.0)
        self.obs_norm, self.return_norm = RunningNorm(shape) if args.norm_obs else None, RunningNorm(())

    @property
    def device(self) -> torch.device:
        return self.return_norm.count.device

    def empty_obs(self, batch: int) -> torch.Tensor:
        """Observations (batch, *space.shape) that are valid, to try something on."""
        shape = (batch, *self.observation_space.shape)
        return torch.full(shape, self.start if self.discrete else 0, dtype=self.obs_dtype, device=self.device)

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        """What actor and critic see."""
        if self.image:
            obs = obs.permute(0, 3, 1, 2) if self.channels_last else obs
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self.body(obs.to(torch.bfloat16 if self.bf16 else torch.float32) / 255).float()
        if self.discrete:
            return F.one_hot(obs - self.start, self.n).float()
        return (self.obs_norm(obs) if self.obs_norm else obs).reshape(len(obs), -1)

    def actor_head(self, features: torch.Tensor) -> torch.Tensor:
        """Means (batch, dims), or logits (batch, components, choices)."""
        if self.continuous:
            return self.actor(features)
        logits = self.actor(features).view(-1, *self.choices)
        return logits if self.missing is None else logits.masked_fill(self.missing, -1e9)

    def policy(self, features: torch.Tensor) -> Categorical | Gaussian:
        """pi(.|s)."""
        head = self.actor_head(features)
        return Gaussian(head, self.log_std) if self.continuous else Categorical(head)

    def value(self, features: torch.Tensor) -> torch.Tensor:
        """V(s) (batch,)."""
        return self.critic(features).squeeze(-1)

    def forward(self, features: torch.Tensor) -> tuple[Categorical | Gaussian, torch.Tensor]:
        return self.policy(features), self.value(features)

    def noise(self, *batch: int) -> torch.Tensor:
        """What makes actions random: normal noise of the policy's deviation, or Gumbel noise for logits."""
        if self.continuous:
            return torch.randn(*batch, len(self.log_std), device=self.device) * self.log_std.exp()
        return -torch.empty(*batch, *self.choices, device=self.device).exponential_().log_()

    def act(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of the policy, (batch, dims or components); its mode where the noise is zero."""
        noisy = self.actor_head(features) + noise
        return noisy if self.continuous else noisy.argmax(-1)

    def numpy_act(self) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """act(features(obs), noise) for an MLP on the CPU, in a quarter of the time that torch takes for a few rows.

        None where there is no such shortcut. Weights and normaliser are read in place.
        """
        if self.image or self.discrete or self.device.type != "cpu" or self.missing is not None:
            return None
        layers = [self.actor.first, self.actor.second, self.actor.last]
        layers = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in layers]
        shift, scale = (self.obs_norm.shift.numpy(), self.obs_norm.scale.numpy()) if self.obs_norm else (0.0, 1.0)

        def act(x: np.ndarray, noise: np.ndarray) -> np.ndarray:
            if self.obs_norm:
                x = np.minimum(np.maximum((x - shift) * scale, -10.0), 10.0)
            x = x.reshape(len(x), -1)
            for weight, bias in layers[:-1]:
                x = np.tanh(x @ weight + bias)
            noisy = (x @ layers[-1][0] + layers[-1][1]).reshape(noise.shape) + noise
            return noisy if self.continuous else noisy.argmax(-1)

        return act

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions (batch, ...) as the environments take them; what lies outside the box is clipped only here."""
        actions = actions.reshape(-1, *self.action_space.shape)
        if self.continuous:
            return np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        return actions + self.action_space.start


# ------------------------------------------------------------------------------------------------------ playing
def check_finite(observations: torch.Tensor, rewards: np.ndarray) -> None:
    """Raises Failed for the first NaN or infinity in observations or rewards, (steps, num_envs, ...)."""
    for name, x in (("observation", observations), ("reward", torch.from_numpy(rewards))):
        if x.is_floating_point() and not x.isfinite().all():
            step, env = (~x.isfinite()).nonzero()[0, :2].tolist()
            raise Failed(f"the {name} of environment {env} in step {step} of the rollout is NaN or infinite")


def scale_rewards(
    norm: RunningNorm, rewards: np.ndarray, ended: np.ndarray, running: np.ndarray, gamma: float
) -> np.ndarray:
    """Rewards over the deviation of the discounted return, which norm takes in; running (num_envs,) is carried on."""
    returns = np.empty_like(rewards)
    for t in range(len(rewards)):
        running[:] = running * gamma + rewards[t]
        returns[t] = running
        running[ended[t]] = 0.0
    norm.update(torch.from_numpy(returns).flatten().to(norm.count.device))
    return (rewards * norm.scale.item()).clip(-10.0, 10.0)


class Steps(NamedTuple):
    """What `play` saw, (num_steps, num_envs, ...) and on the agent's device; flags belong to step t, after it."""

    observations: torch.Tensor  # one more than steps: also what came after the last one
    features: list[torch.Tensor]  # of all steps but that one, where acting has computed them in torch; or none
    actions: torch.Tensor
    rewards: torch.Tensor  # as the method learns from them
    terminations: torch.Tensor
    truncations: torch.Tensor
    final_obs: dict[tuple[int, int], np.ndarray]  # last observation of what was truncated, by step and environment


@torch.no_grad()
def play(
    agent: Agent, envs: gym.vector.VectorEnv, obs: np.ndarray, info: dict, episodes: Episodes, args: Args
) -> tuple[Steps, np.ndarray, dict, list[tuple[int, float, int, int]]]:
    """Plays num_steps steps on from obs and info; returns them, the next obs and info, and the episodes done."""
    shape, device, features, final_obs = (args.num_steps, args.num_envs), agent.device, [], {}
    observations = torch.empty((args.num_steps + 1, *obs.shape), dtype=agent.obs_dtype, device=device)
    noise, fast_act = agent.noise(*shape), agent.numpy_act()
    actions = np.zeros(noise.shape[:3], dtype=np.float32 if agent.continuous else np.int64)
    rewards, (terminations, truncations, finished) = np.zeros(shape), np.zeros((3, *shape), dtype=bool)
    if fast_act:
        seen, noise = observations.numpy(), noise.numpy()
    for t in range(args.num_steps):
        if fast_act:
            seen[t] = obs
            actions[t] = fast_act(seen[t], noise[t])
        else:
            observations[t].copy_(torch.from_numpy(obs))
            features.append(agent.features(observations[t]))
            actions[t] = agent.act(features[t], noise[t]).cpu().numpy()
        clock = info.get("episode_frame_number")
        try:
            obs, rewards[t], terminations[t], truncations[t], info = envs.step(agent.to_env(actions[t]))
        except Failed as error:
            check_finite(observations[: t + 1], rewards[:t])
            raise Failed(f"{error} in step {t} of the rollout", error.status) from error
        if "final_obs" in info:
            finished[t] = whole_games(terminations[t] | truncations[t], info, clock)
            for n in np.flatnonzero(truncations[t] & ~terminations[t]):
                final_obs[t, n] = info["final_obs"][n]
                if agent.obs_dtype == torch.float32 and not np.isfinite(final_obs[t, n]).all():
                    raise Failed(
                        f"the last observation of environment {n} in step {t} of the rollout is NaN or infinite"
                    )
    observations[-1].copy_(torch.from_numpy(obs))
    check_finite(observations, rewards)
    done = episodes.collect(rewards, finished)
    if args.clip_reward:
        rewards = np.sign(rewards)
    if args.norm_reward:
        rewards = scale_rewards(agent.return_norm, rewards, terminations | truncations, episodes.discounted, args.gamma)
    seen = [torch.from_numpy(x).to(device) for x in (actions, rewards.astype(np.float32), terminations, truncations)]
    return Steps(observations, features, *seen, final_obs), obs, info, done


@torch.no_grad()
def values_of_final_obs(agent: Agent, steps: Steps) -> torch.Tensor:
    """V of the last observation where an episode was truncated, and zero elsewhere, (num_steps, num_envs)."""
    values = torch.zeros_like(steps.rewards)
    if steps.final_obs:
        final = torch.from_numpy(np.stack(list(steps.final_obs.values()))).to(agent.device, agent.obs_dtype)
        values[tuple(zip(*steps.final_obs))] = agent.value(agent.features(final))
    return values


# --------------------------------------------------------------------------------------------------- optimising
def flatten_parameters(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """One vector of which all parameters become views: clipping and a step are then a handful of operations."""
    parameters = list(parameters)
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector, parameters)
    return vector


class Adam:
    """Adam (arXiv 1412.6980) on one vector: torch.optim.Adam needs three times as long for so few numbers."""

    def __init__(self, parameters: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-5):
        self.parameters, self.beta1, self.beta2, self.eps, self.t = parameters, beta1, beta2, eps, 0
        self.m, self.v = torch.zeros_like(parameters), torch.zeros_like(parameters)

    @torch.no_grad()
    def step(self, grad: torch.Tensor, learning_rate: float) -> None:
        self.t += 1
        self.m.lerp_(grad, 1 - self.beta1)
        self.v.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        deviation = (self.v / (1 - self.beta2**self.t)).sqrt_().add_(self.eps)
        self.parameters.addcdiv_(self.m, deviation, value=-learning_rate / (1 - self.beta1**self.t))

    def state_dict(self) -> dict[str, Any]:
        return dict(m=self.m, v=self.v, t=self.t)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.m.copy_(state["m"]), self.v.copy_(state["v"])
        self.t = state["t"]


def compile_for(example: Callable[[], tuple], function: Callable, args: Args, worth_it: bool) -> Callable:
    """function as one graph for arguments of the shapes of example(); function itself where args.compile is "off".

    Decides args.compile = "auto". Raises UsageError where "on" was asked for and fails.
    """
    asked = args.compile
    if asked == "auto":
        args.compile = "on" if worth_it and args.device == "cpu" else "off"
    if args.compile == "off":
        return function
    # Every call has the same shapes, so the checks before each go, a seventh of its time. The code object is copied
    # because what was compiled belongs to it, and another agent in this process must not be given ours.
    function.__code__ = function.__code__.replace()
    torch._dynamo.config.trace_autograd_ops = True  # loss, gradient and clipping in one graph
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    try:  # now rather than in the first iteration
        compiled(*example())
    except Exception as error:  # no compiler, no headers, ...
        if asked == "on":
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"--compile on fails here ({reason}); use --compile off.") from None
        print("torch cannot compile here (is there a C++ compiler?), so updates take three times as long.")
        args.compile = "off"
    return compiled if args.compile == "on" else function


# --------------------------------------------------------------------------------------------------- the method
STATS = ("policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac", "grad_norm")


class Batch(NamedTuple):
    """A rollout, flattened to (num_steps * num_envs, ...); old_policy are the parameters of pi_old(.|s)."""

    obs: torch.Tensor
    actions: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor
    old_policy: tuple[torch.Tensor, ...]


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminations: torch.Tensor,
    truncations: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimate (arXiv 1506.02438, eq. 16), and the returns advantages + values.

    All tensors are (num_steps, num_envs), the flags belong to step t. next_values[t] is V of the true successor of
    step t: of the final observation where an episode ended, not of the one after the reset. A terminated state has no
    future; a truncated one does, so its error bootstraps. Neither lets in later errors: those are of another episode.
    """
    terminations, truncations = terminations.bool(), truncations.bool()
    successors = torch.where(terminations, 0.0, next_values)  # where, for 0 * NaN is NaN
    deltas = rewards + gamma * successors - values
    decay = gamma * gae_lambda * (~(terminations | truncations)).to(deltas)
    advantages = [torch.zeros_like(deltas[0])]
    for delta, discount in zip(deltas.flip(0), decay.flip(0)):
        advantages.append(torch.addcmul(delta, discount, advantages[-1]))
    advantages = torch.stack(advantages[:0:-1])
    return advantages, advantages + values


def surrogate_objective(
    ratio: torch.Tensor, advantages: torch.Tensor, kl: torch.Tensor, kl_beta: torch.Tensor | float, args: Args
) -> torch.Tensor:
    """The mean that the policy climbs; ratio, advantages and kl = KL(pi_old || pi) are (batch,)."""
    surrogate = ratio * advantages  # L^CPI, eq. 6
    if args.objective == "clip":
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * advantages
        surrogate = torch.min(surrogate, clipped)  # L^CLIP, eq. 7
    elif args.objective.startswith("kl"):
        surrogate = surrogate - kl_beta * kl  # L^KLPEN, eq. 8
    return surrogate.mean()


def value_objective(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, args: Args) -> torch.Tensor:
    """Half the mean squared error, all (batch,); of a clipped step from the old values, where that is larger."""
    assert values.shape == old.shape == returns.shape
    error = (values - returns) ** 2
    if args.clip_vloss:
        error = torch.max(error, (old + (values - old).clamp(-args.clip_coef, args.clip_coef) - returns) ** 2)
    return 0.5 * error.mean()


def adapt_beta(beta: float, kl: float, kl_target: float) -> float:
    """The KL penalty of the next update (section 4), from the mean KL(pi_old || pi) that this one led to."""
    return beta / 2 if kl < kl_target / 1.5 else beta * 2 if kl > kl_target * 1.5 else beta


def ppo_loss(agent: Agent, batch: Batch, kl_beta: torch.Tensor, args: Args) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Eq. 9 as a loss, and STATS but for the last."""
    policy, values = agent(agent.features(batch.obs))
    logratio = policy.log_prob(batch.actions) - batch.logprobs
    ratio, advantages = logratio.exp(), batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    kl = type(policy)(*batch.old_policy).kl(policy) if args.objective.startswith("kl") else torch.zeros_like(ratio)
    policy_loss = -surrogate_objective(ratio, advantages, kl, kl_beta, args)
    value_loss = value_objective(values, batch.values, batch.returns, args)
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    approx_kl = ((ratio - 1) - logratio).mean()  # the mean of -log r estimates the same, but can be negative
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, [policy_loss, value_loss, entropy, approx_kl, -logratio.mean(), clipfrac]


def make_gradient(agent: Agent, args: Args) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """gradient(batch, rows, kl_beta) -> (gradient (parameters,) clipped to max_grad_norm, STATS as one tensor)."""
    parameters = list(agent.parameters())

    def gradient(batch: Batch, rows: torch.Tensor, kl_beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        minibatch = Batch(*(x[rows] for x in batch[:-1]), tuple(x[rows] for x in batch.old_policy))
        loss, stats = ppo_loss(agent, minibatch, kl_beta, args)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        norm = grad.norm()
        return grad * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), torch.stack([*stats, norm]).detach()

    batch_size = args.num_envs * args.num_steps

    def example() -> tuple[Batch, torch.Tensor, torch.Tensor]:
        obs, zeros = agent.empty_obs(batch_size), torch.zeros(4, batch_size, device=args.device)
        with torch.no_grad():
            features = agent.features(obs)
            actions, old_policy = agent.act(features, zeros[0, 0]), agent.policy(features).parameters
        rows = torch.arange(batch_size // args.num_minibatches, device=args.device)
        return Batch(obs, actions, *zeros, old_policy), rows, zeros[0, 0]

    # Compiling takes 10 s and saves two thirds of each step of an MLP, but nothing of a CNN's.
    steps = args.total_timesteps // batch_size * args.update_epochs * args.num_minibatches
    return compile_for(example, gradient, args, steps > 40_000 and not agent.image)


@torch.no_grad()
def judge(agent: Agent, steps: Steps) -> tuple[Categorical | Gaussian, torch.Tensor, torch.Tensor]:
    """pi(.|s) of all num_steps * num_envs states, and (num_steps, num_envs) values V(s) and V of the true successors.

    All states at once, which is faster than at every step.
    """
    num_envs = steps.rewards.shape[1]
    unseen = steps.observations[-1] if steps.features else steps.observations.flatten(0, 1)
    policy, values = agent(torch.cat([*steps.features, agent.features(unseen)]))
    values = values.view(-1, num_envs)
    next_values = torch.where(steps.truncations, values_of_final_obs(agent, steps), values[1:])
    return type(policy)(*(x[:-num_envs] for x in policy.parameters)), values[:-1], next_values


def rollout(
    agent: Agent, envs: gym.vector.VectorEnv, obs: np.ndarray, info: dict, episodes: Episodes, args: Args
) -> tuple[Batch, np.ndarray, dict, list[tuple[int, float, int, int]]]:
    """Plays num_steps steps on from obs and info; returns the batch, the next obs and info, and the episodes done."""
    steps, obs, info, done = play(agent, envs, obs, info, episodes, args)
    old_policy, values, next_values = judge(agent, steps)
    flags = steps.terminations, steps.truncations
    advantages, returns = compute_gae(steps.rewards, values, next_values, *flags, args.gamma, args.gae_lambda)
    actions = steps.actions.flatten(0, 1)
    flat = (x.flatten(0, 1) for x in (advantages, returns, values))
    logprobs = old_policy.log_prob(actions)
    batch = Batch(steps.observations[:-1].flatten(0, 1), actions, logprobs, *flat, old_policy.parameters)
    return batch, obs, info, done


def update(
    agent: Agent, optimizer: Adam, gradient: Callable, batch: Batch, learning_rate: float, kl_beta: float, args: Args
) -> dict[str, float]:
    """K epochs of minibatch steps; returns the means of STATS over them, and the explained variance, by their tags."""
    stats, beta = [], torch.tensor(kl_beta, device=agent.device)
    epochs = (torch.randperm(len(batch.values), device=agent.device) for _ in range(args.update_epochs))
    for rows in (rows for epoch in epochs for rows in epoch.chunk(args.num_minibatches)):
        grad, minibatch_stats = gradient(batch, rows, beta)
        stats.append(minibatch_stats)
        if args.target_kl and minibatch_stats[STATS.index("approx_kl")] > args.target_kl:
            break
        optimizer.step(grad, learning_rate)
    means = dict(zip(STATS, torch.stack(stats).mean(0).tolist()))
    for name, value in means.items():
        if not math.isfinite(value):
            raise Failed(f"{name} is {value}")
    means["explained_variance"] = (1 - (batch.returns - batch.values).var() / batch.returns.var()).item()
    return {f"losses/{name}": value for name, value in means.items()}


@torch.no_grad()
def mean_kl(agent: Agent, batch: Batch) -> float:
    """E[KL(pi_old || pi)] over the batch, for adapt_beta."""
    policy = agent.policy(agent.features(batch.obs))
    return type(policy)(*batch.old_policy).kl(policy).mean().item()


# ------------------------------------------------------------------------------------------- the run directory
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


def read_config(path: Path) -> tuple[Args, dict[str, Any]]:
    """The arguments, and all else in the config.json, of a run; raises UsageError where there is no such file."""
    try:
        config = json.loads((run_dir_of(path) / "config.json").read_text())
        return Args(**config["args"]), config
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} is no run directory of this script: it has no config.json with its arguments."
        ) from None


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of a run directory; {} while there is none, or none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text())
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError):
        return {}


def versions() -> dict[str, str]:
    packages = ("torch", "gymnasium", "numpy", "mujoco", "ale-py")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def create_run_dir(args: Args) -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json."""

    def git(*command: str) -> str | None:
        here = Path(__file__).parent
        done = shutil.which("git") and subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done and done.returncode == 0 else None

    name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
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
    config = dict(args=asdict(args), command=[sys.executable, *sys.argv], seed=args.seed, versions=versions())
    changes = git("status", "--porcelain")
    config |= dict(git_commit=git("rev-parse", "HEAD"), git_dirty=None if changes is None else bool(changes))
    config |= dict(hardware=torch.cuda.get_device_name() if args.device == "cuda" else cpu, threads=args.num_threads)
    write_json(path / "config.json", config | dict(wandb_id=uuid.uuid4().hex[:8]))
    return path


class Run:
    """The files of a run, their views in TensorBoard, wandb and the progress line, and how the run ends."""

    def __init__(self, args: Args, state: dict[str, Any] | None, started: float):
        self.args, self.signals, self.printed, batch_size = args, [], 0.0, args.num_envs * args.num_steps
        self.path = Path(args.resume) if state else create_run_dir(args)
        self.total = args.total_timesteps // batch_size * batch_size
        saved = state or dict(iteration=0, global_step=0, wall_time=0.0, last_returns=[], best=-math.inf, csv_bytes={})
        self.iteration, self.global_step = saved["iteration"], saved["global_step"]
        self.first_step = self.global_step
        self.earlier_time, self.last_returns, self.best = saved["wall_time"], saved["last_returns"], saved["best"]
        self.files, self.unwritten, self.written = {}, [], 0.0
        for name in ("episodes", "progress"):
            file = self.files[name] = open(self.path / f"{name}.csv", "a+", newline="")
            file.truncate(saved["csv_bytes"].get(name, 0))  # what came after the checkpoint will come again
        if not state:
            csv.writer(self.files["episodes"]).writerow(["global_step", "wall_time", "return", "length"])
            self.files["episodes"].flush()
        self.files["progress"].seek(0)
        self.columns = next(csv.reader(self.files["progress"]), None)
        self.writer = SummaryWriter(self.path, purge_step=self.first_step + 1 if state else None)
        if not state:
            table = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{table}")
            plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in vars(args).items()}
            for summary in hparams(plain, {"charts/episodic_return": 0.0}):
                self.writer.file_writer.add_summary(summary)
        self.wandb = None
        if args.track:
            import wandb

            names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=self.path.name, dir=self.path)
            identity = read_config(self.path)[1]["wandb_id"]
            self.wandb = wandb.init(id=identity, resume="allow", config=vars(args), **names)
        machine = f"{args.device}, threads: {args.num_threads}" + ", compiled" * (args.compile == "on")
        print(f"{self.path} ({machine})")
        self.exact = not state or self.continues_exactly(state)
        if state:
            how = (
                "exactly as if it had never stopped"
                if self.exact
                else "validly, but not bit for bit as without the stop"
            )
            print(f"goes on from step {self.global_step:,}, {how}")
        self.evaluations = read_summary(self.path).get("eval")
        self.begun = time.perf_counter()
        self.startup_time = self.begun - started

    def continues_exactly(self, state: dict[str, Any]) -> bool:
        """Whether a checkpoint is from where every run restarts its environments, from this machine and software."""
        saved, here = read_config(self.path)[0], self.args
        same = saved.device == here.device == "cpu" and saved.compile == here.compile
        return state["exact"] and same and state["versions"] == versions()

    def __enter__(self) -> "Run":
        def remember(signum: int, frame: Any) -> None:
            if self.signals:
                os._exit(128 + signum)  # a second signal does not wait for the iteration
            self.signals.append(signum)

        self.handlers = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        """Writes summary.json, and says of an error when it happened and where the run can go on."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        status = "interrupted" if kind is Stopped else getattr(error, "status", "failed") if error else "completed"
        summary = dict(status=status, global_step=self.global_step, wall_time=self.wall_time(), sps=self.sps())
        summary |= dict(startup_time=self.startup_time, train_last100=self.score())
        unit = 2**20 if sys.platform == "darwin" else 2**10
        summary |= dict(peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        summary |= dict(eval=self.evaluations) if self.evaluations else {}
        print("\n" * (sys.stdout.isatty() and 0 < self.global_step < self.total), end="")
        message = ""
        if status in ("diverged", "failed"):
            newest = max((self.path / "checkpoints").glob("step_*.pt"), default="none")
            message = f"iteration {self.iteration}: {error}; the last good checkpoint is {newest}."
            summary |= dict(error=message)
        try:
            write_json(self.path / "summary.json", summary)
            self.write_scalars()
            for file in (*self.files.values(), self.writer):
                file.close()
        except OSError:  # a full disk again
            if not error:
                raise
        if self.wandb:
            self.wandb.finish(exit_code=int(status != "completed"))
        if isinstance(error, (Failed, OSError)):
            raise Failed(message, status) from error
        print(f"{status} after {self.global_step:,} steps: {self.path}")

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

    def log(self, steps: int, episodes: list[tuple[int, float, int, int]], values: dict[str, float]) -> None:
        """Records what an iteration was: steps, episodes as Episodes.collect returns them, and values by their tags."""
        before, now = self.global_step, f"{self.wall_time():.3f}"
        self.global_step += steps
        csv.writer(self.files["episodes"]).writerows([before + step, now, *rest] for step, *rest, _ in episodes)
        self.last_returns = (self.last_returns + [episode[1] for episode in episodes])[-100:]
        values["charts/SPS"] = self.sps()
        row = {"global_step": self.global_step, "wall_time": now, "sps": values["charts/SPS"]}
        row |= {"charts/episodic_return": "", "charts/episodic_length": ""} | values
        if episodes:
            means = dict(zip(("charts/episodic_return", "charts/episodic_length"), np.mean(episodes, 0)[1:3].tolist()))
            row, values = row | means, values | means
        if not self.columns:
            self.columns = list(row)
            csv.writer(self.files["progress"]).writerow(self.columns)
        csv.writer(self.files["progress"]).writerow([row[column] for column in self.columns])
        for file in self.files.values():
            file.flush()
        self.unwritten += [(tag, value, self.global_step) for tag, value in values.items()]
        if time.perf_counter() - self.written > 2.0:
            self.write_scalars()
        if self.wandb and self.global_step > self.wandb.step:  # it refuses what a killed run has sent already
            self.wandb.log(values, step=self.global_step)
        self.print_progress()

    def write_scalars(self) -> None:
        """Hands TensorBoard what has gathered, at most every other second: its thread gets in the way of this one."""
        for scalar in self.unwritten:
            self.writer.add_scalar(*scalar)
        self.writer.flush()
        self.unwritten, self.written = [], time.perf_counter()

    def print_progress(self) -> None:
        """One line that renews itself on a terminal; a line every five seconds elsewhere."""
        terminal, part = sys.stdout.isatty(), min(self.global_step / self.total, 1.0)
        if time.perf_counter() - self.printed < (0.1 if terminal else 5.0) and part < 1:
            return
        self.printed = time.perf_counter()
        seconds = int(max(self.total - self.global_step, 0) / self.sps())
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        score = "-" if self.score() is None else f"{self.score():,.1f}"
        line = f"{self.global_step:>11,} steps {part:4.0%} {self.sps():>7,.0f}/s  return {score:>9}  {left}"
        bar = f"\r[{'#' * int(10 * part):.<10}]"
        print(f"{bar}{line}\x1b[K" if terminal else line, end="" if terminal and part < 1 else "\n", flush=True)


def save_checkpoint(run: Run, agent: Agent, boundary: bool, **learner: Any) -> None:
    """Writes checkpoints/step_*.pt, of which two stay, and best.pt where the last 100 episodes were the best so far.

    learner is what the method carries on besides the agent. At a boundary an uninterrupted run restarts its
    environments too: from there, a resumed one goes on exactly.
    """
    kind, keys, *position = np.random.get_state()
    better = run.score() is not None and run.score() > run.best
    run.best = run.score() if better else run.best
    state = dict(iteration=run.iteration, global_step=run.global_step, exact=boundary and run.exact)
    state |= dict(total_timesteps=run.args.total_timesteps, versions=versions(), agent=agent.state_dict(), **learner)
    state |= dict(
        torch_rng=torch.get_rng_state(), python_rng=random.getstate(), numpy_rng=[kind, keys.tolist(), *position]
    )
    state |= dict(cuda_rng=torch.cuda.get_rng_state_all() if agent.device.type == "cuda" else [])
    state |= dict(wall_time=run.wall_time(), last_returns=run.last_returns, best=run.best)
    state |= dict(csv_bytes={name: (run.path / f"{name}.csv").stat().st_size for name in run.files})
    run.write_scalars()
    for file in run.files.values():
        os.fsync(file.fileno())  # what csv_bytes counts must outlive a power cut, too
    buffer, folder = io.BytesIO(), run.path / "checkpoints"
    torch.save(state, buffer)
    if better:  # first, for the other one says that it is done
        write_atomically(folder / "best.pt", buffer.getbuffer())
    write_atomically(folder / f"step_{run.global_step:012}.pt", buffer.getbuffer())
    for old in sorted(folder.glob("step_*.pt"))[:-2]:
        old.unlink()


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


def restore(state: dict[str, Any], agent: Agent) -> None:
    """Puts back weights, normalisers and all random states."""
    agent.load_state_dict(state["agent"])
    torch.set_rng_state(state["torch_rng"])
    if agent.device.type == "cuda":
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    np.random.set_state(tuple(state["numpy_rng"]))
    version, keys, gauss = state["python_rng"]
    random.setstate((version, tuple(keys), gauss))


# ---------------------------------------------------------------------------------------- evaluate, train, main
def resolve(args: Args, envs: gym.vector.VectorEnv) -> None:
    """Turns "auto" into what suits this network and machine and sets the threads; UsageError for what cannot be."""
    image, cuda = is_image(envs.single_observation_space), torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    if args.norm_obs and (image or not isinstance(envs.single_observation_space, gym.spaces.Box)):
        raise UsageError(f"--norm-obs is for vector observations, which {args.env_id} has not; use --no-norm-obs.")
    if args.capture_video and importlib.util.find_spec("moviepy") is None:
        raise UsageError("--capture-video needs moviepy; install it with: pip install moviepy")
    if args.track and not args.evaluate and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            problem = None if wandb.login(prompt=False) else "wandb is not logged in"
        except Exception as error:
            problem = f"wandb cannot log in ({' '.join(str(error).split())})"
        if problem:
            raise UsageError(f"--track: {problem}; run wandb login, or set WANDB_MODE=offline.")
    if args.device == "auto":
        args.device = "cuda" if image and cuda else "cpu"
    if args.bf16 == "auto":
        cpu = torch.cpu.get_capabilities().get("avx512_bf16", False)
        native = cpu if args.device == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
        args.bf16 = "on" if image and native else "off"
    args.num_threads = args.num_threads or ((os.cpu_count() or 1) if image else 1)
    torch.set_num_threads(args.num_threads)


def film(frames: list[np.ndarray], path: Path) -> None:
    """Writes frames (height, width, 3) as an mp4."""
    from moviepy import ImageSequenceClip

    path.parent.mkdir(exist_ok=True)
    ImageSequenceClip(frames, fps=30).write_videofile(str(path), logger=None)


@torch.no_grad()
def evaluate(args: Args) -> list[float]:
    """Plays eval_episodes with the run args.evaluate, its normalisers frozen; returns the raw returns.

    Where the run has ended, the result goes to its summary.json and, as eval/episodic_return, to TensorBoard.
    """
    check_args(args)
    path, num_envs = Path(args.evaluate), min(args.eval_episodes, 8)
    atari = environment_family(args.env_id) == "atari"
    envs = make_envs(args, num_envs, **(dict(render_mode="rgb_array") if args.capture_video and not atari else {}))
    resolve(args, envs)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
    state, folder = load_checkpoint(path), run_dir_of(path)
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError:
        raise UsageError(f"{path} was trained on other spaces than those of --env-id {args.env_id}.") from None
    torch.manual_seed(args.eval_seed)
    (obs, info), episodes = reset_envs(envs, args.eval_seed, 0), Episodes(num_envs)
    if args.capture_video and atari:  # the emulators cannot render, but twins that play the same games see in colour
        twins = make_envs(args, num_envs, grayscale=False, img_height=210, img_width=160, stack_num=1)
        twin_obs, _ = reset_envs(twins, args.eval_seed, 0)
    returns, frames = [[] for _ in range(num_envs)], []
    shares = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]  # or else short episodes win
    while any(len(played) < share for played, share in zip(returns, shares)):
        noise = agent.noise(num_envs) * float(args.eval_stochastic)
        features = agent.features(torch.from_numpy(obs).to(agent.device, agent.obs_dtype))
        actions, clock = agent.to_env(agent.act(features, noise).cpu().numpy()), info.get("episode_frame_number")
        filming = args.capture_video and len(returns[0]) < shares[0]
        if filming:
            frames.append(twin_obs[0, -1] if atari else envs.envs[0].render())
            twin_obs = twins.step(actions)[0] if atari else None
        obs, rewards, terminations, truncations, info = envs.step(actions)
        for _, ret, _, n in episodes.collect(rewards[None], whole_games(terminations | truncations, info, clock)[None]):
            returns[n].append(ret)
            if filming and n == 0:
                film(frames, folder / "videos" / f"iteration_{state['iteration']}_episode_{len(returns[0])}.mp4")
                frames.clear()
    returns = [ret for played, share in zip(returns, shares) for ret in played[:share]]
    kind = "stochastic" if args.eval_stochastic else "deterministic"
    result = {name: float(getattr(np, name)(returns)) for name in ("mean", "std", "min", "max")}
    print(f"{len(returns)} {kind} episodes: {', '.join(f'{name} {value:,.2f}' for name, value in result.items())}")
    if summary := read_summary(folder):
        result |= dict(episodes=len(returns), seed=args.eval_seed, iteration=state["iteration"])
        summary["eval"] = summary.get("eval", {}) | {kind: result}
        write_json(folder / "summary.json", summary)
        with SummaryWriter(folder) as writer:
            writer.add_scalar("eval/episodic_return", result["mean"], state["global_step"])
    return returns


def train(args: Args) -> Path:
    """Trains for total_timesteps, or goes on with the run args.resume; returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = time.perf_counter()
    check_args(args)
    check_minibatches(args)
    envs = make_envs(args, args.num_envs)
    resolve(args, envs)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(args.device)
    optimizer = Adam(flatten_parameters(agent.parameters()))
    with torch.random.fork_rng(devices=[]):  # compiling, or not, must not change the run
        gradient = make_gradient(agent, args)
    num_iterations, done, kl_beta = args.total_timesteps // (args.num_envs * args.num_steps), 0, args.kl_beta
    interval = args.checkpoint_interval or max(10, math.ceil(num_iterations / 20))
    state = load_checkpoint(Path(args.resume)) if args.resume else None
    complete = read_summary(Path(args.resume)).get("status") == "completed"  # not if killed just before it was written
    if state and state["iteration"] == num_iterations and complete:
        print(f"{args.resume} is complete; there is nothing left to train.")
        return Path(args.resume)
    if state:
        restore(state, agent)
        optimizer.load_state_dict(state["optimizer"])
        done, kl_beta = state["iteration"], state["kl_beta"]
    with Run(args, state, started) as run:
        if not state:
            save_checkpoint(run, agent, True, optimizer=optimizer.state_dict(), kl_beta=kl_beta)
        for run.iteration in range(done + 1, num_iterations + 1):
            iteration = run.iteration
            if iteration == done + 1 or (iteration - 1) % interval == 0:  # after a checkpoint, as when resuming from it
                (obs, info), episodes = reset_envs(envs, args.seed, iteration), Episodes(args.num_envs)
            learning_rate = args.learning_rate * (1 - (iteration - 1) / num_iterations if args.anneal_lr else 1)
            batch, obs, info, finished = rollout(agent, envs, obs, info, episodes, args)
            values = update(agent, optimizer, gradient, batch, learning_rate, kl_beta, args)
            values |= {"charts/learning_rate": learning_rate}
            if args.objective.startswith("kl"):
                values["charts/kl_beta"] = kl_beta
            if args.objective == "kl-adaptive":
                kl_beta = adapt_beta(kl_beta, mean_kl(agent, batch), args.kl_target)
            if agent.obs_norm:
                agent.obs_norm.update(batch.obs)
            run.log(len(batch.values), finished, values)
            boundary, last, stop = iteration % interval == 0, iteration == num_iterations, bool(run.signals)
            if boundary or last or stop:
                save_checkpoint(run, agent, boundary or last, optimizer=optimizer.state_dict(), kl_beta=kl_beta)
            if stop and not last:
                raise Stopped(run.signals[0])
    return run.path


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""
    try:
        args = parse_args(argv)
        path = args.evaluate or str(train(args))
        if args.evaluate or args.capture_video:
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
