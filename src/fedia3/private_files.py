"""Files that only their owner reads, replaced whole or not at all: keys, tokens, statuses."""

import os
import tempfile
from pathlib import Path

from fedia3.errors import StorageFailed


def write_private(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Replace a file whole or not at all; 0600, its folder made 0700 where it is missing.

    It is on the disk when this returns, unless it need not be ``lasting``: a power cut may then
    lose what was written, as for something that is written often.

    Raises:
        StorageFailed: the disk refused; the old file is as it was.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
            Path(aside).replace(path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        if lasting:
            sync_folder(path.parent)
    except OSError as error:
        raise StorageFailed(
            f"cannot write {path} ({error.strerror}); make room or fix the folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the folder's names survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
