"""Describe a model that no file describes, by experiments on a small random twin on which the result is proven."""

from __future__ import annotations

import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from ...architectures.schema import Architecture, families, parse, remember
from ...checkpoints.checkpoint import Checkpoint
from ...core.errors import OrthogonalizeError, first_line, shown
from ...core.files import check_text, fingerprint, write_atomically
from ...core.progress import note
from ...core.temporary_folders import temporary_folder
from ...models.describe.draft import draft_with_twin, refusals
from ...models.describe.twin import save_twin
from ...models.loading import load_config
from ...models.resolve import cache_folder
from ...models.sites import Sites
from ..recipe import Recipe
from .proof import Proof, prove

WORDS = {
    "embed": "its embedding",
    "reads": "what is read (scope from:)",
    "constants": "constants in blocks",
    "conditional": "conditional edits",
}


def learn(source: Checkpoint, description: Path | str | None = None) -> None:
    """See to it that `architecture_of` knows the model of `source`, in this process.

    A `description`, the name of a TOML file, counts more than what is shipped; a model that neither describes is
    described by experiment, unless the cache holds what an earlier experiment on the same model found.

    Raises:
        OrthogonalizeError: the description is wrong; or no experiment can describe the model. The message says why.
    """
    remember(source.config, None)
    if description is not None:
        remember(source.config, _given(source, Path(description)))
    elif source.config.get("model_type") not in families() and isinstance(source.config.get("model_type"), str):
        remember(source.config, _found(source))


def learn_from(recipe: Recipe, source: Checkpoint) -> None:
    """As `learn`, with the description that an edit of `source` was made by, if its recipe holds one."""
    if recipe.description is None:
        learn(source)
    else:
        remember(source.config, recipe.description)


def _given(source: Checkpoint, file: Path) -> Architecture:
    """The architecture that the user's `file` describes, proven on a twin."""
    check_text(file)
    try:
        architecture = parse(file.read_text("utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise OrthogonalizeError(f"cannot read the description {file}: {first_line(error)}") from error
    if architecture is None or source.config.get("model_type") not in architecture.model_types:
        raise OrthogonalizeError(
            f"{file} does not describe models of type {shown(repr(source.config.get('model_type')), 60)}"
        )
    Sites(architecture, source.config, source.tensors).check_complete()
    with temporary_folder() as twin:
        save_twin(load_config(source.path).get_text_config(), twin)
        proof = prove(architecture, twin)
    note(f"description: {file}, {_shown(proof)}")
    return architecture.model_copy(update={"refused": proof.refused})


def _found(source: Checkpoint) -> Architecture:
    """The architecture that experiments find, or found earlier."""
    model_type = str(source.config["model_type"])
    file = cache_folder() / "descriptions" / f"{_key(source)}.toml"
    if file.is_file():
        architecture = parse(file.read_text("utf-8"), str(file))
        if architecture is not None:
            note(f"{shown(model_type, 60)}: described by an earlier experiment ({file})")
            return architecture
    started = time.monotonic()
    text, proof = describe_by_experiment(source)
    took = time.monotonic() - started
    architecture = parse(text, "the description")
    assert architecture is not None
    with suppress(OSError):  # without a cache, the next command repeats the experiments
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    note(f"{shown(model_type, 60)}: described by experiments on a small random model in {took:.0f} s, {_shown(proof)}")
    return architecture


def describe_by_experiment(source: Checkpoint) -> tuple[str, Proof]:
    """The description of the model of `source` as TOML, and its proof.

    Raises:
        OrthogonalizeError: the experiments cannot describe it, or the description cannot be proven.
    """
    try:
        with temporary_folder() as twin:
            drafted = draft_with_twin(source, twin)
            proof = prove(drafted.architecture, twin)
    except OrthogonalizeError as error:
        raise OrthogonalizeError(
            f"architecture {shown(repr(source.config.get('model_type')), 60)} is not supported: no file describes it, "
            f"and experiments on a small random model cannot: {error}. `orthogonalize describe MODEL` drafts a file, "
            "which --description takes"
        ) from error
    return drafted.text.partition("\n[refused]\n")[0] + refusals(proof.refused), proof


def _shown(proof: Proof) -> str:
    exact = f"hooks = weights to {max(gap for kind, gap in proof.gaps.items() if kind not in proof.refused):.0e}"
    without = ", ".join(WORDS[kind] for kind in proof.refused)
    return f"{exact}; refused: {without}" if without else exact


def _key(source: Checkpoint) -> str:
    """What a description depends on: the configuration, the tensors' names and shapes, and the libraries."""
    shapes = {name: list(info.shape) for name, info in source.tensors.items()}
    versions = {name: version(name) for name in ("orthogonalize", "transformers", "torch")}
    return fingerprint([source.config, shapes, versions])[:32]
