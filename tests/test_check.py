"""check: what counts as a drop, that a random policy is one and fresh seeds are none, and what is said of the rest."""

import csv
import json
import os
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from scipy import stats as oracle

from benchmarks import __main__, check
from benchmarks.jobs import Job, UsageError
from benchmarks.records import read_runs
from benchmarks.report import score_range, write_scores
from benchmarks.stats import difference

RESULTS = Path(check.__file__).parent / "results"
HEADER = "env_id algo seed status total_timesteps global_step train_last100 train_auc eval_deterministic"
HEADER += " eval_stochastic sps wall_time key"


def make_run(runs, env_id, algo, seed, score, status="completed", steps=1000, key="0123456789", episodes=100):
    """A run directory with this train_last100."""
    path = Path(runs) / f"{env_id.replace('/', '-')}__{algo.replace(':', '-')}__{seed}__{key}"
    path.mkdir(parents=True)
    args = dict(env_id=env_id, exp_name=algo, seed=seed, total_timesteps=steps)
    (path / "config.json").write_text(json.dumps(dict(args=args)))
    with open(path / "episodes.csv", "w", newline="") as file:
        rows = [(10 * (n + 1), n, score + (-1) ** n, 10) for n in range(episodes)]
        csv.writer(file).writerows([["global_step", "wall_time", "return", "length"], *rows])
    if status:
        (path / "summary.json").write_text(json.dumps(dict(status=status, global_step=steps)))
    return path


def make_cell(runs, env_id, algo, scores, **more):
    return [make_run(runs, env_id, algo, seed, score, **more) for seed, score in enumerate(scores, 1)]


def store(runs, out):
    """Writes scores.csv as the report does."""
    Path(out).mkdir(exist_ok=True)
    write_scores(read_runs([Path(runs)])[0], Path(out) / "scores.csv")


@pytest.fixture
def verdicts(tmp_path, capsys):
    """verdicts(*flags) compares tmp_path/new with tmp_path/old: (status, {"env algo": verdict}, all that was said)."""

    def run(*flags):
        if (tmp_path / "old").is_dir():
            store(tmp_path / "old", tmp_path)
        status = __main__.main(["check", str(tmp_path / "new"), "--against", str(tmp_path), *flags])
        captured = capsys.readouterr()
        rows = [re.split(r"  +", line) for line in captured.out.split("\n\n")[0].splitlines()[1:]]
        return status, {f"{row[0]} {row[1]}": row[-1] for row in rows}, captured.out + captured.err

    return run


# --------------------------------------------------------------------------------------------------- statistics
def test_interval_is_stretched_by_students_quantile_and_for_the_spread_that_resampling_loses():
    old, new = np.array([1.0, 2, 3, 4, 5]), np.array([3.0, 5, 6, 8])
    ends = difference(old, new, np.random.default_rng(0), repetitions=check.REPETITIONS, confidence=0.95)
    lost = np.sqrt((2.5 / 5 + 13 / 3 / 4) / (2.0 / 5 + 3.25 / 4))  # unbiased variances over those of resampling
    factor = 2.364624 / 1.959964 * lost  # the 97.5% quantiles, of t with 7 degrees of freedom and of the normal
    expected = [2.5 + (end - 2.5) * factor for end in ends]
    assert check.interval(old, new, 0.95, seed=0) == pytest.approx(expected, rel=1e-6)


def test_interval_of_many_seeds_is_that_of_welch():
    rng = np.random.default_rng(0)
    old, new = rng.normal(0, 1, 400), rng.normal(0.3, 2, 300)
    welch = oracle.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    low, high = check.interval(old, new, 0.95, seed=1)
    assert (low, high) == (pytest.approx(welch.low, abs=0.01), pytest.approx(welch.high, abs=0.01))
    assert check.interval(old, new, 0.95, seed=1) == (low, high)


def test_interval_of_few_seeds_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(check, "REPETITIONS", 2000)
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        low, high = check.interval(rng.normal(size=4), rng.normal(size=4), 0.95, seed=0)
        held += low <= 0 <= high
    assert 0.92 < held / 400 <= 0.99  # 0.82 without the stretching


def test_interval_of_equal_scores_has_no_width_and_of_one_seed_is_unknown():
    assert check.interval(np.full(5, 500.0), np.full(3, 490.0), 0.95, 0) == (-10, -10)
    assert np.isnan(check.interval(np.ones(5), np.ones(1), 0.95, 0)).all()


