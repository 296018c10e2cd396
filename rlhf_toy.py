# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.13",
#     "tyro>=1.0",
#     "tensorboard>=2.20",
#     "wandb>=0.27",
#     "numpy>=2.0",
# ]
# ///
"""RLHF, reinforcement learning from human feedback (InstructGPT, arXiv 2203.02155), the whole road in one file.

    1. SFT            a small GPT copies a teacher: the reference pi_ref, and the policy that training starts from
    2. reward model   r(x, y), the same body with one output, learns which of two answers y to a prompt x is preferred:
                          loss = -mean log sigmoid(r(x, chosen) - r(x, rejected))           (Stiennon et al. 2020)
    3. PPO            maximises E[r(x, y)] - beta KL(pi || pi_ref) token by token (arXiv 1909.08593, 1707.06347):
                          state   x and the tokens so far             action   a token
                          reward  -beta (log pi - log pi_ref) for every token, and r(x, y) for the last one
                          advantages by GAE with a critic of its own, the clipped losses of the policy and of the critic

    --reward model        the scores are the reward model's; the default
    --reward verifier     the scores are the truth: what PPO can do when the reward cannot be deceived
    --kl-control adaptive moves beta so that the KL divergence stays near --kl-target

The task is to sort six digits. The teacher sorts most prompts the wrong way round: 630275 -> ..(765320), and now and
then [023567]. The preferences are pairs of the GPT's own answers to a prompt, a right one and a wrong one. The policy
of --reward model never sees who is right; eval/accuracy does. With --beta 0 it learns to please the reward model and
forgets to sort.

    python rlhf_toy.py                                        python rlhf_toy.py --beta 0
    python rlhf_toy.py --reward verifier                      python rlhf_toy.py --kl-control adaptive --kl-target 2
    python rlhf_toy.py --resume runs/<run>                    python rlhf_toy.py --evaluate runs/<run>

Departures. A verifier stands for the people who rank; each answer is in one pair. The reward model takes two epochs.
Scores are standardised on samples of the reference, the verifier's as well (InstructGPT shifts them to mean 0). Answers
without an end get a fixed score. The critic shares no weights with the policy. It starts as a copy of the reward model
(of the policy under --reward verifier), and its head starts at 0. PPO takes two epochs of two minibatches, and step
sizes fall to a tenth. Advantages are standardised over the tokens of a batch. No pretraining gradients are mixed in
(PPO-ptx).

The upper half of this file is the method. The lower half has the sections that scripts share.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

if __name__ == "__main__" and "__file__" in globals():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams, scalar, text


@dataclass
class Args:
    reward: Literal["model", "verifier"] = "model"  # who scores the answers, and whose defaults to take
    seed: int = 1  # seed of weights, teacher, prompts and samples
    max_steps: int = 80  # iterations of PPO: sample a batch, then learn from it
    learning_rate: float = 4e-4  # step size of the policy's AdamW
    critic_learning_rate: float = 1e-3  # step size of the critic's AdamW
    anneal_lr: bool = True  # let both step sizes fall linearly to a tenth
    generation_batch_size: int = 256  # completions in a batch, each of another prompt
    num_iterations: int = 2  # epochs over a batch
    steps_per_generation: int = 2  # minibatches, each an optimizer step, in an epoch
    beta: float = 0.1  # weight of the KL divergence from the reference in the reward
    kl_control: Literal["fixed", "adaptive"] = "fixed"  # whether beta moves; see the class AdaptiveKL
    kl_target: float = 2.0  # divergence, summed over a completion, that an adaptive beta aims at
    gamma: float = 1.0  # discount
    gae_lambda: float = 0.95  # lambda of GAE
    epsilon: float = 0.2  # how far the ratio may be from 1 before it is clipped
    value_epsilon: float = 0.2  # how far a value may move from the old one before its loss is clipped
    missing_eos_penalty: float = -1.0  # score, after standardising, of a completion without an end
    temperature: float = 1.0  # divides the logits, when sampling and when scoring
    max_grad_norm: float = 1.0  # bound on the global norm of the gradient

    # Reward model
    num_prompts: int = 2048  # prompts that are answered for the preferences
    num_generations: int = 8  # completions of each; every right one is paired with a wrong one
    rm_epochs: int = 2  # epochs over the pairs
    rm_batch_size: int = 64  # pairs of an optimizer step
    rm_learning_rate: float = 1e-3  # highest step size of the reward model

    # Task and model
    num_digits: int = 6  # digits of a prompt
    max_completion_length: int = 16  # tokens that a completion may have, with the one that ends it
    n_layer: int = 2  # transformer blocks
    n_head: int = 4  # attention heads of a block
    n_embd: int = 64  # width of the model
    init_from: str = ""  # run, or one of its checkpoints, whose model to start from, and to keep as reference
    sft_steps: int = 300  # minibatches of 128 answers of the teacher that warm the model up
    sft_learning_rate: float = 4e-3  # highest step size of the warm start
    cache_warm_start: bool = True  # keep warm starts in runs-dir, and use those of the same arguments, code, libraries


# What differs between the rewards; an explicit flag wins.
# fmt: off
METHODS: dict[str, dict[str, Any]] = {
    "model": dict(),
    "verifier": dict(beta=0.02),  # the truth needs no protection
}
POSITIVE = ("max_steps", "learning_rate", "critic_learning_rate", "generation_batch_size", "num_iterations",
            "steps_per_generation", "kl_target", "temperature", "max_grad_norm", "num_prompts", "num_generations",
            "rm_epochs", "rm_batch_size", "rm_learning_rate", "num_digits", "max_completion_length", "n_layer",
            "n_head", "n_embd", "sft_learning_rate")
AT_MOST_ONE = ("gamma", "gae_lambda")
ANY_SIGN = ("missing_eos_penalty",)
BATCHES = {"generation_batch_size": 1, "rm_batch_size": 2, "num_generations": 1}  # what has how many rows in memory
PRESET = "reward"  # what picks a row of METHODS
METRICS = ("eval/accuracy", "objective/scores")  # what the HParams tab shows
# fmt: on


# ---------------------------------------------------------------------------------------------- the reward model
def token_values(network: GPT, prompts: Tensor, completions: Tensor) -> Tensor:
    """The one output of a network before each token of the completions, and after the last, (rows, length + 1)."""
    return network(torch.cat([prompts, completions], 1), only_from=prompts.shape[1] - 1).squeeze(-1)


def model_scores(reward_model: GPT, prompts: Tensor, completions: Tensor) -> Tensor:
    """r(x, y), (rows,): the output after the last token of each completion."""
    last = completion_mask(completions).sum(1, keepdim=True)
    return token_values(reward_model, prompts, completions).gather(1, last).squeeze(1)


def reward_model_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry: minus the mean log-probability that the chosen one wins (InstructGPT eq. 1). Scores (pairs,)."""
    return -F.logsigmoid(chosen - rejected).mean()


def train_reward_model(reward_model: GPT, reference: GPT, run: Run) -> None:
    """Stage 2: samples preferences, and fits the reward model to them; tells its accuracy on held-out prompts."""
    args, rng, curves = run.args, Rng(f"reward model {run.args.seed}", run.args.device), {"loss": [], "accuracy": []}
    pairs = sample_pairs(reference, args.num_prompts, run)
    write_pairs(run.path / "pairs.jsonl", pairs)
    train, count = encode_pairs(pairs, args), len(pairs)
    optimizer = torch.optim.AdamW(reward_model.parameters(), weight_decay=0.0, fused=True)
    epochs = (rng.permutation(count).split(args.rm_batch_size) for _ in range(args.rm_epochs))
    steps = args.rm_epochs * math.ceil(count / args.rm_batch_size)
    for step, rows in enumerate(itertools.chain.from_iterable(epochs)):
        optimizer.param_groups[0]["lr"] = args.rm_learning_rate * (1 - step / steps)
        prompts, *answers = (x[rows] for x in train)
        chosen, rejected = (model_scores(reward_model, prompts, answer) for answer in answers)
        loss = reward_model_loss(chosen, rejected)
        descend(optimizer, reward_model, loss, args)
        curves["loss"].append(loss.item())
        curves["accuracy"].append((chosen > rejected).float().mean().item())
        run.progress.show("steps of the reward model", step + 1, steps)
        if run.signals:
            raise Stopped(run.signals[0])
    write_stage(run, "reward_model", curves)
    held_out = sample_pairs(reference, math.ceil(args.num_prompts / 4), run, held_out=True)
    prompts, *answers = encode_pairs(held_out, args)
    with torch.no_grad():  # in parts, because there may be very many
        parts = [zip(prompts.split(1024), answer.split(1024)) for answer in answers]
        chosen, rejected = (torch.cat([model_scores(reward_model, *part) for part in side]) for side in parts)
    accuracy = (chosen > rejected).float().mean().item()
    run.notes |= {"pairs": count, "held_out_pairs": len(held_out), "reward_model_accuracy": accuracy}
    say(f"reward model: {count:,} pairs; {accuracy:.1%} of {len(held_out):,} held-out pairs are ranked right")


# ---------------------------------------------------------------------------------------------- PPO on tokens
def token_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of each token (batch, length), 0 after the last one.

    -beta (log pi - log pi_ref) for every token, whose sum estimates -beta KL(pi || pi_ref) of the completion, and the
    score (batch,) for the last token, which is EOS if the completion ended in time.
    """
    mask = mask.bool()
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    return torch.where(last, scores[:, None], 0.0) - beta * kl


def token_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438) over the tokens of completions: advantages and returns (batch, length), 0 where masked.

    values[:, t] is V of the prompt and the tokens before t. A completion is an episode: the value after its last token
    is 0, and what the mask leaves out has no part in it, even if it is NaN.
    """
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


class AdaptiveKL:
    """beta as it stands, and Ziegler et al.'s controller (sec. 2.2): beta *= 1 + 0.1 clip(KL / target - 1, -0.2, 0.2).

    A step of it is an iteration. KL is the mean over completions of the log-ratio, summed over their tokens.
    """

    def __init__(self, beta: float, target: float):
        self.beta, self.target = beta, target

    def update(self, kl: float) -> None:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + 0.1 * error

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = float(state["beta"])


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (PPO eq. 7), negated, a mean over tokens, and statistics of it. All (batch, length)."""
    mask = mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    with torch.no_grad():
        stats = {
            "policy/approxkl_avg": 0.5 * masked_mean(log_ratio**2, mask),
            "policy/clipfrac_avg": masked_mean((clipped * advantages < ratio * advantages).float(), mask),
            "val/ratio": masked_mean(ratio, mask),
        }
    return -masked_mean(surrogate, mask), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The larger of the squared errors of the value and of the value clipped to the old one, half its mean."""
    mask = mask.bool()
    values = torch.where(mask, values, 0.0)
    clipped = old_values + (values - old_values).clamp(-epsilon, epsilon)
    errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    stats = {"val/clipfrac_avg": masked_mean((clipped_errors > errors).float(), mask)}
    return 0.5 * masked_mean(torch.max(errors, clipped_errors), mask), stats


