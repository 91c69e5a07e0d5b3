"""Adapters from and to PEFT, checked against PEFT itself on four tiny random architectures."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fedia3.adapters.adapter import Adapter
from fedia3.adapters.peft_folder import TaskType, read_peft_folder, write_peft_folder
from fedia3.adapters.schema import Part, Schema, Target
from fedia3.errors import BadAdapter, BadInput, StorageFailed, WrongBaseModel

BASE = "b" * 64


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    )


def _bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def _t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def _llama_targets(layer: int) -> list[Target]:
    here = f"model.layers.{layer}"
    return [
        Target(f"{here}.self_attn.k_proj", "k", 16),
        Target(f"{here}.self_attn.v_proj", "v", 16),
        Target(f"{here}.mlp.down_proj", "ff", 48),
    ]


def _gpt2_targets(layer: int) -> list[Target]:
    here = f"transformer.h.{layer}"
    return [
        Target(f"{here}.attn.c_attn", "k", 32, Part(first=32, width=32, stride=96, total=96)),
        Target(f"{here}.attn.c_attn", "v", 32, Part(first=64, width=32, stride=96, total=96)),
        Target(f"{here}.mlp.c_proj", "ff", 128),
    ]


def _bert_targets(layer: int) -> list[Target]:
    here = f"bert.encoder.layer.{layer}"
    return [
        Target(f"{here}.attention.self.key", "k", 32),
        Target(f"{here}.attention.self.value", "v", 32),
        Target(f"{here}.output.dense", "ff", 48),  # attention.output.dense stays as it is
    ]


def _t5_targets(layer: int) -> list[Target]:
    attentions = [
        f"encoder.block.{layer}.layer.0.SelfAttention",
        f"decoder.block.{layer}.layer.0.SelfAttention",
        f"decoder.block.{layer}.layer.1.EncDecAttention",
    ]
    return [
        *(Target(f"{at}.{kind}", kind, 32) for at in attentions for kind in ("k", "v")),
        Target(f"encoder.block.{layer}.layer.1.DenseReluDense.wo", "ff", 48),
        Target(f"decoder.block.{layer}.layer.2.DenseReluDense.wo", "ff", 48),
    ]


@dataclass(frozen=True)
class Architecture:
    model: Callable[[], Any]
    targets: Callable[[int], list[Target]]
    task_type: TaskType
    conv1d: bool = False

    def tiny(self) -> Any:
        """The same random model at every call."""
        torch.manual_seed(0)
        model = self.model()
        for parameter in model.parameters():
            # Biases are born as zeros and weights so small that a wrong scale would hide.
            fresh = torch.randn_like(parameter)
            parameter.data = 0.2 * fresh if parameter.dim() > 1 else parameter + 0.1 * fresh
        return model

    @property
    def schema(self) -> Schema:
        return Schema(BASE, tuple(self.targets(0) + self.targets(1)))

    @property
    def modules(self) -> list[str]:
        return sorted({target.name for target in self.schema.targets})

    @property
    def feedforward(self) -> list[str]:
        return sorted({target.name for target in self.schema.targets if target.kind == "ff"})


ARCHITECTURES = {
    "llama": Architecture(_llama, _llama_targets, "CAUSAL_LM"),
    "gpt2": Architecture(_gpt2, _gpt2_targets, "CAUSAL_LM", conv1d=True),
    "bert": Architecture(_bert, _bert_targets, "SEQ_CLS"),
    "t5": Architecture(_t5, _t5_targets, "SEQ_2_SEQ_LM"),
}
every_architecture = pytest.mark.parametrize(
    "architecture", ARCHITECTURES.values(), ids=ARCHITECTURES
)


def _some_adapter(schema: Schema) -> Adapter:
    """Scales between a half and two, all different."""
    return Adapter(schema, np.random.default_rng(0).uniform(0.5, 2, schema.n_params))


def _logits(model: Any) -> NDArray[np.float32]:
    tokens = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        given = {"labels": tokens} if model.config.is_encoder_decoder else {}
        found: NDArray[np.float32] = model.eval()(input_ids=tokens, **given).logits.numpy()
    return found


def _merged(model: Any, adapter: Adapter, conv1d: bool) -> Any:
    """A copy whose weights carry the scales: rows and biases of keys and values, columns of ff."""
    model = copy.deepcopy(model)
    for target in adapter.schema.targets:
        module = model.get_submodule(target.name)
        weight = module.weight.data.T if conv1d else module.weight.data  # (out, in)
        scales = torch.tensor(adapter.scales(target.key))
        if target.kind == "ff":
            weight *= scales
            continue
        rows = target.part.positions() if target.part else np.arange(target.dim)
        weight[rows] *= scales[:, None]
        if module.bias is not None:
            module.bias.data[rows] *= scales
    return model


def _peft_of(model: Any, architecture: Architecture) -> Any:
    """PEFT's own IA3 on the modules of the schema, with random scales and ones for queries."""
    config = IA3Config(
        task_type=architecture.task_type,
        target_modules=architecture.modules,
        feedforward_modules=architecture.feedforward,
        fan_in_fan_out=architecture.conv1d,
    )
    peft_model = get_peft_model(model, config)
    adapter = _some_adapter(architecture.schema)
    for target in architecture.schema.targets:
        scales = peft_model.base_model.model.get_submodule(target.name).ia3_l["default"].data
        positions = target.part.positions() if target.part else np.arange(target.dim)
        scales.view(-1)[positions] = torch.tensor(adapter.scales(target.key))
    return peft_model


