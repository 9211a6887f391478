"""Nothing from elsewhere is run, fetched, or read from outside of its folder, and no file takes all of the memory."""

import ast
import contextlib
import io
import json
import pathlib
import pickle
import shutil
import struct
import sys
import time
import tracemalloc
import zlib

import jax.export
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_fixtures import data_config, write_image_folder
from fuzz_mutations import image_seeds
from fuzz_targets import _small_bundle, _write_split
from jax._src import ffi
from PIL import Image
from program_fixtures import CALL, PLACES, arithmetic, composite, custom_call, infeed, nested, write_program
from run_fixtures import ROOT, make_autoencoder, run, train_tiny

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import MAX_SCANS, check_header, decode_image, read_image
from m2m_jax.data import pipeline, precomputed
from m2m_jax.data.sources import folder as folders
from m2m_jax.models import diffusers_folder
from m2m_jax.sampling.bundle import MANIFEST, PARAMS, Bundle, program_file, write_manifest
from m2m_jax.sampling.program_check import require_arithmetic

# Modules that run what they read, and calls that do.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"} | {
    f"{module}.load" for module in ("torch", "np", "numpy", "yaml")
}
WORDS = ("allow_pickle", "trust_remote_code", "shell=True", "weights_only")
FOLDERS = ("m2m_jax", "configs", "examples", "benchmarks", "launch", "docs")
SOURCES = sorted(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(file):
    text = file.read_text().replace("trust_remote_code=False", "")
    assert not [word for word in WORDS if word in text]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not MODULES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)


