"""Streams read and edited inside vLLM equal those of transformers, however its passes divide the prompts."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from helpers.answered import answered
from helpers.chat import tiny_tokenizer
from helpers.tiny_models import store_tiny

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, block_sites, removal, shift
from orthogonalize.directions.direction_set import Directions
from orthogonalize.edits.config import EditConfig
from orthogonalize.edits.fitting import fit
from orthogonalize.edits.fitting.fit import FitTokens
from orthogonalize.engines.base import ONE_DEVICE, EngineOptions
from orthogonalize.engines.reading.stream_worker import BlockEdit, in_order
from orthogonalize.engines.reading.streams import LOGITS, READABLE, EngineStreams, Outputs, Wanted
from orthogonalize.engines.vllm import VllmEngine
from orthogonalize.models.activations import all_activations
from orthogonalize.models.hooks import input_shifted, intervened, layer_projected
from orthogonalize.models.loading import load_model
from orthogonalize.models.logprobs import completion_logprobs, exact_kl, smoothed_kl
from orthogonalize.selection.fits import TOKENS, Fits
from orthogonalize.selection.readers.served.fits import ServedFits
from orthogonalize.selection.scoring import first_token_probabilities

POSITIONS = 3
IDS = [
    torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (17, 5, 9, 16, 23, 4, 11)
]
ANSWERED = 4  # tokens at the end of each prompt that stand for an answer
# Passes of 32 tokens of at most three prompts: prompts are batched, and cut in two.
CHUNKED = {"max_num_batched_tokens": 32, "max_num_seqs": 3}
SEEN = {"mixtral": "attn", "falcon_h1": "mlp", "granitemoehybrid": "attn"}  # what vLLM shows the inputs of, if not all
# Every engine takes half a minute: one of them always, the others in `make prove`.
OTHERS = ("granitemoehybrid", "qwen3", "gemma3", "mixtral", "falcon_h1")
EVERY_KIND = ["llama", *(pytest.param(name, marks=pytest.mark.prove) for name in OTHERS)]


class Served:
    """A tiny model in a vLLM engine, and what transformers says of it."""

    def __init__(self, name, folder, options=ONE_DEVICE):
        self.name, self.folder = name, folder
        store_tiny(name, folder, torch.float32, head_dim=32)
        tiny_tokenizer().save_pretrained(folder)
        self.model = load_model(folder, "cpu", torch.float32)
        self.activations = all_activations(self.model, IDS, POSITIONS)
        self.layers = range(self.activations.shape[2])
        self.engine = VllmEngine(folder, 128, options, **READABLE, **CHUNKED)
        self.streams = EngineStreams(self.engine, len(self.layers) - 1, self.activations.shape[-1])

    def read(self, ids):
        """Activations [prompts, positions, layers + 1, d] and first-token probabilities."""
        found, probabilities = [], []
        for portion in self.streams.read(
            "reading", [Wanted(row) for row in ids], self.layers, POSITIONS, outputs=LOGITS
        ):
            found.append(torch.stack([portion.streams[layer] for layer in self.layers], 2))
            probabilities += [logits[-1].softmax(-1) for logits in portion.outputs]
        return torch.cat(found), torch.stack(probabilities)

    def outputs(self, wanted, outputs=LOGITS, edits=()):
        portions = self.streams.read("reading", wanted, outputs=outputs, edits=edits)
        return [each for portion in portions for each in portion.outputs]


def block_edits(width: int) -> list[BlockEdit]:
    basis = torch.randn(width, generator=torch.Generator().manual_seed(0))
    basis /= basis.norm()
    one, two = frozenset({1}), frozenset({2})
    return [BlockEdit(removal(basis[None]), one, one), BlockEdit(shift(3 * basis), two)]


@pytest.fixture(scope="module", params=EVERY_KIND)
def served(request, tmp_path_factory):
    found = Served(request.param, tmp_path_factory.mktemp("served") / "model")
    with found.engine:
        found.streams.check()
        yield found


def test_streams_and_first_tokens_equal_transformers(served):
    found, probabilities = served.read(IDS)
    torch.testing.assert_close(found, served.activations, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(probabilities, first_token_probabilities(served.model, IDS), atol=1e-5, rtol=0)


def test_one_prompt_at_a_time_gives_the_same(served):
    alone = torch.cat([served.read([row])[0] for row in IDS])
    torch.testing.assert_close(alone, served.read(IDS)[0], atol=1e-4, rtol=1e-5)


def test_edits_of_single_requests_equal_hooks(served):
    """Prompts with either edit and with none share the engine's passes."""
    edits = block_edits(served.activations.shape[-1])
    found = served.outputs([Wanted(row, edit=edit) for row in IDS for edit in (0, 1, -1)], edits=edits)
    probabilities = torch.stack([logits[-1].softmax(-1) for logits in found]).unflatten(0, (len(IDS), 3))
    with layer_projected(served.model, 1, edits[0].map):
        projected = first_token_probabilities(served.model, IDS)
    with input_shifted(served.model, 2, edits[1].map):
        shifted = first_token_probabilities(served.model, IDS)
    expected = torch.stack([projected, shifted, first_token_probabilities(served.model, IDS)], 1)
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    assert (projected - shifted).abs().max() > 1e-3


