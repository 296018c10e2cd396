"""What a user of dpo_toy.py meets: bad input, bad pairs, bad days, kill and resume, files that agree, terminal."""

import json
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

import dpo_toy

__all__ = ["here"]  # a fixture
TOY = SCRIPT.parent / "dpo_toy.py"
LOSSES = ("dpo", "ipo", "kto", "orpo", "sft")
SIZE = [
    "--num-digits",
    "2",
    "--n-layer",
    "1",
    "--n-embd",
    "16",
    "--n-head",
    "2",
    "--max-completion-length",
    "8",
    "--num-threads",
    "1",
]
SMALL = [*SIZE, *["--sft-steps", "40", "--sft-learning-rate", "2e-2", "--eval-prompts", "8", "--num-prompts", "200"]]
SMALL += [
    "--num-generations",
    "4",
    "--batch-size",
    "11",
    "--checkpoint-interval",
    "2",
    "--eval-interval",
    "3",
]  # 6 steps
PROMPTS = [f"{i:02}" for i in range(100) if not dpo_toy.is_held_out(f"{i:02}")]


def start(*flags, name="run"):
    """Trains a small run in this process; returns the exit status and the run directory."""
    return dpo_toy.main([*SMALL, "--run-name", name, *flags]), Path("runs") / name


def pairs_of(run):
    return [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]


def write_pairs(count=30, name="mine.jsonl", **first):
    """A file of pairs as a user would write it, without ends; first changes the first pair."""
    right, wrong = "({}{})", "({}{})"
    made = []
    for prompt in PROMPTS[:count]:
        low, high = sorted(prompt)
        made.append({"prompt": prompt, "chosen": right.format(low, high), "rejected": wrong.format(high, low) + "."})
    made[0] |= first
    Path(name).write_text("".join(json.dumps(pair) + "\n" for pair in made))
    return made


def timeless(run, name):
    """The rows of a csv file without what the clock wrote."""
    clocks = ("wall_time", "sps", "charts/SPS", "tokens_per_second/trained")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows(run, name)]


def assert_same_run(a, b):
    """Same weights, reference, pairs, optimizer, random states, warm start and progress."""
    one, other = newest(a), newest(b)
    assert one.keys() == other.keys()
    for key in one.keys() - {"wall_time", "csv"}:  # digits of the clock count in the length of a file
        assert same(one[key], other[key]), key
    for name in ("sft.csv", "pairs.jsonl"):
        if (a / name).exists() or (b / name).exists():
            assert (a / name).read_bytes() == (b / name).read_bytes()
    assert len(timeless(a, "progress")) > 4 and timeless(a, "progress") == timeless(b, "progress")
    assert (a / "episodes.csv").read_bytes() == (b / "episodes.csv").read_bytes()


