"""1 to 43: files that are no adapter, or one that no training makes.

Each is published by an enrolled device, signed, with the digest of the bytes that are sent.
"""

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedia3.adapters.encoding import decode_personal, digest
from fedia3.client.cache import checked
from fedia3.client.records import TrustedKeys
from fedia3.coordinator.services.adapters import MAX_ADAPTER
from fedia3.errors import BadAdapter, Corrupt
from fedia3.proto.adapters_pb2 import FetchResponse
from fedia3.proto.contract import MAX_MESSAGE

from .scene import ANNA, BAD_ADAPTER, FETCH, TOO_LARGE, Raised, Refused, Scene, require_refused

Fields = dict[str, Any]
K, FF = "layers.0.k_proj.k", "layers.0.down_proj.ff"  # two scales and three: 20 bytes


def header_of(data: bytes) -> Fields:
    """A file's header."""
    fields: Fields = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return fields


def file_of(header: Fields | bytes, tensors: bytes = b"\0" * 20) -> bytes:
    """A file with this header, written as the library writes it, and these tensors' bytes."""
    raw = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return len(raw).to_bytes(8, "little") + raw + tensors


def edited(**tensor_fields: Any) -> Callable[[bytes], bytes]:
    """Fields of the second tensor (bytes 8 to 20) replaced."""

    def edit(good: bytes) -> bytes:
        fields = header_of(good)
        fields[FF] |= tensor_fields
        return file_of(fields)

    return edit


def renamed(name: str) -> Callable[[bytes], bytes]:
    """The second tensor under another name."""

    def rename(good: bytes) -> bytes:
        fields = header_of(good)
        fields[name] = fields.pop(FF)
        return file_of(fields)

    return rename


def noted(note: Any) -> Callable[[bytes], bytes]:
    """One more entry in the metadata."""

    def write(good: bytes) -> bytes:
        fields = header_of(good)
        fields["__metadata__"]["note"] = note
        return file_of(fields)

    return write


def valued(*values: float) -> Callable[[bytes], bytes]:
    """Other values of the delta."""
    return lambda good: good[:-20] + np.array(values, dtype="<f4").tobytes()


