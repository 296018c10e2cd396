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
"""GRPO, Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300), and its relatives, in one file.

For a prompt q, sample a group of completions o_1 ... o_G from the old policy, reward each, and climb

    J = 1/G sum_i 1/|o_i| sum_t  min(r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon) A_i) - beta KL(pi || pi_ref)

    r_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)          A_i = (R_i - mean of R) / std of R, in the group

so that the rest of its group, and no critic, says what was to be expected of a completion.

    --method grpo       as above; the default
    --method dr_grpo    divides by no std, and by a constant in the place of |o_i| (arXiv 2503.20783)
    --method dapo       clips later above 1 than below, averages over all tokens, samples groups again in which nothing
                        differs, makes long answers cost, has no KL (arXiv 2503.14476)
    --method gspo       one ratio per sequence, the geometric mean of its tokens', clipped tightly (arXiv 2507.18071)
    --method gdpo       several rewards, each normalised in its group before they are summed (arXiv 2601.05242)

A method is a row of METHODS, nothing but defaults: every flag wins over it.

The task is to sort six digits. A small GPT first copies a sloppy teacher, who sorts most prompts the wrong way round
and takes the wrong brackets: 630275 -> ..(765320), and now and then [023567]. Then a verifier rewards what it samples.

    python grpo_toy.py                                        python grpo_toy.py --method dapo --num-generations 16
    python grpo_toy.py --rewards correct format length        python grpo_toy.py --help --method gspo
    python grpo_toy.py --resume runs/<run>                    python grpo_toy.py --evaluate runs/<run>

Departures. From GRPO: groups of 8, not 64, batches of 384 completions and not 1,024, two epochs over a batch, not one,
a step size for a small model; outcome rewards only; the reference stays as it is (the iterative variant renews it);
standard deviations divide by G - 1, and 1e-4 is added to them. Dr.GRPO, DAPO and GDPO: two epochs over one whole batch
here, where DAPO takes 16 steps. DAPO also: a group counts as flat where its first reward is the same for all, and after
ten rounds such groups fill the batch; the price of length is at most 1 beside a correctness of -3 or 3. GDPO: the
penalty of GRPO stays. In the first step on a batch the ratio is 1, so nothing is clipped and the loss has nothing to do
with how good the policy is (0 if every sequence weighs the same): that is right, its gradient is not 0.

The upper half of this file is the method. The lower half has the sections that scripts share.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


@dataclass
class Args:
    method: Literal["grpo", "dr_grpo", "dapo", "gspo", "gdpo"] = "grpo"  # whose defaults to take for the others
    seed: int = 1  # seed of weights, teacher, prompts and samples
    max_steps: int = 130  # iterations: sample a batch, then learn from it
    learning_rate: float = 8e-4  # step size of AdamW
    anneal_lr: bool = True  # let the step size fall linearly to a tenth
    generation_batch_size: int = 384  # completions in a batch
    num_generations: int = 8  # completions per prompt, a group (G)
    num_iterations: int = 2  # epochs over a batch (mu)
    steps_per_generation: int = 1  # minibatches, each an optimizer step, in an epoch
    beta: float = 0.04  # weight of the KL divergence from the reference in the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # estimate of this divergence; see the function kl_estimate
    epsilon: float = 0.2  # how far the ratio may fall below 1 before it is clipped
    epsilon_high: float | None = None  # how far the ratio may rise above 1 before it is clipped; None: as epsilon
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"  # see the function policy_loss
    importance_sampling_level: Literal["token", "sequence"] = "token"  # a ratio per token, or (GSPO) per sequence
    scale_rewards: Literal["group", "batch", "none"] = "group"  # the standard deviation that divides rewards, if any
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"  # the second is GDPO
    rewards: list[str] = field(default_factory=lambda: ["correct"])  # correct, exact, format, length, rising, overlong
    reward_weights: list[float] = field(default_factory=list)  # a weight for each of the rewards; without, each has 1
    condition: list[str] = field(default_factory=list)  # rewards that count only with another: "length:correct>=3"
    mask_truncated_completions: bool = False  # leave completions that did not end in time out of the loss
    dynamic_sampling: bool = False  # replace groups whose first reward is the same for all, in at most ten rounds
    overlong_buffer: int = 4  # tokens before the longest length over which the reward "overlong" falls from 0 to -1
    temperature: float = 1.0  # divides the logits, when sampling and when scoring
    max_grad_norm: float = 1.0  # bound on the global norm of the gradient

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


# What each paper sets, where it is not what GRPO sets; an explicit flag wins.
# fmt: off
METHODS: dict[str, dict[str, Any]] = {
    "grpo": dict(),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none", beta=0.0),
    "dapo": dict(loss_type="dapo", epsilon_high=0.28, dynamic_sampling=True, beta=0.0, rewards=["correct", "overlong"]),
    "gspo": dict(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, beta=0.0,
                 steps_per_generation=4, num_iterations=1),
    "gdpo": dict(reward_aggregation="normalize_then_sum", rewards=["correct", "format", "length"]),
}
POSITIVE = ("max_steps", "learning_rate", "generation_batch_size", "num_generations", "num_iterations",
            "steps_per_generation", "overlong_buffer", "temperature", "max_grad_norm", "num_digits",
            "max_completion_length", "n_layer", "n_head", "n_embd", "sft_learning_rate")
AT_MOST_ONE = ()
ANY_SIGN = ("reward_weights",)
# fmt: on


# A reward is a function of this name and form: the prompt, the completion (it ends with "$" if it ended in time) and
# the arguments go in, a number comes out. To add one, write it; --rewards finds it by its name.
def answer(prompt: str, completion: str) -> str:
    """The last digits of a completion, as many as the prompt has; none if it has fewer or did not end in time."""
    digits = re.sub(r"[^0-9]", "", completion)[-len(prompt) :]
    return digits if len(digits) == len(prompt) and completion.endswith("$") else ""


def reward_correct(prompt: str, completion: str, args: Args) -> float:
    """3 for the prompt's digits in order, in whatever brackets, -3 for anything else."""
    return 3.0 if answer(prompt, completion) == "".join(sorted(prompt)) else -3.0


