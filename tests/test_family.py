"""What users of a2c, a3c, trpo, reinforce and sac meet; the text they share is tested in test_run_directory."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from test_run_directory import (
    SCRIPT,
    assert_same_run,
    checkpoints,
    here,
    newest,
    process,
    rows,
    same,
    scalars,
    summary,
    timeless,
    wait_for_the_next_second,
)

__all__ = ["here"]  # a fixture
ROOT = SCRIPT.parent
SPACES = Box(-np.inf, np.inf, (3,)), Box(-2, 2, (1,))  # of Pendulum
SMALL = {
    "ppo": "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2 --checkpoint-interval 2",
    "a2c": "--num-envs 2 --num-steps 8 --log-interval 3 --checkpoint-interval 8",
    "a3c": "--num-workers 1 --num-envs 2 --num-steps 8 --log-interval 3 --checkpoint-interval 8",
    "trpo": "--num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2 --checkpoint-interval 2",
    "reinforce": "--num-envs 2 --num-steps 60 --value-batch-size 60 --checkpoint-interval 2",
    "sac": "--num-envs 2 --learning-starts 60 --log-interval 50 --updates-per-step 0.02 --batch-size 16"
    " --checkpoint-interval 2",
}
OTHERS = [name for name in SMALL if name != "ppo"]  # ppo.py is tested in test_run_directory and test_method
every_script = pytest.mark.parametrize("name", OTHERS)
every_cheap_script = pytest.mark.parametrize(  # a3c.py has the same tests of its own
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "a3c" else name for name in OTHERS]
)
gaussian = pytest.mark.parametrize(
    "name", ["ppo", "a2c", pytest.param("a3c", marks=pytest.mark.slow), "trpo", "reinforce"]
)
on_policy = pytest.mark.parametrize("name", ["a2c", "trpo", "reinforce"])


def small(name: str, *flags: str) -> list[str]:
    return [*SMALL[name].split(), "--device", "cpu", "--compile", "off", *flags]


def script(name: str):
    return importlib.import_module(name)


KILL = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import {name} as script
log = script.Run.log
def log_then_die(run, *values, **groups):
    log(run, *values, **groups)
    if run.iteration >= {iteration}: os.kill(os.getpid(), signal.SIGKILL)
script.Run.log = log_then_die
script.main(sys.argv[1:])
"""
EXACT = [
    ("a2c", "CartPole-v1", 20, 30 * 16, ""),
    ("a2c", "Pendulum-v1", 50, 80 * 16, "--norm-obs --norm-reward --checkpoint-interval 30 --log-std-end -2"),
]
EXACT += [("a2c", "CartPole-v1", 20, 30 * 16, "--optimizer adam --checkpoint-interval 7")]
EXACT += [
    ("trpo", "CartPole-v1", 5, 900, ""),
    ("trpo", "Pendulum-v1", 9, 1536, "--norm-obs --fisher-fraction 0.5 --checkpoint-interval 4 --log-std-end -2"),
]
EXACT += [("reinforce", "CartPole-v1", 5, 1200, "")]
EXACT += [("reinforce", "Pendulum-v1", 5, 3000, "--norm-obs --norm-reward --log-std-end -2")]


@pytest.mark.parametrize("name, env_id, iteration, total, more", EXACT)
def test_run_that_was_killed_and_resumed_equals_one_that_was_not(name, env_id, iteration, total, more, here, capsys):
    flags = small(name, "--env-id", env_id, "--total-timesteps", str(total), *more.split())
    assert script(name).main([*flags, "--run-name", "whole"]) == 0
    code = KILL.format(folder=str(ROOT), name=name, iteration=iteration)
    assert process("-c", code, *flags, "--run-name", "killed", cwd=".").returncode == -signal.SIGKILL
    run = here / "runs" / "killed"
    assert 0 < newest(run)["iteration"] < iteration and not (run / "summary.json").exists()
    assert script(name).main(["--resume", str(run)]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert_same_run(here / "runs" / "whole", run)


@every_script
@pytest.mark.parametrize("content", [None, "{damaged"])
def test_run_without_a_summary_is_completed_by_a_resume(name, content, here):
    assert script(name).main([*small(name), "--run-name", "run", "--total-timesteps", "1000"]) == 0
    run, told = here / "runs" / "run", summary(here / "runs" / "run")
    before = [rows(run, kind) for kind in ("episodes", "progress")], checkpoints(run)
    (run / "summary.json").unlink() if content is None else (run / "summary.json").write_text(content)
    assert script(name).main(["--resume", str(run)]) == 0
    for key in ("status", "global_step", "train_last100"):
        assert summary(run)[key] == told[key], key
    assert 0 < summary(run)["sps"] < 3 * told["sps"]
    assert ([rows(run, kind) for kind in ("episodes", "progress")], checkpoints(run)) == before


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in ("a2c", "sac") else pytest.mark.slow) for x in OTHERS]
)
def test_signal_from_outside_stops_a_real_process_that_can_go_on(name, here, capsys):
    command = [sys.executable, ROOT / f"{name}.py", *small(name), "--run-name", "run", "--total-timesteps", "6000"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while child.poll() is None and not list(here.glob("runs/run/checkpoints/step_*.pt")):
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1] == b"" and child.returncode == 130
    finally:
        child.kill()
    run = here / "runs" / "run"
    stopped = summary(run)
    assert stopped["status"] == "interrupted" and stopped["global_step"] < 6000
    row = 2 * 8 * 3 if name in ("a2c", "a3c") else 1  # steps of a row; one that a signal cuts comes after the resume
    assert stopped["global_step"] == newest(run)["global_step"]
    steps = [0] + [int(line["global_step"]) for line in rows(run, "progress")]
    assert steps[-1] == stopped["global_step"] // row * row
    wait_for_the_next_second()
    assert script(name).main(["--resume", str(run)]) == 0
    assert summary(run)["status"] == "completed" and summary(run)["global_step"] > 6000 - 128
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert script(name).main([*small(name), "--run-name", "whole", "--total-timesteps", "6000"]) == 0
    one, other = newest(here / "runs" / "whole"), newest(run)
    for key in one.keys() - {"wall_time", "csv", "best"}:  # the checkpoint of a signal may be the best one
        assert same(one[key], other[key]), key
    assert timeless(here / "runs" / "whole", "episodes") == timeless(run, "episodes")
    steps = [int(row["global_step"]) for row in rows(run, "progress")]
    loss = "losses/actor_loss" if name == "sac" else "losses/policy_loss"
    assert steps == sorted(set(steps)) and [step for step, _ in scalars(run)[loss]] == steps


