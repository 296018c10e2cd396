"""The method of dpo_toy.py against oracles that do not share its code: slow loops in float64, from the papers."""

import copy
import json
import math
import random

import pytest
import torch

import dpo_toy

LOSSES = ("dpo", "ipo", "kto", "orpo", "sft")
every_loss = pytest.mark.parametrize("loss", LOSSES)
with_reference = pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])

# The defaults are free to change.
SETTING = dict(device="cpu", num_digits=2, max_completion_length=7, n_layer=2, n_head=2, n_embd=16, temperature=1.0)
SETTING |= dict(seed=1, batch_size=4, beta=0.7, desirable_weight=1.0, undesirable_weight=1.0, num_train_epochs=2)
SETTING |= dict(num_prompts=6, num_generations=4, max_grad_norm=1e9)

PAIRS = [("10", "(01)$", "(10)$"), ("42", "..[24]$", "42$"), ("73", "37$", "(((((((")]
PAIRS += [("95", "[59]$", "$"), ("10", "01$", ".[11]$"), ("88", "......$", "88$")]
PAIRS = [dpo_toy.Pair(*pair) for pair in PAIRS]


def settings(**changes) -> dpo_toy.RunArgs:
    return dpo_toy.RunArgs(**SETTING | changes)


def small_model(args: dpo_toy.Args, seed: int = 0) -> dpo_toy.GPT:
    """Float64, and with weights so large that every token depends on all before it."""
    torch.manual_seed(seed)
    model = dpo_toy.GPT(args).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.35 if weight.ndim > 1 else 0.1)
    return model


def close(actual, expected, tolerance: float = 1e-9) -> bool:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def random_logprobs(*sizes: int) -> list[torch.Tensor]:
    """Float64, below 0."""
    generator = torch.Generator().manual_seed(sum(sizes))
    return [-6 * torch.rand(size, generator=generator).double() - 0.05 for size in sizes]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------- the losses by hand, and slowly
def losses_of(loss: str, chosen, rejected, ref_chosen=None, ref_rejected=None, beta=0.7, kl=0.0, weights=(1.0, 1.0)):
    """Losses and rewards of a loss, from tensors or lists."""
    given = [
        torch.as_tensor(x, dtype=torch.float64) for x in (chosen, rejected, ref_chosen, ref_rejected) if x is not None
    ]
    if loss == "kto":
        return dpo_toy.kto_loss(*given, torch.as_tensor(kl, dtype=torch.float64), beta, *weights)
    if loss == "orpo":
        return dpo_toy.orpo_loss(*given[:2], beta)
    return {"dpo": dpo_toy.dpo_loss, "ipo": dpo_toy.ipo_loss}[loss](*given, beta)


def slow_losses(loss, chosen, rejected, ref_chosen, ref_rejected, beta, kl=0.0, weights=(1.0, 1.0)):
    """A pair, or for KTO an answer, at a time, from probabilities and not from their logarithms where that can be."""
    if loss == "kto":  # eq. 7 and 8: lambda - v
        z = max(0.0, kl)
        gains = [weights[0] - weights[0] * sigmoid(beta * (x - y - z)) for x, y in zip(chosen, ref_chosen)]
        return gains + [weights[1] - weights[1] * sigmoid(beta * (z - (x - y))) for x, y in zip(rejected, ref_rejected)]
    result = []
    for w, x, ref_w, ref_x in zip(chosen, rejected, ref_chosen, ref_rejected):
        if loss == "dpo":  # eq. 7, by way of Bradley-Terry on the implicit rewards
            better, worse = (math.exp(w) / math.exp(ref_w)) ** beta, (math.exp(x) / math.exp(ref_x)) ** beta
            result.append(-math.log(better / (better + worse)))
        elif loss == "ipo":  # eq. 17
            h = math.log(math.exp(w) * math.exp(ref_x) / (math.exp(x) * math.exp(ref_w)))
            result.append((h - 1 / beta / 2) ** 2)
        else:  # ORPO eq. 4 and 7
            odds = [math.exp(y) / (1 - math.exp(y)) for y in (w, x)]
            result.append(-beta * math.log(sigmoid(math.log(odds[0] / odds[1]))))
    return result


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo"])
@pytest.mark.parametrize("beta", [0.05, 0.7, 3.0])
def test_losses_are_those_of_the_papers(loss, beta):
    given = random_logprobs(9, 9, 9, 9)
    for kl in (-0.5, 0.0, 0.8):
        losses, _, _ = losses_of(loss, *given, beta=beta, kl=kl, weights=(1.5, 0.3))
        assert close(losses, slow_losses(loss, *(x.tolist() for x in given), beta, kl, (1.5, 0.3)))