def reward_exact(prompt: str, completion: str, args: Args) -> float:
    """The same on the scale of the others: 1 or 0."""
    return float(reward_correct(prompt, completion, args) > 0)


def reward_format(prompt: str, completion: str, args: Args) -> float:
    """1 for digits in square brackets, after dots if any, and nothing else."""
    return float(bool(re.fullmatch(r"\.*\[[0-9]+\]\$", completion)))


def reward_length(prompt: str, completion: str, args: Args) -> float:
    """1 for an end after at most two tokens more than the shortest answer in brackets."""
    return float(completion.endswith("$") and len(completion) <= args.num_digits + 5)


def reward_rising(prompt: str, completion: str, args: Args) -> float:
    """1 if the digits of the answer do not fall, whatever they are: a proxy that can be hacked."""
    digits = answer(prompt, completion)
    return float(digits != "" and list(digits) == sorted(digits))


def reward_overlong(prompt: str, completion: str, args: Args) -> float:
    """DAPO eq. 13: falls from 0 to -1 over the last overlong_buffer tokens, -1 for what did not end in time."""
    if not completion.endswith("$"):
        return -1.0
    return min(0.0, (args.max_completion_length - args.overlong_buffer - len(completion)) / args.overlong_buffer)


# ---------------------------------------------------------------------------------------------------- the method
def parse_condition(text: str) -> tuple[str, str, float]:
    """("length", "correct", 3.0) from "length:correct>=3"; raises UsageError for any other form."""
    match = re.fullmatch(r"(\w+):(\w+)>=(-?\d*\.?\d+)", text)
    refuse(not match, f'--condition {text} is not of the form "length:correct>=3" (mind the quotes around it).')
    return match[1], match[2], float(match[3])


def condition_rewards(rewards: Tensor, names: list[str], conditions: list[str]) -> Tensor:
    """Rewards (..., rewards) in which an easy one is 0 where the hard one that it depends on falls short (GDPO).

    names are those of the last dimension. All conditions look at the rewards as they came. 0 ought to be the least that
    an easy reward gives, or falling short would raise it.
    """
    conditioned = rewards.clone()
    for easy, hard, threshold in map(parse_condition, conditions):
        conditioned[..., names.index(easy)] *= rewards[..., names.index(hard)] >= threshold
    return conditioned


def call_reward(name: str, prompt: str, completion: str, args: Args) -> float:
    """What the reward function of this name says; Failed if it raises, or says nothing finite."""
    try:
        value = float(globals()[f"reward_{name}"](prompt, completion, args))
    except Exception as error:
        raise Failed(f"reward_{name} raised {error!r} for {prompt} {completion}", "failed") from error
    if not math.isfinite(value):
        raise Failed(f"reward_{name} is {value} for {prompt} {completion}")
    return value


def all_equal(x: Tensor) -> Tensor:
    """Whether a group is all the same, (prompts, group, ...) -> (prompts, ...)."""
    return x.amax(1) == x.amin(1)


