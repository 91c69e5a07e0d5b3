"""The contract on the wire: ``.proto`` files, the code generated from them, what both sides share.

Package ``fedia3.v1``. After a change to a ``.proto`` file, from the repository's root:

    python -m grpc_tools.protoc -I fedia3/proto=proto --python_out=src --pyi_out=src proto/*.proto

There are no generated stubs: both sides walk :data:`fedia3.proto.contract.METHODS` and see a
request's bytes before they are parsed, which is what is signed.
"""
