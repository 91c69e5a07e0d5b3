"""Adapters as bytes: one file per adapter, and what is refused before it is believed."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from fedia3.adapters.adapter import Adapter, PersonalAdapter, Vector
from fedia3.adapters.encoding import decode, decode_personal, digest, encode, encode_personal
from fedia3.adapters.safetensors_header import OWN_FILES, Limits, checked_header
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, WrongBaseModel

BASE = "b" * 64
GLOBAL = "a" * 64
SCHEMA = Schema(BASE, (Target("z.k_proj", "k", 2), Target("a.down_proj", "ff", 3)))
ADAPTER = Adapter(SCHEMA, np.array([1, 2, 3, 4, 5], dtype=np.float32))
FILE = encode(ADAPTER)
Fields = dict[str, Any]


def _vector(*values: float) -> Vector:
    return np.array(values, dtype=np.float32)


def _header_of(data: bytes) -> Fields:
    length = int.from_bytes(data[:8], "little")
    fields: Fields = json.loads(data[8 : 8 + length])
    return fields


def _file_of(header: Fields | bytes, data: bytes = FILE[-20:]) -> bytes:
    """A file with this header, written as the library writes it, and these tensor bytes."""
    raw = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return len(raw).to_bytes(8, "little") + raw + data


def _with_values(*values: float) -> bytes:
    return _file_of(_header_of(FILE), _vector(*values).tobytes())


def _with_metadata(**changes: Any) -> bytes:
    fields = _header_of(FILE)
    fields["__metadata__"] |= changes
    return _file_of(fields)


def _many_tensors(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [1]}
    fields = {f"t{i}": entry | {"data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}
    return _file_of(fields, b"\0" * 4 * count)


MUST_REJECT = {  # the rest of what is refused: tests/bad_inputs/test_payload.py
    "beyond 100": (_with_values(1, 1, -101, 1, 1), "magnitude 101"),
    "subnormal only": (_with_values(0, 0, 1e-40, 0, 0), "subnormal"),
    "all zeros": (_with_values(0, 0, 0, 0, 0), "silences the model"),
    "other format": (_with_metadata(format="pt"), "expected metadata format fedia3.adapter.v1"),
    "other form": (_with_metadata(form="personal"), "expected the form 'adapter'"),
    "other schema": (_with_metadata(schema="c" * 64), "order or the parts"),
    "metadata too many": (_with_metadata(note="hi"), "expected metadata"),
}


@pytest.mark.parametrize(("data", "message"), MUST_REJECT.values(), ids=MUST_REJECT)
def test_a_file_that_breaks_the_format_is_refused(data: bytes, message: str):
    """What is wrong with it is named in the error."""
    with pytest.raises(BadAdapter, match=message):
        decode(data, SCHEMA)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        pytest.param({"claimed_digest": "0" * 64}, "announced sha256", id="42 digest"),
        pytest.param({"claimed_bytes": len(FILE) + 1}, "announced", id="43 size"),
    ],
)
@pytest.mark.parametrize("decoder", [decode, decode_personal])
def test_bytes_other_than_announced_are_refused(
    decoder: Callable[..., object], claims: dict[str, Any], message: str
):
    """A size or a digest that does not belong to the bytes is the sender's mistake."""
    with pytest.raises(BadAdapter, match=message):
        decoder(FILE, SCHEMA, **claims)


def test_bytes_as_announced_are_taken():
    """The right size and digest change nothing."""
    assert decode(FILE, SCHEMA, claimed_bytes=len(FILE), claimed_digest=digest(FILE)) == ADAPTER


def test_decoding_gives_the_encoded_adapter_back():
    """The scales 1 to 5 come back in schema order, though names would sort the other way."""
    assert decode(FILE, SCHEMA).vector.tolist() == [1, 2, 3, 4, 5]


def test_the_safetensors_library_reads_our_files():
    """Any safetensors reader sees one tensor per target under its key."""
    tensors = load(FILE)

    assert {name: values.tolist() for name, values in tensors.items()} == {
        "z.k_proj.k": [1, 2],
        "a.down_proj.ff": [3, 4, 5],
    }


def test_tensors_in_another_order_give_the_same_adapter():
    """Names decide where scales belong, not their place in the file."""
    entry = {"dtype": "F32"}
    swapped = {
        "__metadata__": _header_of(FILE)["__metadata__"],
        "a.down_proj.ff": entry | {"shape": [3], "data_offsets": [0, 12]},
        "z.k_proj.k": entry | {"shape": [2], "data_offsets": [12, 20]},
    }

    assert decode(_file_of(swapped, _vector(3, 4, 5, 1, 2).tobytes()), SCHEMA) == ADAPTER


def test_equal_adapters_have_equal_bytes():
    """Minus zero equals zero, so it is written as zero."""
    zero = Adapter(SCHEMA, _vector(0, 1, 1, 1, 1))
    minus_zero = Adapter(SCHEMA, _vector(-0.0, 1, 1, 1, 1))

    assert zero == minus_zero
    assert encode(zero) == encode(minus_zero)


def test_the_tensors_are_aligned_to_eight_bytes():
    """Readers that map the file into memory find floats at even addresses."""
    assert (len(FILE) - 20) % 8 == 0


def test_an_adapter_of_another_base_model_is_refused_by_name():
    """Equal targets of two base models do not mix, and the error names both."""
    other = Schema("d" * 64, SCHEMA.targets)

    with pytest.raises(WrongBaseModel, match=r"bbb.*ddd"):
        decode(FILE, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param((0, 0, 0, 0, 0), "silences", id="all zeros"),
        pytest.param((1, 1, 1, 1, 101), "magnitude 101", id="beyond 100"),
    ],
)
def test_what_could_not_be_decoded_is_not_encoded(values: tuple[float, ...], message: str):
    """The mistake shows where it was made, not where the file is read."""
    with pytest.raises(BadAdapter, match=message):
        encode(Adapter(SCHEMA, _vector(*values)))