def _write(adapter: Adapter, folder: Path, architecture: Architecture) -> None:
    write_peft_folder(
        adapter,
        folder,
        base_name="tiny",
        task_type=architecture.task_type,
        fan_in_fan_out=architecture.conv1d,
    )


@every_architecture
def test_peft_computes_with_our_folder_what_merged_weights_compute(
    architecture: Architecture, tmp_path: Path
):
    """PEFT loads the folder without a warning and gives the logits of hand-merged weights."""
    model, adapter = architecture.tiny(), _some_adapter(architecture.schema)
    expected = _logits(_merged(model, adapter, architecture.conv1d))
    untouched = _logits(model)
    _write(adapter, tmp_path, architecture)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's; deprecations are not ours to mend
        loaded = PeftModel.from_pretrained(model, str(tmp_path))

    assert not np.allclose(untouched, expected, atol=1e-2)  # the scales do matter
    np.testing.assert_allclose(_logits(loaded), expected, rtol=1e-5, atol=1e-5)


@every_architecture
def test_peft_misses_no_key_of_ours_and_finds_none_too_many(
    architecture: Architecture, tmp_path: Path
):
    """The modules PEFT scales are exactly the schema's, each with a tensor in the file."""
    _write(_some_adapter(architecture.schema), tmp_path, architecture)

    loaded = PeftModel.from_pretrained(architecture.tiny(), str(tmp_path))
    result = loaded.load_adapter(str(tmp_path), "again")

    assert result.missing_keys == []
    assert result.unexpected_keys == []
    scaled = [n for n, _ in loaded.base_model.model.named_modules() if n.endswith(".ia3_l")]
    assert sorted(name.removesuffix(".ia3_l") for name in scaled) == architecture.modules


@every_architecture
def test_what_peft_saves_is_read(architecture: Architecture, tmp_path: Path):
    """Scales set in a PEFT model come back from the folder that its save_pretrained writes."""
    _peft_of(architecture.tiny(), architecture).save_pretrained(
        str(tmp_path), save_embedding_layers=False
    )

    is_classifier = architecture.task_type == "SEQ_CLS"
    adapter = read_peft_folder(tmp_path, architecture.schema, without_head=is_classifier)

    assert adapter == _some_adapter(architecture.schema)


@every_architecture
def test_our_own_folder_gives_the_adapter_back(architecture: Architecture, tmp_path: Path):
    """Written and read, every scale is the same float."""
    adapter = _some_adapter(architecture.schema)

    _write(adapter, tmp_path, architecture)

    assert read_peft_folder(tmp_path, architecture.schema) == adapter


def test_peft_reads_again_what_it_saved_from_our_folder(tmp_path: Path):
    """A folder passed on through PEFT still holds the same adapter."""
    architecture = ARCHITECTURES["llama"]
    adapter = _some_adapter(architecture.schema)
    _write(adapter, tmp_path / "ours", architecture)

    loaded = PeftModel.from_pretrained(architecture.tiny(), str(tmp_path / "ours"))
    # Else PEFT asks the hub for the base model's vocabulary.
    loaded.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)

    assert read_peft_folder(tmp_path / "theirs", architecture.schema) == adapter