def drop(old, new, random=np.nan, tolerance=0.05):
    old, new = np.array(old, float), np.array(new, float)
    return check.is_drop(old, new, random, check.interval(old, new, 0.95, 0)[1], tolerance)


def test_drop_needs_the_interval_and_the_tolerance():
    assert drop([500] * 5, [450] * 5, random=20)
    assert not drop([500] * 5, [490] * 5, random=20)  # 2% of the way from random
    assert drop([500] * 5, [490] * 5, random=20, tolerance=0.01)
    assert not drop([500] * 5, [500, 500, 500, 500, 200], random=20)  # one seed of five says little
    assert not drop([500] * 5, [500] * 5, random=20, tolerance=0)
    assert not drop([400, 410, 390], [900, 910, 890], random=20)


def test_tolerance_is_a_part_of_the_way_from_random_and_not_of_the_score():
    assert drop([-100] * 5, [-109] * 5, random=-200, tolerance=0.05)
    assert not drop([-100] * 5, [-109] * 5, random=-500, tolerance=0.05)
    assert not drop([1000] * 5, [951] * 5, tolerance=0.05)  # of the score, where random is not known
    assert drop([1000] * 5, [949] * 5, tolerance=0.05)
    many = [-10, 10] * 1000  # of the spread, where the mean is near 0
    assert drop(many, [-1.1] * 1000, tolerance=0.05) and not drop(many, [-0.9] * 1000, tolerance=0.05)


def test_back_at_the_random_policy_is_a_drop_whatever_the_interval_says():
    old = [1000, 1030, 2100]  # a wide interval; the deviation is half of the mean
    assert check.interval(np.array(old), np.array([-280.0, -290, -270]), 1 - 0.05 / 12, 0)[1] > -1500
    assert check.is_drop(np.array(old), np.array([-280.0]), -280, np.nan, 0.05)  # even for one seed
    assert not check.is_drop(np.array([-280.0, 90, 95]), np.array([-280.0]), -280, np.nan, 0.05)  # a seed was there


