"""The method of grpo_toy.py against oracles that do not share its code: slow loops in float64, from the papers."""

import copy
import itertools
import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

import grpo_toy

AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "reinforce")
LEVELS, ESTIMATORS = ("token", "sequence"), ("k1", "k2", "k3")
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
every_baseline = pytest.mark.parametrize("leave_one_out", [False, True])
every_scale = pytest.mark.parametrize("scale", ["group", "batch", "none"])
every_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
every_level = pytest.mark.parametrize("level", LEVELS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])

# The defaults are free to change.
SETTING = dict(device="cpu", num_digits=2, max_completion_length=6, n_layer=2, n_head=2, n_embd=16, temperature=1.0)
SETTING |= dict(generation_batch_size=24, num_generations=4, num_iterations=1, steps_per_generation=1)
SETTING |= dict(rewards=["correct"], scale_rewards="group", multi_objective_aggregation="sum_then_normalize", beta=0.0)
SETTING |= dict(epsilon=0.2, epsilon_high=None, max_grad_norm=1e9, overlong_buffer=2)


@pytest.fixture(autouse=True)
def seed_of_the_prompts():
    random.seed(0)


def dice(seed: int = 0) -> grpo_toy.Rng:
    return grpo_toy.Rng(seed, "cpu")


def settings(**changes) -> grpo_toy.RunArgs:
    rewards = (SETTING | changes)["rewards"]
    return grpo_toy.RunArgs(**SETTING | dict(reward_weights=[1.0] * len(rewards)) | changes)


def small_model(args: grpo_toy.Args) -> grpo_toy.GPT:
    """Float64, and with weights so large that every token depends on all before it."""
    model = grpo_toy.GPT(args).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.35 if weight.ndim > 1 else 0.1)
    return model


def close(actual, expected, tolerance: float = 1e-9) -> bool:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------- advantages
def advantages_of(rewards, *how: str | bool, weights=None) -> torch.Tensor:
    """From nested lists or a tensor, (prompts, group, rewards)."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    weights = torch.ones(rewards.shape[-1]) if weights is None else weights
    return grpo_toy.group_advantages(rewards, weights, *how)


def slow_advantages(
    rewards: list, weights: list[float], aggregation: str, scale: str, leave_one_out: bool = False
) -> list[list[float]]:
    def normalized(groups: list[list[float]]) -> list[list[float]]:
        result, everything = [], [x for group in groups for x in group]
        for group in groups:
            divisor, means = 1.0, [statistics.fmean(group)] * len(group)
            if leave_one_out:
                means = [statistics.fmean(group[:i] + group[i + 1 :]) for i in range(len(group))]
            if scale != "none":
                divisor = statistics.stdev(group if scale == "group" else everything) + 1e-4
            same = all(x == group[0] for x in group)
            result.append([0.0 if same else (x - mean) / divisor for x, mean in zip(group, means)])
        return result

    kinds = range(len(weights))
    if aggregation == "sum_then_normalize":
        return normalized([[sum(weights[k] * r[k] for k in kinds) for r in group] for group in rewards])
    each = [normalized([[r[k] for r in group] for group in rewards]) for k in kinds]
    sums = [
        [sum(weights[k] * each[k][i][j] for k in kinds) for j in range(len(group))] for i, group in enumerate(rewards)
    ]
    everything = [x for group in sums for x in group]
    mean, deviation = statistics.fmean(everything), statistics.stdev(everything)
    return [[(x - mean) / (deviation + 1e-4) for x in group] for group in sums]


def random_rewards(*shape: int) -> torch.Tensor:
    """Small integers, that tie, and numbers that do not, by turns along the last dimension."""
    rewards = torch.randint(0, 3, shape).double()
    rewards[..., 1::2] = torch.randn(rewards[..., 1::2].shape).double() * 5 + 2
    return rewards


@pytest.mark.parametrize("pair, small", [((0, 1), 0.5), ((0, 2), 1.0), ((1, 2), 0.5)])
def test_pairs_get_the_worked_advantages(pair, small):
    group = [[[reward] for reward in pair]]
    assert close(advantages_of(group, "sum_then_normalize", "group"), [[-0.7071, 0.7071]], 2e-4)
    assert close(advantages_of(group, "sum_then_normalize", "none"), [[-small, small]])


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([0, 1, 1, 0], [-0.8659, 0.8659, 0.8659, -0.8659]),
        ([0, 0, 0, 1], [-0.4999, -0.4999, -0.4999, 1.4997]),
        ([2, 2, 2, 2], [0, 0, 0, 0]),
    ],
)
def test_groups_of_four_get_the_worked_advantages(rewards, expected):
    assert close(advantages_of([[[r] for r in rewards]], "sum_then_normalize", "group"), [expected], 6e-5)


def test_gdpo_tells_one_reward_won_from_two_and_grpo_does_not():
    won_one, won_both = [[0, 0], [1, 0]], [[0, 0], [1, 1]]
    collapsed = advantages_of([won_one, won_both], "sum_then_normalize", "group")
    assert close(collapsed, [[-0.7071, 0.7071]] * 2, 2e-4)
    told_apart = advantages_of([won_one, won_both], "normalize_then_sum", "group")
    assert close(told_apart, [[-0.5477, 0.5477], [-1.0954, 1.0954]], 2e-4)


def test_opposite_rewards_of_equal_weight_cancel_under_gdpo():
    assert close(advantages_of([[[1, 0], [1, 0], [0, 1]]], "normalize_then_sum", "group"), [[0, 0, 0]], 1e-6)


@every_aggregation
@every_scale
@every_baseline
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 3, 2), (5, 4, 3), (7, 8, 1), (3, 16, 4)])
def test_advantages_are_those_of_a_brute_force(shape, aggregation, scale, leave_one_out):
    for _ in range(5):
        rewards, weights = random_rewards(*shape), 2.0 ** torch.randint(-2, 3, shape[-1:])
        expected = slow_advantages(rewards.tolist(), weights.tolist(), aggregation, scale, leave_one_out)
        assert close(advantages_of(rewards, aggregation, scale, leave_one_out, weights=weights), expected)


def test_rloo_compares_a_completion_with_the_mean_of_the_others():
    advantages = advantages_of([[[3], [-3], [-3], [6]], [[1], [1], [1], [1]]], "sum_then_normalize", "none", True)
    assert close(advantages, [[3 - 0, -3 - 2, -3 - 2, 6 + 1], [0, 0, 0, 0]])


def test_reinforce_pp_divides_what_is_left_of_the_rewards_by_its_deviation_in_the_batch():
    args = grpo_toy.parse_args(["--method", "reinforce_pp"])
    rewards = torch.tensor([[[0.0], [2.0]], [[10.0], [16.0]], [[5.0], [5.0]]])
    left = [-1, 1, -3, 3, 0, 0]
    advantages = advantages_of(rewards, args.multi_objective_aggregation, args.scale_rewards, args.leave_one_out)
    assert close(advantages.flatten(), [x / (statistics.stdev(left) + 1e-4) for x in left])
    # Not the deviation of the rewards themselves, most of which is between the groups.
    assert advantages[1, 1] > 2 * advantages_of(rewards, "sum_then_normalize", "batch")[1, 1]


@every_aggregation
@every_scale
@every_baseline
def test_a_group_without_variance_has_advantages_of_exactly_zero(aggregation, scale, leave_one_out):
    for size in (2, 3, 7, 8, 33):
        same = torch.tensor([0.1, 0.2, 0.7]).expand(size, 3)  # the mean of such sums is not always one of them
        weights = torch.tensor([1.0, 1.3, 0.1])
        how = weights, aggregation, scale, leave_one_out
        alone = grpo_toy.group_advantages(same[None], *how)
        assert alone.shape == (1, size) and alone.eq(0).all()
        varied = torch.randn(2, size, 3)
        among_others = grpo_toy.group_advantages(torch.stack([varied[0], same, varied[1]]), *how)
        assert among_others[1].eq(0).all() and among_others[[0, 2]].ne(0).all()


def test_rounding_of_equal_sums_is_not_blown_up_to_advantages():
    rewards = torch.tensor([[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [0.3, 0.1, 0.2]]])
    advantages = grpo_toy.group_advantages(rewards, torch.ones(3), "sum_then_normalize", "group")
    assert advantages.abs().max() < 0.01


def test_rescaling_and_shifting_a_reward_changes_grpo_but_not_gdpo():
    rewards = torch.randn(6, 8, 3).double() * 1000
    changed = rewards * torch.tensor([1.0, 50.0, 1.0]) + torch.tensor([0.0, 700.0, 0.0])
    before, after = (advantages_of(r, "normalize_then_sum", "group") for r in (rewards, changed))
    assert close(after, before, 1e-5)
    before, after = (advantages_of(r, "sum_then_normalize", "group") for r in (rewards, changed))
    assert (after - before).abs().max() > 0.5


@every_aggregation
@every_scale
def test_permuting_prompts_or_completions_permutes_advantages(aggregation, scale):
    rewards = random_rewards(5, 6, 3)
    advantages = advantages_of(rewards, aggregation, scale)
    prompts, completions = torch.randperm(5), torch.randperm(6)
    assert close(advantages_of(rewards[prompts], aggregation, scale), advantages[prompts])
    assert close(advantages_of(rewards[:, completions], aggregation, scale), advantages[:, completions])


def test_gdpo_normalises_over_the_batch_and_not_per_prompt():
    rewards = torch.zeros(2, 4, 2)
    rewards[0, 0] = rewards[1, 0, 0] = 1  # in the first group both rewards agree, in the second one is silent
    advantages = advantages_of(rewards, "normalize_then_sum", "group")
    assert close(advantages.flatten().std(), 1.0, 1e-3)
    assert close(advantages[0], 2 * advantages[1], 1e-3)


# -------------------------------------------------------------------------------------------------- conditions
def test_a_conditioned_reward_counts_only_where_the_other_is_met():
    names = ["correct", "format", "length"]
    rewards = torch.tensor([[[3.0, 1.0, 0.5], [2.9, 1.0, 0.5]], [[-3.0, 0.0, 7.0], [4.0, 1.0, -2.0]]])
    given = rewards.clone()
    expected = torch.tensor([[[3.0, 1.0, 0.5], [2.9, 1.0, 0.0]], [[-3.0, 0.0, 0.0], [4.0, 1.0, -2.0]]])
    assert torch.equal(grpo_toy.condition_rewards(rewards, names, ["length:correct>=3"]), expected)
    assert torch.equal(rewards, given)
    assert torch.equal(grpo_toy.condition_rewards(rewards, names, []), given)


def test_conditions_look_at_the_rewards_as_they_came():
    rewards, names = torch.tensor([0.0, 1.0, 1.0]), ["correct", "format", "length"]
    for conditions in (["format:correct>=1", "length:format>=1"], ["length:format>=1", "format:correct>=1"]):
        assert grpo_toy.condition_rewards(rewards, names, conditions).tolist() == [0.0, 0.0, 1.0]


def test_two_conditions_on_one_reward_must_both_be_met():
    rewards, names = torch.tensor([[1.0, 1, 5], [1, 0, 5], [0, 1, 5], [0, 0, 5]]), ["a", "b", "c"]
    for conditions in (["c:a>=1", "c:b>=1"], ["c:b>=1", "c:a>=1"]):
        assert grpo_toy.condition_rewards(rewards, names, conditions)[:, 2].tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("length:correct>=3", ("length", "correct", 3.0)),
        ("format:my_own>=-0.25", ("format", "my_own", -0.25)),
        ("a:b>=0", ("a", "b", 0.0)),
    ],
)
def test_a_condition_names_two_rewards_and_a_threshold(text, expected):
    assert grpo_toy.parse_condition(text) == expected


MALFORMED = ["", "length", "length:correct", "length:correct>3", "length:correct>=", "length:correct>=many"]
MALFORMED += ["length>=3", ":correct>=3", "length:>=3", "length:correct<=3", "length:correct>=nan"]
MALFORMED += ["length:correct>=3;", "length:a:correct>=3", "correct>=3:length"]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_condition_is_refused_and_named(text):
    with pytest.raises(grpo_toy.UsageError) as error:
        grpo_toy.parse_condition(text)
    assert text in str(error.value) and "length:correct>=3" in str(error.value)


# ---------------------------------------------------------------------------------------------------- the loss
def ragged(rows: int = 7, length: int = 5) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of three policies, advantages and a mask, far enough apart to be clipped."""
    new = -3 * torch.rand(rows, length).double()
    old = new + 0.25 * torch.randn(rows, length) + 0.4 * torch.randn(rows, 1)
    ref = new + 0.5 * torch.randn(rows, length)
    lengths = torch.cat([torch.tensor([1, length]), torch.randint(1, length + 1, (rows - 2,))])
    mask = torch.arange(length) < lengths[:, None]
    return new.requires_grad_(), old, ref, torch.randn(rows).double(), mask


