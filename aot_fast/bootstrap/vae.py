"""The small world's codec: AutoencoderKLQwenImage with two downsamplings, trained on crops of scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from aot_fast.attacker.still_vae import use_image_convolutions
from aot_fast.bootstrap.integrity import box_integrity, ssim
from aot_fast.bootstrap.training import Plan, train
from aot_fast.data.scenes import make_question, render

CONFIG = {"base_dim": 16, "dim_mult": [1, 2, 2], "temperal_downsample": [False, True], "z_dim": 16}
"""One half less downsampling than Qwen's own: 64 px become 16 x 16 latents, 8 x 8 packed tokens."""
PLAN = Plan(steps=3600, lr=1e-3, ema_decay=0.995, seed=1)
CROP_PX = 32
BATCH = 32
WHOLE_IMAGES_FROM = 0.8
"""Share of the steps after which whole pictures replace crops: from the start training sticks, but the middle attention must meet them."""
KL_WEIGHT = 1e-4
SSIM_WEIGHT = 0.05
SSIM_FROM_STEP = 300


def scene_bank(split: str, num_scenes: int, size_px: int = 64) -> Tensor:
    """Rendered scenes, uint8 [N, 3, size, size]."""
    pictures = [np.asarray(render(make_question(split, index, size_px)[0], size_px)) for index in range(num_scenes)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _draw_batch(bank: Tensor, whole: bool, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1], [B, 3, 1, H, W]; a whole picture counts as four crops."""
    size = bank.shape[-1]
    side, count = (size, BATCH // 4) if whole else (CROP_PX, BATCH)
    rows = torch.randint(len(bank), (count,), generator=generator)
    corners = torch.randint(size - side + 1, (count, 2), generator=generator).tolist()
    crops = [bank[row, :, y : y + side, x : x + side] for row, (y, x) in zip(rows.tolist(), corners)]
    return (torch.stack(crops).float() / 127.5 - 1)[:, :, None]


def vae_loss(vae: AutoencoderKLQwenImage, x: Tensor, generator: torch.Generator, ssim_weight: float) -> tuple[Tensor, dict[str, float]]:
    """MSE + 0.1 L1 + SSIM + a little KL, on pictures [B, 3, 1, H, W] in [-1, 1]."""
    mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    # Without `decode`'s clamp to [-1, 1], which would stop the gradient of every saturated pixel.
    y = vae.decoder(vae.post_quant_conv(z))
    mse, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    loss = mse + 0.1 * l1 + KL_WEIGHT * kl
    similarity = torch.ones(())
    if ssim_weight:
        similarity = ssim(x[:, :, 0] / 2 + 0.5, y[:, :, 0] / 2 + 0.5).mean()
        loss = loss + ssim_weight * (1 - similarity)
    return loss, {"db": (10 * torch.log10(4 / mse)).item(), "kl": kl.item(), "ssim": similarity.item()}


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLQwenImage, pictures: Tensor, batch: int = 100) -> Tensor:
    """uint8 [N, 3, H, W] -> mode of the latents, not normalised, [N, 16, H/4, W/4]."""
    return torch.cat([vae.encode((part.float() / 127.5 - 1)[:, :, None]).latent_dist.mode()[:, :, 0] for part in pictures.split(batch)])


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor, batch: int = 100) -> Tensor:
    """Inverse of `encode_pictures`, rounded as a saved picture is: uint8 [N, 3, H, W]."""
    parts = [vae.decode(part[:, :, None]).sample[:, :, 0] for part in latents.split(batch)]
    return ((torch.cat(parts) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def write_latent_statistics(vae: AutoencoderKLQwenImage, bank: Tensor) -> None:
    """Mean and deviation per latent channel into the config, from where the pipeline reads them."""
    latents = encode_pictures(vae, bank).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


def round_trip_metrics(vae: AutoencoderKLQwenImage, split: str, num_scenes: int) -> dict[str, float]:
    """PSNR in dB and q, the least SSIM over the target boxes, of encode(mode) -> decode."""
    questions = [make_question(split, index, 64)[1] for index in range(num_scenes)]
    pictures = scene_bank(split, num_scenes)
    decoded = decode_latents(vae, encode_pictures(vae, pictures))
    a, b = pictures.float() / 255, decoded.float() / 255
    q = torch.tensor([min(box_integrity(x, y, question.target_boxes)) for x, y, question in zip(a, b, questions)])
    decibel = -10 * torch.log10(((a - b) ** 2).mean(dim=(1, 2, 3)))
    return {"psnr_db": decibel.mean().item(), "q_median": q.median().item(), "q_p5": q.quantile(0.05).item(), "num_scenes": num_scenes}


def train_vae(folder: Path, plan: Plan = PLAN, num_scenes: int = 6000, stop_at: int | None = None) -> AutoencoderKLQwenImage:
    """Train from scratch, or from the state in `folder`; returns the model with its latent statistics in the config."""
    torch.manual_seed(plan.seed)
    vae = use_image_convolutions(AutoencoderKLQwenImage(**CONFIG))
    bank = scene_bank("bootstrap", num_scenes)

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x = _draw_batch(bank, step >= WHOLE_IMAGES_FROM * plan.steps, generator)
        return vae_loss(vae, x, generator, SSIM_WEIGHT if step >= SSIM_FROM_STEP else 0.0)

    train(vae, batch_loss, plan, folder, stop_at)
    write_latent_statistics(vae, bank[:1000])
    return vae
