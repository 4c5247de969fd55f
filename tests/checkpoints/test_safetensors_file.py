"""Safetensors files: a header is trusted only as far as the file bears it out."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from orthogonalize.checkpoints.safetensors_file import header_bytes, open_tensor_file, stored_bytes
from orthogonalize.core.errors import OrthogonalizeError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
quiet = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, header, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@quiet
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_tensors_written_by_the_library_are_read_back(tmp_path, shapes, dtype):
    tensors = {f"t{i}": (torch.randn(shape) * 3).to(dtype) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = open_tensor_file(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
        assert b"".join(file.chunks(name)) == bytes(stored_bytes(tensor))


@quiet
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4))
def test_library_reads_what_is_written_here(tmp_path, shapes):
    tensors = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    save_file(tensors, tmp_path / "a.safetensors")
    source = open_tensor_file(tmp_path / "a.safetensors")
    with (tmp_path / "b.safetensors").open("wb") as out:
        infos = sorted(source.tensors.values(), key=lambda t: t.start)
        out.write(header_bytes(infos, {}))
        for info in infos:
            out.write(stored_bytes(source.read(info.name)))
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_never_crash_the_header_reader(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    try:
        open_tensor_file(tmp_path / "x.safetensors")
    except OrthogonalizeError:
        return
    assert len(data) >= 10  # only a real header passes


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 300), value=st.integers(0, 255))
def test_flipped_byte_never_leads_outside_the_file(tmp_path, position, value):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 3), "b": torch.zeros(2)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        file = open_tensor_file(path)
    except OrthogonalizeError:
        return
    assert all(file.data_start + t.end <= len(data) for t in file.tensors.values())


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": ENTRY}, b"1234", "spans bytes"),
        ({"a": ENTRY}, b"12345678extra", "end at byte"),
        ({"a": ENTRY | {"shape": [3]}}, b"12345678", "claims"),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", "starts at byte"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, b"0123456789ab", "starts at byte"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"12345678", "not whole numbers"),
        ({"a": ENTRY | {"shape": [True]}}, b"12345678", "not whole numbers"),
        ({"a": {"dtype": "F32"}}, b"", "lacks"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
        (b'{"a": {"dtype": "F32"', b"", "not JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b"[" * 5000, b"", "not JSON"),
    ],
)
def test_inconsistent_header_is_refused_with_the_reason(tmp_path, header, data, why):
    with pytest.raises(OrthogonalizeError, match=why):
        open_tensor_file(write(tmp_path / "a.safetensors", header, data))


def test_header_larger_than_the_file_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(OrthogonalizeError, match="header claims"):
        open_tensor_file(tmp_path / "a.safetensors")


def library_accepts(path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError, AttributeError):
        return False
    return True


whole = st.one_of(st.integers(-1, 20), st.sampled_from([2**31, 2**63, 2**64, 2**70, 0.5, True, None, "1"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F32", "BF16", "U8", "F99", 3]),
        "shape": st.lists(whole, max_size=3),
        "data_offsets": st.one_of(st.lists(whole, max_size=3), st.tuples(st.integers(0, 16), st.integers(0, 16))),
    }
)
near = st.builds(
    lambda count, start: {"dtype": "F32", "shape": [count], "data_offsets": [start, start + 4 * count]},
    st.integers(0, 4),
    st.integers(0, 16),
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "..", ""]), st.one_of(near, near, entries)),
    size=st.integers(0, 24),
)
def test_header_that_the_library_refuses_is_refused(tmp_path, header, size):
    path = write(tmp_path / "a.safetensors", header, bytes(size))
    try:
        open_tensor_file(path)
    except OrthogonalizeError:
        return
    assert library_accepts(path)


@quiet
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_flipped_byte_that_the_library_refuses_is_refused(tmp_path, position, value):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, path, metadata={"x": "y"})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        open_tensor_file(path)
    except OrthogonalizeError:
        return
    assert library_accepts(path)


def test_huge_numbers_and_deep_nesting_are_refused(tmp_path):
    """Both could exhaust a JSON parser."""
    for bomb in (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"4294967296," * 50 + b'1],"data_offsets":[0,8]}}',
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    ):
        with pytest.raises(OrthogonalizeError):
            open_tensor_file(write(tmp_path / "a.safetensors", bomb, b"12345678"))


@pytest.mark.parametrize("header", [{"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
                                    {"__metadata__": {"a": "\udfff"}}], ids=["name", "metadata"])  # fmt: skip
def test_names_that_no_file_can_hold_are_refused(header, tmp_path):
    with pytest.raises(OrthogonalizeError, match="surrogate"):
        open_tensor_file(write(tmp_path / "a.safetensors", header))