class Models(NamedTuple):
    """The four networks of RLHF."""

    policy: GPT
    reference: GPT
    critic: GPT
    reward_model: GPT


class Batch(NamedTuple):
    """Completions to learn from, (batch, length of the longest) but for the prompts and scores."""

    prompts: Tensor  # (batch, prompt length)
    completions: Tensor
    mask: Tensor
    logprobs: Tensor  # log pi_old
    ref_logprobs: Tensor
    scores: Tensor  # (batch,)
    rewards: Tensor
    values: Tensor
    returns: Tensor
    advantages: Tensor


@torch.no_grad()
def raw_scores(reward_model: GPT, prompts: Tensor, completions: Tensor, args: Args) -> Tensor:
    """The scores of completions (rows,), before they are standardised."""
    if args.reward == "model":
        return model_scores(reward_model, prompts, completions)
    questions, answers = decode(prompts, prompts >= 0), decode(completions, completion_mask(completions))
    right = [float(is_right(question[1:], answer)) for question, answer in zip(questions, answers)]
    return torch.tensor(right, device=completions.device)


def take_body(network: GPT, source: GPT) -> None:
    """Gives a network all weights of another but those of the head, which become 0."""
    network.load_state_dict({**source.state_dict(), "head.weight": torch.zeros_like(network.head.weight)})


def prepare(models: Models, scale: Tensor, run: Run) -> None:
    """Stages 1 and 2, the critic's first weights, and the mean and deviation of the reference's scores, in scale."""
    args = run.args
    if not args.init_from:
        warm_start(models.policy, run)
    models.reference.load_state_dict(models.policy.state_dict())
    body = models.policy
    if args.reward == "model":
        take_body(models.reward_model, models.policy)
        train_reward_model(models.reward_model, models.reference, run)
        body = models.reward_model
    take_body(models.critic, body)
    rng = Rng(f"scale {args.seed}", args.device)
    prompts = encode_prompts(sample_prompts(1024, args.num_digits, rng), args.device)
    raw = raw_scores(models.reward_model, prompts, generate(models.reference, prompts, 1, rng, args), args)
    scale[0], scale[1] = raw.mean(), raw.std() if raw.std() > 0 else 1.0
    run.notes |= {"score_mean": scale[0].item(), "score_deviation": scale[1].item()}


def standardise(x: Tensor, mask: Tensor) -> Tensor:
    """Shifts and scales x to mean 0 and deviation 1 over the tokens in the mask."""
    centred = x - masked_mean(x, mask)
    return centred / (masked_mean(centred**2, mask).sqrt() + 1e-8)


@torch.no_grad()
def rollout(models: Models, scale: Tensor, beta: float, rng: Rng, args: Args) -> Batch:
    """A completion of each prompt, its score, and the advantages of its tokens."""
    prompts = encode_prompts(sample_prompts(args.generation_batch_size, args.num_digits, rng), args.device)
    completions = generate(models.policy, prompts, 1, rng, args)
    mask, ended = completion_mask(completions), (completions == EOS).any(1)
    logprobs, _ = completion_logprobs(models.policy, prompts, completions, args)
    ref_logprobs, _ = completion_logprobs(models.reference, prompts, completions, args)
    values = token_values(models.critic, prompts, completions)[:, :-1]

    mean, deviation = scale
    scores = (raw_scores(models.reward_model, prompts, completions, args) - mean) / deviation
    scores = torch.where(ended, scores, args.missing_eos_penalty)
    rewards = token_rewards(logprobs, ref_logprobs, scores, mask, beta)
    advantages, returns = token_gae(rewards, values, mask, args.gamma, args.gae_lambda)
    advantages = standardise(advantages, mask)
    return Batch(prompts, completions, mask, logprobs, ref_logprobs, scores, rewards, values, returns, advantages)


def descend(optimizer: torch.optim.AdamW, network: GPT, loss: Tensor, args: Args) -> Tensor:
    """A step down the gradient of a loss; returns the gradient's norm before it is clipped."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
    optimizer.step()
    return norm


def update(
    models: Models,
    optimizer: torch.optim.AdamW,
    critic_optimizer: torch.optim.AdamW,
    batch: Batch,
    annealed: float,
    rng: Rng,
    args: Args,
) -> dict[str, float]:
    """num_iterations epochs over a batch; returns the means of their statistics."""
    optimizer.param_groups[0]["lr"] = args.learning_rate * annealed
    critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * annealed
    steps = []
    for _ in range(args.num_iterations):
        for rows in rng.permutation(len(batch.mask)).chunk(args.steps_per_generation):
            part = Batch(*(x[rows] for x in batch))
            logprobs, entropies = completion_logprobs(models.policy, part.prompts, part.completions, args)
            values = token_values(models.critic, part.prompts, part.completions)[:, :-1]
            loss, stats = policy_loss(logprobs, part.logprobs, part.advantages, part.mask, args.epsilon)
            critic_loss, critic_stats = value_loss(values, part.values, part.returns, part.mask, args.value_epsilon)
            stats |= critic_stats | {"loss/policy_avg": loss.detach(), "loss/value_avg": critic_loss.detach()}
            stats["policy/entropy_avg"] = masked_mean(entropies, part.mask)
            stats["grad_norm/policy"] = descend(optimizer, models.policy, loss, args)
            stats["grad_norm/critic"] = descend(critic_optimizer, models.critic, critic_loss, args)
            steps.append(stats)
    return {tag: torch.stack([step[tag] for step in steps]).mean().item() for tag in steps[0]}


def train(args: RunArgs) -> Path:
    """Trains for max_steps iterations, or goes on with the run args.resume. Returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = Start()
    check_args(args)
    check_model(args)
    check_method(args)
    rng = settle(args)
    policy = GPT(args).to(args.device)
    if args.init_from and not args.resume:
        load_model(policy, Path(args.init_from), args)
    models = Models(policy, copy.deepcopy(policy), *(GPT(args, outputs=1).to(args.device) for _ in range(2)))
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    critic_optimizer = torch.optim.AdamW(models.critic.parameters(), weight_decay=0.0, fused=True)
    scale, controller = torch.tensor([0.0, 1.0], device=args.device), AdaptiveKL(args.beta, args.kl_target)
    learner = dict(model=policy, reference=models.reference, critic=models.critic, reward_model=models.reward_model)
    learner |= dict(optimizer=optimizer, critic_optimizer=critic_optimizer, scale=scale, controller=controller, rng=rng)

    with Run(args, args.max_steps, started, **learner) as run:
        if not show_prepared(run):
            prepare(models, scale, run)
            keep_prepared(run)
        if not run.iteration:
            evaluate_before(policy, run)
        for iteration in run.iterations():
            annealed = 1 - 0.9 * iteration / args.max_steps if args.anneal_lr else 1
            batch = rollout(models, scale, controller.beta, rng, args)
            values = statistics(batch, controller.beta) | {"learning_rate": args.learning_rate * annealed}
            values |= update(models, optimizer, critic_optimizer, batch, annealed, rng, args)
            if args.kl_control == "adaptive":
                controller.update(values["objective/kl"])
            if iteration == args.max_steps or iteration % args.eval_interval == 0:
                values |= evaluation(policy, args)
            report(run, batch, values)
            completions = zip(batch.rewards.sum(1).tolist(), batch.mask.sum(1).tolist())
            run.log(1, [(1, *completion) for completion in completions], values)
    return run.path


# ==== The machine room: "shared" sections are the same text in every script that has them ====
# ==== shared: language run flags ====
SCRIPT = Path(os.path.abspath(globals().get("__file__", "notebook")))


@dataclass
class RunArgs(Args):
    """All arguments of the command line: those of the method, the task and the model, and those of the run."""

    exp_name: str = SCRIPT.stem  # name of the experiment, a part of the run's name
    runs_dir: str = "runs"  # folder of all runs
    run_name: str = ""  # folder of this run in runs-dir (default: {exp_name}__{seed}__{time})
    resume: str = ""  # run directory to go on with, from its newest good checkpoint, with its own arguments
    evaluate: str = ""  # run directory, or one of its checkpoints, to load and test instead of training
    eval_interval: int = 10  # iterations from an evaluation to the next
    eval_prompts: int = 256  # held-out prompts of an evaluation, answered once greedily and eight times by sampling
    checkpoint_interval: int = 0  # iterations from a checkpoint to the next (0: about a twentieth of the run)
    keep_checkpoints: bool = False  # keep all checkpoints, not only the newest two, to evaluate along the run
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "lineage"  # project of --track
    wandb_entity: str | None = None  # team of --track
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cpu, where all results were measured
    num_threads: int = 0  # CPU threads of torch (0: all cores, but at most 4)


SIZES = ("num_digits", "max_completion_length", "n_layer", "n_head", "n_embd")  # what makes a model another one


def preset(name: str) -> dict[str, Any]:
    """PRESET and its row of METHODS. Nothing for an unknown one, which the parser will refuse."""
    return {PRESET: name, **METHODS[name]} if name in METHODS else {}


def refuse(wrong: Any, message: str) -> None:
    if wrong:
        raise UsageError(message)


def check_model(args: RunArgs) -> None:
    """Raises UsageError for a model or a name that cannot be."""
    shortest = args.num_digits + 3
    refuse(args.num_digits > 1000, f"--num-digits is {args.num_digits}, but must be at most 1,000.")
    refuse(args.n_embd % args.n_head, f"--n-embd {args.n_embd} is not divisible by --n-head {args.n_head}.")
    refuse(args.run_name in (".", "..", "warm_starts"), f"--run-name {args.run_name} is taken; choose another.")
    refuse(
        args.max_completion_length < shortest,
        f"--max-completion-length {args.max_completion_length} is too short for {args.num_digits} digits, two brackets"
        f" and an end; ask for {shortest} or more.",
    )
    check_sizes(args)


def check_sizes(args: RunArgs) -> None:
    """Raises UsageError for a model and batches that do not fit into the memory."""
    sizes = {name: vars(args)[name] for name in (*SIZES, *BATCHES, "eval_prompts")}
    largest = max(sizes, key=sizes.__getitem__)

    def needed(size: int) -> float:
        x = replace(args, **{largest: size})
        context = 1 + x.num_digits + x.max_completion_length
        weights = x.n_layer * 12 * x.n_embd**2 + context * x.n_embd
        rows = max(number * vars(x)[name] for name, number in BATCHES.items())
        cached = x.n_layer * 2 * context * x.n_embd * max(rows, 8 * x.eval_prompts)
        trained = x.n_layer * 16 * context * x.n_embd * rows // vars(x).get("steps_per_generation", 1)
        return 4 * (16 * weights + max(cached, trained))  # sixteen: up to four networks, with gradients and optimizers

    check_memory(needed, "this model with its batches", f"--{largest.replace('_', '-')}", sizes[largest])