class Trap:
    """Its pickle makes a file where it is opened."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


@pytest.fixture
def trap(tmp_path):
    """Bytes of a pickle, of a pickled array in .npy; and what they would leave behind, which must not be there."""
    marker = tmp_path / "was opened"
    array = io.BytesIO()
    np.save(array, np.array([Trap(marker)], object), allow_pickle=True)
    yield [pickle.dumps(Trap(marker)), array.getvalue()]
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # it is a trap


def test_pickles_as_images(trap, tmp_path):
    root = write_image_folder(tmp_path / "sets", num_sets=2, images_per_set=1)
    for data in trap:
        (root / "set00" / "0.png").write_bytes(data)
        with pytest.raises(UserError, match="not an image"):
            read_image(root / "set00" / "0.png", 8)
        with pytest.raises(UserError, match="not an image"):
            folders.load(str(root), "train")


def test_pickles_as_records(trap, tmp_path):
    shard = _write_split(tmp_path, 3)
    for data in trap:
        shard.write_bytes(data)
        with pytest.raises(UserError, match="cut off or damaged"):
            precomputed.PrecomputedRecords(str(tmp_path), "train", 16)
        writer = ArrayRecordWriter(str(shard), "group_size:1")
        for _ in range(3):
            writer.write(data)
        writer.close()
        with pytest.raises(UserError, match="not an image-set record"):
            precomputed.PrecomputedRecords(str(tmp_path), "train", 16)[0]
        precomputed.manifest_path(tmp_path, "validation").write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            precomputed.PrecomputedRecords(str(tmp_path), "validation", 16)


def test_pickles_as_models(trap, tmp_path):
    model = make_autoencoder(tmp_path / "vae")
    weights = model / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for data in trap:
        weights.write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            diffusers_folder.load_params(model)
        weights.unlink()
        (model / "diffusion_pytorch_model.bin").write_bytes(data)
        with pytest.raises(UserError, match="is pickled and is not opened"):
            diffusers_folder.load_params(model)
        index = model / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.bin"}}))
        with pytest.raises(UserError, match="is damaged"):
            diffusers_folder.load_params(model)
        index.write_bytes(data)
        with pytest.raises(UserError, match="is not JSON"):
            diffusers_folder.load_params(model)
        index.unlink()
        weights.write_bytes(whole)
        (model / "config.json").write_bytes(data)
        with pytest.raises(UserError, match="is not JSON"):
            diffusers_folder.load_autoencoder_config(model)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return _small_bundle(tmp_path_factory.mktemp("bundle"))


def _forged(bundle, copy, name, data):
    """A copy with another file, and the hashes of its manifest made right."""
    shutil.copytree(bundle, copy)
    fields = json.loads((copy / MANIFEST).read_text())
    (copy / name).write_bytes(data)
    (copy / MANIFEST).unlink()
    write_manifest(copy, {key: value for key, value in fields.items() if key not in ("format", "jax", "files")})
    return copy


def test_pickles_in_bundles(trap, bundle, tmp_path):
    for number, data in enumerate(trap):
        for name in (PARAMS, program_file("encode")):
            copy = _forged(bundle, tmp_path / f"{number} {name}", name, data)
            with pytest.raises(UserError, match=f"{name} is damaged"):
                Bundle(copy)


CALLBACKS = ("xla_ffi_python_cpu_callback", "xla_buffer_python_cpu_callback", "xla_python_gpu_callback", "HostCompute")
FORBIDDEN = {
    **{
        target: (custom_call(target, "api_version = 4 : i32, backend_config = {index = 1234567 : ui64}"), target)
        for target in CALLBACKS
    },
    "a kernel of jaxlib": (custom_call("lapack_sgetrf_ffi"), "lapack_sgetrf_ffi"),
    "a side effect": (custom_call("x", "api_version = 2 : i32, has_side_effect = true"), "calls 'x'"),
    "an assertion with an argument": (
        custom_call("shape_assertion", 'backend_config = "x"'),
        "'shape_assertion'",
    ),
    "a queue of the host": (infeed(), "holds 'stablehlo.infeed'"),
    "a composite": (composite("xla.something"), "calls 'xla.something'"),
    "an annotation": (arithmetic('mhlo.frontend_attributes = {_xla_compute_type = "host"}'), "frontend_attributes"),
    "a sharding": (arithmetic('mhlo.sharding = "{replicated}"'), "carries 'mhlo.sharding'"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_programs_that_reach_out_of_xla(kind, place, bundle, tmp_path):
    operation, words = FORBIDDEN[kind]
    copy = _forged(bundle, tmp_path / "copy", program_file("encode"), write_program(operation, place))
    with pytest.raises(UserError, match=rf"encode.exported is no program of a sampler: .*{words}.*forged") as error:
        Bundle(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("operation", "place", "more", "words"),
    [
        (CALL.format("main"), "main", {}, "'main' calls itself"),
        (CALL.format("inner"), "function", {}, "'inner' calls itself"),
        (composite("chlo.erf"), "main", {}, "'main' calls itself"),
        (nested(200), "main", {}, "nested more than 100 deep"),
        (arithmetic(), "main", {"nr_devices": 2}, "is of 2 devices"),
        (arithmetic(), "main", {"module": ', xla.sdy.meshes = "x"'}, "the module carries 'xla.sdy.meshes'"),
        (arithmetic(), "main", {"unordered_effects": (ffi.FfiEffect(),)}, "has side effects"),
    ],
)
def test_programs_that_no_sampler_is(operation, place, more, words, bundle, tmp_path):
    """Recursion and nests of thousands end XLA's compiler with its stack, and the process."""
    copy = _forged(bundle, tmp_path / "copy", program_file("encode"), write_program(operation, place, **more))
    with pytest.raises(UserError, match=words):
        Bundle(copy)


def test_programs_that_only_compute_are_read(bundle, tmp_path):
    for place in PLACES:
        exported = jax.export.deserialize(bytearray(write_program(arithmetic(), place)))
        require_arithmetic(exported)


# Paths


def test_a_model_folder_stays_within_itself(tmp_path):
    model = make_autoencoder(tmp_path / "vae")
    weights = model / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "secret.safetensors")
    for name in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..",
        "a/../../secret.safetensors",
        ".",
    ):
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="lies outside its folder"):
            diffusers_folder.load_params(model)


