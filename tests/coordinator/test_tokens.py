"""Tokens and codes: their shape, and what is kept of them."""

import re
from base64 import b32decode
from hashlib import sha256

import pytest

from fedia3.coordinator.tokens import code_sha256, new_code, new_token, token_sha256
from fedia3.errors import BadToken


def zeros(n: int) -> bytes:
    """Random bytes that a test knows."""
    return bytes(n)


def test_a_token_names_its_kind_and_carries_a_check_sum() -> None:
    """
    256 zero bits are 43 times A in base64url; behind them 8 hex digits.
    """
    assert re.fullmatch(f"fedia3_device_{'A' * 43}_[0-9a-f]{{8}}", new_token("device", zeros))


@pytest.mark.parametrize("kind", ["device", "service", "admin"])
def test_of_a_token_its_sha256_is_kept(kind) -> None:
    """
    A new token of each kind is one, whatever letters its secret has.
    """
    for _ in range(50):
        token = new_token(kind)
        assert token_sha256(token) == sha256(token.encode()).digest()


@pytest.mark.parametrize("change", ["last", "kind", "cut", "longer", "newline", "case", "empty"])
def test_a_tampered_token_is_told_without_a_look_at_what_is_stored(change: str) -> None:
    """
    A changed letter, another kind, a missing or added end: the check sum or the shape is wrong.
    """
    token = new_token("device", zeros)
    tampered = {
        "last": token[:-1] + ("0" if token[-1] != "0" else "1"),
        "kind": token.replace("device", "admin"),
        "cut": token[:-1],
        "longer": token + "0",
        "newline": token + "\n",
        "case": token.upper(),
        "empty": "",
    }[change]
    with pytest.raises(BadToken, match="no token"):
        token_sha256(tampered)


def test_a_refused_token_is_not_repeated() -> None:
    """
    What might be a secret does not end in a log.
    """
    token = new_token("device")[:-1]
    with pytest.raises(BadToken) as refused:
        token_sha256(token)
    assert token[15:30] not in str(refused.value)


def test_tokens_and_codes_are_new_every_time() -> None:
    """
    A hundred of each are a hundred.
    """
    assert len({new_token("device") for _ in range(100)}) == 100
    assert len({new_code() for _ in range(100)}) == 100


def test_a_code_is_128_bits_in_groups() -> None:
    """
    26 letters and digits in six groups of five or four.
    """
    code = new_code(lambda n: bytes(range(n)))
    assert [len(group) for group in code.split("-")] == [5, 5, 4, 4, 4, 4]
    assert b32decode(code.replace("-", "") + "======") == bytes(range(16))


@pytest.mark.parametrize("typed", ["ABCD-EFGH", "abcd efgh", "abcdefgh", "a-b-c-d-e f g h"])
def test_a_code_is_known_however_it_is_typed(typed: str) -> None:
    """
    Dashes, spaces and case do not matter.
    """
    assert code_sha256(typed) == sha256(b"ABCDEFGH").digest()


def test_a_code_of_strange_letters_is_a_wrong_code() -> None:
    """
    A lone surrogate is hashed like anything else.
    """
    assert code_sha256("\udcff") != code_sha256("A")
