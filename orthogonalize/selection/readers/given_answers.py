"""The model's own answers, generated elsewhere: a streamed model generates none."""

from __future__ import annotations

from pathlib import Path

from ...core.errors import OrthogonalizeError
from ...core.files import fingerprint
from ...data.chat import ChatFormat
from ...data.rows import read_rows


def read_answers(file: Path, chat: ChatFormat) -> dict[str, list[int]]:
    """The answers in a file of rows with `prompt` and `answer`, as token ids, by the fingerprint of the prompt's ids.

    Raises:
        OrthogonalizeError: the file cannot be read, or a row is not of that form.
    """
    try:
        rows = list(read_rows(file))
    except ValueError as error:
        raise OrthogonalizeError(f"{file} cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
            raise OrthogonalizeError(f"{file}: row {number} does not have a `prompt` and an `answer`, both text")
    prompts = chat.encode_all([row["prompt"] for row in rows])
    answers = [chat.tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in rows]
    return {fingerprint(list(ids)): list(answer) for ids, answer in zip(prompts, answers, strict=True)}
