"""A checkpoint folder: its configuration and safetensors weights, validated when opened."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..core.errors import OrthogonalizeError
from ..core.files import check_regular_files, is_inside
from ..core.output_folders import CONFIG
from ..core.progress import Progress, track
from .known_files import DRAFTS, is_known, is_weight_name
from .safetensors_file import DTYPES, EDITABLE, RemoteFile, TensorFile, TensorInfo, open_tensor_file
from .settings_files import quantization, read_json, read_settings, stated_dtype

HEADERS = 8  # weight files whose headers are read at a time
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RECIPE = "orthogonalize.json"
CARD = "README.md"
BIASES = ("bias", "qkv_bias", "attention_bias", "mlp_bias")  # settings by which vLLM gives matrices biases
LARGEST_CARD = 2**20  # bytes of a model card that are read
HASHED_AT_ONCE = 4  # files
SETTINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".bpe")  # endings of files that change results
UNFINISHED = (".*.partial", ".*.lock", ".*.journal")  # left by killed processes
NOT_COPIED = (CARD, RECIPE, CONFIG, "report.json", "report.html", ".git/*", ".cache/*", ".gitattributes", *UNFINISHED)
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
# What training leaves in a folder, with its machine's paths and users.
LOGS = (
    *("*.log", "wandb/*", "mlruns/*", "runs/*", "logs/*", "checkpoint-*/*", "events.out.tfevents*"),
    *("trainer_state.json", "trainer_log.jsonl", "training_args*", "optimizer*", "scheduler*", "rng_state*"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a `config.json` and safetensors weights, whose headers have all been validated."""

    path: Path
    config: dict[str, Any]
    files: dict[str, TensorFile]
    indexed: bool

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the model's weight files."""
        return {name: info for file in self.files.values() for name, info in file.tensors.items()}

    @property
    def renamed(self) -> bool:
        """Whether tensors have other names, or are split differently, than in the files on disk."""
        return any(file.renamed for file in self.files.values())

    def split(self, parts: Mapping[str, Mapping[str, int]]) -> Checkpoint:
        """The same checkpoint with each tensor in `parts` split into several (see `TensorFile.split`)."""
        return replace(self, files={name: file.split(parts) for name, file in self.files.items()})

    def file_of(self, name: str) -> TensorFile:
        """The file that holds tensor `name`.

        Raises:
            KeyError: there is none.
        """
        for file in self.files.values():
            if name in file.tensors:
                return file
        raise KeyError(name)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype."""
        return self.file_of(name).read(name)

    def file_for(self, additions: Mapping[str, Addition]) -> str:
        """The name of the weight file to put `additions` in: the one with a tensor that they copy, else the first."""
        copied = [addition.copy_of for addition in additions.values() if addition.copy_of is not None]
        return next(
            (name for name, file in sorted(self.files.items()) if file.tensors.keys() & copied), min(self.files)
        )

    @property
    def dtype(self) -> str | None:
        """The dtype that the model is meant to run in, as torch calls it: the configuration's, else the embedding's.

        None if neither says.
        """
        named = stated_dtype(self.config)
        if named is not None and isinstance(getattr(torch, named, None), torch.dtype):
            return named
        floats = [info for info in self.tensors.values() if info.dtype in EDITABLE and len(info.shape) == 2]
        embedding = max(floats, key=lambda info: ("embed" in info.name, info.size), default=None)
        return None if embedding is None else str(DTYPES[embedding.dtype]).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def remote_sizes(self) -> list[int]:
        """The sizes in bytes of the weight files that are not on this disk, the largest first."""
        return sorted((file.size for file in self.files.values() if file.remote is not None), reverse=True)

    def side_files(self) -> list[Path]:
        """The files that an edit copies byte for byte, relative to the folder (see `known_files`)."""
        return [name for name in self._others() if not self._is_private(name) and self._belongs(name)]

    def private_files(self) -> list[Path]:
        """What an edit leaves behind: hidden files, training logs, and links that lead out of the folder."""
        return [name for name in self._others() if self._is_private(name)]

    def left_out(self) -> list[Path]:
        """What else an edit leaves behind: copies of the weights, and whatever is not known to belong to a model."""
        return [name for name in self._others() if not self._is_private(name) and not self._belongs(name)]

    @cached_property
    def _card(self) -> str:
        """The text of the model card; empty without one that can be read."""
        file = self.path / CARD
        readable = file.is_file() and self._is_inside(Path(CARD)) and file.stat().st_size <= LARGEST_CARD
        return file.read_text("utf-8", errors="replace") if readable else ""

    def _belongs(self, name: Path) -> bool:
        """Whether a file is one that an edited copy of the model has as well."""
        if _matches(name, DRAFTS):
            return not self._repeats_weights(name)
        return is_known(name, self._card)

    def _repeats_weights(self, name: Path) -> bool:
        """Whether a file of tensors has the name or the bytes of a weight of this model."""
        other = open_tensor_file(self.path / name)
        if other.tensors.keys() & self.tensors.keys():
            return True
        sizes: dict[int, list[str]] = {info.size: [] for info in other.tensors.values() if info.size}
        for tensor, info in self.tensors.items():
            if info.size in sizes:
                sizes[info.size].append(tensor)
        return any(
            all(a == b for a, b in zip(other.chunks(mine), self.file_of(known).chunks(known), strict=True))
            for mine, info in other.tensors.items()
            for known in sizes.get(info.size, ())
        )

    def _others(self) -> list[Path]:
        known = {*self.files, INDEX, "config.json"}
        return [name for name in walk(self.path) if str(name) not in known and not _matches(name, NOT_COPIED)]

    def _is_private(self, name: Path) -> bool:
        hidden = any(part.startswith(".") for part in name.parts)
        return hidden or _matches(name, LOGS) or not self._is_inside(name)

    def check_inside(self, name: Path) -> None:
        """Reject a file of the folder that is a link to elsewhere, which a push would upload.

        Raises:
            OrthogonalizeError: the message names it.
        """
        if not self._is_inside(name):
            raise OrthogonalizeError(f"{self.path / name} is a link that leads out of its folder; remove it")

    def _is_inside(self, name: Path) -> bool:
        return _stays_inside(self.path, name)

    def check_nothing_beside(self) -> None:
        """Reject a folder of which vLLM would read more than these weights: without an index, it reads every file.

        Raises:
            OrthogonalizeError: the message names a file.
        """
        others = {path.name for path in self.path.glob("*.safetensors")} - self.files.keys()
        if others and not self.indexed:
            raise OrthogonalizeError(
                f"vLLM would read {min(others)} as well, as {self.path} has no {INDEX}; remove it, or use --engine hf"
            )

    def check_biases(self) -> None:
        """Reject settings that ask vLLM for biases where no matrix has one: it would not fill them with anything.

        Raises:
            OrthogonalizeError: the message names the setting.
        """
        stated = (self.config, self.config.get("text_config") or {})
        asked = [key for key in BIASES if any(isinstance(each, dict) and each.get(key) for each in stated)]
        matrices = {name.rpartition(".")[0] for name, tensor in self.tensors.items() if len(tensor.shape) > 1}
        if asked and not any(f"{name}.bias" in self.tensors for name in matrices):
            raise OrthogonalizeError(
                f"{self.path / 'config.json'} asks for biases ({asked[0]}), of which none is stored; vLLM would use "
                "whatever is in memory; remove that key, or use --engine hf"
            )

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of every weight file, by file name; of a remote file, what its server says."""
        with track("fingerprint of the weights", self.weight_bytes, "bytes") as advance:
            lock = threading.Lock()

            def counted(size: int) -> None:
                with lock:
                    advance(size)

            def hashed(name: str) -> str:
                file = self.files[name]
                if file.remote is None:
                    return _sha256(file.path, counted)
                counted(file.size)
                return file.remote.sha256

            names = sorted(self.files)
            with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
                return dict(zip(names, pool.map(hashed, names), strict=True))

    def settings_fingerprint(self) -> dict[str, str]:
        """SHA-256 of every other file that changes what the model computes or what its tokenizer does, by name."""
        names = [name for name in self.side_files() if name.suffix in SETTINGS]
        return {str(name): _sha256(self.path / name) for name in (Path("config.json"), *names)}


