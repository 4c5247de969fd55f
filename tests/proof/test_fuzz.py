"""Every file that is read, damaged in thousands of ways: nothing but the package's own error leaves its functions.

`make test` tries some hundred files, `make prove` ten thousand.
"""

from __future__ import annotations

import json
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.chat import bake_prompts
from helpers.command_line import UNTRIED
from helpers.hostile_json import DAMAGES, Damage
from helpers.llama import WIDTH, store, tiny_llama
from helpers.made_up import sweep
from helpers.memory_use import memory_growth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthogonalize.architectures import schema
from orthogonalize.checkpoints.checkpoint import INDEX, RECIPE
from orthogonalize.cli import main
from orthogonalize.commands.compare import compare
from orthogonalize.commands.describe import describe
from orthogonalize.commands.edit import edit
from orthogonalize.commands.evaluate import evaluate
from orthogonalize.commands.extract import extract
from orthogonalize.commands.judge import judge
from orthogonalize.commands.merge import merge
from orthogonalize.commands.options.config_file import read_config
from orthogonalize.commands.plot import plot
from orthogonalize.commands.verify import verify
from orthogonalize.core.errors import LONGEST, OrthogonalizeError
from orthogonalize.core.journal import Journal
from orthogonalize.data import template_process
from orthogonalize.data.chat import ChatFormat
from orthogonalize.data.prompts import load_prompts
from orthogonalize.directions.direction_set import load_direction
from orthogonalize.edits.fitting.fit import FitTokens
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.models.loading import check_complete, load_model, load_tokenizer
from orthogonalize.reports.model_card import write_card
from orthogonalize.reports.pages.report_page import write_webpage
from orthogonalize.reports.schema import load_report
from orthogonalize.selection.run_folder import load_run
from orthogonalize.selection.stages import STAGES, StageBook

SHORT = UNTRIED.with_changes(finders=("dim",), train=6, val=1, test=1, enough=1)
SLOWEST = 60.0  # seconds for one damaged file, on a busy machine
PARTS = 40  # of the ten thousand
MEMORY = 2**30  # bytes that reading any of them may take


class TooSlowError(BaseException):
    """Not an `Exception`, so that no handler of a library takes it for its own."""


@dataclass(frozen=True)
class Place:
    """The folders that are damaged, one file at a time, and one to write into."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    @contextmanager
    def output(self) -> Iterator[Path]:
        """A path that does not exist, and does not afterwards."""
        try:
            yield self.root / "out"
        finally:
            shutil.rmtree(self.root / "out", ignore_errors=True)


def edits(place: Place, model: str, **source: Path | str | float) -> None:
    with place.output() as out:
        edit(place.root / model, out, **source)


def loads_model(place: Place) -> None:
    edits(place, "model", direction=place.root / "direction.pt", scope="all")
    edits(place, "model", direction=place.root / "direction.pt", method="actadd", layer=1, coefficient=1.0)
    check_complete(place.model)
    load_model(place.model, "cpu")


def describes(place: Place) -> None:
    """By experiments on a small random model of the configuration's class."""
    describe(place.described)


def merges(place: Place) -> None:
    with place.output() as out:
        merge(place.adapter, out, base=place.model)


def plots(place: Place) -> None:
    with place.output() as out:
        out.mkdir()
        plot(place.sweep, out / "figure.pdf")


def tokenizes(place: Place) -> None:
    tokenizer = load_tokenizer(place.model)
    ChatFormat(tokenizer, templated=False).encode_all(["how do i bake", "ü \U0001f600"])
    ChatFormat(tokenizer).positions()


def uses_recipe(place: Place) -> None:
    recipe = load_recipe(place.edited)
    with place.output() as out:
        out.mkdir()
        write_card(out, recipe, base=place.model)
    verify(place.edited, place.model, logits=False, record=False)
    edits(place, "model", recipe=place.edited / "orthogonalize.json")


