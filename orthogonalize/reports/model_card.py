"""The model card of an edited checkpoint, written from its recipe and, if there is one, its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..checkpoints.checkpoint import CARD, RECIPE
from ..checkpoints.settings_files import read_json
from ..core.errors import OrthogonalizeError
from ..core.files import write_atomically
from ..edits.adapter import is_adapter
from ..edits.methods.registry import METHODS
from ..edits.recipe import Recipe, load_recipe
from ..models.names import is_hub_id, public_name
from ..models.resolve import commit_of
from .card_results import card_results, preserved_lines
from .runtimes import blocks_alone, runtimes
from .schema import Report
from .tables import summary_rows
from .templating import templates

CardKind = Literal["checkpoint", "adapter", "recipe"]
MADE_WITH = "made with orthogonalize"  # in every card from the template
LARGEST_CARD = 2**20  # bytes of a base's card that are read
MEASURED = re.compile(r"^## What it did\n(.*?)(?=^## )", re.DOTALL | re.MULTILINE)
LIBRARIES = {"checkpoint": "transformers", "adapter": "peft", "recipe": "orthogonalize"}


@dataclass(frozen=True)
class CardContext:
    """What a card is about besides the edit.

    Attributes:
        kind: what lies beside the card: a checkpoint, an adapter, or the recipe alone.
        repository: where it is published; None for a local folder.
        title, concept: what the model is called and what the edit is about; None takes the base's and the recipe's.
        picture: the name of an image file beside the card that shows what was measured.
    """

    kind: CardKind = "checkpoint"
    repository: str | None = None
    title: str | None = None
    concept: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class Measured:
    """What an earlier card says was measured: its section as Markdown, and the entries of its model-index."""

    section: str
    results: list[EvalResult]


def _metadata(card: Path) -> dict[str, Any]:
    """The header of a card; empty if there is none that can be read."""
    try:
        readable = card.is_file() and card.stat().st_size <= LARGEST_CARD
        metadata = metadata_load(card) if readable else None
    except Exception:  # a card whose header is not YAML, which raises many things
        metadata = None
    return metadata if isinstance(metadata, dict) else {}


def _base_metadata(base: Path) -> dict[str, Any]:
    """The licence and language that the base's own card declares."""
    metadata = _metadata(base / CARD)
    kept = ("license", "license_name", "license_link", "language")
    return {key: metadata[key] for key in kept if _is_plain(metadata.get(key))}


def declared_licence(card: Path) -> str | None:
    """The licence that a card declares, if any."""
    found = _metadata(card).get("license")
    return str(found) if _is_plain(found) else None


def _is_plain(value: Any) -> bool:
    """Whether a header field is a short text or a list of them."""
    texts = value if isinstance(value, list) else [value]
    return 0 < len(texts) <= 200 and all(isinstance(each, str) and 0 < len(each) <= 200 for each in texts)


def card_text(
    recipe: Recipe,
    inherited: dict[str, Any],
    report: Report | None = None,
    *,
    context: CardContext | None = None,
    config: Mapping[str, Any] | None = None,
    measured: Measured | None = None,
) -> str:
    """The card as Markdown with its YAML header.

    Args:
        inherited: header fields that the base declares.
        report: what was measured; without one, what the earlier card `measured` says.
        config: the edited checkpoint's configuration, from which follows who reads it.
    """
    context = context or CardContext()
    base = public_name(recipe.base.model)
    if is_hub_id(recipe.base.model):
        relation = "adapter" if context.kind == "adapter" else "finetune"
        inherited = {**inherited, "base_model": base, "base_model_relation": relation}
    title = context.title or f"{base}, edited"
    results = card_results(report) if report else measured.results if measured else []
    data = ModelCardData(
        library_name=LIBRARIES[context.kind],
        pipeline_tag="text-generation",
        tags=["orthogonalize", recipe.choice.method],
        **({"model_name": title, "eval_results": results} if results else {}),  # type: ignore[arg-type]
        **inherited,
    )
    method = METHODS[recipe.choice.method]
    scheme = recipe.quantization.scheme if recipe.quantization else None
    projected = method.projects and recipe.choice.strength == 1 and not method.restores_mean(recipe.choice)
    leaks = [t.leak for t in recipe.tensors if t.leak is not None and projected]
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            header=data.to_yaml(),
            recipe=recipe,
            config_changes={k: v for k, v in recipe.config_changes.items() if k != "quantization_config"},
            method=method,
            context=context,
            title=title,
            concept=context.concept or recipe.source.concept,
            base_name=base,
            base_argument=base if is_hub_id(recipe.base.model) else "BASE",
            leak=max(leaks) if leaks else None,
            rows=summary_rows(report) if report else [],
            preserved=preserved_lines(report) if report else [],
            report=report,
            measured=None if report or measured is None else measured.section.strip("\n"),
            runtimes=runtimes(config, recipe.added, scheme) if config else [],
            blocks=blocks_alone(config, recipe.added) if config and scheme is None else None,
        )
    )


def write_card(
    folder: Path,
    recipe: Recipe,
    base: Path | None = None,
    report: Report | None = None,
    *,
    context: CardContext | None = None,
    measured: Measured | None = None,
) -> None:
    """Write README.md into the folder of a checkpoint or adapter.

    Without `base`, the licence in its current README.md is kept.
    """
    context = context or CardContext("adapter" if is_adapter(folder) else "checkpoint")
    config = next((read_json(each / "config.json") for each in (folder, base) if each and _has_config(each)), None)
    inherited = _base_metadata(base or folder)
    text = card_text(recipe, inherited, report, context=context, config=config, measured=measured)
    write_atomically(folder / CARD, text)


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def update_card(checkpoint: Path, report: Report | None = None) -> None:
    """Write the card that `edit` wrote again: with the measures of `report`, or else with those it has.

    Any other card, or none, is left as it is, and so is one in the Hub's cache, where files may be shared.
    """
    card = checkpoint / CARD
    if commit_of(checkpoint) is not None or not (card.is_file() and (checkpoint / RECIPE).is_file()):
        return
    text = card.read_text("utf-8", errors="replace")
    if MADE_WITH in text:
        earlier = None if report else _measured(card, text)
        write_card(checkpoint, load_recipe(checkpoint), report=report, measured=earlier)


def _measured(card: Path, text: str) -> Measured | None:
    """What the card says was measured; None if nothing was."""
    found = MEASURED.search(text)
    if found is None or "Not measured yet." in found[1]:
        return None
    try:
        index = _metadata(card).get("model-index")
        return Measured(found[1], model_index_to_eval_results(index)[1] if index else [])
    except Exception as error:  # whatever the user wrote there
        raise OrthogonalizeError(f"{card} has a model-index that cannot be read; run eval again") from error
