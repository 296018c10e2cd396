"""The method of rlhf_toy.py against oracles that do not share its code: slow loops in float64, from the papers."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

import rlhf_toy
from rlhf_toy import EOS, GPT, PAD, AdaptiveKL, Batch, Models, Rng

# The defaults are free to change.
SETTING = dict(device="cpu", num_digits=2, max_completion_length=6, n_layer=2, n_head=2, n_embd=16, temperature=1.0)
SETTING |= dict(generation_batch_size=24, num_iterations=1, steps_per_generation=1, beta=0.1, gamma=1.0, epsilon=0.2)
SETTING |= dict(gae_lambda=0.95, value_epsilon=0.2, missing_eos_penalty=-5.0, max_grad_norm=1e9, reward="model")
SETTING |= dict(num_generations=4, rm_batch_size=16, rm_epochs=30, rm_learning_rate=3e-3)


def settings(**changes) -> rlhf_toy.RunArgs:
    return rlhf_toy.RunArgs(**SETTING | changes)


def network(args, outputs=None) -> GPT:
    """Float64, and with weights so large that every token depends on all before it."""
    model = (GPT(args) if outputs is None else GPT(args, outputs)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.35 if weight.ndim > 1 else 0.1)
    return model


def four(args) -> Models:
    return Models(network(args), network(args), network(args, 1), network(args, 1))


def dice(seed=0) -> Rng:
    return Rng(seed, "cpu")


def close(actual, expected, tolerance=1e-9) -> bool:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def ragged(rows=7, length=9, seed=0):
    """A mask of completions of every length from 1 to all."""
    lengths = torch.randint(1, length + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    lengths[:3] = tensor([1, length, length - 1])
    return (torch.arange(length) < lengths[:, None]), lengths.tolist()


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(network) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in network.named_parameters()}


# ---------------------------------------------------------------------------------------------- the reward model
def test_the_loss_of_the_reward_model_by_hand():
    loss = rlhf_toy.reward_model_loss(tensor([2.0, 0.0]).double(), tensor([0.0, 1.0]).double())
    assert close(loss, (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2)
    assert close(rlhf_toy.reward_model_loss(torch.zeros(5), torch.zeros(5)), math.log(2), 1e-6)


def test_the_loss_of_the_reward_model_stays_finite_far_out_and_knows_differences_only():
    loss = rlhf_toy.reward_model_loss(tensor([-1e4, 1e4]), tensor([1e4, -1e4]))
    assert close(loss, 1e4, 1e-6)
    a, b = numbers(6), numbers(6, seed=1)
    assert close(rlhf_toy.reward_model_loss(a + 7, b + 7), rlhf_toy.reward_model_loss(a, b))


def test_the_score_of_an_answer_is_the_output_after_its_last_token_whatever_comes_behind():
    args = settings()
    model = network(args, 1)
    prompts = rlhf_toy.encode_prompts(["31", "07", "92"], "cpu")
    texts = ["$", "[13]$", "[1113]"]  # the last one did not end in time
    completions = rlhf_toy.encode(texts, 6)
    scores = rlhf_toy.model_scores(model, prompts, completions)
    for i, text in enumerate(texts):
        alone = torch.cat([prompts[i], rlhf_toy.encode([text], len(text))[0]])
        assert close(scores[i], model(alone[None])[0, -1, 0])
    spoiled = torch.where(rlhf_toy.completion_mask(completions), completions, rlhf_toy.BOS)
    assert torch.equal(rlhf_toy.model_scores(model, prompts, spoiled), scores)


def test_values_are_those_of_the_tokens_before():
    args = settings()
    critic = network(args, 1)
    prompts, completions = rlhf_toy.encode_prompts(["31", "07"], "cpu"), rlhf_toy.encode(["[13]$", "(07)$"], 6)
    values = rlhf_toy.token_values(critic, prompts, completions)
    assert values.shape == (2, 7)
    for t in range(7):
        assert close(values[:, t], critic(torch.cat([prompts, completions[:, :t]], 1))[:, -1, 0])


def judge_by_length(monkeypatch):
    monkeypatch.setattr(rlhf_toy, "is_right", lambda prompt, text: len(text) % 2 == 0)


def a_run(tmp_path, args):
    files = SimpleNamespace(waiting=[])
    progress = SimpleNamespace(show=lambda *what: None)
    return SimpleNamespace(args=args, path=tmp_path, files=files, progress=progress, signals=[], notes={})


def test_the_reward_model_learns_who_is_preferred_and_its_accuracy_is_that_on_held_out_prompts(tmp_path, monkeypatch):
    judge_by_length(monkeypatch)
    torch.manual_seed(0)
    args = settings(num_prompts=96)
    reference, reward_model, run = network(args), GPT(args, 1).double(), a_run(tmp_path, args)
    before = copy.deepcopy(reference.state_dict())
    asked, real = [], rlhf_toy.encode_pairs
    monkeypatch.setattr(rlhf_toy, "encode_pairs", lambda pairs, args: asked.append(pairs) or real(pairs, args))
    steps, descend = [], rlhf_toy.descend
    monkeypatch.setattr(
        rlhf_toy, "descend", lambda *given: steps.append(dict(given[0].param_groups[0])) or descend(*given)
    )
    rlhf_toy.train_reward_model(reward_model, reference, run)
    assert all(torch.equal(x, before[name]) for name, x in reference.state_dict().items())
    train, held_out = asked
    assert run.notes["pairs"] == len(train) and run.notes["held_out_pairs"] == len(held_out) > 5
    assert not any(rlhf_toy.is_held_out(pair.prompt) for pair in train)
    assert all(rlhf_toy.is_held_out(pair.prompt) for pair in held_out)
    assert (tmp_path / "pairs.jsonl").read_text().splitlines() == [json.dumps(pair._asdict()) for pair in train]
    prompts, *answers = real(held_out, args)
    chosen, rejected = (rlhf_toy.model_scores(reward_model, prompts, answer) for answer in answers)
    wins = (chosen > rejected).double().mean().item()
    assert run.notes["reward_model_accuracy"] == pytest.approx(wins) and wins > 0.8
    lines = (tmp_path / "reward_model.csv").read_text().splitlines()
    assert lines[0] == "step,loss,accuracy" and len(lines) == 1 + 30 * math.ceil(len(train) / 16)
    assert float(lines[1].split(",")[1]) > 0.3 > float(lines[-1].split(",")[1])
    count = len(steps)
    assert [step["lr"] for step in steps] == pytest.approx([3e-3 * (1 - i / count) for i in range(count)])
    assert all(step["weight_decay"] == 0 for step in steps)


# ------------------------------------------------------------------------------------------------------- rewards
def test_the_score_comes_at_the_last_token_and_nowhere_else():
    mask, lengths = ragged()
    scores, same = numbers(7), numbers(7, 9, seed=1)
    rewards = rlhf_toy.token_rewards(same, same, scores, mask, beta=0.3)
    for row, length, score in zip(rewards, lengths, scores):
        assert row[length - 1] == score and (row != 0).sum() == 1


def test_the_kl_rewards_of_a_completion_sum_to_its_log_ratio():
    mask, lengths = ragged()
    logprobs, ref = numbers(7, 9), numbers(7, 9, seed=1)
    rewards = rlhf_toy.token_rewards(logprobs, ref, torch.zeros(7).double(), mask, beta=0.3)
    for i, length in enumerate(lengths):
        expected = -0.3 * sum((logprobs[i, t] - ref[i, t]).item() for t in range(length))
        assert rewards[i].sum().item() == pytest.approx(expected)
        assert close(rewards[i, :length], -0.3 * (logprobs[i] - ref[i])[:length]) and not rewards[i, length:].any()


@pytest.mark.parametrize("kind", [torch.float64, torch.bool, torch.int64])
def test_nothing_after_the_end_matters_even_if_it_is_nan(kind):
    mask, lengths = ragged()
    logprobs, ref, values, scores = numbers(7, 9), numbers(7, 9, seed=1), numbers(7, 9, seed=2), numbers(7)
    rewards = rlhf_toy.token_rewards(logprobs, ref, scores, mask.to(kind), 0.3)
    expected = rlhf_toy.token_gae(rewards, values, mask.to(kind), 0.9, 0.8)
    for poison in (math.nan, math.inf):
        spoiled = [torch.where(mask, x, poison) for x in (logprobs, ref, values)]
        again = rlhf_toy.token_rewards(*spoiled[:2], scores, mask.to(kind), 0.3)
        assert torch.equal(again, rewards)
        again = rlhf_toy.token_gae(torch.where(mask, again, poison), spoiled[2], mask.to(kind), 0.9, 0.8)
        assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
        assert not again[0][~mask].any() and not again[1][~mask].any()


# ----------------------------------------------------------------------------------------------------------- GAE
def slow_gae(rewards, values, gamma, gae_lambda):
    """Of one completion, from the definition: the sum of (gamma lambda)^k times the TD errors."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_of_ragged_completions_is_that_of_each_alone(gamma, gae_lambda):
    mask, lengths = ragged()
    rewards, values = numbers(7, 9), numbers(7, 9, seed=1)
    advantages, returns = rlhf_toy.token_gae(rewards, values, mask, gamma, gae_lambda)
    for i, n in enumerate(lengths):
        expected = slow_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, gae_lambda)
        assert close(advantages[i, :n], expected) and close(returns[i, :n] - values[i, :n], expected)