def slow_loss(new, old, ref, advantages, mask, args: grpo_toy.Args) -> torch.Tensor:
    """DeepSeekMath eq. 3, or what the relatives make of it, a token at a time, negated."""
    low, high = 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
    rows = []
    for i, advantage in enumerate(advantages.tolist()):
        tokens, terms = [t for t, counts in enumerate(mask[i].tolist()) if counts], []
        ratios = {t: new[i, t].exp() / old[i, t].exp() for t in tokens}
        if args.importance_sampling_level == "sequence":  # GSPO eq. 7, from the left: (pi / pi_old) ** (1 / |y|)
            whole = math.prod(ratios.values()) ** (1 / len(tokens))
            ratios = dict.fromkeys(tokens, whole)
        for t in tokens:
            bounded = low if ratios[t] < low else high if ratios[t] > high else ratios[t]
            plain, clipped = ratios[t] * advantage, bounded * advantage
            surrogate = clipped if clipped < plain else plain
            if args.loss_type == "reinforce":
                surrogate = advantage * new[i, t]
            elif args.loss_type == "cispo":  # MiniMax-M1 eq. 4
                surrogate = torch.as_tensor(bounded, dtype=torch.float64).detach() * advantage * new[i, t]
            elif args.loss_type == "sapo":  # SAPO eq. 5 and 6
                tau = args.sapo_temperature_pos if advantage > 0 else args.sapo_temperature_neg
                surrogate = advantage * 4 / (tau * (1 + (-tau * (ratios[t] - 1)).exp()))
            r = ref[i, t].exp() / new[i, t].exp()
            kl = {"k1": -r.log(), "k2": 0.5 * r.log() ** 2, "k3": r - r.log() - 1}[args.kl_estimator]
            terms.append(surrogate - args.beta * kl)
        rows.append(terms)
    if args.loss_type in ("grpo", "sapo"):
        objective = sum(sum(terms) / len(terms) for terms in rows) / len(rows)
    elif args.loss_type == "reinforce":
        objective = sum(sum(terms) for terms in rows) / len(rows)
    elif args.loss_type == "dr_grpo":
        objective = sum(sum(terms) / args.max_completion_length for terms in rows) / len(rows)
    else:
        objective = sum(sum(terms) for terms in rows) / sum(len(terms) for terms in rows)
    return -objective


def share(loss_type: str, length: int, mask: torch.Tensor, longest: int) -> int:
    """What the term of a token is divided by, in a sequence of this length."""
    per_sequence = len(mask) * length
    known = {"grpo": per_sequence, "sapo": per_sequence, "dr_grpo": len(mask) * longest, "reinforce": len(mask)}
    return known.get(loss_type, mask.sum().item())


def gradient(loss: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, new)[0]


@every_loss_type
@every_level
@every_estimator
def test_loss_and_gradient_are_those_of_the_papers(loss_type, level, estimator):
    how = dict(loss_type=loss_type, importance_sampling_level=level, kl_estimator=estimator, beta=0.3)
    for high in (None, 0.35):
        args = settings(max_completion_length=9, epsilon_high=high, **how)  # longer than the longest here
        new, *rest = ragged()
        loss, expected = grpo_toy.policy_loss(new, *rest, args)[0], slow_loss(new, *rest, args)
        assert close(loss, expected) and close(gradient(loss, new), gradient(expected, new))


def test_gspo_has_one_term_per_sequence():
    args = settings(importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.15)
    new, old, ref, advantages, mask = ragged()
    objective, clipped = 0, set()
    for row in range(len(mask)):  # eq. 5 and 7, with the logarithm of the ratio
        n = int(mask[row].sum())
        s = ((new[row, :n] - old[row, :n]).sum() / n).exp()
        terms = s * advantages[row], s.clamp(0.9, 1.15) * advantages[row]
        clipped.add(bool(terms[1] < terms[0]))
        objective = objective + torch.minimum(*terms) / len(mask)
    loss, _ = grpo_toy.policy_loss(new, old, ref, advantages, mask, args)
    assert clipped == {True, False}
    assert close(loss, -objective) and close(gradient(loss, new), gradient(-objective, new))


