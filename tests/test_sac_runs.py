"""What a run of sac.py gives and how it ends: its replay buffer on the disk, kill and resume, bad days, bad input."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from odd_envs import Long, Tally
from test_resume import processes
from test_run_directory import Toy, assert_same_run, checkpoints, here, newest, process, rows, same, summary, timeless

import sac

__all__ = ["here", "processes"]  # fixtures
SCRIPT = Path(sac.__file__).resolve()
SMALL = "--env-id odd_envs:Odd/Slide-v0 --device cpu --compile off --num-threads 1 --total-timesteps 300"
SMALL += " --learning-starts 50 --batch-size 16 --log-interval 25 --updates-per-step 0.3 --checkpoint-interval 2"
SMALL = SMALL.split()
GROWTH = 64  # rows


@pytest.fixture(autouse=True)
def small_growth(monkeypatch):
    monkeypatch.setattr(sac.Replay, "GROWTH", GROWTH)


def start(*flags, name="run"):
    """Trains a small run in this process; returns the exit status and the run directory."""
    return sac.main([*SMALL, "--run-name", name, *flags]), Path("runs") / name


def in_log(iteration: int, action) -> None:
    """Calls action after an iteration was logged and before it can be saved. For a process of its own, or a patch."""
    log = sac.Run.log

    def log_then_act(run, *values, **groups):
        log(run, *values, **groups)
        if run.iteration == iteration:
            action()

    sac.Run.log = log_then_act


def child(argv, output, iteration):
    """What a process does that is killed in an iteration, if in any."""
    sac.Replay.GROWTH = GROWTH
    if iteration:
        in_log(iteration, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with open(output, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        torch.set_num_threads(1)
        status = sac.main(argv)
    raise SystemExit(status)


@pytest.fixture(scope="module")
def run_process(processes, tmp_path_factory):
    """run_process(argv, iteration) runs sac.py in a process of its own; returns its exit status and what it told."""
    output = tmp_path_factory.mktemp("output") / "told.txt"

    def run(argv, iteration=0):
        output.write_text("")
        process = processes.Process(target=child, args=(argv, output, iteration))
        process.start()
        process.join()
        return process.exitcode, output.read_text()

    return run


def resumed(run, capsys):
    """How a run goes on, in its own words, and what is said on stderr."""
    capsys.readouterr()
    assert sac.main(["--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    return re.search("goes on from step .*", out)[0], err


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXACTLY = "exactly as if it had never stopped"
RING = "--buffer-size 60 --learning-starts 30 --checkpoint-interval 1"


# ---------------------------------------------------------------------------------------------------- kill and resume
KILLED = {
    "one environment": "",
    "two environments": "--num-envs 2",
    "wrapped": RING,
    "wrapped, three environments": f"--num-envs 3 {RING}",
    "all of the method": "--policy-frequency 2 --target-network-frequency 3 --updates-per-step 0.7",
}


@pytest.mark.parametrize("kind", KILLED)
def test_run_that_was_killed_and_resumed_equals_one_that_was_not(kind, run_process, here, capsys):
    flags = KILLED[kind].split()
    status, whole = start(*flags, name="whole")
    assert status == 0 and not (whole / "replay.bin").exists()
    ring = int(re.search("the replay buffer grows to ([0-9]+) steps", capsys.readouterr().out)[1])
    assert ("wrapped" in kind) == (ring < 300)
    killed = here / "runs" / "killed"
    argv = [*SMALL, "--run-name", "killed", *flags]
    for iteration in (3, 8):  # it begins, and goes on
        assert run_process(argv, iteration)[0] == -signal.SIGKILL
        assert (killed / "replay.bin").exists() and not (killed / "summary.json").exists()
        assert 0 < newest(killed)["iteration"] < iteration  # so there are rows that the resumed run has to forget
        argv = ["--resume", str(killed)]
    assert ring == 300 or newest(killed)["replay"]["count"] > ring or "wrapped" not in kind
    assert EXACTLY in resumed(killed, capsys)[0]
    assert_same_run(whole, killed)
    assert not (killed / "replay.bin").exists()


def test_ring_has_wrapped_when_it_is_killed(run_process, here, capsys):
    """Of a longer run, with few updates, the file is overwritten three times, and the checkpoint is a damaged one."""
    flags = f"{RING} --total-timesteps 900 --updates-per-step 0.1".split()
    _, whole = start(*flags, name="whole")
    assert run_process([*SMALL, "--run-name", "killed", *flags], 30)[0] == -signal.SIGKILL
    killed = here / "runs" / "killed"
    row = (killed / "replay.bin").stat().st_size / (4 * (2 + 1 + 1 + 2 + 1))
    assert row < 200 and newest(killed)["replay"]["count"] > 3 * row
    last = max((killed / "checkpoints").glob("step_*.pt"))
    last.write_bytes(last.read_bytes()[:1000])  # the one before it finds its rows, too
    how, err = resumed(killed, capsys)
    assert "is corrupt" in err and err.count("\n") == 1 and EXACTLY in how
    assert_same_run(whole, killed)


def test_buffer_in_memory_goes_on_with_an_empty_one_and_says_so(run_process, here, capsys):
    argv = [*SMALL, "--run-name", "run", "--buffer-in-memory"]
    assert run_process(argv, 8)[0] == -signal.SIGKILL
    run = here / "runs" / "run"
    how, err = resumed(run, capsys)
    reason = "the replay buffer was in memory, so an empty one is filled first"
    assert (how, err) == (f"goes on from step 200, but not exactly: {reason}", "")
    assert summary(run)["status"] == "completed" and not (run / "replay.bin").exists()
    steps = [int(row["global_step"]) for row in rows(run, "progress")]
    assert steps[-3:] == [200, 275, 300]  # 50 steps without an update, and log_interval more
    assert all(row["losses/qf_loss"] and row["losses/actor_loss"] for row in rows(run, "progress"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("flags", ["", RING])
def test_signal_leaves_a_buffer_to_go_on_with(flags, signum, here, monkeypatch, capsys):
    start(*flags.split(), name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(sac.Run, "log", sac.Run.log)
        in_log(7, lambda: os.kill(os.getpid(), signum))
        status, run = start(*flags.split())
    assert status == 128 + signum == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    assert summary(run)["status"] == "interrupted" and newest(run)["iteration"] == 7
    assert (run / "replay.bin").stat().st_size >= 4 * 7 * newest(run)["replay"]["count"] or flags
    how, err = resumed(run, capsys)
    assert EXACTLY in how and err == "" and not (run / "replay.bin").exists()
    one, other = newest(Path("runs/whole")), newest(run)
    for key in one.keys() - {"wall_time", "csv", "best"}:  # the checkpoint of a signal may be the best one
        assert same(one[key], other[key]), key
    assert timeless(Path("runs/whole"), "episodes") == timeless(run, "episodes")


def test_completed_run_that_lost_its_summary_is_completed_without_its_buffer(here):
    _, run = start()
    before = newest(run)
    (run / "summary.json").unlink()
    assert sac.main(["--resume", str(run)]) == 0
    assert summary(run)["status"] == "completed" and same(before, newest(run))
    assert not (run / "replay.bin").exists()


# ---------------------------------------------------------------------------------------------- the file was damaged
@pytest.fixture(scope="module")
def whole_and_killed(run_process, tmp_path_factory):
    runs = tmp_path_factory.mktemp("folder") / "runs"
    for name, iteration, status in (("whole", 0, 0), ("run", 7, -signal.SIGKILL)):
        assert run_process([*SMALL, "--runs-dir", str(runs), "--run-name", name], iteration)[0] == status
    return runs


@pytest.fixture
def half(whole_and_killed, here):
    """A run that was killed after two checkpoints, beside one that was not, and the size of a row."""
    shutil.copytree(whole_and_killed, "runs")
    run = Path("runs/run")
    counts = [torch.load(run / "checkpoints" / name, weights_only=True)["replay"]["count"]
              for name in checkpoints(run)[-2:]]  # fmt: skip
    assert checkpoints(run)[-2:] == ["step_000000000150.pt", "step_000000000200.pt"] and counts == [150, 200]
    return run, 4 * 7


def shorten(path, size):
    path.write_bytes(path.read_bytes()[:size])


def change(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


NEWER = {  # damage to what only the newest checkpoint needs
    "shortened": (lambda path, row: shorten(path, 190 * row), "is shorter than it was at the checkpoint"),
    "changed": (lambda path, row: change(path, 170 * row + 3), "is not what it was at the checkpoint"),
    "zeros": (lambda path, row: path.write_bytes(path.read_bytes()[: 150 * row] + bytes(150 * row)), "is not what it"),
}


@pytest.mark.parametrize("kind", NEWER)
def test_checkpoint_before_is_used_where_the_newest_rows_are_damaged(kind, half, capsys):
    (run, row), (damage, sentence) = half, NEWER[kind]
    damage(run / "replay.bin", row)
    how, err = resumed(run, capsys)
    assert f"runs/run/replay.bin {sentence}" in err and "step_000000000200.pt" in err and err.count("\n") == 1
    assert how == f"goes on from step 150, {EXACTLY}"
    assert_same_run(Path("runs/whole"), run)


OLDER = {
    "deleted": (lambda path, row: path.unlink(), "is shorter than it was"),
    "emptied": (lambda path, row: path.write_bytes(b""), "is shorter than it was"),
    "changed": (lambda path, row: change(path, 5 * row), "is not what it was"),
    "another file": (lambda path, row: path.write_bytes(b"date,temperature\n" * 1000), "is not what it was"),
}


@pytest.mark.parametrize("kind", OLDER)
def test_run_without_its_rows_is_refused_and_left_alone(kind, half, here, capsys):
    (run, row), (damage, sentence) = half, OLDER[kind]
    damage(run / "replay.bin", row)
    before = contents(run)
    capsys.readouterr()
    assert sac.main(["--resume", str(run)]) == 2
    out, err = capsys.readouterr()
    *reasons, last = err.splitlines()
    assert out == "" and last.startswith("error: runs/run has no checkpoint that can be used") and len(reasons) == 2
    assert all(f"(runs/run/replay.bin {sentence}" in reason for reason in reasons)
    assert contents(run) == before
    assert sac.main(["--evaluate", str(run), "--eval-episodes", "1"]) == 0  # which needs no buffer


# ------------------------------------------------------------------------------------------------------- bad days
class FullDisk:
    """replay.bin can grow so many times. The next time half of it is written."""

    def __init__(self, patch, times):
        self.times = times
        patch.setattr(sac, "open", self.open, raising=False)

    def open(self, path, *args, **options):
        file = open(path, *args, **options)
        if not str(path).endswith("replay.bin"):
            return file
        disk, write = self, file.write

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, content):
                disk.times -= 1
                if disk.times < 0:
                    write(content[: len(content) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(content)

        return File()


@pytest.mark.parametrize("times, checkpoint", [(0, 0), (1, 0), (2, 100), (4, 250)])
def test_full_disk_ends_the_run_and_it_goes_on_from_the_checkpoint(
    times, checkpoint, whole_and_killed, here, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        FullDisk(patch, times)
        status, run = start()
    err = capsys.readouterr().err
    path = run / "checkpoints" / f"step_{checkpoint:012}.pt"
    told = rf"error: iteration \d+: \[Errno 28\] No space left on device; the last good checkpoint is {path}\.\n"
    assert status == 1 and re.fullmatch(told, err), err
    assert summary(run)["status"] == "failed"
    how, err = resumed(run, capsys)
    assert (how, err) == (f"goes on from step {checkpoint}, {EXACTLY}", "")
    assert_same_run(whole_and_killed / "whole", run)


class BadReset(Toy):
    """A Toy whose first observation of an episode is NaN, from some step of its life on."""

    def observation(self):
        self.bad = "observation" if self.t == 0 else ""
        return super().observation()


gym.register("BadReset-v0", BadReset)
BAD = {  # from some step of environment 1 on
    "observation": ("diverged", "the observation of environment 1 in step [0-9]+ of the iteration is NaN or infinite"),
    "nan reward": ("diverged", "the reward of environment 1 in step [0-9]+ of the iteration is NaN or infinite"),
    "inf reward": ("diverged", "the reward of environment 1 in step [0-9]+ of the iteration is NaN or infinite"),
    "huge reward": ("diverged", "qf_loss is (nan|inf)"),
    "raise in step": ("failed", "in step [0-9]+ of the iteration environment 1 of Toy-v0 raised ValueError: the gripp"),
    "raise in reset": ("failed", "in step [0-9]+ of the iteration environment 1 of Toy-v0 raised ValueError: no more"),
    "reset": ("diverged", "the observation of environment 1 in step [0-9]+ of the iteration is NaN or infinite"),
    "first reset": ("diverged", "the observation of environment 1 in step 0 of the iteration is NaN or infinite"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_environment_ends_the_run_with_its_number_and_a_checkpoint(bad, here, monkeypatch, capsys):
    status, message = BAD[bad]
    monkeypatch.setattr(Toy, "made", 0)
    kind = BadReset if bad.endswith("reset") and not bad.startswith("raise") else Toy
    options = dict(actions=Box(-1, 1, (1,)), bad=bad, after=77 * (bad != "first reset"))
    monkeypatch.setitem(gym.registry, "Toy-v0", gym.envs.registration.EnvSpec("Toy-v0", kind, kwargs=options))
    assert start("--env-id", "Toy-v0", "--num-envs", "2")[0] == 1
    run, err = Path("runs/run"), capsys.readouterr().err
    good = r"runs/run/checkpoints/step_\d+.pt"
    assert re.match(rf"error: iteration \d: {message}[^\n]*; the last good checkpoint is {good}", err), err
    assert err.count("\n") == 1 and summary(run)["status"] == status and summary(run)["error"] in err
    assert (newest(run)["global_step"] > 0) == (bad != "first reset")
    assert all(x.isfinite().all() for x in newest(run)["agent"].values())


def test_run_directory_that_goes_away_ends_the_run_with_one_sentence(here, monkeypatch, capsys):
    monkeypatch.setattr(sac.Run, "log", sac.Run.log)
    in_log(3, lambda: shutil.rmtree("runs/run"))
    assert start()[0] == 1
    err = capsys.readouterr().err
    assert re.match(r"error: iteration \d+: [^\n]*(moved, replaced or deleted|No such file)", err), err
    assert err.count("\n") == 1 and not list(here.glob("runs/*"))


class BoxLong(Long):
    action_space = Box(-1, 1, (1,))


class BoxTally(Tally):
    action_space = Box(-1, 1, (1,))


class Wanderer(BoxLong):
    """Goes to another folder."""

    length = 20

    def step(self, action):
        os.chdir("/")
        return super().step(action)


for environment in (BoxLong, BoxTally, Wanderer):
    gym.register(f"{environment.__name__}-v0", environment)


def test_environment_that_goes_elsewhere_takes_nothing_along(here, monkeypatch):
    assert start("--env-id", "Wanderer-v0")[0] == 0
    monkeypatch.chdir(here)
    run = Path("runs/run")
    assert summary(run)["status"] == "completed" and not (run / "replay.bin").exists()


def test_environment_that_carries_something_over_goes_on_and_says_not_exactly(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sac.Run, "log", sac.Run.log)
        in_log(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start("--env-id", "BoxTally-v0", "--num-envs", "2")[0] == 143
    how, err = resumed(Path("runs/run"), capsys)
    assert err == "" and how.endswith("but not exactly: environment 0 does not repeat its rewards")
    assert summary(Path("runs/run"))["status"] == "completed"


def test_episodes_that_outlast_the_interval_between_checkpoints_are_counted(here):
    flags = "--env-id BoxLong-v0 --num-envs 2 --total-timesteps 4200 --log-interval 100 --updates-per-step 0.01"
    _, run = start(*flags.split())
    assert [(float(row["return"]), row["length"]) for row in rows(run, "episodes")] == [(2000, "2000")] * 2


# ------------------------------------------------------------------------------------------------------ wrong inputs
class Free(gym.Env):
    observation_space = Box(-1, 1, (2,))
    action_space = Box(-np.inf, np.inf, (2,))


class HalfFree(Free):
    action_space = Box(np.float32([-1, -1]), np.float32([1, np.inf]))


class Numbered(Free):
    observation_space = gym.spaces.Discrete(4)
    action_space = Box(-1, 1, (1,))


class Pixels(Free):
    observation_space = Box(0, 255, (40, 40, 3), np.uint8)
    action_space = Box(-1, 1, (1,))


for environment in (Free, HalfFree, Numbered, Pixels):
    gym.register(f"{environment.__name__}-v0", environment)

WRONG = {
    "--env-id CartPole-v1": "acts in Discrete(2), and sac.py in boxes only; for such actions there are ppo.py, a2c.py,",
    "--env-id ALE/Pong-v5": "acts in Discrete(6), and sac.py in boxes only; for such actions there are ppo.py",
    "--env-id test_sac_runs:Free-v0": "has actions without bounds, and",
    "--env-id test_sac_runs:HalfFree-v0": "has actions without bounds, and",
    "--env-id test_sac_runs:Numbered-v0": "observes Discrete(4); sac.py takes vectors; use ppo.py.",
    "--env-id test_sac_runs:Pixels-v0": "observes Box(40, 40, 3); sac.py takes vectors; use ppo.py.",
    "--scale-actions off": "use auto.",
    "--total-timesteps 1000 --learning-starts 1000": "ask for 1001 or more, or for a smaller --learning-starts.",
    "--total-timesteps 1000": "ask for 1001 or more",
    "--num-envs 4 --total-timesteps 1003": "ask for 1004 or more",
    "--learning-starts 200 --buffer-size 100": "a buffer of 100 steps never holds that many; ask for 100 at most.",
    "--log-interval 3 --updates-per-step 0.1": "3 steps bring no update of the policy; --log-interval 10 would do.",
    "--log-interval 1 --policy-frequency 2": "--log-interval 2 would do.",
    "--buffer-in-memory --buffer-size 1000000000000": "GiB of memory, and there are",
    "--tau 2": "--tau is 2.0, but must be at most 1.",
    "--tau 0": "--tau is 0.0, but must be greater than 0.",
    "--alpha 0": "--alpha is 0.0, but must be greater than 0.",
    "--gamma 1.5": "--gamma is 1.5, but must be at most 1.",
    "--batch-size 0": "--batch-size is 0, but must be greater than 0.",
    "--updates-per-step 0": "greater than 0",
    "--q-lr nan": "a finite number",
    "--num-steps 3": "'--num-steps' is no flag",
    "--learning-start 3": "did you mean --learning-starts?",
    "--resume runs/nothing": "runs/nothing is no run directory",
}


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_created(argv, run_process, here):
    status, told = run_process(argv.split())
    assert status == 2 and re.fullmatch(r"error: [^\n]+\n", told) and WRONG[argv] in told, told
    assert not list(here.iterdir())


def test_log_interval_that_is_named_works(here):
    assert start("--log-interval", "10", "--updates-per-step", "0.1", "--total-timesteps", "75")[0] == 0
    assert all(row["losses/actor_loss"] for row in rows(Path("runs/run"), "progress")[:-1])


def test_last_row_may_have_no_update_to_tell_of(here):
    flags = "--log-interval 20 --updates-per-step 0.1 --policy-frequency 2 --total-timesteps 73"
    status, run = start(*flags.split())
    table = rows(run, "progress")
    assert status == 0 and [int(row["global_step"]) for row in table] == [70, 73]
    assert table[0]["losses/actor_loss"] and table[1]["losses/qf_loss"] == ""


def test_resume_with_another_buffer_is_refused(here, capsys):
    _, run = start()
    capsys.readouterr()
    assert sac.main(["--resume", str(run), "--buffer-size", "99"]) == 2
    assert "buffer_size 1000000 -> 99" in capsys.readouterr().err


def test_exit_status_of_the_script_for_wrong_input(tmp_path):
    done = process(SCRIPT, "--env-id", "CartPole-v1", cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert re.fullmatch(r"error: --env-id CartPole-v1 acts in Discrete\(2\)[^\n]*\n", done.stderr)


# ---------------------------------------------------------------------------------------------------- what a run gives
def test_script_alone_in_an_empty_folder_prints_plain_lines_and_no_warning(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "mine.py")
    flags = ["--env-id", "HalfCheetah-v4", *SMALL[2:], "--run-name", "run", "--total-timesteps", "120"]
    done = process("-W", "default", "mine.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, understood, buffer, *progress, last = done.stdout.splitlines()
    assert first == "runs/run (cpu, threads: 1)"
    assert understood == "observes Box(17,) as 17 numbers through an MLP, acts in Box(6,), scaled to it"
    assert buffer == "the replay buffer grows to 120 steps, 0 MB on the disk, until all is trained"
    assert progress and all(re.match(r" *[\d,]+ steps +\d+% +[\d,]+/s  return .* left$", line) for line in progress)
    assert last == "completed after 120 steps: runs/run"
    config = json.loads((tmp_path / "runs/run/config.json").read_text())["args"]
    assert (config["exp_name"], config["scale_actions"], config["updates_per_step"]) == ("mine", "on", 0.3)


def test_columns_of_progress_and_the_size_of_the_buffer(here, capsys):
    status, run = start("--num-envs", "2", "--buffer-in-memory", "--no-autotune", "--alpha", "0.3")
    assert "the replay buffer grows to 300 steps, 0 MB of memory\n" in capsys.readouterr().out
    table = rows(run, "progress")
    for tag in ("qf_loss", "qf_values", "actor_loss", "entropy", "alpha"):
        assert all(np.isfinite(float(row[f"losses/{tag}"])) for row in table), tag
    assert [float(row["losses/alpha"]) for row in table] == pytest.approx([0.3] * len(table))
    assert [int(row["global_step"]) for row in table] == [76, 102, 128, 154, 180, 206, 232, 258, 284, 300]
    assert len(rows(run, "episodes")) > 10


def test_help_shows_the_defaults_of_the_family(capsys):
    with pytest.raises(SystemExit) as stopped:
        sac.main(["--help", "--env-id", "HalfCheetah-v4"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "(default: 1000000)" in text.split("--total-timesteps")[1][:200]
    assert "(default: 5000)" in text.split("--learning-starts")[1][:200]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pendulum_is_learned_with_the_default_arguments(seed, here):
    """A policy that does nothing has about -1,200; a swing up costs 120 to 250."""
    command = [sys.executable, SCRIPT, "--seed", str(seed), "--run-name", "run"]
    assert subprocess.run(command).returncode == 0
    assert sac.main(["--evaluate", "runs/run", "--eval-episodes", "20"]) == 0
    assert summary(Path("runs/run"))["eval"]["deterministic"]["mean"] > -250
