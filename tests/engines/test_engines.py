"""How engines start, fail and are spread over processes; vLLM's own class is replaced, so that none starts."""

from __future__ import annotations

import json
import os
import sys
import threading
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers.chat import tiny_tokenizer
from helpers.llama import store, tiny_llama

from orthogonalize.checkpoints.checkpoint import Checkpoint, open_checkpoint
from orthogonalize.cli import main
from orthogonalize.core.errors import InPlaceError, OrthogonalizeError
from orthogonalize.engines import weight_swap
from orthogonalize.engines.base import EngineOptions
from orthogonalize.engines.data_parallel import EngineGroup, _devices, _serve
from orthogonalize.engines.registry import check_engine, open_engine
from orthogonalize.engines.transformers import TransformersEngine, single_tokens
from orthogonalize.engines.vllm import VllmEngine, dtype_for, patch_llvmlite_introspection, set_environment
from orthogonalize.engines.weight_swap import WeightSwap, block_of


class Dead:
    """An engine that dies at its second batch."""

    def __init__(self, **options) -> None:
        self.options, self.calls = options, 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def generate(self, rows, parameters, use_tqdm):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("EngineCore died\nCUDA out of memory")
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 2], finish_reason="stop")]) for _ in rows]


@pytest.fixture
def folder(tmp_path) -> Path:
    return store(tiny_llama(), tmp_path / "model", torch.float32)


def test_vllm_options_are_passed_through(folder, monkeypatch):
    monkeypatch.setattr("vllm.LLM", Dead)
    options = EngineOptions(tensor_parallel_size=4, pipeline_parallel_size=2, distributed_executor_backend="ray")
    with open_engine("vllm", folder, None, 77, options) as engine:
        given = engine.llm.options
    assert (given["tensor_parallel_size"], given["pipeline_parallel_size"]) == (4, 2)
    assert given["distributed_executor_backend"] == "ray"
    assert given["max_model_len"] == 77
    assert given["dtype"] == "float32"


def test_engine_that_dies_is_reported_with_advice(folder, monkeypatch):
    monkeypatch.setattr("vllm.LLM", Dead)
    with VllmEngine(folder, 64) as engine:
        assert engine.answers([[3, 4]], 5) == [[5]]
        with pytest.raises(OrthogonalizeError, match=r"failed while answering: .*CUDA out of memory; .*memory"):
            engine.answers([[3, 4]], 5)


def test_too_little_memory_at_startup_names_the_setting(folder, monkeypatch):
    def full(**_options):
        raise ValueError("Not enough memory for the KV cache.\nAvailable memory 0.5 GiB")

    monkeypatch.setattr("vllm.LLM", full)
    setting = "--tensor-parallel-size" if torch.cuda.is_available() else "VLLM_CPU_KVCACHE_SPACE"
    with pytest.raises(OrthogonalizeError, match=f"Available memory 0.5 GiB; .*{setting}.*--engine hf"):
        VllmEngine(folder, 64).__enter__()


class Replica:
    """Stands in for the engine of a replica."""

    fail = False

    def __init__(self, folder, max_model_len, options) -> None:
        pass

    def __enter__(self):
        if Replica.fail:
            raise OrthogonalizeError("vLLM did not start")
        return self

    def __exit__(self, *exc) -> None:
        pass

    def answers(self, prompts, new_tokens):
        return [[p[0], new_tokens] for p in prompts]

    def choices(self, contexts, choices):
        return [[float(c[0]), float(len(x))] for c, x in zip(contexts, choices, strict=True)]

    def fingerprint(self, part):
        return f"same {part}"

    def load_from(self, folder):
        assert (folder / "00000.safetensors").is_file()


