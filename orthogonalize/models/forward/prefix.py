"""What many prompts begin with, such as a system prompt, is computed once: its keys and values are shared.

Under causal attention, tokens do not see what follows them, so this is exact, also within the context of an edit that
acts on every token alike. Only models whose blocks remember nothing but keys and values can share them, and each
shows first that it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...core.errors import OrthogonalizeError
from ..stream import Stream
from .logits import logits_at

FEWEST = 4  # tokens for which sharing pays
_shares: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a block, each [rows, heads, tokens, width]."""


@dataclass
class Prefix:
    """The first `tokens` of many rows, and their keys and values by block, of which there are `layers`.

    There may be several versions of them, as under edits that differ by row.
    """

    tokens: tuple[int, ...] = ()
    layers: int = 0
    pairs: dict[int, Pair] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, model: Any, tokens: Sequence[int]) -> Prefix:
        """The prefix `tokens` of `model`, still to be read; an empty one needs no reading."""
        return cls(tuple(tokens), Stream.of(model).layer_count)

    @torch.inference_mode()
    def read(self, model: Any, versions: int = 1) -> None:
        """Take the keys and values in the model as it is now, of the blocks that run now."""
        if self.tokens:
            padded = torch.tensor([list(self.tokens)], device=model.device).expand(versions, -1)
            Stream.of(model).decoder(input_ids=padded, past_key_values=_cache(self, None), use_cache=True)

    def before(self, count: int) -> dict[str, Any]:
        """Arguments of a forward pass over what follows the prefix in `count` rows for each version.

        Rows of the same version are next to each other. What the pass adds is not kept.
        """
        return {"past_key_values": _cache(self, count), "use_cache": True} if self.tokens else {"use_cache": False}


def read_prefix(model: Any, tokens: Sequence[int], versions: int = 1) -> Prefix:
    """The `tokens` that rows begin with, read in the model as it is now."""
    found = Prefix.of(model, tokens)
    found.read(model, versions)
    return found


def shared_length(model: Any, ids: Sequence[Sequence[int]], own: int = 1) -> int:
    """How many tokens all rows of `ids` begin with and share; 0 if the model cannot, or it would not pay.

    `own`: how many tokens every row has for itself.
    """
    if len(ids) < 2:
        return 0
    first, last = min(map(list, ids)), max(map(list, ids))  # all others begin with what these have in common
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    common = min(common, min(map(len, ids)) - own)
    return common if common >= FEWEST and _can_share(model, ids[0], common) else 0


def _can_share(model: Any, row: Sequence[int], length: int) -> bool:
    """Whether `model` gives the same logits with and without a shared prefix, tried once on `row`."""
    if model not in _shares:
        _shares[model] = _keeps_pairs(model) and _agrees(model, row, length)
    return _shares[model]


def _keeps_pairs(model: Any) -> bool:
    """Whether every block of `model` keeps keys and values for later tokens, and nothing else.

    Of a model that no file describes, such as a judge, that is not known.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    try:
        stream = Stream.of(model)
        assert stream.decoder is not None
    except OrthogonalizeError:
        return False
    layers = DynamicCache(config=stream.decoder.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    every = not stream.architecture.images_attended  # without an image, some blocks do not run
    return plain and every and len(layers) == stream.layer_count


@torch.inference_mode()
def _agrees(model: Any, row: Sequence[int], length: int) -> bool:
    ids = torch.tensor([list(row)], device=model.device)
    whole = logits_at(model, ids, 1, use_cache=False).float()
    after = read_prefix(model, row[:length]).before(1)
    shared = logits_at(model, ids[:, length:], 1, **after).float()
    coarsest = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))  # norms and softmax are float32
    return bool((shared - whole).abs().max() <= math.sqrt(coarsest) * whole.abs().max())


def _cache(prefix: Prefix, count: int | None) -> Any:
    """What blocks ask for the keys and values of the prefix, `count` times each; None: they come to be stored."""
    from transformers import Cache
    from transformers.cache_utils import CacheLayerMixin

    class Block(CacheLayerMixin):  # type: ignore[misc]
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        def lazy_initialization(self, *_: Any) -> None:
            """Nothing is kept."""

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Pair:
            if count is None:
                prefix.pairs[self.layer] = (keys, values)
                return keys, values
            before = prefix.pairs[self.layer]
            return _joined(before[0], keys, count), _joined(before[1], values, count)

        def get_seq_length(self) -> int:  # also of blocks that are skipped
            return 0 if count is None else len(prefix)

        def get_mask_sizes(self, queries: Any) -> tuple[int, int]:
            asked = queries if isinstance(queries, int) else len(queries)  # or their positions
            return self.get_seq_length() + asked, 0

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

    return Cache(layers=[Block(layer) for layer in range(prefix.layers)])


def _joined(first: torch.Tensor, then: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([first.repeat_interleave(count, 0), then], -2)
