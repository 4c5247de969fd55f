"""`push` end to end, through huggingface_hub and the command line, against a loopback server."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from helpers.hub_server import Hub, Repository, command, python
from helpers.llama import WIDTH, store, tiny_llama
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.benchmarks import MMLU, rows
from orthogonalize.edits.recipe import load_recipe
from orthogonalize.reports.schema import Loss, Losses, Measures, Paired, Rate, Refusals, Report

TOKEN = "hf_loopbacktokenthatmustnotbeprinted"


@pytest.fixture
def edited(tmp_path) -> Path:
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16, shards=2)
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [famous]\n---\nBest model in the world.")
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    edit(str(base), tmp_path / "edited", direction=tmp_path / "direction.safetensors", layer=2)
    return tmp_path / "edited"


@pytest.fixture
def report(tmp_path) -> Path:
    rate = Rate(value=0.9, n=10, ci95=(0.6, 0.98))
    low = Rate(value=0.1, n=10, ci95=(0.02, 0.4))
    loss = Loss(value=0.5, n=10, ci95=(0.4, 0.6), tokens=100, perplexity=1.65)
    written = Report(
        engine="hf", engine_version="transformers", base_model="base", checkpoint="edited", edit=None,
        max_new_tokens=100, sensitive=False,
        base=Measures(refusal=Refusals(target=rate, harmless=low), loss=Losses(own_completions=loss)),
        edited=Measures(refusal=Refusals(target=low, harmless=low), loss=Losses(own_completions=loss)),
        paired={
            "refusal.target": Paired(difference=-0.8, n=10, p=0.008),
            "refusal.harmless": Paired(difference=0.0, n=10, p=1.0),
            "loss.own_completions": Paired(difference=0.0, n=10, ci95=(-0.1, 0.1)),
        },
        answers=[],
    )  # fmt: skip
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(written.model_dump_json())
    (tmp_path / "report" / "report.html").write_text("<html></html>")
    return tmp_path / "report"


def push(hub: Hub, *words: str | Path, token: str | None = TOKEN, home: Path) -> subprocess.CompletedProcess[str]:
    """`orthogonalize push` against the loopback Hub."""
    return command(hub, "push", *words, token=token, home=home)


def test_push_is_private_complete_and_leaks_no_token(edited, report, tmp_path):
    with Hub(TOKEN) as hub:
        done = push(hub, edited, "me/edited", "--report", report, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        repository = hub.state.repositories["me/edited"]
    assert repository.private is True
    on_disk = {str(f.relative_to(edited)): f.read_bytes() for f in edited.rglob("*") if f.is_file()}
    pushed = {k: v for k, v in repository.files.items() if k != ".gitattributes"}
    described = {"README.md", "orthogonalize.json", "report.json", "report.html", "rates.png"}
    assert pushed.keys() == on_disk.keys() | described
    assert all(pushed[name] == on_disk[name] for name in on_disk.keys() - described)
    assert load_recipe(edited).base.model == str(tmp_path / "base"), "the local recipe still finds its base"
    assert TOKEN not in done.stdout + done.stderr
    for name in ("orthogonalize.json", "README.md", "report.json"):
        assert str(tmp_path).encode() not in pushed[name], "a path of this machine would be published"
    assert all(TOKEN.encode() not in content for content in pushed.values())
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert "famous" not in (card.data.tags or [])
    assert "Best model" not in card.text
    assert "| refusal, target prompts (n = 10) | 90.0% [60.0, 98.0] | 10.0% [2.0, 40.0] |" in card.text


def test_push_uploads_what_the_recipe_lists_in_one_commit(edited, tmp_path):
    for name in (".env", "notes.txt", "wandb/run.log", ".README.md.0123.partial", "more/secrets.json", "[a].txt"):
        (edited / name).parent.mkdir(exist_ok=True)
        (edited / name).write_text("secret")
    with Hub(TOKEN) as hub:
        left = {"model.safetensors": b"old", "pytorch_model.bin": b"old", "notes.md": b"mine"}
        left["orthogonalize.json"] = b"{}"
        hub.state.repositories["me/edited"] = Repository(True, left)
        done = push(hub, edited, "me/edited", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        pushed = hub.state.repositories["me/edited"].files
        commits = [request for request in hub.state.requests if "/commit/" in request]
    recipe = load_recipe(edited)
    assert pushed.keys() == {*recipe.weights, *recipe.files, "README.md", "orthogonalize.json", "notes.md"}
    assert not [name for name, content in pushed.items() if b"secret" in content or content == b"old"]
    assert len(commits) == 1


def test_an_adapter_is_pushed_as_it_is(report, tmp_path):
    base = store(tiny_llama(), tmp_path / "base", torch.bfloat16)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    adapter = tmp_path / "adapter"
    edit(str(base), adapter, direction=tmp_path / "direction.safetensors", layer=1, scope="layers:1-2", format="lora")
    (adapter / ".env").write_text("secret")
    with Hub(TOKEN) as hub:
        hub.state.repositories["me/adapter"] = Repository(
            True, {"model.safetensors": b"merged before", "orthogonalize.json": b"{}"}
        )
        done = push(hub, adapter, "me/adapter", "--report", report, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        pushed = hub.state.repositories["me/adapter"].files
    described = {"README.md", "orthogonalize.json", "report.json", "report.html", "rates.png"}
    assert pushed.keys() == {"adapter_config.json", "adapter_model.safetensors"} | described
    assert pushed["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    local = json.loads((adapter / "adapter_config.json").read_text())
    assert json.loads(pushed["adapter_config.json"]) == local | {"base_model_name_or_path": "base"}
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("peft", "apache-2.0")
    assert "This is a LoRA adapter for base" in card.text
    assert "Tensors changed" not in card.text
    assert "| refusal, target prompts (n = 10) | 90.0% [60.0, 98.0] | 10.0% [2.0, 40.0] |" in card.text


@pytest.mark.parametrize("name", ["missing.json", "../outside.json", "/etc/hostname"])
def test_push_refuses_a_recipe_that_lists_what_is_not_there(name, edited, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    recipe = load_recipe(edited)
    recipe.files.append(name)
    recipe.save(edited)
    with Hub(TOKEN) as hub:
        done = push(hub, edited, "me/edited", home=tmp_path / "home")
        assert hub.state.repositories == {}
    assert done.returncode == 1
    assert "which its recipe lists" in done.stderr


def test_repository_is_public_only_on_request(edited, tmp_path):
    with Hub(TOKEN) as hub:
        assert push(hub, edited, "me/open", "--public", home=tmp_path / "home").returncode == 0
        assert hub.state.repositories["me/open"].private is False
        hub.state.repositories["me/theirs"] = Repository(private=False)
        refused = push(hub, edited, "me/theirs", home=tmp_path / "home")
        assert refused.returncode == 1
        assert "exists and is public" in refused.stderr
        assert hub.state.repositories["me/theirs"].files == {}


@pytest.mark.parametrize(
    ("token", "words", "message"),
    [
        (None, ("me/x",), "no Hub token"),
        ("wrong", ("me/x",), "the Hub does not accept the token"),
        (TOKEN, ("no-owner",), "not of the form owner/name"),
        (TOKEN, ("me/x", "--report", "nowhere"), "no report at"),
    ],
)
def test_impossible_push_is_a_one_line_error(edited, tmp_path, token, words, message):
    with Hub(TOKEN) as hub:
        done = push(hub, edited, *words, "--no-verify", token=token, home=tmp_path / "home")
        assert hub.state.repositories == {}
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert token is None or token not in done.stderr


def test_unreachable_hub_and_foreign_report_are_one_line_errors(edited, report, tmp_path):
    hub = Hub(TOKEN)
    hub.server.server_close()
    done = push(hub, edited, "me/x", home=tmp_path / "home")
    assert done.returncode == 1
    assert "uploading to me/x failed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    file = report / "report.json"
    file.write_text(file.read_text().replace('"recipe":null', '"recipe":"0000"'))
    with Hub(TOKEN) as hub:
        refused = push(hub, edited, "me/x", "--report", report, home=tmp_path / "home")
        assert hub.state.repositories == {}
    assert "reports on a different edit" in refused.stderr


def test_model_given_by_hub_id_is_downloaded_and_on_the_card(tmp_path):
    local = store(tiny_llama(), tmp_path / "local", torch.bfloat16, shards=2)
    (local / "README.md").write_text("---\nlicense: mit\n---\n")
    (local / "pytorch_model.bin").write_bytes(b"must not be downloaded")
    save_file({"direction": torch.randn(WIDTH)}, tmp_path / "direction.safetensors")
    words = ("--direction", tmp_path / "direction.safetensors", "--layer", "2")
    with Hub(TOKEN) as hub:
        files = {str(f.relative_to(local)): f.read_bytes() for f in local.rglob("*") if f.is_file()}
        hub.state.repositories["some/model"] = Repository(False, files)
        done = command(hub, "edit", "some/model", "--out", tmp_path / "a", *words, token=TOKEN, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        missing = command(
            hub, "edit", "some/other", "--out", tmp_path / "c", *words, token=TOKEN, home=tmp_path / "home"
        )
        requests = list(hub.state.requests)
    edit(str(local), tmp_path / "b", direction=tmp_path / "direction.safetensors", layer=2)
    for file in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    assert not any("pytorch_model.bin" in request for request in requests)
    card = ModelCard((tmp_path / "a" / "README.md").read_text())
    assert (card.data.base_model, card.data.license) == ("some/model", "mit")
    assert missing.returncode == 1
    assert "no such model: 'some/other'" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


READ = """
import json, sys
from orthogonalize.data.benchmarks import ALPACA, MMLU, PILE, rows
from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data.prompts import load_prompts
print(json.dumps([rows(MMLU, None), rows(PILE, None, 3), [p.text for p in load_prompts("some/prompts", "positive")]]))
for absent in (ALPACA,):
    try:
        rows(absent, None)
    except OrthogonalizeError as error:
        print(error)
