"""What is fuzzed: each target takes something damaged and returns what it made of it, or raises UserError.

Anything else that it raises, and every broken promise that it finds (`assert`), is a bug.
"""

import dataclasses
import functools
import io
import json
import pathlib
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from caption_fixtures import SUFFIXES, write_captions
from flax import nnx
from fuzz_mutations import CHANGES, JSON_CHANGES, damaged, damaged_json, image_seeds, mended_png
from hypothesis import strategies as st
from mis_fixtures import set_name, write_mis
from model_fixtures import random_params
from program_fixtures import CALL, PLACES, arithmetic, composite, custom_call, infeed, nested, write_program
from run_fixtures import ROOT, make_autoencoder
from safetensors.numpy import load_file
from torch_fixtures import write_legacy

from m2m_jax import config_flag
from m2m_jax.building.caption_rules import CaptionRules
from m2m_jax.building.captions import clean_captions, read_captions
from m2m_jax.building.torch_legacy import read_legacy_torch
from m2m_jax.checkpoints.saved_model import SavedModel
from m2m_jax.config_fields import fields_of, flatten, groups_in
from m2m_jax.config_rules import validate
from m2m_jax.configuration import default_config, from_json, to_json
from m2m_jax.core import program
from m2m_jax.core.errors import UserError
from m2m_jax.core.images import check_header, read_image, write_png
from m2m_jax.core.parameters import abstract
from m2m_jax.data import mis, pipeline, precomputed, records
from m2m_jax.data.emoji import iconify, naming
from m2m_jax.data.sources.mis import MisRecords
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models import diffusers_folder, transformers_folder
from m2m_jax.models.clip_image import CLIP, CLIPImageConfig
from m2m_jax.models.clip_text import CLIPTextConfig
from m2m_jax.models.dinov2 import DINOv2, DINOv2Config
from m2m_jax.models.efficientnet import EfficientNetConfig, EfficientNetLite, load_efficientnet, save_efficientnet
from m2m_jax.models.folder import require_same, save_folder
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.sampling.bundle import MANIFEST, Bundle, _load, program_file, write_manifest
from m2m_jax.sampling.bundle_writer import write_bundle
from m2m_jax.sampling.sampler import Sampler
from m2m_jax.sampling.settings import SamplingSettings


@dataclasses.dataclass(frozen=True)
class Target:
    """What is damaged, how, and what is then done with it.

    Attributes:
      prepare: (folder) -> what is damaged, made once.
      run: (what was prepared, an empty folder of its own, an example of `strategy`).
      few, many: mutations in the test suite, and of `make fuzz`.
      slow: seconds of processors' time for one mutation; more is a hang.
    """

    strategy: st.SearchStrategy
    prepare: Callable[[pathlib.Path], Any]
    run: Callable[[Any, pathlib.Path, Any], object]
    few: int
    many: int
    slow: float = 10.0


# Image files


def _read(seeds, folder: pathlib.Path, example):
    which, changes, mend = example
    names = [name for name in seeds if name.startswith("PNG")] if mend else list(seeds)
    data = damaged(seeds[names[which % len(names)]], changes)
    file, copy = folder / "image", folder / "copy.png"
    file.write_bytes(mended_png(data) if mend else data)
    try:
        pixels = read_image(file, 16)
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
        check_header(file)  # what can be read passes the check at the start
        write_png(copy, pixels)
        np.testing.assert_array_equal(read_image(copy, 16), pixels)
    finally:
        assert {path.name for path in folder.iterdir()} <= {"image", "copy.png"}


_WHICH = st.integers(0, 1000)
IMAGES = Target(st.tuples(_WHICH, CHANGES, st.just(False)), lambda folder: image_seeds(), _read, 150, 3000)
PNGS = Target(st.tuples(_WHICH, CHANGES, st.just(True)), lambda folder: image_seeds(), _read, 100, 1500)


# Caption files


def _captions(folder: pathlib.Path) -> list[pathlib.Path]:
    captions = ["a cat", "a dog, running", "Käse \u2028 北京", "", "a cat", "x" * 300]
    return [write_captions(folder / f"captions{suffix}", captions) for suffix in SUFFIXES]


