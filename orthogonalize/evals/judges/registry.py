"""The judges that `--judge` can name. To add one, write a file with an `ENTRIES` tuple and name it in `MODULES`.

Code outside this package calls `JUDGES.add(...)` instead. This module and those that it imports do not import torch.
"""

from __future__ import annotations

import re
from importlib import import_module

from ...core.errors import OrthogonalizeError
from ...core.registry import Registry
from ...models.names import check_model_name
from .base import EndpointJudge, Judge, ModelJudge, WordingJudge

# In the order of help texts and messages.
MODULES = ("llama_guard", "harmbench", "wildguard", "qwen3guard", "shieldgemma", "endpoint", "prefix")

JUDGES: Registry[Judge] = Registry("judge")

for _module in MODULES:
    for _entry in import_module(f".{_module}", __package__).ENTRIES:
        JUDGES.add(_entry)


def model_judges() -> dict[str, ModelJudge]:
    """The judges that are models, by name."""
    return {name: judge for name, judge in JUDGES.items() if not isinstance(judge, WordingJudge | EndpointJudge)}


def find_judge(text: str) -> Judge:
    """The judge that `NAME`, `NAME=MODEL` or `NAME:URL#MODEL` names.

    Raises:
        OrthogonalizeError: the name is unknown, MODEL is empty or given for a judge without a model, or a server's
            address is missing.
    """
    name = judge_name(text)
    judge = JUDGES.find(name)
    if isinstance(judge, EndpointJudge):
        address_of(text)
        return judge
    name, equals, model = text.partition("=")
    if name not in JUDGES:
        raise OrthogonalizeError(f"judge {judge.name} is behind no server; write {judge.name}, or {judge.name}=MODEL")
    if equals and isinstance(judge, WordingJudge):
        raise OrthogonalizeError(f"judge {name} has no model; leave out ={model}")
    if equals and not model.strip():
        raise OrthogonalizeError(f"judge {text!r} names no model; leave out the =, or give one")
    return judge


def judge_name(text: str) -> str:
    """The name of the judge in `NAME`, `NAME=MODEL` or `NAME:URL#MODEL`."""
    return re.split("[=:]", text, maxsplit=1)[0]


def address_of(text: str) -> str:
    """The address in `NAME:URL#MODEL`.

    Raises:
        OrthogonalizeError: there is none, or it cannot be one.
    """
    from ...engines.endpoint import Endpoint

    name, colon, address = text.partition(":")
    if not colon or "=" in name:
        raise OrthogonalizeError(f"judge {judge_name(text)} is behind a server: write {judge_name(text)}:URL#MODEL")
    Endpoint.parse(address)
    return address


def check_judge(text: str) -> None:
    """Check what names a judge without loading anything: it is known, and its MODEL or URL can be one.

    Raises:
        OrthogonalizeError: as `find_judge`, or MODEL is neither a folder nor of the form of a Hub id, or the address
            cannot be one.
    """
    if not isinstance(find_judge(text), EndpointJudge) and (model := text.partition("=")[2]):
        check_model_name(model)


def find_model_judge(text: str) -> tuple[ModelJudge, str]:
    """The judge that `NAME` or `NAME=MODEL` names, and its model: MODEL, or the judge's default.

    Raises:
        OrthogonalizeError: as `find_judge`, or the judge is not a model.
    """
    judge = find_judge(text)
    if isinstance(judge, EndpointJudge):
        raise OrthogonalizeError(f"judge {judge.name} runs elsewhere, and has no model here")
    if isinstance(judge, WordingJudge):
        raise OrthogonalizeError(
            f"judge {judge.name} goes by wording, and eval counts such refusals anyway; "
            f"name a judge model ({', '.join(model_judges())})"
        )
    return judge, text.partition("=")[2] or judge.model
