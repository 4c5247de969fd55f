"""The behaviour of a contrast: what shows it (the run's measure), and which prompts show or lack it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..core.errors import OrthogonalizeError
from ..core.files import write_atomically
from ..data.prompts import MINIMUM_TRAIN, Prompt
from .readouts import FirstToken, NearerSide, Readout

FIRST_TOKEN: Final = "first-token"
DIRECTION: Final = "direction"
READOUT = "readout.safetensors"  # of a run whose edits are tried by direction
ReadoutName = Literal["first-token", "direction"]


class MeasureInfo(BaseModel):
    """A run's behaviour measure, as stored in `run.json`.

    Attributes:
        name: the value of `--measure`, such as `first-token` or `judge:wildguard`.
        trials: the readout by which edits are tried: the measure itself, or what stands in for one of answers.
        threshold: the log-odds from which first tokens show the behaviour.
        phrases: what `wording` looks for.
        shares: the share of train prompts that show the behaviour in the unedited model, by side.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = FIRST_TOKEN
    trials: ReadoutName = FIRST_TOKEN
    threshold: float = 0.0
    phrases: list[str] = Field(default_factory=list)
    shares: dict[str, float] = Field(default_factory=dict)

    @property
    def separation(self) -> float:
        """The share of positive train prompts that show the behaviour, less that of negative ones."""
        return self.shares["positive"] - self.shares["negative"]

    @property
    def reads_answers(self) -> bool:
        """Whether it needs generated answers, and not only a forward pass."""
        return self.name not in (FIRST_TOKEN, DIRECTION)

    @property
    def public_name(self) -> str:
        """Its name for what is published: without the address, model or folder that only this machine knows."""
        kind, colon, argument = self.name.partition(":")
        if kind == "judge":
            argument = re.split("[=:]", argument, maxsplit=1)[0]
        elif kind == "python":
            argument = argument.rpartition("/")[2]
        return f"{kind}{colon}{argument}"

    def describe(self, words: Sequence[str] = ()) -> str:
        """What shows the behaviour; `words` are its first tokens."""
        kind, _, argument = self.public_name.partition(":")
        if kind == FIRST_TOKEN:
            said = f"answers that begin with {' or '.join(map(repr, words))}"
            return said + (f", at log-odds above {self.threshold:.1f}" if self.threshold else "")
        if kind == DIRECTION:
            return "prompts whose activations are nearer to the positive side's"
        if kind == "wording":
            more = f" (and {len(self.phrases) - 3} more)" if len(self.phrases) > 3 else ""
            return f"answers that contain {' or '.join(map(repr, self.phrases[:3]))}{more}"
        return f"answers that {argument} says show it" if kind == "judge" else f"answers by {argument}"


class Found(BaseModel):
    """What stage `prompts` of an extraction finds: the run's measure, its tokens, and what was filtered, by side."""

    model_config = ConfigDict(extra="forbid")

    behaviour_tokens: list[int]
    behaviour_words: list[str]
    filtered: dict[str, dict[str, int]]
    measure: MeasureInfo = Field(default_factory=MeasureInfo)


def keep_expected(prompts: list[Prompt], filtered: bool) -> tuple[list[Prompt], dict[str, dict[str, int]]]:
    """Keep the train and val prompts on which the model behaves as expected of their side, and count them.

    Raises:
        OrthogonalizeError: too few are left.
    """
    kept = prompts
    if filtered:
        kept = [p for p in prompts if p.split == "test" or p.shows is (p.side == "positive")]
    counts: dict[str, dict[str, int]] = {}
    for side in dict.fromkeys(p.side for p in prompts):
        for split in ("train", "val"):
            left = sum((p.side, p.split) == (side, split) for p in kept)
            given = sum((p.side, p.split) == (side, split) for p in prompts)
            counts.setdefault(side, {})[split] = left
            needed = MINIMUM_TRAIN if split == "train" else 1
            if left < needed:
                verb = "shows" if side == "positive" else "lacks"
                raise OrthogonalizeError(
                    f"the model {verb} the behaviour on {left} of {given} {side} {split} prompts, but at least "
                    f"{needed} are needed; use other prompts, another --measure, --behaviour-tokens or --no-filter"
                )
    return kept, counts


def save_readout(readout: Readout, folder: Path) -> None:
    """Store what `load_readout` needs besides `run.json`."""
    file = folder / READOUT
    if not isinstance(readout, NearerSide):
        file.unlink(missing_ok=True)
        return
    tensors = {
        "positive": readout.positive,
        "negative": readout.negative,
        "middle_and_scale": torch.tensor([readout.middle, readout.scale], dtype=torch.float64),
        "layers": torch.tensor(readout.layers),
    }
    write_atomically(file, save(tensors))  # `save_file` would give it mode 0600, whatever the umask


def load_readout(info: MeasureInfo, tokens: Sequence[int], folder: Path) -> Readout:
    """The readout by which a run's edits are tried.

    Raises:
        OrthogonalizeError: its file is missing or damaged.
    """
    if info.trials == FIRST_TOKEN:
        return FirstToken(tuple(tokens), info.threshold)
    file = folder / READOUT
    try:
        with safe_open(file, framework="pt") as stored:
            held = {name: stored.get_tensor(name) for name in ("positive", "negative", "middle_and_scale", "layers")}
    except (OSError, SafetensorError, ValueError) as error:
        raise OrthogonalizeError(f"{file} is missing or damaged; extract again with --stage prompts --force") from error
    middle, scale = held["middle_and_scale"].tolist()
    return NearerSide(tuple(held["layers"].tolist()), held["positive"], held["negative"], middle, scale)