def raw(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The header's bytes, without its padding, spelled another way."""
    return lambda good: file_of(change(good[8:-20].rstrip(b" ")))


def only(data: bytes) -> Callable[[bytes], bytes]:
    """These bytes, whatever a good file is."""
    return lambda _good: data


def gap(good: bytes) -> bytes:
    """Four bytes before the second tensor that are nobody's."""
    return file_of(header_of(edited(data_offsets=[12, 24])(good)), b"\0" * 24)


def without_one(good: bytes) -> bytes:
    """The first tensor alone."""
    fields = header_of(good)
    del fields[FF]
    return file_of(fields, b"\0" * 8)


def with_one_more(good: bytes) -> bytes:
    """A third tensor."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}
    return file_of(header_of(good) | {"q_proj.k": entry}, b"\0" * 24)


def many_tensors(count: int) -> bytes:
    """A file of so many tensors of one scale."""
    entry = {"dtype": "F32", "shape": [1]}
    fields = {f"t{i}": entry | {"data_offsets": [4 * i, 4 * i + 4]} for i in range(count)}
    return file_of(fields, b"\0" * 4 * count)


def nested(depth: int) -> bytes:
    """A header of lists in lists."""
    return file_of(b'{"a":' + b"[" * depth + b"]" * depth + b"}", b"")


def zipped() -> bytes:
    """What ``torch.save`` writes, and half of all that is called .bin."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return file.getvalue()


def npz() -> bytes:
    """Arrays as numpy saves them."""
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


BYTES: list[tuple[int, str, Callable[[bytes], bytes], str]] = [
    (1, "empty", only(b""), "expected a safetensors file, got 0 bytes"),
    (2, "under 8 bytes", only(b"\x10\0\0"), "got 3 bytes"),
    (3, "header of 2^64-1", lambda good: b"\xff" * 8 + good[8:], "announces 18446744073709551615"),
    (4, "header beyond the file", lambda good: good[:20], "longer than the file"),
    (5, "header over 64 KiB", only(file_of(b"{" + b" " * 65536)), "at most 65536 bytes"),
    (6, "header not JSON", only(file_of(b"hello, header")), "not JSON"),
    (6, "NaN in the header", only(file_of(b'{"a":NaN}')), "not JSON"),
    (6, "a number too long to read", only(file_of(b'{"a":' + b"9" * 5000 + b"}")), "not JSON"),
    (7, "header not UTF-8", only(file_of(b'{"\xff":1}')), "not JSON"),
    (8, "header a list", only(file_of(b"[]")), "JSON object, got list"),
    (9, "nesting", only(file_of(b"[" * 60_000)), "not JSON"),
    (10, "overlap", edited(data_offsets=[4, 16]), "overlap"),
    (11, "gap", gap, "4 bytes before it belong to no tensor"),
    (12, "reversed offsets", edited(data_offsets=[20, 8]), "ascend"),
    (12, "negative offset", edited(data_offsets=[-4, 8]), "start at 0"),
    (13, "offset past the end", edited(data_offsets=[8, 24]), "end at 24, the file holds 20"),
    (14, "trailing byte", lambda good: good + b"\0", "1 trailing bytes"),
    (14, "zip behind it", lambda good: good + zipped(), "trailing bytes belong to no tensor"),
    (15, "truncated", lambda good: good[:-1], "cut short"),
    (16, "shape and bytes disagree", edited(shape=[2]), "does not take 12 bytes"),
    (17, "dimension overflow", edited(shape=[2**62, 4]), "a dimension lies in"),
    (18, "negative dimension", edited(shape=[-3, -1]), "a dimension lies in"),
    (19, "rank 3", edited(shape=[3, 1, 1]), "one or two dimensions"),
    (19, "rank 0", edited(shape=[]), "one or two dimensions"),
    (19, "a dimension that is no number", edited(shape=[True]), "one or two dimensions"),
    (20, "zero-size dimension", edited(shape=[0]), "a dimension lies in"),
    (21, "no tensor", only(file_of({}, b"")), "expected 1 to 512 tensors, got 0"),
    (
        22,
        "key twice",
        raw(lambda header: header.replace(b'"shape":[3]', b'"shape":[9],"shape":[3]')),
        "'shape' twice",
    ),
    (23, "extra field", edited(note="hi"), "expected dtype, shape and data_offsets"),
    (
        23,
        "missing field",
        only(file_of({"a": {"dtype": "F32", "shape": [5]}})),
        "expected dtype, shape and data_offsets",
    ),
    (24, "leading space", raw(lambda header: b" " + header), "compact JSON"),
    (24, "inner space", raw(lambda header: header.replace(b":", b": ", 1)), "compact JSON"),
    (24, "trailing newline", raw(lambda header: header + b"\n"), "compact JSON"),
    (24, "more padding than needed", raw(lambda header: header + b" " * 8), "at most 7 spaces"),
    (24, "escapes", raw(lambda header: header.replace(b"F32", rb"\u004632")), "compact JSON"),
    (25, "513 tensors", only(many_tensors(513)), "1 to 512 tensors, got 513"),
    (26, "metadata over 4 KiB", noted("x" * 4096), "at most 4096 bytes"),
    (26, "metadata that is a number", noted(1), "strings only"),
    (27, "name ../x", renamed("../x"), "dotted module path"),
    (27, "name with NUL", renamed("a\0"), "dotted module path"),
    (
        27,
        "name right to left",
        raw(lambda header: header.replace(FF.encode(), "a\u202eb".encode())),
        "dotted module path",
    ),
    (
        27,
        "name not ASCII",
        raw(lambda header: header.replace(FF.encode(), "gr\u00fcn".encode())),
        "dotted module path",
    ),
    (27, "name too long", renamed("a" * 257), "dotted module path"),
    (28, "unknown dtype", edited(dtype="F33"), "unknown dtype 'F33'"),
    (28, "dtype that is no string", edited(dtype=["F32"]), "unknown dtype"),
    (29, "F64", edited(dtype="F64"), "expected dtype F32, got F64"),
    (29, "BOOL", edited(dtype="BOOL"), "expected dtype F32, got BOOL"),
    (29, "I32", edited(dtype="I32"), "expected dtype F32, got I32"),
    (29, "F16", edited(dtype="F16"), "expected dtype F32, got F16"),
    (30, "NaN", valued(1, 1, float("nan"), 1, 1), "1 of 5 are not finite"),
    (31, "infinities", valued(1, 1, -np.inf, 1, np.inf), "2 of 5 are not finite"),
    (32, "subnormal only", valued(0, 0, 1e-40, 0, 0), "zero or subnormal; send zeros"),
    (32, "beyond 100", valued(1, 1, -101, 1, 1), "within ±100, got one of magnitude 101"),
    (32, "beyond 100 together", valued(0, 0, 99.5, 0, 0), "part names: .* got one of magnitude"),
    (34, "zeros together", valued(-1, -1, -1, -1, -1), "every scale is zero .* silences the model"),
    (35, "missing module", without_one, f"1 tensors are missing: {FF}"),
    (36, "extra module", with_one_more, "1 tensors are in no target: q_proj.k"),
    (37, "wrong prefix", renamed(f"base_model.model.{FF}"), f"another prefix: expected {FF}"),
    (38, "wrong dimension", edited(shape=[3, 1]), r"expected shape \(3,\), got \(3, 1\)"),
    (39, "pickle", only(pickle.dumps({"a": [1.0] * 9})), "looks like a Python pickle"),
    (39, "torch's zip", only(zipped()), "looks like a zip archive"),
    (39, "npz", only(npz()), "looks like a zip archive"),
    (39, "npy", only(npz()[npz().index(b"\x93NUMPY") :]), "looks like a numpy"),
    (39, "GGUF", only(b"GGUF\3\0\0\0" + b"x" * 20), "looks like a GGUF model"),
    (40, "gzip bomb", only(gzip.compress(b"\0" * (64 << 20))), "gzip-compressed; send plain"),
    (40, "zstd", only(b"\x28\xb5\x2f\xfd" + b"x" * 20), "looks like zstd-compressed"),
    (41, "too large", only(b"\0" * (MAX_ADAPTER + 1)), f"at most {MAX_ADAPTER} bytes, got"),
]


def published(spoil: Callable[[bytes], bytes]) -> Callable[[Scene], bytes]:
    """Anna's good file, spoiled and sent."""
    return lambda scene: scene.publish(spoil(scene.good))


PAYLOAD = [
    *(Refused(n, what, published(spoil), BAD_ADAPTER, says) for n, what, spoil, says in BYTES),
    Refused(
        41,
        "a message too large",
        lambda scene: scene.publish(b"\0" * MAX_MESSAGE),
        TOO_LARGE,
        "larger than max",
    ),
    Refused(
        42,
        "another digest",
        lambda scene: scene.publish(digest="0" * 64),
        BAD_ADAPTER,
        "announced sha256 '000.*send again",
    ),
    Refused(
        42, "no digest", lambda scene: scene.publish(digest=""), BAD_ADAPTER, "announced sha256 ''"
    ),
]


def cut_on_the_way(scene: Scene) -> object:
    """A version's bytes, but for the last one, as a device checks them."""
    answer = FetchResponse.FromString(scene.read(FETCH, ANNA))
    answer.data = answer.data[:-1]
    return checked(answer, TrustedKeys((scene.service.coordinator_key,)), "anna", scene.base)


# A publish says no size, its digest says all; a record that a device fetches says one.
SIZES = [
    Raised(43, "another size than the record's", cut_on_the_way, Corrupt, r"has \d+ bytes of"),
    Raised(
        43,
        "another size than claimed",
        lambda scene: decode_personal(scene.good, scene.schema, claimed_bytes=7),
        BadAdapter,
        "announced 7 bytes, got .*send again",
    ),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_a_size_that_was_not_promised_is_refused(scene: Scene, case: Raised) -> None:
    """Whoever said how many bytes come is held to it."""
    with pytest.raises(case.error, match=case.says):
        case.use(scene)


@pytest.mark.parametrize("case", PAYLOAD, ids=str)
def test_a_file_that_is_no_adapter_is_refused(scene: Scene, case: Refused) -> None:
    """The message names what is wrong with it, and what the user had stays."""
    require_refused(scene, case)


def test_no_depth_of_nesting_is_a_fault(scene: Scene) -> None:
    """Where a header is just shallow enough to be read, it may be too deep to be written again."""
    for depth in range(900, 1000):
        require_refused(
            scene, Refused(9, "nesting", published(only(nested(depth))), BAD_ADAPTER, "header|a:")
        )


def test_the_good_file_is_taken(scene: Scene) -> None:
    """What all of them are spoiled from is published, once: the same key names the same bytes."""
    before = scene.kept()
    scene.publish()
    assert scene.kept() == before
    assert digest(scene.good) in {one.digest for one in before[0][1]}


NUMBERS = {case.number for case in (*PAYLOAD, *SIZES)}
