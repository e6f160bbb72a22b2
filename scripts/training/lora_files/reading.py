"""The layers of a LoRA file, whatever the names of its tensors: kohya's, LyCORIS', diffusers' and PEFT's."""

import contextlib
import csv
import functools
import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import ModelError, SettingsError, abbreviated
from common.files import parse_json, read_file
from common.weights import StoredTensor, WeightsFile, read_header
from training.method.comfyui_modules import COMFYUI_MODULES
from training.models.sdxl import PREFIXES

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""torch's name of each type of safetensors that weights of a LoRA have."""

_SPELLINGS = {
    "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A", "_lora.down.weight", ".lora.down.weight"),
    "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B", "_lora.up.weight", ".lora.up.weight"),
    "mid": (".lora_mid.weight",),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight"),
    "diff": (".diff", ".w_norm"),
    "diff_b": (".diff_b", ".b_norm"),
}
_SPELLINGS["down"] += (".lora_linear_layer.down.weight",)
_SPELLINGS["up"] += (".lora_linear_layer.up.weight",)
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_ENDS = {end: part for part, ends in _SPELLINGS.items() for end in ends}
_ENDS |= {f".{part}": part for part in ("alpha", "dora_scale", *_LOHA, *_LOKR)}
"""How the name of a tensor ends -> what it is of its layer."""
_PART_OF_KEY = re.compile(f"(.+?)({'|'.join(sorted(map(re.escape, _ENDS), key=len, reverse=True))})")

_REQUIRED = {
    "LoRA": [{"up", "down"}],
    "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "LoKr": [{first, *second} for first in ("lokr_w1", "lokr_w1_a") for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))],
    "full": [{"diff"}, {"diff_b"}],
}
"""Kind of a layer -> the sets of parts, one of which it must have."""

_OF_UNET = re.compile(r"(?:(?:base_model\.model|unet|(?:model\.)?diffusion_model)\.)*(?:lora_unet_|lycoris_)?")
_OF_TEXT_ENCODER = {
    "te1": re.compile(r"text_encoder\.|text_encoders\.clip_l\.transformer\.|lora_te1?_"),
    "te2": re.compile(r"text_encoder_2\.|text_encoders\.clip_g\.transformer\.|lora_te2_"),
}
"""How the name of a layer begins."""

_OTHER_MODELS = (
    (r"double_blocks|single_transformer_blocks|single_blocks", "Flux"),
    (r"joint_blocks|transformer_blocks_\d+_attn_add|context_embedder", "Stable Diffusion 3"),
    (r"down_blocks_0_attentions|input_blocks_1_1_", "Stable Diffusion 1.x or 2.x"),
)
"""Names that layers of other models have."""
_MOST_CHARACTERS = 300
"""Of the name of a tensor."""
_MOST_UNKNOWN = 0.1
"""A file in which a greater share of the layers is not SDXL's is a LoRA of another model, some of whose names are the same."""


_MOST_SCALE = 1e6
"""alpha / rank; usual are 0.1 to 16."""
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_REPEATED = re.compile(r"(?<!\\)[.\]][*+{]|\\[wWSD][*+{]"), 3
"""Repetitions of any character in an expression, and at most how many: each of them may multiply the time that a match takes by
the length of the name. That of repeated groups has no limit."""
_CHOICES = re.compile(r"[?|]"), 16
"""Each of them may double it."""


