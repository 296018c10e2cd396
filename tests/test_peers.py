"""benchmarks/peers.py: files as of the scripts, raw returns, resume, evaluation, protocols, hyperparameters, errors."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ale_py.env
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo
from benchmarks import peers
from benchmarks.arguments import arguments_of
from benchmarks.jobs import ROOT, has_checkpoint
from ppo import UsageError

ALGOS = ("sb3:ppo", "sb3:a2c", "sb3:trpo", "sb3:sac", "random")
SMALL = {  # two environments; an iteration is 64 steps, for A2C 10
    "sb3:ppo": "--n-envs 2 --n-steps 32 --batch-size 32 --n-epochs 2",
    "sb3:a2c": "--n-envs 2",
    "sb3:trpo": "--n-envs 2 --n-steps 32 --batch-size 32 --n-critic-updates 2",
    "sb3:sac": "--n-envs 2 --learning-starts 64 --batch-size 16 --train-freq 4",
    "random": "--n-envs 2 --n-steps 32",
}
BOXES = {  # what SAC plays instead of an environment with discrete actions
    "CartPole-v1": "InvertedPendulum-v5",
    "Rising-v0": "RisingBox-v0",
    "Risingraise-v0": "RisingraiseBox-v0",
}


class Rising(gym.Env):
    """Episodes of 5 steps, the k-th of an environment's life with a return of 10 k; later, what `bad` says."""

    def __init__(self, bad="", actions=None):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (3,)), actions or spaces.Discrete(2)
        self.bad, self.episode = bad, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        if self.bad == "raise" and self.episode > 10:
            raise ValueError("the gripper broke")
        reward = np.nan if self.bad == "nan" and self.episode > 10 else 2.0 * self.episode
        return np.full(3, 0.1 * self.t, dtype=np.float32), reward, self.t == 5, False, {}


class Coin(gym.Env):
    """Episodes of 20 or of 120 steps, by a coin, with a point for each step."""

    def __init__(self):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = (20, 120)[self.np_random.integers(2)]
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(3, dtype=np.float32), 1.0, self.left == 0, False, {}


class Opened(gym.Env):
    """Counts in `open` who is not closed. Episodes of 5 steps; what goes wrong, and when, is `bad`."""

    open: list["Opened"] = []
    made = 0

    def __init__(self, bad="", length=5):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)
        self.bad, self.length, self.life = bad, length, 0
        Opened.made += 1
        if bad == "third" and Opened.made == 3:
            raise KeyError("level")
        self.open.append(self)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action):
        self.t, self.life = self.t + 1, self.life + 1
        if self.life == 100 and self.bad in ("raise", "exit"):
            raise {"raise": ValueError, "exit": SystemExit}[self.bad]("the gripper broke")
        return np.zeros(3, dtype=np.float32), 1.0, self.t == self.length, False, {}

    def close(self):
        self.open.remove(self)  # a second time it raises
        if self.bad == "close":
            raise RuntimeError("the server is gone")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, the current one of the test, Rising and Coin among the environments, short iterations of SAC."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(peers.ITERATION, "sb3:sac", 100)
    Opened.made, Opened.open[:] = 0, []
    for bad in ("", "raise", "exit", "third", "close"):
        gym.register(f"Opened{bad}-v0", Opened, kwargs=dict(bad=bad))
    gym.register("Endless-v0", Opened, kwargs=dict(length=10**9))
    gym.register("Coin-v0", Coin)
    for bad in ("", "nan", "raise"):
        gym.register(f"Rising{bad}-v0", Rising, kwargs=dict(bad=bad))
        gym.register(f"Rising{bad}Box-v0", Rising, kwargs=dict(bad=bad, actions=spaces.Box(-1, 1, (2,))))
    yield tmp_path
    for name in ("Coin", "Endless", *(f"Opened{bad}" for bad in ("", "raise", "exit", "third", "close"))):
        del gym.registry[f"{name}-v0"]
    for bad in ("", "nan", "raise"):
        del gym.registry[f"Rising{bad}-v0"], gym.registry[f"Rising{bad}Box-v0"]


def start(algo, *flags, steps=640, name="run", env_id="Rising-v0"):
    """Trains a small run in this process; returns the exit status and the run directory."""
    env_id = BOXES.get(env_id, env_id) if algo == "sb3:sac" else env_id
    where = ["--env-id", env_id, "--total-timesteps", str(steps), "--run-name", name, "--checkpoint-interval", "2"]
    return peers.main([algo, *SMALL[algo].split(), *where, *flags]), Path("runs") / name


