"""Every call that loads something with transformers says what becomes of code in a model's files."""

from __future__ import annotations

import ast
from pathlib import Path

import orthogonalize

PACKAGE = Path(orthogonalize.__file__).parent
LOADERS = ("from_pretrained", "from_config")
# Classes that are known when the call is made, and that are given no folder: `from_pretrained(None, ...)`.
MEMORY = "None"


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of the package that loads something with transformers, and where it is."""
    return [
        (f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}", node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS
    ]


def test_every_loader_says_what_becomes_of_remote_code():
    silent = [
        where
        for where, call in calls()
        if not any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
        and not (call.args and ast.unparse(call.args[0]) == MEMORY)
        and ast.unparse(call.func) != "PeftModel.from_pretrained"  # of an adapter that ships with this package
    ]
    assert silent == []


def test_only_extract_hands_on_that_code_is_trusted():
    """Everywhere else it is False."""
    trusting = {
        where.partition(":")[0]
        for where, call in calls()
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
    }
    expected = {"models/loading.py", "models/tokenizer/faithful.py"}
    assert trusting == expected, "whose functions have it off by default, or are given it by those"
