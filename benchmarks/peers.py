"""Stable-Baselines3 and a random policy beside the scripts: python -m benchmarks.peers ALGO --env-id CartPole-v1

ALGO is sb3:ppo, sb3:a2c or sb3:sac (Stable-Baselines3), sb3:trpo (sb3-contrib), or random: uniformly random actions, in
training and in evaluation. The flags of a run, its directory, budget and exit status are those of ppo.py, but the
library does not resume exactly, and SAC begins an empty replay buffer. A run ends as the library's do, with the first
whole batch that reaches the budget.

--hyperparameters theirs takes the library's defaults but for what is customary with it (THEIRS below). Each is a flag:
--n-steps 512 --learning-rate lin_3e-4 (falls linearly to zero) --policy-kwargs '{"net_arch": [64]}'
--hyperparameters ours takes those of our script for the environment, and its flags, under the library's names. What
has no counterpart is in config.json as "unmapped". All that ran is in config.json in either case.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch

import ppo
from benchmarks.jobs import PEERS, read_json, read_value, shortened
from ppo import Episode, Failed, Stopped, UsageError, one_line, run_dir_of

Args = Any  # flags of the run and hyperparameters of ALGO, as an instance of a dataclass

# Where "theirs" departs from the defaults of the library's constructors, which leave the number of environments open:
# PPO, TRPO and SAC are set for one, A2C usually gets eight. On Atari the settings of RL Baselines3 Zoo; TRPO, which it
# does not have there, takes its default batch of 2,048 from eight games. On MuJoCo observations and rewards are
# normalised, but for SAC, which the Zoo gives more random steps there instead.
TF_RMSPROP = {"optimizer_class": "RMSpropTFLike", "optimizer_kwargs": {"eps": 1e-5}}
# fmt: off
THEIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("sb3:ppo", ""): dict(n_envs=1),
    ("sb3:ppo", "atari"): dict(n_envs=8, n_steps=128, batch_size=256, n_epochs=4, learning_rate="lin_2.5e-4",
                               clip_range="lin_0.1", ent_coef=0.01, vf_coef=0.5),
    ("sb3:a2c", ""): dict(n_envs=8),
    ("sb3:a2c", "atari"): dict(n_envs=16, ent_coef=0.01, vf_coef=0.25, policy_kwargs=TF_RMSPROP),
    ("sb3:trpo", ""): dict(n_envs=1),
    ("sb3:trpo", "atari"): dict(n_envs=8, n_steps=256),
    ("sb3:sac", ""): dict(n_envs=1),
    ("sb3:sac", "mujoco"): dict(n_envs=1, learning_starts=10_000, norm_obs=False, norm_reward=False),
}
# Parameters of the library's constructors that are no hyperparameters, or are flags of a run.
NOT_HYPERPARAMETERS = ("self", "policy", "env", "policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs",
                       "stats_window_size", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model",
                       "replay_buffer_class", "replay_buffer_kwargs", "action_noise")

# "ours": the library's names for our scripts' arguments.
SAME = {
    "num_envs": "n_envs", "num_steps": "n_steps", "gamma": "gamma", "gae_lambda": "gae_lambda", "ent_coef": "ent_coef",
    "norm_adv": "normalize_advantage", "max_grad_norm": "max_grad_norm", "clip_coef": "clip_range",
    "max_kl": "target_kl", "cg_iters": "cg_max_steps", "cg_damping": "cg_damping",
    "line_search_steps": "line_search_max_iter", "line_search_shrink": "line_search_shrinking_factor",
    "norm_obs": "norm_obs", "norm_reward": "norm_reward", "clip_reward": "clip_reward",
    "buffer_size": "buffer_size", "learning_starts": "learning_starts", "batch_size": "batch_size", "tau": "tau",
    "policy_lr": "learning_rate",
}
# Our arguments that settings_ours puts in other terms, and those that belong to the run.
CONVERTED = ("learning_rate", "anneal_lr", "num_minibatches", "update_epochs", "vf_coef", "target_kl", "optimizer",
             "log_std_init", "env_id", "seed", "total_timesteps", "log_interval", "updates_per_step", "q_lr", "alpha",
             "autotune", "buffer_in_memory")
# The values at which arguments without a counterpart mean nothing.
IDLE = dict(objective="clip", kl_beta=1.0, kl_target=0.01, clip_vloss=False, fisher_fraction=1.0, ent_coef=0.0,
            policy_frequency=1, target_network_frequency=1, recompute_advantages=False)
# Our tags for the library's values, and the factor between them: our value error is halved, our entropy is no loss.
TAGS = {
    "policy_gradient_loss": ("losses/policy_loss", 1.0), "policy_loss": ("losses/policy_loss", 1.0),
    "policy_objective": ("losses/policy_loss", -1.0), "value_loss": ("losses/value_loss", 0.5),
    "entropy_loss": ("losses/entropy", -1.0), "approx_kl": ("losses/approx_kl", 1.0),
    "kl_divergence_loss": ("losses/kl", 1.0), "clip_fraction": ("losses/clipfrac", 1.0),
    "critic_loss": ("losses/qf_loss", 1.0), "actor_loss": ("losses/actor_loss", 1.0), "ent_coef": ("losses/alpha", 1.0),
}
LOG_INTERVAL = {"sb3:a2c": 100}  # iterations in a row of progress.csv, as in a2c.py and in the library itself
ITERATION = {"sb3:sac": 500}  # steps of an iteration, where it is not a batch; as in sac.py
# Flags that ppo.py has, too. Their defaults are the same, but for a few.
FLAGS = ("env_id", "total_timesteps", "seed", "exp_name", "runs_dir", "run_name", "resume", "evaluate", "eval_episodes",
         "eval_seed", "eval_stochastic", "eval_max_steps", "checkpoint_interval", "keep_checkpoints", "device",
         "num_threads")
RUNNING = ("obs_rms", "ret_rms")  # what the library's normaliser keeps
CHOICES = {"device": ["auto", "cpu", "cuda"], "hyperparameters": ["theirs", "ours"]}
# fmt: on


# ---------------------------------------------------------------------------------------------- hyperparameters
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
    parameters = inspect.signature(library_class(algo).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in NOT_HYPERPARAMETERS}


def settings_theirs(algo: str, family: str) -> dict[str, Any]:
    """What is customary with the library."""
    if algo == "random":
        return {"n_envs": 8, "n_steps": 128}
    mujoco = family == "mujoco"
    settings = library_defaults(algo) | {"policy_kwargs": {}, "norm_obs": mujoco, "norm_reward": mujoco}
    return settings | {"clip_reward": family == "atari"} | THEIRS.get((algo, family), THEIRS[algo, ""])


def settings_ours(algo: str, flags: list[str]) -> dict[str, Any]:
    """Our script's hyperparameters under the library's names. "unmapped" are those that have no counterpart there."""
    script = importlib.import_module(algo.removeprefix("sb3:"))
    try:
        args = script.parse_args(flags)
        script.check_args(args)
        (script.check_budget if algo == "sb3:sac" else script.check_batch)(args)
    except script.UsageError as error:
        raise UsageError(str(error)) from None
    ours = {field.name: vars(args)[field.name] for field in fields(script.Args)}
    settings = library_defaults(algo) | {"n_envs": 0, "clip_reward": False, "norm_obs": False, "norm_reward": False}
    same = {name: theirs for name, theirs in SAME.items() if name in ours and theirs in settings}
    settings |= {theirs: ours[name] for name, theirs in same.items()}
    settings |= off_policy(args) if algo == "sb3:sac" else on_policy(algo, args)
    rest = [name for name in ours if name not in (*same, *CONVERTED) and ours[name] != IDLE.get(name)]
    return settings | {"total_timesteps": args.total_timesteps, "unmapped": {name: ours[name] for name in rest}}


def on_policy(algo: str, args: Any) -> dict[str, Any]:
    """What settings_ours puts in other terms for PPO, A2C and TRPO."""
    settings: dict[str, Any] = {"policy_kwargs": {"log_std_init": args.log_std_init}}
    settings["learning_rate"] = f"lin_{args.learning_rate}" if args.anneal_lr else args.learning_rate
    if algo == "sb3:a2c":
        settings["use_rms_prop"] = args.optimizer == "rmsprop"
        settings["policy_kwargs"] |= TF_RMSPROP if settings["use_rms_prop"] else {}
    else:
        settings["batch_size"] = args.num_envs * args.num_steps // args.num_minibatches
        settings["n_epochs" if algo == "sb3:ppo" else "n_critic_updates"] = args.update_epochs
    if algo != "sb3:trpo":
        settings["vf_coef"] = args.vf_coef / 2  # ours weighs half the squared error
    if vars(args).get("target_kl"):
        settings["target_kl"] = args.target_kl / 1.5  # theirs ends the epochs at 1.5 times its target
    return settings


def off_policy(args: Any) -> dict[str, Any]:
    """What settings_ours puts in other terms for SAC. Raises UsageError for what the library cannot do."""
    updates = args.updates_per_step * args.num_envs  # the library counts those of a step of all environments
    if updates != int(updates):
        would = "--updates-per-step must give a whole number of updates to a step of all environments"
        raise UsageError(f"sb3:sac makes whole updates, so {would}, not {updates:g}.")
    if args.q_lr != args.policy_lr:
        rates = f"--q-lr is {args.q_lr} and --policy-lr {args.policy_lr}"
        raise UsageError(f"sb3:sac has one step size for both networks, but {rates}; make them equal.")
    entropy = f"auto_{args.alpha}" if args.autotune else args.alpha
    return {"policy_kwargs": {}, "gradient_steps": int(updates), "ent_coef": entropy}


# ---------------------------------------------------------------------------------------------------- arguments
def plain(text: str) -> Any:
    """What a flag's value is in JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class Parser(argparse.ArgumentParser):
    """The flags of a run. An error is one sentence, as a UsageError."""

    def __init__(self, algo: str):
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "add_help": False, "allow_abbrev": False}
        super().__init__("python -m benchmarks.peers ALGO", description=__doc__, **options)
        defaults = vars(ppo.RunArgs()) | {"exp_name": algo, "device": "cpu", "hyperparameters": "theirs"}
        for name in (*FLAGS, "hyperparameters"):
            self.add(name, defaults[name], type(defaults[name]))
        self.set_defaults(algo=algo, total_timesteps=None)

    def add(self, name: str, default: Any, kind: Any) -> None:
        flag = f"--{name.replace('_', '-')}"
        options = {"default": default, "help": "(default: %(default)s)"}
        if isinstance(default, bool):
            self.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = None if name in CHOICES else "X"
            self.add_argument(flag, type=kind, choices=CHOICES.get(name), metavar=metavar, **options)

    def error(self, message: str) -> None:
        raise UsageError(f"{message.removeprefix('argument ')}.")


