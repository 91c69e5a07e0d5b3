"""How every process of Flower's is started: it tells nobody, asks nobody, installs nothing."""

from pathlib import Path

_LOOPBACK = "localhost,127.0.0.1"


def environment(home: Path) -> dict[str, str]:
    """What it is told beside its parent's environment; ``home`` is for Flower's own files."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": _LOOPBACK,  # its only peers
        "no_proxy": _LOOPBACK,
    }
