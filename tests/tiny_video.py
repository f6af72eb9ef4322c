"""A random LTX pipeline of a few thousand parameters, for tests."""

from dataclasses import replace
from pathlib import Path

import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline, LTXVideoTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

from cinema.config import Preset

LATENT = 8


def transformer() -> LTXVideoTransformer3DModel:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=LATENT,
        out_channels=LATENT,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=tiny.TEXT,
    ).eval()


def vae() -> AutoencoderKLLTXVideo:
    torch.manual_seed(0)
    model = AutoencoderKLLTXVideo(
        latent_channels=LATENT,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 0),
        down_block_types=("LTXVideo095DownBlock3D",) * 3,
        downsample_type=("spatiotemporal",) * 3,
        spatio_temporal_scaling=(True,) * 3,
        decoder_block_out_channels=(8, 8, 8),
        decoder_layers_per_block=(1, 1, 1, 0),
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        upsample_residual=(True,) * 3,
        upsample_factor=(1, 1, 1),
        decoder_causal=True,
    ).eval()
    model.encoder.conv_out.conv.bias.data[LATENT:] = -6.0  # small variances
    model.latents_mean.uniform_(-0.5, 0.5)
    model.latents_std.uniform_(0.5, 2.0)
    return model


def pipeline_folder(folder: Path) -> Path:
    """Save a whole stock pipeline of random weights."""
    LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae(),
        text_encoder=tiny.text_encoders()[1],
        tokenizer=tiny.tokenizer(start=False, length=10),
        transformer=transformer(),
    ).save_pretrained(folder)
    return folder


def preset(keyframes: Path, video: Path, **changes: object) -> Preset:
    """`tiny.preset`, with shots of 9 frames of 64 x 128 pixels, two in a window."""
    told = tiny.preset(keyframes)
    settings = replace(
        told.video, weights=str(video), height=64, width=128, frames=9, window=2, text_tokens=10, steps=2
    )
    return replace(told, video=replace(settings, **changes))
