"""Honest stand-ins for tests, ours and yours: tiny random models, and a network that fails."""

import contextlib
import json
import socket
import struct
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fedia3.adapters.base_model import BaseModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "vit": {"image_size": 16, "patch_size": 8, "num_labels": 3},
    "gemma": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
    "gemma3_text": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_model(architecture: str, *, seed: int = 0, **options: Any) -> "PreTrainedModel":
    """A random float32 model of ``architecture`` (transformers' ``model_type``) in eval mode.

    Hidden 32, two layers, four heads, vocabulary 99; no dropout. ``options`` go to its config.
    """
    import torch  # noqa: PLC0415  # fedia3.testing must import without torch
    import transformers  # noqa: PLC0415  # as above

    names = {**SIZES, **TOKENS, **OTHER_NAMES.get(architecture, {}), **options}
    config = transformers.AutoConfig.for_model(architecture, **names)
    for option in vars(config):
        if "drop" in option and isinstance(getattr(config, option), float):
            setattr(config, option, 0.0)
    torch.manual_seed(seed)
    kind: Any = {
        "t5": transformers.AutoModelForSeq2SeqLM,
        "bert": transformers.AutoModelForSequenceClassification,
        "roberta": transformers.AutoModelForSequenceClassification,
        "distilbert": transformers.AutoModelForSequenceClassification,
        "vit": transformers.AutoModelForImageClassification,
    }.get(architecture, transformers.AutoModelForCausalLM)
    model: PreTrainedModel = kind.from_config(config).float().eval()
    return model


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE without merges: 256 bytes behind ``<s>`` 0, ``</s>`` 1 and ``<pad>`` 2."""
    import transformers  # noqa: PLC0415  # as above
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415  # as above

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # it has no types
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_base(
    folder: Path,
    architecture: str = "llama",
    *,
    name: str = "toy",
    seed: int = 0,
    pretrained_on: Collection[str] = (),
    **options: Any,
) -> "BaseModel":
    """Make ``folder`` a 4-bit base model of :func:`tiny_model`'s kind that reads bytes; load it.

    ``pretrained_on`` are the users that its ``pretraining.json`` names; ``options`` go to the
    model's config.
    """
    from fedia3.adapters.base_model import load, quantize, quiet  # noqa: PLC0415  # as above

    sizes = {"vocab_size": 259, "max_position_embeddings": 256}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with quiet(), tempfile.TemporaryDirectory() as source:
        model = tiny_model(architecture, seed=seed, **{**sizes, **tokens, **options})
        model.save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        if pretrained_on:
            users = json.dumps({"users": {"toy": sorted(pretrained_on)}})
            (Path(source) / "pretraining.json").write_text(users)
        quantize(source, folder, name=name)
    return load(folder)


@dataclass
class Flow:
    """One direction of a :class:`CuttingProxy`, over all its connections."""

    count: int = 0  # bytes passed on
    captured: bytearray = field(default_factory=bytearray)  # those bytes, if the proxy keeps them
    bytes_per_s: float | None = None  # no faster than that


class CuttingProxy:
    """A TCP relay on 127.0.0.1 that counts, captures, cuts, truncates, slows, stalls and refuses.

    Every knob may be turned while connections are open.

    Args:
        target: ``host:port`` of the server.
        captures: keep every byte of both directions in :attr:`Flow.captured`.
    """

    def __init__(self, target: str, *, captures: bool = False) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._captures = (host, int(port)), captures
        self.to_server, self.to_client = Flow(), Flow()
        self.connections = 0  # accepted so far
        self.refuses = False  # new connections are hung up on
        self._flows, self._over = Event(), Event()
        self._flows.set()
        self._budgets: list[int] = []  # bytes to the next cut, and between those after it
        self._is_clean = False
        self._lock, self._open = Lock(), set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Reset every open connection."""
        with self._lock:
            for end in self._open:
                _reset(end)

    def cut_after(self, *to_client: int) -> None:
        """Reset all connections when so many more bytes have gone towards clients.

        With several numbers again and again, each counted from the cut before it.
        """
        with self._lock:
            self._budgets, self._is_clean = list(to_client), False

    def truncate_after(self, *to_client: int) -> None:
        """As :meth:`cut_after`, but with a clean end, as a server that says goodbye too early."""
        with self._lock:
            self._budgets, self._is_clean = list(to_client), True

    def stall(self) -> None:
        """Pass nothing on, and keep everything open."""
        self._flows.clear()

    def flow(self) -> None:
        """Pass on again."""
        self._flows.set()

    def close(self) -> None:
        """Hang up on everybody and stop listening."""
        self._over.set()
        self._flows.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self.refuses:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                _reset(client)
                client.close()
                continue
            self._join(client, server)

    def _join(self, client: socket.socket, server: socket.socket) -> None:
        for end in (client, server):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {client, server}
        ways = ((client, server, self.to_server), (server, client, self.to_client))
        pumps = [Thread(target=self._pump, args=way, daemon=True) for way in ways]
        for pump in pumps:
            pump.start()
        Thread(target=self._forget, args=(pumps, client, server), daemon=True).start()

    def _forget(self, pumps: list[Thread], *ends: socket.socket) -> None:
        for pump in pumps:
            pump.join()
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket, flow: Flow) -> None:
        """Relay until an end closes; a clean end is passed on as one."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                self._pass_on(self._allowed(data, flow), sink, flow)
            sink.shutdown(socket.SHUT_WR)
            return
        _reset(sink)

    def _allowed(self, data: bytes, flow: Flow) -> bytes:
        """What may still pass; the budget's last byte cuts."""
        with self._lock:
            if flow is not self.to_client or not self._budgets:
                return data
            data = data[: self._budgets[0]]
            self._budgets[0] -= len(data)
            return data

    def _pass_on(self, data: bytes, sink: socket.socket, flow: Flow) -> None:
        if flow.bytes_per_s:
            time.sleep(len(data) / flow.bytes_per_s)
        with self._lock:  # before they can be seen: who has them may count on the count
            flow.count += len(data)
            if self._captures:
                flow.captured += data
            is_used_up = flow is self.to_client and self._budgets[:1] == [0]
            if is_used_up:
                self._budgets.pop(0)
        sink.sendall(data)
        if is_used_up:
            self._end_all()

    def _end_all(self) -> None:
        if not self._is_clean:
            self.cut()
            return
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _reset(end: socket.socket) -> None:
    """End a connection so that both sides notice at once, whatever is under way."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
