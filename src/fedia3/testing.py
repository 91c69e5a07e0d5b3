"""Honest stand-ins for tests, ours and yours: tiny random models of every known architecture."""

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    for field in vars(config):
        if "drop" in field and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
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
