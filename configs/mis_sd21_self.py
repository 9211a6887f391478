"""M2M-Self at full size: from Stable Diffusion 2.1-base (512 px, epsilon prediction), on precomputed latents.

    python -m m2m_jax.train --config configs/mis_sd21_self.py --config.data.path=LATENTS \
        --config.init.path=SD21/unet --config.autoencoder.path=SD21/vae --workdir runs/mis_sd21_self

LATENTS comes from `python -m m2m_jax.data.precompute` with the same autoencoder, once with --split=train and once with
--split=validation; SD21 is a local folder in diffusers' layout. The paper starts from Stable Diffusion and predicts the
noise; batch size, rates, images a set and context dropout are not known of it and chosen here.
"""

from m2m_jax.configuration import Config, apply_preset, default_config


def get_config(preset: str = "") -> Config:
    """The one config; there are no presets."""
    config = default_config()
    config.data.name = "precomputed"
    config.data.image_size = 512
    config.data.images_per_set = 5
    config.data.batch_size = 64
    config.eval.batch_size = 64  # like the batch, a multiple of the devices that share it
    config.data.augment.enabled = False
    config.autoencoder.path = "stable-diffusion-2-1-base/vae"
    config.init.path = "stable-diffusion-2-1-base/unet"

    # The U-Net of Stable Diffusion 2.x.
    config.model.block_out_channels = (320, 640, 1280, 1280)
    config.model.layers_per_block = 2
    config.model.down_block_types = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    config.model.num_attention_heads = (5, 10, 20, 20)
    config.model.norm_num_groups = 32
    config.model.dtype = "bfloat16"

    # Its schedule.
    config.schedule.beta_schedule = "scaled_linear"
    config.schedule.rescale_betas_zero_snr = False
    config.schedule.prediction_type = "epsilon"

    config.optimizer.learning_rate = 1e-5
    config.optimizer.attn2_rate = 10.0
    config.optimizer.warmup_steps = 1_000
    config.train.steps = 200_000
    config.train.log_every = 50
    config.train.ema_decay = 0.9999
    config.eval.every = 5_000
    config.checkpoint.every = 5_000

    config.sample.steps = 50
    config.sample.stepper = "ddim"
    return apply_preset(config, preset, {})
