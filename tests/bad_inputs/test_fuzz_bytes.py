"""Whatever bytes a file, a name or a token is made of, it is sound or refused, and nothing else.

What is accepted comes back as the same bytes. Memory stays in proportion to the input.
"""

import json
import tracemalloc
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import strategies as st

from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.encoding import decode, decode_personal, digest, encode, encode_personal
from fedia3.adapters.safetensors_header import PEFT_FILES, checked_header
from fedia3.adapters.schema import Schema, Target
from fedia3.coordinator.access import peer_address, shown_token, signed_parts
from fedia3.coordinator.records import MAX_NAME, Owner
from fedia3.coordinator.services.adapters import checked_part
from fedia3.coordinator.tokens import code_sha256, new_code, new_token, token_sha256
from fedia3.errors import BadAdapter, BadInput, BadSignature, BadToken, WrongBaseModel
from fedia3.proto.adapters_pb2 import PublishRequest
from fedia3.proto.signing import NONCE_HEADER, SIGNATURE_HEADER, TIME_HEADER, TOKEN_HEADER

from .fuzzing import fuzzed, mutated, scripts

pytestmark = pytest.mark.slow  # a minute

SCHEMA = Schema("b" * 64, (Target("z.k_proj", "k", 2), Target("a.down_proj", "ff", 3)))
VALUES = np.array([1, 2, 3, 4, 5], dtype=np.float32)
FILE = encode(Adapter(SCHEMA, VALUES))
PART = encode_personal(PersonalAdapter(SCHEMA, VALUES, "a" * 64))

# Of a header's JSON a byte becomes an object of a hundred at most: a list, or a small number.
BYTES_OF_ONE, BYTES_AT_LEAST = 150, 1 << 18


def require_sound_or_refused(data: bytes) -> None:
    """Read it as each kind of file, and as what a publish carries."""
    for read in (read_adapter, read_part, read_published, read_header):
        with suppress(BadAdapter, WrongBaseModel):
            read(data)


@contextmanager
def memory_for(size: int) -> Iterator[None]:
    """What is allocated meanwhile stays in proportion to an input of so many bytes."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < BYTES_AT_LEAST + BYTES_OF_ONE * size


def read_adapter(data: bytes) -> None:
    """An adapter that is accepted is one value, and its file says the same."""
    adapter = decode(data, SCHEMA)
    assert decode(encode(adapter), SCHEMA) == adapter


def read_part(data: bytes) -> None:
    """As with an adapter."""
    part = decode_personal(data, SCHEMA)
    again = decode_personal(encode_personal(part), SCHEMA)
    assert again.delta.tobytes() == part.delta.tobytes()
    assert again.global_digest == part.global_digest


def read_published(data: bytes) -> None:
    """What a publish is let in with is what will be fetched, byte for byte."""
    request = PublishRequest(data=data, digest=digest(data))
    assert encode_personal(checked_part(request, SCHEMA)) == data


def read_header(data: bytes) -> None:
    """Whatever tensors there are, they take up the file without a hole."""
    header = checked_header(data, PEFT_FILES)
    places = sorted((entry.first, entry.end) for entry in header.tensors.values())
    starts, ends = zip(*places, strict=True)
    assert (*starts[1:], len(data)) == ends


def framed(header: bytes) -> bytes:
    """A file of this header and no tensors."""
    return len(header).to_bytes(8, "little") + header


@fuzzed(12_000, data=st.binary(max_size=256))
def test_any_bytes(data: bytes) -> None:
    """As they come, and as a header."""
    require_sound_or_refused(data)
    require_sound_or_refused(framed(data))


@fuzzed(45_000, sound=st.sampled_from((FILE, PART)), script=scripts)
def test_any_edit_of_a_sound_file(sound: bytes, script: bytes) -> None:
    """Flips, cuts, splices and repeats anywhere in it."""
    require_sound_or_refused(mutated(sound, script))


@fuzzed(15_000, sound=st.sampled_from((FILE, PART)), script=scripts)
def test_any_edit_of_a_sound_header(sound: bytes, script: bytes) -> None:
    """In the header alone, whose length is then put right: the edit reaches the JSON's parser."""
    length = int.from_bytes(sound[:8], "little")
    header = mutated(sound[8 : 8 + length], script)
    require_sound_or_refused(framed(header) + sound[8 + length :])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["F32", "F64", "", "a\ud800", "fedia3.adapter.v1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@fuzzed(
    4_000,
    sound=st.sampled_from((FILE, PART)),
    key=st.sampled_from(["__metadata__", "z.k_proj.k", "a.down_proj.ff", "other"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "base", "global", None]),
    value=json_values,
)
def test_any_value_in_a_sound_header(
    sound: bytes, key: str, field: str | None, value: object
) -> None:
    """JSON of any kind in one of its places."""
    length = int.from_bytes(sound[:8], "little")
    fields = json.loads(sound[8 : 8 + length])
    if field is None or key not in fields:
        fields[key] = value
    else:
        fields[key][field] = value
    header = json.dumps(fields, separators=(",", ":")).encode()
    require_sound_or_refused(framed(header) + sound[8 + length :])


