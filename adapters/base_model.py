"""The shared frozen base model: made 4-bit once, then verified and loaded wherever it runs.

Linear layers are stored as NF4 with double quantization (QLoRA: Dettmers et al., 2023, §3) by
bitsandbytes. On a CPU bitsandbytes decodes a weight at every use, so where memory allows the
weights are decoded once instead. That is done here, to the bit as bitsandbytes does it: importing
bitsandbytes and loading through it takes 2 of the 7.5 seconds until a small model stands.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import embedding, pad
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.hub import cached_file

from fedia3.adapters.manifest import (
    Manifest,
    Origin,
    check_name,
    manifest_of,
    read_manifest,
    schema,
    verify,
    write_manifest,
)
from fedia3.adapters.schema import Schema
from fedia3.adapters.targets import find_targets
from fedia3.errors import BadAdapter, BadInput, Conflict, Corrupt, NotFound, WrongBaseModel

# Travel with the model although transformers does not save them: who made it, under which terms,
# on whose text; and how images become pixels.
EXTRA_FILES = ("README.md", "LICENSE", "pretraining.json", "preprocessor_config.json")

# transformers' plain matmul. Measured forward + backward of the scales, 5.9M Llama, 16 x 48 tokens,
# one core with AVX512-BF16: bfloat16 200 ms against 320 ms for "sdpa"; float32 no difference.
ATTENTION = "eager"

Weights = Literal["dequantized", "4bit"]


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded base model: frozen, in eval mode, on the CPU.

    ``tokenizer`` is None for models that read no text. ``weights`` says whether linear layers hold
    decoded values (ordinary ``nn.Linear``) or stay 4-bit (bitsandbytes' ``Linear4bit``).
    """

    model: Any  # a transformers PreTrainedModel of the architecture the manifest names
    tokenizer: Any  # a transformers tokenizer, or None
    manifest: Manifest
    schema: Schema
    weights: Weights
    pretraining_users: frozenset[str] = frozenset()  # whose text the base has seen, as it says

    @property
    def pad_id(self) -> int:
        """What fills up a batch; masked everywhere, so any token would do."""
        for name in ("pad_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    @property
    def digest(self) -> str:
        """The base model's identity, as :attr:`Schema.base_digest`."""
        return self.manifest.digest

    def require(self, wanted: Schema) -> None:
        """Refuse adapters that were not made for this base model.

        Raises:
            WrongBaseModel: ``wanted`` belongs to another base model.
            BadAdapter: same base model, other targets.
        """
        if wanted.base_digest != self.digest:
            raise WrongBaseModel(
                f"the adapter is for base model {wanted.base_digest[:12]}, this one is "
                f"{self.manifest.name} ({self.digest[:12]}); load that base or train it anew"
            )
        if wanted != self.schema:
            raise BadAdapter(
                f"the adapter scales other targets than {self.manifest.name}'s manifest lists"
            )


# --- making ---------------------------------------------------------------------------------


def quantize(
    source: str | Path,
    out: Path,
    *,
    name: str,
    targets: Sequence[str] | None = None,
    feedforward: Sequence[str] | None = None,
    revision: str | None = None,
) -> Manifest:
    """Make ``out`` a 4-bit base model with its tokenizer, papers and manifest.

    Embeddings, norms and output heads stay in bfloat16; so do T5's ``wo``, which transformers
    exempts because half precision overflows there. A local ``source`` is read without the
    network.

    Args:
        source: folder of a transformers model, or its hub id.
        out: a folder that does not exist or is empty.
        name: what people call it: lower case, see :func:`check_name`.
        targets: module suffixes that IA3 scales; None = the architecture's own.
        feedforward: those of ``targets`` that are scaled on their input.
        revision: branch, tag or commit of a hub id.

    Raises:
        NotFound: no such folder, no such model, or the hub cannot be reached.
        BadInput: the model is quantized already, its class is none of transformers', or its
            file lacks weights.
        BadTargets: the IA3 targets match nothing or are not known.
        Conflict: ``out`` holds files.
    """
    check_name(name)
    if _is_folder(source) and not Path(source).is_dir():
        raise NotFound(f"no folder {source}; give a transformers model's folder or hub id")
    if out.exists() and any(out.iterdir()):
        raise Conflict(f"{out} is not empty; a base model needs a folder of its own")
    with quiet():
        with _translated(source):
            model = _quantized(source, revision)
            tokenizer = _tokenizer(source, revision)
            extra_files = _extra_files(source, revision)
        ia3_targets = find_targets(model, targets, feedforward)
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
    for path in extra_files:
        shutil.copyfile(path, out / path.name)
    manifest = manifest_of(
        out,
        name=name,
        created_from=Origin(
            architecture=type(model).__name__,
            source=None if _is_folder(source) else str(source),
            revision=getattr(model.config, "_commit_hash", None),
        ),
        targets=ia3_targets,
        license=_license(out),
        pretraining="pretraining.json" if (out / "pretraining.json").exists() else None,
    )
    write_manifest(out, manifest)
    return manifest


def _quantized(source: str | Path, revision: str | None) -> Any:
    where: dict[str, Any] = {"local_files_only": _is_folder(source), "revision": revision}
    config = transformers.AutoConfig.from_pretrained(source, **where, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise BadInput(f"{source} is quantized already; give the model it was made from")
    model_class = _class_of(config)
    settings = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # it has no types
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # The name is from 8-bit times; it holds for 4 bits.
        llm_int8_skip_modules=_unquantized_modules(_skeleton(model_class, config)),
    )
    model, report = model_class.from_pretrained(
        source,
        **where,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=settings,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise BadInput(
            f"{source} lacks weights of {type(model).__name__}: {sorted(report['missing_keys'])}; "
            "they would be random. Train the model for this task first"
        )
    return model


def _unquantized_modules(model: Any) -> list[str]:
    """Output heads, of whatever kind, and what shares its weight with an embedding.

    transformers' own list misses heads that have a bias, as BERT's classifier.
    """
    body = model.base_model
    in_body = set() if body is model else set(body.modules())
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and in_body and module not in in_body
    ]
    return sorted({*heads, *get_keys_to_not_convert(model)})


def _skeleton(model_class: Any, config: Any) -> Any:
    """The model's modules without memory for their weights."""
    with torch.device("meta"):
        return model_class(config)


def _class_of(config: Any) -> Any:
    """The model class that config.json names; heads included, so nothing is guessed by task."""
    named = (getattr(config, "architectures", None) or [None])[0]
    found = getattr(transformers, named, None) if named else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise BadInput(
            f"config.json names architecture {named!r}, which transformers "
            f"{transformers.__version__} does not have; remote code is not run"
        )
    return found


def _tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The tokenizer beside a model, None where there is none."""
    if _extra_file(source, revision, "tokenizer_config.json") is None:
        return None
    return transformers.AutoTokenizer.from_pretrained(
        source, local_files_only=_is_folder(source), revision=revision, trust_remote_code=False
    )


def _extra_files(source: str | Path, revision: str | None) -> list[Path]:
    found = (_extra_file(source, revision, name) for name in EXTRA_FILES)
    return [path for path in found if path is not None]


def _extra_file(source: str | Path, revision: str | None, name: str) -> Path | None:
    if _is_folder(source):
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(
        str(source), name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(found) if found else None


def _is_folder(source: str | Path) -> bool:
    """True for what is a folder or was meant as one; everything else is a hub id."""
    if isinstance(source, Path) or source.startswith(("/", ".", "~")):
        return True
    return Path(source).is_dir()


def _license(folder: Path) -> str | None:
    """What the model card's front matter says."""
    card = folder / "README.md"
    if not card.exists():
        return None
    front_matter = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    line = front_matter and re.search(r"^license: *(\S+)", front_matter[1], re.MULTILINE)
    return line[1].strip("\"'") if line else None


@contextmanager
def _translated(source: str | Path) -> Iterator[None]:
    """transformers answers OSError for all of: no folder, no such model, no network.

    A config.json that it cannot use is a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise BadInput(f"transformers cannot use {source}: {_first_line(error)}") from error
    except OSError as error:
        raise NotFound(
            f"no transformers model at {source}: {_first_line(error)} Give a folder with "
            "config.json and weights, or check the hub id and the connection"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


# --- loading --------------------------------------------------------------------------------


def load(
    folder: Path, *, memory_budget: int | None = None, dtype: torch.dtype = torch.float32
) -> BaseModel:
    """Verify every byte of a base model, then load it frozen.

    Args:
        folder: what :func:`quantize` made.
        memory_budget: bytes that the decoded model may take; None = no limit, 0 = stay 4-bit.
        dtype: of decoded weights, and of the activations then. bfloat16 is about twice as fast
            on a CPU with AVX512-BF16 or AMX, and slower than float32 on others.

    Raises:
        NotFound: the folder holds no base model.
        BadInput: the manifest is malformed, or the folder holds links.
        Corrupt: a file is not what the manifest lists, or the model file is incomplete.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    fits = memory_budget is None or decoded_size(folder, dtype) <= memory_budget
    if not fits:
        return _loaded(folder, manifest, _four_bit_model, "4bit")
    return _loaded(folder, manifest, lambda folder: _decoded_model(folder, dtype), "dequantized")


def load_plain(folder: Path) -> BaseModel:
    """A base model as transformers itself would have it, decoded to float32.

    Errors as :func:`load`. GPT-2 keeps its ``Conv1D`` here: saved, it is a GPT-2 again.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    return _loaded(
        folder, manifest, lambda folder: _plain_model(folder, torch.float32)[:2], "dequantized"
    )


def _loaded(
    folder: Path,
    manifest: Manifest,
    read: Callable[[Path], tuple[Any, Any]],
    weights: Weights,
) -> BaseModel:
    with quiet():
        model, report = read(folder)
        tokenizer = _tokenizer(folder)
    if report["missing_keys"]:
        raise Corrupt(f"{manifest.name} lacks weights: {sorted(report['missing_keys'])}")
    return BaseModel(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        manifest=manifest,
        schema=schema(manifest),
        weights=weights,
        pretraining_users=_pretraining_users(folder, manifest),
    )


def _pretraining_users(folder: Path, manifest: Manifest) -> frozenset[str]:
    """Every user that the base's ``pretraining.json`` lists under ``users``, by data source."""
    if manifest.pretraining is None:
        return frozenset()
    try:
        text = (folder / manifest.pretraining).read_text(encoding="utf-8")
        return frozenset(user for users in json.loads(text)["users"].values() for user in users)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{manifest.pretraining} of {manifest.name} lists users by data source, "
            f'{{"users": {{source: [user, …]}}}}; got {error!r}'
        ) from error


