"""Images and the frames of videos: files by Pillow, videos by PyAV, the rest in torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mla_fast.datasets.files import DecodeError, frames_in

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CC12M = ((0.5762, 0.5503, 0.5213), (0.3207, 0.3169, 0.3307))  # of M3AE's pretraining
Moment = tuple[Path, float, float]  # a video, and seconds from and to


def read_image(path: Path) -> Tensor:
    """Return uint8 [H, W, 3] of an image of any mode; DecodeError if it is none or cut short, ImportError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{path} needs Pillow: pip install 'mla_fast[paper]' ({error})") from error
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
            return torch.from_numpy(np.array(rgb))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(path, f"not an image ({error})") from None


def read_video(path: Path, count: int, start: float = 0.0, end: float = math.inf) -> list[Tensor]:
    """Return `count` frames, uint8 [H, W, 3], chosen by ``spread`` from one each second between `start` and `end`.

    Raises DecodeError if nothing can be decoded, ImportError without PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path} needs PyAV, or its frames extracted: pip install 'mla_fast[video]' ({error})") from error
    kept: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            if start > 0:
                container.seek(int(start * av.time_base))
            for frame in container.decode(video=0):
                time = frame.time or 0.0
                if time > end:
                    break
                if time >= start + len(kept):
                    kept.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise DecodeError(path, f"not a video ({error})") from None
    if not kept:
        raise DecodeError(path, "no frames")
    return [kept[i] for i in spread(len(kept), count)]


def spread(frames: int, count: int) -> list[int]:
    """Return which of `frames` ≥ 1 to take: ⌊frames / count⌋ · i for i below `count`; the middle one for a count of one."""
    return [frames // 2] if count == 1 else [frames // count * i for i in range(count)]


@dataclass(frozen=True)
class Images:
    """Read images as float32 [3, size, size]; or `frames` of a clip, [frames, 3, size, size].

    A source is an image, a folder of frames, a video, or (video, from, to) in seconds.

    squash: without augmentation, resize to size × size whatever the form was; otherwise the shorter side, and cut out the centre.
    resample: "bilinear" or "bicubic", with antialiasing.
    jitter: the most that brightness, contrast and saturation change in augmentation, beside a random crop of 8 to 100 % of the
        area, of a form between 3:4 and 4:3, and a flip.
    """

    size: int = 224
    frames: int | None = None
    squash: bool = True
    resample: str = "bilinear"
    jitter: float = 0.0
    moments: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    def __repr__(self) -> str:
        return f"Images(frames={self.frames})"  # all that decoding depends on

    def decode(self, source: Path | Moment) -> Tensor:
        """Return uint8 [frames or 1, H, W, 3]."""
        count = self.frames or 1
        if isinstance(source, tuple):
            images = read_video(source[0], count, *source[1:])
        elif source.is_dir():
            paths = frames_in(source)
            if not paths:
                raise DecodeError(source, "folder without frames")
            images = [read_image(paths[i]) for i in spread(len(paths), count)]
        else:
            still = source.suffix.lower() in (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
            images = [read_image(source)] if still else read_video(source, count)
        if len({image.shape for image in images}) > 1:
            raise DecodeError(source, "frames of different sizes")
        images = images * count if len(images) < count else images
        return torch.stack(images)

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        return self.expand(self.compact(decoded, augment))

    def compact(self, decoded: Tensor | None, augment: bool) -> Tensor:
        """Return uint8 [3, size, size] or [frames, 3, size, size], cut and resized."""
        if decoded is None:
            return self.empty().byte()
        images = [
            image.permute(2, 0, 1) for image in decoded
        ]  # [3, H, W] with the channels last in memory, which resizes fastest
        batch = torch.stack([self._augmented(image) if augment else self._plain(image) for image in images])
        if augment and self.jitter:
            batch = torch.stack([self._jittered(image / 255).mul_(255).round_().byte() for image in batch])
        return batch[0] if self.frames is None else batch

    def expand(self, compact: Tensor) -> Tensor:
        """Return float32, standardised by channel."""
        mean, deviation = (torch.tensor(m, device=compact.device)[:, None, None] for m in self.moments)
        return compact.float().div_(255).sub_(mean).div_(deviation)  # in place: what it costs is the memory that it touches

    def empty(self) -> Tensor:
        return torch.zeros(*(() if self.frames is None else (self.frames,)), 3, self.size, self.size)

    def _resized(self, image: Tensor, height: int, width: int) -> Tensor:
        resized: Tensor = F.interpolate(image[None], (height, width), mode=self.resample, antialias=True)[0]
        return resized

    def _plain(self, image: Tensor) -> Tensor:
        _, height, width = image.shape
        if self.squash:
            return self._resized(image, self.size, self.size)
        scale = self.size / min(height, width)
        height, width = (max(self.size, round(side * scale)) for side in (height, width))
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return self._resized(image, height, width)[:, top : top + self.size, left : left + self.size]

    def _augmented(self, image: Tensor) -> Tensor:
        top, left, height, width = random_crop(image.shape[1], image.shape[2])
        image = self._resized(image[:, top : top + height, left : left + width], self.size, self.size)
        return image.flip(2) if torch.rand(()) < 0.5 else image

    def _jittered(self, image: Tensor) -> Tensor:
        """Change brightness, contrast and saturation of [3, size, size] in 0 … 1, each by a factor of its own."""
        brightness, contrast, saturation = (1 + self.jitter * (2 * torch.rand(3) - 1)).tolist()
        image = (image * brightness).clamp(0, 1)
        mean = _grey(image).mean()
        image = ((image - mean) * contrast + mean).clamp(0, 1)
        grey = _grey(image)
        image = ((image - grey) * saturation + grey).clamp(0, 1)
        return image


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of 8 to 100 % of the area, of a form between 3:4 and 4:3; all if ten tries do not fit."""
    for _ in range(10):
        share, form, y, x = torch.rand(4, dtype=torch.float64).tolist()
        area = (0.08 + 0.92 * share) * height * width
        ratio = math.exp(math.log(3 / 4) + form * math.log(16 / 9))  # width / height
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    return 0, 0, height, width


def _grey(image: Tensor) -> Tensor:
    return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
