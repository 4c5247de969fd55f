"""Settings from anybody in front of vLLM: whatever key it reads, no file chooses code, another model or an address.

vLLM's configuration is built as the engine builds it, some 10 ms each, without an engine; one engine then starts on
all keys at once.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.chat import store_choosing
from helpers.watching import Watcher, watching
from transformers import CONFIG_MAPPING, LlamaConfig

from orthogonalize.checkpoints.checkpoint import BIASES, open_checkpoint
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.engines.base import ONE_DEVICE
from orthogonalize.engines.vllm import VllmEngine, engine_arguments, set_environment

vllm = pytest.importorskip("vllm")

WORD = "zz_stranger"  # in no path of a checkout
REPOSITORY, CLASS = f"{WORD}/repository", f"{WORD}.Code"
# Whatever a key may name: a repository, a class, a list of them, and the tables in which vLLM looks for such names.
VALUES: dict[str, Any] = {
    "repository": REPOSITORY,
    "class": CLASS,
    "list": [REPOSITORY, CLASS],
    "table": {
        "name_or_path": REPOSITORY,
        "verifier": {"name_or_path": REPOSITORY},
        "quant_method": CLASS,
        "model_type": WORD,
        "rope_type": WORD,
        "AutoConfig": CLASS,
        "AutoModelForCausalLM": f"{REPOSITORY}--{CLASS}",
    },
    "yes": True,
}
ROOMS = (
    *("config/*.py", "transformers_utils/*.py", "engine/arg_utils.py", "tokenizers/*.py", "renderers/*.py"),
    "plugins/**/*.py",
    *("model_executor/model_loader/*.py", "model_executor/layers/quantization/*.py"),
    *(f"model_executor/models/{name}.py" for name in ("llama", "utils", "registry", "config")),
)
# What a file must not change in vLLM's configuration.
CHOSEN = ("model", "tokenizer", "trust_remote_code", "hf_config_path", "model_impl", "tokenizer_mode", "runner_type")
OTHERS = ("speculative_config", "lora_config", "kv_transfer_config", "ec_transfer_config", "weight_transfer_config")


def sources() -> Iterator[tuple[Path, ast.Module]]:
    root = Path(vllm.__file__).parent
    for room in ROOMS:
        for path in sorted(root.glob(room)):
            yield path, ast.parse(path.read_text("utf-8"))


def key_of(node: ast.AST) -> object:
    """The name that an expression reads from something called a configuration; None if it reads nothing."""

    def is_config(owner: ast.AST) -> bool:
        return "config" in ast.unparse(owner).lower()

    match node:
        case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[owner, ast.Constant(name), *_]) if is_config(
            owner
        ):
            return name
        case ast.Call(func=ast.Attribute(owner, "get" | "pop"), args=[ast.Constant(name), *_]) if is_config(owner):
            return name
        case ast.Subscript(owner, ast.Constant(name)) if is_config(owner):
            return name
        case ast.Attribute(owner, name) if ast.unparse(owner).endswith("config"):
            return name
    return None


def read_keys() -> list[str]:
    """Every key that vLLM reads from a configuration before it builds a model, and every argument of its engine."""
    read = {key for _, tree in sources() for node in ast.walk(tree) if isinstance(key := key_of(node), str)}
    arguments = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
    llama = LlamaConfig()
    return sorted(read | arguments, key=lambda key: (hasattr(llama, key), key))  # whose values it checks, side by side


@pytest.fixture(scope="module")
def keys() -> list[str]:
    return read_keys()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama with a module of code beside it."""
    folder = store_choosing(tmp_path_factory.mktemp("base") / "model", hidden_size=128, intermediate_size=96)
    (folder / f"{WORD}.py").write_text("raise SystemExit('code of a model ran')\nclass Code: ...\n")
    built(folder)  # once a machine, vLLM looks at the class of a model in a process of its own
    return folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """vLLM reads a configuration that it refuses a second time, after two seconds."""
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda _: None)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """vLLM renames classes of configurations and puts its own into transformers' table; later tests read both."""
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    for kind in {_CONFIG_REGISTRY[name] for name in _CONFIG_REGISTRY}:
        monkeypatch.setattr(kind, "model_type", kind.model_type)


def built(folder: Path, **others: Any) -> Any:
    """vLLM's whole configuration for a folder, as the engine asks for it."""
    set_environment(on_cpu=True)
    arguments = engine_arguments(open_checkpoint(folder), ONE_DEVICE, on_cpu=True) | others
    return vllm.EngineArgs(
        model=str(folder), tokenizer=str(folder), max_model_len=64, **arguments
    ).create_engine_config()


def choices(config: Any) -> dict[str, str]:
    return {
        **{name: repr(getattr(config.model_config, name)) for name in CHOSEN},
        **{name: repr(getattr(config, name)) for name in OTHERS},
        "load_config": repr(config.load_config),
        "logits_processors": repr(config.model_config.logits_processors),
        "worker": repr(config.parallel_config.worker_extension_cls),
    }


def tried(folder: Path, plain: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Any, Watcher]:
    """vLLM's configuration for changed settings, or the error that refuses them, and what happened meanwhile."""
    (folder / "config.json").write_text(json.dumps({**plain, **changes}))
    with watching(folder, WORD) as watcher:
        try:
            return built(folder), watcher
        except OrthogonalizeError as error:
            return error, watcher
        except Exception as error:  # any of vLLM's own, which the engine reports in one line
            return error, watcher
        finally:
            (folder / "config.json").write_text(json.dumps(plain))