def test_a_bundle_stays_within_itself(bundle, tmp_path):
    """Its manifest names files, and none is opened but those that every bundle has."""
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"] |= {"../secret": {"bytes": 6, "sha256": "0"}, "/etc/hostname": {"bytes": 1, "sha256": "0"}}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    opened = _opened_files(lambda: Bundle(copy))
    assert {pathlib.Path(path).parent for path in opened if "bundle" in path} == {copy}
    assert "/etc/hostname" not in opened and not [path for path in opened if "secret" in path]


def test_prepared_data_stays_within_itself(tmp_path):
    """TFDS's dataset_info.json has a template of file names."""
    from m2m_jax.data.emoji.builder import Emoji

    builder = Emoji.at(16, str(tmp_path))
    where = pathlib.Path(builder.data_path)
    where.mkdir(parents=True)
    info = {
        "name": "emoji",
        "version": str(builder.version),
        "configName": "16px",
        "fileFormat": "array_record",
        "splits": [{"name": "train", "shardLengths": ["1"], "filepathTemplate": "../../../{SPLIT}.{FILEFORMAT}"}],
    }
    (where / "dataset_info.json").write_text(json.dumps(info))
    (where / "metadata.json").write_text(json.dumps({"kinds": {"train": ["style"]}, "num_images": {"train": [4]}}))
    config = data_config(directory=str(tmp_path), image_size=16)
    with pytest.raises(UserError, match="files outside of its folder"):
        pipeline.open_examples(config, split="train", seed=0)


# Bombs


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    end = _chunk(b"IDAT", zlib.compress(pixels, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def _seed(kind: str) -> bytes:
    return next(data for name, data in image_seeds().items() if name.startswith(kind))


def _sides(kind: str, form: str, huge: int = 60_000, before: bytes = b"") -> bytes:
    """A good file whose sides of 16 x 12 pixels (in a JPEG 12 x 16) are written as `huge` ones."""
    small, data = (12, 16) if kind == "JPEG" else (16, 12), _seed(kind)
    old = before + struct.pack(form, *small)
    assert old in data
    return data.replace(old, before + struct.pack(form, huge, huge))


_WIDTH = struct.pack("<HHI", 256, 4, 1)  # TIFF's tag, a long
HUGE = {
    "PNG": _png(60_000, 60_000),
    "JPEG": _sides("JPEG", ">HH"),
    "WEBP": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_000).to_bytes(3, "little") * 2 + b"VP8 \0\0\0\0",
    "GIF": _sides("GIF", "<HH"),
    "BMP": _sides("BMP", "<ii"),
    "TIFF": _seed("TIFF").replace(_WIDTH + struct.pack("<I", 16), _WIDTH + struct.pack("<I", 2**30)),
    "AVIF": _sides("AVIF", ">II", before=b"ispe\0\0\0\0"),
    "PPM": b"P6\n60000 60000\n255\n" + bytes(100),
}


def _measured(read) -> tuple[float, float]:
    """(seconds of CPUs, whatever else runs on them; MB that Python held at most)"""
    tracemalloc.start()
    try:
        start = time.process_time()
        read()
        return time.process_time() - start, tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", HUGE)
def test_a_small_file_of_a_huge_image(kind, tmp_path, recwarn):
    assert HUGE[kind] != _seed(kind)
    file = tmp_path / "image"
    file.write_bytes(HUGE[kind])

    def read():
        for reader in (check_header, lambda path: read_image(path, 16)):
            with pytest.raises(UserError, match=r"too large|damaged|not an image"):
                reader(file)

    seconds, megabytes = _measured(read)
    assert seconds < 2 and megabytes < 20
    assert not recwarn.list  # one line and no second one


ZEROS, PIXELS = bytes(200_000_000), bytes(25 * 8)
EXIF = b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\4\xff\xff\xff\xff\0\0\0\x08" * 9000  # tags of 16 GiB
BOMBS = {
    "zTXt": lambda: _png(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(ZEROS)), pixels=PIXELS),
    "iTXt": lambda: _png(8, 8, _chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(ZEROS)), pixels=PIXELS),
    "iCCP": lambda: _png(8, 8, _chunk(b"iCCP", b"a\0\0" + zlib.compress(ZEROS)), pixels=PIXELS),
    "many zTXt": lambda: _png(8, 8, *[_chunk(b"zTXt", b"a\0\0" + zlib.compress(ZEROS[: 10**6]))] * 200, pixels=PIXELS),
    "IDAT": lambda: _png(8, 8, pixels=ZEROS),
    "eXIf": lambda: _png(8, 8, _chunk(b"eXIf", EXIF), pixels=PIXELS),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_packed_into_a_png(name):
    data = BOMBS[name]()
    assert len(data) < 400_000

    def read():
        with contextlib.suppress(UserError):
            assert decode_image(data, "test").size == (8, 8)

    seconds, megabytes = _measured(read)
    assert seconds < 5 and megabytes < 100


