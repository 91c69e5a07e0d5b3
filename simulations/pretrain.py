"""Pretrains the tiny base model that fedia3 ships: a byte-level BPE and a 5.9M-parameter Llama.

    python -m fedia3.simulations.pretrain --irc messages.jsonl --shakespeare speeches.jsonl \\
        --nlu nlu_eval_home --out tiny-base --minutes 50

Of every source only half of the users are learned from; the other half stays unseen, so that
federated and personalized training have somebody left to adapt to. ``pretraining.json`` beside
the model names the users that were seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedia3.simulations.demo import demo_population, pretraining_population

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 4096
ROW = 256  # tokens in a training row
ROWS_PER_STEP = 8
PEAK_LR = 1.5e-3
WARM_UP = 0.03  # fraction of the run
FINAL_LR = 0.02  # fraction of the peak
REPORT_EVERY_S = 120.0
SAVE_EVERY_S = 300.0
IGNORED = -100  # the label that cross_entropy leaves out

SOURCES = (
    {
        "name": "irc_authors",
        "licence": "CC BY 4.0",
        "citation": "Kummerfeld et al., A Large-Scale Corpus for Conversation Disentanglement, "
        "ACL 2019",
        "description": "Ubuntu IRC messages by author, de-duplicated, unfiltered language",
    },
    {
        "name": "shakespeare",
        "licence": "public domain",
        "citation": "William Shakespeare, 36 plays",
        "description": "speeches of the plays by speaker, without stage directions",
    },
    {
        "name": "nlu_eval_home",
        "licence": "CC BY 4.0",
        "citation": "Liu, Eshghi, Swietojanski, Rieser, Benchmarking Natural Language "
        "Understanding Services for building Conversational Agents, IWSDS 2019",
        "description": "home-assistant commands with a JSON answer, and with the intent's label",
    },
    {
        "name": "demo",
        "licence": "as fedia3",
        "citation": "fedia3.simulations.demo",
        "description": "messages of synthetic persons, generated; none of the demo's own persons",
    },
)


@dataclass(frozen=True)
class Document:
    """One message, speech or command of one user of one source."""

    source: str
    user: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and per source the held-out documents of seen and of unseen users."""

    training: tuple[Document, ...]
    held_out: Mapping[str, tuple[Document, ...]]
    unseen: Mapping[str, tuple[Document, ...]]


# --- the corpus -----------------------------------------------------------------------------