def group_advantages(rewards: Tensor, weights: Tensor, aggregation: str, scale: str) -> Tensor:
    """How much better than its group each completion is, (prompts, group).

    rewards (prompts, group, rewards), weights (rewards,). GRPO (sec. 4.1.2) sums, then normalises in the group; GDPO
    normalises each reward in the group, sums, and divides by the standard deviation of the sums over the batch (their
    mean over the batch is that of every group, 0). scale: rewards are divided by the standard deviation of their
    "group", of the "batch", or (Dr.GRPO) by "none". A group without variance has advantages of exactly 0.
    """

    def normalize(x: Tensor) -> Tensor:
        if scale == "none":
            deviation = 1.0
        else:
            deviation = (x.std(1, keepdim=True) if scale == "group" else x.flatten(0, 1).std(0)) + 1e-4
        # Rounding may set the mean of equal numbers apart from them, and 1e-4 would make much of that.
        return torch.where(all_equal(x)[:, None], 0.0, (x - x.mean(1, keepdim=True)) / deviation)

    if aggregation == "sum_then_normalize":
        return normalize((rewards * weights).sum(-1))
    sums = (normalize(rewards) * weights).sum(-1)
    return sums / (sums.std() + 1e-4)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """An estimate of KL(pi || pi_ref) from tokens that pi sampled, in the shape given (Schulman, kl-approx, 2020).

    kind   formula, r = pi_ref / pi   its mean is            the mean of its gradient, where it is a loss, is
    "k1"   -log r                     KL(pi || pi_ref)       0: as a loss it does nothing but add noise
    "k2"   (log r)^2 / 2              close to it, biased    that of KL(pi || pi_ref)
    "k3"   r - 1 - log r              KL(pi || pi_ref), >= 0 that of KL(pi_ref || pi), the other direction; in GRPO

    This holds while pi is what sampled; in later epochs over a batch it drifts, and (as in the paper) no importance
    ratio corrects it. Gradients are of a token given those before it.
    """
    log_r = ref_logprobs - logprobs
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.expm1() - log_r}[kind]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with its KL penalty, negated (GRPO eq. 3), and statistics of it.

    Log-probabilities of the sampled tokens and mask (batch, length), advantages (batch,). What the mask leaves out
    has no part in the loss, nor in its gradient, even if it is infinite.
    """
    mask = mask.bool()
    logprobs, old_logprobs, ref_logprobs = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, ref_logprobs))
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    advantages = advantages[:, None]
    log_ratio = logprobs - old_logprobs
    if args.importance_sampling_level == "sequence":  # GSPO eq. 7: the geometric mean over the sequence
        log_ratio = log_ratio.sum(1, keepdim=True) / lengths
    ratio = log_ratio.exp().expand(mask.shape)
    low, high = 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
    surrogate = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    kl = {kind: kl_estimate(logprobs, ref_logprobs, kind) for kind in ("k1", "k2", "k3")}
    token_losses = torch.where(mask, args.beta * kl[args.kl_estimator] - surrogate, 0.0)
    if args.loss_type == "grpo":
        loss = (token_losses.sum(1, keepdim=True) / lengths).mean()
    elif args.loss_type == "dr_grpo":
        loss = token_losses.sum() / (len(mask) * args.max_completion_length)
    else:
        loss = token_losses.sum() / mask.sum().clamp(min=1)
    with torch.no_grad():
        stats = {
            "loss": loss.detach(),
            "kl": masked_mean(kl[args.kl_estimator], mask),
            **{f"kl/{kind}": masked_mean(value, mask) for kind, value in kl.items()},
            "clip_ratio/low_mean": masked_mean((ratio < low) & (advantages < 0), mask),
            "clip_ratio/high_mean": masked_mean((ratio > high) & (advantages > 0), mask),
            "ratio/max": torch.where(mask, ratio, 0.0).max(),
        }
    return loss, stats


class Group(NamedTuple):
    """Completions of one prompt."""

    prompt: str
    completions: Tensor  # (group, max_completion_length)
    texts: list[str]
    rewards: Tensor  # (group, rewards), as the functions gave them


class Batch(NamedTuple):
    """Completions to learn from, those of a group one after the other."""

    prompts: Tensor  # (batch, prompt length)
    completions: Tensor  # (batch, length of the longest)
    mask: Tensor  # (batch, length of the longest)
    advantages: Tensor  # (batch,)


def sample_groups(
    model: GPT, prompts: list[str], size: int, rewards: list[str], rng: Rng, args: Args, greedy: bool = False
) -> list[Group]:
    """A group of completions of each prompt, with the rewards of these names."""
    completions = generate(model, encode_prompts(prompts, args.device), size, rng, args, greedy)
    completions = F.pad(completions, (0, args.max_completion_length - completions.shape[1]), value=PAD)
    groups = []
    for prompt, tokens in zip(prompts, completions.split(size)):
        texts = decode(tokens, completion_mask(tokens))
        scores = [[call_reward(name, prompt, text, args) for name in rewards] for text in texts]
        groups.append(Group(prompt, tokens, texts, torch.tensor(scores)))
    return groups


def is_flat(group: Group) -> bool:
    """Whether the first reward is the same for all of a group, so that it says nothing."""
    return all_equal(group.rewards[None, :, 0]).item()


def rollout(model: GPT, rng: Rng, args: Args) -> tuple[list[Group], Batch]:
    """Samples groups of completions and compares each with its group; returns all groups, the batch's first."""
    num_prompts, groups = args.generation_batch_size // args.num_generations, []
    for _ in range(10):
        prompts = sample_prompts(num_prompts, args.num_digits, rng)
        groups += sample_groups(model, prompts, args.num_generations, args.rewards, rng, args)
        if not args.dynamic_sampling:
            break
        groups.sort(key=is_flat)  # flat groups go to the end (DAPO eq. 11)
        if not is_flat(groups[num_prompts - 1]):
            break
    chosen, weights = groups[:num_prompts], torch.tensor(args.reward_weights)
    rewards = condition_rewards(torch.stack([group.rewards for group in chosen]), args.rewards, args.condition)
    advantages = group_advantages(rewards, weights, args.reward_aggregation, args.scale_rewards).flatten()
    completions = torch.cat([group.completions for group in chosen])
    mask = completion_mask(completions)
    longest = int(mask.sum(1).max())
    if args.mask_truncated_completions:
        mask &= (completions == EOS).any(1, keepdim=True)
    prompts = encode_prompts([group.prompt for group in chosen], args.device).repeat_interleave(args.num_generations, 0)
    return groups, Batch(prompts, completions[:, :longest], mask[:, :longest], advantages.to(mask.device))


def statistics(groups: list[Group], args: Args) -> tuple[list[tuple[float, int]], dict[str, float]]:
    """Reward and length of every completion, and what there is to say of them, by TRL's tags.

    rewards/<name> are as the functions gave them, all else is after the conditions.
    """
    given = torch.stack([group.rewards for group in groups])
    rewards = condition_rewards(given, args.rewards, args.condition)
    returns = (rewards * torch.tensor(args.reward_weights)).sum(-1)
    texts = [text for group in groups for text in group.texts]
    lengths = [len(text) for text in texts]
    values = {
        "reward": returns.mean(),
        "reward_std": returns.std(1).mean(),
        "frac_reward_zero_std": all_equal(returns).float().mean(),
        "completions/mean_length": sum(lengths) / len(texts),
        "completions/clipped_ratio": sum(text[-1] != "$" for text in texts) / len(texts),
    }
    for i, name in enumerate(args.rewards):
        values[f"rewards/{name}/mean"] = given[..., i].mean()
        values[f"rewards/{name}/std"] = given[..., i].std()
        values[f"frac_reward_zero_std/{name}"] = all_equal(rewards[..., i]).float().mean()
    return list(zip(returns.flatten().tolist(), lengths)), {tag: float(value) for tag, value in values.items()}


