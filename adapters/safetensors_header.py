"""The safetensors container, checked before anything in it is believed.

A file is 8 bytes of header length (little-endian), the header as JSON, then the tensors' bytes
without holes (https://github.com/huggingface/safetensors, "Format"). Common readers let more pass
than an adapter from a stranger should be able to say: duplicate keys, extra fields, empty tensors,
any name, 100 MB of header. Here such a file is refused, and for each tensor list exactly one
header is accepted: compact JSON, padded with at most seven spaces.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from reprlib import repr as short  # messages show hostile values: short and escaped
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedia3.errors import BadAdapter

LENGTH_BYTES = 8
PADDING = 7  # spaces at most: the writer aligns the tensors to 8 bytes
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
MAX_NAME = 256  # characters
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
OTHER_FORMATS = {
    b"\x80": "a Python pickle (torch.save)",
    b"PK": "a zip archive (a torch .bin or .pt file, or .npz)",
    b"\x93NUMPY": "a numpy .npy file",
    b"GGUF": "a GGUF model",
    b"\x1f\x8b": "gzip-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
}


@dataclass(frozen=True)
class Limits:
    """What a file may hold; the defaults are those of our own adapter files.

    512 targets with names like ``model.layers.79.self_attn.k_proj.k`` fit into 64 KiB of header,
    a million scales (a 13B Llama's) into 4 MiB. Larger base models pass larger limits.
    """

    max_bytes: int = 4 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_tensors: int = 512
    max_metadata_bytes: int = 4 * 2**10
    dtypes: tuple[str, ...] = ("F32",)


OWN_FILES = Limits()
PEFT_FILES = Limits(dtypes=("F32", "F16", "BF16"))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its type, its shape of one or two dimensions, where it lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int  # bytes from the start of the file
    end: int  # bytes; one past the last


@dataclass(frozen=True)
class Header:
    """What a checked file holds."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def checked_header(data: bytes, limits: Limits = OWN_FILES) -> Header:
    """The header of a file whose every byte is accounted for.

    Raises:
        BadAdapter: the bytes are not a well-formed safetensors file within ``limits``.
    """
    if len(data) > limits.max_bytes:
        raise BadAdapter(f"expected at most {limits.max_bytes} bytes, got {len(data)}")
    length = _header_length(data, limits)
    fields = _parsed(data[LENGTH_BYTES : LENGTH_BYTES + length])
    metadata = _checked_metadata(fields.pop("__metadata__", {}), limits)
    if not 1 <= len(fields) <= limits.max_tensors:
        raise BadAdapter(f"expected 1 to {limits.max_tensors} tensors, got {len(fields)}")
    start = LENGTH_BYTES + length
    tensors = {
        name: _checked_entry(name, entry, start, len(data), limits)
        for name, entry in fields.items()
    }
    _require_no_holes(tensors, start, len(data))
    return Header(metadata, tensors)


def tensor_values(data: bytes, entry: TensorEntry) -> NDArray[np.float32]:
    """A tensor's values, flat float32; F16 and BF16 are widened, which is exact."""
    raw = data[entry.first : entry.end]
    if entry.dtype == "BF16":  # the upper half of a float32, a type numpy does not have
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry.dtype]).astype(np.float32)


def file_bytes(
    tensors: Sequence[tuple[str, NDArray[np.float32]]], metadata: Mapping[str, str]
) -> bytes:
    """The one safetensors file of these tensors in this order.

    Written by hand because the library's writer keeps metadata in a hash map: there, equal
    contents give different bytes from run to run.
    """
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, values in tensors:
        first, end = end, end + 4 * values.size
        fields[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [first, end]}
    header = _compact(fields).encode()
    header += b" " * (-len(header) % 8)
    data = b"".join(values.astype("<f4").tobytes() for _, values in tensors)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + data


def _header_length(data: bytes, limits: Limits) -> int:
    """Bytes of header, refusing lengths that other file formats' first bytes would spell."""
    if len(data) < LENGTH_BYTES:
        raise BadAdapter(f"expected a safetensors file, got {len(data)} bytes{_guess(data)}")
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > limits.max_header_bytes:
        raise BadAdapter(
            f"expected a safetensors header of at most {limits.max_header_bytes} bytes, the file "
            f"announces {length}{_guess(data)}"
        )
    if length > len(data) - LENGTH_BYTES:
        raise BadAdapter(
            f"the header of {length} bytes is longer than the file{_guess(data)}; it was cut short"
        )
    return length


