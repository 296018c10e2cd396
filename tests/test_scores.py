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