def fingerprint(name: str) -> int:
    """A number that depends on ``name`` alone: the same half on every machine and version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def first_half(names: Iterable[str]) -> frozenset[str]:
    """Half of the distinct ``names`` (the larger one if odd), by order of their sha256."""
    ordered = sorted(set(names), key=lambda name: (fingerprint(name), name))
    return frozenset(ordered[: (len(ordered) + 1) // 2])


def is_held_out(key: str) -> bool:
    """True for 5 % of all keys; equal texts share a key, so none is on both sides."""
    return fingerprint(f"held-out/{key}") % 20 == 0


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One record for each line of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


@dataclass(frozen=True)
class Candidate:
    """A document, the group whose half decides if it is seen, and its held-out key."""

    document: Document
    group: str
    key: str


def irc_candidates(path: Path) -> Iterator[Candidate]:
    """Every author is a group: half of the people are never seen."""
    for row in read_rows(path):
        document = Document("irc_authors", row["user"], row["text"])
        yield Candidate(document, group=row["user"], key=row["text"])


def shakespeare_candidates(path: Path) -> Iterator[Candidate]:
    """Whole plays are seen or not: speakers of one play share its names and its story."""
    for row in read_rows(path):
        document = Document("shakespeare", row["user"], row["text"])
        yield Candidate(document, group=row["play"], key=row["text"])


def nlu_candidates(folder: Path) -> Iterator[Candidate]:
    """Each command twice, with its JSON answer and with its label, both on the same side."""
    for row in read_rows(folder / "instruct.jsonl"):
        text = f"{row['instruction']}\n\n{row['output']}"
        document = Document("nlu_eval_home", row["user"], text)
        yield Candidate(document, group=row["user"], key=row["instruction"])
    for row in read_rows(folder / "utterances.jsonl"):
        document = Document("nlu_eval_home", row["user"], f"{row['text']}\n\n{row['label']}")
        yield Candidate(document, group=row["user"], key=row["text"])


def demo_documents(rows: Iterable[Mapping[str, str]]) -> list[Document]:
    """Generated rows as documents of the source ``demo``."""
    return [Document("demo", row["user"], row["text"]) for row in rows]


def build_corpus(irc: Path, shakespeare: Path, nlu: Path, seed: int) -> Corpus:
    """Half of each file's users and all of the demo's pretraining persons, less 5 %."""
    training: list[Document] = []
    held_out: dict[str, list[Document]] = defaultdict(list)
    unseen: dict[str, list[Document]] = defaultdict(list)
    for candidates in (
        list(irc_candidates(irc)),
        list(shakespeare_candidates(shakespeare)),
        list(nlu_candidates(nlu)),
    ):
        seen_groups = first_half(candidate.group for candidate in candidates)
        for candidate in candidates:
            source = candidate.document.source
            if candidate.group not in seen_groups:
                unseen[source].append(candidate.document)
            elif is_held_out(candidate.key):
                held_out[source].append(candidate.document)
            else:
                training.append(candidate.document)
    for document in demo_documents(pretraining_population(seed=seed)):
        (held_out["demo"] if is_held_out(document.text) else training).append(document)
    unseen["demo"] = demo_documents(demo_population(seed=seed))
    return Corpus(tuple(training), _frozen(held_out), _frozen(unseen))


def _frozen(sides: Mapping[str, list[Document]]) -> dict[str, tuple[Document, ...]]:
    return {source: tuple(documents) for source, documents in sides.items()}


# --- the tokenizer --------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; adds no special tokens by itself, callers write bos and eos."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped in transformers
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[int, ...]]:
    """Token ids of each document between bos and eos."""
    ids = tokenizer([document.text for document in documents], add_special_tokens=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [(bos, *tokens, eos) for tokens in ids["input_ids"]]


# --- rows and losses ------------------------------------------------------------------------


def packed(documents: Iterable[tuple[int, ...]], pad: int) -> Iterator[list[int]]:
    """Rows of ``ROW`` tokens that begin with a document, as every later use does.

    A document that does not fit the rest of a row begins the next one; only one longer than a
    row is cut, and its tail goes on without bos.
    """
    row: list[int] = []
    for document in documents:
        for start in range(0, len(document), ROW):
            piece = document[start : start + ROW]
            if len(row) + len(piece) > ROW:
                yield row + [pad] * (ROW - len(row))
                row = []
            row.extend(piece)
    if row:
        yield row + [pad] * (ROW - len(row))


def endless_batches(
    documents: Sequence[tuple[int, ...]], pad: int, seed: int
) -> Iterator[torch.Tensor]:
    """Batches ``(ROWS_PER_STEP, ROW)``, packed anew from reshuffled documents in each epoch."""
    rng = Random(f"batches/{seed}")
    order = list(documents)
    waiting: list[list[int]] = []
    while True:
        rng.shuffle(order)
        for row in packed(order, pad):
            waiting.append(row)
            if len(waiting) == ROWS_PER_STEP:
                yield torch.tensor(waiting)
                waiting = []


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, pad: int) -> torch.Tensor:
    """Nats for each token of ``ids`` (rows, length) but the first; 0.0 where it is padding."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == pad, IGNORED)
    flat = cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    )
    return flat.view_as(labels)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, documents: Sequence[tuple[int, ...]], pad: int) -> float:
    """Nats per token, each document alone in its row and cut to ``ROW`` tokens."""
    total, count = 0.0, 0
    by_length = sorted((document[:ROW] for document in documents), key=len)
    for start in range(0, len(by_length), 16):
        chunk = by_length[start : start + 16]
        width = len(chunk[-1])
        ids = torch.tensor([[*document] + [pad] * (width - len(document)) for document in chunk])
        total += float(token_losses(model, ids, pad).sum())
        count += sum(len(document) - 1 for document in chunk)
    return total / count


@dataclass(frozen=True)
class HeldOut:
    """Encoded documents per source, in a fixed random order: a prefix is a fair sample."""

    seen_users: Mapping[str, Sequence[tuple[int, ...]]]
    unseen_users: Mapping[str, Sequence[tuple[int, ...]]]

    def losses(
        self, model: LlamaForCausalLM, pad: int, documents_each: int
    ) -> dict[str, dict[str, float]]:
        """``{source: {"seen_users": nats per token, "unseen_users": nats per token}}``."""
        sides = {"seen_users": self.seen_users, "unseen_users": self.unseen_users}
        return {
            source: {
                side: round(mean_loss(model, documents[source][:documents_each], pad), 4)
                for side, documents in sides.items()
            }
            for source in sorted(self.seen_users)
        }


