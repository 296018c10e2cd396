"""What a user of rlhf_toy.py meets: three stages, bad input, kill and resume in each of them, files that agree."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_grpo_runs import assert_same_run
from test_run_directory import SCRIPT, here, newest, process, rows, same, scalars, summary, tensorboard

import grpo_toy
import rlhf_toy

__all__ = ["here"]  # a fixture
TOY = SCRIPT.parent / "rlhf_toy.py"
SMALL = "--num-digits 2 --n-layer 1 --n-embd 16 --n-head 2 --sft-steps 3 --eval-prompts 8 --max-completion-length 8"
SMALL += " --generation-batch-size 16 --num-generations 4 --num-threads 1 --checkpoint-interval 2 --eval-interval 3"
TINY = SMALL.split()  # for other scripts, too
SMALL = [*TINY, "--num-prompts", "16", "--rm-batch-size", "8"]
STAGES = ("sft", "reward_model")


def judge(prompt, text):
    """A verifier that finds right answers among those of a model that knows nothing yet."""
    return len(text) % 2 == 0


@pytest.fixture(autouse=True)
def verifier(monkeypatch):
    monkeypatch.setattr(rlhf_toy, "is_right", judge)


def start(*flags, steps=6, name="run"):
    """Trains a small run in this process; returns the exit status and the run directory."""
    status = rlhf_toy.main([*SMALL, "--max-steps", str(steps), "--run-name", name, *flags])
    return status, Path("runs") / name


# A real process that gets a signal after the given call of one of its functions.
KILL = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import rlhf_toy
rlhf_toy.is_right = lambda prompt, text: len(text) % 2 == 0
owner = rlhf_toy.Run if hasattr(rlhf_toy.Run, {function!r}) else rlhf_toy
function, calls = getattr(owner, {function!r}), []
def then_die(*given, **named):
    result = function(*given, **named)
    calls.append(0)
    if len(calls) == {call}: os.kill(os.getpid(), signal.{signal})
    return result
setattr(owner, {function!r}, then_die)
sys.exit(rlhf_toy.main(sys.argv[1:]))
"""


def killed(*flags, function, call, signal="SIGKILL"):
    code = KILL.format(folder=str(TOY.parent), function=function, call=call, signal=signal)
    return process("-c", code, *SMALL, "--max-steps", "6", "--run-name", "killed", *flags, cwd=".").returncode


# ----------------------------------------------------------------------------------------------------- bad input
BAD_ARGUMENTS = {
    "--kl-control adaptive --beta 0": "0 would stay 0; ask for a --beta greater than 0",
    "--kl-control other": "fixed",
    "--reward people": "verifier",
    "--steps-per-generation 3": "--generation-batch-size 256 is not divisible by --steps-per-generation 3; 258 is",
    "--num-generations 1": "gives no pair of answers; use 2 or more",
    "--beta=-0.1": "0 or more",
    "--beta nan": "must be a finite number",
    "--gamma 1.1": "at most 1",
    "--gae-lambda 2": "at most 1",
    "--kl-target 0": "greater than 0",
    "--rm-epochs 0": "greater than 0",
    "--num-prompts 0": "greater than 0",
    "--missing-eos-penalty inf": "must be a finite number",
    "--critic-learning-rate 0": "greater than 0",
    "--max-completion-length 8": "too short for 6 digits, two brackets and an end; ask for 9 or more",
    "--rm-batch-size 100000000000": "memory",
    "--init-from nowhere": "nowhere is no run of this project with a model in it",
    "--resume nowhere": "no run directory of this script",
    "--evaluate nowhere": "no run directory of this script",
    "--bete 0.1": "--beta",
}


@pytest.mark.parametrize("argv", BAD_ARGUMENTS)
def test_bad_argument_is_refused_in_one_sentence(argv, here, capsys):
    assert rlhf_toy.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and BAD_ARGUMENTS[argv] in err, err
    assert not list(here.iterdir())


