"""The figure of sac.py's runs: what it reads from run directories, what it keeps of earlier runs, and the command."""

import csv
import json

import numpy as np
import pytest

import sac
from benchmarks import sac_figure

EVALUATED = ((0, 10.0), (20_000, 30.0))


def make_run(folder, algo="sac", seed=1, env_id="Hopper-v4", bf16="off", policy_lr=1e-3, evaluated=EVALUATED):
    """A run directory of 400 episodes of 100 steps: episode i ends at step 100 (i + 1), pays i, and takes a second."""
    folder.mkdir(parents=True)
    args = {"exp_name": algo, "env_id": env_id, "seed": seed}
    args |= {"bf16": bf16, "policy_lr": policy_lr} if algo == "sac" else {}
    (folder / "config.json").write_text(json.dumps({"args": args}))
    with open(folder / "episodes.csv", "w", newline="") as file:
        csv.writer(file).writerows([["global_step", "return", "wall_time"]])
        csv.writer(file).writerows([100 * (i + 1), i, i + 1] for i in range(400))
    if evaluated:
        with open(folder / "evaluations.csv", "w", newline="") as file:
            csv.writer(file).writerows([["step", "mean"], *evaluated])
    return folder


def chosen(points, **values):
    return [p for p in points if all(p[name] == value for name, value in values.items())]


def test_training_returns_are_means_of_the_last_20_episodes_and_evaluations_have_the_time_of_their_step(tmp_path):
    points = sac_figure.read_run(make_run(tmp_path / "run"))
    trained = chosen(points, kind="train")
    assert [p["step"] for p in trained] == [10_000, 20_000, 30_000, 40_000]
    for point in trained:
        newest = point["step"] // 100 - 1  # the episode that ends at this very step counts
        assert point["return"] == pytest.approx(np.mean(range(newest - 19, newest + 1)))
        assert point["wall_time"] == newest + 1
    evaluated = [(p["step"], p["return"], p["wall_time"]) for p in chosen(points, kind="eval")]
    assert evaluated == [(0, 10.0, 0.0), (20_000, 30.0, 200.0)]
    assert {(p["env_id"], p["algo"], p["seed"]) for p in points} == {("Hopper-v4", "sac", 1)}


@pytest.mark.parametrize("bf16, policy_lr, algo", [("on", 1e-3, "sac bf16"), ("off", 3e-4, "sac 3e-4")])
def test_other_settings_are_told_from_the_default(bf16, policy_lr, algo, tmp_path):
    run = make_run(tmp_path / "run", bf16=bf16, policy_lr=policy_lr)
    assert sac_figure.read_run(run)[0]["algo"] == algo and algo in sac_figure.VARIANTS


def test_the_default_is_that_of_the_script():
    assert sac.parse_args(["--env-id", "Hopper-v4"]).policy_lr == sac_figure.STEP_SIZE


def test_evaluations_of_another_number_of_episodes_are_another_curve(tmp_path):
    run = make_run(tmp_path / "run", evaluated=())
    with open(run / "evaluations.csv", "w", newline="") as file:
        rows = [(0, 10.0, 10), (20_000, 30.0, 10), (20_000, 50.0, 100)]
        csv.writer(file).writerows([["step", "mean", "episodes"], *rows])
    points = chosen(sac_figure.read_run(run), kind="eval")
    assert [(p["step"], p["return"]) for p in points] == [(0, 10.0), (20_000, 30.0)]


def test_two_runs_of_one_seed_are_refused(tmp_path, capsys):
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "again")
    with pytest.raises(SystemExit):
        sac_figure.main([str(tmp_path / "runs"), "--out", str(tmp_path / "sac")])
    assert "more than one run of ('Hopper-v4', 'sac', 1)" in capsys.readouterr().err and not list(
        tmp_path.glob("*.png")
    )


def test_a_run_without_a_finished_episode_has_no_training_curve(tmp_path):
    run = make_run(tmp_path / "run", evaluated=())
    (run / "episodes.csv").write_text("global_step,return,wall_time\n")
    assert sac_figure.read_run(run) == []


def test_a_run_made_again_replaces_its_stored_points_and_others_stay():
    def point(algo, seed, value):
        return {"env_id": "Hopper-v4", "algo": algo, "seed": seed, "return": value}

    stored = [point("sac", 1, 1.0), point("sac", 2, 2.0), point("sac bf16", 1, 3.0)]
    joined = sac_figure.join(stored, [point("sac", 1, 7.0)])
    assert {(p["algo"], p["seed"], p["return"]) for p in joined} == {
        ("sac", 1, 7.0),
        ("sac", 2, 2.0),
        ("sac bf16", 1, 3.0),
    }
    assert len(joined) == 3


def test_the_command_draws_and_joins_what_was_stored(tmp_path, capsys, monkeypatch):
    figures = []
    save = sac_figure.save_figure
    monkeypatch.setattr(sac_figure, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    make_run(tmp_path / "first" / "a")
    make_run(tmp_path / "first" / "b", algo="ppo", env_id="HalfCheetah-v4", evaluated=())
    make_run(tmp_path / "first" / "d", policy_lr=3e-4, bf16="on")
    make_run(tmp_path / "second" / "c", seed=2, evaluated=((0, 20.0), (20_000, 70.0)))
    out = tmp_path / "new" / "sac"
    for runs in ("first", "second", "second"):  # the last changes nothing
        sac_figure.main([str(tmp_path / runs), "--out", str(out)])
    assert (tmp_path / "new" / "sac.png").read_bytes().startswith(b"\x89PNG")
    points = sac_figure.read_points(tmp_path / "new" / "sac.csv")
    assert len(points) == 3 * (4 + 2) + 4
    assert chosen(points, algo="ppo", step=10_000)[0]["return"] == pytest.approx(np.mean(range(80, 100)))
    assert "Hopper-v4       default           20,000       50  (30, 70)" in capsys.readouterr().out

    panels = figures[-1].axes
    published = "published (tianshou, -v3, 10 seeds)"
    names = [[line.get_label() for line in axis.lines if line.get_label()[0] != "_"] for axis in panels]
    assert names == [
        [published],
        ["sac.py, 2 seeds", published],
        [published],
        ["PPO, 1 seed"],
        ["PPO, 1 seed"],
        ["default, 2 seeds", "3e-4, bfloat16, 1 seed"],
    ]
    (mean,) = (line for line in panels[1].lines if line.get_label() == "sac.py, 2 seeds")
    assert mean.get_xydata().tolist() == [[0, 15], [20_000, 50]]


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sac_figure.main([str(tmp_path)])
    assert "holds no run directories" in capsys.readouterr().err
