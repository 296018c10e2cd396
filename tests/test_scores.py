"""Trains to a score, with default arguments: minutes long, run with pytest -m slow."""

import importlib
import json

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def train_last100(name, env_id, seed, runs_dir):
    script = importlib.import_module(name)
    run = script.train(script.parse_args(["--env-id", env_id, "--seed", str(seed), "--runs-dir", str(runs_dir)]))
    return json.loads((run / "summary.json").read_text())["train_last100"]


@pytest.mark.parametrize("name, mean", [("ppo", 490), ("a2c", 475), ("trpo", 475), ("reinforce", 475)])
def test_cartpole_is_solved_by_ten_seeds(name, mean, tmp_path):
    scores = [train_last100(name, "CartPole-v1", seed, tmp_path) for seed in range(1, 11)]
    assert np.mean(scores) >= mean, scores


def test_halfcheetah_is_above_the_published_mean(tmp_path):
    assert train_last100("ppo", "HalfCheetah-v4", 1, tmp_path) > 1443


def accuracy(runs_dir, *flags):
    """Before and after, of a run of grpo_toy.py."""
    import grpo_toy

    run = grpo_toy.train(grpo_toy.parse_args(["--runs-dir", str(runs_dir), *flags]))
    summary = json.loads((run / "summary.json").read_text())
    return summary["accuracy_before"], summary["accuracy"]


def test_grpo_learns_to_sort_with_five_seeds(tmp_path):
    before, after = zip(*(accuracy(tmp_path, "--seed", str(seed)) for seed in range(1, 6)))
    assert 0.15 < np.mean(before) < 0.25 and np.mean(after) >= 0.93 and min(after) >= 0.88, (before, after)


@pytest.mark.parametrize("method", ["dr_grpo", "dapo", "gspo", "gdpo", "rloo", "cispo", "sapo", "reinforce_pp"])
def test_every_method_learns_to_sort(method, tmp_path):
    assert accuracy(tmp_path, "--method", method)[1] >= 0.9
