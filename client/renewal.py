"""A device's token, kept fresh: a new one once half of its life is over."""

import logging
from collections.abc import Callable
from dataclasses import replace
from threading import Lock

from fedia3.client.device import DeviceFolder, Enrolment
from fedia3.errors import Fedia3Error
from fedia3.proto.caller import Caller
from fedia3.proto.enrolment_pb2 import RenewRequest, RenewResponse

AGAIN_S = 600.0  # after a renewal that failed

logger = logging.getLogger(__name__)


class Renewal:
    """Asks for a new token when it is time, writes it down and shows it from then on."""

    def __init__(
        self, folder: DeviceFolder, known: Enrolment, caller: Caller, now_ms: Callable[[], int]
    ) -> None:
        self.folder = folder
        self._known, self._caller, self._now_ms = known, caller, now_ms
        self._lock, self._not_before_ms = Lock(), 0

    def renew_if_due(self) -> None:
        """After a call that was answered: a failure here is told, and tried again later."""
        now_ms = self._now_ms()
        if not self._known.needs_renewal(now_ms) or now_ms < self._not_before_ms:
            return
        if not self._lock.acquire(blocking=False):
            return  # another thread is at it
        try:
            self._renew(now_ms)
        except Fedia3Error as error:
            self._not_before_ms = now_ms + round(AGAIN_S * 1000)
            logger.warning("the device's token was not renewed: %s", error)
        finally:
            self._lock.release()

    def _renew(self, now_ms: int) -> None:
        answer = self._caller.call("Enrolment/Renew", RenewRequest(), RenewResponse)
        self._known = replace(
            self._known,
            token=answer.token,
            token_issued_ms=now_ms,
            token_expires_ms=answer.token_expires_ms,
        )
        self.folder.keep(self._known)
        self._caller.show(answer.token)
