"""What a user of grpo_toy.py meets: bad input, bad days, kill and resume, files that agree, evaluation, terminal."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run_directory import (
    SCRIPT,
    cut,
    here,
    newest,
    process,
    rows,
    same,
    scalars,
    summary,
    tensorboard,
    wait_for_the_next_second,
)

import grpo_toy

__all__ = ["here"]  # a fixture
TOY = SCRIPT.parent / "grpo_toy.py"
SMALL = "--num-digits 2 --n-layer 1 --n-embd 16 --n-head 2 --sft-steps 3 --eval-prompts 8 --max-completion-length 8"
SMALL = [*SMALL.split(), "--generation-batch-size", "16", "--num-generations", "4", "--num-threads", "1"]
SMALL += ["--checkpoint-interval", "2", "--eval-interval", "3"]


def start(*flags, steps=6, name="run"):
    """Trains a small run in this process; returns the exit status and the run directory."""
    status = grpo_toy.main([*SMALL, "--max-steps", str(steps), "--run-name", name, *flags])
    return status, Path("runs") / name


def timeless(run, name):
    """The rows of a csv file without what the clock wrote."""
    clocks = ("wall_time", "sps", "charts/SPS", "tokens_per_second/sampled", "tokens_per_second/trained")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows(run, name)]


def assert_same_run(a, b):
    """Same weights, reference, optimizer, random states, best checkpoint, completions and progress."""
    for file in ("best.pt", max(path.name for path in (a / "checkpoints").iterdir())):
        one, other = (torch.load(run / "checkpoints" / file, weights_only=True) for run in (a, b))
        assert one.keys() == other.keys()
        for state in (one, other):
            state["notes"].pop("tokens_per_second", None)
        for key in one.keys() - {"wall_time", "csv"}:  # digits of the clock count in the length of a file
            assert same(one[key], other[key]), (file, key)
    assert len(timeless(a, "episodes")) > 1
    assert timeless(a, "episodes") == timeless(b, "episodes")
    assert timeless(a, "progress") == timeless(b, "progress")


# ----------------------------------------------------------------------------------------------------- bad input
BAD_ARGUMENTS = {
    "--num-generations 1": "use 2 or more",
    "--generation-batch-size 50": "not divisible by --num-generations 8 and --steps-per-generation 1; 56 is",
    "--generation-batch-size 24 --steps-per-generation 5": "; 40 is",
    "--generation-batch-size 0": "greater than 0",
    "--rewards corect": "corect is unknown; there are correct, exact, format, length, rising, overlong",
    "--rewards correct correct": "twice",
    "--rewards": "--rewards needs one or more of correct",
    "--condition length:correct>=3": "is about length, not in use; add it to --rewards",
    "--rewards correct --condition correct:correct>=3": "name the easy one",
    "--rewards correct length --condition length:correct>3": 'not of the form "length:correct>=3"',
    "--rewards correct length --condition length": 'not of the form "length:correct>=3"',
    "--rewards correct length --reward-weights 1 2 3": "--reward-weights are 3, but --rewards are 2",
    "--reward-weights nan": "must be a finite number",
    "--epsilon=-0.1": "0 or more",
    "--epsilon nan": "must be a finite number",
    "--epsilon-high=-1": "0 or more",
    "--beta=-0.1": "0 or more",
    "--method rloo --num-iterations 2": "use --num-iterations 1 and --steps-per-generation 1, or another loss type",
    "--method rloo --steps-per-generation 2": "--loss-type reinforce has no ratio",
    "--method sapo --sapo-temperature-neg 0": "--sapo-temperature-neg is 0.0, but must be greater than 0",
    "--sapo-temperature-pos nan": "must be a finite number",
    "--method ppo --max-steps 1": "for argument '--method'. Expected one of ('grpo', 'dr_grpo',",
    "--loss-type ppo": "Expected one of ('grpo', 'dr_grpo', 'dapo', 'cispo', 'sapo', 'reinforce')",
    "--beta nan": "must be a finite number",
    "--beta inf": "must be a finite number",
    "--learning-rate 0": "greater than 0",
    "--temperature 0": "greater than 0",
    "--max-steps 0": "greater than 0",
    "--num-iterations 0": "greater than 0",
    "--max-completion-length 8": "too short for 6 digits, two brackets and an end; ask for 9 or more",
    "--num-threads 100000": "cores; ask for fewer",
    "--run-name ..": "is taken",
    "--rewards correct length --condition length:correct>=nan": 'not of the form "length:correct>=3"',
    "--num-digits 0": "greater than 0",
    "--n-head 3": "--n-embd 64 is not divisible by --n-head 3",
    "--seed 4294967296": "less than 2**32",
    "--seed=-1": "0 or more",
    "--overlong-buffer 17": "at most",
    "--init-from nowhere": "nowhere is no run of this project with a model in it",
    "--resume nowhere": "no run directory of this script",
    "--evaluate nowhere": "no run directory of this script",
}


@pytest.mark.parametrize("argv", BAD_ARGUMENTS)
def test_bad_argument_is_refused_in_one_sentence(argv, here, capsys):
    assert grpo_toy.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and BAD_ARGUMENTS[argv] in err, err
    assert not list(here.iterdir())


@pytest.mark.parametrize("argv", ["--num-generations 1", "--rewards corect", "--epsilon x"])
def test_exit_status_of_the_script_for_bad_input(argv, tmp_path):
    done = process(TOY, *argv.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", []) and done.stderr
    assert "Traceback" not in done.stderr


def test_cuda_where_there_is_none_is_refused(here, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start("--device", "cuda")[0] == 2
    assert "use --device cpu" in capsys.readouterr().err and not list(here.iterdir())


def test_existing_run_name_is_refused_and_left_alone(here, capsys):
    start(steps=1)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert start(steps=1)[0] == 2
    assert "--resume runs/run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_resume_with_changed_arguments_is_refused_with_the_difference(here, capsys):
    start(steps=1)
    capsys.readouterr()
    assert grpo_toy.main(["--resume", "runs/run", "--beta", "0.5", "--rewards", "exact"]) == 2
    err = capsys.readouterr().err
    assert "beta 0.04 -> 0.5" in err and "rewards ['correct'] -> ['exact']" in err


@pytest.mark.parametrize("flag, own", [("n-embd", 16), ("n-head", 2), ("num-digits", 2)])
def test_init_from_a_model_of_another_size_is_refused(flag, own, here, capsys):
    start(steps=1)
    capsys.readouterr()
    assert start("--init-from", "runs/run", f"--{flag}", "4", name="other")[0] == 2
    err = capsys.readouterr().err
    assert f"ask for its {flag.replace('-', '_')} {own}." in err and not Path("runs/other").exists()


@pytest.mark.parametrize("content", [[1], {"model": [1]}, {"model": 3}, {}])
def test_init_from_leaves_out_and_names_a_file_without_a_model(content, here, capsys):
    start(steps=1)
    other = Path("runs/run/checkpoints/step_000000000009.pt")
    torch.save(content, other)
    capsys.readouterr()
    assert start("--init-from", "runs/run", name="other", steps=1)[0] == 0
    assert re.fullmatch(rf"{other} is not a checkpoint of this run [^\n]+ left out.\n", capsys.readouterr().err)
    assert start("--init-from", str(other), name="another")[0] == 2
    assert re.fullmatch(rf"error: {other} is not a checkpoint of this run [^\n]+\n", capsys.readouterr().err)


def test_evaluation_with_changed_arguments_is_refused(here, capsys):
    start(steps=1)
    capsys.readouterr()
    assert grpo_toy.main(["--evaluate", "runs/run", "--n-head", "4", "--temperature", "0.1"]) == 2
    assert "temperature 1.0 -> 0.1, n_head 2 -> 4" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ bad days
def test_nan_in_the_loss_ends_the_run_with_its_iteration_and_the_checkpoint_before(here, monkeypatch, capsys):
    update, calls = grpo_toy.update, []

    def third_is_poisoned(model, *rest):
        calls.append(0)
        if len(calls) == 3:
            model.head.weight.data.fill_(torch.nan)
        return update(model, *rest)

    monkeypatch.setattr(grpo_toy, "update", third_is_poisoned)
    status, run = start()
    err = capsys.readouterr().err
    assert status == 1 and re.fullmatch(r"error: iteration 3: loss is nan; the last good checkpoint is [^\n]+\n", err)
    assert str(run / "checkpoints" / "step_000000000002.pt") in err
    assert summary(run)["status"] == "diverged" and summary(run)["error"] in err
    assert all(x.isfinite().all() for x in newest(run)["model"].values())


def test_warm_start_that_diverges_fails_the_run_and_is_not_cached(here, capsys):
    status, run = start("--sft-learning-rate", "1e30")
    assert status == 1 and "the loss of the warm start is" in capsys.readouterr().err
    assert summary(run)["status"] == "diverged" and not Path("runs/warm_starts").exists()


def test_reward_that_raises_ends_the_run_with_one_sentence(here, monkeypatch, capsys):
    def reward_mine(prompt, completion, args):
        raise ValueError("no verdict")

    monkeypatch.setattr(grpo_toy, "reward_mine", reward_mine, raising=False)
    status, run = start("--rewards", "correct", "mine")
    err = capsys.readouterr().err
    assert status == 1 and "iteration 1: reward_mine raised ValueError('no verdict')" in err and err.count("\n") == 1
    assert summary(run)["status"] == "failed"


def test_full_disk_ends_the_run_and_leaves_the_checkpoint_before(here, monkeypatch, capsys):
    write = grpo_toy.write_atomically

    def full(path, content):
        if path.name == "step_000000000004.pt":
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(grpo_toy, "write_atomically", full)
        status, run = start()
    err = capsys.readouterr().err
    assert status == 1 and "No space left" in err and err.count("\n") == 1 and "step_000000000002.pt" in err
    start(name="whole")
    assert grpo_toy.main(["--resume", str(run)]) == 0
    assert_same_run(Path("runs/whole"), run)


# ------------------------------------------------------------------------------------- kill, signals and resume
KILL = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import grpo_toy
method = getattr(grpo_toy.Run, {method!r})
def then_die(run, *values, **groups):
    method(run, *values, **groups)
    if run.iteration == {iteration}: os.kill(os.getpid(), signal.{signal})
grpo_toy.Run.{method} = then_die
sys.exit(grpo_toy.main(sys.argv[1:]))
"""


