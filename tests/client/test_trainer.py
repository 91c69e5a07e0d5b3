"""Training rows: a cohort in one pass equals its clients one by one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedia3.adapters.adapter import Vector
from fedia3.adapters.bank import IA3Bank
from fedia3.adapters.schema import Schema, Target
from fedia3.adapters.targets import find_targets
from fedia3.adapters.update import TrainingPlan, TrainRequest
from fedia3.client import trainer
from fedia3.client.tasks import CausalLM, Seq2Seq, SequenceClassification, task_for
from fedia3.client.tokens import Encoded, EncodedClass, EncodedPair
from fedia3.client.trainer import (
    ClientExamples,
    Job,
    ResidentTrainer,
    evaluate_rows,
    seed_of,
    train_rows,
)
from fedia3.errors import BadData, BadSetting, NoGradient, NotFound, WrongBaseModel
from fedia3.testing import tiny_model

TASK = CausalLM(pad_id=0)
PLAN = TrainingPlan(learning_rate=1e-2, epochs=3, batch_size=2, warmup_steps=2, clip_norm=0.05)

PATIENT = TrainingPlan(learning_rate=0.05, patience=2)


def _text(seed: int, length: int) -> Encoded:
    ids = np.random.default_rng(seed).integers(3, 99, length).tolist()
    return Encoded(input_ids=ids, labels=[-100, *ids[1:]])


def _setting(architecture: str = "llama", **options: Any) -> tuple[Any, Schema, IA3Bank]:
    model = tiny_model(architecture, **options).requires_grad_(False)
    schema = Schema("0" * 64, find_targets(model))
    return model, schema, IA3Bank(model, schema)


def _ones(schema: Schema) -> Vector:
    return np.ones(schema.n_params, dtype=np.float32)


def _ragged_jobs(schema: Schema) -> list[Job[Encoded]]:
    """Four clients with 1, 2, 3 and 5 texts of 4 to 12 tokens."""
    return [
        Job(_ones(schema), [_text(10 * c + n, 4 + (3 * n + c) % 9) for n in range(count)], [], c)
        for c, count in enumerate([1, 2, 3, 5])
    ]


def _reference(
    model: nn.Module, bank: IA3Bank, job: Job[Encoded], plan: TrainingPlan
) -> torch.Tensor:
    """One client trained the plain way: torch's AdamW, clip_grad_norm_, mean token loss."""
    bank.load([job.start])
    optimizer = torch.optim.AdamW([bank.scales], lr=plan.learning_rate, weight_decay=0.0)
    order, step = np.random.default_rng(job.seed), 0
    for _ in range(plan.epochs):
        permutation = order.permutation(len(job.train))
        for start in range(0, len(permutation), plan.batch_size):
            step += 1
            batch = [job.train[i] for i in permutation[start : start + plan.batch_size]]
            optimizer.zero_grad()
            with bank.using(torch.tensor([0])):
                loss = TASK.score(model, batch).loss.sum() / sum(map(TASK.learned, batch))
                loss.backward()
            torch.nn.utils.clip_grad_norm_([bank.scales], plan.clip_norm)
            optimizer.param_groups[0]["lr"] = plan.learning_rate * min(
                1.0, step / (plan.warmup_steps + 1)
            )
            optimizer.step()
    return bank.scales.detach()[0].clone()


def test_a_ragged_cohort_equals_plain_torch_training_of_each_client() -> None:
    """Rows of one pass equal separate trainings with torch's AdamW and clipping, to rounding."""
    model, schema, bank = _setting()
    jobs = _ragged_jobs(schema)
    together = train_rows(model, bank, TASK, jobs, PLAN)
    for job, result in zip(jobs, together, strict=True):
        alone = _reference(model, bank, job, PLAN)
        assert np.abs(result.vector - 1).max() > 0.01
        np.testing.assert_allclose(result.vector, alone.numpy(), rtol=0, atol=5e-6)