def update(
    model: GPT, reference: GPT, optimizer: torch.optim.AdamW, batch: Batch, learning_rate: float, rng: Rng, args: Args
) -> dict[str, float]:
    """num_iterations epochs over a batch; returns the means of their statistics.

    The old policy is the one that sampled, so the first step has ratios of exactly 1 ("ratio/max_first_step"): its
    gradient is the policy gradient.
    """
    optimizer.param_groups[0]["lr"] = learning_rate
    steps = []
    rows = rng.permutation(len(batch.mask)).chunk(args.steps_per_generation)
    parts = [Batch(*(x[part] for x in batch)) for part in rows]
    with torch.no_grad():
        old = [completion_logprobs(model, part.prompts, part.completions, args)[0] for part in parts]
        ref = [completion_logprobs(reference, part.prompts, part.completions, args)[0] for part in parts]
    for _ in range(args.num_iterations):
        for i, part in enumerate(parts):
            logprobs, entropies = completion_logprobs(model, part.prompts, part.completions, args)
            loss, stats = policy_loss(logprobs, old[i], ref[i], part.advantages, part.mask, args)
            optimizer.zero_grad()
            loss.backward()
            stats["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            steps.append(stats | {"entropy": masked_mean(entropies, part.mask)})
    values = {tag: torch.stack([step[tag] for step in steps]).mean().item() for tag in steps[0]}
    values["ratio/max_first_step"] = steps[0]["ratio/max"].item()
    values["ratio/max"] = max(step["ratio/max"].item() for step in steps)
    return values


def check_method(args: Args) -> None:
    """Raises UsageError for batches, rewards and conditions that do not fit together; fills the weights in."""
    batch, used = args.generation_batch_size, args.rewards
    unit = math.lcm(args.num_generations, args.steps_per_generation)
    refuse(args.num_generations < 2, "--num-generations 1 leaves a completion nothing to compare with; use 2 or more.")
    refuse(
        batch % unit,
        f"--generation-batch-size {batch} is not divisible by --num-generations {args.num_generations} and"
        f" --steps-per-generation {args.steps_per_generation}; {math.ceil(batch / unit) * unit} is.",
    )
    known = [name.removeprefix("reward_") for name in globals() if name.startswith("reward_")]
    for name in used:
        refuse(name not in known, f"--rewards {name} is unknown; there are {', '.join(known)}.")
        refuse(used.count(name) > 1, f"--rewards names {name} twice; give it a weight instead.")
    refuse(not used, f"--rewards needs one or more of {', '.join(known)}.")
    args.reward_weights = args.reward_weights or [1.0] * len(used)
    count = len(args.reward_weights)
    refuse(count != len(used), f"--reward-weights are {count}, but --rewards are {len(used)}; give each reward one.")
    for easy, hard, _ in map(parse_condition, args.condition):
        unused = [name for name in (easy, hard) if name not in used]
        refuse(unused, f"--condition {easy}:{hard} is about {' and '.join(unused)}, not in use; add it to --rewards.")
        refuse(easy == hard, f"--condition {easy}:{hard} is about one reward; name the easy one, then the hard one.")
    too_long = args.overlong_buffer > args.max_completion_length
    refuse(too_long, f"--overlong-buffer must be at most --max-completion-length, {args.max_completion_length}.")


def train(args: RunArgs) -> Path:
    """Trains for max_steps iterations, or goes on with the run args.resume. Returns the run directory.

    Raises UsageError before anything is created; later Failed, OSError, and Stopped for a signal.
    """
    started = time.perf_counter()
    check_args(args)
    check_model(args)
    check_method(args)
    rng = settle(args)
    model = GPT(args).to(args.device)
    if args.init_from and not args.resume:
        load_model(model, Path(args.init_from), args)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)

    with Run(args, args.max_steps, started, model=model, reference=reference, optimizer=optimizer, rng=rng) as run:
        if not run.iteration:
            if not args.init_from:
                warm_start(model, run)
            reference.load_state_dict(model.state_dict())
            evaluate_before(model, run)
        for iteration in run.iterations():
            learning_rate = args.learning_rate * (1 - 0.9 * iteration / args.max_steps if args.anneal_lr else 1)
            clock = [time.perf_counter()]
            groups, batch = rollout(model, rng, args)
            clock.append(time.perf_counter())
            completions, values = statistics(groups, args)
            values |= update(model, reference, optimizer, batch, learning_rate, rng, args)
            values |= speed(completions, batch, clock, args)
            values["learning_rate"] = learning_rate
            if iteration == args.max_steps or iteration % args.eval_interval == 0:
                values |= evaluation(model, args)
            report(run, groups, batch, values)
            run.log(1, [(1, *completion) for completion in completions], values)
    return run.path


# ==== The machine room: "shared" sections are the same text in every script that has them ====
# ==== shared: language run flags ====
SCRIPT = Path(globals().get("__file__", "notebook"))


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
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "lineage"  # project of --track
    wandb_entity: str | None = None  # team of --track
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cpu, where all results were measured
    num_threads: int = 0  # CPU threads of torch (0: all cores, but at most 4)


METRICS = ("eval/accuracy", "reward")  # of the HParams tab
SIZES = ("num_digits", "max_completion_length", "n_layer", "n_head", "n_embd")  # what makes a model another one
PRESET = "method"  # the argument that picks a row of METHODS


def preset(method: str) -> dict[str, Any]:
    """A method and its row of METHODS. Nothing for an unknown one, which the parser will refuse."""
    return {"method": method, **METHODS[method]} if method in METHODS else {}


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
    sizes = {name: vars(args)[name] for name in (*SIZES, "generation_batch_size", "eval_prompts")}
    largest = max(sizes, key=sizes.__getitem__)

    def needed(size: int) -> float:
        x = replace(args, **{largest: size})
        context = 1 + x.num_digits + x.max_completion_length
        weights = x.n_layer * 12 * x.n_embd**2 + context * x.n_embd
        cached = x.n_layer * 2 * context * x.n_embd * max(x.generation_batch_size, 8 * x.eval_prompts)
        trained = x.n_layer * 16 * context * x.n_embd * x.generation_batch_size // x.steps_per_generation
        return 4 * (6 * weights + max(cached, trained))  # six, with the reference, the gradients and the optimizer

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


class Stopped(Exception):
    """A signal ended the run after its iteration was saved: exit status 128 + signal."""

    status = "interrupted"


