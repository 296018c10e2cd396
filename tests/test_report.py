"""The report: its numbers against numpy, what it says about runs that are damaged, missing or unequal, its files."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import markdown
import numpy as np
import pytest

from benchmarks import figures, report, stats
from benchmarks.__main__ import main
from benchmarks.jobs import UsageError, printable
from benchmarks.records import find_runs, key_of, read_run, read_runs
from benchmarks.suite import read_suite


def make_run(folder, env_id="CartPole-v1", algo="ppo", seed=1, returns=(), status="completed", evaluation=None, **args):
    """A run directory with an episode of ten steps per return."""
    path = Path(folder) / f"{env_id.replace('/', '-')}__{algo}__{seed}{'__x' * bool(args)}"
    path.mkdir(parents=True)
    returns = list(returns) or list(np.linspace(20, 100 + seed, 200))
    arguments = dict(env_id=env_id, exp_name=algo, seed=seed, total_timesteps=10 * len(returns), learning_rate=0.1)
    command = ["/home/somebody/bin/python", "/home/somebody/ppo.py", "--env-id", env_id]
    config = dict(args=arguments | args, command=command, git_commit="0123456789abcdef", git_dirty=False)
    config |= dict(versions={"python": "3.11.7", "torch": "2.13.0"}, hardware="a processor", threads=1)
    (path / "config.json").write_text(json.dumps(config))
    rows = [(10 * (n + 1), 0.5 * (n + 1), value, 10) for n, value in enumerate(returns)]
    with open(path / "episodes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["global_step", "wall_time", "return", "length"], *rows])
    if status:
        summary = dict(status=status, global_step=10 * len(returns), wall_time=0.5 * len(returns), sps=20.0)
        summary |= dict(train_last100=float(np.mean(returns[-100:])))
        summary |= dict(eval={"deterministic": dict(mean=evaluation, episodes=100)}) if evaluation is not None else {}
        summary |= dict(error="iteration 3: loss is nan") if status == "diverged" else {}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def set_argument(run, **values):
    config = json.loads((run / "config.json").read_text())
    config["args"] |= values
    (run / "config.json").write_text(json.dumps(config))


def set_config(run, **values):
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | values))


def set_summary(run, **values):
    (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | values))


def shuffle(file):
    header, first, second, *rest = file.read_text().splitlines()
    file.write_text("\n".join([header, second, first, *rest]) + "\n")


def double(run, num_envs):
    """Each row twice, as two processes that do the same write it, or two environments in step."""
    set_argument(run, num_envs=num_envs)
    header, *rows = (run / "episodes.csv").read_text().splitlines()
    (run / "episodes.csv").write_text("\n".join([header, *(row for row in rows for _ in range(2))]) + "\n")
    set_summary(run, train_last100=float(np.mean([float(row.split(",")[2]) for row in rows[-50:]])))


def progress(run, *steps):
    set_argument(run, num_envs=1)
    (run / "progress.csv").write_text("global_step,wall_time,sps\n" + "".join(f"{step},1,1\n" for step in steps))


def report_of(runs, *flags):
    assert main(["report", str(runs), *map(str, flags)]) == 0
    return (Path(runs) / "report" / "report.md").read_text()


def row_of(text, *cells):
    """The cells of the first table row that starts with these."""
    start = "| " + " | ".join(cells) + " |"
    return next(line for line in text.splitlines() if line.startswith(start)).strip("| ").split(" | ")


def note(runs, cells, **more):
    """Writes suite.json; a cell has the name that make_run gives, unless it has another."""
    for cell in cells or ():
        if isinstance(cell, dict) and "seed" in cell:
            cell.setdefault("name", f"{cell['env_id']}__{cell['algo']}__{cell['seed']}")
    content = dict(name="a suite", description="what it is", commands=["python -m benchmarks run it"], cells=cells)
    (Path(runs) / "suite.json").write_text(json.dumps(content | more))


def test_scores_are_those_of_the_last_100_episodes(tmp_path, capsys):
    means = []
    for seed in (1, 2, 3):
        returns = np.random.default_rng(seed).normal(50, 10, 300)
        make_run(tmp_path, seed=seed, returns=returns, evaluation=100.0 + seed)
        means.append(returns[-100:].mean())
    row = row_of(report_of(tmp_path), "CartPole-v1", "ppo", "3,000", "3")
    mean, low, high = (float(part) for part in re.findall(r"[-\d.]+", row[4]))
    assert mean == pytest.approx(np.mean(means), abs=0.06)
    assert min(means) - 0.06 <= low < mean < high <= max(means) + 0.06
    assert row[6].startswith("102.0 [") and row[7] == "not evaluated" and row[8] == "20 (20 to 20)"
    with open(tmp_path / "report" / "scores.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert [float(run["train_last100"]) for run in stored] == pytest.approx(means, rel=1e-6)
    assert [run["seed"] for run in stored] == ["1", "2", "3"]


def test_curves_end_in_the_scores(tmp_path):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2, status="interrupted", total_timesteps=4000)
    report_of(tmp_path)
    with open(tmp_path / "report" / "curves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if row["seed"] == "1"]
    assert len(first) == 100 and first[-1]["step"] == "2000"
    expected = np.linspace(20, 101, 200)
    assert float(first[-1]["return_last100"]) == pytest.approx(expected[-100:].mean(), rel=1e-4)
    assert float(first[9]["return_last100"]) == pytest.approx(expected[:20].mean(), rel=1e-4)
    assert max(int(row["step"]) for row in rows if row["seed"] == "2") <= 2000  # not beyond where it stopped


def test_the_same_runs_give_the_same_report(tmp_path):
    for seed in range(1, 8):
        make_run(tmp_path, seed=seed, returns=np.random.default_rng(seed).normal(50, 100, 120))
    assert report_of(tmp_path) == report_of(tmp_path)
    assert main(["report", str(tmp_path), "--seed", "5", "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "report.md").read_text() != report_of(tmp_path)


def test_what_is_missing_or_failed_is_shown_and_counted(tmp_path, capsys):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2, status="diverged")
    make_run(tmp_path, seed=3, status="")
    cells = [dict(env_id="CartPole-v1", algo=algo, seed=seed) for algo in ("ppo", "a2c") for seed in (1, 2, 3, 4)]
    note(tmp_path, cells)
    text = report_of(tmp_path)
    out = capsys.readouterr().out
    assert row_of(text, "CartPole-v1", "ppo")[3] == "1 of 4 (1 diverged, 1 unfinished, 1 missing)"
    assert row_of(text, "CartPole-v1", "a2c")[2:5] == ["-", "0 of 4 (4 missing)", "-"]
    assert "3 runs (1 completed, 1 diverged, 1 unfinished, 5 missing)" in text
    for said in ("diverged: iteration 3: loss is nan", "is unfinished, at step 2,000 of 2,000"):
        assert said in text and said in out
    assert "python -m benchmarks run it" in text


@pytest.mark.parametrize(
    "damage, said, counts",
    [
        (lambda run: (run / "config.json").write_text("{"), "has no readable config.json", 1),
        (lambda run: (run / "config.json").unlink(), "has no readable config.json", 1),
        (lambda run: (run / "config.json").write_text('{"args": {"seed": 1}}'), "is no run in an environment", 1),
        (lambda run: (run / "episodes.csv").unlink(), "has no episodes.csv", 1),
        (lambda run: (run / "summary.json").write_text("nonsense"), "damaged summary.json", 1),
        (lambda run: (run / "episodes.csv").open("a").write("1,2,"), "1 rows of episodes.csv cannot be read", 2),
        (lambda run: (run / "episodes.csv").open("a").write("1,2,\0"), "episodes.csv has NUL bytes", 1),
        (lambda run: shuffle(run / "episodes.csv"), "global_step goes back in episodes.csv", 1),
        (lambda run: (run / "episodes.csv").write_text(""), "episodes.csv has no episode", 1),
        (lambda run: os.truncate(run / "episodes.csv", 400), "summary.json says train_last100", 1),
        (lambda run: (run / "episodes.csv").open("a").write("nan,1,2,3\n"), "1 rows of episodes.csv cannot be read", 2),
        (lambda run: (run / "episodes.csv").open("a").write("\0" * 200_000), "episodes.csv has NUL bytes", 1),
        (lambda run: (run / "progress.csv").write_text("global_step,sps\n100,1\n\0\0\n"), "progress.csv has NUL", 1),
        (lambda run: progress(run, 100, 200, 150, 300), "global_step goes back or repeats in progress.csv", 1),
        (lambda run: progress(run, 100, 200, 200, 300), "global_step goes back or repeats in progress.csv", 1),
        (lambda run: progress(run, 100, 200, 300), "", 2),
        (lambda run: (run / "progress.csv").write_text("global_step,sps\n100,1\n200,1\n3"), "", 2),  # cut off
        (lambda run: double(run, num_envs=1), "more episodes end in one step of episodes.csv than there are", 1),
        (lambda run: double(run, num_envs=2), "", 2),
        (lambda run: set_summary(run, global_step=1990), "summary.json ends at step 1,990, episodes.csv at 2,000", 1),
        (lambda run: set_summary(run, train_last100=None), "summary.json says train_last100 None", 1),
        (lambda run: set_argument(run, total_timesteps=10**30), "config.json: args.total_timesteps is 1000000", 1),
        (lambda run: set_argument(run, seed=-1), "config.json: args.seed is -1", 1),
        (lambda run: set_argument(run, seed=2**40), "config.json: args.seed is 1099511627776", 1),
        (lambda run: set_argument(run, seed=math.inf), "has a value that makes no sense", 1),
        (lambda run: set_summary(run, eval=[1]), "has a value that makes no sense", 1),
        (lambda run: set_summary(run, eval={"stochastic": {"mean": "x"}}), "eval.stochastic.mean is 'x'", 1),
        (lambda run: set_summary(run, sps="fast"), "has a value that makes no sense", 1),
        (lambda run: set_summary(run, global_step="many"), "has a value that makes no sense", 1),
        (lambda run: set_config(run, versions=[1]), "has a value that makes no sense", 1),
        (lambda run: set_config(run, git_commit=7), "has a value that makes no sense", 1),
        (lambda run: set_argument(run, seed="x"), "has a value that makes no sense", 1),
        (lambda run: set_argument(run, total_timesteps=[1]), "has a value that makes no sense", 1),
    ],
)
def test_a_damaged_run_is_named_and_the_rest_reported(tmp_path, capsys, damage, said, counts):
    make_run(tmp_path, seed=1)
    damage(make_run(tmp_path, seed=2))
    text = report_of(tmp_path)
    assert said in capsys.readouterr().out and said in text
    assert f"{counts} completed" in text


def test_runs_that_differ_in_an_argument_are_told_apart(tmp_path):
    make_run(tmp_path, seed=1)
    make_run(tmp_path, seed=2)
    make_run(tmp_path, seed=1, learning_rate=0.5)
    text = report_of(tmp_path)
    assert row_of(text, "CartPole-v1", "ppo")[3] == "2"
    assert row_of(text, "CartPole-v1", "ppo, learning_rate=0.5")[3] == "1"


def test_the_name_without_an_addition_is_one_setting_in_all_environments(tmp_path):
    """Also where most runs of one environment have another. What an older text did not have is a setting, too."""
    for env_id, few, many in (("CartPole-v1", 0.1, 0.5), ("Acrobot-v1", 0.5, 0.1), ("Pendulum-v1", 0.1, 0.1)):
        for seed in (1, 2, 3):
            make_run(tmp_path / "many", env_id, seed=seed, learning_rate=many)
        make_run(tmp_path / "few", env_id, seed=4, learning_rate=few)
    make_run(tmp_path / "old", "Pendulum-v1", seed=5, learning_rate=0.1, clip=True)
    runs, _, _ = read_runs([tmp_path])
    settings = {(run.env_id, run.algo): run.arguments["learning_rate"] for run in runs if run.seed < 5}
    assert settings == {
        ("CartPole-v1", "ppo"): 0.1,
        ("CartPole-v1", "ppo, learning_rate=0.5"): 0.5,
        ("Acrobot-v1", "ppo"): 0.1,
        ("Acrobot-v1", "ppo, learning_rate=0.5"): 0.5,
        ("Pendulum-v1", "ppo"): 0.1,
    }
    assert [run.algo for run in runs if run.seed == 5] == ["ppo, clip=True"]


@pytest.mark.parametrize("bf16", ["on", "off"])
def test_runs_in_bfloat16_are_not_in_one_mean_with_others(tmp_path, bf16):
    for seed in (1, 2):
        make_run(tmp_path, seed=seed, bf16=bf16)
    make_run(tmp_path, seed=3, bf16="on" if bf16 == "off" else "off")
    assert sorted(run.algo for run in read_runs([tmp_path])[0])[1:] == [
        "ppo",
        "ppo, bf16=" + ("on" if bf16 == "off" else "off"),
    ]


def test_only_an_evaluation_of_the_last_policy_is_reported(tmp_path):
    for seed, step in ((1, 2000), (2, 1000), (3, None)):
        run = make_run(tmp_path, seed=seed, evaluation=90.0)
        evaluation = {"mean": 90.0, "episodes": 100} | ({"global_step": step} if step else {})
        set_summary(run, eval={"deterministic": evaluation})
    runs, _, _ = read_runs([tmp_path])
    found = [run.scores["eval_deterministic"] for run in runs]
    assert found[0] == found[2] == 90.0 and math.isnan(found[1])  # an old summary does not say which


def test_of_two_runs_of_one_cell_the_later_counts(tmp_path):
    make_run(tmp_path / "a", seed=1, returns=[1.0] * 100)
    later = make_run(tmp_path / "b", seed=1, returns=[2.0] * 100)
    (later / "config.json").touch()
    runs, problems, _ = read_runs([tmp_path])
    assert [run.scores["train_last100"] for run in runs] == [2.0]
    assert problems == ["Left out, because another run is the same cell and was asked for later: CartPole-v1__ppo__1."]


def test_what_was_asked_for_last_counts_even_if_it_failed(tmp_path):
    """A broken script must not hide behind the run of the text before."""
    asked = make_run(tmp_path, seed=1, status="diverged", learning_rate=0.1)
    make_run(tmp_path, seed=1).joinpath("config.json").touch()
    note(tmp_path, [dict(env_id="CartPole-v1", algo="ppo", seed=1, name=asked.name)])
    assert row_of(report_of(tmp_path), "CartPole-v1", "ppo")[3] == "0 of 1 (1 diverged)"


def test_runs_of_another_script_text_do_not_stand_in_for_what_was_asked_for(tmp_path, capsys):
    """A script that no longer starts must not hide behind the runs of the text before."""
    for seed in (1, 2):
        keyed(make_run(tmp_path, seed=seed), f"old{seed}")
    keyed(make_run(tmp_path, seed=1, returns=[7.0] * 120), "new1")
    cells = [dict(env_id="CartPole-v1", algo="ppo", seed=seed) for seed in (1, 2)]
    note(
        tmp_path,
        [cell | dict(name=f"CartPole-v1__ppo__{n}__{ten_digits(f'new{n}')}") for n, cell in enumerate(cells, 1)],
    )
    text = report_of(tmp_path)
    assert row_of(text, "CartPole-v1", "ppo")[3:5] == ["1 of 2 (1 missing)", "7.00"]
    names = ", ".join(f"CartPole-v1__ppo__{n}__{ten_digits(f'old{n}')}" for n in (1, 2))
    said = f"other flags were asked for later: {names}."
    assert said in text and said in (out := capsys.readouterr().out)
    assert "1 of 2 runs are complete, 1 are missing" in out


def test_folders_of_several_suites_keep_what_is_missing(tmp_path):
    for name, algo in (("one", "ppo"), ("two", "a2c")):
        make_run(tmp_path / name, algo=algo, seed=1)
        note(tmp_path / name, [dict(env_id="CartPole-v1", algo=algo, seed=seed) for seed in (1, 2)], name=name)
    text = report_of(tmp_path)
    assert "Runs of the suites one, two." in text
    assert row_of(text, "CartPole-v1", "ppo")[3] == row_of(text, "CartPole-v1", "a2c")[3] == "1 of 2 (1 missing)"


def keyed(run, key):
    """The run directory under a name as the harness gives it."""
    return run.rename(run.with_name("__".join([*run.name.split("__")[:3], ten_digits(key)])))


def ten_digits(key):
    return hashlib.sha256(key.encode()).hexdigest()[:10]


def stored(folder, name):
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_stored_results_are_read_as_they_were_written(tmp_path):
    runs, out, again = tmp_path / "runs", tmp_path / "out", tmp_path / "again"
    for algo in ("ppo", "a2c, learning_rate=0.5"):
        for seed in (1, 2, 3):
            returns = np.random.default_rng(seed).normal(50, 100, 230 + seed)
            keyed(make_run(runs, "Hopper-v4", algo, seed, returns, evaluation=seed / 3), f"{algo[0]}{seed}")
    make_run(runs, "Hopper-v4", "trpo", 1, returns=[1.0] * 130, status="interrupted", total_timesteps=10_000)
    note(runs, [])
    assert main(["report", str(runs), "--out", str(out)]) == 0
    assert main(["report", str(out), "--out", str(again)]) == 0
    for name in ("scores", "curves"):
        assert stored(again, name) == stored(out, name)
    old, new = (json.loads((folder / "provenance.json").read_text()) for folder in (out, again))
    assert old["example"].startswith("python ppo.py") and old == new
    assert old["commit"] == {"0123456789": 7} and old["started by"] == ["python -m benchmarks run it"]
    old, new = ((folder / "report.md").read_text() for folder in (out, again))
    assert row_of(old, "Hopper-v4", "ppo") == row_of(new, "Hopper-v4", "ppo")
    assert row_of(new, "Hopper-v4", "trpo")[3] == "0 of 1 (1 interrupted)"
    assert "\nHere: 7 runs (6 completed, 1 interrupted) of `ppo`" in new
    assert f" in 1 environment; {date.today()}. Stored in {out} already: 7.\n" in new


def test_the_last_point_of_a_curve_is_the_score(tmp_path):
    """Also where whole batches end before or behind the budget."""
    out = tmp_path / "out"
    for seed, episodes in ((1, 997), (2, 1003), (3, 500)):  # of ten steps
        returns = np.random.default_rng(seed).normal(50, 100, episodes)
        status = "completed" if seed < 3 else "interrupted"
        make_run(tmp_path / "runs", seed=seed, returns=returns, status=status, total_timesteps=10_000)
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    last = {point["seed"]: (point["step"], float(point["return_last100"])) for point in stored(out, "curves")}
    scores = [float(run["train_last100"]) for run in stored(out, "scores")]
    assert [step for step, _ in last.values()] == ["9970", "10030", "5000"]
    assert [value for _, value in last.values()] == pytest.approx(scores, rel=1e-4)


def test_a_stored_curve_is_drawn_between_its_points(tmp_path):
    run = make_run(tmp_path / "runs", returns=np.linspace(0, 1000, 1000))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    (here,), (there,) = read_runs([run])[0], read_runs([tmp_path / "out"])[0]
    grid = np.linspace(200, 9_900, 77)
    np.testing.assert_allclose(there.curve(grid), here.curve(grid), atol=2.0)  # rises by 1 an episode
    assert np.isnan(there.curve(np.array([50.0])))
    assert there.curve(np.array([10_000.0])) == pytest.approx(here.returns[-100:].mean(), rel=1e-4)


def test_runs_beside_stored_results(tmp_path):
    """Another algorithm is another column; what is stored of the same one stays apart, unless it is the same runs."""
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    for env_id in ("CartPole-v1", "Acrobot-v1"):
        for algo in ("ppo", "a2c"):
            for seed in (1, 2):
                keyed(make_run(old, env_id, algo, seed, returns=[seed] * 120), f"{env_id[0]}{algo}{seed}")
    assert main(["report", str(old), "--out", str(out)]) == 0
    text = report_of_both(new, out, keyed(make_run(new, algo="mine", seed=1, returns=[7.0] * 120), "m1"))
    assert row_of(text, "CartPole-v1", "mine")[3] == "1" and row_of(text, "CartPole-v1", "ppo")[3] == "2"
    assert (
        "9 runs (9 completed) of `ppo`, `a2c`, `mine` in 2 environments" in text
        and f"Stored in {out} already: 8." in text
    )
    text = report_of_both(new, out, keyed(make_run(new, algo="ppo", seed=1, returns=[7.0] * 120), "p1"))
    assert row_of(text, "CartPole-v1", "ppo")[3:5] == ["1", "7.00"]
    assert row_of(text, "CartPole-v1", "ppo, stored")[3] == row_of(text, "Acrobot-v1", "ppo, stored")[3] == "2"
    assert row_of(text, "CartPole-v1", "a2c")[3] == "2" and "Left out" not in text
    for run in new.iterdir():
        shutil.rmtree(run)
    same = keyed(make_run(new, algo="ppo", seed=1, returns=[1] * 120), "Cppo1")
    text = report_of_both(new, out, same)
    assert row_of(text, "CartPole-v1", "ppo")[3] == "1"
    assert row_of(text, "CartPole-v1", "ppo, stored")[3] == "2" and "9 runs (9 completed)" in text
    for run in old.iterdir():
        if run.is_dir() and run.name != same.name:
            shutil.copytree(run, new / run.name)
    text = report_of_both(new, out)
    assert "stored" not in text and "8 runs (8 completed)" in text and "Left out" not in text


def test_an_equal_key_of_another_algorithm_is_not_the_same_run(tmp_path):
    """As peers have it, which are one script, and an unmodified copy of a script."""
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    for algo in ("ppo", "random"):
        keyed(make_run(old, algo=algo, returns=[1.0] * 120), "same")
    assert main(["report", str(old), "--out", str(out)]) == 0
    fresh = keyed(make_run(new, algo="my_ppo", returns=[7.0] * 120), "same")
    text = report_of_both(new, out, fresh)
    assert [row_of(text, "CartPole-v1", algo)[4] for algo in ("my_ppo", "ppo", "random")] == ["7.00", "1.00", "1.00"]
    shutil.rmtree(fresh)
    keyed(make_run(new, algo="ppo", returns=[1.0] * 120), "same")
    for seed in (2, 3):  # and so the first is now "ppo, learning_rate=0.1"
        keyed(make_run(new, algo="ppo", seed=seed, learning_rate=0.5), f"another{seed}")
    assert "stored`" not in report_of_both(new, out)


def test_only_what_the_harness_names_has_a_key(tmp_path):
    digits = ten_digits("any")
    assert key_of(Path(f"CartPole-v1__my__ppo__1__{digits}")) == digits
    for name in ("CartPole-v1__ppo__1__try2", "CartPole-v1__ppo__1__20260101-120000", f"mine__{digits}", "mine"):
        assert key_of(Path(name)) == ""


def test_stored_results_never_stand_in_and_are_never_mixed(tmp_path):
    old, new, out, other = (tmp_path / name for name in ("old", "new", "out", "other"))
    for seed in (1, 2):
        keyed(make_run(old, seed=seed, returns=[1.0] * 120), f"k{seed}")
    assert main(["report", str(old), "--out", str(out)]) == 0
    keyed(make_run(new, algo="mine", seed=1), "m1")
    cells = [
        dict(env_id="CartPole-v1", algo="ppo", seed=n, name=f"CartPole-v1__ppo__{n}__{ten_digits(f'n{n}')}")
        for n in (1, 2)
    ]
    note(new, cells)  # asked for, and never started
    text = report_of_both(new, out)
    assert row_of(text, "CartPole-v1", "ppo")[3:5] == ["0 of 2 (2 missing)", "-"]
    assert row_of(text, "CartPole-v1", "ppo, stored")[3] == "2"
    note(new, [cell | dict(name=f"CartPole-v1__ppo__{n}__{ten_digits(f'k{n}')}") for n, cell in enumerate(cells, 1)])
    keyed(make_run(new, seed=1, returns=[5.0] * 120, status=""), "k1")  # the same again, and not at its end yet
    text = report_of_both(new, out)
    assert row_of(text, "CartPole-v1", "ppo")[3] == "0 of 2 (1 unfinished, 1 missing)"
    assert row_of(text, "CartPole-v1", "ppo, stored")[3] == "2"
    shutil.rmtree(new)
    keyed(make_run(new, seed=1, returns=[9.0] * 120), "another")
    assert main(["report", str(new), str(out), "--out", str(other)]) == 0  # has ppo, and ppo, stored
    shutil.rmtree(new)
    keyed(make_run(new, seed=1, returns=[7.0] * 120), "a third")
    text = report_of_both(new, other)
    means = {", stored" * n: row_of(text, "CartPole-v1", "ppo" + ", stored" * n)[3:5] for n in range(3)}
    assert [*means.values()] == [["1", "7.00"], ["1", "9.00"], ["2", "1.00 [1.00, 1.00]"]]
    assert main(["report", str(out), str(other), "--out", str(tmp_path / "two")]) == 0
    text = (tmp_path / "two" / "report.md").read_text()
    assert row_of(text, "CartPole-v1", "ppo")[3] == "2" and row_of(text, "CartPole-v1", "ppo, stored")[3:5] == [
        "1",
        "9.00",
    ]


def test_a_stored_report_written_over_keeps_what_it_says(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_run(runs, "Hopper-v4", total_timesteps=1_000_000)
    note(runs, [], published=["cleanrl_ppo_continuous", "tianshou_mujoco"], name="mine", normalise=False)
    assert main(["report", str(runs), "--out", str(out)]) == 0
    before = [(out / name).read_text() for name in ("report.md", "provenance.json", "scores.csv", "curves.csv")]
    assert main(["report", str(out), "--out", str(out)]) == 0
    after = [(out / name).read_text() for name in ("report.md", "provenance.json", "scores.csv", "curves.csv")]
    assert after[0].replace(f" Stored in {out} already: 1.", "") == before[0] and after[1:] == before[1:]
    assert "| tianshou MuJoCo benchmark |" in after[0] and "# mine" in after[0] and "## Over" not in after[0]


def test_runs_by_hand_have_no_key_and_stand_in_for_what_is_missing(tmp_path):
    run = make_run(tmp_path, seed=1).rename(tmp_path / "CartPole-v1__ppo__1__20260101-120000")
    note(tmp_path, [dict(env_id="CartPole-v1", algo="ppo", seed=1, name="CartPole-v1__ppo__1__0123456789")])
    (read,), problems, missing = read_runs([tmp_path])
    assert read.path == run and read.key == "" and not problems and not missing


def test_runs_of_any_name_are_read(tmp_path):
    make_run(tmp_path, seed=1).rename(tmp_path / "mine")
    note(tmp_path, [dict(env_id="CartPole-v1", algo="ppo", seed=2, name="another")])
    runs, problems, missing = read_runs([tmp_path])
    assert [run.path.name for run in runs] == ["mine"] and not problems and missing == {("CartPole-v1", "ppo"): [2]}


def test_a_run_that_a_path_names_is_read(tmp_path):
    old = keyed(make_run(tmp_path, seed=1), "old")
    note(tmp_path, [dict(env_id="CartPole-v1", algo="ppo", seed=1, name="CartPole-v1__ppo__1__new")])
    assert [run.path for run in read_runs([old])[0]] == [old] and not read_runs([tmp_path])[0]


@pytest.mark.parametrize("cells", [None, ["x"], [None], {"a": 1}, [{}], [dict(env_id=1, algo="ppo", seed=1, name="x")]])
def test_damaged_notes_are_left_out(tmp_path, cells):
    make_run(tmp_path, seed=1)
    note(tmp_path, cells, commands=None, published=None)
    assert row_of(report_of(tmp_path), "CartPole-v1", "ppo")[3] == "1"


def report_of_both(new, out, *_):
    assert main(["report", str(new), str(out), "--out", str(new.parent / "both")]) == 0
    return (new.parent / "both" / "report.md").read_text()


@pytest.mark.parametrize(
    "name, line, says",
    [
        ("scores", "CartPole-v1,ppo,1,completed,1000,1000,high,,,,,,", "scores.csv, line 2: train_last100 is 'high'"),
        ("scores", "CartPole-v1,ppo,one", "scores.csv, line 2: seed is 'one'"),
        ("curves", "CartPole-v1,ppo,1,10,x", "curves.csv, line 2 is no point of a curve"),
        ("curves", None, "curves.csv, which belongs to"),
    ],
)
def test_damaged_stored_results_are_one_sentence(tmp_path, capsys, name, line, says):
    make_run(tmp_path / "runs")
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    file = tmp_path / "out" / f"{name}.csv"
    if line:
        file.write_text(file.read_text().splitlines()[0] + f"\n{line}\n")
    else:
        file.unlink()
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "again").exists()


def test_a_difference_is_taken_only_from_the_same_measure_after_the_same_steps(tmp_path):
    returns = [4000.0] * 100
    make_run(tmp_path, "HalfCheetah-v4", "ppo", 1, returns, evaluation=5000.0, total_timesteps=1_000_000)
    make_run(tmp_path, "HalfCheetah-v4", "trpo", 1, returns, evaluation=5000.0, total_timesteps=1_000_000)
    note(tmp_path, [], published=["cleanrl_ppo_continuous", "sb3_contrib_trpo", "tianshou_mujoco"])
    rows = [line.strip("| ").split(" | ") for line in report_of(tmp_path).splitlines() if "| HalfCheetah-v4 " in line]
    rows = [row for row in rows if "**" in row[3]]
    differences = {(row[0], row[5]): row[4] for row in rows}
    assert differences["HalfCheetah-v4 ppo", "train_last100"] == "+2,557"  # 4,000 - 1,442.64
    assert differences["HalfCheetah-v4 trpo", "final_eval"] == "-"  # of -v3
    assert differences["HalfCheetah-v4 ppo", "max_over_training"] == "-"
    assert {row[6] for row in rows} == {"1,000,000"}


def test_a_mean_of_logged_means_is_another_measure(tmp_path):
    make_run(tmp_path, "Pendulum-v1", "ppo", 1, [-150.0] * 100, total_timesteps=300_000)
    note(tmp_path, [], published=["slm_lab"])
    rows = [line.strip("| ").split(" | ") for line in report_of(tmp_path).splitlines() if "| Pendulum-v1 ppo" in line]
    (row,) = [row for row in rows if row[5:7] == ["train_last100_logged", "300,000"]]
    assert row[4] == "-"


def test_published_numbers_stand_beside_ours_with_their_protocol(tmp_path):
    make_run(tmp_path, seed=1)
    row = row_of(report_of(tmp_path), "CartPole-v1 ppo")
    assert row[3] == "**490.0** ± 6.12 (std over seeds)" and row[5] == "train_last100" and row[6] == "500,000"
    assert row[4] == "-"
    note(tmp_path, [], published=["slm_lab"])
    text = report_of(tmp_path)
    assert row_of(text, "CartPole-v1 ppo")[3:6:2] == ["**498.9**", "train_last100_logged"]
    assert "490.0" not in text and "- SLM-Lab v5 benchmark (2026): total_reward_ma" in text


def test_table_1_is_scaled_as_in_the_paper(tmp_path):
    low = report.score_range("Hopper-v4")[0]
    for setting, returns in (("clipping, eps=0.2", [low + 100, low + 50]), ("fixed KL, beta=1", [low + 20, low])):
        for seed, value in enumerate(returns):
            make_run(tmp_path, "Hopper-v4", setting, seed, returns=[value] * 100)
    text = report_of(tmp_path)
    assert row_of(text, "clipping, eps=0.2", "0.75", "2", "0.82") and row_of(
        text, "fixed KL, beta=1", "0.10", "2", "0.71"
    )
    paper = {row["setting"] for row in report.read_reference("ppo_paper_table1")}
    assert set(read_suite("ppo-table1").algos) == paper


def test_sticky_and_other_games_are_not_put_beside_each_other(tmp_path):
    for env_id in ("ALE/Pong-v5", "PongNoFrameskip-v4"):
        make_run(tmp_path, env_id, total_timesteps=10_000_000)
    note(tmp_path, [], published=["slm_lab", "cleanrl_ppo_atari"])
    lines = [
        line.strip("| ").split(" | ") for line in report_of(tmp_path).splitlines() if "Pong" in line and "**" in line
    ]
    versions = {(line[0].split()[0], line[8]) for line in lines}
    assert versions == {("ALE/Pong-v5", "ALE/Pong-v5"), ("PongNoFrameskip-v4", "PongNoFrameskip-v4")}


def test_atari_is_normalised_by_a_human_player(tmp_path):
    low, high, _ = report.score_range("ALE/Pong-v5")
    assert (low, high) == report.score_range("PongNoFrameskip-v4")[:2] == (-20.7, 14.6)
    for seed in (1, 2):
        make_run(tmp_path, "ALE/Pong-v5", seed=seed, returns=[14.6 if seed == 1 else -20.7] * 120)
    text = report_of(tmp_path)
    assert row_of(text, "ALE/Pong-v5", "50%") and row_of(text, "ppo", "0.50 [0.00, 1.00]")


def test_aggregates_are_over_environments_that_all_have(tmp_path):
    for algo, bonus in (("ppo", 100), ("a2c", 0)):
        for env_id in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1"):
            for seed in (1, 2, 3):
                if (algo, env_id) != ("a2c", "Pendulum-v1"):
                    make_run(tmp_path, env_id, algo, seed, returns=[bonus + seed] * 100)
    make_run(tmp_path, "CartPole-v1", "trpo", 1, returns=[5.0] * 100)
    text = report_of(tmp_path)
    assert "## Over 2 environments" in text
    assert "Pendulum-v1 is in no aggregate, because not all have it." in text
    assert "trpo has 1 of 3 environments and is in no aggregate." in text
    assert row_of(text, "ppo", "", "1.00 [1.00, 1.00]")
    runs, *_ = read_runs([tmp_path])
    by_algo, envs, _ = report.normalised(report.cells_of(runs), "train_last100")
    low, high, _ = report.score_range("CartPole-v1")
    assert envs == ["Acrobot-v1", "CartPole-v1"]
    np.testing.assert_allclose(by_algo["a2c"][1], (np.array([1, 2, 3]) - low) / (high - low))
    assert f"{stats.aggregate_iqm(by_algo['ppo']):.2f} [" in row_of(text, "ppo")[2]


def test_an_algorithm_for_half_of_the_environments_does_not_take_the_others_from_the_rest(tmp_path):
    for algo, env_id in (
        ("ppo", "CartPole-v1"),
        ("ppo", "Pendulum-v1"),
        ("a2c", "CartPole-v1"),
        ("sac", "Pendulum-v1"),
    ):
        make_run(tmp_path, env_id, algo, returns=[50.0] * 100)
    cells = report.cells_of(read_runs([tmp_path])[0])
    by_algo, envs, notes = report.normalised(cells, "train_last100")
    assert [*by_algo] == ["ppo"] and envs == ["CartPole-v1", "Pendulum-v1"]
    assert "sac has 1 of 2 environments and is in no aggregate." in notes
    del cells["Pendulum-v1", "ppo"]  # nobody has both
    by_algo, envs, notes = report.normalised(cells, "train_last100")
    assert {*by_algo} == {"ppo", "a2c", "sac"} and not envs


def test_another_budget_is_in_no_aggregate_and_that_is_said(tmp_path):
    for env_id in ("CartPole-v1", "Acrobot-v1"):
        for algo in ("ppo", "a2c", "trpo"):
            for seed in (1, 2):
                make_run(tmp_path, env_id, algo, seed, returns=[50.0] * (110 if algo == "trpo" else 100))
    text = report_of(tmp_path)
    assert "trpo has 1,100 steps of CartPole-v1, not 1,000, and does not count there." in text
    by_algo, envs, _ = report.normalised(report.cells_of(read_runs([tmp_path])[0]), "train_last100")
    assert [*by_algo] == ["ppo", "a2c"] and len(envs) == 2


def test_of_two_budgets_that_of_more_runs_counts(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, seed=seed, returns=[50.0] * 100)
    make_run(tmp_path, algo="long", returns=[50.0] * 300)
    make_run(tmp_path, algo="stopped", returns=[50.0] * 300, status="interrupted")
    by_algo, *_ = report.normalised(report.cells_of(read_runs([tmp_path])[0]), "train_last100")
    assert [*by_algo] == ["ppo"]


def test_who_has_no_score_is_said_to_be_in_no_aggregate(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, algo="ppo", seed=seed)
        make_run(tmp_path, algo="a2c", seed=seed, status="diverged")
    assert "a2c has no score that counts in any of these environments and is in no aggregate." in report_of(tmp_path)


def test_the_scale_does_not_depend_on_who_else_is_there(tmp_path):
    """Adding an algorithm must not change the others' normalised scores."""
    make_run(tmp_path, algo="ppo", seed=1)
    alone = row_of(report_of(tmp_path), "ppo")
    make_run(tmp_path, algo="a2c", seed=1, returns=[500.0] * 100)
    assert row_of(report_of(tmp_path), "ppo") == alone