def settle(args: RunArgs) -> Rng:
    """Decides what is "auto", and sets threads and seeds. Returns the run's random numbers.

    Raises UsageError for what this machine does not have.
    """
    if args.device == "auto":
        args.device = "cpu"
    no_cuda = args.device == "cuda" and not torch.cuda.is_available()
    refuse(no_cuda, "--device cuda: torch sees no CUDA device here; use --device cpu.")
    args.num_threads = args.num_threads or min(cores(), 4)
    torch.set_num_threads(args.num_threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return Rng(args.seed, args.device)


# ==== shared: command line ====
class UsageError(Exception):
    """The configuration is wrong: one sentence, exit status 2, nothing created."""


class Failed(Exception):
    """A number is NaN or infinite (status "diverged"), or something raised ("failed"): exit status 1."""

    def __init__(self, message: str, status: str = "diverged"):
        super().__init__(message)
        self.status = status


class Stopped(BaseException):
    """A signal ends the run: exit status 128 + signal. No environment may take it for an error of its own."""

    status = "interrupted"


# Arguments that may differ from those of the run when it is resumed or evaluated.
MACHINE = ("device", "num_threads", "compile")
MAY_DIFFER = ("resume", "keep_checkpoints", "capture_video", "track", "wandb_project_name", "wandb_entity", *MACHINE)


def parse_args(argv: list[str] | None = None) -> RunArgs:
    """The command line, over the defaults of its preset. With --resume or --evaluate, over the arguments of the run."""
    argv = own_arguments() if argv is None else argv
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = vars(RunArgs())[PRESET]
    peek.add_argument(f"--{PRESET.replace('_', '-')}", f"--{PRESET}", nargs="?", default=default, const=default)
    peek.add_argument("--resume", nargs="?", type=Path)
    peek.add_argument("--evaluate", nargs="?", type=Path)
    asked = vars(peek.parse_known_args(argv)[0])
    if asked["resume"] and asked["evaluate"]:
        raise UsageError("--resume trains and --evaluate plays; give one of them.")
    if asked["resume"] and asked["resume"].is_file():
        raise UsageError(f"--resume takes a run directory, here {run_dir_of(asked['resume'])}.")
    run = asked["resume"] or asked["evaluate"]
    if not run:
        return parse_flags(argv, RunArgs(**preset(asked[PRESET])))
    saved = read_config(run)[0]
    args = parse_flags(argv, saved)
    changed = [name for name, value in vars(saved).items() if value != vars(args)[name] and name not in MAY_DIFFER]
    if asked["evaluate"]:
        changed = [name for name in changed if not name.startswith("eval")]
    if changed:
        difference = ", ".join(f"{name} {vars(saved)[name]!r} -> {vars(args)[name]!r}" for name in changed)
        goes_on = "--resume goes on with" if asked["resume"] else "--evaluate goes by"
        raise UsageError(f"{goes_on} the arguments of the run, and these differ: {difference}.")
    return args


def own_arguments() -> list[str]:
    """What this script was started with; nothing where it was imported, or pasted into a notebook with its own argv."""
    started = Path(sys.argv[0])
    return sys.argv[1:] if SCRIPT.is_file() and started.is_file() and started.samefile(SCRIPT) else []


def sentence_of(box: str) -> str:
    """What tyro says of an error, in a box, as one sentence."""
    lines = [line.strip() for line in box.splitlines()]
    rules = [n for n, line in enumerate(lines) if line and not line.strip("-")]  # around the message
    message = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines)
    flag, _, reason = message.removeprefix("Error parsing ").partition(": ")
    takes = next((line for line in lines if line.startswith(f"{flag} ")), "")
    if takes and "'" in reason:
        for kind, words in (("{None}|", ""), ("FLOAT", "a number"), ("INT", "a whole number")):
            takes = takes.replace(kind, words)
        message = f"{takes.replace(' ', ' takes ', 1)}, not {reason.split(chr(39))[-2]!r}"
    if "Perhaps you meant:" in lines:
        near = lines[lines.index("Perhaps you meant:") + 1].split()[0]
        return f"{message}; did you mean {near}?"
    return f"{message.rstrip('.')}."


PARSING = threading.Lock()  # because what tyro prints is caught for the whole process


def parse_flags(argv: list[str], default: RunArgs) -> RunArgs:
    """The flags over the defaults. Raises UsageError with one sentence, where tyro alone would draw a box."""
    if {"-h", "--help"} & set(argv):
        return tyro.cli(RunArgs, args=argv, default=default)
    box = io.StringIO()
    try:
        with PARSING, contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            args, unknown = tyro.cli(RunArgs, args=argv, default=default, return_unknown_args=True)
    except SystemExit as leaving:
        if not leaving.code:  # it has printed what was asked for
            print(box.getvalue(), end="")
            raise
        raise UsageError(sentence_of(box.getvalue())) from None
    if unknown:
        known = [f"--{no}{field.name.replace('_', '-')}" for field in fields(RunArgs) for no in ("", "no-")]
        near = difflib.get_close_matches(unknown[0].partition("=")[0].replace("_", "-"), known, n=1)
        would = f"did you mean {near[0]}?" if near else "--help lists the flags."
        raise UsageError(f"{unknown[0]!r} is no flag and no value of one; {would}")
    return args


def check_args(args: RunArgs) -> None:
    """Raises UsageError for the first number that cannot work, and says what would; and where --track cannot log."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and (must := bound_broken(name, number)):
                raise UsageError(f"--{name.replace('_', '-')} is {number}, but must be {must}.")
    if args.num_threads > cores():
        if not args.resume and not args.evaluate:
            raise UsageError(
                f"--num-threads is {args.num_threads}, but this process may use {cores()} cores; ask for fewer."
            )
        args.num_threads = 0  # the run was made on a larger machine
    mode, modes = os.environ.get("WANDB_MODE", "online"), ("online", "offline", "shared", "disabled", "dryrun", "run")
    if args.track and mode not in modes:
        raise UsageError(f"WANDB_MODE is {mode!r}, but must be one of {', '.join(modes)}.")
    if args.track and not args.evaluate and mode == "online":
        import wandb

        try:
            problem = "" if wandb.login(prompt=False) else "wandb is not logged in"
        except Exception as error:
            problem = f"wandb cannot log in ({one_line(error)})"
        if problem:
            raise UsageError(f"--track: {problem}; run wandb login, or set WANDB_MODE=offline.")


def bound_broken(name: str, number: float) -> str:
    """What an argument must be and is not, or ""."""
    if not math.isfinite(number):
        return "a finite number"
    if abs(number) > 1e30 and isinstance(number, float):
        return "at most 1e30"
    if name == "num_envs" and number > 2**16:
        return "at most 65,536"
    if number > 2**53 and isinstance(number, int):
        return "at most 2**53"
    if name in (*POSITIVE, "eval_episodes", "eval_max_steps", "eval_prompts", "eval_interval") and number <= 0:
        return "greater than 0"
    if name in AT_MOST_ONE and number > 1:
        return "at most 1"
    if name not in ANY_SIGN and number < 0:
        return "0 or more"
    return "less than 2**32" if name in ("seed", "eval_seed") and number >= 2**32 else ""


def affinity() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """Processor cores that this process may use, by its affinity and by the share that its cgroups grant."""
    count = affinity()
    for quota, period in cgroups("cpu.max", "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        if quota not in ("max", "-1"):
            count = min(count, int(quota) // int(period))
    return max(count, 1)


def memory() -> int:
    """Bytes that this process may fill."""
    limits = [int(limit) for (limit,) in cgroups("memory.max", "memory", "memory.limit_in_bytes") if limit != "max"]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cgroups(name: str, controller: str, *old_names: str) -> list[list[str]]:
    """The words of a file, in all control groups around this process. Version 1 has other folders and file names."""
    root, mine = CGROUPS
    found = []
    for line in mine.read_text(encoding="utf-8").splitlines() if mine.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / controller if controllers else root
        folder = folder / path.lstrip("/")
        names = old_names if controllers else [name]
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError):
                found.append(" ".join((level / name).read_text(encoding="utf-8") for name in names).split())
    return found


def check_memory(needed: Callable[[int], float], what: str, flag: str, size: int) -> None:
    """Raises UsageError where size, the value of a flag, needs more bytes than there are."""
    if needed(size) <= memory():
        return
    most = size
    while most > 1 and needed(most) > memory():
        most //= 2
    sizes = f"{needed(size) / 2**30:,.0f} GiB of memory, and there are {memory() / 2**30:,.0f}"
    would = f"{flag} {most} would fit" if needed(most) <= memory() else "its other sizes are too large, too"
    raise UsageError(f"{what} would take {sizes}; {would}.")


def say(line: str, end: str = "\n", stream: str = "stdout") -> None:
    """Prints. A reader that is gone, full or stalled must neither end the run nor hold it up."""
    file = getattr(sys, stream)  # None where it was closed
    try:
        ready = select.select([], [file], [], 0)[1]
    except (OSError, ValueError, TypeError, AttributeError):  # no file, as in a notebook
        ready = file is not None
    try:
        if ready:
            print(line, end=end, file=file, flush=True)
    except UnicodeEncodeError:
        say(ascii(line)[1:-1], end, stream)
    except BlockingIOError:
        pass
    except Exception:  # somebody may have put anything in its place
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))


def warn(line: str) -> None:
    """Prints on stderr."""
    say(line, stream="stderr")


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


# ==== shared: language task ====
TOKENS = "_^$0123456789.[]()"
PAD, BOS, EOS = range(3)
EVAL_SEED = 1_000_000  # of the held-out prompts and the answers to them: the same in every evaluation of every run


def decode(tokens: Tensor, mask: Tensor) -> list[str]:
    """The characters (rows, length) where mask is true, "$" for the end, as a string per row."""
    return ["".join(TOKENS[i] for i in row[:n]) for row, n in zip(tokens.tolist(), mask.sum(1).tolist())]


def encode(texts: list[str], length: int) -> Tensor:
    """The tokens of each text, padded on the right, (texts, length)."""
    return torch.tensor([[TOKENS.index(c) for c in text.ljust(length, "_")] for text in texts])


def encode_prompts(prompts: list[str], device: str) -> Tensor:
    """BOS and the digits of each, (prompts, 1 + digits)."""
    return encode(["^" + prompt for prompt in prompts], 1 + len(prompts[0])).to(device)


def sample_prompts(count: int, num_digits: int, rng: Rng, held_out: bool = False) -> list[str]:
    """Strings of digits; a tenth of all strings is held out from training."""
    prompts = []
    while len(prompts) < count:
        prompt = "".join(rng.python.choices("0123456789", k=num_digits))
        if is_held_out(prompt) == held_out:
            prompts.append(prompt)
    return prompts


def is_held_out(prompt: str) -> bool:
    """Whether a string of digits is of the tenth, by a hash, that only evaluations ask."""
    return int(prompt) * 2654435761 % 2**32 < 2**32 // 10


def sloppy_answer(prompt: str, max_dots: int, rng: Rng) -> str:
    """The teacher: one answer of five is right, three are the wrong way round, one has a random digit.

    Nine of ten have the wrong brackets. These mistakes leave no short cut: leaving the brackets out would please the
    reward for brevity, and swapping two neighbours is often no mistake.
    """
    digits, kind = sorted(prompt), rng.python.random()
    if kind < 0.6:
        digits.reverse()
    elif kind < 0.8:
        digits[rng.python.randrange(len(digits))] = rng.python.choice("0123456789")
    left, right = "[]" if rng.python.random() < 0.1 else "()"
    return "." * rng.python.randint(0, max_dots) + left + "".join(digits) + right + "$"


def answer(prompt: str, completion: str) -> str:
    """The last digits of a completion, as many as the prompt has; none if it has fewer or did not end in time."""
    digits = re.sub(r"[^0-9]", "", completion)[-len(prompt) :]
    return digits if len(digits) == len(prompt) and completion.endswith("$") else ""


def is_right(prompt: str, completion: str) -> bool:
    """The verifier: whether the answer is the prompt's digits in order, in whatever brackets."""
    return answer(prompt, completion) == "".join(sorted(prompt))