# Arguments that may differ from those of the run when it is resumed or evaluated.
MACHINE = ("device", "num_threads", "compile")
MAY_DIFFER = ("resume", "capture_video", "track", "wandb_project_name", "wandb_entity", *MACHINE)


def parse_args(argv: list[str] | None = None) -> RunArgs:
    """The command line, over the defaults of its preset. With --resume or --evaluate, over the arguments of the run."""
    argv = own_arguments() if argv is None else argv
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = vars(RunArgs())[PRESET]
    peek.add_argument(f"--{PRESET.replace('_', '-')}", f"--{PRESET}", nargs="?", default=default, const=default)
    peek.add_argument("--resume", nargs="?", type=Path)
    peek.add_argument("--evaluate", nargs="?", type=Path)
    asked = vars(peek.parse_known_args(argv)[0])
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


def parse_flags(argv: list[str], default: RunArgs) -> RunArgs:
    """The flags over the defaults. Raises UsageError with one sentence, where tyro alone would draw a box."""
    if {"-h", "--help"} & set(argv):
        return tyro.cli(RunArgs, args=argv, default=default)
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            args, unknown = tyro.cli(RunArgs, args=argv, default=default, return_unknown_args=True)
    except SystemExit:
        lines = [line.strip() for line in box.getvalue().splitlines()]
        rules = [n for n, line in enumerate(lines) if line and not line.strip("-")]  # around the message
        message = " ".join(lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines)
        flag, _, reason = message.removeprefix("Error parsing ").partition(": ")
        takes = next((line for line in lines if line.startswith(f"{flag} ")), "")
        if takes and "'" in reason:
            for kind, words in (("{None}|", ""), ("FLOAT", "a number"), ("INT", "a whole number")):
                takes = takes.replace(kind, words)
            message = f"{takes.replace(' ', ' takes ', 1)}, not {reason.split(chr(39))[-2]!r}"
        raise UsageError(f"{message.rstrip('.')}.") from None
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
            raise UsageError(f"--num-threads is {args.num_threads}, but this process may use {cores()} cores.")
        args.num_threads = 0  # the run was made on a larger machine
    if args.track and not args.evaluate and os.environ.get("WANDB_MODE", "online") == "online":
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
    if name == "num_envs" and number > 2**16:
        return "at most 65,536"
    if number > 2**53 and isinstance(number, int):
        return "at most 2**53"
    if name in (*POSITIVE, "eval_episodes", "eval_prompts", "eval_interval") and number <= 0:
        return "greater than 0"
    if name in AT_MOST_ONE and number > 1:
        return "at most 1"
    if name not in ANY_SIGN and number < 0:
        return "0 or more"
    return "less than 2**32" if name in ("seed", "eval_seed") and number >= 2**32 else ""


def cores() -> int:
    """Processor cores that this process may use, by its affinity and by the share that its cgroups grant."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        count = os.process_cpu_count() or 1
    else:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
    for line in mine.read_text().splitlines() if mine.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = root / controller if controllers else root
        folder = folder / path.lstrip("/")
        names = old_names if controllers else [name]
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError):
                found.append(" ".join((level / name).read_text() for name in names).split())
    return found


def check_memory(needed: Callable[[int], float], what: str, flag: str, size: int) -> None:
    """Raises UsageError where size, the value of a flag, needs more bytes than there are."""
    most = size
    while most > 1 and needed(most) > memory():
        most //= 2
    if most < size:
        sizes = f"{needed(size) / 2**30:,.0f} GiB of memory, and there are {memory() / 2**30:,.0f}"
        raise UsageError(f"{what} would take {sizes}; {flag} {most} would fit.")


def say(line: str, end: str = "\n") -> None:
    """Prints. A reader that has gone away must not end the run."""
    try:
        print(line, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


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
    """Strings of digits; a tenth of all strings, by a hash, is held out from training."""
    prompts = []
    while len(prompts) < count:
        prompt = "".join(rng.python.choices("0123456789", k=num_digits))
        if (int(prompt) * 2654435761 % 2**32 < 2**32 // 10) == held_out:
            prompts.append(prompt)
    return prompts


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
    """Tokens (rows, length) to the logits of the token after each, (rows, length, tokens)."""

    def __init__(self, args: Args):
        super().__init__()
        self.context = 1 + args.num_digits + args.max_completion_length
        self.token, self.position = nn.Embedding(len(TOKENS), args.n_embd), nn.Embedding(self.context, args.n_embd)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.norm, self.head = nn.LayerNorm(args.n_embd), nn.Linear(args.n_embd, len(TOKENS), bias=False)
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


def completion_logprobs(model: GPT, prompts: Tensor, completions: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t), at the temperature that samples have, and the entropy there, each (rows, length)."""
    tokens = torch.cat([prompts, completions[:, :-1]], 1)
    logprobs = (model(tokens, only_from=prompts.shape[1] - 1) / args.temperature).log_softmax(-1)
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, completions[..., None]).squeeze(-1), entropies


# ==== reporting ====
def table_of(groups: list[Group], batch: Batch, args: Args) -> list[list[str]]:
    """The first group of the batch in which something differs, if any, to look at."""
    advantages = batch.advantages.view(-1, args.num_generations)
    i = int((~all_equal(advantages)).int().argmax())
    scores = [[f"{reward:g}" for reward in rewards] for rewards in groups[i].rewards.tolist()]
    rows = zip(groups[i].texts, scores, advantages[i].tolist())
    header = ["prompt", "completion", *args.rewards, "advantage"]
    return [header, *([groups[i].prompt, text, *given, f"{advantage:.2f}"] for text, given, advantage in rows)]


def speed(completions: list[tuple[float, int]], batch: Batch, clock: list[float], args: RunArgs) -> dict[str, float]:
    """Tokens a second in sampling, from clock[0] to clock[1], and in training since then."""
    trained = args.num_iterations * batch.mask.sum().item()
    return {
        "tokens_per_second/sampled": sum(length for _, length in completions) / (clock[1] - clock[0]),
        "tokens_per_second/trained": trained / (time.perf_counter() - clock[1]),
    }


