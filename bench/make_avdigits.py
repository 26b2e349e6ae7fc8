"""Makes avdigits.npz, spoken digits paired by label with handwritten ones, from two public data sets that you download.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset     # recordings/*.wav; commit 26eb9aaf was used
    # MNIST's test set: t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, of any mirror of yann.lecun.com/exdb/mnist
    python -m bench.make_avdigits --recordings free-spoken-digit-dataset --mnist FOLDER --output avdigits.npz

The spectrograms and the order of the clips are those of the file that was measured with. Which of MNIST's images stand beside the
clips is drawn at random, here from ``--seed``, so that single numbers come out differently.
"""

from __future__ import annotations

import argparse
import gzip
import re
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RATE, FRAME, HOP, FRAMES, MELS = 8000, 256, 160, 32, 32
LENGTH = FRAME + (FRAMES - 1) * HOP  # 0.652 s
FLOOR = 80.0  # dB below the loudest
Array = NDArray[np.generic]


class Clip(NamedTuple):
    """A recording, which says in its name what it is: 7_jackson_32.wav."""

    path: Path
    label: int
    speaker: str
    take: int


def clips(folder: Path) -> list[Clip]:
    """Return the recordings of a checkout of the Free Spoken Digit Dataset, or of its folder of them, in order of their names.

    Raises FileNotFoundError if there are none.
    """
    folder = folder / "recordings" if (folder / "recordings").is_dir() else folder
    matches = [(path, re.fullmatch(r"(\d)_(.+)_(\d+)\.wav", path.name)) for path in sorted(folder.glob("*.wav"))]
    found = [Clip(path, int(m[1]), m[2], int(m[3])) for path, m in matches if m]
    if not found:
        raise FileNotFoundError(
            f"--recordings: expected files like 7_jackson_32.wav in {folder}, got none; "
            "git clone https://github.com/Jakobovski/free-spoken-digit-dataset"
        )
    return found


def read_wav(path: Path) -> NDArray[np.float64]:
    """Return samples [T] in −1 … 1; ValueError for anything else than 16 bits, one channel and 8 kHz."""
    with wave.open(str(path)) as file:
        kind = file.getsampwidth(), file.getnchannels(), file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") if kind == (2, 1, RATE) else np.empty(0)
    if kind != (2, 1, RATE) or not samples.any():
        raise ValueError(
            f"{path}: expected sound of 16 bits, one channel and {RATE} Hz, got {8 * kind[0]}, {kind[1]} and {kind[2]}"
        )
    return samples / 32768


def spectrogram(samples: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return uint8 [32, 32], mel × time: the power of Hann frames of 256 every 160 samples, dB below the clip's maximum."""
    samples = np.pad(samples[:LENGTH] / np.abs(samples).max(), (0, max(0, LENGTH - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP]  # [32, 256]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    power = mel_filters() @ (np.abs(np.fft.rfft(frames * hann)) ** 2).T
    decibels = 10 * np.log10(np.maximum(power / power.max(), 10 ** (-FLOOR / 10)))
    return np.rint((decibels + FLOOR) / FLOOR * 255).astype(np.uint8)


def mel_filters(low: float = 60.0, high: float = 4000.0) -> NDArray[np.float64]:
    """Return triangles [32, 129] over the FFT's frequencies, equally wide in HTK's mel, 2595 log10(1 + f / 700)."""
    ends = 2595 * np.log10(1 + np.array([low, high]) / 700)
    corners = 700 * (10 ** (np.linspace(*ends, MELS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(FRAME, 1 / RATE)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    return np.clip(np.minimum((frequencies - left) / (middle - left), (right - frequencies) / (right - middle)), 0, None)


def read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return one of MNIST's files, compressed or not; FileNotFoundError or ValueError if it is not there or not whole."""
    names = [f"{each}{end}" for each in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    path = next((folder / each for each in names if (folder / each).exists()), None)
    if path is None:
        raise FileNotFoundError(f"--mnist: expected {name} or {name}.gz in {folder}, the test set of MNIST, got neither")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    dimensions = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", dimensions, 4) if len(content) >= 4 + 4 * dimensions else ()
    if not dimensions or len(content) != 4 + 4 * dimensions + np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: expected a file of MNIST, got {len(content)} other bytes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def build(recordings: Path, mnist: Path, seed: int = 0) -> dict[str, Array]:
    """Return the arrays of avdigits.npz, a row for each clip, each with another image of its digit.

    Raises FileNotFoundError or ValueError for sources that are not as they were published.
    """
    found = clips(recordings)
    images, labels = read_idx(mnist, "t10k-images-idx3-ubyte"), read_idx(mnist, "t10k-labels-idx1-ubyte")
    if images.shape != (len(labels), 28, 28):
        raise ValueError(f"--mnist: expected as many images [28, 28] as labels, {len(labels)}, got {list(images.shape)}")
    label, names = np.array([clip.label for clip in found]), sorted({clip.speaker for clip in found})
    index, random = np.empty(len(found), np.uint16), np.random.RandomState(seed)
    for digit in range(10):
        rows, those = np.flatnonzero(label == digit), np.flatnonzero(labels == digit)
        if len(rows) > len(those):
            raise ValueError(f"--mnist: expected an image of {digit} for each of {len(rows)} clips, got {len(those)}")
        index[rows] = random.permutation(those)[: len(rows)]
    return {
        "audio": np.stack([spectrogram(read_wav(clip.path)) for clip in found]),
        "image": images[index],
        "label": label.astype(np.uint8),
        "speaker": np.array([names.index(clip.speaker) for clip in found], np.uint8),
        "take": np.array([clip.take for clip in found], np.uint8),
        "mnist_index": index,
        "speaker_names": np.array(names),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.make_avdigits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help = "the Free Spoken Digit Dataset (CC BY-SA 4.0): a checkout, or its folder of recordings"
    parser.add_argument("--recordings", type=Path, required=True, help=help)
    help = "a folder with MNIST's t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, compressed or not"
    parser.add_argument("--mnist", type=Path, required=True, help=help)
    parser.add_argument("--seed", type=int, default=0, help="of the images that are drawn (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("avdigits.npz"), help="(default: avdigits.npz)")
    arguments = parser.parse_args(argv)
    try:
        made = build(arguments.recordings, arguments.mnist, arguments.seed)
        np.savez_compressed(arguments.output, **made)
    except (ValueError, OSError, EOFError, wave.Error) as error:
        print(f"bench.make_avdigits: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {arguments.output}: {len(made['label'])} clips of {', '.join(made['speaker_names'])}")


if __name__ == "__main__":
    main()