def swept(folder: Path, keys: Sequence[str], value: Any, found: list[str]) -> dict[str, Any]:
    """The keys that vLLM takes with a value, tried all at once, or in halves where it refuses; `found` gets the rest.

    What a key brought about, beside being refused, is added to `found`.
    """
    plain = json.loads((folder / "config.json").read_text())
    result, watcher = tried(folder, plain, dict.fromkeys(keys, value))
    found += watcher.seen
    if not isinstance(result, Exception):
        expected = choices(built(folder))
        found += [f"{keys}: {name} = {now}" for name, now in choices(result).items() if now != expected[name]]
        return dict.fromkeys(keys, value)
    if len(keys) == 1:
        return {}
    half = len(keys) // 2
    return swept(folder, keys[:half], value, found) | swept(folder, keys[half:], value, found)


def test_the_keys_that_vllm_is_known_to_follow_are_among_those_tried(keys):
    known = {"architectures", "auto_map", "io_processor_plugin", "model_type", "speculators_config", "text_config"}
    assert known <= set(keys)
    assert len(keys) > 600


def test_the_watcher_sees_a_key_that_is_followed(model, monkeypatch):
    """Without this package's check, vLLM looks for the model that `speculators_config` names."""
    monkeypatch.setattr("orthogonalize.checkpoints.settings_files.FOLLOWED", {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    plain = json.loads((model / "config.json").read_text())
    changes = {
        "speculators_config": {
            "verifier": {"name_or_path": REPOSITORY}, "proposal_methods": [{"speculative_tokens": 1}],
        },
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {},
    }  # fmt: skip
    _, watcher = tried(model, plain, changes)
    assert any(REPOSITORY in each or each.startswith("socket") for each in watcher.seen)


def test_the_watcher_sees_code_that_runs(model):
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(plain | {"model_type": WORD, "auto_map": {"AutoConfig": CLASS}}))
    with watching(model, WORD) as watcher, suppress(SystemExit, Exception):
        built(model, trust_remote_code=True)
    (model / "config.json").write_text(json.dumps(plain))
    assert watcher.seen


def test_no_key_that_vllm_reads_makes_it_fetch_run_or_load_anything_else(model, keys):
    found: list[str] = []
    assert len(swept(model, keys, VALUES["table"], found)) > 600, "vLLM takes most keys, or this proves nothing"
    assert found == []


def test_no_kind_of_model_or_quantization_that_vllm_knows_does(model):
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    plain, expected = json.loads((model / "config.json").read_text()), choices(built(model))
    kinds: list[dict[str, Any]] = [{"model_type": name} for name in _CONFIG_REGISTRY]
    kinds += [{"quantization_config": VALUES["table"] | {"quant_method": name}} for name in QUANTIZATION_METHODS]
    assert len(kinds) > 50
    for change in kinds:
        result, watcher = tried(model, plain, {**VALUES["table"], **change})
        assert watcher.seen == [], change
        assert isinstance(result, Exception) or choices(result) == expected, change


@pytest.mark.parametrize("key", BIASES)
def test_biases_that_no_file_holds_are_refused(key, model, tmp_path):
    """vLLM leaves them as the memory was, and answers with that."""
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: True}))
    with pytest.raises(OrthogonalizeError, match=rf"asks for biases \({key}\), of which none is stored"):
        VllmEngine(tmp_path / "model", 64).__enter__()


@pytest.mark.prove
@pytest.mark.parametrize("name", VALUES)
def test_no_value_of_any_key_does(name, model, keys):
    found: list[str] = []
    for key in keys:
        swept(model, [key], VALUES[name], found)
    assert found == []


@pytest.mark.prove
def test_an_engine_that_starts_on_all_keys_and_files_at_once_scores_as_the_weights_say(model, keys, tmp_path):
    with watching(model, WORD) as usual, VllmEngine(model, 64) as engine:  # vLLM asks the system for its processors
        expected = engine.scores([[5, 6, 7]], [[8, 9, 10, 11]])
    folder, found = tmp_path / "all", list[str]()
    shutil.copytree(model, folder)
    plain = json.loads((folder / "config.json").read_text())
    numbers = ("rot", "rope", "dtype", "scale")  # in whose names: settings of any model, which have to be what they are
    others = [key for key in keys if key not in (*plain, *BIASES) and not any(part in key for part in numbers)]
    taken = swept(folder, others, VALUES["table"], found)
    assert len(taken) > 600
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    for name, content in {
        "config.json": taken | plain,
        "generation_config.json": VALUES["table"],
        "tokenizer_config.json": tokenizer | {"auto_map": {"AutoTokenizer": [CLASS, CLASS]}},
        "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": CLASS}, "processor_class": CLASS},
        "params.json": VALUES["table"],
    }.items():
        (folder / name).write_text(json.dumps(content))
    with watching(folder, WORD) as watcher, VllmEngine(folder, 64) as engine:
        assert engine.scores([[5, 6, 7]], [[8, 9, 10, 11]]) == expected
    assert set(watcher.seen) <= set(usual.seen)
    assert not any(WORD in each for each in watcher.seen)
    assert found == []
