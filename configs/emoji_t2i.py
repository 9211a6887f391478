"""A small text-to-image model of emoji: what generates the image sets of `make road`.

    pip install --no-deps -r requirements-text.txt
    python -m m2m_jax.data.prepare
    python -m m2m_jax.data.prepare_minilm --output=data/minilm
    python -m m2m_jax.train --config configs/emoji_t2i.py --workdir runs/emoji_t2i

Starts from the single-image U-Net in pretrained/ and learns attn2, to the tokens of a frozen MiniLM, from the training
split's images and their captions, "cat face, animal mammal, twemoji". It is small, sees 32 px, and knows few words:
what it makes of a caption is often only of the right kind. Results: docs/road.md.
"""

from m2m_jax.configuration import TINY, Config, apply_preset, default_config

PRESETS = {"tiny": {**TINY, "model.block_out_channels": (16, 32), "init.path": ""}}


def get_config(preset: str = "") -> Config:
    """The config of a preset; '' is the full run."""
    config = default_config()
    config.task = "text_to_image"
    config.data.images_per_set = 1
    config.data.batch_size = 64
    config.data.augment.enabled = False  # captions name no colours of grounds; hues are part of what they do name
    config.data.caption_tag_dropout = 0.3
    config.text_encoder.path = "data/minilm"
    config.text_encoder.max_tokens = 20  # 99 % of the captions have no more
    config.model.attentions = ("self", "text")
    config.optimizer.learning_rate = 7e-4
    config.optimizer.attn2_rate = 2.0
    config.optimizer.warmup_steps = 200
    config.train.steps = 6_000
    config.train.log_every = 20
    config.train.ema_decay = 0.998
    config.eval.every = 1_000
    config.eval.batches = 8
    config.eval.batch_size = 64
    config.sample.steps = 12
    config.sample.guidance_scale = 3.0
    config.checkpoint.every = 500
    return apply_preset(config, preset, PRESETS)
