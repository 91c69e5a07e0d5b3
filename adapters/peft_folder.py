"""Adapters from and to PEFT: the folder that its ``save_pretrained`` writes for IA3.

``adapter_model.safetensors`` holds one tensor per scaled module,
``base_model.model.<module>.ia3_l``: ``(out_features, 1)`` where PEFT scales the output,
``(1, in_features)`` where it scales the input of a feed-forward module (PEFT,
``tuners/ia3/layer.py``). ``adapter_config.json`` names the modules. PEFT itself is not needed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from re import escape
from reprlib import repr as short
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedia3.adapters.adapter import Adapter, Vector
from fedia3.adapters.encoding import require_keys, require_scales
from fedia3.adapters.manifest import Manifest
from fedia3.adapters.safetensors_header import (
    PEFT_FILES,
    Header,
    Limits,
    checked_header,
    file_bytes,
    tensor_values,
)
from fedia3.adapters.schema import Schema, Target
from fedia3.errors import BadAdapter, BadInput, BadSetting, StorageFailed, WrongBaseModel

TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]

CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
CARD = "README.md"  # PEFT's save_pretrained leaves a model card
PREFIX = "base_model.model."
SUFFIX = ".ia3_l"
BASE_DIGEST = "fedia3.base"  # our own line in the metadata; PEFT passes over it


@dataclass(frozen=True)
class ScaledModule:
    """One module as PEFT scales it: all of its output, or all of its input."""

    name: str
    targets: tuple[Target, ...]  # several where keys and values share the projection

    @property
    def key(self) -> str:
        """The tensor's name in PEFT's file."""
        return f"{PREFIX}{self.name}{SUFFIX}"

    @property
    def shape(self) -> tuple[int, int]:
        """``(1, in_features)`` for feed-forward, else ``(out_features, 1)``."""
        first = self.targets[0]
        if first.kind == "ff":
            return 1, first.dim
        return (first.part.total if first.part else first.dim), 1

    def positions(self, target: Target) -> NDArray[np.int64]:
        """Where a target's scales lie in the module's tensor, shape ``(dim,)``."""
        return target.part.positions() if target.part else np.arange(target.dim)


def task_type_of(architecture: str) -> TaskType:
    """What a transformers class is for, in PEFT's words.

    Raises:
        BadSetting: it is for something else (images, masked words …).
    """
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if architecture.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    if architecture.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    raise BadSetting(
        f"expected a causal, sequence-to-sequence or classification model, got {architecture}"
    )


def write_peft_folder_for(
    base: Manifest,
    adapter: Adapter,
    folder: Path,
    *,
    base_name: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """:func:`write_peft_folder` for an adapter of this base model.

    Raises:
        BadSetting: the base is no language model and no classifier.
        BadInput, BadAdapter, StorageFailed: as there.
    """
    architecture = base.created_from.architecture
    write_peft_folder(
        adapter,
        folder,
        base_name=base_name,
        task_type=task_type_of(architecture),
        fan_in_fan_out=architecture.startswith("GPT2"),  # its projections are Conv1D
        notes=notes,
    )


def write_peft_folder(
    adapter: Adapter,
    folder: Path,
    *,
    base_name: str,
    task_type: TaskType,
    fan_in_fan_out: bool = False,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write what ``peft.PeftModel.from_pretrained(base, folder)`` loads, replacing an older export.

    ``base_name`` is the base model's path or hub name, for the config. ``fan_in_fan_out`` is true
    where the projections are transformers' ``Conv1D`` (GPT-2). Where keys and values share a
    projection with queries, the queries' scales are ones. ``notes`` are lines of our own in the
    metadata, which PEFT passes over.

    Raises:
        BadInput: the folder holds other things than a PEFT adapter, or the notes are too long.
        BadAdapter: a module would need two vectors, which PEFT cannot say, or the values are
            such that no reader would take them.
        StorageFailed: the folder cannot be made or written.
    """
    modules = _scaled_modules(adapter.schema)
    require_scales(adapter.vector)
    config = _config(modules, base_name, task_type, fan_in_fan_out)
    tensors = [(module.key, _peft_tensor(module, adapter)) for module in modules]
    metadata = {**(notes or {}), "format": "pt", BASE_DIGEST: adapter.schema.base_digest}
    if (size := len(json.dumps(metadata))) > PEFT_FILES.max_metadata_bytes:
        raise BadInput(f"notes take {size} bytes, readers take {PEFT_FILES.max_metadata_bytes}")
    try:
        _require_ours(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The config last: without it, what a crash leaves behind does not load.
        _replace(folder / MODEL, file_bytes(tensors, metadata))
        _replace(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    except OSError as error:
        raise StorageFailed(
            f"cannot write an adapter to {folder}: {error.strerror}; choose another folder or make "
            "room"
        ) from error


def read_peft_folder(
    folder: Path, schema: Schema, *, without_head: bool = False, limits: Limits = PEFT_FILES
) -> Adapter:
    """The adapter in a folder that PEFT's ``save_pretrained`` or :func:`write_peft_folder` wrote.

    PEFT saves a classifier's trained head (``modules_to_save``) beside the scales. An adapter has
    no place for it: ``without_head`` reads the scales and leaves the head behind.

    Raises:
        BadAdapter: the folder is no IA3 adapter, scales other modules than the schema, scales
            queries, holds a head, or its values are such that no training gives them.
        WrongBaseModel: we exported it, for another base model.
    """
    config = _read_config(folder, limits)
    data = _read_file(folder / MODEL, limits)
    header = checked_header(data, limits)
    base_digest = header.metadata.get(BASE_DIGEST, schema.base_digest)
    if base_digest != schema.base_digest:
        raise WrongBaseModel(
            f"{folder} is for base model {short(base_digest)}, expected "
            f"{short(schema.base_digest)}; train it anew on the base you run"
        )
    modules = _scaled_modules(schema)
    require_keys(_scale_keys(header, config, without_head), [module.key for module in modules])
    vector = np.ones(schema.n_params, dtype=np.float32)
    for module in modules:
        scales = _module_scales(module, data, header)
        for target in module.targets:
            vector[schema.slices[target.key]] = scales[module.positions(target)]
    return Adapter(schema, require_scales(vector))


def peft_notes(folder: Path, limits: Limits = PEFT_FILES) -> Mapping[str, str]:
    """The metadata of a folder's file, ``notes`` of :func:`write_peft_folder` among them.

    Raises:
        BadAdapter: there is no well-formed file.
    """
    return checked_header(_read_file(folder / MODEL, limits), limits).metadata


def _scaled_modules(schema: Schema) -> tuple[ScaledModule, ...]:
    """The schema's targets by module, in name order."""
    by_name = sorted(schema.targets, key=lambda target: target.name)
    modules = tuple(
        ScaledModule(name, tuple(targets))
        for name, targets in groupby(by_name, key=lambda target: target.name)
    )
    for module in modules:
        if len(module.targets) > 1 and not all(target.part for target in module.targets):
            raise BadAdapter(f"{module.name}: PEFT scales a module once, the schema twice")
    return modules


def _peft_tensor(module: ScaledModule, adapter: Adapter) -> Vector:
    """The module's whole vector; positions of no target stay at one."""
    scales = np.ones(max(module.shape), dtype=np.float32)
    for target in module.targets:
        scales[module.positions(target)] = adapter.scales(target.key)
    return scales.reshape(module.shape)


def _module_scales(module: ScaledModule, data: bytes, header: Header) -> Vector:
    """The module's flat vector from PEFT's file, once its shape and its queries are as expected."""
    entry = header.tensors[module.key]
    if entry.shape != module.shape:
        raise BadAdapter(
            f"{module.key}: expected shape {module.shape}, got {entry.shape}; feed-forward modules "
            "are (1, in_features), keys and values (out_features, 1)"
        )
    scales = tensor_values(data, entry)
    others = np.ones(scales.size, dtype=bool)
    for target in module.targets:
        others[module.positions(target)] = False
    if (scales[others] != 1).any():
        raise BadAdapter(
            f"{module.name}: expected ones outside of keys and values, got other scales: PEFT "
            "trained the queries of this fused projection too, and an adapter cannot hold them"
        )
    return scales


def _config(
    modules: Iterable[ScaledModule], base_name: str, task_type: TaskType, fan_in_fan_out: bool
) -> dict[str, Any]:
    """``peft.IA3Config`` as JSON.

    Modules are given as patterns of whole names. PEFT would match a list of names by their ends,
    and feed-forward ones even within a word, so that a module outside the schema could be caught.
    """
    # Told that it is a classifier, PEFT demands a trained head in the folder. Our head is the base
    # model's, untouched; without a task type PEFT leaves it in place.
    told_task = None if task_type == "SEQ_CLS" else task_type
    feedforward = [module.name for module in modules if module.targets[0].kind == "ff"]
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "feedforward_modules": _whole_names(feedforward),
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "revision": None,
        "target_modules": _whole_names(module.name for module in modules),
        "task_type": told_task,
    }


def _whole_names(names: Iterable[str]) -> str:
    return "|".join(escape(name) for name in names)


def _read_config(folder: Path, limits: Limits) -> Mapping[str, Any]:
    try:
        config = json.loads(_read_file(folder / CONFIG, limits))
    except (ValueError, RecursionError) as error:
        raise BadAdapter(f"{folder / CONFIG} is not JSON: {short(str(error))}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "IA3":
        got = config.get("peft_type") if isinstance(config, dict) else config
        raise BadAdapter(f"{folder / CONFIG}: expected peft_type IA3, got {short(got)}")
    return config


def _scale_keys(header: Header, config: Mapping[str, Any], without_head: bool) -> list[str]:
    """The file's tensors without the trained head, if it may be left behind."""
    heads = config.get("modules_to_save")
    heads = heads if isinstance(heads, list) else []
    head = {key for key in header.tensors if any(f".{name}." in key for name in heads)}
    if head and not without_head:
        raise BadAdapter(
            f"the folder holds a trained head ({', '.join(sorted(head))}), an adapter holds scales "
            "only; read it without_head and keep the head with the base model"
        )
    return [key for key in header.tensors if key not in head]


def _read_file(path: Path, limits: Limits) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise BadAdapter(
            f"cannot read {path} ({error.strerror}); expected the folder that PEFT's "
            "save_pretrained writes, with safetensors"
        ) from error
    if len(data) > limits.max_bytes:
        raise BadAdapter(f"{path}: expected at most {limits.max_bytes} bytes")
    return data


def _require_ours(folder: Path) -> None:
    """Refuse to mix an export into a folder that serves something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder} is a file; name a new or empty folder")
    known = {CONFIG, MODEL, CARD, _draft(folder / CONFIG).name, _draft(folder / MODEL).name}
    others = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if others:
        raise BadInput(
            f"{folder} holds other things than a PEFT adapter ({', '.join(others[:3])}); "
            "name a new or empty folder"
        )


def _replace(path: Path, data: bytes) -> None:
    """Write so that a reader sees the old file or the new one, never a part."""
    _draft(path).write_bytes(data)
    _draft(path).replace(path)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