def walk(folder: Path) -> Iterator[Path]:
    """Every file in a folder and those below, relative to it, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder)


def _stays_inside(folder: Path, name: Path) -> bool:
    """Whether a file of `folder`, all links followed, lies in it or among the blobs of its cached repository."""
    here = folder.resolve()
    blobs = here.parent.parent / "blobs"  # of a snapshot in the Hub's cache
    return is_inside(folder / name, here, *([blobs] if here.parent.name == "snapshots" else []))


def _matches(name: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name.name, pattern) or fnmatch(str(name), pattern) for pattern in patterns)


def _sha256(path: Path, progress: Progress | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(2**22):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index says.

    Raises:
        OrthogonalizeError: it does not, or points outside its folder.
    """
    listed = read_json(index)
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise OrthogonalizeError(f"{index} has no weight_map; fetch it again")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise OrthogonalizeError(f"{index} has a file name that is not a string; fetch it again")
        if not is_weight_name(name):
            raise OrthogonalizeError(
                f"{index} points outside its folder ({name!r}); this checkpoint is not to be trusted"
            )
    return weight_map


def weight_names(folder: Path) -> list[str]:
    """The names of the weight files of a model whose settings are in `folder`, whether or not they are there.

    Raises:
        OrthogonalizeError: its index is damaged.
    """
    index = folder / INDEX
    return sorted(set(_weight_map(index).values())) if index.exists() else [SINGLE]


