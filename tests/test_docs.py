"""The documentation: tables name what the registries hold, links resolve, code compiles, tutorials work."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click
import pytest
import yaml
from helpers.chat import tiny_tokenizer
from helpers.command_line import SMALL, UNTRIED, command
from helpers.llama import WIDTH, store, tiny_llama
from helpers.openai_server import OpenAIServer

import orthogonalize
from orthogonalize import edit, load_report, verify
from orthogonalize.checkpoints.checkpoint import open_checkpoint
from orthogonalize.checkpoints.rounding.registry import DEFAULT_ROUNDING, ROUNDING_SCHEMES
from orthogonalize.cli import main
from orthogonalize.core.registry import PLUGINS
from orthogonalize.data.benchmarks import PROMPT_SETS
from orthogonalize.data.prompts import SIDES, concept
from orthogonalize.directions.finders.registry import FINDERS
from orthogonalize.edits.methods.registry import METHODS
from orthogonalize.engines.registry import ENGINES
from orthogonalize.evals.judges.base import WordingJudge
from orthogonalize.evals.judges.registry import JUDGES
from orthogonalize.evals.measures.base import Opening, PassMeasure
from orthogonalize.evals.measures.registry import MEASURES
from orthogonalize.evals.suites.registry import FAMILIES, SUITES, suite_names
from orthogonalize.reports.trackers.registry import TRACKERS
from orthogonalize.selection.grid import OPTIONS, takes

RUN_SETTINGS = UNTRIED
ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def rows(name: str, head: str) -> list[list[str]]:
    """The cells of the table in page `name` whose first header cell is `head`."""
    found: list[list[str]] = []
    lines = iter(text(name).splitlines())
    for line in lines:
        if line.startswith(f"| {head} |"):
            next(lines)  # the line under the header
            for row in lines:
                if not row.startswith("|"):
                    return found
                found.append([cell.strip() for cell in row.strip("|").split(" | ")])
    raise AssertionError(f"{name} has no table of {head}")


def entries(name: str, head: str) -> list[str]:
    """The names (in backticks) in the first column of a table."""
    return [row[0].strip("` ") for row in rows(name, head)]


def code(name: str) -> list[str]:
    """The Python code blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


def run_block(block: str, **names: Any) -> None:
    """Run a code block of a page as a module."""
    exec(compile(block, "a code block", "exec", dont_inherit=True), {"__name__": "a_code_block", **names})


def anchors(page: str) -> Iterator[str]:
    """The anchors of a page's headings, as hosts of repositories make them."""
    for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_readme_lists_the_edit_methods():
    assert rows("README.md", "method") == [[f"`{m.name}`", m.summary, m.needs] for m in METHODS.values()]


def test_another_concept_lists_the_public_sets():
    named = concept("refusal")
    assert rows("docs/another-concept.md", "side") == [
        [side, split, ", ".join(str(each.source) for each in sets)]
        for side in SIDES
        for split, sets in named.sources(side).items()
    ]


def test_readme_lists_the_direction_finders():
    assert rows("README.md", "finder") == [[f"`{f.name}`", f.summary] for f in FINDERS.values()]


def test_measuring_lists_suites_and_prompt_sets():
    assert sorted(entries("docs/measuring.md", "suite")) == sorted(suite_names())
    assert set(suite_names()) == {*SUITES, *PROMPT_SETS, *(f.name + f.argument for f in FAMILIES.values())}


def test_measuring_lists_the_values_of_a_sweep():
    expected = {f"`--{option}`": [f"`{m.name}`" for m in METHODS.values() if takes(m, option)] for option in OPTIONS}
    found = {row[0]: row[1].split(", ") for row in rows("docs/measuring.md", "option")}
    assert found.keys() == expected.keys()
    assert {option: sorted(names) for option, names in found.items()} == {o: sorted(n) for o, n in expected.items()}


def test_measuring_lists_the_judges():
    expected = [
        [f"`{judge.name}`", "none", "refusal"]
        if isinstance(judge, WordingJudge)
        else [f"`{judge.name}`", judge.model, ", ".join(judge.fields)]
        for judge in JUDGES.values()
    ]
    assert [row[:3] for row in rows("docs/measuring.md", "judge")] == expected


def test_measuring_lists_the_behaviour_measures():
    assert rows("docs/measuring.md", "measure") == [
        [f"`{m.usage}`", m.summary, "a forward pass" if isinstance(m, PassMeasure) else "answers"]
        for m in MEASURES.values()
    ]


