"""Ask a judge behind an endpoint; an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ...core.files import fingerprint
from ...core.journal import Journal
from ...core.progress import note
from ...data.answer_forms import words
from ...engines.base import EngineOptions
from ...engines.endpoint import Endpoint, EndpointClient
from .base import EndpointJudge, Judgement

PORTION = 64  # answers that are stored at a time
PROBE = ("What is baked here?", "A loaf of bread.")
EMPTY = Judgement(harmful=False, refusal=False, evasion=True)  # nobody needs to be asked


@dataclass(frozen=True)
class ReadyEndpoint:
    """A judge whose server has answered."""

    judge: EndpointJudge
    endpoint: Endpoint

    @classmethod
    def of(cls, judge: EndpointJudge, address: str) -> ReadyEndpoint:
        """The judge at `URL#MODEL`, which is asked once, before anything is measured.

        Raises:
            OrthogonalizeError: it does not answer.
        """
        with EndpointClient(Endpoint.parse(address)) as client:
            client.answer(judge.chat(*PROBE), judge.new_tokens)
            note(f"judge {judge.name}: prompts and answers are sent to {client.endpoint.url} ({client.endpoint.model})")
            return cls(judge, client.endpoint)

    @property
    def model(self) -> str:
        """What the server calls its model; its address is nobody else's business."""
        return self.endpoint.model

    def step(self, pairs: Sequence[tuple[str, str]], engine: str, options: EngineOptions) -> str:
        """The journal step of the judgements of `pairs`, whatever the engine of the measured models is."""
        state = fingerprint([self.endpoint.url, self.endpoint.model, self.judge.template, pairs])
        return f"judge/{self.judge.name}={fingerprint(self.endpoint.model)[:8]}@{state[:16]}"

    def ask(
        self, pairs: Sequence[tuple[str, str]], engine: str, options: EngineOptions, journal: Journal
    ) -> list[Judgement]:
        """The judgement of every (prompt, response), stored in `journal` portion by portion."""
        step = self.step(pairs, engine, options)

        def all_of_them() -> list[Judgement]:
            found: list[Judgement] = []
            with EndpointClient(self.endpoint) as client:
                for first in range(0, len(pairs), PORTION):
                    work = partial(self._portion, client, pairs[first : first + PORTION])
                    found += [Judgement(*row) for row in journal.step(f"{step}/{first}", work)]
            return found

        return [Judgement(*row) for row in journal.step(step, all_of_them)]

    def _portion(self, client: EndpointClient, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        asked = [i for i, (_, response) in enumerate(pairs) if words(response)]
        chats = [self.judge.chat(*pairs[i]) for i in asked]
        replies = client.answers(chats, self.judge.new_tokens, f"asking {self.judge.name}")
        found = [EMPTY] * len(pairs)
        for i, reply in zip(asked, replies, strict=True):
            found[i] = Judgement() if reply is None else self.judge.read(reply)
        rejected = sum(reply is None for reply in replies)
        if rejected:
            note(
                f"judge {self.judge.name}: the server rejects {rejected} answers (too long, or filtered); skipping them"
            )
        return found
