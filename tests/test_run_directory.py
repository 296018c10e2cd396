"""What a run gives and how it ends: bad input, bad days, kill and resume, files that agree, evaluation, terminal."""

import csv
import errno
import hashlib
import io
import itertools
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from fcntl import ioctl
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import wandb
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import ppo

SCRIPT = Path(ppo.__file__).resolve()
BATCH = 128  # of SMALL
SMALL = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "2", "--update-epochs", "2", "--device", "cpu"]
SMALL += ["--checkpoint-interval", "2", "--total-timesteps", "512"]


# ------------------------------------------------------------------------------------------------------- helpers
class Toy(gym.Env):
    """Episodes of 5 steps; from step `after` of its life on, environment number 1 of a run does what `bad` says."""

    made = 0

    def __init__(self, observations=None, actions=None, bad="", after=0, render_mode=None):
        self.observation_space = observations or spaces.Box(-1, 1, (3,))
        self.action_space = actions or spaces.Discrete(2)
        self.bad, self.after, self.life, self.number = bad, after, 0, Toy.made
        Toy.made += 1

    def is_bad(self, kind):
        return self.bad == kind and self.number == 1 and self.life >= self.after

    def observation(self):
        if self.is_bad("observation"):
            return np.array([0.0, np.nan, 0.0], dtype=np.float32)
        return np.full(3, 0.1 * self.t, dtype=np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        if self.is_bad("raise in reset"):
            raise ValueError("no more games")
        return self.observation(), {}

    def step(self, action):
        self.t, self.life = self.t + 1, self.life + 1
        if self.is_bad("raise in step"):
            raise ValueError("the gripper broke")
        bad_rewards = {"nan reward": np.nan, "inf reward": -np.inf, "huge reward": 1e38}
        reward = next((value for kind, value in bad_rewards.items() if self.is_bad(kind)), 1.0)
        return self.observation(), reward, self.t == 5, False, {}


@pytest.fixture
def toy():
    """toy(**options) registers a Toy of its own and returns its id."""
    ids = []

    def register(**options):
        Toy.made = 0
        ids.append(f"Toy{len(ids)}-v0")
        gym.register(ids[-1], Toy, kwargs=options)
        return ids[-1]

    yield register
    for name in ids:
        del gym.registry[name]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, the current one of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*flags, iterations=4, name="run"):
    """Trains a small run in this process; returns the exit status and the run directory."""
    status = ppo.main([*SMALL, "--total-timesteps", str(iterations * BATCH), "--run-name", name, *flags])
    return status, Path("runs") / name


def process(*command, cwd, **environment):
    """A python process of its own that finds nothing of ours but what the command names."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")} | environment
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


def rows(run, name):
    with open(run / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def timeless(run, name):
    """The rows of a csv file without what the clock wrote."""
    clocks = ("wall_time", "sps", "charts/SPS")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows(run, name)]


def summary(run):
    return json.loads((run / "summary.json").read_text())


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run):
    return torch.load(max((run / "checkpoints").glob("step_*.pt")), weights_only=True)


def tensorboard(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return events


def scalars(run):
    events = tensorboard(run)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wait_for_the_next_second():
    """TensorBoard reads files in the order of their names, which hold the second of their birth."""
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.02)


def same(a, b):
    """Equal in every bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Same weights, normalisers, optimizer, random states, best checkpoint, episodes and progress."""
    for file in ("best.pt", max(checkpoints(a))):
        one, other = (torch.load(run / "checkpoints" / file, weights_only=True) for run in (a, b))
        for key in one.keys() - {"wall_time", "csv"}:  # the clock's digits also count in the length of a csv file
            assert same(one[key], other[key]), (file, key)
    assert len(timeless(a, "episodes")) > 1
    assert timeless(a, "episodes") == timeless(b, "episodes")
    assert timeless(a, "progress") == timeless(b, "progress")


def after_iteration(monkeypatch, iteration, action):
    """Calls action once, when the given iteration was logged and before it can be saved."""
    log = ppo.Run.log

    def log_then_act(run, *values, **groups):
        log(run, *values, **groups)
        if run.iteration == iteration:
            action()

    monkeypatch.setattr(ppo.Run, "log", log_then_act)


def before_update(monkeypatch, iteration, action):
    """Calls action once, in the middle of the given iteration."""
    update, count = ppo.update, itertools.count(1)

    def act_then_update(*args):
        if next(count) == iteration:
            action()
        return update(*args)

    monkeypatch.setattr(ppo, "update", act_then_update)


DIE = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import ppo
write_row, replace = ppo.Run.write_row, os.replace
def write_row_then_die(run):
    write_row(run)
    for signum in {signals}:
        if run.global_step == {step}: os.kill(os.getpid(), signum)
ppo.Run.write_row = write_row_then_die
def die_before_replacing(source, target):
    if str(target).endswith({target!r}): os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die_before_replacing
sys.exit(ppo.main(sys.argv[1:]))
"""


def killed(*flags, step=0, signals=(), target="never"):
    """A run of a real process that sends itself signals after the row of a step, or is killed about to put a file in
    place."""
    code = DIE.format(folder=str(SCRIPT.parent), step=step, signals=[int(s) for s in signals], target=target)
    return process("-c", code, *SMALL, "--run-name", "killed", *flags, cwd=".").returncode


# ----------------------------------------------------------------------------------------------------- bad input
def refused(capsys, *argv, here):
    """The one sentence with which these arguments are refused, before anything is created."""
    before = sorted(here.rglob("*"))
    assert ppo.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert sorted(here.rglob("*")) == before
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err), (out, err)
    return err


