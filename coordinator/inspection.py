"""Looks whether a registry is whole: database, versions, bytes, and that they agree.

Page by page, so that a large registry fits; beside a coordinator at work, so that what seems wrong
is looked at a second time: it may have been erased, or put again, between two looks.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedia3.adapters import encoding
from fedia3.adapters.safetensors_header import checked_header
from fedia3.adapters.schema import Schema
from fedia3.coordinator.janitor import in_groups
from fedia3.coordinator.records import AdapterRecord
from fedia3.coordinator.registry import Registry
from fedia3.errors import Corrupt, Fedia3Error, NotFound

MAX_NAMED = 1000  # faults that are kept word by word
PAGE = 200
SECOND_LOOK_S = 0.5

SchemaOf = Callable[[str], Schema | None]  # by a base model's digest; None where it is not here
Watch = Callable[[int], None]  # called with the versions that were looked at


@dataclass
class Inspected:
    """What was looked at, and what was found."""

    versions: int = 0
    decoded: int = 0  # of them, by a schema that is known here; of others, the form alone
    blob_bytes: int = 0
    orphans: int = 0  # blobs without a version: no fault, `gc` collects them
    faults: int = 0
    named: list[str] = field(default_factory=list)  # the first of the faults

    def add(self, fault: str) -> None:
        """One more fault."""
        self.faults += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(fault)


def inspect(
    registry: Registry,
    schema_of: SchemaOf = lambda _base: None,
    watch: Watch = lambda _versions: None,
) -> Inspected:
    """Read everything and compare it; nothing is changed."""
    found = Inspected()
    try:
        for fault in registry.store.faults():
            found.add(fault)
    except (Fedia3Error, ValueError, TypeError) as error:
        found.add(f"the database cannot be read to its end: {error}")
    try:
        for record in every_version(registry):
            _inspect_version(registry, record, schema_of, found)
            watch(found.versions)
        for digests in in_groups(registry.blobs.digests(), PAGE):
            found.orphans += len(registry.store.unused(digests))
    except (Fedia3Error, ValueError, TypeError) as error:  # a row that says what no record can say
        found.add(f"versions cannot be read behind the {found.versions} first ones: {error}")
    return found


def every_version(registry: Registry) -> Iterator[AdapterRecord]:
    """All versions of all owners, page by page, those with the same bytes behind each other."""
    page = registry.store.every_version(None, PAGE)
    while page:
        yield from page
        page = registry.store.every_version(page[-1], PAGE)


def _inspect_version(
    registry: Registry, record: AdapterRecord, schema_of: SchemaOf, found: Inspected
) -> None:
    found.versions += 1
    data = _bytes(registry, record, found)
    if data is None:
        return
    found.blob_bytes += len(data)
    try:
        schema = schema_of(record.base)
        if schema is not None and schema.digest == record.schema_digest:
            decode = encoding.decode if record.form == "adapter" else encoding.decode_personal
            decode(data, schema)
            found.decoded += 1
        _require_same(record, data)
    except Fedia3Error as error:
        found.add(f"{record} on base {record.base[:12]}: {error}")


def _bytes(registry: Registry, record: AdapterRecord, found: Inspected) -> bytes | None:
    """The version's bytes; None where they are damaged, or it was erased meanwhile."""
    fault = ""
    for pause_s in (0.0, SECOND_LOOK_S):
        time.sleep(pause_s)
        try:
            return registry.fetch(record.owner, record.base, record.version)[1]
        except NotFound:
            return None
        except Fedia3Error as error:
            fault = str(error)
    found.add(f"{record} on base {record.base[:12]}: {fault}")
    return None


def _require_same(record: AdapterRecord, data: bytes) -> None:
    """The file says of itself what the database says of it.

    Raises:
        Corrupt: it does not.
        BadAdapter: it is no adapter's file.
    """
    says = checked_header(data).metadata
    for name, expected in (
        ("form", record.form),
        ("base", record.base),
        ("schema", record.schema_digest),
        ("global", record.global_digest),
    ):
        if says.get(name) != expected:
            raise Corrupt(f"its file says {name} {says.get(name)}, the database {expected}")
