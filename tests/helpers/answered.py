"""Random prompts with answers, to fit conditional edits to."""

from __future__ import annotations

import torch

from orthogonalize.edits.fitting.fit import AnsweredTokens


def answered(seed: int, count: int) -> AnsweredTokens:
    """Random prompts of 5 to 11 tokens with answers of up to 12."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(5, 12, (count,), generator=generator).tolist()
    answers = torch.randint(0, 13, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 90, (n + m,), generator=generator).tolist() for n, m in zip(prompts, answers, strict=True)]
    return AnsweredTokens(ids, prompts)