def _read_captions(files: list[pathlib.Path], folder: pathlib.Path, example):
    which, changes = example
    file = files[which % len(files)]
    copy = folder / file.name
    copy.write_bytes(damaged(file.read_bytes(), changes))
    captions = list(read_captions(copy))
    kept, dropped = clean_captions(captions, CaptionRules(min_latin_share=0.2))
    assert len(kept) + dropped.total() == len(captions)
    assert not any("\0" in caption or "\n" in caption for _, caption in kept)
    json.dumps([kept, dropped]).encode()


CAPTIONS = Target(st.tuples(_WHICH, CHANGES), _captions, _read_captions, 60, 5000)


# Records


def _records(number: int) -> list[records.ImageSetRecord]:
    pngs = [data for name, data in image_seeds().items() if name.startswith("PNG")]
    latents = np.arange(2 * 4 * 4 * 4, dtype=np.float32).reshape(2, 4, 4, 4)
    return [
        records.ImageSetRecord(f"set{i}", "folder", "a caption", (pngs[i % 5], pngs[0]), ("a", "b"), latents + i)
        for i in range(number)
    ]


def _manifest(number: int) -> precomputed.Manifest:
    return precomputed.Manifest(
        version=precomputed.VERSION,
        image_size=16,
        autoencoder={"config": {}, "sha256": "0"},
        latent_shape=[4, 4, 4],
        latent_dtype="float32",
        has_images=True,
        records_per_shard=number,
        kinds=["folder"] * number,
        num_images=[2] * number,
        made_from="nothing",
        command="COMMAND",
    )


def _write_split(folder: pathlib.Path, number: int) -> pathlib.Path:
    precomputed.write_manifest(folder, "train", _manifest(number))
    shard = precomputed.shard_path(folder, "train", 0, 1)
    precomputed.write_shard(shard, _records(number))
    return shard


def _use(source, index: int) -> records.ImageSetRecord:
    """A record, after everything that training asks of one."""
    record = source[index]
    config = default_config().data
    config.images_per_set, config.image_size, config.name = 2, 16, "folder"
    examples = pipeline.SetExamples(source, config, split="train", seed=0, augment=True)
    images = [examples._fetch.image(index, image) for image in range(len(record.images))]
    assert all(image.shape == (16, 16, 4) for image in images)
    assert record.latents.shape == (2, 4, 4, 4) and np.isfinite(record.latents).all()
    return record


def _read_example(serialized: list[bytes], folder: pathlib.Path, changes):
    """One damaged record between two good ones, behind valid checksums."""
    precomputed.write_manifest(folder, "train", _manifest(3))
    writer = ArrayRecordWriter(str(precomputed.shard_path(folder, "train", 0, 1)), "group_size:1")
    for data in (serialized[0], damaged(serialized[1], changes), serialized[2]):
        writer.write(data)
    writer.close()
    source = precomputed.PrecomputedRecords(str(folder), "train", 16)
    assert (source[0].set_id, source[2].set_id) == ("set0", "set2")
    _use(source, 1)


EXAMPLES = Target(
    CHANGES, lambda folder: [precomputed.serialize(record) for record in _records(3)], _read_example, 60, 2000
)


_TEXTS = st.binary(max_size=8) | st.just("text") | st.integers()
_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "set_id": _TEXTS,
        "kind": _TEXTS,
        "caption": _TEXTS,
        "images": st.lists(st.binary(max_size=4), max_size=30) | _TEXTS | st.none(),
        "image_captions": st.lists(st.binary(max_size=4), max_size=3) | _TEXTS | st.none(),
        "latents": st.binary(max_size=64) | st.just(bytes(16)) | st.just(b"\xff" * 16) | st.none(),
        "latents_dtype": st.sampled_from([b"", b"float32", b"float16", b"float64", b"object", b"|O", b"\xff"]) | _TEXTS,
        "latents_shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**62]) | st.integers(), max_size=5)
        | st.just([1, 1, 1, 4])
        | st.none(),
    },
)


