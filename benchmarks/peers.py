"""Stable-Baselines3 and a random policy beside the scripts: python -m benchmarks.peers ALGO --env-id CartPole-v1

ALGO is sb3:ppo or sb3:a2c (Stable-Baselines3), sb3:trpo (sb3-contrib), or random: uniformly random actions, in training
and in evaluation. Environments, budgets, run directory and exit status are those of ppo.py; so are --evaluate RUN_DIR
and --resume RUN_DIR, which here goes on validly, but not bit for bit. A run ends as the library's do, with the first
whole batch that reaches the budget.

--hyperparameters theirs takes the library's defaults but for what is customary with it (THEIRS below). Each is a flag:
--n-steps 512 --learning-rate lin_3e-4 (falls linearly to zero) --policy-kwargs '{"net_arch": [64]}'
--hyperparameters ours takes those of our script for the environment, and its flags, under the library's names; what
has no counterpart is in config.json as "unmapped". All that ran is in config.json in either case.
"""

import argparse
import csv
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks.jobs import PEERS, ROOT, UsageError, check_environment, read_json

BUDGETS = {"classic": 200_000, "box2d": 1_000_000, "mujoco": 1_000_000, "atari": 10_000_000}  # those of the scripts

# Where "theirs" departs from the defaults of the library's constructors, which leave the number of environments open:
# PPO and TRPO are set for one, A2C usually gets eight. On Atari the settings of RL Baselines3 Zoo; TRPO, which it does
# not have there, takes its default batch of 2,048 from eight games. On MuJoCo observations and rewards are normalised.
TF_RMSPROP = {"optimizer_class": "RMSpropTFLike", "optimizer_kwargs": {"eps": 1e-5}}
THEIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("sb3:ppo", ""): dict(n_envs=1),
    ("sb3:ppo", "atari"): dict(n_envs=8, n_steps=128, batch_size=256, n_epochs=4, learning_rate="lin_2.5e-4")
    | dict(clip_range="lin_0.1", ent_coef=0.01, vf_coef=0.5),
    ("sb3:a2c", ""): dict(n_envs=8),
    ("sb3:a2c", "atari"): dict(n_envs=16, ent_coef=0.01, vf_coef=0.25, policy_kwargs=TF_RMSPROP),
    ("sb3:trpo", ""): dict(n_envs=1),
    ("sb3:trpo", "atari"): dict(n_envs=8, n_steps=256),
}

# "ours": their names for our scripts' arguments, and the values of those without a name at which they mean nothing.
SAME = dict(num_envs="n_envs", num_steps="n_steps", gamma="gamma", gae_lambda="gae_lambda", ent_coef="ent_coef")
SAME |= dict(norm_adv="normalize_advantage", max_grad_norm="max_grad_norm", clip_coef="clip_range", max_kl="target_kl")
SAME |= dict(cg_iters="cg_max_steps", cg_damping="cg_damping", line_search_steps="line_search_max_iter")
SAME |= dict(line_search_shrink="line_search_shrinking_factor", clip_reward="clip_reward")
IDLE = dict(objective="clip", kl_beta=1.0, kl_target=0.01, clip_vloss=False, fisher_fraction=1.0, ent_coef=0.0)

# Our tags for their values, and the factor between them: our value error is halved, and our entropy is no loss.
TAGS = {"policy_gradient_loss": ("losses/policy_loss", 1.0), "policy_loss": ("losses/policy_loss", 1.0)}
TAGS |= {"policy_objective": ("losses/policy_loss", -1.0), "value_loss": ("losses/value_loss", 0.5)}
TAGS |= {"entropy_loss": ("losses/entropy", -1.0), "approx_kl": ("losses/approx_kl", 1.0)}
TAGS |= {"kl_divergence_loss": ("losses/kl", 1.0), "clip_fraction": ("losses/clipfrac", 1.0)}
TAGS |= {"explained_variance": ("losses/explained_variance", 1.0), "learning_rate": ("charts/learning_rate", 1.0)}


class Failed(Exception):
    """Something raised: exit status 1."""

    status = "failed"


class Diverged(Failed):
    """A number is NaN or infinite: exit status 1."""

    status = "diverged"


class Stopped(Exception):
    """A signal ended the run after its iteration was saved: exit status 128 + signal."""

    status = "interrupted"


