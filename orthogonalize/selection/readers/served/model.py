"""A model in a vLLM engine in this process's charge: read, asked for answers, and edited by swapping weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ....architectures.schema import architecture_of
from ....checkpoints.checkpoint import Checkpoint, open_checkpoint
from ....checkpoints.plan import CheckpointPlan
from ....checkpoints.settings_files import context_length
from ....core.errors import OrthogonalizeError
from ....core.interventions import Intervention, Site, block_sites, removal
from ....core.progress import note
from ....edits.bake import bake
from ....engines.base import EngineOptions
from ....engines.experiment.ask import ask_server
from ....engines.reading.streams import READABLE, EngineStreams
from ....engines.shared_base import SharedBase, common_folder, edited_weights
from ....engines.vllm import VllmEngine
from ....engines.weight_swap import WeightSwap, kind_of
from ....models.loading import check_complete

CONTEXT = 2048  # tokens of the engine's context, in multiples of which it grows


class ServedModel:
    """The engine, which is started when it is first needed, and again if a longer context or other tensors are.

    Args:
        source: the checkpoint.
        options: how the engine is spread over devices.
        dtype: what it computes in; None for vLLM's choice.
    """

    def __init__(self, source: Checkpoint, options: EngineOptions, dtype: torch.dtype | None) -> None:
        self.source, self.options, self.dtype = source, options, dtype
        architecture = architecture_of(source.config)
        self.layer_count, self.width = architecture.layers(source.config), architecture.width(source.config)
        self.starts = 0  # what workers keep is gone after each
        self._stack = ExitStack()
        self._engine: VllmEngine | None = None
        self._streams: EngineStreams | None = None
        self._swap: WeightSwap | None = None
        self._in_edit = False
        self._checked: set[str] = set()
        self._plans = self._usual_plans()

    def _usual_plans(self) -> list[CheckpointPlan]:
        """A plan that adds the tensors of most edits: an edit of every write needs a head of its own."""
        direction = torch.zeros(1, self.width)
        direction[0, 0], direction[0, 1] = 0.5**0.5, -(0.5**0.5)  # centred, as LayerNorms need it
        sites = [Site("embed"), *block_sites(range(self.layer_count))]
        try:
            return [bake(self.source, Intervention(writes=dict.fromkeys(sites, removal(direction)))).checkpoint]
        except OrthogonalizeError:
            return []  # then edits are baked otherwise, and the engine starts again for the first of them

    def engine(self, tokens: int = 1) -> VllmEngine:
        """The running engine, with a context of at least so many tokens if the model has one.

        It has the weights of the base, except in a context of `edited`.
        """
        most = context_length(self.source.config)
        if self._engine is None or min(tokens, most or tokens) > self._engine.max_model_len:
            context = -(-max(tokens, 1) // CONTEXT) * CONTEXT
            self._start(context if most is None else min(context, most))
        assert self._engine is not None
        assert self._swap is not None
        if not self._in_edit:
            self._swap.restore()
        return self._engine

    def streams(self, tokens: int = 1) -> EngineStreams:
        """The streams of the model in the engine; see `engine`."""
        engine = self.engine(tokens)
        if self._streams is None:
            self._streams = EngineStreams(engine, self.layer_count, self.width)
            self._streams.check()
        return self._streams

    def _start(self, context: int) -> None:
        self.close()
        check_complete(self.source.path)
        extra: dict[str, Any] = dict(READABLE)
        if self.dtype is not None:
            extra["dtype"] = str(self.dtype).removeprefix("torch.")
        folder = self._stack.enter_context(common_folder(self.source, self._plans))
        self._engine = self._stack.enter_context(VllmEngine(folder, context, self.options, **extra))
        self._swap = WeightSwap(self._engine, open_checkpoint(folder))
        self._checked = set()
        self.starts += 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the engine computes in."""
        found: torch.dtype = self.engine().llm.llm_engine.vllm_config.model_config.dtype
        return found

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return int(self.engine().llm.llm_engine.vllm_config.model_config.get_vocab_size())

    def close(self) -> None:
        """Stop the engine."""
        self._stack.close()
        self._engine = self._streams = self._swap = None

    # edits

    def fit(self, plan: CheckpointPlan) -> None:
        """Make sure that the engine has every tensor and setting of an edit; it may have to start again.

        Raises:
            OrthogonalizeError: the engine cannot replace a tensor of the edit.
        """
        if SharedBase.of(self.source, [*self._plans, plan]).state != SharedBase.of(self.source, self._plans).state:
            self._plans = [*self._plans, plan]
            if self._engine is not None:
                note("the engine starts again, with tensors that an edit adds")
                self._start(self._engine.max_model_len)
        if self._engine is None:
            self.engine()
        assert self._swap is not None
        fresh = {kind_of(name): name for name in plan.touched}
        unchecked = [name for kind, name in fresh.items() if kind not in self._checked]
        if unchecked:
            self._swap.restore()
            lacking = self._swap.first_unswappable(unchecked)
            if lacking is not None:
                self.close()  # it may hold wrong weights
                raise OrthogonalizeError(
                    f"vLLM cannot replace {lacking} in place, so edits cannot be tried; use --engine stream, "
                    "or --trials 0"
                )
            self._checked |= fresh.keys()

    @contextmanager
    def edited(self, plan: CheckpointPlan) -> Iterator[None]:
        """A context in which the engine has an edit's weights; `fit` it before.

        They stay there until the base's are needed, since the next edit may change the same tensors.
        """
        assert self._swap is not None
        self._swap.apply(edited_weights(plan))
        self._in_edit = True
        try:
            yield
        finally:
            self._in_edit = False


def edit_plan(source: Checkpoint, intervention: Intervention) -> CheckpointPlan:
    """How an edit changes a checkpoint."""
    return bake(source, intervention, ask_server).checkpoint
