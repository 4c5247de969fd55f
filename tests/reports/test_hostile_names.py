"""Names of folders and fields from a base's card are text in the model card: no markup, no header, no escape."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
import torch
import yaml
from helpers.hostile_report import hostile_report
from helpers.llama import WIDTH, store, tiny_llama

from orthogonalize.commands.edit import edit
from orthogonalize.core.errors import shown
from orthogonalize.reports.pages.report_page import write_webpage
from orthogonalize.reports.templating import escape_markdown

NAMES = [
    "name\n---\nlicense: evil\n# Injected",
    "<img src=x onerror=alert(1)>",
    "a](javascript:x) `b` *c*",
    "x\x1b[31m|y",
]


def card(tmp_path, name: str, readme: str = "") -> tuple[dict, str]:
    base = store(tiny_llama(), tmp_path / name, torch.bfloat16)
    (base / "README.md").write_text(readme)
    torch.save(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), tmp_path / "direction.pt")
    edit(str(base), tmp_path / "out", direction=tmp_path / "direction.pt", scope="layers:0")
    head, _, body = (tmp_path / "out" / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), body


@pytest.mark.parametrize("name", NAMES)
def test_a_folders_name_is_text_in_the_card(name, tmp_path):
    header, body = card(tmp_path, name.replace("/", ":"))
    assert "license" not in header
    title = body.strip().splitlines()[0]
    assert title.startswith("# ")
    assert title.endswith(", edited")
    assert "\n---" not in body
    assert not any(line.startswith("# Injected") for line in body.splitlines())
    for markup in ("<img", "](", "\x1b"):
        assert markup not in body.replace("\\<", "").replace("\\]", "")


@pytest.mark.parametrize(
    "header",
    ["license: other: my licence", "license: [1, {a: b}]", "license: {a: b}", "license: 5\nlanguage: 7", "- a", "x"],
)
def test_a_base_with_a_broken_card_is_edited(header, tmp_path):
    found, body = card(tmp_path, "base", f"---\n{header}\n---\ntext")
    assert "license" not in found
    assert body


def test_a_licence_is_kept_as_one_value(tmp_path):
    readme = "---\nlicense: 'mit\n\n  tags: [evil]'\nlanguage: [en, de]\n---\n"
    found, _ = card(tmp_path, "base", readme)
    assert found["license"] == yaml.safe_load(readme.split("---")[1])["license"]
    assert found["language"] == ["en", "de"]
    assert "evil" not in found["tags"]


def test_a_page_allows_its_own_script_and_nothing_else(tmp_path):
    hostile = "</summary><script>alert(1)</script><img src=http://evil/x onerror=alert(1)> POLICY \"'"
    write_webpage(hostile_report(hostile), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    [script] = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    assert "alert" not in script
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert "img-src" not in rules
    assert page.index("Content-Security-Policy") < page.index("evil")
    assert "<img src=http" not in page
    without_values = re.sub(r'="[^"]*"', '=""', page)
    assert not re.search(r"<[^>]*\s(on\w+|style)=", without_values), "what the policy forbids, the page does not use"


@pytest.mark.parametrize("plain", ["Qwen2.5-0.5B", "my_model_v2", "llama 3 (base)", "3.1"])
def test_usual_names_stay_as_they_are(plain):
    assert escape_markdown(plain) == plain
    assert shown(plain) == plain


def test_what_is_shown_is_one_visible_line():
    assert shown("a\nb\x1b[0m\u202e\ud83d") == "a\\nb\\x1b[0m\\u202e\\ud83d"
    assert len(shown("x" * 10**7)) == 201
    assert shown("日本 ü") == "日本 ü"