def encode_held_out(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> HeldOut:
    """At most 600 documents of each source and side."""

    def sample(side: Mapping[str, Sequence[Document]]) -> dict[str, list[tuple[int, ...]]]:
        return {
            source: encode(Random(seed).sample(documents, min(600, len(documents))), tokenizer)
            for source, documents in side.items()
        }

    return HeldOut(seen_users=sample(corpus.held_out), unseen_users=sample(corpus.unseen))


# --- the model and its training -------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 5.9M parameters.

    As many key/value heads as heads: at this size grouping saves nothing worth having, and
    k_proj and v_proj are where IA3 vectors act, so wide ones leave more to personalize.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=704,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learning_rate(elapsed: float) -> float:
    """Linear warm-up, then cosine, over ``elapsed`` in 0…1: the fraction of the time budget.

    Driven by the clock, not by steps: on a noisy machine nobody knows how many steps fit, and
    the run must end with a decayed rate all the same. Runs are hence not bit-reproducible.
    """
    if elapsed < WARM_UP:
        return PEAK_LR * max(elapsed, 1e-3) / WARM_UP
    done = min(1.0, (elapsed - WARM_UP) / (1 - WARM_UP))
    return PEAK_LR * (FINAL_LR + (1 - FINAL_LR) * (1 + cos(pi * done)) / 2)


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices (embeddings too) but not the norms' scales."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    pad: int,
    bf16: bool,
) -> float:
    """One AdamW step on ``ids`` (rows, ``ROW``); the mean loss in nats per token before it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = token_losses(model, ids, pad)
    loss = losses.sum() / (ids[:, 1:] != pad).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def bf16_is_faster(tokenizer: PreTrainedTokenizerFast, batch: torch.Tensor, seed: int) -> bool:
    """Time a few steps of a throw-away model in both precisions; many CPUs lack fast bf16."""
    seconds: dict[bool, float] = {}
    for bf16 in (False, True):
        model = new_model(tokenizer, seed)
        optimizer = new_optimizer(model)
        durations = []
        for _ in range(4):
            started = time.monotonic()
            train_step(model, optimizer, batch, tokenizer.pad_token_id, bf16)
            durations.append(time.monotonic() - started)
        seconds[bf16] = min(durations)
    print(f"a step takes {seconds[False]:.2f} s in fp32, {seconds[True]:.2f} s in bf16", flush=True)
    return seconds[True] < seconds[False]


# --- what is written ------------------------------------------------------------------------


def seen_users(corpus: Corpus) -> dict[str, list[str]]:
    """Names of the users that were trained on, per source, as their files spell them."""
    users: dict[str, set[str]] = defaultdict(set)
    for document in corpus.training:
        users[document.source].add(document.user)
    return {source: sorted(names) for source, names in sorted(users.items())}


def save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    report: Mapping[str, Any],
) -> None:
    """Write all files beside ``out``, then move each over its predecessor.

    A kill at any moment leaves every file whole and the model loadable.
    """
    fresh = out.with_name(f".{out.name}.new")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in fresh.iterdir():
        path.replace(out / path.name)
    fresh.rmdir()


@dataclass(frozen=True)
class Plan:
    """What the command line says."""

    irc: Path
    shakespeare: Path
    nlu: Path
    out: Path
    minutes: float
    threads: int
    seed: int

    @property
    def command(self) -> str:
        """The command without the machine's own folders."""
        return (
            f"python -m fedia3.simulations.pretrain --irc {self.irc.name}"
            f" --shakespeare {self.shakespeare.name} --nlu {self.nlu.name}"
            f" --out {self.out.name} --minutes {self.minutes:g} --threads {self.threads}"
            f" --seed {self.seed}"
        )