BAD_ARGUMENTS = {
    "--env-id CartPol-v1": "did you mean CartPole-v1?",
    "--env-id HalfCheetah-v9": "did you mean HalfCheetah-v",
    "--env-id ALE/Pon-v5": "did you mean ALE/Pong-v5?",
    "--env-id no_such_package:Thing-v0": "No module named 'no_such_package'. Python looked in",
    "--env-id json:Thing-v0": "json:Thing-v0 is not registered",
    "--env-id Pong-v4": "ALE/<Game>-v5 or <Game>NoFrameskip-v4",
    "--env-id Blackjack-v1": "Box and Discrete are supported",
    "--num-envs 3 --num-steps 5": "3 x 5 = 15",
    "--num-envs 3 --num-steps 5 --num-minibatches 4": "--num-minibatches 3 or 5 or 1",
    "--num-envs 2 --num-steps 4 --num-minibatches 8": "--num-minibatches 4",
    "--num-envs 1 --num-steps 1 --num-minibatches 1": "a larger --num-steps",
    "--num-envs 2 --num-steps 4 --total-timesteps 7": "2 x 4 = 8; ask for 8 or more",
    "--num-envs 0": "--num-envs is 0, but must be greater than 0",
    "--num-envs -1": "--num-envs is -1",
    "--num-steps 0": "--num-steps is 0",
    "--num-minibatches 0": "--num-minibatches is 0",
    "--update-epochs 0": "--update-epochs is 0",
    "--total-timesteps 0": "--total-timesteps is 0",
    "--learning-rate 0": "--learning-rate is 0.0, but must be greater than 0",
    "--learning-rate -1e-3": "--learning-rate is -0.001",
    "--learning-rate nan": "--learning-rate is nan, but must be a finite number",
    "--learning-rate inf": "--learning-rate is inf",
    "--gamma 1.01": "--gamma is 1.01, but must be at most 1",
    "--gamma 0": "--gamma is 0.0",
    "--gae-lambda 1.5": "--gae-lambda is 1.5, but must be at most 1",
    "--gae-lambda -0.1": "--gae-lambda is -0.1",
    "--gae-lambda nan": "--gae-lambda is nan",
    "--clip-coef 0": "--clip-coef is 0.0",
    "--kl-beta 0": "--kl-beta is 0.0",
    "--kl-target -1": "--kl-target is -1.0",
    "--target-kl 0": "--target-kl is 0.0",
    "--target-kl nan": "--target-kl is nan",
    "--ent-coef -0.1": "--ent-coef is -0.1, but must be 0 or more",
    "--ent-coef inf": "--ent-coef is inf",
    "--vf-coef nan": "--vf-coef is nan",
    "--max-grad-norm 0": "--max-grad-norm is 0.0",
    "--log-std-init nan": "--log-std-init is nan",
    "--checkpoint-interval -1": "--checkpoint-interval is -1",
    "--num-threads -1": "--num-threads is -1",
    "--seed -1": "--seed is -1",
    "--seed 4294967296": "--seed is 4294967296",
    "--env-id FrozenLake-v1 --norm-obs": "use --no-norm-obs",
    "--env-id PongNoFrameskip-v4 --num-envs 2 --norm-obs": "use --no-norm-obs",
    "--bf16 on": "--bf16 on is for the CNN, and CartPole-v1 has no images",
    "--resume runs/nothing": "runs/nothing is no run directory",
    "--evaluate runs/nothing": "runs/nothing is no run directory",
}


@pytest.mark.parametrize("argv", BAD_ARGUMENTS)
def test_bad_argument_is_refused_in_one_sentence(argv, here, capsys):
    assert BAD_ARGUMENTS[argv] in refused(capsys, *argv.split(), here=here)


UNSUPPORTED = {
    "Dict observation": dict(observations=spaces.Dict(a=spaces.Discrete(2))),
    "Tuple observation": dict(observations=spaces.Tuple([spaces.Discrete(2)])),
    "MultiBinary observation": dict(observations=spaces.MultiBinary(3)),
    "MultiDiscrete observation": dict(observations=spaces.MultiDiscrete([2, 3])),
    "Text observation": dict(observations=spaces.Text(5)),
    "Dict action": dict(actions=spaces.Dict(a=spaces.Discrete(2))),
    "Tuple action": dict(actions=spaces.Tuple([spaces.Discrete(2)])),
    "MultiBinary action": dict(actions=spaces.MultiBinary(3)),
}


@pytest.mark.parametrize("space", UNSUPPORTED)
def test_unsupported_space_is_refused_with_what_is_supported(space, toy, here, capsys):
    sentence = refused(capsys, "--env-id", toy(**UNSUPPORTED[space]), here=here)
    assert (
        "Box and Discrete are" in sentence if "observation" in space else "Box, Discrete and MultiDiscrete" in sentence
    )


