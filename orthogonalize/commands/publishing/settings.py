"""What `push` is asked for, and what the Hub's refusals mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ...core.errors import OrthogonalizeError
from ...models.names import HUB_ID

Gate = Literal["auto", "manual"]
LONGEST_NAME = 200  # characters of a title or concept


def check_repository(name: str, what: str = "repository") -> None:
    """Check that `name` can be that of a repository on the Hub.

    Raises:
        OrthogonalizeError: it cannot; the message begins with `what`.
    """
    if not re.fullmatch(HUB_ID, name):
        raise OrthogonalizeError(f"{what} {name!r} is not of the form owner/name")


@dataclass(frozen=True)
class PushSettings:
    """How to publish a checkpoint.

    Attributes:
        public: make the repository public. Otherwise it is created private, and a public one is refused.
        report: a folder written by `eval`, which is included in the card and uploaded.
        dry_run: list the files and their sizes, and send nothing.
        gated: who may download: `auto` lets everybody who accepts the terms, `manual` those whom you approve.
        branch: upload to this branch, which is created if it does not exist.
        create_pr: open a pull request on an existing repository instead of changing it.
        message: the commit's message.
        recipe_only: upload recipe, card and report alone; `edit --recipe OWNER/NAME` rebuilds the checkpoint.
        base_model: the base's name on the Hub, for a base that is a local folder.
        title: the card's title; default: the base's name.
        concept: what the edit is about, for the card; default: the run's.
        verify: verify a checkpoint that was not verified yet, and refuse one that was not found to be what its recipe
            says.
    """

    public: bool = False
    report: Path | str | None = None
    dry_run: bool = False
    gated: Gate | None = None
    branch: str | None = None
    create_pr: bool = False
    message: str | None = None
    recipe_only: bool = False
    base_model: str | None = None
    title: str | None = None
    concept: str | None = None
    verify: bool = True

    def check(self, repository: str) -> None:
        """Reject settings that do not fit each other or `repository`.

        Raises:
            OrthogonalizeError: the message says which.
        """
        check_repository(repository)
        if self.base_model is not None:
            check_repository(self.base_model, "--base-model")
        if self.create_pr and (self.branch or self.gated):
            given = "--branch" if self.branch else "--gated"
            raise OrthogonalizeError(f"--create-pr changes no settings and has a branch of its own; leave out {given}")
        if self.gated not in (None, "auto", "manual"):
            raise OrthogonalizeError(f"--gated {self.gated!r} is neither auto nor manual")
        for option in ("title", "concept", "message"):
            text = getattr(self, option)
            if text is not None and not 0 < len(text.strip()) <= LONGEST_NAME:
                raise OrthogonalizeError(f"--{option} is empty or longer than {LONGEST_NAME} characters")


SETTINGS = frozenset(each.name for each in fields(PushSettings))
