"""Base models through cuts, crashes, full disks and a coordinator at fault."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from fcntl import LOCK_EX, flock
from pathlib import Path
from threading import Thread, Timer

import pytest

from fedia3.adapters.base_store import BaseEntry, BaseStore
from fedia3.adapters.manifest import MAX_CHUNK, FileEntry, Manifest, read_manifest, verify
from fedia3.client.base_download import BaseDownload, Progress
from fedia3.errors import Corrupt, StorageFailed, Unreachable
from fedia3.proto.base_models_pb2 import GetManifestRequest, SignedManifest
from fedia3.proto.caller import Caller
from fedia3.testing import CuttingProxy
from fedia3.testing_service import RunningService, paper_base, running_service

MIB = 1 << 20
SIZE = 8 * MIB + 12345  # of the one large file: nine chunks
OVERHEAD = 1.01  # TLS, HTTP/2 and gRPC around the bytes

# A downloader as a process of its own; its files may not grow beyond the last argument.
PROCESS = """
import resource, signal, sys
from pathlib import Path
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.manifest import Manifest
from fedia3.client.base_download import BaseDownload
from fedia3.proto.caller import Caller

address, folder, token, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
manifest = Manifest.from_json((folder / "manifest.json").read_text())
caller = Caller(address, ca=(folder / "ca.pem").read_bytes(), token=token)
BaseDownload(caller, BaseStore(folder / "home", folder / "none")).fetch(manifest)
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A coordinator that hands out a base of nine chunks and two small files."""
    folder = tmp_path_factory.mktemp("coordinator")
    base = paper_base(folder / "base", size=SIZE)
    with running_service(folder, base=base, in_memory=True) as running:
        yield running


@pytest.fixture
def proxy(service: RunningService) -> Iterator[CuttingProxy]:
    """A network that fails on demand."""
    with CuttingProxy(service.address) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> BaseStore:
    """A home without base models of its own."""
    return BaseStore(tmp_path / "home", shipped=tmp_path / "none")


@pytest.fixture
def caller(proxy: CuttingProxy, service: RunningService) -> Iterator[Caller]:
    """Behind that network."""
    with Caller(at(proxy), ca=service.ca, token=service.service_token()) as made:
        yield made


def at(proxy: CuttingProxy) -> str:
    """The proxy by the name that the coordinator's certificate is for."""
    return proxy.address.replace("127.0.0.1", "localhost")


def fetch(
    caller: Caller,
    store: BaseStore,
    manifest: Manifest,
    progress: Progress = lambda _done, _total: None,
    *,
    stall_s: float = 30.0,
    patience_s: float = 30.0,
) -> BaseEntry:
    """The base, with short pauses."""
    download = BaseDownload(
        caller, store, progress, stall_s=stall_s, patience_s=patience_s, jitter=lambda: 0.1
    )
    return download.fetch(manifest)


def once_at(places: list[int], act: Callable[[], None]) -> Progress:
    """Act when a download first reaches each of these bytes."""

    def progress(done: int, _total: int) -> None:
        if places and done >= places[0]:
            places.pop(0)
            act()

    return progress


def partial_model(tmp_path: Path, manifest: Manifest) -> Path:
    """The large file on its way."""
    return tmp_path / "home" / "bases" / f".partial-{manifest.digest}" / "model.safetensors"


def left_over(tmp_path: Path) -> list[str]:
    """What lies beside the base models."""
    return [p.name for p in (tmp_path / "home" / "bases").iterdir() if p.name.startswith(".")]


def test_a_base_comes_whole(
    service: RunningService, caller: Caller, store: BaseStore, tmp_path: Path
):
    """
    Every file is the manifest's, the empty one too, and nothing else is left.
    """
    entry = fetch(caller, store, service.manifest)
    verify(entry.path, service.manifest)
    assert read_manifest(entry.path) == service.manifest
    assert store.find(service.manifest.digest) == entry.path
    assert left_over(tmp_path) == []


def test_a_base_that_is_there_is_not_fetched(
    service: RunningService, proxy: CuttingProxy, caller: Caller, store: BaseStore
):
    """
    With the network away, the base of before is found.
    """
    first = fetch(caller, store, service.manifest)
    proxy.refuses = True
    proxy.cut()
    assert fetch(caller, store, service.manifest) == first


def test_a_damaged_base_is_fetched_again(
    service: RunningService, caller: Caller, store: BaseStore, tmp_path: Path
):
    """
    A file that rotted in the home is replaced by the coordinator's.
    """
    entry = fetch(caller, store, service.manifest)
    (entry.path / "model.safetensors").write_bytes(b"rot")
    verify(fetch(caller, store, service.manifest).path, service.manifest)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("way", ["cut_after", "truncate_after"])