def test_missing_extra_is_refused_with_the_install_command(here, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith(("Box2D", "gymnasium.envs.box2d"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    assert "pip install" in refused(capsys, "--env-id", "LunarLander-v3", here=here)


def test_environment_that_cannot_be_constructed_is_refused(here, toy, capsys):
    sentence = refused(capsys, "--env-id", toy(no_such_option=1), here=here)
    assert "no_such_option" in sentence


def test_cuda_where_there_is_none_is_refused(here, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use --device cpu" in refused(capsys, "--device", "cuda", here=here)


def fail_to_compile(*args, **options):
    raise RuntimeError("no working C++ compiler found\nand a long story")


def test_compile_on_without_compiler_is_refused(here, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: fail_to_compile)
    sentence = refused(capsys, *SMALL, "--compile", "on", here=here)
    assert "no working C++ compiler found" in sentence and "use --compile off" in sentence


def test_compile_auto_without_compiler_goes_on_without(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *args, **options: fail_to_compile)
    args = ppo.parse_args([*SMALL, "--total-timesteps", "10000000"])
    envs = ppo.make_envs(args, 2, args.seed)
    ppo.settle(args, envs)
    gradient = ppo.make_gradient(ppo.make_agent(envs, args), args)
    assert args.compile == "off" and gradient is not fail_to_compile
    assert "cannot compile here" in capsys.readouterr().out


def test_track_without_login_is_refused(tmp_path):
    (tmp_path / "home").mkdir()  # without .netrc
    code = f"import os, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); os.environ.pop('WANDB_API_KEY', None)"
    code += "; os.environ.pop('WANDB_MODE', None); import ppo; sys.exit(ppo.main(['--track']))"
    done = process("-c", code, cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [tmp_path / "home"])
    assert done.stderr == "error: --track: wandb is not logged in; run wandb login, or set WANDB_MODE=offline.\n"


def test_track_with_a_key_or_server_that_does_not_work_is_refused(here, monkeypatch, capsys):
    def login(**options):
        raise wandb.errors.AuthenticationError("the server did not respond")

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert "WANDB_MODE=offline" in refused(capsys, *SMALL, "--track", here=here)


def test_missing_moviepy_is_said_before_anything_is_played(here, monkeypatch, capsys):
    _, run = start(iterations=1)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in refused(capsys, "--evaluate", str(run), "--capture-video", here=here)


def test_existing_run_name_is_refused_and_left_alone(here, capsys):
    _, run = start(iterations=1)
    before = (run / "episodes.csv").read_text()
    capsys.readouterr()
    assert "go on with --resume runs/run" in refused(capsys, "--run-name", "run", here=here)
    assert (run / "episodes.csv").read_text() == before


def test_existing_folder_that_is_no_run_is_not_taken_as_run_name(here, capsys):
    (here / "runs" / "thesis").mkdir(parents=True)
    assert "runs/thesis exists" in refused(capsys, *SMALL, "--run-name", "thesis", here=here)


def test_runs_dir_that_is_a_file_is_refused(here, capsys):
    (here / "runs").touch()
    assert "runs" in refused(capsys, *SMALL, here=here)


@pytest.mark.parametrize("config", ["", "{}", '{"model_type": "bert"}', "[]", '{"args": {"unknown": 1}}'])
def test_resume_of_a_folder_with_a_foreign_config_is_refused(config, here, capsys):
    (here / "config.json").write_text(config)
    assert "is no run directory" in refused(capsys, "--resume", str(here), here=here)


def test_resume_with_changed_arguments_is_refused_with_the_difference(here, capsys):
    _, run = start(iterations=1)
    capsys.readouterr()
    sentence = refused(capsys, "--resume", str(run), "--gamma", "0.9", "--seed", "7", here=here)
    assert "gamma 0.99 -> 0.9" in sentence and "seed 1 -> 7" in sentence and "num_envs" not in sentence
    assert "total_timesteps 128 -> 256" in refused(capsys, "--resume", str(run), "--total-timesteps", "256", here=here)


def test_resume_with_the_same_and_with_harmless_arguments_is_allowed(here):
    _, run = start(iterations=1)
    same_again = [*SMALL, "--total-timesteps", str(BATCH), "--run-name", "run"]
    assert ppo.main(["--resume", str(run), *same_again, "--wandb-entity", "team", "--wandb-project-name", "other"]) == 0


def test_evaluation_with_changed_arguments_is_refused_with_the_difference(here, capsys):
    _, run = start(iterations=1)
    capsys.readouterr()
    sentence = refused(capsys, "--evaluate", str(run), "--gamma", "0.9", "--eval-seed", "7", here=here)
    assert "gamma 0.99 -> 0.9" in sentence and "eval_seed" not in sentence
    assert "num_envs 2 -> 4" in refused(capsys, "--evaluate", str(run), "--num-envs", "4", here=here)
    harmless = ["--eval-episodes", "1", "--eval-seed", "7", "--eval-stochastic", "--num-threads", "1"]
    assert ppo.main(["--evaluate", str(run), *harmless, "--device", "cpu", "--compile", "off"]) == 0


def test_resume_of_a_checkpoint_file_is_refused(here, capsys):
    _, run = start(iterations=1)
    capsys.readouterr()
    assert "--resume" in refused(capsys, "--resume", str(run / "checkpoints" / "step_000000000128.pt"), here=here)


def test_evaluation_in_an_environment_with_other_spaces_is_refused(here, capsys):
    _, run = start(iterations=1)
    capsys.readouterr()
    assert "Acrobot-v1" in refused(capsys, "--evaluate", str(run), "--env-id", "Acrobot-v1", here=here)


def test_exit_status_of_the_script_for_bad_input(tmp_path):
    done = process(SCRIPT, "--env-id", "CartPol-v1", cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr == "error: --env-id CartPol-v1 is not registered in gymnasium; did you mean CartPole-v1?\n"


# ------------------------------------------------------------------------------------------------------ bad days
BAD_ENVIRONMENTS = {  # what goes wrong from the 150th step of environment 1 on, in step 22 of iteration 3
    "observation": ("diverged", "the observation of environment 1 in step 2[12] of the rollout is NaN"),
    "nan reward": ("diverged", "the reward of environment 1 in step 21 of the rollout is NaN"),
    "inf reward": ("diverged", "the reward of environment 1 in step 21 of the rollout is NaN or infinite"),
    "huge reward": ("diverged", "(policy_loss|value_loss|grad_norm) is (nan|inf)"),
    "raise in step": (
        "failed",
        r"in step 21 of the rollout environment 1 of Toy0-v0 raised ValueError: the gripper bro",
    ),
    "raise in reset": (
        "failed",
        r"in step 21 of the rollout environment 1 of Toy0-v0 raised ValueError: no more games",
    ),
}


@pytest.mark.parametrize("bad", BAD_ENVIRONMENTS)
def test_bad_environment_ends_the_run_with_iteration_quantity_and_checkpoint(bad, toy, here, capsys):
    status, message = BAD_ENVIRONMENTS[bad]
    assert start("--env-id", toy(bad=bad, after=150))[0] == 1
    run, err = Path("runs/run"), capsys.readouterr().err
    assert re.search(f"^error: iteration 3: .*{message}.*; the last good checkpoint is", err), err
    assert err.count("\n") == 1 and str(run / "checkpoints" / "step_000000000256.pt") in err
    assert summary(run)["status"] == status and summary(run)["global_step"] == 2 * BATCH
    assert summary(run)["error"] in err
    weights = newest(run)["agent"]
    assert all(x.isfinite().all() for x in weights.values() if x.is_floating_point())


def test_environment_that_raises_in_its_first_reset_is_named_before_anything_is_created(toy, here, capsys):
    assert start("--env-id", toy(bad="raise in reset"))[0] == 1
    assert capsys.readouterr().err.startswith("error: environment 1 of Toy0-v0 raised ValueError: no more games (")
    assert not list(here.iterdir())


def test_nan_loss_ends_the_run_before_it_can_be_saved(here, capsys):
    status, run = start("--learning-rate", "1e30")
    assert status == 1 and re.search(r"error: iteration 1: \w+ is (nan|inf); the last good", capsys.readouterr().err)
    assert summary(run)["status"] == "diverged" and checkpoints(run) == ["step_000000000000.pt"]


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_ends_the_run_and_leaves_the_checkpoint_before(call, here, monkeypatch, capsys):
    after_iteration(monkeypatch, 4, lambda: monkeypatch.setattr(os, call, full_disk))
    status, run = start(iterations=6)
    err = capsys.readouterr().err
    assert status == 1 and "No space left" in err and err.count("\n") == 1
    assert "iteration 4" in err and str(run / "checkpoints" / "step_000000000256.pt") in err, err
    assert newest(run)["iteration"] == 2 and not list(run.rglob("*.tmp"))


def test_run_that_a_full_disk_ended_goes_on_as_if_it_had_not(here, monkeypatch):
    start(name="whole")
    with monkeypatch.context() as patch:
        after_iteration(patch, 4, lambda: patch.setattr(os, "fsync", full_disk))
        assert start(name="run")[0] == 1
    assert ppo.main(["--resume", "runs/run"]) == 0
    assert_same_run(Path("runs/whole"), Path("runs/run"))


# ------------------------------------------------------------------------------------- kill, signals and resume
EXACT = {
    "CartPole-v1": ["--compile", "off"],
    "Pendulum-v1": ["--norm-obs", "--norm-reward", "--num-steps", "128", "--objective", "kl-adaptive"],
}


@pytest.mark.parametrize("env_id", EXACT)
def test_run_that_was_killed_and_resumed_equals_one_that_was_not(env_id, here, capsys):
    flags = ["--env-id", env_id, *EXACT[env_id], "--total-timesteps", "1600"]  # with an incomplete batch at the end
    assert ppo.main([*SMALL, "--run-name", "whole", *flags]) == 0
    step = 5 * (256 if "128" in flags else 128)
    assert killed(*flags, step=step, signals=[signal.SIGKILL]) == -signal.SIGKILL
    run = here / "runs" / "killed"
    assert newest(run)["iteration"] == 4 and not (run / "summary.json").exists()
    assert int(rows(run, "progress")[-1]["global_step"]) == step  # what the resumed run has to forget
    wait_for_the_next_second()
    assert ppo.main(["--resume", str(run)]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert_same_run(here / "runs" / "whole", run)
    steps = [int(row["global_step"]) for row in rows(run, "progress")]
    for tag, points in scalars(run).items():
        assert len({step for step, _ in points}) == len(points), tag
        assert {step for step, _ in points} <= set(steps)
    assert [step for step, _ in scalars(run)["losses/policy_loss"]] == steps


def test_run_that_was_killed_before_its_first_interval_ended_loses_nothing(here):
    start(name="whole")
    assert killed(step=BATCH, signals=[signal.SIGKILL]) == -signal.SIGKILL
    assert ppo.main(["--resume", "runs/killed"]) == 0
    assert_same_run(Path("runs/whole"), Path("runs/killed"))


@pytest.mark.parametrize("file, iterations", [("step_000000000512.pt", 6), ("best.pt", 2)])
def test_kill_in_the_middle_of_saving_loses_nothing(file, iterations, here):
    start(name="whole", iterations=iterations)
    assert killed("--total-timesteps", str(iterations * BATCH), target=file) == -signal.SIGKILL
    run = here / "runs" / "killed"
    assert ppo.main(["--resume", str(run)]) == 0
    assert checkpoints(run) == checkpoints(here / "runs" / "whole")  # and no temporary file
    assert_same_run(here / "runs" / "whole", run)


def test_atari_run_resumed_from_a_middle_checkpoint_equals_the_whole_one(here):
    flags = "--env-id PongNoFrameskip-v4 --num-envs 2 --num-steps 8 --num-minibatches 2 --device cpu --update-epochs 1"
    flags = [*flags.split(), "--checkpoint-interval", "2", "--total-timesteps", "64", "--run-name"]
    assert ppo.main([*flags, "whole"]) == 0
    run = here / "runs" / "half"
    shutil.copytree(here / "runs" / "whole", run)
    (run / "checkpoints" / "step_000000000064.pt").unlink()
    (run / "summary.json").unlink()
    assert ppo.main(["--resume", str(run)]) == 0
    one, other = newest(here / "runs" / "whole"), newest(run)
    assert all(same(one[key], other[key]) for key in ("agent", "optimizer", "torch_rng"))
    assert len(timeless(run, "progress")) == 4
    assert timeless(run, "progress") == timeless(here / "runs" / "whole", "progress")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_and_saves_the_iteration_and_the_run_goes_on_exactly(signum, here, monkeypatch, capsys):
    start(name="whole", iterations=6)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        before_update(patch, 3, lambda: os.kill(os.getpid(), signum))
        status, run = start(iterations=6)
    assert status == 128 + signum and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert newest(run)["iteration"] == 3
    assert summary(run)["status"] == "interrupted" and summary(run)["global_step"] == 3 * BATCH
    assert "error" not in summary(run)
    assert len(rows(run, "progress")) == 3 and capsys.readouterr().err == ""
    assert ppo.main(["--resume", str(run)]) == 0
    assert "goes on from step 384, exactly as if it had never stopped\n" in capsys.readouterr().out
    assert_same_run(Path("runs/whole"), run)
    assert summary(run)["status"] == "completed" and summary(run)["global_step"] == 6 * BATCH
    assert [int(row["global_step"]) for row in rows(run, "progress")] == [BATCH * i for i in range(1, 7)]


def test_signal_in_the_last_iteration_leaves_a_completed_run(here, monkeypatch):
    before_update(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, run = start(iterations=4)
    assert status == 0 and summary(run)["status"] == "completed"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_from_outside_stops_a_real_process(signum, here):
    command = [sys.executable, SCRIPT, *SMALL, "--run-name", "run", "--total-timesteps", "1000000000"]
    child = subprocess.Popen([*command, "--compile", "off"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while child.poll() is None and not list(here.glob("runs/run/checkpoints/step_*.pt")):
            time.sleep(0.05)
        child.send_signal(signum)
        assert child.communicate(timeout=60)[1] == b"" and child.returncode == 128 + signum
    finally:
        child.kill()
    run = here / "runs" / "run"
    assert summary(run)["status"] == "interrupted"
    assert (
        summary(run)["global_step"] == newest(run)["iteration"] * BATCH == int(rows(run, "progress")[-1]["global_step"])
    )


def test_second_signal_leaves_at_once(here):
    signals = [signal.SIGINT, signal.SIGTERM]
    assert killed("--total-timesteps", "512", step=3 * BATCH, signals=signals) == 128 + signal.SIGTERM
    run = here / "runs" / "killed"
    assert newest(run)["iteration"] == 2 and summary(run)["status"] == "interrupted"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_weight(path):
    """Changes one byte of the actor's weights, and nothing that tells where they are."""
    data = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["agent"]["actor.second.weight"].numpy().tobytes()
    data[data.index(weights[:64]) + 3] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_weight])
def test_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(damage, here, capsys):
    _, run = start()
    shutil.copytree(run, here / "runs" / "whole")
    damage(run / "checkpoints" / "step_000000000512.pt")
    capsys.readouterr()
    assert ppo.main(["--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert str(run / "checkpoints" / "step_000000000512.pt") in err and "corrupt" in err and err.count("\n") == 1
    assert "goes on from step 256" in out
    assert_same_run(here / "runs" / "whole", run)


def test_a_checkpoint_that_was_left_out_is_not_in_the_way_of_the_next_resume(here, monkeypatch):
    """It may be whole, on a disk that failed once. The run has taken another course from the one before it."""
    _, run = start()
    shutil.copytree(run, here / "runs" / "whole")
    load = torch.load

    def fails(file, **options):
        if "000512" in str(file):
            raise OSError("stale file handle")
        return load(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fails)
        before_update(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert ppo.main(["--resume", str(run)]) == 143
    assert summary(run)["global_step"] == 384
    assert ppo.main(["--resume", str(run)]) == 0
    for name in ("episodes", "progress"):
        assert timeless(run, name) == timeless(here / "runs" / "whole", name)


def test_run_of_which_all_checkpoints_are_corrupt_is_refused_and_left_alone(here, capsys):
    _, run = start()
    for path in (run / "checkpoints").glob("step_*"):
        cut(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert ppo.main(["--resume", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(
        "error: runs/run has no checkpoint that can be used. If it ended while it started, start it again.\n"
    )
    assert "step_000000000512.pt" in err and "step_000000000256.pt" in err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_corrupt_checkpoint_file_given_to_evaluate_has_no_other_in_its_place(here, capsys):
    _, run = start()
    cut(run / "checkpoints" / "best.pt")
    capsys.readouterr()
    assert ppo.main(["--evaluate", str(run / "checkpoints" / "best.pt")]) == 2
    err = capsys.readouterr().err
    assert "best.pt" in err and "the one before" not in err  # it tries none


def test_resume_of_a_completed_run_changes_nothing(here, capsys):
    _, run = start()
    assert ppo.main(["--evaluate", str(run), "--eval-episodes", "2"]) == 0
    told, episodes, progress = summary(run), rows(run, "episodes"), rows(run, "progress")
    assert ppo.main(["--resume", str(run)]) == 0
    assert (rows(run, "episodes"), rows(run, "progress")) == (episodes, progress)
    for key in ("status", "global_step", "train_last100", "eval", "sps"):
        assert summary(run).get(key) == told[key], key


def test_run_that_was_killed_before_its_summary_was_written_is_completed_by_a_resume(here, capsys):
    start(name="whole", iterations=5)  # the last checkpoint is not one of the regular ones
    assert killed("--total-timesteps", str(5 * BATCH), target="summary.json") == -signal.SIGKILL
    run = here / "runs" / "killed"
    assert newest(run)["iteration"] == 5 and not (run / "summary.json").exists()
    assert ppo.main(["--resume", str(run)]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert_same_run(here / "runs" / "whole", run)
    told, whole = summary(run), summary(here / "runs" / "whole")
    for key in ("status", "global_step", "train_last100"):
        assert told[key] == whole[key], key
    assert told["sps"] == pytest.approx(5 * BATCH / newest(run)["wall_time"])
    assert ppo.main(["--resume", str(run)]) == 0
    assert "nothing left to train" in capsys.readouterr().out and summary(run) == told


def test_evaluation_stays_in_the_summary_of_a_run_that_goes_on(here, monkeypatch):
    with monkeypatch.context() as patch:
        before_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        _, run = start()
    assert ppo.main(["--evaluate", str(run), "--eval-episodes", "2"]) == 0
    told = summary(run)["eval"]
    assert ppo.main(["--resume", str(run)]) == 0
    assert summary(run)["status"] == "completed" and summary(run).get("eval") == told


# --------------------------------------------------------------------------------------------- the run directory
def test_two_runs_of_the_same_second_do_not_share_a_directory(here, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *args: "20300101-000000")
    args, mkdir, together = ppo.parse_args(SMALL), Path.mkdir, threading.Barrier(8)
    waited = threading.local()

    def mkdir_at_the_same_moment(path, *options, **more):
        if not vars(waited):
            waited.once = together.wait(timeout=60)
        mkdir(path, *options, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir_at_the_same_moment)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(ppo.create_run_dir, [args] * 8))
    assert len(set(paths)) == 8 and all((path / "config.json").exists() for path in paths)
    assert here / "runs" / "CartPole-v1__ppo__1__20300101-000000" in [path.resolve() for path in paths]


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "gymnasium.envs.classic_control:CartPole-v1"])
def test_run_name_is_one_safe_folder(env_id, here):
    path = ppo.create_run_dir(ppo.parse_args(["--env-id", env_id]))
    assert path.parent == here / "runs" and re.fullmatch(r"[\w.-]+__ppo__1__\d{8}-\d{6}", path.name)


def assert_files_agree(run):
    episodes, progress = rows(run, "episodes"), rows(run, "progress")
    returns = [float(row["return"]) for row in episodes]
    steps = [int(row["global_step"]) for row in progress]
    assert steps == sorted(set(steps)) and len(episodes) > 20

    told = summary(run)
    assert told["status"] == "completed" and told["global_step"] == steps[-1]
    assert told["train_last100"] == pytest.approx(np.mean(returns[-100:]))
    assert told["wall_time"] >= float(progress[-1]["wall_time"]) >= float(episodes[-1]["wall_time"])
    assert told["sps"] > 0 and told["startup_time"] > 0 and told["peak_memory_mb"] > 10

    tags = list(progress[0])[3:]
    points = scalars(run)
    assert set(points) == set(tags)
    for tag in tags:
        written = [(step, float(row[tag])) for step, row in zip(steps, progress) if row[tag]]
        assert [step for step, _ in points[tag]] == [step for step, _ in written], tag
        assert [value for _, value in points[tag]] == pytest.approx([value for _, value in written], rel=1e-6), tag
    assert [row["sps"] for row in progress] == [row["charts/SPS"] for row in progress]

    for row, before in zip(progress, [0, *steps]):
        so_far = [float(e["return"]) for e in episodes if int(e["global_step"]) <= int(row["global_step"])]
        last = row["charts/train_last100"]
        assert float(last) == pytest.approx(np.mean(so_far[-100:])) if so_far else last == ""
        mine = [e for e in episodes if before < int(e["global_step"]) <= int(row["global_step"])]
        for tag, column in (("charts/episodic_return", "return"), ("charts/episodic_length", "length")):
            mean = np.mean([float(e[column]) for e in mine]) if mine else None
            assert row[tag] == "" if mean is None else float(row[tag]) == pytest.approx(mean)
    assert all(float(row["return"]) == float(row["length"]) for row in episodes)  # CartPole pays 1 per step


TAGS = {"charts/episodic_return", "charts/episodic_length", "charts/train_last100", "charts/SPS"}
TAGS |= {"charts/learning_rate"}
TAGS |= {"losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/old_approx_kl"}
TAGS |= {"losses/clipfrac", "losses/explained_variance"}


def test_csv_tensorboard_and_summary_agree(here):
    _, run = start(iterations=20)
    assert_files_agree(run)
    assert set(scalars(run)) >= TAGS
    assert list(rows(run, "episodes")[0]) == ["global_step", "wall_time", "return", "length"]
    assert list(rows(run, "progress")[0])[:3] == ["global_step", "wall_time", "sps"]


def test_csv_tensorboard_and_summary_agree_after_a_resume(here, monkeypatch):
    with monkeypatch.context() as patch:
        after_iteration(patch, 10, lambda: patch.setattr(os, "replace", full_disk))  # logged but never saved
        status, run = start(iterations=20)
    assert status == 1 and int(rows(run, "progress")[-1]["global_step"]) == 10 * BATCH
    wait_for_the_next_second()
    assert ppo.main(["--resume", str(run)]) == 0
    assert_files_agree(run)


def test_learning_rate_column_anneals_to_the_last_iteration(here):
    _, run = start(iterations=4)
    assert [float(row["charts/learning_rate"]) for row in rows(run, "progress")] == [1e-3, 7.5e-4, 5e-4, 2.5e-4]


def test_tensorboard_has_hyperparameters_as_text_and_in_the_hparams_tab(here):
    _, run = start("--target-kl", "0.5", iterations=2)
    events = tensorboard(run)
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    content = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    shown = content.session_start_info.hparams
    for name, value in json.loads((run / "config.json").read_text())["args"].items():
        assert f"|{name}|{value}|" in text
    assert set(shown) == {field.name for field in fields(ppo.Args)}  # those of the run itself are not compared
    assert shown["gamma"].number_value == 0.99 and shown["target_kl"].number_value == 0.5
    assert shown["env_id"].string_value == "CartPole-v1"


def test_config_says_what_ran_on_what(here):
    _, run = start("--seed", "3", iterations=1)
    config = json.loads((run / "config.json").read_text())
    assert config["args"] == vars(ppo.RunArgs(**config["args"])) and config["args"]["num_envs"] == 2
    assert config["seed"] == config["args"]["seed"] == 3 and config["threads"] == 1 and config["hardware"]
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["gymnasium"] == gym.__version__
    assert config["versions"].keys() == {"python", "torch", "gymnasium", "numpy", "mujoco", "ale_py"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert config["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert config["git_dirty"] is (bool(dirty.stdout) if head.returncode == 0 else None)


def test_script_copied_alone_into_an_empty_folder_trains(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "mine.py")
    flags = [*SMALL, "--total-timesteps", "256"]
    done = process("mine.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    [run] = (tmp_path / "runs").iterdir()
    assert run.name.startswith("CartPole-v1__mine__1__") and summary(run)["status"] == "completed"
    config = json.loads((run / "config.json").read_text())
    assert config["command"] == [sys.executable, "mine.py", *flags]
    assert config["git_commit"] is None and config["git_dirty"] is None  # unknown is not clean


def test_two_newest_checkpoints_and_the_best_are_kept(here):
    _, run = start(iterations=7)
    assert checkpoints(run) == ["best.pt", "step_000000000768.pt", "step_000000000896.pt"]
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    returns = [float(row["return"]) for row in rows(run, "episodes")]
    steps = [int(row["global_step"]) for row in rows(run, "episodes")]
    scores = {i: np.mean([r for r, s in zip(returns, steps) if s <= i * BATCH][-100:]) for i in (2, 4, 6, 7)}
    assert best["iteration"] == max(scores, key=scores.get) and best["best"] == pytest.approx(max(scores.values()))


CHECKPOINT = "agent optimizer player rng kl_beta iteration global_step last_returns best notes wall_time csv total"
CHECKPOINT += " gathered episodes conditions torch_rng cuda_rng numpy_rng python_rng"


def test_checkpoint_holds_all_that_a_run_is(here):
    _, run = start(iterations=2)
    state = newest(run)
    assert set(state) == set(CHECKPOINT.split())
    assert (state["iteration"], state["global_step"], state["total"]) == (2, 2 * BATCH, 2 * BATCH)
    tables = {name: (run / f"{name}.csv").read_bytes() for name in ("episodes", "progress")}
    assert state["csv"] == {name: [len(x), hashlib.sha256(x).hexdigest()] for name, x in tables.items()}
    assert set(state["player"]) == {"obs", "discounted", "episodes"}


@pytest.mark.parametrize("iterations", [7, 20, 50])
def test_checkpoints_come_at_every_twentieth_of_the_budget(iterations, here, monkeypatch):
    save, saved = ppo.Run.save, []

    def save_and_tell(run, **options):
        saved.append(run.iteration)
        save(run, **options)

    monkeypatch.setattr(ppo.Run, "save", save_and_tell)
    start("--checkpoint-interval", "0", "--update-epochs", "1", iterations=iterations)
    twentieths = [20 * iteration // iterations for iteration in range(iterations + 1)]
    assert saved == [0] + [i for i in range(1, iterations + 1) if twentieths[i] > twentieths[i - 1]]


def test_wandb_offline_works_and_a_resumed_run_keeps_its_id(here, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        before_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, run = start("--track")
    wait_for_the_next_second()  # two folders of one second would be told apart by a number after the id
    assert status == 143 and ppo.main(["--resume", str(run)]) == 0
    wandb_id = json.loads((run / "config.json").read_text())["wandb_id"]
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(f"-{wandb_id}") for name in folders)
    assert not (here / "wandb").exists()


# ----------------------------------------------------------------------------------------------------- evaluation
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with both normalisers, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = "--env-id CartPole-v1 --norm-obs --norm-reward --total-timesteps 1024 --run-name run --runs-dir"
    assert ppo.main([*SMALL, *flags.split(), str(folder)]) == 0
    return folder / "run"


@pytest.fixture
def run(trained, here):
    shutil.copytree(trained, here / "run")
    return Path("run")


def returns_of(path, *flags):
    return ppo.evaluate(ppo.parse_args(["--evaluate", str(path), *flags]))


def test_evaluation_prints_and_records_what_it_returns(run, capsys):
    returns = returns_of(run, "--eval-episodes", "11")
    told = dict(mean=np.mean(returns), std=np.std(returns), min=min(returns), max=max(returns))
    out, err = capsys.readouterr()
    assert len(returns) == 11 and err == ""
    assert out == f"11 deterministic episodes: {', '.join(f'{k} {v:,.2f}' for k, v in told.items())}\n"
    recorded = summary(run)["eval"]["deterministic"]
    assert {key: recorded[key] for key in told} == pytest.approx(told) and recorded["episodes"] == 11
    [(step, value)] = scalars(run)["eval/episodic_return"]
    assert step == 1024 and value == pytest.approx(told["mean"])
    assert summary(run)["status"] == "completed" and summary(run)["train_last100"] > 0


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_evaluation_plays_as_many_episodes_as_asked(count, run):
    assert len(returns_of(run, "--eval-episodes", str(count))) == count


def test_evaluation_needs_no_memory_for_a_rollout(run, monkeypatch):
    monkeypatch.setattr(ppo, "memory", lambda: 100_000)
    assert len(returns_of(run)) == 10


def test_evaluation_changes_only_the_summary_and_tensorboard(run, monkeypatch):
    monkeypatch.setattr(ppo.RunningNorm, "update", lambda *args: pytest.fail("a normaliser is not frozen"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    returns_of(run)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert [path.name for path in before if before[path] != after[path]] == ["summary.json"]
    assert all(path.name.startswith("events.out.tfevents.") for path in after.keys() - before.keys())


def test_evaluation_depends_on_its_seed_and_on_nothing_else(run):
    first = returns_of(run, "--eval-stochastic")
    torch.manual_seed(99), np.random.seed(99)
    assert returns_of(run, "--eval-stochastic") == first
    assert returns_of(run, "--eval-stochastic", "--eval-seed", "5") != first
    assert len(set(first)) > 1
    assert set(summary(run)["eval"]) == {"stochastic"}


def test_training_does_not_notice_an_evaluation(here):
    start(name="whole", iterations=6)
    _, run = start(iterations=4)  # of the same arguments but the budget, which only the learning rate knows
    path = run / "checkpoints" / "step_000000000512.pt"
    state = torch.load(path, weights_only=True)
    returns_of(run)
    assert same(torch.load(path, weights_only=True), state) and summary(run)["global_step"] == 512


def test_evaluation_plays_the_checkpoint_that_is_given(run):
    paths = sorted((run / "checkpoints").glob("step_*.pt"))
    blind = torch.load(paths[0], weights_only=True)
    for name, tensor in blind["agent"].items():
        if name.startswith("actor.last"):
            tensor.zero_()
    blind["agent"]["actor.last.bias"][0] = 1.0  # always to the left: the pole falls in 8 to 10 steps
    torch.save(blind, paths[0])
    left = returns_of(paths[0])
    assert max(left) <= 11 and summary(run)["eval"]["deterministic"]["iteration"] == blind["iteration"]
    assert returns_of(run) == returns_of(paths[1]) != left


# ------------------------------------------------------------------------------------------ terminal and process
QUIET = {
    "CartPole-v1": ["--num-steps", "64"],
    "HalfCheetah-v4": ["--num-steps", "64"],
    "PongNoFrameskip-v4": ["--num-steps", "4"],
}


@pytest.mark.parametrize("env_id", QUIET)
def test_normal_run_prints_plain_lines_and_no_warning(env_id, tmp_path):
    flags = ["--env-id", env_id, *SMALL, *QUIET[env_id], "--total-timesteps", "256", "--run-name", "run"]
    flags[-3] = str(4 * 2 * int(QUIET[env_id][1]))
    done = process("-W", "default", SCRIPT, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, understood, *progress, last = done.stdout.splitlines()
    assert understood.startswith("observes Box(") and len(understood) <= 80
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert first.startswith("runs/run (cpu, ") and re.match(r"completed after \d+ steps: runs/run", last)
    assert progress and all(re.match(r" *[\d,]+ steps +\d+% +[\d,]+/s  return .* left$", line) for line in progress)


def test_progress_line_fits_and_renews_itself_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, SCRIPT, *SMALL, "--total-timesteps", "2560", "--run-name", "run"]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 4096):
            output += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0
    first, understood, *bars, last = output.decode().replace("\r\n", "\n").strip().split("\n")
    renewed = "".join(bars).replace("\x1b[K", "").split("\r")[1:]
    assert len(bars) == 1 and len(renewed) > 1 and last.startswith("completed after 2,560 steps")
    assert all(line.startswith("[") and len(line) <= 80 for line in renewed) and "100%" in renewed[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress_line(monkeypatch, global_step, total, sps, score):
    """What a run in this state prints on a terminal."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        run = SimpleNamespace(global_step=global_step, total=total, sps=lambda: sps, score=lambda: score, headline="")
        run.unit, run.gathered, run.episodes, run.progress = "steps", [{}], [], ppo.Progress()
        run.wall_time, run.files = lambda: 1.0, SimpleNamespace(row=lambda *values: None)
        ppo.Run.write_row(run)
        return sys.stdout.getvalue()


def test_progress_line_of_a_long_run_fits_80_columns(monkeypatch):
    line = progress_line(monkeypatch, 10_000, 50_000_000, 150.0, -123_456.7)
    assert len(line.strip("\r\n").removesuffix("\x1b[K")) <= 80, line


def test_progress_line_leaves_nothing_of_a_longer_one_before(monkeypatch):
    longer = progress_line(monkeypatch, 1_000, 10_000_000, 100.0, -12_345.6)
    shorter = progress_line(monkeypatch, 1_000_000, 10_000_000, 10_000.0, 1.0)
    assert "\x1b[K" in shorter or len(shorter) >= len(longer)


def test_help_shows_the_defaults_of_the_family(capsys):
    def default_of(flag, *argv):
        with pytest.raises(SystemExit) as end:
            ppo.main(["--help", *argv])
        assert end.value.code == 0
        text = re.sub(r"\s+", " ", re.sub(r"[│╭╰─╮╯]|\x1b\[[\d;]*m", " ", capsys.readouterr().out))
        return re.search(rf" --{flag}\b.*?\(default: (.*?)\)", text)[1]

    mujoco = ppo.FAMILIES["mujoco"]
    assert default_of("num-minibatches") == str(ppo.Args.num_minibatches) != str(mujoco["num_minibatches"])
    assert default_of("num-minibatches", "--env-id", "HalfCheetah-v5") == str(mujoco["num_minibatches"])
    assert default_of("total-timesteps", "--env-id", "HalfCheetah-v5") == "1000000"
    assert default_of("env-id", "--env-id", "HalfCheetah-v5") == "HalfCheetah-v5"
    assert default_of("clip-coef", "--env-id", "ALE/Pong-v5") == "0.1"


def test_explicit_flags_win_over_the_defaults_of_the_family():
    family = ppo.parse_args(["--env-id", "HalfCheetah-v5"])
    assert family.norm_obs and family.norm_reward and family.num_minibatches != 4
    chosen = ppo.parse_args(["--num-minibatches", "4", "--no-norm-obs", "--env-id=HalfCheetah-v5"])
    assert (chosen.num_minibatches, chosen.norm_obs) == (4, False)  # also where they are the general default
    assert vars(chosen) == vars(family) | dict(num_minibatches=4, norm_obs=False)


def test_importing_the_script_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import ppo"
    done = process("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