def test_small_packs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch cut into packs of few tokens gives the same vectors: gradients only add up."""
    model, schema, bank = _setting()
    whole = train_rows(model, bank, TASK, _ragged_jobs(schema), PLAN)
    monkeypatch.setattr(trainer, "TOKENS_AT_ONCE", 16)
    packed = train_rows(model, bank, TASK, _ragged_jobs(schema), PLAN)
    for left, right in zip(whole, packed, strict=True):
        np.testing.assert_allclose(left.vector, right.vector, rtol=0, atol=5e-6)


def test_the_same_training_twice_is_bit_identical() -> None:
    """Nothing is random but the job's seed."""
    model, schema, bank = _setting()
    first, second = (train_rows(model, bank, TASK, _ragged_jobs(schema), PLAN) for _ in range(2))
    assert [r.vector.tobytes() for r in first] == [r.vector.tobytes() for r in second]


def test_max_steps_ends_a_row() -> None:
    """Five texts by two for three epochs are nine steps; max_steps 4 makes them four."""
    model, schema, bank = _setting()
    job = _ragged_jobs(schema)[3]
    assert train_rows(model, bank, TASK, [job], PLAN)[0].steps == 9
    short = TrainingPlan(epochs=3, batch_size=2, max_steps=4)
    assert train_rows(model, bank, TASK, [job], short)[0].steps == 4


def test_a_plateau_stops_the_row_at_its_best_epoch() -> None:
    """Validation text that every epoch makes worse: the row stops and returns its first epoch."""
    model, schema, bank = _setting()
    learn = [_text(1, 8)]
    # the validation text wants exactly what training pushes away: every next token another one
    wrong = [(t + 1) % 99 for t in learn[0].input_ids[1:]]
    contrary = [Encoded(learn[0].input_ids, [-100, *wrong])]
    job = Job(_ones(schema), learn, contrary, 0)
    result = train_rows(model, bank, TASK, [job], replace(PATIENT, epochs=50))[0]
    first = train_rows(model, bank, TASK, [job], replace(PATIENT, epochs=1))[0]
    assert result.steps == 3
    assert np.array_equal(result.vector, first.vector)


def test_patience_without_validation_is_an_error() -> None:
    """There is nothing to judge a plateau by."""
    model, schema, bank = _setting()
    with pytest.raises(BadData, match="validation"):
        train_rows(model, bank, TASK, _ragged_jobs(schema), TrainingPlan(patience=1))


def test_a_diverging_row_stops_and_leaves_its_neighbour_alone() -> None:
    """A row whose gradient overflows keeps its vector; the other row trains as if alone."""
    model, schema, bank = _setting()
    good = _ragged_jobs(schema)[2]
    bad = Job((_ones(schema) * np.float32(3e38)), good.train, [], 0)
    bad_result, good_result = train_rows(model, bank, TASK, [bad, good], PLAN)
    assert bad_result.diverged
    assert np.array_equal(bad_result.vector, bad.start)
    alone = train_rows(model, bank, TASK, [good], PLAN)[0]
    np.testing.assert_allclose(good_result.vector, alone.vector, rtol=0, atol=5e-6)


def test_a_vector_without_gradient_is_named() -> None:
    """A target the loss never sees is an error, not a silent vector of ones."""
    model, schema, _ = _setting()
    model.unused = nn.Linear(4, 4)
    wider = Schema("0" * 64, (*schema.targets, Target("unused", "k", 4)))
    bank = IA3Bank(model, wider)
    with pytest.raises(NoGradient, match=r"unused\.k"):
        train_rows(model, bank, TASK, _ragged_jobs(wider), PLAN)


