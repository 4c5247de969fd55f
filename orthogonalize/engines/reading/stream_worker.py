"""Reads and edits the residual stream inside a vLLM worker, with hooks on the blocks of its own model.

The engine must run eagerly and without a prefix cache. Only the tokens that are wanted are kept, by their absolute
positions, until they are stored or measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...core.errors import OrthogonalizeError
from ...core.interventions import AffineMap
from .outputs import OutputStore
from .served_stream import NORM_ARGUMENTS, ServedStream, StreamArguments, stream_of
from .step import Step, Token, Tokens, check_positions, spans_of

PLACES = "places"  # the rows and positions of stored tokens


@dataclass(frozen=True)
class BlockEdit:
    """A map on the inputs of some blocks, and without its shift on what the attention and MLPs of some blocks add."""

    map: AffineMap
    inputs: frozenset[int]
    outputs: frozenset[int] = frozenset()


def store_edits(edits: Sequence[BlockEdit], folder: Path) -> str | None:
    """Write edits to a file in `folder` for `load_edits`; None if there are none."""
    if not edits:
        return None
    tensors: dict[str, torch.Tensor] = {}
    for number, edit in enumerate(edits):
        tensors |= {f"{number}.{part}": getattr(edit.map, part) for part in "uvs"}
        tensors |= {f"{number}.{name}": torch.tensor(sorted(getattr(edit, name))) for name in ("inputs", "outputs")}
    _save(tensors, folder / "edits.safetensors")
    return str(folder / "edits.safetensors")


def load_edits(file: str | None) -> list[BlockEdit]:
    """The edits that `store_edits` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(file) if file else {}
    return [
        BlockEdit(
            AffineMap(*(tensors[f"{number}.{part}"] for part in "uvs")),
            *(frozenset(map(int, tensors[f"{number}.{name}"])) for name in ("inputs", "outputs")),
        )
        for number in range(len(tensors) // 5)
    ]


class Stored(NamedTuple):
    """A file of the streams [layers, tokens, d] at the inputs of `layers`, as one worker wrote it."""

    name: str
    layers: list[int]
    tokens: int
    width: int
    dtype: str

    def create(self, folder: Path) -> torch.Tensor:
        """A new file as a tensor to be written.

        Raises:
            OSError: the disk is full.
        """
        with (folder / self.name).open("xb") as file:  # to write to what a full disk cannot map would kill the process
            os.posix_fallocate(file.fileno(), 0, math.prod(self._shape) * self._dtype.itemsize)
        return self._mapped(folder, shared=True)

    def open(self, folder: Path) -> torch.Tensor:
        """The file as a tensor, which outlives its name."""
        return self._mapped(folder, shared=False)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(self.layers), self.tokens, self.width

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def _mapped(self, folder: Path, shared: bool) -> torch.Tensor:
        size = math.prod(self._shape)
        return torch.from_file(str(folder / self.name), shared=shared, size=size, dtype=self._dtype).view(self._shape)


class WorkerStreams:
    """The streams of one worker's model.

    Args:
        runner: vLLM's model runner (V1).
        writes: whether this worker stores what it reads: one of each tensor-parallel group does, since the stream is
            the same in all of them.

    Raises:
        OrthogonalizeError: the class of the model has its blocks elsewhere, or calls them otherwise.
    """

    def __init__(self, runner: Any, writes: bool) -> None:
        self.runner, self.writes = runner, writes
        self.model: nn.Module = runner.get_model()
        self.stream = ServedStream.of(self.model)
        self.readers = {layer: StreamArguments.of(self.stream.block(layer)) for layer in self.stream.local_layers}
        self.step = Step([], 1)
        self.layers: frozenset[int] = frozenset()
        self.positions, self.summed = 1, True
        self._unchecked = True  # of the first pass of a reading
        self.edits: list[BlockEdit] = []
        self.taken: dict[int, list[torch.Tensor]] = {}
        self.taken_tokens: list[Token] = []
        self.outputs = OutputStore(self.model, runner.model_config.get_vocab_size())
        self._handles: list[Any] = []

    # hooks

    def begin(self, layers: list[int], positions: int, edits: list[BlockEdit], summed: bool) -> None:
        """Read, from now on, the streams at the inputs of `layers`, and edit the requests that are marked so.

        `summed`: whether the stream is the sum of the two parts that blocks take, or the first alone.
        """
        self.end()
        self.summed, self._unchecked = summed, True
        self.layers, self.positions, self.edits = frozenset(layers), positions, edits
        edited = frozenset[int]().union(*(edit.inputs for edit in edits))
        projected = frozenset[int]().union(*(edit.outputs for edit in edits))
        for layer in self.stream.local_layers:
            if layer in self.layers or layer in edited:
                self._hook_input(self.stream.block(layer), self.readers[layer], layer)
            if layer in projected:
                for module in self.stream.outputs(layer):
                    self._hook_output(module, layer)
        if self.stream.layer_count in self.layers and self.stream.has_head:
            self._hook_input(self.stream.head_norm, NORM_ARGUMENTS, self.stream.layer_count)
        self._wrap_forward()

    def end(self) -> None:
        """Remove all hooks, and drop what was not stored."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.model.__dict__.pop("forward", None)
        self.taken, self.taken_tokens = {}, []
        self.outputs.clear()

    def _wrap_forward(self) -> None:
        """Note the tokens of each pass before it, and what it puts out.

        A hook would not do: classes that vLLM may compile are called without their hooks.
        """
        forward = self.model.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            self.step = Step(spans_of(self.runner), self.positions)
            positions = kwargs.get("positions")
            if self._unchecked and self.step.spans and positions is not None:
                check_positions(self.step.spans, positions)
                self._unchecked = False
            self.taken_tokens += self.step.last.tokens
            output = forward(*args, **kwargs)
            if isinstance(output, torch.Tensor) and self.step.outputs.places:  # else of another stage
                self.outputs.add(self.step.outputs.of(output), self.step.outputs.tokens)
            return output

        self.model.__dict__["forward"] = noting

    def _hook_input(self, module: nn.Module, reader: StreamArguments, layer: int) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self.step.spans:
                return None
            given, residual = reader.parts(args, kwargs)
            hidden = self._flat(given)
            if residual is not None:
                residual = self._flat(residual)
            read = residual if self.summed else None
            if layer in self.layers and self.step.last.places:
                self.taken.setdefault(layer, []).append(self._last(hidden, read))
            edited = [(edit, tokens) for edit, tokens in self._edited() if layer in edit.inputs]
            if not edited:
                return None
            hidden = hidden.clone()  # the stream is all in `hidden` where it is edited
            read = None if read is None else read.clone()
            for edit, tokens in edited:
                new = edit.map(stream_of(tokens.of(hidden), None if read is None else tokens.of(read)))
                tokens.put(new, hidden)
                if read is not None:
                    tokens.put(torch.zeros_like(new), read)
            return reader.replaced(args, kwargs, hidden.reshape(given.shape), residual if read is None else read)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _last(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The stream at the wanted positions; a copy, since fused kernels write into both parts."""
        last = self.step.last
        return stream_of(last.of(hidden), None if residual is None else last.of(residual))

    def _edited(self) -> list[tuple[BlockEdit, Tokens]]:
        return [(self.edits[number], tokens) for number, tokens in self.step.edited.items()]

    def _hook_output(self, module: nn.Module, layer: int) -> None:
        def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            edited = [(edit, tokens) for edit, tokens in self._edited() if layer in edit.outputs]
            if not edited:
                return None
            given = output is None  # into a buffer of the caller
            hidden = kwargs["output"] if given else output[0] if isinstance(output, tuple) else output
            new = self._flat(hidden) if given else self._flat(hidden).clone()
            for edit, tokens in edited:
                tokens.put(edit.map.linear(tokens.of(new)), new)
            new = new.reshape(hidden.shape)
            return None if given else (new, *output[1:]) if isinstance(output, tuple) else new

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _flat(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as [tokens, d]; classes of transformers have a batch of one around it."""
        flat = hidden[0] if hidden.dim() == 3 and len(hidden) == 1 else hidden
        if flat.dim() == 2 and len(flat) >= self.step.count:
            return flat
        raise OrthogonalizeError(
            f"vLLM's {type(self.model).__name__} divides the tokens of a pass among its workers; "
            "use --engine stream, or another kind of parallelism"
        )

    # results

    def store(self, folder: str, rank: int) -> Stored | None:
        """Write the streams read so far to `RANK.streams` in `folder`, and forget them; None if there are none.

        Tokens are in the order of `in_order`. They go from the device straight into the mapped file.
        """
        taken, tokens = self.taken, self.taken_tokens
        self.taken, self.taken_tokens = {}, []
        if not self.writes or not taken:
            return None
        first, order = next(iter(taken.values()))[0], in_order(_places(tokens))
        stored = Stored(
            f"{rank}.streams", sorted(taken), len(order), first.shape[-1], str(first.dtype).removeprefix("torch.")
        )
        on_device = order.to(first.device)
        for mapped, layer in zip(stored.create(Path(folder)), stored.layers, strict=True):
            mapped.copy_(torch.cat(taken.pop(layer)).index_select(0, on_device))
        return stored

    def store_logits(self, folder: str) -> None:
        """Write the logits [tokens, vocabulary] of the outputs so far, in float32, and forget them."""
        tokens: list[Token] = []
        parts: list[torch.Tensor] = []
        for some, logits in self.outputs.logits():
            tokens += some
            parts.append(logits.float().cpu())
        self._store_outputs(folder, "logits", tokens, parts)

    def store_measures(self, folder: str, behaviour: list[int], keep: bool, along: bool) -> None:
        """Write what `OutputStore.measures` gives of the outputs so far, and forget them."""
        tokens, found = self.outputs.measures(behaviour, keep, along)
        self._store_outputs(folder, "measures", tokens, [found])

    def _store_outputs(self, folder: str, name: str, tokens: list[Token], parts: list[torch.Tensor]) -> None:
        if self.writes and tokens:
            _save({name: torch.cat(parts), PLACES: _places(tokens)}, Path(folder) / "outputs.safetensors")


def _places(tokens: list[Token]) -> torch.Tensor:
    """The rows and positions of tokens, [tokens, 2]."""
    return torch.tensor([token[:2] for token in tokens], dtype=torch.long).reshape(-1, 2)


def in_order(places: torch.Tensor) -> torch.Tensor:
    """The order of tokens by row, then by position; the last of each, since an engine may compute tokens again."""
    rows, positions = places.unbind(1)
    keys = rows * (int(positions.max()) + 1 if len(places) else 1) + positions
    order = torch.argsort(keys, stable=True)
    following = keys[order].roll(-1)
    last = keys[order] != following
    last[-1:] = True
    return order[last]


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: each.contiguous() for name, each in tensors.items()}, file)