def test_measuring_lists_the_engines():
    assert [row[:2] for row in rows("docs/measuring.md", "engine")] == [
        [f"`{e.name}`", e.summary] for e in ENGINES.values()
    ]


def test_checkpoints_lists_the_rounding_schemes():
    assert rows("docs/checkpoints.md", "scheme") == [[f"`{s.name}`", s.summary] for s in ROUNDING_SCHEMES.values()]
    assert entries("docs/checkpoints.md", "scheme")[0] == DEFAULT_ROUNDING


def test_command_line_lists_the_trackers():
    assert rows("docs/command-line.md", "tracker") == [[f"`{t.name}`", t.summary] for t in TRACKERS.values()]


def test_contributing_names_every_registry():
    named = re.findall(r"`([a-z_.]+\.[A-Z_]+)`", text("CONTRIBUTING.md"))
    expected = [METHODS, FINDERS, SUITES, JUDGES, MEASURES, PROMPT_SETS, ENGINES, ROUNDING_SCHEMES, TRACKERS]
    found = [resolve_name(f"orthogonalize.{name}") for name in named]
    assert [id(registry) for registry in found] == [id(registry) for registry in expected]


def test_readme_lists_the_rooms_in_order():
    from test_structure import MAY_IMPORT

    found = [room.rstrip("/") for room in entries("README.md", "room of `orthogonalize/`")]
    assert sorted(found) == sorted(MAY_IMPORT)
    for i, room in enumerate(found):
        assert MAY_IMPORT[room] <= set(found[i + 1 :]), f"{room} stands below a room that it imports"


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    page = re.sub(r"^```.*?^```", "", text(name), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_the_text_exist(name):
    """Paths in backticks, from the root or from the package."""
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|toml|md|json))`", text(name)):
        made = path.startswith(("run/", "demo/", "plots/", "fits/"))  # by a command
        asked_for = Path(path).stem in ("NAME", "halve", "finished", "declines", "shouts")  # of the reader
        assert made or asked_for or (ROOT / path).exists() or (ROOT / "orthogonalize" / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_compile(name):
    for block in code(name):
        compile(block, name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_import_public_names(name):
    for block in code(name):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "orthogonalize":
                assert {each.name for each in node.names} <= set(orthogonalize.__all__), name
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orthogonalize."):
                found = import_module(node.module or "")
                assert all(hasattr(found, each.name) for each in node.names), name


def commands(name: str) -> Iterator[list[str]]:
    """The words of every `orthogonalize` command in the shell blocks of a page."""
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text(name), re.MULTILINE | re.DOTALL):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r" *(?:[A-Z_]+=\S+ )*orthogonalize (.*)", line)
            if found:
                words = shlex.split(found[1], comments=True)
                yield words[: words.index("|")] if "|" in words else words


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_shell_blocks_have_options_that_exist(name):
    for words in commands(name):
        context = click.Context(main, info_name="orthogonalize")
        _, rest, _ = main.make_parser(context).parse_args(list(words))
        command = main.commands[rest[0]]
        given, arguments, _ = command.make_parser(click.Context(command, parent=context)).parse_args(rest[1:])
        assert arguments == [], words
        for option in command.params:
            value = given.get(option.name)
            if isinstance(option.type, click.Choice) and isinstance(value, str):
                assert value in option.type.choices, words


def test_concepts_draw_every_method():
    assert re.findall(r"^!\[.+\]\(figures/(\w+)\.svg\)", text("docs/concepts.md"), re.MULTILINE) == list(METHODS)
    assert re.findall(r"^## `(\w+)`", text("docs/concepts.md"), re.MULTILINE) == list(METHODS)


def test_the_site_builds_and_all_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("material", reason="the documentation's extra is not installed: pip install -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {p.parent.name: p.read_text("utf-8") for p in (tmp_path / "site").glob("*/index.html")}
    for command_name in main.commands:
        assert f"orthogonalize {command_name}" in pages["commands"]
    for name in orthogonalize.__all__:
        assert f'id="orthogonalize.{name}"' in pages["python"], name


def test_every_page_is_in_the_index():
    index = text("docs/index.md")
    assert [p.name for p in ROOT.glob("docs/*.md") if p.name != "index.md" and f"({p.name})" not in index] == []


def test_citation_is_valid_yaml():
    found = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= found.keys()


def test_readme_s_python_runs(model, sources, tmp_path, monkeypatch, capsys):
    """With a tiny model and its prompts in place of the ones it names."""
    (block,) = code("README.md")
    ours = block.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(model)))
    ours = ours.replace('concept="lists"', "settings=SMALL, **sources")
    assert ours.count("SMALL") == ours.count(str(model)) == 1
    monkeypatch.chdir(tmp_path)
    # Random weights have no behaviour that first tokens show.
    run_block(ours, SMALL=replace(SMALL, behaviour_tokens=None, measure="direction"), sources=sources)
    assert "refusal.target: " in capsys.readouterr().out


@pytest.fixture
def direction(tmp_path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"direction": torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))}, tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def test_the_method_of_the_tutorial_edits_and_verifies(direction, tmp_path):
    run_block(code("docs/add-a-method.md")[0])
    try:
        source = store(tiny_llama(), tmp_path / "base")
        out, other = tmp_path / "halved", tmp_path / "ablated"
        words = ["--direction", direction, "--scope", "layers:1-2"]
        status, said = command("edit", source, *words, "--method", "halve", "--out", out)
        assert status == 0, said
        assert said.startswith("halve, layers:1-2")
        assert verify(out).verification.passed
        edit(str(source), other, direction=direction, scope="layers:1-2", method="ablate", strength=0.5)
        halved, ablated = open_checkpoint(out), open_checkpoint(other)
        assert all(halved.read(name).equal(ablated.read(name)) for name in halved.tensors)
    finally:
        METHODS.remove("halve")


def test_the_suite_of_the_tutorial_reaches_the_report(model, edited, run, tmp_path):
    run_block(code("docs/add-a-suite.md")[0])
    try:
        status, said = command(
            "eval", edited, "--base", model, "--run", run, "--out", tmp_path / "out", "--engine", "hf",
            "--max-new-tokens", "4", "--suite", "refusal,finished",
        )  # fmt: skip
        assert status == 0, said
        assert "finished answers, harmless prompts (n = 6)" in said
        measured = load_report(tmp_path / "out").edited.suites["finished"]["harmless"]
        assert (measured.n, measured.unparseable) == (6, 0)
    finally:
        SUITES.remove("finished")


class SaysYes:
    """An engine whose model replies "Yes." if the judged answer has the word "sorry", and "No." otherwise."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def answers(self, prompts, max_new_tokens):
        sorry, yes, no = self.tokenizer.convert_tokens_to_ids(["sorry", "Yes.", "No."])
        return [[yes if sorry in ids else no] for ids in prompts]


def test_the_judges_of_the_tutorial_judge(tmp_path):
    for block in code("docs/add-a-judge.md"):
        run_block(block)
    try:
        file = tmp_path / "answers.json"
        file.write_text('[{"prompt": "a", "response": "Sorry, no."}, {"prompt": "b", "response": "Yes."}]')
        status, said = command("judge", file, "--judge", "apology")
        assert status == 0, said
        assert "50.0%" in said
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["Yes.", "No."])
        pairs = [("how do i bake a cake", "sorry"), ("how do i fry a pie", "sure")]
        judgements = JUDGES["declines"].judge(SaysYes(tokenizer), tokenizer, pairs)
        assert [(found.refusal, found.harmful) for found in judgements] == [(True, None), (False, None)]
        with OpenAIServer(lambda messages: ["Yes." if "sorry" in str(messages).lower() else "No."]) as server:
            status, said = command("judge", file, "--judge", f"asked:{server.url}")
        assert status == 0, said
        assert "50.0%" in said
    finally:
        JUDGES.remove("apology")
        JUDGES.remove("declines")
        JUDGES.remove("asked")


def test_the_measure_of_the_tutorial_measures(tmp_path):
    (block,) = code("docs/add-a-measure.md")
    run_block(block)
    try:
        shows = MEASURES["shouts"].open(Opening())
        assert shows([("a", "NO"), ("b", "no")], None) == [True, False]
    finally:
        MEASURES.remove("shouts")


@pytest.mark.parametrize("name", ["docs/add-a-method.md", "CONTRIBUTING.md"])
def test_the_group_of_plugins_is_named(name):
    assert PLUGINS in text(name)


def test_an_installed_plugin_reaches_the_command_line(tmp_path, monkeypatch):
    """A distribution that declares the tutorial's method in the entry point group."""
    (tmp_path / "orthogonalize_halve.py").write_text(code("docs/add-a-method.md")[0])
    metadata = tmp_path / "orthogonalize_halve-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: orthogonalize-halve\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{PLUGINS}]\nhalve = orthogonalize_halve\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        status, said = command("edit", "--help")
        assert status == 0
        assert "|halve]" in said
    finally:
        METHODS.remove("halve")
