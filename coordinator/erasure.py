"""The operator's erasure of a user: their parts, their devices' names, and their own.

What rounds made of their updates cannot be taken out of everyone's adapter; the receipt says where
it is. Contributions name devices by ids that tell nobody anything any more; in a simulation's
registry, where clients are called as their users, those names stay.
"""

from dataclasses import dataclass
from datetime import datetime

from fedia3.clock import wall_ms
from fedia3.coordinator.directory import Directory
from fedia3.coordinator.registry import Registry


@dataclass(frozen=True)
class ErasureReceipt:
    """What an operator can show: it names the erasure, not the user."""

    receipt: str  # 32 random hex digits, kept in the registry
    erased_at: datetime
    versions: int  # deleted
    devices: tuple[str, ...]  # ids; shut out, and without a name from now on
    global_versions: tuple[int, ...]  # everyone's that hold updates of those devices, and stay
    traceless: bool  # False: the database's log goes on holding the past; erase again


def erase_user(registry: Registry, directory: Directory, user: str) -> ErasureReceipt:
    """Delete a user's parts, shut their devices out, and forget every name.

    Cut short anywhere it is finished by erasing again.

    Raises:
        BadInput: the name is not sound.
    """
    devices = [device.device_id for device in directory.devices_of(user)]
    done = registry.erase_user(user, clients=devices)
    is_log_empty = directory.forget_user(user, wall_ms())
    return ErasureReceipt(
        receipt=done.tombstone.receipt,
        erased_at=done.tombstone.erased_at,
        versions=done.tombstone.versions,
        devices=tuple(devices),
        global_versions=done.global_versions,
        traceless=is_log_empty,
    )
