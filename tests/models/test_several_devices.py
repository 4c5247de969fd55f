"""Blocks that are streamed to several devices, with prompts split over them: the streams are those of one device."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from helpers.devices import spread
from helpers.tiny_models import store_tiny

from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.core.interrupts import handle_signals
from orthogonalize.core.interventions import Intervention, Site, removal
from orthogonalize.models import loading
from orthogonalize.models.loading import choose_devices
from orthogonalize.models.streaming import state
from orthogonalize.models.streaming.lanes import StreamedModel
from orthogonalize.models.streaming.passes import Pass, Variant, edited_variant
from orthogonalize.models.streaming.state import StreamState
from orthogonalize.models.streaming.weights import PartialModel

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = [
    torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (17, 5, 9, 16, 23, 4, 11)
]
SETS = {"prompts": IDS, "others": [row[::-1] for row in IDS[:3]]}


def streamed_model(folder) -> StreamedModel:
    return StreamedModel(PartialModel(open_checkpoint(folder), "cpu", torch.float32))


@pytest.fixture
def spread_llama(tmp_path, monkeypatch) -> StreamedModel:
    spread(monkeypatch)
    return streamed_model(store_tiny("llama", tmp_path / "model", torch.float32))


def variants(width: int) -> list[Variant]:
    remove = removal(torch.linalg.qr(torch.randn(width, 2, generator=torch.Generator().manual_seed(1)))[0].mT)
    edits = {
        "writes": Intervention({Site("embed"): remove, Site("mlp", 2): remove, Site("attn", 3): remove}),
        "head": Intervention({}, {Site("head"): remove}),
    }
    return [edited_variant(name, "prompts", edit, 4) for name, edit in edits.items()]


def one_pass(streamed: StreamedModel, **settings) -> Pass:
    return Pass(streamed, SETS, variants(streamed.width), tokens=24, **settings)


def streams(passed: Pass) -> list[torch.Tensor]:
    return [each.hidden for each in passed._named().values()]


def first_tokens(passed: Pass) -> list[torch.Tensor]:
    return [logits for _, _, logits in passed.logits(lambda _set, lane: lane.last(1)[:, 0])]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama", 3),
        ("falcon_h1", 2),
        *(pytest.param(name, 2, marks=pytest.mark.prove) for name in ("gpt2", "qwen3_moe")),
    ],
)
def test_streams_and_logits_are_those_of_one_device_bit_for_bit(name, count, tmp_path, monkeypatch):
    folder = store_tiny(name, tmp_path / "model", torch.float32)
    alone = one_pass(streamed_model(folder))
    alone.run("one device")
    spread(monkeypatch, count)
    found = one_pass(streamed_model(folder))
    found.run("several devices")
    assert len({id(lane.replica) for lane in found.lanes["prompts"]}) == count
    assert all(torch.equal(a, b) for a, b in zip(streams(found), streams(alone), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first_tokens(found), first_tokens(alone), strict=True))


def test_every_device_takes_its_own_share_through_its_own_replica(spread_llama):
    seen: list[tuple[int, int, int]] = []  # thread, device, tokens
    for number, replica in enumerate(spread_llama.replicas):
        for layer in range(4):
            replica.stream.block(layer).register_forward_hook(
                lambda _m, _args, out, number=number: seen.append((threading.get_ident(), number, out[..., 0].numel()))
            )
    passed = Pass(spread_llama, SETS, tokens=24)
    passed.run("reading")
    lanes = [lane for each in passed.lanes.values() for lane in each]
    shares = [0, 0]
    for number, replica in enumerate(spread_llama.replicas):
        shares[number] = sum(lane.hidden[..., 0].numel() for lane in lanes if lane.replica is replica)
        outside = [n for thread, device, n in seen if device == number and thread != threading.get_ident()]
        assert sum(outside) == 4 * shares[number]
    assert max(shares) - min(shares) <= 24


def test_replicas_hold_the_block_that_is_used_and_release_it(spread_llama):
    block = [p.numel() for p in spread_llama.stream.block(0).parameters()]
    held = []

    def live(replica) -> int:
        return sum(p.numel() for p in replica.model.parameters() if not p.is_meta)

    always = live(spread_llama.parts)
    Pass(spread_llama, SETS, take=lambda *_: held.append([live(r) for r in spread_llama.replicas])).run("reading")
    assert max(held[1]) <= always + 2 * sum(block)
    assert min(map(min, held[:-1])) >= always + sum(block)
    assert [live(each) for each in spread_llama.replicas] == [always, always]


def test_a_stopped_pass_resumes_on_any_number_of_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "WRITTEN", 1e6)  # tiny blocks are small beside the streams
    folder = store_tiny("gemma3", tmp_path / "model", torch.float32)
    whole = one_pass(streamed_model(folder))
    whole.run("one device")

    def stop(layer, _lanes):
        if layer == 2:
            raise KeyboardInterrupt

    for first, second in ((2, 2), (2, 1), (1, 3)):
        stored = StreamState(tmp_path / "state", "same")
        spread(monkeypatch, first)
        with pytest.raises(KeyboardInterrupt):
            one_pass(streamed_model(folder), state=stored, take=stop).run("reading")
        spread(monkeypatch, second)
        resumed = one_pass(streamed_model(folder), state=StreamState(tmp_path / "state", "same"))
        assert resumed.state.layer == 2
        resumed.run("reading")
        resumed.state.close()
        assert all(torch.equal(a, b) for a, b in zip(streams(resumed), streams(whole), strict=True))


@pytest.mark.parametrize("device", [0, 1])
def test_a_fault_on_one_device_is_named_and_stops_the_others(spread_llama, monkeypatch, device):
    calls, forward = [], type(spread_llama.stream.block(0)).forward
    faulty = spread_llama.replicas[device].stream.block(1)

    def fail(block, *args, **kwargs):
        if block is faulty:
            raise OrthogonalizeError("this device is full")
        calls.append(block)
        time.sleep(0.05)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(type(faulty), "forward", fail)
    passed = Pass(spread_llama, SETS, tokens=8)
    with pytest.raises(OrthogonalizeError, match="this device is full"):
        passed.run("reading")
    lanes = [lane for each in passed.lanes.values() for lane in each]
    other = spread_llama.replicas[1 - device]
    done = sum(block is other.stream.block(1) for block in calls)
    assert done < sum(lane.replica is other for lane in lanes)
    monkeypatch.undo()
    Pass(spread_llama, SETS, tokens=8).run("once more")


def test_ctrl_c_stops_every_device_before_its_next_lane(spread_llama, monkeypatch):
    calls, forward = [], type(spread_llama.stream.block(0)).forward
    started = threading.Event()

    def slow(block, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            calls.append(block)
            if not started.is_set():
                started.set()
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(type(spread_llama.stream.block(0)), "forward", slow)
    with handle_signals(), pytest.raises(KeyboardInterrupt):
        Pass(spread_llama, SETS, tokens=8).run("reading")
    assert len(calls) <= 4


def test_auto_and_all_are_every_gpu_and_a_name_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_devices("auto") == choose_devices("all") == gpus
    monkeypatch.setattr(loading, "choose_device", torch.device)
    assert choose_devices("cuda:1") == gpus[1:]
    assert choose_devices("cpu") == [torch.device("cpu")]
