"""The behaviour of a contrast: its first tokens, the score of each prompt, and the prompts that show or lack it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..core.errors import OrthogonalizeError
from ..data.chat import ChatFormat
from ..data.prompts import MINIMUM_TRAIN, SIDES, PreservedPrompt, Prompt
from .reader import Reader
from .scoring import behaviour_score, learn_behaviour_tokens


def measure_behaviour(
    reader: Reader,
    tokenizer: Any,
    chat: ChatFormat,
    prompts: list[Prompt],
    given: Sequence[int | str],
    preserved: Sequence[PreservedPrompt] = (),
) -> tuple[list[int], list[Prompt]]:
    """The behaviour tokens, `given` or else learnt on train and val prompts, and `prompts` with scores.

    Test prompts get no score. The answers to `preserved` will be asked for later.
    """
    used = [i for i, p in enumerate(prompts) if p.split != "test"]
    ids = chat.encode_all([prompts[i].text for i in used])
    later = chat.encode_all([p.text for p in preserved if p.split != "test"])
    probabilities = reader.first_token_probabilities(ids, later)
    if given:
        tokens = [_token(reader.vocabulary, tokenizer, t) for t in given]
    else:
        rows = {side: [n for n, i in enumerate(used) if prompts[i].side == side and prompts[i].split != "spare"]
                for side in SIDES}  # fmt: skip
        tokens = learn_behaviour_tokens(probabilities[rows["positive"]], probabilities[rows["negative"]])
    scored = list(prompts)
    for i, score in zip(used, behaviour_score(probabilities, tokens).tolist(), strict=True):
        scored[i] = replace(prompts[i], score=score)
    return tokens, scored


def keep_expected(prompts: list[Prompt], filtered: bool) -> tuple[list[Prompt], dict[str, dict[str, int]]]:
    """Keep the train and val prompts on which the model behaves as expected of their side, and count them.

    Raises:
        OrthogonalizeError: too few are left.
    """
    kept = prompts
    if filtered:
        kept = [p for p in prompts if p.score is None or (p.score > 0) == (p.side == "positive")]
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
                    f"{needed} are needed; use other prompts, --behaviour-tokens or --no-filter"
                )
    return kept, counts


def _token(vocabulary: int, tokenizer: Any, token: int | str) -> int:
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise OrthogonalizeError(f"behaviour token {token} is not in the model's vocabulary")
        return token
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise OrthogonalizeError(
            f"behaviour token {token!r} is {len(ids)} tokens in this model's vocabulary; it must be one"
        )
    return int(ids[0])
