"""Chat templates: turn instructions into token ids, rendering and tokenizing once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..core.errors import OrthogonalizeError, first_line, shown
from .template_process import TemplateError, render
from .thoughts import Thinking, has_thought, mark_of, open_thought, switches_of
from .tokenization import encode_open_ended, encode_rendered

# Instructions without a common suffix, so that what their renderings share at the end comes from the template.
_PROBES = ("Name a colour", "7 + 5 =", "Why?", "translate: bonjour\nto English")

_REJECTS = "the chat template rejects this prompt"

# Arguments of `apply_chat_template` itself, which is not called.
_NOT_FOR_TEMPLATES = frozenset(
    {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "chat_template",
     "add_generation_prompt", "continue_final_message"}
)  # fmt: skip


def chat_ids(tokenizer: Any, chats: Sequence[Any], arguments: Mapping[str, Any], rejects: str) -> list[list[int]]:
    """Token ids of each of `chats` (lists of messages), up to where the answer begins.

    The template is rendered in a process of its own (see `template_process`). The rendered text is tokenized without
    adding special tokens, so a BOS that the template writes is not doubled.

    Args:
        arguments: passed to the chat template.
        rejects: how the error message begins, such as "the chat template rejects this prompt".

    Raises:
        OrthogonalizeError: the template rejects a chat, fails, or exceeds a limit.
    """
    if not chats:
        return []
    taken = sorted(_NOT_FOR_TEMPLATES & arguments.keys())
    if taken:
        raise OrthogonalizeError(f"{rejects}: {taken[0]} is an argument of transformers, and none of templates")
    if _renders_itself(tokenizer):
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        try:
            rows = [list(tokenizer.apply_chat_template(chat, **options, **arguments)) for chat in chats]
        except Exception as error:  # whatever the model's files make the library raise
            raise OrthogonalizeError(f"{rejects}: {first_line(error)}") from error
    else:
        rows = encode_rendered(tokenizer, _rendered(tokenizer, chats, arguments, rejects))
    if not all(rows):
        raise OrthogonalizeError(f"{rejects}: the tokenizer has no token for what it writes")
    return rows


def _rendered(tokenizer: Any, chats: Sequence[Any], arguments: Mapping[str, Any], rejects: str) -> list[str]:
    """Each of `chats` as the text that the tokenizer's template writes (see `chat_ids`)."""
    try:
        return render(tokenizer.get_chat_template(), chats, {**tokenizer.special_tokens_map, **arguments})
    except (TemplateError, TypeError, ValueError) as error:
        raise OrthogonalizeError(f"{rejects}: {shown(error)}") from error


