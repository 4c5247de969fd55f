"""The options of `push`, cut connections and the Hub's refusals, against a loopback server."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers.hub_server import CHUNKS_TOKEN, Hub, Repository, command
from helpers.llama import WIDTH, store, tiny_llama
from helpers.made_up import report
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from orthogonalize.commands.edit import edit
from orthogonalize.edits.recipe import load_recipe

TOKEN = "hf_loopbacktokenthatmustnotbeprinted"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, a checkpoint and an adapter edited from it, and a home for the commands."""
    place = tmp_path_factory.mktemp("hidden-place")
    base = store(tiny_llama(), place / "base", torch.bfloat16, shards=2)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n")
    save_file({"direction": torch.randn(WIDTH)}, place / "direction.safetensors")
    direction = {"direction": place / "direction.safetensors", "layer": 2}
    edit(str(base), place / "edited", **direction)
    edit(str(base), place / "adapter", format="lora", scope="layers:0-1", **direction)
    return place


def push(hub: Hub, folder: Path, *words: str | Path, verify: bool = False, xet: bool = False):
    """`orthogonalize push`; without `verify`, as it is, which saves loading models."""
    more = () if verify else ("--no-verify",)
    return command(hub, "push", *words, *more, token=TOKEN, home=folder / "home", xet=xet)


def one_line(done) -> str:
    assert done.returncode == 1, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return lines[0]


def test_dry_run_lists_files_and_sizes_and_sends_nothing(folder):
    with Hub(TOKEN) as hub:
        done = command(hub, "push", folder / "edited", "me/x", "--dry-run", token=None, home=folder / "home")
        assert hub.state.requests == []
    assert done.returncode == 0, done.stderr
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in done.stdout.splitlines()}
    recipe = load_recipe(folder / "edited")
    assert sizes.keys() == {*recipe.weights, *recipe.files, "README.md", "orthogonalize.json"}
    assert all(sizes[name] == (folder / "edited" / name).stat().st_size for name in recipe.weights)


CUTS = ["POST /api/repos/create", "GET /api/models/me/x", "POST /api/models/me/x/preupload", "PUT /blob/",
        "POST /api/models/me/x/commit"]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_connection_is_taken_up_again(folder, cut):
    with Hub(TOKEN) as hub:
        hub.state.cuts = [cut]
        done = push(hub, folder, folder / "edited", "me/x")
        assert done.returncode == 0, done.stderr
        assert hub.state.cuts == [], "the connection was not cut"
        pushed = hub.state.repositories["me/x"].files
        blobs = [request for request in hub.state.requests if request.startswith("PUT /blob/")]
    recipe = load_recipe(folder / "edited")
    assert {name: pushed[name] for name in recipe.weights} == {
        name: (folder / "edited" / name).read_bytes() for name in recipe.weights
    }
    assert len(blobs) == len(recipe.weights) + cut.startswith("PUT"), "what the Hub has was sent again"


def test_chunked_storage_gets_the_weights_whatever_is_cut(folder):
    """As far as it can be spoken here: chunks and what is said of them are taken, and not put together again."""
    with Hub(TOKEN) as hub:
        hub.state.cuts = ["GET /api/models/me/x/xet-write-token", "POST /cas/v1/xorbs", "POST /cas/v1/shards"]
        done = push(hub, folder, folder / "edited", "me/x", xet=True)
        assert done.returncode == 0, done.stderr
        assert hub.state.cuts == [], "the connection was not cut"
        pushed = hub.state.repositories["me/x"].files
        said = done.stdout + done.stderr
    recipe = load_recipe(folder / "edited")
    assert {name: pushed[name].decode() for name in recipe.weights} == recipe.weights, "each by its SHA-256"
    assert hub.state.blobs == {}, "nothing went to LFS"
    assert sum(map(len, hub.state.xorbs.values())) > 0
    assert len(hub.state.shards) >= 1
    assert TOKEN not in said
    assert CHUNKS_TOKEN not in said


