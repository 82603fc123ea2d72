"""The discriminator of an autoencoder's adversarial loss."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches: ``[B, C, T, H, W]`` to ``[B, 1, T', H', W']``, high for what looks like data.

    Three convolutions, halving H and W each and T in the last two, and one that makes the logits. No norm: statistics
    of a batch would tell real from reconstructed by themselves.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [nn.Conv3d(before, after, 3, stride, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