@dataclass(frozen=True)
class Layer:
    """What a LoRA file changes in one layer of the model."""

    name: str
    """The name of the module in kohya's files of SDXL, or as the file has it if SDXL has no such layer."""
    path: Path
    parts: dict[str, StoredTensor]
    """Its tensors: `up`, `down`, `alpha`, `hada_w1_a`, ..."""
    keys: dict[str, str]
    """Their names in the file."""
    configured_scale: float | None = None
    """alpha / rank, from the configuration of a PEFT adapter."""

    @property
    def kind(self) -> str:
        """LoRA, LoHa, LoKr or full (the difference itself). Raises ModelError if tensors are missing."""
        kind = "LoRA" if self.parts.keys() & {"up", "down"} else "LoHa" if self.parts.keys() & set(_LOHA) else "LoKr"
        if kind == "LoKr" and not self.parts.keys() & set(_LOKR):
            kind = "full"
        if not any(required <= self.parts.keys() for required in _REQUIRED[kind]):
            missing = sorted(min((required - self.parts.keys() for required in _REQUIRED[kind]), key=len))
            raise ModelError(f"{self.path}: is damaged: the layer {self.name} lacks {', '.join(missing)}: download it again")
        return kind

    @property
    def is_dora(self) -> bool:
        """Whether the norms of the rows or columns are set, too."""
        return bool(self.parts.keys() & {"dora_scale", "magnitude"})

    def read(self, parts: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """Its tensors, or those of `parts`, in fp32. Raises ModelError if one is not finite."""
        tensors = {}
        for part, stored in self.parts.items():
            if not parts or part in parts:
                tensors[part] = read_tensor(self.path, stored).float()
                if not tensors[part].isfinite().all():
                    raise ModelError(
                        f"{self.path}: {self.keys[part]} holds NaN or infinity: the file is damaged, or training failed"
                    )
        return tensors

    def shapes(self) -> dict[str, torch.Tensor]:
        """Its tensors without their values, on the meta device, except alpha, which is read."""
        shapes = {part: torch.empty(stored.shape, device="meta") for part, stored in self.parts.items()}
        return shapes | (self.read(["alpha"]) if "alpha" in self.parts else {})


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, and the layers that it changes."""

    header: WeightsFile
    layers: dict[str, Layer]
    """By name, in the order of the file."""
    others: list[str]
    """Names of tensors that are not of a layer: embeddings in the same file, or kinds that are not known here."""

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def dtypes(self) -> list[str]:
        """The types of the weights, without alpha's, the most frequent first."""
        found = [stored.dtype for layer in self.layers.values() for part, stored in layer.parts.items() if part != "alpha"]
        return sorted(set(found), key=found.count, reverse=True)


def read_lora(path: Path) -> LoraFile:
    """The LoRA file at `path`, by its header. Raises SettingsError if there is none, ModelError if it is damaged or another kind of
    file."""
    if not path.exists():
        raise SettingsError(f"{path}: no such file")
    try:
        header = read_header(path)
    except PermissionError:
        raise ModelError(f"{path}: this user may not read it: change its permissions") from None
    parts: dict[str, dict[str, str]] = {}
    spelled: dict[str, str] = {}
    others = []
    for key in sorted(header.tensors, key=lambda key: header.tensors[key].begin):
        match = _PART_OF_KEY.fullmatch(key)
        if len(key) > _MOST_CHARACTERS or not key.isprintable():
            raise ModelError(f"{path}: has a tensor called {key[:40]!r}..., as no LoRA file has: download it again")
        if match is None:
            others.append(key)
            continue
        name, part = layer_name(match[1]), _ENDS[match[2]]
        if part in parts.setdefault(name, {}):
            raise ModelError(f"{path}: holds the same layer twice, as {parts[name][part]} and {key}: use another file")
        parts[name][part] = key
        spelled.setdefault(name, match[1])
    parts = {name: keys for name, keys in parts.items() if keys.keys() != {"alpha"}}
    if not parts:
        raise ModelError(f"{path}: {_other_file(header)}")
    for alpha in (keys["alpha"] for keys in parts.values() if "alpha" in keys):
        if math.prod(header.tensors[alpha].shape) != 1:
            raise ModelError(f"{path}: is damaged: {alpha} is not one number: download it again")
    if unusable := [key for keys in parts.values() for key in keys.values() if header.tensors[key].dtype not in DTYPES]:
        raise ModelError(f"{path}: {unusable[0]} has the type {header.tensors[unusable[0]].dtype}, which no LoRA file has")
    scale = _configured_scale(path, header.metadata)
    layers = {}
    for name, keys in parts.items():
        stored = {part: header.tensors[key] for part, key in keys.items()}
        layers[name] = Layer(name, path, stored, keys, None if "alpha" in keys else scale(spelled[name]))
    return LoraFile(header, layers, others)


def layer_name(spelled: str) -> str:
    """kohya's name of the layer of SDXL that a file calls `spelled`; `spelled` itself if there is none."""
    for part, pattern in _OF_TEXT_ENCODER.items():
        if match := pattern.match(spelled):
            inner = spelled[match.end() :].replace(".", "_")
            inner = f"text_model_{inner}" if inner.startswith("encoder_") else inner  # CLIPTextModel of transformers 5.6
            return _kohya_names().get(f"lora_{part}_{inner}", spelled)
    rest = spelled[_OF_UNET.match(spelled).end() :].replace(".processor.", ".")
    rest = f"{rest}.0" if rest.endswith(".to_out") else rest
    return _kohya_names().get(rest.replace(".", "_"), spelled)


@functools.cache
def _kohya_names() -> dict[str, str]:
    """kohya's names of SDXL's layers: of the UNet's by their original and by diffusers' names, with underscores for dots."""
    names = {}
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kohya = row["kohya_module"]
            names |= {kohya.removeprefix("lora_unet_"): kohya, row["diffusers_module"].replace(".", "_"): kohya}
    return names


def usable_layers(file: LoraFile, known: Collection[str]) -> dict[str, Layer]:
    """The layers that are among the `known` ones; a line is printed for what is left out.

    Raises ModelError if it is not a LoRA of SDXL, or holds tensors of a kind that cannot be computed here.
    """
    embedded = [key for key in file.others if key.startswith("bundle_emb.")]
    if unknown := [key for key in file.others if key not in embedded]:
        raise ModelError(f"{file.path}: holds tensors of a kind that is not supported: {abbreviated(unknown, 3)}")
    layers = {name: layer for name, layer in file.layers.items() if name in known}
    left_out = [name for name in file.layers if name not in layers]
    if len(left_out) > _MOST_UNKNOWN * len(file.layers):
        text = " ".join(left_out).replace(".", "_")
        other = next((name for pattern, name in _OTHER_MODELS if re.search(pattern, text)), "another model")
        raise ModelError(
            f"{file.path}: is a LoRA of {other}, not of SDXL: {len(left_out)} of its {len(file.layers)} layers are unknown "
            f"({abbreviated(left_out, 2)})"
        )
    if embedded or left_out:
        print(f"{file.path.name}: left out: {abbreviated([*left_out, *embedded])}", flush=True)
    for layer in layers.values():
        _ = layer.kind  # raises if tensors are missing
    return layers


def read_tensor(path: Path, stored: StoredTensor) -> torch.Tensor:
    """One tensor of a `.safetensors` file, in memory of its own."""
    with path.open("rb") as file:
        file.seek(stored.begin)
        content = bytearray(file.read(stored.end - stored.begin))
    if len(content) < stored.end - stored.begin:
        raise ModelError(f"{path}: became shorter while it was read: run the command again when it is complete")
    flat = torch.frombuffer(content, dtype=DTYPES[stored.dtype]) if content else torch.empty(0, dtype=DTYPES[stored.dtype])
    return flat.view(stored.shape)


def _other_file(header: WeightsFile) -> str:
    """What a file without layers of a LoRA is."""
    names = header.tensors
    if any(key.startswith(PREFIXES["unet"]) for key in names):
        return "is a checkpoint, not a LoRA file"
    if any(key in ("emb_params", "clip_l", "clip_g") or key.startswith("string_to_param") for key in names):
        return "is a textual inversion embedding, not a LoRA file"
    if any(re.search(r"oft_|\.a1\.weight|\.on_input", key) for key in names):
        return f"holds an adapter of a kind that is not supported ({next(iter(names))})"
    return "is not a LoRA file: no tensor has the name of a LoRA's"


def _configured_scale(path: Path, metadata: Mapping[str, str]):
    """A function (name of a layer in the file) -> alpha / rank by the configuration of a PEFT adapter, or None without one.

    diffusers has it in the metadata of the file, PEFT in adapter_config.json beside it.
    """
    configs: dict[str, dict[str, Any]] = {}
    if "lora_adapter_metadata" in metadata:
        try:
            flat = json.loads(metadata["lora_adapter_metadata"])
            for key, value in flat.items():
                part, _, name = key.partition(".")
                configs.setdefault(part, {})[name] = value
        except (ValueError, AttributeError, RecursionError):
            raise ModelError(f"{path}: its lora_adapter_metadata is damaged: download it again") from None
    elif path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file():
        try:
            configs[""] = dict(parse_json(read_file(path.parent / "adapter_config.json")))
        except (ValueError, TypeError):
            raise ModelError(f"{path.parent / 'adapter_config.json'}: is damaged: download it again") from None

    patterns = {
        (part, kind): _compiled(path, config.get(kind))
        for part, config in configs.items()
        for kind in ("alpha_pattern", "rank_pattern")
    }

    def scale(spelled: str) -> float | None:
        part = spelled.partition(".")[0]
        part = part if part in configs else ""
        if part not in configs:
            return None
        config, inner = configs[part], spelled.removeprefix("base_model.model.")
        usual = {"alpha_pattern": config.get("lora_alpha", config.get("alpha")), "rank_pattern": config.get("r")}
        alpha, rank = (
            next((value for pattern, value in patterns[part, kind] if pattern.match(inner)), default)
            for kind, default in usual.items()
        )
        if not all(isinstance(number, (int, float)) and number > 0 for number in (alpha, rank)):
            return None
        try:
            found = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        except (OverflowError, ZeroDivisionError):
            found = math.inf
        if not found <= _MOST_SCALE:
            raise ModelError(f"{path}: the alpha of {spelled} is out of all proportion to its rank: download it again")
        return found

    return scale


def _compiled(path: Path, pattern: Any) -> list[tuple[re.Pattern[str], Any]]:
    """The expressions of PEFT's `alpha_pattern` or `rank_pattern`, which it compares with the end of a layer's name, and their
    values. One that is not an expression matches no layer. Raises ModelError for one that may take forever."""
    compiled = []
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        if _REPEATED_GROUP.search(key) or any(len(part.findall(key)) > most for part, most in (_REPEATED, _CHOICES)):
            raise ModelError(
                f"{path}: its configuration has the expression {key[:40]!r}, which no PEFT adapter needs: download it again"
            )
        with contextlib.suppress(re.error, OverflowError, RecursionError), warnings.catch_warnings(action="ignore"):
            compiled.append((re.compile(rf"(.*\.)?({key})$"), value))
    return compiled