def test_a_module_whose_name_ends_in_anothers_is_not_caught(tmp_path: Path):
    """PEFT matches lists of names by their ends; ours scale "up.fc" and "fc", never "out.fc"."""

    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)
            self.up = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 2)})
            self.out = torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)})

    schema = Schema(BASE, (Target("up.fc", "k", 2), Target("fc", "ff", 2)))
    write_peft_folder(_some_adapter(schema), tmp_path, base_name="nested", task_type="CAUSAL_LM")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()) | {"task_type": None})
    )  # a plain module, not a language model

    loaded = PeftModel.from_pretrained(Nested(), str(tmp_path)).base_model.model

    assert loaded.up["fc"].ia3_l["default"].shape == (2, 1)
    assert loaded.fc.ia3_l["default"].shape == (1, 2)
    assert isinstance(loaded.out["fc"], torch.nn.Linear)


LINEAR = Schema(BASE, (Target("k_proj", "k", 2), Target("down_proj", "ff", 3)))
FUSED = Schema(
    BASE,
    (
        Target("c_attn", "k", 2, Part(first=2, width=2, stride=6, total=6)),
        Target("c_attn", "v", 2, Part(first=4, width=2, stride=6, total=6)),
    ),
)
GOOD = {"k_proj": [[2.0], [3.0]], "down_proj": [[4.0, 5.0, 6.0]]}


def _peft_file(
    folder: Path, values: dict[str, Any] = GOOD, dtype: str = "float32", **config: Any
) -> Path:
    """A folder as PEFT writes it, by module name."""
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{name}.ia3_l": np.array(rows, dtype=dtype)
        for name, rows in values.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"} | config))
    return folder


def test_queries_of_a_fused_projection_are_written_as_ones(tmp_path: Path):
    """Keys 2, 3 and values 4, 5 of a projection shared with two queries are 1, 1, 2, 3, 4, 5."""
    adapter = Adapter(FUSED, np.array([2, 3, 4, 5], dtype=np.float32))

    write_peft_folder(adapter, tmp_path, base_name="fused", task_type="CAUSAL_LM")

    written = load_file(tmp_path / "adapter_model.safetensors")
    assert written["base_model.model.c_attn.ia3_l"].T.tolist() == [[1, 1, 2, 3, 4, 5]]


def test_scaled_queries_are_refused(tmp_path: Path):
    """PEFT trains all of a fused projection; dropping the queries' part would change the model."""
    folder = _peft_file(tmp_path, {"c_attn": [[1.0], [1.5], [2.0], [3.0], [4.0], [5.0]]})

    with pytest.raises(BadAdapter, match=r"c_attn.*queries"):
        read_peft_folder(folder, FUSED)


def test_half_precision_is_widened(tmp_path: Path):
    """The numbers 2 to 6 are the same in half precision."""
    folder = _peft_file(tmp_path, dtype="float16")

    assert read_peft_folder(folder, LINEAR).vector.tolist() == [2, 3, 4, 5, 6]


def test_bfloat16_is_widened(tmp_path: Path):
    """The numbers 2 to 6 are the same in bfloat16, which numpy does not know."""
    folder = _peft_file(tmp_path)
    save_torch_file(
        {
            f"base_model.model.{name}.ia3_l": torch.tensor(rows, dtype=torch.bfloat16)
            for name, rows in GOOD.items()
        },
        folder / "adapter_model.safetensors",
    )

    assert read_peft_folder(folder, LINEAR).vector.tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"k_proj": GOOD["k_proj"]}, "missing.*down_proj", id="missing module"),
        pytest.param(GOOD | {"q_proj": [[1.0]]}, "no target.*q_proj", id="extra module"),
        pytest.param(
            GOOD | {"down_proj": [[4.0], [5.0], [6.0]]},
            r"expected shape \(1, 3\), got \(3, 1\)",
            id="output scaled instead of input",
        ),
        pytest.param(GOOD | {"k_proj": [[2.0], [np.nan]]}, "not finite", id="NaN"),
        pytest.param(GOOD | {"k_proj": [[2.0], [101.0]]}, "magnitude 101", id="beyond 100"),
        pytest.param({"k_proj": [[0.0]] * 2, "down_proj": [[0.0] * 3]}, "silences", id="all zeros"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
):
    """Other modules, another side, or scales that no training gives are named."""
    with pytest.raises(BadAdapter, match=message):
        read_peft_folder(_peft_file(tmp_path, values), LINEAR)


