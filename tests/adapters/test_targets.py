"""Which modules of which architecture are scaled."""

import pytest
import torch
from torch import nn

from fedia3.adapters.targets import find_targets
from fedia3.errors import BadTargets
from fedia3.testing import tiny_model

LAYERS = 2


@pytest.mark.parametrize(
    ("architecture", "k", "v", "ff"),
    [
        ("llama", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("mistral", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("qwen2", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("qwen3", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("gemma", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("gemma2", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("gemma3_text", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        ("phi", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc2"),
        ("phi3", "self_attn.qkv_proj", "self_attn.qkv_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_attn", "attn.c_attn", "mlp.c_proj"),
        ("falcon", "query_key_value", "query_key_value", "dense_4h_to_h"),
        ("bert", "self.key", "self.value", "output.dense"),
        ("roberta", "self.key", "self.value", "output.dense"),
        ("distilbert", "attention.k_lin", "attention.v_lin", "ffn.lin2"),
        ("vit", "attention.k_proj", "attention.v_proj", "mlp.fc2"),
    ],
)
def test_every_layer_gives_its_keys_values_and_feed_forward(
    architecture: str, k: str, v: str, ff: str
) -> None:
    """A known architecture scales k, v and the last feed-forward projection of every layer."""
    targets = find_targets(tiny_model(architecture))
    for kind, ending in (("k", k), ("v", v), ("ff", ff)):
        names = [t.name for t in targets if t.kind == kind]
        assert len(names) == LAYERS, architecture
        assert all(name.endswith(ending) for name in names)


def test_t5_scales_self_and_cross_attention() -> None:
    """Encoder, decoder and cross attention each give keys and values: 3 per pair of layers."""
    kinds = [t.kind for t in find_targets(tiny_model("t5"))]
    assert (kinds.count("k"), kinds.count("v"), kinds.count("ff")) == (6, 6, 4)


def test_berts_attention_output_is_not_a_target() -> None:
    """BERT's attention.output.dense shares its last names with the feed-forward's; it is left."""
    assert not [t for t in find_targets(tiny_model("bert")) if "attention.output" in t.name]


def test_gpt2_keys_and_values_are_the_last_two_thirds_of_the_fused_output() -> None:
    """GPT-2 fuses [q, k, v]; for hidden 32 the keys are positions 32–63, the values 64–95."""
    key, value = find_targets(tiny_model("gpt2"))[:2]
    assert key.part is not None
    assert value.part is not None
    assert key.part.positions().tolist() == list(range(32, 64))
    assert value.part.positions().tolist() == list(range(64, 96))


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        # 4 heads of 8: all queries, then one shared key and one shared value head
        ({"multi_query": True, "new_decoder_architecture": False}, [*range(32, 40)],
         [*range(40, 48)]),
        # per head: query, key, value
        (
            {"multi_query": False, "new_decoder_architecture": False},
            [i + 24 * head + 8 for head in range(4) for i in range(8)],
            [i + 24 * head + 16 for head in range(4) for i in range(8)],
        ),
        # 2 groups: two queries, key, value
        (
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            [i + 32 * group + 16 for group in range(2) for i in range(8)],
            [i + 32 * group + 24 for group in range(2) for i in range(8)],
        ),
    ],
)  # fmt: skip
def test_falcons_three_fused_layouts(
    options: dict[str, object], key: list[int], value: list[int]
) -> None:
    """Each Falcon generation interleaves heads differently; the slices follow."""
    targets = find_targets(tiny_model("falcon", **options))
    parts = {t.kind: t.part for t in targets if t.part}
    assert parts["k"].positions().tolist() == key
    assert parts["v"].positions().tolist() == value


class _Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = type("C", (), {"model_type": "strange"})()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(4, 6), "vault": nn.Linear(6, 8)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_an_unknown_architecture_lists_its_candidates() -> None:
    """Without targets the error names the architecture and the modules to choose from."""
    with pytest.raises(BadTargets, match=r"'strange'.*layers\.\*\.mix \(4 → 6\)"):
        find_targets(_Strange())


def test_explicit_targets_serve_an_unknown_architecture() -> None:
    """Named targets are scaled on the output, named feed-forward ones on the input."""
    targets = find_targets(_Strange(), explicit=["mix", "vault"], feedforward=["vault"])
    assert [(t.name, t.kind, t.dim) for t in targets[:2]] == [
        ("layers.0.mix", "k", 6),
        ("layers.0.vault", "ff", 6),
    ]


def test_a_target_that_matches_nothing_is_an_error() -> None:
    """A misspelt target never trains silently without itself."""
    with pytest.raises(BadTargets, match="no module is called 'k_projj'"):
        find_targets(tiny_model("llama"), explicit=["k_projj"])


def test_a_feed_forward_target_outside_the_targets_is_an_error() -> None:
    """feedforward names some of the targets, as in PEFT."""
    with pytest.raises(BadTargets, match="down_proj"):
        find_targets(tiny_model("llama"), explicit=["k_proj"], feedforward=["down_proj"])
