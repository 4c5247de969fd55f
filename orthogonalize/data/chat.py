"""From an instruction to token ids: the chat template is rendered once and tokenised once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from ..core.errors import OrthogonalizeError
from .tokenization import encode_open_ended

# What templates that write the current date are told it is: prompts, and what was measured of them, would change at
# midnight. It is the date that Llama 3's own template falls back to.
TODAY = datetime(2024, 7, 26)

# Different in every token, so that what the renderings share at the end is the template's own.
_PROBES = ("Name a colour", "7 + 5 =", "Why?", "translate: bonjour\nto English")


def with_fixed_date(tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` of the chat template of `tokenizer`, and a date that stays where it writes one."""
    writes = "strftime_now" in str(tokenizer.chat_template)
    return ({"strftime_now": TODAY.strftime} if writes else {}) | dict(arguments)


@dataclass(frozen=True)
class ChatFormat:
    """How instructions are put to a model.

    `system` is an optional system prompt, `arguments` are passed to the chat template (such as
    `enable_thinking`); `templated=False` sends the bare text, with the tokenizer's special tokens.
    """

    tokenizer: Any
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    templated: bool = True

    def __post_init__(self) -> None:
        if self.templated and not self.tokenizer.chat_template:
            raise OrthogonalizeError("the model has no chat template; --no-chat-template sends the bare prompts")

    def encode(self, instruction: str) -> list[int]:
        """Token ids of the whole prompt, up to where the model's answer begins.

        The template's text is tokenised without adding special tokens again, so a BOS that the
        template writes is never doubled.
        """
        if not self.templated:
            return encode_open_ended(self.tokenizer, [instruction])[0]
        messages = [{"role": "user", "content": instruction}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            ids = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **with_fixed_date(self.tokenizer, self.arguments),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise OrthogonalizeError(f"the chat template does not take this prompt: {error}") from error
        return list(ids)

    def encode_all(self, instructions: Sequence[str]) -> list[list[int]]:
        """`encode` for many."""
        return [self.encode(instruction) for instruction in instructions]

    def post_instruction_tokens(self) -> list[int]:
        """The ids that the template appends after the instruction, found by rendering.

        Without a template, the last token of a prompt is the only such position; [] stands for it.
        """
        if not self.templated:
            return []
        rendered = self.encode_all(_PROBES)
        shared: list[int] = []
        for column in zip(*(reversed(ids) for ids in rendered), strict=False):
            if len(set(column)) > 1:
                break
            shared.insert(0, column[0])
        return shared

    def positions(self) -> list[int]:
        """Post-instruction positions, counted from the end: [-5, …, -1]; at least the last token."""
        return list(range(-max(1, len(self.post_instruction_tokens())), 0))