def rows(run, name):
    with open(run / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def timeless(run):
    return [(row["global_step"], row["return"], row["length"]) for row in rows(run, "episodes")]


def read(run, name):
    return json.loads((run / f"{name}.json").read_text())


def process(*words, cwd, **options):
    """The peers' command line as a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.peers", *words]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ----------------------------------------------------------------------------------------------------- the files
@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of ppo.py, evaluated both ways."""
    where = tmp_path_factory.mktemp("ours")
    small = "--num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1 --total-timesteps 640 --compile off"
    assert ppo.main([*small.split(), "--runs-dir", str(where), "--run-name", "run"]) == 0
    for flags in ([], ["--eval-stochastic"]):
        assert ppo.main(["--evaluate", str(where / "run"), "--eval-episodes", "3", *flags]) == 0
    return where / "run"


@pytest.mark.parametrize("algo", ALGOS)
def test_the_run_directory_is_that_of_a_script(algo, ours):
    status, run = start(algo, env_id="CartPole-v1")
    for flags in ([], ["--eval-stochastic"]):
        assert peers.main([algo, "--evaluate", str(run), "--eval-episodes", "3", *flags]) == 0
    assert status == 0 and has_checkpoint(run)
    assert {path.name.split(".")[0] for path in run.iterdir()} == {path.name.split(".")[0] for path in ours.iterdir()}

    def shape(content):
        return {key: shape(value) if isinstance(value, dict) else type(value) for key, value in content.items()}

    assert shape(read(run, "summary")) == shape(read(ours, "summary"))
    assert read(run, "summary")["status"] == "completed" and read(run, "summary")["global_step"] == 640
    theirs, config = read(run, "config"), read(ours, "config")
    assert set(theirs) == set(config)
    assert {key: theirs["args"][key] for key in ("env_id", "exp_name", "seed", "total_timesteps", "num_threads")} == {
        "env_id": "CartPole-v1" if algo != "sb3:sac" else BOXES["CartPole-v1"],
        "exp_name": algo,
        "seed": 1,
        "total_timesteps": 640,
        "num_threads": 1,
    }
    assert ("stable-baselines3" in theirs["versions"]) == (algo != "random")
    assert set(config["versions"]) <= set(theirs["versions"])

    assert list(rows(run, "episodes")[0]) == list(rows(ours, "episodes")[0])
    progress = rows(run, "progress")
    assert list(progress[0])[:5] == list(rows(ours, "progress")[0])[:5]
    assert progress[-1]["global_step"] == "640"
    scalars = set(EventAccumulator(str(run)).Reload().Tags()["scalars"])
    assert scalars == {*progress[0], "eval/episodic_return"} - {"global_step", "wall_time", "sps"}
    expected = {"policy_loss", "value_loss", "explained_variance"} if algo not in ("random", "sb3:sac") else set()
    expected |= {"qf_loss", "actor_loss", "alpha"} if algo == "sb3:sac" else set()
    expected |= {"entropy"} if algo in ("sb3:ppo", "sb3:a2c") else set()
    expected |= {"approx_kl", "clipfrac"} if algo == "sb3:ppo" else set()
    assert {f"losses/{name}" for name in expected} <= scalars
    losses = [tag for tag in progress[0] if tag.startswith("losses/")]
    assert len(losses) >= len(expected) and all(np.isfinite(float(row[tag])) for row in progress for tag in losses)


@pytest.mark.parametrize("algo", ALGOS)
def test_episodes_are_the_environments_own(algo):
    clip = [] if algo == "random" else ["--clip-reward", "--norm-reward", "--norm-obs"]  # for the learner alone
    _, run = start(algo, *clip)
    expected = [(str(10 * k), str(10.0 * k), "5") for k in range(1, 65) for _ in range(2)]
    assert timeless(run) == expected
    assert read(run, "summary")["train_last100"] == np.mean([10.0 * k for k in range(15, 65)])


@pytest.mark.parametrize("algo", ["sb3:ppo", "random"])
def test_episodes_longer_than_the_time_between_checkpoints_are_counted(algo):
    epochs = [] if algo == "random" else ["--n-epochs", "1"]
    _, run = start(algo, *epochs, steps=8_000, env_id="Coin-v0")  # a checkpoint every 64 steps of an environment
    returns = [float(row["return"]) for row in rows(run, "episodes")]
    assert set(returns) == {20.0, 120.0} and all(
        float(row["length"]) == float(row["return"]) for row in rows(run, "episodes")
    )
    assert len(returns) > 80 and abs(np.mean(returns) - 70.0) < 3 * 50.0 / len(returns) ** 0.5
    assert sum(returns) > 8_000 - 2 * 120  # all steps but those of the episodes in play


@pytest.mark.parametrize("algo", ALGOS)
def test_a_run_repeats_itself_and_another_seed_does_not(algo):
    one, same, other = (
        timeless(start(algo, "--seed", seed, name=name, env_id="CartPole-v1")[1])
        for name, seed in (("one", "3"), ("same", "3"), ("other", "4"))
    )
    assert one == same != other


def test_what_a_run_takes_is_in_its_config():
    linear = ["--learning-rate", "lin_1e-3", "--no-normalize-advantage", "--policy_kwargs", '{"net_arch": [8]}']
    _, run = start("sb3:ppo", *linear, "--clip-range=0.3", steps=128)
    args, signature = read(run, "config")["args"], peers.library_defaults("sb3:ppo")
    assert set(signature) <= set(args)
    assert args["learning_rate"] == "lin_1e-3" and args["clip_range"] == 0.3 and args["gae_lambda"] == 0.95
    assert args["normalize_advantage"] is False and args["n_steps"] == 32 and args["policy"] == "MlpPolicy"
    assert args["policy_kwargs"]["net_arch"] == [8] and args["policy_kwargs"]["optimizer_kwargs"] == {"eps": 1e-5}
    assert [float(row["charts/learning_rate"]) for row in rows(run, "progress")] == pytest.approx([5e-4, 0.0])


def test_the_explained_variance_is_the_librarys(monkeypatch):
    from stable_baselines3.common.logger import Logger

    theirs, record = [], Logger.record

    def watched(self, key, value, **options):
        theirs.extend([value] * (key == "train/explained_variance"))
        return record(self, key, value, **options)

    monkeypatch.setattr(Logger, "record", watched)
    _, run = start("sb3:ppo", env_id="CartPole-v1")
    assert [float(row["losses/explained_variance"]) for row in rows(run, "progress")] == pytest.approx(theirs, abs=1e-4)


# --------------------------------------------------------------------------------------- how a run stops and goes on
@pytest.mark.parametrize("algo", ALGOS)
def test_resume_continues_the_files(algo, capsys):
    linear = [] if algo == "random" else ["--learning-rate", "lin_1e-3"]
    steps = 640
    apart = ["--checkpoint-interval", "33"] if algo == "sb3:a2c" else []  # so that some episodes end in between
    _, run = start(algo, *linear, *apart, env_id="CartPole-v1", steps=steps)
    whole, unbroken = rows(run, "progress"), timeless(run)
    newest = max((run / "checkpoints").glob("step_*"))
    newest.unlink()  # as if it had been killed before
    (run / "summary.json").unlink()
    saved = int(max((run / "checkpoints").glob("step_*")).stem[5:])
    assert 0 < saved < steps
    before = [row for row in timeless(run) if int(row[0]) <= saved]
    assert peers.main([algo, "--resume", str(run)]) == 0
    how = "exactly as if" if algo == "random" else "but not exactly: Stable-Baselines3 does not resume exactly"
    assert f"goes on from step {saved:,}, {how}" in capsys.readouterr().out
    assert timeless(run)[: len(before)] == before and len(timeless(run)) > len(before)
    if algo == "random":
        assert timeless(run) == unbroken
    assert all(int(row[0]) > saved for row in timeless(run)[len(before) :])
    again = rows(run, "progress")
    assert [row["global_step"] for row in again] == [row["global_step"] for row in whole]
    assert (np.diff([float(row["wall_time"]) for row in again]) >= 0).all()  # in milliseconds, so it may stand still
    if linear:  # the schedule of the whole budget
        assert [row["charts/learning_rate"] for row in again] == [row["charts/learning_rate"] for row in whole]
    assert read(run, "summary")["status"] == "completed" and read(run, "summary")["global_step"] == steps
    told, after = read(run, "summary"), [rows(run, name) for name in ("episodes", "progress")]
    (run / "summary.json").unlink()  # as if it had been killed just before
    assert peers.main(["--resume", str(run)]) == 0
    assert [rows(run, name) for name in ("episodes", "progress")] == after
    for key in ("status", "global_step", "train_last100"):
        assert read(run, "summary")[key] == told[key], key
    assert read(run, "summary")["sps"] > 0
    assert peers.main(["--resume", str(run)]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def loaded(args, num_envs, path):
    library = peers.Library(args, num_envs)
    library.load_state_dict(ppo.load_checkpoint(path)["player"])
    return library


def test_resume_brings_back_model_and_normaliser():
    _, run = start("sb3:ppo", "--norm-obs", "--norm-reward", steps=128)
    args = peers.parse_args(["--resume", str(run)])
    model = loaded(args, args.n_envs, run).model
    envs = model.get_vec_normalize_env()
    # every environment's observations are 0 to 0.5 in steps of 0.1, so 2.5 tenths on average
    assert model.num_timesteps == 128 and envs.training
    assert envs.obs_rms.count == pytest.approx(128 + 2) and 0.15 < envs.obs_rms.mean[0] < 0.25
    assert model.policy.optimizer.state_dict()["state"][0]["step"] == 8  # 2 iterations, 2 epochs, 2 minibatches


def test_sac_resumes_with_its_temperature_and_fills_an_empty_buffer_before_it_learns(monkeypatch):
    _, run = start("sb3:sac", steps=312, env_id="Pendulum-v1")
    args = peers.parse_args(["--resume", str(run)])
    library = loaded(args, args.n_envs, run)
    alpha = [float(row["losses/alpha"]) for row in rows(run, "progress")]
    assert 0 < library.temperature.exp() < alpha[-1] < alpha[0] < 1  # it falls from 1
    assert library.model.replay_buffer.size() == 0

    from stable_baselines3 import SAC

    sizes, train = [], SAC.train

    def watched(model, **options):
        sizes.append(model.replay_buffer.size() * 2)
        train(model, **options)

    monkeypatch.setattr(SAC, "train", watched)
    start("sb3:sac", steps=312, name="other", env_id="Pendulum-v1")
    assert sizes == list(range(72, 320, 8))  # after 64 random steps
    newest = max((run / "checkpoints").glob("step_*"))
    newest.unlink()  # as if it had been killed before
    (run / "summary.json").unlink()
    sizes.clear()
    assert peers.main(["--resume", str(run)]) == 0
    assert sizes == [72, 80, 88, 96, 104] and read(run, "summary")["global_step"] == 312


def test_a_budget_of_sac_that_ends_before_it_learns_ends_all_the_same():
    status, run = start("sb3:sac", steps=48, env_id="Pendulum-v1")
    assert status == 0 and [row["global_step"] for row in rows(run, "progress")] == ["48"]
    assert float(rows(run, "progress")[0]["charts/learning_rate"]) == 3e-4


def test_sac_evaluates_without_memory_for_a_buffer():
    _, run = start("sb3:sac", steps=104, env_id="Pendulum-v1")
    args = peers.parse_args(["--evaluate", str(run)])
    assert args.buffer_size == 1_000_000 and loaded(args, 8, run).model.replay_buffer.buffer_size == 1000 // 8


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_serves(capsys):
    _, run = start("sb3:a2c", steps=2000)
    (run / "summary.json").unlink()
    newest = max((run / "checkpoints").glob("step_*"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    assert peers.main(["--resume", str(run)]) == 0
    assert f"{newest} is corrupt" in capsys.readouterr().err
    assert read(run, "summary")["global_step"] == 2000


@pytest.mark.parametrize("algo", ["sb3:ppo", "random"])
def test_a_signal_saves_and_the_run_goes_on(algo, here):
    words = [algo, *SMALL[algo].split(), "--total-timesteps", "1000000000", "--run-name", "run"]
    child, run = process(*words, cwd=here), here / "runs" / "run"
    while not (run / "progress.csv").exists() or not rows(run, "progress"):
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 143 and not err
    steps = read(run, "summary")["global_step"]
    assert read(run, "summary")["status"] == "interrupted" and f"interrupted after {steps:,} steps" in out
    assert (run / "checkpoints" / f"step_{steps:012}.pt").exists()
    assert rows(run, "progress")[-1]["global_step"] == str(steps)
    config = read(run, "config")
    config["args"]["total_timesteps"] = steps + 64
    (run / "config.json").write_text(json.dumps(config))
    assert peers.main([algo, "--resume", str(run)]) == 0
    assert read(run, "summary")["global_step"] == steps + 64


@pytest.mark.parametrize("algo", ALGOS)
def test_an_environment_that_breaks(algo, capsys):
    status, run = start(algo, env_id="Risingraise-v0")
    assert status == 1 and read(run, "summary")["status"] == "failed"
    error = capsys.readouterr().err
    assert error.startswith("error: iteration ") and "the gripper broke" in error and error.count("\n") == 1
    assert read(run, "summary")["error"] in error and has_checkpoint(run)


def test_rewards_that_are_not_numbers_diverge(capsys):
    status, run = start("sb3:ppo", env_id="Risingnan-v0")
    assert status == 1 and read(run, "summary")["status"] == "diverged"
    error = capsys.readouterr().err
    assert error.startswith("error: iteration 2: ") and re.search("is nan|not finite", error) and error.count("\n") == 1
    for file in (run / "checkpoints").glob("step_*"):
        args = peers.parse_args(["--evaluate", str(file)])
        policy = loaded(args, 2, file).model.policy
        assert all(parameter.isfinite().all() for parameter in policy.parameters())


# ------------------------------------------------------------------------------------------- what is opened is closed
@pytest.mark.parametrize("algo", ["sb3:ppo", "random"])
@pytest.mark.parametrize(
    "bad, status, says",
    [
        ("", 0, ""),
        ("raise", 1, "the gripper broke"),
        ("exit", 1, "the gripper broke"),
        ("third", 2, "level"),
        ("close", 0, "the server is gone"),
    ],
)
def test_environments_are_closed_on_every_way_out(algo, bad, status, says, capsys):
    flags = ["--n-envs", "3"]
    ended, run = start(algo, *flags, env_id=f"Opened{bad}-v0")
    error = capsys.readouterr().err
    assert ended == status and says in error and "Traceback" not in error
    assert Opened.made >= 3 and not Opened.open
    assert run.exists() == (status != 2)
    if status == 0:
        assert read(run, "summary")["status"] == "completed"
        assert len(peers.evaluate(peers.parse_args(["--evaluate", str(run), "--eval-episodes", "2"]))) == 2
        assert not Opened.open


def test_environments_are_closed_where_the_library_refuses():
    assert start("sb3:ppo", "--batch-size", "1", env_id="Opened-v0")[0] == 2
    assert Opened.made and not Opened.open


# --------------------------------------------------------------------------------------------------------- pickles
def test_no_pickle_is_read(monkeypatch):
    _, run = start("sb3:ppo", "--norm-obs", steps=128)

    def refuse(*_, **__):
        raise AssertionError("a pickle is read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr("cloudpickle.loads", refuse)
    assert peers.main(["--resume", str(run)]) == 0
    assert peers.main(["--evaluate", str(run), "--eval-episodes", "1"]) == 0


def test_a_checkpoint_of_another_form_is_one_sentence(capsys):
    _, run = start("sb3:ppo", steps=64)
    for file in (run / "checkpoints").glob("step_*"):
        state = torch.load(file, weights_only=True)
        torch.save(state | {"player": {"model": torch.zeros(3, dtype=torch.uint8)}}, file)
    for words in (["--resume", str(run)], ["--evaluate", str(run)]):
        capsys.readouterr()
        assert peers.main(words) == 2
        error = capsys.readouterr().err
        *named, last = error.splitlines()
        assert all("is not a checkpoint of this run (" in line for line in named)
        assert last.startswith("error: runs/run has no checkpoint that can be used.")


# ---------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("algo", ["sb3:ppo", "random"])
def test_an_evaluation_that_would_not_end(algo, capsys):
    _, run = start(algo, steps=64, env_id="Endless-v0")
    assert peers.main(["--evaluate", str(run), "--eval-max-steps", "300", "--eval-episodes", "3"]) == 1
    said = capsys.readouterr()
    assert re.match(r"error: Endless-v0: an episode of environment \d did not end within 300 steps", said.err)
    assert "0 of 3 episodes ended" in said.err and said.err.count("\n") == 1
    assert "eval" not in read(run, "summary")


def test_episodes_that_ended_are_told_where_one_does_not(capsys):
    _, run = start("sb3:ppo", steps=64, env_id="Coin-v0")
    assert peers.main(["--evaluate", str(run), "--eval-max-steps", "100", "--eval-episodes", "40"]) == 1
    said = capsys.readouterr()
    ended = int(re.search(r"(\d+) deterministic episodes: mean 20.00, std 0.00", said.out)[1])
    assert 0 < ended < 40 and f"{ended} of 40 episodes ended" in said.err


def test_evaluation_is_fair_to_long_episodes_and_changes_nothing(capsys):
    _, run = start("sb3:ppo", "--norm-obs", steps=128)
    files = {path: path.read_bytes() for path in run.rglob("*.pt")} | {run: (run / "episodes.csv").read_bytes()}
    args = peers.parse_args(["--evaluate", str(run), "--eval-episodes", "11"])
    assert peers.evaluate(args) == [10.0, 20.0] * 3 + [10.0] * 5  # shares of 8 environments
    assert "11 deterministic episodes: mean 12.73" in capsys.readouterr().out
    result = read(run, "summary")["eval"]["deterministic"]
    assert result == dict(mean=result["mean"], std=result["std"], min=10.0, max=20.0) | dict(
        episodes=11, seed=1_000_000, iteration=2, global_step=128
    )
    assert all(path.read_bytes() == content for path, content in files.items() if path != run)
    assert (run / "episodes.csv").read_bytes() == files[run]


def test_evaluation_freezes_the_normaliser(monkeypatch):
    _, run = start("sb3:ppo", "--norm-obs", "--norm-reward", env_id="Pendulum-v1")
    libraries, make = [], peers.make_player
    monkeypatch.setattr(peers, "make_player", lambda *given: libraries.append(make(*given)) or libraries[0])
    assert len(peers.evaluate(peers.parse_args(["--evaluate", str(run), "--eval-episodes", "2"]))) == 2
    normaliser = libraries[0].model.get_vec_normalize_env()
    assert not normaliser.training and normaliser.obs_rms.count == pytest.approx(640 + 2)


def test_evaluation_repeats_itself():
    _, run = start("sb3:a2c", env_id="CartPole-v1")
    flags = ["--evaluate", str(run), "--eval-episodes", "9"]
    one, same, sampled, other = (
        peers.evaluate(peers.parse_args([*flags, *more]))
        for more in ([], [], ["--eval-stochastic"], ["--eval-seed", "7"])
    )
    assert one == same and one != sampled and one != other


# ------------------------------------------------------------------------------------------------------ protocols
def atari_args(env_id):
    return peers.parse_args(["sb3:a2c", "--env-id", env_id])


def test_atari_of_the_paper_counts_whole_games_in_raw_points(monkeypatch):
    games, step = [0.0], ale_py.env.AtariEnv.step

    def spy(self, action):
        result = step(self, action)
        games[-1] += result[1]
        games.extend([0.0] * result[2])
        return result

    monkeypatch.setattr(ale_py.env.AtariEnv, "step", spy)
    args = atari_args("SpaceInvadersNoFrameskip-v4")
    assert (args.clip_reward, args.n_envs, args.ent_coef, args.vf_coef) == (True, 16, 0.01, 0.25)
    envs = peers.library_envs(args, 1, [])
    envs.seed(0), envs.action_space.seed(0)
    observations, counted, ended, lost, steps = envs.reset(), peers.Games(envs), [], 0, 0
    assert observations.shape == (1, 84, 84, 4) and observations.dtype == np.uint8
    while len(ended) < 2:
        _, rewards, dones, _ = envs.step([envs.action_space.sample()])
        ended, lost, steps = ended + counted.ended(dones, steps), lost + int(dones[0]), steps + 1
        assert set(rewards) <= {0.0, 1.0}
    assert [episode.episodic_return for episode in ended] == games[:2] and max(games) >= 30
    assert lost == 6 and sum(episode.length for episode in ended) == steps  # three lives a game


def test_sticky_atari_is_nothing_else():
    envs = peers.library_envs(atari_args("ALE/Breakout-v5"), 1, [])
    envs.seed(0)
    envs.reset()
    ale, frames, lives = envs.unwrapped.envs[0].unwrapped.ale, [], []
    assert ale.getFloat("repeat_action_probability") == 0.25 and ale.getEpisodeFrameNumber() == 0
    dones = [False]
    for t in range(200):
        _, _, dones, _ = envs.step([t % 4])
        frames.append(ale.getEpisodeFrameNumber()), lives.append(ale.lives())
        assert bool(dones[0]) == (frames[-1] == 0)
        if dones[0]:
            break
    assert frames[:3] == [4, 8, 12] and min(lives[:-1]) < 5


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "ALE/Breakout-v5"])
def test_random_atari_plays_whole_games(env_id):
    status, run = start("random", "--n-envs", "8", "--n-steps", "64", env_id=env_id, steps=2560)
    episodes = rows(run, "episodes")
    assert status == 0 and len(episodes) >= 5
    assert all(int(row["length"]) > 100 for row in episodes)  # five lives
    assert 0.2 < np.mean([float(row["return"]) for row in episodes]) < 3.5  # 1.7 in the literature


def test_mujoco_is_normalised_and_reported_raw():
    _, run = start("sb3:ppo", env_id="InvertedPendulum-v4")
    args = read(run, "config")["args"]
    assert args["norm_obs"] and args["norm_reward"] and args["vec_normalize"]["gamma"] == args["gamma"]
    assert all(float(row["return"]) == float(row["length"]) for row in rows(run, "episodes"))  # a point for each step


def test_random_cartpole_scores_22():
    status, run = start("random", "--checkpoint-interval", "9999", "--n-envs", "8", env_id="CartPole-v1", steps=40_000)
    assert status == 0 and 21.0 < np.mean([float(row["return"]) for row in rows(run, "episodes")]) < 23.5
    assert peers.main(["random", "--evaluate", str(run), "--eval-episodes", "100"]) == 0
    assert 17.0 < read(run, "summary")["eval"]["deterministic"]["mean"] < 28.0


# ------------------------------------------------------------------------------------------------- hyperparameters
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4", "BreakoutNoFrameskip-v4"])
@pytest.mark.parametrize("name", ["ppo", "a2c", "trpo"])
def test_ours_are_mapped_or_listed(name, env_id):
    args = peers.parse_args([f"sb3:{name}", "--env-id", env_id, "--hyperparameters", "ours"])
    ours = __import__(name).parse_args(["--env-id", env_id])
    assert args.total_timesteps == ours.total_timesteps
    assert (args.n_envs, args.n_steps, args.gamma) == (ours.num_envs, ours.num_steps, ours.gamma)
    assert args.policy_kwargs["log_std_init"] == ours.log_std_init and args.norm_obs == ours.norm_obs
    assert args.learning_rate == (f"lin_{ours.learning_rate}" if ours.anneal_lr else ours.learning_rate)
    if name != "a2c":
        assert args.batch_size * ours.num_minibatches == args.n_envs * args.n_steps
    atari_trpo = {"fisher_fraction": 0.1, "ent_coef": 0.01}
    mujoco_ppo = {"log_std_end": -2.0, "recompute_advantages": True}
    unmapped = {("trpo", "BreakoutNoFrameskip-v4"): atari_trpo, ("ppo", "Hopper-v4"): mujoco_ppo}
    assert args.unmapped == unmapped.get((name, env_id), {})


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v4"])
def test_those_of_sac_are_mapped(env_id):
    args = peers.parse_args(["sb3:sac", "--env-id", env_id, "--hyperparameters", "ours"])
    ours = __import__("sac").parse_args(["--env-id", env_id])
    for name in ("total_timesteps", "buffer_size", "learning_starts", "batch_size", "tau", "gamma"):
        assert vars(args)[name] == vars(ours)[name], name
    assert (args.learning_rate, args.gradient_steps, args.train_freq) == (ours.policy_lr, 1, 1)
    assert (args.ent_coef, args.target_entropy, args.target_update_interval) == ("auto_1.0", "auto", 1)
    assert (args.norm_obs, args.norm_reward, args.clip_reward, args.unmapped) == (False, False, False, {})
    flags = "--num-envs 4 --updates-per-step 0.5 --no-autotune --alpha 0.2 --policy-frequency 2 --policy-lr 1e-3"
    words = ["sb3:sac", "--env-id", env_id, "--hyperparameters", "ours", *flags.split(), "--q-lr", "1e-3"]
    args = peers.parse_args([*words, "--target-network-frequency", "3"])
    assert (args.n_envs, args.gradient_steps, args.ent_coef, args.learning_rate) == (4, 2, 0.2, 1e-3)
    # The library counts updates from 0 in every call of train, so its interval would not do what ours does.
    assert args.target_update_interval == 1
    assert args.unmapped == {"policy_frequency": 2, "target_network_frequency": 3}


def test_theirs_of_sac_are_those_of_the_zoo():
    args = peers.parse_args(["sb3:sac", "--env-id", "HalfCheetah-v5"])
    assert (args.learning_starts, args.norm_obs, args.norm_reward, args.n_envs) == (10_000, False, False, 1)
    assert peers.parse_args(["sb3:sac", "--env-id", "Pendulum-v1"]).learning_starts == 100


def test_ours_takes_the_flags_of_the_script():
    flags = "--env-id CartPole-v1 --num-envs 4 --objective kl-fixed --target-kl 0.03 --no-norm-adv --vf-coef 1"
    args = peers.parse_args(["sb3:ppo", "--hyperparameters", "ours", *flags.split(), "--seed", "5"])
    assert args.n_envs == 4 and args.batch_size == 128 and args.target_kl == pytest.approx(0.02) and args.seed == 5
    assert args.normalize_advantage is False and args.vf_coef == 0.5 and args.unmapped == {"objective": "kl-fixed"}
    args = peers.parse_args(["sb3:a2c", "--hyperparameters", "ours", "--optimizer", "adam"])
    assert args.use_rms_prop is False and "optimizer_class" not in args.policy_kwargs


def test_value_losses_have_one_scale():
    """Weighing theirs with our mapped coefficient gives the gradient of ours, and the tag is our loss."""
    args = peers.parse_args(["sb3:ppo", "--hyperparameters", "ours"])
    ours = ppo.parse_args([])
    values, returns = torch.randn(9), torch.randn(9)
    half = ppo.value_objective(values, values, returns, ours)
    theirs = torch.nn.functional.mse_loss(returns, values)
    assert args.vf_coef * theirs == pytest.approx(ours.vf_coef * half)
    assert peers.TAGS["value_loss"][1] * theirs == pytest.approx(half)


def test_ours_runs():
    flags = "--num-envs 2 --num-steps 32 --num-minibatches 2 --total-timesteps 128 --run-name run"
    assert peers.main(["sb3:ppo", "--hyperparameters", "ours", *flags.split()]) == 0
    args = read(Path("runs/run"), "config")["args"]
    assert args["hyperparameters"] == "ours" and args["learning_rate"] == "lin_0.001" and args["n_epochs"] == 10
    assert peers.main(["--resume", "runs/run"]) == 0
    flags = "--env-id Pendulum-v1 --learning-starts 50 --batch-size 16 --total-timesteps 104 --run-name sac"
    assert peers.main(["sb3:sac", "--hyperparameters", "ours", *flags.split()]) == 0
    args = read(Path("runs/sac"), "config")["args"]
    assert args["ent_coef"] == "auto_1.0" and args["policy_kwargs"]["net_arch"] == [256, 256]
    assert peers.main(["--resume", "runs/sac"]) == 0


# ----------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    "words, says",
    [
        ("", "must be one of sb3:ppo, sb3:a2c, sb3:trpo, sb3:sac, random"),
        ("sb3:dqn", "but is sb3:dqn"),
        ("sb3:ppo --env-id CartPol-v1", "did you mean CartPole-v1?"),
        ("sb3:ppo --env-id Blackjack-v1", "Box and Discrete"),
        ("sb3:ppo --env-id Breakout-v4", "Breakout-v4"),
        ("sb3:ppo --num-envs 4", "does not take --num-envs 4"),
        ("sb3:ppo --n-steps many", "--n-steps is 'many'"),
        ("sb3:ppo --n-steps", "--n-steps: expected one argument"),
        ("sb3:ppo --gamma high", "gamma is high"),
        ("sb3:ppo --learning-rate lin_fast", "'fast'"),
        ("sb3:ppo --batch-size 1", "batch_size"),
        ("sb3:ppo --env-id FrozenLake-v1 --norm-obs", "VecNormalize"),
        ("sb3:ppo --hyperparameters ours --num-minibatches 3", "3 equal parts"),
        ("sb3:sac --env-id CartPole-v1", "Discrete(2)"),
        ("sb3:sac --env-id Pendulum-v1 --train-freq 0", "--train-freq is 0, but must be a whole number from 1"),
        ("sb3:sac --env-id Pendulum-v1 --ent-coef much", "much"),
        ("sb3:sac --hyperparameters ours --env-id Pendulum-v1 --q-lr 1e-3", "make them equal"),
        ("sb3:sac --hyperparameters ours --env-id Pendulum-v1 --updates-per-step 0.5", "whole updates"),
        ("sb3:sac --hyperparameters ours --env-id Pendulum-v1 --total-timesteps 9", "ends before the first update"),
        ("sb3:ppo --seed -1", "--seed is -1"),
        ("sb3:ppo --seed one", "--seed"),
        ("sb3:ppo --device tpu", "--device"),
        ("random --total-timesteps 0", "--total-timesteps is 0"),
        ("random --n-envs 0", "--n-envs is 0"),
        ("random --resume nowhere", "nowhere is no run directory"),
        ("sb3:ppo --evaluate nowhere", "nowhere is no run directory"),
        ("random --num-threads 100000", "--num-threads is 100000, but this process may use"),
        ("random --n-envs 100000000", "--n-envs is 100000000, but must be a whole number from 1 to 65,536"),
        ("random --total-timesteps 1" + 30 * "0", "--total-timesteps is 1000000"),
        ("random --run-name " + 300 * "x", ""),
        ("random --run-name .", ""),
        ("random --run-name ..", ""),
        ("random --env-id ..:CartPole-v1", ""),
    ],
)
def test_wrong_input_is_one_sentence(words, says, capsys, here):
    assert peers.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda config: 3, "no run directory of a peer"),
        (lambda config: config | {"args": [1]}, "no run directory of a peer"),
        (
            lambda config: config | {"args": config["args"] | {"seed": None}},
            "config.json: args.seed is None, but must be",
        ),
        (
            lambda config: config | {"args": config["args"] | {"env_id": 3}},
            "config.json: args.env_id is 3, but must be",
        ),
        (lambda config: config | {"args": config["args"] | {"n_envs": "x"}}, "--n-envs is 'x', but must be"),
        (lambda config: config | {"args": config["args"] | {"seed": 10**30}}, "--seed is 1000000"),
    ],
)
def test_a_damaged_config_is_one_sentence(change, says, capsys):
    _, run = start("random", steps=64)
    (run / "config.json").write_text(json.dumps(change(read(run, "config"))))
    for words in (["--resume", str(run)], ["--evaluate", str(run)]):
        capsys.readouterr()
        assert peers.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_wrong_continuations(capsys):
    _, run = start("random", steps=64)
    for words, says in (
        (["sb3:ppo", "--resume", str(run)], "is a run of random, not of sb3:ppo"),
        (["random", "--resume", str(run), "--seed", "3"], "seed 1 -> 3"),
        (["random", "--resume", str(run / "checkpoints" / "step_000000000064.pt")], f"directory, here {run}"),
        (["random", "--run-name", "run"], "exists"),
        (["random", "--evaluate", str(run), "--eval-episodes", "0"], "--eval-episodes is 0"),
    ):
        assert peers.main(words) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("algo", ALGOS)
def test_the_harness_knows_flags_defaults_and_choices(algo):
    flags = arguments_of(algo, "HalfCheetah-v5")
    assert flags["total-timesteps"].default == 1_000_000 and flags["exp-name"].default == algo
    assert flags["device"].misfit("gpu") and not flags["device"].misfit("cuda")
    assert "algo" not in flags and "unmapped" not in flags
    if algo != "random":
        assert flags["norm-obs"].default is (algo != "sb3:sac") and flags["gamma"].default == 0.99


def test_a_missing_library_is_named_and_random_needs_none(monkeypatch):
    find = peers.importlib.util.find_spec
    missing = ("stable_baselines3", "sb3_contrib", "cv2")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    for algo, package in (("sb3:ppo", "stable_baselines3"), ("sb3:trpo", "sb3_contrib")):
        with pytest.raises(UsageError, match=rf"{algo} needs {package}; install .*\[peers\]"):
            peers.parse_args([algo])
    assert start("random", steps=64)[0] == 0