# ------------------------------------------------------------------------------------- the same code, random policy
def simulated_cells(rng, seeds):
    """Scores of `seeds` runs in twelve cells: sure, heavy-tailed, at a ceiling, all or nothing."""
    cells = []
    for n in range(12):
        scores = 1 + (0.05, 0.15, 0.3)[n % 3] * rng.standard_normal(seeds)
        scores = [scores, np.minimum(scores, 1), np.where(rng.random(seeds) < 0.7, scores, 0.3), scores][n // 3]
        cells.append(100 * scores)
    return cells


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_fresh_seeds_of_the_same_code_pass_and_a_random_policy_does_not(seeds, monkeypatch):
    monkeypatch.setattr(check, "REPETITIONS", 4000)
    rng, alarms, confidence = np.random.default_rng(seeds), 0, 1 - 0.05 / 12
    for _ in range(20):
        cells = list(zip(simulated_cells(rng, seeds), simulated_cells(rng, seeds)))
        alarms += any(
            check.is_drop(old, new, 0.0, check.interval(old, new, confidence, 0)[1], 0.05) for old, new in cells
        )
        for old, _ in cells:
            random = rng.normal(0, 1, seeds)
            high = check.interval(old, random, confidence, 0)[1]
            assert check.is_drop(old, random, 0.0, high, 0.05) or old.min() < 5, (old, random)
    assert alarms <= 4  # of 20 tables; expected are one or two


def random_scores(env_id, seeds):
    """train_last100 of runs that act at random: the means of 100 episodes each."""
    env, means = gym.make(env_id), []
    for seed in range(seeds):
        env.reset(seed=seed), env.action_space.seed(seed)
        returns = []
        for _ in range(100):
            env.reset()
            total, ended = 0.0, False
            while not ended:
                _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                total, ended = total + float(reward), terminated or truncated
            returns.append(total)
        means.append(np.mean(returns))
    return means


def test_random_policy_in_the_environment_fails(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [500, 499, 495, 500, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", random_scores("CartPole-v1", 3))
    status, verdict, said = verdicts("--fewer-seeds")
    assert status == 1 and verdict == {"CartPole-v1 ppo": "DROP"}, said


@pytest.mark.parametrize("folder", sorted({path.parent for path in RESULTS.glob("*/scores.csv")}), ids=lambda p: p.name)
def test_random_policy_fails_every_threshold_of_the_stored_results(folder, tmp_path, capsys):
    """Or check itself says that the cell is blind, which hangs on the stored scores alone."""
    stored = check.by_seed(map(check.score_of, check.read_scores(folder)))
    for (env_id, algo), runs in stored.items():
        for seed, run in runs.items():
            score = (score_range(env_id) or (0.0,))[0]
            make_run(tmp_path, env_id, algo, seed, score, steps=run.total_timesteps)
    __main__.main(["check", str(tmp_path), "--against", str(folder)])
    out = capsys.readouterr().out
    rows = [line for line in out.split("\n\n")[0].splitlines()[1:]]
    passed = [row for row in rows if "DROP" not in row and "blind" not in row]
    assert len(rows) == len(stored) and not passed, out
    assert sum("DROP" in row for row in rows) > len(rows) / 2, out


# ------------------------------------------------------------------------------------------------- the command
def test_the_same_scores_are_identical(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [100.123456789, 200, 300.5])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [100.123456789, 200, 300.5], key="another")
    status, verdict, said = verdicts()
    assert status == 0 and verdict == {"CartPole-v1 ppo": "identical"}
    assert "none of 1 cells dropped" in said and "Failed" not in said and "Not compared" not in said


def test_the_table(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 485, 500, 495])
    make_cell(tmp_path / "old", "CartPole-v1", "a2c", [480, 490, 500, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "a2c", [300, 280, 310, 290])
    status, verdict, said = verdicts()
    assert status == 1 and verdict == {"CartPole-v1 ppo": "ok, 2 identical", "CartPole-v1 a2c": "DROP"}
    row = re.search(r"a2c +4, 4 +492\.5 +295\.0  (\S+) \[(\S+), (\S+)\]  DROP", said).groups()
    change, low, high = (float(number.strip("],")) for number in row)
    assert change == -197.5 and low < -197.5 < high < 0
    assert "intervals of 97.5%" in said and "1 of 2 cells dropped." in said
    ppo, a2c = said.splitlines()[1:3]
    assert ppo.index("492.5") == a2c.index("492.5")
    assert "ppo: seeds 2, 4: the same script text and arguments, another score" in said  # make_run has one key
    assert verdicts() == (status, verdict, said)


def test_one_identical_cell_does_not_widen_the_others(tmp_path, verdicts):
    for algo in ("ppo", "a2c", "trpo"):
        make_cell(tmp_path / "old", "CartPole-v1", algo, [480, 490, 500])
        make_cell(tmp_path / "new", "CartPole-v1", algo, [480, 490, 500] if algo == "trpo" else [481, 491, 500])
    assert "intervals of 97.5%" in verdicts()[2]


def test_blind_cells_are_named(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [21, 24, 30, 22])  # no better than the random policy
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [25, 27, 23, 20])
    make_cell(tmp_path / "old", "Nowhere-v0", "ppo", [21, 24, 30, 22])  # no random score is known
    make_cell(tmp_path / "new", "Nowhere-v0", "ppo", [25, 27, 23, 20])
    status, verdict, said = verdicts()
    assert status == 0 and verdict == {"CartPole-v1 ppo": "ok, blind", "Nowhere-v0 ppo": "ok"}
    assert "blind: a random policy would pass here too" in said


def test_higher_and_lower_within_the_tolerance(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [300, 301, 302])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [400, 401, 402])
    make_cell(tmp_path / "old", "CartPole-v1", "a2c", [490, 490.1, 490.2])
    make_cell(tmp_path / "new", "CartPole-v1", "a2c", [480, 480.1, 480.2])
    status, verdict, _ = verdicts()
    assert status == 0
    assert verdict == {"CartPole-v1 ppo": "ok, higher", "CartPole-v1 a2c": "ok, lower within the tolerance"}
    assert verdicts("--tolerance", "0.01")[:2] == (1, verdict | {"CartPole-v1 a2c": "DROP"})


