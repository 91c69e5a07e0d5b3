"""Fleet calls as Flower's own code has them."""

import pytest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedia3.errors import BadInput
from fedia3.proto.fleet import OPERATIONS, Call


def test_a_key_that_is_not_base64_is_bad_input() -> None:
    """
    The call says so instead of guessing.
    """
    call = Call(OPERATIONS["/v1/fleet/pull-messages"], {"flwr-public-key": "***"}, b"")
    with pytest.raises(BadInput, match="base64"):
        assert call.key


def test_the_operations_are_flowers() -> None:
    """
    The installed Flower serves each of these paths with the same request type.
    """
    for path, operation in OPERATIONS.items():
        assert PROTOBUF_REQUEST_TYPES["POST", path] is operation.request
