"""The lessons' command: that it starts the script, reads what the script wrote, and says what went wrong."""

import csv
import importlib
import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from benchmarks import lessons
from benchmarks.figures import plt

TINY = {
    "num-digits": 2,
    "n-layer": 1,
    "n-embd": 16,
    "n-head": 2,
    "sft-steps": 3,
    "eval-prompts": 8,
    "max-completion-length": 8,
    "generation-batch-size": 16,
    "num-generations": 4,
    "max-steps": 3,
    "rewards": ["correct", "format", "length"],
}


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """lesson(**arms) gives the lesson "gdpo" with these arms in an empty folder: (exit status, rows of its table)."""
    monkeypatch.chdir(tmp_path)

    def run(seeds=2, name="gdpo", **arms):
        monkeypatch.setitem(lessons.LESSONS, name, replace(lessons.LESSONS[name], arms=arms))
        status = lessons.main([name, "--seeds", str(seeds), "--out", str(tmp_path / "figure")])
        if not Path("figure.csv").exists():
            return status, []
        with open("figure.csv", newline="") as file:
            return status, list(csv.DictReader(file))

    return run


def test_every_arm_and_seed_is_run_once_and_read(lesson, capsys):
    arms = dict(one=TINY, other=TINY | {"method": "gdpo"})
    status, table = lesson(**arms)
    out = capsys.readouterr().out
    assert status == 0 and Path("figure.png").stat().st_size > 1000
    assert {(row["arm"], row["seed"], row["step"]) for row in table} == {
        (arm, seed, step) for arm in ("one", "other") for seed in "12" for step in ("0.0", "1.0", "2.0", "3.0")
    }
    (job, _) = lessons.jobs_of(lessons.LESSONS["gdpo"], [1, 2], Path("runs/lessons"))["one"]
    with open(Path("runs/lessons") / job.name / "progress.csv", newline="") as file:
        written = list(csv.DictReader(file))
    mine = [row for row in table if (row["arm"], row["seed"]) == ("one", "1")]
    for row, point in zip(written[1:], mine[1:]):
        assert float(point["right answer"]) == pytest.approx((float(row["rewards/correct/mean"]) + 3) / 6, abs=1e-4)
        assert float(point["reward"]) == pytest.approx(float(row["reward"]), abs=1e-4)
    assert float(mine[0]["accuracy"]) == pytest.approx(float(written[0]["eval/accuracy"]), abs=1e-4)
    assert re.search(r"^one: iterations to 90% right format never, never; iterations to 80% right answers", out, re.M)
    assert out.count("\ndone  ") == 4 and "4 of 4 runs are done" in out
    lesson(**arms)
    out = capsys.readouterr().out
    assert "done  " not in out and "4 of 4 runs are done" in out
    lesson(one=TINY | {"beta": 0.5})  # other flags, other runs
    assert capsys.readouterr().out.count("done  ") == 2


def test_a_lesson_may_begin_with_the_models_of_another(lesson, monkeypatch):
    accuracy = replace(lessons.LESSONS["accuracy"], arms={"GRPO": TINY})
    monkeypatch.setitem(lessons.LESSONS, "accuracy", accuracy)
    small = TINY | {"sft-steps": 0, "rewards": "format", "eval-interval": 1}
    status, table = lesson(name="hacking", seeds=1, one=small | {"beta": 0.1})
    assert status == 0 and len(table) == 4
    (trained,) = lessons.jobs_of(accuracy, [1], Path("runs/lessons"))["GRPO"]
    (job,) = lessons.jobs_of(lessons.LESSONS["hacking"], [1], Path("runs/lessons"))["one"]
    config = json.loads((Path("runs/lessons") / job.name / "config.json").read_text())
    assert config["args"]["init_from"] == str(Path("runs/lessons") / trained.name)


ROAD = {name: value for name, value in TINY.items() if name not in ("rewards", "num-generations")}


def test_the_road_is_drawn_against_what_was_sampled(lesson, capsys):
    """Two scripts in one lesson, and the best of n answers of the warm start of the first arm."""
    arms = {"RLHF-PPO": ROAD | {"reward": "verifier"}, "GRPO": ROAD | {"script": "grpo_toy", "num-generations": 4}}
    status, table = lesson(name="road", seeds=1, **arms)
    assert status == 0 and Path("figure.png").stat().st_size > 1000
    by_arm = {arm: [row for row in table if row["arm"] == arm] for arm in (*arms, "best of n")}
    for arm in arms:
        assert [float(row["completions sampled"]) for row in by_arm[arm]] == [0, 16, 32, 48]
        assert float(by_arm[arm][-1]["tokens sampled"]) > 48
    jobs = lessons.jobs_of(replace(lessons.LESSONS["road"], arms=arms), [1], Path("runs/lessons"))
    assert [Path(job.command[1]).stem for (job,) in jobs.values()] == ["rlhf_toy", "grpo_toy"]
    assert [float(row["completions sampled"]) for row in by_arm["best of n"]] == [8 * 2**k for k in range(8)]


def test_the_best_of_n_is_a_mean_over_all_choices(lesson, monkeypatch):
    import rlhf_toy

    lesson(name="road", seeds=1, **{"RLHF-PPO": ROAD | {"reward": "verifier"}})
    ((job,),) = lessons.jobs_of(lessons.LESSONS["road"], [1], Path("runs/lessons")).values()
    judged = []

    def is_right(prompt, text):
        judged.append((prompt, len(text) % 3 == 0))
        return judged[-1][1]

    monkeypatch.setattr(rlhf_toy, "is_right", is_right)
    points = lessons.best_of_n(Path("runs/lessons") / job.name, most=8)
    prompts = [judged[i : i + 8] for i in range(0, len(judged), 8)]
    assert len(prompts) == 8 and all(len({prompt for prompt, _ in group}) == 1 for group in prompts)
    for point in points:
        best = [
            mean(any(right for _, right in some) for some in combinations(group, point["step"])) for group in prompts
        ]
        assert point["accuracy"] == pytest.approx(mean(best)) and point["completions sampled"] == 8 * point["step"]
    assert 0 < points[0]["accuracy"] < points[-1]["accuracy"]