# ---------------------------------------------------------------------------------------------- hyperparameters
def family_of(env_id: str) -> str:
    """classic, box2d, mujoco or atari; raises UsageError for what is not registered, and for other Atari protocols."""
    check_environment(env_id)
    where = str(gym.spec(env_id.rpartition(":")[2]).entry_point)
    if where.startswith("ale_py"):
        if not re.fullmatch(r"ALE/\w+-v5|\w+NoFrameskip-v4", env_id) or "-ram" in env_id:
            raise UsageError(f"--env-id {env_id}: Atari games are ALE/<Game>-v5 or <Game>NoFrameskip-v4.")
        return "atari"
    return next((name for name in ("box2d", "mujoco") if where.startswith(f"gymnasium.envs.{name}")), "classic")


def need(package: str, purpose: str) -> None:
    """Raises UsageError where a package of the extra is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f'{purpose} needs {package}; install it with: pip install -c constraints.txt -e ".[peers]"')


def library_class(algo: str) -> type:
    """The class behind sb3:..."""
    package = "sb3_contrib" if algo == "sb3:trpo" else "stable_baselines3"
    need(package, algo)
    return getattr(importlib.import_module(package), algo.removeprefix("sb3:").upper())


def library_defaults(algo: str) -> dict[str, Any]:
    """The hyperparameters of the class, at their defaults."""
    others = "self policy env policy_kwargs rollout_buffer_class rollout_buffer_kwargs stats_window_size"
    others += " tensorboard_log verbose seed device _init_setup_model"
    parameters = inspect.signature(library_class(algo).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in others.split()}


def settings_theirs(algo: str, family: str) -> dict[str, Any]:
    """What is customary with the library."""
    if algo == "random":
        return dict(n_envs=8, n_steps=128)
    mujoco = family == "mujoco"
    settings = library_defaults(algo) | dict(policy_kwargs={}, norm_obs=mujoco, norm_reward=mujoco)
    return settings | dict(clip_reward=family == "atari") | THEIRS.get((algo, family), THEIRS[algo, ""])


def settings_ours(algo: str, flags: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our script's hyperparameters under the library's names, and those of ours that have no counterpart there."""
    settings, script = library_defaults(algo), importlib.import_module(algo.removeprefix("sb3:"))
    try:
        args = script.parse_args(flags)
        script.check_args(args)
        if algo != "sb3:a2c":
            script.check_minibatches(args)
    except script.UsageError as error:
        raise UsageError(str(error)) from None
    ours = vars(args)
    settings |= dict(n_envs=0, clip_reward=False, norm_obs=args.norm_obs, norm_reward=args.norm_reward)
    settings |= dict(learning_rate=f"lin_{args.learning_rate}" if args.anneal_lr else args.learning_rate)
    settings |= dict(policy_kwargs=dict(log_std_init=args.log_std_init))
    if algo == "sb3:a2c":
        settings["use_rms_prop"] = args.optimizer == "rmsprop"
        settings["policy_kwargs"] |= TF_RMSPROP if settings["use_rms_prop"] else {}
    else:
        settings["batch_size"] = args.num_envs * args.num_steps // args.num_minibatches
        settings["n_epochs" if algo == "sb3:ppo" else "n_critic_updates"] = args.update_epochs
    if algo != "sb3:trpo":
        settings["vf_coef"] = args.vf_coef / 2  # ours weighs half the squared error
    if ours.get("target_kl"):
        settings["target_kl"] = args.target_kl / 1.5  # theirs ends the epochs at 1.5 times its target
    same = [name for name in SAME if name in ours and SAME[name] in settings]
    settings |= {SAME[name]: ours[name] for name in same}
    mapped = "total_timesteps log_interval learning_rate anneal_lr num_minibatches update_epochs vf_coef target_kl"
    mapped += " optimizer log_std_init norm_obs norm_reward"
    fields = list(ours)  # those before env_id are about the run
    rest = [name for name in fields[fields.index("env_id") + 1 :] if name not in [*same, *mapped.split()]]
    return settings, {name: ours[name] for name in rest if ours[name] != IDLE.get(name)}


