"""The weights of a model that is never whole in memory: a transformers model whose parts are read when they are needed.

The model is built on the meta device, where tensors have shapes but no values. A part (a block, the embedding, the
head) gets its values through transformers' own loader, which knows how a checkpoint's tensors become a module's
parameters, and loses them again when it is released.

On several devices, each has a replica of the model. Blocks are read to the first and copied to the others.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...architectures.schema import architecture_of, remembered
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.decoding.weights import StoredWeight, stored_weights
from ...checkpoints.quantization import row_reader
from ...core.errors import OrthogonalizeError
from ..loading import choose_devices, choose_dtype, load_on_meta
from ..sites import Sites
from ..stream import Stream
from .ahead import announce, reading_ahead


def can_stream(checkpoint: Checkpoint) -> bool:
    """Whether the blocks of a checkpoint can be read and run one at a time.

    It is not quantised, or in a format that is decoded (see `stored_weights`), and of a family that the package
    describes: what experiments find, or the user says, does not show that blocks need nothing from each other but the
    stream.
    """
    if remembered(checkpoint.config) is not None:
        return False
    try:
        stored_weights(checkpoint, torch.float32)
    except OrthogonalizeError:
        return False
    return True


@dataclass(frozen=True)
class _Stored:
    """A tensor of a checkpoint that is read when transformers' loader, in one of its threads, asks for its values."""

    weight: StoredWeight
    device: torch.device

    def __getitem__(self, _whole: Any) -> torch.Tensor:
        return self.weight.read(self.device)