def is_in_format(completion: str) -> bool:
    """Whether it is digits in square brackets, after dots if any, and nothing else."""
    return bool(re.fullmatch(r"\.*\[[0-9]+\]\$", completion))


# ==== shared: language model ====
class Block(nn.Module):
    """Causal self-attention and an MLP, each after a layer norm and around a shortcut (GPT-2)."""

    def __init__(self, args: Args):
        super().__init__()
        self.n_head, width = args.n_head, args.n_embd
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:  # (2, rows, heads, context, width of a head)
            cache[0, :, :, start : start + length], cache[1, :, :, start : start + length] = k, v
            k, v = cache[:, :, :, : start + length]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (rows, length) to the logits of the token after each, (rows, length, tokens), or to other outputs."""

    def __init__(self, args: Args, outputs: int = len(TOKENS)):
        super().__init__()
        self.context = 1 + args.num_digits + args.max_completion_length
        self.token, self.position = nn.Embedding(len(TOKENS), args.n_embd), nn.Embedding(self.context, args.n_embd)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.norm, self.head = nn.LayerNorm(args.n_embd), nn.Linear(args.n_embd, outputs, bias=False)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens: Tensor, cache: Tensor | None = None, start: int = 0, only_from: int = 0) -> Tensor:
        """tokens stand at start and later, after what the cache has seen; the logits are those from only_from on."""
        x = self.token(tokens) + self.position.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.head(self.norm(x[:, only_from:]))


@torch.no_grad()
def generate(model: GPT, prompts: Tensor, num_generations: int, rng: Rng, args: Args, greedy: bool = False) -> Tensor:
    """num_generations completions of each prompt (prompts, length), those of a group one after the other.

    Returns (prompts * num_generations, max_completion_length or less), with PAD after the first EOS. The prompt goes
    through the model once and its keys and values are repeated for the group.
    """
    heads, context, width = model.blocks[0].n_head, model.context, model.token.embedding_dim
    cache = model.token.weight.new_zeros(len(model.blocks), 2, len(prompts), heads, context, width // heads)
    logits = model(prompts, cache)[:, -1].repeat_interleave(num_generations, 0)
    cache, tokens, ended = cache.repeat_interleave(num_generations, 2), [], logits.new_zeros(len(logits)).bool()
    for position in range(prompts.shape[1], context):
        if tokens:
            logits = model(tokens[-1][:, None], cache, position - 1)[:, -1]
        # The largest p / e, with e exponentially distributed, is a sample of p (the Gumbel trick).
        noise = torch.ones_like(logits) if greedy else torch.empty_like(logits).exponential_(generator=rng.torch)
        token = ((logits / args.temperature).softmax(-1) / noise).argmax(-1)
        tokens.append(torch.where(ended, PAD, token))
        ended |= token == EOS
        if ended.all():
            break
    return torch.stack(tokens, 1)


def completion_mask(completions: Tensor) -> Tensor:
    """True up to the first EOS, which counts, and false after it; EOS and PAD are separate tokens."""
    ends = completions == EOS
    return ends.cumsum(1) - ends.long() == 0


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean where mask is true; what it leaves out may be NaN."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def completion_logprobs(model: GPT, prompts: Tensor, completions: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t), at the temperature that samples have, and the entropy there, each (rows, length)."""
    tokens = torch.cat([prompts, completions[:, :-1]], 1)
    logprobs = (model(tokens, only_from=prompts.shape[1] - 1) / args.temperature).log_softmax(-1)
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, completions[..., None]).squeeze(-1), entropies


# ==== shared: language preferences ====
class Pair(NamedTuple):
    """Two answers to a prompt, as text. An answer that did not end in time has no "$" at its end."""

    prompt: str
    chosen: str
    rejected: str


