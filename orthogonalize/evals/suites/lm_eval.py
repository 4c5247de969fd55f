"""Suites `lm_eval:TASK`: any task of lm-evaluation-harness, measured in the engine that is already running."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import OrthogonalizeError, first_line
from ...core.files import fingerprint
from ...core.foreign import check_has
from ...core.progress import note
from ...data.hub import offline_if_unreachable
from ...data.tokenization import encode_open_ended, encode_rendered
from ..metrics import Series
from .base import BaseOutputs, SuiteContext, SuiteFamily

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    from ...engines.base import Responder

PREFIX = "lm_eval:"
DEFAULT_TOKENS = 256  # of a generated answer, if a task sets no limit
ROLLING = 4096  # tokens per window over a long text, if the model takes as many
FEWSHOT_SEED = 1234  # lm-eval's own; the few-shot examples, and so the prompts' lengths, depend on it


def harness_model(engine: Responder, tokenizer: Any, max_length: int) -> TemplateLM:
    """`engine` as an lm-eval LM. A prompt of more than `max_length` tokens loses its beginning, as in lm-eval's own."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):  # type: ignore[misc]
        """An lm-eval LM on top of one of our engines."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:  # no second BOS for a text that a chat template gave one
                add_special_tokens = not (tokenizer.bos_token and string.startswith(tokenizer.bos_token))
            if add_special_tokens:
                return encode_open_ended(tokenizer, [string])[0]
            return encode_rendered(tokenizer, [string])[0]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            # A text that does not fit loses its beginning; at least one token is left to condition on.
            wholes = [([*c, *x][-(max_length - 1) :], min(len(x), max_length - 2)) for _, c, x in requests]
            contexts, texts = [ids[: len(ids) - n] for ids, n in wholes], [ids[len(ids) - n :] for ids, n in wholes]
            scores = engine.scores(contexts, texts)
            return [(s.logprob, s.greedy) for s in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for number, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                rolling = get_rolling_token_windows(tokens, self.prefix_token_id, max_length - 2, 1)
                for window in map(make_disjoint_window, rolling):
                    windows.append((None, *window))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[owner] += logprob
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            results = [""] * len(requests)
            asked = [_generation(request.args[1]) for request in requests]
            lengths = [each["max_gen_toks"] for each in asked]
            for length in sorted(set(lengths)):
                mine = [i for i, n in enumerate(lengths) if n == length]
                prompts = [self.tok_encode(requests[i].args[0])[-(max_length - length - 1) :] for i in mine]
                for i, ids in zip(mine, engine.answers(prompts, length), strict=True):
                    results[i] = _cut(tokenizer.decode(ids, skip_special_tokens=True), asked[i]["until"])
            return results

    return HarnessModel()


def _generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation settings under lm-eval's normalized names."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(dict(asked), DEFAULT_TOKENS))


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


@dataclass(frozen=True)
class HarnessTask:
    """A task (or group of tasks) of lm-eval; every metric with a number per item is compared item by item.

    `state` is a fingerprint of its requests and documents, `source` where the documents come from.
    """

    task: str
    tokenizer: Any
    max_length: int
    known: TaskManager
    limit: int | None
    state: str
    source: str
    aggregations: Mapping[str, Mapping[str, Any]]  # by task of the group, then by metric
    reported: set[str] = field(default_factory=set, compare=False)

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.task}"

    @property
    def longest(self) -> int:
        return self.max_length

    def measure(self, engine: Responder, memory: BaseOutputs) -> dict[str, Series]:
        """Run the task in `engine`; `memory` is not used."""
        from lm_eval import simple_evaluate

        try:
            found = simple_evaluate(
                model=harness_model(engine, self.tokenizer, self.max_length),
                tasks=[self.task],
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                fewshot_random_seed=FEWSHOT_SEED,
                task_manager=self.known,
            )
        except OrthogonalizeError:
            raise
        except Exception as error:  # anything that the task or its data raise
            raise OrthogonalizeError(f"lm-eval's {self.task} failed: {first_line(error)}") from error
        result = {}
        for task, samples in (found or {}).get("samples", {}).items():
            # An answer read by several "filters" gives several samples; each filter is a measure of its own.
            for way in sorted({str(sample.get("filter", "none")) for sample in samples}):
                mine = [s for s in samples if str(s.get("filter", "none")) == way]
                for metric in sorted({m for sample in mine for m in sample["metrics"]} - {"bits_per_byte"}):
                    aggregation = self.aggregations.get(task, {}).get(metric)
                    values = [s.get(metric) for s in sorted(mine, key=lambda s: s["doc_id"])]
                    series = _series(values, _is_perplexity(aggregation))
                    name = metric if way == "none" else f"{metric},{way}"
                    if series is None:
                        self._report_omission(f"{task}: {name}")
                        continue
                    if series.kind != "loss" and not _is_mean(aggregation):
                        name = f"{name},mean"  # under that name, the task aggregates its items differently
                    result[f"tasks.{task.replace('.', '_')}.{name.replace('.', '_')}"] = series
        if not result:
            raise OrthogonalizeError(f"lm-eval's {self.task} gives no number per item, so there is nothing to compare")
        return result

    def _report_omission(self, metric: str) -> None:
        if metric not in self.reported:
            note(f"lm-eval's {metric} has no number per item; leaving it out")
        self.reported.add(metric)


def harness_tasks(
    names: Sequence[str], tokenizer: Any, positions: int | None, include: Path | None, limit: int | None
) -> list[HarnessTask]:
    """The tasks `names` from lm-eval and from the folder `include`, for a model that takes `positions` tokens.

    Each is loaded with its data, so that missing data show before anything is measured.

    Raises:
        OrthogonalizeError: lm-eval, a task or its data are missing, or a task needs sampling.
    """
    if not names:
        return []
    check_has("lm_eval", "a task of lm-eval")
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(include) if include else None)  # built once, since it reads thousands of files
    for name in names:
        if name not in known.all_tasks:
            raise OrthogonalizeError(f"lm-eval has no task {name!r} (`lm-eval ls tasks` lists them)")
    return [_harness_task(name, known, tokenizer, positions, limit) for name in names]


def _harness_task(
    name: str, known: TaskManager, tokenizer: Any, positions: int | None, limit: int | None
) -> HarnessTask:
    """The task `name`, loaded once to see its requests; lm-eval loads it again for every model."""
    try:
        random.seed(0)  # lm-eval's own seeds: some tasks shuffle while they load
        np.random.seed(FEWSHOT_SEED)
        with offline_if_unreachable():
            tasks: dict[str, Any] = known.load([name])["tasks"]
        for task in tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            task.build_all_requests(limit=limit)
        requests = [request for task in tasks.values() for request in task.instances]
        generated = [_generation(r.args[1]) for r in requests if r.request_type == "generate_until"]
        aggregations = {each: dict(task.aggregation()) for each, task in tasks.items()}
    except Exception as error:  # anything that its data or code raise
        raise OrthogonalizeError(f"lm-eval's {name} cannot be loaded: {first_line(error)}") from error
    if any(asked["do_sample"] for asked in generated):
        raise OrthogonalizeError(f"lm-eval's {name} samples its answers; only greedy decoding is supported")
    unconditioned = any(r.request_type == "loglikelihood_rolling" or not r.args[0] for r in requests)
    if unconditioned and tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise OrthogonalizeError(
            f"lm-eval's {name} scores the first token of texts, but the model's tokenizer has no BOS or EOS"
        )
    longest = max((asked["max_gen_toks"] for asked in generated), default=0)
    return HarnessTask(
        name,
        tokenizer,
        _length(name, requests, longest, tokenizer, positions),
        known,
        limit,
        _state(tasks, known),
        ", ".join(dict.fromkeys(str(task.config.dataset_path) for task in tasks.values())),
        aggregations,
    )


def _state(tasks: Mapping[str, Any], known: TaskManager) -> str:
    """A fingerprint of the tasks' requests, documents, settings and code (the Python files beside their YAML)."""
    entries = [known.task_index[name] for name in tasks if name in known.task_index]
    folders = sorted({entry.yaml_path.parent for entry in entries if entry.yaml_path is not None})
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for home in folders for file in sorted(home.glob("*.py"))]
    requests = [[r.args, r.doc] for task in tasks.values() for r in task.instances]
    return fingerprint([version("lm-eval"), code, _plain([requests, [entry.cfg for entry in entries]])])