def fastest_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies in it, else float32.

    Measured side by side in benchmarks/train_step.py.
    """
    capabilities = torch.cpu.get_capabilities()
    native = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, Arm
    return torch.bfloat16 if any(capabilities.get(name) for name in native) else torch.float32


def decoded_size(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the model once decoded to ``dtype``; only the files' headers are read."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - safe_open is no dict
    packed = _quantized_keys(shapes)
    values = sum(
        torch.Size(shape).numel() * (2 if key in packed else 1)  # two 4-bit codes a byte
        for key, shape in shapes.items()
        if not _is_statistic(key, packed)
    )
    return values * dtype.itemsize


def _decoded_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    model, report, transposed = _plain_model(folder, dtype)
    for module in transposed:
        model.set_submodule(module, _as_linear(model.get_submodule(module)))
    return model, report


def _plain_model(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """The decoded model, transformers' report of loading it, and which modules are ``Conv1D``."""
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    del config.quantization_config  # else transformers looks for bitsandbytes and packed weights
    model_class = _class_of(config)
    state = _decoded_state(folder, dtype)
    transposed = _conv1d_modules(model_class, config)
    for module in transposed:
        state[f"{module}.weight"] = state[f"{module}.weight"].T.contiguous()
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            folder, local_files_only=True
        )
    return model, report, transposed