def test_an_upload_that_was_given_up_is_resumed_by_the_next(folder):
    with Hub(TOKEN) as hub:
        hub.state.refusals = {"POST /api/models/me/x/commit": (403, "Forbidden")}
        first = push(hub, folder, folder / "edited", "me/x")
        assert "may not write there" in one_line(first)
        sent = len(hub.state.blobs)
        assert hub.state.repositories["me/x"].files == {}, "something is visible before the commit"
        hub.state.refusals, hub.state.requests[:] = {}, []
        assert push(hub, folder, folder / "edited", "me/x").returncode == 0
        again = [request for request in hub.state.requests if request.startswith("PUT /blob/")]
    assert sent > 0
    assert again == []


@pytest.mark.parametrize(
    ("request_", "status", "said", "advice"),
    [
        ("POST /api/repos/create", 403, "You don't have the rights to create a model under me", "write access to me"),
        ("POST /api/models/me/x/commit", 403, "Private repository storage limit reached", "storage on the Hub is full"),
        ("POST /api/models/me/x/preupload", 413, "Payload too large", "larger than the Hub takes"),
        ("POST /api/models/me/x/commit", 429, "Too many requests", "wait a few minutes"),
        ("POST /api/models/me/x/commit", 409, "Conflict", "run the command again"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(folder, request_, status, said, advice):
    with Hub(TOKEN) as hub:
        hub.state.refusals = {request_: (status, said)}
        assert advice in one_line(push(hub, folder, folder / "edited", "me/x"))


def test_another_model_of_that_name_is_not_replaced(folder):
    with Hub(TOKEN) as hub:
        hub.state.repositories["me/x"] = Repository(True, {"model.safetensors": b"precious"})
        refused = one_line(push(hub, folder, folder / "edited", "me/x"))
        assert hub.state.repositories["me/x"].files == {"model.safetensors": b"precious"}
        on_branch = push(hub, folder, folder / "edited", "me/x", "--branch", "edits")
        assert on_branch.returncode == 0, on_branch.stderr
        assert hub.state.branches == ["edits"]
        assert any("/commit/edits" in request for request in hub.state.requests)
    assert "holds another model" in refused
    assert on_branch.stdout.strip().endswith("/me/x/tree/edits")


@pytest.mark.parametrize("licensed", [True, False])
def test_gate_and_message_arrive_and_no_licence_is_said(folder, licensed, tmp_path):
    gate, edited = ("manual", folder / "edited") if licensed else ("auto", tmp_path / "edited")
    if not licensed:
        shutil.copytree(folder / "edited", edited)
        (edited / "README.md").write_text("# Mine\n")
    with Hub(TOKEN) as hub:
        done = push(hub, folder, edited, "me/x", "--gated", gate, "--message", "third try")
        assert done.returncode == 0, done.stderr
        assert {"gated": gate} in hub.state.settings
        assert any(b'"summary": "third try"' in body for body in hub.state.bodies)
    assert ("names no licence" in done.stderr) == (not licensed)


def test_pull_request_leaves_the_repositorys_settings_alone(folder):
    with Hub(TOKEN) as hub:
        absent = one_line(push(hub, folder, folder / "edited", "me/x", "--create-pr"))
        hub.state.repositories["me/x"] = Repository(True)
        done = push(hub, folder, folder / "edited", "me/x", "--create-pr")
        assert (hub.state.settings, hub.state.branches) == ([], [])
    assert "there is no such repository" in absent
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/me/x/discussions/1")


def test_recipe_alone_rebuilds_the_checkpoint_bit_for_bit(folder, tmp_path):
    named = ("--base-model", "some/base", "--title", "Less <b>cooking</b>", "--concept", "cooking | baking")
    with Hub(TOKEN) as hub:
        done = push(hub, folder, folder / "edited", "me/recipe", "--recipe-only", *named)
        assert done.returncode == 0, done.stderr
        pushed = hub.state.repositories["me/recipe"].files
        words = ("edit", folder / "base", "--recipe", "me/recipe", "--out", tmp_path / "rebuilt")
        rebuilt = command(hub, *words, token=TOKEN, home=tmp_path / "home")
        assert rebuilt.returncode == 0, rebuilt.stderr
        lacking = command(
            hub, "edit", folder / "base", "--recipe", "me/nothing", "--out", tmp_path / "n", token=TOKEN,
            home=tmp_path / "home",
        )  # fmt: skip
    assert pushed.keys() == {"README.md", "orthogonalize.json"}
    for name in load_recipe(folder / "edited").weights:
        assert (tmp_path / "rebuilt" / name).read_bytes() == (folder / "edited" / name).read_bytes()
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("some/base", "finetune")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert "# Less \\<b\\>cooking\\</b\\>" in card.text
    assert "cooking \\| baking" in card.text
    assert "orthogonalize edit some/base --recipe me/recipe --out rebuilt" in card.text
    assert "no recipe at 'me/nothing'" in one_line(lacking)


def test_adapter_is_uploaded_as_itself(folder):
    with Hub(TOKEN) as hub:
        done = push(hub, folder, folder / "adapter", "me/adapter", "--base-model", "some/base")
        assert done.returncode == 0, done.stderr
        pushed = hub.state.repositories["me/adapter"].files
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md", "orthogonalize.json"}
    assert pushed.keys() == expected
    assert pushed["adapter_model.safetensors"] == (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "some/base"
    card = ModelCard(pushed["README.md"].decode())
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")


def test_nothing_sent_names_a_token_a_path_or_a_user(folder, tmp_path):
    """Not the picture and the page either, from folders full of what is nobody's business."""
    private = f"{TOKEN} {folder} /home/{getpass.getuser()}/ {socket.gethostname()}"
    for name in ("edited", "adapter"):
        shutil.copytree(folder / name, tmp_path / name)
        for each in (
            ".env",
            "notes.txt",
            "wandb/run.log",
            ".cache/token",
            ".README.md.0123.partial",
            "trainer_state.json",
        ):
            (tmp_path / name / each).parent.mkdir(exist_ok=True)
            (tmp_path / name / each).write_text(private)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(report().model_dump_json())
    (tmp_path / "report" / "report.html").write_text("<html></html>")
    with Hub(TOKEN) as hub:
        for name in ("edited", "adapter"):
            done = push(hub, folder, tmp_path / name, f"me/{name}", "--report", tmp_path / "report")
            assert done.returncode == 0, done.stderr
            assert "rates.png" in hub.state.repositories[f"me/{name}"].files
        sent = b"".join(hub.state.bodies) + b"".join(
            content for each in hub.state.repositories.values() for content in each.files.values()
        )
    host = socket.gethostname()  # one of a few letters may be anywhere
    for secret in (TOKEN, str(folder), "hidden-place", f"/{getpass.getuser()}/", *([host] if len(host) > 6 else [])):
        assert secret.encode() not in sent, secret


def test_a_password_in_the_hubs_address_is_not_printed(folder):
    with Hub("another token") as hub:
        hub.url = hub.url.replace("//", "//me:loopbackpassword@")
        refused = push(hub, folder, folder / "edited", "me/x")
    assert one_line(refused)
    assert "loopbackpassword" not in refused.stdout + refused.stderr


def test_what_is_not_what_its_recipe_says_is_not_uploaded(folder, tmp_path):
    shutil.copytree(folder / "edited", tmp_path / "edited")
    file = next(iter(load_recipe(tmp_path / "edited").weights))
    content = bytearray((tmp_path / "edited" / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / "edited" / file).write_bytes(content)
    with Hub(TOKEN) as hub:
        changed = one_line(push(hub, folder, tmp_path / "edited", "me/x", verify=True))
        written = [request for request in hub.state.requests if not request.startswith("GET ")]
        assert written == [], "the token is looked at before a verification, which can take long"
    assert "the weights are not those of its recipe" in changed


def test_a_checkpoint_is_verified_before_it_is_uploaded(folder, tmp_path):
    shutil.copytree(folder / "edited", tmp_path / "edited")
    with Hub(TOKEN) as hub:
        done = push(hub, folder, tmp_path / "edited", "me/x", verify=True)
        assert done.returncode == 0, done.stderr
        pushed = hub.state.repositories["me/x"].files
    verification = load_recipe(tmp_path / "edited").verification
    assert verification is not None
    assert verification.passed
    for card in ((tmp_path / "edited" / "README.md").read_text(), pushed["README.md"].decode()):
        assert "## Verified" in card
    recipe = load_recipe(tmp_path / "edited")
    recipe.verification = verification.model_copy(update={"passed": False})
    recipe.save(tmp_path / "edited")
    with Hub(TOKEN) as hub:
        assert "is NOT what its recipe gives" in one_line(push(hub, folder, tmp_path / "edited", "me/x", verify=True))
