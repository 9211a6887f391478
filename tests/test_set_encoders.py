"""Encoders that judge images, against their torch originals at random weights, and through their folders."""

import json

import numpy as np
import pytest
from flax import nnx
from parity_fixtures import assert_same_params, random_model, record, require_equal, to_numpy, to_torch, torch_record
from PIL import Image
from text_fixtures import CLIP_LENGTH, make_bert, make_clip_tokenizer
from torch_fixtures import write_legacy

from m2m_jax.building import conse as conse_package
from m2m_jax.building import efficientnet as package
from m2m_jax.building.inception import prepare_inception
from m2m_jax.building.options import ConseCopy
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, fingerprint
from m2m_jax.models import inception
from m2m_jax.models.classifiers import ConvNorm
from m2m_jax.models.clip_image import CLIP, Embeddings
from m2m_jax.models.clip_text import MLP, Attention
from m2m_jax.models.dinov2 import DINOv2, DINOv2Config
from m2m_jax.models.efficientnet import (
    Block,
    Depthwise,
    EfficientNetConfig,
    EfficientNetLite,
    load_efficientnet,
    save_efficientnet,
)
from m2m_jax.models.transformers_folder import load_clip, save_dinov2
from m2m_jax.scoring.conse import SentenceEncoder
from m2m_jax.scoring.encoders import LOGITS, SET_ENCODERS, require_unseen, resized

TINY = EfficientNetConfig(width=0.25, depth=0.4, image_size=33, num_classes=7)


def random_of(cls, config):
    """Random parameters, features neither vanishing nor exploding, variances positive."""
    graphdef, shapes = abstract(lambda: cls(config, rngs=nnx.Rngs(0)))
    rng, params = np.random.default_rng(0), {}
    for name, x in shapes.items():
        leaf, value = name.rpartition(".")[2], rng.standard_normal(x.shape)
        if leaf == "kernel":
            value *= np.sqrt(2 / np.prod(x.shape[:-1]))
        elif leaf in ("scale", "running_var"):
            value = 1 + 0.2 * value.clip(-2, 2)
        else:
            value *= 0.1
        params[name] = value.astype(np.float32)
    return graphdef, params


def images(size, batch=2):
    return np.random.default_rng(1).standard_normal((batch, size, size, 3)).astype(np.float32)