EVIL = """<script>alert(1)</script> <img src=x onerror=alert(2)> [here](javascript:alert(3)) ![p](../../secret.png) \
`</code><b>` **bold** | pipe _x_ &lt;b&gt; "quoted" 'too' <!-- [a]: http://b -->"""


TAGS = {*("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "em", "strong", "code", "pre", "ul", "li")}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td", "img"}


def tags_of(page):
    """The tags of a page with their attributes, and its text."""
    tags, texts = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

        def handle_data(self, data):
            texts.append(data)

    Parser(convert_charrefs=True).feed(page)
    return tags, "".join(texts)


def test_text_from_outside_is_text(tmp_path, capsys):
    """In title, description, commands, names, environments, values of arguments and messages of errors."""
    for seed in (1, 2):
        make_run(tmp_path, env_id="CartPole-v1", seed=seed)
        make_run(tmp_path, env_id="Acrobot-v1", seed=seed)
    evil = make_run(tmp_path, env_id="Evil-v0", algo="a")
    set_argument(evil, env_id=EVIL, exp_name=EVIL + "\x1b[2J\ud800")
    set_argument(make_run(tmp_path, seed=3, more=EVIL), more=EVIL)
    bad = make_run(tmp_path, seed=4, status="failed")
    set_summary(bad, error=EVIL + "\n# heading\n\n<script>alert(4)</script>")
    set_config(bad, hardware=EVIL, git_commit=EVIL, versions={EVIL: EVIL}, threads=EVIL)
    set_summary(make_run(tmp_path, seed=5, status="failed"), status=EVIL)
    cells = [dict(env_id=EVIL, algo=EVIL, seed=9, name="x")]
    note(tmp_path, cells, name="```\n</pre>" + EVIL, description=EVIL, commands=[EVIL, "``" + EVIL], published=[EVIL])
    text = report_of(tmp_path, "--title", "<script>" + EVIL)
    for page in (
        (tmp_path / "report" / "report.html").read_text(),
        markdown.markdown(text, extensions=["tables", "fenced_code"]),
    ):
        tags, words = tags_of(page)
        assert {tag for tag, _ in tags} <= TAGS
        for tag, attributes in tags:
            assert set(attributes) <= {"lang", "charset", "name", "content", "style", "class", "alt", "src"}, attributes
            assert tag != "img" or attributes["src"].startswith("data:image/png") or "/" not in attributes["src"]
        for literally in ("<script>alert(1)</script>", "[here](javascript:alert(3))", "**bold**", "_x_", "&lt;b&gt;"):
            assert words.count(literally) >= 8, literally
    assert not set("\x1b\ud800") & set(text + capsys.readouterr().out)
    assert row_of(text, *[report.literal(printable(EVIL)).replace("|", "\\|")] * 2)  # its cells are two cells
    stored = tmp_path / "report"
    assert main(["report", str(stored), "--out", str(tmp_path / "again")]) == 0
    assert {tag for tag, _ in tags_of((tmp_path / "again" / "report.html").read_text())[0]} <= TAGS


def test_no_table_says_nan(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / "runs", seed=seed, evaluation=math.nan)
        set_summary(make_run(tmp_path / "runs", env_id="Acrobot-v1", seed=seed, returns=[-500.0] * 100), sps=math.nan)
    make_run(tmp_path / "runs", env_id="Pendulum-v1", returns=[math.nan] * 200)
    make_run(tmp_path / "runs", env_id="MountainCar-v0", evaluation=7.0)
    make_run(tmp_path / "runs", env_id="MountainCar-v0", seed=2)
    empty = make_run(tmp_path / "runs", env_id="Taxi-v3")
    (empty / "episodes.csv").write_text("global_step,wall_time,return,length\n")
    set_summary(empty, train_last100=None, sps=None, wall_time=None)
    text = report_of(tmp_path / "runs")
    for file in (tmp_path / "runs" / "report").glob("*.*"):
        if file.suffix in (".md", ".html", ".csv"):
            assert not re.search(r"\bnan\b", re.sub('base64,[^"]*', "", file.read_text()), re.IGNORECASE), file
    row = row_of(text, "CartPole-v1", "ppo")
    assert row[6:8] == ["not evaluated"] * 2 and row[8] == "20 (20 to 20)"
    assert row_of(text, "Acrobot-v1", "ppo")[8] == "-"
    assert row_of(text, "Pendulum-v1", "ppo")[4:6] == ["no episode"] * 2
    assert row_of(text, "MountainCar-v0", "ppo")[6:8] == ["1 of 2 not evaluated", "not evaluated"]
    assert row_of(text, "Taxi-v3", "ppo")[4] == "no episode"
    assert main(["check", str(tmp_path / "runs"), "--against", str(tmp_path / "runs" / "report")]) in (0, 1)
    assert not re.search(r"\bnan\b", capsys.readouterr().out)


def test_a_run_that_is_being_trained_is_named_and_in_no_score(tmp_path, capsys):
    make_run(tmp_path, seed=1)
    busy = make_run(tmp_path, seed=2, status="interrupted")
    over = make_run(tmp_path, seed=3)
    holder = "import fcntl, sys; files = [open(path, 'a') for path in sys.argv[1:]]\n"
    holder += "[fcntl.lockf(file, fcntl.LOCK_EX) for file in files]; print('ready', flush=True); input()"
    command = [sys.executable, "-c", holder, busy / "lock", over / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        text = report_of(tmp_path)
        process.communicate(b"\n")
    said = f"{busy} is being trained at this moment; it is in no score."
    assert said in capsys.readouterr().out and "2 completed, 1 running" in text
    assert "2 completed, 1 interrupted" in report_of(tmp_path)


def test_long_files_are_read_fast(tmp_path):
    run = make_run(tmp_path)
    rows = 300_000
    (run / "episodes.csv").write_text(
        "global_step,wall_time,return,length\n" + "".join(f"{n},{n / 9:.3f},1.5,7\n" for n in range(rows))
    )
    (run / "progress.csv").write_text(
        "global_step,wall_time,sps\n" + "".join(f"{n},{n / 9:.3f},{n}\n" for n in range(1, rows))
    )
    set_summary(run, train_last100=1.5, global_step=rows)
    set_argument(run, total_timesteps=rows, num_envs=1)
    begun = time.process_time()
    found, problem = read_run(run)
    assert time.process_time() - begun < 2 and not problem
    assert len(found.steps) == rows and found.scores["train_last100"] == 1.5


@pytest.mark.parametrize(
    "line, says",
    [
        ("CartPole-v1,ppo,1,completed,1000,1000,inf,,,,,,", "line 2: train_last100 is 'inf'"),
        (f"CartPole-v1,ppo,{2**40},completed,1000,1000,1,,,,,,", "line 2: seed is '1099511627776'"),
        (f"CartPole-v1,ppo,1,completed,{10**30},1000,1,,,,,,", "line 2: total_timesteps is '10000"),
        (
            "CartPole-v1,ppo,1,completed,9,9,1,,,,,,\nCartPole-v1,ppo,1,completed,9,9,1,,,,,,",
            "line 3: CartPole-v1 ppo seed 1 is there twice",
        ),
        (f"CartPole-v1,{'x' * 200_000},1,completed,9,9,1,,,,,,", "scores.csv cannot be read (field larger than"),
    ],
)
def test_scores_that_cannot_be_are_one_sentence(tmp_path, capsys, line, says):
    make_run(tmp_path / "runs")
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "scores.csv"
    file.write_text(file.read_text().splitlines()[0] + f"\n{line}\n")
    for words in (
        ["report", str(tmp_path / "out"), "--out", str(tmp_path / "again")],
        ["check", str(tmp_path / "runs"), "--against", str(tmp_path / "out")],
    ):
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "again").exists()


def test_wrong_numbers_and_names_are_one_sentence_and_make_nothing(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for words in (
        ["--seed", "-1"],
        ["--seed", str(2**40)],
        ["--out", f"new/{'x' * 300}"],
        ["--out", "runs/suite.txt/x"],
    ):
        (tmp_path / "runs" / "suite.txt").touch()
        assert main(["report", "runs", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert main(["report", "x" * 300]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_the_page_needs_nothing_but_itself_and_no_path_of_this_machine_is_written(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, seed=seed)
    report_of(tmp_path)
    out = tmp_path / "report"
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == 4
    assert not re.search(r'src="(?!data:)|https?://(?!arxiv)', page)
    assert "<table>" in page
    for name in ("report.md", "provenance.json", "scores.csv"):
        assert "/home/somebody" not in (out / name).read_text()
    assert "python ppo.py --env-id CartPole-v1" in (out / "provenance.json").read_text()


def test_an_algorithm_has_the_same_colour_whatever_stands_beside_it():
    mine = ["my_ppo", "another", "ppo"]
    ppo = figures.style_of("ppo", mine)
    assert ppo == figures.style_of("ppo", ["ppo"]) and ppo["color"] == figures.COLORS["ppo"]
    many = [*figures.COLORS, *(f"variant {n}" for n in range(20))]
    styles = [tuple(figures.style_of(name, many).values()) for name in many]
    assert len({*styles}) == len(many)


LEGENDS = [["a", "bb", "ccc", "dddd"], ["ppo, learning_rate=0.0001, num_envs=16"] * 3, [*"abcdefg"]]


@pytest.mark.parametrize("algos", LEGENDS)
@pytest.mark.parametrize("envs", [1, 2, 3])
def test_legends_stay_inside_the_figure(algos, envs):
    figure, _ = figures.new_figure(1, envs, 4.0, 2.9)
    algos = [f"{algo}$_{n}" for n, algo in enumerate(algos)]
    cells = {("CartPole-v1", algo): [] for algo in algos}
    figures.add_legend(figure, cells, algos)
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y0 >= 0
    figures.plt.close(figure)


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    make_run(tmp_path / "runs")
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "file")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'file'} cannot be written (File exists); choose another --out.\n"
    )
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "trials.csv").touch()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "sweep")]) == 2
    assert "is the report of a sweep; choose another --out." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["."]])
def test_wrong_folders_are_one_sentence(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_readable_is_exit_status_1(tmp_path, capsys):
    (make_run(tmp_path) / "config.json").unlink()
    assert main(["report", str(tmp_path)]) == 1
    assert "none of these run directories can be read" in capsys.readouterr().err


def test_run_directories_are_found_at_three_depths(tmp_path):
    one = make_run(tmp_path / "a" / "b")
    for depth in (one, tmp_path / "a" / "b", tmp_path / "a"):
        assert find_runs([depth]) == [one]
    with pytest.raises(UsageError, match="no run directory"):
        find_runs([tmp_path])


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "markdown", None)
    assert main(["report", str(make_run(tmp_path))]) == 2
    assert 'pip install -c constraints.txt -e ".[bench]"' in capsys.readouterr().err


def test_every_published_source_of_a_suite_exists_and_every_scale_is_one():
    from benchmarks.suite import SUITES

    known = {row["source_key"] for row in report.read_reference("sources")}
    for file in SUITES.glob("*.toml"):
        suite = read_suite(file.stem)
        assert set(suite.published) <= known
        for env_id in suite.envs:
            low, high, source = report.score_range(env_id)
            assert low < high and source