# ----------------------------------------------------------------------------------------------------- bad input
BAD_ARGUMENTS = {
    "--loss dqo": "invalid choice 'dqo' for argument '--loss'. Expected one of ('dpo', 'ipo', 'kto', 'orpo', 'sft')",
    "--loss": "loss",
    "--num-generations 1": "use 2 or more",
    "--num-generations 0": "greater than 0",
    "--num-prompts 0": "greater than 0",
    "--num-train-epochs 0": "greater than 0",
    "--batch-size 0": "greater than 0",
    "--batch-size 1000000000": "would fit",
    "--loss kto --batch-size 1": "ask for --batch-size 2 or more",
    "--loss kto --desirable-weight 0 --undesirable-weight 0": "one must be greater",
    "--desirable-weight=-1": "0 or more",
    "--undesirable-weight nan": "must be a finite number",
    "--beta 0": "--beta is 0, but must be greater than 0 for --loss dpo.",
    "--loss ipo --beta 0": "greater than 0 for --loss ipo",
    "--beta=-0.1": "0 or more",
    "--beta nan": "must be a finite number",
    "--loss ppo": "Expected one of ('dpo', 'ipo', 'kto', 'orpo', 'sft')",
    "--beta x": "takes a number, not 'x'",
    "--learning-rate 0": "greater than 0",
    "--temperature 0": "greater than 0",
    "--max-grad-norm 0": "greater than 0",
    "--max-steps 3": "is no flag",
    "--max-completion-length 8": "too short for 6 digits, two brackets and an end; ask for 9 or more",
    "--n-head 3": "--n-embd 64 is not divisible by --n-head 3",
    "--seed=-1": "0 or more",
    "--run-name ..": "is taken",
    "--pairs nowhere.jsonl": "--pairs nowhere.jsonl cannot be read (No such file or directory)",
    "--pairs .": "--pairs . cannot be read (Is a directory)",
    "--save-pairs nowhere/pairs.jsonl": "there is no folder nowhere; make it",
    "--save-pairs .": "--save-pairs . is no file; name one",
    "--save-pairs /dev/null": "--save-pairs /dev/null is no file; name one",
    "--save-pairs /proc/x": "nothing can be written there",
    f"--save-pairs {'x' * 300}": "nothing can be written there (File name too long)",
    f"--save-pairs {'x' * 253}": "is too long a name",
    "--init-from nowhere": "nowhere is no run of this project with a model in it",
    "--resume nowhere": "no run directory of this script",
    "--evaluate nowhere": "no run directory of this script",
}


@pytest.mark.parametrize("argv", BAD_ARGUMENTS)
def test_bad_argument_is_refused_in_one_sentence(argv, here, capsys):
    assert dpo_toy.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and BAD_ARGUMENTS[argv] in err, err
    assert not list(here.iterdir())


@pytest.mark.parametrize("argv", ["--loss kto --batch-size 1", "--pairs nowhere.jsonl"])
def test_exit_status_of_the_script_for_bad_input(argv, tmp_path):
    done = process(TOY, *argv.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", []) and done.stderr
    assert "Traceback" not in done.stderr


def test_orpo_without_its_weight_is_fine_tuning(here):
    start("--loss", "orpo", "--beta", "0", name="orpo")
    start("--loss", "sft", *(f"--learning-rate {dpo_toy.METHODS['orpo']['learning_rate']}".split()), name="sft")
    one, other = (newest(Path("runs") / name)["model"] for name in ("orpo", "sft"))
    assert same(one, other)


def test_resume_with_changed_arguments_is_refused_with_the_difference(here, capsys):
    start()
    capsys.readouterr()
    assert dpo_toy.main(["--resume", "runs/run", "--beta", "0.5", "--loss", "ipo"]) == 2
    err = capsys.readouterr().err
    assert "loss 'dpo' -> 'ipo'" in err and "-> 0.5" in err


# ----------------------------------------------------------------------------------------------------- bad pairs
def line(prompt="10", chosen="(01)", rejected="(10)", **more):
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected} | more)


