"""What a coordinator is told: ``coordinator.toml``, read and checked in one place.

Everything a coordinator keeps lies beside that file. A key that this version does not know is an
error, because a misspelt one would otherwise quietly do nothing.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fedia3.adapters.update import TrainingPlan
from fedia3.coordinator.gate import GateLimits
from fedia3.coordinator.rounds import RoundPlan
from fedia3.errors import BadSetting, NotFound

CONFIG_VARIABLE = "FEDIA3_COORDINATOR_CONFIG"  # the file's path, nothing else
DATABASE_VARIABLE = "FEDIA3_DATABASE_URL"  # counts before the file, and may hold a password
FILE_NAME = "coordinator.toml"
BACK_TO_BACK_RUN = 20  # rounds of one Flower run where no pause lies between them

Section = TypeVar("Section")


@dataclass(frozen=True)
class ServiceConfig:
    """Where the coordinator listens, and which base model it trains."""

    hosts: tuple[str, ...]  # names and addresses that devices reach it by; the first is handed out
    base: str  # a base model's digest, name or folder
    bind: str = "0.0.0.0"
    grpc_port: int = 8443
    fleet_port: int = 8444
    superlink_port: int = 8441  # on 127.0.0.1

    def __post_init__(self) -> None:
        if not self.hosts or not all(self.hosts):
            raise BadSetting("hosts names at least one host that devices reach, got none")
        ports = (self.grpc_port, self.fleet_port, self.superlink_port)
        for port in ports:
            if not 1 <= port <= 65535:
                raise BadSetting(f"a port lies between 1 and 65535, got {port}")
        if len(set(ports)) < len(ports):
            raise BadSetting(f"grpc_port, fleet_port and superlink_port differ, got {ports}")


@dataclass(frozen=True)
class RoundsConfig:
    """When rounds run, and with whom."""

    every_s: float = 0.0  # between the ends of two rounds; 0: back to back
    cohort: int = 100  # devices asked in a round
    min_clients: int = 2  # devices online without which no round starts
    quorum: int = 2  # usable updates without which a round is not committed
    deadline_s: float = 600.0  # for a round's replies
    seed: int = 0  # draws the cohorts and seeds the devices' training
    rounds_per_run: int | None = None  # of one Flower run; None: 20 back to back, else 1

    def __post_init__(self) -> None:
        if self.every_s < 0:
            raise BadSetting(f"every_s is at least 0, got {self.every_s}")
        if self.deadline_s <= 0:
            raise BadSetting(f"deadline_s is above 0, got {self.deadline_s}")
        if not 1 <= self.quorum <= self.min_clients:
            raise BadSetting(
                f"quorum lies between 1 and min_clients {self.min_clients}, got {self.quorum}"
            )
        if self.min_clients > self.cohort:
            raise BadSetting(
                f"min_clients is at most cohort {self.cohort}, got {self.min_clients}: no round "
                "would ask that many"
            )
        if self.rounds_per_run is not None and self.rounds_per_run < 1:
            raise BadSetting(f"rounds_per_run is at least 1, got {self.rounds_per_run}")

    @property
    def run_length(self) -> int:
        """Rounds that one Flower run holds."""
        if self.rounds_per_run is not None:
            return self.rounds_per_run
        return 1 if self.every_s else BACK_TO_BACK_RUN


@dataclass(frozen=True)
class RegistryConfig:
    """Where the registry's rows are kept; adapters' bytes are files beside the settings."""

    database: str = ""  # a PostgreSQL database's URL; "" is registry/registry.db


@dataclass(frozen=True)
class CoordinatorConfig:
    """A coordinator's settings and the folder where it keeps everything."""

    folder: Path
    coordinator: ServiceConfig
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    training: TrainingPlan = field(default_factory=TrainingPlan)
    limits: GateLimits = field(default_factory=GateLimits)
    database: str | None = field(default=None, repr=False)  # its URL; None: registry/registry.db

    @property
    def plan(self) -> RoundPlan:
        """How its rounds are run."""
        rounds = self.rounds
        return RoundPlan(
            cohort_size=rounds.cohort,
            quorum=rounds.quorum,
            deadline_s=rounds.deadline_s,
            seed=rounds.seed,
            training=self.training,
            limits=self.limits,
        )

    @property
    def file(self) -> Path:
        """``coordinator.toml`` itself."""
        return self.folder / FILE_NAME

    @property
    def address(self) -> str:
        """host:port of the services, as it is handed out."""
        return _address(self.coordinator.hosts[0], self.coordinator.grpc_port)

    @property
    def fleet_address(self) -> str:
        """host:port of the Flower fleet, as it is handed out."""
        return _address(self.coordinator.hosts[0], self.coordinator.fleet_port)

    @property
    def superlink_address(self) -> str:
        """host:port of the SuperLink, for this machine only."""
        return f"127.0.0.1:{self.coordinator.superlink_port}"

    def local_address(self, port: int) -> str:
        """host:port by which this machine reaches what listens on ``bind``."""
        bind = self.coordinator.bind
        return _address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind), port)

    @property
    def registry(self) -> Path:
        """Adapters, rounds and devices: ``registry.db``, or a server's database, and ``blobs/``."""
        return self.folder / "registry"

    @property
    def ca(self) -> Path:
        """The authority's certificate, PEM; devices trust no other."""
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The authority's private key, PEM."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """The servers' certificate and the authority's, PEM."""
        return self.folder / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """The servers' private key, PEM."""
        return self.folder / "server.key"

    @property
    def signing_key(self) -> Path:
        """Ed25519, PEM: signs manifests and adapter records."""
        return self.folder / "signing.key"

    @property
    def superexec_secret(self) -> Path:
        """What the superexec proves itself to the SuperLink with."""
        return self.folder / "superexec.secret"

    @property
    def operator(self) -> Path:
        """What the operator's commands need."""
        return self.folder / "operator.json"

    @property
    def flower(self) -> Path:
        """Flower's own files: the SuperLink's database, unpacked apps."""
        return self.folder / "flower"

    @property
    def logs(self) -> Path:
        """What each part prints."""
        return self.folder / "logs"

    @property
    def parts_file(self) -> Path:
        """How each part is doing, as the supervisor last wrote it."""
        return self.folder / "parts.json"

    @property
    def schedule_file(self) -> Path:
        """Why the next round has not started, as the scheduler last wrote it."""
        return self.folder / "schedule.json"

    @property
    def drain_file(self) -> Path:
        """Its being there asks the ServerApp to begin no further round."""
        return self.folder / "draining"