def _plain(value: Any) -> Any:
    """`value` as JSON, identical in every process; an object that JSON cannot hold becomes its type's name."""
    if isinstance(value, np.generic):
        value = value.item()
    match value:
        case str() | int() | float() | None:
            return value
        case dict():
            return sorted(([str(key), _plain(part)] for key, part in value.items()), key=lambda pair: pair[0])
        case list() | tuple():
            return [_plain(part) for part in value]
        case set() | frozenset():
            return sorted(map(str, value))
        case bytes():
            return value.hex()
    return type(value).__name__


def _length(name: str, requests: Sequence[Any], answer: int, tokenizer: Any, positions: int | None) -> int:
    """The tokens of a task's longest prompt with its completion, but no more than the model takes."""
    if positions is not None and answer + 2 >= positions:  # a prompt has one token at least
        raise OrthogonalizeError(
            f"lm-eval's {name} needs answers of {answer} tokens, but the model takes only {positions}; leave it out"
        )
    needs = [_need(request, tokenizer, positions) for request in requests]
    wanted = max(needs, default=ROLLING)
    if positions is None or wanted < positions:
        return wanted
    cut = sum(need >= positions for need in needs)
    note(f"lm-eval's {name}: {cut} of {len(needs)} prompts lose their beginning (the model takes {positions} tokens)")
    return positions - 1