# ---------------------------------------------------------------------------------------------------- arguments
def plain(text: str) -> Any:
    """What a flag's value is in JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def refuse(message: str) -> None:
    raise UsageError(f"{message.removeprefix('argument ')}.")


def parse_args(argv: list[str] | None = None) -> tuple[Namespace, dict[str, Any]]:
    """Arguments of the run and hyperparameters as one flat namespace, and what of ours could not be mapped."""
    words = sys.argv[1:] if argv is None else list(argv)
    algo = words.pop(0) if words and not words[0].startswith("-") else ""
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    options = dict(formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False)
    parser = argparse.ArgumentParser("python -m benchmarks.peers ALGO", description=__doc__, **options)
    parser.error = refuse
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--exp-name", default=algo, help="name of the experiment (default: ALGO)")
    add("--seed", type=int, default=1, help=f"seed of weights, actions and environments {default}")
    add("--runs-dir", default="runs", help=f"folder of all runs {default}")
    add("--run-name", default="", help="folder of this run in runs-dir")
    add("--resume", default="", metavar="RUN_DIR", help="run to go on with, with its own arguments")
    add("--evaluate", default="", metavar="RUN_DIR", help="run, or one of its checkpoints, to play instead of training")
    add("--eval-episodes", type=int, default=10, help=f"episodes that --evaluate plays {default}")
    add("--eval-seed", type=int, default=1_000_000, help=f"seed of --evaluate {default}")
    add("--eval-stochastic", action="store_true", help="let --evaluate sample actions")
    add("--checkpoint-interval", type=int, default=0, help="iterations between checkpoints (0: a twentieth of the run)")
    add("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="auto: cuda for a CNN, where there is one")
    add("--num-threads", type=int, default=0, help="0: one for an MLP, all cores for a CNN")
    add("--hyperparameters", choices=["theirs", "ours"], default="theirs", help=default)
    add("--env-id", default="CartPole-v1", help=default)
    add("--total-timesteps", type=int, help="budget (default: that of our scripts for the environment)")
    parser.set_defaults(algo=algo)
    asked, flags = parser.parse_known_args(words)
    where, settings, saved, unmapped = asked.resume or asked.evaluate, {}, {}, {}
    ours = not where and asked.hyperparameters == "ours" and algo.startswith("sb3:")
    if where:
        saved = read_json(run_dir_of(Path(where)) / "config.json").get("args", {})
        if saved.get("algo") not in PEERS:
            raise UsageError(f"{where} is no run directory of a peer: it has no config.json with its arguments.")
        if algo not in ("", saved["algo"]):
            raise UsageError(f"{where} is a run of {saved['algo']}, not of {algo}.")
        if asked.resume and Path(where).is_file():
            raise UsageError(f"--resume takes a run directory, here {run_dir_of(Path(where))}.")
        settings = {name: value for name, value in saved.items() if name not in vars(asked)}
        parser.set_defaults(**saved)
    elif algo in PEERS:
        family = family_of(asked.env_id)
        budget = asked.total_timesteps or BUDGETS[family]
        if ours:
            flags += ["--env-id", asked.env_id, "--total-timesteps", str(budget)]
            settings, unmapped = settings_ours(algo, flags)
        else:
            settings = settings_theirs(algo, family)
        parser.set_defaults(total_timesteps=budget)
    elif not {"-h", "--help"} & set(flags):
        raise UsageError(f"the first argument must be one of {', '.join(PEERS)}, but is {algo or 'missing'}.")
    for name, value in settings.items() if not ours else ():
        flag = name.replace("_", "-")
        add(f"--{flag}", type=plain, nargs="?", const=True, metavar="X", default=value, help=default)
        add(f"--no-{flag}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
    add("-h", "--help", action="help", help="of ALGO for --env-id")
    args, left = parser.parse_known_args(words)
    if left and not ours:
        raise UsageError(f"{args.algo} does not take {' '.join(left)}; --help shows what it takes.")
    harmless = ("resume", "device", "num_threads")
    changed = [name for name, value in saved.items() if name not in harmless and value != vars(args).get(name)]
    if asked.resume and changed:
        difference = ", ".join(f"{name} {saved[name]!r} -> {vars(args)[name]!r}" for name in changed)
        raise UsageError(f"--resume goes on with the arguments of the run, and these differ: {difference}.")
    vars(args).update(settings if ours else {})
    return args, unmapped


def check_args(args: Namespace) -> None:
    """Raises UsageError for the first argument that cannot work; the library judges the rest of its own."""
    for name in ("total_timesteps", "eval_episodes", "n_envs", "n_steps"):
        if type(vars(args)[name]) is not int or vars(args)[name] <= 0:
            raise UsageError(f"--{name.replace('_', '-')} is {vars(args)[name]}, but must be a whole number above 0.")
    for name, bound in (("seed", 2**32), ("eval_seed", 2**32), ("num_threads", 2**16), ("checkpoint_interval", 2**32)):
        if not 0 <= vars(args)[name] < bound:
            raise UsageError(f"--{name.replace('_', '-')} is {vars(args)[name]}, but must be from 0 to {bound - 1}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu.")


# ------------------------------------------------------------------------------------- environments and players
# A player is a function that takes one step in every environment and returns the episodes that ended in it, as
# (environment, return, length) with raw returns. On Atari they are whole games, and length is in the agent's steps.
Player = Callable[[], list[tuple[int, float, int]]]


def make_quietly(make: Callable[[], Any], env_id: str) -> Any:
    """What make() returns, without gymnasium's warnings about old versions; UsageError for whatever it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            envs = make()
    except Exception as error:  # an extra that is missing, or whatever a constructor raises
        raise UsageError(f"--env-id {env_id} cannot be made: {' '.join(str(error).split())}") from None
    return envs


