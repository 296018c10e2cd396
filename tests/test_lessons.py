"""The lessons' command: that it starts the script, reads what the script wrote, and says what went wrong."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks import lessons

TINY = "--num-digits 2 --n-layer 1 --n-embd 16 --n-head 2 --sft-steps 3 --eval-prompts 8 --max-completion-length 8"
TINY += " --generation-batch-size 16 --num-generations 4 --max-steps 3 --rewards correct format length"


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """lesson(**arms) runs these arms as the lesson "gdpo" in an empty folder and returns the rows of its table."""

    def run(seeds=2, **arms):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(lessons.LESSONS, "gdpo", arms)
        monkeypatch.setattr("sys.argv", ["lessons", "gdpo", "--seeds", str(seeds), "--out", str(tmp_path / "figure")])
        lessons.main()
        with open(tmp_path / "figure.csv", newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_every_arm_and_seed_is_run_once_and_read(lesson, capsys):
    table = lesson(one=TINY, other=f"{TINY} --method gdpo")
    out = capsys.readouterr().out
    assert Path("figure.png").stat().st_size > 1000
    assert {(row["arm"], row["seed"], row["step"]) for row in table} == {
        (arm, seed, step) for arm in ("one", "other") for seed in "12" for step in ("0.0", "1.0", "2.0", "3.0")
    }
    with open(Path("runs") / lessons.name_of(TINY, 1) / "progress.csv", newline="") as file:
        written = list(csv.DictReader(file))
    mine = [row for row in table if (row["arm"], row["seed"]) == ("one", "1")]
    for row, point in zip(written[1:], mine[1:]):
        assert float(point["right answer"]) == pytest.approx((float(row["rewards/correct/mean"]) + 3) / 6, abs=1e-4)
        assert float(point["reward"]) == pytest.approx(float(row["reward"]), abs=1e-4)
    assert float(mine[0]["accuracy"]) == pytest.approx(float(written[0]["eval/accuracy"]), abs=1e-4)
    assert re.search(r"^one: iterations to 90% right format never, never; iterations to 80% right answers", out, re.M)
    assert out.count("python grpo_toy.py") == 4
    lesson(one=TINY, other=f"{TINY} --method gdpo")
    out = capsys.readouterr().out
    assert "python grpo_toy.py" not in out and out.count("kept: runs/") == 4
    lesson(one=f"{TINY} --beta 0.5")  # other flags, other runs
    assert capsys.readouterr().out.count("python grpo_toy.py") == 2


def test_no_seed_is_refused(lesson, capsys):
    with pytest.raises(SystemExit):
        lesson(seeds=0, one=TINY)
    assert "--seeds must be 1 or more" in capsys.readouterr().err


def test_run_that_fails_ends_the_lesson_with_its_name_and_error(lesson):
    with pytest.raises(SystemExit, match="beta_1__1: error: --beta is -1.0, but must be 0 or more"):
        lesson(seeds=1, one=f"{TINY} --beta=-1")


def test_first_iteration_of_a_threshold():
    series = [{"step": 0, "x": 0.95}, {"step": 1}, {"step": 2, "y": 0.9}, {"step": 3, "y": 0.95}]
    assert [lessons.first(series, *at) for at in (("y", 0.9), ("y", 0.91), ("x", 0.9), ("y", 0.96))] == [2, 3, 0, None]


def test_collapse_prints_the_worked_numbers(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lessons", "collapse"])
    lessons.main()
    out = capsys.readouterr().out
    for numbers in (
        r"-0.707 \+0.707 +-0.500 \+0.500 +-0.548 \+0.548",
        r"-0.707 \+0.707 +-1.000 \+1.000 +-1.095 \+1.095",
    ):
        assert re.search(numbers, out)
