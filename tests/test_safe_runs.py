"""A run has one writer, survives what is done to it from outside, and never says what it does not know."""

import ast
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
import wandb
from test_run_directory import (
    BATCH,
    SCRIPT,
    SMALL,
    Toy,
    after_iteration,
    assert_same_run,
    before_update,
    cut,
    here,
    newest,
    refused,
    rows,
    scalars,
    start,
    summary,
)

import grpo_toy
import ppo

__all__ = ["here"]  # a fixture
SCRIPTS = ("ppo", "a2c", "a3c", "trpo", "reinforce", "sac", "grpo_toy", "rlhf_toy", "dpo_toy")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_a_run():
    """A run as it was when half of it was done."""
    _, run = start(iterations=4)
    max((run / "checkpoints").glob("step_*.pt")).unlink()
    (run / "summary.json").unlink()
    return run


def resumed(run, capsys):
    """How a run goes on, in its own words, and what is said on stderr."""
    capsys.readouterr()
    assert ppo.main(["--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    return re.search("goes on from step .*", out)[0], err


# ---------------------------------------------------------------------------------------------------- one writer
HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held():
    """held(run) lets another process take the lock of a run, and returns it."""
    children = []

    def hold(run):
        children.append(subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True))
        assert children[-1].stdout.readline() == "held\n"
        return children[-1]

    yield hold
    for child in children:
        child.kill()
        child.wait()


def test_run_in_the_hands_of_another_process_is_refused_until_that_is_killed(held, here, capsys):
    start(name="whole")
    run = half_a_run()
    other = held(run)
    before = contents(run)
    capsys.readouterr()
    assert "runs/run is in use" in refused(capsys, "--resume", "runs/run", here=here)
    assert contents(run) == before
    other.kill()
    other.wait()
    assert "exactly as if" in resumed(run, capsys)[0]
    assert_same_run(here / "runs" / "whole", run)


def test_run_in_the_hands_of_another_thread_is_refused(here, capsys):
    run = half_a_run()
    statuses, reached, go_on = [], threading.Event(), threading.Event()

    def first():
        with pytest.MonkeyPatch.context() as patch:
            before_update(patch, 1, lambda: (reached.set(), go_on.wait(60)))
            statuses.append(ppo.main(["--resume", str(run)]))

    thread = threading.Thread(target=first)
    thread.start()
    assert reached.wait(60)
    statuses.append(ppo.main(["--resume", str(run.absolute())]))
    go_on.set()
    thread.join()
    assert statuses == [2, 0] and "is in use" in capsys.readouterr().err
    assert summary(run)["status"] == "completed" and newest(run)["iteration"] == 4
    assert ppo.main(["--resume", str(run)]) == 0  # nobody has it now


def test_of_two_runs_of_one_name_at_the_same_moment_one_is_refused(here, capsys):
    together, told = threading.Barrier(2), []
    args = ppo.parse_args([*SMALL, "--total-timesteps", "256", "--run-name", "run"])

    def run():
        together.wait()
        try:
            told.append(ppo.train(replace(args)))
        except ppo.UsageError as error:
            told.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    path = here / "runs" / "run"
    assert path in told and [x for x in told if "runs/run exists; choose another --run-name" in str(x)]
    assert summary(path)["global_step"] == 2 * BATCH


@pytest.mark.parametrize("script", [ppo, grpo_toy])
def test_evaluation_of_a_run_in_training_prints_its_result_and_says_that_it_is_not_written(script, held, here, capsys):
    if script is ppo:
        _, run = start(iterations=1)
        flags = ["--eval-episodes", "1"]
    else:
        size = "--num-digits 2 --n-layer 1 --n-embd 16 --sft-steps 1 --max-steps 1 --generation-batch-size 8"
        run, flags = Path("runs/run"), ["--eval-prompts", "8"]
        assert grpo_toy.main([*size.split(), *flags, "--num-threads", "1", "--run-name", "run"]) == 0
    held(run)
    before = contents(run)
    capsys.readouterr()
    assert script.main(["--evaluate", str(run), *flags]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and re.search(r"1 deterministic episodes: mean|accuracy", out)
    assert re.fullmatch(r"The result is not in summary.json [^\n]* of runs/run: runs/run is in use[^\n]*\n", err)
    assert contents(run) == before


def test_evaluation_of_a_run_that_has_not_ended_says_that_it_is_not_written(here, capsys):
    run = half_a_run()
    capsys.readouterr()
    assert ppo.main(["--evaluate", str(run), "--eval-episodes", "1"]) == 0
    assert capsys.readouterr().err.endswith("of runs/run: the run has not ended.\n")
    assert not (run / "summary.json").exists()


def test_file_system_without_locks_prevents_nothing_and_is_mentioned_once(here, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", lockf)
    status, run = start(iterations=1)
    err = capsys.readouterr().err
    assert status == 0 and "no locks" in err and err.count("\n") == 1 and summary(run)["status"] == "completed"


# ------------------------------------------------------------------------------------- a world that changes under it
@pytest.mark.parametrize("moment", ["import", "init", "reset", "step"])
def test_environment_that_goes_elsewhere_takes_nothing_along(moment, here, monkeypatch, capsys):
    gone = here / "elsewhere"
    wander = f"(os.makedirs({str(gone)!r}, exist_ok=True), os.chdir({str(gone)!r}), shutil.rmtree({str(gone)!r}))"
    text = "import os, shutil\nimport gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
    text += f"def wander():\n    {wander}\n"
    text += "class Wanderer(CartPoleEnv):\n"
    for name, arguments in (("__init__", "**options"), ("reset", "**options"), ("step", "action")):
        there = "wander()" if moment in name else "pass"
        text += f"    def {name}(self, {arguments}):\n        {there}\n        return super().{name}({arguments})\n"
    text += f"gymnasium.register('Wanderer-{moment}', Wanderer)\n" + ("wander()\n" if moment == "import" else "")
    module = f"wanderer_{moment}"
    (here / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(here)
    flags = ["--env-id", f"{module}:Wanderer-{moment}", "--runs-dir", "runs"]
    with monkeypatch.context() as patch:
        before_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert start(*flags)[0] == 143
    monkeypatch.chdir(here)
    run = Path("runs/run")
    out = capsys.readouterr().out
    assert re.search("^runs/run .cpu", out) and re.search("^interrupted after 256 steps: runs/run$", out, re.MULTILINE)
    assert "exactly as if" in resumed("runs/run", capsys)[0]
    monkeypatch.chdir(here)
    assert summary(run)["status"] == "completed" and newest(run)["iteration"] == 4 and len(rows(run, "progress")) == 4
    assert ppo.main(["--evaluate", "runs/run", "--eval-episodes", "1"]) == 0
    monkeypatch.chdir(here)
    assert summary(run)["eval"]["deterministic"]["episodes"] == 1
    assert {path.name for path in here.iterdir()} <= {"runs", f"{module}.py", "__pycache__"}


@pytest.fixture
def pasted(monkeypatch):
    """ppo.py as it is in a notebook: its text is in no file, and the arguments of the process are not its own."""
    module = types.ModuleType("pasted")
    monkeypatch.setitem(sys.modules, "pasted", module)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(sys, "argv", ["kernel.py", "-f", "--gamma=0.5"])
    exec(compile(SCRIPT.read_text(encoding="utf-8"), "cell", "exec"), vars(module))
    return module


def test_script_that_was_pasted_trains_in_a_thread_and_says_what_it_cannot_know(pasted, here, capsys):
    args = pasted.RunArgs(num_envs=2, num_steps=64, total_timesteps=256, run_name="run", device="cpu")
    paths = []
    thread = threading.Thread(target=lambda: paths.append(pasted.train(args)))
    thread.start()
    thread.join()
    run = here / "runs" / "run"
    assert paths == [run] and summary(run)["status"] == "completed"
    config = json.loads((run / "config.json").read_text())
    assert [config[name] for name in ("command", "script", "git_commit", "git_dirty")] == [None] * 4
    max((run / "checkpoints").glob("step_*.pt")).unlink()
    (run / "summary.json").unlink()
    assert pasted.main(["--resume", "runs/run"]) == 0
    assert re.search("goes on from step .*, but not exactly: no file with the script\n", capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------------- signals
class Closing(Toy):
    closed = []

    def close(self):
        Closing.closed.append(self.number)


def test_second_signal_ends_the_iteration_and_the_summary_says_interrupted(here, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def two_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the iteration goes on")

    with monkeypatch.context() as patch:
        before_update(patch, 3, two_signals)
        status, run = start()
    assert status == 143 and summary(run)["status"] == "interrupted" and "error" not in summary(run)
    assert newest(run)["iteration"] == 2 and not list(run.rglob("*.tmp"))
    assert signal.getsignal(signal.SIGINT) is handler
    start(name="whole")
    assert ppo.main(["--resume", str(run)]) == 0
    assert_same_run(Path("runs/whole"), run)


def test_third_signal_does_not_wait_for_what_is_closing(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    run = SimpleNamespace(signals=[], leaving=True)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        ppo.Run.take_signal(run, signum, None)
    assert left == [143]


def test_signal_before_the_run_begins_unwinds_and_leaves_nothing(here, monkeypatch):
    make_agent = ppo.make_agent
    monkeypatch.setattr(ppo, "make_agent", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), make_agent(*args)))
    assert start()[0] == 143 and not list(here.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---------------------------------------------------------------------------------------- telling is not training
def broken(*args, **options):
    raise OSError(errno.EIO, "the cable is out\nof its socket")


def test_tensorboard_that_fails_is_given_up_with_one_sentence(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        after_iteration(patch, 2, lambda: patch.setattr(ppo.TensorBoard, "add", broken))
        status, run = start()
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (0, 1) and err.startswith("TensorBoard is given up") and "cable" in err
    assert len(rows(run, "progress")) == 4 and summary(run)["status"] == "completed"


def test_tensorboard_that_cannot_begin_is_given_up(here, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "TensorBoard", broken)
    status, run = start(iterations=1)
    assert status == 0 and capsys.readouterr().err.count("TensorBoard is given up") == 1
    assert summary(run)["status"] == "completed"


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_wandb_that_fails_is_given_up_with_one_sentence(what, here, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake = SimpleNamespace(step=0, log=lambda *args, **options: None, finish=lambda **options: None)
    monkeypatch.setattr(wandb, "init", broken if what == "init" else lambda **options: fake)
    setattr(fake, what, broken)
    status, run = start("--track", iterations=2)
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (0, 1) and err.startswith("Weights & Biases is given up") and "cable" in err
    assert summary(run)["status"] == "completed" and scalars(run)["losses/policy_loss"]


@pytest.mark.parametrize("stderr", ["closed", "full", "none"])
def test_stderr_that_takes_nothing_changes_no_exit_status(stderr, here, monkeypatch):
    file = open("/dev/full", "w")
    if stderr == "closed":
        file.close()
    monkeypatch.setattr(sys, "stderr", None if stderr == "none" else file)
    before_update(monkeypatch, 2, broken)
    assert start()[0] == 1 and summary(Path("runs/run"))["status"] == "failed"
    assert start()[0] == 2


def test_all_text_is_utf8():
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((SCRIPT.parent / f"{script}.py").read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) == "os.open":
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [x.value for mode in node.args[1:2] for x in ast.walk(mode) if isinstance(x, ast.Constant)]
            binary = any("b" in str(mode) for mode in modes)
            if name in ("read_text", "write_text") or (name == "open" and not binary):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{script}.py:{node.lineno}"


# ----------------------------------------------------------------------------------------------------------- names
NAMES = ["x" * 300, "ü" * 200, ".", "..", " ", "a\0b", "a\nb", "\udcff", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("flag", ["--run-name", "--exp-name"])
def test_name_that_no_folder_can_have_is_refused(flag, name, here, capsys):
    if flag == "--exp-name" and name in (".", "..", " "):
        return  # these are fine as a part of a name
    sentence = refused(capsys, *SMALL, flag, name, here=here)
    assert "choose a" in sentence and "--run-name" in sentence


FOLDERS = ["y" * 300, "new/" + "y" * 300, "a\0b", "\udcff", "file/below"]


@pytest.mark.parametrize("folder", FOLDERS, ids=ascii)
def test_runs_dir_that_cannot_be_is_refused(folder, here, capsys):
    (here / "file").touch()
    assert "another" in refused(capsys, *SMALL, "--runs-dir", folder, here=here)


def test_full_disk_before_the_run_has_begun_leaves_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "write_json", broken)
    assert "cannot be made (the cable is out" in refused(capsys, *SMALL, "--runs-dir", "new/runs", here=here)


# ---------------------------------------------------------------------------------------------------------- damage
def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGED_TABLES = {
    "deleted": (Path.unlink, "cannot be read (No such file or directory)"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
    "emptied": (rewrite(lambda content: b""), "is shorter than it was at the checkpoint"),
    "cut": (rewrite(lambda content: content[:60]), "is shorter than it was at the checkpoint"),
    "NUL bytes": (rewrite(lambda content: content[:60] + bytes(len(content) - 60)), "is not what it was"),
    "edited": (rewrite(lambda content: content.replace(b"1", b"2", 1)), "is not what it was"),
    "another file": (rewrite(lambda content: b"date,temperature\n" * 1000), "is not what it was"),
}


@pytest.mark.parametrize("name", ["episodes", "progress"])
@pytest.mark.parametrize("damage", DAMAGED_TABLES)
def test_csv_file_that_was_damaged_is_refused_and_nothing_changed(damage, name, here, capsys):
    run, (action, sentence) = half_a_run(), DAMAGED_TABLES[damage]
    action(run / f"{name}.csv")
    before = contents(run)
    capsys.readouterr()
    assert f"runs/run/{name}.csv {sentence}" in refused(capsys, "--resume", str(run), here=here)
    assert contents(run) == before


def test_what_was_written_after_the_checkpoint_is_no_damage(here, capsys):
    start(name="whole")
    run = half_a_run()
    with open(run / "episodes.csv", "ab") as file:
        file.write(b"\0\0\0 half a ro")
    assert "exactly as if" in resumed(run, capsys)[0]
    assert_same_run(here / "runs" / "whole", run)


def damaged_state(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thesis.txt", "chapter one")


FOREIGN = {
    "no optimizer": (damaged_state(lambda state: state.pop("optimizer")), "it lacks optimizer"),
    "a key too many": (damaged_state(lambda state: state.update(extra=1)), "it has extra"),
    "another architecture": (damaged_state(lambda state: state["agent"].popitem()), "agent lacks"),
    "other weights": (
        damaged_state(lambda state: state["agent"].update({"actor.last.bias": torch.zeros(3)})),
        "agent.actor.last.bias is (3,) float32 and not (2,) float32",
    ),
    "a vector for a number": (damaged_state(lambda state: state.update(kl_beta=torch.zeros(1))), "kl_beta is (1,)"),
    "an optimizer of one": (damaged_state(lambda state: state["optimizer"].update(m=torch.zeros(1))), "optimizer.m"),
    "a text for a number": (damaged_state(lambda state: state.update(iteration="3")), "iteration is a str"),
    "returns that are none": (damaged_state(lambda state: state.update(last_returns=["x"])), "could not convert"),
    "other actions": (
        damaged_state(lambda state: state["player"]["episodes"].update(in_play=[[torch.zeros(3, 5)] * 2] * 2)),
        "is not a checkpoint of this run (",
    ),
    "no arguments": (damaged_state(lambda state: state["conditions"].pop("arguments")), "'arguments'"),
    "a list": (lambda path: torch.save([1], path), "it is a list"),
    "a pickle": (lambda path: torch.save({"path": Path("x")}, path), "is not a checkpoint (UnpicklingError)"),
    "a zip": (foreign_zip, "is not a checkpoint (RuntimeError)"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_checkpoint_is_called_that_and_the_one_before_it_is_used(kind, here, capsys):
    """With what it put back half undone: the run ends as if it had never been there."""
    start("--objective", "kl-adaptive", name="whole", iterations=5)
    start("--objective", "kl-adaptive", iterations=5)
    run, (damage, sentence) = Path("runs/run"), FOREIGN[kind]
    (run / "summary.json").unlink()
    last, middle, *_ = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    last.unlink()
    shutil.copy(middle, last.with_name("step_000000000600.pt"))
    damage(last.with_name("step_000000000600.pt"))
    how, err = resumed(run, capsys)
    assert "step_000000000600.pt" in err and sentence in err and "corrupt" not in err and err.count("\n") == 1
    assert how == "goes on from step 512, exactly as if it had never stopped"
    aside = last.with_name("step_000000000600.unused")  # not in the way of the next resume
    aside.rmdir() if aside.is_dir() else aside.unlink()
    assert_same_run(here / "runs" / "whole", run)


def test_optimizer_of_another_model_is_noticed(here, capsys):
    """torch's optimizers take in anything."""
    size = "--num-digits 2 --n-layer 1 --n-embd 16 --sft-steps 1 --max-steps 3 --generation-batch-size 8"
    flags = [*size.split(), "--eval-prompts", "8", "--num-threads", "1", "--checkpoint-interval", "1"]
    assert grpo_toy.main([*flags, "--run-name", "run"]) == 0
    run = Path("runs/run")
    (run / "summary.json").unlink()
    path = max((run / "checkpoints").glob("step_*"))
    damaged_state(lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)))(path)
    capsys.readouterr()
    assert grpo_toy.main(["--resume", str(run)]) == 0
    assert "is not a checkpoint of this run (optimizer has other shapes)" in capsys.readouterr().err


def test_evaluation_of_a_foreign_checkpoint_is_refused(here, capsys):
    _, run = start(iterations=1)
    best = run / "checkpoints" / "best.pt"
    damaged_state(lambda state: state["agent"].popitem())(best)
    capsys.readouterr()
    assert "best.pt is not a checkpoint of this run" in refused(capsys, "--evaluate", str(best), here=here)


DAMAGED_ARGUMENTS = {
    "learning_rate": ("0.001", 'learning_rate is "0.001", but must be of the type float'),
    "gamma": (None, "gamma is null, but must be of the type float"),
    "num_envs": (2.0, "num_envs is 2.0, but must be of the type int"),
    "seed": (True, "seed is true, but must be of the type int"),
    "anneal_lr": (1, "anneal_lr is 1, but must be of the type bool"),
    "objective": ("clap", "objective is \"clap\", but must be of the type Literal['clip', "),
    "target_kl": ([1], "target_kl is [1], but must be of the type float | None"),
    "vf_coef": (float("nan"), "vf_coef is NaN"),
    "colour": (1, "its config.json has an argument colour"),
}


@pytest.mark.parametrize("name", DAMAGED_ARGUMENTS)
def test_argument_in_config_that_was_damaged_is_named(name, here, capsys):
    run, (value, sentence) = half_a_run(), DAMAGED_ARGUMENTS[name]
    config = json.loads((run / "config.json").read_text())
    config["args"][name] = value
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    capsys.readouterr()
    for flag in ("--resume", "--evaluate"):
        assert sentence in refused(capsys, flag, str(run), here=here)
    assert contents(run) == before


DAMAGED_CONFIGS = {
    "cut": (rewrite(lambda content: content[:100]), "its config.json is damaged"),
    "another encoding": (rewrite(lambda content: content.decode().encode("utf-16")), "its config.json is damaged"),
    "deep": (rewrite(lambda content: b"[" * 100_000), "its config.json is damaged"),
    "a list": (rewrite(lambda content: b"[" + content + b"]"), "its config.json holds no arguments"),
    "no arguments": (rewrite(lambda content: content.replace(b'"args"', b'"arms"')), "holds no arguments"),
    "one missing": (rewrite(lambda content: content.replace(b'"gamma": 0.99,', b"")), "has no argument gamma"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "config.json cannot be read (Is a directory)"),
    "deleted": (Path.unlink, "it has no config.json"),
}


@pytest.mark.parametrize("kind", DAMAGED_CONFIGS)
def test_config_that_was_damaged_is_refused(kind, here, capsys):
    run, (damage, sentence) = half_a_run(), DAMAGED_CONFIGS[kind]
    damage(run / "config.json")
    capsys.readouterr()
    told = refused(capsys, "--resume", str(run), here=here)
    assert told.startswith("error: runs/run is no run directory of this script: ") and sentence in told


@pytest.mark.parametrize("content", ["[1]", "7", '{"eval": [1]}', '{"status": "failed", "eval": 3}', "[" * 100_000])
def test_summary_that_was_damaged_prevents_nothing(content, here, capsys):
    run = half_a_run()
    (run / "summary.json").write_text(content)
    assert ppo.main(["--resume", str(run)]) == 0
    assert summary(run)["status"] == "completed"
    assert ppo.main(["--evaluate", str(run), "--eval-episodes", "1"]) == 0
    assert summary(run)["eval"]["deterministic"]["episodes"] == 1


# ------------------------------------------------------------------------------------------ what exactly depends on
@pytest.mark.parametrize("name, value", [("seed", 7), ("learning_rate", 0.1), ("gamma", 0.5), ("clip_vloss", True)])
def test_argument_that_was_edited_in_config_is_named(name, value, here, capsys):
    run = half_a_run()
    config = json.loads((run / "config.json").read_text())
    was, config["args"][name] = config["args"][name], value
    (run / "config.json").write_text(json.dumps(config))
    how, err = resumed(run, capsys)
    assert ", but not exactly: " in how and f"another {name} ({was}, now {value})" in how and err == ""


def test_variable_that_changes_the_arithmetic_is_named(here, monkeypatch, capsys):
    run = half_a_run()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert resumed(run, capsys)[0].endswith(", but not exactly: another ATEN_CPU_CAPABILITY")


def test_another_processor_is_named(here, monkeypatch, capsys):
    run = half_a_run()
    monkeypatch.setattr(ppo, "processor", lambda: "another")
    assert resumed(run, capsys)[0].endswith(", but not exactly: another processor")


def imported(path, monkeypatch):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_script_whose_loss_was_edited_is_named(here, monkeypatch, capsys):
    mine = here / "mine.py"
    shutil.copy(SCRIPT, mine)
    flags = [*SMALL, "--run-name", "run"]
    script = imported(mine, monkeypatch)
    after_two = iter([None, 1])
    update = script.update
    script.update = lambda *args: (next(after_two) and os.kill(os.getpid(), signal.SIGTERM), update(*args))[1]
    assert script.main(flags) == 143
    config = json.loads(Path("runs/run/config.json").read_text())
    text = mine.read_text(encoding="utf-8")
    assert config["script"] == script.text_of(mine)
    mine.write_text(text.replace("args.vf_coef * value_loss", "2 * args.vf_coef * value_loss"), encoding="utf-8")
    capsys.readouterr()
    assert imported(mine, monkeypatch).main(["--resume", "runs/run"]) == 0
    assert re.search("goes on from step 256, but not exactly: another script\n", capsys.readouterr().out)


def test_environment_whose_code_was_edited_is_named(here, monkeypatch, capsys):
    text = "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
    text += "class Pole(CartPoleEnv):\n    colour = 'red'\ngymnasium.register('EditedPole', Pole)\n"
    (here / "edited_pole.py").write_text(text)
    monkeypatch.syspath_prepend(here)
    assert start("--env-id", "edited_pole:EditedPole")[0] == 0
    run = Path("runs/run")
    max((run / "checkpoints").glob("step_*.pt")).unlink()
    (run / "summary.json").unlink()
    (here / "edited_pole.py").write_text(text.replace("red", "blue"))
    assert resumed(run, capsys)[0].endswith(", but not exactly: another environment's code")
    del gym.registry["EditedPole"]


# ------------------------------------------------------------------------------ how it fails, whatever has raised
class Http(Exception):
    status = 404


class Rude(BaseException):
    pass


RAISED = [ValueError("bad\nluck"), MemoryError(), RecursionError("deep"), SystemExit(0)]
RAISED += [
    StopIteration(),
    OSError(errno.EIO, "cable"),
    Http("lost"),
    Rude("!"),
    AssertionError(),
    ppo.UsageError("no"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_is_raised_ends_the_run_with_one_sentence(error, here, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)

    def fail():
        raise error

    before_update(monkeypatch, 4, fail)
    status, run = start(iterations=6)
    err = capsys.readouterr().err
    newest = "runs/run/checkpoints/step_000000000256.pt"
    assert status == 1 and re.fullmatch(
        rf"error: iteration 4: [^\n]*; the last good checkpoint is {newest}[^\n]*\n", err
    )
    assert summary(run)["status"] == "failed" and summary(run)["error"] in err
    expected = isinstance(error, (OSError, ppo.UsageError))
    assert (f"{type(error).__name__}" in err and "the traceback is in runs/run/error.txt" in err) is not expected
    assert (run / "error.txt").exists() is not expected
    if not expected:
        told = (run / "error.txt").read_text(encoding="utf-8")
        assert told.startswith("Traceback") and "in fail\n" in told
    assert signal.getsignal(signal.SIGINT) is handler


def test_environment_that_raises_has_its_traceback_in_a_file(here, capsys):
    gym.register("Raises-v0", Toy, kwargs={"bad": "raise in step", "after": 150})
    Toy.made = 0
    assert start("--env-id", "Raises-v0")[0] == 1
    del gym.registry["Raises-v0"]
    assert "the gripper broke" in (here / "runs/run/error.txt").read_text().split("direct cause")[0]


def test_corrupt_checkpoint_is_not_called_the_last_good_one(here, monkeypatch, capsys):
    def fail():
        cut(Path("runs/run/checkpoints/step_000000000512.pt"))
        raise ValueError("bad luck")

    before_update(monkeypatch, 5, fail)
    assert start(iterations=6)[0] == 1
    assert "the last good checkpoint is runs/run/checkpoints/step_000000000256.pt" in capsys.readouterr().err


def replaced(run):
    run.rename(run.with_name("moved"))
    shutil.copytree(run.with_name("moved"), run)


@pytest.mark.parametrize("action", [shutil.rmtree, lambda run: run.rename(run.with_name("moved")), replaced])
def test_run_directory_that_goes_away_ends_the_run_with_one_sentence(action, here, monkeypatch, capsys):
    before_update(monkeypatch, 3, lambda: action(Path("runs/run")))
    status, run = start(iterations=6)
    err = capsys.readouterr().err
    assert status == 1 and re.match(r"error: iteration 4: runs/run was moved, replaced or deleted; the last good", err)
    assert err.count("\n") == 1 and not (run / "summary.json").exists()
    if run.exists():  # that is another one now
        assert newest(run)["iteration"] == 2


class FullDisk:
    """Every call that needs room fails from the given one on. What was written before can be written over."""

    def __init__(self, patch, after):
        self.left = after
        self.patch = patch
        patch.setattr(ppo, "open", self.open, raising=False)
        patch.setattr(os, "fsync", self.spend(os.fsync))
        patch.setattr(os, "mkdir", self.spend(os.mkdir))

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def spend(self, function):
        def spent(*args, **options):
            self.check()
            return function(*args, **options)

        return spent

    def open(self, path, *args, **options):
        file = open(path, *args, **options)
        if "r" in (*args, options.get("mode", ""), "")[0]:
            return file
        disk = self

        class File:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, content):
                disk.check()
                return file.write(content)

            def flush(self):
                disk.check()
                return file.flush()

        return File()


def test_full_disk_at_any_point_is_one_sentence_and_a_summary(here, capsys):
    for after in range(1000):
        shutil.rmtree("runs", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, 7 * after)
            status, run = start("--update-epochs", "1", iterations=4)
        err = capsys.readouterr().err
        if disk.left >= 0:
            break
        if status == 0:  # all was saved, and at most TensorBoard had more to write
            assert err.count("\n") <= 1 and summary(run)["status"] == "completed"
            continue
        if status == 2:  # it had not begun
            assert re.fullmatch(r"error: runs/run cannot be made \(No space left on device\)[^\n]*\n", err), (
                after,
                err,
            )
            assert not Path("runs").exists()
            continue
        told = (
            r"error: iteration \d: \[Errno 28\] No space left on device[^\n]*; the last good checkpoint is ([^\n]*)\.\n"
        )
        assert status == 1 and (match := re.fullmatch(told, err)), (after, status, err)
        assert summary(run)["status"] == "failed", after
        assert match[1] == "none" or not ppo.damage_of(Path(match[1]))
    assert after > 15 and status == 0