def _decode(good: dict, folder: pathlib.Path, fields):
    record = records.decode_record(good | fields, origin="somewhere")
    assert record.num_images > 0
    assert record.latents is None or record.latents.ndim == 4


def _good_example(folder):
    (record,) = _records(1)
    example = records.encode_record(record)
    return records.features().deserialize_example_np(records.features().serialize_example(example))


FIELDS = Target(_FIELDS, _good_example, _decode, 100, 1000)


def _read_shard(whole: bytes, folder: pathlib.Path, changes):
    """A record of a damaged file is the record that was written, or an error."""
    precomputed.write_manifest(folder, "train", _manifest(8))
    precomputed.shard_path(folder, "train", 0, 1).write_bytes(damaged(whole, changes))
    source, refused = precomputed.PrecomputedRecords(str(folder), "train", 16, strict=False), None
    for index, expected in enumerate(_records(8)):
        try:
            record = source[index]
        except UserError as error:
            refused = error
        else:
            assert record.set_id == expected.set_id and record.images == expected.images
            np.testing.assert_array_equal(record.latents, expected.latents)
    if refused:
        raise refused


SHARDS = Target(CHANGES, lambda folder: _write_split(folder, 8).read_bytes(), _read_shard, 60, 1000)


def _read_manifest(prepared, folder: pathlib.Path, changes):
    text = json.dumps(damaged_json(dataclasses.asdict(_manifest(3)), changes)) if _is_tree(changes) else None
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    path = precomputed.manifest_path(folder, "train")
    path.write_bytes(text.encode() if text else damaged(path.read_bytes(), changes))
    source = precomputed.PrecomputedRecords(str(folder), "train", 16)
    for index in range(len(source.kinds)):
        _use(source, index)


def _is_tree(changes) -> bool:
    return isinstance(changes[0][0], int)


def _split_in(folder):
    _write_split(folder, 3)
    return folder


MANIFESTS = Target(JSON_CHANGES | CHANGES, _split_in, _read_manifest, 40, 600)


def _read_mis_manifest(prepared, folder: pathlib.Path, changes):
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    path = mis.folder(folder) / mis.MANIFEST
    data = path.read_bytes()
    text = json.dumps(damaged_json(json.loads(data), changes)).encode() if _is_tree(changes) else damaged(data, changes)
    path.write_bytes(text)
    source = MisRecords(str(folder), "train", latents=None, image_size=None)
    for index in range(len(source.kinds)):
        assert source[index].set_id == set_name("train", index)


def _mis_in(folder):
    return write_mis(folder, captions={"train": 3}, images_per_set=2, sets_per_shard=2)


MIS_MANIFESTS = Target(JSON_CHANGES | CHANGES, _mis_in, _read_mis_manifest, 40, 2000)


SMALL_UNET = UNetConfig(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    layers_per_block=1,
    num_attention_heads=(1,),
    norm_num_groups=4,
)


# Bundles


def _small_sampler(folder: pathlib.Path) -> Sampler:
    vae = make_autoencoder(folder / "vae")
    models = FrozenModels(diffusers_folder.load_autoencoder_config(vae))
    return Sampler(
        unet_config=SMALL_UNET,
        unet_params=_params(UNet, SMALL_UNET),
        models=models,
        frozen={"autoencoder": diffusers_folder.load_params(vae)},
        schedule=NoiseSchedule.from_config(vars(default_config().schedule)),
        settings=SamplingSettings(steps=1, cache_size=2),
        clean_timestep=0,
        image_size=8,
    )


def _small_bundle(folder: pathlib.Path) -> pathlib.Path:
    bundle = folder / "bundle"
    bundle.mkdir()
    write_bundle(_small_sampler(folder), bundle)
    return bundle