def group_of(count: int, monkeypatch) -> EngineGroup:
    """A group whose replicas are threads with a replaced engine."""
    monkeypatch.setattr("orthogonalize.engines.vllm.VllmEngine", Replica)
    group = EngineGroup(Path("nowhere"), 64, EngineOptions(data_parallel_size=count))
    for _ in range(count):
        here, there = Pipe()
        threading.Thread(target=_serve, args=(there, Path("x"), 64, EngineOptions(), ""), daemon=True).start()
        group.connections.append(here)
    group._replies()
    return group


@pytest.mark.parametrize("count", [1, 3])
def test_prompts_are_distributed_and_results_kept_in_order(count, monkeypatch):
    group = group_of(count, monkeypatch)
    prompts = [[i] for i in range(10)]
    assert group.answers(prompts, 7) == [[i, 7] for i in range(10)]
    assert group.choices(prompts, [[[1]] * (i + 1) for i in range(10)]) == [[float(i), i + 1.0] for i in range(10)]
    assert group.fingerprint() == " ".join(["same all"] * count)
    assert group.fingerprint(3) == " ".join(["same 3"] * count)
    group.load({"a": lambda: torch.ones(2)})
    for connection in group.connections:
        connection.send(None)


def test_replica_that_cannot_start_or_died_is_an_error(monkeypatch):
    monkeypatch.setattr(Replica, "fail", True)
    with pytest.raises(OrthogonalizeError, match="did not start"):
        group_of(2, monkeypatch)
    monkeypatch.setattr(Replica, "fail", False)
    group = group_of(2, monkeypatch)
    here, there = Pipe()
    there.close()
    group.connections[1] = here
    group.connections[0].send(("fingerprint", ("all",)))
    with pytest.raises(OrthogonalizeError, match="engine 1 of 2 died"):
        group._replies()
    for ask in (
        lambda: group.answers([[1], [2]], 3),
        group.fingerprint,
        lambda: group.load({"a": lambda: torch.ones(2)}),
    ):
        with pytest.raises(OrthogonalizeError, match="engine 1 of 2 died"):  # noticed at the next request
            ask()


def test_options_that_an_engine_would_ignore_are_refused():
    check_engine("hf", EngineOptions(device="cuda:1"))
    check_engine("vllm", EngineOptions(tensor_parallel_size=2, distributed_executor_backend="ray"))
    with pytest.raises(OrthogonalizeError, match="CUDA_VISIBLE_DEVICES"):
        check_engine("vllm", EngineOptions(device="cuda:1"))
    of_vllm = {"tensor_parallel_size": 2, "data_parallel_size": 2, "distributed_executor_backend": "mp"}
    for name, value in (of_vllm | {"gpu_memory_utilization": 0.5}).items():
        with pytest.raises(OrthogonalizeError, match=f"--engine hf does not take --{name.replace('_', '-')}:"):
            check_engine("hf", EngineOptions(**{name: value}))


def test_every_replica_gets_its_own_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert [_devices(i, 2) for i in range(2)] == ["2,3", "5,7"]
    with pytest.raises(OrthogonalizeError, match="lower --data-parallel-size"):
        _devices(2, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _devices(0, 1) == ""


def test_transformers_engine_ignores_generation_config(tmp_path):
    """Many models come with a repetition penalty, which vLLM is not asked to apply either."""
    answers = []
    for name, settings in (("plain", {}), ("own", {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1})):
        folder = store(tiny_llama(), tmp_path / name, torch.float32)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | settings))
        tiny_tokenizer().save_pretrained(folder)
        with TransformersEngine(folder, tiny_tokenizer(), "cpu") as engine:
            answers.append(engine.answers([[1, 9, 11, 20]], 24))
            assert engine.model.generation_config.repetition_penalty == settings.get("repetition_penalty")
    assert answers[0] == answers[1]
    assert len(set(answers[0][0])) < len(answers[0][0])  # tokens repeat, so a penalty would have shown


def test_parallel_sizes_below_one_are_refused():
    with pytest.raises(OrthogonalizeError, match="--data-parallel-size must be at least 1"):
        EngineOptions(data_parallel_size=0)