BAD_LINES = {
    "prompt": "is not JSON",
    line()[:-1]: "is not JSON",
    line() + ",": "is not JSON",
    line() + line(): "is not JSON",
    "[" * 100000: "is not JSON",
    '["10", "(01)", "(10)"]': "is no object like",
    "null": "is no object like",
    '"10"': "is no object like",
    "{}": "has no prompt; it must be an object like",
    '{"prompt": "10", "chosen": "(01)"}': "has no rejected",
    '{"prompt": "10", "rejected": "(01)", "Chosen": "(01)"}': "has no chosen",
    line(prompt=10): "has 10 as prompt, but that must be a string",
    line(chosen=["(01)"]): 'has ["(01)"] as chosen, but that must be a string',
    line(rejected=None): "has null as rejected",
    line(prompt="123"): "has the prompt '123', which must be 2 digits",
    line(prompt=""): "has the prompt '', which must be 2 digits",
    line(prompt="1a"): "which must be 2 digits",
    line(prompt="1\u0662"): "which must be 2 digits",
    line(prompt="10\n"): "which must be 2 digits",
    line(chosen="(0 1)"): "has '(0 1)' as chosen, but ' ' is none of _^0123456789.[]()",
    line(rejected="{10}"): "as rejected, but '{' is none of",
    line(rejected="(10)\u2028"): r"but '\u2028' is none of",
    line(rejected="(10)-"): "but '-' is none of",
    line(chosen="(01)$$"): "but '$' is none of _^0123456789.[]() and no $ at its end",
    line(chosen="(0$1)"): "but '$' is none of",
    line(chosen="\ud800"): r"but '\ud800' is none of",
    line(chosen=""): "has an empty chosen; an answer that ends at once is written $",
    line(chosen="....(01)$"): "9 characters, but --max-completion-length is 8",
    line(rejected="." * 500): "500 characters, but --max-completion-length is 8",
    line(rejected="(01)"): "has '(01)$' as chosen and as rejected",
    line(rejected="(01)$"): "has '(01)$' as chosen and as rejected",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_with_its_number_and_what_is_wrong(bad, here, capsys):
    Path("mine.jsonl").write_text(f"{line()}\n\n{line(rejected='$')}\n{bad}\n{line()}\n")
    assert start("--pairs", "mine.jsonl")[0] == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: --pairs mine.jsonl, line 4, [^\n]+\n", err), err
    assert BAD_LINES[bad] in err and len(err) < 300, err
    assert [path.name for path in here.iterdir()] == ["mine.jsonl"]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "mine.jsonl is empty; each line must be an object like"),
        (b"\n  \r\n\n", "is empty"),
        (line(prompt="42").encode() + b"\n\xff\xfe", "is no text in UTF-8"),
        (line().encode("utf-16"), "is no text in UTF-8"),
        (line(prompt=next(f"{i:02}" for i in range(100) if dpo_toy.is_held_out(f"{i:02}"))).encode(), "held out"),
    ],
)
def test_a_bad_file_is_refused(content, says, here, capsys):
    Path("mine.jsonl").write_bytes(content)
    assert start("--pairs", "mine.jsonl")[0] == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and says in err
    assert [path.name for path in here.iterdir()] == ["mine.jsonl"]


def test_exit_status_of_the_script_for_a_bad_line(tmp_path):
    (tmp_path / "mine.jsonl").write_text(line(prompt="630275") + "\n" + line(prompt="63027") + "\n")
    done = process(TOY, "--pairs", "mine.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    assert done.stderr == "error: --pairs mine.jsonl, line 2, has the prompt '63027', which must be 6 digits.\n"


def test_pairs_of_a_user_are_learned_from_and_those_of_evaluations_are_left_out(here, capsys):
    made = write_pairs()
    held_out = next(f"{i:02}" for i in range(100) if dpo_toy.is_held_out(f"{i:02}"))
    with open("mine.jsonl", "a", encoding="utf-8-sig") as file:
        file.write("\r\n" + line(prompt=held_out) + "\r\n")
    text = Path("mine.jsonl").read_bytes()
    Path("mine.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\xef\xbb\xbf", b""))
    status, run = start("--pairs", "mine.jsonl")
    out, err = capsys.readouterr()
    assert (status, err) == (0, "") and "1 of 31 pairs are left out: their prompts are held out for evaluations" in out
    assert pairs_of(run) == [pair | {name: pair[name] + "$" for name in ("chosen", "rejected")} for pair in made]
    assert summary(run)["pairs"] == 30 and summary(run)["global_step"] == 6 and summary(run)["tokens_sampled"] == 0
    assert summary(run)["tokens_trained"] == 2 * 30 * (5 + 6)


