"""Random models of a few thousand parameters, and whole pipelines of them, for tests."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from cinema.config import TOY, Preset
from cinema.training.text import ClipTask, T5Task
from cinema.transformer import InterleavedFluxTransformer, PairGroup

CHANNELS, TEXT, POOLED = 16, 32, 24
WORDS = ["<pad>", "</s>", "<s>", "<unk>", "<ada>", "<bo>", "<cleo>"]
WORDS += ["wide", "close", "shot,", "forest.", "city.", "left,", "right,", "jumping."]


def transformer_config(guidance: bool = True) -> dict[str, object]:
    return {
        "in_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
    }


def transformer(guidance: bool = True) -> InterleavedFluxTransformer:
    torch.manual_seed(0)
    return InterleavedFluxTransformer(**transformer_config(guidance)).eval()


def grid(height: int, width: int, scale: float = 1.0) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height) * scale, torch.arange(width) * scale, indexing="ij")
    return torch.stack([y, x], dim=-1).reshape(-1, 2).float()


def group(index: list[int], height: int = 2, width: int = 3, text: int = 5, batch: int = 2, seed: int = 0) -> PairGroup:
    g, p = torch.Generator().manual_seed(seed + 100 * height + index[0]), len(index)
    return PairGroup(
        latents=torch.randn(batch, p, height * width, CHANNELS, generator=g),
        text=torch.randn(batch, p, text, TEXT, generator=g),
        pooled=torch.randn(batch, p, POOLED, generator=g),
        sigma=torch.rand(batch, p, generator=g),
        ids=grid(height, width, scale=4 / height),
        index=torch.tensor(index),
    )


def tokenizer(start: bool, length: int) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "<s> $A </s>" if start else "$A </s>"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def text_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=POOLED,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=POOLED,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    t5 = T5Config(
        vocab_size=len(WORDS),
        d_model=TEXT,
        d_kv=16,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return CLIPTextModel(clip).eval(), T5EncoderModel(t5).eval()


def toy_text(folder: Path) -> dict[str, Path]:
    """Save small untrained text encoders that know the toy world's words, by the options that name them."""
    torch.manual_seed(0)
    clip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    for task in (ClipTask(0, None, shape=clip | {"projection_dim": 32}), T5Task(0, None, shape=t5)):
        task.save(folder / type(task).__name__)
    return {"clip": folder / "ClipTask", "t5": folder / "T5Task"}


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS // 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    ).eval()


def pipeline_folder(folder: Path, shift: float = TOY.keyframes.shift) -> Path:
    """Save a whole stock pipeline of random weights."""
    torch.manual_seed(0)
    clip, t5 = text_encoders()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(),
        text_encoder=clip,
        tokenizer=tokenizer(start=True, length=12),
        text_encoder_2=t5,
        tokenizer_2=tokenizer(start=False, length=10),
        transformer=FluxTransformer2DModel(**transformer_config()),
    )
    pipeline.save_pretrained(folder)
    return folder


def preset(folder: Path, **changes: object) -> Preset:
    """The toy preset's rules at 64 x 128 pixels, in float32, for a folder of `pipeline_folder`."""
    keyframes = replace(
        TOY.keyframes,
        weights=str(folder),
        height=64,
        width=128,
        text_tokens=10,
        steps=2,
        guidance=1.0,
        distilled_guidance=3.5,
        memory_levels=2,
        memory_group=2,
    )
    return replace(TOY, dtype="float32", tags=("<ada>", "<bo>", "<cleo>"), keyframes=replace(keyframes, **changes))