def killed(*flags, iteration, signal="SIGKILL", method=None):
    """A run of a real process that is killed after the row of an iteration, or gets another signal in it."""
    method = method or ("write_row" if signal == "SIGKILL" else "log")
    code = KILL.format(folder=str(TOY.parent), iteration=iteration, signal=signal, method=method)
    return process("-c", code, *SMALL, "--max-steps", "6", "--run-name", "killed", *flags, cwd=".").returncode


EXACT = [
    "--rewards length",
    pytest.param("--method dapo --rewards length overlong", marks=pytest.mark.slow),
    "--no-cache-warm-start --method gspo --rewards length",
]
EXACT += ["--method gdpo --steps-per-generation 2 --condition length:correct>=-3"]
EXACT += [pytest.param("--method rloo --rewards length", marks=pytest.mark.slow)]


@pytest.mark.parametrize("flags", EXACT)
def test_run_that_was_killed_and_resumed_equals_one_that_was_not(flags, here, capsys):
    start(*flags.split(), name="whole")
    assert killed(*flags.split(), iteration=5) == -signal.SIGKILL
    run = here / "runs" / "killed"
    assert newest(run)["iteration"] == 4 and not (run / "summary.json").exists()
    assert int(rows(run, "progress")[-1]["global_step"]) == 5  # what the resumed run has to forget
    wait_for_the_next_second()
    assert grpo_toy.main(["--resume", str(run)]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert_same_run(here / "runs" / "whole", run)
    assert not same(newest(run)["model"], newest(run)["reference"])
    one, other = summary(here / "runs" / "whole"), summary(run)
    assert all(one[key] == other[key] for key in ("accuracy_before", "accuracy", "accuracy_greedy", "format"))
    assert [step for step, _ in scalars(run)["reward"]] == [1, 2, 3, 4, 5, 6]


def test_the_curve_of_the_warm_start_is_whole_after_a_resume(here):
    assert killed("--sft-steps", "9", "--no-cache-warm-start", iteration=3) == -signal.SIGKILL
    wait_for_the_next_second()
    assert grpo_toy.main(["--resume", "runs/killed"]) == 0
    assert [step for step, _ in scalars(Path("runs/killed"))["sft/loss"]] == [*range(1, 10)]


def test_the_checkpoint_of_step_0_holds_the_warm_start(here):
    def first(sft_steps):
        _, run = start("--sft-steps", sft_steps, "--keep-checkpoints", steps=1, name=sft_steps)
        return torch.load(run / "checkpoints" / "step_000000000000.pt", weights_only=True)

    untrained, warm = first("0"), first("9")
    assert same(warm["model"], warm["reference"]) and not same(warm["model"], untrained["model"])
    assert warm["notes"] == {"warm_start": "9 steps"}


@pytest.mark.parametrize("iteration, method", [(0, "save"), (0, None), (1, None)])
def test_run_that_was_killed_before_its_first_interval_ended_loses_nothing(iteration, method, here):
    start(name="whole")
    assert killed(iteration=iteration, method=method) == -signal.SIGKILL
    assert grpo_toy.main(["--resume", "runs/killed"]) == 0
    assert_same_run(Path("runs/whole"), Path("runs/killed"))


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_signal_saves_the_iteration_and_the_run_goes_on_exactly(name, here, capsys):
    start(name="whole")
    assert killed(iteration=3, signal=name) == 128 + signal.Signals[name]
    run = Path("runs/killed")
    assert newest(run)["iteration"] == 3 and summary(run)["status"] == "interrupted" and "error" not in summary(run)
    assert grpo_toy.main(["--resume", str(run)]) == 0
    assert summary(run)["status"] == "completed"
    one, other = newest(Path("runs/whole")), newest(run)
    assert same(one["model"], other["model"]) and timeless(run, "progress") == timeless(Path("runs/whole"), "progress")


def test_signal_during_the_warm_start_stops_a_real_process_that_can_go_on(here, capsys):
    flags = [*SMALL, "--sft-steps", "100000", "--run-name", "run"]
    child = subprocess.Popen([sys.executable, TOY, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while "warm start" not in child.stdout.readline():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1] == "" and child.returncode == 130
    finally:
        child.kill()
    assert summary(Path("runs/run"))["status"] == "interrupted" and newest(Path("runs/run"))["iteration"] == 0
    assert not Path("runs/warm_starts").exists()
    assert grpo_toy.main(["--evaluate", "runs/run"]) == start("--init-from", "runs/run", name="other")[0] == 2
    assert capsys.readouterr().err.count("it is from before the warm start") == 2 and not Path("runs/other").exists()


def test_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(here, capsys):
    _, run = start()
    shutil.copytree(run, here / "runs" / "whole")
    cut(run / "checkpoints" / "step_000000000006.pt")
    capsys.readouterr()
    assert grpo_toy.main(["--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "step_000000000006.pt is corrupt" in err and err.count("\n") == 1 and "goes on from step 4" in out
    assert_same_run(here / "runs" / "whole", run)


def test_resume_of_a_completed_run_changes_nothing(here, capsys):
    start(steps=2)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert grpo_toy.main(["--resume", "runs/run"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_run_that_was_killed_before_its_summary_was_written_is_completed_by_a_resume(here):
    start(steps=3)
    run, told = Path("runs/run"), summary(Path("runs/run"))
    (run / "summary.json").unlink()
    assert grpo_toy.main(["--resume", str(run)]) == 0
    session = {"wall_time", "startup_time", "peak_memory_mb", "sps", "tokens_per_second"}
    assert {key: told[key] for key in told.keys() - session} == {
        key: summary(run)[key] for key in summary(run).keys() - session
    }
    assert summary(run)["sps"] == pytest.approx(told["sps"], rel=0.5)
    assert summary(run)["tokens_per_second"] == pytest.approx(told["tokens_per_second"], rel=0.5)


# ---------------------------------------------------------------------------------------------------- warm start
def test_cached_warm_start_gives_the_same_run_and_is_left_alone(here, capsys):
    start(name="first")
    (cached,) = Path("runs/warm_starts").iterdir()
    before = cached.read_bytes(), cached.stat().st_mtime_ns
    capsys.readouterr()
    start(name="second")
    assert f"warm start: {cached}" in capsys.readouterr().out
    start("--no-cache-warm-start", name="third")
    assert "warm start: " not in capsys.readouterr().out
    assert before == (cached.read_bytes(), cached.stat().st_mtime_ns)
    assert_same_run(Path("runs/first"), Path("runs/second"))
    assert same(newest(Path("runs/first"))["model"], newest(Path("runs/third"))["model"])


def test_run_that_was_moved_goes_on_and_caches_where_it_is(here, monkeypatch):
    assert killed(iteration=0, method="save") == -signal.SIGKILL  # before the warm start
    Path("elsewhere").mkdir()
    shutil.move("runs/killed", "elsewhere/run")
    monkeypatch.chdir("elsewhere")
    shutil.rmtree(here / "runs")
    assert grpo_toy.main(["--resume", "run"]) == 0
    assert len(list(Path("warm_starts").iterdir())) == 1 and not (here / "runs").exists()


def test_warm_start_of_other_arguments_is_another_one(here):
    start(name="a", steps=1)
    start("--sft-steps", "4", name="b", steps=1)
    start("--seed", "2", name="c", steps=1)
    start("--beta", "0.1", name="d", steps=1)  # has no part in it
    assert len(list(Path("runs/warm_starts").iterdir())) == 3


def test_corrupt_warm_start_is_made_anew(here, capsys):
    start(name="first", steps=1)
    (cached,) = Path("runs/warm_starts").iterdir()
    cut(cached)
    start(name="second", steps=1)
    assert "corrupt" in capsys.readouterr().err
    assert same(newest(Path("runs/first"))["model"], newest(Path("runs/second"))["model"])


def test_init_from_takes_the_trained_model_as_policy_and_as_reference(here):
    start(name="trained")
    start("--init-from", "runs/trained", "--rewards", "length", name="run", steps=1)
    trained, run = newest(Path("runs/trained")), newest(Path("runs/run"))
    assert same(run["reference"], trained["model"]) and not same(run["model"], trained["model"])
    assert summary(Path("runs/run"))["accuracy_before"] == summary(Path("runs/trained"))["accuracy"]


# ----------------------------------------------------------------------------------------- files and evaluation
TAGS = """charts/SPS charts/episodic_return charts/episodic_length charts/train_last100
reward reward_std frac_reward_zero_std rewards/correct/mean rewards/correct/std rewards/length/mean
rewards/length/std frac_reward_zero_std/correct frac_reward_zero_std/length kl kl/k1 kl/k2 kl/k3 entropy
clip_ratio/low_mean clip_ratio/high_mean completions/mean_length completions/clipped_ratio ratio/max
ratio/max_first_step loss grad_norm learning_rate tokens_per_second/sampled tokens_per_second/trained
eval/accuracy eval/accuracy_greedy eval/pass@8 eval/format"""
EVALUATED = [tag for tag in TAGS.split() if tag.startswith("eval/")]
CLOCK = ["global_step", "wall_time", "sps"]


def test_csv_tensorboard_and_summary_agree(here):
    _, run = start("--rewards", "correct", "length", "--condition", "length:correct>=3")
    (before, *table), events, final = rows(run, "progress"), scalars(run), summary(run)
    assert before["global_step"] == "0" and {tag for tag in before if before[tag]} == {*EVALUATED, *CLOCK} - {"sps"}
    assert set(events) == {*TAGS.split(), "sft/loss"} and set(table[0]) == {*TAGS.split(), *CLOCK}
    assert [int(row["step"]) for row in rows(run, "sft")] == [step for step, _ in events["sft/loss"]] == [1, 2, 3]
    assert [y for _, y in events["sft/loss"]] == pytest.approx([float(row["loss"]) for row in rows(run, "sft")])
    assert [int(row["global_step"]) for row in table] == [1, 2, 3, 4, 5, 6]
    for tag in set(TAGS.split()):
        assert tag not in EVALUATED or float(before[tag]) == pytest.approx(events[tag][0][1])
        points = [(int(row["global_step"]), float(row[tag])) for row in table if row[tag]]
        logged = [point for point in events[tag] if point[0]]
        assert [step for step, _ in points] == [step for step, _ in logged]
        assert [y for _, y in logged] == pytest.approx([y for _, y in points], rel=1e-5), tag
    evaluated = [3, 6]
    assert [step for step, _ in events["eval/accuracy"]] == [0, *evaluated]
    assert all(float(row["ratio/max_first_step"]) == 1 for row in table)
    completions = rows(run, "episodes")
    assert len(completions) == 6 * 16 and final["global_step"] == 6 and final["status"] == "completed"
    returns = [float(row["return"]) for row in completions]
    assert final["train_last100"] == pytest.approx(sum(returns[-100:]) / 96)
    for step in range(6):
        mine = returns[16 * step : 16 * step + 16]
        assert float(table[step]["reward"]) == pytest.approx(sum(mine) / 16, abs=1e-5)
    assert final["accuracy"] == float(table[-1]["eval/accuracy"]) and final["format"] == float(table[-1]["eval/format"])
    assert final["accuracy_greedy"] == float(table[-1]["eval/accuracy_greedy"])
    assert final["accuracy_before"] == pytest.approx(events["eval/accuracy"][0][1])
    assert final["tokens_per_second"] > 0 and final["startup_time"] > 0 and final["peak_memory_mb"] > 0


def test_tensorboard_has_hyperparameters_and_sample_completions_as_text(here):
    _, run = start()
    events = tensorboard(run)
    assert {"hyperparameters/text_summary", "completions/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("completions/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("|`prompt`|`completion`|`correct`|`advantage`|\n|-|-|-|-|\n") and text.count("\n") == 2 + 4


def test_config_says_what_ran(here):
    _, run = start("--method", "dapo", steps=1)
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["loss_type"] == "dapo" and config["args"]["rewards"] == ["correct", "overlong"]
    assert config["args"]["reward_weights"] == [1, 1] and config["seed"] == 1 and config["versions"]["torch"]


def test_evaluation_prints_and_records_what_training_saw(here, capsys):
    _, run = start()
    weights = newest(run)["model"]
    capsys.readouterr()
    assert grpo_toy.main(["--evaluate", str(run)]) == 0
    final = summary(run)
    assert f"accuracy {final['accuracy']:.3f}" in capsys.readouterr().out
    assert final["eval"]["accuracy"] == final["accuracy"] and final["eval"]["iteration"] == 6
    assert same(weights, newest(run)["model"])
    assert grpo_toy.main(["--evaluate", str(run), "--eval-prompts", "16"]) == 0
    assert summary(run)["eval"]["prompts"] == 16
    assert grpo_toy.main(["--evaluate", str(run / "checkpoints" / "step_000000000004.pt")]) == 0
    assert summary(run)["eval"]["iteration"] == 4


def test_training_does_not_notice_evaluations(here):
    start(name="often")
    start("--eval-interval", "100", "--eval-prompts", "3", name="seldom")
    assert same(newest(Path("runs/often"))["model"], newest(Path("runs/seldom"))["model"])


def test_same_seed_is_the_same_run_and_another_seed_is_not(here):
    start(name="a", steps=3)
    torch.rand(3)  # what happened before in the process must not matter
    start(name="b", steps=3)
    start("--seed", "5", name="c", steps=3)
    a, b, c = (newest(Path("runs") / name)["model"] for name in "abc")
    assert same(a, b) and not same(a, c)


# ------------------------------------------------------------------------------------------------------ terminal
LINE = r" +%s steps +%s%% +[\d,]+/s  return +[\d.-]+  0:00:00 left  accuracy [\d.]+"


def test_normal_run_prints_plain_lines_and_no_warning(tmp_path):
    shutil.copy(TOY, tmp_path / "mine.py")  # and alone in an empty folder
    done = process("-W", "default", "mine.py", *SMALL, "--max-steps", "4", "--run-name", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *middle, last = done.stdout.splitlines()
    assert first == "runs/run (cpu, threads: 1)"
    assert re.fullmatch(r"completed after 4 steps, accuracy [\d.]+ -> [\d.]+: runs/run", last)
    assert any(re.fullmatch(LINE % ("4", "100"), line) for line in middle)
    assert any(re.fullmatch(r"prompt +completion +correct +advantage", line) for line in middle)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert json.loads((tmp_path / "runs/run/config.json").read_text())["args"]["exp_name"] == "mine"


def test_progress_line_renews_itself_on_a_terminal(here):
    master, slave = pty.openpty()
    code = KILL.format(folder=str(TOY.parent), iteration=3, signal="SIGINT", method="log")
    command = [sys.executable, "-c", code, *SMALL, "--max-steps", "60", "--run-name", "run"]
    child = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        text += part
    assert child.wait(timeout=60) == 130
    lines = re.split(r"[\r\n]+", text.decode())
    assert any(line.startswith("interrupted after 3 steps") for line in lines)
    assert all(len(re.sub(r"\x1b\[K", "", line)) <= 80 for line in lines) and "\x1b[K" in text.decode()


def test_help_shows_the_defaults_of_the_method(capsys):
    with pytest.raises(SystemExit) as stopped:
        grpo_toy.main(["--help", "--method", "gspo"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "0.0003" in text.split("--epsilon FLOAT")[1][:200]


def test_importing_the_script_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(TOY.parent)!r}); import grpo_toy"
    done = process("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_wandb_offline_works_and_a_resumed_run_keeps_its_id(here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert killed("--track", iteration=3, signal="SIGTERM") == 128 + signal.SIGTERM
    run = Path("runs/killed")
    wait_for_the_next_second()
    assert grpo_toy.main(["--resume", str(run)]) == 0 and summary(run)["status"] == "completed"
    wandb_id = json.loads((run / "config.json").read_text())["wandb_id"]
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(f"-{wandb_id}") for name in folders)


def test_a_run_of_a_script_that_kept_no_warm_start_is_not_warmed_up_again(here):
    """Its checkpoints say nothing of it, and its model has learned since."""
    _, run = start(steps=4)
    (run / "summary.json").unlink()
    last = max((run / "checkpoints").glob("step_*.pt"))
    for path in (run / "checkpoints").glob("step_*.pt"):
        state = torch.load(path, weights_only=True)
        del state["notes"]["warm_start"]
        torch.save(state, path)
    trained = torch.load(last, weights_only=True)["model"]
    assert grpo_toy.main(["--resume", str(run)]) == 0
    assert same(newest(run)["model"], trained)
