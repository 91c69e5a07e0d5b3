"""Which modules of a transformers model IA3 scales (Liu et al., 2022, §3.3).

Keys and values of every attention, and the input of every feed-forward's last projection. Found
by architecture for the models below; any other model needs its targets named.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedia3.adapters.schema import Kind, Part, Target
from fedia3.errors import BadTargets

Parts = Callable[[Any, int], Part]  # (model config, width of the fused output) -> the slice


@dataclass(frozen=True)
class Rule:
    """Modules whose path matches ``pattern`` hold scales of ``kind``, in ``part`` where fused."""

    pattern: str
    kind: Kind
    part: Parts | None = None


def _gpt2_key(config: Any, total: int) -> Part:
    return Part(
        first=total - 2 * config.hidden_size, width=config.hidden_size, stride=total, total=total
    )  # cross-attention fuses k and v only: first is 0 there


def _gpt2_value(config: Any, total: int) -> Part:
    return Part(
        first=total - config.hidden_size, width=config.hidden_size, stride=total, total=total
    )


def _falcon_key(config: Any, total: int) -> Part:
    head = config.hidden_size // config.num_attention_heads
    return Part(
        first=_falcon_group(config, total) - 2 * head,
        width=head,
        stride=_falcon_group(config, total),
        total=total,
    )


def _falcon_value(config: Any, total: int) -> Part:
    head = config.hidden_size // config.num_attention_heads
    return Part(
        first=_falcon_group(config, total) - head,
        width=head,
        stride=_falcon_group(config, total),
        total=total,
    )


def _falcon_group(config: Any, total: int) -> int:
    """Width of one [queries, key, value] group, the three layouts of Falcon's fused projection."""
    head = int(config.hidden_size // config.num_attention_heads)
    if config.new_decoder_architecture:
        return int(config.num_attention_heads // config.num_kv_heads + 2) * head
    return total if config.multi_query else 3 * head


def _phi3_key(config: Any, total: int) -> Part:
    return Part(
        first=total - 2 * _kv_width(config), width=_kv_width(config), stride=total, total=total
    )


def _phi3_value(config: Any, total: int) -> Part:
    return Part(first=total - _kv_width(config), width=_kv_width(config), stride=total, total=total)


def _kv_width(config: Any) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads * head)


_LLAMA = (
    Rule(r"self_attn\.k_proj$", "k"),
    Rule(r"self_attn\.v_proj$", "v"),
    Rule(r"mlp\.down_proj$", "ff"),
)
_BERT = (
    Rule(r"\.key$", "k"),
    Rule(r"\.value$", "v"),
    Rule(r"layer\.\d+\.output\.dense$", "ff"),  # not attention.output.dense, which shares the name
)
ARCHITECTURES: dict[str, tuple[Rule, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": (*_LLAMA[:2], Rule(r"mlp\.fc2$", "ff")),
    "phi3": (
        Rule(r"self_attn\.qkv_proj$", "k", _phi3_key),
        Rule(r"self_attn\.qkv_proj$", "v", _phi3_value),
        Rule(r"mlp\.down_proj$", "ff"),
    ),
    "gpt2": (
        Rule(r"attn\.c_attn$|crossattention\.c_attn$", "k", _gpt2_key),
        Rule(r"attn\.c_attn$|crossattention\.c_attn$", "v", _gpt2_value),
        Rule(r"mlp\.c_proj$", "ff"),
    ),
    "falcon": (
        Rule(r"self_attention\.query_key_value$", "k", _falcon_key),
        Rule(r"self_attention\.query_key_value$", "v", _falcon_value),
        Rule(r"mlp\.dense_4h_to_h$", "ff"),
    ),
    "t5": (
        Rule(r"Attention\.k$", "k"),
        Rule(r"Attention\.v$", "v"),
        Rule(r"DenseReluDense\.wo$", "ff"),
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": (
        Rule(r"attention\.k_lin$", "k"),
        Rule(r"attention\.v_lin$", "v"),
        Rule(r"ffn\.lin2$", "ff"),
    ),
    "vit": (
        Rule(r"attention\.k_proj$", "k"),
        Rule(r"attention\.v_proj$", "v"),
        Rule(r"mlp\.fc2$", "ff"),
    ),
}


def find_targets(
    model: nn.Module,
    explicit: Sequence[str] | None = None,
    feedforward: Sequence[str] | None = None,
) -> tuple[Target, ...]:
    """The model's IA3 targets in module order.

    Args:
        model: a transformers model, quantized or not.
        explicit: suffixes of module paths to scale instead of the architecture's own, as PEFT's
            ``target_modules``; keys and values act alike, a leaf name with a "v" counts as values.
        feedforward: those of ``explicit`` that are scaled on their input, as PEFT's
            ``feedforward_modules``.

    Raises:
        BadTargets: the architecture is not known, a target matches nothing, or a feed-forward
            target is none of the targets; the message lists the candidate modules.
    """
    if explicit is not None:
        targets = _explicit_targets(model, explicit, feedforward or ())
    elif feedforward is not None:
        raise BadTargets("feedforward names some of the explicit targets; give those as well")
    else:
        targets = _known_targets(model)
    order = {name: position for position, (name, _) in enumerate(projections(model))}
    return tuple(sorted(targets, key=lambda t: (order[t.name], t.kind)))


def projections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module a vector can scale: linear layers, 4-bit ones too, and GPT-2's Conv1D."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a projection; a packed 4-bit weight's shape says neither."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = cast(Tensor, module.weight)
    return int(weight.shape[0]), int(weight.shape[1])  # Conv1D stores (in, out)


def _known_targets(model: nn.Module) -> list[Target]:
    config: Any = model.config
    rules = ARCHITECTURES.get(config.model_type)
    if rules is None:
        raise BadTargets(
            f"the IA3 targets of architecture {config.model_type!r} are not known "
            f"(known: {', '.join(sorted(ARCHITECTURES))}); name them. {_candidates(model)}"
        )
    targets = []
    for rule in rules:
        matching = [(n, m) for n, m in projections(model) if re.search(rule.pattern, n)]
        if not matching:
            raise BadTargets(f"no module matches {rule.pattern!r}. {_candidates(model)}")
        targets += [_target(n, m, rule.kind, rule.part, config) for n, m in matching]
    return targets


def _explicit_targets(
    model: nn.Module, explicit: Sequence[str], feedforward: Sequence[str]
) -> list[Target]:
    outside = [name for name in feedforward if name not in explicit]
    if outside:
        raise BadTargets(f"feed-forward targets {outside} are none of the targets {list(explicit)}")
    targets: dict[str, Target] = {}
    for suffix in explicit:
        matching = [(n, m) for n, m in projections(model) if _ends_in(n, suffix)]
        if not matching:
            raise BadTargets(f"no module is called {suffix!r}. {_candidates(model)}")
        kind = "ff" if suffix in feedforward else _key_or_value(suffix)
        targets |= {n: _target(n, m, kind, None, None) for n, m in matching}
    return list(targets.values())


def _target(name: str, module: nn.Module, kind: Kind, part: Parts | None, config: Any) -> Target:
    wide_in, wide_out = features(module)
    if part is None:
        return Target(name, kind, wide_in if kind == "ff" else wide_out)
    piece = part(config, wide_out)
    return Target(name, kind, len(piece.positions()), piece)


def _ends_in(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _key_or_value(suffix: str) -> Kind:
    return "v" if "v" in suffix.rsplit(".", maxsplit=1)[-1].lower() else "k"


def _candidates(model: nn.Module) -> str:
    """The modules there are, repeated layers named once, as the end of an error message."""
    shapes = {
        re.sub(r"\.\d+\.", ".*.", name): features(module) for name, module in projections(model)
    }
    return "Candidate modules (in → out): " + _joined(
        f"{name} ({wide_in} → {wide_out})" for name, (wide_in, wide_out) in shapes.items()
    )


def _joined(names: Iterable[str]) -> str:
    return ", ".join(names) or "none, this model has no linear layer"