# ----------------------------------------------------------------------------------------------- pairs kept and saved
def test_sampled_pairs_are_kept_and_saved_and_give_the_same_run_bit_for_bit(here):
    _, run = start("--save-pairs", "saved.jsonl", name="sampled")
    assert Path("saved.jsonl").read_bytes() == (run / "pairs.jsonl").read_bytes()
    start("--pairs", "saved.jsonl", name="given")
    one, other = newest(run), newest(Path("runs/given"))
    for key in ("model", "reference", "optimizer", "pairs"):
        assert same(one[key], other[key])
    assert timeless(run, "progress") == timeless(Path("runs/given"), "progress")
    told, given = summary(run), summary(Path("runs/given"))
    assert told["tokens_sampled"] > 200 * 4 and given["tokens_sampled"] == 0
    assert all(told[key] == given[key] for key in ("pairs", "tokens_trained", "accuracy", "accuracy_before"))
    for pair in pairs_of(run):
        assert dpo_toy.is_right(pair["prompt"], pair["chosen"]) and not dpo_toy.is_right(
            pair["prompt"], pair["rejected"]
        )


def test_pairs_do_not_depend_on_the_loss(here):
    found = [(start("--loss", loss, name=loss)[1] / "pairs.jsonl").read_bytes() for loss in LOSSES]
    assert len(set(found)) == 1
    assert len(list(Path("runs/warm_starts").iterdir())) == 1
    models = [newest(Path("runs") / loss) for loss in LOSSES]
    assert all(same(model["reference"], models[0]["reference"]) for model in models)
    assert not any(same(model["model"], models[0]["model"]) for model in models[1:])


def test_saving_over_a_file_replaces_it_and_saving_on_a_full_disk_fails_the_run(here, monkeypatch, capsys):
    Path("saved.jsonl").write_text("old" * 10000)
    start("--save-pairs", "saved.jsonl")
    assert Path("saved.jsonl").read_bytes() == Path("runs/run/pairs.jsonl").read_bytes()
    write = dpo_toy.write_atomically

    def full(path, content):
        if path.name == "saved.jsonl":
            raise OSError(28, "No space left on device")
        write(path, content)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(dpo_toy, "write_atomically", full)
        assert start("--save-pairs", "saved.jsonl", name="other")[0] == 1
    err = capsys.readouterr().err
    assert "No space left" in err and err.count("\n") == 1
    assert dpo_toy.main(["--resume", "runs/other"]) == 0
    assert_same_run(Path("runs/run"), Path("runs/other"))


def test_a_model_that_is_never_right_has_no_pairs_and_says_what_would_help(here, capsys):
    status, run = start("--sft-steps", "1", "--num-prompts", "2", "--num-generations", "2")
    err = capsys.readouterr().err
    assert status == 1 and re.fullmatch(r"error: iteration 0: no prompt of 2 has a right and a wrong one [^\n]+\n", err)
    assert "raise --num-generations" in err and summary(run)["status"] == "failed"
    assert not (run / "pairs.jsonl").exists()


# ------------------------------------------------------------------------------------------------------ bad days
def test_nan_in_the_loss_ends_the_run_with_its_iteration_and_the_checkpoint_before(here, monkeypatch, capsys):
    update, calls = dpo_toy.update, []

    def third_is_poisoned(model, *rest):
        calls.append(0)
        if len(calls) == 3:
            model.head.weight.data.fill_(torch.nan)
        return update(model, *rest)

    monkeypatch.setattr(dpo_toy, "update", third_is_poisoned)
    status, run = start()
    err = capsys.readouterr().err
    assert status == 1 and re.fullmatch(r"error: iteration 3: loss is nan; the last good checkpoint is [^\n]+\n", err)
    assert str(run / "checkpoints" / "step_000000000002.pt") in err and summary(run)["status"] == "diverged"
    assert all(x.isfinite().all() for x in newest(run)["model"].values())


@pytest.mark.parametrize("loss, beta", [("ipo", "1e-30"), ("dpo", "1e30"), ("kto", "1e30"), ("orpo", "1e30")])
def test_an_absurd_beta_trains_or_ends_in_one_sentence(loss, beta, here, capsys):
    status, run = start("--loss", loss, "--beta", beta)
    err = capsys.readouterr().err
    assert (status, err) == (0, "") or (status == 1 and re.fullmatch(r"error: iteration \d: [^\n]+\n", err))
    assert all(x.isfinite().all() for x in newest(run)["model"].values())