def _four_bit_model(folder: Path) -> tuple[Any, Any]:
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model, report = _class_of(config).from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    _keep_differentiable(model)
    return model, report


def _keep_differentiable(model: Any) -> None:
    """Stop bitsandbytes from repacking weights at their first use without gradient.

    On a CPU with AVX512-BF16 it does so in eval mode, and a repacked layer passes no gradient
    on: after one evaluation training would silently move nothing (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _conv1d_modules(model_class: Any, config: Any) -> list[str]:
    """GPT-2's projections: transformers quantizes them as the ``nn.Linear`` they amount to."""
    modules = _skeleton(model_class, config).named_modules()
    return [name for name, module in modules if isinstance(module, Conv1D)]


def _as_linear(module: Any) -> nn.Linear:
    in_features, out_features = module.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)
    linear.bias = module.bias
    return linear


# --- decoding NF4 ---------------------------------------------------------------------------


def _decoded_state(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no dict
    packed = _quantized_keys(stored)
    return {
        key: dequantize(stored, key).to(dtype) if key in packed else _cast(tensor, dtype)
        for key, tensor in stored.items()
        if not _is_statistic(key, packed)
    }


def dequantize(stored: Mapping[str, Tensor], key: str) -> Tensor:
    """One weight's values ``(out_features, in_features)``, in the dtype it was quantized from.

    Equal to the bit to ``bitsandbytes.functional.dequantize_4bit``: code book entry times the
    block's scale, which is itself 8-bit: entry times scale plus the mean (QLoRA §3, "double
    quantization").

    Args:
        stored: a safetensors file as bitsandbytes writes it; beside each packed weight lie its
            ``absmax``, ``quant_map``, ``nested_absmax``, ``nested_quant_map`` and ``quant_state``.
        key: the packed weight's name.
    """
    state = json.loads(stored[f"{key}.quant_state.bitsandbytes__nf4"].numpy().tobytes())
    scales = _scaled(
        stored[f"{key}.nested_quant_map"][stored[f"{key}.absmax"].int()],
        stored[f"{key}.nested_absmax"],
        state["nested_blocksize"],
    )
    codes = _code_pairs(stored[f"{key}.quant_map"])
    shape = torch.Size(state["shape"])
    values = embedding(stored[key].flatten().int(), codes).flatten()[: shape.numel()]
    values = _scaled(values, scales + state["nested_offset"], state["blocksize"])
    return values.view(shape).to(getattr(torch, state["dtype"]))


def _scaled(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Each run of ``block_size`` values times its scale; the last run may be shorter."""
    blocks = pad(values, (0, -len(values) % block_size)).view(-1, block_size)
    return (blocks * scales[:, None]).flatten()[: len(values)]


def _code_pairs(code_book: Tensor) -> Tensor:
    """The two values of each byte, ``(256, 2)``: the high half comes first."""
    byte = torch.arange(256)
    return torch.stack((code_book[byte >> 4], code_book[byte & 0xF]), dim=1)


def _quantized_keys(keys: Mapping[str, Any]) -> set[str]:
    return {key.removesuffix(".quant_map") for key in keys if key.endswith(".weight.quant_map")}


def _is_statistic(key: str, packed: set[str]) -> bool:
    """True for what lies beside a packed weight, as ``q_proj.weight.absmax``."""
    weight, _, rest = key.partition(".weight.")
    return bool(rest) and f"{weight}.weight" in packed


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


# --- other people's noise -------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers and its libraries draw no progress bars and log errors only.

    bitsandbytes' import says through logging which optional kernels are missing, huggingface_hub
    reports each retry, transformers draws a bar over the weights of the smallest model.
    """
    libraries = [logging.getLogger(name) for name in ("bitsandbytes", "huggingface_hub")]
    levels = [library.level for library in libraries]
    transformers_logging: Any = transformers.logging  # half of it has no types
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    for library in libraries:
        library.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
