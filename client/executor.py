"""Takes a node's messages from its SuperNode and has a fork of this process answer each.

Flower's own executor starts a program for every message, which installs and loads the app that the
coordinator sent: about a second of work and 130 MB each time. A device of fedia3 runs one app, the
one that is installed, and that app is thin; so this process stays and has it loaded, and whatever
app came along with a message is not even unpacked.

The agent starts it as ``python -m fedia3.client.executor ADDRESS SECRET_FILE SIGNAL``, beside
``flower-supernode --isolation process``, and sends it that signal when its gateway saw that a
message is complete: asking the SuperNode often would keep a device's processor awake for nothing.
"""

import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedia3.client.flower import deployed

IDLE_POLL_S = 15.0  # should a wake-up be lost
AGAIN_S = 2.0  # after the SuperNode did not answer
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"  # what the secret is asked for

logger = logging.getLogger(__name__)


def acquire(runtime: RuntimeHttpClient) -> str | None:
    """The token of the next message's task; None while there is none."""
    answer = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    return answer.token if answer.HasField("task") and answer.token else None


def answer(address: str, token: str) -> None:
    """Do one task: its message through the installed app, its reply back to the SuperNode."""
    runtime = _connected(
        address,
        [RuntimeVersionHttpInterceptor("flwr-clientapp"), RuntimeTokenHttpInterceptor(token)],
    )
    alive = HeartbeatSender(make_task_heartbeat_fn_http(runtime))
    alive.start()
    try:
        message, context, _run, _app = pull_task_input(runtime)
        reply = in_its_time(deployed(message, context), message)
        push_message(runtime, reply, context)
        push_task_output(runtime, context, SubStatus.COMPLETED, "")
    except Exception as error:  # the text of an error stays on the device
        push_task_output(runtime, None, SubStatus.FAILED, type(error).__name__)
        raise
    finally:
        alive.stop()
        runtime.close()


def in_its_time(reply: Message, message: Message) -> Message:
    """The reply, dated as the message it answers: by the coordinator's clock, to live as long.

    Dated by a device's clock that is ahead it would have been over before it was sent.
    """
    reply.metadata.created_at = message.metadata.created_at
    reply.metadata.ttl = message.metadata.ttl
    return reply


class Pause:
    """The time between two questions: until the signal ``wake`` comes, or a long while is over.

    Asking before the SuperNode has all of a message is worse than useless: it hands the task out
    early, and Flower's client then waits a second for what was not there yet.
    """

    def __init__(self, wake: int) -> None:
        self._woken, writing = socket.socketpair()
        for end in (self._woken, writing):
            end.setblocking(False)
        self._writing = writing
        signal.signal(wake, lambda *_: None)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def take(self) -> None:
        """Wait for the next question's time."""
        woken, _, _ = select.select([self._woken], [], [], IDLE_POLL_S)
        if woken:
            self._woken.recv(4096)


class Worker:
    """The fork that answers a message. A new message means that nobody waits for the last one's."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._pid: int | None = None

    def begin(self, token: str) -> None:
        """Have a new fork do this task, and end one that still tries to do another."""
        self.look(end=True)
        self._pid = os.fork()
        if self._pid == 0:
            os._exit(_answered(self._address, token))

    def look(self, *, end: bool = False) -> None:
        """Let the system forget a fork that is through; ``end`` it if it is not."""
        if self._pid is None:
            return
        if end:
            os.kill(self._pid, signal.SIGKILL)
        if os.waitpid(self._pid, 0 if end else os.WNOHANG)[0]:
            self._pid = None


def _answered(address: str, token: str) -> int:
    """In the fork: its exit status."""
    signal.set_wakeup_fd(-1)  # the pipe is the parent's
    try:
        answer(address, token)
    except Exception as error:
        logger.warning("a message was not answered: %s", type(error).__name__, exc_info=error)
        return 1
    return 0


def work(address: str, secret: bytes, wake: int) -> None:
    """Answer messages until the process is ended."""
    pause, worker = Pause(wake), Worker(address)
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})
    runtime = _connected(address, [RuntimeVersionHttpInterceptor("SuperExec"), proof])
    while True:
        try:
            worker.look()
            if token := acquire(runtime):
                worker.begin(token)
            else:
                pause.take()
        except Exception as error:  # the SuperNode is starting, or gone for a while
            logger.warning("the SuperNode was not asked: %s", type(error).__name__)
            time.sleep(AGAIN_S)


def _connected(
    address: str, interceptors: Sequence[ProtobufClientInterceptor]
) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,  # this machine's loopback
        root_certificates=None,
        interceptors=list(interceptors),
        retry_invoker=make_simple_http_retry_invoker(),
    )


def main() -> None:
    """The process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every question
    os.umask(0o077)
    address, secret_file, wake = sys.argv[1:]
    work(address, Path(secret_file).read_bytes(), int(wake))


if __name__ == "__main__":
    main()
