"""What a device does with its coordinator between rounds: base model, global adapter, own part.

Everything here waits for the network, so the agent calls it in a thread. What the coordinator does
not give is taken from this machine: the last good global adapter, or the base model alone.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock

from fedia3.adapters import encoding
from fedia3.adapters.adapter import Adapter, PersonalAdapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.schema import Schema
from fedia3.client.cache import AdapterCache
from fedia3.client.coordinator import Coordinator
from fedia3.client.device import DeviceFolder
from fedia3.client.personal_store import Judged, KeptPart, ones_digest
from fedia3.client.records import TrustedKeys
from fedia3.clock import wall_ms
from fedia3.errors import Fedia3Error, NotAllowed, NotFound, Unreachable

BASE_EVERY_S = 3600.0  # whether rounds train another base model now; its manifest may be long
CALL_BYTES = 2000  # of one call beside its data, both ways: TLS, HTTP/2, token, signatures

logger = logging.getLogger(__name__)


class BytesSpent(Fedia3Error):
    """Today's bytes are spent; what came is kept, and goes on tomorrow."""


@dataclass(frozen=True)
class Everyones:
    """The global adapter that a device's own part is trained from."""

    adapter: Adapter
    digest: str
    version: int | None = None  # None: no round is known, the base model alone


class Upkeep:
    """A device's dealings with its coordinator.

    Args:
        folder: the enrolled device.
        store: where base models lie.
        count: told of bytes, both ways.
        may_go: whether today's bytes still suffice.
        now_ms: ms since 1970.
        clock: seconds, steady.
    """

    def __init__(
        self,
        folder: DeviceFolder,
        store: BaseStore,
        count: Callable[[int], None] = lambda _: None,
        may_go: Callable[[], bool] = lambda: True,
        now_ms: Callable[[], int] = wall_ms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._store = folder, store
        self._count, self._may_go, self._now_ms = count, may_go, now_ms
        self._lock, self._home = Lock(), Coordinator.from_state(folder, store=store)
        self.device_id = folder.enrolment().device_id
        self._clock, self._ask_base = clock, clock()
        self.silent_since_ms: int | None = None
        self.shut_out: str | None = None

    def close(self) -> None:
        """Hang up; what is under way ends as Unreachable."""
        self._home.close()

    def refresh(self) -> None:
        """Bring base model and global adapter up to date; note whether the coordinator answers."""
        with self._lock:
            try:
                self._follow_base()
                self._fetch_global()
                self._heard()
                self._fetch_base()
            except Unreachable as error:
                self._missed(error)
            except NotAllowed as error:
                if self.shut_out is None:
                    logger.warning("shut out: %s", error)
                self.silent_since_ms, self.shut_out = None, str(error)
            except BytesSpent:
                logger.info("the download goes on tomorrow: today's bytes are spent")

    def share(self, part: PersonalAdapter, kept: KeptPart) -> int:
        """Give the owner's part to the registry; its version there."""
        with self._lock:
            metrics = {
                "validation_global": kept.judged.global_loss,
                "validation_personal": kept.judged.personal_loss,
            }
            version = self._home.publish(
                part,
                num_examples=kept.judged.num_examples,
                metrics=metrics,
                # Made again after its owner erased it, the same bytes are another publish.
                idem_key=f"part-{kept.judged.made_ms}-{kept.digest}",
                age_ms=_age_ms(kept.judged),
            )
            self._count(CALL_BYTES + version.size)
            return version.version

    def _follow_base(self) -> None:
        """Belong to the base model that rounds train, which an operator may change."""
        if self._clock() < self._ask_base:
            return
        wanted = self._home.base_of_rounds()
        self._count(CALL_BYTES + len(wanted.to_json()))
        self._ask_base = self._clock() + BASE_EVERY_S
        known = self._folder.enrolment()
        if wanted.digest != known.base_digest:
            logger.info("rounds train base model %s now (%s)", wanted.name, wanted.digest[:12])
            self._folder.keep(replace(known, base_digest=wanted.digest))
            self._home.close()
            self._home = Coordinator.from_state(self._folder, store=self._store)

    def _fetch_global(self) -> None:
        self._count(CALL_BYTES)
        known = self._kept_digest()
        try:
            fetched = self._home.fetch()
        except NotFound:
            return  # no round yet
        if fetched.fallback is not None:
            raise Unreachable(fetched.fallback)
        if fetched.version.digest != known:
            self._count(fetched.version.size)
            logger.info("%s is here, of round %d", fetched.version, fetched.version.round_num)

    def _kept_digest(self) -> str | None:
        base, keys = self._home.base_digest, self._folder.enrolment().coordinator_keys
        found = _kept(self._folder, keys, base)
        return None if found is None else found[0]

    def _fetch_base(self) -> None:
        try:
            self._store.find(self._home.base_digest)
        except NotFound:
            seen = 0

            def progress(done: int, _: int) -> None:
                nonlocal seen
                self._count(done - seen)
                seen = done
                if not self._may_go():
                    raise BytesSpent from None

            entry = self._home.download_base(progress=progress)
            logger.info("base model %s is here, %.1f MB", entry.name, entry.size / 1e6)

    def _heard(self) -> None:
        if self.silent_since_ms is not None:
            logger.info("%s answers again", self._home.address)
        self.silent_since_ms, self.shut_out = None, None

    def _missed(self, error: Unreachable) -> None:
        if self.silent_since_ms is None:
            logger.warning("offline: %s", error)
            self.silent_since_ms = self._now_ms()


def everyones(folder: DeviceFolder, schema: Schema) -> Everyones:
    """The newest global adapter on this machine; the ones, as round 0 has them, before any."""
    if folder.is_enrolled:
        keys = folder.enrolment().coordinator_keys
        found = _kept(folder, keys, schema.base_digest)
        if found is not None:
            digest, version, data = found
            return Everyones(encoding.decode(data, schema), digest, version)
    return Everyones(Adapter.ones(schema), ones_digest(schema))


def _kept(
    folder: DeviceFolder, keys: tuple[bytes, ...], base_digest: str
) -> tuple[str, int, bytes] | None:
    try:
        good = AdapterCache(folder.adapters, TrustedKeys(keys)).load(None, base_digest)
    except Fedia3Error as error:
        logger.warning("the kept global adapter is not used: %s", error)
        return None
    return None if good is None else (good.version.digest, good.version.version, good.data)


def _age_ms(judged: Judged) -> int:
    """How long ago a part's training began; 0 where the clock was set back since."""
    began_ms = judged.made_ms if judged.began_ms is None else judged.began_ms
    return max(0, wall_ms() - began_ms)