def test_a_jpeg_of_a_thousand_scans():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    assert decode_image(data, "test").size == (64, 64)
    with pytest.raises(UserError, match=f"more than {MAX_SCANS} scans"):
        decode_image(data[:last] + data[last:-2] * 1000 + data[-2:], "test")


def test_a_file_without_end(monkeypatch):
    monkeypatch.setattr("m2m_jax.core.images.MAX_BYTES", 2**24)
    with pytest.raises(UserError, match="larger than 16 MiB"):
        read_image("/dev/zero", 8)


# The network

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
_watch = {"on": False, "opened": None, "events": []}


def _audit(event: str, arguments: tuple) -> None:
    """An audit hook stays for as long as the process; it looks away unless a test asks it to look."""
    if _watch["opened"] is not None and event == "open" and isinstance(arguments[0], str | pathlib.Path):
        _watch["opened"].append(str(arguments[0]))
    if _watch["on"] and event in NETWORK:
        _watch["events"].append((event, repr(arguments)[:200]))
        raise PermissionError(f"{event} in a run that was not asked for it")
    # TensorBoard's writer has a multiprocessing queue between two threads of its own: nothing from elsewhere is in it.
    if _watch["on"] and event == "pickle.find_class" and not _called_from("tensorboardX"):
        _watch["events"].append((event, repr(arguments)[:200]))


def _called_from(package: str) -> bool:
    frame = sys._getframe()
    while frame:
        if f"/{package}/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@pytest.fixture(scope="module", autouse=True)
def _install_audit():
    sys.addaudithook(_audit)


def _opened_files(call) -> list[str]:
    _watch["opened"] = []
    try:
        call()
        return _watch["opened"]
    finally:
        _watch["opened"] = None


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return train_tiny(tmp_path_factory)


def test_nothing_is_fetched_and_nothing_unpickled(tiny_run, tmp_path):
    """Checked, trained and sampled, with every connection refused and every unpickling noted."""
    sets = write_image_folder(tmp_path / "images", num_sets=12, images_per_set=5)
    run_in = tmp_path / "run"
    data = ("--config.data.name=folder", f"--config.data.path={sets}")
    _watch["on"] = True
    try:
        results = [
            run("data.check", sets, f"--output={tmp_path / 'sheet.png'}"),
            run("train", *tiny_run.arguments, *data, f"--workdir={run_in}"),
            run("sample", f"--checkpoint={run_in}", "--num_images=1", "--steps=1", f"--output={tmp_path / 'out'}"),
        ]
    finally:
        _watch["on"] = False
    assert _watch["events"] == []
    assert [result.code for result in results] == [0, 0, 0], results
