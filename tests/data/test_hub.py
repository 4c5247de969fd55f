"""Data on the Hub where that cannot be reached: an answer at once, or what is stored."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants

from orthogonalize.core.errors import OrthogonalizeError
from orthogonalize.data import benchmarks, hub
from orthogonalize.data.prompts import load_prompts


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a server that takes connections, to which the Hub's client is pointed; no proxy."""
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield SimpleNamespace(address=address, close=server.close)


def settings() -> list[bool]:
    return [constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE]


def test_a_host_is_reachable_if_it_takes_connections(endpoint):
    assert hub.is_reachable(endpoint.address)
    endpoint.close()
    assert not hub.is_reachable(endpoint.address)
    assert not hub.is_reachable("https://host.invalid")


def test_a_proxy_is_trusted_to_reach_the_hub(endpoint, monkeypatch):
    endpoint.close()
    monkeypatch.setattr(hub, "getproxies", lambda: {"http": "http://proxy.invalid:3128"})
    assert hub.is_reachable(endpoint.address)


def test_libraries_are_offline_only_where_the_hub_is_unreachable(endpoint, monkeypatch):
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with hub.offline_if_unreachable():
        assert settings() == [False, False]
    endpoint.close()
    with hub.offline_if_unreachable():
        assert settings() == [True, True]
    assert settings() == [False, False]


def test_who_is_offline_by_choice_stays_so(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.offline_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE


def test_an_unreachable_hub_is_not_tried_again_and_again(endpoint, monkeypatch):
    endpoint.close()
    asked = []
    monkeypatch.setattr("time.sleep", lambda seconds: asked.append(seconds))
    with pytest.raises(OrthogonalizeError, match=r"cais/mmlu .* cannot be read: .*; check the network"):
        benchmarks.rows(benchmarks.MMLU, None, 1)
    with pytest.raises(OrthogonalizeError, match=r"dataset 'owner/name' \(split 'train'\) cannot be read: "):
        load_prompts("owner/name")
    assert asked == [], "no library waits to try again"
