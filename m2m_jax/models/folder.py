"""Model folders in diffusers' layout: `config.json` beside `diffusion_pytorch_model.safetensors` (sharded index too).

Parameter names are diffusers' but for the leaf (`kernel`, `scale` here, `weight` there) and the three `RENAMED` paths;
convolutions are HWIO here and OIHW there, linear layers are transposed.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from m2m_jax.errors import UserError
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.parameters import Params
from m2m_jax.models.unet import UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
RENAMED = ((".to_out.", ".to_out.0."), (".ff.up.", ".ff.net.0.proj."), (".ff.down.", ".ff.net.2."))

# Fields of diffusers' config.json that bear another name here.
UNET_FIELDS = {"num_attention_heads": "attention_head_dim"}
# Fields of diffusers' U-Net that have one value here; another would be another network.
UNET_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
}


def load_unet_config(folder: str | Path, **overrides) -> UNetConfig:
    """The architecture that a U-Net folder describes; `overrides` replace fields that a folder does not hold."""
    values = _read_config(folder, "UNet2DConditionModel")
    levels = len(values.get("block_out_channels", UNetConfig.block_out_channels))
    heads = values.get("attention_head_dim", 8)  # diffusers' default; the number of heads, despite the name
    values["attention_head_dim"] = heads if isinstance(heads, list) else [heads] * levels
    values.setdefault("use_linear_projection", False)
    for name, value in UNET_FIXED.items():
        if values.get(name, value) != value:
            raise UserError(f"{folder}/config.json has {name}={values[name]!r}; only {value!r} is implemented")
    if not isinstance(values.get("transformer_layers_per_block", 1), int):
        raise UserError(f"{folder}/config.json has transformer_layers_per_block by level; one number is implemented")
    return _config_from(UNetConfig, values, UNET_FIELDS, overrides)


def load_autoencoder_config(folder: str | Path) -> AutoencoderConfig:
    """The architecture that an autoencoder folder describes."""
    return _config_from(AutoencoderConfig, _read_config(folder, "AutoencoderKL"), {}, {})


def save_unet(folder: str | Path, config: UNetConfig, params: Params, dtype=np.float32) -> None:
    """Writes a U-Net folder."""
    values = {UNET_FIELDS.get(k, k): v for k, v in dataclasses.asdict(config).items()}
    for runtime_choice in ("dtype", "attention_backend"):
        del values[runtime_choice]
    up = [kind.replace("Down", "Up") for kind in reversed(config.down_block_types)]
    _save(folder, {"_class_name": "UNet2DConditionModel", **values, "up_block_types": up}, params, dtype)


def save_autoencoder(folder: str | Path, config: AutoencoderConfig, params: Params, dtype=np.float32) -> None:
    """Writes an autoencoder folder."""
    levels = len(config.block_out_channels)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    _save(folder, {"_class_name": "AutoencoderKL", **dataclasses.asdict(config), **blocks}, params, dtype)


def load_params(folder: str | Path) -> Params:
    """All parameters of a folder under this project's names, as float32 NumPy arrays.

    Raises:
      UserError: no safetensors there, or damaged ones. Pickled weights are never opened.
    """
    folder = Path(folder)
    index = folder / f"{WEIGHTS}.index.json"
    files = [folder / WEIGHTS]
    if index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: it has no weight_map of file names") from error
        for file in files:
            if file.parent != folder or file.name == "..":
                raise UserError(f"{index} names {file}, which lies outside its folder")
    params = {}
    for file in files:
        if not file.is_file():
            pickled = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth")]
            remedy = f"; {pickled[0]} is pickled and is not opened: convert it to safetensors" if pickled else ""
            raise UserError(f"no weights at {file}{remedy}")
        try:
            with safe_open(file, framework="np") as tensors:
                for torch_name in tensors.keys():  # noqa: SIM118 (no mapping)
                    name, value = _from_torch(torch_name, tensors.get_tensor(torch_name))
                    params[name] = value
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}") from error
    return params


def require_same(folder: str | Path, expected: Params, found: Params) -> None:
    """Raises UserError listing every parameter that is missing, unexpected or of another shape."""
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name].shape}, should be {expected[name].shape}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{folder} does not hold this model: {'; '.join(sorted(problems))}")


def _read_config(folder: str | Path, class_name: str) -> dict:
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not a diffusers model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: {folder} is not a diffusers model folder")
    if values.get("_class_name", class_name) != class_name:
        raise UserError(f"{path} describes a {values['_class_name']}, not a {class_name}")
    return values


def _config_from(cls, values: dict, renamed: dict[str, str], overrides: dict):
    fields = {}
    for field in dataclasses.fields(cls):
        name = renamed.get(field.name, field.name)
        if name in values:
            value = values[name]
            fields[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**(fields | overrides))


def _save(folder: str | Path, values: dict, params: Params, dtype) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_to_torch(name, np.asarray(x).astype(dtype)) for name, x in params.items())
    # Written aside and renamed: a folder that can be opened is whole.
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _to_torch(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    stem, leaf = name.rsplit(".", 1)
    if leaf == "kernel":
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return f"{stem}.{'bias' if leaf == 'bias' else 'weight'}", np.ascontiguousarray(value)


def _from_torch(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    stem, leaf = name.rsplit(".", 1)
    if leaf == "weight":
        leaf = "scale" if value.ndim == 1 else "kernel"
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    name = f"{stem}.{leaf}"
    for ours, theirs in RENAMED:
        name = name.replace(theirs, ours)
    return name, np.ascontiguousarray(value, np.float32)