def test_a_trained_head_is_not_dropped_unasked(tmp_path: Path):
    """Without its head a classifier answers differently, so leaving it behind is said aloud."""
    with_head = GOOD | {"score": [[1.0]]}
    folder = _peft_file(tmp_path, with_head, modules_to_save=["classifier", "score"])

    with pytest.raises(BadAdapter, match=r"trained head .*score"):
        read_peft_folder(folder, LINEAR)
    assert read_peft_folder(folder, LINEAR, without_head=True).vector.tolist() == [2, 3, 4, 5, 6]


def test_another_method_is_refused(tmp_path: Path):
    """A LoRA folder is named as such."""
    with pytest.raises(BadAdapter, match="expected peft_type IA3, got 'LORA'"):
        read_peft_folder(_peft_file(tmp_path, peft_type="LORA"), LINEAR)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, "\udcff"])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path):
    """Whatever is wrong with the config, the error is ours."""
    folder = _peft_file(tmp_path)
    (folder / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(BadAdapter, match=r"adapter_config\.json"):
        read_peft_folder(folder, LINEAR)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_its_files_is_refused(name: str, tmp_path: Path):
    """The error names the file, for instance where an old PEFT saved a pickle instead."""
    (_peft_file(tmp_path) / name).unlink()

    with pytest.raises(BadAdapter, match=name):
        read_peft_folder(tmp_path, LINEAR)


def test_our_export_of_another_base_model_is_refused(tmp_path: Path):
    """Two base models with equal modules are told apart by the digest we write."""
    write_peft_folder(_some_adapter(LINEAR), tmp_path, base_name="one", task_type="CAUSAL_LM")

    with pytest.raises(WrongBaseModel, match="ddd"):
        read_peft_folder(tmp_path, Schema("d" * 64, LINEAR.targets))


def test_an_older_export_is_replaced(tmp_path: Path):
    """The folder holds the second adapter and no drafts."""
    newer = Adapter(LINEAR, np.array([2, 3, 4, 5, 6], dtype=np.float32))

    for adapter in (Adapter.ones(LINEAR), newer):
        write_peft_folder(adapter, tmp_path, base_name="one", task_type="CAUSAL_LM")

    assert read_peft_folder(tmp_path, LINEAR) == newer
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path):
    """An export does not land in the middle of somebody's model."""
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(BadInput, match=r"model\.safetensors"):
        write_peft_folder(_some_adapter(LINEAR), tmp_path, base_name="one", task_type="CAUSAL_LM")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_in_the_folders_place_is_left_alone(tmp_path: Path):
    """The path of an existing file is no folder to write to."""
    (tmp_path / "notes").touch()

    with pytest.raises(BadInput, match="is a file"):
        write_peft_folder(
            _some_adapter(LINEAR), tmp_path / "notes", base_name="one", task_type="CAUSAL_LM"
        )


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path):
    """
    Below a file, where nobody can make one.
    """
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="choose another folder"):
        write_peft_folder(
            Adapter.ones(Schema(BASE, (Target("h.0.k_proj", "k", 2),))),
            tmp_path / "file" / "adapter",
            base_name="base",
            task_type="CAUSAL_LM",
        )


def test_a_module_scaled_on_both_sides_cannot_be_said_in_peft(tmp_path: Path):
    """PEFT holds one vector a module; a schema with two is refused before anything is written."""
    twice = Schema(BASE, (Target("proj", "k", 2), Target("proj", "ff", 3)))

    with pytest.raises(BadAdapter, match="PEFT scales a module once"):
        write_peft_folder(
            _some_adapter(twice), tmp_path / "out", base_name="one", task_type="CAUSAL_LM"
        )
    assert not (tmp_path / "out").exists()
