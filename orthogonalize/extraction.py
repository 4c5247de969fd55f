"""`extract`: from two prompt sets to directions, scored candidates and tried edits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .activations import all_activations, mean_activations
from .architectures import architecture_of
from .chat import ChatFormat
from .checkpoint import open_checkpoint
from .directions import Directions, all_subspaces
from .errors import OrthogonalizeError
from .generation import generate, stop_tokens
from .models import commit_of, find_model, load_model, load_tokenizer
from .outputs import RUN, check_free, complete_folder
from .plots import plot_candidates
from .progress import note, track
from .prompts import MINIMUM_TRAIN, Prompt, Side, Split, check_contrast, concept, load_prompts, split_prompts
from .refusals import refused
from .run import Run, RunInfo
from .scores import behaviour_score, first_token_probabilities, learn_behaviour_tokens
from .selection import Candidate, rank, score_candidates
from .trials import Trial, Trials

METHODS = ("dim", "inlp")
ANSWER_TOKENS = 48  # of the base model's own answers, against which a tried edit's harm is measured
CONFIRM_TOKENS = 64
CONFIRMED = 0.05  # the most answers of a confirmed edit that may still refuse


@dataclass(frozen=True)
class Settings:
    """How `extract` works; the defaults are the reference's where it has them.

    `scored` is the most val prompts a side that score single directions (None is all of them); whole
    edits are tried on all positive ones, and on the model's own answers to `answers` negative ones.
    `trials` is how many edits; 0 skips that.
    """

    methods: Sequence[str] = ("dim", "inlp")
    device: str = "auto"
    dtype: torch.dtype | None = None
    seed: int = 0
    train: int = 128
    val: int = 32
    test: int = 100
    system: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = True
    behaviour_tokens: Sequence[int | str] | None = None
    filtered: bool = True
    max_rank: int = 20
    scored: int | None = None
    trials: int = 32
    answers: int = 32
    trust_remote_code: bool = False


def _versions() -> dict[str, str]:
    found = {}
    for package in ("orthogonalize", "torch", "transformers", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def read_contrast(
    concept_name: str | None,
    positive: str | None,
    negative: str | None,
    column: str | None = None,
    hub_split: str = "train",
) -> tuple[list[Prompt], list[Prompt], bool]:
    """Both sides of a contrast, and whether its prompts are sensitive.

    Raises:
        OrthogonalizeError: neither a concept nor both sources are given, or they cannot be used.
    """
    if concept_name and not (positive or negative):
        named = concept(concept_name)
        sides = (
            load_prompts(named.positive, "positive", named.positive_column, named.hub_split),
            load_prompts(named.negative, "negative", named.negative_column, named.hub_split),
        )
        sensitive = named.sensitive
    elif positive and negative and not concept_name:
        sides = (
            load_prompts(positive, "positive", column, hub_split),
            load_prompts(negative, "negative", column, hub_split),
        )
        sensitive = False
    else:
        raise OrthogonalizeError("give either --concept, or both --positive and --negative")
    check_contrast(*sides)
    return *sides, sensitive


class _Extraction:
    """The model and the prompts, and the steps that use them, in order."""

    def __init__(self, folder: Path, settings: Settings, prompts: list[Prompt]) -> None:
        self.settings = settings
        self.prompts = prompts
        tokenizer = load_tokenizer(folder, settings.trust_remote_code)
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer, settings.system, settings.template_arguments, settings.chat_template)
        self.positions = tuple(self.chat.positions())
        self.model = load_model(folder, settings.device, settings.dtype, settings.trust_remote_code)

    def ids(self, side: Side, split: Split) -> list[list[int]]:
        return self.chat.encode_all([p.text for p in self.prompts if (p.side, p.split) == (side, split)])

    def measure_behaviour(self) -> list[int]:
        """Learn or read the behaviour tokens, and give every train and val prompt its score."""
        used = [i for i, p in enumerate(self.prompts) if p.split != "test"]
        with track("scoring prompts", 1) as advance:
            probabilities = first_token_probabilities(
                self.model, self.chat.encode_all([self.prompts[i].text for i in used])
            )
            advance(1)
        if not torch.isfinite(probabilities).all():
            mean_activations(self.model, self.ids("positive", "train"), 1)  # names the layer, where it is one
            raise OrthogonalizeError("the model's outputs hold NaN or infinite values; the checkpoint is damaged")
        sides = [self.prompts[i].side for i in used]
        if self.settings.behaviour_tokens:
            tokens = [self._token(t) for t in self.settings.behaviour_tokens]
        else:
            rows = {side: torch.tensor([s == side for s in sides]) for side in ("positive", "negative")}
            tokens = learn_behaviour_tokens(probabilities[rows["positive"]], probabilities[rows["negative"]])
        for i, score in zip(used, behaviour_score(probabilities, tokens).tolist(), strict=True):
            self.prompts[i] = replace(self.prompts[i], score=score)
        return tokens

    def _token(self, token: int | str) -> int:
        if isinstance(token, int):
            if not 0 <= token < self.model.config.vocab_size:
                raise OrthogonalizeError(f"behaviour token {token} is no id of this model's vocabulary")
            return token
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise OrthogonalizeError(f"behaviour token {token!r} is {len(ids)} tokens for this model; it must be one")
        return int(ids[0])

    def filter_prompts(self) -> dict[str, dict[str, int]]:
        """Keep train and val prompts on which the model behaves as their side says (design, section 5)."""
        before = list(self.prompts)
        if self.settings.filtered:
            self.prompts = [
                p for p in before if p.split == "test" or p.score is None or (p.score > 0) == (p.side == "positive")
            ]
        counts: dict[str, dict[str, int]] = {}
        for side in ("positive", "negative"):
            for split in ("train", "val"):
                kept = sum((p.side, p.split) == (side, split) for p in self.prompts)
                given = sum((p.side, p.split) == (side, split) for p in before)
                counts.setdefault(side, {})[split] = kept
                needed = MINIMUM_TRAIN if split == "train" else 1
                if kept < needed:
                    verb = "shows" if side == "positive" else "lacks"
                    raise OrthogonalizeError(
                        f"of {given} {side} {split} prompts the model {verb} the behaviour on {kept}, and at least "
                        f"{needed} are needed; give other prompts, --behaviour-tokens or --no-filter"
                    )
        return counts

    def find_directions(self) -> Directions:
        """Diff-in-means and, if asked for, INLP at every (position, layer)."""
        count = len(self.positions)
        ids = {side: self.ids(side, "train") for side in ("positive", "negative")}
        with track("reading activations", sum(map(len, ids.values())), "prompts") as advance:
            if "inlp" not in self.settings.methods:
                means = [mean_activations(self.model, ids[s], count, advance) for s in ("positive", "negative")]
                return Directions(self.positions, means[0] - means[1])
            positive, negative = (all_activations(self.model, ids[s], count, advance) for s in ("positive", "negative"))
        difference = positive.double().mean(0) - negative.double().mean(0)
        subspaces = all_subspaces(positive, negative, self.positions, self.settings.max_rank, self.settings.seed)
        return Directions(self.positions, difference, subspaces)

    def score(self, directions: Directions, tokens: list[int]) -> list[Candidate]:
        """Scored, filtered and ranked candidates of every method."""
        most = self.settings.scored
        positive, negative = self.ids("positive", "val")[:most], self.ids("negative", "val")[:most]
        scored = score_candidates(self.model, positive, negative, directions, self.settings.methods, tokens)
        ranked = []
        for method in self.settings.methods:
            mine = rank([c for c in scored if c.method == method], directions.layer_count)
            if mine and mine[0].failed:
                note(f"no {method} direction passes the filters; the best of all fails: {', '.join(mine[0].failed)}")
            ranked += mine
        return ranked

    def try_edits(self, directions: Directions, ranked: list[Candidate], tokens: list[int]) -> list[Trial]:
        """Search whole edits on val prompts, and confirm the best by what the model then answers."""
        if not self.settings.trials:
            return []
        stops = stop_tokens(self.model, self.tokenizer)
        negative = self.ids("negative", "val")[: self.settings.answers]
        with track("the model's own answers", len(negative), "prompts") as advance:
            answers = generate(self.model, negative, ANSWER_TOKENS, stops, progress=advance)
        kept = [i for i, answer in enumerate(answers) if answer]
        if not kept:
            note("the model answers nothing to the negative prompts, so no edit can be tried")
            return []
        trials = Trials(
            self.model,
            directions,
            ranked,
            tokens,
            self.ids("positive", "val"),
            [negative[i] for i in kept],
            [answers[i] for i in kept],
        )
        return self._confirm(trials, trials.search(self.settings.trials), stops)

    def _confirm(self, trials: Trials, found: list[Trial], stops: list[int], most: int = 4) -> list[Trial]:
        """Let the best trials answer; the first whose answers do not refuse goes to the front.

        Only where the unedited model's answers are refusals by wording can this be told.
        """
        ids = self.ids("positive", "val")
        if self._refusal_rate(ids, stops) < 0.5:
            return found
        confirmed: list[Trial] = []
        for trial in found[:most]:
            with trials.edited(trial.choice):
                confirmed.append(trial.model_copy(update={"confirmed": self._refusal_rate(ids, stops)}))
            if (confirmed[-1].confirmed or 0.0) <= CONFIRMED:
                break
        # Only the last can have passed; where none did, the one that leaves least comes first.
        confirmed.sort(key=lambda t: t.confirmed or 0.0)
        return [*confirmed, *found[len(confirmed) :]]

    def _refusal_rate(self, ids: list[list[int]], stops: list[int]) -> float:
        with track("confirming by answers", len(ids), "prompts") as advance:
            answers = generate(self.model, ids, CONFIRM_TOKENS, stops, progress=advance)
        return sum(refused(self.tokenizer.decode(a)) for a in answers) / len(answers)


def extract(
    model: str,
    out: Path | str,
    *,
    concept: str | None = None,
    positive: str | None = None,
    negative: str | None = None,
    column: str | None = None,
    hub_split: str = "train",
    revision: str | None = None,
    settings: Settings | None = None,
    force: bool = False,
) -> Run:
    """Find where `model` represents a contrast, and which edit removes it at the least cost.

    Args:
        model: a checkpoint folder, a Hub id or a .gguf file.
        out: the run folder to make.
        concept: a named contrast; or `positive` and `negative`, two prompt sources.
        column, hub_split: which column and dataset split hold the prompts.
        settings: everything else.
        force: replace a run folder that exists.

    Raises:
        OrthogonalizeError: anything in model, prompts or output that cannot work.
    """
    settings = settings or Settings()
    out = Path(out)
    check_free(out, RUN, force, [Path(p) for p in (model, positive, negative) if p])
    unknown = [m for m in settings.methods if m not in METHODS]
    if unknown or "dim" not in settings.methods:
        raise OrthogonalizeError(f"--methods must name dim, and may add inlp; got {','.join(settings.methods)}")
    if settings.train < MINIMUM_TRAIN or settings.val < 1 or settings.test < 0:
        raise OrthogonalizeError(f"--train must be at least {MINIMUM_TRAIN}, --val 1 and --test 0")
    sides = read_contrast(concept, positive, negative, column, hub_split)
    counts = {"train": settings.train, "val": settings.val, "test": settings.test}
    prompts = [p for side in sides[:2] for p in split_prompts(side, settings.seed, **counts)]
    folder = find_model(model, revision)
    checkpoint = open_checkpoint(folder)
    architecture = architecture_of(checkpoint.config)
    work = _Extraction(folder, settings, prompts)
    tokens = work.measure_behaviour()
    words = [work.tokenizer.decode([t]) for t in tokens]
    note(f"behaviour tokens: {', '.join(map(repr, words))}")
    filtered = work.filter_prompts()
    directions = work.find_directions()
    candidates = work.score(directions, tokens)
    trials = work.try_edits(directions, candidates, tokens)
    base_score: dict[str, float] = {}
    sides_of: tuple[Side, ...] = ("positive", "negative")
    for side in sides_of:
        scores = [p.score for p in work.prompts if p.side == side and p.split == "val" and p.score is not None]
        base_score[side] = sum(scores) / len(scores)
    info = RunInfo(
        model=str(model),
        revision=commit_of(folder) or revision,
        architecture=architecture.family,
        weights=checkpoint.fingerprint(),
        prompts={
            f"{side}.{split}": _fingerprint([p.text for p in work.prompts if (p.side, p.split) == (side, split)])
            for side in ("positive", "negative")
            for split in ("train", "val", "test")
        },
        sensitive=sides[2],
        system=settings.system,
        template_arguments=dict(settings.template_arguments),
        chat_template=settings.chat_template,
        layer_count=directions.layer_count,
        width=architecture.width(checkpoint.config),
        methods=list(settings.methods),
        behaviour_tokens=tokens,
        behaviour_words=words,
        base_score=base_score,
        filtered=filtered,
        seed=settings.seed,
        versions=_versions(),
    )
    run = Run(info, work.prompts, directions, candidates, trials)
    with complete_folder(out, RUN, force) as partial:
        run.save(partial)
        plot_candidates(run, partial / "plots")
    return run


def _fingerprint(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