def random_player(args: Namespace, num_envs: int, seed: int) -> Player:
    """Plays uniformly random actions in gymnasium's vector environments."""
    env_id, mode, args.device = args.env_id, gym.vector.AutoresetMode.SAME_STEP, "cpu"
    atari = family_of(env_id) == "atari"
    if atari:  # games as our scripts play them, without the lives, which mean nothing to random actions
        paper = env_id.endswith("NoFrameskip-v4")
        env_id = "ALE/" + env_id.removeprefix("ALE/").removesuffix("-v5").removesuffix("NoFrameskip-v4") + "-v5"
        options = dict(repeat_action_probability=0.0 if paper else 0.25, noop_max=30 if paper else 0)
        options |= dict(use_fire_reset=paper, life_loss_info=False, episodic_life=False, reward_clipping=False)
        options |= dict(frameskip=4, maxpool=True, max_num_frames_per_episode=108_000, full_action_space=False)
        args.num_threads = args.num_threads or os.cpu_count() or 1
        options |= dict(autoreset_mode=mode, num_threads=min(num_envs, args.num_threads))
    else:
        args.num_threads = 1
        options = dict(vectorization_mode="sync", vector_kwargs=dict(copy=False, autoreset_mode=mode))
    envs = make_quietly(lambda: gym.make_vec(env_id, num_envs, **options), args.env_id)
    envs.action_space.seed(seed)
    seeds = np.random.SeedSequence(seed).generate_state(num_envs).astype(np.int64) % 2**31
    envs.reset(seed=seeds if atari else seeds.tolist())
    returns, lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)

    def step() -> list[tuple[int, float, int]]:
        nonlocal returns, lengths
        _, rewards, terminations, truncations, _ = envs.step(envs.action_space.sample())
        returns, lengths, over = returns + rewards, lengths + 1, terminations | truncations
        ended = [(int(n), float(returns[n]), int(lengths[n])) for n in np.flatnonzero(over)]
        returns[over], lengths[over] = 0.0, 0
        return ended

    return step


def library_envs(args: Namespace, num_envs: int, checkpoint: Path | None, training: bool = True) -> Any:
    """The library's vector environment, with the normaliser of the checkpoint, if any."""
    from stable_baselines3.common import atari_wrappers as atari
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    # The protocols of ppo.py: the paper's, which is the library's wrapper, or sticky actions and nothing else.
    paper, sticky = args.env_id.endswith("NoFrameskip-v4"), args.env_id.startswith("ALE/")
    if paper or sticky:
        need("cv2", f"{args.algo} on Atari")

    def wrap(env: gym.Env) -> gym.Env:
        if paper:
            return atari.AtariWrapper(env, clip_reward=args.clip_reward)
        env = atari.WarpFrame(atari.MaxAndSkipEnv(env, 4)) if sticky else env
        return atari.ClipRewardEnv(env) if args.clip_reward else env

    def make() -> Any:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        envs = make_vec_env(args.env_id, num_envs, wrapper_class=wrap, env_kwargs=dict(frameskip=1) if sticky else None)
        return VecFrameStack(envs, 4) if paper or sticky else envs

    envs = make_quietly(make, args.env_id)
    if not isinstance(envs.observation_space, (gym.spaces.Box, gym.spaces.Discrete)):
        raise UsageError(f"--env-id {args.env_id} observes {envs.observation_space}; Box and Discrete are supported.")
    if not (args.norm_obs or args.norm_reward):
        return envs
    if checkpoint:
        with zipfile.ZipFile(checkpoint) as archive:
            normaliser = pickle.loads(archive.read("vecnormalize.pkl"))  # as trusting as the library's own files
        normaliser.set_venv(envs)
    else:
        normaliser = VecNormalize(envs, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma)
    normaliser.training = training
    return normaliser