@fuzzed(
    400,
    head=st.sampled_from((b"", b"{", b'{"a":', b'{"__metadata__":', b'{"a":{"shape":')),
    unit=st.sampled_from((b"[", b'{"a":', b'"":1,', b"[],", b"1,", b" ", b"\\u0000", b"9"))
    | st.binary(min_size=1, max_size=6),
    size=st.integers(0, 1 << 16),
)
def test_any_repetition(head: bytes, unit: bytes, size: int) -> None:
    """As much of one thing as a header may hold: it takes no more memory than it says."""
    data = framed((head + unit * (size // len(unit)))[: 1 << 16])
    with memory_for(len(data)):
        require_sound_or_refused(data)


any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=160)


def require_a_name_or_refused(text: str) -> None:
    """A name that is accepted can be stored, shown and found again under its own spelling."""
    try:
        owner = Owner.user(text)
    except BadInput:
        return
    assert 1 <= len(owner.name) <= MAX_NAME
    assert owner.name == unicodedata.normalize("NFC", text)
    assert Owner.user(owner.name) == owner
    assert owner.name.encode().decode() == owner.name


@fuzzed(8_000, text=any_text)
def test_any_text_as_a_name(text: str) -> None:
    """Of any characters there are, halves of some included."""
    require_a_name_or_refused(text)


@fuzzed(300, unit=st.text(min_size=1, max_size=4), count=st.integers(1, 1 << 19))
def test_any_repetition_as_a_name(unit: str, count: int) -> None:
    """As much of one thing as a message may hold; the accents among it take no longer."""
    require_a_name_or_refused(unit * count)
    require_a_name_or_refused("a" + "\u0315\u0300" * count)


TOKEN, CODE = (
    new_token("admin", lambda size: bytes(range(size))),
    new_code(lambda size: b"x" * size),
)


@fuzzed(6_000, script=scripts)
def test_any_edit_of_a_token(script: bytes) -> None:
    """A token is what was handed out, or none; so is what a call shows it in."""
    text = mutated(f"Bearer {TOKEN}".encode(), script).decode("latin-1")
    try:
        token = shown_token([(TOKEN_HEADER, text)])
        assert len(token_sha256(token)) == 32
    except BadToken:
        return
    assert text == f"Bearer {TOKEN}"


@fuzzed(6_000, text=any_text)
def test_any_text_as_a_token_or_code(text: str) -> None:
    """No text but a token's is one; a code's is looked up as it is, and never found."""
    with pytest.raises(BadToken):
        token_sha256(text)
    assert code_sha256(text) != code_sha256(CODE)
    assert isinstance(peer_address(text), str)


@fuzzed(
    4_000,
    nonce=st.binary(max_size=20) | any_text,
    time_ms=any_text | st.integers().map(str) | st.binary(max_size=8),
    signature=st.binary(max_size=80) | any_text,
)
def test_anything_as_a_signature(nonce: object, time_ms: object, signature: object) -> None:
    """Header by header, it has the shape of a signed call's or is refused."""
    headers = [(NONCE_HEADER, nonce), (TIME_HEADER, time_ms), (SIGNATURE_HEADER, signature)]
    try:
        signed = signed_parts(headers)  # type: ignore[arg-type]  # anything at all
    except BadSignature:
        return
    assert (signed.nonce, signed.signature) == (nonce, signature)
    assert signed.time_ms == int(str(time_ms)) >= 0
