"""Federated on-device personalization of language models with IA3 vectors."""

__version__ = "0.1.0"
