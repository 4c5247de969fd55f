"""Commands killed at random moments: no half result, no leftovers that grow, and the same bytes in the end.

`make test` kills each command a few times, `make prove` two hundred times.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat import bake_prompts, store_chatting
from helpers.command_line import SMALL
from helpers.hub_server import Hub
from helpers.killing import Killed, Warm, contents, moments, warm_process
from helpers.llama import WIDTH

from orthogonalize.commands.edit import edit
from orthogonalize.commands.extract import extract

TOKEN = "hf_loopback"
MOST_LEFT = 4  # entries beside an output: its lock, its journal, one partial folder, and one that is being removed
SETTINGS = replace(SMALL, chat_template=False)  # templates are rendered in a process of their own, which starts slowly


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, a direction, a run and an edited checkpoint."""
    root = tmp_path_factory.mktemp("kills")
    store_chatting(root / "model")
    torch.save(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), root / "direction.pt")
    for side, prompts in zip(("positive", "negative"), bake_prompts(), strict=True):
        (root / f"{side}.txt").write_text("\n".join(prompts))
    extract(root / "model", root / "run", positive=str(root / "positive.txt"), negative=str(root / "negative.txt"),
            settings=SETTINGS)  # fmt: skip
    edit(root / "model", root / "edited", direction=root / "direction.pt", scope="all")
    return root


def job(inputs: Path, command: str, out: Path | str) -> dict[str, Any]:
    """A command as `helpers.killing` runs it."""
    words: list[Any]
    match command:
        case "edit":
            words, options = [inputs / "model", out], {"direction": inputs / "direction.pt", "scope": "all"}
        case "cache":
            words = [inputs / "model"]
            options = {"cache": out, "direction": inputs / "direction.pt", "scope": "all"}
        case "extract":
            settings = {name: value for name, value in asdict(SETTINGS).items() if name != "engine_options"}
            sides = {side: str(inputs / f"{side}.txt") for side in ("positive", "negative")}
            words, options = [inputs / "model", out], sides | settings
        case "eval":
            words = [inputs / "edited", str(inputs / "model"), inputs / "run", out]
            options = {"engine": "hf", "suites": ["refusal", "behaviour", "kl"], "max_new_tokens": 12}
        case _:
            words, options = [inputs / "edited", out], {}
    name = "edit" if command == "cache" else command
    return {"command": name, "words": [str(word) for word in words], "options": options}


def kill_many(
    process: Warm, work: dict[str, Any], result: Callable[[], object | None], clear: Callable[[], None], place: Path,
    count: int,
) -> Killed:  # fmt: skip
    """Kill a command until `count` kills have hit, repeating it until it succeeds each time.

    Args:
        result: what the command made, None if there is nothing under its final name.
        clear: removes that.
        place: the folder of the output, which must not fill up with what killed runs leave.
    """
    process.warm(work)
    clear()
    longest = process.warm(work)
    expected = result()
    assert expected is not None
    clear()
    outcome = Killed()
    for moment in moments(20 * count, longest):
        status = process.run(work, kill_after=moment)
        found = result()
        assert found in (None, expected), "half a result under the final name"
        if status == 0:
            outcome.finished += 1
            assert found == expected, "the same command gave something else"
        else:
            assert status == -signal.SIGKILL, f"it failed by itself: {status}"
            outcome.kills += 1
            outcome.left.append(sum(1 for _ in place.iterdir()))
            assert outcome.left[-1] <= MOST_LEFT, sorted(entry.name for entry in place.iterdir())
        if found is not None:  # complete, if perhaps killed just after; the next run begins anew
            clear()
        if outcome.kills == count:
            break
    assert outcome.kills == count
    assert process.fresh(work) == 0
    assert result() == expected
    assert [entry.name for entry in place.iterdir() if "partial" in entry.name] == []
    print(f"\n{work['command']}: {outcome.kills} kills, {outcome.finished} runs to the end, of {longest:.2f} s")
    return outcome


def kill_local(command: str, inputs: Path, tmp_path: Path, count: int) -> None:
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with warm_process(TMPDIR=str(temporary)) as process:
        kill_many(
            process, job(inputs, command, out),
            lambda: final(command, out), lambda: shutil.rmtree(out, ignore_errors=True), place, count,
        )  # fmt: skip
    assert list(temporary.iterdir()) == []


def final(command: str, out: Path) -> dict[str, bytes] | None:
    """What an output folder holds; nothing for a run that is unfinished, as its own record says."""
    if not out.is_dir():
        return None
    found = contents(out)
    unfinished = command == "extract" and b'"selection"' not in found.get("stages.json", b"")
    return None if unfinished else found


def kill_cache(inputs: Path, tmp_path: Path, count: int) -> None:
    cache = tmp_path / "hub"
    cache.mkdir()
    folder = cache / "models--me--edited"

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with warm_process(HF_HUB_CACHE=str(cache)) as process:
        work = job(inputs, "cache", "me/edited")
        kill_many(process, work, lambda: contents(folder) if folder.is_dir() else None, clear, cache, count)
    assert [entry.name for entry in (cache / ".locks").iterdir()] == []


def kill_push(inputs: Path, tmp_path: Path, count: int) -> None:
    """The server holds all of an upload or nothing of it; what a killed one staged is removed by the next."""
    place = tmp_path / "tmp"
    place.mkdir()
    with Hub(TOKEN) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "TMPDIR": str(place)}
        with warm_process(**environment, HF_HOME=str(tmp_path / "home")) as process:
            work = job(inputs, "push", "me/edited")

            def result() -> dict[str, bytes] | None:
                repository = hub.state.repositories.get("me/edited")
                return dict(repository.files) if repository is not None and repository.files else None

            kill_many(process, work, result, hub.state.repositories.clear, place, count)


KILLS = {
    "edit": lambda *arguments: kill_local("edit", *arguments),
    "extract": lambda *arguments: kill_local("extract", *arguments),
    "eval": lambda *arguments: kill_local("eval", *arguments),
    "push": kill_push,
    "cache": kill_cache,
}


@pytest.mark.parametrize("command", KILLS)
def test_killed_command_leaves_nothing_and_ends_the_same(command, inputs, tmp_path):
    KILLS[command](inputs, tmp_path, 3)


@pytest.mark.prove
@pytest.mark.parametrize("command", KILLS)
def test_command_killed_two_hundred_times_ends_the_same(command, inputs, tmp_path):
    KILLS[command](inputs, tmp_path, 200)
