"""Split one edit over several machines (`--shard I/N`): each writes a share of the weight files.

Share i of n of the checkpoint OUT is the folder OUT.share-i-of-n beside it; the folder appears only when complete.
The process that writes the last share (on a shared disk, or after copying the others there) assembles OUT and
deletes the share folders.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.plan import CheckpointPlan
from ..checkpoints.writer import write_other_files, write_weights
from ..core.errors import OrthogonalizeError
from ..core.output_folders import FolderKind, complete_folder
from ..core.progress import Progress
from .recipe import Recipe, TensorChange, load_recipe

RECORD = "share.json"
SHARE = FolderKind(RECORD)


class Share(NamedTuple):
    """Share `number` (counted from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `i/n`.

        Raises:
            OrthogonalizeError: `text` does not have this form.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        share = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise OrthogonalizeError(f"--shard {text}: give i/n with i from 1 to n, such as 2/4")
        return share

    def folder(self, out: Path) -> Path:
        """The folder of this share of the checkpoint `out`."""
        return out.absolute().with_name(f"{out.absolute().name}.share-{self.number}-of-{self.of}")

    def all(self) -> list[Share]:
        """Every share of the same edit."""
        return [Share(number, self.of) for number in range(1, self.of + 1)]


def share_files(plan: CheckpointPlan, share: Share) -> list[str]:
    """The weight files of `share`."""
    return sorted(plan.source.files)[share.number - 1 :: share.of]


def share_bytes(plan: CheckpointPlan, share: Share, link: bool) -> int:
    """Total size of the weight files of `share` in bytes; with `link`, only of those that differ from the source's."""
    kept = plan.changed_files if link else plan.source.files.keys()
    return plan.bytes_of(name for name in share_files(plan, share) if name in kept)


def write_share(
    plan: CheckpointPlan,
    out: Path,
    share: Share,
    recipe: Recipe,
    *,
    force: bool = False,
    workers: int = 1,
    link: bool = False,
    expected: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the weight files of `share` into its folder, and `recipe` with their hashes and records."""
    names = share_files(plan, share)
    with complete_folder(share.folder(out), SHARE, force) as partial:
        done = write_weights(
            plan.source, partial, plan.changes, progress, names=names, workers=workers, link=link, expected=expected
        )
        recipe.base.weights, recipe.weights = done.source, done.result
        recipe.tensors = [TensorChange(**asdict(done.records[name])) for name in sorted(done.records)]
        (partial / RECORD).write_text(recipe.model_dump_json(indent=1) + "\n", "utf-8")


def assemble(plan: CheckpointPlan, share: Share, out: Path, partial: Path, link: bool = False) -> Recipe:
    """Assemble the checkpoint in the folder `partial` from all shares of `out`; returns the complete recipe.

    Raises:
        OrthogonalizeError: the shares belong to different edits, or a file is in none of them.
    """
    folders = [other.folder(out) for other in share.all()]
    recipes = [load_recipe(folder / RECORD) for folder in folders]
    compared = {"choice", "maps", "conditional", "arrays", "rounding", "added", "config_changes"}
    for folder, recipe in zip(folders, recipes, strict=True):
        if recipe.model_dump_json(include=compared) != recipes[0].model_dump_json(include=compared):
            raise OrthogonalizeError(f"{folder} and {folders[0]} are shares of different edits; write one again")
        if recipe.base.revision != recipes[0].base.revision:
            raise OrthogonalizeError(
                f"{folder} and {folders[0]} are shares of different revisions of {recipe.base.model}; write one again "
                "with the --revision of the other"
            )
    whole = recipes[0].model_copy(deep=True)
    for folder, recipe in zip(folders, recipes, strict=True):
        whole.base.weights |= recipe.base.weights
        whole.weights |= recipe.weights
        for name in recipe.weights:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(folder / name, partial / name)
    whole.tensors = sorted((t for recipe in recipes for t in recipe.tensors), key=lambda t: t.name)
    missing = sorted(plan.source.files.keys() - whole.weights.keys())
    if missing:
        raise OrthogonalizeError(f"no share of {out} has {missing[0]}; write all shares again with the same N")
    write_other_files(plan.source, partial, plan.additions, plan.config_changes, plan.texts, link=link)
    return whole


def _link_or_copy(file: Path, target: Path) -> None:
    """Link (or copy) a file of a share to `target`; the share keeps it until the checkpoint is complete."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def missing_shares(share: Share, out: Path) -> list[Path]:
    """The folders of the shares that do not exist yet."""
    return [folder for other in share.all() if not (folder := other.folder(out)).is_dir()]


def remove_shares(share: Share, out: Path) -> None:
    """Delete the folders of all shares, after `assemble`."""
    for other in share.all():
        shutil.rmtree(other.folder(out), ignore_errors=True)