class PartialModel:
    """A transformers model of which only the norms, the buffers and the parts in use have values.

    Attributes:
        model: the model, in evaluation mode.
        stream: where its residual stream passes.
        device, dtype: of the values.
        replicas: this model, and those on the other devices, which hold the same blocks.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "auto", dtype: torch.dtype | None = None) -> None:
        """
        Args:
            checkpoint: where the values are read, again each time.
            device, dtype: see the attributes; chosen by `choose_devices` and `choose_dtype`.

        Raises:
            OrthogonalizeError: the checkpoint is incomplete, quantized in a format that is not decoded or of a family
                that the package does not describe, or transformers cannot load it.
        """
        if remembered(checkpoint.config) is not None:
            raise OrthogonalizeError(
                f"{checkpoint.path} cannot be streamed: the package does not describe models of its type, and no "
                "experiment shows that their blocks can run alone; use --engine hf"
            )
        self.checkpoint, config = reading_ahead(checkpoint), checkpoint.config
        self.device, *others = choose_devices(device)
        self.dtype = dtype or choose_dtype(self.device, checkpoint.dtype)
        try:
            self._weights = stored_weights(self.checkpoint, self.dtype)
        except OrthogonalizeError as error:
            raise OrthogonalizeError(f"{checkpoint.path} cannot be streamed: {error}; use --engine hf") from error
        self._tensors = {name: weight.info for name, weight in self._weights.items()}
        self.model = load_on_meta(checkpoint.path, self._tensors, self.dtype)
        self.stream = Stream.of(self.model)
        self._sites = Sites(architecture_of(config), config, self._tensors)
        self._empty: dict[str, torch.Tensor] = dict(self.model.state_dict(keep_vars=True))
        _compute_buffers(self.model, self.device)
        self._fill(self._always)
        self.replicas: list[PartialModel] = [self, *(self._replica(each) for each in others)]

    def _replica(self, device: torch.device) -> PartialModel:
        other = copy.copy(self)
        other.device, other.model = device, copy.deepcopy(self.model)
        other.model._apply(lambda value: value if value.is_meta else value.to(device))
        other.stream = Stream.of(other.model)
        other._empty = dict(other.model.state_dict(keep_vars=True))
        other.replicas = [other]
        return other

    # parts of the checkpoint

    @cached_property
    def _in_blocks(self) -> dict[int, list[str]]:
        """The names of the tensors of each block."""
        layers = range(self.stream.layer_count)
        prefixes = {self._sites.in_layer("", layer).removesuffix("."): layer for layer in layers}
        depth = next(iter(prefixes)).count(".") + 1
        found: dict[int, list[str]] = {layer: [] for layer in layers}
        for name in self._tensors:
            layer = prefixes.get(".".join(name.split(".")[:depth]))
            if layer is not None:
                found[layer].append(name)
        return found

    @property
    def _token_embedding(self) -> str:
        weight = next(each.weight for each in self._sites.architecture.embed.values() if each.tied)
        return self._sites.decoder + weight

    @cached_property
    def _head(self) -> list[str]:
        """The names of the head's tensors; none if it is tied."""
        stem = self._sites.head.removesuffix("weight")
        return [name for name in self._tensors if name.startswith(stem)]

    @property
    def _always(self) -> list[str]:
        """The names of what is small and used outside blocks: norms, positions, projections."""
        decoder, first_block = self._sites.decoder, self._sites.in_layer("", 0)
        blocks = first_block[: first_block.index("0", len(decoder))]
        apart = {self._token_embedding, *self._head}
        return [n for n in self._tensors if n.startswith(decoder) and not n.startswith(blocks) and n not in apart]

    # values

    @torch.no_grad()
    def _fill(self, names: Sequence[str]) -> None:
        """Give values to what the checkpoint's tensors `names` become."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        loading = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=get_model_conversion_mapping(self.model, None, None),
            device_map={"": self.device},
        )
        older = "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters  # transformers < 5.10
        stored = {name: _Stored(self._weights[name], self.device) for name in names}
        announce(self.checkpoint, [part for name in names for part in self._weights[name].stored])
        with _no_progress_bar():
            convert_and_load_state_dict_in_model(self.model, stored, loading, **({"tp_plan": None} if older else {}))

    def _check_filled(self, name: str) -> None:
        missing = [key for key, value in self._values_of(name) if value.is_meta]
        if missing:
            raise OrthogonalizeError(
                f"{self.checkpoint.path} has no values for {missing[0]}; download or write it again"
            )

    def _values_of(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The stored tensors of module `name`, by their name in the model."""
        module = self.model.get_submodule(name)
        for key, value in module.state_dict(keep_vars=True).items():
            yield f"{name}.{key}", value

    def _release(self, name: str) -> None:
        """Take the values of module `name` away again."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels that still read them
        for key, _ in list(self._values_of(name)):
            self._set(key, self._empty[key])

    def _set(self, key: str, value: torch.Tensor) -> None:
        parent, _, last = key.rpartition(".")
        setattr(self.model.get_submodule(parent), last, value)

    def _name_of(self, module: nn.Module) -> str:
        names: dict[nn.Module, str] = {each: name for name, each in self.model.named_modules()}
        return names[module]

    def _fill_block(self, layer: int) -> None:
        self._fill(self._in_blocks[layer])
        self._check_filled(self.stream.block_name(layer))
        for replica in self.replicas[1:]:
            replica._copy_block(layer, self)

    @torch.no_grad()
    def _copy_block(self, layer: int, source: PartialModel) -> None:
        """Copy block `layer` from `source`, which holds it."""
        with _beside_computing(source, self):
            for key, value in source._values_of(self.stream.block_name(layer)):
                own = value.to(self.device)
                self._set(key, nn.Parameter(own, requires_grad=False) if isinstance(value, nn.Parameter) else own)

    @cached_property
    def _copying(self) -> torch.cuda.Stream:
        """The CUDA stream for copies between GPUs: always the same, so that its memory is used again."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def block_bytes(self, layer: int) -> int:
        """The size of a block's values in memory."""
        return sum(value.numel() * value.element_size() for _, value in self._values_of(self.stream.block_name(layer)))

    # parts in use

    def hold(self, layer: int) -> None:
        """Read block `layer`, unless it is held; the next use of `blocks` gives it back."""
        if any(value.is_meta for _, value in self._values_of(self.stream.block_name(layer))):
            self._fill_block(layer)

    def _release_block(self, layer: int) -> None:
        for replica in self.replicas:
            replica._release(self.stream.block_name(layer))

    def blocks(self, first: int = 0) -> Generator[int]:
        """The layers from `first` on, each while its block is held; the next one is read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            coming: Future[None] = reader.submit(self.hold, first) if first < self.stream.layer_count else Future()
            try:
                for layer in range(first, self.stream.layer_count):
                    coming.result()
                    if layer + 1 < self.stream.layer_count:
                        coming = reader.submit(self._fill_block, layer + 1)
                    yield layer
                    self._release_block(layer)
            finally:
                reader.shutdown(cancel_futures=True)
                for layer in range(self.stream.layer_count):
                    self._release_block(layer)

    @contextmanager
    def embedding(self, tokens: Iterable[int]) -> Iterator[None]:
        """Hold the rows of the token embedding that `tokens` (and padding, 0) look up, in this context."""
        wanted, vocabulary = sorted({0, *tokens}), self._tensors[self._token_embedding].shape[0]
        if wanted[-1] >= vocabulary:
            raise OrthogonalizeError(f"the tokenizer has token {wanted[-1]}, but the model only {vocabulary} tokens")
        rows = self._embedding_rows(wanted)
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica._embedded(wanted, rows, vocabulary))
            yield

    def _embedding_rows(self, wanted: Sequence[int]) -> torch.Tensor:
        """Rows of the token embedding, in order; a quantised one is decoded whole."""
        weight = self._weights[self._token_embedding]
        if not weight.plain:
            return weight.read(self.device)[torch.tensor(wanted, device=self.device)]
        read = row_reader(self.checkpoint, self._token_embedding)
        return torch.cat([read(first, last) for first, last in _runs(wanted)])

    @contextmanager
    def _embedded(self, wanted: Sequence[int], rows: torch.Tensor, vocabulary: int) -> Iterator[None]:
        """Look tokens up in `rows` of the embedding, which are those of the tokens `wanted`, in this context."""
        module = self.model.get_input_embeddings()
        places = torch.zeros(vocabulary, dtype=torch.long, device=self.device)
        places[torch.tensor(wanted, device=self.device)] = torch.arange(len(wanted), device=self.device)
        empty, padding = module.weight, module.padding_idx
        module.weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        module.padding_idx = None  # which is no row of these; it matters for gradients only
        module.forward = lambda ids: type(module).forward(module, places[ids])
        try:
            yield
        finally:
            del module.forward
            module.weight, module.padding_idx = empty, padding

    @contextmanager
    def head(self) -> Iterator[None]:
        """Hold the output head in this context."""
        module = self.model.get_output_embeddings()
        name = self._name_of(module)
        self._fill(self._head or [self._token_embedding])
        embedding = self.model.get_input_embeddings()
        if not self._head:
            module.weight = embedding.weight
            self._release(self._name_of(embedding))
        self._check_filled(name)
        try:
            yield
        finally:
            self._release(name)


@contextmanager
def _beside_computing(source: PartialModel, target: PartialModel) -> Iterator[None]:
    """Let copies from one GPU to another in this context wait for nothing but what has been read to the first.

    Without streams of their own, they would make each GPU wait for what the other computes.
    """
    if {source.device.type, target.device.type} != {"cuda"}:
        yield
        return
    source._copying.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(source._copying), torch.cuda.stream(target._copying):
        yield
    for each in (source, target):
        each._copying.synchronize()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Let transformers show no progress in this context, which would be a line per block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Give their values to the buffers that no checkpoint holds, such as rotary frequencies."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, torch.empty_like(buffer, device=device))
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # parameters are on the meta device, where this does nothing


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as spans (first, last + 1) without gaps."""
    first = previous = numbers[0]
    for number in numbers[1:]:
        if number != previous + 1:
            yield first, previous + 1
            first = number
        previous = number
    yield first, previous + 1
