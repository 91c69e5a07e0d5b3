"""The coordinator's ``fedia3.v1`` services: what callers ask over gRPC, answered from the stores.

A service is plain code over requests and answers; deadlines, tokens, threads and the wire are the
server's.
"""
