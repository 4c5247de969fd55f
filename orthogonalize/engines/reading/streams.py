"""Ask a vLLM engine for residual streams and logits of prompts, a portion of prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...core.errors import OrthogonalizeError
from ...core.interventions import shift
from ...core.progress import track
from ...core.temporary_folders import temporary_folder
from ..base import Ids
from ..vllm import SLICE, VllmEngine
from .step import Mark
from .stream_worker import PLACES, BlockEdit, Stored, in_order, store_edits

PROBE = [1, 2, 3, 5, 8, 13, 21, 34]  # token ids that every model has
SAME = 0.1  # of the spread of logits, by which rounding may move them; another form of the stream moves them wholly
# vLLM's settings for an engine whose streams are read.
READABLE: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False}


@dataclass(frozen=True)
class Wanted:
    """What is wanted of one sequence of token ids.

    Attributes:
        ids: the sequence.
        first, end: the positions whose outputs are wanted; the last token's by default.
        edit: the number of what edits it; -1 for nothing.
        base: the number of the base's sequence that its outputs are compared with; -1 for none.
    """

    ids: Ids
    first: int = -1
    end: int = -1
    edit: int = -1
    base: int = -1

    def mark(self, row: int) -> Mark:
        first = self.first if self.first >= 0 else len(self.ids) - 1
        return Mark(row, self.edit, first, self.end if self.end >= 0 else len(self.ids), self.base)


@dataclass
class Portion:
    """What was read of consecutive prompts.

    Attributes:
        rows: their numbers.
        streams: [prompts, positions, d] by layer; `layer_count` is what the head's norm reads.
        outputs: what was asked of the wanted outputs of each: logits [tokens, vocabulary] in float32, or measures
            [tokens, 5] in float64.
    """

    rows: range
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Outputs:
    """What to take of the wanted outputs: their logits, or measures (see `OutputStore.measures`).

    Attributes:
        behaviour: tokens whose joint probability is measured; None takes logits.
        keep: whether this is the base that others are compared with later.
        along: whether tokens along answers are measured (exact KLs), and not first tokens (smoothed ones).
    """

    behaviour: Sequence[int] | None = None
    keep: bool = False
    along: bool = False


LOGITS = Outputs()


class EngineStreams:
    """The streams of the model in a running engine that was started with `READABLE`.

    Args:
        engine: the engine.
        layer_count, width: the number of the model's blocks, and the width of its stream.
    """

    def __init__(self, engine: VllmEngine, layer_count: int, width: int) -> None:
        self.engine, self.layer_count, self.width = engine, layer_count, width
        self.summed = True

    def check(self) -> None:
        """Check that the stream is where it is looked for, and find out in which form blocks take it.

        If each block is given the stream in one part, with nothing in the other, the outputs must stay the same.

        Raises:
            OrthogonalizeError: they do not, so it is not known what the blocks of this class take.
        """
        nothing = shift(torch.zeros(self.width))
        same = [BlockEdit(nothing, frozenset(range(self.layer_count)))]
        for self.summed in (True, False):
            wanted = [Wanted(PROBE), Wanted(PROBE, edit=0)]
            (portion,) = self.read("checking the engine", wanted, outputs=LOGITS, edits=same)
            plain, moved = (each[-1].double() for each in portion.outputs)
            if not torch.isfinite(plain).all():  # which the first reading names
                return
            if (plain - moved).norm() <= SAME * (plain - plain.mean()).norm():
                return
        raise OrthogonalizeError(
            "vLLM hands the stream of this model on in a form that is not known; use --engine stream"
        )

    def read(
        self,
        activity: str,
        wanted: Sequence[Wanted],
        layers: Sequence[int] = (),
        positions: int = 1,
        *,
        outputs: Outputs | None = None,
        edits: Sequence[BlockEdit] = (),
    ) -> Iterator[Portion]:
        """Yield the streams at the inputs of `layers` at the last `positions` tokens, in portions in order.

        Args:
            activity: names the work in progress bars and errors.
            wanted: the sequences, each at least `positions` long.
            outputs: what to take of the wanted outputs, if anything.
            edits: by number, what the sequences may be edited by.

        Raises:
            OrthogonalizeError: the engine cannot read its class of models, or died.
        """
        with self.reading(activity, layers, positions, edits), track(activity, len(wanted), "prompts") as advance:
            for start in range(0, len(wanted), SLICE):
                rows = range(start, min(start + SLICE, len(wanted)))
                self.run(activity, [wanted[row] for row in rows], rows)
                portion = Portion(rows)
                if layers:
                    portion.streams = self._streams(activity, rows, layers, positions)
                if outputs is not None:
                    portion.outputs = self._outputs(activity, rows, outputs)
                yield portion
                advance(len(rows))

    @contextmanager
    def reading(
        self, activity: str, layers: Sequence[int], positions: int, edits: Sequence[BlockEdit] = ()
    ) -> Iterator[None]:
        """A context in which the workers read; see `WorkerStreams.begin`."""
        with temporary_folder() as folder:
            file = store_edits(edits, folder)
            for refused in self.ask(activity, "begin_reading", list(layers), positions, file, self.summed):
                if refused:
                    raise OrthogonalizeError(refused)
        try:
            yield
        except OrthogonalizeError:  # the engine may be dead
            raise
        except BaseException:
            self.ask(activity, "end_reading")
            raise
        self.ask(activity, "end_reading")

    def ask(self, activity: str, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker."""
        return self.engine.ask_workers(activity, method, *arguments)

    def run(self, activity: str, wanted: Sequence[Wanted], rows: Sequence[int]) -> None:
        """Let the engine read the sequences `wanted`, whose numbers are `rows`."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=each.mark(row).arguments())
            for row, each in zip(rows, wanted, strict=True)
        ]
        self.engine.generate_slice(activity, [each.ids for each in wanted], parameters)

    def _streams(self, activity: str, rows: range, layers: Sequence[int], positions: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        with temporary_folder() as folder:
            for told in filter(None, self.ask(activity, "store_streams", str(folder))):
                stored = Stored(*told)
                if stored.tokens != len(rows) * positions:
                    raise OrthogonalizeError(f"vLLM left out tokens while {activity}; use --engine stream")
                values = stored.open(folder).view(-1, len(rows), positions, stored.width)
                found |= dict(zip(stored.layers, values, strict=True))
        missing = sorted(set(layers) - found.keys())
        if missing:
            raise OrthogonalizeError(
                f"vLLM runs block {missing[0]} of this model in a way that cannot be read; use --engine stream"
            )
        return found

    def _outputs(self, activity: str, rows: range, outputs: Outputs) -> list[torch.Tensor]:
        if outputs.behaviour is None:
            name, arguments = "logits", list[Any]()
        else:
            name, arguments = "measures", [list(outputs.behaviour), outputs.keep, outputs.along]
        stored = list(self._stored(activity, f"store_{name}", *arguments))
        if len(stored) != 1:
            raise OrthogonalizeError("vLLM gives no logits of this model; use --engine stream")
        places, found = stored[0][PLACES], stored[0][name]
        order = in_order(places)
        counts = torch.bincount(places[order, 0] - rows.start, minlength=len(rows)).tolist()
        return list(torch.split(found[order], counts))

    def _stored(self, activity: str, method: str, *arguments: Any) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each file that the workers write when `method` is called."""
        from safetensors.torch import load_file

        with temporary_folder() as folder:
            self.ask(activity, method, str(folder), *arguments)
            for file in sorted(folder.iterdir()):
                yield load_file(file)