def test_with_lambda_one_returns_are_the_rewards_to_come():
    mask, lengths = ragged()
    rewards = numbers(7, 9)
    _, returns = rlhf_toy.token_gae(rewards, numbers(7, 9, seed=1), mask, 1.0, 1.0)
    for i, n in enumerate(lengths):
        assert close(returns[i, :n], [rewards[i, t:n].sum().item() for t in range(n)])


# -------------------------------------------------------------------------------------------------- adaptive beta
def test_adaptive_beta_by_hand():
    controller = AdaptiveKL(0.1, target=2.0)
    expected = 0.1
    for kl, error in ((2.0, 0.0), (2.2, 0.1), (9.0, 0.2), (0.0, -0.2), (-1.0, -0.2), (1.8, -0.1)):
        controller.update(kl)
        expected *= 1 + 0.1 * error
        assert controller.beta == pytest.approx(expected)
    other = AdaptiveKL(7.0, target=2.0)
    other.load_state_dict(controller.state_dict())
    assert other.beta == controller.beta


# -------------------------------------------------------------------------------------------------------- losses
def test_the_policy_loss_is_the_clipped_surrogate_over_all_tokens():
    mask, lengths = ragged()
    old = numbers(7, 9) - 2
    new = (old + 0.4 * numbers(7, 9, seed=1)).requires_grad_()
    advantages = numbers(7, 9, seed=2)
    loss, stats = rlhf_toy.policy_loss(new, old, advantages, mask, 0.2)
    total, clipped, ratios, kls = 0.0, 0, [], []
    for i, n in enumerate(lengths):
        for t in range(n):
            ratio, a = (new[i, t] - old[i, t]).exp(), advantages[i, t].item()
            bound = ratio.clamp(0.8, 1.2)
            total = total + (ratio * a if ratio * a < bound * a else bound * a)
            clipped += (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
            ratios.append(ratio.item())
            kls.append(0.5 * (new[i, t] - old[i, t]).item() ** 2)
    count = sum(lengths)
    (slope,) = torch.autograd.grad(loss, new, retain_graph=True)
    (expected,) = torch.autograd.grad(-total / count, new)
    assert close(loss, (-total / count).detach()) and close(slope, expected)
    assert 0 < clipped < count and close(stats["policy/clipfrac_avg"], clipped / count)
    assert close(stats["val/ratio"], sum(ratios) / count) and close(stats["policy/approxkl_avg"], sum(kls) / count)


def test_the_value_loss_is_the_larger_of_two_squared_errors():
    mask, lengths = ragged()
    old, returns = numbers(7, 9), numbers(7, 9, seed=1)
    values = (old + 0.3 * numbers(7, 9, seed=2)).requires_grad_()
    loss, stats = rlhf_toy.value_loss(values, old, returns, mask, 0.2)
    total, clipped, count = 0.0, 0, sum(lengths)
    for i, n in enumerate(lengths):
        for t in range(n):
            bound = min(max(values[i, t].item(), old[i, t].item() - 0.2), old[i, t].item() + 0.2)
            plain, held = (values[i, t] - returns[i, t]) ** 2, (bound - returns[i, t]) ** 2
            total = total + 0.5 * (held if held > plain else plain)
            clipped += bool(held > plain)
    (slope,) = torch.autograd.grad(loss, values)
    (expected,) = torch.autograd.grad(total / count, values)
    assert close(loss.detach(), (total / count).detach()) and close(slope, expected)
    assert 0 < clipped < count and close(stats["val/clipfrac_avg"], clipped / count, 1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_no_loss_looks_behind_the_end(poison):
    mask, _ = ragged()
    old, advantages = numbers(7, 9) - 2, numbers(7, 9, seed=2)
    given = [(old + 0.1 * numbers(7, 9, seed=1)), old, advantages]
    for loss_of in (rlhf_toy.policy_loss, rlhf_toy.value_loss):
        losses, slopes = [], []
        for inputs in (given, [torch.where(mask, x, poison) for x in given[:2]] + [given[2]]):
            new = inputs[0].clone().requires_grad_()
            losses.append(loss_of(new, *inputs[1:], mask, 0.2)[0])
            slopes.append(torch.autograd.grad(losses[-1], new)[0])
        assert torch.equal(*losses) and torch.equal(*slopes) and not slopes[0][~mask].any()


# ------------------------------------------------------------------------------------------------ rollout, update
def a_batch(models, args, scale=(0.0, 1.0), seed=0) -> Batch:
    return rlhf_toy.rollout(models, tensor(scale).double(), args.beta, dice(seed), args)


def optimizers_of(models, kind=torch.optim.SGD) -> list[torch.optim.Optimizer]:
    return [kind(part.parameters(), lr=9.9) for part in (models.policy, models.critic)]  # update sets the step sizes


def test_a_rollout_scores_completions_standardised_and_punishes_those_without_an_end():
    torch.manual_seed(0)
    args = settings()
    models = four(args)
    batch = a_batch(models, args, scale=(0.5, 2.0))
    ended = (batch.completions == EOS).any(1)
    assert 0 < ended.sum() < len(ended)
    raw = rlhf_toy.model_scores(models.reward_model, batch.prompts, batch.completions)
    assert close(batch.scores[ended], (raw[ended] - 0.5) / 2) and (batch.scores[~ended] == -5).all()
    assert not rlhf_toy.completion_mask(batch.completions)[batch.completions == PAD].all()
    expected = rlhf_toy.token_rewards(batch.logprobs, batch.ref_logprobs, batch.scores, batch.mask, args.beta)
    assert torch.equal(batch.rewards, expected)
    for network_, logprobs in ((models.policy, batch.logprobs), (models.reference, batch.ref_logprobs)):
        mine = rlhf_toy.completion_logprobs(network_, batch.prompts, batch.completions, args)[0]
        assert close(logprobs, mine.detach())
    values = rlhf_toy.token_values(models.critic, batch.prompts, batch.completions)[:, :-1]
    assert close(batch.values, values.detach())
    assert not batch.values.requires_grad and not batch.logprobs.requires_grad


def test_returns_are_computed_before_the_advantages_are_standardised():
    torch.manual_seed(0)
    args = settings(gamma=0.9, gae_lambda=0.8)
    batch = a_batch(four(args), args)
    raw, returns = [], []
    for i, n in enumerate(batch.mask.sum(1).tolist()):
        values = batch.values[i, :n].tolist()
        raw += (mine := slow_gae(batch.rewards[i, :n].tolist(), values, 0.9, 0.8))
        returns += [a + v for a, v in zip(mine, values)]
    assert close(batch.returns[batch.mask], returns)
    raw = tensor(raw, dtype=torch.float64)
    assert close(batch.advantages[batch.mask], (raw - raw.mean()) / raw.std(unbiased=False), 1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_with_one_epoch_and_no_kl_the_gradient_is_the_policy_gradient(temperature):
    torch.manual_seed(0)
    args = settings(beta=0.0, temperature=temperature)
    models = four(args)
    batch = a_batch(models, args)
    optimizers = optimizers_of(models)
    stats = rlhf_toy.update(models, *optimizers, batch, 0.0, dice(), args)
    mine = gradients(models.policy)
    models.policy.zero_grad()
    total = 0.0
    for i, n in enumerate(batch.mask.sum(1).tolist()):
        for t in range(n):
            before = torch.cat([batch.prompts[i], batch.completions[i, :t]])
            logits = models.policy(before[None])[0, -1] / temperature
            total = total + batch.advantages[i, t] * logits.log_softmax(-1)[batch.completions[i, t]]
    (-total / batch.mask.sum()).backward()
    assert all(close(mine[name], weight.grad, 1e-7) for name, weight in models.policy.named_parameters())
    assert stats["val/ratio"] == pytest.approx(1) and stats["policy/clipfrac_avg"] == 0


def test_steps_of_the_critic_leave_the_policy_alone_and_those_of_the_policy_the_critic():
    torch.manual_seed(0)
    for moving, rates in (("policy", (0.1, 0.0)), ("critic", (0.0, 0.1))):
        rates = dict(zip(("learning_rate", "critic_learning_rate"), rates))
        args = settings(num_iterations=2, steps_per_generation=2, **rates)
        models = four(args)
        before = copy.deepcopy(models)
        batch = a_batch(models, args)
        rlhf_toy.update(models, *optimizers_of(models), batch, 1.0, dice(), args)
        for name in Models._fields:
            one, other = getattr(models, name).state_dict(), getattr(before, name).state_dict()
            assert all(torch.equal(one[key], other[key]) for key in one) == (name != moving), name


def test_every_epoch_sees_each_completion_once(monkeypatch):
    torch.manual_seed(0)
    args = settings(num_iterations=3, steps_per_generation=4)
    models = four(args)
    batch = a_batch(models, args)
    batch = batch._replace(returns=torch.arange(24).double()[:, None].expand(batch.mask.shape))
    seen, real = [], rlhf_toy.value_loss
    monkeypatch.setattr(rlhf_toy, "value_loss", lambda *given: seen.append(given[2][:, 0].tolist()) or real(*given))
    rlhf_toy.update(models, *optimizers_of(models), batch, 0.0, dice(), args)
    assert [len(rows) for rows in seen] == [6] * 12
    epochs = [sum(seen[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]


def test_each_step_is_as_long_as_the_annealed_step_size_times_the_bound_on_the_gradient(monkeypatch):
    """And the advantages of a minibatch are those of the batch, not standardised again."""
    torch.manual_seed(0)
    args = settings(steps_per_generation=2, learning_rate=0.5, critic_learning_rate=0.2, max_grad_norm=1e-2)
    models = four(args)
    batch = a_batch(models, args)
    seen, weights, real = [], [], rlhf_toy.policy_loss

    def now():
        return [torch.nn.utils.parameters_to_vector(x.parameters()).detach() for x in (models.policy, models.critic)]

    def spy(*given):
        seen.extend(given[2].tolist())
        weights.append(now())
        return real(*given)

    monkeypatch.setattr(rlhf_toy, "policy_loss", spy)
    rlhf_toy.update(models, *optimizers_of(models), batch, 0.3, dice(), args)
    assert sorted(seen) == sorted(batch.advantages.tolist())
    for before, after in zip(weights, [*weights[1:], now()]):
        moved = [(x - y).norm().item() for x, y in zip(before, after)]
        assert moved == pytest.approx([0.5 * 0.3 * 1e-2, 0.2 * 0.3 * 1e-2], rel=1e-3)


def test_the_critic_fits_the_returns_of_a_batch():
    torch.manual_seed(0)
    args = settings(num_iterations=150, value_epsilon=1e9, learning_rate=0.0, critic_learning_rate=3e-3)
    models = four(args)
    batch = a_batch(models, args)
    rlhf_toy.update(models, *optimizers_of(models, torch.optim.AdamW), batch, 1.0, dice(), args)
    values = rlhf_toy.token_values(models.critic, batch.prompts, batch.completions)[:, :-1]
    errors = ((values - batch.returns)[batch.mask] ** 2).mean()
    assert errors < 0.3 * batch.returns[batch.mask].var()


def test_the_verifier_scores_by_the_truth():
    args = settings(reward="verifier", max_completion_length=8)
    prompts = rlhf_toy.encode_prompts(["31", "07", "92"], "cpu")
    completions = rlhf_toy.encode([".(13)$", "(70)$", "[29]$"], 8)
    assert rlhf_toy.raw_scores(None, prompts, completions, args).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("reward", ["model", "verifier"])
def test_the_scores_of_the_reference_are_standardised(reward, tmp_path, monkeypatch):
    judge_by_length(monkeypatch)
    torch.manual_seed(0)
    args = settings(reward=reward, num_prompts=40, rm_epochs=2, max_completion_length=12)
    models, run = four(args), a_run(tmp_path, args)
    monkeypatch.setattr(rlhf_toy, "warm_start", lambda model, run: None)
    scale = tensor([0.0, 1.0]).double()
    untrained, real = [], rlhf_toy.train_reward_model
    monkeypatch.setattr(
        rlhf_toy, "train_reward_model", lambda *given: untrained.append(copy.deepcopy(given[0])) or real(*given)
    )
    rlhf_toy.prepare(models, scale, run)
    assert all(torch.equal(x, models.policy.state_dict()[name]) for name, x in models.reference.state_dict().items())
    prompts = rlhf_toy.encode_prompts(rlhf_toy.sample_prompts(4000, 2, dice(5)), "cpu")
    completions = rlhf_toy.generate(models.reference, prompts, 1, dice(6), args)
    scores = (rlhf_toy.raw_scores(models.reward_model, prompts, completions, args) - scale[0]) / scale[1]
    assert abs(scores.mean()) < 0.1 and abs(scores.std() - 1) < 0.1
    assert len(untrained) == (reward == "model")
    for network_ in untrained:
        for name, weights in network_.state_dict().items():
            assert name == "head.weight" or torch.equal(weights, models.policy.state_dict()[name])
    body = models.reward_model if reward == "model" else models.policy
    for name, weights in models.critic.state_dict().items():
        assert torch.equal(weights, body.state_dict()[name]) if name != "head.weight" else not weights.any()


def test_statistics_are_those_counted_by_hand():
    mask = tensor([[1, 1, 0], [1, 1, 1]]).bool()
    logprobs, ref = tensor([[-1.0, -2.0, 9.0], [-3.0, -1.0, -1.0]]), tensor([[-2.0, -2.0, 7.0], [-1.0, -2.0, -3.0]])
    completions, scores = tensor([[5, EOS, PAD], [5, 6, 7]]), tensor([0.5, -1.0])
    rewards = rlhf_toy.token_rewards(logprobs, ref, scores, mask, 0.1)
    batch = Batch(None, completions, mask, logprobs, ref, scores, rewards, None, None, None)
    values = rlhf_toy.statistics(batch, 0.1)
    expected = {"objective/kl": 1.0, "objective/entropy": 4.0, "objective/scores": -0.25, "val/num_eos_tokens": 1}
    expected |= {"objective/non_score_reward": -0.1, "objective/rlhf_reward": -0.35, "objective/beta": 0.1}
    assert values == pytest.approx(expected | {"completions/mean_length": 2.5})
