"""`doctor`: what it finds, what it advises, and what it never shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import command
from helpers.hub_server import Hub
from helpers.hub_server import command as against

from orthogonalize.commands import doctor as room

TOKEN = "hf_loopbacktokenthatmustnotbeprinted"


def states(found) -> dict[str, str]:
    return {each.name: each.state for each in found}


def test_what_is_missing_or_short_is_said_with_what_to_do(monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 2**30)
    monkeypatch.setattr(room, "_version", lambda package: None)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**30})())
    found = room.doctor(network=False)
    assert states(found)["memory"] == states(found)["disk here"] == "limited"
    assert states(found)["vLLM"] == "missing"
    assert all(each.advice for each in found if each.state != "fine")
    assert "Hub" not in states(found)


def test_json_holds_the_same_findings_as_the_table(monkeypatch):
    status, said = command("doctor", "--no-network", "--json")
    assert status == 0
    assert [each["name"] for each in json.loads(said)] == list(states(room.doctor(network=False)))
    status, table = command("doctor", "--no-network")
    assert status == 0
    assert all(each["name"] in table for each in json.loads(said))


@pytest.mark.parametrize(
    ("token", "expected"),
    [(TOKEN, "reachable, and it accepts the token"), ("hf_wrong", "reachable, but it does not accept the token")],
)
def test_token_is_tried_and_never_shown(token, expected, tmp_path):
    with Hub(TOKEN) as hub:
        done = against(hub, "doctor", "--json", token=token, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["Hub"]["found"] == expected
    assert found["Hub token"]["found"] == "set"
    assert token not in done.stdout + done.stderr


def test_unreachable_hub_is_a_finding_and_no_failure(tmp_path):
    hub = Hub(TOKEN)
    hub.server.server_close()
    done = against(hub, "doctor", "--json", token=None, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["Hub"]["state"] == "limited"
    assert str(Path.home()) not in done.stdout
