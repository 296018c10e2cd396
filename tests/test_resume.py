"""A run that was stopped, at whatever moment, goes on as if it had not; and no run pays for its checkpoints."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run_directory import here, newest, rows, same, timeless

import ppo

__all__ = ["here"]  # a fixture
SCRIPTS = ("ppo", "a2c", "a3c", "trpo", "reinforce")
COMMON = "--device cpu --compile off --num-threads 1"
BRIEF = {  # one cheap update per iteration
    "ppo": "--num-minibatches 1 --update-epochs 1",
    "a2c": "",
    "a3c": "--num-workers 1",
    "trpo": "--num-minibatches 1 --update-epochs 1 --cg-iters 2",
    "reinforce": "",
}
every_script = pytest.mark.parametrize("name", SCRIPTS)


def start(name, run, *flags):
    """Trains in this process, and returns the run directory."""
    argv = [*COMMON.split(), *BRIEF[name].split(), "--run-name", run, *" ".join(flags).split()]
    assert importlib.import_module(name).main(argv) == 0
    return Path("runs") / run


def forget_the_end(run):
    """Leaves the run as it was at the last checkpoint but one."""
    max((run / "checkpoints").glob("step_*.pt")).unlink()
    (run / "summary.json").unlink()


# ------------------------------------------------------------------------------------- what checkpoints do not cost
COIN = {
    "ppo": "--num-envs 8 --num-steps 128 --total-timesteps 81920 --checkpoint-interval",
    "a2c": "--num-envs 8 --num-steps 64 --total-timesteps 81920 --checkpoint-interval",
    "a3c": "--num-envs 8 --num-steps 64 --total-timesteps 81920 --checkpoint-interval",
    "trpo": "--num-envs 8 --num-steps 128 --total-timesteps 81920 --checkpoint-interval",
    "reinforce": "--num-envs 8 --num-steps 2000 --total-timesteps 81920 --checkpoint-interval",
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x == "a3c" else x for x in SCRIPTS])
def test_what_is_measured_is_not_bent_by_how_often_it_is_saved(name, here):
    flags = f"--env-id odd_envs:Odd/Coin-v0 {COIN[name]}"
    often = start(name, "often", flags, "1" if name == "reinforce" else "3")
    never = start(name, "never", flags, "1000000")
    returns = [float(row["return"]) for row in rows(often, "episodes")]
    assert set(returns) == {200, 1200} and len(returns) > 80
    assert abs(np.mean(returns) - 700) < 4 * 500 / len(returns) ** 0.5
    assert timeless(often, "episodes") == timeless(never, "episodes")
    assert same(newest(often)["agent"], newest(never)["agent"])


@every_script
def test_episodes_that_outlast_the_interval_between_checkpoints_are_counted(name, here):
    run = start(name, "run", "--env-id odd_envs:Odd/Long-v0 --num-envs 2 --num-steps 100 --total-timesteps 8200")
    episodes = rows(run, "episodes")
    assert len(episodes) >= 4
    assert {(float(row["return"]), int(row["length"])) for row in episodes} == {(2000, 2000)}


# ------------------------------------------------------------------------------------------------ kill and go on
def run_script(name, argv, output):
    """What a process does; of its own, so that it can be killed."""
    with open(output, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        torch.set_num_threads(1)
        status = importlib.import_module(name).main(argv)
    raise SystemExit(status)


@pytest.fixture(scope="module")
def processes():
    """Processes begin as forks of one that has imported all and computed nothing, which saves seconds for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume", *SCRIPTS, "sac"])
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:  # it imports the scripts beside these tests, not installed ones
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))))
        forkserver.ensure_running()
    return context


KILLED = {  # seconds each
    "ppo CartPole-v1": "--num-envs 4 --num-steps 128 --total-timesteps 10240",
    "ppo Pendulum-v1": "--num-envs 4 --num-steps 128 --total-timesteps 10240 --norm-reward",
    "ppo HalfCheetah-v5": "--num-envs 2 --num-steps 96 --total-timesteps 4800 --num-minibatches 4",
    "ppo odd_envs:Odd/Coin-v0": "--num-envs 4 --num-steps 100 --total-timesteps 12000",
    "ppo ALE/Pong-v5": "--num-envs 2 --num-steps 16 --total-timesteps 320 --num-minibatches 1 --update-epochs 1",
    "ppo PongNoFrameskip-v4": "--num-envs 2 --num-steps 16 --total-timesteps 320 --num-minibatches 1 --update-epochs 1",
    "a2c CartPole-v1": "--num-envs 4 --num-steps 8 --total-timesteps 9600 --log-interval 1",
    "a3c CartPole-v1": "--num-workers 1 --num-envs 4 --num-steps 8 --total-timesteps 9600 --log-interval 1",
    "trpo CartPole-v1": "--num-envs 4 --num-steps 128 --total-timesteps 10240",
    "reinforce CartPole-v1": "--num-envs 4 --num-steps 100 --total-timesteps 20480",
    "sac odd_envs:Odd/Slide-v0": "--num-envs 2 --total-timesteps 4000 --buffer-size 300 --learning-starts 100"
    " --updates-per-step 0.05 --batch-size 16 --log-interval 50",
}