def _guess(data: bytes) -> str:
    """What the bytes look like instead, for the message.

    Asked only once the length is impossible: ``80 02 00…`` is also a header of 640 bytes.
    """
    for magic, name in OTHER_FORMATS.items():
        if data.startswith(magic):
            return f": this looks like {name}; send plain safetensors"
    return ""


def _parsed(raw: bytes) -> dict[str, Any]:
    """The header's JSON object, if it is written the one accepted way."""
    try:
        text = raw.decode("utf-8")
        fields = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_not_json)
        spelled = _compact(fields)  # here, too, nesting may be too deep
    except (ValueError, RecursionError) as error:
        raise BadAdapter(f"the safetensors header is not JSON: {short(str(error))}") from error
    if not isinstance(fields, dict):
        raise BadAdapter(f"the header is a JSON object, got {type(fields).__name__}")
    if text.rstrip(" ") != spelled or len(text) - len(spelled) > PADDING:
        raise BadAdapter(
            f"the header is compact JSON padded with at most {PADDING} spaces, as the safetensors "
            "library writes it; this one holds other white space or spellings"
        )
    return fields


def _compact(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise BadAdapter(f"the header names {short(name)} twice")
        fields[name] = value
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _checked_metadata(metadata: Any, limits: Limits) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise BadAdapter(f"__metadata__ is an object of strings, got {type(metadata).__name__}")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise BadAdapter("__metadata__ holds strings only")
    size = len(_compact(metadata).encode())
    if size > limits.max_metadata_bytes:
        raise BadAdapter(f"__metadata__ has at most {limits.max_metadata_bytes} bytes, got {size}")
    return metadata


def _checked_entry(name: str, entry: Any, start: int, size: int, limits: Limits) -> TensorEntry:
    """One tensor's line of the header, with offsets turned into positions in the file."""
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise BadAdapter(f"a tensor's name is a dotted module path in ASCII, got {short(name)}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadAdapter(f"{name}: expected dtype, shape and data_offsets, got {short(entry)}")
    dtype = _checked_dtype(name, entry["dtype"], limits)
    shape = _checked_shape(name, entry["shape"], limits)
    first, end = _checked_offsets(name, entry["data_offsets"], size - start)
    if prod(shape) * DTYPE_BYTES[dtype] != end - first:
        raise BadAdapter(f"{name}: {dtype} of shape {shape} does not take {end - first} bytes")
    return TensorEntry(dtype, shape, start + first, start + end)


def _checked_dtype(name: str, dtype: Any, limits: Limits) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadAdapter(f"{name}: unknown dtype {short(dtype)}")
    if dtype not in limits.dtypes:
        raise BadAdapter(f"{name}: expected dtype {' or '.join(limits.dtypes)}, got {dtype}")
    return dtype


def _checked_shape(name: str, shape: Any, limits: Limits) -> tuple[int, ...]:
    if not _is_whole_numbers(shape) or len(shape) not in (1, 2):
        raise BadAdapter(f"{name}: expected a shape of one or two dimensions, got {short(shape)}")
    # The upper bound also keeps the product small enough to print.
    if not all(1 <= dim <= limits.max_bytes for dim in shape):
        raise BadAdapter(
            f"{name}: a dimension lies in 1 to {limits.max_bytes}, got shape {short(shape)}"
        )
    return tuple(shape)


def _checked_offsets(name: str, offsets: Any, data_bytes: int) -> tuple[int, int]:
    if not _is_whole_numbers(offsets) or len(offsets) != 2:
        raise BadAdapter(f"{name}: data_offsets are two whole numbers, got {short(offsets)}")
    first, end = offsets
    if not 0 <= first <= end:
        raise BadAdapter(f"{name}: data_offsets start at 0 and ascend, got {short(offsets)}")
    if end > data_bytes:
        raise BadAdapter(
            f"{name}: its bytes end at {short(end)}, the file holds {data_bytes}; it was cut short"
        )
    return first, end


def _is_whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _require_no_holes(tensors: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor: nothing can hide in the file."""
    at = start
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].first):
        if entry.first < at:
            raise BadAdapter(f"{name}: its bytes overlap another tensor's")
        if entry.first > at:
            raise BadAdapter(f"{name}: {entry.first - at} bytes before it belong to no tensor")
        at = entry.end
    if at != size:
        raise BadAdapter(f"{size - at} trailing bytes belong to no tensor")
