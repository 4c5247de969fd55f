"""What goes into blocks that share keys and values, pass on several streams, or run only beside an image."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import store_tiny

from orthogonalize.core.interventions import Intervention, Site, WriteMatrix, removal, shift
from orthogonalize.models.activations import all_activations
from orthogonalize.models.forward.block_inputs import Entry, capturing_entries
from orthogonalize.models.forward.partial import bare, noting_tuples, starting_at
from orthogonalize.models.gradients import traced
from orthogonalize.models.hooks import input_shifted, intervened, layer_projected
from orthogonalize.models.loading import load_model
from orthogonalize.models.stream import Stream
from orthogonalize.models.write_reading import TokenSet, WriteReader
from orthogonalize.selection.scoring import LocalScorer

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["gemma4", "gemma3n", "mllama multimodal"]
LEFT_OUT = 1  # the block of the tiny Mllama that runs only beside an image
IDS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16]]
PADDED = torch.tensor([[*IDS[0], 0], IDS[1]])


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    folder = store_tiny(request.param, tmp_path_factory.mktemp("model") / "model", torch.float32)
    return load_model(folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory):
    return load_model(
        store_tiny("gemma3n", tmp_path_factory.mktemp("model") / "m", torch.float32), "cpu", torch.float32
    )


@pytest.fixture(scope="module")
def mllama(tmp_path_factory):
    folder = store_tiny("mllama multimodal", tmp_path_factory.mktemp("model") / "m", torch.float32)
    return load_model(folder, "cpu", torch.float32)


def direction(model):
    stream = Stream.of(model)
    width = stream.architecture.width(stream.config)
    row = torch.randn(width, generator=torch.Generator().manual_seed(3))
    return (row / row.norm()).double()


@torch.inference_mode()
def logits(model, ids=PADDED):
    return model(input_ids=ids, use_cache=False).logits


def entries_of(model):
    """What goes into every block, and how blocks return the stream."""
    found, how = [], [bare]
    with noting_tuples(model, how.append), capturing_entries(model, lambda _, entry: found.append(entry.copy())):
        logits(model)
    return found, how[-1]


def close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pass_that_starts_at_a_block_is_the_whole_pass(model):
    """Also with a batch repeated, and where blocks before it were edited, which only what goes in shows."""
    plain = logits(model)
    entries, returned = entries_of(model)
    edit = Intervention({Site("attn", 0): removal(direction(model)[None])})
    with intervened(model, edit):
        edited = logits(model)
        behind, _ = entries_of(model)
    assert not close(edited, plain)
    for layer in range(1, Stream.of(model).layer_count):
        with starting_at(model, layer, entries[layer], returned):
            assert close(logits(model), plain)
        with starting_at(model, layer, entries[layer].repeated(2), returned):
            assert close(logits(model, PADDED.repeat(2, 1)), plain.repeat(2, 1, 1))
        with starting_at(model, layer, behind[layer], returned):
            assert close(logits(model), edited)
    assert close(logits(model), plain)


def test_read_stream_is_what_the_blocks_are_given(model):
    """Against hooks of this test's own on the modules; a block that is left out is given what the next is."""
    given = {}
    stream = Stream.of(model)
    modules = [*(stream.block(layer) for layer in range(stream.layer_count)), stream.head_norm]
    handles = [
        module.register_forward_pre_hook(lambda _m, args, layer=layer: given.update({layer: args[0]}))
        for layer, module in enumerate(modules)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    found = all_activations(model, [IDS[1]], 6)[0]
    for layer in range(len(modules)):
        hidden = given[layer if layer in given else layer + 1]
        assert close(found[:, layer], (hidden[0] if hidden.dim() == 4 else hidden)[1])
    assert (set(range(len(modules))) - set(given)) == ({LEFT_OUT} if "Mllama" in type(model).__name__ else set())


def test_gradients_reach_what_is_read(model):
    """A small step either way along a direction changes the sum of the logits as the gradient says."""
    with traced(model) as stream:
        total = model(input_ids=PADDED, use_cache=False).logits.sum()
    found = torch.autograd.grad(total, stream.inputs, materialize_grads=True)
    for layer in (1, 2, 3):
        step = 1e-3 * found[layer].sum((0, 1)).double() / found[layer].sum((0, 1)).norm()
        moved = []
        for sign in (1, -1):
            with input_shifted(model, layer, shift(sign * step)):
                moved.append(logits(model).double().sum())
        expected = (found[layer].double() @ step).sum()
        assert abs((moved[0] - moved[1]) / 2 - expected) <= 0.02 * expected


def test_scores_of_edits_at_a_block_are_those_of_whole_passes(model):
    scorer = LocalScorer(model, IDS, layers=[3])
    ones = torch.stack([direction(model), direction(model).roll(1)])
    maps = type(removal(ones[:1]))(*(torch.stack([getattr(removal(row[None]), k) for row in ones]) for k in "uvs"))
    for layer in range(4):
        found = scorer.outputs(layer, maps, projected=True).probabilities
        for number, row in enumerate(ones):
            with layer_projected(model, layer, removal(row[None])):
                for place, ids in enumerate(IDS):
                    expected = logits(model, torch.tensor([ids]))[0, -1].softmax(-1)
                    assert (found[number, place] - expected).abs().max() < 1e-6


def test_edit_before_a_block_that_is_left_out_acts_on_the_next(mllama):
    step = shift(direction(mllama))
    results = []
    for layer in (LEFT_OUT, LEFT_OUT + 1):
        with input_shifted(mllama, layer, step):
            results += [logits(mllama), logits(mllama)]  # in every pass
    assert all(torch.equal(each, results[0]) for each in results)
    assert not close(results[0], logits(mllama))


def test_direction_is_taken_out_of_every_stream(gemma3n):
    along, taken = direction(gemma3n).float(), []

    def take(layer, entry):
        if layer == 2:
            taken.append(entry.hidden)

    with layer_projected(gemma3n, 2, removal(along[None].double())), capturing_entries(gemma3n, take):
        logits(gemma3n)
    assert taken[0].shape[0] == 4
    assert (taken[0] @ along).abs().max() < 1e-5


def test_inputs_of_writes_are_read_behind_shared_keys_and_values(model):
    """Two groups of layers, against one."""
    last = Stream.of(model).layer_count - 1
    matrices = [WriteMatrix(Site("mlp", layer), "mlp.down_proj") for layer in (2, last)]
    sets = {"all": TokenSet(IDS, [1, 1])}

    def read(groups):
        found, reader = {}, WriteReader(model, sets)
        for group in groups:
            reader.read(group, lambda _n, matrix, _e, x, _y: found.setdefault(matrix, x.clone()))
        return found

    whole, parts = read([matrices]), read([[matrix] for matrix in matrices])
    assert whole.keys() == parts.keys() == set(matrices)
    assert all(close(parts[matrix], whole[matrix]) for matrix in matrices)


def test_entry_counts_what_it_holds():
    pair = (torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    entry = Entry(torch.zeros(4, 2, 3, 8), {"full": pair})
    assert entry.numel == 4 * 2 * 3 * 8 + 2 * 24
    twice = entry.repeated(2)
    assert twice.hidden.shape == (4, 4, 3, 8)
    assert twice.shared["full"][0].shape == (4, 1, 3, 4)