def test_what_is_not_in_both_is_named_and_the_rest_compared(tmp_path, verdicts):
    for algo in ("ppo", "a2c"):
        make_cell(tmp_path / "old", "CartPole-v1", algo, [480, 490, 500])
    make_cell(tmp_path / "old", "Hopper-v4", "ppo", [480, 490, 500])
    make_cell(tmp_path / "old", "Walker2d-v4", "ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "sb3:ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "Hopper-v5", "ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "Walker2d-v4", "ppo", [480, 490, 500], steps=20_000)
    status, verdict, said = verdicts()
    assert status == 0 and verdict == {"CartPole-v1 ppo": "identical"}
    assert "CartPole-v1 a2c: not in RUNS" in said
    assert "CartPole-v1 sb3:ppo: nothing is stored\n" in said
    assert "Hopper-v5 ppo: nothing is stored (Hopper-v4 is another environment)" in said
    assert "Walker2d-v4 ppo: runs of 20,000 steps; the stored ones have 1,000" in said


def test_failed_and_missing_runs_are_named_and_fail(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500, 495, 485, 499, 480])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490, 500])
    make_run(tmp_path / "new", "CartPole-v1", "ppo", 4, 100, status="failed")
    make_run(tmp_path / "new", "CartPole-v1", "ppo", 5, 100, status="interrupted")
    make_run(tmp_path / "new", "CartPole-v1", "ppo", 6, 100, status="")
    status, verdict, said = verdicts()
    assert status == 1 and verdict == {"CartPole-v1 ppo": "identical"}
    for what in ("seed 4 failed", "seed 5 interrupted", "seed 6 unfinished", "seed 7 absent"):
        assert f"CartPole-v1 ppo: {what}\n" in said
    assert "runs failed or are missing" in said and "at step 1,000 of 1,000" in said
    status, _, said = verdicts("--fewer-seeds")
    assert status == 1 and "seed 4 failed" in said and "absent" not in said
    (tmp_path / "new" / "CartPole-v1__ppo__4__0123456789" / "summary.json").unlink()
    assert verdicts("--fewer-seeds")[0] == 0


def test_what_failed_before_may_fail_again(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500])
    make_run(tmp_path / "old", "CartPole-v1", "ppo", 4, 100, status="diverged")
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490, 500])
    assert verdicts()[0] == 0
    make_run(tmp_path / "new", "CartPole-v1", "ppo", 4, 100, status="diverged")
    assert verdicts()[0] == 0
    make_run(tmp_path / "new", "CartPole-v1", "ppo", 5, 100, status="diverged")  # not stored, but a failure of the cell
    status, _, said = verdicts()
    assert status == 1 and "CartPole-v1 ppo: seed 5 diverged" in said


def test_failed_runs_are_in_no_mean(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [470, 490, 500])
    make_run(tmp_path / "new", "CartPole-v1", "ppo", 4, 0, status="failed")
    assert re.search(r"3, 3 +490\.0 +486\.7 ", verdicts()[2])


def test_damaged_runs_are_named_and_the_rest_compared(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500, 499, 498])
    runs = make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490, 500, 499, 498])
    (runs[0] / "config.json").write_text("{")
    (runs[1] / "summary.json").write_text("")
    (runs[2] / "episodes.csv").unlink()
    status, verdict, said = verdicts()
    assert status == 1 and verdict == {"CartPole-v1 ppo": "identical"}
    assert "no readable config.json" in said and "damaged summary.json" in said and "no episodes.csv" in said
    assert "seeds 1, 3 absent" in said and "seed 2 unfinished" in said
    make_run(tmp_path / "new", "CartPole-v1", "a2c", 1, 0, episodes=0)
    make_cell(tmp_path / "old", "CartPole-v1", "a2c", [480, 490])
    status, verdict, said = verdicts()
    assert status == 1 and verdict["CartPole-v1 a2c"] == "no score"
    assert "CartPole-v1 a2c: seed 1 completed without a finished episode" in said
    assert "CartPole-v1 a2c: seed 1 completed without a finished episode" in verdicts("--fewer-seeds")[2]


def test_one_seed_is_judged_only_where_it_can_be(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [470])
    status, _, said = verdicts("--fewer-seeds")
    assert status == 2 and "error: no cell has the two seeds on each side" in said
    make_cell(tmp_path / "old", "CartPole-v1", "a2c", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "a2c", [22])
    assert verdicts("--fewer-seeds")[:2] == (1, {"CartPole-v1 ppo": "too few seeds", "CartPole-v1 a2c": "DROP"})
    make_cell(tmp_path / "old", "CartPole-v1", "trpo", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "trpo", [480])
    assert verdicts("--fewer-seeds")[1]["CartPole-v1 trpo"] == "identical"