def loss_at_ratio(ratio: float, advantage: float, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient for one sequence of three tokens, all with this ratio."""
    new = torch.full((1, 3), -1.0, dtype=torch.float64, requires_grad=True)
    old = new.detach() - math.log(ratio)
    mask, args = torch.ones(1, 3, dtype=torch.bool), settings(**changes)
    loss, _ = grpo_toy.policy_loss(new, old, old, torch.tensor([advantage]).double(), mask, args)
    return loss, gradient(loss, new)


@every_level
@pytest.mark.parametrize(
    "ratio, advantage, stopped",
    [(1.3, 2.0, True), (1.3, -2.0, False), (0.7, 2.0, False), (0.7, -2.0, True), (1.1, 2.0, False), (0.9, -2.0, False)],
)
def test_the_gradient_stops_only_where_a_step_went_far_enough_in_its_own_direction(ratio, advantage, stopped, level):
    loss, slope = loss_at_ratio(ratio, advantage, importance_sampling_level=level)
    assert close(loss, -(1.2 if ratio > 1 else 0.8) * advantage if stopped else -ratio * advantage)
    assert slope.eq(0).all() if stopped else close(slope, [[-ratio * advantage / 3] * 3])


@every_level
@pytest.mark.parametrize(
    "ratio, advantage, high, stopped",
    [
        (1.25, 1.0, 0.28, False),
        (1.29, 1.0, 0.28, True),
        (0.79, -1.0, 0.28, True),
        (0.81, -1.0, 0.28, False),
        (1.25, 1.0, None, True),
        (1.19, 1.0, None, False),
        (1.01, 1.0, 0.0, True),
    ],
)
def test_epsilon_high_moves_the_upper_bound_alone(ratio, advantage, high, stopped, level):
    _, slope = loss_at_ratio(ratio, advantage, epsilon_high=high, importance_sampling_level=level)
    assert slope.eq(0).all() if stopped else slope.ne(0).all()


@every_loss_type
@every_level
def test_no_epsilon_high_is_epsilon(loss_type, level):
    new, *rest = ragged()
    how = dict(loss_type=loss_type, importance_sampling_level=level, epsilon=0.15)
    losses = [grpo_toy.policy_loss(new, *rest, settings(**how, epsilon_high=high))[0] for high in (None, 0.15)]
    assert torch.equal(*losses) and torch.equal(*(gradient(loss, new) for loss in losses))


@every_loss_type
@every_level
def test_the_first_step_is_that_of_reinforce(loss_type, level):
    new, _, ref, advantages, mask = ragged()
    args = settings(loss_type=loss_type, importance_sampling_level=level)
    loss, stats = grpo_toy.policy_loss(new, new.detach(), ref, advantages, mask, args)
    assert stats["ratio/max"] == 1 and stats["clip_ratio/low_mean"] == stats["clip_ratio/high_mean"] == 0
    expected = torch.zeros_like(new)
    for i, t in mask.nonzero().tolist():
        expected[i, t] = -advantages[i] / share(loss_type, mask[i].sum().item(), mask, args.max_completion_length)
    assert close(gradient(loss, new), expected)


@every_loss_type
@every_level
@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan, 1e30, -700.0])
def test_what_the_mask_leaves_out_changes_neither_loss_nor_gradient_nor_statistics(loss_type, level, fill):
    new, old, ref, advantages, mask = ragged()
    args = settings(loss_type=loss_type, importance_sampling_level=level, beta=0.3, kl_estimator="k3")
    loss, stats = grpo_toy.policy_loss(new, old, ref, advantages, mask, args)
    for spoiled in ((0,), (1,), (2,), (0, 1, 2)):
        inputs = [new.detach(), old, ref]
        for i in spoiled:
            inputs[i] = inputs[i].masked_fill(~mask, fill)
        inputs[0].requires_grad_()
        other_loss, other_stats = grpo_toy.policy_loss(*inputs, advantages, mask, args)
        assert torch.equal(other_loss, loss) and {k: v.item() for k, v in stats.items()} == {
            k: v.item() for k, v in other_stats.items()
        }
        slope = gradient(other_loss, inputs[0])
        assert torch.equal(slope, gradient(grpo_toy.policy_loss(new, old, ref, advantages, mask, args)[0], new))
        assert slope[~mask].eq(0).all() and slope[mask].ne(0).any()


@every_loss_type
@every_level
def test_a_row_that_is_masked_as_a_whole_has_no_gradient(loss_type, level):
    new, old, ref, advantages, mask = ragged()
    mask[2] = False
    args = settings(loss_type=loss_type, importance_sampling_level=level, beta=0.3, epsilon=9.0)
    loss, stats = grpo_toy.policy_loss(new, old, ref, advantages, mask, args)
    slope = gradient(loss, new)
    assert loss.isfinite() and all(value.isfinite() for value in stats.values())
    assert slope[2].eq(0).all() and slope[mask].ne(0).all()
    nothing, stats = grpo_toy.policy_loss(new, old, ref, advantages, torch.zeros_like(mask), args)
    assert nothing == 0 and gradient(nothing, new).eq(0).all() and all(value.isfinite() for value in stats.values())


def test_clip_ratios_are_shares_of_the_tokens():
    ratios = torch.tensor([[0.5, 1.5, 1.0, 9.0], [0.5, 0.7, 1.5, 0.85], [1.25, 1.35, 1.4, 0.1]]).double()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    advantages = torch.tensor([1.0, -1.0, 2.0]).double()
    zeros = torch.zeros(3, 4).double()
    args = settings(epsilon=0.2, epsilon_high=0.3)
    _, stats = grpo_toy.policy_loss(ratios.log(), zeros, zeros, advantages, mask, args)
    assert close(stats["clip_ratio/low_mean"], 2 / 9, 1e-6)  # 0.5 and 0.7 in the second row
    assert close(stats["clip_ratio/high_mean"], 2 / 9, 1e-6)  # 1.5 in the first, 1.35 in the third
    assert close(stats["ratio/max"], 1.5)
    args = settings(epsilon=0.2, epsilon_high=0.3, loss_type="cispo")  # clips the weight, whatever the sign
    _, stats = grpo_toy.policy_loss(ratios.log(), zeros, zeros, advantages, mask, args)
    assert close(stats["clip_ratio/low_mean"], 3 / 9, 1e-6) and close(stats["clip_ratio/high_mean"], 3 / 9, 1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, weight",
    [(9.0, 2.0, 5.0), (9.0, -2.0, 5.0), (1.3, 2.0, 1.3), (0.7, -2.0, 0.7), (1e-3, -2.0, 1e-3), (1e-3, 2.0, 1e-3)],
)
def test_cispo_clips_the_weight_and_leaves_every_token_its_gradient(ratio, advantage, weight):
    """Its row of defaults, where PPO's gradient is 0 for the first, third, fourth and fifth of these tokens."""
    row = grpo_toy.METHODS["cispo"]
    loss, slope = loss_at_ratio(ratio, advantage, **row)
    assert close(loss, weight * advantage)  # minus the weight times A times a log-probability of -1
    assert close(slope, [[-weight * advantage / 3] * 3])  # any gradient of the weight would add to this
    _, ppo = loss_at_ratio(ratio, advantage)
    assert ppo.eq(0).all() == ((ratio > 1) == (advantage > 0))


@pytest.mark.parametrize("tau_pos, tau_neg", [(1.0, 1.05), (0.5, 4.0)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_sapo_weighs_a_token_by_the_gate_of_its_paper(advantage, tau_pos, tau_neg):
    tau = tau_pos if advantage > 0 else tau_neg
    for ratio in (1e-3, 0.3, 0.9, 1.0, 1.1, 2.0, 7.0):
        how = dict(loss_type="sapo", sapo_temperature_pos=tau_pos, sapo_temperature_neg=tau_neg)
        loss, slope = loss_at_ratio(ratio, advantage, **how)
        p = 1 / (1 + math.exp(-tau * (ratio - 1)))
        assert close(loss, -4 / tau * p * advantage)
        assert close(slope, [[-4 * p * (1 - p) * ratio * advantage / 3] * 3])  # the weight is 4 p (1 - p), 1 at ratio 1
        assert ratio != 1 or close(slope, [[-advantage / 3] * 3])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 2.0, 5.0])
def test_sapo_lets_go_of_a_negative_advantage_sooner(ratio):
    row = grpo_toy.METHODS["sapo"]
    (_, up), (_, down) = (loss_at_ratio(ratio, advantage, **row) for advantage in (1.0, -1.0))
    assert up.lt(0).all() and down.gt(0).all() and (down < -up).all()


def test_a_kl_in_the_reward_is_not_in_the_loss():
    new, *rest = ragged()
    for loss_type in LOSS_TYPES:
        losses = [
            grpo_toy.policy_loss(new, *rest, settings(loss_type=loss_type, beta=beta, kl_in_reward=inside))
            for beta, inside in ((0.0, False), (0.3, True), (0.3, False))
        ]
        assert torch.equal(losses[0][0], losses[1][0]) and not torch.equal(losses[0][0], losses[2][0])
        assert losses[0][1]["kl"] == losses[1][1]["kl"] > 0  # but it is logged


@every_loss_type
@every_estimator
def test_beta_weighs_the_kl(loss_type, estimator):
    new, old, ref, advantages, mask = ragged()
    losses = []
    for beta in (0.0, 0.1, 0.4):
        args = settings(beta=beta, loss_type=loss_type, kl_estimator=estimator, max_completion_length=9)
        loss, stats = grpo_toy.policy_loss(new, old, ref, advantages, mask, args)
        losses.append(loss)
    none, some, much = losses
    assert close(much - none, 4 * (some - none)) and abs(some - none) > 1e-4
    x = (new - ref).detach()
    kinds = {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}
    assert close(stats["kl"], kinds[estimator][mask].mean())
    assert all(close(stats[f"kl/{kind}"], value[mask].mean()) for kind, value in kinds.items())
    expected = {"grpo": sum(kl[m].mean() for kl, m in zip(kinds[estimator], mask)) / len(mask)}
    expected |= {"sapo": expected["grpo"], "dapo": stats["kl"], "cispo": stats["kl"]}
    expected |= {name: kinds[estimator][mask].sum() / len(mask) / n for name, n in (("dr_grpo", 9), ("reinforce", 1))}
    assert close(much - none, 0.4 * expected[loss_type])


# ------------------------------------------------------------------------------------------------ the KL estimate
def test_k3_is_never_negative():
    for scale in (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0, 10.0, 60.0):
        logprobs = -2 * torch.rand(20_000)
        assert grpo_toy.kl_estimate(logprobs, logprobs + scale * torch.randn(20_000), "k3").min() >= 0
        assert grpo_toy.kl_estimate(torch.zeros(20_000), scale * torch.randn(20_000), "k3").min() >= 0
    extreme = torch.tensor([-1e4, -200.0, -1e-30, 0.0, 1e-30, 80.0])
    assert grpo_toy.kl_estimate(torch.zeros(6), extreme, "k3").min() >= 0
    assert close(grpo_toy.kl_estimate(torch.zeros(1), torch.tensor([1e-2]), "k3"), [math.exp(1e-2) - 1.01], 1e-8)


def two_categoricals() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and log-probabilities of pi, and log-probabilities of its reference, over five classes."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4]).double().requires_grad_()
    ref = torch.tensor([-0.5, 0.8, 0.1, -1.5, 0.6]).double().log_softmax(0)
    return logits, logits.log_softmax(0), ref


def test_k1_and_k3_have_the_mean_of_the_kl_and_k2_is_close_to_it():
    _, logprobs, ref = two_categoricals()
    for share, bias in ((1.0, 0.1), (0.1, 0.1), (0.01, 0.01)):
        other = (logprobs + share * (ref - logprobs)).log_softmax(0)
        exact = sum(math.exp(p) * (p - q) for p, q in zip(logprobs.tolist(), other.tolist()))
        mean = {k: (logprobs.exp() * grpo_toy.kl_estimate(logprobs, other, k)).sum().item() for k in ESTIMATORS}
        assert exact > 0 and close(mean["k1"], exact) and close(mean["k3"], exact)
        assert 1e-4 < abs(mean["k2"] / exact - 1) < bias


def exact_gradient(logits, logprobs, ref, estimator: str) -> torch.Tensor:
    """Nothing, or that of KL(pi || ref), or that of KL(ref || pi)."""
    there, back = (logprobs.exp() * (logprobs - ref)).sum(), (ref.exp() * (ref - logprobs)).sum()
    exact = {"k1": 0 * there, "k2": there, "k3": back}[estimator]
    return torch.autograd.grad(exact, logits, retain_graph=True)[0]


@every_estimator
def test_the_mean_gradient_of_an_estimator_is_what_its_docstring_says(estimator):
    logits, logprobs, ref = two_categoricals()
    estimate = grpo_toy.kl_estimate(logprobs, ref, estimator)
    slope = torch.autograd.grad((logprobs.exp().detach() * estimate).sum(), logits, retain_graph=True)[0]
    assert close(slope, exact_gradient(logits, logprobs, ref, estimator))


@every_estimator
def test_samples_agree_with_the_exact_kl_and_its_gradient(estimator):
    logits, logprobs, ref = two_categoricals()
    tokens = torch.multinomial(logprobs.exp().detach(), 200_000, replacement=True)
    per_class = grpo_toy.kl_estimate(logprobs, ref, estimator)
    slopes = torch.stack([torch.autograd.grad(x, logits, retain_graph=True)[0] for x in per_class])[tokens]
    values, exact = per_class.detach()[tokens], exact_gradient(logits, logprobs, ref, estimator)
    kl = (logprobs.exp() * (logprobs - ref)).sum().detach()
    for sampled, mean in [(slopes, exact)] + [(values, kl)] * (estimator != "k2"):
        error = sampled.std(0) / len(tokens) ** 0.5
        assert (sampled.mean(0) - mean).abs().le(4 * error).all() and error.max() < 0.02


# ------------------------------------------------------------------------------------------------ RLOO, exactly
@pytest.mark.parametrize("fill", [0.0, math.inf, -math.inf, math.nan])
def test_the_kl_reward_of_a_sequence_is_its_log_ratio_and_nothing_after_its_end_matters(fill):
    new, _, ref, _, mask = ragged()
    expected = []
    for logprobs, ref_logprobs, counts in zip(new.tolist(), ref.tolist(), mask.tolist()):
        pairs = [pair for *pair, counted in zip(logprobs, ref_logprobs, counts) if counted]
        expected.append(math.log(math.prod(math.exp(r) for _, r in pairs) / math.prod(math.exp(p) for p, _ in pairs)))
    new, ref = (x.detach().masked_fill(~mask, fill) for x in (new, ref))
    assert close(grpo_toy.kl_reward(new, ref, mask), expected)
    assert grpo_toy.kl_reward(new, ref, torch.zeros_like(mask)).eq(0).all()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_rloo_is_unbiased_with_the_kl_in_the_reward(size, beta):
    """Three sequences, (0), (1, 0) and (1, 1): the mean over all groups is the exact gradient."""
    logits = torch.tensor([[0.4, -0.7], [1.1, 0.2]]).double().requires_grad_()
    ref = torch.tensor([[-0.3, 0.5], [0.9, -1.4]]).double().log_softmax(1)
    tokens, mask = torch.tensor([[0, 0], [1, 0], [1, 1]]), torch.tensor([[1, 0], [1, 1], [1, 1]]).bool()
    rewards, weights = (torch.tensor(x, dtype=torch.float64) for x in ([2, -3, 5], [1, beta]))

    def scores(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([table[0, tokens[:, 0]], table[1, tokens[:, 1]]], 1)

    odds = [scores(logits.softmax(1))[i][mask[i]].prod() for i in range(3)]
    ref_odds = [scores(ref.exp())[i][mask[i]].prod() for i in range(3)]
    objective = sum(p * (r - beta * (p / q).log()) for p, q, r in zip(odds, ref_odds, rewards))
    exact = torch.autograd.grad(objective, logits, retain_graph=True)[0]
    args = settings(**grpo_toy.METHODS["rloo"] | dict(beta=beta))
    found = {}
    for leave_one_out in (True, False):
        mean = 0
        for group in itertools.product(range(3), repeat=size):
            group = list(group)
            logprobs, ref_logprobs = (scores(table)[group] for table in (logits.log_softmax(1), ref))
            kl = grpo_toy.kl_reward(logprobs.detach(), ref_logprobs, mask[group])
            both = torch.stack([rewards[group], kl], -1)[None]
            how = args.multi_objective_aggregation, args.scale_rewards, leave_one_out
            advantages = grpo_toy.group_advantages(both, weights, *how)[0]
            loss, _ = grpo_toy.policy_loss(logprobs, logprobs.detach(), ref_logprobs, advantages, mask[group], args)
            chance = math.prod(odds[i].item() for i in group)
            mean = mean - chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        found[leave_one_out] = mean
    assert exact.abs().min() > 0.01 and close(found[True], exact)
    assert close(found[False], exact * (1 - 1 / size))  # a mean that a completion is part of takes its share away


# --------------------------------------------------------------------------------------------------- the verifier
SIX = dict(num_digits=6, max_completion_length=16, overlong_buffer=4)


def verdicts(name: str, prompt: str, completions: list[str]) -> list[float]:
    return [getattr(grpo_toy, f"reward_{name}")(prompt, text, settings(**SIX)) for text in completions]


RIGHT = "[023567]$ (023567)$ 023567$ ..[023567]$ ..(023567]$ 9023567$ 999999[023567]$ 0.2.3.5.6.7$ ]023567[$ [[023567$"
RIGHT += " 023[567]$ [023567]..$ _02^3567_$ [023567]()[]$ ......[0235]67$"
WRONG = " $ [023567] 023567 [02356]$ [0235677]$ [023567]0$ 0[02356]$ (765320)$ [630275]$ [235670]$ ......$ []$ [23567]$"
WRONG += " [000000]$ 0235.67 ______$ [023567]1$"


def test_the_last_digits_of_an_answer_that_ended_are_right_in_whatever_brackets():
    right, wrong = RIGHT.split(" "), WRONG.split(" ")
    assert "" in wrong
    assert verdicts("correct", "630275", right) == [3] * len(right)
    assert verdicts("correct", "630275", wrong) == [-3] * len(wrong)
    assert verdicts("exact", "630275", right) == [1] * len(right)
    assert verdicts("exact", "630275", wrong) == [0] * len(wrong)


@pytest.mark.parametrize(
    "prompt, right, wrong",
    [
        ("110000", ["[000011]$", "0000011$"], ["[11]$", "[000001]$", "[001100]$", "[110000]$", "[00011]$"]),
        ("555555", ["[555555]$", "(5555555)$"], ["[5]$", "[55555]$", "[555556]$"]),
        ("000000", ["[000000]$"], ["[]$", "[0]$", "$", "[00000]$"]),
        ("987789", ["[778899]$"], ["[789]$", "[789789]$", "[778999]$"]),
    ],
)
def test_repeated_digits_and_leading_zeros_are_kept(prompt, right, wrong):
    assert set(verdicts("correct", prompt, right)) == {3}
    assert set(verdicts("correct", prompt, wrong)) == {-3}


def test_format_is_dots_then_digits_in_square_brackets_and_nothing_else():
    good = ["[023567]$", "..[023567]$", "......[1]$", "[765320]$", "[0235677]$", "[0]$"]
    bad = " $ [023567] (023567)$ [023567)$ (023567]$ 023567$ []$ ..[]$ [023567]..$ .[023567].$ [02.35]$ [[023567]]$"
    bad += " [[023567]$ [023567]]$ ]023567[$ 1[023567]$ [023567]1$ [02][35]$ _[023567]$ ^[023567]$ [02_35]$ [023567]_$"
    bad += " ([023567])$ [023567$ 023567]$ ......"
    bad = bad.split(" ")
    assert verdicts("format", "630275", good) == [1] * len(good)
    assert verdicts("format", "630275", bad) == [0] * len(bad)


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("[023567]$", 1),  # the shortest, 9 tokens
        (".[023567]$", 1),
        ("..[023567]$", 1),  # 11
        ("...[023567]$", 0),  # 12
        ("$", 1),
        ("..........$", 1),
        ("...........$", 0),
        ("", 0),
        ("[023567]", 0),
        ("..[023567].", 0),
        ("......(765320)..", 0),
    ],
)
def test_length_is_an_end_after_eleven_tokens_at_most(completion, expected):
    assert verdicts("length", "630275", [completion]) == [expected]


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("[023567]$", 1),
        ("(111111)$", 1),
        ("[000009]$", 1),
        ("9.9[123456]$", 1),
        ("[1.2.3.3.3.4]$", 1),
        ("[765320]$", 0),
        ("[123465]$", 0),
        ("[12345]$", 0),
        ("[123456]0$", 0),
        ("[123456]", 0),
        ("$", 0),
        ("", 0),
    ],
)
def test_rising_asks_only_that_the_digits_of_the_answer_do_not_fall(completion, expected):
    assert verdicts("rising", "630275", [completion]) == [expected]


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("$", 0),
        ("...[023567]$", 0),  # 12 of 16 tokens, the buffer has 4
        ("....[023567]$", -0.25),
        (".....[023567]$", -0.5),
        ("......[023567]$", -0.75),
        (".......[023567]$", -1),
        (".......[023567].", -1),
        ("[023567]", -1),
        ("", -1),
    ],
)
def test_overlong_falls_from_zero_to_minus_one_over_the_buffer(completion, expected):
    assert close(verdicts("overlong", "630275", [completion]), [float(expected)])


