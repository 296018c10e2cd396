"""Trains to a score, with default arguments: minutes long, run with pytest -m slow."""

import json

import numpy as np
import pytest

import ppo

pytestmark = pytest.mark.slow


def train_last100(env_id, seed, runs_dir):
    run = ppo.train(ppo.parse_args(["--env-id", env_id, "--seed", str(seed), "--runs-dir", str(runs_dir)]))
    return json.loads((run / "summary.json").read_text())["train_last100"]


def test_cartpole_is_solved_by_ten_seeds(tmp_path):
    scores = [train_last100("CartPole-v1", seed, tmp_path) for seed in range(1, 11)]
    assert np.mean(scores) >= 490 and min(scores) >= 475, scores


def test_halfcheetah_is_above_the_published_mean(tmp_path):
    assert train_last100("HalfCheetah-v4", 1, tmp_path) > 1443