OFTEN = [case for case in KILLED if case not in ("ppo CartPole-v1", "ppo ALE/Pong-v5", "a3c CartPole-v1")]


@pytest.mark.parametrize("case", [pytest.param(x, marks=[] if x in OFTEN else pytest.mark.slow) for x in KILLED])
def test_run_that_was_killed_again_and_again_equals_one_that_was_not(case, processes, here):
    name, env_id = case.split()
    flags = [*COMMON.split(), "--env-id", env_id, *KILLED[case].split(), "--run-name"]
    whole, killed = Path("runs/whole"), Path("runs/killed")
    child = processes.Process(target=run_script, args=(name, [*flags, "whole"], "whole.txt"))
    child.start()
    child.join()
    assert child.exitcode == 0, Path("whole.txt").read_text()
    needed = json.loads((whole / "summary.json").read_text())["wall_time"]

    moments, kills, resumed = random.Random(case), [], 0
    while True:
        if list(killed.glob("checkpoints/step_*.pt")):
            command = ["--resume", str(killed)]
            resumed += 1
        else:
            shutil.rmtree(killed, ignore_errors=True)
            command = [*flags, "killed"]
        sessions = len(list(killed.glob("events*")))
        child = processes.Process(target=run_script, args=(name, command, "killed.txt"))
        child.start()
        while child.exitcode is None and len(list(killed.glob("events*"))) == sessions:
            child.join(0.02)  # it is not training yet
        child.join(moments.uniform(0, 0.4) * needed if len(kills) < 3 else None)
        if child.exitcode is None:
            kills.append(moments.choice([signal.SIGKILL, signal.SIGTERM]))
            child.kill() if kills[-1] == signal.SIGKILL else child.terminate()
            child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode in (-signal.SIGKILL, 143, -signal.SIGTERM), Path("killed.txt").read_text()

    told = Path("killed.txt").read_text()
    assert "not exactly" not in told and "corrupt" not in told, told
    # What SIGKILL ended may not have come to tell it; a run that was short of a checkpoint began again.
    assert resumed > 0 and told.count("exactly as if it had never stopped") >= resumed - kills.count(signal.SIGKILL), (
        told
    )
    one, other = newest(whole), newest(killed)
    # A checkpoint that SIGTERM forces may be the best one; digits of the clock count in the length of a file.
    for key in one.keys() - {"wall_time", "csv", "best"}:
        assert same(one[key], other[key]), key
    assert len(timeless(whole, "episodes")) > 3 or "Pong" in env_id
    assert timeless(whole, "episodes") == timeless(killed, "episodes")
    assert timeless(whole, "progress") == timeless(killed, "progress")


# ----------------------------------------------------------------------------------------------- what is not exact
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "a3c"])  # a worker runs ahead of what is logged
@pytest.mark.parametrize("num_steps", [30, 40])  # the second ends with episodes
def test_environment_that_carries_something_over_goes_on_and_says_not_exactly(name, num_steps, here, capsys):
    size = f"--num-envs 2 --num-steps {num_steps} --checkpoint-interval 1 --total-timesteps {8 * num_steps}"
    run = start(name, "run", "--env-id odd_envs:Odd/Tally-v0", size)
    forget_the_end(run)
    before = newest(run)["global_step"]
    capsys.readouterr()
    assert importlib.import_module(name).main(["--resume", str(run)]) == 0
    sentence = f"goes on from step {before:,}, but not exactly: environment 0 does not repeat its rewards\n"
    assert before > 0 and sentence in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "odd_envs:Odd/Coin-v0"])  # the second observes nothing
def test_episode_too_long_to_be_saved_goes_on_and_says_not_exactly(env_id, here, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "LONGEST", 50)
    size = "--num-envs 2 --num-steps 30 --checkpoint-interval 1 --total-timesteps 240"
    run = start("ppo", "run", "--env-id", env_id, size)
    forget_the_end(run)
    capsys.readouterr()
    assert ppo.main(["--resume", str(run)]) == 0
    assert "goes on from step 180, but not exactly: " in capsys.readouterr().out


CONDITIONS = ["torch", "numpy", "processor", "script"]


@pytest.mark.parametrize("names", [[name] for name in CONDITIONS] + [CONDITIONS])
def test_other_conditions_are_named(names, here, capsys):
    run = start("ppo", "run", "--num-envs 2 --num-steps 30 --checkpoint-interval 1 --total-timesteps 240")
    forget_the_end(run)
    path = max((run / "checkpoints").glob("step_*.pt"))
    state = torch.load(path, weights_only=True)
    state["conditions"] |= dict.fromkeys(names, "another")
    torch.save(state, path)
    capsys.readouterr()
    assert ppo.main(["--resume", str(run)]) == 0
    differences = ", ".join(f"another {name}" for name in names)
    assert f"goes on from step 180, but not exactly: {differences}\n" in capsys.readouterr().out


def test_another_number_of_threads_is_allowed_and_named(here, capsys):
    run = start("ppo", "run", "--num-envs 2 --num-steps 30 --checkpoint-interval 1 --total-timesteps 240")
    forget_the_end(run)
    capsys.readouterr()
    assert ppo.main(["--resume", str(run), "--num-threads", "2"]) == 0
    assert "goes on from step 180, but not exactly: another num_threads\n" in capsys.readouterr().out
