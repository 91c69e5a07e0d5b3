"""What is kept of adapters, and what is never taken for them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedia3.adapters.encoding import digest
from fedia3.client.cache import AdapterCache
from fedia3.client.records import TrustedKeys, opened_version
from fedia3.errors import BadSignature, Corrupt, WrongBaseModel
from fedia3.proto.adapters_pb2 import AdapterRecord, FetchResponse, Owner, SignedRecord
from fedia3.proto.signing import signed_bytes

BASE, OTHER_BASE = "ab" * 32, "cd" * 32


@dataclass(frozen=True)
class Signer:
    """A coordinator's pen."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def answer(
        self,
        version: int,
        *,
        user: str = "",
        base: str = BASE,
        data: bytes = b"scales",
        alias: str = "latest",
    ) -> FetchResponse:
        """A sound answer."""
        record = AdapterRecord(
            owner=Owner(user=user) if user else Owner(everyone=True),
            version=version,
            digest=digest(data),
            size=len(data),
            base_digest=base,
            revision=version,
            alias=alias,
        ).SerializeToString()
        signature = self.key.sign(signed_bytes("record", record))
        signed = SignedRecord(record=record, signature=signature, key=self.public)
        return FetchResponse(record=signed, data=data)


@pytest.fixture
def signer() -> Signer:
    """The coordinator that the device trusts."""
    return Signer(Ed25519PrivateKey.generate())


@pytest.fixture
def cache(tmp_path: Path, signer: Signer) -> AdapterCache:
    """An empty cache of that device."""
    return AdapterCache(tmp_path / "adapters", TrustedKeys((signer.public,)))


def kept_file(tmp_path: Path) -> Path:
    """The one file with bytes in it."""
    (found,) = (tmp_path / "adapters").rglob("current")
    return found


def test_what_is_kept_comes_back(cache: AdapterCache, signer: Signer):
    """
    The version and its bytes, for the owner and base that they were kept for, and no other.
    """
    cache.keep(signer.answer(3), None, BASE)
    good = cache.load(None, BASE)
    assert good is not None
    assert (good.version.version, good.data) == (3, b"scales")
    assert cache.load("ann", BASE) is None
    assert cache.load(None, OTHER_BASE) is None


def test_users_names_may_hold_anything(cache: AdapterCache, signer: Signer, tmp_path: Path):
    """
    A name that looks like a path stays inside the folder.
    """
    cache.keep(signer.answer(1, user="../../x"), "../../x", BASE)
    assert cache.load("../../x", BASE) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"adapters"}


def test_an_older_version_is_refused(cache: AdapterCache, signer: Signer):
    """
    Behind version 5, version 4 is not taken, and 5 stays.
    """
    cache.keep(signer.answer(5), None, BASE)
    with pytest.raises(Corrupt, match="revision 5 was here before"):
        cache.keep(signer.answer(4, data=b"old"), None, BASE)
    good = cache.load(None, BASE)
    assert good is not None
    assert good.version.version == 5


def test_the_floor_outlives_the_bytes(cache: AdapterCache, signer: Signer):
    """
    Forgetting version 5 does not let version 4 in.
    """
    cache.keep(signer.answer(5), None, BASE)
    cache.forget(None, BASE)
    assert cache.load(None, BASE) is None
    with pytest.raises(Corrupt, match="revision 5 was here before"):
        cache.keep(signer.answer(4), None, BASE)


def test_a_floor_lost_in_a_crash_is_read_from_the_bytes(
    cache: AdapterCache, signer: Signer, tmp_path: Path
):
    """
    A crash between the two files leaves the newer version without its floor; it holds all the same.
    """
    cache.keep(signer.answer(5), None, BASE)
    (kept_file(tmp_path).parent / "floor").unlink()
    with pytest.raises(Corrupt, match="revision 5 was here before"):
        cache.keep(signer.answer(4), None, BASE)