def test_losses_of_a_pair_worked_by_hand():
    # margin (-1 + 2) - (-3 + 2.5) = 1.5
    losses, good, bad = losses_of("dpo", [-1.0], [-3.0], [-2.0], [-2.5], beta=0.5)
    assert close(losses, [0.386871], 1e-5) and close(good, [0.5]) and close(bad, [-0.25])
    losses, good, bad = losses_of("ipo", [-1.0], [-3.0], [-2.0], [-2.5], beta=0.5)
    assert close(losses, [0.25]) and close(good, [0.5]) and close(bad, [-0.25])
    # sigmoid(0.5 (1 - 0.4)) = 0.574443, sigmoid(0.5 (0.4 + 0.5)) = 0.610639
    losses, good, bad = losses_of("kto", [-1.0], [-3.0], [-2.0], [-2.5], beta=0.5, kl=0.4, weights=(2.0, 3.0))
    assert close(losses, [2 * 0.425557, 3 * 0.389361], 1e-5) and close(good, [0.5]) and close(bad, [-0.25])
    # odds 3 and 1 / 4: ratio 12, sigmoid(log 12) = 12 / 13
    losses, good, bad = losses_of("orpo", [math.log(0.75)], [math.log(0.2)], beta=0.1)
    assert close(losses, [0.1 * math.log(13 / 12)]) and close(good, [0.1 * math.log(0.75)])
    assert close(bad, [0.1 * math.log(0.2)])


def test_a_margin_of_zero_costs_log_two_and_half_of_a_weight():
    x, y = [-1.5, -0.2], [-4.0, -0.9]
    assert close(losses_of("dpo", x, y, x, y)[0], [math.log(2)] * 2)
    assert close(losses_of("orpo", x, x, beta=0.7)[0], [0.7 * math.log(2)] * 2)
    assert close(losses_of("ipo", x, y, x, y, beta=0.25)[0], [4.0] * 2)
    assert close(losses_of("kto", x, y, x, y, weights=(3.0, 5.0))[0], [1.5] * 2 + [2.5] * 2)


def test_ipo_wants_a_margin_and_no_more():
    reached = [losses_of("ipo", [margin], [0.0], [0.0], [0.0], beta=0.5)[0].item() for margin in (0.5, 1.0, 1.5)]
    assert reached == [0.25, 0.0, 0.25]
    further = [losses_of("dpo", [margin], [0.0], [0.0], [0.0], beta=0.5)[0].item() for margin in (1.0, 10.0, 30.0)]
    assert further == sorted(further, reverse=True) and further[-1] > 0


def test_gradient_of_dpo_weighs_pairs_by_how_wrong_they_are():
    given = random_logprobs(7, 7, 7, 7)
    chosen, rejected = (x.requires_grad_() for x in given[:2])
    losses, good, bad = dpo_toy.dpo_loss(chosen, rejected, *given[2:], 0.7)
    losses.sum().backward()
    weights = torch.tensor([0.7 * sigmoid(x) for x in (bad - good).tolist()])
    assert close(chosen.grad, -weights, 1e-6) and close(rejected.grad, weights, 1e-6)


@with_reference
def test_rewards_have_no_gradient_and_references_may_be_plain_numbers(loss):
    given = random_logprobs(5, 5, 5, 5)
    chosen, rejected = (x.requires_grad_() for x in given[:2])
    losses, good, bad = losses_of(loss, chosen, rejected, *given[2:])
    assert losses.requires_grad and not good.requires_grad and not bad.requires_grad
    assert close(good, 0.7 * (chosen - given[2])) and close(bad, 0.7 * (rejected - given[3]))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo"])
