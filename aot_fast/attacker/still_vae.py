"""The video VAE of Qwen-Image on still pictures: a third of the work, the same results but for rounding (`attacker.still_vae`)."""

from __future__ import annotations

from types import MethodType

import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor


def _convolve_image(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The causal 3-D convolution of one frame: its past is zeros, so only the kernel's last time slice counts (a third of the work)."""
    if x.shape[2] != 1 or cache_x is not None:
        return QwenImageCausalConv3d.forward(self, x, cache_x)
    return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self._padding[2:4])[:, :, None]


def use_image_convolutions(vae: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    """Make still pictures cheap to encode and decode, with unchanged results."""
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = MethodType(_convolve_image, module)
    return vae