def test_variances_are_compared_at_equal_return():
    variance, ratio, returns = lessons.LESSONS["variance"].panels
    rows = [(16, 1, 9), (18, 100, 1), (17, 10, 3), (25, 5, 5), (50, 2, 2), (60, 2, 2), (45, 2, 2), (69.9, 2, 2)]
    rows += [(500, 9, 9)] * 3
    seeds = [[{returns: x, variance: v, ratio: r} for x, v, r in part] for part in (rows[:4], rows[4:])]
    points = lessons.binned(lessons.LESSONS["variance"], seeds)
    assert points[:, 0] == pytest.approx([(16 * 18 * 17) ** (1 / 3), (50 * 60 * 45 * 69.9) ** (1 / 4)])
    assert points[:, 1:] == pytest.approx(np.array([[10, 3], [2, 2]]))
    assert lessons.binned(lessons.LESSONS["variance"], [seeds[0][3:]]).shape == (0, 3)


@pytest.mark.slow
def test_the_lesson_of_reinforce_runs_to_a_figure(lesson, capsys):
    short = lessons.RAW | {"total-timesteps": 20_000, "num-envs": 8, "num-steps": 50}
    arms = {
        "a": short | {"returns": "full", "baseline": "none"},
        "b": short | {"returns": "to-go", "baseline": "value"},
    }
    status, table = lesson(name="variance", seeds=1, **arms)
    assert status == 0 and Path("figure.png").stat().st_size > 1000
    assert list(table[0]) == ["returns", "baseline", "mean_return", "variance", "snr"]
    assert {(row["returns"], row["baseline"]) for row in table} == {("full", "none"), ("to-go", "value")}
    assert re.search(r"^a: \S+ at return \d+", capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_the_lesson_of_a3c_runs_to_a_figure_against_steps_and_seconds(lesson, capsys):
    short = {"total-timesteps": 4000, "num-steps": 5, "log-interval": 10}
    arms = {"A2C": short | {"script": "a2c", "num-envs": 4}, "A3C": short | {"num-workers": 2, "num-envs": 2}}
    status, table = lesson(name="async", seeds=2, **arms)
    assert status == 0 and Path("figure.png").stat().st_size > 1000
    for arm, row in (("A2C", 200), ("A3C", 100)):
        for seed in "12":
            points = [point for point in table if (point["arm"], point["seed"]) == (arm, seed)]
            assert [float(point["step"]) for point in points] == list(range(row, 4001, row))
            assert float(points[-1]["return of the last 100 episodes"]) > 9 and float(points[-1]["seconds"]) > 0
    out = capsys.readouterr().out
    assert re.search(r"^A3C: return of the last 100 episodes [\d.]+ -> [\d.]+, [\d.]+ -> [\d.]+$", out, re.M)


def test_no_seed_is_refused(lesson, capsys):
    with pytest.raises(SystemExit):
        lesson(seeds=0, one=TINY)
    assert "--seeds must be a whole number from 1 to 10,000" in capsys.readouterr().err


def test_run_that_fails_ends_the_lesson_with_its_error(lesson, capsys):
    status, table = lesson(seeds=1, one=TINY | {"beta": -1})
    out = capsys.readouterr().out
    assert status == 1 and not table and "error: --beta is -1.0, but must be 0 or more" in out and "FAILED" in out


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_the_scripts_take_the_flags_of_every_lesson(name, tmp_path):
    lesson = lessons.LESSONS[name]
    for arm in lessons.jobs_of(lesson, [1], tmp_path).values():
        _, path, *flags = arm[0].start(tmp_path)
        args = importlib.import_module(Path(path).stem).parse_args(flags)
        assert (args.seed, args.run_name, args.num_threads) == (1, arm[0].name, arm[0].threads)
        assert arm[0].threads == 1 or lesson.at_a_time == 1  # the machine has two cores
    derived = {"completions sampled", "tokens sampled", "root of the KL"}
    quantities = {name for panel in lesson.panels for name in panel.split(" against ")}
    assert quantities <= {*lessons.COLUMNS.values(), *derived}


def test_first_iteration_of_a_threshold():
    series = [{"step": 0, "x": 0.95}, {"step": 1}, {"step": 2, "y": 0.9}, {"step": 3, "y": 0.95}]
    assert [lessons.first(series, *at) for at in (("y", 0.9), ("y", 0.91), ("x", 0.9), ("y", 0.96))] == [2, 3, 0, None]


def test_collapse_prints_the_worked_numbers(capsys):
    assert lessons.main(["collapse"]) == 0
    out = capsys.readouterr().out
    for numbers in (
        r"-0.707 \+0.707 +-0.500 \+0.500 +-0.548 \+0.548",
        r"-0.707 \+0.707 +-1.000 \+1.000 +-1.095 \+1.095",
    ):
        assert re.search(numbers, out)


def test_the_mean_of_a_panel_is_at_equal_iterations_where_a_seed_begins_later():
    series = [[{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}], [{"step": 1}, {"step": 2, "x": 4.0}]]
    figure, axis = plt.subplots()
    lessons.draw_curves(replace(lessons.LESSONS["gdpo"], panels=("x",)), {"arm": series}, figure, np.array([axis]))
    (mean,) = (line for line in axis.lines if line.get_label() == "arm")
    assert mean.get_xydata().tolist() == [[2, 3]]
    plt.close(figure)
