"""A word tokenizer with a chat template, tiny models that use it, and two contrasting prompt sets."""

from __future__ import annotations

from pathlib import Path

import torch

from .llama import store, tiny_llama

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[answer] :{% endif %}"
)


WORDS = """colour = Why? English how do i bake roast fry a the paint wash fold cake pie soup
wall car shirt please today now sorry sure""".split()  # noqa: SIM905


def tiny_tokenizer(template: str | None = TEMPLATE):
    """A word tokenizer that, like many real ones, prepends a BOS to every input."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[user]", "[system]", "[end]", "[answer]", ":"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def choosing_tokenizer():
    """The same tokenizer, with the words of multiple-choice prompts."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["A", "B", "C", "D", "Answer:", "Question:", "A.", "B.", "C.", "D.", "Q:", "A:"])
    return tokenizer


def store_choosing(folder: Path, **overrides) -> Path:
    """A tiny random float32 Llama, with the vocabulary and context length that multiple choice needs."""
    tiny = tiny_llama(tie_word_embeddings=True, max_position_embeddings=512, **overrides)
    choosing_tokenizer().save_pretrained(store(tiny, folder, torch.float32))
    return folder


def store_chatting(folder: Path) -> Path:
    """A tiny random float32 Llama with a tokenizer and a chat template."""
    tiny_tokenizer().save_pretrained(store(tiny_llama(tie_word_embeddings=True), folder, torch.float32))
    return folder


def bake_prompts() -> tuple[list[str], list[str]]:
    """Two sets of 24 prompts that differ in one respect: cooking and housework."""

    def sentences(verbs: str, things: str) -> list[str]:
        endings = ("please", "today", "now")
        return [f"how do i {v} a {t} {e}" for v in verbs.split() for t in things.split() for e in endings][:24]

    return sentences("bake roast fry", "cake pie soup"), sentences("paint wash fold", "wall car shirt")
