"""Pages and their Content-Security-Policy: a page's own script and style by their hashes, and nothing else."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

from ..templating import templates


def write_page(template: str, file: Path, **values: Any) -> None:
    """Render `template` with `values`, and write the page with its policy."""
    file.write_text(_sealed(templates().get_template(template).render(values)), "utf-8")


def _sealed(page: str) -> str:
    """The page with its policy; the placeholder stands before any text from outside."""
    return page.replace('content="POLICY"', f'content="{_policy(page)}"', 1)


def _policy(page: str) -> str:
    """A policy that allows the page's own script and style, and nothing from the network."""
    sources = {"style": _hashes("style", page), "script": _hashes("script", page)}
    allowed = "".join(f"; {kind}-src {' '.join(each)}" for kind, each in sources.items() if each)
    return f"default-src 'none'; base-uri 'none'; form-action 'none'{allowed}"


def _hashes(tag: str, page: str) -> list[str]:
    """The hashes of the page's `tag` elements, as a policy names them; text from outside is escaped, so has none."""
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return [f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in contents]
