"""Tiny text encoders with their tokenizers, and a whole Stable Diffusion pipeline of them, as folders."""

import json
import pathlib

from flax import nnx
from model_fixtures import random_params

from m2m_jax.core.parameters import Params, abstract
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.diffusers_folder import save_autoencoder, save_unet
from m2m_jax.models.transformers_folder import save_bert, save_clip_text
from m2m_jax.models.unet import UNet, UNetConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
WORDS = ("cat", "dog", "red", "blue", "pizza", "face")
WIDTH = 12  # of the tokens
CLIP_LENGTH = 11  # ids a caption
SD_SCHEDULE = NoiseSchedule(
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    timestep_spacing="leading",
    rescale_betas_zero_snr=False,
    steps_offset=1,
)
SD_UNET = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    num_attention_heads=(2, 4),
    norm_num_groups=8,
    attentions=("self", "text"),
    cross_attention_dim=WIDTH,
)
SD_AUTOENCODER = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8)
SAMPLE_SIZE = 8  # latents along a side; images have twice as many pixels


def make_bert(folder: pathlib.Path) -> pathlib.Path:
    """A text encoder of `WORDS` and letters, with a WordPiece tokenizer."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{x}" for x in LETTERS)]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
    )
    save_bert(folder, config, _random(BertEncoder, config))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


def make_clip_tokenizer(folder: pathlib.Path) -> int:
    """CLIP's, of letters and a few pairs, in Stable Diffusion's files. Returns the size of its vocabulary."""
    pairs = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*LETTERS, *(f"{x}</w>" for x in LETTERS), *("".join(pair) for pair in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, **special})
    )
    return len(tokens)


def make_stable_diffusion(folder: pathlib.Path) -> pathlib.Path:
    """A pipeline of random weights that diffusers reads, too: images of 16 pixels a side."""
    vocabulary = make_clip_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=CLIP_LENGTH,
    )
    save_clip_text(folder / "text_encoder", text, _random(CLIPTextEncoder, text))
    save_autoencoder(folder / "vae", SD_AUTOENCODER, _random(AutoencoderKL, SD_AUTOENCODER))
    save_unet(folder / "unet", SD_UNET, _random(UNet, SD_UNET))
    values = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(values | {"sample_size": SAMPLE_SIZE}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD_SCHEDULE.to_config()))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _random(cls, config) -> Params:
    return random_params(abstract(lambda: cls(config, rngs=nnx.Rngs(0)))[1])
