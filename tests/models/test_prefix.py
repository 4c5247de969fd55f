"""What all prompts begin with is computed once: nothing that is measured may change by it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.llama import LAYERS, VOCABULARY, load
from helpers.scoring import directions_of
from helpers.tiny_models import build

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, removal, shift, stack_maps
from orthogonalize.models import write_reading
from orthogonalize.models.activations import all_activations, capture
from orthogonalize.models.forward import prefix
from orthogonalize.models.forward.prefix import shared_length
from orthogonalize.models.generation import generate
from orthogonalize.models.hooks import intervened
from orthogonalize.models.logprobs import completion_logprobs
from orthogonalize.models.stream import Stream
from orthogonalize.models.write_matrices import write_modules
from orthogonalize.selection.readers.kept_activations import KeptActivations
from orthogonalize.selection.readouts import FirstToken
from orthogonalize.selection.scoring import LocalScorer, PromptScores, global_outputs, read_outputs
from orthogonalize.selection.search.drift import AnsweredPrompts

COMMON = 9
# One family of each kind of memory, positions and masks; those from mamba on cannot share.
FAMILIES = (
    "llama", "mistral", "qwen3_vl multimodal", "gemma3", "gemma3 multimodal", "gemma4", "gpt2", "opt", "falcon",
    "gpt_oss", "llama4", "mixtral", "deepseek_v3", "cohere2", "mamba", "qwen3_next", "jamba", "lfm2", "falcon_h1",
)  # fmt: skip


def rows(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(3, vocabulary, (COMMON,), generator=generator).tolist()
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [begins + torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@contextmanager
def unshared(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prefix, "FEWEST", 10**9)
        yield


def both(monkeypatch, compute):
    """What `compute` gives with and without sharing."""
    found = compute()
    with unshared(monkeypatch):
        return found, compute()


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_to_whole_prompts(name, monkeypatch):
    model = build(name).float().eval()
    ids = rows(7, vocabulary=90)
    together = generate(model, ids, 12, [2], batch=3)
    with unshared(monkeypatch):
        assert together == generate(model, ids, 12, [2], batch=1)
    assert len({tuple(answer) for answer in together}) > 2 or name == "opt"  # which always answers the same


def test_a_beginning_is_computed_once_for_all_answers(monkeypatch):
    model = build("llama").eval()
    ids = rows(6, vocabulary=90)
    sizes: list[torch.Size] = []
    embedding = model.get_input_embeddings()
    with unshared(monkeypatch):
        assert shared_length(model, ids) == 0
    shared_length(model, ids)  # which tries it once
    embedding.register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape))
    generate(model, ids, 2, [2], batch=3)
    assert sizes[0] == (1, COMMON)
    assert max(width for rows_, width in sizes if rows_ > 1) == max(map(len, ids)) - COMMON


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_whole_prompts(name, monkeypatch):
    model = build(name).float().eval()
    ids = rows(5, vocabulary=90)
    one, two = both(monkeypatch, lambda: read_outputs(model, ids, layers=(1,)))
    assert torch.allclose(one.probabilities, two.probabilities, atol=1e-5)
    assert torch.allclose(one.streams[1], two.streams[1], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "mixtral", "gpt2"])
def test_families_that_keep_keys_and_values_share(name):
    model = build(name).float().eval()
    assert prefix.shared_length(model, rows(5, vocabulary=90)) == COMMON


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_families_with_other_memories_do_not(name):
    model = build(name).float().eval()
    assert prefix.shared_length(model, rows(5, vocabulary=90)) == 0


def test_a_model_that_disagrees_does_not_share(base, monkeypatch):
    """One whose positions count from the first token that it is given."""
    model = load(base)
    decoder = Stream.of(model).decoder
    plain = decoder.forward
    monkeypatch.setattr(
        decoder, "forward",
        lambda **k: plain(**k | {"position_ids": torch.arange(k["input_ids"].shape[1])[None]}),
    )  # fmt: skip
    assert prefix.shared_length(model, rows(5)) == 0
    assert prefix.shared_length(load(base), rows(5)) == COMMON


def test_a_model_that_no_file_describes_does_not_share(base, monkeypatch):
    """Such as a judge: it is read whole, and nothing is refused."""
    other, ids = load(base), rows(5)

    def undescribed(_model):
        raise OrthogonalizeError("no file describes it")

    monkeypatch.setattr(prefix.Stream, "of", undescribed)
    assert prefix.shared_length(other, ids) == 0


def test_every_row_keeps_tokens_of_its_own(base):
    model, ids = load(base), [[5] * 8, [5] * 12]
    assert prefix.shared_length(model, ids) == 7
    assert prefix.shared_length(model, ids, own=3) == 5
    assert prefix.shared_length(model, ids, own=6) == 0, "which would not pay"
    assert prefix.shared_length(model, ids[:1]) == 0


def test_activations_and_log_probabilities_do_not_change(base, monkeypatch):
    model, ids = load(base), rows(6)
    one, two = both(monkeypatch, lambda: all_activations(model, ids, 3))
    assert torch.allclose(one, two, atol=1e-4)
    answers = [row[-4:] for row in rows(6, seed=1)]
    one, two = both(monkeypatch, lambda: dict(completion_logprobs(model, ids, answers)))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[i], two[i], atol=1e-4) for i in one)


def test_scores_of_directions_do_not_change(base, monkeypatch):
    """Edits differ by row, and so does what they make of the beginning."""
    model, ids, others = load(base), rows(6), rows(7, seed=2)
    directions = directions_of(model, ids, others)
    for layer in (0, LAYERS - 2):
        maps = stack_maps([directions.removal("inlp", p, layer) for p in (-2, -1)])
        added = shift(torch.stack([3 * directions.mean_diff(p, layer) for p in (-2, -1)]))
        for given, projected in ((maps, True), (added, False)):
            one, two = both(
                monkeypatch, lambda g=given, p=projected, at=layer: LocalScorer(model, ids, (2,)).outputs(at, g, p)
            )
            assert torch.allclose(one.probabilities, two.probabilities, atol=1e-5)
            assert torch.allclose(one.streams[2], two.streams[2], atol=1e-4)
            assert not torch.allclose(one.probabilities[0], one.probabilities[1], atol=1e-3)
        one, two = both(monkeypatch, lambda m=maps: global_outputs(model, ids, m, LAYERS))
        assert torch.allclose(one.probabilities, two.probabilities, atol=1e-5)


@pytest.mark.parametrize("first", [0, LAYERS - 1])
def test_measures_of_whole_edits_do_not_change(base, first, monkeypatch):
    """Also where the blocks below the edit are not computed again."""
    model, ids = load(base), rows(6)
    direction = torch.nn.functional.normalize(all_activations(model, ids, 1)[0, 0, -1:], dim=-1)
    edit = Intervention(writes={Site("mlp", layer): removal(direction) for layer in range(first, LAYERS)})
    middle, answers = LAYERS // 2, [row[-4:] for row in rows(6, seed=1)]

    def measured():
        spared = edit.spares(middle)
        scores = PromptScores(model, ids, FirstToken((5, 9)), middle)
        answered = AnsweredPrompts(model, ids, answers, layer=middle)
        context = lambda: intervened(model, edit)  # noqa: E731
        return torch.tensor([*scores.edited(context, spared), *answered.drift(context, spared).kls])

    one, two = both(monkeypatch, measured)
    assert torch.allclose(one, two, atol=1e-4)
    assert one[6:].min() > 1e-4


def test_what_write_matrices_take_in_does_not_change(base, monkeypatch):
    """Behind edits of earlier layers too; tokens that do not count are computed once."""
    model, ids = load(base), rows(6)
    sets = {"all": write_reading.TokenSet(ids, [len(row) - 2 for row in ids])}
    stream = Stream.of(model)
    matrices = [m for layer in (1, 2) for site in (Site("attn", layer), Site("mlp", layer))
                for m in write_modules(stream, site)]  # fmt: skip

    def read() -> dict:
        found: dict = {}
        reader = write_reading.WriteReader(model, sets)
        reader.advance(1)
        for layer in (1, 2):
            mine = [m for m in matrices if m.site.layer == layer]
            reader.read(mine, lambda _n, m, _e, x, y: found.update({m: torch.cat([x, y], -1)}))
        return found

    one, two = both(monkeypatch, read)
    assert one.keys() == two.keys() == set(matrices)
    assert all(torch.allclose(one[m], two[m], atol=1e-4) for m in one)


def test_activations_of_scored_prompts_are_not_read_again(base, monkeypatch):
    """One pass gives the first tokens and all activations; prompts that were not scored are read."""
    model, ids, others = load(base), rows(6), rows(2, seed=3)
    kept = KeptActivations(3)
    done: list[int] = []
    found = kept.outputs(model, ids, (1, LAYERS), done.append)
    assert sum(done) == len(ids)
    plain = read_outputs(model, ids, (1, LAYERS))
    assert torch.allclose(found.probabilities, plain.probabilities, atol=1e-6)
    asked: list[int] = []
    monkeypatch.setattr(
        "orthogonalize.selection.readers.kept_activations.capture",
        lambda m, left, p: (asked.append(len(left)), capture(m, left, p))[1],
    )
    wanted = [*others, *ids]
    result = torch.empty(len(wanted), 3, LAYERS + 1, found.streams[1].shape[-1], dtype=model.dtype)
    for group, part in kept.capture(model, wanted, 3):
        result[group] = part
    assert asked == [len(others)]
    assert torch.allclose(result, all_activations(model, wanted, 3).to(result), atol=1e-5)
    kept.forget()
    assert sum(len(group) for group, _ in kept.capture(model, ids, 3)) == len(ids)
    assert asked == [len(others), len(ids)]
