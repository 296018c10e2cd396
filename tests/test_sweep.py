"""The sweep, with a quick script in the place of a real one: its score is a formula of its flags."""

import csv
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

from benchmarks import conclusion, space, study, sweep
from benchmarks.arguments import arguments_of
from benchmarks.jobs import ROOT, UsageError
from benchmarks.plan import Options, make_plan
from benchmarks.suite import jobs_of, read_suite

SCRIPT = r"""
import argparse, json, math, os, signal, sys, time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    runs_dir: str = "runs"
    run_name: str = ""
    exp_name: str = "fake"
    resume: str = ""
    evaluate: str = ""
    surrogate: Literal["clip", "none"] = "clip"
    seed: int = 1
    total_timesteps: int = 1000
    eval_episodes: int = 10
    eval_stochastic: bool = False
    width: int = 64
    num_threads: int = 0
    learning_rate: float = 0.1
    sleep: float = 0.0
    sleep_later: float = 0.0
    norm_adv: bool = True


def parse_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for field in fields(Args):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            kind = field.type if field.type in (int, float) else str
            parser.add_argument(flag, type=kind, default=field.default)
    return Args(**vars(parser.parse_args(argv)))


def main():
    args = parse_args()
    run = Path(args.resume or args.evaluate or Path(args.runs_dir) / args.run_name)
    if args.resume or args.evaluate:
        args = Args(**json.loads((run / "config.json").read_text())["args"] | {"evaluate": args.evaluate,
            "resume": args.resume, "eval_episodes": args.eval_episodes, "eval_stochastic": args.eval_stochastic})
    if args.width == 13:
        sys.exit(print("error: --width is 13, which brings bad luck.", file=sys.stderr) or 2)
    if args.evaluate:
        summary = json.loads((run / "summary.json").read_text())
        kind = "stochastic" if args.eval_stochastic else "deterministic"
        summary.setdefault("eval", {})[kind] = dict(mean=1.0, std=0.0, min=1.0, max=1.0, episodes=args.eval_episodes)
        sys.exit((run / "summary.json").write_text(json.dumps(summary)) * 0)
    if not args.resume:
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(dict(args=vars(args))))
        (run / "checkpoints" / "step_0.pt").write_text("")
    (run / "pid").write_text(str(os.getpid()))
    with open(run / "sessions.txt", "a") as file:
        print("resumed" if args.resume else "begun", file=file)

    def end(status, exit_status, score=None):
        (run / "summary.json").write_text(json.dumps(dict(status=status, global_step=1000, train_last100=score)))
        sys.exit(exit_status)

    signal.signal(signal.SIGTERM, lambda *_: end("interrupted", 143))
    time.sleep(args.sleep + args.sleep_later * (args.seed > 1001))
    (run / "progress.csv").write_text("global_step,wall_time,sps\n1000,1.0,1000.0\n")
    if args.width == 7:
        print("error: iteration 1: the loss is nan", file=sys.stderr)
        end("diverged", 1)
    good = math.exp(-math.log10(args.learning_rate / 0.001) ** 2) * (1.0 if args.width >= 32 else 0.5)
    good += 0.01 * ((args.seed * 37) % 5 - 2)
    scales = {"CartPole-v1": (22, 500), "Acrobot-v1": (-500, -80), "Taxi-v4": (0, 1)}
    low, high = scales[args.env_id]
    end("completed", 0, low + (high - low) * good)


if __name__ == "__main__":
    main()
"""
SPACE = """
[learning-rate]
low = 1e-5
high = 1.0
log = true

[width]
low = 16
high = 128

[normalise]
CartPole-v1 = [22, 500]
Acrobot-v1 = [-500, -80]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the quick script and a space, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(SCRIPT)
    Path("space.toml").write_text(SPACE)
    return tmp_path


def options(**changes) -> Options:
    both = ("CartPole-v1", "Acrobot-v1")
    defaults = dict(script="fake.py", env_ids=both, study="s", space="space.toml", trials=6, workers=4, seeds=1)
    return Options(**defaults | dict(final_seeds=0, eval_episodes=0) | changes)


def command(*flags: str, envs: str = "CartPole-v1 Acrobot-v1", space: str = "space.toml") -> list[str]:
    """The sweep as a process; flags given here win over the usual ones."""
    usual = f"sweep fake.py --study s --space {space} --final-seeds 0 --eval-episodes 0 --env-ids {envs}".split()
    return [sys.executable, "-m", "benchmarks", *usual, *flags]


def run(*flags: str, **places: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*flags, **places), capture_output=True, text=True, env=environ())
    assert "Traceback" not in done.stderr, done.stderr
    return done


def environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def trials(runs_dir: str = "runs/s") -> list:
    """All trials of the study, from its journal."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(f"{runs_dir}/journal.log")
    return optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend)).trials