def test_evaluation_is_the_mean_loss_of_learned_tokens() -> None:
    """Two texts of 4 and 10 tokens have 3 and 9 learned ones; the mean is over the 12."""
    model, schema, bank = _setting()
    texts = [_text(1, 4), _text(2, 10)]
    result = evaluate_rows(model, bank, TASK, [_ones(schema)], [texts])[0]
    total = 0.0
    for text in texts:
        ids = torch.tensor([text.input_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert (result.tokens, result.examples) == (12, 2)
    assert result.loss == pytest.approx(total / 12, rel=1e-5)


def test_prompt_tokens_are_not_scored() -> None:
    """Only the completion's two tokens count."""
    model, schema, bank = _setting()
    item = Encoded(input_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8])
    result = evaluate_rows(model, bank, TASK, [_ones(schema)], [[item]])[0]
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    expected = nn.functional.cross_entropy(logits[1:3], torch.tensor([7, 8]))
    assert result.tokens == 2
    assert result.loss == pytest.approx(float(expected), rel=1e-5)


def _improves(architecture: str, task: Any, items: Sequence[Any], **options: Any) -> bool:
    model, schema, bank = _setting(architecture, **options)
    plan = TrainingPlan(learning_rate=0.05, epochs=20)
    after = train_rows(model, bank, task, [Job(_ones(schema), items, [], 0)], plan)[0].vector
    results = evaluate_rows(model, bank, task, [_ones(schema), after], [items, items])
    return results[1].loss < 0.95 * results[0].loss


def test_a_classifier_learns_its_users_classes() -> None:
    """Sequence classification trains through the frozen head."""
    items = [EncodedClass([5 + n, 6, 7], label_index=n % 2) for n in range(4)]
    # weights ten times the usual random ones: else a random head sees no text at all
    assert _improves("bert", SequenceClassification(pad_id=0), items, initializer_range=0.2)


def test_an_encoder_decoder_learns_its_targets() -> None:
    """Sequence to sequence trains through encoder, decoder and cross attention."""
    items = [EncodedPair([5 + n, 6, 7], [40, 41, 2]) for n in range(4)]
    assert _improves("t5", Seq2Seq(pad_id=0), items)


def test_the_task_follows_the_models_class() -> None:
    """A causal, an encoder-decoder and a classification model each find their task."""
    tasks = [type(task_for(tiny_model(a), 0)) for a in ("gpt2", "llama", "t5", "bert")]
    assert tasks == [CausalLM, CausalLM, Seq2Seq, SequenceClassification]


def test_an_image_model_cannot_train_on_text() -> None:
    """ViT has adapters, but no text to learn from."""
    with pytest.raises(BadSetting, match="ViT"):
        task_for(tiny_model("vit"), 0)


def _request(schema: Schema, client: str) -> TrainRequest:
    return TrainRequest(client, 3, 7, _ones(schema), schema.digest, PLAN)


def test_a_prepared_cohort_answers_as_each_client_would() -> None:
    """What prepare trained in one pass is what each client gets alone."""
    model, schema, _ = _setting()
    clients = {
        name: ClientExamples([_text(seed, 6), _text(seed + 1, 9)], [], [])
        for seed, name in enumerate(["ann", "ben"])
    }
    cohort = ResidentTrainer(model, schema, TASK, clients)
    requests = [_request(schema, name) for name in clients]
    cohort.prepare(requests)
    together = [cohort.train(r) for r in requests]
    alone = [ResidentTrainer(model, schema, TASK, clients).train(r) for r in requests]
    for left, right in zip(together, alone, strict=True):
        np.testing.assert_allclose(left.delta, right.delta, rtol=0, atol=5e-6)
        assert left.num_examples == right.num_examples == 2


def test_a_client_of_another_machine_is_not_found() -> None:
    """The message does not repeat the name, which may travel."""
    model, schema, _ = _setting()
    with pytest.raises(NotFound, match="no data"):
        ResidentTrainer(model, schema, TASK, {}).train(_request(schema, "mallory"))


def test_a_request_for_another_base_is_refused() -> None:
    """Vectors of equal length are not enough: the schema's digest has to be this machine's."""
    model, schema, _ = _setting()
    request = replace(_request(schema, "ann"), schema_digest="f" * 64)
    clients = {"ann": ClientExamples([_text(1, 6)], [], [])}
    with pytest.raises(WrongBaseModel, match="ffffffffffff"):
        ResidentTrainer(model, schema, TASK, clients).train(request)


def test_seeds_differ_by_client_and_round_but_not_by_process() -> None:
    """The first bytes of a sha256: known, and apart for ("a", "bc") and ("ab", "c")."""
    assert seed_of("a", "bc") != seed_of("ab", "c")
    assert seed_of(1) == 0x6B86B273FF34FCE1
