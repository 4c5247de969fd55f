"""What write matrices take in and put out inside a vLLM worker, and edits of what they put out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...core.errors import OrthogonalizeError
from ...core.interventions import ConditionalMap, Site, WriteMatrix
from ...models.write_matrices import WriteModule
from .step import Step
from .stream_worker import WorkerStreams

Counted = Mapping[str, Mapping[int, tuple[int, int]]]
"""By set of tokens and row, the positions that count, from the first to before the last."""

Take = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with the name of a set, the inputs [tokens, n] and outputs [tokens, d] of its tokens."""


class WriteHooks:
    """Hooks on the write matrices of a worker's model; `close` removes them, and ends the reading of the streams.

    Those that watch see the `counted` tokens, and those that edit act on all tokens of the rows `edited`.
    """

    def __init__(self, streams: WorkerStreams, counted: Counted, edited: Collection[int] = ()) -> None:
        self.streams, self.counted, self.edited = streams, counted, edited
        self.handles: list[Any] = []
        self.skipped: list[nn.Module] = []
        self._places: dict[str, torch.Tensor] = {}
        self._edited_places = torch.tensor([], dtype=torch.long)
        self._step: Step | None = None
        streams.begin([], 1, [], True)

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self.handles:
            handle.remove()
        for block in self.skipped:
            block.__dict__.pop("forward", None)
        self.handles, self.skipped = [], []
        self.streams.end()

    def watch(self, matrix: WriteModule, take: Take) -> None:
        """Call `take` with what goes through a matrix, set by set."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self.streams.step.spans:
                return
            inputs, outputs = args[0], output[0] if isinstance(output, tuple) else output
            self._find_places(outputs.device)
            for name, places in self._places.items():
                take(name, _gathered(module, inputs[places]), outputs[places])

        self.handles.append(matrix.module.register_forward_hook(hook))

    def _find_places(self, device: torch.device) -> None:
        """Find the places of the tokens that count, by set, and of those that are edited, once in a pass."""
        if self._step is self.streams.step:
            return
        self._step, self._places = self.streams.step, {}
        for name, rows in self.counted.items():
            places = [
                place
                for span in self._step.spans
                if span.mark.row in rows
                for place in span.places(*rows[span.mark.row])
            ]
            if places:
                self._places[name] = torch.tensor(places, device=device)
        own = [span for span in self._step.spans if span.mark.row in self.edited]
        edited = [place for span in own for place in range(span.start, span.start + span.count)]
        self._edited_places = torch.tensor(edited, dtype=torch.long, device=device)

    def edit(self, matrix: WriteModule, conditional: ConditionalMap) -> None:
        """Apply a conditional map to what a matrix puts out for the edited rows, as edited weights do."""
        stream = self.streams.stream
        scale = stream.post_scale(matrix.matrix.site, matrix.part)
        if scale is not None:
            conditional = conditional.before_norm(scale)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            outputs = output[0] if isinstance(output, tuple) else output
            self._find_places(outputs.device)
            inputs, places = _gathered(module, args[0]), self._edited_places
            new = outputs.clone()
            new[places] = conditional(inputs[places], outputs[places])
            return (new, *output[1:]) if isinstance(output, tuple) else new

        self.handles.append(matrix.module.register_forward_hook(hook))

    def stop_after(self, layer: int) -> None:
        """Let later blocks do nothing; what the model puts out then means nothing."""
        for later in self.streams.stream.local_layers:
            if later > layer:
                block, reader = self.streams.stream.block(later), self.streams.readers[later]

                def same(*args: Any, reader: Any = reader, **kwargs: Any) -> Any:
                    hidden, residual = reader.parts(args, kwargs)
                    return hidden if reader.residual is None else (hidden, residual)

                block.__dict__["forward"] = same
                self.skipped.append(block)


def written_at(streams: WorkerStreams, site: Site) -> dict[WriteMatrix, WriteModule]:
    """The matrices that write at `site` of a block of this pipeline stage.

    Raises:
        OrthogonalizeError: one cannot be watched.
    """
    found: dict[WriteMatrix, WriteModule] = {}
    for part in streams.stream.served_parts(site):
        for template in part.writes:
            name = template.removesuffix(".weight")
            module = None if "{expert}" in name else streams.stream.find(site, name)
            if module is None or _is_partial(module):
                raise OrthogonalizeError(f"vLLM does not show what {name} takes in at {site}; use --engine stream")
            matrix = WriteMatrix(site, name)
            found[matrix] = WriteModule(matrix, part, module)
    return found


def _is_partial(module: nn.Module) -> bool:
    """Whether a matrix leaves it to others to add up what the workers put out."""
    return getattr(module, "tp_size", 1) > 1 and not getattr(module, "reduce_results", True)


def _gathered(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The whole inputs [tokens, n] of a matrix that may hold one of several parts of its columns."""
    whole = getattr(module, "input_size", inputs.shape[-1])
    if inputs.shape[-1] == whole:
        return inputs
    from vllm.distributed import tensor_model_parallel_all_gather

    gathered: torch.Tensor = tensor_model_parallel_all_gather(inputs.contiguous(), -1)
    return gathered