def ended(found: list) -> list:
    return [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]


def table() -> list[dict[str, str]]:
    with open("runs/s/report/trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def sessions() -> dict[str, list[str]]:
    """What each run directory of the trials has seen."""
    return {path.parent.name: path.read_text().split() for path in Path("runs/s/trials").glob("*/sessions.txt")}


def wait_for(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------- whole sweeps
def test_a_sweep_finds_what_is_good_and_checks_it_on_other_seeds(here):
    done = run("--trials", "24", "--workers", "3", "--seeds", "2", "--final-seeds", "3", "--eval-episodes", "5")
    assert done.returncode == 0, done.stderr
    found = trials()
    assert len(ended(found)) == len(found) == 24
    rows = table()
    assert len(rows) == 24 and max(float(row["score"]) for row in rows) == float(rows[0]["score"]) > 0.9
    assert 1e-4 < float(rows[0]["learning-rate"]) < 1e-2 and int(rows[0]["width"]) >= 32
    assert found[0].params == {"learning-rate": 0.1, "width": 64}  # the script's defaults come first
    lines = [line for line in done.stdout.splitlines() if re.match(r"trial \d+: ", line)]
    assert len(lines) == 24 and re.search(r"best \S+, trial \d+; 24 of 24, 0:00:00 left$", lines[-1]), lines[-1]

    report = Path("runs/s/report")
    assert {path.name for path in report.iterdir()} >= {
        "history.png",
        "importance.png",
        "parameters.png",
        "winner.toml",
    }
    text = (report / "report.md").read_text()
    assert re.search(r"\| all, normalised \| 0\.0\d\d \[.*\] \| [01]\.\d+ \[.*\] \| .* \| better \|", text), text
    number = int(rows[0]["trial"])
    flags = f"--learning-rate {rows[0]['learning-rate']} --width {rows[0]['width']}"
    assert f"## Winner: trial {number}\n" in text
    assert f"python fake.py --env-id Acrobot-v1 {flags}\n" in text
    again = f"python -m benchmarks run runs/s/report/winner.toml --runs-dir runs/s/final-{number:04}"
    assert f"`{again}`" in text and "normalised (" in text and "cut off at -0.5; a failed run scores -1." in text
    dry = [sys.executable, *again.split()[1:], "--dry-run"]
    dry = subprocess.run(dry, capture_output=True, text=True, env=environ())
    assert dry.returncode == 0 and dry.stdout.count(f"--runs-dir runs/s/final-{number:04} ") == 12, dry.stderr

    tuned = {int(name.split("__")[2]) for name in sessions()}
    jobs = jobs_of(read_suite(str(report / "winner.toml")))
    assert tuned == {1001, 1002} and {job.seed for job in jobs} == {1, 2, 3}
    assert {job.algo: job.flags for job in jobs} == {
        "default": ("--exp-name", "default"),
        "winner": ("--exp-name", "winner", *flags.split()),
    }
    final = Path(f"runs/s/final-{number:04}")
    for job in jobs:  # the check is a run of the suite, with evaluations
        assert json.loads((final / job.name / "summary.json").read_text())["eval"]["deterministic"]["episodes"] == 5

    again = run("--trials", "24", "--workers", "3", "--seeds", "2", "--final-seeds", "3", "--eval-episodes", "5")
    seen = set(map(tuple, sessions().values()))  # () of a run that was stopped early in its first instant
    assert again.returncode == 0 and ("begun",) in seen and seen <= {("begun",), ()}


def test_a_killed_sweep_goes_on_with_the_same_trials_and_runs(here):
    Path("slow.toml").write_text(SPACE + "\n[fixed]\nsleep = 0.4\n")
    flags = ("--trials", "5", "--workers", "2", "--seeds", "2")
    process = subprocess.Popen(command(*flags, space="slow.toml"), stdout=subprocess.DEVNULL, env=environ())
    wait_for(lambda: len(sessions()) >= 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {trial.number: trial.params for trial in trials()}
    assert any(trial.state.name == "RUNNING" for trial in trials())
    done = run(*flags, space="slow.toml")
    assert done.returncode == 0 and "goes on; who worked on it is gone" in done.stdout

    found = ended(trials())
    numbers = [study.number_of(trial) for trial in found]
    assert sorted(numbers) == list(range(5))  # none lost, none double
    for trial in found:
        assert study.number_of(trial) not in before or trial.params == before[study.number_of(trial)]
        assert len(trial.user_attrs["runs"]) == 4
    counts = Counter(session for seen in sessions().values() for session in seen)
    assert counts["begun"] == len(sessions()) == 20


def test_two_processes_share_a_study(here):
    Path("slow.toml").write_text(SPACE + "\n[fixed]\nsleep = 0.1\n")
    flags = ("--trials", "12", "--workers", "2", "--seeds", "1", "--final-seeds", "1")
    start = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ())
    both = [subprocess.Popen(command(*flags, space="slow.toml"), **start) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    found = trials()
    assert len(ended(found)) == 12 and len([t for t in found if t.state.name != "FAIL"]) == 12
    owners = Counter(trial.user_attrs["owner"] for trial in ended(found))
    assert len(owners) == 2 and min(owners.values()) >= 2, owners
    assert len({tuple(sorted(trial.params.items())) for trial in found}) == 12  # nobody drew what another drew
    assert set(map(tuple, sessions().values())) == {("begun",)} and len(sessions()) == 24
    said = [re.findall(r"^trial (\d+): ", output, re.M) for output, _ in outputs]
    assert sorted(map(int, said[0] + said[1])) == list(range(12))


def test_ctrl_c_saves_and_the_same_command_goes_on(here):
    Path("slow.toml").write_text(SPACE + "\n[fixed]\nsleep = 0.5\n")
    flags = ("--trials", "3", "--workers", "2", "--seeds", "2")
    process = subprocess.Popen(command(*flags, space="slow.toml"), stdout=subprocess.PIPE, text=True, env=environ())
    wait_for(lambda: len(sessions()) >= 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in output
    assert not any(trial.state.name == "RUNNING" for trial in trials())
    statuses = [json.loads(path.read_text())["status"] for path in Path("runs/s/trials").glob("*/summary.json")]
    assert statuses.count("interrupted") >= 1
    assert run(*flags, space="slow.toml").returncode == 0
    assert sorted(study.number_of(trial) for trial in ended(trials())) == [0, 1, 2]
    assert "resumed" in {session for seen in sessions().values() for session in seen}


# ------------------------------------------------------------------------------------------ bad and failed trials
def known(values: list[float], envs: tuple[str, ...] = ("A-v0",)) -> dict:
    pairs = [(env_id, 1001 + n) for n in range(len(values) // len(envs)) for env_id in envs]
    return {f"{env_id} {seed}": {"score": value} for (env_id, seed), value in zip(pairs, values)}


def test_a_trial_is_bad_when_below_the_quantile_over_the_same_runs():
    others = [known([score, 10 * score, score, 10 * score], ("A-v0", "B-v0")) for score in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert study.is_bad(known([0.2, 3.0], ("A-v0", "B-v0")), others, 0.5, envs=2)  # the median is (0.3 + 3) / 2
    assert not study.is_bad(known([0.4, 3.0], ("A-v0", "B-v0")), others, 0.5, envs=2)
    assert not study.is_bad(known([0.2, 3.0], ("A-v0", "B-v0")), others, 0.2, envs=2)
    assert not study.is_bad(known([0.0, 0.0], ("A-v0", "B-v0")), others[:4], 0.5, envs=2)  # too few to compare with
    assert not study.is_bad(known([0.0]), others, 0.5, envs=2)  # nothing is known of the other environment
    assert study.is_bad({"B-v0 1002": {"score": 2.9}}, others, 0.5, envs=1)  # against 3.0, not against the others of A
    assert study.is_bad(known([-math.inf]), others, 0.5, envs=1)


def test_a_bad_trial_is_stopped_with_the_run_that_is_going_on(here):
    Path("space.toml").write_text(SPACE + "[fixed]\nsleep-later = 0.5\n")
    flags = ("--workers", "2", "--seeds", "3", "--sampler-seed", "1")
    done = run("--trials", "14", *flags, envs="CartPole-v1")
    assert done.returncode == 0
    early = [row for row in table() if row["state"] == "stopped early"]
    assert (
        len(early) >= 3
        and min(int(row["trial"]) for row in early) >= study.ENOUGH
        and {row["runs"] for row in early} <= {"1", "2"}
    )
    assert max(float(row["score"]) for row in early) < float(table()[0]["score"])
    for row in early:  # seed 1001 is quick; 1002 is going on when the verdict comes, and 1003 has not begun
        runs = {path.parent: json.loads(path.read_text()) for path in Path("runs/s/trials").glob("*/summary.json")}
        status = [r["status"] for path, r in runs.items() if f"trial-{int(row['trial']):04}" in path.name]
        assert len(status) <= int(row["runs"]) + 1 and status.count("completed") == int(row["runs"])
    assert "interrupted" in [r["status"] for r in runs.values()]
    assert re.search(r"stopped after [12] of 3 runs", done.stdout)


def test_failed_runs_are_shown_and_score_lowest(here):
    Path("space.toml").write_text(SPACE.replace("low = 16\nhigh = 128", "choices = [7, 13, 64]"))
    done = run("--trials", "12", "--workers", "2", "--seeds", "2", "--prune", "0")
    assert done.returncode == 0
    rows = table()
    failed = [row for row in rows if row["width"] in ("7", "13")]
    assert failed and all(row["score"] == "-1.0" and row["failed"] == "4" for row in failed)
    assert rows[0]["width"] == "64" and len(rows) == 12
    assert "error: iteration 1: the loss is nan" in done.stdout
    assert "error: --width is 13, which brings bad luck." in done.stdout
    assert f"{4 * len(failed)} failed runs." in Path("runs/s/report/report.md").read_text()


def test_a_failed_run_scores_lower_than_the_worst_one_that_worked(here):
    plan = make_plan(options())
    assert plan.score("CartPole-v1", None) < plan.score("CartPole-v1", -1e9) < plan.score("CartPole-v1", 0.0) < 0.0
    assert plan.score("CartPole-v1", 22.0) == 0.0 and plan.score("CartPole-v1", 500.0) == 1.0


def test_games_are_scored_between_a_random_and_a_human_player(here):
    plan = make_plan(options(env_ids=("PongNoFrameskip-v4", "ALE/Breakout-v5")))
    assert plan.bounds == {"PongNoFrameskip-v4": [-20.7, 14.6], "ALE/Breakout-v5": [1.7, 30.5]}


def test_a_script_that_never_starts_ends_the_study_with_its_message(here):
    Path("space.toml").write_text("[learning-rate]\nlow = 0.1\nhigh = 0.2\n[fixed]\nwidth = 13\n")
    done = run("--trials", "4", "--workers", "2", envs="CartPole-v1")
    assert done.returncode == 2 and "error: --width is 13, which brings bad luck." in done.stderr
    assert not ended(trials())


def test_one_environment_may_keep_raw_scores(here):
    Path("space.toml").write_text("[width]\nchoices = [7, 32]\n")
    done = run("--trials", "3", "--final-seeds", "2", envs="Taxi-v4")
    assert done.returncode == 0, done.stderr
    scores = {row["width"]: float(row["score"]) for row in table()}
    assert 0 < scores["32"] < 1 and scores["7"] == -math.inf
    assert "A failed run scores lowest of all." in Path("runs/s/report/report.md").read_text()


# ----------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[learning-rat]\nlow = 1\nhigh = 2",
            "space.toml: learning-rat: fake.py has no such flag; did you mean learning-rate?",
        ),
        (
            "[width]\nlow = 1\nhigh = 2\n[learning_rate]\nlow = 1\nhi = 2",
            "space.toml: learning-rate.hi: no such key; did you mean high?",
        ),
        ("\n[width]\nlow = 8\n[sleep]\nlow = 1\nhigh = 2", "space.toml: width.high: is missing."),
        ("[width]\nlow = 8\nhigh = 8", "space.toml: width.high: must be greater than low, 8"),
        (
            "[width]\nlow = 0\nhigh = 8\nlog = true",
            "space.toml: width.log: must be true or false, and low greater than 0",
        ),
        ("[width]\nlow = 1\nhigh = 8\nstep = 0", "space.toml: width.step: must be a number greater than 0"),
        ("[width]\nlow = '1'\nhigh = 8", "space.toml: width.low: must be a number"),
        ("[width]\nchoices = [1]", "space.toml: width.choices: must be a list of two or more different values"),
        (
            "[surrogate]\nchoices = ['clip', 'clop']",
            "space.toml: surrogate.choices: fake.py takes clip, none, not clop",
        ),
        ("width = 3", "space.toml: width: must be a table"),
        ("[width]\nlow = nan\nhigh = 8", "space.toml: width.low: must be a number"),
        ("[width]\nlow = 1\nhigh = inf", "space.toml: width.high: must be a number"),
        (
            "[learning-rate]\nlow = 0.1\nhigh = 1\n[learning_rate]\nlow = 1\nhigh = 2",
            "learning-rate: is there twice, with - and with _",
        ),
        ("[width]\nlow = 1\nhigh = 8\n[fixed]\nwidth = 3", "space.toml: fixed.width: is searched as well"),
        (
            "[width]\nlow = 1\nhigh = 8\n[fixed]\nwdth = 3",
            "space.toml: fixed.wdth: fake.py has no such flag; did you mean width?",
        ),
        ("[seed]\nlow = 1\nhigh = 8", "space.toml: seed: the sweep sets this flag itself"),
        (
            "[width]\nlow = 1\nhigh = 8\n[normalise]\nA-v0 = [3, 2]",
            "space.toml: normalise.A-v0: must be [score that counts as 0",
        ),
        ("[width]\nlow = 1.5\nhigh = 8", "space.toml: width.low: fake.py takes whole numbers; low, high and step must"),
        (
            "[sleep]\nlow = 1\nhigh = 8\n[fixed]\nnorm-adv = 1",
            "space.toml: fixed.norm-adv: fake.py takes true or false",
        ),
        ("[width\nlow = 1", "at line 1"),
        ("[fixed]\nwidth = 3", "searches nothing"),
    ],
)
def test_mistakes_in_a_space_are_named_before_anything_is_created(here, text, message):
    Path("space.toml").write_text(text)
    with pytest.raises(UsageError) as error:
        make_plan(options())
    assert message in str(error.value) and "space.toml" in str(error.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(storage="sqlite:///study.db", workers=2), "SQLite locks its whole file for a writer"),
        (dict(env_ids=("CartPole-v1", "Taxi-v4")), 'under [normalise]: "Taxi-v4" = ['),
        (dict(env_ids=("CartPole-v2",)), "did you mean CartPole-v1?"),
        (dict(script="fak.py"), "fak.py is no script"),
        (dict(space="nonsense"), "there is no space nonsense"),
        (dict(trials=0), "--trials is 0, but must be a whole number from 1 to"),
        (dict(workers=10**6), "--workers is 1000000, but must be a whole number from 1 to 1,000"),
        (dict(seeds=10**8), "--seeds is 100000000, but must be"),
        (dict(sampler_seed=-1), "--sampler-seed is -1, but must be"),
        (dict(total_timesteps=10**30), "--total-timesteps is 1000000"),
        (dict(study="x" * 201), "--study is longer than 200 bytes"),
        (dict(study="é" * 120), "--study is longer than 200 bytes"),
        (dict(space="x" * 300), "there is no space xxx"),
        (dict(env_ids=("..:CartPole-v1",)), "importing .. fails (TypeError"),
        (dict(study=""), "--study is '', but must be a name"),
        (dict(study="../elsewhere"), "but must be a name of letters"),
        (dict(script="sb3:ppo", export_wandb="wandb.yaml"), "sb3:ppo cannot log to Weights & Biases"),
        (dict(prune=1.5), "--prune from 0 to 1"),
    ],
)
def test_wrong_usage_is_refused_in_a_sentence(here, changes, message):
    with pytest.raises(UsageError) as error:
        make_plan(options(**changes))
    assert message in str(error.value)


def test_wrong_usage_ends_with_status_2_and_creates_nothing(here):
    done = run("--storage", "sqlite:///study.db", "--workers", "2")
    assert done.returncode == 2 and done.stderr.startswith("error: SQLite") and done.stderr.count("\n") == 1
    assert not Path("runs").exists() and not Path("study.db").exists()


def test_a_storage_that_cannot_be_used_is_refused(here):
    for storage in ("postgresql://nobody@localhost:1/none", "nonsense://place", "fake.py/journal.log"):
        with pytest.raises(UsageError, match=f"the storage {storage} cannot be used: "):
            study.open_study(make_plan(options(storage=storage)))
    assert not Path("runs/s/journal.log").exists()


def test_sqlite_serves_one_worker(here):
    done = run("--storage", "sqlite:///study.db", "--trials", "2", "--seeds", "1")
    assert done.returncode == 0 and len(table()) == 2


def test_a_study_is_joined_only_with_what_it_was_begun_with(here):
    study.open_study(make_plan(options()))
    study.open_study(make_plan(options(trials=99, workers=1, prune=0.1)))
    with pytest.raises(UsageError, match="was begun with another seeds; choose another --study"):
        study.open_study(make_plan(options(seeds=2)))
    Path("fake.py").write_text(SCRIPT + "\n# another text")
    with pytest.raises(UsageError, match="another text of the script;"):
        study.open_study(make_plan(options()))


# ------------------------------------------------------------------------------------------------------ the rest
def test_more_trials_than_asked_for_are_given_up_by_whom_is_later(here, monkeypatch):
    """Machines that do not share a folder, and so the lock, may both take the last trial."""
    plan = make_plan(options(trials=2))
    found = study.open_study(plan)
    first, second = sweep.Sweep(plan, found), sweep.Sweep(plan, found)
    ask = type(found).ask

    def late(self, *args):
        """While second asks for a trial, first takes the last one."""
        monkeypatch.setattr(type(found), "ask", ask)
        monkeypatch.setattr(study.fcntl, "flock", lambda *_: None)
        first.claim()
        return ask(self, *args)

    first.claim()
    monkeypatch.setattr(type(found), "ask", late)
    second.in_progress = list(first.in_progress)  # one process plays both: what first has is not its dead predecessor's
    second.claim()
    assert [trial.state.name for trial in found.trials] == ["RUNNING", "RUNNING", "FAIL"]
    assert len(first.in_progress) == 2 and len(second.in_progress) == 1


def test_a_trial_that_is_handed_back_stays_what_it_was(here):
    plan = make_plan(options(trials=4))
    found = study.open_study(plan)
    first, second = sweep.Sweep(plan, found), sweep.Sweep(plan, found)
    for _ in range(2):
        first.claim()
    second.in_progress = list(first.in_progress)
    trial = first.in_progress[0].trial
    trial.set_user_attr("runs", {"CartPole-v1 1001": {"status": "done", "value": 400.0, "score": 0.79, "run": "x"}})
    study.hand_back(found, trial)
    study.hand_back(found, trial)  # by somebody else who had the same thought
    second.claim()
    taken = second.in_progress[-1]
    assert str(taken) == "trial 0" and taken.trial.params == trial.params and len(found.trials) == 3
    assert [job.name for job in taken.todo] == [job.name for job in first.in_progress[0].jobs[1:]]


def test_owners_are_dead_without_their_process_and_after_a_long_silence(here):
    found = study.open_study(make_plan(options()))
    host, pid = study.OWNER.split()
    gone = subprocess.Popen(["true"])
    gone.wait()
    for owner, seen, alive in (
        (f"{host} {os.getpid()}", 0, True),
        (f"{host} {os.getpid()}", 601, False),
        (f"{host} {gone.pid}", 0, False),
        (f"elsewhere {gone.pid}", 500, True),
        (f"elsewhere {gone.pid}", 601, False),
    ):
        found.set_user_attr(f"seen {owner}", time.time() - seen)
        assert study.is_alive(found, owner) == alive, (owner, seen)


def test_the_lock_of_the_journal_goes_with_its_process(here):
    hold = "import time; from pathlib import Path; from benchmarks.study import JournalLock\n"
    hold += "lock = JournalLock(Path('journal.log.lock'))\nlock.acquire()\nPath('held').touch()\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold], env=environ())
    wait_for(Path("held").exists)
    with open("journal.log.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.wait()
    lock = study.JournalLock(Path("journal.log.lock"))
    assert lock.acquire()
    lock.release()
    assert lock.acquire()


def test_defaults_come_from_the_script_and_stay_within_the_space(here):
    known = arguments_of("fake.py", "CartPole-v1")
    text = "[learning-rate]\nlow = 1e-4\nhigh = 1e-2\n[width]\nlow = 10\nhigh = 100\nstep = 20\n"
    text += "[norm-adv]\nchoices = [false, true]\n[sleep]\nchoices = [1, 2]\n[sleep-later]\nchoices = [2, 0]\n"
    Path("space.toml").write_text(text + "[surrogate]\nlow = 1\nhigh = 2\n")
    read = space.read_space("space.toml")
    defaults = {"learning-rate": 0.01, "width": 70, "norm-adv": True, "sleep-later": 0}
    assert space.default_of(read, known) == defaults
    assert [type(value) for value in space.default_of(read, known).values()] == [float, int, bool, int]
    assert space.values_of(read, {"learning-rate": 0.0012345, "width": 30}) == {"learning-rate": 0.001234, "width": 30}


def test_the_shipped_spaces_fit_their_scripts():
    plan = make_plan(Options(script="ppo", env_ids=("CartPole-v1",), study="s"))
    jobs = plan.jobs("trial-0000", plan.defaults[0])
    assert set(plan.defaults[0]) == set(plan.space.params) and [job.seed for job in jobs] == [1001, 1002, 1003]
    assert plan.algo == "ppo" and plan.shown == ("python", "ppo.py") and jobs[0].eval_episodes == 0
    for name in ("ppo", "a2c", "a3c", "trpo", "reinforce", "sac"):
        env_id = "Pendulum-v1" if name == "sac" else "CartPole-v1"
        known, read = arguments_of(name, env_id), space.read_space(name)
        space.check_flags(read, name, known)
        assert set(space.default_of(read, known)) == set(read.params)


def test_a_script_that_cannot_play_an_environment_is_refused():
    with pytest.raises(UsageError, match=r"^sac acts in boxes only, and CartPole-v1 has other actions\.$"):
        make_plan(Options(script="sac", env_ids=("Pendulum-v1", "CartPole-v1"), study="s"))


def test_a_run_that_somebody_else_stops_goes_on(here):
    Path("slow.toml").write_text(SPACE + "\n[fixed]\nsleep = 1.0\n")
    flags = ("--trials", "1", "--seeds", "1")
    start = dict(stdout=subprocess.PIPE, text=True, env=environ())
    process = subprocess.Popen(command(*flags, envs="CartPole-v1", space="slow.toml"), **start)
    wait_for(sessions)
    name = next(iter(sessions()))
    time.sleep(0.3)
    os.kill(int(Path(f"runs/s/trials/{name}/pid").read_text()), signal.SIGTERM)
    assert process.communicate(timeout=60) and process.returncode == 0
    assert sessions() == {name: ["begun", "resumed"]} and table()[0]["failed"] == "0"


def test_the_sweep_file_of_wandb_needs_no_extra(here, monkeypatch):
    pytest.importorskip("yaml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for module in (sweep, study, conclusion):
        monkeypatch.setattr(module, "optuna", None)
    assert sweep.main(options(export_wandb="wandb.yaml")) == 0 and Path("wandb.yaml").exists()
    with pytest.raises(UsageError, match="a sweep needs optuna"):
        make_plan(options())


def test_the_space_as_a_sweep_file_of_wandb(here):
    yaml = pytest.importorskip("yaml")
    more = (
        "[norm-adv]\nchoices = [false, true]\n[surrogate]\nchoices = ['clip', 'none']\n[sleep]\nlow = 0.0\nhigh = 0.3\n"
    )
    more += "step = 0.1\n[fixed]\ntotal-timesteps = 5000\n"
    Path("space.toml").write_text(SPACE.replace("high = 128", "high = 128\nlog = true") + more)
    done = run("--export-wandb", "wandb.yaml")
    assert done.returncode == 0 and not Path("runs").exists()
    content = yaml.safe_load(Path("wandb.yaml").read_text())
    assert content["program"] == "fake.py" and content["method"] == "random"
    assert content["metric"] == {"name": "charts/train_last100", "goal": "maximize"}
    parameters = content["parameters"]
    assert parameters["learning_rate"] == {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0}
    assert parameters["width"] == {"distribution": "q_log_uniform_values", "q": 1, "min": 16, "max": 128}
    assert parameters["no_norm_adv"] == {"values": [False, True]}  # the default is true, and an agent drops false ones
    assert parameters["sleep"] == {"values": [0.0, 0.1, 0.2, 0.3]}
    assert parameters["env_id"] == {"values": ["CartPole-v1", "Acrobot-v1"]}
    assert parameters["seed"] == {"values": [1001, 1002, 1003]}
    assert content["command"][3:] == ["--track", "--total-timesteps", "5000", "${args_no_boolean_flags}"]


def test_the_comparison_has_intervals_and_says_what_they_show(here):
    plan = make_plan(options())
    rng = np.random.default_rng(1)
    default = {"CartPole-v1": list(rng.normal(200, 10, 5)), "Acrobot-v1": list(rng.normal(-90, 5, 5))}
    winner = {"CartPole-v1": list(rng.normal(400, 10, 5)), "Acrobot-v1": list(rng.normal(-90, 5, 5))}
    lines = conclusion.compare(plan, default, winner)
    assert lines[2].startswith("| CartPole-v1 | ") and lines[2].endswith("| better |")
    assert lines[3].startswith("| Acrobot-v1 | ") and lines[3].endswith("| not shown to differ |")
    assert lines[4].startswith("| all, normalised | ") and lines[4].endswith("| better |")
    assert conclusion.compare(plan, winner, default)[2].endswith("| worse |")
    assert "few seeds are too narrow" in lines[-1]


def test_the_verdict_on_five_seeds_is_not_that_of_the_plain_bootstrap(here):
    """The plain interval of this difference, [0.8, 14.6], is above zero."""
    plan = make_plan(options())
    default, winner = [0.0, 4.0, 8.0, 12.0, 16.0], [8.0, 12.0, 16.0, 19.0, 24.0]
    plain = conclusion.stats.difference(np.array(default), np.array(winner), np.random.default_rng(0))
    assert plain[0] > 0
    lines = conclusion.compare(plan, {"CartPole-v1": default}, {"CartPole-v1": winner})
    assert lines[2].endswith("| not shown to differ |")


def test_a_failed_run_of_the_check_counts_as_the_lowest_return(here):
    plan = make_plan(options())
    assert conclusion.filled(plan, [300.0, 30.0], [None, 400.0], "CartPole-v1")[1].tolist() == [22.0, 400.0]
    assert conclusion.filled(plan, [300.0, 10.0], [None, 400.0], "CartPole-v1")[1].tolist() == [10.0, 400.0]
    assert math.isnan(conclusion.filled(plan, [0.5], [None], "Taxi-v4")[1][0])
    both = {"CartPole-v1": [300.0, 300.0, 320.0], "Acrobot-v1": [-90.0, -90.0, -91.0]}
    failed = {env_id: [None, *scores[1:]] for env_id, scores in both.items()}
    scores = [plan.score(env_id, value) for env_id, values in failed.items() for value in values]
    assert scores.count(-1.0) == 2 and f"| {study.show(np.mean(scores))} [" in conclusion.compare(plan, both, failed)[4]
    said = " ".join(conclusion.compare(plan, both, failed))
    assert "On CartPole-v1 0 of 3 runs of the default and 1 of 3 of the winner failed and count as 22.0." in said
    assert "failed" not in " ".join(conclusion.compare(plan, both, both))
