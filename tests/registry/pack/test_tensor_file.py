"""Files of tensors: what is written is read back, and a header is checked before the parser sees it."""

import json
import struct
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from lorary.domains.errors import IncompatibleError, IntegrityError
from lorary.registry.pack.tensor_file import ADAPTER_TYPES, MAX_HEADER, MAX_TENSORS, load_tensors, save_tensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
names = st.from_regex(r"[A-Za-z0-9_.]{1,20}", fullmatch=True)
shapes = st.lists(st.integers(0, 5), max_size=4)


def built(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: str = "F32", shape: Any = (1,), data_offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


@given(st.dictionaries(names, st.tuples(shapes, st.sampled_from(DTYPES)), max_size=5))
def test_tensors_are_read_back_as_they_were(shaped: dict[str, Any]) -> None:
    tensors = {name: torch.arange(torch.Size(s).numel()).reshape(s).to(dtype) for name, (s, dtype) in shaped.items()}

    found = load_tensors(save_tensors(tensors), source="x")

    assert list(found) == sorted(tensors)
    assert all(torch.equal(found[n], tensors[n]) and found[n].dtype == tensors[n].dtype for n in tensors)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"1234567", "in a file of 7"),
        (built({}, length=1 << 63), "a header of 9223372036854775808 bytes"),
        (built(b" " * MAX_HEADER + b"{}"), f"a header of {MAX_HEADER + 2} bytes"),
        (built({}, b"rest"), "overlap, or leave bytes"),
        (built([]), "no object"),
        (built(b"{nonsense"), "Expecting property name"),
        (built(b"\xff\xfe"), "utf-8"),
        (built(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'), "twice"),
        (built(b'{"a":NaN}'), "NaN is not a valid JSON number"),
        (built(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "nested deeper"),
        (built(b'{"a":' + b"9" * 5000 + b"}"), "does not fit into 64 bits"),
        (built({"a": entry(), "__metadata__": {"format": "pt", "note": "\x1b[31m"}}, b"1234"), "metadata other than"),
        (built({"a\x1b": entry()}, b"1234"), "a tensor is named"),
        (built({"": entry()}, b"1234"), "a tensor is named"),
        (built({"a" * 256: entry()}, b"1234"), "a tensor is named"),
        (built({"a": entry(more=1)}, b"1234"), "another description"),
        (built({"a": []}, b"1234"), "another description"),
        (built({"a": entry("I8", [4])}, b"1234"), "numbers of type 'I8'"),
        (built({"a": entry("BOOL", [4])}, b"1234"), "numbers of type 'BOOL'"),
        (built({"a": entry(["F32"])}, b"1234"), "numbers of type"),  # type: ignore[arg-type]
        (built({"a": entry(shape=[1, 1, 1, 1, 1])}, b"1234"), "no counts"),
        (built({"a": entry(shape=[-1])}, b"1234"), "no counts"),
        (built({"a": entry(shape=[True])}, b"1234"), "no counts"),
        (built({"a": entry(shape=[1.0])}, b"1234"), "no counts"),
        (built({"a": entry(shape=1)}, b"1234"), "no counts"),
        (built({"a": entry(data_offsets=[0])}, b"1234"), "no counts"),
        (built({"a": entry(data_offsets=[4, 0])}, b"1234"), "has -4 bytes"),
        (built({"a": entry(shape=[1 << 40, 1 << 40])}, b"1234"), "its shape"),
        (built({"a": entry(shape=[0, 1 << 60], data_offsets=[0, 4])}, b"1234"), "needs 0"),
        (built({"a": entry(shape=[2])}, b"1234"), "needs 8"),
        (built({"a": entry(), "b": entry()}, b"1234"), "overlap"),
        (built({"a": entry(data_offsets=[4, 8])}, b"12345678"), "leave bytes between"),
        (built({"a": entry(data_offsets=[0, 4])}, b"12345678"), "leave bytes between"),
    ],
    ids=range(34),
)
def test_a_file_that_could_not_have_been_written_here_is_refused(data: bytes, cause: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        load_tensors(data, source="the file")

    assert caught.value.message.startswith("the file")
    assert cause in str(caught.value.cause)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    data = save_tensors({"a": torch.tensor([1.0, value]).to(dtype)})

    with pytest.raises(IntegrityError, match="not finite"):
        load_tensors(data, source="x")


def test_too_many_tensors_are_refused_before_any_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.registry.pack.tensor_file.MAX_TENSORS", 3)
    data = save_tensors({f"t{i}": torch.zeros(1) for i in range(4)})

    with pytest.raises(IntegrityError) as caught:
        load_tensors(data, source="x")

    assert "it has 4 tensors; at most 3" in str(caught.value.cause)
    assert MAX_TENSORS == 20_000


def test_a_header_bomb_costs_nothing() -> None:
    header = {f"t{i}": entry(shape=[0], data_offsets=[0, 0]) for i in range(100_000)}
    data = built(header)
    assert len(load(data)) == 100_000  # the parser takes it

    started = time.perf_counter()
    with pytest.raises(IntegrityError):
        load_tensors(data, source="x")

    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.bfloat16]
)
def test_an_adapter_may_have_numbers_that_float32_holds(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-3, 3, 24).reshape(4, 6).to(dtype)

    found = load_tensors(save_tensors({"a": tensor}), source="theirs", types=ADAPTER_TYPES)["a"]

    assert torch.equal(found.float(), tensor.float())
    assert found.dtype == (torch.float32 if tensor.element_size() == 1 else dtype)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64, torch.float8_e8m0fnu]
)
def test_numbers_of_other_types_are_refused_as_a_type(dtype: torch.dtype) -> None:
    data = save_tensors({"a": torch.ones(4).to(dtype)})

    with pytest.raises(IncompatibleError, match="cannot be imported") as refusal:
        load_tensors(data, source="theirs", types=ADAPTER_TYPES)
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_tensors(data, source="a pack")

    assert "has numbers of type" in str(refusal.value.cause)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_values_that_are_not_finite_are_refused(dtype: torch.dtype) -> None:
    data = save_tensors({"a": torch.tensor([1.0, float("nan")]).to(dtype)})

    with pytest.raises(IntegrityError, match="not finite"):
        load_tensors(data, source="theirs", types=ADAPTER_TYPES)