def uses_run(place: Place) -> None:
    found = load_run(place.run)
    assert repr(found)
    StageBook(place.run).to_run(lambda stage: {"stage": stage}, force=True)
    FitTokens.load(place.run / "tokens.json")
    edits(place, "model", run=place.run, pick=1)
    edits(place, "model", run=place.run, method="ablate", scope="all")


def uses_report(place: Place) -> None:
    report = load_report(place.report)
    judge(place.report / "report.json")
    compare(place.report, place.other)
    with place.output() as out:
        out.mkdir()
        write_card(out, load_recipe(place.edited), base=place.model, report=report)
        write_webpage(report, out / "report.html")


def uses_stages(place: Place) -> None:
    book = StageBook(place.run)
    for stage in STAGES:
        with_inputs = {"stage": stage}
        book.unchanged(stage, with_inputs)
        book.changed_inputs(stage, with_inputs)
        book.to_run(lambda stage: {"stage": stage}, force=True)


def resumes(place: Place) -> None:
    """The run is extracted anew where the record of its stages is damaged, and its selection is made again."""
    with place.output() as out:
        shutil.copytree(place.resumed, out)
        for stage in ("selection", None):
            extract(place.model, out, concept="lists", settings=SHORT, stage=stage, force=True)


def uses_journal(place: Place) -> None:
    for inputs in (None, "ours"):
        journal = Journal(place.root / ".journal", inputs)
        journal.announce_resume(["a", "b"])
        assert journal.step("new", lambda: [1]) == [1]


def edits_sharded(place: Place) -> None:
    edits(place, "sharded", direction=place.root / "direction.pt", scope="layers:0")


def edits_model(place: Place) -> None:
    edits(place, "model", direction=place.root / "direction.pt", scope="layers:0")
    edits(place, "model", direction=place.root / "direction.pt", method="actadd", layer=1, coefficient=1.0)


def verifies(place: Place) -> None:
    verify(place.edited, place.model, logits=False, record=False)


READERS: dict[str, Callable[[Place], object]] = {
    "model/config.json": loads_model,
    "model/generation_config.json": loads_model,
    "model/model.safetensors": edits_model,
    "described/config.json": describes,
    "described/model.safetensors": describes,
    "adapter/adapter_config.json": merges,
    "adapter/adapter_model.safetensors": merges,
    "sweep/sweep.json": plots,
    "options.toml": lambda place: read_config(place.root / "options.toml", main),
    "model/tokenizer.json": tokenizes,
    "model/tokenizer_config.json": tokenizes,
    "model/special_tokens_map.json": tokenizes,
    "model/added_tokens.json": tokenizes,
    "model/README.md": edits_model,
    f"sharded/{INDEX}": edits_sharded,
    "edited/orthogonalize.json": uses_recipe,
    "edited/config.json": verifies,
    "run/run.json": uses_run,
    "run/prompts.jsonl": uses_run,
    "run/candidates.json": uses_run,
    "run/tokens.json": uses_run,
    "run/directions.safetensors": uses_run,
    "run/activations.safetensors": uses_run,
    "run/stages.json": uses_stages,
    "resumed/stages.json": resumes,
    "report/report.json": uses_report,
    "answers.json": lambda place: judge(place.root / "answers.json"),
    "prompts.json": lambda place: load_prompts(place.root / "prompts.json"),
    "prompts.jsonl": lambda place: load_prompts(place.root / "prompts.jsonl"),
    "prompts.csv": lambda place: load_prompts(place.root / "prompts.csv"),
    "prompts.txt": lambda place: load_prompts(place.root / "prompts.txt"),
    "direction_metadata.json": lambda place: load_direction(place.root / "direction.pt"),
    ".journal": uses_journal,
    "family.toml": lambda place: schema.parse(
        (place.root / "family.toml").read_text("utf-8", "replace"), "family.toml"
    ),
}