def parse_args(argv: list[str] | None = None) -> Args:
    """Arguments of the run and hyperparameters. With --resume or --evaluate, those of the run."""
    words = sys.argv[1:] if argv is None else list(argv)
    algo = words.pop(0) if words and not words[0].startswith("-") else ""
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    parser = Parser(algo)
    asked, flags = parser.parse_known_args(words)
    made = {"policy": "", "vec_normalize": {}, "unmapped": {}, "track": False}  # what is no flag
    saved, settings = {}, {}
    if asked.resume or asked.evaluate:
        saved = read_args(asked)
        settings = {name: value for name, value in saved.items() if name not in vars(asked)}
        parser.set_defaults(**{name: value for name, value in saved.items() if name not in settings})
    elif algo in PEERS:
        family = ppo.environment_family(asked.env_id)
        script = importlib.import_module("sac" if algo == "sb3:sac" else "ppo")
        budget = script.RunArgs(**script.preset(asked.env_id)).total_timesteps
        parser.set_defaults(total_timesteps=budget)
        if asked.hyperparameters == "ours" and algo != "random":
            budget = budget if asked.total_timesteps is None else asked.total_timesteps
            settings = settings_ours(algo, [*flags, "--env-id", asked.env_id, "--total-timesteps", str(budget)])
            return as_dataclass(vars(asked) | made | settings)
        settings = settings_theirs(algo, family)
    elif not {"-h", "--help"} & set(flags):
        raise UsageError(f"the first argument must be one of {', '.join(PEERS)}, but is {algo or 'missing'}.")
    for name, value in settings.items():
        if name not in made:
            parser.add(name, value, plain)
    parser.add_argument("-h", "--help", action="help", help="of ALGO for --env-id")
    args, left = parser.parse_known_args(words)
    if left:
        raise UsageError(f"{args.algo} does not take {' '.join(left)}; --help shows what it takes.")
    changed = [name for name, value in saved.items() if name not in made and value != vars(args)[name]]
    changed = [name for name in changed if name not in ppo.MAY_DIFFER and (args.resume or not name.startswith("eval"))]
    if changed:
        difference = ", ".join(f"{name} {saved[name]!r} -> {vars(args)[name]!r}" for name in changed)
        goes_on = "--resume goes on with" if args.resume else "--evaluate goes by"
        raise UsageError(f"{goes_on} the arguments of the run, and these differ: {difference}.")
    return as_dataclass(made | saved | vars(args))


