"""Chat templates: turn instructions into token ids, rendering and tokenizing once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from ..core.errors import OrthogonalizeError
from .tokenization import encode_open_ended

# The date given to templates that write the current one; otherwise prompts, and results, would change at midnight.
# Llama 3's own template falls back to this date.
TODAY = datetime(2024, 7, 26)

# Instructions without a common suffix, so that what their renderings share at the end comes from the template.
_PROBES = ("Name a colour", "7 + 5 =", "Why?", "translate: bonjour\nto English")


def with_fixed_date(tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` for the chat template of `tokenizer`, with a fixed date if the template writes the current one."""
    writes_date = "strftime_now" in str(tokenizer.chat_template)
    return ({"strftime_now": TODAY.strftime} if writes_date else {}) | dict(arguments)


@dataclass(frozen=True)
class ChatFormat:
    """How instructions are presented to a model.

    Attributes:
        tokenizer: the model's tokenizer.
        system: an optional system prompt.
        arguments: passed to the chat template (such as `enable_thinking`).
        templated: if False, the bare text is sent, with the tokenizer's special tokens.
    """

    tokenizer: Any
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    templated: bool = True

    def __post_init__(self) -> None:
        if self.templated and not self.tokenizer.chat_template:
            raise OrthogonalizeError("the model has no chat template; use --no-chat-template to send the bare prompts")

    def encode(self, instruction: str) -> list[int]:
        """Token ids of the full prompt, up to where the model's answer begins.

        The rendered text is tokenized without adding special tokens, so a BOS that the template writes is not
        doubled.

        Raises:
            OrthogonalizeError: the chat template rejects the prompt.
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
            raise OrthogonalizeError(f"the chat template rejects this prompt: {error}") from error
        return list(ids)

    def encode_all(self, instructions: Sequence[str]) -> list[list[int]]:
        """`encode` for several instructions."""
        return [self.encode(instruction) for instruction in instructions]

    def post_instruction_tokens(self) -> list[int]:
        """The token ids that the template appends to every instruction, found by rendering; [] without a template."""
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
