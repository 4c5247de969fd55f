"""How far an edit moves a model's next-token distributions along the base model's own answers.

The KL is exact: over the whole vocabulary, from log-probabilities, without a smoothing constant. The cross-entropy of
the same answers is only reported: a model that merely becomes more certain of what the base would say lowers it, and so
it cannot tell whether an edit changed the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...models.activations import batches
from ...models.forward.partial import StreamCache
from ...models.forward.prefix import Prefix, read_prefix, shared_length
from ...models.logprobs import completion_logprobs, exact_kl
from ..scoring import PREFIX

BATCH = 2**26  # log-probabilities computed at a time, of the base and of the edited model each: 256 MiB in float32
CACHED = 2**27  # log-probabilities of the base kept between edits: 512 MiB; those beyond are computed again
BATCH_TOKENS = 2048  # as in `completion_logprobs`, which then takes a batch whole
FEWEST_NATS = 1e-6  # the least cross-entropy per token that float32 resolves


@dataclass(frozen=True)
class Drift:
    """What an edit did along a set of the base's own answers.

    Attributes:
        kls: per prompt, KL(base || edited) summed over its answer's tokens and divided by the mean length of all
            answers, so that their mean is `kl`.
        first_kl: mean KL at the answers' first token, in nats.
        ce_increase: relative increase of the answers' cross-entropy (0.1 is 10%).
    """

    kls: list[float]
    first_kl: float
    ce_increase: float

    @property
    def kl(self) -> float:
        """The mean KL over all tokens of the answers, in nats per token."""
        return sum(self.kls) / len(self.kls)


class DriftSums:
    """Sums over `answers` (token ids, none empty), added one by one, of which a `Drift` is made."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = answers
        self._kls, self._first_kls = [0.0] * len(answers), [0.0] * len(answers)
        self._base_loss = self._edited_loss = 0.0

    def add(self, i: int, base: torch.Tensor, edited: torch.Tensor) -> None:
        """Add answer `i` by its log-probabilities [tokens, vocabulary]."""
        target = torch.tensor(self.answers[i], device=edited.device)[:, None]
        self.add_measured(i, exact_kl(base, edited), base.gather(-1, target), edited.gather(-1, target))

    def add_measured(self, i: int, kl: torch.Tensor, base: torch.Tensor, edited: torch.Tensor) -> None:
        """Add answer `i` by the KL at each of its tokens, and the log-probabilities of these."""
        self._kls[i], self._first_kls[i] = kl.sum().item(), kl[0].item()
        self._base_loss -= base.sum().item()
        self._edited_loss -= edited.sum().item()

    @property
    def drift(self) -> Drift:
        """The result, once all answers were added."""
        count, tokens = len(self.answers), sum(map(len, self.answers))
        return Drift(
            kls=[kl * count / tokens for kl in self._kls],
            first_kl=sum(self._first_kls) / count,
            ce_increase=self._edited_loss / max(self._base_loss, FEWEST_NATS * tokens) - 1,
        )


@dataclass
class AnsweredPrompts:
    """The base model's own answers to some prompts, along which edited models are compared with it.

    Attributes:
        model: the base model, without hooks.
        prompts, answers: token ids; no answer is empty.
        cached: the number of the base's log-probabilities to keep between edits.
        layer: the block at which the model starts under edits that spare its input.
    """

    model: Any
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    cached: int = CACHED
    layer: int = 0

    def __post_init__(self) -> None:
        self._streams = StreamCache(self.model, self.layer)
        self._kept: dict[int, dict[int, torch.Tensor]] = {}  # by batch, then by prompt; on the CPU

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Indices of the prompts in batches whose log-probabilities fit into `BATCH`."""
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = [[*p, *a] for p, a in zip(self.prompts, self.answers, strict=True)]
        return list(batches(rows, tokens=min(BATCH_TOKENS, max(1, BATCH // vocabulary))))

    @cached_property
    def _shared(self) -> int:
        """How many tokens of all prompts are computed once for an edit."""
        return shared_length(self.model, self.prompts)

    def _prefix(self) -> Prefix:
        """These tokens in the model as it is now."""
        return read_prefix(self.model, self.prompts[0][: self._shared])

    @cached_property
    def _base_prefix(self) -> Prefix:
        with self._streams.recording(PREFIX):
            return self._prefix()

    def _logprobs(self, group: Sequence[int], prefix: Prefix) -> dict[int, torch.Tensor]:
        """Log-probabilities [tokens, vocabulary] of the model as it is now, by prompt."""
        found = completion_logprobs(
            self.model, [self.prompts[i] for i in group], [self.answers[i] for i in group], prefix=prefix
        )
        return {group[n]: logprobs for n, logprobs in found}

    def _base(self, number: int) -> dict[int, torch.Tensor]:
        """The base's log-probabilities of one batch; the first batches are kept as long as there is room."""
        if number in self._kept:
            return self._kept[number]
        prefix = self._base_prefix
        with self._streams.recording(number):
            found = self._logprobs(self._groups[number], prefix)
        held = sum(rows.numel() for kept in self._kept.values() for rows in kept.values())
        if held + sum(rows.numel() for rows in found.values()) <= self.cached:
            self._kept[number] = {i: rows.cpu() for i, rows in found.items()}
        return found

    @torch.inference_mode()
    def drift(self, edited: Callable[[], AbstractContextManager[Any]], spared: bool = False) -> Drift:
        """Compare the model as `edited()` makes it with the base.

        A batch at a time, the model runs without and then within the context. `spared`: whether the edit leaves the
        input of block `layer` as it is.
        """
        sums = DriftSums(self.answers)
        assert self._base_prefix is not None  # from which its stream is recorded
        with self._streams.resumed(PREFIX) if spared else nullcontext(), edited():
            prefix = self._prefix()
        for number, group in enumerate(self._groups):
            base = self._base(number)
            with self._streams.resumed(number) if spared else nullcontext(), edited():
                found = self._logprobs(group, prefix)
            for i, q in found.items():
                sums.add(i, base[i].to(q.device), q)
        return sums.drift
