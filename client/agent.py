"""The agent: keeps a device's trainer, its Flower node and its owner's own part going.

It holds no model. Every second it looks at what its owner wants, how the machine is and what the
parts say, and begins what is due; what takes time runs beside the loop. It works from the first
second without a coordinator, and takes part in rounds whenever it can.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, cast

import psutil

from fedia3.adapters.adapter import PersonalAdapter
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.update import TrainingPlan
from fedia3.client.conditions import Conditions, DayBytes, Probes, why_not, why_offline
from fedia3.client.data import files_stamp
from fedia3.client.device import DeviceFolder, Enrolment
from fedia3.client.device_status import Control, Coordinator, DeviceStatus
from fedia3.client.gateway import Gatekeeper
from fedia3.client.node import Node
from fedia3.client.personal_store import Judged, KeptPart, PersonalStore, Shared
from fedia3.client.resident import TRAINER, LocalBase, Resident
from fedia3.client.splits import SplitPlan
from fedia3.client.trainer_settings import TrainerSettings
from fedia3.client.trainer_socket import OwnPart
from fedia3.client.upkeep import Everyones, Upkeep, everyones
from fedia3.errors import Fedia3Error, NotFound

TICK_S = 1.0
PROBE_EVERY_S = 5.0
REFRESH_EVERY_S = 60.0  # the global adapter and the base model
AFTER_ROUND_S = 6.0  # by then the round that this device trained for is mostly committed
LEAVE_AFTER_S = 30.0  # of waiting, before the fleet is left: joining it again is work
REST_AFTER_S = 600.0  # of waiting, before the trainer gives its memory back
TELL_EVERY_S = 3.0  # the status, where only numbers change
AGAIN_S = 30.0  # after something that failed
RESTS = 10  # a personalization is followed by so many times its length without one

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentSettings:
    """What an owner asks of a device."""

    data: Path  # a .jsonl file, or a folder of them
    base: str = "tiny"  # until the device is enrolled and the coordinator's base is here
    order_field: str | None = None  # sorts the texts; None = the files' order
    split: SplitPlan = field(default_factory=SplitPlan)
    share_personal: bool = False
    conditions: Conditions = field(default_factory=Conditions)
    cpu_share: float = 1.0  # of all processors
    check_every_s: float = 0.0  # how often the coordinator is asked for work; 0: as Flower does
    personal_every_s: float = 60.0  # at most so often
    personal: TrainingPlan = field(
        default_factory=lambda: TrainingPlan(learning_rate=3e-2, epochs=6, patience=2)
    )
    seed: int = 0
    trainer_program: tuple[str, ...] = TRAINER  # what answers on the trainer's socket

    def trainer(self, base: Path, socket: Path) -> TrainerSettings:
        """What the trainer is started with."""
        return TrainerSettings(
            base, self.data, socket, self.order_field, self.split, self.cpu_share
        )


@dataclass(frozen=True)
class Grown:
    """What an own part grew on: a global adapter and a state of the text."""

    global_digest: str
    data_digest: str


def is_due(kept: KeptPart | None, now: Grown, *, is_asked: bool, rested: bool) -> bool:
    """Whether the owner's part is to be trained anew."""
    grown = None if kept is None else Grown(kept.global_digest, kept.judged.data_digest)
    return is_asked or (rested and grown != now)


def silent_since(missed_ms: int | None, heard_ms: int | None) -> int | None:
    """Since when a coordinator is silent: not any more where it was heard after it was missed."""
    is_back = missed_ms is not None and heard_ms is not None and heard_ms > missed_ms
    return None if is_back else missed_ms