def read_config(path: Path) -> CoordinatorConfig:
    """The settings in ``path``: a ``coordinator.toml``, or the folder that holds one.

    Raises:
        NotFound: there is no such file.
        BadSetting: it is no TOML, a key is unknown or a value outside its range.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        text = file.read_text()
    except OSError as error:
        raise NotFound(
            f"cannot read {file} ({error.strerror}); `fedia3 coordinator init DIR` writes one"
        ) from error
    return config_of(text, file.resolve().parent, str(file))


def config_of(text: str, folder: Path, name: str = FILE_NAME) -> CoordinatorConfig:
    """The settings that ``text`` holds, for a coordinator in ``folder``.

    Raises:
        BadSetting: it is no TOML, a key is unknown or a value outside its range.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"{name} is no TOML: {error}") from error
    sections = {"coordinator", "registry", "rounds", "training", "limits"}
    _require_known(table, sections, name, "section")
    if "coordinator" not in table:
        raise BadSetting(f"{name} has no section [coordinator], which names hosts and base")
    registry = _section(RegistryConfig, table, "registry", name)
    return CoordinatorConfig(
        folder=folder,
        coordinator=_section(ServiceConfig, table, "coordinator", name),
        rounds=_section(RoundsConfig, table, "rounds", name),
        training=_section(TrainingPlan, table, "training", name),
        limits=_section(GateLimits, table, "limits", name),
        database=os.environ.get(DATABASE_VARIABLE) or registry.database or None,
    )


def config_path(given: Path | None = None) -> Path:
    """Where the settings are: ``given``, else what the environment says, else here."""
    return given or Path(os.environ.get(CONFIG_VARIABLE) or FILE_NAME)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _section(kind: type[Section], table: Mapping[str, Any], section: str, name: str) -> Section:
    values = table.get(section, {})
    if not isinstance(values, dict):
        raise BadSetting(f"{name}: expected [{section}] as a section, got {section} = {values!r}")
    types = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # every section is a dataclass
    _require_known(values, known, name, f"key in [{section}]")
    given = {
        key: _checked(value, types[key], f"{name}: {section}.{key}")
        for key, value in values.items()
    }
    try:
        return kind(**given)
    except TypeError as error:  # a key without a default is not there
        missing = [f.name for f in fields(kind) if f.name not in given]  # type: ignore[arg-type]
        raise BadSetting(f"{name}: [{section}] lacks one of {', '.join(missing)}") from error
    except BadSetting as error:
        raise BadSetting(f"{name}, [{section}]: {error}") from error


def _require_known(table: Mapping[str, Any], known: set[str], name: str, what: str) -> None:
    for key in table:
        if key not in known:
            raise BadSetting(
                f"{name}: no {what} is called {key!r}; there are: {', '.join(sorted(known))}"
            )


def _checked(value: object, kind: Any, where: str) -> object:
    """``value`` as the field's type wants it; a whole number may stand for a float."""
    if get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise BadSetting(f'{where} is a list of strings, such as ["a", "b"], got {value!r}')
    allowed = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(k.__name__ for k in allowed if k is not type(None))
        raise BadSetting(f"{where} is a {names}, got {value!r}")
    return value