def test_a_cut_download_goes_on_where_it_was(
    service: RunningService, proxy: CuttingProxy, caller: Caller, store: BaseStore, way: str
):
    """
    Cut three times, the right bytes come, and little more than each cut's chunk comes again.
    """
    getattr(proxy, way)(MIB // 2, 2 * MIB + MIB // 2, 3 * MIB)
    entry = fetch(caller, store, service.manifest)
    verify(entry.path, service.manifest)
    assert proxy.connections == 4
    assert proxy.to_client.count < (SIZE + 3 * 2 * MIB) * OVERHEAD


def test_a_stalled_download_goes_on(
    service: RunningService, proxy: CuttingProxy, caller: Caller, store: BaseStore
):
    """
    A stream that brings nothing is opened anew; once the network flows, so does the download.
    """

    def stall_for_a_while() -> None:
        proxy.stall()
        Thread(target=lambda: (time.sleep(0.6), proxy.flow()), daemon=True).start()

    entry = fetch(
        caller, store, service.manifest, once_at([2 * MIB], stall_for_a_while), stall_s=0.3
    )
    verify(entry.path, service.manifest)


def test_without_a_network_what_came_is_kept(
    service: RunningService, proxy: CuttingProxy, caller: Caller, store: BaseStore, tmp_path: Path
):
    """
    Cut behind 5 MiB, whole chunks lie there: all that came but the last and what the network had
    in hand. The next try fetches only the rest.
    """

    caller.call("BaseModels/GetManifest", GetManifestRequest(), SignedManifest)
    proxy.refuses = True  # nobody else, once the connection there is is cut
    proxy.cut_after(5 * MIB)
    with pytest.raises(Unreachable):
        fetch(caller, store, service.manifest, patience_s=0.3)
    kept = partial_model(tmp_path, service.manifest).stat().st_size
    assert 2 * MIB <= kept <= 5 * MIB
    assert kept % MIB == 0
    proxy.refuses, before = False, proxy.to_client.count
    verify(fetch(caller, store, service.manifest).path, service.manifest)
    assert proxy.to_client.count - before < (SIZE - kept) * OVERHEAD + MIB // 10


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_closed_caller_ends_a_download(
    service: RunningService,
    proxy: CuttingProxy,
    caller: Caller,
    store: BaseStore,
    tmp_path: Path,
    is_locked: bool,
):
    """
    Whether it waits for the network or for another process: who hangs up is let go at once.
    """
    proxy.refuses = True
    Timer(0.3, caller.close).start()
    with ExitStack() as stack:
        if is_locked:
            lock = store.writable_folder() / f".{service.manifest.digest}.lock"
            flock(stack.enter_context(lock.open("w")), LOCK_EX)
        with pytest.raises(Unreachable):
            fetch(caller, store, service.manifest, patience_s=3600)


def test_two_downloaders_fetch_once(
    service: RunningService, proxy: CuttingProxy, caller: Caller, tmp_path: Path
):
    """
    Two at the same time in one home: both have it, and it crossed the network once.
    """
    stores = [BaseStore(tmp_path / "home", shipped=tmp_path / "none") for _ in range(2)]
    found: list[BaseEntry] = []
    threads = [
        Thread(target=lambda store=store: found.append(fetch(caller, store, service.manifest)))
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    verify(found[0].path, service.manifest)
    assert proxy.to_client.count < SIZE * OVERHEAD + MIB // 10
    assert left_over(tmp_path) == []


def test_a_wrong_chunk_is_dropped_and_named(store: BaseStore, tmp_path: Path):
    """
    One rotten byte on the coordinator's disk: the chunks before it stay, the base of before too.
    """
    older = paper_base(tmp_path / "home" / "bases" / "older", size=10, seed=1)
    with running_service(tmp_path / "coordinator", in_memory=True) as service:
        model = service.settings.base / "model.safetensors"
        whole = model.read_bytes()
        model.write_bytes(whole[: MIB + 7] + bytes([whole[MIB + 7] ^ 1]) + whole[MIB + 8 :])
        with Caller(service.address, ca=service.ca, token=service.service_token()) as caller:
            with pytest.raises(Corrupt, match="chunk 1 of 3"):
                fetch(caller, store, service.manifest)
            assert partial_model(tmp_path, service.manifest).stat().st_size == MIB
            assert [entry.path for entry in store.list()] == [older]
            model.write_bytes(whole)
            verify(fetch(caller, store, service.manifest).path, service.manifest)


def test_rot_in_what_was_kept_is_noticed(
    service: RunningService, caller: Caller, store: BaseStore, tmp_path: Path
):
    """
    Of three chunks left by an earlier try the second rotted: all behind the first comes again.
    """
    data = (service.settings.base / "model.safetensors").read_bytes()[: 3 * MIB]
    kept = partial_model(tmp_path, service.manifest)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data[: MIB + 5] + b"rot" + data[MIB + 8 :])
    seen: list[int] = []
    entry = fetch(caller, store, service.manifest, lambda done, _: seen.append(done))
    verify(entry.path, service.manifest)
    assert 2 * MIB < seen[1] < 3 * MIB  # with the small files' bytes


def test_a_link_among_what_was_kept_is_not_followed(
    service: RunningService, caller: Caller, store: BaseStore, tmp_path: Path
):
    """
    A link in the partial folder cannot make the download write elsewhere.
    """
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    kept = partial_model(tmp_path, service.manifest)
    kept.parent.mkdir(parents=True)
    kept.symlink_to(outside)
    with pytest.raises(StorageFailed):
        fetch(caller, store, service.manifest)
    assert outside.read_bytes() == b"mine"


def test_a_base_without_room_is_not_begun(
    service: RunningService, caller: Caller, store: BaseStore
):
    """
    Ten terabytes are refused before a byte of them is asked for, with what is missing.
    """
    size = 10**13
    entry = FileEntry("model.safetensors", size, ("ab" * 32,) * -(-size // MAX_CHUNK))
    huge = replace(service.manifest, files=(entry,), chunk_size=MAX_CHUNK)
    with pytest.raises(StorageFailed, match="10000000 MB are to come"):
        fetch(caller, store, huge)


def run_downloader(
    address: str, service: RunningService, folder: Path, limit: int = 0
) -> subprocess.Popen[str]:
    """A process that downloads into ``folder/home``."""
    (folder / "manifest.json").write_text(service.manifest.to_json())
    (folder / "ca.pem").write_bytes(service.ca)
    command = [sys.executable, "-c", PROCESS, address, str(folder), service.service_token()]
    return subprocess.Popen([*command, str(limit)], stderr=subprocess.PIPE, text=True)


def test_a_full_disk_leaves_what_came(
    service: RunningService, caller: Caller, store: BaseStore, tmp_path: Path
):
    """
    A disk that takes no more than 2.5 MiB keeps two chunks; with room the rest comes.
    """
    process = run_downloader(service.address, service, tmp_path, limit=2 * MIB + MIB // 2)
    _, said = process.communicate(timeout=60)
    assert "StorageFailed" in said
    assert "make room" in said
    assert partial_model(tmp_path, service.manifest).stat().st_size == 2 * MIB
    verify(fetch(caller, store, service.manifest).path, service.manifest)


@pytest.mark.slow
def test_a_killed_download_goes_on_in_another_process(
    service: RunningService, proxy: CuttingProxy, store: BaseStore, tmp_path: Path
):
    """
    Killed -9 again and again in the middle, the base is right in the end, and few bytes came twice.
    """
    proxy.to_client.bytes_per_s = 4 * MIB
    kept, kills = partial_model(tmp_path, service.manifest), 0
    for place in (1 * MIB, 3 * MIB, 5 * MIB, 7 * MIB):
        process = run_downloader(at(proxy), service, tmp_path)
        while process.poll() is None and (not kept.exists() or kept.stat().st_size < place):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert process.stderr is not None
        process.stderr.close()
    process = run_downloader(at(proxy), service, tmp_path)
    assert process.wait(60) == 0
    assert process.stderr is not None
    process.stderr.close()
    verify(store.find(service.manifest.digest), service.manifest)
    assert kills == 4
    assert proxy.to_client.count < (SIZE + kills * 2 * MIB) * OVERHEAD
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_cuts_cost_a_large_base_little(tmp_path: Path):
    """
    The benchmark, small: five downloads of 100 MB, each cut once at a random byte, are right, and
    on average no more than 2 % is sent again.
    """
    script, facts = Path(__file__).parents[2] / "benchmarks/base_download.py", tmp_path / "facts"
    subprocess.run(
        [sys.executable, script, "--repeats", "0", "--cuts", "5", "--json", facts],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    told = json.loads(facts.read_text())
    assert (told["cut"]["right"], told["both"]["right"]) == (5, 2)
    assert told["cut"]["sent_again_mean"] <= 0.02
    assert told["both"]["crossed"] < OVERHEAD
