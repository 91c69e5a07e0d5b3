"""An owner's word that a device forgets: their own parts, what was cached of them, and the logs.

Their text is theirs and stays where it is. What a disk keeps of deleted files is beyond this.
"""

from dataclasses import replace
from pathlib import Path

from fedia3.client.cache import AdapterCache
from fedia3.client.coordinator import Coordinator
from fedia3.client.device import DeviceFolder
from fedia3.client.device_status import Control
from fedia3.client.personal_store import Forgotten, PersonalStore, delete_below
from fedia3.client.records import TrustedKeys


def forget(folder: DeviceFolder, now_ms: int) -> Forgotten:
    """Delete what this device has learned of its owner, and pause it, or it would learn it again.

    A running agent drops what it was learning and lets its trainer go.
    """
    control = Control.read(folder.control_file)
    replace(control, paused=True, forgotten_ms=now_ms).write(folder.control_file)
    personal = PersonalStore(folder.personal).forget()
    _forget_cached(folder)
    deleted = sum(_emptied(log) for log in folder.logs.glob("*")) if folder.logs.exists() else 0
    flower = delete_below(folder.path / "flwr")  # Flower's copies of rounds' apps
    folder.status_file.unlink(missing_ok=True)  # losses; a running agent writes it anew
    return Forgotten(personal.deleted + deleted + flower.deleted, personal.left + flower.left)


def forget_everywhere(folder: DeviceFolder) -> int:
    """Erase the owner's shared parts at the coordinator; how many versions there were.

    Raises:
        NotFound: this device is not enrolled.
        Unreachable: the coordinator does not answer; nothing was erased there.
    """
    with Coordinator.from_state(folder) as home:
        return home.erase()


def _forget_cached(folder: DeviceFolder) -> None:
    """The owner's shared parts as they were fetched; the global adapter is nobody's."""
    if folder.is_enrolled:
        known = folder.enrolment()
        AdapterCache(folder.adapters, TrustedKeys(known.coordinator_keys)).forget_user(known.user)


def _emptied(log: Path) -> int:
    """Emptied rather than deleted: a running process goes on writing into it."""
    if not log.is_file():
        return 0
    with log.open("r+b") as file:
        file.truncate(0)
    return 1