def library_model(args: Namespace, num_envs: int, checkpoint: Path | None, training: bool = True) -> Any:
    """The library's model, new or from a checkpoint, with its environments; completes args with what it chose itself.

    Raises UsageError for hyperparameters and spaces that it refuses.
    """
    from stable_baselines3.common.preprocessing import is_image_space
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.utils import LinearSchedule

    kind, envs = library_class(args.algo), library_envs(args, num_envs, checkpoint, training)
    image = is_image_space(envs.observation_space)
    if args.device == "auto":
        args.device = "cuda" if image and torch.cuda.is_available() else "cpu"
    args.num_threads = args.num_threads or ((os.cpu_count() or 1) if image else 1)
    torch.set_num_threads(args.num_threads)
    if checkpoint:
        return kind.load(checkpoint, env=envs, device=args.device)

    def setting(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not value.startswith("lin_") or name not in ("learning_rate", "clip_range", "clip_range_vf"):
            raise ValueError(f"{name} is {value}")
        return LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)

    try:
        policy = dict(args.policy_kwargs)
        if "optimizer_class" in policy:
            name = policy["optimizer_class"]
            policy["optimizer_class"] = RMSpropTFLike if name == "RMSpropTFLike" else getattr(torch.optim, name)
        if "activation_fn" in policy:
            policy["activation_fn"] = getattr(torch.nn, policy["activation_fn"])
        settings = {name: setting(name, vars(args)[name]) for name in library_defaults(args.algo)}
        args.policy = "CnnPolicy" if image else "MlpPolicy"
        model = kind(args.policy, envs, policy_kwargs=policy, seed=args.seed, device=args.device, **settings)
    except Exception as error:
        raise UsageError(f"{args.algo} refuses these arguments: {' '.join(str(error).split())}") from None
    chosen, names = model.policy, ("activation_fn", "optimizer_class", "features_extractor_class")
    args.policy_kwargs = {name: getattr(chosen, name) for name in ("net_arch", "ortho_init", "log_std_init")}
    args.policy_kwargs |= {name: getattr(chosen, name).__name__ for name in names}
    args.policy_kwargs |= dict(optimizer_kwargs=chosen.optimizer_kwargs)
    if args.norm_obs or args.norm_reward:
        args.vec_normalize = {name: getattr(envs, name) for name in ("clip_obs", "clip_reward", "gamma", "epsilon")}
    return model


class Games:
    """The episodes of the library's environments, from the Monitors below the wrappers that end a game at a lost life.

    Not from info, which lacks a game that ends while such a wrapper resets.
    """

    def __init__(self, envs: Any):
        from stable_baselines3.common.env_util import unwrap_wrapper
        from stable_baselines3.common.monitor import Monitor

        self.monitors = [unwrap_wrapper(env, Monitor) for env in envs.unwrapped.envs]
        self.lengths = np.zeros(envs.num_envs, dtype=np.int64)

    def ended(self, dones: np.ndarray) -> list[tuple[int, float, int]]:
        """What Player says of a step, whose flags dones (num_envs,) are."""
        self.lengths += 1
        ended = []
        for n in np.flatnonzero(dones):
            for episode in self.monitors[n].episode_returns:
                ended.append((int(n), episode, int(self.lengths[n])))
                self.lengths[n] = 0
            self.monitors[n].episode_returns.clear()
        return ended


def library_player(args: Namespace, num_envs: int, checkpoint: Path) -> Player:
    """Plays the policy of a checkpoint, its normaliser frozen."""
    model = library_model(args, num_envs, checkpoint, training=False)
    model.set_random_seed(args.eval_seed)
    envs = model.get_env()
    games, obs = Games(envs), envs.reset()

    def step() -> list[tuple[int, float, int]]:
        nonlocal obs
        obs, _, dones, _ = envs.step(model.predict(obs, deterministic=not args.eval_stochastic)[0])
        return games.ended(dones)

    return step


# ------------------------------------------------------------------------------------------- the run directory
def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary neighbour, then puts it in the place of path: there is always the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def run_dir_of(path: Path) -> Path:
    """The run directory that path is, or that the checkpoint path belongs to."""
    return path.parent.parent if path.is_file() else path