# ------------------------------------------------------------------------------------- kill, signals and resume
KILL = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import dpo_toy
method = getattr(dpo_toy.Run, {method!r})
def then_die(run, *values, **groups):
    method(run, *values, **groups)
    if run.iteration == {iteration}: os.kill(os.getpid(), signal.{signal})
dpo_toy.Run.{method} = then_die
sys.exit(dpo_toy.main(sys.argv[1:]))
"""
KILL_IN = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import dpo_toy
real, calls = dpo_toy.{function}, []
def then_die(*given, **names):
    calls.append(0)
    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **names)
dpo_toy.{function} = then_die
sys.exit(dpo_toy.main(sys.argv[1:]))
"""


def killed(*flags, iteration, signal="SIGKILL"):
    """A run of a real process that is killed after the row of an iteration, or gets another signal in it."""
    method = "write_row" if signal == "SIGKILL" else "log"
    code = KILL.format(folder=str(TOY.parent), iteration=iteration, signal=signal, method=method)
    return process("-c", code, *SMALL, "--run-name", "killed", *flags, cwd=".").returncode


def killed_in(function, call, *flags):
    """A run of a real process that is killed when it calls a function for the call-th time."""
    code = KILL_IN.format(folder=str(TOY.parent), function=function, call=call)
    return process("-c", code, *SMALL, "--run-name", "killed", *flags, cwd=".").returncode