"""


def test_public_sets_are_read_in_the_formats_of_the_hub(tmp_path):
    """Shards of a named configuration, and compressed lines of which only the first are needed."""
    questions = [
        {"question": f"what is {i}", "subject": "sums", "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for i in range(7)
    ]
    texts = [{"text": f"text {i}"} for i in range(5)]
    card = "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: test\n    path: all/test-*\n---\n"
    lines = "".join(json.dumps(row) + "\n" for row in texts).encode()
    with Hub(TOKEN) as hub:
        hub.state.datasets = {
            "cais/mmlu": {
                "README.md": card.encode(),
                "all/test-00000-of-00002.parquet": parquet(questions[:4]),
                "all/test-00001-of-00002.parquet": parquet(questions[4:]),
            },
            "monology/pile-uncopyrighted": {"test.jsonl.zst": zstandard.compress(lines)},
            "some/prompts": {"train.jsonl": json.dumps({"instruction": "say hello"}).encode() + b"\n"},
        }
        done = python(hub, "-c", READ, token=TOKEN, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    read, refused = done.stdout.splitlines()
    assert json.loads(read) == [questions, texts[:3], ["say hello"]]
    assert "tatsu-lab/alpaca train cannot be read" in refused


def test_local_copies_in_every_format_give_the_same_rows(tmp_path):
    questions = [
        {"question": f"what is {i}", "subject": "sums", "choices": ["a", "b"], "answer": i % 2} for i in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in questions).encode()
    copies = {
        "shards": {
            "all/test-00000-of-00002.parquet": parquet(questions[:2]),
            "all/test-00001-of-00002.parquet": parquet(questions[2:]),
        },
        "below data": {"data/test-00000-of-00001.parquet": parquet(questions)},
        "compressed": {"all/test.jsonl.zst": zstandard.compress(lines)},
        "lines": {"all/test.jsonl": lines},
        "list": {"test.json": json.dumps(questions).encode()},
    }
    for name, files in copies.items():
        for file, content in files.items():
            place = tmp_path / name / "cais/mmlu" / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        assert rows(MMLU, tmp_path / name) == questions, name
    cut = tmp_path / "compressed" / "cais/mmlu/all/test.jsonl.zst"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(OrthogonalizeError, match=r"test\.jsonl\.zst .*download it again"):
        rows(MMLU, tmp_path / "compressed")