@pytest.fixture(scope="module")
def place(model, run, edited, tmp_path_factory) -> Place:
    root = tmp_path_factory.mktemp("fuzz")
    for name, folder in (("model", model), ("run", run), ("edited", edited)):
        shutil.copytree(folder, root / name)
    (root / "model" / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    (root / "model" / "added_tokens.json").write_text('{"<extra>": 40}')
    (root / "model" / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags:\n- a\n---\ntext\n")
    extract(root / "model", root / "resumed", concept="lists", settings=SHORT)
    shutil.copytree(model, root / "described")
    store(tiny_llama(), root / "sharded", torch.bfloat16, shards=2)
    torch.save(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), root / "direction.pt")
    (root / "direction_metadata.json").write_text('{"pos": -1, "layer": 1}')
    edit(root / "model", root / "adapter", direction=root / "direction.pt", layer=1, scope="layers:1", format="lora")
    (root / "adapter" / RECIPE).unlink()  # with one, it would be rebuilt from that
    (root / "sweep").mkdir()
    (root / "sweep" / "sweep.json").write_text(sweep({"mild": (0.3, 0.0), "strong": (0.5, 0.1)}).model_dump_json())
    (root / "options.toml").write_text('[extract]\nseed = 3\ntrain = 64\n[edit]\nscope = "all"\nforce = true\n')
    evaluate(root / "edited", str(model), run, root / "report", engine="hf", suites=["behaviour", "refusal", "kl"])
    shutil.copytree(root / "report", root / "other")
    rows = [{"prompt": each, "response": "no", "category": "a"} for each in bake_prompts()[0]]
    (root / "answers.json").write_text(json.dumps(rows))
    (root / "prompts.json").write_text(json.dumps(rows))
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompts.csv").write_text("prompt,category\n" + "".join(f'"{row["prompt"]}",a\n' for row in rows))
    (root / "prompts.txt").write_text("\n".join(bake_prompts()[0]))
    journal = Journal(root / ".journal")
    journal.put({"a": 1, "b/1": [1, 2], "c": {"d": None}})
    shutil.copyfile(Path(schema.__file__).with_name("llama.toml"), root / "family.toml")
    return Place(root)


@contextmanager
def damaged(file: Path, damage: Damage) -> Iterator[None]:
    """A context in which `file` has other content; of a safetensors file, another header."""
    before = file.read_bytes()
    if file.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", before[:8])
        header = damage.of(before[8 : 8 + length])
        content = struct.pack("<Q", len(header)) + header + before[8 + length :]
    else:
        content = damage.of(before)
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@contextmanager
def bounded() -> Iterator[None]:
    """A context that is left after `SLOWEST` at the latest."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SLOWEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survives(place: Place, name: str, damage: Damage) -> None:
    with damaged(place.root / name, damage), memory_growth() as growth:
        try:
            with bounded():
                READERS[name](place)
        except OrthogonalizeError as error:
            said = str(error)
            assert said
            assert said.isprintable()
            assert len(said) <= LONGEST
    assert growth.bytes < MEMORY


CASES = st.tuples(st.sampled_from(sorted(READERS)), DAMAGES)
COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 2.0)


@pytest.mark.parametrize("name", sorted(READERS))
def test_file_as_it_was_is_read(name, place):
    """Otherwise the damaged ones would prove nothing."""
    READERS[name](place)


@settings(max_examples=300, derandomize=True, **COMMON)
@given(case=CASES)
def test_damaged_files_end_in_one_line(case, place):
    survives(place, *case)


@pytest.fixture(scope="module")
def compiled_place(place) -> Place:
    """After everything was read once, so that no damaged file is blamed for the minute that numba takes to compile."""
    for read in READERS.values():
        read(place)
    return place


@pytest.mark.prove
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_damaged_files_end_in_one_line(part, compiled_place):
    """Other files each time; a part of them takes a minute or two."""

    @settings(max_examples=10_000 // PARTS, **COMMON)
    @given(case=CASES)
    def tried(case: tuple[str, Damage]) -> None:
        survives(compiled_place, *case)

    tried()