@pytest.mark.parametrize("argv", ["--kl-control adaptive --beta 0", "--epsilon x"])
def test_exit_status_of_the_script_for_bad_input(argv, tmp_path):
    done = process(TOY, *argv.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", []) and done.stderr
    assert "Traceback" not in done.stderr


def test_the_reward_picks_its_defaults_and_a_flag_wins():
    assert rlhf_toy.parse_args(["--reward", "verifier"]).beta == rlhf_toy.METHODS["verifier"]["beta"]
    assert rlhf_toy.parse_args(["--reward", "verifier", "--beta", "0.3"]).beta == 0.3
    assert rlhf_toy.parse_args([]).beta == rlhf_toy.Args.beta


def test_no_pair_to_learn_from_ends_the_run_with_one_sentence(here, monkeypatch, capsys):
    monkeypatch.setattr(rlhf_toy, "is_right", lambda prompt, text: False)
    status, run = start()
    err = capsys.readouterr().err
    assert status == 1 and "no prompt of 16 has a right and a wrong one among 4 answers" in err and err.count("\n") == 1
    assert summary(run)["status"] == "failed"


def test_a_verifier_that_finds_nothing_right_gives_scores_of_0(here, monkeypatch):
    monkeypatch.setattr(rlhf_toy, "is_right", lambda prompt, text: False)
    status, run = start("--reward", "verifier")
    assert status == 0 and newest(run)["scale"].tolist() == [0, 1]
    assert "nan" not in (run / "progress.csv").read_text().lower()


def test_a_reward_that_is_no_number_ends_the_run_with_its_iteration(here, monkeypatch, capsys):
    real = rlhf_toy.rollout

    def poisoned(models, *rest):
        models.reward_model.head.weight.data.fill_(torch.nan)
        return real(models, *rest)

    monkeypatch.setattr(rlhf_toy, "rollout", poisoned)
    status, run = start()
    assert status == 1 and re.fullmatch(r"error: iteration 1: objective/\S+ is nan; [^\n]+\n", capsys.readouterr().err)
    assert summary(run)["status"] == "diverged"


# ------------------------------------------------------------------------------------- kill, signals and resume
WHERE = {
    "in the warm start": dict(function="sloppy_answer", call=2 * 128 + 5),
    "in the preferences": dict(function="generate", call=1),
    "in the reward model": dict(function="reward_model_loss", call=2),
    "between the stages": dict(function="prepare", call=1),
    "after the stages": dict(function="save", call=2),
    "in iteration 5": dict(function="rollout", call=5),
    "after iteration 6": dict(function="write_row", call=7),
}


OFTEN = ("in the reward model", "in iteration 5")  # the others are slow


@pytest.mark.parametrize("where", [pytest.param(x, marks=[] if x in OFTEN else pytest.mark.slow) for x in WHERE])
def test_run_that_was_killed_and_resumed_equals_one_that_was_not(where, here, capsys):
    flags = ["--no-cache-warm-start", "--kl-control", "adaptive", "--kl-target", "0.1"]
    start(*flags, name="whole")
    assert killed(*flags, **WHERE[where]) == -signal.SIGKILL
    assert rlhf_toy.main(["--resume", "runs/killed"]) == 0
    assert "exactly as if it had never stopped" in capsys.readouterr().out
    whole, run = Path("runs/whole"), Path("runs/killed")
    assert_same_run(whole, run)
    for stage in STAGES:
        assert (whole / f"{stage}.csv").read_bytes() == (run / f"{stage}.csv").read_bytes()
    state = newest(run)
    assert not same(state["model"], state["reference"]) and state["controller"]["beta"] != rlhf_toy.Args.beta


def test_verifier_run_that_was_killed_and_resumed_equals_one_that_was_not(here):
    flags = ["--no-cache-warm-start", "--reward", "verifier"]
    start(*flags, name="whole")
    assert killed(*flags, **WHERE["after the stages"]) == -signal.SIGKILL
    assert rlhf_toy.main(["--resume", "runs/killed"]) == 0
    assert_same_run(Path("runs/whole"), Path("runs/killed"))
    assert not Path("runs/killed/reward_model.csv").exists()


@pytest.mark.parametrize("where", ["in the warm start", "in the preferences", "in the reward model", "in iteration 5"])
def test_signal_stops_in_every_stage_and_the_run_goes_on_exactly(where, here, monkeypatch):
    start(name="whole")
    shutil.rmtree("runs/warm_starts")
    function, call = WHERE[where].values()
    real, calls = getattr(rlhf_toy, function), []

    def then_signal(*given, **named):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(rlhf_toy, function, then_signal)
        assert start()[0] == 143 and len(calls) >= call
    assert summary(Path("runs/run"))["status"] == "interrupted"
    assert rlhf_toy.main(["--resume", "runs/run"]) == 0
    one, other = newest(Path("runs/whole")), newest(Path("runs/run"))
    assert all(same(one[name], other[name]) for name in ("model", "critic", "reward_model", "scale", "optimizer"))
    assert summary(Path("runs/run"))["status"] == "completed"


# ----------------------------------------------------------------------------------------- files and evaluation
TAGS = """charts/SPS charts/episodic_return charts/episodic_length charts/train_last100 learning_rate
objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores objective/beta
policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio
val/num_eos_tokens completions/mean_length grad_norm/policy grad_norm/critic
eval/accuracy eval/accuracy_greedy eval/pass@8 eval/format"""
EVALUATED = [tag for tag in TAGS.split() if tag.startswith("eval/")]
CLOCK = ["global_step", "wall_time", "sps"]


def test_csv_tensorboard_and_summary_agree(here, capsys):
    _, run = start()
    (before, *table), events, final = rows(run, "progress"), scalars(run), summary(run)
    assert {tag for tag in before if before[tag]} == {*EVALUATED, *CLOCK} - {"sps"}
    stages = {"sft/loss", "reward_model/loss", "reward_model/accuracy"}
    assert set(events) == {*TAGS.split(), *stages} and set(table[0]) == {*TAGS.split(), *CLOCK}
    for tag in TAGS.split():
        points = [(int(row["global_step"]), float(row[tag])) for row in table if row[tag]]
        logged = [point for point in events[tag] if point[0]]
        assert [step for step, _ in points] == [step for step, _ in logged]
        assert [y for _, y in logged] == pytest.approx([y for _, y in points], rel=1e-5), tag
    for tag in stages:
        stage, name = tag.split("/")
        written = [(int(row["step"]), float(row[name])) for row in rows(run, stage)]
        assert [step for step, _ in events[tag]] == [step for step, _ in written]
        assert [y for _, y in events[tag]] == pytest.approx([y for _, y in written])
    completions = rows(run, "episodes")
    assert len(completions) == 6 * 16 == final["completions"]
    for step in range(6):
        mine = [float(row["return"]) for row in completions[16 * step : 16 * step + 16]]
        assert float(table[step]["objective/rlhf_reward"]) == pytest.approx(sum(mine) / 16, abs=1e-5)
    assert sum(int(row["length"]) for row in completions) == final["tokens"]
    assert final["accuracy"] == float(table[-1]["eval/accuracy"]) and 0 <= final["reward_model_accuracy"] <= 1
    out = capsys.readouterr().out
    assert (
        f"reward model: {final['pairs']} pairs; {final['reward_model_accuracy']:.1%} of {final['held_out_pairs']}"
        in out
    )


@pytest.mark.parametrize("control", ["adaptive", "fixed"])
def test_beta_follows_the_divergence_of_each_iteration_or_stays(control, here):
    _, run = start("--kl-control", control, "--kl-target", "0.1", "--beta", "0.5", "--learning-rate", "0.01")
    table = [{tag: float(row[tag]) for tag in row if "objective/" in tag} for row in rows(run, "progress")[1:]]
    beta = 0.5
    for row in table:
        kl = row["objective/kl"]
        assert row["objective/beta"] == pytest.approx(beta, rel=1e-6)
        assert row["objective/non_score_reward"] == pytest.approx(-beta * kl, rel=1e-4, abs=1e-6)
        paid = row["objective/rlhf_reward"] - row["objective/scores"]
        assert paid == pytest.approx(-beta * kl, rel=1e-3, abs=1e-6)  # beta is in the rewards, too
        if control == "adaptive":
            beta *= 1 + 0.1 * min(max(kl / 0.1 - 1, -0.2), 0.2)
    assert max(row["objective/kl"] for row in table) > 0.1


@pytest.mark.parametrize("flag, last", [("--anneal-lr", 0.1), ("--no-anneal-lr", 1)])
def test_step_sizes_fall_to_a_tenth_or_stay_and_no_weight_decays(flag, last, here):
    _, run = start(flag, "--learning-rate", "0.002", "--critic-learning-rate", "0.003")
    logged = [float(row["learning_rate"]) for row in rows(run, "progress")[1:]]
    assert logged == pytest.approx([0.002 * (1 - (1 - last) * i / 6) for i in range(1, 7)], rel=1e-4)
    for name, step_size in (("optimizer", 0.002), ("critic_optimizer", 0.003)):
        (used,) = newest(run)[name]["param_groups"]
        assert used["lr"] == pytest.approx(last * step_size) and used["weight_decay"] == 0


def test_the_reference_of_a_finished_run_is_the_warm_start(here):
    _, run = start()
    (cached,) = Path("runs/warm_starts").iterdir()
    warm, state = torch.load(cached, weights_only=True)["model"], newest(run)
    assert same(state["reference"], warm) and not same(state["model"], warm)


def test_the_first_step_on_a_batch_has_a_ratio_of_one(here):
    start("--num-iterations", "1", "--steps-per-generation", "1")
    table = rows(Path("runs/run"), "progress")[1:]
    assert all(float(row["val/ratio"]) == pytest.approx(1, abs=1e-6) for row in table)
    assert all(float(row["policy/clipfrac_avg"]) == 0 for row in table)


def test_tensorboard_shows_completions_with_score_and_truth(here):
    _, run = start()
    text = tensorboard(run).Tensors("completions/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("|`prompt`|`completion`|`score`|`in truth`|\n|-|-|-|-|\n") and text.count("\n") == 2 + 8
    for _, _, completion, _, truth, _ in (re.split(r"`?\|`?", line) for line in text.splitlines()[2:]):
        assert truth == ("right" if judge("", completion) else "wrong")


def test_the_policy_of_a_reward_model_does_not_see_the_truth(here, monkeypatch):
    """With the same reward model, another truth gives the same weights."""
    start(name="one")
    monkeypatch.setattr(rlhf_toy, "report", lambda run, batch, values: rlhf_toy.report_accuracy(run, values))
    prepare = rlhf_toy.prepare

    def then_lie(*given):
        prepare(*given)
        monkeypatch.setattr(rlhf_toy, "is_right", lambda prompt, text: not judge(prompt, text))

    monkeypatch.setattr(rlhf_toy, "prepare", then_lie)
    start(name="other")
    one, other = newest(Path("runs/one")), newest(Path("runs/other"))
    assert same(one["model"], other["model"])
    assert summary(Path("runs/one"))["accuracy"] + summary(Path("runs/other"))["accuracy"] == pytest.approx(1)


def test_evaluation_plays_the_policy(here, capsys):
    _, run = start()
    capsys.readouterr()
    assert rlhf_toy.main(["--evaluate", str(run)]) == 0
    accuracy = summary(run)["accuracy"]
    assert f"iteration 6, 8 held-out prompts: accuracy {accuracy:.3f}" in capsys.readouterr().out


def test_init_from_takes_a_model_of_any_language_script(here):
    assert grpo_toy.main([*TINY, "--max-steps", "2", "--run-name", "g"]) == 0
    start("--init-from", "runs/g", steps=1)
    assert same(newest(Path("runs/run"))["reference"], newest(Path("runs/g"))["model"])
    assert not Path("runs/run/sft.csv").exists()


def test_warm_starts_of_all_language_scripts_are_the_same(here):
    assert grpo_toy.main([*TINY, "--max-steps", "1", "--run-name", "g"]) == 0
    start(steps=1)
    assert same(newest(Path("runs/run"))["reference"], newest(Path("runs/g"))["reference"])
    assert json.loads(Path("runs/run/config.json").read_text())["args"]["sft_steps"] == 3
