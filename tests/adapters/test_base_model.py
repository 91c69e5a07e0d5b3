import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from fedia3.adapters.base_model import (
    BaseModel,
    decoded_size,
    dequantize,
    load,
    quantize,
    quiet,
)
from fedia3.adapters.manifest import read_manifest
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, BadInput, Conflict, Corrupt, NotFound, WrongBaseModel

TOKENS = torch.arange(3, 27).view(2, 12)  # two texts of twelve tokens


def tiny_llama() -> Any:
    """Two layers, two key/value heads of 16, tied embeddings."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def tiny_gpt2() -> Any:
    """Conv1D instead of linear layers; queries, keys and values in one."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    )


def tiny_t5() -> Any:
    """Encoder and decoder."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4
        )
    )


def tiny_bert() -> Any:
    """A classifier of three labels."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            num_labels=3,
        )
    )


def byte_tokenizer() -> Any:
    """Byte-level BPE of 256 bytes and three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["to be"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_source(folder: Path, make: Callable[[], Any]) -> Path:
    """The same random weights each time, with a tokenizer beside them."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """The model's answer to TOKENS, without gradient."""
    decoder = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **decoder).logits.float()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unquantized tiny Llama with a model card and a list of users."""
    folder = save_source(tmp_path_factory.mktemp("source"), tiny_llama)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A toy\n")
    (folder / "pretraining.json").write_text('{"users": {"plays": ["Romeo", "Juliet"]}}')
    return folder


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny Llama, quantized; no test changes it."""
    folder = tmp_path_factory.mktemp("base")
    quantize(source, folder, name="toy")
    return folder


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    """The quantized tiny Llama, decoded to float32."""
    return load(base)


def test_the_manifest_says_where_the_model_comes_from(base: Path):
    """
    Architecture, licence and pretraining file are recorded, the local folder's path is not.
    """
    manifest = read_manifest(base)
    assert manifest.created_from.architecture == "LlamaForCausalLM"
    assert manifest.created_from.source is None
    assert (manifest.license, manifest.pretraining) == ("mit", "pretraining.json")
    assert {"README.md", "tokenizer.json"} <= {entry.path for entry in manifest.files}


def test_keys_values_and_down_projections_are_the_targets(base: Path):
    """
    Two layers with 32-wide keys and values (two heads of 16) and a 128-wide feed-forward.
    """
    assert [(t.kind, t.dim) for t in read_manifest(base).targets] == 2 * [
        ("k", 32),
        ("v", 32),
        ("ff", 128),
    ]


def test_quantizing_twice_gives_the_same_digest(source: Path, base: Path, tmp_path: Path):
    """
    A base model's identity depends on its source alone.
    """
    assert quantize(source, tmp_path, name="toy").digest == read_manifest(base).digest


def test_a_loaded_model_is_frozen_and_in_eval_mode(loaded: BaseModel):
    """
    Nothing of the base model ever learns or drops out.
    """
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_decoded_weights_are_ordinary_linear_layers(loaded: BaseModel):
    """
    Without a limit on memory everything is decoded, to float32 unless told otherwise.
    """
    assert loaded.weights == "dequantized"
    assert type(loaded.model.model.layers[0].mlp.up_proj) is nn.Linear
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_the_tokenizer_comes_along(loaded: BaseModel):
    """
    What the source's tokenizer encodes, the base model's decodes.
    """
    ids = loaded.tokenizer("to be")["input_ids"]
    assert ids == byte_tokenizer()("to be")["input_ids"]
    assert loaded.tokenizer.decode(ids) == "to be"


def test_a_loaded_base_knows_whose_text_it_has_seen(loaded: BaseModel):
    """
    Users of all sources of pretraining.json together.
    """
    assert loaded.pretraining_users == {"Romeo", "Juliet"}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert])
def test_decoded_weights_equal_what_bitsandbytes_decodes(make: Callable[[], Any], tmp_path: Path):
    """
    Every linear layer holds exactly the values of transformers' own 4-bit loading; the logits
    differ by bfloat16 rounding only.
    """
    quantize(save_source(tmp_path / "source", make), tmp_path / "base", name="toy")
    ours = load(tmp_path / "base").model
    with quiet():
        theirs = type(ours).from_pretrained(tmp_path / "base", device_map={"": "cpu"}).eval()
    packed = {n: m for n, m in theirs.named_modules() if isinstance(m, Linear4bit)}
    assert packed
    for name, module in packed.items():
        decoded = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
        assert type(ours.get_submodule(name)) is nn.Linear
        assert torch.equal(ours.get_submodule(name).weight, decoded.float())
    expected = logits(theirs)
    assert torch.allclose(logits(ours), expected, atol=0.03 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 30), (7, 2), (40, 1024)])
