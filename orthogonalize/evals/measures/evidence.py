"""What a behaviour measure is fitted to: the train and val prompts, and what the unedited model does with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ...core.errors import OrthogonalizeError
from ...core.journal import Journal
from ...core.progress import track
from ...data.chat import ChatFormat
from ...data.prompts import PreservedPrompt, Prompt, Side, Split
from ...data.refusals import LEAST_TOKENS
from ...data.thoughts import answer_texts, opener_tokens, special_tokens
from ...data.tokenization import encode_rendered
from ...selection.readers.base import Reader
from ...selection.readouts import Outputs, read_layers

THOUGHTFUL = 0.1  # probability that answers to one side begin with a thought, from which the user is told


class Evidence:
    """The train and val prompts of a run (spare ones included), and what the unedited model does with them.

    Nothing is computed before it is asked for. The answers to `preserved` prompts will be asked of the reader later.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Any,
        chat: ChatFormat,
        prompts: Sequence[Prompt],
        journal: Journal,
        given: Sequence[int | str] = (),
        preserved: Sequence[PreservedPrompt] = (),
    ) -> None:
        self.reader, self.tokenizer, self.prompts, self.journal = reader, tokenizer, prompts, journal
        self.ids = chat.encode_all([p.text for p in prompts])
        self.later = chat.encode_all([p.text for p in preserved if p.split != "test"])
        self.given_tokens = [_token(reader.vocabulary, tokenizer, each) for each in given]

    def rows(self, side: Side, split: Split | None = None) -> list[int]:
        """The places of a side's prompts: those of one split, or of train and val."""
        splits = ("train", "val") if split is None else (split,)
        return [i for i, p in enumerate(self.prompts) if p.side == side and p.split in splits]

    @property
    def structural_tokens(self) -> list[int]:
        """The tokens that are part of no answer: special ones and those that mark thoughts."""
        size = self.outputs.probabilities.shape[-1]
        return [token for token in special_tokens(self.tokenizer) if token < size]

    @cached_property
    def outputs(self) -> Outputs:
        """The first-token probabilities of every prompt, and the streams at which a direction is read, in one pass.

        Raises:
            OrthogonalizeError: they contain NaN or infinite values.
        """
        return self.reader.outputs(self.ids, read_layers(self.reader.layer_count), self.later)

    @property
    def streams(self) -> dict[int, torch.Tensor]:
        """The streams [prompts, d] at the last token of every prompt, by the layers at which a direction is read."""
        return dict(self.outputs.streams)

    @property
    def generates(self) -> bool:
        """Whether there are whole answers."""
        return self.reader.generates

    def answers(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        """The prompts in `rows` with the model's greedy answers, without their thoughts.

        Raises:
            OrthogonalizeError: the model is streamed, and generates none.
        """
        if not self.generates:
            raise OrthogonalizeError(
                f"--engine {self.reader.name} generates no answers; use --measure first-token, or --engine hf"
            )
        missing = [i for i in rows if f"answer:{i}" not in self.journal]
        if missing:
            with track("answering", len(missing), "prompts") as advance:
                found = self.reader.answers([self.ids[i] for i in missing], LEAST_TOKENS, advance)
            texts = answer_texts(self.tokenizer, found)
            self.journal.put({f"answer:{i}": text for i, text in zip(missing, texts, strict=True)})
        return [(self.prompts[i].text, self.journal[f"answer:{i}"]) for i in rows]

    def thought_hint(self) -> str:
        """What to do about answers that begin with a thought, as the end of a sentence; "" if few do."""
        openers = opener_tokens(self.tokenizer)
        begun = self.outputs.probabilities[:, openers].sum(-1)
        share = max(begun[self.rows(side)].mean().item() for side in ("positive", "negative"))
        if share < THOUGHTFUL:
            return ""
        return (
            f"; up to {100 * share:.0f}% of answers begin with a thought, whose opener is no token of the behaviour: "
            "close it with --thinking skip or --template-argument enable_thinking=false"
        )


def _token(vocabulary: int, tokenizer: Any, token: int | str) -> int:
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise OrthogonalizeError(f"behaviour token {token} is not in the model's vocabulary")
        return token
    [ids] = encode_rendered(tokenizer, [token])
    if len(ids) != 1:
        raise OrthogonalizeError(
            f"behaviour token {token!r} is {len(ids)} tokens in this model's vocabulary; it must be one"
        )
    return int(ids[0])