# ------------------------------------------------------------------------------------------------------- sampling
def ask(*prompts: str) -> torch.Tensor:
    return torch.tensor([[grpo_toy.BOS, *map(grpo_toy.TOKENS.index, prompt)] for prompt in prompts])


def slow_logprobs(model, prompts: torch.Tensor, completions: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of each token by a forward pass over all that stands before it, one at a time."""
    columns = []
    for t in range(completions.shape[1]):
        before = torch.cat([prompts, completions[:, :t]], 1)
        odds = (model(before)[:, -1] / temperature).softmax(-1)
        columns.append(torch.stack([p[token] for p, token in zip(odds, completions[:, t])]).log())
    return torch.stack(columns, 1)


@every_temperature
def test_the_cache_scores_what_it_samples_as_a_full_forward_pass_does(temperature):
    args = settings(temperature=temperature, max_completion_length=9)
    model, seen = small_model(args), []
    hook = model.register_forward_hook(lambda model, inputs, logits: seen.append(logits[:, -1]))
    prompts = ask("07", "70", "35")
    completions = grpo_toy.generate(model, prompts, 5, dice(), args)
    hook.remove()
    assert len(seen) == completions.shape[1] and len(seen[0]) == 3 and len(completions) == 15
    cached = (torch.stack([seen[0].repeat_interleave(5, 0), *seen[1:]], 1) / temperature).log_softmax(-1)
    prompts, mask = prompts.repeat_interleave(5, 0), grpo_toy.completion_mask(completions)
    logprobs, entropies = grpo_toy.completion_logprobs(model, prompts, completions, args)
    taken = cached.gather(-1, completions[..., None])[..., 0]
    assert logprobs.shape == completions.shape and close(taken[mask], logprobs[mask])
    assert close(logprobs, slow_logprobs(model, prompts, completions, temperature))
    assert close(entropies[mask], -(cached.exp() * cached).sum(-1)[mask])


@every_temperature
def test_samples_follow_the_distribution_that_scores_them(temperature):
    args = settings(temperature=temperature, max_completion_length=2)
    model, count, tokens = small_model(args), 20_000, len(grpo_toy.TOKENS)
    pairs = torch.cartesian_prod(torch.arange(tokens), torch.arange(tokens))
    pairs = pairs[(pairs[:, 0] != grpo_toy.EOS) | (pairs[:, 1] == grpo_toy.PAD)]
    prompt = ask("40")
    logprobs, _ = grpo_toy.completion_logprobs(model, prompt.expand(len(pairs), -1), pairs, args)
    expected = torch.where(grpo_toy.completion_mask(pairs), logprobs, 0.0).sum(1).exp() * count
    assert close(expected.sum(), float(count), 1e-6)
    samples = grpo_toy.generate(model, prompt, count, dice(), args)
    cells = {tuple(pair): i for i, pair in enumerate(pairs.tolist())}
    observed = torch.bincount(torch.tensor([cells[tuple(pair)] for pair in samples.tolist()]), minlength=len(pairs))
    rare = expected < 5
    if rare.any():
        expected, observed = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, observed))
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert freedom > 15 and abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_greedy_completions_are_the_likeliest_tokens_and_groups_are_contiguous():
    args = settings(max_completion_length=8)
    model, prompts = small_model(args), ["07", "70", "35", "99"]
    completions = grpo_toy.generate(model, ask(*prompts), 3, dice(), args, greedy=True)
    assert len({tuple(row) for row in completions.tolist()}) > 1
    for row, prompt in zip(completions.tolist(), [prompt for prompt in prompts for _ in range(3)]):
        text = ask(prompt)[0].tolist()
        for token in row:
            expected = model(torch.tensor([text]))[0, -1].argmax().item()
            assert token == (grpo_toy.PAD if grpo_toy.EOS in text else expected)
            text.append(token)
    assert torch.equal(grpo_toy.generate(model, ask(*prompts), 3, dice(7), args, greedy=True), completions)


def test_after_the_end_comes_only_padding_and_the_mask_takes_the_end_in():
    args = settings(max_completion_length=7)
    completions = grpo_toy.generate(small_model(args), ask("07", "31"), 300, dice(), args)
    mask, ended = grpo_toy.completion_mask(completions), 0
    for row, counts in zip(completions.tolist(), mask.tolist()):
        length = row.index(grpo_toy.EOS) + 1 if grpo_toy.EOS in row else len(row)
        assert counts == [True] * length + [False] * (len(row) - length)
        assert set(row[length:]) <= {grpo_toy.PAD}
        ended += grpo_toy.EOS in row
    assert 20 < ended < 580 and (completions[mask] == grpo_toy.PAD).any()


def test_the_mask_ends_with_the_first_end():
    eos, pad = grpo_toy.EOS, grpo_toy.PAD
    rows = [[5, eos, pad, pad], [eos, eos, 5, eos], [pad, 5, 6, eos], [pad, pad, 5, 6], [5, eos, 7, eos]]
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    mask = grpo_toy.completion_mask(torch.tensor(rows))
    assert mask.dtype == torch.bool and mask.int().tolist() == expected
    assert len({pad, eos, grpo_toy.BOS}) == 3


def test_a_text_survives_encoding_and_decoding():
    texts = ["..[012345]$", "$", "(9)[]$", "^_.[67]$"]
    tokens = grpo_toy.encode(texts, 12)
    assert tokens.shape == (4, 12) and grpo_toy.decode(tokens, grpo_toy.completion_mask(tokens)) == texts
    truncated = grpo_toy.encode(["..(98", "[0123"], 5)
    assert grpo_toy.decode(truncated, grpo_toy.completion_mask(truncated)) == ["..(98", "[0123"]


def test_a_group_holds_the_completions_and_rewards_of_its_own_prompt(monkeypatch):
    monkeypatch.setattr(grpo_toy, "reward_number", lambda prompt, completion, args: int(prompt), raising=False)
    monkeypatch.setattr(grpo_toy, "reward_size", lambda prompt, completion, args: len(completion), raising=False)
    args, prompts = settings(), ["07", "70", "35"]
    groups = grpo_toy.sample_groups(small_model(args), prompts, 5, ["number", "size"], dice(), args)
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert group.rewards.tolist() == [[int(group.prompt), len(text)] for text in group.texts]
        assert len(group.texts) == 5 and group.completions.shape == (5, args.max_completion_length)
        assert group.texts == grpo_toy.decode(group.completions, grpo_toy.completion_mask(group.completions))


def test_training_and_held_out_prompts_are_disjoint():
    train, held_out = (set(grpo_toy.sample_prompts(15_000, 3, dice(), which)) for which in (False, True))
    assert not train & held_out and len(train | held_out) == 1000  # all that there are, so each is on one side
    assert 70 <= len(held_out) <= 130 and all(len(prompt) == 3 and prompt.isdigit() for prompt in train | held_out)


def test_a_tenth_of_the_six_digit_prompts_is_held_out():
    draws = []

    def choices(*given, **options) -> list[str]:
        draws.append(given)
        return random.choices(*given, **options)

    prompts = grpo_toy.sample_prompts(1000, 6, SimpleNamespace(python=SimpleNamespace(choices=choices)), held_out=True)
    assert 0.085 < 1000 / len(draws) < 0.115 and any(prompt[0] == "0" for prompt in prompts)


# -------------------------------------------------------------------------------------------- a step of the method
@pytest.fixture
def own_rewards(monkeypatch):
    """Two rewards that a model of random weights varies in."""

    def digits(prompt: str, completion: str, args: grpo_toy.Args) -> int:
        return sum(map(str.isdigit, completion))

    monkeypatch.setattr(grpo_toy, "reward_digits", digits, raising=False)
    monkeypatch.setattr(grpo_toy, "reward_ended", lambda prompt, text, args: text[-1:] == "$", raising=False)


def a_batch(model, args: grpo_toy.Args) -> grpo_toy.Batch:
    """A rollout whose advantages are all different."""
    batch = grpo_toy.rollout(model, None, dice(), args)[-1]
    return batch._replace(advantages=torch.randn(len(batch.mask)).double())


def take_a_step(model, reference, batch, args: grpo_toy.Args, kind=torch.optim.AdamW, **options) -> dict[str, float]:
    return grpo_toy.update(model, reference, kind(model.parameters(), **options), batch, 1e-3, dice(), args)


def reinforce_gradient(model, batch: grpo_toy.Batch, args: grpo_toy.Args) -> dict[str, torch.Tensor]:
    """Of the sum of -A log pi with the weights of the loss type, tokens one by one."""
    model = copy.deepcopy(model)
    loss = 0
    for prompt, row, counts, advantage in zip(*batch):
        logprobs = model(torch.cat([prompt, row])[None])[0].log_softmax(-1)
        length = counts.sum().item()
        for t in range(length):
            weight = advantage / share(args.loss_type, length, batch.mask, args.max_completion_length)
            loss = loss - weight * logprobs[len(prompt) - 1 + t, row[t]]
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@every_loss_type
@every_level
def test_the_first_gradient_of_a_model_is_that_of_reinforce(loss_type, level):
    args = settings(loss_type=loss_type, importance_sampling_level=level)
    model = small_model(args)
    batch = a_batch(model, args)
    logprobs, _ = grpo_toy.completion_logprobs(model, batch.prompts, batch.completions, args)
    old = logprobs.detach()
    loss, stats = grpo_toy.policy_loss(logprobs, old, old, batch.advantages, batch.mask, args)
    loss.backward()
    assert stats["ratio/max"] == 1
    expected = reinforce_gradient(model, batch, args)
    assert all(close(weight.grad, expected[name]) for name, weight in model.named_parameters())


@every_loss_type
def test_tokens_after_the_end_change_neither_loss_nor_gradient_of_a_model(loss_type):
    args = settings(loss_type=loss_type, beta=0.2, max_completion_length=8)
    model, reference = small_model(args), small_model(args)
    batch = a_batch(model, args)
    noise = torch.randint(0, len(grpo_toy.TOKENS), batch.completions.shape)
    spoiled = torch.where(batch.mask, batch.completions, noise)
    assert (spoiled != batch.completions).any() and torch.equal(grpo_toy.completion_mask(spoiled), batch.mask)
    results = []
    for completions in (batch.completions, spoiled):
        model.zero_grad()
        logprobs = grpo_toy.completion_logprobs(model, batch.prompts, completions, args)[0]
        ref = grpo_toy.completion_logprobs(reference, batch.prompts, completions, args)[0].detach()
        loss, _ = grpo_toy.policy_loss(logprobs, logprobs.detach(), ref, batch.advantages, batch.mask, args)
        loss.backward()
        results.append((loss.detach(), [weight.grad.clone() for weight in model.parameters()]))
    (loss, slopes), (other_loss, other_slopes) = results
    assert close(loss, other_loss) and all(map(close, slopes, other_slopes))


@every_loss_type
def test_an_update_is_one_adamw_step_along_the_gradient_of_reinforce(loss_type):
    args = settings(loss_type=loss_type, beta=0.3, kl_estimator="k3")  # k3 has no slope where policy is reference
    model = small_model(args)
    start, batch = copy.deepcopy(model.state_dict()), a_batch(model, args)
    slopes = reinforce_gradient(model, batch, args)
    take_a_step(model, copy.deepcopy(model), batch, args, lr=99.0, weight_decay=0.0, eps=1e-8)
    for name, weight in model.named_parameters():
        assert close(weight, start[name] - 1e-3 * slopes[name] / (slopes[name].abs() + 1e-8), 1e-8)


def test_an_update_clips_the_norm_of_the_gradient():
    args = settings(max_grad_norm=0.01)
    model = small_model(args)
    start, batch = copy.deepcopy(model.state_dict()), a_batch(model, args)
    slopes = reinforce_gradient(model, batch, args)
    norm = math.sqrt(sum(slope.square().sum().item() for slope in slopes.values()))
    values = take_a_step(model, copy.deepcopy(model), batch, args, torch.optim.SGD, lr=99.0)
    assert norm > 0.02 and close(values["grad_norm"], norm, 1e-6)
    for name, weight in model.named_parameters():
        assert close(weight, start[name] - 1e-3 * slopes[name] * 0.01 / norm, 1e-8)


@every_level
@pytest.mark.parametrize("steps", [1, 4])
def test_the_ratio_of_the_first_step_is_exactly_one_and_the_reference_stays(steps, level):
    args = settings(num_iterations=3, steps_per_generation=steps, importance_sampling_level=level, beta=0.1)
    model = small_model(args).float()
    reference = copy.deepcopy(model)
    kept, batch = copy.deepcopy(reference.state_dict()), a_batch(model, args)
    values = take_a_step(model, reference, batch, args)
    assert values["ratio/max_first_step"] == 1.0
    assert all(torch.equal(weight, kept[name]) for name, weight in reference.state_dict().items())
    assert not any(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())
    assert values["ratio/max"] > 1


def test_every_step_compares_with_the_policy_that_sampled_and_every_epoch_sees_each_row_once(monkeypatch):
    args = settings(num_iterations=2, steps_per_generation=4)
    model, reference, calls = small_model(args), small_model(args), []
    batch = a_batch(model, args)
    real = grpo_toy.policy_loss
    monkeypatch.setattr(grpo_toy, "policy_loss", lambda *given: calls.append(given) or real(*given))
    scores = [
        grpo_toy.completion_logprobs(net, batch.prompts, batch.completions, args)[0].detach()
        for net in (model, reference)
    ]
    take_a_step(model, reference, batch, args)
    assert len(calls) == 8
    for epoch in (calls[:4], calls[4:]):
        new, old, ref, advantages, mask = (torch.cat(parts) for parts in list(zip(*epoch))[:5])
        rows = [batch.advantages.tolist().index(advantage) for advantage in advantages.tolist()]
        assert sorted(rows) == list(range(24)) and torch.equal(mask, batch.mask[rows])
        assert close(old, scores[0][rows]) and close(ref, scores[1][rows])
        assert not close(new, scores[0][rows], 1e-4)


def test_an_advantage_that_is_no_number_ends_the_run():
    args = settings()
    model = small_model(args)
    batch = a_batch(model, args)
    batch.advantages[3] = math.nan
    values = take_a_step(model, copy.deepcopy(model), batch, args)
    with pytest.raises(grpo_toy.Failed, match="^loss is nan$"):
        grpo_toy.Run.log(SimpleNamespace(gathered=[], args=args), 1, [], values)


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(condition=["digits:ended>=1"], reward_weights=[0.5, 2.0]),
        dict(multi_objective_aggregation="normalize_then_sum", scale_rewards="batch", condition=["digits:ended>=1"]),
    ],
)
def test_a_rollout_compares_the_completions_of_each_prompt(own_rewards, how):
    args = settings(rewards=["digits", "ended"], max_completion_length=8, **how)
    groups, _, batch = grpo_toy.rollout(small_model(args), None, dice(), args)
    assert len(groups) == 6 and batch.advantages.shape == (24,)
    texts = grpo_toy.decode(batch.completions, grpo_toy.completion_mask(batch.completions))
    assert texts == [text for group in groups for text in group.texts]
    prompts = [group.prompt for group in groups for _ in range(4)]
    assert torch.equal(batch.prompts, ask(*prompts))
    assert torch.equal(batch.mask, grpo_toy.completion_mask(batch.completions)) and batch.mask.any(0).all()
    rewards = [[[sum(map(str.isdigit, text)), text[-1] == "$"] for text in group.texts] for group in groups]
    if args.condition:
        rewards = [[[digits * ended, ended] for digits, ended in group] for group in rewards]
    expected = slow_advantages(rewards, args.reward_weights, args.multi_objective_aggregation, args.scale_rewards)
    assert close(batch.advantages, [x for group in expected for x in group], 1e-5)
    assert batch.advantages.ne(0).any()


@pytest.mark.parametrize("masked", [False, True])
def test_a_rollout_takes_the_kl_of_whole_completions_off_their_rewards(own_rewards, masked):
    how = dict(kl_in_reward=True, leave_one_out=True, scale_rewards="none", beta=0.3, reward_weights=[2.0])
    args = settings(rewards=["digits"], max_completion_length=8, mask_truncated_completions=masked, **how)
    model, reference = small_model(args), small_model(args)
    groups, _, batch = grpo_toy.rollout(model, reference, dice(), args)
    mask = grpo_toy.completion_mask(batch.completions)
    assert (batch.mask.sum() < mask.sum()) == masked  # but in the rewards all tokens count
    with torch.no_grad():
        one, other = (slow_logprobs(net, batch.prompts, batch.completions, 1.0) for net in (model, reference))
    kl = [(x - y)[m].sum().item() for x, y, m in zip(one, other, mask)]
    rewards = [2.0 * sum(map(str.isdigit, text)) for group in groups for text in group.texts]
    rewards = [[[r - 0.3 * k] for r, k in zip(rewards, kl)][i : i + 4] for i in range(0, 24, 4)]
    expected = slow_advantages(rewards, [1.0], "sum_then_normalize", "none", True)
    assert close(batch.advantages, [x for group in expected for x in group], 1e-4)
    assert groups[0].rewards.shape == (4, 1)  # what is logged is what the functions said


def test_dynamic_sampling_replaces_groups_whose_first_reward_does_not_vary(monkeypatch):
    def mine(prompt: str, completion: str, args: grpo_toy.Args) -> float:
        return random.random() if int(prompt) % 4 == 0 else 1.0

    monkeypatch.setattr(grpo_toy, "reward_mine", mine, raising=False)
    monkeypatch.setattr(grpo_toy, "reward_noise", lambda prompt, text, args: random.random(), raising=False)
    args = settings(rewards=["mine", "noise"], dynamic_sampling=True, max_completion_length=3)
    groups, chosen, batch = grpo_toy.rollout(small_model(args), None, dice(), args)
    prompts = ["".join(grpo_toy.TOKENS[i] for i in row[1:]) for row in batch.prompts.tolist()]
    assert prompts == [group.prompt for group in chosen for _ in range(4)]
    assert [group.prompt for group in chosen] == [group.prompt for group in groups if not grpo_toy.is_flat(group)][:6]
    flat = [grpo_toy.is_flat(group) for group in groups]
    assert flat != sorted(flat)  # as they were drawn, so that the last 100 completions are no others than the rest
    assert len(prompts) == 24 and all(int(prompt) % 4 == 0 for prompt in prompts)
    assert 12 <= len(groups) < 60 and len(groups) % 6 == 0
    varied = sum(int(group.prompt) % 4 == 0 for group in groups)
    assert 6 <= varied < 12  # it stops as soon as there are enough
    groups, _, batch = grpo_toy.rollout(
        small_model(args), None, dice(), settings(rewards=["mine", "noise"], max_completion_length=3)
    )
    assert len(groups) == 6 and len(batch.mask) == 24


def test_dynamic_sampling_gives_up_after_ten_rounds(monkeypatch):
    monkeypatch.setattr(grpo_toy, "reward_mine", lambda prompt, completion, args: 0.1, raising=False)
    args = settings(rewards=["mine"], dynamic_sampling=True, max_completion_length=3)
    groups, _, batch = grpo_toy.rollout(small_model(args), None, dice(), args)
    assert len(groups) == 60 and len(batch.mask) == 24 and batch.advantages.eq(0).all()


def test_masking_truncated_completions_leaves_exactly_them_out(own_rewards):
    args = settings(rewards=["digits"], mask_truncated_completions=True, max_completion_length=8)
    *_, batch = grpo_toy.rollout(small_model(args), None, dice(), args)
    ended = torch.tensor([grpo_toy.EOS in row for row in batch.completions.tolist()])
    assert 0 < ended.sum() < 24
    assert not batch.mask[~ended].any()
    assert torch.equal(batch.mask[ended], grpo_toy.completion_mask(batch.completions)[ended])
    assert batch.advantages[~ended].ne(0).any()  # they count in the mean of their group all the same


def test_a_batch_of_truncated_completions_alone_teaches_nothing():
    args = settings(beta=0.5, num_iterations=2)
    model, reference = small_model(args), small_model(args)
    start, batch = copy.deepcopy(model.state_dict()), a_batch(model, args)
    values = take_a_step(model, reference, batch._replace(mask=torch.zeros_like(batch.mask)), args, weight_decay=0.0)
    assert values["loss"] == 0 and all(math.isfinite(value) for value in values.values())
    assert all(torch.equal(weight, start[name]) for name, weight in model.state_dict().items())


def test_a_reward_of_ones_own_is_found_by_its_name(monkeypatch):
    calls = []

    def mine(prompt: str, completion: str, args: grpo_toy.Args) -> int:
        calls.append((prompt, completion))
        return len(calls)

    monkeypatch.setattr(grpo_toy, "reward_mine", mine, raising=False)
    args = grpo_toy.parse_args(["--rewards", "mine", "--num-digits", "2", "--device", "cpu"])
    grpo_toy.check_method(args)
    args = settings(rewards=["mine"])
    groups, _, batch = grpo_toy.rollout(small_model(args), None, dice(), args)
    assert calls == [(group.prompt, text) for group in groups for text in group.texts]
    assert [reward for group in groups for reward in group.rewards[:, 0].tolist()] == list(range(1, 25))
    assert close(batch.advantages.view(6, 4), [[-1.1618, -0.3873, 0.3873, 1.1618]] * 6, 2e-4)


def broken(prompt: str, completion: str, args: grpo_toy.Args) -> float:
    raise KeyError("oops")


@pytest.mark.parametrize(
    "reward, says",
    [
        (broken, "oops"),
        (lambda *given: math.nan, "nan"),
        (lambda *given: math.inf, "inf"),
        (lambda *given: None, "NoneType"),
        (lambda *given: "many", "many"),
    ],
)
def test_a_reward_that_raises_or_says_no_number_is_named(monkeypatch, reward, says):
    monkeypatch.setattr(grpo_toy, "reward_mine", reward, raising=False)
    args = settings(rewards=["correct", "mine"])
    with pytest.raises(grpo_toy.Failed, match=f"reward_mine.*{says}"):
        grpo_toy.rollout(small_model(args), None, dice(), args)


# ------------------------------------------------------------------------------------------- methods and a small run
PAPERS = {
    "grpo": dict(loss_type="grpo", importance_sampling_level="token", multi_objective_aggregation="sum_then_normalize")
    | dict(scale_rewards="group", kl_estimator="k3", epsilon_high=None, dynamic_sampling=False),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none", beta=0.0),
    "dapo": dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, dynamic_sampling=True, beta=0.0),
    "gspo": dict(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "gdpo": dict(multi_objective_aggregation="normalize_then_sum", scale_rewards="group"),
    "rloo": dict(loss_type="reinforce", leave_one_out=True, scale_rewards="none", kl_in_reward=True)
    | dict(num_iterations=1, steps_per_generation=1),
    "cispo": dict(loss_type="cispo", epsilon=1.0, epsilon_high=4.0, beta=0.0, scale_rewards="group"),  # 0 to 5
    "sapo": dict(loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, beta=0.0)
    | dict(scale_rewards="group", importance_sampling_level="token"),
    "reinforce_pp": dict(multi_objective_aggregation="normalize_then_sum", scale_rewards="none", kl_estimator="k2")
    | dict(loss_type="grpo", kl_in_reward=False, epsilon=0.2),
}


@pytest.mark.parametrize("method", PAPERS)
def test_a_method_sets_what_its_paper_sets(method):
    args = grpo_toy.parse_args(["--method", method])
    assert {name: getattr(args, name) for name in PAPERS[method]} == PAPERS[method]
    assert ("overlong" in args.rewards) == (method == "dapo") and (len(args.rewards) > 2) == (method == "gdpo")
    assert args.method == method and PAPERS.keys() == grpo_toy.METHODS.keys()
    assert args.kl_in_reward == args.leave_one_out == (method == "rloo")
    assert method == "rloo" or args.loss_type != "reinforce"
    assert (args.beta > 0) == (method in ("grpo", "gdpo", "rloo", "reinforce_pp"))
    assert method != "grpo" or (args.beta > 0 and args == grpo_toy.parse_args([]))
    grpo_toy.check_args(args), grpo_toy.check_method(args)


@pytest.mark.parametrize(
    "flags, name, value",
    [
        ("--method dapo --beta 0.1", "beta", 0.1),
        ("--beta 0.1 --method=dapo", "beta", 0.1),
        ("--method dapo --no-dynamic-sampling", "dynamic_sampling", False),
        ("--method gspo --epsilon 0.1", "epsilon", 0.1),
        ("--method dr_grpo --scale-rewards batch", "scale_rewards", "batch"),
        ("--method gdpo --rewards correct", "rewards", ["correct"]),
        ("--method rloo --no-leave-one-out", "leave_one_out", False),
        ("--no-kl-in-reward --method rloo", "kl_in_reward", False),
        ("--method cispo --epsilon-high 1", "epsilon_high", 1.0),
        ("--sapo-temperature-neg 2 --method sapo", "sapo_temperature_neg", 2.0),
    ],
)
def test_a_flag_wins_over_its_method_and_leaves_the_rest(flags, name, value):
    args = grpo_toy.parse_args(flags.split())
    plain = grpo_toy.parse_args(["--method", args.method])
    assert getattr(args, name) == value != getattr(plain, name)
    assert vars(args) == vars(plain) | {name: value}


@pytest.mark.parametrize("flag", ["--multi-objective-aggregation", "--reward-aggregation"])
def test_the_aggregation_has_an_old_name_as_well(flag):
    args = grpo_toy.parse_args([flag, "normalize_then_sum"])
    assert vars(args) == vars(grpo_toy.parse_args([])) | {"multi_objective_aggregation": "normalize_then_sum"}


def test_help_names_the_aggregation_by_its_new_name(capsys):
    with pytest.raises(SystemExit):
        grpo_toy.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--multi-objective-aggregation" in text and "reward_aggregation" not in text


def test_an_evaluation_is_always_the_same_and_takes_no_random_numbers_from_training():
    args = settings(eval_prompts=8)
    model = small_model(args)
    torch.manual_seed(1), random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    first = grpo_toy.evaluation(model, args)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    torch.manual_seed(2), random.seed(2)
    assert grpo_toy.evaluation(model, args) == first


OFTEN = ("grpo", "dapo", "gdpo", "rloo", "cispo")  # the others are slow


@pytest.mark.parametrize(
    "method", [pytest.param(x, marks=[] if x in OFTEN else pytest.mark.slow) for x in grpo_toy.METHODS]
)
def test_a_small_run_learns_to_sort_two_digits(method, tmp_path):
    flags = "--num-digits 2 --max-completion-length 6 --n-layer 1 --n-head 2 --n-embd 32 --sft-steps 150 --seed 1"
    flags += " --sft-learning-rate 1e-2 --max-steps 50 --generation-batch-size 128 --num-generations 8"
    flags += " --steps-per-generation 1 --learning-rate 2e-3 --anneal-lr --temperature 1"
    flags += f" --num-iterations {1 if method == 'rloo' else 2}"
    flags += " --eval-prompts 64 --eval-interval 50 --checkpoint-interval 50 --num-threads 1 --no-cache-warm-start"
    args = grpo_toy.parse_args([*flags.split(), "--method", method, "--device", "cpu", "--runs-dir", str(tmp_path)])
    summary = json.loads((grpo_toy.train(args) / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy"]
    assert summary["status"] == "completed" and 0.05 < before < 0.3 and after > before + 0.25


# ------------------------------------------------------------------------------------ what is shown, and the teacher
def two_groups() -> list[grpo_toy.Group]:
    """One where correctness differs and format does not, one the other way round; the last text has no end."""
    texts = [["[13]$", "(31)$"], ["[31]$", "(((((("]]
    rewards = [[[3.0, 1.0], [-3.0, 1.0]], [[-3.0, 1.0], [-3.0, 0.0]]]
    return [grpo_toy.Group("31", torch.zeros(2, 6), text, torch.tensor(r)) for text, r in zip(texts, rewards)]


def test_statistics_are_those_counted_by_hand():
    args = settings(rewards=["correct", "format"], reward_weights=[1.0, 2.0], condition=["format:correct>=3"])
    episodes, values = grpo_toy.statistics(two_groups(), args)
    # After the condition only the first answer keeps its format reward: returns 5, -3 and -3, -3.
    assert episodes == [(5.0, 5), (-3.0, 5), (-3.0, 5), (-3.0, 6)]
    expected = {"reward": -1.0, "reward_std": statistics.stdev([5, -3]) / 2, "frac_reward_zero_std": 0.5}
    expected |= {"rewards/correct/mean": -1.5, "rewards/correct/std": statistics.stdev([3, -3, -3, -3])}
    expected |= {"rewards/format/mean": 0.75, "rewards/format/std": statistics.stdev([1, 1, 1, 0])}  # as they came
    expected |= {"frac_reward_zero_std/correct": 0.5, "frac_reward_zero_std/format": 0.5}
    expected |= {"completions/mean_length": 21 / 4, "completions/clipped_ratio": 0.25}
    assert values == pytest.approx(expected, abs=1e-6)


def test_the_table_shows_the_first_group_in_which_something_differs():
    args = settings(rewards=["correct", "format"], num_generations=2)
    batch = SimpleNamespace(advantages=torch.tensor([0.0, 0.0, 0.5, -0.5]))
    table = grpo_toy.table_of(two_groups(), batch, args)
    assert table[0] == ["prompt", "completion", "correct", "format", "advantage"]
    assert table[1:] == [["31", "[31]$", "-3", "1", "0.50"], ["31", "((((((", "-3", "0", "-0.50"]]


def test_the_teacher_makes_the_mistakes_that_it_is_said_to_make():
    args, count = settings(num_digits=6, max_completion_length=16), 4000
    prompts = grpo_toy.sample_prompts(count, 6, dice())
    rng = dice()
    answers = [grpo_toy.sloppy_answer(prompt, 6, rng) for prompt in prompts]
    assert all(len(answer) <= 16 and answer.endswith("$") for answer in answers)
    right = sum(grpo_toy.reward_exact(*pair, args) for pair in zip(prompts, answers)) / count
    assert 0.2 < right < 0.25  # a random digit is now and then the one that it replaces
    reversed_ = sum("".join(sorted(p, reverse=True)) in a for p, a in zip(prompts, answers)) / count
    assert abs(reversed_ - 0.6) < 0.03
    assert abs(sum(grpo_toy.reward_format(*pair, args) for pair in zip(prompts, answers)) / count - 0.1) < 0.02
    dots = [answer.count(".") for answer in answers]
    assert set(dots) == set(range(7)) and abs(statistics.mean(dots) - 3) < 0.15
