"""The exact KL from the base along its own answers, and why their cross-entropy cannot replace it."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers.llama import VOCABULARY, load
from helpers.scoring import some_ids

from orthogonalize.models.generation import generate
from orthogonalize.models.logprobs import exact_kl
from orthogonalize.selection.search import drift as drifting
from orthogonalize.selection.search.drift import AnsweredPrompts


@contextmanager
def sharpened(model, factor):
    """Every logit times `factor`: the final norm's weight is scaled."""
    weight = model.model.norm.weight.data
    kept = weight.clone()
    weight *= factor
    try:
        yield
    finally:
        weight.copy_(kept)


@contextmanager
def shaken(model):
    """A block's output matrix is changed."""
    weight = model.model.layers[1].mlp.down_proj.weight.data
    kept = weight.clone()
    weight *= -1
    try:
        yield
    finally:
        weight.copy_(kept)


def plain_logprobs(model, prompt, answer):
    """Log-probabilities [tokens, vocabulary] along one answer, from transformers alone, in float64."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.fixture
def answered(base):
    model, prompts = load(base), some_ids(7, 3)
    answers = [row[: 2 + i] for i, row in enumerate(generate(model, prompts, 9, [], batch=4))]
    return model, prompts, answers


def test_drift_equals_a_plain_computation(answered):
    model, prompts, answers = answered
    found = AnsweredPrompts(model, prompts, answers).drift(lambda: shaken(model))
    kls, losses = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        p = plain_logprobs(model, prompt, answer)
        with shaken(model):
            q = plain_logprobs(model, prompt, answer)
        kls.append((p.exp() * (p - q)).sum(-1))
        target = torch.tensor(answer)[:, None]
        losses.append((-p.gather(-1, target).sum(), -q.gather(-1, target).sum()))
    tokens = sum(map(len, answers))
    assert found.kl == pytest.approx(sum(k.sum().item() for k in kls) / tokens, rel=1e-5)
    assert found.kls == pytest.approx([k.sum().item() * len(answers) / tokens for k in kls], rel=1e-4)
    assert found.first_kl == pytest.approx(sum(k[0].item() for k in kls) / len(kls), rel=1e-4)
    before, after = (sum(loss).item() for loss in zip(*losses, strict=True))
    assert found.ce_increase == pytest.approx(after / before - 1, rel=1e-4)


def test_sharpening_lowers_the_cross_entropy_but_is_a_change(answered):
    """A model that becomes more certain predicts the base's greedy answers better, though it is another model."""
    model, prompts, answers = answered
    found = AnsweredPrompts(model, prompts, answers).drift(lambda: sharpened(model, 1.25))
    assert found.ce_increase < -0.05
    assert found.kl > 0.01
    assert found.first_kl > 0.01
    more = AnsweredPrompts(model, prompts, answers).drift(lambda: sharpened(model, 1.5))
    assert more.ce_increase < found.ce_increase
    assert more.kl > found.kl


def test_unedited_model_does_not_drift(answered):
    model, prompts, answers = answered
    found = AnsweredPrompts(model, prompts, answers).drift(nullcontext)
    assert found.kls == [0.0] * len(prompts)
    assert (found.first_kl, found.ce_increase) == (0.0, 0.0)


def test_kl_has_no_smoothing_constant():
    """What the edited model makes rarer counts in full, however rare it becomes."""
    p = torch.tensor([0.5, 0.5]).log()
    for rare in (1e-9, 1e-12):
        q = torch.tensor([1 - rare, rare], dtype=torch.float64).log()
        expected = 0.5 * math.log(0.5 / (1 - rare)) + 0.5 * math.log(0.5 / rare)
        assert exact_kl(p, q).item() == pytest.approx(expected, rel=1e-6)
    ruled_out = torch.tensor([0.0, -torch.inf])
    assert exact_kl(ruled_out, ruled_out).item() == 0
    assert exact_kl(p, torch.tensor([torch.nan, 0.0])).isnan()


def test_memory_is_bounded_and_the_base_is_kept_only_as_far_as_there_is_room(answered, monkeypatch):
    model, prompts, answers = answered
    whole = AnsweredPrompts(model, prompts, answers).drift(lambda: shaken(model))
    asked, real = [], drifting.completion_logprobs

    def counting(model, prompts, answers, prefix):
        asked.append(sum(map(len, answers)))
        return real(model, prompts, answers, prefix=prefix)

    monkeypatch.setattr(drifting, "completion_logprobs", counting)
    monkeypatch.setattr(drifting, "BATCH", 30 * VOCABULARY)
    room = sum(map(len, answers)) * VOCABULARY // 2
    own = AnsweredPrompts(model, prompts, answers, cached=room)
    first = own.drift(lambda: shaken(model))
    assert max(asked) <= 30
    passes = len(asked)
    assert own.drift(lambda: shaken(model)) == first, "kept and recomputed distributions are the same"
    again = len(asked) - passes
    assert passes / 2 < again < passes, "some batches of the base are kept, others are computed again"
    held = sum(rows.numel() for batch in own._kept.values() for rows in batch.values())
    assert 0 < held <= room
    assert first.kls == pytest.approx(whole.kls, rel=1e-4)
