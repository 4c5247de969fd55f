"""Models that are streamed block by block: equal to the resident ones, however they are batched and interrupted."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import every_family, store_tiny

from orthogonalize.architectures.schema import architecture_of, remember
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interventions import Intervention, Site, removal
from orthogonalize.directions.activation_store import record_streamed
from orthogonalize.models.activations import all_activations
from orthogonalize.models.hooks import intervened
from orthogonalize.models.loading import load_model
from orthogonalize.models.streaming import state
from orthogonalize.models.streaming.lanes import StreamedModel
from orthogonalize.models.streaming.passes import Pass, edited_variant
from orthogonalize.models.streaming.state import StreamState
from orthogonalize.models.streaming.weights import PartialModel, can_stream
from orthogonalize.selection.scoring import first_token_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")
POSITIONS = 3
IDS = [
    torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (17, 5, 9, 16, 23, 4, 11)
]


def streamed_model(folder) -> StreamedModel:
    return StreamedModel(PartialModel(open_checkpoint(folder), "cpu", torch.float32))


def test_what_the_package_does_not_describe_is_not_streamed(tmp_path):
    """No experiment shows that its blocks need nothing from each other but the stream."""
    source = open_checkpoint(store_tiny("llama", tmp_path / "base"))
    assert can_stream(source)
    remember(source.config, architecture_of(source.config))
    try:
        assert not can_stream(source)
        with pytest.raises(OrthogonalizeError, match=r"cannot be streamed: the package does not .* use --engine hf"):
            PartialModel(source, "cpu", torch.float32)
    finally:
        remember(source.config, None)


class Activations:
    """Collects what a pass reads: activations [prompts, positions, layers + 1, d]."""

    def __init__(self, streamed: StreamedModel, count: int = len(IDS)) -> None:
        self.found = torch.full((count, POSITIONS, streamed.layer_count + 1, streamed.width), torch.nan)

    def take(self, layer, lanes):
        for lane in lanes["prompts"]:
            self.found[lane.rows, :, layer] = lane.last(POSITIONS)


def read(streamed: StreamedModel, tokens: int = 4096) -> tuple[torch.Tensor, Pass]:
    activations = Activations(streamed)
    one_pass = Pass(streamed, {"prompts": IDS}, take=activations.take, tokens=tokens)
    one_pass.run("reading")
    return activations.found, one_pass


def first_tokens(one_pass: Pass) -> torch.Tensor:
    found = {}
    for _, lane, logits in one_pass.logits(lambda _set, lane: lane.last(1)[:, 0]):
        found |= dict(zip(lane.rows, logits.softmax(-1), strict=True))
    return torch.stack([found[row] for row in sorted(found)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


STREAM_REFUSED = {
    "gemma4": "share shared_kv_states",
    "gemma4 experts": "share shared_kv_states",
    "gemma3n": "share shared_kv_states",
    "mllama multimodal": "does not run its blocks in order",
}


@pytest.mark.parametrize("name", every_family(but=STREAM_REFUSED))
def test_every_family_streams_as_it_runs_whole(name, tmp_path):
    folder = store_tiny(name, tmp_path / "model", torch.float32)
    whole, streamed = load_model(folder, "cpu", torch.float32), streamed_model(folder)
    expected, probabilities = all_activations(whole, IDS, POSITIONS), first_token_probabilities(whole, IDS)
    found, one_pass = read(streamed)
    assert relative(found, expected) < 1e-6
    assert (first_tokens(one_pass) - probabilities).abs().max() < 1e-6
    one_by_one, _ = read(streamed, tokens=1)
    alone = torch.cat([all_activations(whole, [row], POSITIONS) for row in IDS])  # batches differ in their rounding
    assert relative(one_by_one, alone) < 1e-6
    assert relative(one_by_one, expected) < 1e-5


@pytest.mark.parametrize("name", STREAM_REFUSED)
def test_family_whose_blocks_do_not_pass_one_stream_to_the_next_is_refused(name, tmp_path):
    with pytest.raises(OrthogonalizeError, match=STREAM_REFUSED[name]):
        read(streamed_model(store_tiny(name, tmp_path / "model", torch.float32)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "opt", "falcon_h1"])
def test_variants_are_the_model_with_its_edit(name, tmp_path):
    folder = store_tiny(name, tmp_path / "model", torch.float32)
    whole, streamed = load_model(folder, "cpu", torch.float32), streamed_model(folder)
    directions, _ = torch.linalg.qr(torch.randn(streamed.width, 2, generator=torch.Generator().manual_seed(1)))
    remove = removal(directions.mT)
    edits = {
        "writes": Intervention({Site("embed"): remove, Site("mlp", 2): remove, Site("attn", 3): remove}),
        "late": Intervention({Site("mlp", 3): remove}),
        "reads": Intervention({}, {Site("attn", 1): remove, Site("head"): remove}),
        "head": Intervention({}, {Site("head"): remove}),
    }
    one_pass = Pass(
        streamed,
        {"prompts": IDS},
        [edited_variant(edit, "prompts", each, 4) for edit, each in edits.items()],
    )
    one_pass.run("edits")
    found = {edit: torch.empty(len(IDS), 96) for edit in ["prompts", *edits]}
    for edit, lane, logits in one_pass.logits(lambda _set, lane: lane.last(1)[:, 0]):
        found[edit][lane.rows] = logits.softmax(-1)
    base = first_token_probabilities(whole, IDS)
    assert (found["prompts"] - base).abs().max() < 1e-6
    for edit, each in edits.items():
        with intervened(whole, each, renormalise=False):
            expected = first_token_probabilities(whole, IDS)
        assert (expected - base).abs().max() > 1e-3
        assert (found[edit] - expected).abs().max() < 2e-6


def live_parameters(streamed: StreamedModel) -> int:
    return sum(p.numel() for p in streamed.model.parameters() if not p.is_meta)


@pytest.mark.parametrize("layers", [4, 12])
def test_at_most_two_blocks_are_held_whatever_their_number(layers, tmp_path):
    folder = store_tiny("llama", tmp_path / "model", torch.float32, num_hidden_layers=layers)
    streamed = streamed_model(folder)
    block = sum(p.numel() for p in streamed.stream.block(0).parameters())
    embedding = streamed.model.get_input_embeddings().weight.numel()
    always = live_parameters(streamed)
    held = []
    one_pass = Pass(streamed, {"prompts": IDS}, take=lambda _layer, _lanes: held.append(live_parameters(streamed)))
    one_pass.run("reading")
    assert max(held) <= always + 2 * block
    for _ in one_pass.logits(lambda _set, lane: lane.last(1)[:, 0]):
        assert live_parameters(streamed) == always + embedding  # the head, which is tied
    assert live_parameters(streamed) == always
    assert always < min(block, embedding)


def test_a_stopped_pass_resumes_at_its_block_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WRITTEN", 1e6)  # tiny blocks are small beside the streams
    folder = store_tiny("gemma3", tmp_path / "model", torch.float32)
    streamed = streamed_model(folder)
    edit = Intervention({Site("mlp", 0): removal(torch.eye(streamed.width)[:1])})

    def one_pass(take) -> Pass:
        variant = edited_variant("edit", "prompts", edit, 4)
        return Pass(streamed, {"prompts": IDS}, [variant], StreamState(tmp_path / "state", "same"), take)

    whole = Activations(streamed)
    uninterrupted = Pass(streamed, {"prompts": IDS}, [edited_variant("edit", "prompts", edit, 4)], take=whole.take)
    uninterrupted.run("reading")

    parts, seen = Activations(streamed), []

    def stop(layer, lanes):
        parts.take(layer, lanes)
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_pass(stop).run("reading")
    assert live_parameters(streamed) < sum(p.numel() for p in streamed.stream.block(0).parameters())

    def resume(layer, lanes):
        seen.append(layer)
        parts.take(layer, lanes)

    resumed = one_pass(resume)
    resumed.run("reading")
    assert seen == [2, 3, 4]
    assert torch.equal(parts.found, whole.found)
    for name in ("prompts", "edit"):
        lanes = [each.lanes.get(name) or each.forks[name] for each in (resumed, uninterrupted)]
        assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(*lanes, strict=True))


def test_a_state_of_other_inputs_is_not_resumed(tmp_path):
    stored = StreamState(tmp_path / "state", "these")
    stored.passed(3, 10**6, {"a": torch.ones(4)})
    assert StreamState(tmp_path / "state", "these").layer == 3
    assert StreamState(tmp_path / "state", "others").layer == 0
    assert not (tmp_path / "state").exists()


def test_streams_are_written_rarely_where_they_are_large_beside_the_blocks(tmp_path):
    stored = StreamState(tmp_path / "state", "these")
    written = []
    for layer in range(1, 9):
        stored.passed(layer, 40, {"a": torch.ones(10)})  # 40 bytes of weights, 40 of stream: every fourth block
        written.append(stored.layer)
    assert written == [0, 0, 0, 4, 4, 4, 4, 8]


def test_a_block_that_puts_out_nan_is_named(tmp_path):
    folder = store_tiny("llama", tmp_path / "model", torch.float32)
    damage(folder, "model.layers.2.mlp.down_proj.weight", torch.nan)
    with pytest.raises(OrthogonalizeError, match=r"block 2 puts out"):
        record_streamed(streamed_model(folder), {"prompts": IDS}, 2, tmp_path / "activations.safetensors", "inputs")


def damage(folder, name: str, value: float) -> None:
    """Set a number of tensor `name` in its file."""
    file = open_checkpoint(folder).file_of(name)
    with file.path.open("r+b") as out:
        out.seek(file.data_start + file.tensors[name].start)
        out.write(torch.tensor([value]).numpy().tobytes())


def test_a_file_that_is_cut_while_blocks_are_read_is_named(tmp_path):
    folder = store_tiny("llama", tmp_path / "model", torch.float32)
    streamed = streamed_model(folder)
    last = open_checkpoint(folder).file_of("model.layers.3.mlp.down_proj.weight")

    def cut(layer, lanes):
        if layer == 0:
            with last.path.open("r+b") as file:
                file.truncate(last.data_start + 10)

    with pytest.raises(OrthogonalizeError, match=r"truncated: model\.layers\.[0-9]+\..*fetch the file again"):
        Pass(streamed, {"prompts": IDS}, take=cut).run("reading")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = store_tiny("llama", tmp_path / "model", torch.float32)
    tensors = {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OrthogonalizeError, match=r"lacks model\.layers\.1\.self_attn\.o_proj\.weight"):
        streamed_model(folder)


def test_blocks_that_share_state_are_refused_by_name(tmp_path, monkeypatch):
    streamed = streamed_model(store_tiny("llama", tmp_path / "model", torch.float32))
    forward = type(streamed.stream.block(0)).forward
    decoder = streamed.stream.decoder
    whole = decoder.forward
    monkeypatch.setattr(type(streamed.stream.block(0)), "forward", lambda *a, shared=None, **k: forward(*a, **k))
    monkeypatch.setattr(decoder, "forward", lambda **kwargs: whole(shared={}, **kwargs))
    with pytest.raises(OrthogonalizeError, match=r"the blocks of LlamaForCausalLM share shared; use --engine hf"):
        streamed.enter([IDS])
