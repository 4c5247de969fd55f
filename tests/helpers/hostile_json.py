"""Hypothesis strategies of files that somebody broke on purpose: valid JSON with one place changed, and worse."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep@"  # stands for lists nested 100,000 deep, which no JSON library writes
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 7, 255, 2**31, -(2**31), 2**53 + 1, 10**20, -0.5, 1e308, float("nan"), float("inf")]
)
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "\x1b[31m", "a\nb", "\ud800", "../../x", "/etc/passwd", "owner/name", "x" * 100_000, DEEP,
     "layers:0-9999999999", "{{ 1 // 0 }}", "NaN", "write", "embed", "attn:0", "layers:0", "F32", "I8", "BF16", "fp8"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Damage:
    """What happens to a file: `action` at the place that `path` leads to (indices, taken modulo what is there)."""

    action: str
    path: list[int] = field(default_factory=list)
    value: Any = None
    at: int = 0

    def of(self, content: bytes) -> bytes:
        """The damaged content of a file of JSON, or of lines of JSON."""
        if self.action == "cut":
            return content[: self.at % (len(content) + 1)]
        if self.action == "bytes":
            at = self.at % (len(content) + 1)
            return content[:at] + bytes([self.at % 256]) * (1 + self.at % 5) + content[at + self.at % 3 :]
        try:
            return _as_bytes(self._changed(json.loads(content)))
        except ValueError:
            lines = content.splitlines() or [b""]
            number = self.at % len(lines)
            try:
                lines[number] = _as_bytes(self._changed(json.loads(lines[number])))
            except ValueError:
                lines[number] = _as_bytes(self.value)
            return b"\n".join(lines) + b"\n"

    def _changed(self, document: Any) -> Any:
        if self.action == "whole":
            return self.value
        root = [copy.deepcopy(document)]
        parent: Any = root
        key: Any = 0
        for step in self.path:
            inner = parent[key]
            keys = (
                list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
            )
            if not keys:
                break
            parent, key = inner, keys[step % len(keys)]
        match self.action:
            case "delete" if parent is not root:
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[str(self.value)[:50]] = self.value
            case "repeat" if isinstance(parent, list) and parent is not root:
                parent.append(parent[key])
            case "retype":
                parent[key] = [parent[key]] if self.at % 2 else {"a": parent[key]}
            case "stringify":
                parent[key] = str(parent[key])
            case _:
                parent[key] = self.value
        return root[0]


def _as_bytes(document: Any) -> bytes:
    text = json.dumps(document).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode()


ACTIONS = ["delete", "delete", "add", "repeat", "retype", "stringify", "whole", "cut", "bytes"]
DAMAGES = st.builds(
    Damage,
    action=st.sampled_from(["replace"] * 8 + ACTIONS),
    path=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    value=VALUES,
    at=st.integers(0, 10**6),
)  # fmt: skip