def _need(request: Any, tokenizer: Any, positions: int | None) -> int:
    """The tokens of an lm-eval request, plus one to be generated."""
    match request.request_type:
        case "generate_until":
            after = int(_generation(request.args[1])["max_gen_toks"])
        case "loglikelihood_rolling":  # a text of any length is scored in windows
            window = ROLLING if positions is None else min(ROLLING, positions - 1)
            return min(len(tokenizer(request.args[0])["input_ids"]) + 3, window)
        case _:
            return len(tokenizer(request.args[0] + request.args[1])["input_ids"]) + 2
    return len(tokenizer(request.args[0])["input_ids"]) + after + 1


def _is_perplexity(aggregation: Any) -> bool:
    from lm_eval.api.metrics import perplexity, weighted_perplexity

    return aggregation in (perplexity, weighted_perplexity)


def _is_mean(aggregation: Any) -> bool:
    from lm_eval.api.metrics import mean, nanmean

    return aggregation in (mean, nanmean, np.mean, np.nanmean)


def _series(values: Sequence[Any], perplexity: bool) -> Series | None:
    """A task's metric by item, with None for an item without a number; None if no item has a number.

    A perplexity's items are log-probabilities, or pairs of one and the text's count of words or bytes: losses per
    item, word or byte.
    """
    pairs = [v if perplexity and isinstance(v, list | tuple) and len(v) == 2 else (v, 1) for v in values]
    rows = [(_number(v), _number(w)) for v, w in pairs]
    numbers = [None if v is None or w is None else v for v, w in rows]
    known = {v for v in numbers if v is not None}
    if not known:
        return None
    if perplexity:
        tokens = [0 if v is None else int(w or 0) for v, (_, w) in zip(numbers, rows, strict=True)]
        losses = [None if v is None else -v for v in numbers]
        return Series(kind="loss", values=losses, tokens=tokens) if any(tokens) else None
    return Series(kind="share" if known <= {0.0, 1.0} else "score", values=numbers)


def _number(value: Any) -> float | None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _make(context: SuiteContext, tasks: Sequence[str]) -> list[HarnessTask]:
    return harness_tasks(tasks, context.tokenizer, context.positions, context.data, context.limit)


ENTRIES = (
    SuiteFamily(
        PREFIX,
        "TASK",
        "any task of lm-evaluation-harness, in the same engine (`pip install 'orthogonalize[tasks]'`)",
        _make,
    ),
)
