"""Adapters as bytes: one adapter has one file, so its sha256 names it.

The form ``fedia3.adapter.v1`` is a safetensors file with one F32 tensor ``(dim,)`` per target,
named :attr:`Target.key`, in schema order. Its metadata:

    format   fedia3.adapter.v1
    form     adapter (scales) or personal (a delta to a global adapter)
    base     digest of the base model's manifest
    schema   digest of the schema
    global   digest of the global adapter's file (personal only)
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Literal

import numpy as np

from fedia3.adapters.adapter import Adapter, PersonalAdapter, Vector
from fedia3.adapters.safetensors_header import (
    OWN_FILES,
    Header,
    Limits,
    checked_header,
    file_bytes,
    tensor_values,
)
from fedia3.adapters.schema import Schema
from fedia3.errors import BadAdapter, WrongBaseModel

FORMAT = "fedia3.adapter.v1"
MAX_SCALE = 100.0  # magnitude; trained scales stay near one, deltas near zero
SHA256_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
SMALLEST_NORMAL = np.finfo(np.float32).tiny

Form = Literal["adapter", "personal"]


def encode(adapter: Adapter, *, limits: Limits = OWN_FILES) -> bytes:
    """The adapter's file; equal adapters give equal bytes.

    Raises:
        BadAdapter: :func:`decode` would refuse it: too large, all zeros, or a scale beyond 100.
    """
    return _encoded(adapter.schema, require_scales(adapter.vector), "adapter", {}, limits)


def decode(
    data: bytes,
    schema: Schema,
    *,
    claimed_bytes: int | None = None,
    claimed_digest: str | None = None,
    limits: Limits = OWN_FILES,
) -> Adapter:
    """The adapter in a file from anywhere; ``claimed_*`` is what its sender said about it.

    Raises:
        BadAdapter: the bytes break the format, do not fit the schema or the sender's claims, or
            hold values that no training gives.
        WrongBaseModel: the adapter was trained on another base model.
    """
    require_claims(data, claimed_bytes, claimed_digest)
    header = _opened(data, schema, "adapter", limits)
    return Adapter(schema, require_scales(_vector(data, header, schema)))


def encode_personal(personal: PersonalAdapter, *, limits: Limits = OWN_FILES) -> bytes:
    """The personal adapter's file; equal parts on the same global adapter give equal bytes.

    Raises:
        BadAdapter: :func:`decode_personal` would refuse it.
    """
    anchor = {"global": _require_digest(personal.global_digest)}
    return _encoded(personal.schema, require_delta(personal.delta), "personal", anchor, limits)


def decode_personal(
    data: bytes,
    schema: Schema,
    *,
    claimed_bytes: int | None = None,
    claimed_digest: str | None = None,
    limits: Limits = OWN_FILES,
) -> PersonalAdapter:
    """The personal adapter in a file from anywhere; arguments and errors as :func:`decode`."""
    require_claims(data, claimed_bytes, claimed_digest)
    header = _opened(data, schema, "personal", limits)
    delta = require_delta(_vector(data, header, schema))
    return PersonalAdapter(schema, delta, _require_digest(header.metadata["global"]))


def digest(data: bytes) -> str:
    """The name of stored bytes: sha256, hex."""
    return hashlib.sha256(data).hexdigest()


def require_claims(data: bytes, claimed_bytes: int | None, claimed_digest: str | None) -> None:
    """Refuse bytes that are not what their sender said; None claims nothing.

    Raises:
        BadAdapter: the length or the sha256 differs.
    """
    if claimed_bytes is not None and claimed_bytes != len(data):
        raise BadAdapter(f"the sender announced {claimed_bytes} bytes, got {len(data)}; send again")
    if claimed_digest is not None and claimed_digest != digest(data):
        raise BadAdapter(
            f"the sender announced sha256 {short(claimed_digest)}, the bytes have "
            f"{digest(data)[:12]}…; send again"
        )


def require_scales(scales: Vector) -> Vector:
    """The scales, if a base model could still speak under them.

    Raises:
        BadAdapter: a scale is not finite or beyond ±100, or all vanish (which silences the model).
    """
    _require_moderate(scales)  # first: NaN is above nothing, and would be called zero
    if not (np.abs(scales) >= SMALLEST_NORMAL).any():
        raise BadAdapter("every scale is zero or subnormal, which silences the model; 1 = the base")
    return scales


def require_delta(delta: Vector) -> Vector:
    """The delta, if training could have made it; zeros are fine: nothing learned yet.

    Raises:
        BadAdapter: an entry is not finite or beyond ±100, or all are subnormal.
    """
    _require_moderate(delta)
    if delta.any() and not (np.abs(delta) >= SMALLEST_NORMAL).any():
        raise BadAdapter("every entry of the delta is zero or subnormal; send zeros for no change")
    return delta


def _require_moderate(vector: Vector) -> None:
    if not np.isfinite(vector).all():
        raise BadAdapter(f"{int((~np.isfinite(vector)).sum())} of {vector.size} are not finite")
    if (largest := float(np.abs(vector).max())) > MAX_SCALE:
        raise BadAdapter(f"values lie within ±{MAX_SCALE:g}, got one of magnitude {largest:g}")


def _encoded(
    schema: Schema, vector: Vector, form: Form, extra: Mapping[str, str], limits: Limits
) -> bytes:
    plain = vector + np.float32(0)  # -0.0 equals 0.0 and must not have bytes of its own
    tensors = [(key, plain[part]) for key, part in schema.slices.items()]
    about = {"format": FORMAT, "form": form, "base": schema.base_digest, "schema": schema.digest}
    data = file_bytes(tensors, {**about, **extra})
    checked_header(data, limits)  # never write what a reader would refuse
    return data


def _opened(data: bytes, schema: Schema, form: Form, limits: Limits) -> Header:
    """The header of a file of this form for this schema."""
    header = checked_header(data, limits)
    _require_form(header.metadata, form)
    if header.metadata["base"] != schema.base_digest:
        raise WrongBaseModel(
            f"the adapter is for base model {short(header.metadata['base'])}, expected "
            f"{short(schema.base_digest)}; train it anew on the base you run"
        )
    require_keys(header.tensors, schema.slices)
    for target in schema.targets:
        shape = header.tensors[target.key].shape
        if shape != (target.dim,):
            raise BadAdapter(f"{target.key}: expected shape ({target.dim},), got {shape}")
    if header.metadata["schema"] != schema.digest:
        raise BadAdapter(
            "the adapter's schema differs from the expected one in the order or the parts of its "
            "targets, though their names agree; export it anew"
        )
    return header


def _require_form(metadata: Mapping[str, str], form: Form) -> None:
    fields = {"format", "form", "base", "schema"} | ({"global"} if form == "personal" else set())
    if metadata.get("format") != FORMAT:
        raise BadAdapter(
            f"expected metadata format {FORMAT}, got {short(metadata.get('format'))}; adapters "
            "from PEFT are imported as a folder"
        )
    if metadata.get("form") != form:
        raise BadAdapter(f"expected the form {form!r}, got {short(metadata.get('form'))}")
    if metadata.keys() != fields:
        raise BadAdapter(f"expected metadata {sorted(fields)}, got {short(sorted(metadata))}")


def require_keys(found: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a file that does not name exactly the expected tensors.

    Raises:
        BadAdapter: keys are missing, too many, or the same under another prefix; some are named.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    twin = next((key for key in extra if missing and _same_module(key, missing[0])), None)
    if twin:
        raise BadAdapter(f"keys carry another prefix: expected {missing[0]}, got {twin}")
    if missing:
        raise BadAdapter(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    if extra:
        raise BadAdapter(f"{len(extra)} tensors are in no target: {', '.join(extra[:3])}")


def _same_module(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _vector(data: bytes, header: Header, schema: Schema) -> Vector:
    """The flat vector in schema order, in whatever order the file holds the tensors."""
    return np.concatenate([tensor_values(data, header.tensors[t.key]) for t in schema.targets])


def _require_digest(text: str) -> str:
    if not SHA256_HEX.fullmatch(text):
        raise BadAdapter(f"the global adapter is named by a sha256 in hex, got {short(text)}")
    return text