def test_larger_limits_let_larger_adapters_through():
    """A schema beyond 4 MiB is refused by default and passes where the limits say so."""
    schema = Schema(BASE, (Target("wide.down_proj", "ff", 2**20),))
    ones = Adapter.ones(schema)
    large = replace(OWN_FILES, max_bytes=8 * 2**20)

    with pytest.raises(BadAdapter, match="at most 4194304 bytes"):
        encode(ones)
    assert decode(encode(ones, limits=large), schema, limits=large) == ones


def test_a_personal_part_comes_back_with_its_global():
    """The delta and the name of the global adapter it belongs to survive."""
    personal = PersonalAdapter(SCHEMA, _vector(0, 0.5, 0, -0.5, 0), GLOBAL)

    back = decode_personal(encode_personal(personal), SCHEMA)

    assert back.delta.tolist() == [0, 0.5, 0, -0.5, 0]
    assert back.global_digest == GLOBAL


def test_a_personal_part_may_be_zeros():
    """Nothing learned yet is exactly the global adapter, unlike scales of zero."""
    nothing = PersonalAdapter(SCHEMA, _vector(0, 0, 0, 0, 0), GLOBAL)

    assert not decode_personal(encode_personal(nothing), SCHEMA).delta.any()


def test_a_personal_part_is_not_taken_for_an_adapter():
    """A delta near zero, used as scales, would silence the model."""
    personal = encode_personal(PersonalAdapter(SCHEMA, _vector(0, 0.5, 0, 0, 0), GLOBAL))

    with pytest.raises(BadAdapter, match="expected the form 'adapter', got 'personal'"):
        decode(personal, SCHEMA)


def test_an_adapter_is_not_taken_for_a_personal_part():
    """Scales near one, used as a delta, would double the model."""
    with pytest.raises(BadAdapter, match="expected the form 'personal', got 'adapter'"):
        decode_personal(FILE, SCHEMA)


@pytest.mark.parametrize(
    ("delta", "global_digest", "message"),
    [
        pytest.param((0, 0, 0, 0, 1e-40), GLOBAL, "subnormal", id="subnormal only"),
        pytest.param((0, 0, 0, 0, 101), GLOBAL, "magnitude 101", id="beyond 100"),
        pytest.param((0, 0, 0, 0, 1), "../etc", "sha256 in hex", id="a path for a digest"),
        pytest.param((0, 0, 0, 0, 1), "A" * 64, "sha256 in hex", id="capital letters"),
    ],
)
def test_a_personal_part_nobody_trained_is_refused(
    delta: tuple[float, ...], global_digest: str, message: str
):
    """A delta of noise or of nonsense, and a global that is not named by a digest."""
    good = encode_personal(PersonalAdapter(SCHEMA, _vector(0, 0, 0, 0, 1), GLOBAL))
    fields = _header_of(good)
    fields["__metadata__"]["global"] = global_digest

    with pytest.raises(BadAdapter, match=message):
        encode_personal(PersonalAdapter(SCHEMA, _vector(*delta), global_digest))
    with pytest.raises(BadAdapter, match=message):
        decode_personal(_file_of(fields, _vector(*delta).tobytes()), SCHEMA)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle():
    """Its length starts with the two bytes that start a pickle."""
    fields = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    filled = {"__metadata__": {"note": ""}} | fields
    filled["__metadata__"]["note"] = "x" * (640 - len(_file_of(filled, b"")) + 8)
    data = _file_of(filled, b"\0" * 4)

    assert data[:2] == b"\x80\x02"
    assert list(checked_header(data).tensors) == ["a"]


def test_as_many_tensors_as_allowed_pass():
    """512 tensors are the most, and are enough for 170 layers of keys, values and feed-forward."""
    assert len(checked_header(_many_tensors(512)).tensors) == 512


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=256) | st.binary(max_size=64).map(_file_of))
def test_any_bytes_are_refused_as_a_bad_adapter(data: bytes):
    """Noise, bare or framed as a header, never raises anything but our errors."""
    with pytest.raises(BadAdapter):
        decode(data, SCHEMA)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["F32", "F64", "", "a\ud800", "fedia3.adapter.v1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["__metadata__", "z.k_proj.k", "a.down_proj.ff"]),
    st.sampled_from(["dtype", "shape", "data_offsets", "base", "global", None]),
    json_values,
)
def test_any_header_is_refused_or_means_the_same_adapter(
    key: str, field: str | None, value: object
):
    """Whatever JSON stands in one place of the header, the scales never come out changed."""
    fields = _header_of(FILE)
    if field is None:
        fields[key] = value
    else:
        fields[key][field] = value
    with suppress(BadAdapter, WrongBaseModel):
        assert decode(_file_of(fields), SCHEMA) == ADAPTER


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_the_header_never_changes_the_scales(bit: int):
    """Each bit before the tensors, flipped alone, is refused or means the same adapter."""
    refused = 0
    for position in range(len(FILE) - 20):
        flipped = bytearray(FILE)
        flipped[position] ^= 1 << bit
        try:
            assert decode(bytes(flipped), SCHEMA) == ADAPTER
        except (BadAdapter, WrongBaseModel):
            refused += 1
    assert refused == len(FILE) - 20


def test_limits_of_peft_files_do_not_apply_to_ours():
    """Half precision, which PEFT may write, passes only where the limits name it."""
    halves = _file_of({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4)

    assert checked_header(halves, Limits(dtypes=("F16",))).tensors["a"].shape == (2,)
    with pytest.raises(BadAdapter, match="expected dtype F32, got F16"):
        checked_header(halves)
