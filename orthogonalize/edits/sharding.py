"""One edit by several machines: each writes a share of the weight files, and the last puts the checkpoint together.

Share i of n of the checkpoint OUT is a folder beside it, OUT.share-i-of-n, complete when it is there. Who finishes
and finds all n of them (on a disk that the machines share, or copied together) makes OUT of them and removes them.
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
from ..checkpoints.writer import write_rest, write_weights
from ..core.errors import OrthogonalizeError
from ..core.output_folders import FolderKind, complete_folder
from ..core.progress import Progress
from .recipe import Recipe, TensorChange, load_recipe

RECORD = "share.json"
SHARE = FolderKind(RECORD)


class Share(NamedTuple):
    """Share `number` (from 1) of `of`."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `i/n`.

        Raises:
            OrthogonalizeError: it is not of that form.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        share = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= share.number <= share.of:
            raise OrthogonalizeError(f"--shard {text}: give i/n with i from 1 to n, such as 2/4")
        return share

    def folder(self, out: Path) -> Path:
        """Where this share of the checkpoint `out` is written."""
        return out.absolute().with_name(f"{out.absolute().name}.share-{self.number}-of-{self.of}")

    def all(self) -> list[Share]:
        """Every share of the same edit."""
        return [Share(number, self.of) for number in range(1, self.of + 1)]


def share_files(plan: CheckpointPlan, share: Share) -> list[str]:
    """The weight files of `share`."""
    return sorted(plan.source.files)[share.number - 1 :: share.of]


def share_bytes(plan: CheckpointPlan, share: Share, link: bool) -> int:
    """Bytes that the weight files of `share` take; with `link` those that are not the source's."""
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
    """Write the weight files of `share` into its folder, with what `recipe` gains by them."""
    names = share_files(plan, share)
    with complete_folder(share.folder(out), SHARE, force) as partial:
        done = write_weights(
            plan.source, partial, plan.changes, progress, names=names, workers=workers, link=link, expected=expected
        )
        recipe.base.weights, recipe.weights = done.source, done.result
        recipe.tensors = [TensorChange(**asdict(done.records[name])) for name in sorted(done.records)]
        (partial / RECORD).write_text(recipe.model_dump_json(indent=1) + "\n", "utf-8")


def put_together(plan: CheckpointPlan, share: Share, out: Path, partial: Path, link: bool = False) -> Recipe:
    """Fill the folder `partial` with all shares of `out`, the index and the rest; returns the whole recipe.

    Raises:
        OrthogonalizeError: the shares are not of one edit, or a file is in none.
    """
    folders = [other.folder(out) for other in share.all()]
    recipes = [load_recipe(folder / RECORD) for folder in folders]
    what = {"choice", "maps", "arrays", "rounding", "added", "config_changes"}
    for folder, recipe in zip(folders, recipes, strict=True):
        if recipe.model_dump_json(include=what) != recipes[0].model_dump_json(include=what):
            raise OrthogonalizeError(f"{folder} is a share of another edit than {folders[0]}; write it again")
    whole = recipes[0].model_copy(deep=True)
    for folder, recipe in zip(folders, recipes, strict=True):
        whole.base.weights |= recipe.base.weights
        whole.weights |= recipe.weights
        for name in recipe.weights:
            _move(folder / name, partial / name)
    whole.tensors = sorted((t for recipe in recipes for t in recipe.tensors), key=lambda t: t.name)
    missing = sorted(plan.source.files.keys() - whole.weights.keys())
    if missing:
        raise OrthogonalizeError(f"no share of {out} has {missing[0]}; write the shares again, all of the same number")
    write_rest(plan.source, partial, plan.additions, plan.config_changes, link=link)
    return whole


def _move(file: Path, target: Path) -> None:
    """A second name for a file of a share; what it had stays until the whole is there."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def waiting_for(share: Share, out: Path) -> list[Path]:
    """The folders of the shares that are not there yet."""
    return [folder for other in share.all() if not (folder := other.folder(out)).is_dir()]


def remove_shares(share: Share, out: Path) -> None:
    """Remove the folders of all shares, once they are put together."""
    for other in share.all():
        shutil.rmtree(other.folder(out), ignore_errors=True)