def test_measures_equal_those_of_whole_distributions(served):
    edit, behaviour = block_edits(served.activations.shape[-1])[:1], [5, 9]
    places = [(len(row) - ANSWERED - 1, len(row) - 1) for row in IDS if len(row) > ANSWERED]
    rows = [row for row in IDS if len(row) > ANSWERED]

    def wanted(number):
        return [Wanted(row, *place, number, n) for n, (row, place) in enumerate(zip(rows, places, strict=True))]

    base = served.outputs(wanted(-1), Outputs(behaviour, keep=True, along=True))
    first, along = (served.outputs(wanted(0), Outputs(behaviour, along=each), edit) for each in (False, True))
    edited = [torch.where(one.isnan(), other, one) for one, other in zip(first, along, strict=True)]
    prompts, answers = [row[:-ANSWERED] for row in rows], [row[-ANSWERED:] for row in rows]
    before = dict(completion_logprobs(served.model, prompts, answers))
    with layer_projected(served.model, 1, edit[0].map):
        after = dict(completion_logprobs(served.model, prompts, answers))
    for number, answer in enumerate(answers):
        p, q, target = before[number], after[number], torch.tensor(answer)[:, None]
        expected = torch.stack(
            [
                q.exp()[:, behaviour].sum(-1).double(),
                smoothed_kl(p.exp(), q.exp()),
                exact_kl(p, q),
                q.gather(-1, target)[:, 0].double(),
                p.gather(-1, target)[:, 0].double(),
            ],
            1,
        )
        torch.testing.assert_close(edited[number], expected, atol=1e-5, rtol=1e-3)
        assert base[number][:, 2].abs().max() < 1e-9
        assert [each[number].isnan().any(0).tolist()[1:3] for each in (first, along)] == [[False, True], [True, False]]


def test_an_edit_of_every_write_equals_hooks(served):
    edit = block_edits(served.activations.shape[-1])[0].map
    every = range(len(served.layers) - 1)
    found = served.outputs(
        [Wanted(row, edit=0) for row in IDS], edits=[BlockEdit(edit, frozenset({0}), frozenset(every))]
    )
    writes = {Site("embed"): edit} | dict.fromkeys(block_sites(every), edit)
    with intervened(served.model, Intervention(writes=writes)):
        expected = first_token_probabilities(served.model, IDS)
    torch.testing.assert_close(torch.stack([each[-1].softmax(-1) for each in found]), expected, atol=1e-5, rtol=0)


def test_tokens_that_are_computed_twice_count_once():
    places = torch.tensor([[1, 4], [0, 3], [0, 2], [1, 4], [0, 3]])
    assert in_order(places).tolist() == [2, 4, 3]


def test_nothing_is_left_behind_when_reading_ends(served):
    model = served.engine.llm.llm_engine.model_executor.driver_worker.worker.get_model()
    served.read(IDS[:1])
    assert "forward" not in model.__dict__
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_conditional_fits_are_those_of_the_resident_model(served, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "GROUP", 1)  # so that every layer but the first is read behind an edit
    d, layers = served.activations.shape[-1], len(served.layers)
    differences = torch.randn(1, layers, d, generator=torch.Generator().manual_seed(1))
    directions = Directions((-1,), differences - differences.mean(-1, keepdim=True))
    source = open_checkpoint(served.folder)
    ours = ServedFits(SimpleNamespace(source=source, streams=lambda _=1: served.streams), tmp_path, directions, {})
    FitTokens(3, answered(1, 14), answered(2, 20)).save(tmp_path / TOKENS)
    assert ours.components == SEEN.get(served.name, "both")
    choice = EditConfig(
        method="conditional",
        scope="from:1",
        position=-1,
        per_layer=True,
        target_weight=10.0,
        components=ours.components,
    )
    found = ours.intervention(choice).conditional
    theirs = Fits(tmp_path / "resident", directions, dict(source.config), {}, lambda: served.model)
    theirs.folder.mkdir()
    (theirs.folder / TOKENS).write_bytes((tmp_path / TOKENS).read_bytes())
    expected = theirs.intervention(choice).conditional
    assert found.keys() == expected.keys()
    for matrix, each in expected.items():
        torch.testing.assert_close(found[matrix].r, each.r)
        assert (found[matrix].c - each.c).norm() < 1e-3 * each.c.norm(), matrix


@pytest.mark.prove
def test_two_tensor_parallel_workers_read_the_same(tmp_path):
    found = Served("llama", tmp_path / "model", EngineOptions(tensor_parallel_size=2))
    with found.engine:
        found.streams.check()
        test_streams_and_first_tokens_equal_transformers(found)
        test_edits_of_single_requests_equal_hooks(found)
        test_measures_equal_those_of_whole_distributions(found)
        worker = multiprocessing.active_children()[-1]
        worker.kill()
        worker.join()
        with pytest.raises(OrthogonalizeError, match="vLLM failed while reading") as error:
            found.read(IDS)
    assert "\n" not in str(error.value)


def test_a_class_with_blocks_elsewhere_is_refused_by_name(tmp_path, monkeypatch):
    from orthogonalize.engines.reading import served_stream

    found = Served("llama", tmp_path / "model")
    with found.engine:
        monkeypatch.setattr(served_stream, "HIDDEN", ("states",))
        with pytest.raises(OrthogonalizeError, match=r"LlamaDecoderLayer takes its input under another name.*stream"):
            found.read(IDS)
