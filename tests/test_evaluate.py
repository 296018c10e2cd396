"""The verb evaluate: the numbers of --evaluate for every kept checkpoint, once, without changing the run."""

import csv
import importlib
import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest

from benchmarks import evaluate
from benchmarks.__main__ import main
from benchmarks.jobs import ROOT

PPO = "--num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1 --compile off --checkpoint-interval 1"
RUNS = {  # what is trained, and the steps of its checkpoints
    "ppo": (f"--env-id CartPole-v1 {PPO} --total-timesteps 128", [0, 64, 128]),
    "sac": ("--env-id Pendulum-v1 --learning-starts 20 --batch-size 8 --log-interval 20 --checkpoint-interval 1"
            " --compile off --total-timesteps 60", [0, 40, 60]),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of each script, not evaluated yet."""
    folder = tmp_path_factory.mktemp("trained")
    for name, (flags, _) in RUNS.items():
        words = [*flags.split(), "--keep-checkpoints", "--runs-dir", str(folder), "--run-name", name]
        assert importlib.import_module(name).main(words) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """run(name) is a copy of a run."""
    return lambda name: Path(shutil.copytree(trained / name, tmp_path / name))


class Here:
    """An executor that works in this process, at once."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", Here)


def rows(run):
    with open(run / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "evaluations.csv"}


def refused(capsys, *words):
    assert main(["evaluate", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_every_checkpoint_has_the_numbers_of_evaluate_and_the_run_is_as_before(run, capsys):
    runs = {name: run(name) for name in RUNS}
    (runs["sac"] / "summary.json").unlink()  # as if it were still training
    before = {name: contents(path) for name, path in runs.items()}
    assert main(["evaluate", *map(str, runs.values()), "--episodes", "3", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("6 evaluations were missing\n") and "sac step 40: mean -" in out
    for name, path in runs.items():
        found = rows(path)
        assert list(found[0]) == ["step", "mean", "std", "min", "max", "episodes", "seed"]
        assert [int(row["step"]) for row in found] == RUNS[name][1] and contents(path) == before[name]
        assert {(row["episodes"], row["seed"]) for row in found} == {("3", "1000000")}
        script = importlib.import_module(name)
        for row in found:
            file = path / "checkpoints" / f"step_{int(row['step']):012}.pt"
            returns = script.evaluate(script.parse_args(["--evaluate", str(file), "--eval-episodes", "3"]))
            mean = sum(returns) / 3
            assert float(row["mean"]) == pytest.approx(mean, rel=1e-12)
            assert (float(row["min"]), float(row["max"])) == (min(returns), max(returns))
            assert float(row["std"]) == pytest.approx((sum((x - mean) ** 2 for x in returns) / 3) ** 0.5)


def test_what_is_there_is_not_repeated_and_more_is_added(run, here, capsys):
    path = run("ppo")
    assert main(["evaluate", str(path), "--episodes", "2", "--every", "128"]) == 0
    first = rows(path)
    assert [row["step"] for row in first] == ["0", "128"] and "2 evaluations were missing" in capsys.readouterr().out
    before = (path / "evaluations.csv").read_bytes()
    assert main(["evaluate", str(path), str(path), "--episodes", "2", "--every", "128"]) == 0
    assert capsys.readouterr().out == "0 evaluations were missing\n"
    assert (path / "evaluations.csv").read_bytes() == before
    assert main(["evaluate", str(path), "--episodes", "2"]) == 0
    assert capsys.readouterr().out.count("step ") == 1
    assert [row["step"] for row in rows(path)] == ["0", "64", "128"] and rows(path)[::2] == first
    assert sorted(path.name for path in path.iterdir() if "evaluations" in path.name) == ["evaluations.csv"]


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_others_are_evaluated(run, here, capsys):
    path = run("ppo")
    bad = path / "checkpoints" / "step_000000000064.pt"
    bad.write_bytes(b"no checkpoint")
    assert main(["evaluate", str(path), "--episodes", "1"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {bad}: ") and err.count("\n") == 1 and "is corrupt" in err
    assert [row["step"] for row in rows(path)] == ["0", "128"]
    assert out.endswith("3 evaluations were missing, and some still are\n")


def test_the_script_is_that_of_the_command_or_the_one_here_of_its_name(tmp_path):
    mine = Path(shutil.copy(ROOT / "ppo.py", tmp_path / "mine.py"))

    def script(command, exp_name="ppo", **args):
        return evaluate.script_of(tmp_path, {"command": command, "args": {"exp_name": exp_name} | args})

    assert script(["python", str(mine), "--seed", "1"]) == mine.resolve()
    assert script(["python", "/gone/a2c.py"]) == ROOT / "a2c.py"
    assert script(None, "sac") == ROOT / "sac.py" and script(["pytest"], "trpo") == ROOT / "trpo.py"
    assert script(None, algo="sb3:sac") == ROOT / "benchmarks" / "peers.py"
    with pytest.raises(evaluate.UsageError, match="the script that has trained it, /gone/other.py, is not there"):
        script(["python", "/gone/other.py"], "other")


def test_a_peer_is_evaluated_too(tmp_path):
    from benchmarks import peers

    flags = "random --n-steps 32 --n-envs 2 --total-timesteps 64 --keep-checkpoints --run-name run --runs-dir"
    assert peers.main([*flags.split(), str(tmp_path)]) == 0
    result, said = evaluate.evaluate(evaluate.Task(tmp_path / "run", ROOT / "benchmarks" / "peers.py", 64, 2))
    assert not said and result["episodes"] == 2 and result["min"] <= result["mean"] <= result["max"]
    assert not (tmp_path / "run" / "evaluations.csv").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "evaluate takes one or more run directories."),
        (("nowhere",), "nowhere is no run in an environment: it has no config.json with its arguments."),
        (("{run}", "--episodes", "0"), "--episodes is 0, but must be a whole number from 1 to 1,000,000."),
        (("{run}", "--every", "-5"), "--every is -5, but must be"),
        (("{run}", "--jobs", "0"), "--jobs is 0, but must be"),
        (("{run}", "--jobs", "many"), "many"),
    ],
)
def test_wrong_usage_is_one_sentence(words, says, run, capsys):
    path = run("ppo")
    assert says in refused(capsys, *(word.format(run=path) for word in words))
    assert not (path / "evaluations.csv").exists()


def test_a_run_without_checkpoints_that_were_asked_for_is_refused(run, capsys):
    path = run("ppo")
    (path / "checkpoints" / "step_000000000000.pt").unlink()
    said = refused(capsys, path, "--every", "1000")
    assert said.endswith("has no checkpoint at a multiple of 1,000 steps; its steps are 64, 128....\n")
    shutil.rmtree(path / "checkpoints")
    assert "it has none at all" in refused(capsys, path)


@pytest.mark.parametrize("content", ["step,mean\n1,2\n", "step,mean,std,min,max,episodes,seed\n1,x,1,1,1,1,1\n"])
def test_a_file_of_something_else_is_not_overwritten(content, run, capsys):
    path = run("ppo")
    (path / "evaluations.csv").write_text(content)
    assert "evaluations.csv cannot be read as evaluations; move it away" in refused(capsys, path)
    assert (path / "evaluations.csv").read_text() == content


def test_a_run_of_a_language_script_is_refused(run, capsys):
    path = run("ppo")
    config = json.loads((path / "config.json").read_text())
    del config["args"]["env_id"]
    (path / "config.json").write_text(json.dumps(config))
    assert "is no run in an environment" in refused(capsys, path)
