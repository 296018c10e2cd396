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


@pytest.mark.parametrize("name, mean", [("ppo", 490), ("a2c", 475), ("a3c", 475), ("trpo", 475), ("reinforce", 475)])
def test_cartpole_is_solved_by_ten_seeds(name, mean, tmp_path):
    scores = [train_last100(name, "CartPole-v1", seed, tmp_path) for seed in range(1, 11)]
    assert np.mean(scores) >= mean, scores


def test_halfcheetah_is_above_the_published_mean(tmp_path):
    assert train_last100("ppo", "HalfCheetah-v4", 1, tmp_path) > 1443


def accuracy(runs_dir, *flags, name="grpo_toy"):
    """Before and after, of a run of a language script."""
    script = importlib.import_module(name)
    run = script.train(script.parse_args(["--runs-dir", str(runs_dir), *flags]))
    summary = json.loads((run / "summary.json").read_text())
    return summary["accuracy_before"], summary["accuracy"]


def test_grpo_learns_to_sort_with_five_seeds(tmp_path):
    before, after = zip(*(accuracy(tmp_path, "--seed", str(seed)) for seed in range(1, 6)))
    assert 0.15 < np.mean(before) < 0.25 and np.mean(after) >= 0.93 and min(after) >= 0.88, (before, after)


@pytest.mark.parametrize("method", ["dr_grpo", "dapo", "gspo", "gdpo", "rloo", "cispo", "sapo", "reinforce_pp"])
def test_every_method_learns_to_sort(method, tmp_path):
    assert accuracy(tmp_path, "--method", method)[1] >= 0.9


def accuracies(runs_dir, name, *flags):
    """After training, of three seeds."""
    return [accuracy(runs_dir, "--seed", seed, *flags, name=name)[1] for seed in "123"]


def test_rlhf_learns_to_sort_from_a_verifier(tmp_path):
    assert min(accuracies(tmp_path, "rlhf_toy", "--reward", "verifier")) >= 0.88


def test_rlhf_learns_to_sort_from_a_reward_model_and_forgets_it_without_the_kl_penalty(tmp_path):
    assert min(accuracies(tmp_path, "rlhf_toy")) >= 0.55
    assert max(accuracies(tmp_path, "rlhf_toy", "--beta", "0")) < 0.1


@pytest.mark.parametrize("loss, mean", [("dpo", 0.75), ("ipo", 0.75), ("kto", 0.9), ("orpo", 0.9), ("sft", 0.9)])
def test_every_loss_learns_to_sort_from_preferences(loss, mean, tmp_path):
    assert np.mean(accuracies(tmp_path, "dpo_toy", "--loss", loss)) >= mean
