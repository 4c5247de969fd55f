"""Tiny random models, written to disk as the Hub stores them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from benchmark_files import all_sets
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_models import DoublePrecision
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from orthogonalize.cli import main
from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract
from orthogonalize.selection.settings import Settings

WIDTH, LAYERS, VOCABULARY = 32, 4, 96


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A float64 Llama whose every parameter is random, so that nothing passes by accident."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.4 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def store(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype = torch.float64, shards: int = 1) -> Path:
    """Write `model` as a checkpoint folder of one or several shards, with a few side files."""
    folder.mkdir(parents=True)
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: t.detach().to(dtype).contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(tensors.items())[number::shards])
            save_file(part, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "generation_config.json").write_text('{"eos_token_id":  2}\n')
    (folder / "LICENSE").write_bytes(b"some licence\r\n")
    (folder / "README.md").write_text("claims of the base model")
    return folder


def in_double(model):
    """Let a float64 model compute in float64 throughout; the library does some of it in float32."""
    forward = model.forward

    def wide(*args, **kwargs):
        with DoublePrecision():
            return forward(*args, **kwargs)

    model.forward = wide
    return model


def load(folder: Path):
    """A checkpoint folder as a float64 transformers model."""
    return in_double(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())


def logits(model, seed: int = 0) -> torch.Tensor:
    """Logits on random token ids, in float64."""
    ids = torch.randint(3, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(input_ids=ids).logits.double()


ENGINES = {"test_demo", "test_vllm", "test_serving", "test_model", "test_judges", "test_adapters"}


def process_of(file: str) -> str:
    """What tests of `file` share a process with, where two run tests: one starts all of vLLM's engines."""
    name = Path(file).stem
    return "engines" if name in ENGINES else name


def pytest_collection_modifyitems(items):
    """The engines' process begins at once: it has the most to do."""
    items.sort(key=lambda item: process_of(str(item.path)) != "engines")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return process_of(nodeid.split("::")[0])

    return ByProcess(config, log)


def pytest_addoption(parser):
    parser.addoption(
        "--proof", type=Path, help="Folder with proof.json and architectures.md, which are brought up to date."
    )


@pytest.fixture(scope="session")
def proof(request):
    """Takes what was measured about a family; at the end it goes into the documentation, if that was asked for."""
    from proving import record

    measured: dict[str, dict] = {}
    yield lambda name, **values: measured.setdefault(name, {}).update(values)
    folder = request.config.getoption("--proof")
    if folder is not None:
        record(folder, measured)


@pytest.fixture
def one_thread():
    """Matrices this small take longer to share than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Tiny checkpoints of every family by name, each made once."""
    from harness import Base

    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: Base(name, folder / name))


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny random Llama on disk, float64, head untied."""
    return store(tiny_llama(), tmp_path / "base")


@pytest.fixture
def basis() -> torch.Tensor:
    """Three orthonormal directions of the tiny models' stream."""
    q, _ = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    return q.T.contiguous()


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[answer] :{% endif %}"
)
WORDS = """colour = Why? English how do i bake roast fry a the paint wash fold cake pie soup
wall car shirt please today now sorry sure""".split()  # noqa: SIM905


def tiny_tokenizer(template: str | None = TEMPLATE):
    """A word tokenizer that, like many real ones, puts a BOS before everything it is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[user]", "[system]", "[end]", "[answer]", ":"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def choosing_tokenizer():
    """The same, with the words of multiple-choice prompts."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["A", "B", "C", "D", "Answer:", "Question:", "A.", "B.", "C.", "D.", "Q:", "A:"])
    return tokenizer


def store_choosing(folder: Path, **overrides) -> Path:
    """A tiny random Llama, float32, with a context and the words for multiple choice."""
    tiny = tiny_llama(tie_word_embeddings=True, max_position_embeddings=512, **overrides)
    choosing_tokenizer().save_pretrained(store(tiny, folder, torch.float32))
    return folder


def store_chatting(folder: Path) -> Path:
    """A tiny random Llama with a tokenizer and a chat template, float32."""
    tiny_tokenizer().save_pretrained(store(tiny_llama(tie_word_embeddings=True), folder, torch.float32))
    return folder


@pytest.fixture
def chat_model(tmp_path) -> Path:
    return store_chatting(tmp_path / "chat-model")


def bake_prompts() -> tuple[list[str], list[str]]:
    """Two sets of 24 prompts that differ in one thing: cooking against housework."""

    def sentences(verbs: str, things: str) -> list[str]:
        endings = ("please", "today", "now")
        return [f"how do i {v} a {t} {e}" for v in verbs.split() for t in things.split() for e in endings][:24]

    return sentences("bake roast fry", "cake pie soup"), sentences("paint wash fold", "wall car shirt")


SMALL = Settings(train=12, val=4, test=6, filtered=False, behaviour_tokens=["sorry"], trials=4, max_rank=3)
UNTRIED = replace(SMALL, trials=0, max_rank=2)  # without whole edits


@pytest.fixture(scope="module")
def model(request, tmp_path_factory) -> Path:
    """A tiny model that chats; a module that needs another has a function `store_model` that writes it."""
    folder = tmp_path_factory.mktemp(request.module.__name__) / "model"
    return getattr(request.module, "store_model", store_chatting)(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("prompts")
    paths = {}
    for side, prompts in zip(("positive", "negative"), bake_prompts(), strict=True):
        (folder / f"{side}.txt").write_text("\n".join(prompts))
        paths[side] = str(folder / f"{side}.txt")
    return paths


@pytest.fixture(scope="module")
def run_settings(request) -> Settings:
    """What `run` is extracted with; a module that needs another run has RUN_SETTINGS."""
    return getattr(request.module, "RUN_SETTINGS", SMALL)


@pytest.fixture(scope="module")
def run(model, sources, run_settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    extract(str(model), out, **sources, settings=run_settings)
    return out


@pytest.fixture(scope="module")
def edited(model, run, tmp_path_factory) -> Path:
    """`model` without the best direction of `run`."""
    out = tmp_path_factory.mktemp("edited") / "edited"
    edit(str(model), out, run=run, method="ablate", scope="all")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Local copies of every public set."""
    return all_sets(tmp_path_factory.mktemp("data"))


def command(*words: str | Path) -> tuple[int, str]:
    """Run the command line; exit status and what it says (one line for what a user can mend)."""
    result = CliRunner().invoke(main, ["--quiet", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.strip()
