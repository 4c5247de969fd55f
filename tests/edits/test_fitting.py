"""Fitting conditional maps: what is read, from which tokens, and behind which edits."""

from __future__ import annotations

import pytest
import torch
from helpers.answered import answered
from helpers.exactness import LAYERS, centred_basis
from helpers.tiny_models import DoublePrecision

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import EXPERTS, Intervention, Site, WriteMatrix, block_sites
from orthogonalize.directions.conditional import InputTokens, Weights, solve
from orthogonalize.edits.fitting import kept
from orthogonalize.edits.fitting.fit import AnsweredTokens, FitTokens, fit_conditional
from orthogonalize.models.hooks import intervened
from orthogonalize.models.stream import Stream
from orthogonalize.models.write_reading import TokenSet, WriteReader

pytestmark = pytest.mark.usefixtures("one_thread")
R = centred_basis(2, 17)
NOTHING = Intervention()

TEMPLATE = 3
FURTHER = answered(9, 8)
TOKENS = FitTokens(TEMPLATE, answered(1, 14), answered(2, 20), {"kept": answered(3, 6)}, further=FURTHER)


def seen_alone(model, module, tokens: TokenSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a module, one sequence at a time and without padding."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _m, args, out: parts.append((args[0], out)))
    taken = []
    with torch.inference_mode(), DoublePrecision():
        for row, start, end in zip(tokens.ids, tokens.starts, tokens.lasts, strict=True):
            parts.clear()
            model(input_ids=torch.tensor([row]), use_cache=False)
            x, y = (part.reshape(-1, part.shape[-1]) for part in parts[-1])
            taken.append((x[start:end], y[start:end]))
    handle.remove()
    return torch.cat([x for x, _ in taken]), torch.cat([y for _, y in taken])


def solved(model, module, weights: Weights, before: Intervention = NOTHING):
    """The map of one module from independently read tokens, each set with its weight; the target's behind an edit."""
    target, harmless, preserved = TOKENS.target, TOKENS.harmless, TOKENS.preserved["kept"]
    sets = [
        target.first(TEMPLATE), harmless.whole(), harmless.first(TEMPLATE), preserved.whole(),
        preserved.first(TEMPLATE),
    ]  # fmt: skip
    shares = [weights.first, weights.preserve, weights.preserve * weights.first]
    with intervened(model, before):
        target_seen = seen_alone(model, module, sets[0])
    seen = [target_seen, *(seen_alone(model, module, tokens) for tokens in sets[1:])]
    read = [InputTokens().update(x, y @ R.mT) for x, y in seen]
    x, y = seen_alone(model, module, FURTHER.first(TEMPLATE))  # they belong to the harmless first tokens
    read[2].update(x, y @ R.mT)
    return solve(R, (read[0], read[1], list(zip(shares, read[2:], strict=True))), weights)


def test_first_tokens_are_the_template_and_the_start_of_the_answer():
    tokens = AnsweredTokens([list(range(30)), list(range(12))], [10, 11]).first(3)
    assert [row[start:end] for row, start, end in zip(tokens.ids, tokens.starts, tokens.lasts, strict=True)] == [
        list(range(7, 18)), [8, 9, 10, 11]
    ]  # fmt: skip
    assert tokens.count == 15


def test_tokens_are_the_same_after_saving(tmp_path):
    TOKENS.save(tmp_path / "tokens.json")
    assert FitTokens.load(tmp_path / "tokens.json") == TOKENS
    (tmp_path / "tokens.json").write_text('{"target": {}}')
    with pytest.raises(OrthogonalizeError, match=r"tokens\.json is damaged"):
        FitTokens.load(tmp_path / "tokens.json")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mamba2", "falcon_h1"])
def test_fit_from_one_reading_is_the_regression_on_each_input(name, bases):
    model, weights = bases(name).model, Weights(0.3, 2.0, 4.0, 0.05)
    with DoublePrecision():
        fit = fit_conditional(model, TOKENS, lambda _: R, block_sites(range(LAYERS)), weights, sequential=False)
    stream = Stream.of(model)
    assert fit.maps
    for matrix, found in fit.maps.items():
        expected = solved(model, stream.inner(matrix.site, matrix.name), weights)
        assert (found.c - expected.c).norm() <= 1e-9 * expected.c.norm(), matrix


def test_sequential_fit_reads_the_target_behind_earlier_edits_and_the_rest_in_the_base(bases):
    """Layers 0 to 2 from the base; of layer 3, the target as read while the edits of those are applied."""
    model, weights = bases("llama").model, Weights(0.3, 2.0, 4.0, 0.05)
    with DoublePrecision():
        fit = fit_conditional(model, TOKENS, lambda _: R, block_sites(range(LAYERS)), weights)
    stream, last = Stream.of(model), WriteMatrix(Site("mlp", 3), "mlp.down_proj")
    before = {matrix: each for matrix, each in fit.maps.items() if matrix.site.layer != 3}
    module = stream.inner(last.site, last.name)
    base = solved(model, module, weights)
    expected = solved(model, module, weights, Intervention(conditional=before))
    assert (base.c - expected.c).norm() > 1e-3 * expected.c.norm(), "earlier edits make no difference here"
    assert (fit.maps[last].c - expected.c).norm() <= 1e-9 * expected.c.norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_an_expert_sees_the_tokens_that_are_routed_to_it(name, bases, monkeypatch):
    """Against a replacement of every other expert's matrix by zeros, one token at a time."""
    model = bases(name).model
    site = next(s for s in block_sites(range(LAYERS)) if WriteMatrix(s, EXPERTS) in _matrices(model, s))
    matrix, tokens = WriteMatrix(site, EXPERTS), answered(5, 3).first(TEMPLATE)
    seen: dict[int, list[torch.Tensor]] = {}

    def take(_name, _matrix, expert, x, y):
        assert len(x) == len(y)
        seen.setdefault(expert, []).append(x)

    with DoublePrecision():
        WriteReader(model, {"all": tokens}).read([matrix], take)
        together = {e: torch.cat(rows) for e, rows in seen.items()}
        seen.clear()
        for row, start, end in zip(tokens.ids, tokens.starts, tokens.lasts, strict=True):
            for last in range(start, end):  # the last token alone counts
                WriteReader(model, {"all": TokenSet([row[: last + 1]], [last])}).read([matrix], take)
    alone = {e: torch.cat(rows) for e, rows in seen.items()}
    assert together.keys() == alone.keys()
    for e in alone:
        assert _same_rows(together[e], alone[e]), e


def _matrices(model, site):
    from orthogonalize.models.write_matrices import write_modules

    return write_modules(Stream.of(model), site)


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both hold the same rows, in any order."""
    return len(a) == len(b) and bool((torch.cdist(a, b).min(1).values < 1e-9).all())


def test_experts_that_saw_too_few_tokens_are_left_alone(bases):
    model = bases("mixtral").model
    few = FitTokens(TEMPLATE, answered(1, 6), answered(2, 4))
    sites = [Site("mlp", 1)]
    fit = fit_conditional(model, few, lambda _: R, sites, Weights())
    many = fit_conditional(model, FitTokens(TEMPLATE, answered(1, 80), answered(2, 60)), lambda _: R, sites, Weights())
    assert fit.left_alone > many.left_alone
    for found in fit.maps.values():
        assert int((found.c.abs().sum((1, 2)) == 0).sum()) == fit.left_alone


def test_a_stream_without_direction_is_not_edited(bases):
    model = bases("llama").model
    fit = fit_conditional(model, TOKENS, lambda layer: R if layer == 2 else None, block_sites(range(LAYERS)), Weights())
    assert {matrix.site.layer for matrix in fit.maps} == {1}


def test_places_are_the_first_tokens_one_by_one():
    tokens = AnsweredTokens([list(range(30)), list(range(12))], [10, 11])
    places = tokens.places(3)
    taken = {
        place: [row[a:b] for row, a, b in zip(each.ids, each.starts, each.lasts, strict=True)]
        for place, each in places.items()
    }
    assert list(taken) == list(range(-3, 8))
    assert (taken[-1], taken[0], taken[1]) == ([[9], [10]], [[10], [11]], [[11], []])
    assert sum(each.count for each in places.values()) == tokens.first(3).count


def test_a_target_is_read_with_the_answers_of_the_examples():
    target = AnsweredTokens([[1, 2, 3, 9], [4, 5, 9]], [3, 2])
    found = target.answered_as(AnsweredTokens([[7, 7, 8]], [2]))
    assert found == AnsweredTokens([[1, 2, 3, 8], [4, 5, 8]], [3, 2])


def test_examples_say_what_the_target_is_to_write_at_each_place(bases):
    """Values relative to the examples' mean at the same place, against tokens read one sequence at a time."""
    model, weights, examples = bases("llama").model, Weights(0.3, 2.0, 4.0, 0.05), answered(8, 9)
    tokens = FitTokens(TEMPLATE, TOKENS.target, TOKENS.harmless, TOKENS.preserved, examples)
    site = Site("mlp", 1)
    with DoublePrecision():
        (found,) = fit_conditional(model, tokens, lambda _: R, [site], weights).maps.values()
    module = Stream.of(model).inner(site, "mlp.down_proj")
    shown, wanted = examples.places(TEMPLATE), TOKENS.target.answered_as(examples).places(TEMPLATE)
    target = InputTokens()
    for place, each in wanted.items():
        x, y = seen_alone(model, module, each)
        example = seen_alone(model, module, shown[place])[1] @ R.mT
        if len(x):
            target.update(x, y @ R.mT - example.mean(0))
    harmless, kept = TOKENS.harmless, TOKENS.preserved["kept"]
    others = [harmless.whole(), harmless.first(TEMPLATE), kept.whole(), kept.first(TEMPLATE)]
    read = [InputTokens().update(x, y @ R.mT) for x, y in (seen_alone(model, module, each) for each in others)]
    shares = [weights.first, weights.preserve, weights.preserve * weights.first]
    sets = (target, read[0], list(zip(shares, read[1:], strict=True)))
    expected = solve(R, sets, weights, torch.zeros(len(R), dtype=torch.float64))
    assert (found.c - expected.c).norm() <= 1e-9 * expected.c.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("room", [kept.HELD, 0])
def test_fits_that_share_what_they_read_are_those_of_fresh_ones(name, room, bases, monkeypatch):
    monkeypatch.setattr(kept, "HELD", room)
    model, weights = bases(name).model, Weights()
    with DoublePrecision():
        shared, unchanged = WriteReader(model, TOKENS.changed), kept.KeptReader(model, TOKENS.unchanged)
        shared.advance(1)
        for first in (2, 1, 3):
            sites = block_sites(range(first, LAYERS))
            fresh = fit_conditional(model, TOKENS, lambda _: R, sites, weights)
            found = fit_conditional(model, TOKENS, lambda _: R, sites, weights, reader=shared.copy(), kept=unchanged)
            assert shared.at == 1
            for matrix, each in fresh.maps.items():
                assert (found.maps[matrix].c - each.c).norm() <= 1e-9 * each.c.norm(), matrix