def test_the_newest_of_two_runs_of_a_seed_counts(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490, 500])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [22, 22, 22], key="0000000000")
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490, 500], key="1111111111")
    for path in (tmp_path / "new").glob("*__0000000000"):
        os.utime(path / "config.json", (0, 0))
    status, verdict, said = verdicts()
    assert status == 0 and verdict == {"CartPole-v1 ppo": "identical"} and "another run is the same cell" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        (["{new}"], "--against"),
        (["--against", "{old}"], "give run directories"),
        (["{new}", "--against", "{old}/nowhere"], "there is no .*nowhere"),
        (["{old}/nowhere", "--against", "{old}"], "nowhere is no folder"),
        (["{old}", "--against", "{old}"], "there is no .*curves.csv, which belongs to"),
        (["{new}", "--against", "{old}", "--tolerance", "1"], "--tolerance is 1.0, but must be"),
        (["{new}", "--against", "{old}", "--seed", "-1"], "--seed is -1, but must be"),
        (["{other}", "--against", "{old}"], "nothing in RUNS can be compared with .*Acrobot-v1 ppo: nothing is stored"),
    ],
)
def test_wrong_usage_is_said_in_a_sentence(flags, message, tmp_path, capsys):
    make_cell(tmp_path / "runs", "CartPole-v1", "ppo", [480, 490])
    make_cell(tmp_path / "other", "Acrobot-v1", "ppo", [-80, -90])
    (tmp_path / "old").mkdir()
    store(tmp_path / "runs", tmp_path / "old")
    names = dict(new=tmp_path / "runs", old=tmp_path / "old", other=tmp_path / "other")
    try:
        status = __main__.main(["check", *(flag.format(**names) for flag in flags)])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    assert status == 2 and re.search(message, said.out + said.err), said


@pytest.mark.parametrize(
    "row, message",
    [
        ("CartPole-v1,ppo,one,completed,1000,1000,480,,,,,,", "line 3: seed is 'one'"),
        ("CartPole-v1,ppo,1,completed,1000,1000,high,,,,,,", "line 3: train_last100 is 'high'"),
        ("CartPole-v1,ppo", "line 3: seed is None"),
        (None, "has no rows"),
    ],
)
def test_damaged_scores_are_refused_with_their_line(row, message, tmp_path, capsys):
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490])
    good = "CartPole-v1,ppo,2,completed,1000,1000,480,,,,,,"
    (tmp_path / "scores.csv").write_text("\n".join([HEADER.replace(" ", ","), *([good, row] if row else [])]))
    assert __main__.main(["check", str(tmp_path / "new"), "--against", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "scores.csv").write_text("env_id,algo\nCartPole-v1,ppo\n")
    with pytest.raises(UsageError, match="line 2: seed"):
        check.read_scores(tmp_path)


def test_key_is_the_one_of_the_job(tmp_path):
    job = Job("ppo", ("python",), "text", "CartPole-v1", 1)
    make_run(tmp_path, "CartPole-v1", "ppo", 1, 5.0, key=job.key)
    (run,) = read_runs([tmp_path])[0]
    assert check.score_of(run) == check.Score("CartPole-v1", "ppo", 1, "completed", 1000, 5.0, job.key)


def test_what_was_asked_for_and_never_started_is_missing(tmp_path, verdicts):
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [480, 490])
    new = make_cell(tmp_path / "new", "CartPole-v1", "ppo", [480, 490])
    cells = [dict(env_id="CartPole-v1", algo="ppo", seed=n, name=run.name) for n, run in enumerate(new, 1)]
    cells += [dict(env_id="CartPole-v1", algo="a2c", seed=n, name=f"CartPole-v1__a2c__{n}__x") for n in (1, 2)]
    (tmp_path / "new" / "suite.json").write_text(json.dumps(dict(cells=cells)))
    status, _, said = verdicts()
    assert status == 1 and "CartPole-v1 a2c: seeds 1, 2 asked for, absent" in said
    assert verdicts("--fewer-seeds")[0] == 1  # nothing of it is there
    cells = [cell for cell in cells if cell["algo"] == "ppo"] + [cells[0] | dict(seed=3, name="CartPole-v1__ppo__3__x")]
    (tmp_path / "new" / "suite.json").write_text(json.dumps(dict(cells=cells)))
    assert verdicts()[0] == 1 and verdicts("--fewer-seeds")[0] == 0


def test_without_scipy_it_says_what_installs_it(tmp_path, verdicts, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    make_cell(tmp_path / "old", "CartPole-v1", "ppo", [500, 490])
    make_cell(tmp_path / "new", "CartPole-v1", "ppo", [500, 490])
    assert verdicts()[::2] == (2, 'error: check needs scipy: pip install -c constraints.txt -e ".[bench]"\n')
