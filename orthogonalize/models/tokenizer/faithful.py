"""The tokenizer of a model, checked against its tokenizer.json.

For some names of classes, transformers builds a tokenizer of its own from the vocabulary in tokenizer.json, with
another normalizer, pre-tokenizer or decoder than the file's: a byte-level vocabulary read by `LlamaTokenizer` loses
every space. A few such models are repaired by their ids on the Hub, but not where they are read from a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.settings_files import TOKENIZER_FILES, check_tokenizer_files, read_json
from ...core.errors import OrthogonalizeError, shown
from ...core.foreign import explained
from ...core.progress import note
from ...core.temporary_folders import temporary_folder

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is
NO_TOKENIZER = "fetch its tokenizer files again, or update transformers and tokenizers"
# Texts in which pre-tokenizers, normalizers and decoders differ: spaces, newlines, digits, cases, signs and scripts.
PROBES = (
    "hello world a list",
    " two  spaces   three\tand a tab ",
    "lines\n\nand\r\nmore\n   indented\n",
    "In 2024, 1234567 x 3.14 = 12,345.678 or 0x1F",
    "it's don't WE'LL they'VE camelCase snake_case",
    "f(x[0], y)!= {z}; // https://a.b/c?d=e&f#g @h <i>",
    "naïve café Ａ ﬁ e\u0301 ½ № ™",  # noqa: RUF001
    "你好，世界。日本語の文章です 한국어 문장",  # noqa: RUF001
    "Привет мир Γειά σου שלום مرحبا नमस्ते ไทย",  # noqa: RUF001
    "🙂👩‍👩‍👧 \u200bzero\u00a0width",
)


@dataclass(frozen=True)
class Difference:
    """A class that reads some text in another way than tokenizer.json: its name, and the first such text."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"the class {self.name} reads {shown(self.text, 40)!r} differently than tokenizer.json"


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> tuple[Any, Difference | None]:
    """The tokenizer, and in what the class that the folder names differs from tokenizer.json, if it does.

    Raises:
        OrthogonalizeError: there is none that can be used.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_tokenizer_files(folder)
    with explained(f"{folder} has no usable tokenizer", NO_TOKENIZER):
        named = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        _check_knows_words(named, folder)
        text = _differs(named, folder)
        if text is None:
            return named, None
        plain = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        still = _differs(plain, folder)
        if still is not None:
            raise OrthogonalizeError(
                f"transformers reads {shown(still, 40)!r} differently than {folder / TOKENIZER} with every class; "
                "update transformers and tokenizers"
            )
        return plain, Difference(type(named).__name__, text)


def _check_knows_words(tokenizer: Any, folder: Path) -> None:
    """Check that a tokenizer has a vocabulary: transformers builds some classes even where their files are missing.

    Raises:
        OrthogonalizeError: its only tokens are special ones.
    """
    if len(tokenizer) <= len(getattr(tokenizer, "added_tokens_decoder", ())):
        raise OrthogonalizeError(f"{folder} has no usable tokenizer: no file holds its vocabulary; {NO_TOKENIZER}")


def _differs(tokenizer: Any, folder: Path) -> str | None:
    """The first of `PROBES` that a tokenizer encodes or decodes in another way than tokenizer.json says."""
    file = folder / TOKENIZER
    if not file.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(file))
    raw.no_truncation()
    raw.no_padding()
    for text in PROBES:
        ids = raw.encode(text, add_special_tokens=False).ids
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            return text
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != raw.decode(ids, skip_special_tokens=False):
            return text
    return None


@dataclass(frozen=True)
class MendedSettings:
    """A tokenizer_config.json whose class does what tokenizer.json says, in place of one whose class does not."""

    settings: dict[str, Any]
    instead_of: Difference

    def text(self) -> str:
        """What the file holds."""
        return json.dumps(self.settings, ensure_ascii=False, indent=2) + "\n"


def mended_settings(folder: Path) -> MendedSettings | None:
    """The settings with which tokenizer.json is taken as it is; None where the folder's own do so.

    A folder whose tokenizer cannot be loaded is left as it is.
    """
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        _, other = read_tokenizer(folder)
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    except OrthogonalizeError:
        return None
    return None if other is None else MendedSettings({**settings, "tokenizer_class": PLAIN_CLASS}, other)


def check_written(folder: Path) -> None:
    """Say so where transformers overrules the class of a mended copy, as it does for some model types."""
    if mended_settings(folder) is not None:
        note(
            f"transformers overrules the tokenizer class of {folder.name} by the model's type, and reads some texts "
            f"differently than its tokenizer.json; load it with {PLAIN_CLASS}.from_pretrained"
        )


@contextmanager
def faithful_folder(folder: Path) -> Iterator[Path]:
    """A folder from which libraries load the tokenizer that tokenizer.json says: `folder`, or a temporary one."""
    mended = mended_settings(folder)
    if mended is None:
        yield folder
        return
    with temporary_folder() as own:
        for name in (*TOKENIZER_FILES, "chat_template.jinja"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, own / name)
        (own / SETTINGS).write_text(mended.text(), "utf-8")
        (own / "config.json").write_text("{}")  # for some model types, transformers overrules the class
        yield own