def test_swapping_chosen_and_rejected_flips_the_margin(loss):
    w, x, ref_w, ref_x = random_logprobs(6, 6, 6, 6)
    losses, good, bad = losses_of(loss, w, x, ref_w, ref_x)
    swapped, worse, better = losses_of(loss, x, w, ref_x, ref_w)
    assert close(better - worse, good - bad) and not close(losses, swapped)
    if loss == "dpo":  # -log sigmoid(m) and -log sigmoid(-m)
        assert close(swapped - losses, good - bad)
    if loss == "ipo":
        assert close(swapped - losses, 2 / 0.7 * (w - x - ref_w + ref_x))


def test_answers_of_kto_need_no_partners():
    good, bad, ref_good, ref_bad = random_logprobs(3, 5, 3, 5)
    losses, good_rewards, bad_rewards = losses_of("kto", good, bad, ref_good, ref_bad, kl=0.3)
    assert losses.shape == (8,) and good_rewards.shape == (3,) and bad_rewards.shape == (5,)
    alone, _, _ = losses_of("kto", good, bad[:0], ref_good, ref_bad[:0], kl=0.3)
    assert close(losses[:3], alone)
    expected = slow_losses("kto", good.tolist(), bad.tolist(), ref_good.tolist(), ref_bad.tolist(), 0.7, 0.3)
    assert close(losses, expected)


def test_reference_point_of_kto_has_no_gradient_and_is_no_less_than_zero():
    given = random_logprobs(4, 4, 4, 4)
    chosen = given[0].requires_grad_()
    kl = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    dpo_toy.kto_loss(*given, kl * chosen.sum().exp(), 0.7, 1.0, 1.0)[0].sum().backward()
    assert kl.grad is None
    through, chosen.grad = chosen.grad.clone(), None
    constant = (kl * chosen.sum().exp()).detach()
    dpo_toy.kto_loss(*given, constant, 0.7, 1.0, 1.0)[0].sum().backward()
    assert close(through, chosen.grad)
    below, at_zero, above = (losses_of("kto", *(x.detach() for x in given), kl=kl)[0] for kl in (-3.0, 0.0, 0.5))
    assert torch.equal(below, at_zero) and not close(above, at_zero)