def versions(algo: str) -> dict[str, str]:
    packages = ["torch", "gymnasium", "numpy", "mujoco", "ale-py"]
    packages += ["stable-baselines3", "sb3-contrib"] if algo != "random" else []
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def create_run_dir(args: Namespace, unmapped: dict[str, Any]) -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json."""

    def git(*command: str) -> str | None:
        done = shutil.which("git") and subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done and done.returncode == 0 else None

    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{now}"
    path = Path(args.runs_dir) / name.replace("/", "-").replace(":", "-")
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{path} exists; choose another --run-name, or go on with --resume {path}.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror}); choose another --runs-dir.") from None
    (path / "checkpoints").mkdir()
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    config = dict(args=vars(args), command=[sys.executable, *sys.argv], seed=args.seed, versions=versions(args.algo))
    changes = git("status", "--porcelain")
    config |= dict(git_commit=git("rev-parse", "HEAD"), git_dirty=None if changes is None else bool(changes))
    config |= dict(hardware=torch.cuda.get_device_name() if args.device == "cuda" else cpu, threads=args.num_threads)
    write_json(path / "config.json", config | dict(unmapped=unmapped))
    return path


class Run:
    """The files of a run, their view in TensorBoard, the progress line, its checkpoints, and how it ends."""

    def __init__(self, args: Namespace, unmapped: dict, state: dict | None, model: Any, started: float):
        self.args, self.model, self.signals, self.printed = args, model, [], 0.0
        self.path = Path(args.resume) if state else create_run_dir(args, unmapped)
        saved = state or dict(iteration=0, global_step=0, wall_time=0.0, last_returns=[], csv_bytes={})
        self.iteration = self.checkpointed = saved["iteration"]
        self.global_step = self.first_step = saved["global_step"]
        self.earlier_time, self.last_returns = saved["wall_time"], deque(saved["last_returns"], maxlen=100)
        self.episodes, self.gathered, self.files = [], [], {}
        batch = args.n_envs * args.n_steps
        self.total = math.ceil(args.total_timesteps / batch) * batch
        self.interval = args.checkpoint_interval or max(10, math.ceil(self.total / batch / 20))
        self.log_interval = 100 if args.algo == "sb3:a2c" else 1  # as a2c.py and as the library itself
        for name in ("episodes", "progress"):
            file = self.files[name] = open(self.path / f"{name}.csv", "a+", newline="")
            file.truncate(saved["csv_bytes"].get(name, 0))  # what came after the checkpoint will come again
        if not state:
            csv.writer(self.files["episodes"]).writerow(["global_step", "wall_time", "return", "length"])
        self.files["progress"].seek(0)
        self.columns = next(csv.reader(self.files["progress"]), None)
        self.writer = SummaryWriter(self.path, purge_step=self.first_step + 1 if state else None)
        print(f"{self.path} ({args.device}, threads: {args.num_threads})")
        if state:
            print(f"goes on from step {self.global_step:,}, validly, but not bit for bit as without the stop")
        self.evaluations = read_json(self.path / "summary.json").get("eval")
        self.begun = time.perf_counter()
        self.startup_time = self.begun - started

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
        status = getattr(error, "status", "failed") if error else "completed"
        summary = dict(status=status, global_step=self.global_step, wall_time=self.wall_time(), sps=self.sps())
        summary |= dict(startup_time=self.startup_time, train_last100=self.score())
        unit = 2**20 if sys.platform == "darwin" else 2**10
        summary |= dict(peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        summary |= dict(eval=self.evaluations) if self.evaluations else {}
        message = ""
        if status in ("diverged", "failed"):
            newest = max((self.path / "checkpoints").glob("step_*.zip"), default="none")
            message = f"iteration {self.iteration + 1}: {error}; the last good checkpoint is {newest}."
            summary |= dict(error=message)
        try:
            write_json(self.path / "summary.json", summary)
            for file in (*self.files.values(), self.writer):
                file.close()
        except OSError:  # a full disk again
            if not error:
                raise
        if isinstance(error, (Failed, OSError)):
            raise Failed(message) from error
        print(f"{status} after {self.global_step:,} steps: {self.path}")

    def score(self) -> float | None:
        """Mean return of the last 100 training episodes."""
        return float(np.mean(self.last_returns)) if self.last_returns else None

    def wall_time(self) -> float:
        """Seconds of training, with earlier sessions, without start-up."""
        return self.earlier_time + time.perf_counter() - self.begun

    def sps(self) -> float:
        """Steps per second of this session, or of those before it where this one had nothing left to train."""
        if self.first_step >= self.args.total_timesteps:
            return self.first_step / self.earlier_time
        return (self.global_step - self.first_step) / (time.perf_counter() - self.begun)

    def step(self, steps: int, ended: list[tuple[int, float, int]]) -> None:
        """Counts a step of all environments and the episodes that ended in it."""
        self.global_step += steps
        for _, score, length in ended:
            self.last_returns.append(score)
            self.episodes.append((self.global_step, f"{self.wall_time():.3f}", score, length))

    def end_iteration(self, values: dict[str, float]) -> None:
        """Takes in the values of an iteration by their tags; logs, saves and, after a signal, stops where it is due."""
        for tag, value in values.items():
            if tag.endswith("_loss") and not math.isfinite(value):
                raise Diverged(f"{tag} is not finite")
        self.iteration += 1
        self.gathered.append(values)
        last, stop = self.global_step >= self.args.total_timesteps, bool(self.signals)
        if last or stop or self.iteration % self.log_interval == 0:
            self.log()
        if last or stop or (self.iteration - self.checkpointed >= self.interval and not self.gathered):
            self.save()
        if stop and not last:
            raise Stopped(self.signals[0])

    def log(self) -> None:
        """Writes the episodes and the means of the values since the last time."""
        values = {tag: float(np.mean([one[tag] for one in self.gathered])) for tag in self.gathered[-1]}
        values["charts/SPS"] = self.sps()
        row = {"global_step": self.global_step, "wall_time": f"{self.wall_time():.3f}", "sps": values["charts/SPS"]}
        row |= {"charts/episodic_return": "", "charts/episodic_length": ""} | values
        if self.episodes:
            means = np.mean([episode[2:] for episode in self.episodes], 0).tolist()
            means = dict(zip(("charts/episodic_return", "charts/episodic_length"), means))
            row, values = row | means, values | means
        if not self.columns:
            self.columns = list(row)
            csv.writer(self.files["progress"]).writerow(self.columns)
        csv.writer(self.files["progress"]).writerow([row[column] for column in self.columns])
        csv.writer(self.files["episodes"]).writerows(self.episodes)
        for file in self.files.values():
            file.flush()
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, self.global_step)
        self.episodes, self.gathered = [], []
        self.print_progress()

    def print_progress(self) -> None:
        """A line every five seconds, and one at the end."""
        if time.perf_counter() - self.printed < 5.0 and self.global_step < self.total:
            return
        self.printed = time.perf_counter()
        seconds = int(max(self.total - self.global_step, 0) / self.sps())
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        score = "-" if self.score() is None else f"{self.score():,.1f}"
        done = f"{self.global_step:>11,} steps {self.global_step / self.total:4.0%}"
        print(f"{done} {self.sps():>7,.0f}/s  return {score:>9}  {left}", flush=True)

    def save(self) -> None:
        """Writes checkpoints/step_*.zip, of which two stay: the library's own format, our state as further members."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())  # what csv_bytes counts must outlive a power cut, too
        self.writer.flush()
        state = dict(iteration=self.iteration, global_step=self.global_step, wall_time=self.wall_time())
        state |= dict(last_returns=list(self.last_returns), versions=versions(self.args.algo))
        state |= dict(csv_bytes={name: (self.path / f"{name}.csv").stat().st_size for name in self.files})
        buffer, folder = io.BytesIO(), self.path / "checkpoints"
        if self.model:
            self.model.save(buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr("run.json", json.dumps(state))
            if self.model and self.model.get_vec_normalize_env():
                archive.writestr("vecnormalize.pkl", pickle.dumps(self.model.get_vec_normalize_env()))
        write_atomically(folder / f"step_{self.global_step:012}.zip", buffer.getbuffer())
        for old in sorted(folder.glob("step_*.zip"))[:-2]:
            old.unlink()
        self.checkpointed = self.iteration


def load_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The newest good checkpoint of a run directory, or the file given, and our state; a corrupt one is named."""
    for file in [path] if path.is_file() else sorted((path / "checkpoints").glob("step_*.zip"), reverse=True):
        try:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} has a wrong checksum")
                return file, json.loads(archive.read("run.json"))
        except Exception as error:  # damage can surface as almost anything
            print(f"{file} is corrupt and left out ({type(error).__name__}).", file=sys.stderr)
    raise UsageError(f"{path} has no readable checkpoint.")


# ---------------------------------------------------------------------------------------- evaluate, train, main
def evaluate(args: Namespace) -> list[float]:
    """Plays eval_episodes with the run args.evaluate, its normaliser frozen; returns the raw returns.

    Where the run has ended, the result goes to its summary.json and, as eval/episodic_return, to TensorBoard.
    """
    check_args(args)
    num_envs, folder = min(args.eval_episodes, 8), run_dir_of(Path(args.evaluate))
    file, state = load_checkpoint(Path(args.evaluate))
    random = args.algo == "random"
    step = random_player(args, num_envs, args.eval_seed) if random else library_player(args, num_envs, file)
    returns = [[] for _ in range(num_envs)]
    shares = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]  # or else short episodes win
    with failing():
        while any(len(played) < share for played, share in zip(returns, shares)):
            for n, score, _ in step():
                returns[n].append(score)
    returns = [score for played, share in zip(returns, shares) for score in played[:share]]
    kind = "stochastic" if args.eval_stochastic else "deterministic"
    result = {name: float(getattr(np, name)(returns)) for name in ("mean", "std", "min", "max")}
    print(f"{len(returns)} {kind} episodes: {', '.join(f'{name} {value:,.2f}' for name, value in result.items())}")
    summary = read_json(folder / "summary.json")
    if summary:
        result |= dict(episodes=len(returns), seed=args.eval_seed, iteration=state["iteration"])
        summary["eval"] = summary.get("eval", {}) | {kind: result}
        write_json(folder / "summary.json", summary)
        with SummaryWriter(folder) as writer:
            writer.add_scalar("eval/episodic_return", result["mean"], state["global_step"])
    return returns


@contextmanager
def failing(model: Any = None) -> Iterator[None]:
    """Makes one sentence of whatever an environment or the library raises."""
    try:
        yield
    except (Stopped, Failed, OSError):
        raise
    except Exception as error:
        finite = not model or all(parameter.isfinite().all() for parameter in model.policy.parameters())
        if not finite:  # the library's message is a tensor
            raise Diverged("the network's parameters are not finite") from error
        raise Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def learn(model: Any, run: Run) -> None:
    """Lets the library train from run.global_step to the budget, and tells the run what happens."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger

    games = Games(model.get_env())

    class Recorder(BaseCallback):
        def _on_step(self) -> bool:
            run.step(model.n_envs, games.ended(self.locals["dones"]))
            return True

        def _on_rollout_start(self) -> None:  # the next one, after the update: only now is the iteration over
            if self.n_calls:
                self._on_training_end()

        def _on_training_end(self) -> None:
            values = {name.removeprefix("train/"): value for name, value in self.logger.name_to_value.items()}
            run.end_iteration({TAGS[name][0]: value * TAGS[name][1] for name, value in values.items() if name in TAGS})

    model.set_logger(Logger(None, []))
    left = run.args.total_timesteps - run.global_step  # the library adds what is done, so schedules keep the budget
    model.learn(left, Recorder(), log_interval=None, reset_num_timesteps=run.global_step == 0)


def train(args: Namespace, unmapped: dict[str, Any]) -> Path:
    """Trains for total_timesteps, or goes on with the run args.resume; returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = time.perf_counter()
    check_args(args)
    checkpoint, state = load_checkpoint(Path(args.resume)) if args.resume else (None, None)
    complete = read_json(Path(args.resume) / "summary.json").get("status") == "completed"
    if state and state["global_step"] >= args.total_timesteps and complete:
        print(f"{args.resume} is complete; there is nothing left to train.")
        return Path(args.resume)
    seed = args.seed
    if state:  # another one, or else what follows would be what the run began with
        seed = int(np.random.SeedSequence([seed, state["global_step"]]).generate_state(1)[0]) % 2**31
    if args.algo == "random":
        model, player = None, random_player(args, args.n_envs, seed)
    else:
        model = library_model(args, args.n_envs, checkpoint)
    if model and state:
        model.set_random_seed(seed)
    with Run(args, unmapped, state, model, started) as run, failing(model):
        if not state:
            run.save()
        if model and run.global_step < args.total_timesteps:
            learn(model, run)
        while run.global_step < args.total_timesteps:
            for _ in range(args.n_steps):
                run.step(args.n_envs, player())
            run.end_iteration({})
    return run.path


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""
    try:
        args, unmapped = parse_args(argv)
        if args.evaluate:
            evaluate(args)
        else:
            train(args, unmapped)
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
