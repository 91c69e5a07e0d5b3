"""The failing network that other tests stand on."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from fedia3.testing import CuttingProxy


@contextmanager
def echo() -> Iterator[str]:
    """A server that says back what it hears; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(1 << 16):
                    peer.sendall(data)
            except OSError:
                pass

    def run() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            Thread(target=talk, args=(peer,), daemon=True).start()

    Thread(target=run, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def connected(proxy: CuttingProxy) -> socket.socket:
    """A connection through the proxy."""
    host, port = proxy.address.split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def everything(end: socket.socket) -> bytes:
    """What comes until the connection ends, however it does."""
    got = b""
    try:
        while data := end.recv(1000):
            got += data
    except ConnectionResetError:
        pass
    return got


@pytest.fixture
def proxy() -> Iterator[CuttingProxy]:
    """A proxy in front of an echo that keeps what passes."""
    with echo() as address, CuttingProxy(address, captures=True) as made:
        yield made


def test_bytes_pass_and_are_kept(proxy: CuttingProxy):
    """
    Five bytes there and back are counted and captured in each direction.
    """
    with connected(proxy) as end:
        end.sendall(b"hello")
        assert end.recv(100) == b"hello"
    assert (proxy.to_server.captured, proxy.to_client.captured) == (b"hello", b"hello")
    assert (proxy.to_server.count, proxy.to_client.count, proxy.connections) == (5, 5, 1)


@pytest.mark.parametrize("way", ["cut_after", "truncate_after"])
def test_a_connection_ends_behind_the_given_byte(proxy: CuttingProxy, way: str):
    """
    Of ten bytes, three come back; then it is over. The next connection is whole again.
    """
    getattr(proxy, way)(3)
    with connected(proxy) as end:
        end.sendall(b"0123456789")
        assert everything(end) == b"012"
    with connected(proxy) as end:
        end.sendall(b"0123456789")
        assert end.recv(100) == b"0123456789"


def test_a_stalled_connection_stays_open_and_goes_on(proxy: CuttingProxy):
    """
    Nothing comes while it stalls, everything after.
    """
    with connected(proxy) as end:
        proxy.stall()
        end.sendall(b"late")
        end.settimeout(0.2)
        with pytest.raises(TimeoutError):
            end.recv(100)
        proxy.flow()
        end.settimeout(5)
        assert end.recv(100) == b"late"


def test_cutting_ends_what_is_open(proxy: CuttingProxy):
    """
    A cut is seen by the client at once.
    """
    with connected(proxy) as end:
        end.sendall(b"a")
        end.recv(1)
        proxy.cut()
        assert everything(end) == b""


def test_who_is_refused_gets_nothing(proxy: CuttingProxy):
    """
    New connections are hung up on while it refuses.
    """
    proxy.refuses = True
    with suppress(OSError), connected(proxy) as end:  # it may be over before it is there
        assert everything(end) == b""