def test_decoding_equals_bitsandbytes_to_the_bit(dtype: torch.dtype, shape: tuple[int, int]):
    """
    Also where the last block of 64 weights or of 256 scales is not full.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    stored = {f"w.{name}": value for name, value in state.as_dict(packed=True).items()}
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(stored | {"w": packed}, "w"), expected)


def test_heads_and_embeddings_are_not_quantized(tmp_path: Path):
    """
    BERT's classifier has three outputs: too few for 4 bits to be worth it.
    """
    quantize(save_source(tmp_path / "source", tiny_bert), tmp_path / "base", name="toy")
    model = load(tmp_path / "base", memory_budget=0).model
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
    assert isinstance(model.bert.encoder.layer[0].output.dense, Linear4bit)


def test_a_model_over_the_memory_budget_stays_4bit(base: Path):
    """
    One byte less than the decoded model takes is too little.
    """
    size = decoded_size(base, torch.float32)
    assert load(base, memory_budget=size).weights == "dequantized"
    small = load(base, memory_budget=size - 1)
    assert small.weights == "4bit"
    assert isinstance(small.model.model.layers[0].mlp.up_proj, Linear4bit)


def test_the_decoded_size_counts_every_parameter_once(base: Path, loaded: BaseModel):
    """
    Four bytes for each float32 parameter, tied embeddings once.
    """
    parameters = sum(p.numel() for p in loaded.model.parameters())
    assert decoded_size(base, torch.float32) == 4 * parameters


def test_a_4bit_model_passes_gradients_after_an_evaluation(base: Path):
    """
    bitsandbytes repacks weights when a model is evaluated on some CPUs, and such a layer has no
    gradient: scales of the first layer would never move again.
    """
    model = load(base, memory_budget=0).model
    logits(model)
    scales = torch.ones(128, requires_grad=True)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: (args[0] * scales.to(args[0].dtype),)
    )
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert scales.grad is not None and scales.grad.abs().sum() > 0


def test_a_damaged_base_model_is_not_loaded(source: Path, tmp_path: Path):
    """
    Every chunk is checked before anything is read from it.
    """
    quantize(source, tmp_path, name="toy")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(Corrupt, match=r"model\.safetensors: chunk 0"):
        load(tmp_path)


def test_an_adapter_of_another_base_is_refused_naming_both(loaded: BaseModel):
    """
    The error names the adapter's base and the one that is loaded.
    """
    with pytest.raises(WrongBaseModel, match=f"abababababab.*toy .{loaded.digest[:12]}"):
        loaded.require(Schema("ab" * 32, loaded.schema.targets))


def test_an_adapter_of_other_targets_is_refused(loaded: BaseModel):
    """
    The same base model with another list of targets is another schema; its own is welcome.
    """
    loaded.require(loaded.schema)
    with pytest.raises(BadAdapter, match="toy"):
        loaded.require(Schema(loaded.digest, (Target("lm_head", "k", 2),)))


def test_explicit_targets_replace_the_architectures_own(source: Path, tmp_path: Path):
    """
    Named targets are all that the manifest lists.
    """
    manifest = quantize(source, tmp_path, name="toy", targets=["q_proj"])
    assert {t.name.rsplit(".")[-1] for t in manifest.targets} == {"q_proj"}


def test_a_quantized_model_is_not_quantized_again(base: Path, tmp_path: Path):
    """
    Rounding what was rounded would be worse than either.
    """
    with pytest.raises(BadInput, match="quantized already"):
        quantize(base, tmp_path / "again", name="toy")


def test_a_model_without_its_head_is_refused(tmp_path: Path):
    """
    transformers would make up a random head, another one each time.
    """
    folder = save_source(tmp_path / "source", tiny_bert)
    described = (folder / "config.json").read_text()
    with quiet(), torch.random.fork_rng():
        tiny_bert().bert.save_pretrained(folder)
    (folder / "config.json").write_text(described)
    with pytest.raises(BadInput, match=r"classifier\.weight"):
        quantize(folder, tmp_path / "base", name="toy")


@pytest.mark.parametrize("architectures", [None, ["NoSuchModel"], ["__version__"]])
def test_an_architecture_that_transformers_lacks_is_refused(
    architectures: list[str] | None, source: Path, tmp_path: Path
):
    """
    Code that comes with a model is never run.
    """
    config = json.loads((source / "config.json").read_text()) | {"architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="architecture"):
        quantize(tmp_path, tmp_path / "base", name="toy")


def test_an_absent_folder_is_not_found(tmp_path: Path):
    """
    An absent folder is never taken for a hub id.
    """
    for absent in (tmp_path / "absent", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(NotFound, match="no folder"):
            quantize(absent, tmp_path / "base", name="toy")


def test_an_unreachable_hub_is_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """
    Off the network, a hub id that was never downloaded says what to do.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound, match="check the hub id and the connection"):
        quantize("fedia3/no-such-model", tmp_path / "base", name="toy")


def test_a_folder_with_files_is_not_written_into(source: Path):
    """
    Somebody's files are never mixed with a base model's.
    """
    with pytest.raises(Conflict, match="not empty"):
        quantize(source, source, name="toy")


@pytest.mark.slow
def test_loading_prints_nothing(base: Path):
    """
    No progress bar, no word about missing kernels, on either path and from the first import on.
    """
    program = (
        "from pathlib import Path; from fedia3.adapters.base_model import load; "
        f"[load(Path({str(base)!r}), memory_budget=budget) for budget in (None, 0)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