def test_blocks_are_the_modules_that_engines_fuse():
    assert block_of("model.layers.3.self_attn.q_proj.weight") == "model.layers.3.self_attn"
    assert block_of("model.layers.3.mlp.experts.7.down_proj.weight") == "model.layers.3.mlp"
    assert block_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert block_of("lm_head.weight") == "lm_head"


class Holder:
    """An engine that remembers what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, torch.Tensor] = {}

    def load(self, weights):
        self.given = {name: make() for name, make in weights.items()}


class Picky(TransformersEngine):
    """An engine that keeps some tensors as they are, spoils them, or refuses them."""

    def __init__(self, folder, fault: str, kind: str) -> None:
        super().__init__(folder, None, "cpu")
        self.fault, self.kind = fault, kind

    def load(self, weights):
        own = {name: make for name, make in weights.items() if self.kind in name}
        if own and self.fault == "refuses":
            raise InPlaceError("these it has under another name")
        if self.fault == "keeps":
            weights = {name: make for name, make in weights.items() if name not in own}
        if self.fault == "spoils":
            weights = weights | {name: (lambda make=make: make() + 1e-3) for name, make in own.items()}
        super().load(weights)


@pytest.mark.parametrize("fault", ["keeps", "refuses", "spoils", "none"])
@pytest.mark.parametrize("kind", ["down_proj", "embed_tokens", "input_layernorm"])
def test_tensor_that_cannot_be_swapped_is_found(fault, kind, folder):
    source = open_checkpoint(folder)
    with Picky(folder, fault, kind) as engine:
        before = engine.fingerprint()
        found = WeightSwap(engine, source).first_unswappable(source.tensors)
        if fault == "none":
            assert found is None
            assert engine.fingerprint() == before
        else:
            assert found is not None
            assert kind in found or fault != "keeps"
        others = [name for name in source.tensors if kind not in name and not name.startswith("model.layers")]
        assert fault == "spoils" or WeightSwap(engine, source).first_unswappable(others) is None


def test_full_disk_is_not_mistaken_for_an_unswappable_engine(folder):
    class Full(TransformersEngine):
        def load(self, weights):
            raise OrthogonalizeError("set TMPDIR to a folder with room")

    source = open_checkpoint(folder)
    with Full(folder, None, "cpu") as engine, pytest.raises(OrthogonalizeError, match="TMPDIR"):
        WeightSwap(engine, source).first_unswappable(source.tensors)


def test_swap_loads_whole_blocks_and_undoes_the_last_one(folder):
    source = open_checkpoint(folder)
    swap = WeightSwap(Holder(), source)
    name = "model.layers.1.self_attn.q_proj.weight"
    swap.apply({name: lambda: source.read(name) * 2})
    assert set(swap.engine.given) == {n for n in source.tensors if n.startswith("model.layers.1.self_attn.")}
    assert torch.equal(swap.engine.given[name], source.read(name) * 2)
    other = "model.layers.2.mlp.down_proj.weight"
    swap.apply({other: lambda: source.read(other) * 3})
    assert torch.equal(swap.engine.given[name], source.read(name))
    assert torch.equal(swap.engine.given[other], source.read(other) * 3)
    assert {n.split(".")[3] for n in swap.engine.given} == {"self_attn", "mlp"}
    swap.restore()
    assert all(torch.equal(t, source.read(n)) for n, t in swap.engine.given.items())
    assert {n.split(".")[2] for n in swap.engine.given} == {"2"}
    with pytest.raises(ValueError, match="no tensor"):
        swap.apply({"lm_head.bias": lambda: torch.zeros(1)})


class Fusing(TransformersEngine):
    """An engine that holds some tensors of a block as one: whatever of it is not given is lost."""

    FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

    def __init__(self, folder) -> None:
        super().__init__(folder, None, "cpu")
        self.given: list[set[str]] = []

    def load(self, weights):
        lost = {}
        for name in weights:
            for group in self.FUSED:
                own = next((part for part in group if part in name), None)
                others = [name.replace(own, part) for part in group] if own else []
                lost |= {other: (lambda: torch.tensor(0.5)) for other in others if other not in weights}
        self.given.append(set(weights))
        super().load({**lost, **weights})


def test_what_an_engine_does_not_fuse_is_swapped_without_its_block(folder):
    source = open_checkpoint(folder)
    attention = [n for n in source.tensors if n.startswith("model.layers.1.self_attn.")]
    output, query = (f"model.layers.1.self_attn.{name}.weight" for name in ("o_proj", "q_proj"))
    with Fusing(folder) as engine:
        before, swap = engine.fingerprint(), WeightSwap(engine, source)
        assert swap.first_unswappable(source.tensors) is None
        assert engine.fingerprint() == before
        engine.given.clear()
        swap.apply({output: lambda: 2 * source.read(output)})
        swap.apply({query: lambda: 2 * source.read(query)})
        swap.apply({output: lambda: 2 * source.read(output)})
        swap.restore()
        assert engine.fingerprint() == before
        assert engine.given == [{output}, set(attention), set(attention), {output}]


def test_a_swap_loads_a_few_blocks_at_a_time(folder, monkeypatch):
    source = open_checkpoint(folder)
    names = [n for n in source.tensors if ".mlp." in n]
    size = sum(source.tensors[n].size for n in names if n.startswith("model.layers.0."))
    monkeypatch.setattr(weight_swap, "PORTION", 2 * size)
    with Fusing(folder) as engine:
        before, swap = engine.fingerprint(), WeightSwap(engine, source)
        swap.apply({n: partial(lambda n: 2 * source.read(n), n) for n in names if "down_proj" in n})
        assert [len(given) for given in engine.given] == [6, 6]
        held = dict(engine.model.named_parameters())
        assert all(torch.equal(held[n], (2 if "down_proj" in n else 1) * source.read(n)) for n in names)
        swap.restore()
        assert engine.fingerprint() == before


def test_single_token_choices_are_recognised():
    assert single_tokens([[1], [2]])
    assert not single_tokens([[1], [1]])
    assert not single_tokens([[1], [2, 3]])


@pytest.mark.parametrize("command", ["sweep", "judge", "eval"])
def test_measuring_commands_document_the_engine_options(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert "--data-parallel-size" in result.output


def test_vllm_introspection_does_not_stumble_over_llvmlite():
    """Its library object answered `__dict__` with a function; what numba compiles must keep working."""
    import llvmlite.binding  # noqa: F401
    import numba

    patch_llvmlite_introspection()
    patch_llvmlite_introspection()
    assert not hasattr(sys.modules["llvmlite.binding.ffi"].lib, "__dict__")
    assert numba.njit(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_without_bfloat16_runs_in_float32(fast, expected, monkeypatch):
    """On a GPU, and where the checkpoint is quantized or not in bfloat16, the stored dtype is kept."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast)

    def chosen(on_cpu: bool, **config: object) -> str:
        return dtype_for(Checkpoint(Path(), config, {}, indexed=False), on_cpu)

    assert chosen(on_cpu=True, dtype="bfloat16") == expected
    assert chosen(on_cpu=True, text_config={"dtype": "bfloat16"}) == expected
    assert chosen(on_cpu=False, dtype="bfloat16") == "bfloat16"
    assert chosen(on_cpu=True, dtype="bfloat16", quantization_config={"quant_method": "fp8"}) == "bfloat16"
    assert chosen(on_cpu=True, torch_dtype="float32") == "float32"
    assert chosen(on_cpu=True) == "auto"


def test_sockets_of_vllm_are_in_a_folder_of_ones_own(monkeypatch):
    """TMPDIR may be everybody's."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    set_environment(on_cpu=False)
    folder = Path(environment["VLLM_RPC_BASE_PATH"])
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    set_environment(on_cpu=False)
    assert environment["VLLM_RPC_BASE_PATH"] == str(folder), "one folder for all engines of a process"