# ------------------------------------------------------------------------------------------------------ the limits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_finite_at_all_probabilities_and_right_where_they_can_be(dtype):
    x = torch.tensor([-1e4, -200.0, -30.0, -1.0, -1e-3, -1e-5, -1e-9, -1e-20, -0.0], dtype=dtype, requires_grad=True)
    odds = dpo_toy.log_odds(x)
    odds.sum().backward()
    assert odds.isfinite().all() and x.grad.isfinite().all() and (odds.diff() >= 0).all()
    expected = [y - math.log(-math.expm1(y)) for y in x[:6].tolist()]
    assert close(odds[:6], expected, 1e-5 if dtype == torch.float32 else 1e-12)
    assert close(x.grad[:6], [1 / -math.expm1(y) for y in x[:6].tolist()], 1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize(
    "chosen, rejected", [(-0.0, -0.0), (-0.0, -50.0), (-50.0, -0.0), (-1e-8, -1e-8), (-900.0, -900.0)]
)
def test_odds_ratio_and_its_gradient_are_finite_where_an_answer_is_sure(chosen, rejected):
    x, y = (torch.tensor([value], requires_grad=True) for value in (chosen, rejected))
    losses, _, _ = dpo_toy.orpo_loss(x, y, 0.5)
    losses.sum().backward()
    assert losses.isfinite().all() and x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("margin", [-2e4, -300.0, 300.0, 2e4])
def test_extreme_margins_give_finite_losses_and_gradients(margin):
    for loss in ("dpo", "kto"):
        x = torch.tensor([margin], requires_grad=True)
        zero = torch.zeros(1)
        if loss == "dpo":
            losses, _, _ = dpo_toy.dpo_loss(x, zero, zero, zero, 1.0)
            assert close(losses, [max(-margin, 0.0)])
        else:
            losses, _, _ = dpo_toy.kto_loss(x, zero[:0], zero, zero[:0], torch.tensor(0.0), 1.0, 1.0, 1.0)
            assert close(losses, [float(margin < 0)])
        losses.sum().backward()
        assert x.grad.isfinite().all()


# ------------------------------------------------------------------------------- log-probabilities and the whole loss
def logprob_by_hand(model: dpo_toy.GPT, prompt: str, answer: str, temperature: float = 1.0) -> list[float]:
    """That of each character, from a forward pass of its own over what comes before it."""
    result, text = [], "^" + prompt
    for character in answer:
        tokens = torch.tensor([[dpo_toy.TOKENS.index(c) for c in text]])
        logits = (model(tokens)[0, -1] / temperature).tolist()
        index = dpo_toy.TOKENS.index(character)
        result.append(logits[index] - math.log(sum(math.exp(x) for x in logits)))
        text += character
    return result


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_those_of_the_answer_and_its_end_alone(temperature):
    args = settings(temperature=temperature)
    model = small_model(args)
    prompts = dpo_toy.encode_prompts([pair.prompt for pair in PAIRS], "cpu")
    for name in ("chosen", "rejected"):
        texts = [getattr(pair, name) for pair in PAIRS]
        sums, lengths = dpo_toy.sequence_logprobs(model, prompts, dpo_toy.encode(texts, 7), args)
        assert lengths.tolist() == [len(text) for text in texts]
        expected = [sum(logprob_by_hand(model, pair.prompt, text, temperature)) for pair, text in zip(PAIRS, texts)]
        assert close(sums, expected)


def test_what_comes_after_the_end_has_no_part_even_if_it_is_infinite(monkeypatch):
    args = settings()
    model = small_model(args)
    prompts, answers = dpo_toy.encode_prompts(["10", "42"], "cpu"), dpo_toy.encode(["(01)$", "42$"], 7)
    before, lengths = dpo_toy.sequence_logprobs(model, prompts, answers, args)
    other = torch.where(dpo_toy.completion_mask(answers), answers, 9)
    assert not torch.equal(other, answers)
    again, same_lengths = dpo_toy.sequence_logprobs(model, prompts, other, args)
    assert close(again, before) and torch.equal(lengths, same_lengths)
    real = dpo_toy.completion_logprobs

    def broken(model, prompts, completions, args):
        logprobs, entropies = real(model, prompts, completions, args)
        return torch.where(dpo_toy.completion_mask(completions), logprobs, -torch.inf), entropies

    monkeypatch.setattr(dpo_toy, "completion_logprobs", broken)
    sums, _ = dpo_toy.sequence_logprobs(model, prompts, answers, args)
    assert close(sums, before)
    sums.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def all_of(pairs, reference, args) -> dpo_toy.Batch:
    return dpo_toy.tokens_of(pairs, reference, args)


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_of_a_batch_and_its_statistics_are_those_of_a_slow_version(loss, temperature):
    args = settings(loss=loss, temperature=temperature, desirable_weight=1.5, undesirable_weight=0.5)
    model, reference = small_model(args, 1), small_model(args, 2)
    value, stats = dpo_toy.preference_loss(model, reference, all_of(PAIRS, reference, args), args)

    def each(network, side, mean=False):
        lists = [logprob_by_hand(network, pair.prompt, getattr(pair, side), temperature) for pair in PAIRS]
        return [sum(x) / (len(x) if mean else 1) for x in lists]

    mean = loss in ("ipo", "orpo")
    given = [each(network, side, mean) for network in (model, reference) for side in ("chosen", "rejected")]
    chosen, rejected, ref_chosen, ref_rejected = given
    nll = -sum(each(model, "chosen", True)) / len(PAIRS)
    if loss == "sft":
        expected = nll
    else:
        ratios = []
        for pair, follower in zip(PAIRS, [*PAIRS[1:], PAIRS[0]]):
            for answer in (pair.chosen, pair.rejected):
                logs = [sum(logprob_by_hand(x, follower.prompt, answer, temperature)) for x in (model, reference)]
                ratios.append(logs[0] - logs[1])
        kl = sum(ratios) / len(ratios)
        losses = slow_losses(loss, *given, 0.7, kl, (1.5, 0.5))
        expected = sum(losses) / len(losses) + (nll if loss == "orpo" else 0)
    assert close(value, expected)
    sums = each(model, "chosen"), each(model, "rejected")
    if loss == "orpo":
        rewards = [[0.7 * x for x in side] for side in (chosen, rejected)]
    else:
        rewards = [[0.7 * (x - y) for x, y in zip(*side)] for side in ((chosen, ref_chosen), (rejected, ref_rejected))]
    count = len(PAIRS)
    told = {
        "loss": expected,
        "nll_loss": nll,
        "logps/chosen": sum(sums[0]) / count,
        "logps/rejected": sum(sums[1]) / count,
        "rewards/chosen": sum(rewards[0]) / count,
        "rewards/rejected": sum(rewards[1]) / count,
        "rewards/margins": (sum(rewards[0]) - sum(rewards[1])) / count,
        "rewards/accuracies": sum(x > y for x, y in zip(*rewards)) / count,
    }
    if loss == "kto":
        told["kl"] = max(kl, 0)
    if loss == "orpo":
        odds = [[math.log(math.exp(x) / (1 - math.exp(x))) for x in side] for side in (chosen, rejected)]
        told["log_odds_ratio"] = (sum(odds[0]) - sum(odds[1])) / count
    assert stats.keys() == told.keys()
    for tag, number in told.items():
        assert close(stats[tag], number, 1e-6), tag


@every_loss
def test_gradient_of_a_batch_is_that_of_its_losses(loss):
    """By finite differences along a random direction; KTO's reference point is held, as it has no gradient."""
    args = settings(loss=loss)
    model, reference = small_model(args, 1), small_model(args, 2)
    batch = all_of(PAIRS, reference, args)
    held = dpo_toy.reference_point(model, reference, batch, args)
    value, _ = dpo_toy.preference_loss(model, reference, batch, args)
    value.backward()
    direction = [torch.randn_like(weight) for weight in model.parameters()]
    slope = sum((weight.grad * d).sum() for weight, d in zip(model.parameters(), direction)).item()
    values = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dpo_toy, "reference_point", lambda *_: held)
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(model)
            for weight, d in zip(moved.parameters(), direction):
                weight += step * d
            values.append(dpo_toy.preference_loss(moved, reference, batch, args)[0].item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8)