class Reference:
    """Torch's operations on a state dict, each recorded by the name of its layer."""

    def __init__(self, state):
        torch = pytest.importorskip("torch", reason="the reference is computed by torch, a test-only dependency")
        self.f = torch.nn.functional
        self.state = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
        self.outputs = {}

    def kept(self, name, x):
        self.outputs[name] = to_numpy(x)
        return x

    def norm(self, name, x):
        part = {leaf: self.state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")}
        return self.f.batch_norm(x, *part.values(), eps=1e-3)


def torch_name(name):
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.weight" if leaf in ("kernel", "scale") else name


def torch_state(params):
    return {
        torch_name(name): x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T if x.ndim == 2 else x
        for name, x in params.items()
    }


# --- Inception --------------------------------------------------------------------------------------------------------


class Inception(Reference):
    """The published network, in its FID form, written once more."""

    def conv(self, name, x, stride=1, same=True):
        weight = self.state[f"{name}.conv.weight"]
        padding = tuple(side // 2 for side in weight.shape[2:]) if same else 0
        x = self.f.conv2d(x, weight, stride=stride, padding=padding)
        return self.kept(name, self.f.relu(self.norm(f"{name}.bn", x)))

    def chain(self, block, x, *names, last_stride=1):
        for name in names:
            strided = name == names[-1] and last_stride == 2
            x = self.conv(f"{block}.{name}", x, 2 if strided else 1, not strided)
        return x

    def mean(self, x):
        return self.f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block(self, name, x):
        import torch

        kind = {"5": "A", "6": "C", "7": "E"}[name[6]] if name not in ("Mixed_6a", "Mixed_7a") else name
        doubles = [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
        sevens = [f"branch7x7_{i}" for i in (1, 2, 3)]
        if kind == "A":
            branches = [["branch1x1"], ["branch5x5_1", "branch5x5_2"], doubles]
        elif kind == "C":
            branches = [["branch1x1"], sevens, [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)]]
        if kind in ("A", "C"):
            parts = [self.chain(name, x, *branch) for branch in branches]
            return torch.cat([*parts, self.chain(name, self.mean(x), "branch_pool")], 1)
        if kind == "Mixed_6a":
            branches = [["branch3x3"], doubles]
        elif kind == "Mixed_7a":
            branches = [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]]
        if kind != "E":
            parts = [self.chain(name, x, *branch, last_stride=2) for branch in branches]
            return torch.cat([*parts, self.f.max_pool2d(x, 3, 2)], 1)
        three, double = self.chain(name, x, "branch3x3_1"), self.chain(name, x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = self.f.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else self.mean(x)
        parts = [self.chain(name, x, "branch1x1")]
        parts += [self.chain(name, three, f"branch3x3_2{side}") for side in "ab"]
        parts += [self.chain(name, double, f"branch3x3dbl_3{side}") for side in "ab"]
        return torch.cat([*parts, self.chain(name, pooled, "branch_pool")], 1)

    def run(self, x):
        x = self.conv("Conv2d_1a_3x3", x, 2, same=False)
        x = self.conv("Conv2d_2b_3x3", self.conv("Conv2d_2a_3x3", x, same=False))
        x = self.conv("Conv2d_3b_1x1", self.f.max_pool2d(x, 3, 2))
        x = self.f.max_pool2d(self.conv("Conv2d_4a_3x3", x, same=False), 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.block(f"Mixed_{name}", x)
        features = self.kept("features", x.mean((2, 3)))
        self.kept("logits", features @ self.state["fc.weight"].T)
        return self.outputs


def test_inception_is_the_network_of_fid():
    graphdef, params = random_of(inception.Inception, inception.InceptionConfig(divide=16))
    x_bhwc = images(107)
    ours = record(graphdef, params, (ConvNorm,), lambda model, x: dict(zip(("features", "logits"), model(x))), x_bhwc)
    theirs = Inception(torch_state(params)).run(to_torch(x_bhwc))
    require_equal(ours, {name: theirs[name] for name in ours})
    assert len(ours) == 94 + 2


def test_published_weights_of_inception_become_a_folder(tmp_path):
    small = inception.InceptionConfig(divide=16)
    params = random_of(inception.Inception, small)[1]
    state = torch_state(params) | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(1, np.float32)}
    file = write_legacy(tmp_path / "weights.pth", state)
    prepare_inception(file, tmp_path / "made", small)
    assert_same_params(inception.load_inception(tmp_path / "made", small), params)
    del state["fc.bias"]
    with pytest.raises(UserError, match=r"missing fc\.bias"):
        prepare_inception(write_legacy(file, state), tmp_path / "other", small)
    assert not (tmp_path / "other").exists()


def test_inception_has_the_parameters_of_the_published_one():
    shapes = abstract(lambda: inception.Inception(inception.PUBLISHED, rngs=nnx.Rngs(0)))[1]
    # torchvision's has 21,785,568 in its convolutions and norms; running statistics: 17,216 twice. 1,008 classes.
    trained = sum(x.size for name, x in shapes.items() if "running" not in name)
    assert trained == 21_785_568 + 2049 * 1008
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.kernel"].shape == (3, 1, 384, 384)


# --- EfficientNet-Lite ------------------------------------------------------------------------------------------------


def lite_state(config, seed=0):
    """The names and layouts of the package's file, of random numbers."""
    rng, state = np.random.default_rng(seed), {}

    def conv(name, out, inputs, kernel):
        state[f"{name}.weight"] = rng.standard_normal((out, inputs, kernel, kernel)) * (2 / inputs / kernel**2) ** 0.5

    def norm(name, channels):
        for leaf, mean in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            state[f"{name}.{leaf}"] = mean + 0.2 * rng.standard_normal(channels).clip(-2, 2)
        state[f"{name}.num_batches_tracked"] = np.zeros(1)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for number, (inputs, channels, kernel, _, expansion) in enumerate(config.blocks()):
        block, middle = f"_blocks.{number}", inputs * expansion
        if expansion != 1:
            conv(f"{block}._expand_conv", middle, inputs, 1)
            norm(f"{block}._bn0", middle)
        conv(f"{block}._depthwise_conv", middle, 1, kernel)
        norm(f"{block}._bn1", middle)
        conv(f"{block}._project_conv", channels, middle, 1)
        norm(f"{block}._bn2", channels)
    conv("_conv_head", 1280, config.blocks()[-1][1], 1)
    norm("_bn1", 1280)
    state["_fc.weight"] = rng.standard_normal((config.num_classes, 1280)) * 1280**-0.5
    state["_fc.bias"] = rng.standard_normal(config.num_classes)
    return {name: x.astype(np.float32) for name, x in state.items()}


class Lite(Reference):
    """The network of the package, by the names of its file."""

    def conv(self, name, x, stride=1, groups=1):
        weight, pads = self.state[f"{name}.weight"], []
        for side in (x.shape[3], x.shape[2]):  # TensorFlow's SAME
            pad = max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
            pads += [pad // 2, pad - pad // 2]
        return self.f.conv2d(self.f.pad(x, pads), weight, stride=stride, groups=groups)

    def run(self, config, x):
        relu6 = self.f.relu6
        x = self.kept("stem", relu6(self.norm("_bn0", self.conv("_conv_stem", x, 2))))
        for number, (inputs, channels, _, stride, expansion) in enumerate(config.blocks()):
            block, h = f"_blocks.{number}", x
            if expansion != 1:
                h = relu6(self.norm(f"{block}._bn0", self.conv(f"{block}._expand_conv", h)))
            h = self.kept(f"blocks.{number}.depthwise", self.conv(f"{block}._depthwise_conv", h, stride, h.shape[1]))
            h = self.conv(f"{block}._project_conv", relu6(self.norm(f"{block}._bn1", h)))
            h = self.norm(f"{block}._bn2", h)
            x = self.kept(f"blocks.{number}", h + x if stride == 1 and inputs == channels else h)
        x = self.kept("head", relu6(self.norm("_bn1", self.conv("_conv_head", x))))
        features = self.kept("features", x.mean((2, 3)))
        self.kept("logits", self.f.linear(features, self.state["_fc.weight"], self.state["_fc.bias"]))
        return self.outputs


def test_efficientnet_is_the_network_of_the_package():
    state, x_bhwc = lite_state(TINY), images(33)
    graphdef, shapes = abstract(lambda: EfficientNetLite(TINY, rngs=nnx.Rngs(0)))
    params = package.convert(state)
    assert {name: x.shape for name, x in params.items()} == {name: x.shape for name, x in shapes.items()}
    kinds = (ConvNorm, Depthwise, Block)
    ours = record(graphdef, params, kinds, lambda model, x: dict(zip(("features", "logits"), model(x))), x_bhwc)
    theirs = Lite(state).run(TINY, to_torch(x_bhwc))
    require_equal({name: x for name, x in ours.items() if name in theirs}, theirs)


def test_the_package_is_read_without_running_it(tmp_path, monkeypatch):
    file = write_legacy(tmp_path / "weights.pth", lite_state(TINY))
    monkeypatch.setattr(package, "package_file", lambda: file)
    monkeypatch.setattr(package, "CONFIG", TINY)
    monkeypatch.setattr(package, "distribution", lambda name: FakePackage())
    package.prepare_efficientnet(tmp_path / "made")
    config, params = load_efficientnet(tmp_path / "made")
    assert config == TINY
    np.testing.assert_array_equal(params["fc.bias"], lite_state(TINY)["_fc.bias"])
    assert "a licence" in (tmp_path / "made" / "LICENSE.md").read_text()
    encoder = SET_ENCODERS["efficientnet_lite0"](tmp_path / "made")
    found = encoder.outputs(np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8))
    assert found["features"].shape == (3, 1280) and found[LOGITS].shape == (3, 7)
    assert encoder.fingerprint == fingerprint(params)
    with pytest.raises(UserError, match="conditioned on"):
        require_unseen(encoder, [fingerprint(params)])


class FakePackage:
    version = "0"

    def read_text(self, name):
        return "a licence"


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, transformers):
    """A tiny CLIP of transformers, with its tokenizer."""
    import torch

    folder = tmp_path_factory.mktemp("models") / "clip"
    vocabulary = make_clip_tokenizer(folder)
    tower = {"intermediate_size": 20, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 12, "num_attention_heads": 3, "image_size": 20, "patch_size": 5, **tower},
        text_config={
            "hidden_size": 8,
            "num_attention_heads": 2,
            "max_position_embeddings": CLIP_LENGTH,
            **tower,
            "vocab_size": vocabulary,
            "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2,
        },
        projection_dim=6,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


def test_clip_is_that_of_transformers(clip_folder):
    folder, model = clip_folder
    image, text, dim, params = load_clip(folder)
    graphdef, _ = abstract(lambda: CLIP(image, text, dim, rngs=nnx.Rngs(0)))
    x_bhwc = images(20)

    def ours(clip, x):
        return {"projected": clip.image_features(x)}

    kinds = (nnx.Conv, nnx.LayerNorm, nnx.Linear, Attention, MLP, Embeddings)
    found = record(graphdef, params, kinds, ours, x_bhwc)

    def theirs(model):
        return {"projected": model.visual_projection(model.vision_model(pixel_values=to_torch(x_bhwc)).pooler_output)}

    expected = torch_record(model, found, theirs)
    require_equal({name: x for name, x in found.items() if name in expected}, expected)
    assert sum(".layers." in name for name in expected) >= 20


def test_clip_judges_images_and_captions(clip_folder):
    import torch

    folder, model = clip_folder
    encoder = SET_ENCODERS["clip"](folder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    captions = ["red cat", "a dog, a cat, a red pizza face"]
    ids = encoder._folder and torch.from_numpy(tokenized(folder, captions)).long()
    with torch.no_grad():
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output).numpy()
        x = to_torch((pixels / 255 - clip_mean) / clip_std).float()
        image = model.visual_projection(model.vision_model(pixel_values=x).pooler_output).numpy()
    np.testing.assert_allclose(encoder.encode_text(captions), text, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder(pixels), image, rtol=1e-4, atol=1e-5)
    assert encoder.name == "clip-vit-12-5-20" and encoder.reads_text


clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tokenized(folder, captions):
    from m2m_jax.models.tokenizer import load_tokenizer

    return load_tokenizer(str(folder), CLIP_LENGTH)(captions)


def test_half_a_clip_is_refused(clip_folder, tmp_path):
    values = json.loads((clip_folder[0] / "config.json").read_text())
    del values["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="must have vision_config"):
        load_clip(tmp_path)


# --- DINOv2, ConSE, pixels --------------------------------------------------------------------------------------------


def test_dinov2_judges_by_its_class_token(tmp_path):
    config = DINOv2Config(
        hidden_size=12, num_hidden_layers=12, num_attention_heads=3, mlp_ratio=1, image_size=112, patch_size=56
    )
    graphdef, params = random_model(DINOv2, config)
    save_dinov2(tmp_path / "vit", config, params)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    last, eleventh = (SET_ENCODERS[name](tmp_path / "vit") for name in ("dinov2", "vit_s14"))
    assert (last.name, eleventh.name) == ("dinov2-vit-12-56", "focus-vit-12-56-cls11")
    assert last.fingerprint == eleventh.fingerprint  # whoever was conditioned on any layer is known
    from m2m_jax.core.parameters import merge

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x_bhwc = ((pixels / 255 - mean) / std).astype(np.float32)
    np.testing.assert_allclose(last(pixels), merge(graphdef, params)(x_bhwc)[:, 0], rtol=1e-3, atol=1e-4)
    assert np.abs(last(pixels) - eleventh(pixels)).max() > 0.01


def test_conse_puts_images_near_the_names_of_their_classes(tmp_path, monkeypatch):
    names = ["cat", "dog", "red", "blue", "pizza", "face", "a"]
    save_efficientnet(tmp_path / "classifier", TINY, random_of(EfficientNetLite, TINY)[1])
    (tmp_path / "text").mkdir()
    make_bert(tmp_path / "text")
    monkeypatch.setattr(conse_package, "class_names", lambda: names)
    monkeypatch.setattr(conse_package, "version", lambda name: "0")
    folders = {"classifier": tmp_path / "classifier", "text_encoder": tmp_path / "text"}
    assert conse_package.prepare_conse(ConseCopy(output=tmp_path / "conse", **folders)) == 7
    encoder, sentences = SET_ENCODERS["conse"](tmp_path / "conse"), SentenceEncoder(tmp_path / "text")
    vectors = sentences([f"a photo of a {name}" for name in names])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(sentences(["cat", "a red dog face"])[:1], sentences(["cat"]), atol=1e-6)  # no padding
    pixels = np.random.default_rng(0).integers(0, 256, (2, 33, 33, 3), np.uint8)
    logits = encoder._classifier.outputs(pixels)[LOGITS]
    classes = vectors - vectors.mean(0)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    expected = np.exp(logits / 2) @ classes
    np.testing.assert_allclose(encoder(pixels), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    caption = encoder.encode_text([f"a photo of a {names[2]}"])[0]
    np.testing.assert_allclose(caption, classes[2], atol=1e-5)


def test_the_names_of_classes_are_read_without_running_code(tmp_path, monkeypatch):
    (tmp_path / "tinyclip").mkdir()
    file = tmp_path / "tinyclip" / "imagenet_zeroshot_data.py"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tinyclip" / "__init__.py").write_text("raise SystemExit\n")
    file.write_text(f"raise SystemExit\nimagenet_classnames = {[str(i) for i in range(1000)]}\n")
    assert conse_package.class_names()[999] == "999"
    file.write_text("imagenet_classnames = list(range(1000))\n")
    with pytest.raises(UserError, match="imagenet_zeroshot_data"):
        conse_package.class_names()


def test_images_are_resized_as_pillow_and_as_clean_fid_do():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), np.uint8)
    rounded, floats = resized(pixels, 17), resized(pixels, 17, rounded=False)
    expected = np.asarray(Image.fromarray(pixels[0]).resize((17, 17), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(rounded[0], expected)
    assert np.abs(rounded - floats.clip(0, 255)).max() < 3  # Pillow rounds after each axis
    assert (floats % 1 != 0).any()