def _weight_files(folder: Path, remote: Mapping[str, RemoteFile]) -> tuple[dict[str, TensorFile], bool]:
    index = folder / INDEX
    present = {path.name for path in folder.glob("*.safetensors")} | remote.keys()
    if not index.exists():
        if SINGLE in present:
            return _open_all(folder, [SINGLE], remote), False
        if present:
            raise OrthogonalizeError(f"{folder} has safetensors files but neither {SINGLE} nor {INDEX}")
        if any(_matches(name, PICKLES) for name in walk(folder)):
            raise OrthogonalizeError(
                f"{folder} has pickled weights only, which can run arbitrary code when loaded; "
                "convert them to safetensors first (the Hub's safetensors/convert Space does)"
            )
        raise OrthogonalizeError(f"{folder} has no weights ({SINGLE} or {INDEX})")
    weight_map = _weight_map(index)
    if SINGLE in present and SINGLE not in weight_map.values():
        raise OrthogonalizeError(
            f"{folder} has both {INDEX} and {SINGLE}, and loaders disagree on which to read; keep one"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file() and name not in remote:
            raise OrthogonalizeError(f"{folder} lacks the shard {name}; fetch it again")
    files = _open_all(folder, names, remote)
    stored: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.tensors:
            if stored.setdefault(tensor, name) != name:
                raise OrthogonalizeError(
                    f"{folder} has {tensor!r} in more than one shard, and loaders disagree on which to read; "
                    "fetch the shards again"
                )
    if stored != weight_map:
        wrong = sorted(set(stored.items()) ^ set(weight_map.items()))[0][0]
        raise OrthogonalizeError(f"{index} and the shards disagree about {wrong!r}; fetch the checkpoint again")
    return files, True


def _open_all(folder: Path, names: Sequence[str], remote: Mapping[str, RemoteFile]) -> dict[str, TensorFile]:
    """The weight files `names`, opened in parallel, since a remote header is a wait for its server."""
    with ThreadPoolExecutor(HEADERS) as pool:
        opened = pool.map(lambda name: open_tensor_file(folder / name, remote.get(name)), names)
        return dict(zip(names, opened, strict=True))


def open_checkpoint(folder: Path | str, remote: Mapping[str, RemoteFile] | None = None) -> Checkpoint:
    """Open a checkpoint folder and validate the header of every weight file.

    Args:
        remote: weight files that are elsewhere, by the names that they would have in the folder.

    Raises:
        OrthogonalizeError: something is missing, truncated, inconsistent or unsafe.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OrthogonalizeError(f"no such model folder: {folder}")
    if (folder / "adapter_config.json").exists():
        raise OrthogonalizeError(
            f"{folder} holds an adapter, which loaders would apply on top of the weights; merge it into the model first"
        )
    if not (folder / "config.json").exists():
        raise OrthogonalizeError(f"{folder} has no config.json; is it a model folder?")
    check_regular_files(folder)
    config = read_settings(folder / "config.json")
    quantization(config)
    if (folder / "generation_config.json").exists():
        read_settings(folder / "generation_config.json")
    files, indexed = _weight_files(folder, remote or {})
    return Checkpoint(folder, config, files, indexed)


@dataclass(frozen=True)
class Addition:
    """A tensor that the edit adds: dtype and shape are known in advance, values are computed when it is written.

    `copy_of` is the name of the source tensor that it starts as a copy of, if any.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    copy_of: str | None = None

    @classmethod
    def copy(cls, source: Checkpoint, name: str) -> Addition:
        """A second tensor with the values of tensor `name`."""
        info = source.tensors[name]
        return cls(info.dtype, info.shape, lambda: source.read(name), name)

    @classmethod
    def zeros(cls, dtype: str, shape: tuple[int, ...]) -> Addition:
        """A tensor of zeros."""
        return cls(dtype, shape, lambda: torch.zeros(shape, dtype=DTYPES[dtype]))

    @property
    def size(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)