def _renders_itself(tokenizer: Any) -> bool:
    """Whether the tokenizer's class has code of its own in place of a Jinja template (Mistral's)."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is not PreTrainedTokenizerBase.apply_chat_template


@dataclass(frozen=True)
class ChatFormat:
    """How instructions are presented to a model.

    Attributes:
        tokenizer: the model's tokenizer.
        system: an optional system prompt.
        arguments: passed to the chat template (such as `enable_thinking`).
        templated: if False, the bare text is sent, with the tokenizer's special tokens.
        thinking: what becomes of a thought before the answer. `off` turns it off by the template's own argument, or
            closes it where the template still opens one; `skip` makes every answer begin after an empty thought;
            `keep` leaves prompts as the template writes them.
    """

    tokenizer: Any
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    templated: bool = True
    thinking: Thinking = "keep"

    def __post_init__(self) -> None:
        if self.templated and not self.tokenizer.chat_template:
            raise OrthogonalizeError("the model has no chat template; use --no-chat-template to send the bare prompts")

    def encode(self, instruction: str) -> list[int]:
        """Token ids of the full prompt, up to where the model's answer begins.

        Raises:
            OrthogonalizeError: the chat template rejects the prompt.
        """
        return self.encode_all([instruction])[0]

    def encode_all(self, instructions: Sequence[str]) -> list[list[int]]:
        """`encode` for several instructions."""
        if not self.templated:
            return encode_open_ended(self.tokenizer, instructions)
        return [[*ids, *self._after_thought] for ids in self._rendered(instructions)]

    def encode_turns(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's next answer begins.

        Args:
            turns: messages of `role` (user and assistant in turn, a user's first and last) and `content`. Without a
                template, they follow each other as lines of text.

        Raises:
            OrthogonalizeError: the chat template rejects them.
        """
        if not self.templated:
            return encode_open_ended(self.tokenizer, ["\n".join(turn["content"] for turn in turns)])[0]
        arguments = self._switches | dict(self.arguments)
        ids = chat_ids(self.tokenizer, [[*self._system, *map(dict, turns)]], arguments, _REJECTS)[0]
        return [*ids, *self._after_thought]

    def _rendered(self, instructions: Sequence[str]) -> list[list[int]]:
        """What the template itself makes of instructions."""
        arguments = self._switches | dict(self.arguments)
        return chat_ids(self.tokenizer, [self._chat(each) for each in instructions], arguments, _REJECTS)

    def _chat(self, instruction: str) -> list[dict[str, str]]:
        return [*self._system, {"role": "user", "content": instruction}]

    @property
    def _system(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def check_template(self) -> None:
        """Reject a template that silently drops text; one that loops over a message's parts finds none in a text.

        Raises:
            OrthogonalizeError: it leaves out the instruction or the system prompt.
        """
        if not self.templated or _renders_itself(self.tokenizer):
            return
        chat, arguments = self._chat(_PROBES[0]), self._switches | dict(self.arguments)
        text, without = (_rendered(self.tokenizer, [each], arguments, _REJECTS)[0] for each in (chat, chat[-1:]))
        failure = None
        if _PROBES[0] not in text:
            failure = "instruction out of what it writes; use --no-chat-template to send the bare prompts"
        elif chat[1:] and text == without:
            failure = "system prompt out of what it writes; omit --system"
        if failure is not None:
            raise OrthogonalizeError(f"the chat template leaves the {failure}, or give the model another template")

    @cached_property
    def _switches(self) -> dict[str, bool]:
        """The template's arguments that turn thoughts off, unless they are given."""
        if self.thinking != "off" or _renders_itself(self.tokenizer):
            return {}
        found = switches_of(self.tokenizer.get_chat_template())
        return {name: value for name, value in found.items() if name not in self.arguments}

    @cached_property
    def _after_thought(self) -> list[int]:
        """The tokens that close a thought after every rendered prompt, or that stand for an empty one."""
        if self.thinking == "keep":
            return []
        end = self.tokenizer.decode(_common_end(self._rendered(_PROBES)))
        mark, text = open_thought(end), ""
        if mark is not None:
            text = mark.close.lstrip("\n") if end.endswith("\n") else mark.close
        elif self.thinking == "skip" and not has_thought(end):
            mark = mark_of(self.tokenizer)
            text = mark.empty if mark is not None else ""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def thought_closed(self) -> str | None:
        """How the prompts are kept from beginning a thought, in words; None if nothing had to be done."""
        if not self.templated:
            return None
        if self._after_thought:
            return f"prompts end with {self.tokenizer.decode(self._after_thought)!r}, so that answers follow no thought"
        if self._switches and has_thought(str(self.tokenizer.get_chat_template())):
            return f"the chat template is given {', '.join(f'{name}=false' for name in self._switches)}"
        return None

    def post_instruction_tokens(self) -> list[int]:
        """The token ids that follow every instruction, found by rendering; [] without a template."""
        return _common_end(self.encode_all(_PROBES)) if self.templated else []

    def positions(self) -> list[int]:
        """Post-instruction positions, counted from the end: [-5, …, -1]; at least the last token."""
        return list(range(-max(1, len(self.post_instruction_tokens())), 0))


def _common_end(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows end with."""
    shared: list[int] = []
    for column in zip(*(reversed(ids) for ids in rows), strict=False):
        if len(set(column)) > 1:
            break
        shared.insert(0, column[0])
    return shared