def test_somebody_elses_signature_is_refused(cache: AdapterCache, signer: Signer):
    """
    A sound record by another key, and ours on other words, change nothing.
    """
    cache.keep(signer.answer(1), None, BASE)
    stranger = Signer(Ed25519PrivateKey.generate())
    with pytest.raises(BadSignature, match="not the coordinator's"):
        cache.keep(stranger.answer(2), None, BASE)
    forged = signer.answer(2)
    forged.record.record = signer.answer(3).record.record
    with pytest.raises(BadSignature, match="not what the coordinator signed"):
        cache.keep(forged, None, BASE)
    good = cache.load(None, BASE)
    assert good is not None
    assert good.version.version == 1


def test_another_owners_adapter_is_refused(cache: AdapterCache, signer: Signer):
    """
    Bob's part does not pass for ann's, nor for everyone's.
    """
    for asked_for in ("ann", None):
        with pytest.raises(Corrupt, match="asked for an adapter of"):
            cache.keep(signer.answer(1, user="bob"), asked_for, BASE)


def test_another_bases_adapter_is_refused(cache: AdapterCache, signer: Signer):
    """
    Mix and match is noticed before anything is stored.
    """
    with pytest.raises(WrongBaseModel, match="asked for an adapter of base model abab"):
        cache.keep(signer.answer(1, base=OTHER_BASE), None, BASE)
    assert cache.load(None, BASE) is None


@pytest.mark.parametrize("data", [b"scale", b"scales!", b"Scales"])
def test_other_bytes_are_refused(cache: AdapterCache, signer: Signer, data: bytes):
    """
    Fewer, more or other bytes than were signed for are not kept.
    """
    answer = signer.answer(1)
    answer.data = data
    with pytest.raises(Corrupt, match="6 bytes of digest"):
        cache.keep(answer, None, BASE)


def test_every_flipped_byte_on_the_disk_is_noticed(
    cache: AdapterCache, signer: Signer, tmp_path: Path
):
    """
    Whatever byte of the file rots, the adapter is not used.
    """
    cache.keep(signer.answer(1), None, BASE)
    path = kept_file(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((BadSignature, Corrupt, WrongBaseModel)):
            cache.load(None, BASE)


def test_a_user_is_forgotten_on_every_base(cache: AdapterCache, signer: Signer):
    """
    Ann's bytes go on both base models; everyone's stay.
    """
    for base in (BASE, OTHER_BASE):
        cache.keep(signer.answer(1, user="ann", base=base), "ann", base)
        cache.keep(signer.answer(1, base=base), None, base)
    cache.forget_user("ann")
    assert [cache.load("ann", base) for base in (BASE, OTHER_BASE)] == [None, None]
    assert cache.load(None, BASE) is not None


def test_the_first_key_is_trusted_and_no_other_after_it(tmp_path: Path, signer: Signer):
    """
    Who pinned nothing takes the first key, and remembers it in the next process.
    """
    file = tmp_path / "keys.json"
    AdapterCache(tmp_path, TrustedKeys(file=file)).keep(signer.answer(1), None, BASE)
    stranger = Signer(Ed25519PrivateKey.generate())
    again = AdapterCache(tmp_path, TrustedKeys(file=file))
    assert again.load(None, BASE) is not None
    with pytest.raises(BadSignature, match="not the coordinator's"):
        again.keep(stranger.answer(2), None, BASE)


def test_a_record_of_no_time_is_damaged():
    """
    Signed or not: what cannot be is not used, and no fault of this machine.
    """
    pen = Signer(Ed25519PrivateKey.generate())
    record = AdapterRecord(created_ms=2**62).SerializeToString()
    signature = pen.key.sign(signed_bytes("record", record))
    with pytest.raises(Corrupt, match="time"):
        opened_version(
            SignedRecord(record=record, signature=signature, key=pen.public), TrustedKeys()
        )
