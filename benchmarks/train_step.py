"""One cohort's training on the shipped base: fedia3's bank against bitsandbytes + PEFT.

    python benchmarks/train_step.py [--clients 16] [--repeats 5]

Each repeat times every contender once, in turn, so that a noisy machine slows all of them alike;
what counts are the ratios. All train the same clients on the same texts for one epoch with AdamW,
the rival as bitsandbytes and PEFT document it: the 4-bit model through transformers, one IA3
adapter, clients one after the other.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.base_model import load, quiet
from fedia3.adapters.base_store import BaseStore
from fedia3.adapters.update import TrainingPlan
from fedia3.client.data import Example
from fedia3.client.tasks import CausalLM
from fedia3.client.tokens import Encoded, encode_all
from fedia3.client.trainer import Job, train_rows
from fedia3.simulations.demo import demo_population

PLAN = TrainingPlan(learning_rate=1e-2, batch_size=8, warmup_steps=0)
Cohort = Sequence[Sequence[Encoded]]


def cohort_of(tokenizer: Any, clients: int) -> Cohort:
    """The demo users' training texts, 32 each."""
    rows = demo_population(clients, 32)
    users = sorted({row["user"] for row in rows})
    texts = [[Example.whole(r["text"]) for r in rows if r["user"] == user] for user in users]
    return [encode_all(theirs, tokenizer, PLAN.max_length).items for theirs in texts]


def fedia3_contender(
    folder: Path, cohort: Cohort, dtype: torch.dtype, *, rows: int, decoded: bool = True
) -> Callable[[], None]:
    """The cohort in passes of ``rows`` clients."""
    base = load(folder, dtype=dtype, memory_budget=None if decoded else 0)
    bank = IA3Bank(base.model, base.schema)
    task = CausalLM(base.pad_id)
    ones = Adapter.ones(base.schema).vector
    jobs = [Job(ones, texts, (), seed) for seed, texts in enumerate(cohort)]

    def run() -> None:
        for start in range(0, len(jobs), rows):
            train_rows(base.model, bank, task, jobs[start : start + rows], PLAN)

    return run


def peft_contender(folder: Path, cohort: Cohort) -> Callable[[], None]:
    """bitsandbytes 4-bit + PEFT IA3, client after client."""
    import peft  # noqa: PLC0415  # only the rival needs it

    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": "cpu"}
        )
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, config)
    model.train()
    scales = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for seed, texts in enumerate(cohort):
            for scale in scales:
                scale.data.fill_(1.0)
            optimizer = torch.optim.AdamW(scales, lr=PLAN.learning_rate)
            order = np.random.default_rng(seed).permutation(len(texts))
            for start in range(0, len(order), PLAN.batch_size):
                batch = _batch([texts[i] for i in order[start : start + PLAN.batch_size]])
                optimizer.zero_grad()
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(scales, PLAN.clip_norm)
                optimizer.step()
        if any(scale.grad is None for scale in scales):
            raise SystemExit("the rival did not train: no gradient reached its scales")

    return run


def _batch(texts: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    longest = max(len(t.input_ids) for t in texts)
    ids = [[*t.input_ids, *[0] * (longest - len(t.input_ids))] for t in texts]
    mask = [[1] * len(t.input_ids) + [0] * (longest - len(t.input_ids)) for t in texts]
    labels = [[*t.labels, *[-100] * (longest - len(t.labels))] for t in texts]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def measure(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, the contenders in turn, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Print a table: seconds, and how many times as fast as bitsandbytes + PEFT, pair by pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--json", type=Path, help="also write the seconds here")
    given = parser.parse_args()
    folder = BaseStore().find(given.base)
    cohort = cohort_of(load(folder).tokenizer, given.clients)
    rival = "bitsandbytes + PEFT, one by one"
    contenders = {
        rival: peft_contender(folder, cohort),
        "fedia3, 4-bit, one by one": fedia3_contender(
            folder, cohort, torch.bfloat16, rows=1, decoded=False
        ),
        "fedia3, float32, one by one": fedia3_contender(folder, cohort, torch.float32, rows=1),
        "fedia3, bfloat16, one by one": fedia3_contender(folder, cohort, torch.bfloat16, rows=1),
        "fedia3, float32, one pass": fedia3_contender(folder, cohort, torch.float32, rows=32),
        "fedia3, bfloat16, one pass": fedia3_contender(folder, cohort, torch.bfloat16, rows=32),
    }
    seconds = measure(contenders, given.repeats)
    tokens = sum(len(t.input_ids) for texts in cohort for t in texts)
    print(
        f"{given.clients} clients, {tokens} tokens, base {given.base}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, {os.cpu_count()} cores; "
        f"median (least to most) of {given.repeats}"
    )
    for name, taken in seconds.items():
        ratios = [r / t for r, t in zip(seconds[rival], taken, strict=True)]
        print(
            f"{name:<32} {statistics.median(taken):6.2f} s ({min(taken):.2f} to {max(taken):.2f})  "
            f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if given.json:
        given.json.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    sys.exit(main())