def report(run: Run, groups: list[Group], batch: Batch, values: dict[str, float]) -> None:
    """What a run tells besides its values: accuracy, tokens a second, and now and then a group of completions."""
    last = run.iteration == run.args.max_steps
    report_accuracy(run, values)
    run.notes["tokens"] = run.notes.get("tokens", 0) + sum(len(text) for group in groups for text in group.texts)
    run.notes["tokens_per_second"] = run.notes["tokens"] / run.wall_time()
    if run.iteration == 1 or last or run.iteration % math.ceil(run.args.max_steps / 4) == 0:
        table = table_of(groups, batch, run.args)
        run.files.text("completions", [[f"`{cell}`" for cell in row] for row in table], run.iteration)
        widths = [max(map(len, column)) for column in zip(*table)]
        run.progress.end()
        for row in table[:9]:
            say("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


# ==== shared: run directory ====
def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a temporary neighbour, then puts it in the place of path: there is always the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def run_dir_of(path: Path) -> Path:
    """The run directory that path is, or that the checkpoint path belongs to."""
    return path.parent.parent if path.is_file() else path


def read_config(path: Path) -> tuple[RunArgs, dict[str, Any]]:
    """The arguments of a run, and all of its config.json. Raises UsageError where there is no such file."""
    try:
        config = json.loads((run_dir_of(path) / "config.json").read_text(encoding="utf-8"))
        return RunArgs(**config["args"]), config
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} is no run directory of this script: it has no config.json with its arguments."
        ) from None


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of a run directory; {} while there is none, or none that can be read."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        return summary if isinstance(summary, dict) else {}
    except (OSError, ValueError):
        return {}


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    packages = [name for name in ("torch", "gymnasium", "numpy", "mujoco", "ale_py") if importlib.util.find_spec(name)]
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def conditions(args: RunArgs) -> dict[str, Any]:
    """What must be the same for the same bits."""
    return {
        **versions(),
        **{name: vars(args).get(name) for name in MACHINE},
        "processor": torch.backends.cpu.get_cpu_capability(),
        "script": hashlib.sha256(SCRIPT.read_bytes() if SCRIPT.is_file() else b"").hexdigest(),
    }


