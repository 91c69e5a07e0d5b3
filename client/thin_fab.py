"""The one Flower app that a device runs: names of what is installed here, and no code.

A coordinator hands out the app of its rounds as a zip file, and Flower runs what is in it. A device
takes it only while it holds nothing but fedia3's own description: whoever owns the coordinator may
train on the device, and not run programs there.
"""

import re
import tomllib
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import fedia3.proto
from fedia3.errors import BadInput

MAX_BYTES = 1 << 20  # of the zip file and of each file in it
FILES = {"pyproject.toml", "LICENSE", ".info/CONTENT"}
VERSION = re.compile(r"\d+(\.\d+){0,3}", re.ASCII)


def thin_app() -> Path:
    """The folder of the app as it is installed."""
    return Path(fedia3.proto.__path__[0]) / "thin_app"


def app_id() -> str:
    """``publisher/name``, as Flower calls the app."""
    described = _described((thin_app() / "pyproject.toml").read_bytes())
    return f"{described['publisher']}/{described['name']}"


def require_thin(fab: bytes, claimed_digest: str) -> None:
    """Refuse every app but the thin one; its version and settings may be the coordinator's.

    Raises:
        BadInput: the bytes are not what was claimed, hold another file, or name another app.
    """
    if sha256(fab).hexdigest() != claimed_digest:
        raise BadInput("the app's bytes do not have the digest it is sent under")
    described, installed = (
        _described(_files(fab)["pyproject.toml"]),
        _described((thin_app() / "pyproject.toml").read_bytes()),
    )
    for field in ("name", "publisher", "components"):
        if described[field] != installed[field]:
            raise BadInput(
                f"expected the app's {field} {installed[field]!r}; this device runs no other"
            )
    if not VERSION.fullmatch(str(described["version"])):
        raise BadInput("the app's version is none")


def _files(fab: bytes) -> Mapping[str, bytes]:
    if len(fab) > MAX_BYTES:
        raise BadInput(f"expected an app of at most {MAX_BYTES} bytes, got {len(fab)}")
    try:
        with zipfile.ZipFile(BytesIO(fab)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if sorted(names) != sorted(FILES):
                raise BadInput(f"expected an app of {', '.join(sorted(FILES))} alone")
            return {entry.filename: _content(archive, entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise BadInput(f"the app is no zip file ({type(error).__name__})") from error


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadInput(f"a file of the app has more than {MAX_BYTES} bytes")
    return content


def _described(pyproject: bytes) -> Mapping[str, Any]:
    """What an app says of itself, as far as it decides what runs and where it is put."""
    try:
        described = tomllib.loads(pyproject.decode())
        app = described["tool"]["flwr"]["app"]
        return {
            "name": described["project"]["name"],
            "version": described["project"]["version"],
            "publisher": app["publisher"],
            "components": app["components"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"the app's pyproject.toml cannot be read ({type(error).__name__})"
        ) from error