def read_args(asked: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the run that --resume or --evaluate names."""
    where = asked.resume or asked.evaluate
    file = run_dir_of(Path(where)) / "config.json"
    saved = read_value(file, "args", kind=dict) or {}
    if saved.get("algo") not in PEERS:
        raise UsageError(f"{where} is no run directory of a peer: it has no config.json with its arguments.")
    defaults = vars(ppo.RunArgs()) | {"hyperparameters": ""}
    for name in (*FLAGS, "hyperparameters"):
        if name in saved and type(saved[name]) is not type(defaults[name]):
            what = f"{shortened(saved[name])}, but must be a {type(defaults[name]).__name__}"
            raise UsageError(f"{file}: args.{name} is {what}.")
    if asked.algo not in ("", saved["algo"]):
        raise UsageError(f"{where} is a run of {saved['algo']}, not of {asked.algo}.")
    if asked.resume and Path(where).is_file():
        raise UsageError(f"--resume takes a run directory, here {run_dir_of(Path(where))}.")
    return saved


def as_dataclass(values: dict[str, Any]) -> Args:
    """What ppo.Run takes: an instance of a dataclass whose fields are the values."""
    return make_dataclass("Args", values)(**values)


def check_args(args: Args) -> None:
    """Raises UsageError for the first argument that cannot work. The library judges the rest of its own."""
    numbers = ("total_timesteps", "eval_episodes", "seed", "eval_seed", "eval_max_steps", "num_threads")
    for name in (*numbers, "checkpoint_interval"):
        if must := ppo.bound_broken(name, vars(args)[name]):
            raise UsageError(f"--{name.replace('_', '-')} is {vars(args)[name]}, but must be {must}.")
    for name in ("n_envs", "n_steps", *(["train_freq"] if args.algo == "sb3:sac" else [])):
        number = vars(args).get(name)
        if type(number) is not int or not 0 < number <= 2**16:
            what = f"{shortened(number)}, but must be a whole number from 1 to 65,536"
            raise UsageError(f"--{name.replace('_', '-')} is {what}.")
    if args.num_threads > ppo.cores():
        if not args.resume and not args.evaluate:
            here = f"this process may use {ppo.cores()} cores"
            raise UsageError(f"--num-threads is {args.num_threads}, but {here}.")
        args.num_threads = 0  # the run was made on a larger machine
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu.")


def settle(args: Args, image: bool) -> None:
    """Decides what is "auto", and sets threads."""
    if args.device == "auto":
        args.device = "cuda" if image and torch.cuda.is_available() else "cpu"
    args.num_threads = args.num_threads or (ppo.cores() if image else 1)
    torch.set_num_threads(args.num_threads)


# ------------------------------------------------------------------------------------------------------ players
class RandomPolicy:
    """Uniformly random actions in the environments of the scripts."""

    packages = ()  # that results depend on, besides those of ppo.versions

    def __init__(self, args: Args, num_envs: int):
        args.device = "cpu"
        seed = args.eval_seed if args.evaluate else args.seed
        self.num_steps = args.n_steps
        self.envs = ppo.make_envs(args, num_envs, seed)
        try:
            settle(args, self.envs.atari)
            self.rng = ppo.Rng(seed, "cpu")
            self.obs = self.envs.reset()
        except BaseException:
            self.close()
            raise
        self.episodes = ppo.Episodes(self.envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)  # of the episodes in play
        self.inexact = ""

    def close(self) -> None:
        self.envs.close()

    def play(self) -> list[Episode]:
        """Plays num_steps steps on in every environment. Returns the episodes that ended in them."""
        space = gym.vector.utils.batch_space(self.envs.single_action_space, self.envs.num_envs)
        space.seed(self.rng.python.getrandbits(31))
        actions = [space.sample() for _ in range(self.num_steps)]
        rewards = np.zeros((self.num_steps, self.envs.num_envs))
        over = np.zeros(rewards.shape, dtype=bool)
        for t, action in enumerate(actions):
            self.obs, rewards[t], _, _, over[t], _ = self.envs.step(action)
            self.lengths = np.where(over[t], 0, self.lengths + 1)
        start = getattr(self.envs.single_action_space, "start", 0)  # ppo.py's actions count from zero
        return self.episodes.collect(np.stack(actions) - start, rewards, over)

    def train(self, run: ppo.Run) -> None:
        for _ in run.iterations():
            finished = self.play()
            run.log(self.num_steps * self.envs.num_envs, finished, {"charts/learning_rate": 0.0})  # it learns nothing

    def state_dict(self) -> dict[str, Any]:
        obs = torch.from_numpy(np.copy(self.obs))
        return {"obs": obs, "episodes": self.episodes.state_dict(), "rng": self.rng.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.load_state_dict(state["rng"])
        self.obs, self.inexact = self.episodes.load_state_dict(state["episodes"], state["obs"])


class Library:
    """A model of the library with its environments."""

    packages = ("stable-baselines3", "sb3-contrib")
    inexact = "Stable-Baselines3 does not resume exactly"

    def __init__(self, args: Args, num_envs: int):
        from stable_baselines3.common.preprocessing import is_image_space

        self.args = args
        self.kind = library_class(args.algo)
        self.games: Games | None = None
        self.made: list[gym.Env] = []  # what close has to close
        try:
            self.envs = library_envs(args, num_envs, self.made)
            settle(args, is_image_space(self.envs.observation_space))
            self.model = new_model(args, self.kind, self.envs)
        except BaseException as error:
            self.close()
            if isinstance(error, (UsageError, Stopped, KeyboardInterrupt)):
                raise
            raise UsageError(f"{args.algo} refuses these arguments: {one_line(error)}") from None

    def close(self) -> None:
        made, self.made = self.made, []
        ppo.close_all(made, self.args.env_id)

    def state_dict(self) -> dict[str, Any]:
        """All that the library learns, as tensors and numbers: its own files are pickles, which can run any program."""
        model, normaliser = self.model, self.model.get_vec_normalize_env()
        state = {
            "parameters": model.get_parameters(),
            "num_timesteps": model.num_timesteps,
            "updates": model._n_updates,
        }
        if self.temperature is not None:
            state["temperature"] = self.temperature.detach().clone()
        for name in RUNNING if normaliser else ():
            norm = getattr(normaliser, name)
            state[name] = [torch.as_tensor(np.asarray(x)) for x in (norm.mean, norm.var, norm.count)]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        model, normaliser = self.model, self.model.get_vec_normalize_env()
        if "parameters" not in state:
            raise ValueError("it was written by an earlier version of benchmarks/peers.py")
        model.set_parameters(state["parameters"])
        model.num_timesteps, model._n_updates = state["num_timesteps"], state["updates"]
        if self.temperature is not None:
            self.temperature.data.copy_(state["temperature"])
        if normaliser:
            for name in RUNNING:
                norm = getattr(normaliser, name)
                norm.mean, norm.var, norm.count = (x.numpy() for x in state[name])
            normaliser.training = not self.args.evaluate
        seed = np.random.SeedSequence([self.args.seed, model.num_timesteps]).generate_state(1)[0]
        model.set_random_seed(int(seed // 2))  # another one, or else the run would play its first episodes again

    @property
    def temperature(self) -> torch.Tensor | None:
        """The log temperature that SAC learns, which is none of the library's parameters; None where there is none."""
        return getattr(self.model, "log_ent_coef", None)

    @property
    def lengths(self) -> np.ndarray:
        """Steps of the episodes in play, (num_envs,)."""
        return self.games.lengths

    def play(self) -> list[Episode]:
        """Plays a step of an evaluation in every environment. Returns the episodes that ended in it."""
        if not self.games:
            self.model.set_random_seed(self.args.eval_seed)
            self.games = Games(self.envs)
            self.obs = self.envs.reset()
        actions, _ = self.model.predict(self.obs, deterministic=not self.args.eval_stochastic)
        self.obs, _, dones, _ = self.envs.step(actions)
        return self.games.ended(dones, 0)

    def train(self, run: ppo.Run) -> None:
        """Lets the library learn from run.global_step to the budget, and tells the run what happens."""
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.logger import Logger

        model, games, iterations = self.model, Games(self.envs), run.iterations()
        if next(iterations, None) is None:
            return

        every, updates, replays = ITERATION.get(self.args.algo, 0), model._n_updates, hasattr(model, "replay_buffer")

        class Recorder(BaseCallback):
            def _on_training_start(self) -> None:
                self.begin()

            def begin(self) -> None:
                """An iteration begins."""
                self.steps = 0
                self.episodes: list[Episode] = []
                self.values: dict[str, list[float]] = {}  # of its updates, by our tags

            def _on_rollout_start(self) -> None:
                if not self.n_calls:
                    return
                self.gather()  # after the update of the last one: only now is that over
                if self.steps >= every and (model._n_updates > updates or not replays):  # each row has losses
                    self.log()

            def _on_step(self) -> bool:
                self.steps += model.n_envs
                self.episodes += games.ended(self.locals["dones"], self.steps)
                return True

            def _on_rollout_end(self) -> None:
                if not replays:
                    returns, values = model.rollout_buffer.returns, model.rollout_buffer.values
                    variances = ppo.value_variances(torch.from_numpy(returns), torch.from_numpy(values))
                    self.add({f"losses/{name}": float(value) for name, value in variances.items()})

            def _on_training_end(self) -> None:
                self.gather()
                self.log()

            def gather(self) -> None:
                """Takes what the library has logged of its last update."""
                logged = {name.removeprefix("train/"): value for name, value in self.logger.name_to_value.items()}
                self.add({tag: logged[name] * factor for name, (tag, factor) in TAGS.items() if name in logged})

            def add(self, values: dict[str, float]) -> None:
                for tag, value in values.items():
                    self.values.setdefault(tag, []).append(value)

            def log(self) -> None:
                rate = {"charts/learning_rate": model.lr_schedule(model._current_progress_remaining)}
                means = {tag: np.mean(values) for tag, values in self.values.items()}
                run.log(self.steps, self.episodes, means | rate)
                next(iterations, None)
                self.begin()

        if replays and run.first_step:  # the buffer is empty: nothing is learned before it is filled as at first
            train, filled = model.train, run.first_step + self.args.learning_starts

            def train_when_filled(**options: int) -> None:
                if model.num_timesteps > filled:
                    train(**options)

            model.train = train_when_filled

        model.set_logger(Logger(None, []))
        left = self.args.total_timesteps - run.global_step  # the library adds what is done: schedules keep the budget
        model.learn(left, Recorder(), log_interval=None, reset_num_timesteps=run.global_step == 0)


def library_envs(args: Args, num_envs: int, made: list[gym.Env]) -> Any:
    """The library's vector environment, whose parts go to made. Raises UsageError for what ppo.py refuses, too."""
    from stable_baselines3.common import atari_wrappers as atari
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    # The protocols of ppo.py: the paper's, which is the library's wrapper, or sticky actions and nothing else.
    game = ppo.environment_family(args.env_id) == "atari"
    paper = args.env_id.endswith("NoFrameskip-v4")
    sticky = game and not paper
    if game:
        need("cv2", f"{args.algo} on Atari")
    ppo.make_envs(args, 1, args.seed).close()  # only to see whether it can

    def wrap(env: gym.Env) -> gym.Env:
        made.append(env)
        if paper:
            return atari.AtariWrapper(env, clip_reward=args.clip_reward)
        env = atari.WarpFrame(atari.MaxAndSkipEnv(env, 4)) if sticky else env
        return atari.ClipRewardEnv(env) if args.clip_reward else env

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    with warnings.catch_warnings():  # about versions that are out of date
        warnings.simplefilter("ignore")
        envs = make_vec_env(args.env_id, num_envs, wrapper_class=wrap, env_kwargs={"frameskip": 1} if sticky else None)
    envs = VecFrameStack(envs, 4) if game else envs
    if args.norm_obs or args.norm_reward:
        return VecNormalize(envs, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma)
    return envs


def new_model(args: Args, kind: type, envs: Any) -> Any:
    """The library's model. Completes args with what it chose itself."""
    from stable_baselines3.common.preprocessing import is_image_space
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.utils import LinearSchedule

    def setting(name: str, value: Any) -> Any:
        if not isinstance(value, str) or name in ("ent_coef", "target_entropy"):
            return value
        if not value.startswith("lin_") or name not in ("learning_rate", "clip_range", "clip_range_vf"):
            raise ValueError(f"{name} is {value}")
        return LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)

    policy = dict(args.policy_kwargs)
    if args.resume or args.evaluate:
        policy.pop("features_extractor_class", None)  # the policy's own; here it is only told
    if "optimizer_class" in policy:
        name = policy["optimizer_class"]
        policy["optimizer_class"] = RMSpropTFLike if name == "RMSpropTFLike" else getattr(torch.optim, name)
    if "activation_fn" in policy:
        policy["activation_fn"] = getattr(torch.nn, policy["activation_fn"])
    settings = {name: setting(name, vars(args)[name]) for name in library_defaults(args.algo)}
    if args.evaluate and "buffer_size" in settings:  # nothing comes into it
        settings["buffer_size"] = 1000
    elif args.evaluate:  # with another number of environments; a whole number of batches all the same
        settings["n_steps"] *= args.n_envs
    args.policy = "CnnPolicy" if is_image_space(envs.observation_space) else "MlpPolicy"
    model = kind(args.policy, envs, policy_kwargs=policy, seed=args.seed, device=args.device, **settings)
    chosen, names = model.policy, ("activation_fn", "optimizer_class", "features_extractor_class")
    named = [name for name in ("net_arch", "ortho_init", "log_std_init") if hasattr(chosen, name)]
    args.policy_kwargs = {name: getattr(chosen, name) for name in named}
    args.policy_kwargs |= {name: getattr(chosen, name).__name__ for name in names}
    args.policy_kwargs["optimizer_kwargs"] = chosen.optimizer_kwargs
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

    def ended(self, dones: np.ndarray, step: int) -> list[Episode]:
        """The episodes that ended in a step whose flags are dones (num_envs,), with raw returns.

        On Atari they are whole games, and length is in the agent's steps.
        """
        self.lengths += 1
        ended = []
        for n in np.flatnonzero(dones):
            for score in self.monitors[n].episode_returns:
                ended.append(Episode(step, score, int(self.lengths[n]), int(n)))
                self.lengths[n] = 0
            self.monitors[n].episode_returns.clear()
        return ended