@every_loss
def test_only_what_a_loss_compares_has_a_part_in_it(loss):
    """SFT does not see the rejected; DPO, IPO and KTO see the reference, the others do not."""
    args = settings(loss=loss)
    model, reference = small_model(args, 1), small_model(args, 2)
    batch = all_of(PAIRS, reference, args)

    def value(batch, reference=reference):
        return dpo_toy.preference_loss(model, reference, batch, args)[0].item()

    other = dpo_toy.encode(["99$"] * 6, 7)
    assert (value(batch._replace(rejected=other)) == value(batch)) == (loss == "sft")
    assert value(batch._replace(chosen=other)) != value(batch)
    changed = batch._replace(ref_chosen=batch.ref_chosen - 1, ref_rejected=batch.ref_rejected + 1)
    assert (value(changed) == value(batch)) == (loss in ("orpo", "sft"))


def test_reference_point_is_of_other_prompts_and_leaves_the_same_prompt_out():
    args = settings(loss="kto")
    model, reference = small_model(args, 1), small_model(args, 2)
    pairs = [PAIRS[0], PAIRS[4], PAIRS[1]]  # the first two are of one prompt
    asked = []
    real = dpo_toy.sequence_logprobs

    def noted(network, prompts, completions, args):
        asked.append((prompts.clone(), completions.clone()))
        return real(network, prompts, completions, args)

    batch = all_of(pairs, reference, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_toy, "sequence_logprobs", noted)
        kl = dpo_toy.reference_point(model, reference, batch, args)
    assert len(asked) == 2 and not kl.requires_grad
    ratios = []
    for i, pair in enumerate(pairs):
        other = pairs[(i + 1) % 3]
        if other.prompt != pair.prompt:
            for answer in (pair.chosen, pair.rejected):
                logs = [sum(logprob_by_hand(x, other.prompt, answer)) for x in (model, reference)]
                ratios.append(logs[0] - logs[1])
    assert len(ratios) == 4 and close(kl, sum(ratios) / 4)
    one_prompt = all_of([PAIRS[0], PAIRS[4]], reference, args)
    assert dpo_toy.reference_point(model, reference, one_prompt, args) == 0