@pytest.mark.parametrize("loss", ["kto", pytest.param("dpo", marks=pytest.mark.slow), "sft"])
def test_run_that_was_killed_and_resumed_equals_one_that_was_not(loss, here, capsys):
    write_pairs()
    flags = ["--loss", loss] + (["--pairs", "mine.jsonl"] if loss == "sft" else [])
    start(*flags, name="whole")
    assert killed(*flags, iteration=5) == -signal.SIGKILL
    run = here / "runs" / "killed"
    assert newest(run)["iteration"] == 4 and not (run / "summary.json").exists()
    assert int(rows(run, "progress")[-1]["global_step"]) == 5  # what the resumed run has to forget
    Path("mine.jsonl").unlink()  # a run needs no files but its own
    wait_for_the_next_second()
    assert dpo_toy.main(["--resume", str(run)]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert_same_run(here / "runs" / "whole", run)
    assert not same(newest(run)["model"], newest(run)["reference"])
    one, other = summary(here / "runs" / "whole"), summary(run)
    for key in ("pairs", "tokens_sampled", "tokens_trained", "accuracy_before", "accuracy", "global_step", "status"):
        assert one[key] == other[key]
    assert [step for step, _ in scalars(run)["loss"]] == [1, 2, 3, 4, 5, 6]


STAGES = {
    "warm start": ("sloppy_answer", 1000, "--no-cache-warm-start"),
    "pairs": ("decode", 2, "--no-cache-warm-start", "--num-generations", "8", "--num-prompts", "600"),
    "before the pairs are written": ("keep_pairs", 1),
    "before the pairs are saved": ("write_atomically", 5, "--save-pairs", "saved.jsonl"),  # after four of the run
    "after the pairs are written": ("tokens_of", 1),
    "first step": ("update", 2),
    "pairs of a user": ("keep_pairs", 1, "--pairs", "mine.jsonl"),
}


OFTEN = ("warm start", "pairs", "before the pairs are saved")  # the others are slow, and rarely another story


@pytest.mark.parametrize("stage", [pytest.param(x, marks=[] if x in OFTEN else pytest.mark.slow) for x in STAGES])
def test_run_that_was_killed_in_any_stage_goes_on_exactly(stage, here, capsys):
    function, call, *flags = STAGES[stage]
    write_pairs()
    start(*flags, name="whole")
    Path("saved.jsonl").unlink(missing_ok=True)
    assert killed_in(function, call, *flags) == -signal.SIGKILL
    run = Path("runs/killed")
    assert newest(run)["iteration"] == 0
    Path("mine.jsonl").unlink()
    assert dpo_toy.main(["--resume", str(run)]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    assert_same_run(Path("runs/whole"), run)
    assert ("--save-pairs" in flags) == Path("saved.jsonl").exists()


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_signal_saves_the_iteration_and_the_run_goes_on_exactly(name, here):
    start(name="whole")
    assert killed(iteration=3, signal=name) == 128 + signal.Signals[name]
    run = Path("runs/killed")
    assert newest(run)["iteration"] == 3 and summary(run)["status"] == "interrupted" and "error" not in summary(run)
    assert dpo_toy.main(["--resume", str(run)]) == 0
    assert summary(run)["status"] == "completed"
    assert_same_run(Path("runs/whole"), run)


@pytest.mark.parametrize(
    "stage, flags", [("warm start", ["--sft-steps", "100000"]), ("pairs", ["--num-prompts", "900000"])]
)
def test_signal_in_a_stage_stops_a_real_process_that_can_go_on(stage, flags, here):
    command = [sys.executable, TOY, *SMALL, *flags, "--run-name", "run"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while f"of the {stage}" not in child.stdout.readline():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1] == "" and child.returncode == 130
    finally:
        child.kill()
    assert summary(Path("runs/run"))["status"] == "interrupted" and newest(Path("runs/run"))["iteration"] == 0


def test_pairs_changed_or_lost_after_the_start_do_not_change_the_run(here):
    write_pairs()
    start("--pairs", "mine.jsonl", name="whole")
    assert killed("--pairs", "mine.jsonl", iteration=3) == -signal.SIGKILL
    write_pairs(chosen="$")
    Path("runs/killed/pairs.jsonl").unlink()
    assert dpo_toy.main(["--resume", "runs/killed"]) == 0
    assert same(newest(Path("runs/whole"))["model"], newest(Path("runs/killed"))["model"])


def test_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(here, capsys):
    _, run = start()
    shutil.copytree(run, here / "runs" / "whole")
    cut(run / "checkpoints" / "step_000000000006.pt")
    capsys.readouterr()
    assert dpo_toy.main(["--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "step_000000000006.pt is corrupt" in err and err.count("\n") == 1 and "goes on from step 4" in out
    assert_same_run(here / "runs" / "whole", run)


def test_resume_of_a_completed_run_changes_nothing(here, capsys):
    start()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert dpo_toy.main(["--resume", "runs/run"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_run_that_was_killed_before_its_summary_was_written_is_completed_by_a_resume(here):
    start()
    run, told = Path("runs/run"), summary(Path("runs/run"))
    (run / "summary.json").unlink()
    assert dpo_toy.main(["--resume", str(run)]) == 0
    session = {"wall_time", "startup_time", "peak_memory_mb", "sps"}
    assert {key: told[key] for key in told.keys() - session} == {
        key: summary(run)[key] for key in summary(run).keys() - session
    }
    assert summary(run)["sps"] == pytest.approx(told["sps"], rel=0.5)


def test_init_from_takes_the_trained_model_as_policy_as_reference_and_to_sample_pairs(here):
    start(name="trained")
    start("--init-from", "runs/trained", name="run")
    trained, run = newest(Path("runs/trained")), newest(Path("runs/run"))
    assert same(run["reference"], trained["model"]) and not same(run["model"], trained["model"])
    assert summary(Path("runs/run"))["accuracy_before"] == summary(Path("runs/trained"))["accuracy"]
    assert pairs_of(Path("runs/run")) != pairs_of(Path("runs/trained")) and not Path("runs/run/sft.csv").exists()


def test_a_model_of_grpo_can_be_the_start(here):
    import grpo_toy

    flags = [*SIZE, *["--sft-steps", "40", "--sft-learning-rate", "2e-2", "--eval-prompts", "8", "--run-name", "grpo"]]
    flags += ["--generation-batch-size", "16", "--num-generations", "4", "--max-steps", "1"]
    assert grpo_toy.main(flags) == 0
    assert start("--init-from", "runs/grpo", "--num-generations", "8")[0] == 0
    assert same(newest(Path("runs/run"))["reference"], newest(Path("runs/grpo"))["model"])


def test_run_from_another_that_was_killed_before_its_first_step_goes_on_exactly(here):
    start(name="trained")
    start("--init-from", "runs/trained", name="whole")
    assert killed_in("keep_pairs", 1, "--init-from", "runs/trained") == -signal.SIGKILL
    shutil.rmtree("runs/trained")
    assert dpo_toy.main(["--resume", "runs/killed"]) == 0
    assert_same_run(Path("runs/whole"), Path("runs/killed"))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_single_pair_is_enough(loss, here, capsys):
    write_pairs(1)
    status, run = start("--loss", loss, "--pairs", "mine.jsonl", "--num-train-epochs", "3")
    assert (status, capsys.readouterr().err) == (0, "") and summary(run)["global_step"] == 3
    assert loss != "kto" or all(float(row["kl"]) == 0 for row in rows(run, "progress")[1:])


# ----------------------------------------------------------------------------------------- files and evaluation
TAGS = """charts/SPS charts/episodic_return charts/episodic_length charts/train_last100
loss nll_loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected
grad_norm learning_rate tokens_per_second/trained eval/accuracy eval/accuracy_greedy eval/pass@8 eval/format"""
OWN = {"kto": {"kl"}, "orpo": {"log_odds_ratio"}}
EVALUATED = [tag for tag in TAGS.split() if tag.startswith("eval/")]
EMPTY = {"charts/episodic_return", "charts/episodic_length", "charts/train_last100"}  # training samples nothing
CLOCK = ["global_step", "wall_time", "sps"]


@pytest.mark.parametrize("loss", LOSSES)
def test_csv_tensorboard_and_summary_agree(loss, here):
    _, run = start("--loss", loss)
    tags = {*TAGS.split()} | OWN.get(loss, set())
    (before, *table), events, final = rows(run, "progress"), scalars(run), summary(run)
    assert before["global_step"] == "0" and {tag for tag in before if before[tag]} == {*EVALUATED, *CLOCK} - {"sps"}
    assert set(events) == {*tags, "sft/loss"} - EMPTY and set(table[0]) == {*tags, *CLOCK}
    assert [int(row["step"]) for row in rows(run, "sft")] == [step for step, _ in events["sft/loss"]]
    assert [int(row["global_step"]) for row in table] == [1, 2, 3, 4, 5, 6]
    for tag in tags - EMPTY:
        points = [(int(row["global_step"]), float(row[tag])) for row in table if row[tag]]
        logged = [point for point in events[tag] if point[0]]
        assert [step for step, _ in points] == [step for step, _ in logged]
        assert [y for _, y in logged] == pytest.approx([y for _, y in points], rel=1e-5), tag
    assert [step for step, _ in events["eval/accuracy"]] == [0, 3, 6]
    assert rows(run, "episodes") == [] and (run / "episodes.csv").read_text().startswith("global_step,wall_time,return")
    assert final["train_last100"] is None and final["status"] == "completed" and final["global_step"] == 6
    pairs = pairs_of(run)
    sides = ("chosen",) if loss == "sft" else ("chosen", "rejected")
    assert final["pairs"] == len(pairs) and final["tokens_trained"] == 2 * sum(
        len(p[side]) for p in pairs for side in sides
    )
    assert final["accuracy"] == float(table[-1]["eval/accuracy"])
    assert final["accuracy_greedy"] == float(table[-1]["eval/accuracy_greedy"])
    assert final["accuracy_before"] == pytest.approx(events["eval/accuracy"][0][1])
    for row in table:
        assert float(row["rewards/margins"]) == pytest.approx(
            float(row["rewards/chosen"]) - float(row["rewards/rejected"]), abs=1e-5
        )
        assert 0 <= float(row["rewards/accuracies"]) <= 1 and float(row["nll_loss"]) > 0
    rate = dpo_toy.RunArgs(**dpo_toy.preset(loss)).learning_rate
    rates = [rate * (1 - 0.9 * step / 6) for step in range(1, 7)]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx(rates)


def test_first_step_has_the_loss_of_a_margin_of_zero(here):
    for loss, expected in (("dpo", 0.693147), ("kto", 0.5), ("ipo", 0.25)):
        _, run = start("--loss", loss, "--beta", "1", name=loss)
        first = rows(run, "progress")[1]
        assert float(first["loss"]) == pytest.approx(expected, abs=1e-4)
        assert float(first["rewards/margins"]) == pytest.approx(0, abs=1e-4)


def test_tensorboard_has_hyperparameters_and_pairs_as_text(here):
    _, run = start()
    events = tensorboard(run)
    assert {"hyperparameters/text_summary", "pairs/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("pairs/text_summary")[-1].tensor_proto.string_val[0].decode()
    first = pairs_of(run)[0]
    assert text.startswith("|`prompt`|`chosen`|`rejected`|\n|-|-|-|\n") and f"`{first['chosen']}`" in text


def test_evaluation_prints_and_records_what_training_saw(here, capsys):
    _, run = start()
    weights = newest(run)["model"]
    capsys.readouterr()
    assert dpo_toy.main(["--evaluate", str(run)]) == 0
    final = summary(run)
    assert f"accuracy {final['accuracy']:.3f}" in capsys.readouterr().out
    assert final["eval"]["accuracy"] == final["accuracy"] and final["eval"]["iteration"] == 6
    assert same(weights, newest(run)["model"])
    assert dpo_toy.main(["--evaluate", str(run / "checkpoints" / "step_000000000004.pt")]) == 0
    assert summary(run)["eval"]["iteration"] == 4


def test_training_does_not_notice_evaluations(here):
    start(name="often")
    start("--eval-interval", "100", "--eval-prompts", "3", name="seldom")
    assert same(newest(Path("runs/often"))["model"], newest(Path("runs/seldom"))["model"])


def test_same_seed_is_the_same_run_and_another_seed_is_not(here):
    start(name="a")
    torch.rand(3)  # what happened before in the process must not matter
    start("--no-cache-warm-start", name="b")
    start("--seed", "5", "--num-generations", "8", name="c")
    a, b, c = (newest(Path("runs") / name)["model"] for name in "abc")
    assert same(a, b) and not same(a, c)


# ------------------------------------------------------------------------------------------------------ terminal
def test_normal_run_prints_plain_lines_and_no_warning(tmp_path):
    shutil.copy(TOY, tmp_path / "mine.py")  # and alone in an empty folder
    done = process("-W", "default", "mine.py", *SMALL, "--run-name", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *middle, last = done.stdout.splitlines()
    assert first == "runs/run (cpu, threads: 1)"
    assert re.fullmatch(r"completed after 6 steps, accuracy [\d.]+ -> [\d.]+: runs/run", last)
    assert any(re.fullmatch(r" +6 steps +100% +[\d,]+/s  return +-  0:00:00 left  accuracy [\d.]+", x) for x in middle)
    assert any(re.fullmatch(r"prompt +chosen +rejected", line) for line in middle)
    assert any(re.fullmatch(r"pairs: \d+", line) for line in middle)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert json.loads((tmp_path / "runs/run/config.json").read_text())["args"]["exp_name"] == "mine"


def test_help_shows_the_defaults_of_the_loss(capsys):
    with pytest.raises(SystemExit) as stopped:
        dpo_toy.main(["--help", "--loss", "orpo"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and str(dpo_toy.METHODS["orpo"]["beta"]) in text.split("--beta FLOAT")[1][:200]


def test_importing_the_script_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(TOY.parent)!r}); import dpo_toy"
    done = process("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
