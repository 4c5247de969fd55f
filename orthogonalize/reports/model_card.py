"""The model card of an edited checkpoint, written from its recipe and, if there is one, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from ..checkpoints.checkpoint import CARD, RECIPE
from ..core.files import write_atomically
from ..edits.adapter import is_adapter
from ..edits.methods.registry import METHODS
from ..edits.recipe import Recipe, load_recipe
from ..models.names import is_hub_id, public_name
from ..models.resolve import commit_of
from .schema import Report
from .tables import summary_rows
from .templating import templates

MADE_WITH = "made with orthogonalize"  # in every card from the template
LARGEST_CARD = 2**20  # bytes of a base's card that are read


def _base_metadata(base: Path) -> dict[str, Any]:
    """The licence and language that the base's own card declares."""
    file = base / CARD
    try:
        readable = file.is_file() and file.stat().st_size <= LARGEST_CARD
        metadata = metadata_load(file) if readable else None
    except Exception:  # a card whose header is not YAML, which raises many things
        metadata = None
    if not isinstance(metadata, dict):
        return {}
    kept = ("license", "license_name", "license_link", "language")
    return {key: metadata[key] for key in kept if _is_plain(metadata.get(key))}


def _is_plain(value: Any) -> bool:
    """Whether a header field is a short text or a list of them."""
    texts = value if isinstance(value, list) else [value]
    return 0 < len(texts) <= 200 and all(isinstance(each, str) and 0 < len(each) <= 200 for each in texts)


def card_text(recipe: Recipe, inherited: dict[str, Any], report: Report | None = None, adapter: bool = False) -> str:
    """The card as Markdown with its YAML header; `inherited` are header fields that the base declares.

    `adapter`: it is that of an adapter, not of a checkpoint.
    """
    if is_hub_id(recipe.base.model):
        relation = "adapter" if adapter else "finetune"
        inherited = {**inherited, "base_model": recipe.base.model, "base_model_relation": relation}
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["orthogonalize", recipe.choice.method],
        **inherited,
    )
    method = METHODS[recipe.choice.method]
    projected = method.projects and recipe.choice.strength == 1 and not method.restores_mean(recipe.choice)
    leaks = [t.leak for t in recipe.tensors if t.leak is not None and projected]
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            header=data.to_yaml(),
            recipe=recipe,
            base_name=public_name(recipe.base.model),
            leak=max(leaks) if leaks else None,
            rows=summary_rows(report) if report else [],
            report=report,
            adapter=adapter,
        )
    )


def write_card(folder: Path, recipe: Recipe, base: Path | None = None, report: Report | None = None) -> None:
    """Write README.md into the folder of a checkpoint or adapter.

    Without `base`, the licence in its current README.md is kept.
    """
    text = card_text(recipe, _base_metadata(base or folder), report, is_adapter(folder))
    write_atomically(folder / CARD, text)


def update_card(checkpoint: Path, report: Report) -> None:
    """Put the measures of `report` into the card that `edit` wrote; any other card, or none, is left as it is.

    A card in the Hub's cache, where files may be shared, is left as well.
    """
    card = checkpoint / CARD
    if commit_of(checkpoint) is not None or not (card.is_file() and (checkpoint / RECIPE).is_file()):
        return
    if MADE_WITH in card.read_text("utf-8", errors="replace"):
        write_card(checkpoint, load_recipe(checkpoint), report=report)