def git(*command: str) -> str | None:
    """What git says in the folder of this file; None where there is no git or no repository."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", *command], cwd=SCRIPT.resolve().parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def create_run_dir(args: RunArgs) -> Path:
    """Makes the folder of a new run, never one that exists, and its config.json."""
    parts = (vars(args).get("env_id"), args.exp_name, args.seed, time.strftime("%Y%m%d-%H%M%S"))
    name = args.run_name or "__".join(str(part) for part in parts if part is not None)
    path = Path(args.runs_dir) / name.replace("/", "-").replace(":", "-")
    try:
        path.mkdir(parents=True)
    except OSError as error:
        if not path.exists():
            raise UsageError(f"{path} cannot be made ({error.strerror}); choose another --runs-dir.") from None
        if args.run_name:
            raise UsageError(f"{path} exists; choose another --run-name, or go on with --resume {path}.") from None
        path = path.with_name(f"{path.name}-{uuid.uuid4().hex[:4]}")  # another run was started in this second
        path.mkdir()
    (path / "checkpoints").mkdir()
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    changes = git("status", "--porcelain")
    config = {
        "args": asdict(args),
        "command": [sys.executable, *sys.argv],
        "seed": args.seed,
        "versions": versions(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "threads": args.num_threads,
        "wandb_id": uuid.uuid4().hex[:8],
    }
    write_json(path / "config.json", config)
    return path


class Log:
    """episodes.csv and progress.csv of a run, and their views in TensorBoard and Weights & Biases."""

    def __init__(self, path: Path, args: RunArgs, state: dict[str, Any] | None):
        self.path = path
        self.waiting: list[tuple[str, float, int]] = []  # for TensorBoard
        self.handed_over = 0.0
        self.first_row: dict[str, Any] = {}  # that of step 0, which does not have all columns
        self.files = {}
        for name in ("episodes", "progress"):
            file = self.files[name] = open(path / f"{name}.csv", "a+", newline="", encoding="utf-8")
            size = state["csv_bytes"][name] if state else 0
            if os.fstat(file.fileno()).st_size < size:
                raise UsageError(
                    f"{file.name} is shorter than it was at the checkpoint; restore it, or start a new run."
                )
            file.truncate(size)  # what came after the checkpoint will come again
        self.files["progress"].seek(0)
        self.columns = next(csv.reader(self.files["progress"]), None)
        self.tensorboard = SummaryWriter(path, purge_step=state["global_step"] + 1 if state else None)
        names = [field.name for field in fields(Args) if field.name in vars(args)]  # of the method and the environment
        swept = {name: vars(args)[name] for name in names}
        if not state:
            csv.writer(self.files["episodes"]).writerow(["global_step", "wall_time", "return", "length"])
            self.text("hyperparameters", [("name", "value"), *vars(args).items()], 0)
            self.hparams(swept)
        self.wandb = None
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": path.name, "dir": path}
            self.wandb = wandb.init(id=read_config(path)[1]["wandb_id"], resume="allow", config=swept, **names)

    def hparams(self, swept: dict[str, Any]) -> None:
        """The HParams tab. It shows those first that differ, by their names; these are taken to be the flags given."""
        given = {word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in sys.argv}
        plain = {name: x if type(x) in (int, float) else str(x) for name, x in swept.items()}
        experiment, *session = hparams(plain, dict.fromkeys(METRICS, 0.0))
        content = experiment.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(content.content)
        for info in data.experiment.hparam_infos:
            info.differs = info.name in given
        content.content = data.SerializeToString()
        for summary in (experiment, *session):
            self.tensorboard.file_writer.add_summary(summary)

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
        csv.writer(self.files["progress"]).writerows([one.get(name, "") for name in self.columns] for one in rows)
        for file in self.files.values():
            file.flush()
        values = {tag: value for tag, value in values.items() if not math.isnan(value)}
        self.waiting += [(tag, value, step) for tag, value in values.items()]
        if time.perf_counter() - self.handed_over > 2.0:  # not more often: its thread gets in the way of this one
            self.hand_over()
        if self.wandb and (not step or step > self.wandb.step):  # it refuses what a killed run has sent already
            self.wandb.log(values, step=step)

    def text(self, tag: str, table: list[Any], step: int) -> None:
        """A table, its head first, as text in TensorBoard."""
        lines = ["|".join(str(cell) for cell in row) for row in table]
        lines.insert(1, "|".join("-" for _ in table[0]))
        self.tensorboard.add_text(tag, "".join(f"|{line}|\n" for line in lines), step)

    def hand_over(self) -> None:
        """Gives TensorBoard what is waiting."""
        for scalar in self.waiting:
            self.tensorboard.add_scalar(*scalar)
        self.tensorboard.flush()
        self.waiting = []
        self.handed_over = time.perf_counter()

    def sync(self) -> dict[str, int]:
        """Puts all on the disk, so that it outlives a power cut. Returns the sizes of the files."""
        self.hand_over()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: (self.path / f"{name}.csv").stat().st_size for name in self.files}

    def close(self) -> None:
        self.hand_over()
        for file in (*self.files.values(), self.tensorboard):
            file.close()


class Progress:
    """One line that renews itself on a terminal; a line every five seconds elsewhere."""

    def __init__(self) -> None:
        self.terminal = bool(sys.stdout and sys.stdout.isatty())  # None where it was closed
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
        self, args: RunArgs, total: int, started: float, log_interval: int = 1, unit: str = "steps", **learner
    ):
        self.args = args
        self.total = total
        self.started = started
        self.log_interval = log_interval
        self.unit = unit
        self.learner = learner
        self.iteration = 0
        self.global_step = 0
        self.last_returns: list[float] = []  # of the last 100 training episodes
        self.best = -math.inf
        self.notes: dict[str, Any] = {}  # what else summary.json tells
        self.earlier_time = 0.0  # seconds of training in earlier sessions
        self.headline = ""  # what else the progress line tells
        self.outcome = ""  # what else the last line tells
        self.gathered: list[dict[str, float]] = []  # values of the iterations since the last row
        self.episodes: list[list[float]] = []  # return and length of what ended since the last row
        self.signals: list[int] = []
        self.conditions = conditions(args)
        self.progress = Progress()
        state = load_checkpoint(Path(args.resume)) if args.resume else None
        how = self.restore(state) if state else ""
        self.first_step = self.global_step
        self.path = Path(args.resume) if args.resume else create_run_dir(args)
        self.complete = self.global_step >= total and read_summary(self.path).get("status") == "completed"
        if self.complete:
            say(f"{self.path} is complete; there is nothing left to train.")
            return
        self.files = Log(self.path, args, state)
        compiled = ", compiled" if vars(args).get("compile") == "on" else ""
        say(f"{self.path} ({args.device}, threads: {args.num_threads}{compiled})")
        if how:
            say(f"goes on from step {self.global_step:,}, {how}")
        self.start_clock()

    def start_clock(self) -> None:
        """Training begins here; what was before is start-up."""
        self.begun = time.perf_counter()
        self.startup_time = self.begun - self.started

    def restore(self, state: dict[str, Any]) -> str:
        """Puts back what save has written. Says how exactly the run goes on."""
        for name, part in self.learner.items():
            if isinstance(part, Tensor):
                part.copy_(state[name])
            else:
                part.load_state_dict(state[name])
        for name in KEPT:
            setattr(self, name, state[name])
        self.earlier_time = state["wall_time"]
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] and self.args.device == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        np.random.set_state(tuple(state["numpy_rng"]))
        version, keys, gauss = state["python_rng"]
        random.setstate((version, tuple(keys), gauss))
        differs = [part.inexact for part in self.learner.values() if getattr(part, "inexact", "")]
        was, here = state["conditions"], self.conditions
        differs += [f"another {name}" for name in was if was[name] != here.get(name)]
        if self.args.device == "cuda":
            differs.append("a GPU does not repeat itself bit for bit")
        return f"but not exactly: {', '.join(differs)}" if differs else "exactly as if it had never stopped"

    def __enter__(self) -> Run:
        def remember(signum: int, frame: Any) -> None:
            if self.signals:
                os._exit(128 + signum)  # a second signal does not wait for the iteration
            self.signals.append(signum)

        self.handlers = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
        if not self.args.resume:
            self.save()
        return self

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
            csv.writer(self.files.files["episodes"]).writerows(rows)
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
        if self.global_step:
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
        if self.first_step >= self.total:
            return self.first_step / self.earlier_time
        if self.global_step == self.first_step:
            return math.nan
        return (self.global_step - self.first_step) / (time.perf_counter() - self.begun)

    def save(self, best: bool = True) -> None:
        """Writes checkpoints/step_*.pt, of which two stay, and best.pt where the last 100 episodes were the best.

        best is false for a checkpoint that a signal forces: it must not change what the run leaves behind.
        """
        score = self.score()
        better = best and score is not None and score > self.best
        if better:
            self.best = score
        kind, keys, *position = np.random.get_state()
        state = {
            **{name: part if isinstance(part, Tensor) else part.state_dict() for name, part in self.learner.items()},
            **{name: getattr(self, name) for name in KEPT},
            "wall_time": self.wall_time(),
            "csv_bytes": self.files.sync(),
            "total": self.total,
            "conditions": self.conditions,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.args.device == "cuda" else [],
            "numpy_rng": [kind, keys.tolist(), *position],
            "python_rng": random.getstate(),
        }
        buffer, folder = io.BytesIO(), self.path / "checkpoints"
        torch.save(state, buffer)
        if better:  # first, because the other one says that it is done
            write_atomically(folder / "best.pt", buffer.getbuffer())
        write_atomically(folder / f"step_{self.global_step:012}.pt", buffer.getbuffer())
        for old in sorted(folder.glob("step_*.pt"))[:-2]:
            old.unlink()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        """Writes summary.json. Of an error it says when it happened and where the run can go on."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if self.complete:
            return
        self.progress.end()
        status = getattr(error, "status", "failed") if error else "completed"
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
        message = ""
        if status in ("diverged", "failed"):
            newest = max((self.path / "checkpoints").glob("step_*.pt"), default="none")
            message = f"iteration {self.iteration}: {error}; the last good checkpoint is {newest}."
            summary["error"] = message
        try:
            write_json(self.path / "summary.json", summary)
            self.files.close()
        except OSError:  # a full disk again
            if not error:
                raise
        if self.files.wandb:
            self.files.wandb.finish(exit_code=int(status != "completed"))
        if isinstance(error, (Failed, OSError)):
            raise Failed(message, status) from error
        say(f"{status} after {self.global_step:,} {self.unit}{self.outcome}: {self.path}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The newest good checkpoint of a run directory, or the file given; a corrupt one is named, none starts afresh."""
    for file in [path] if path.is_file() else sorted((path / "checkpoints").glob("step_*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():  # torch does not look at the checksums
                    raise ValueError(f"{damaged} has a wrong checksum")
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damage can surface as almost anything
            print(f"{file} is corrupt and left out ({type(error).__name__}).", file=sys.stderr)
    raise UsageError(f"{path} has no checkpoint that can be read. If it ended while it started, start it again.")


# ==== shared: language warm start and evaluation ====
def warm_start(model: GPT, run: Run) -> None:
    """Fine-tunes the model on answers of the teacher (SFT), or takes the result from runs-dir if it is there."""
    args = run.args
    recipe = ("seed", "device", "num_threads", "sft_steps", "sft_learning_rate", *SIZES)
    made_of = json.dumps({name: vars(args)[name] for name in recipe} | versions()).encode()
    key = hashlib.sha256(made_of + (SCRIPT.read_bytes() if SCRIPT.is_file() else b"")).hexdigest()[:16]
    cached = run.path.parent / "warm_starts" / f"{key}.pt"
    if args.cache_warm_start and cached.exists():
        try:
            model.load_state_dict(load_checkpoint(cached)["model"])
            say(f"warm start: {cached}")
            return
        except UsageError:  # it is corrupt, as load_checkpoint has said, and is made again
            pass
    plain, rng = replace(args, temperature=1.0), Rng(f"warm start {args.seed}", args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    max_dots = min(6, args.max_completion_length - args.num_digits - 3)
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
        run.progress.show("steps of the warm start", step + 1, args.sft_steps)
        if run.signals:
            raise Stopped(run.signals[0])
    if args.sft_steps and not loss.isfinite():
        raise Failed(f"the loss of the warm start is {loss:.3g}")
    if args.cache_warm_start:
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict()}, buffer)
        cached.parent.mkdir(exist_ok=True)
        mine = cached.with_name(run.path.name)  # runs side by side may be making the same
        write_atomically(mine, buffer.getbuffer())
        os.replace(mine, cached)


def evaluate_before(model: GPT, run: Run) -> None:
    """Step 0 of a run: what the model can do before it learns from rewards."""
    values = evaluation(model, run.args)
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
    try:
        made = json.loads((run_dir_of(path) / "config.json").read_text(encoding="utf-8"))["args"]
        state = load_checkpoint(path)
        other = [f"{name} {made[name]}" for name in SIZES if made[name] != vars(args)[name]]
        refuse(other, f"{path} has a model of another size; ask for its {', '.join(other)}.")
        model.load_state_dict(state["model"])
        return state
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):
        raise UsageError(f"{path} is no run of this project with a model in it, nor one of its checkpoints.") from None


@torch.no_grad()
def evaluation(model: GPT, args: RunArgs) -> dict[str, float]:
    """Means over the held-out prompts, always the same: accuracy sampled and greedy, pass@8, format."""
    rng = Rng(EVAL_SEED, args.device)
    prompts = sample_prompts(args.eval_prompts, args.num_digits, rng, held_out=True)
    sampled = sample_groups(model, prompts, 8, ["exact", "format"], rng, args)
    greedy = sample_groups(model, prompts, 1, ["exact"], rng, args, greedy=True)
    exact, in_format = torch.stack([group.rewards for group in sampled]).unbind(-1)
    values = {
        "accuracy": exact.mean(),
        "pass@8": exact.amax(1).mean(),
        "format": in_format.mean(),
        "accuracy_greedy": torch.stack([group.rewards for group in greedy]).mean(),
    }
    return {f"eval/{name}": value.item() for name, value in values.items()}


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
    if summary := read_summary(run_dir_of(path)):
        result = values | {"prompts": args.eval_prompts, "seed": EVAL_SEED, "iteration": state["iteration"]}
        write_json(run_dir_of(path) / "summary.json", summary | {"eval": result})
    return values


# ==== shared: main ====
def main(argv: list[str] | None = None) -> int:
    """The command line. The exit status is 0 trained, 1 diverged or crashed, 2 wrong usage, 128 + signal."""
    try:
        args = parse_args(argv)
        path = args.evaluate or str(train(args))
        if args.evaluate or vars(args).get("capture_video"):
            evaluate(replace(args, evaluate=path))
        return 0
    except Stopped as stopped:
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        return 130
    except (UsageError, Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    status = main()
    if SCRIPT.is_file():  # a notebook would show the exit as an error
        sys.exit(status)