# ---------------------------------------------------------------------------------------- evaluate, train, main
def make_player(args: Args, num_envs: int) -> RandomPolicy | Library:
    return RandomPolicy(args, num_envs) if args.algo == "random" else Library(args, num_envs)


@contextmanager
def failing(player: RandomPolicy | Library) -> Iterator[None]:
    """Makes one sentence of whatever an environment or the library raises."""
    try:
        yield
    except (Stopped, Failed, UsageError, OSError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(player, Library) and not all(x.isfinite().all() for x in player.model.policy.parameters()):
            raise Failed("the network's parameters are not finite") from error  # the library's message is a tensor
        raise Failed(ppo.what_happened(error), "failed") from error


def evaluate(args: Args) -> list[float]:
    """Plays eval_episodes with the run args.evaluate, its normaliser frozen. Returns the raw returns.

    Where the run has ended, the result goes to its summary.json and, as eval/episodic_return, to TensorBoard. Raises
    Failed where an episode does not end, after telling of those that did.
    """
    check_args(args)
    args.evaluate = str(Path(ppo.here(), args.evaluate))  # before an environment goes to another folder
    # Each environment plays its share of the episodes, because the first ones to end are the shortest.
    num_envs = min(args.eval_episodes, 8)
    shares = [len(range(n, args.eval_episodes, num_envs)) for n in range(num_envs)]
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    begun, progress, endless = time.perf_counter(), ppo.Progress(), ""

    def left() -> list[int]:
        """The environments that have not played their share."""
        return [n for n, share in enumerate(shares) if len(returns[n]) < share]

    with closing(make_player(args, num_envs)) as player, failing(player):
        use = bool if args.algo == "random" else lambda state: player.load_state_dict(state["player"])
        state = ppo.load_checkpoint(Path(args.evaluate), use)
        while left() and not endless:
            for episode in player.play():
                returns[episode.env].append(episode.episodic_return)
            for n in left():
                if player.lengths[n] >= args.eval_max_steps:
                    endless = f"an episode of environment {n} did not end within {args.eval_max_steps:,} steps"
            if time.perf_counter() - begun > 5:  # a short evaluation shows nothing
                ended = sum(min(len(played), share) for played, share in zip(returns, shares))
                progress.show(f"of {args.eval_episodes:,} episodes", ended, args.eval_episodes)
    progress.end()
    scores = [score for played, share in zip(returns, shares) for score in played[:share]]
    kind = "stochastic" if args.eval_stochastic else "deterministic"
    result = {name: float(getattr(np, name)(scores)) for name in ("mean", "std", "min", "max") if scores}
    if scores:
        told = ", ".join(f"{name} {value:,.2f}" for name, value in result.items())
        ppo.say(f"{len(scores)} {kind} episodes: {told}")
    if endless:
        ended = f"{len(scores)} of {args.eval_episodes} episodes ended, and nothing is recorded"
        raise Failed(f"{args.env_id}: {endless} (--eval-max-steps); {ended}.", "failed")
    if not np.isfinite(scores).all():
        raise Failed(f"{args.env_id}: a return is NaN or infinite", "failed")
    result |= {"episodes": len(scores), "seed": args.eval_seed}
    result |= {name: state[name] for name in ("iteration", "global_step")}
    folder = run_dir_of(Path(args.evaluate))
    ppo.record_evaluation(folder, {kind: result}, {"eval/episodic_return": result["mean"]}, state["global_step"])
    return scores


def train(args: Args) -> Path:
    """Trains for total_timesteps, or goes on with the run args.resume. Returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = ppo.Start()
    check_args(args)
    batch = args.n_envs * (args.train_freq if args.algo == "sb3:sac" else args.n_steps)
    total = math.ceil(args.total_timesteps / batch) * batch
    with closing(make_player(args, args.n_envs)) as player:
        with ppo.Run(args, total, started, LOG_INTERVAL.get(args.algo, 1), player=player) as run, failing(player):
            if not args.resume:
                config = read_json(run.path / "config.json")
                config["versions"] |= {package: importlib.metadata.version(package) for package in player.packages}
                ppo.write_json(run.path / "config.json", config)
            player.train(run)
        return run.path


def main(argv: list[str] | None = None) -> int:
    """The command line. The exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""

    def leave(signum: int, frame: Any) -> None:
        raise Stopped(signum)

    handlers = ppo.set_handlers(leave)
    ppo.STARTED_IN.append(ppo.here())
    try:
        args = parse_args(argv)
        if args.evaluate:
            evaluate(args)
        else:
            train(args)
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 130
    except (UsageError, Failed, OSError) as error:
        ppo.warn(f"error: {one_line(error)}")
        return 2 if isinstance(error, UsageError) else 1
    finally:
        ppo.STARTED_IN.pop()
        ppo.put_back(handlers)


if __name__ == "__main__":
    sys.exit(main())