class Agent:
    """One device at work.

    Args:
        settings: what its owner asks.
        folder: its state.
        store: where base models lie.
        probes: find out how the machine is.
        told: gets the status whenever its line changes.
    """

    def __init__(
        self,
        settings: AgentSettings,
        folder: DeviceFolder,
        *,
        store: BaseStore | None = None,
        probes: Probes | None = None,
        told: Callable[[DeviceStatus], None] = lambda _: None,
    ) -> None:
        self.settings, self.folder, self._told = settings, folder, told
        self._store, self._probes = store or BaseStore(), probes or Probes()
        self._personal = PersonalStore(folder.personal)
        self._jobs = _Jobs()
        self._control = Control()
        self._problem: str | None = None
        self._waiting: str | None = None
        self._waiting_since = time.monotonic()
        self._withheld: str | None = None
        self._stamp: str | None = None
        self._enrolment: Enrolment | None = None
        self._upkeep: Upkeep | None = None
        self._node: Node | None = None
        self._own: tuple[KeptPart | None, Shared | None] = (None, None)
        self._global_version: int | None = None
        self._rounds = 0
        self._met_ms = 0  # the owner's last wish to personalize that was met
        self._rests_until = 0.0
        self._status: DeviceStatus | None = None

    async def run(self, until: asyncio.Event) -> None:
        """Work until somebody sets the event, then end everything that was started.

        Raises:
            Conflict: another agent works with the same folder.
        """
        with self.folder.locked():
            self._open()
            try:
                while not until.is_set():
                    await self._tick()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(until.wait(), TICK_S)
            finally:
                await self._close()

    def _open(self) -> None:
        threads = self.settings.trainer(Path(), Path()).threads
        self._trainer = Resident(
            self.folder, self.settings.trainer, threads, self.settings.trainer_program
        )
        self._bytes = DayBytes(self.folder.path / "bytes.json")
        self._met_ms = Control.read(self.folder.control_file).personalize_asked_ms
        self._keeper = Gatekeeper(
            self._bytes.add,
            check_every_s=self.settings.check_every_s,
            withheld=lambda: self._withheld,
        )

    async def _close(self) -> None:
        with suppress(Fedia3Error):  # a full disk must not keep it from ending
            self._tell()  # as it was while it worked
        if self._upkeep is not None:
            self._upkeep.close()
        await self._trainer.rest()  # first: who waits for it in a thread is let go
        await self._jobs.end()
        await self._leave_fleet()
        self._bytes.save()

    async def _tick(self) -> None:
        """One look at everything. Nothing that goes wrong here ends the agent."""
        try:
            await self._look()
            await self._keep_trainer()
            self._begin_what_is_due()
            self._problem = None
        except Fedia3Error as error:
            self._note_problem(str(error))
        except Exception as error:
            logger.exception("a fault of fedia3")
            self._problem = f"a fault of fedia3 ({type(error).__name__}); agent.log says more"
        with suppress(Fedia3Error):  # a full disk must not end the work
            self._tell()

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            logger.warning("%s", problem)
        self._problem = problem

    # --- what is -----------------------------------------------------------------------------

    async def _look(self) -> None:
        control = Control.read(self.folder.control_file)
        if control.forgotten_ms != self._control.forgotten_ms:
            self._own = (None, None)
        self._control = control
        self._enrolment = self.folder.enrolment() if self.folder.is_enrolled else None
        if self._jobs.may_begin("probe"):
            self._jobs.not_before("probe", PROBE_EVERY_S)
            self._facts = await asyncio.to_thread(
                self._probes.facts, is_paused=False, bytes_today=self._bytes.count
            )
        facts = replace(self._facts, is_paused=self._control.paused, bytes_today=self._bytes.count)
        waiting = why_not(self.settings.conditions, facts)
        if (waiting is None) != (self._waiting is None):
            self._waiting_since = time.monotonic()
        self._waiting = waiting
        self._withheld = why_offline(self.settings.conditions, facts)

    @property
    def _waited_s(self) -> float:
        return 0.0 if self._waiting is None else time.monotonic() - self._waiting_since

    # --- the trainer -------------------------------------------------------------------------

    async def _keep_trainer(self) -> None:
        if self._control.paused or self._waited_s > REST_AFTER_S:
            await self._trainer.rest()
            return
        if self._waiting is not None and self._trainer.base is None:
            return  # loading a base is work
        base = self._base()
        if self._trainer.base is None:
            self._stamp = files_stamp(self.settings.data)  # what is newer than this is read again
        await self._trainer.use(base)
        await self._trainer.look()
        await self._trainer.hold(self._waiting is not None)

    def _base(self) -> LocalBase:
        """The base that rounds train once it is here, before that the owner's choice.

        Raises:
            NotFound: neither is here.
        """
        running = self._trainer.base
        if running is not None and not self._jobs.may_begin("base"):
            return running
        self._jobs.not_before("base", PROBE_EVERY_S)
        if self._enrolment is not None:
            with suppress(NotFound):
                return LocalBase.at(self._store.find(self._enrolment.base_digest))
        return LocalBase.at(self._store.find(self.settings.base))

    # --- what is due -------------------------------------------------------------------------

    def _begin_what_is_due(self) -> None:
        self._begin_with_coordinator()
        self._jobs.begin("fleet", self._keep_fleet)
        status = self._trainer.status
        if status is None or self._waiting is not None:
            return
        if status.rounds != self._rounds:
            self._rounds = status.rounds
            self._jobs.not_before("refresh", AFTER_ROUND_S, sooner=True)
        self._jobs.begin("reload", self._reload_new_text)
        if self._control.personalize_asked_ms > self._met_ms:
            self._jobs.not_before("personalize", 0.0, sooner=True)
        if status.doing is None and status.too_little is None:
            self._jobs.begin("personalize", self._personalize_if_due)

    def _begin_with_coordinator(self) -> None:
        if self._enrolment is None or self._withheld is not None or self._waiting is not None:
            return
        if self._upkeep is not None and self._upkeep.device_id != self._enrolment.device_id:
            self._upkeep.close()  # enrolled anew
            self._upkeep = None
        if self._upkeep is None:
            self._upkeep = Upkeep(self.folder, self._store, self._bytes.add, self._may_use_network)
        if self._keeper.shut_out is not None:
            self._jobs.not_before("refresh", AGAIN_S / 2, sooner=True)  # is it so?
        self._jobs.begin("refresh", self._refresh)
        if self.settings.share_personal:
            self._jobs.begin("share", self._share)

    def _may_use_network(self) -> bool:
        facts = replace(self._facts, bytes_today=self._bytes.count)
        return why_offline(self.settings.conditions, facts) is None

    async def _refresh(self) -> None:
        assert self._upkeep is not None
        self._jobs.not_before("refresh", REFRESH_EVERY_S)
        await aside(self._upkeep.refresh)

    async def _reload_new_text(self) -> None:
        stamp = await aside(lambda: files_stamp(self.settings.data))
        self._jobs.not_before("reload", PROBE_EVERY_S)
        if stamp != self._stamp:
            status = await aside(self._trainer.remote.reload)
            logger.info("the text changed: %d texts now", status.texts)
        self._stamp = stamp

    # --- the fleet ---------------------------------------------------------------------------

    async def _keep_fleet(self) -> None:
        if self._node is not None and (
            self._node.enrolment.device_id != getattr(self._enrolment, "device_id", None)
            or not self._belongs_into_fleet()
        ):
            await self._leave_fleet()
        elif self._node is None and self._enrolment is not None and self._belongs_into_fleet():
            self._jobs.not_before("fleet", AGAIN_S)  # where joining fails
            self._node = Node(self.folder, self._enrolment, self._trainer.socket, self._keeper)
            await self._node.start()
            self._jobs.not_before("fleet", 0.0)

    async def _leave_fleet(self) -> None:
        node, self._node = self._node, None
        if node is not None:
            await node.stop()

    def _belongs_into_fleet(self) -> bool:
        """Whether a round's message could be answered."""
        enrolment, status = self._enrolment, self._trainer.status
        if enrolment is None or self._withheld is not None or self._control.paused:
            return False
        if self._upkeep is not None and self._upkeep.shut_out is not None:
            return False
        if self._waited_s > LEAVE_AFTER_S:
            return False
        if status is None:  # between two lives of the trainer a node waits; it does not begin
            return self._node is not None and self._trainer.base is not None
        return status.too_little is None and status.base_digest == enrolment.base_digest

    # --- the owner's part --------------------------------------------------------------------

    async def _personalize_if_due(self) -> None:
        self._jobs.not_before("personalize", PROBE_EVERY_S)
        base, status = self._trainer.base, self._trainer.status
        if base is None or status is None:
            return
        start = everyones(self.folder, base.schema)
        found = self._personal.current(base.schema)
        asked_ms = self._control.personalize_asked_ms
        if is_due(
            found[0] if found else None,
            Grown(start.digest, status.data_digest),
            is_asked=asked_ms > self._met_ms,
            rested=time.monotonic() >= self._rests_until,
        ):
            self._met_ms = max(self._met_ms, asked_ms)
            await self._personalize(start)

    async def _personalize(self, start: Everyones) -> None:
        began_ms, began = now_ms(), time.monotonic()
        plan, seed = self.settings.personal, self.settings.seed
        try:
            part = await aside(
                lambda: self._trainer.remote.personalize(
                    start.adapter.vector, start.digest, plan, seed
                )
            )
        finally:
            took = time.monotonic() - began
            rest_s = max(self.settings.personal_every_s, RESTS * took)
            self._rests_until = time.monotonic() + rest_s
        # the owner may have had everything forgotten meanwhile
        if Control.read(self.folder.control_file).forgotten_ms < began_ms:
            self._keep(part, start, began_ms)
            self._jobs.not_before("share", 0.0)
            self._jobs.not_before("own", 0.0)
            logger.info("personalized in %.1f s: %s is served", took, part.choice)

    def _keep(self, part: OwnPart, start: Everyones, began_ms: int) -> None:
        judged = Judged(
            choice=part.choice,
            global_loss=part.global_loss,
            personal_loss=part.personal_loss,
            num_examples=part.num_examples,
            data_digest=part.data_digest,
            made_ms=now_ms(),
            test=part.test,
            began_ms=began_ms,
        )
        self._personal.keep(PersonalAdapter(start.adapter.schema, part.delta, start.digest), judged)

    async def _share(self) -> None:
        """Give the coordinator what the gate decided."""
        assert self._upkeep is not None
        base, enrolment = self._trainer.base, self._enrolment
        self._jobs.not_before("share", AGAIN_S)
        if base is None or enrolment is None or base.digest != enrolment.base_digest:
            return
        found = self._personal.current(base.schema)
        part = self._personal.to_share(base.schema)
        if found is not None and part is not None:
            upkeep, kept = self._upkeep, found[0]
            version = await aside(lambda: upkeep.share(part, kept))
            self._personal.note_shared(part, version)
            self._jobs.not_before("own", 0.0)
            logger.info("shared the owner's part as version %d", version)

    # --- the status --------------------------------------------------------------------------

    def _tell(self) -> None:
        """Write the status down, at once where its line changed."""
        before, status = self._status, self._told_now()
        if before is not None and before.line == status.line and not self._jobs.may_begin("tell"):
            return
        self._jobs.not_before("tell", TELL_EVERY_S)
        status.write(self.folder.status_file)
        self._status = status
        if before is None or before.line != status.line:
            self._told(status)

    def _told_now(self) -> DeviceStatus:
        trainer, base = self._trainer.last, self._trainer.base
        status = DeviceStatus(
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            written_ms=now_ms(),
            state_folder=str(self.folder.path),
            data=str(self.settings.data),
            waiting=self._waiting,
            trainer="running" if self._trainer.status is not None else "starting",
            problem=self._problem,
            base=None if base is None else f"{base.manifest.name} {base.digest[:12]}",
            coordinator=self._standing(),
            device_id=self._enrolment.device_id if self._enrolment else None,
            user=self._enrolment.user if self._enrolment else None,
            node=self._node.status().state if self._node else "stopped",
            bytes_today=self._bytes.count,
        )
        if trainer is not None:
            status = replace(
                status,
                texts=trainer.texts,
                skipped=trainer.skipped,
                first_skipped=trainer.first_skipped,
                too_little=trainer.too_little,
                doing=trainer.doing if self._trainer.status is not None else None,
                last_round=trainer.last_round,
                last_round_ms=trainer.last_round_ms,
                last_loss=trainer.last_loss,
                last_failure=trainer.last_failure,
            )
        return self._with_personal(status)

    def _with_personal(self, status: DeviceStatus) -> DeviceStatus:
        self._look_at_own()
        kept, shared = self._own
        status = replace(status, global_version=self._global_version)
        if kept is None:
            return status
        return replace(
            status,
            choice=kept.judged.choice,
            personalized_ms=kept.judged.made_ms,
            losses=dict(kept.judged.test),
            shared_version=shared.version if shared else None,
        )

    def _look_at_own(self) -> None:
        if self._trainer.base is None or not self._jobs.may_begin("own"):
            return
        self._jobs.not_before("own", PROBE_EVERY_S)
        schema = self._trainer.base.schema
        found = self._personal.current(schema)
        self._own = (found[0] if found else None, self._personal.shared(schema.base_digest))
        self._global_version = everyones(self.folder, schema).version

    def _standing(self) -> Coordinator | None:
        if self._enrolment is None:
            return None
        upkeep, keeper = self._upkeep, self._keeper
        silent_ms = keeper.silent_since_ms
        if silent_ms is None and upkeep is not None:
            silent_ms = silent_since(upkeep.silent_since_ms, keeper.heard_ms)
        return Coordinator(
            self._enrolment.address,
            silent_since_ms=silent_ms,
            shut_out=upkeep.shut_out if upkeep else None,
            withheld=self._withheld,
        )