@dataclass(frozen=True)
class Prepared:
    """All that is fixed before the first step; ``documents`` are encoded training documents."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    documents: Sequence[tuple[int, ...]]
    held_out: HeldOut

    @property
    def tokens_per_source(self) -> dict[str, int]:
        """Tokens of one epoch, with bos and eos."""
        share: dict[str, int] = defaultdict(int)
        for document, ids in zip(self.corpus.training, self.documents, strict=True):
            share[document.source] += len(ids)
        return dict(share)


def prepare(plan: Plan) -> Prepared:
    """Corpus and tokenizer, and both sides encoded."""
    corpus = build_corpus(plan.irc, plan.shakespeare, plan.nlu, plan.seed)
    tokenizer = train_tokenizer(document.text for document in corpus.training)
    documents = encode(corpus.training, tokenizer)
    held_out = encode_held_out(corpus, tokenizer, plan.seed)
    return Prepared(corpus, tokenizer, documents, held_out)


@dataclass
class Run:
    """How far the training is; times are seconds of the monotonic clock."""

    bf16: bool
    started: float
    reported: float
    saved: float
    steps: int = 0
    tokens: int = 0

    @classmethod
    def begin(cls, bf16: bool) -> Run:
        """Nothing done yet, the clock starts now."""
        now = time.monotonic()
        return cls(bf16, started=now, reported=now, saved=now)

    def elapsed(self, minutes: float) -> float:
        """Fraction of a budget of ``minutes`` that is used up."""
        return (time.monotonic() - self.started) / (60 * minutes)


def report(
    plan: Plan, prepared: Prepared, run: Run, model: LlamaForCausalLM, losses: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``pretraining.json`` says."""
    return {
        "sources": SOURCES,
        "users": seen_users(prepared.corpus),
        "corpus_tokens": prepared.tokens_per_source,
        "losses": losses,
        "tokens": run.tokens,
        "steps": run.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": plan.seed,
        "precision": "bf16 autocast" if run.bf16 else "fp32",
        "command": plan.command,
    }


def train(plan: Plan, prepared: Prepared, model: LlamaForCausalLM) -> Run:
    """Step until the time is up; print progress and save a usable model on the way."""
    pad = prepared.tokenizer.pad_token_id
    batches = endless_batches(prepared.documents, pad, plan.seed)
    bf16 = bf16_is_faster(prepared.tokenizer, next(batches), plan.seed)
    optimizer = new_optimizer(model)
    run = Run.begin(bf16)
    recent: list[float] = []
    while (elapsed := run.elapsed(plan.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed)
        ids = next(batches)
        recent.append(train_step(model, optimizer, ids, pad, bf16))
        run.steps += 1
        run.tokens += int((ids != pad).sum())
        if time.monotonic() - run.reported > REPORT_EVERY_S:
            look(plan, prepared, run, model, sum(recent) / len(recent))
            recent.clear()
    return run


def look(plan: Plan, prepared: Prepared, run: Run, model: LlamaForCausalLM, loss: float) -> None:
    """Print a progress line with a small held-out sample; save if the last save is old."""
    now = time.monotonic()
    losses = prepared.held_out.losses(model, prepared.tokenizer.pad_token_id, documents_each=48)
    rate = run.tokens / (now - run.started)
    print(
        f"{run.elapsed(plan.minutes):.0%} step {run.steps} loss {loss:.3f} {rate:.0f} tokens/s "
        f"held-out {losses}",
        flush=True,
    )
    run.reported = now
    if now - run.saved > SAVE_EVERY_S:
        save(plan.out, model, prepared.tokenizer, report(plan, prepared, run, model, losses))
        run.saved = now


def pretrain(plan: Plan) -> None:
    """Prepare, train, measure on all held-out documents, save."""
    torch.set_num_threads(plan.threads)
    prepared = prepare(plan)
    print(f"tokens per source: {prepared.tokens_per_source}", flush=True)
    model = new_model(prepared.tokenizer, plan.seed)
    run = train(plan, prepared, model)
    losses = prepared.held_out.losses(model, prepared.tokenizer.pad_token_id, documents_each=600)
    save(plan.out, model, prepared.tokenizer, report(plan, prepared, run, model, losses))
    print(f"done: {run.steps} steps, {run.tokens} tokens, held-out {losses}", flush=True)


def plan_from_arguments() -> Plan:
    """Read the command line; every option but the sources and the output has a default."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny base model.")
    parser.add_argument("--irc", type=Path, required=True, help="messages.jsonl by author")
    parser.add_argument("--shakespeare", type=Path, required=True, help="speeches.jsonl")
    parser.add_argument(
        "--nlu", type=Path, required=True, help="folder with instruct.jsonl and utterances.jsonl"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    parser.add_argument("--minutes", type=float, default=50.0, help="wall-clock budget")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return Plan(**vars(parser.parse_args()))


if __name__ == "__main__":
    pretrain(plan_from_arguments())