# ---------------------------------------------------------------------------------------------- batches and updates
def test_every_epoch_sees_each_pair_once_in_an_order_of_its_own():
    args, count = settings(batch_size=4), 11
    data = dpo_toy.Batch(*(torch.arange(count)[:, None].expand(count, 3) + 100 * i for i in range(5)))
    epochs = []
    for epoch in range(3):
        batches = [dpo_toy.batch_of(data, 3 * epoch + i, args) for i in (1, 2, 3)]
        assert [len(batch.prompts) for batch in batches] == [4, 4, 3]
        for batch in batches:  # rows stay together
            assert all(torch.equal(part, batch.prompts + 100 * i) for i, part in enumerate(batch))
        epochs.append(torch.cat([batch.prompts[:, 0] for batch in batches]).tolist())
        assert sorted(epochs[-1]) == list(range(count))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(count))
    assert (
        epochs[0] != torch.cat([dpo_toy.batch_of(data, i, settings(seed=2)).prompts[:, 0] for i in (1, 2, 3)]).tolist()
    )


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 130])
def test_batches_are_of_one_size_but_for_a_pair(count):
    args, data = settings(batch_size=4), torch.arange(count)
    steps = dpo_toy.batches_per_epoch(count, args)
    sizes = [len(dpo_toy.batch_of(dpo_toy.Batch(*[data] * 5), i + 1, args).prompts) for i in range(steps)]
    assert sum(sizes) == count and max(sizes) <= 4 and max(sizes) - min(sizes) <= 1