def _open_bundle(bundle: pathlib.Path, folder: pathlib.Path, example):
    """how: "bytes" of any file; the "manifest" as a tree; a file whose hash in the manifest is made right."""
    how, which, changes, tree_changes = example
    copy = folder / "bundle"
    shutil.copytree(bundle, copy, copy_function=_link)
    names = sorted(path.name for path in bundle.iterdir())
    name = MANIFEST if how == "manifest" else names[which % len(names)]
    data = (bundle / name).read_bytes()
    (copy / name).unlink()
    if how == "manifest":
        (copy / name).write_text(json.dumps(damaged_json(json.loads(data), tree_changes)))
    else:
        (copy / name).write_bytes(damaged(data, changes))
    if how == "signed" and name != MANIFEST:
        fields = json.loads((bundle / MANIFEST).read_text())
        (copy / MANIFEST).unlink()
        write_manifest(copy, {k: v for k, v in fields.items() if k not in ("format", "jax", "files")})
    opened = Bundle(copy)
    if how == "signed":
        opened.sample_sets([np.zeros((1, 8, 8, 3), np.uint8)], 1, np.array([1]))


def _link(source, target):
    pathlib.Path(target).hardlink_to(source)


_BUNDLES = st.tuples(st.sampled_from(["bytes", "manifest", "manifest"]), _WHICH, CHANGES, JSON_CHANGES)
BUNDLES = Target(_BUNDLES, _small_bundle, _open_bundle, 30, 800)
SIGNED = Target(st.tuples(st.just("signed"), _WHICH, CHANGES, JSON_CHANGES), _small_bundle, _open_bundle, 4, 200, 120.0)


# What a forger may write: any call, anywhere, with any fields; and arithmetic, which is read.
_TARGETS = st.sampled_from(
    [
        "xla_ffi_python_cpu_callback",
        "xla_buffer_python_cpu_callback",
        "shape_assertion",
        "lapack_sgetrf_ffi",
        "Sharding",
    ]
) | st.from_regex(r"[A-Za-z_$.]{1,20}", fullmatch=True)
_CALL_FIELDS = st.sampled_from(
    [
        "api_version = 2 : i32",
        "api_version = 4 : i32, backend_config = {index = 1234567 : ui64}",
        'api_version = 1 : i32, backend_config = "1234567", has_side_effect = true',
        "api_version = 4 : i32, called_computations = [@main]",
    ]
)
_OPERATIONS = st.one_of(
    st.builds(custom_call, _TARGETS, _CALL_FIELDS),
    st.builds(composite, st.sampled_from(["chlo.erf", "chlo.top_k", "xla.gpu.triton", "a.b"])),
    st.builds(arithmetic, st.sampled_from(["", 'mhlo.sharding = "{replicated}"', "mhlo.frontend_attributes = {}"])),
    st.builds(nested, st.integers(1, 300)),
    st.sampled_from(["main", "inner"]).map(CALL.format),
    st.just(infeed()),
)


def _read_program(nothing, folder: pathlib.Path, example):
    """A program that is read can be compiled and run, and ends; nothing that it names is called."""
    operation, place = example
    if "@inner" in operation and "@inner" not in PLACES[place]:
        operation = CALL.format("main")
    file = folder / program_file("encode")
    file.write_bytes(write_program(operation, place))
    program = _load(folder, "encode", {"jax": jax.__version__})
    assert "custom_call" not in operation and "infeed" not in operation and "mhlo." not in operation
    assert program(jnp.ones(2)).shape == (2,)


PROGRAMS = Target(st.tuples(_OPERATIONS, st.sampled_from(list(PLACES))), lambda folder: None, _read_program, 60, 2000)


# Model folders


