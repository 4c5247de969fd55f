"""Turn the measurements of `make prove` into the table in docs/architectures.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- proof: made by make prove -->", "<!-- end of proof -->"
HEAD = (
    "| model | edits compared | weights = hooks | exact but for a length: write, read | constants: MLP, attention "
    "| vLLM: class | read whole | top-5, float32 arithmetic | top-5, bf16 | the edit moves them by |"
)


def record(folder: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Merge `measured` into proof.json and rewrite the table."""
    file = folder / "proof.json"
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for name, values in measured.items():
        known.setdefault(name, {}).update(values)
    file.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", "utf-8")
    page = folder / "architectures.md"
    text = page.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(known)}\n{END}{after}", "utf-8")


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _thousandths(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return f"{value:.0%}" if value else "-"


def _row(name: str, of: dict[str, Any]) -> str:
    served = of.get("served", {})
    failed = "error" in served
    whole = "-" if failed or not served else "yes" if not served["uninitialised"] + served["dropped"] else "**no**"
    cells = [
        name,
        str(of.get("edits", "-")),
        _small(of.get("exact")),
        f"{_percent(of.get('rescaled_write'))}, {_percent(of.get('rescaled_read'))}",
        f"{of.get('constant', '-')}, {of.get('constant_attention', '-')}",
        f"not in this build: {served['error']}" if failed else served.get("served_by", "-"),
        whole,
        _small(served.get("gap_float32")),
        _thousandths(served.get("gap_bfloat16")),
        _thousandths(served.get("moved")),
    ]
    return "| " + " | ".join(cells) + " |"


def table(known: dict[str, dict[str, Any]]) -> str:
    """The table of all measurements, one row per model."""
    ruler = "|" + "---|" * (HEAD.count("|") - 1)
    return "\n".join([HEAD, ruler, *(_row(name, of) for name, of in sorted(known.items()))])


CLASSES_BEGIN, CLASSES_END = "<!-- classes: made by make prove -->", "<!-- end of classes -->"


def record_classes(folder: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Store `measured` as classes.json and rewrite the table of classes."""
    (folder / "classes.json").write_text(json.dumps(dict(sorted(measured.items())), indent=1) + "\n", "utf-8")
    page = folder / "architectures.md"
    text = page.read_text("utf-8")
    before, _, rest = text.partition(CLASSES_BEGIN)
    _, _, after = rest.partition(CLASSES_END)
    page.write_text(f"{before}{CLASSES_BEGIN}\n{class_table(measured)}\n{CLASSES_END}{after}", "utf-8")


def class_table(measured: dict[str, dict[str, Any]]) -> str:
    """The table of all classes, one row each, after a line that counts them."""
    rows = [_class_row(name, of) for name, of in sorted(measured.items())]
    passed = sum("conditional" in of.get("gaps", {}) and "conditional" not in of["refused"] for of in measured.values())
    seconds = sum(of["seconds"] for of in measured.values())
    counts = f"{passed} of {len(measured)} classes ({passed / len(measured):.1%}) pass, in {seconds:.0f} seconds."
    head = "| class | blocks | conditional | embedding | reads | constants | seconds | what is missing |"
    return "\n".join([counts, "", head, "|" + "---|" * 8, *rows])


def _class_row(name: str, of: dict[str, Any]) -> str:
    gaps, refused = of.get("gaps", {}), of.get("refused", {})
    kinds = ("blocks", "conditional", "embed", "reads", "constants")
    cells = ["refused" if k in refused else _small(gaps.get(k)) for k in kinds]
    missing = of.get("reason") or "; ".join(dict.fromkeys(refused.values()))
    return f"| {name} | {' | '.join(cells)} | {of['seconds']:.1f} | {_without_paths(missing)} |"


def _without_paths(text: str) -> str:
    return re.sub(r"/\S*/", "", text).replace("|", "/").replace("\n", " ")[:160]