@every_loss
def test_an_update_is_one_adamw_step_along_the_gradient_and_leaves_the_reference_alone(loss):
    args = settings(loss=loss)
    model, reference = small_model(args, 1), small_model(args, 2)
    mine, kept = copy.deepcopy(model), copy.deepcopy(reference.state_dict())
    batch = all_of(PAIRS, reference, args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    values = dpo_toy.update(model, reference, optimizer, batch, 1e-3, args)
    value, stats = dpo_toy.preference_loss(mine, reference, batch, args)
    value.backward()
    norm = math.sqrt(sum((weight.grad**2).sum().item() for weight in mine.parameters()))
    assert values["grad_norm"] == pytest.approx(norm) and values["loss"] == pytest.approx(value.item())
    assert values.keys() == {*stats, "grad_norm"}
    for before, after in zip(
        mine.parameters(), model.parameters()
    ):  # the first step of Adam: lr times the sign, nearly
        step = 1e-3 * before.grad / (before.grad.abs() + 1e-8)
        assert close(after, before - step, 1e-7)
    assert all(torch.equal(weight, kept[name]) for name, weight in reference.state_dict().items())


def test_an_update_clips_the_norm_of_the_gradient():
    args = settings(loss="dpo", max_grad_norm=0.01)
    model, reference = small_model(args, 1), small_model(args, 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    values = dpo_toy.update(model, reference, optimizer, all_of(PAIRS, reference, args), 1.0, args)
    moved = math.sqrt(sum(((x - y) ** 2).sum().item() for x, y in zip(before.parameters(), model.parameters())))
    assert values["grad_norm"] > 0.02 and moved == pytest.approx(0.01, rel=1e-3)


@every_loss
def test_training_on_pairs_raises_the_margin(loss):
    args = settings(loss=loss, beta=0.5)
    model, reference = small_model(args, 1), small_model(args, 1)
    batch = all_of(PAIRS, reference, args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    first, *_, last = (dpo_toy.update(model, reference, optimizer, batch, 3e-3, args) for _ in range(30))
    assert last["loss"] < first["loss"] and last["rewards/margins"] > first["rewards/margins"]
    if loss in ("sft", "orpo"):
        assert last["logps/chosen"] > first["logps/chosen"]


# --------------------------------------------------------------------------------------------------- pairs and files
class FakeRun:
    """What sample_pairs needs of a run."""

    def __init__(self, args):
        self.args, self.notes, self.signals, self.progress = args, {}, [], self
        self.shown = []

    def show(self, *what):
        self.shown.append(what)


def test_a_right_answer_is_preferred_to_another_wrong_one_of_its_prompt(monkeypatch):
    args = settings(num_generations=4)
    answers = {"12": ["12$", "21$", "[12]$", "1$"], "30": ["03$"] * 4, "55": ["$", "55$", ".......", "5$"]}
    answers |= {"64": ["46$", "(46)$", "64$", ".46$"]}
    monkeypatch.setattr(dpo_toy, "sample_prompts", lambda *_: list(answers))
    texts = [text for group in answers.values() for text in group]
    monkeypatch.setattr(dpo_toy, "generate", lambda *_: dpo_toy.encode(texts, 7))
    run = FakeRun(args)
    pairs = dpo_toy.sample_pairs(None, 4, run)
    assert pairs == [("12", "12$", "21$"), ("12", "[12]$", "1$"), ("55", "55$", "$"), ("64", "46$", "64$")]
    assert run.notes["tokens_sampled"] == sum(map(len, texts)) and run.shown[-1][1:] == (4, 4)


def test_pairs_are_of_training_prompts_and_do_not_depend_on_the_loss():
    model = small_model(settings()).float()
    found = {}
    for loss in LOSSES:
        random.seed(len(found)), torch.manual_seed(len(found))  # nor on what happened before in the process
        args = settings(loss=loss, num_prompts=700, num_generations=8, beta=float(len(found)))
        found[loss] = dpo_toy.sample_pairs(model, args.num_prompts, FakeRun(args))
    assert len(found["dpo"]) > 3 and all(pairs == found["dpo"] for pairs in found.values())
    for prompt, chosen, rejected in found["dpo"]:
        assert not dpo_toy.is_held_out(prompt) and len(chosen) <= 7
        assert dpo_toy.is_right(prompt, chosen) and not dpo_toy.is_right(prompt, rejected)
    assert dpo_toy.sample_pairs(model, 700, FakeRun(settings(seed=2, num_generations=8))) != found["dpo"]


def test_a_checkpoint_gives_the_pairs_back():
    kept = dpo_toy.Preferences(list(PAIRS))
    other = dpo_toy.Preferences([])
    assert dpo_toy.misfit(other.state_dict(), kept.state_dict()) == ""
    other.load_state_dict(json.loads(json.dumps(kept.state_dict())))
    assert other.list == PAIRS and isinstance(other.list[0], dpo_toy.Pair)


def test_reference_logprobs_are_the_same_however_they_are_cut():
    args = settings(batch_size=2)
    reference = small_model(args)
    whole = all_of(PAIRS, reference, settings(batch_size=64))
    cut = all_of(PAIRS, reference, args)
    assert all(close(x, y) for x, y in zip(whole, cut)) and not whole.ref_chosen.requires_grad


GOOD_LINES = {
    '{"prompt": "10", "chosen": "[01]", "rejected": "10"}': ("10", "[01]$", "10$"),
    '{"prompt": "10", "chosen": "[01]$", "rejected": "$", "from": "me"}': ("10", "[01]$", "$"),
    '{"rejected": "1010101", "chosen": "01", "prompt": "10"}\r': ("10", "01$", "1010101"),
    '{"prompt": "01", "chosen": "......$", "rejected": "......"}': None,  # the same, when both have ended
    '{"prompt": "01", "chosen": "......$", "rejected": "......."}': ("01", "......$", "......."),
}


@pytest.mark.parametrize("line", GOOD_LINES)
def test_an_answer_without_an_end_gets_it_unless_it_is_as_long_as_can_be(line):
    if GOOD_LINES[line]:
        assert dpo_toy.parse_pair(line, "here", settings()) == GOOD_LINES[line]
    else:
        with pytest.raises(dpo_toy.UsageError, match="as chosen and as rejected"):
            dpo_toy.parse_pair(line, "here", settings())


def test_what_sampling_writes_is_what_reading_gives_back():
    args = settings()
    for pair in PAIRS:
        assert dpo_toy.parse_pair(json.dumps(pair._asdict()), "here", args) == pair


# ------------------------------------------------------------------------------------------------------- arguments
def test_a_loss_picks_its_row_and_a_flag_wins():
    for loss in LOSSES:
        args = dpo_toy.parse_args(["--loss", loss])
        expected = vars(dpo_toy.RunArgs()) | {"loss": loss} | dpo_toy.METHODS[loss]
        assert vars(args) == expected
        assert dpo_toy.parse_args(["--loss", loss, "--beta", "0.123"]).beta == 0.123