def serve(agent: Agent) -> None:
    """Run an agent until Ctrl-C or SIGTERM; its log goes into its state folder."""
    agent.folder.make()
    with _logging(agent.folder.logs / "agent.log"):
        asyncio.run(_until_ended(agent))


async def _until_ended(agent: Agent) -> None:
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await agent.run(ended)


@contextmanager
def _logging(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=1 << 20, backupCount=1)
    path.chmod(0o600)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("fedia3")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _Jobs:
    """What runs beside the loop: each by name, one at a time, not before its time."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}

    def may_begin(self, name: str) -> bool:
        return name not in self._running and time.monotonic() >= self._not_before.get(name, 0.0)

    def not_before(self, name: str, in_s: float, *, sooner: bool = False) -> None:
        """Not for so long; with ``sooner``, as early as that where it was later."""
        due = time.monotonic() + in_s
        self._not_before[name] = min(due, self._not_before.get(name, due)) if sooner else due

    def begin(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Unless it is under way, or its time has not come."""
        if self.may_begin(name):
            self._running[name] = asyncio.create_task(self._done(name, work()), name=name)

    async def end(self, within_s: float = 5.0) -> None:
        """Wait for what is under way; whatever it waits for has been taken away."""
        if self._running:
            _, late = await asyncio.wait(self._running.values(), timeout=within_s)
            for job in late:
                job.cancel()

    async def _done(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Fedia3Error as error:
            logger.warning("%s: %s", name, error)
            self.not_before(name, AGAIN_S)
        except Exception:
            logger.exception("%s: a fault of fedia3", name)
            self.not_before(name, AGAIN_S)
        finally:
            del self._running[name]


async def aside(work: Callable[[], T]) -> T:
    """Run what waits for others in a thread that keeps no process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(T, result))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # handed to whoever awaits it
            error = raised
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    Thread(target=run, daemon=True).start()
    return await done


def now_ms() -> int:
    """This machine's clock, ms since 1970."""
    return time.time_ns() // 10**6