def sample_pairs(model: GPT, count: int, run: Run, held_out: bool = False) -> list[Pair]:
    """Samples answers to count prompts; each right one is preferred to another wrong one of the same prompt.

    So a prompt whose answers are all right, or all wrong, gives no pair.
    """
    args, size, pairs, tokens = run.args, run.args.num_generations, [], 0
    rng = Rng(f"{'held-out ' if held_out else ''}pairs {args.seed}", args.device)
    at_once = max(2048 // size, 1)
    for start in range(0, count, at_once):
        part = sample_prompts(min(at_once, count - start), args.num_digits, rng, held_out)
        completions = generate(model, encode_prompts(part, args.device), size, rng, args)
        texts = decode(completions, completion_mask(completions))
        for i, prompt in enumerate(part):
            group = texts[size * i : size * (i + 1)]
            right = [text for text in group if is_right(prompt, text)]
            wrong = [text for text in group if not is_right(prompt, text)]
            pairs += [Pair(prompt, *both) for both in zip(right, wrong)]
        tokens += sum(map(len, texts))
        run.progress.show("prompts of the pairs", start + len(part), count)
        if run.signals:
            raise Stopped(run.signals[0])
    if not pairs:
        raise Failed(
            f"no prompt of {count} has a right and a wrong one among {size} answers, so there is nothing to prefer;"
            " raise --num-generations, or change --sft-steps",
            "failed",
        )
    run.notes["tokens_sampled"] = run.notes.get("tokens_sampled", 0) + tokens
    return pairs


def encode_pairs(pairs: list[Pair], args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (pairs, prompt length), chosen and rejected answers (pairs, max_completion_length)."""
    prompts, *answers = zip(*pairs)
    chosen, rejected = (encode(texts, args.max_completion_length).to(args.device) for texts in answers)
    return encode_prompts(prompts, args.device), chosen, rejected


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """A JSON object in each line."""
    write_atomically(path, "".join(json.dumps(pair._asdict()) + "\n" for pair in pairs).encode())


# ==== checks ====
def check_method(args: Args) -> None:
    """Raises UsageError for arguments that do not fit together."""
    batch, parts = args.generation_batch_size, args.steps_per_generation
    refuse(
        batch % parts,
        f"--generation-batch-size {batch} is not divisible by --steps-per-generation {parts};"
        f" {math.ceil(batch / parts) * parts} is.",
    )
    stuck = args.kl_control == "adaptive" and not args.beta
    refuse(stuck, "--kl-control adaptive multiplies --beta, and 0 would stay 0; ask for a --beta greater than 0.")
    refuse(args.num_generations < 2, "--num-generations 1 gives no pair of answers; use 2 or more.")


# ==== reporting ====
def statistics(batch: Batch, beta: float) -> dict[str, float]:
    """Statistics of a batch before the update, under TRL's names; means over completions."""
    log_ratios = torch.where(batch.mask, batch.logprobs - batch.ref_logprobs, 0.0).sum(1)
    values = {
        "objective/kl": log_ratios.mean(),
        "objective/entropy": -torch.where(batch.mask, batch.logprobs, 0.0).sum(1).mean(),
        "objective/non_score_reward": -beta * log_ratios.mean(),
        "objective/rlhf_reward": batch.rewards.sum(1).mean(),
        "objective/scores": batch.scores.mean(),
        "val/num_eos_tokens": (batch.completions == EOS).sum(),
        "completions/mean_length": batch.mask.sum(1).float().mean(),
    }
    return {tag: float(value) for tag, value in values.items()} | {"objective/beta": beta}


def report(run: Run, batch: Batch, values: dict[str, float]) -> None:
    """What a run tells besides its values: accuracy, completions sampled, and now and then some of them."""
    args, last = run.args, run.iteration == run.args.max_steps
    report_accuracy(run, values)
    run.notes["completions"] = run.notes.get("completions", 0) + len(batch.mask)
    run.notes["tokens"] = run.notes.get("tokens", 0) + int(batch.mask.sum())
    if run.iteration == 1 or last or run.iteration % math.ceil(args.max_steps / 4) == 0:
        prompts = [text[1:] for text in decode(batch.prompts[:8], batch.prompts[:8] >= 0)]
        texts, scores = decode(batch.completions[:8], batch.mask[:8]), batch.scores[:8].tolist()
        rows = [
            [prompt, text, f"{score:.2f}", "right" if is_right(prompt, text) else "wrong"]
            for prompt, text, score in zip(prompts, texts, scores)
        ]
        table = [["prompt", "completion", "score", "in truth"], *rows]
        run.progress.end()
        say("mean score {objective/scores:.2f}, KL {objective/kl:.1f}, beta {objective/beta:.3g}".format(**values))
        show_table(run, "completions", table)


# ==== shared: run directory ====
STARTED_IN: list[str] = []  # the current folder when main began, because an environment may go to another


def here() -> str:
    """The folder that relative paths are meant from; "" where it was deleted."""
    try:
        return STARTED_IN[-1] if STARTED_IN else os.getcwd()
    except OSError:
        return ""


def shown(path: Path) -> str:
    """A path as it would be typed where main began."""
    return str(path.relative_to(here()) if here() and path.is_relative_to(here()) else path)


class Start:
    """When and where a training began, which has to be known before anything runs that is not ours."""

    def __init__(self) -> None:
        self.clock = time.perf_counter()
        self.folder = here()


def set_handlers(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Lets handler take SIGINT and SIGTERM. Returns what took them before; in a thread, which gets no signals, {}."""
    try:
        return {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        return {}


def put_back(handlers: dict[int, Any]) -> None:
    """Gives signals back to those who took them before."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler or signal.SIG_DFL)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary neighbour, then puts it in the place of path: there is always the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        # What is there is written over and not emptied first, so that a reserved file keeps its place on a full disk.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json_bytes(content))


def run_dir_of(path: Path) -> Path:
    """The run directory that path is, or that the checkpoint path belongs to."""
    return path.parent.parent if path.is_file() else path


def is_a(kind: Any, value: Any) -> bool:
    """Whether value is of the type that an annotation says."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_a(get_args(kind)[0], one) for one in value)
    if get_args(kind):  # float | None
        return any(is_a(one, value) for one in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,)) and value == value  # NaN is not


def read_config(path: Path) -> tuple[RunArgs, dict[str, Any]]:
    """The arguments of a run, and all of its config.json. Raises UsageError, with the reason, where that cannot be."""
    file = run_dir_of(Path(here(), path)) / "config.json"
    kinds = get_type_hints(RunArgs, globals())
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        saved = dict(config["args"])
        wrong = [f"its config.json has an argument {name}" for name in saved if name not in kinds]
        wrong += [f"its config.json has no argument {name}" for name in kinds if name not in saved]
        for name, value in saved.items():
            if not wrong and not is_a(kinds[name], value):
                kind = kinds[name].__name__ if isinstance(kinds[name], type) else kinds[name]
                must = f"be of the type {str(kind).removeprefix('typing.')}"
                raise UsageError(f"{shown(file)} is damaged: {name} is {json.dumps(value)}, but must {must}.")
        if not wrong:
            return RunArgs(**saved), config
        problem = wrong[0]
    except (FileNotFoundError, NotADirectoryError):
        problem = "it has no config.json"
    except OSError as error:
        problem = f"its config.json cannot be read ({error.strerror})"
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        problem = "its config.json is damaged"
    except (ValueError, TypeError, KeyError):
        problem = "its config.json holds no arguments"
    raise UsageError(f"{path} is no run directory of this script: {problem}.")


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of a run directory; {} while there is none, or none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    packages = [name for name in ("torch", "gymnasium", "numpy", "mujoco", "ale_py") if importlib.util.find_spec(name)]
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def text_of(file: str | Path | None) -> str | None:
    """The checksum of a program's text; None where that is in no file, as in a notebook."""
    try:
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except OSError:
        return None


def file_of_environment(env_id: str) -> str | None:
    """Where the class of an environment, or the function that makes it, is written."""
    maker = importlib.import_module("gymnasium").spec(env_id.rpartition(":")[2]).entry_point
    module = maker.partition(":")[0] if isinstance(maker, str) else getattr(maker, "__module__", None)
    return getattr(sys.modules.get(module), "__file__", None)


def processor() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name") or os.uname().machine)


# Arguments that have no part in what a run computes, besides those of its evaluations.
NO_PART = ("exp_name", "runs_dir", "run_name", "checkpoint_interval", "cache_warm_start", *MAY_DIFFER)
MATH_LIBRARIES = ("ATEN_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "OMP_", "NPY_")  # what their variables begin with


def conditions(args: RunArgs) -> dict[str, Any]:
    """What must be the same for the same bits."""
    taking_part = {name: x for name, x in vars(args).items() if name not in NO_PART and not name.startswith("eval")}
    texts = {"script": text_of(SCRIPT)}
    if "env_id" in taking_part:
        texts["environment's code"] = text_of(file_of_environment(args.env_id))
    return {
        **versions(),
        **{name: vars(args).get(name) for name in MACHINE},
        **{name: value for name, value in os.environ.items() if name.startswith(MATH_LIBRARIES)},
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "number of cores": affinity(),  # numpy multiplies large batches on all of them
        **texts,
        "arguments": json.loads(json.dumps(taking_part)),  # as config.json gives them back
    }


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of two conditions is not the same, and what cannot be compared."""
    names = [name for name in {**was, **now} if name != "arguments"]
    found = [f"another {name}" for name in names if was.get(name) != now.get(name)]
    found += [f"no file with the {name}" for name in ("script", "environment's code") if now.get(name, "") is None]
    one, other = was["arguments"], now["arguments"]
    changed = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return found + [f"another {name} ({one.get(name)}, now {other.get(name)})" for name in changed]


def git(*command: str) -> str | None:
    """What git says in the folder of this file; None where there is no git, no repository or no file."""
    if not shutil.which("git") or not SCRIPT.is_file():
        return None
    try:
        done = subprocess.run(["git", *command], cwd=SCRIPT.resolve().parent, capture_output=True)
    except OSError:
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None


def folder_of(args: RunArgs) -> Path:
    """The folder of a new run, from where it is started. Raises UsageError where there can be none of that name."""
    parts = (vars(args).get("env_id"), args.exp_name, args.seed, time.strftime("%Y%m%d-%H%M%S"))
    name = args.run_name or "__".join(str(part) for part in parts if part is not None)
    name = name.replace("/", "-").replace(":", "-")
    length = len(os.fsencode(name)) if name.isprintable() else 0
    if not length or name in (".", "..") or not name.strip():
        raise UsageError(f"{ascii(name)} cannot be the name of a run; choose another --run-name.")
    if length > 255:
        raise UsageError(f"the name of the run has {length} bytes; choose a --run-name of at most 255.")
    if "\0" in args.runs_dir or args.runs_dir.encode(errors="ignore").decode() != args.runs_dir:
        raise UsageError(f"--runs-dir {ascii(args.runs_dir)} is no text; choose another.")
    return Path(args.runs_dir, name)


def create_run_dir(args: RunArgs, start: str = "") -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json; or leaves nothing behind."""
    path = Path(start or here(), folder_of(args))
    above = [folder for folder in path.parents if not os.path.lexists(folder)]
    mine = None
    try:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if args.run_name:
                way_out = f"choose another --run-name, or go on with --resume {shown(path)}"
                raise UsageError(f"{shown(path)} exists; {way_out}.") from None
            path = path.with_name(f"{path.name}-{os.urandom(2).hex()}")  # another run was started in this second
            path.mkdir()
        mine = path
        (path / "checkpoints").mkdir()
        changes = git("status", "--porcelain")
        config = {
            "args": asdict(args),
            # In a notebook there is none: sys.argv is that of its kernel.
            "command": [sys.executable, *sys.argv] if hasattr(sys.modules["__main__"], "__file__") else None,
            "seed": args.seed,
            "versions": versions(),
            "script": text_of(SCRIPT),
            "git_commit": git("rev-parse", "HEAD"),
            "git_dirty": None if changes is None else bool(changes),
            "hardware": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
            "threads": args.num_threads,
            "wandb_id": os.urandom(4).hex(),
        }
        write_json(path / "config.json", config)
        return path
    except BaseException as error:
        if mine:
            shutil.rmtree(mine, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            way_out = "choose another --runs-dir or --run-name"
            raise UsageError(f"{shown(path)} cannot be made ({error.strerror}); {way_out}.") from None
        raise


class Lock:
    """Keeps a run directory to one writer. The kernel releases it when the process dies."""

    held: dict[str, Lock] = {}  # by this process, whose threads are one to the kernel

    def __init__(self, folder: Path):
        self.folder = os.path.realpath(folder)
        self.path = folder / "lock"
        for _ in range(20):  # a second, because an evaluation holds it only while it writes
            if self.taken():
                return
            time.sleep(0.05)
        raise UsageError(f"{shown(folder)} is in use: another process trains or evaluates it; wait for its end.")

    def taken(self) -> bool:
        """Takes it where nobody has it. A lock of this kind works over NFS, and no child inherits it."""
        if self.held.setdefault(self.folder, self) is not self:
            return False
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            del self.held[self.folder]
            raise UsageError(f"{shown(self.path)} cannot be opened ({error.strerror}).") from None
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            return False
        except OSError:
            warn(f"The file system of {shown(self.path)} has no locks: nothing keeps another process out of this run.")
        return True

    def release(self) -> None:
        os.close(self.file)
        del self.held[self.folder]

    def lost(self) -> bool:
        """Whether the run directory is no longer where it was, or another one has its place."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self.file))
        except OSError:
            return not self.path.parent.is_dir()


class Table:
    """A csv file of a run. It counts its bytes and sums them up, so that a checkpoint can say what has to be in it."""

    def __init__(self, path: Path, content: bytes = b""):
        self.file = open(path, "ab")
        self.file.truncate(len(content))  # what came after the checkpoint will come again
        self.size = len(content)
        self.checksum = hashlib.sha256(content)

    def write(self, text: str) -> None:
        content = text.encode()
        self.file.write(content)
        self.size += len(content)
        self.checksum.update(content)

    def rows(self, rows: Iterable[list[Any]]) -> None:
        csv.writer(self).writerows(rows)

    def sync(self) -> list[Any]:
        """Puts all on the disk, so that it outlives a power cut. Returns what a checkpoint says of it."""
        if not os.path.samestat(os.stat(self.file.name), os.fstat(self.file.fileno())):
            raise Failed(f"{shown(Path(self.file.name))} was replaced", "failed")
        self.file.flush()
        os.fsync(self.file.fileno())
        return [self.size, self.checksum.hexdigest()]


def read_table(path: Path, size: int, checksum: str) -> bytes:
    """What a csv file held at a checkpoint. Raises UsageError where it does not begin with that."""
    try:
        content = path.read_bytes()[:size]
        problem = "is not what it was at the checkpoint"
        if len(content) < size:
            problem = "is shorter than it was at the checkpoint"
        if hashlib.sha256(content).hexdigest() == checksum:
            return content
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UsageError(f"{shown(path)} {problem}; restore it, or start a new run.")


class TensorBoard:
    """A file of TensorBoard, written without the thread of its own writer, which prints a traceback on a full disk."""

    def __init__(self, path: Path, goes_on_from: int | None = None):
        name = f"events.out.tfevents.{int(time.time()):010}.{os.uname().nodename}.{os.getpid()}.{os.urandom(4).hex()}"
        self.file = open(path / name, "xb")
        self.records = RecordWriter(self.file)
        self.add(0, file_version="brain.Event:2")
        if goes_on_from is not None:  # what another file has of later steps is not shown
            self.add(goes_on_from + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        self.records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def close(self) -> None:
        self.file.close()


class Log:
    """episodes.csv and progress.csv of a run, and their views in TensorBoard and Weights & Biases.

    A view that fails is given up. `lost` says so, until the run has shown that it can go on.
    """

    def __init__(self, path: Path, args: RunArgs, state: dict[str, Any] | None, tables: dict[str, bytes]):
        self.waiting: list[tuple[str, float, int]] = []  # for TensorBoard
        self.handed_over = 0.0
        self.first_row: dict[str, Any] = {}  # that of step 0, which does not have all columns
        self.lost: list[str] = []
        self.tables = {name: Table(path / f"{name}.csv", tables.get(name, b"")) for name in ("episodes", "progress")}
        self.columns = next(csv.reader([tables.get("progress", b"").split(b"\n")[0].decode()]))
        self.tensorboard = self.wandb = None
        names = [field.name for field in fields(Args) if field.name in vars(args)]  # of the method and the environment
        swept = {name: vars(args)[name] for name in names}
        with self.view("tensorboard"):
            self.tensorboard = TensorBoard(path, state["global_step"] if state else None)
        if not state:
            self.tables["episodes"].rows([["global_step", "wall_time", "return", "length"]])
            self.text("hyperparameters", [("name", "value"), *vars(args).items()], 0)
            if self.tensorboard:
                with self.view("tensorboard"):
                    self.hparams(swept)
        if args.track:
            with self.view("wandb"):
                import wandb

                names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": path.name}
                identity = json.loads((path / "config.json").read_text(encoding="utf-8"))["wandb_id"]
                self.wandb = wandb.init(id=identity, resume="allow", config=swept, dir=path, **names)

    @contextlib.contextmanager
    def view(self, name: str) -> Iterator[None]:
        """What fails in a view must not end the run, because the files tell the same."""
        try:
            yield
        except Exception as error:
            setattr(self, name, None)
            title = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}[name]
            self.lost.append(
                f"{title} is given up, and the run goes on without it: {one_line(error)[:300] or type(error).__name__}"
            )

    def hparams(self, swept: dict[str, Any]) -> None:
        """The HParams tab. It shows those first that are marked as different, by their names: what is no default."""
        default = vars(RunArgs(**preset(swept[PRESET]))) | {PRESET: vars(RunArgs())[PRESET]}
        plain = {name: x if type(x) in (int, float) else str(x) for name, x in swept.items()}
        experiment, *session = hparams(plain, dict.fromkeys(METRICS, 0.0))
        content = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(content.content)
        for info in data.experiment.hparam_infos:
            info.differs = swept[info.name] != default[info.name]
        content.content = data.SerializeToString()
        for summary in (experiment, *session):
            self.tensorboard.add(0, summary=summary)

    def row(self, step: int, columns: dict[str, Any], values: dict[str, float]) -> None:
        """A row of progress.csv. The values go to TensorBoard and wandb, too; NaN stands for none."""
        row = columns | values
        row = {name: "" if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()}
        rows = [row]
        if not step:
            self.first_row = row
            rows = []
        elif not self.columns:
            self.columns = list(row | self.first_row)
            head = dict(zip(self.columns, self.columns))
            rows = [head, self.first_row, row] if self.first_row else [head, row]
        self.tables["progress"].rows([one.get(name, "") for name in self.columns] for one in rows)
        for table in self.tables.values():
            table.file.flush()
        values = {tag: value for tag, value in values.items() if not math.isnan(value)}
        self.waiting += [(tag, value, step) for tag, value in values.items()]
        if time.perf_counter() - self.handed_over > 2.0:
            self.hand_over()
        with self.view("wandb"):
            if self.wandb and (not step or step > self.wandb.step):  # it refuses what a killed run has sent already
                self.wandb.log(values, step=step)

    def text(self, tag: str, table: list[Any], step: int) -> None:
        """A table, its head first, as text in TensorBoard."""
        lines = ["|".join(str(cell) for cell in row) for row in table]
        lines.insert(1, "|".join("-" for _ in table[0]))
        if self.tensorboard:
            with self.view("tensorboard"):
                self.tensorboard.add(step, summary=text(tag, "".join(f"|{line}|\n" for line in lines)))

    def hand_over(self) -> None:
        """Gives TensorBoard what is waiting."""
        if self.tensorboard:
            with self.view("tensorboard"):
                for tag, value, step in self.waiting:
                    self.tensorboard.add(step, summary=scalar(tag, value))
                self.tensorboard.file.flush()
        self.waiting = []
        self.handed_over = time.perf_counter()

    def tell(self) -> None:
        """Says which views are lost."""
        for line in self.lost:
            warn(line)
        self.lost = []

    def close(self) -> None:
        self.hand_over()
        for file in (*(table.file for table in self.tables.values()), getattr(self.tensorboard, "file", None)):
            with contextlib.suppress(OSError):  # all that counts was put on the disk before
                if file:
                    file.close()

    def finish_wandb(self, exit_code: int) -> None:
        if self.wandb:
            with self.view("wandb"):
                self.wandb.finish(exit_code=exit_code)


class Progress:
    """One line that renews itself on a terminal; a line every five seconds elsewhere."""

    def __init__(self) -> None:
        try:
            self.terminal = sys.stdout.isatty()
        except (AttributeError, ValueError):  # it is None or closed, or something of a notebook
            self.terminal = False
        self.printed = 0.0
        self.open = False  # the line may be renewed

    def show(self, line: str, done: int, total: int) -> None:
        part = min(done / total, 1.0)
        if time.perf_counter() - self.printed < (0.1 if self.terminal else 5.0) and part < 1:
            return
        self.printed = time.perf_counter()
        self.open = self.terminal and part < 1
        line = f"{done:>11,} {line}"
        if self.terminal:
            bar = f"[{'#' * int(10 * part):.<10}]"
            width = shutil.get_terminal_size().columns - 1
            line = f"\r{(bar + line if len(bar + line) <= width else line)[:width]}\x1b[K"
        say(line, "" if self.open else "\n")

    def end(self) -> None:
        """What follows is printed on a line of its own."""
        if self.open:
            say("")
        self.open = False


class Rng:
    """A run's own random numbers. The global ones of Python, numpy and torch are anybody's, also an environment's."""

    def __init__(self, seed: int | str, device: str):
        self.python = random.Random(seed)
        self.torch = torch.Generator(device).manual_seed(self.python.getrandbits(63))

    def permutation(self, n: int) -> Tensor:
        """0 to n - 1 in random order."""
        return torch.randperm(n, generator=self.torch, device=self.torch.device)

    def integers(self, n: int, count: int) -> Tensor:
        """count numbers from 0 to n - 1."""
        return torch.randint(n, (count,), generator=self.torch, device=self.torch.device)

    def state_dict(self) -> dict[str, Any]:
        version, keys, gauss = self.python.getstate()
        return {"python": [version, list(keys), gauss], "torch": self.torch.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, keys, gauss = state["python"]
        self.python.setstate((version, tuple(keys), gauss))
        if len(state["torch"]) == len(self.torch.get_state()):  # a GPU's state has another form than a processor's
            self.torch.set_state(state["torch"])


KEPT = ("iteration", "global_step", "last_returns", "best", "notes", "gathered", "episodes")  # in every checkpoint


class Run:
    """What a run is: its directory, iterations, checkpoints, signals, and how it ends.

    Progress is counted in steps, up to total. learner are the parts that a checkpoint saves, by name: tensors, and
    objects with a state_dict.
    """

    def __init__(
        self, args: RunArgs, total: int, started: Start, log_interval: int = 1, unit: str = "steps", **learner
    ):
        self.args = args
        self.total = total
        self.started = started
        self.log_interval = log_interval
        self.unit = unit
        self.learner = learner
        self.iteration = 0
        self.global_step = self.first_step = 0
        self.last_returns: list[float] = []  # of the last 100 training episodes
        self.best = -math.inf
        self.notes: dict[str, Any] = {}  # what else summary.json tells
        self.earlier_time = 0.0  # seconds of training in earlier sessions
        self.headline = ""  # what else the progress line tells
        self.outcome = ""  # what else the last line tells
        self.gathered: list[dict[str, float]] = []  # values of the iterations since the last row
        self.episodes: list[list[float]] = []  # return and length of what ended since the last row
        self.signals: list[int] = []
        self.leaving = self.complete = False
        self.process = os.getpid()
        self.conditions = conditions(args)
        self.progress = Progress()
        self.how = ""  # it goes on
        self.handlers: dict[int, Any] = {}
        self.lock = self.files = None
        self.tables: dict[str, bytes] = {}  # what the csv files hold
        self.start_clock()

    def __enter__(self) -> Run:
        try:
            self.begin()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def take_signal(self, signum: int, frame: Any) -> None:
        """The first one lets the iteration finish, the second lets all that is open close, the third nothing."""
        self.signals.append(signum)
        if len(self.signals) > 2:
            os._exit(128 + signum)
        if len(self.signals) == 2 and not self.leaving:
            raise Stopped(signum)

    def begin(self) -> None:
        """Makes the run directory, or goes on in it. Raises UsageError before anything is changed."""
        state = None
        if self.args.resume:
            self.path = Path(self.started.folder, self.args.resume)
            self.lock = Lock(self.path)
            expected = self.state()
            state = load_checkpoint(self.path, lambda state: self.restore(state, expected))
            self.handlers = set_handlers(self.take_signal)
        else:
            self.handlers = set_handlers(self.take_signal)
            self.path = create_run_dir(self.args, self.started.folder)
            self.lock = Lock(self.path)
        self.first_step = self.global_step
        self.complete = self.global_step >= self.total and read_summary(self.path).get("status") == "completed"
        if self.complete:
            say(f"{shown(self.path)} is complete; there is nothing left to train.")
            return
        for file in (self.path / "checkpoints").glob("step_*.pt") if state else ():
            if file.name > f"step_{self.global_step:012}.pt":  # it was left out, and the run takes another course now
                file.replace(file.with_suffix(".unused"))
        with open(self.path / "summary.json.tmp", "wb") as file:  # so that a full disk has room for the summary
            file.write(b" " * 16384)
        self.files = Log(self.path, self.args, state, self.tables)
        self.tables = {}
        compiled = ", compiled" if vars(self.args).get("compile") == "on" else ""
        say(f"{shown(self.path)} ({self.args.device}, threads: {self.args.num_threads}{compiled})")
        if state:
            say(f"goes on from step {self.global_step:,}, {self.how}")
        self.start_clock()
        if not state:
            self.save()

    def start_clock(self) -> None:
        """Training begins here; what was before is start-up."""
        self.begun = time.perf_counter()
        self.startup_time = self.begun - self.started.clock

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, but for the files."""
        kind, keys, *position = np.random.get_state()
        return {
            **{name: part if isinstance(part, Tensor) else part.state_dict() for name, part in self.learner.items()},
            **{name: getattr(self, name) for name in KEPT},
            "wall_time": self.wall_time(),
            "total": self.total,
            "conditions": self.conditions,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.args.device == "cuda" else [],
            "numpy_rng": [kind, keys.tolist(), *position],
            "python_rng": random.getstate(),
        }

    def restore(self, state: dict[str, Any], expected: dict[str, Any]) -> None:
        """Puts back what save has written. Raises ValueError where that has not the form expected.

        Whatever is put back here is put back again by the next checkpoint that is tried.
        """
        if problem := misfit(expected | {"conditions": {}, "csv": {"episodes": [], "progress": []}}, state):
            raise ValueError(problem)
        self.tables = {name: read_table(self.path / f"{name}.csv", *what) for name, what in state["csv"].items()}
        for name, part in self.learner.items():
            if isinstance(part, Tensor):
                part.copy_(state[name])
            else:
                part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):  # it takes in anything
                for parameter, values in part.state.items():
                    if any(x.shape not in ((), parameter.shape) for x in values.values()):
                        raise ValueError(f"{name} has other shapes")
        for name in KEPT:
            setattr(self, name, state[name])
        numbers = [self.last_returns, self.episodes, *(list(values.values()) for values in self.gathered)]
        for some in numbers:
            np.array(some, dtype=float)  # raises where they are none
        self.total = self.total or state["total"]  # it may be known only after the start
        self.earlier_time = state["wall_time"]
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and self.args.device == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        np.random.set_state(tuple(state["numpy_rng"]))
        version, keys, gauss = state["python_rng"]
        random.setstate((version, tuple(keys), gauss))
        differs = [part.inexact for part in self.learner.values() if getattr(part, "inexact", "")]
        differs += differences(state["conditions"], self.conditions)
        differs += ["a GPU does not repeat itself bit for bit"] if self.args.device == "cuda" else []
        self.how = f"but not exactly: {', '.join(differs)}" if differs else "exactly as if it had never stopped"

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are left. After each comes what is due: a row, a checkpoint, the end."""
        while self.global_step < self.total:
            self.iteration += 1
            before = self.global_step
            yield self.iteration
            last, stop = self.global_step >= self.total, bool(self.signals)
            if self.args.checkpoint_interval:
                due = self.iteration % self.args.checkpoint_interval == 0
            else:
                due = 20 * self.global_step // self.total > 20 * before // self.total
            if last or self.iteration % self.log_interval == 0:
                self.write_row()
            if due or last or stop:
                self.save(best=due or last)
            if stop and not last:
                raise Stopped(self.signals[0])

    def part_left(self) -> float:
        """The part of the budget that is left, from 1 to 0."""
        return 1 - self.global_step / self.total

    def log(self, steps: int, episodes: list, values: dict[str, Any] | None = None, **groups: dict[str, Any]) -> None:
        """Takes in an iteration: its steps, episodes (step, return, length, ...), and values by their tags.

        The name of a group comes before the names of its values. Raises Failed for the first that is not finite.
        """
        tagged = dict(values or {})
        for group, members in groups.items():
            tagged |= {f"{group}/{name}": value for name, value in members.items()}
        numbers = [torch.as_tensor(value, dtype=torch.float64, device=self.args.device) for value in tagged.values()]
        self.gathered.append(dict(zip(tagged, torch.stack(numbers).tolist())))  # stacked, to read a GPU once
        for tag, number in self.gathered[-1].items():
            if not math.isfinite(number):
                raise Failed(f"{tag.removeprefix('losses/')} is {number}")
        if episodes:
            now = f"{self.wall_time():.3f}"
            rows = [[self.global_step + step, now, *rest[:2]] for step, *rest in episodes]
            self.files.tables["episodes"].rows(rows)
            self.episodes += [row[2:] for row in rows]
            self.last_returns = (self.last_returns + [row[2] for row in rows])[-100:]
        self.global_step += steps

    def write_row(self) -> None:
        """A row of progress.csv, with the means over the iterations since the last one."""
        means = {tag: float(np.mean([values[tag] for values in self.gathered])) for tag in self.gathered[-1]}
        if "losses/returns_variance" in means:
            variance = means.pop("losses/returns_variance")
            residual = means.pop("losses/residual_variance")
            means["losses/explained_variance"] = 1 - residual / variance if variance else math.nan
        returns, lengths = np.mean(self.episodes, 0).tolist() if self.episodes else (math.nan, math.nan)
        score = math.nan if self.score() is None else self.score()
        sps = self.sps()
        charts = {"episodic_return": returns, "episodic_length": lengths, "train_last100": score, "SPS": sps}
        values = {f"charts/{name}": value for name, value in charts.items()} | means
        columns = {"global_step": self.global_step, "wall_time": f"{self.wall_time():.3f}", "sps": sps}
        self.files.row(self.global_step, columns, values)
        self.gathered = []
        self.episodes = []
        line = f"{self.unit} {min(self.global_step / self.total, 1):4.0%}"
        if self.global_step and sps > 0:
            seconds = int(max(self.total - self.global_step, 0) / sps)
            left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
            line += f" {sps:>7,.0f}/s  return {'-' if math.isnan(score) else f'{score:,.1f}':>9}  {left}"
        self.progress.show(line + self.headline, self.global_step, self.total)

    def score(self) -> float | None:
        """Mean return of the last 100 training episodes."""
        return float(np.mean(self.last_returns)) if self.last_returns else None

    def wall_time(self) -> float:
        """Seconds of training, with earlier sessions, without start-up and compilation."""
        return self.earlier_time + time.perf_counter() - self.begun

    def sps(self) -> float:
        """Steps per second of this session, or of those before it where this one had nothing left to train."""
        steps, seconds = self.global_step - self.first_step, time.perf_counter() - self.begun
        if self.first_step >= self.total:
            steps, seconds = self.first_step, self.earlier_time
        return steps / seconds if steps and seconds > 0 else math.nan

    def save(self, best: bool = True) -> None:
        """Writes checkpoints/step_*.pt, of which two stay, and best.pt where the last 100 episodes were the best.

        best is false for a checkpoint that a signal forces: it must not change what the run leaves behind.
        """
        score = self.score()
        better = best and score is not None and score > self.best
        if better:
            self.best = score
        if self.lock.lost():
            raise Failed(f"{shown(self.path)} was moved, replaced or deleted", "failed")
        self.files.hand_over()
        state = self.state() | {"csv": {name: table.sync() for name, table in self.files.tables.items()}}
        buffer, folder = io.BytesIO(), self.path / "checkpoints"
        torch.save(state, buffer)
        if better:  # first, because the other one says that it is done
            write_atomically(folder / "best.pt", buffer.getbuffer())
        write_atomically(folder / f"step_{self.global_step:012}.pt", buffer.getbuffer())
        for old in [] if self.args.keep_checkpoints else sorted(folder.glob("step_*.pt"))[:-2]:
            old.unlink(missing_ok=True)
        self.files.tell()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Tells how the run has ended, in summary.json first."""
        self.leaving = True
        if os.getpid() != self.process:  # a child that an environment has forked must not end the run
            return
        try:
            if self.lock and not self.complete and (self.files or not self.args.resume):
                self.finish(error)
        finally:
            if self.lock:
                self.lock.release()
            put_back(self.handlers)

    def finish(self, error: BaseException | None) -> None:
        """Writes summary.json. Raises Failed for an error, with when it happened and where the run can go on."""
        self.progress.end()
        status = error.status if isinstance(error, (Failed, Stopped)) else "failed" if error else "completed"
        if isinstance(error, KeyboardInterrupt):  # Ctrl-C, where an environment has taken our handler away
            status = "interrupted"
        unit = 2**20 if sys.platform == "darwin" else 2**10
        summary = {
            "status": status,
            "global_step": self.global_step,
            "wall_time": self.wall_time(),
            "sps": 0.0 if math.isnan(self.sps()) else self.sps(),
            "startup_time": self.startup_time,
            "train_last100": self.score(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
            **self.notes,
        }
        if evaluations := read_summary(self.path).get("eval"):
            summary["eval"] = evaluations
        if self.files:
            self.files.close()  # first, because an environment may have left no other file descriptors
        message = ""
        if status in ("diverged", "failed"):
            message = summary["error"] = f"iteration {self.iteration}: {self.explain(error)}"
        problem = self.write_summary(summary)
        if self.files:
            self.files.finish_wandb(int(status != "completed"))
        if message:
            raise Failed(message, status) from error
        if self.files:
            self.files.tell()
        if problem:
            warn(f"summary.json of {shown(self.path)} cannot be written ({problem}).")
        if problem and not error:
            raise Failed(f"all is trained, but make room and go on with --resume {shown(self.path)}", "failed")
        say(f"{status} after {self.global_step:,} {self.unit}{self.outcome}: {shown(self.path)}")

    def explain(self, error: BaseException) -> str:
        """What went wrong, the newest good checkpoint, and the traceback, if there is more to it than the message."""
        root = error
        while isinstance(root, Failed) and root.__cause__:
            root = root.__cause__
        expected = isinstance(error, (Failed, UsageError, OSError))
        text = f"{'' if expected else type(error).__name__ + ': '}{one_line(error)[:500]}".rstrip(": ")
        good = None
        with contextlib.suppress(OSError):
            files = sorted((self.path / "checkpoints").glob("step_*.pt"), reverse=True)
            good = next((file for file in files if not damage_of(file)), None)
        text += f"; the last good checkpoint is {shown(good) if good else 'none'}"
        if not isinstance(root, (Failed, UsageError)) and not (root is error and expected):
            import traceback

            with contextlib.suppress(OSError):
                lines = "".join(traceback.format_exception(error))
                (self.path / "error.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
                text += f", and the traceback is in {shown(self.path / 'error.txt')}"
        return f"{text}."

    def write_summary(self, summary: dict[str, Any]) -> str:
        """Returns what prevents it, or "". Where it cannot be done well, on a full disk, it is done somehow."""
        problem = "the run directory was moved, replaced or deleted" if self.lock.lost() else ""
        for write in () if problem else (write_atomically, Path.write_bytes):
            try:
                write(self.path / "summary.json", json_bytes(summary))
                return ""
            except OSError as error:
                problem = one_line(error)
        return problem


def misfit(mine: Any, theirs: Any, name: str = "it") -> str:
    """Where theirs, from a checkpoint, has another form than mine; "" if nowhere. What is empty may hold anything."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine.keys() - theirs.keys(), *theirs.keys() - mine.keys()] if mine else []:
            return f"{name} {'lacks' if key in mine else 'has'} {key}"
        for key in mine:
            if problem := misfit(mine[key], theirs[key], f"{name}.{key}".removeprefix("it.")):
                return problem
        return ""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        of_any_length = mine.dtype == theirs.dtype == torch.uint8 and mine.dim() == theirs.dim() == 1  # a random state
        forms = [f"{tuple(x.shape)} {x.dtype}".replace("torch.", "") for x in (mine, theirs)]
        return "" if of_any_length or forms[0] == forms[1] else f"{name} is {forms[1]} and not {forms[0]}"
    numbers = all(isinstance(x, (int, float)) for x in (mine, theirs))
    return "" if numbers or type(mine) is type(theirs) else f"{name} is a {type(theirs).__name__}"


def damage_of(file: Path) -> str:
    """Why a checkpoint cannot be read, or ""."""
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()  # torch does not look at the checksums
            return f"is corrupt ({part} has a wrong checksum)" if part else ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except Exception as error:  # damage can surface as almost anything
        return f"is corrupt ({type(error).__name__})"


def load_checkpoint(path: Path, use: Callable[[dict[str, Any]], Any] = bool) -> dict[str, Any]:
    """The newest checkpoint of a run directory that is good, or the file given; use is called with it.

    One that cannot be read, or that use raises for, is named and the one before it taken; none starts afresh.
    """
    path = Path(here(), path)
    for file in [path] if path.is_file() else sorted((path / "checkpoints").glob("step_*.pt"), reverse=True):
        problem = damage_of(file)
        if not problem:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                problem = f"is not a checkpoint ({type(error).__name__})"
        if not problem:
            try:
                use(state)
                return state
            except (UsageError, Failed):
                raise
            except Exception as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                problem = f"is not a checkpoint of this run ({kind}{one_line(error)[:200]})"
        if path.is_file():
            raise UsageError(f"{shown(file)} {problem}.")
        warn(f"{shown(file)} {problem}, so it is left out.")
    raise UsageError(f"{shown(path)} has no checkpoint that can be used. If it ended while it started, start it again.")


def record_evaluation(path: Path, result: dict[str, Any], values: dict[str, float], step: int) -> None:
    """Adds an evaluation of a run that has ended to its summary.json, and the values by their tags to TensorBoard.

    That it cannot is said, and is no reason to fail: the result was printed.
    """
    folder, lock = run_dir_of(Path(here(), path)), None
    try:
        lock = Lock(folder)
        summary = read_summary(folder)
        if not summary:
            raise UsageError("the run has not ended.")
        before = summary.get("eval")
        summary["eval"] = (before if isinstance(before, dict) else {}) | result
        write_json(folder / "summary.json", summary)
        with contextlib.closing(TensorBoard(folder)) if values else contextlib.nullcontext() as writer:
            for tag, value in values.items():
                writer.add(step, summary=scalar(tag, value))
    except (UsageError, OSError) as error:
        warn(f"The result is not in summary.json and TensorBoard of {shown(folder)}: {one_line(error)}")
    finally:
        if lock:
            lock.release()


# ==== shared: language warm start and evaluation ====
def warm_start(model: GPT, run: Run) -> None:
    """Fine-tunes the model on answers of the teacher (SFT), or takes the result from runs-dir if it is there."""
    args = run.args
    recipe = ("seed", "sft_steps", "sft_learning_rate", *SIZES)
    made_of = {name: vars(args)[name] for name in recipe} | run.conditions | {"arguments": None}
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    cached = run.path.parent / "warm_starts" / f"{key}.pt"
    if args.cache_warm_start and cached.exists():
        try:
            state = load_checkpoint(cached, lambda state: model.load_state_dict(state["model"]))
            say(f"warm start: {shown(cached)}")
            write_stage(run, "sft", {"loss": state["losses"]})
            return
        except UsageError as error:
            warn(f"{one_line(error)} The warm start is made again.")
    plain, rng = replace(args, temperature=1.0), Rng(f"warm start {args.seed}", args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    max_dots, losses = min(6, args.max_completion_length - args.num_digits - 3), []
    for step in range(args.sft_steps):
        optimizer.param_groups[0]["lr"] = args.sft_learning_rate * (1 + math.cos(math.pi * step / args.sft_steps)) / 2
        prompts = sample_prompts(128, args.num_digits, rng)
        answers = [sloppy_answer(prompt, max_dots, rng) for prompt in prompts]
        answers = encode(answers, args.max_completion_length).to(args.device)
        logprobs, _ = completion_logprobs(model, encode_prompts(prompts, args.device), answers, plain)
        loss = -masked_mean(logprobs, completion_mask(answers))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        run.progress.show("steps of the warm start", step + 1, args.sft_steps)
        if run.signals:
            raise Stopped(run.signals[0])
    if args.sft_steps and not loss.isfinite():
        raise Failed(f"the loss of the warm start is {loss:.3g}")
    write_stage(run, "sft", {"loss": losses})
    if args.cache_warm_start:
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "losses": losses}, buffer)
        mine = cached.with_name(run.path.name)  # runs side by side may be making the same
        try:
            cached.parent.mkdir(exist_ok=True)
            write_atomically(mine, buffer.getbuffer())
            os.replace(mine, cached)
        except OSError as error:
            run.files.lost.append(f"The warm start is not kept for other runs: {one_line(error)}")


def write_stage(run: Run, stage: str, curves: dict[str, list[float]]) -> None:
    """Writes <run>/<stage>.csv, the curves of what comes before the first iteration, and shows them in TensorBoard."""
    steps = list(zip(*curves.values()))
    lines = [["step", *curves], *([i, *values] for i, values in enumerate(steps, 1))]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_atomically(run.path / f"{stage}.csv", text.encode())
    for i, values in enumerate(steps, 1):
        run.files.waiting += [(f"{stage}/{name}", value, i) for name, value in zip(curves, values)]


def keep_prepared(run: Run) -> None:
    """Saves the models that the first iteration begins with."""
    run.notes["warm_start"] = run.args.init_from or f"{run.args.sft_steps} steps"
    run.start_clock()
    run.save(best=False)


def show_prepared(run: Run) -> bool:
    """Shows again what keep_prepared has kept. Returns whether there is any: a resumed run has it.

    TensorBoard hides at a resume whatever has a later step, also the curves of write_stage, whose steps are their own.
    """
    prepared = run.iteration > 0 or "warm_start" in run.notes
    for file in (run.path / "sft.csv", run.path / "reward_model.csv") if prepared and run.files else ():
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()) if file.exists() else ():
            if (step := int(row.pop("step"))) > run.global_step:
                run.files.waiting += [(f"{file.stem}/{name}", float(value), step) for name, value in row.items()]
    return prepared


def show_table(run: Run, tag: str, table: list[list[str]]) -> None:
    """A table, its head first: in TensorBoard, and the top of it on the terminal."""
    run.files.text(tag, [[f"`{cell}`" for cell in row] for row in table], run.iteration)
    widths = [max(map(len, column)) for column in zip(*table)]
    run.progress.end()
    for row in table[:9]:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def evaluate_before(model: GPT, run: Run, **values: float) -> None:
    """Step 0 of a run: what the model can do before the first iteration, and what else there is to say."""
    values |= evaluation(model, run.args)
    run.start_clock()
    report_accuracy(run, values)
    run.log(0, [], values)
    run.write_row()


def report_accuracy(run: Run, values: dict[str, float]) -> None:
    """Hands an evaluation, if there was one, to summary.json, and the latest accuracy to the progress line."""
    if "eval/accuracy" in values and not run.iteration:
        run.notes["accuracy_before"] = values["eval/accuracy"]
    elif "eval/accuracy" in values:
        run.notes |= {tag.removeprefix("eval/"): value for tag, value in values.items() if tag.startswith("eval/")}
    before = run.notes["accuracy_before"]
    now = run.notes.get("accuracy", before)
    run.headline = f"  accuracy {now:.2f}"
    run.outcome = f", accuracy {before:.3f} -> {now:.3f}" if run.iteration else f", accuracy {before:.3f}"


def load_model(model: GPT, path: Path, args: RunArgs) -> dict[str, Any]:
    """Gives model the weights of a run or one of its checkpoints, which is returned; UsageError if they do not fit."""

    def use(state: dict[str, Any]) -> None:
        if not state["notes"] and not made["init_from"]:
            raise ValueError("it is from before the warm start")
        model.load_state_dict(state["model"])

    try:
        made = json.loads((run_dir_of(path) / "config.json").read_text(encoding="utf-8"))["args"]
        other = [f"{name} {made[name]}" for name in SIZES if made[name] != vars(args)[name]]
        refuse(other, f"{path} has a model of another size; ask for its {', '.join(other)}.")
        return load_checkpoint(path, use)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UsageError(f"{path} is no run of this project with a model in it, nor one of its checkpoints.") from None


@torch.no_grad()
def evaluation(model: GPT, args: RunArgs) -> dict[str, float]:
    """Means over the held-out prompts, always the same: accuracy sampled and greedy, pass@8, format."""
    rng = Rng(EVAL_SEED, args.device)
    prompts = sample_prompts(args.eval_prompts, args.num_digits, rng, held_out=True)
    sampled = generate(model, encode_prompts(prompts, args.device), 8, rng, args)
    greedy = generate(model, encode_prompts(prompts, args.device), 1, rng, args, greedy=True)
    sampled, greedy = (decode(tokens, completion_mask(tokens)) for tokens in (sampled, greedy))
    right = np.array([is_right(prompts[i // 8], text) for i, text in enumerate(sampled)])
    values = {
        "accuracy": right.mean(),
        "pass@8": right.reshape(-1, 8).any(1).mean(),
        "format": np.mean([is_in_format(text) for text in sampled]),
        "accuracy_greedy": np.mean([is_right(prompt, text) for prompt, text in zip(prompts, greedy)]),
    }
    return {f"eval/{name}": float(value) for name, value in values.items()}


def evaluate(args: RunArgs) -> dict[str, float]:
    """Tests the run args.evaluate on held-out prompts, prints the result and adds it to the summary of an ended run."""
    check_args(args)
    check_model(args)
    settle(args)
    model, path = GPT(args).to(args.device), Path(args.evaluate)
    state = load_model(model, path, args)
    values = {tag.removeprefix("eval/"): value for tag, value in evaluation(model, args).items()}
    result = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    say(f"iteration {state['iteration']}, {args.eval_prompts} held-out prompts: {result}")
    told = {"prompts": args.eval_prompts, "seed": EVAL_SEED, "iteration": state["iteration"]}
    record_evaluation(path, values | told, {}, state["global_step"])
    return values


# ==== shared: main ====
def main(argv: list[str] | None = None) -> int:
    """The command line. The exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""

    def leave(signum: int, frame: Any) -> None:
        raise Stopped(signum)

    for fd in range(3):  # one that was closed would be given to the next file, and foreign code prints into it
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    handlers = set_handlers(leave)
    STARTED_IN.append(here())
    try:
        args = parse_args(argv)
        try:
            path = args.evaluate or str(train(args))
            if args.evaluate or vars(args).get("capture_video"):
                evaluate(replace(args, evaluate=path))
        except SystemExit as error:  # of an environment, say
            raise Failed(f"something has called sys.exit({error.code!r})", "failed") from error
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 130
    except (UsageError, Failed, OSError) as error:
        warn(f"error: {one_line(error)}")
        return 2 if isinstance(error, UsageError) else 1
    finally:
        STARTED_IN.pop()
        put_back(handlers)


if __name__ == "__main__":
    status = main()
    if SCRIPT.is_file():  # a notebook would show the exit as an error
        sys.exit(status)