def _model_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    vae = make_autoencoder(folder / "vae")
    diffusers_folder.save_unet(folder / "unet", SMALL_UNET, _params(UNet, SMALL_UNET))
    encoder = DINOv2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    transformers_folder.save_dinov2(folder / "dino", encoder, _params(DINOv2, encoder))
    for model in (folder / "unet", folder / "dino"):  # in several files, as large models come
        (weights,) = model.glob("*.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(weights), weights.name)}
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    lite = EfficientNetConfig(width=0.1, depth=0.1, num_classes=3)
    save_efficientnet(folder / "lite", lite, _params(EfficientNetLite, lite))
    small = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    towers = {"vision_config": {**small, "image_size": 8, "patch_size": 8}, "text_config": {**small, "vocab_size": 5}}
    image, text = CLIPImageConfig(**towers["vision_config"]), CLIPTextConfig(**towers["text_config"])
    shapes = abstract(lambda: CLIP(image, text, 3, rngs=nnx.Rngs(0)))[1]
    values = {"model_type": "clip", "projection_dim": 3, **towers}
    save_folder(folder / "clip", values, random_params(shapes), np.float32, transformers_folder.TRANSFORMERS)
    return {"vae": vae} | {name: folder / name for name in ("unet", "dino", "lite", "clip")}


def _params(kind, config):
    return random_params(_shapes(kind, config))


@functools.lru_cache(maxsize=8)
def _shapes(kind, config):
    return abstract(lambda: kind(config, rngs=nnx.Rngs(0)))[1]


def _open_model(models: dict[str, pathlib.Path], folder: pathlib.Path, example):
    kind, which, changes, tree_changes = example
    copy = folder / kind
    shutil.copytree(models[kind], copy)
    files = sorted(copy.iterdir())
    file = files[which % len(files)]
    data = file.read_bytes()
    if file.suffix == ".json" and which % 5:
        file.write_text(json.dumps(damaged_json(json.loads(data), tree_changes)))
    elif file.suffix == ".safetensors" and which % 2:  # most of such a file is numbers, which may be any
        header = int.from_bytes(data[:8], "little")
        file.write_bytes(damaged(data[: 8 + header], changes) + data[8 + header :])
    else:
        file.write_bytes(damaged(data, changes))
    if kind == "vae":
        config = default_config()
        config.autoencoder.path = str(copy)
        FrozenModels.load(config)
    elif kind == "unet":
        config = diffusers_folder.load_unet_config(copy)
        require_same(copy, _shapes(UNet, config), diffusers_folder.load_params(copy))
    elif kind == "lite":
        load_efficientnet(copy)
    elif kind == "clip":
        transformers_folder.load_clip(copy)
    else:
        config = transformers_folder.load_dinov2_config(copy)
        require_same(copy, _shapes(DINOv2, config), transformers_folder.load_params(copy))


_MODELS = st.tuples(st.sampled_from(["vae", "unet", "dino", "lite", "clip"]), _WHICH, CHANGES, JSON_CHANGES)
MODELS = Target(_MODELS, _model_folders, _open_model, 20, 800, 60.0)


# What a checkpoint says of itself


def _saved(folder: pathlib.Path) -> SavedModel:
    sampler = _small_sampler(folder)
    config = default_config()
    config.data.image_size = 8
    metadata = {
        "config": to_json(config),
        "unet": dataclasses.asdict(sampler.unet_config),
        "frozen": sampler.models.metadata,
    }
    return SavedModel(json.loads(json.dumps(metadata)), sampler.unet_params, sampler.frozen, 1)


def _open_saved(saved: SavedModel, folder: pathlib.Path, changes):
    metadata = json.loads(json.dumps(damaged_json(saved.metadata, changes)))
    sampler = Sampler.from_saved(saved._replace(metadata=metadata), "somewhere")
    assert sampler.num_steps >= 1 and min(sampler.models.latent_shape(sampler.image_size)) >= 0
    json.dumps(sampler.about)


METADATA = Target(JSON_CHANGES, _saved, _open_saved, 30, 500)


# Config values


_STRANGE = (
    *("None", "True", "nan", "inf", "-inf", "1e400", "-1", "0", "()", "(1,", "((1,),)", "'a'", "[]", "{}", "0x10", "٣"),
    *("__import__('os')", "1_000", "-", "--", "=", "1+1j"),
)
_WORDS = st.sampled_from([*_STRANGE, "", "1" * 5000, "9" * 30, "1 if True else 2", "a\nb", "\0"])
_FIELDS = [one for group in groups_in(default_config()) for one in fields_of(type(group)).values()]
_CHOICES = sorted({word for one in _FIELDS for word in one.about.words})
_PLAUSIBLE = st.integers(0, 64).map(str) | st.floats(0, 1).map(str) | st.sampled_from(_CHOICES)
_TUPLES = st.lists(_WORDS | st.integers(0, 64).map(str), max_size=3).map(lambda items: f"({','.join(items)})")
_TEXT = _PLAUSIBLE | _WORDS | _TUPLES | st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)
_NAMES = list(flatten(default_config()))
_ARGUMENTS = st.lists(
    st.tuples(
        st.sampled_from(["--", "--", "--", "-", "--no"]),
        st.one_of(*[st.sampled_from(_NAMES)] * 4, st.text(max_size=12)),
        st.one_of(*[_TEXT] * 4, st.none()),
    ),
    min_size=1,
    max_size=2,
)


