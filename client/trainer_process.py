"""A device's trainer: the base model loaded once, the owner's text, one training at a time.

The agent starts it as ``python -m fedia3.client.trainer_process SETTINGS`` and both the agent and
Flower's short-lived ClientApp reach it over its socket. A request that fails is answered with the
error's class, and the process lives on.
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import psutil
import torch
from torch import nn

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.base_model import BaseModel, fastest_dtype, load
from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.client.examples import OWNER, OwnText, encode_sides, read_own
from fedia3.client.personalization import personalize
from fedia3.client.tasks import Scores, Task, task_for
from fedia3.client.trainer import (
    ClientExamples,
    ResidentTrainer,
    evaluate_rows,
    give_memory_back,
)
from fedia3.client.trainer_settings import TrainerSettings, cores
from fedia3.client.trainer_socket import Frame, FrameServer, TrainerStatus
from fedia3.clock import wall_ms
from fedia3.errors import BadData, BadInput

NICENESS = 10  # whoever uses the machine comes first
MEMORY_SHARE = 0.5  # of what is free, for decoded weights; a base beyond it stays 4-bit

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Spent(NamedTuple):
    """Time of a process."""

    wall_s: float
    busy_s: float  # of all its threads together


class Paced(Generic[Item]):
    """A task that leaves the machine to others: a share of the processor, nothing while held."""

    def __init__(
        self,
        task: Task[Item],
        processors: float,
        *,
        clock: Callable[[], Spent] = lambda: Spent(time.monotonic(), time.process_time()),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._task, self._processors = task, processors
        self._clock, self._sleep = clock, sleep
        self._since = clock()
        self._may_go = Event()
        self._may_go.set()

    def hold(self, held: bool) -> None:
        """Stop before the next batch, or go on with it."""
        if held:
            self._may_go.clear()
        else:
            self._may_go.set()

    @property
    def is_held(self) -> bool:
        """Whether nothing may be done now."""
        return not self._may_go.is_set()

    def length(self, item: Item) -> int:
        """As the task."""
        return self._task.length(item)

    def learned(self, item: Item) -> int:
        """As the task."""
        return self._task.learned(item)

    def score(self, model: nn.Module, items: Sequence[Item]) -> Scores:
        """As the task, after a rest that keeps the time since the last batch within the share."""
        self._may_go.wait()
        self._rest()
        return self._task.score(model, items)

    def _rest(self) -> None:
        now, then = self._clock(), self._since
        owed = (now.busy_s - then.busy_s) / self._processors - (now.wall_s - then.wall_s)
        if owed > 0:
            self._sleep(owed)
        self._since = self._clock()


class DeviceTrainer:
    """Answers the requests of :class:`fedia3.client.trainer_socket.RemoteTrainer`."""

    def __init__(
        self, base: BaseModel, settings: TrainerSettings, task: Paced[Any] | None = None
    ) -> None:
        self.base, self.settings = base, settings
        self.task = task or Paced(task_for(base.model, base.pad_id), settings.cpu_share * cores())
        self.resident = ResidentTrainer(base.model, base.schema, self.task, {})
        self._working, self._noting = Lock(), Lock()
        self._encoded: dict[int, ClientExamples[Any]] = {}  # by max_length
        self._text = self._read()
        self._status = TrainerStatus(base.digest, base.schema.digest)
        self._requests: dict[str, Callable[[Frame], Frame]] = {
            "train": self._train,
            "personalize": self._personalize,
            "reload": self._reload,
            "status": lambda _: self.status(),
            "hold": self._hold,
        }

    def answer(self, frame: Frame) -> Frame:
        """The answer to one request.

        Raises:
            BadInput: nobody knows what it asks for, or a part of it is missing.
        """
        wanted = frame.header.get("do")
        if wanted not in self._requests:
            raise BadInput(f"expected one of {', '.join(self._requests)}, got {wanted!r}")
        try:
            return self._requests[wanted](frame)
        except KeyError as error:
            raise BadInput(f"the request {wanted!r} lacks {error}") from error

    def failed(self, error: Exception) -> None:
        """Note what went wrong; the log has the whole of it, and stays on the device."""
        self._note(last_failure=type(error).__name__)
        logger.error("a request failed", exc_info=error)

    def status(self) -> Frame:
        """How it is, also during a training."""
        text = self._text
        status = replace(
            self._status,
            texts=text.texts,
            data_digest=text.digest,
            skipped=len(text.skipped),
            first_skipped=str(text.skipped[0]) if text.skipped else None,
            too_little=text.too_little,
            is_held=self.task.is_held,
        )
        return Frame(asdict(status))

    def _train(self, frame: Frame) -> Frame:
        asked = frame.header
        plan = TrainingPlan(**asked["plan"])
        request = TrainRequest(
            client=OWNER,
            round_num=asked["round"],
            round_seed=asked["seed"],  # the device's own share of it
            vector=frame.vector(),
            schema_digest=asked["schema"],
            plan=plan,
        )
        with self._doing(f"training round {request.round_num}"):
            self._use(plan.max_length)
            update = self.resident.train(request)
            self._note_round(request.round_num, update.metrics["loss_mean"])
        facts = {"num_examples": update.num_examples, "metrics": dict(update.metrics)}
        return Frame.with_vector(facts, update.delta)

    def _personalize(self, frame: Frame) -> Frame:
        asked = frame.header
        plan = TrainingPlan(**asked["plan"])
        start = Adapter(self.base.schema, frame.vector())
        with self._doing("personalizing"):
            digest, digest_of_global = self._text.digest, asked["global_digest"]
            self._use(plan.max_length)
            result = personalize(
                self.resident, [OWNER], start, digest_of_global, plan, asked["seed"]
            )[OWNER]
            test = self._tested(start, result.personal.on(start))
        facts = {
            "choice": result.choice,
            "global_loss": result.global_loss,
            "personal_loss": result.personal_loss,
            "num_examples": result.num_examples,
            "data_digest": digest,
            "test": test,
        }
        return Frame.with_vector(facts, result.personal.delta)

    def _tested(self, start: Adapter, own: Adapter) -> dict[str, float]:
        """Losses on text that neither trained nor decided; the owner's to read."""
        adapters = {"base": Adapter.ones(self.base.schema), "global": start, "personal": own}
        held_out = self.resident.clients[OWNER].test
        judged = evaluate_rows(
            self.resident.model,
            self.resident.bank,
            self.task,
            [adapter.vector for adapter in adapters.values()],
            [held_out] * len(adapters),
        )
        return {name: result.loss for name, result in zip(adapters, judged, strict=True)}

    def _reload(self, _: Frame) -> Frame:
        with self._doing("reading"):  # the tokenizer serves one at a time
            self._text = self._read()
            self._encoded.clear()
        return self.status()

    def _hold(self, frame: Frame) -> Frame:
        self.task.hold(bool(frame.header["held"]))
        return Frame({})

    def _read(self) -> OwnText:
        settings = self.settings
        return read_own(settings.data, settings.split, self.base, order_field=settings.order_field)

    def _use(self, max_length: int) -> None:
        """Have the owner's text at hand, cut to ``max_length``.

        Raises:
            BadData: there is too little of it.
        """
        if self._text.sides is None:
            raise BadData(self._text.too_little or "there is no text")
        if max_length not in self._encoded:
            self._encoded = {max_length: encode_sides(self._text.sides, self.base, max_length)}
        examples = self._encoded[max_length]
        if not (examples.train and examples.validation and examples.test):
            raise BadData(f"within max_length={max_length} a side has nothing left to learn")
        self.resident.clients = {OWNER: examples}

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """One piece of work at a time, and its name in the status."""
        with self._working:
            self._note(doing=what)
            try:
                yield
            finally:
                give_memory_back()
                self._note(doing=None)

    def _note_round(self, round_num: int, loss: float) -> None:
        self._note(
            rounds=self._status.rounds + 1,
            last_round=round_num,
            last_round_ms=wall_ms(),
            last_loss=loss if math.isfinite(loss) else None,
        )

    def _note(self, **changes: Any) -> None:
        with self._noting:
            self._status = replace(self._status, **changes)


def serve(settings: TrainerSettings) -> None:
    """Load the base and answer until the process is ended."""
    torch.set_num_threads(settings.threads)
    budget = int(MEMORY_SHARE * psutil.virtual_memory().available)
    base = load(settings.base, memory_budget=budget, dtype=fastest_dtype())
    trainer = DeviceTrainer(base, settings)
    with FrameServer(
        settings.socket,
        trainer.answer,
        # towards Flower, the class is all that may be said of an error
        keeps_text=lambda frame: frame.header.get("do") != "train",
        failed=trainer.failed,
    ) as server:
        logger.info("base %s, %d texts", base.manifest.name, trainer.status().header["texts"])
        server.serve_forever()


def main() -> None:
    """The process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = TrainerSettings.read(Path(sys.argv[1]))
    os.nice(NICENESS)

    def leave(*_: object) -> NoReturn:
        settings.socket.unlink(missing_ok=True)
        os._exit(0)  # a training under way in another thread has nothing to save

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    serve(settings)


if __name__ == "__main__":
    main()