@every_script
def test_resume_of_a_completed_run_changes_nothing(name, here, capsys):
    assert script(name).main([*small(name), "--total-timesteps", "600", "--run-name", "run"]) == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert script(name).main(["--resume", "runs/run"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@every_script
def test_evaluation_plays_and_records(name, here, capsys):
    assert script(name).main([*small(name), "--total-timesteps", "600", "--run-name", "run"]) == 0
    weights = newest(here / "runs" / "run")["agent"]
    assert script(name).main(["--evaluate", "runs/run", "--eval-episodes", "3"]) == 0
    assert re.search(r"^3 deterministic episodes: mean -?[\d,.]+, std", capsys.readouterr().out, re.M)
    assert summary(here / "runs" / "run")["eval"]["deterministic"]["episodes"] == 3
    assert all(torch.equal(x, weights[key]) for key, x in newest(here / "runs" / "run")["agent"].items())


REFUSED = [
    ("a2c", "--log-interval 0", "greater than 0"),
    ("a2c", "--num-steps 0", "greater than 0"),
    ("a2c", "--num-steps 1 --num-envs 1 --norm-adv", "a larger --num-steps"),
    ("a2c", "--total-timesteps 39", "ask for 40 or more"),
    ("a2c", "--gae-lambda 1.5", "at most 1"),
    ("trpo", "--max-kl 0", "greater than 0"),
    ("trpo", "--cg-damping=-0.1", "0 or more"),
    ("trpo", "--line-search-shrink 1.5", "at most 1"),
    ("trpo", "--fisher-fraction 2", "at most 1"),
    ("trpo", "--num-minibatches 7", "would"),
    ("reinforce", "--num-envs 1", "--num-envs 2 or more"),
    ("reinforce", "--value-batch-size 0", "greater than 0"),
    ("reinforce", "--gamma 1.1", "at most 1"),
]


@pytest.mark.parametrize("name, flags, would_work", REFUSED)
def test_bad_argument_is_refused_in_one_sentence(name, flags, would_work, here, capsys):
    assert script(name).main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and would_work in err
    assert not list(here.iterdir())


QUIET = {
    "a2c": {
        "CartPole-v1": "--total-timesteps 240",
        "HalfCheetah-v4": "--total-timesteps 240",
        "BreakoutNoFrameskip-v4": "--total-timesteps 16 --num-steps 2",
    },
    "a3c": {
        "CartPole-v1": "--total-timesteps 240",
        "HalfCheetah-v4": "--total-timesteps 240 --num-workers 2",
        "BreakoutNoFrameskip-v4": "--total-timesteps 16 --num-steps 2 --num-workers 2",
    },
    "trpo": {
        "CartPole-v1": "--total-timesteps 512",
        "HalfCheetah-v4": "--total-timesteps 512",
        "BreakoutNoFrameskip-v4": "--total-timesteps 16 --num-steps 4",
    },
    "reinforce": {
        "CartPole-v1": "--total-timesteps 400",
        "HalfCheetah-v4": "--total-timesteps 240",
        "BreakoutNoFrameskip-v4": "--total-timesteps 16 --num-steps 4 --value-batch-size 8",
    },
}


OFTEN = {("a2c", "CartPole-v1"), ("a2c", "BreakoutNoFrameskip-v4"), ("a3c", "HalfCheetah-v4")}
OFTEN |= {("trpo", "HalfCheetah-v4"), ("reinforce", "CartPole-v1")}  # the others are slow


@pytest.mark.parametrize(
    "name, env_id",
    [
        pytest.param(name, env_id, marks=[] if (name, env_id) in OFTEN else pytest.mark.slow)
        for name in QUIET
        for env_id in QUIET[name]
    ],
)
def test_normal_run_prints_plain_lines_and_no_warning(name, env_id, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")  # and alone in an empty folder
    flags = ["--env-id", env_id, *small(name), *QUIET[name][env_id].split(), "--run-name", "run"]
    done = process("-W", "default", "mine.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, understood, *progress, last = done.stdout.splitlines()
    assert understood.startswith("observes Box(") and len(understood) <= 80
    assert first.startswith("runs/run (cpu, ") and re.match(r"completed after [\d,]+ steps: runs/run", last)
    assert progress and all(re.match(r" *[\d,]+ steps +\d+% +[\d,]+/s  return .* left$", line) for line in progress)
    assert json.loads((tmp_path / "runs/run/config.json").read_text())["args"]["exp_name"] == "mine"


@on_policy
def test_help_shows_the_defaults_of_the_family(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help", "--env-id", "HalfCheetah-v4"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "(default: True)" in text.split("--norm-obs")[1][:200]
    assert "(default: 1000000)" in text.split("--total-timesteps")[1][:200]


@every_cheap_script
def test_same_seed_is_the_same_run_and_another_seed_is_not(name, here):
    weights = []
    for run, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        flags = ["--total-timesteps", "600", "--run-name", run, "--seed", seed]
        assert script(name).main([*small(name), *flags]) == 0
        weights.append(newest(Path("runs") / run)["agent"])
        torch.rand(3)  # what happened before in the process must not matter
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("name", ["a2c", *(pytest.param(x, marks=pytest.mark.slow) for x in ("trpo", "reinforce"))])
def test_compiled_gradient_takes_discrete_observations(name, here):
    flags = ["--env-id", "FrozenLake-v1", "--total-timesteps", "256", "--compile", "on", "--run-name", "run"]
    assert script(name).main([*small(name), *flags]) == 0
    assert json.loads(Path("runs/run/config.json").read_text())["args"]["compile"] == "on"


@gaussian
def test_deviation_falls_linearly_to_log_std_end_and_nothing_else_moves_it(name, here):
    """Checkpoints have that of their last iteration, and it has no part in what is optimised."""
    planned = "--env-id Pendulum-v1 --log-std-init -0.5 --log-std-end -1.5 --ent-coef 0.1 --keep-checkpoints"
    flags = [*planned.split(), "--total-timesteps", "1280", "--run-name", "run"]
    assert script(name).main([*small(name), *flags]) == 0
    run = here / "runs" / "run"
    found = [torch.load(path, weights_only=True) for path in (run / "checkpoints").glob("step_*.pt")]
    assert len(found) > 2
    for checkpoint in found:
        steps, updates = checkpoint["global_step"], checkpoint["iteration"]
        before = steps - steps / max(updates, 1)  # when its last iteration began
        expected = -0.5 - before / summary(run)["global_step"]
        assert checkpoint["agent"]["log_std"].tolist() == pytest.approx([expected], abs=1e-6)
    entropy = [float(row["losses/entropy"]) for row in rows(run, "progress")]
    assert entropy == sorted(entropy, reverse=True) and entropy[0] - entropy[-1] > 0.5
    assert script(name).main(["--evaluate", "runs/run", "--eval-episodes", "1"]) == 0
    assert script(name).main(["--evaluate", "runs/run", "--eval-episodes", "1", "--eval-stochastic"]) == 0
    told = summary(run)["eval"]
    assert told["deterministic"]["mean"] != told["stochastic"]["mean"]
    args = script(name).parse_args([*small(name), *planned.split()])
    agent = script(name).Agent(*SPACES, args, share_body=False)
    assert "log_std" in agent.state_dict() and "log_std" not in dict(agent.named_parameters())
    assert agent.log_std.item() == -0.5
    learned = script(name).Agent(*SPACES, script(name).parse_args(small(name)), share_body=False)
    sizes = [sum(p.numel() for p in each.policy_parameters()) for each in (learned, agent)]
    assert sizes[0] == sizes[1] + 1
    script(name).anneal_log_std(learned, 0.0, script(name).parse_args(small(name)))
    assert learned.log_std.item() == 0  # as it was


@gaussian
def test_log_std_end_means_nothing_to_discrete_actions(name, here):
    for run, flags in (("plain", []), ("planned", ["--log-std-end", "-2"])):
        assert script(name).main([*small(name), "--total-timesteps", "600", "--run-name", run, *flags]) == 0
    assert same(newest(here / "runs" / "plain")["agent"], newest(here / "runs" / "planned")["agent"])


@pytest.mark.parametrize("name", ["ppo", "a2c", "a3c", "trpo", "reinforce"])
def test_none_learns_the_deviation_where_the_family_plans_it(name):
    assert script(name).parse_args(["--env-id", "Pendulum-v1"]).log_std_end == -1
    args = script(name).parse_args(["--env-id", "Pendulum-v1", "--log-std-end", "None"])
    assert args.log_std_end is None
    assert "log_std" in dict(script(name).Agent(*SPACES, args, share_body=False).named_parameters())