def _parse(config_file, folder: pathlib.Path, arguments):
    argv = ["train", f"--config={config_file}"]
    argv += [f"{dashes}config.{name}" + ("" if text is None else f"={text}") for dashes, name, text in arguments]
    values = flags.FlagValues()
    holder = config_flag.define_config_flag(values)
    program.read_flags(argv, holder.take, values)
    validate(holder.value)
    validate(from_json(json.loads(json.dumps(to_json(holder.value)))))


ARGUMENTS = Target(_ARGUMENTS, lambda folder: f"{ROOT / 'configs' / 'emoji.py'}:tiny", _parse, 60, 2000)


def _config_json(good: dict, folder: pathlib.Path, changes):
    validate(from_json(json.loads(json.dumps(damaged_json(good, changes)))))


CONFIGS = Target(JSON_CHANGES, lambda folder: to_json(default_config()), _config_json, 60, 800)

# What packages of others hold


def _draw_package(good: dict, folder: pathlib.Path, example):
    """A package of emoji whose JSON is damaged as a tree, or whose file is, as bytes."""
    which, tree_changes, changes = example
    files = {name: damaged_json(json.loads(json.dumps(x)), tree_changes) if which % 3 == i else x
             for i, (name, x) in enumerate(good.items())}  # fmt: skip
    path = iconify.package_file(folder, "noto")
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if which % 4 == 3:
        path.write_bytes(damaged(path.read_bytes(), changes))
    iconify.load_family.cache_clear()
    family = iconify.load_family(str(folder), "noto")
    for icon in [*family.icons, *family.aliases]:
        pixels = family.draw(icon, 16)
        assert pixels is None or (pixels.shape == (16, 16, 4) and pixels.dtype == np.uint8)
    naming.name_subjects([family])


def _package(folder):
    body = '<path fill="#f00" d="M4 4h8v8h-8z"/>'
    icons = {"width": 16, "icons": {"sun": {"body": body}, "moon": {"body": body, "left": 2, "width": 12}}}
    return {
        "icons": icons | {"aliases": {"sunny": {"parent": "sun"}, "half": {"parent": "moon", "hFlip": True}}},
        "metadata": {"categories": {"Travel & Places": ["sun", "moon"]}},
        "chars": {"2600": "sun"},
    }


PACKAGES = Target(st.tuples(_WHICH, JSON_CHANGES, CHANGES), _package, _draw_package, 60, 1000)


def _read_legacy(whole: bytes, folder: pathlib.Path, changes):
    (folder / "weights.pth").write_bytes(damaged(whole, changes))
    for x in read_legacy_torch(folder / "weights.pth").values():
        assert isinstance(x, np.ndarray) and x.dtype.kind in "fi"


def _legacy(folder):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.float32)}
    return write_legacy(folder / "weights.pth", arrays).read_bytes()


LEGACY = Target(CHANGES, _legacy, _read_legacy, 100, 3000)


TARGETS = {
    "image files": IMAGES,
    "PNG files, checksums mended": PNGS,
    "caption files": CAPTIONS,
    "records: serialized bytes": EXAMPLES,
    "records: fields": FIELDS,
    "ArrayRecord shards": SHARDS,
    "manifests of latents": MANIFESTS,
    "manifests of image sets from captions": MIS_MANIFESTS,
    "bundles": BUNDLES,
    "bundles, hashes mended": SIGNED,
    "bundles, programs by hand": PROGRAMS,
    "model folders": MODELS,
    "metadata of checkpoints": METADATA,
    "emoji packages": PACKAGES,
    "state dicts of old torch": LEGACY,
    "config: command line": ARGUMENTS,
    "config: JSON": CONFIGS,
}
