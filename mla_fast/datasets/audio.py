"""Audio: files by soundfile, Kaldi's filter banks and the spectrograms of the paper's field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_fast.datasets.files import DecodeError, load_array

EPSILON = torch.finfo(torch.float32).eps
CAVMAE = (-5.081, 4.4849)  # mean and deviation of AudioSet's filter banks, by which CAV-MAE standardises


def read_audio(path: Path) -> tuple[Tensor, int]:
    """Return (samples float64 [T] in −1 … 1, the mean over channels; their rate).

    Raises DecodeError for what is no audio or is silent, ImportError without ``soundfile``.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"{path} needs soundfile: pip install 'mla_fast[paper]' ({error})") from error
    try:
        samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
    except (RuntimeError, OSError, TypeError) as error:
        raise DecodeError(path, f"not audio ({error})") from None
    waveform = torch.from_numpy(samples).mean(1)
    if not len(waveform) or waveform.max() == waveform.min():
        raise DecodeError(path, "silent")
    return waveform, int(rate)


def resample(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """Return samples [T] at another rate, by scipy's polyphase filter; raise ImportError without ``scipy``.

    librosa's and torchaudio's filters are others: values differ a little near half the lower rate.
    """
    if rate == wanted:
        return waveform
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(f"audio of {rate} Hz for {wanted} Hz needs scipy: pip install 'mla_fast[paper]' ({error})") from error
    shared = math.gcd(rate, wanted)
    return torch.from_numpy(resample_poly(waveform.numpy(), wanted // shared, rate // shared))


def fbank(waveform: Tensor, rate: int, bins: int = 128) -> Tensor:
    """Return the log-mel energies float32 [frames, bins] of samples [T], as Kaldi computes them.

    Those of ``torchaudio.compliance.kaldi.fbank(waveform, sample_frequency=rate, num_mel_bins=bins, window_type="hanning",
    htk_compat=True, use_energy=False, dither=0.0, frame_shift=10)``: windows of 25 ms every 10 ms, within the signal, without
    their mean, pre-emphasised by 0.97, power spectrum, triangles equally wide in mel from 20 Hz to half the rate.
    """
    size, shift = int(rate * 0.025), int(rate * 0.010)
    if len(waveform) < size:
        return torch.zeros(0, bins)
    frames = waveform.double().unfold(0, size, shift)
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames = frames * torch.hann_window(size, periodic=False, dtype=torch.float64)
    padded = 2 ** (size - 1).bit_length()
    power = torch.fft.rfft(frames, padded).abs().square()[:, :-1]  # the highest frequency is in no triangle
    energies: Tensor = power @ _mel_triangles(rate, padded, bins).T
    return energies.clamp(min=EPSILON).log().float()


def _mel_triangles(rate: int, size: int, bins: int) -> Tensor:
    """Return weights [bins, size / 2] of the FFT's frequencies; made in float32, as torchaudio makes them."""
    low, high = (1127.0 * math.log(1.0 + frequency / 700.0) for frequency in (20.0, rate / 2))
    corners = low + torch.arange(bins + 2) * ((high - low) / (bins + 1))
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    mel = 1127.0 * (1.0 + torch.arange(size // 2) * (rate / size) / 700.0).log()
    return torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0).double()


def log_spectrogram(waveform: Tensor, n_fft: int = 512, hop: int = 353) -> Tensor:
    """Return log(|STFT| + 1e-7), float32 [n_fft / 2 + 1, T // hop + 1], of samples [T] clipped to −1 … 1.

    Windows are Hann's, centred, and see the signal reflected at its ends.
    """
    window = torch.hann_window(n_fft, dtype=torch.float64)
    spectrum = torch.stft(waveform.double().clamp(-1, 1), n_fft, hop, window=window, pad_mode="reflect", return_complex=True)
    return (spectrum.abs() + 1e-7).log().float()


@dataclass(frozen=True)
class Fbank:
    """Read filter banks float32 [frames, 128] from audio, or from ``.npy`` and ``.pkl`` of that shape.

    Longer ones are cut, shorter ones padded by zeros, then standardised where audio was read: arrays are taken as they are.

    standardize: (mean, deviation), ``audio.CAVMAE`` for CAV-MAE; None for MLA's code, which leaves them as they are.
    rate: to which audio of another rate is resampled, by default 16 kHz as CAV-MAE expects; None leaves each file its own.
    """

    frames: int = 1024
    standardize: tuple[float, float] | None = None
    rate: int | None = 16000

    def decode(self, source: Path) -> Tensor:
        if source.suffix in (".npy", ".pkl"):
            return _checked_array(source, (self.frames, 128))
        waveform, rate = read_audio(source)
        if self.rate is not None:
            waveform, rate = resample(waveform, rate, self.rate), self.rate
        banks = fbank(waveform - waveform.mean(), rate)[: self.frames]
        if not len(banks):
            raise DecodeError(source, "shorter than 25 ms")
        mean, deviation = self.standardize or (0.0, 1.0)
        return (banks - mean) / deviation

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        """Pad by what zeros become; a cache has no padding, which often is most of the array."""
        mean, deviation = self.standardize or (0.0, 1.0)
        return F.pad(decoded, (0, 0, 0, self.frames - len(decoded)), value=(0.0 - mean) / deviation)

    def empty(self) -> Tensor:
        return torch.zeros(self.frames, 128)


@dataclass(frozen=True)
class Spectrogram:
    """Read log-spectrograms float32 [257, 188] as OGM-GE makes them: three seconds, which shorter audio is repeated for.

    Audio of another rate than 22,050 Hz is resampled by ``resample``, in OGM-GE's code by librosa. Arrays in ``.npy`` and
    ``.pkl`` are taken as they are.
    """

    rate: int = 22050
    seconds: int = 3

    def decode(self, source: Path) -> Tensor:
        if source.suffix in (".npy", ".pkl"):
            return _checked_array(source, tuple(self.empty().shape))
        return log_spectrogram(_repeated(resample(*read_audio(source), self.rate), self.rate * self.seconds))

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        return decoded

    def empty(self) -> Tensor:
        return torch.zeros(257, self.rate * self.seconds // 353 + 1)


@dataclass(frozen=True)
class CroppedSpectrogram:
    """Read log-spectrograms float32 [129, 626] as MLA's code makes them beside its filter banks.

    Audio at 16 kHz, resampled where it is not, is repeated to 10 s. Of these, 5 s drawn at random in augmentation, otherwise
    those in the middle, become a spectrogram of windows of 256 samples every 128.
    """

    rate: int = 16000
    seconds: int = 5

    def decode(self, source: Path) -> Tensor:
        return _repeated(resample(*read_audio(source), self.rate), 2 * self.rate * self.seconds).float()

    def finish(self, decoded: Tensor, augment: bool) -> Tensor:
        length = self.rate * self.seconds
        room = len(decoded) - length
        start = int(torch.randint(room + 1, ())) if augment else room // 2
        return log_spectrogram(decoded[start : start + length], 256, 128)

    def empty(self) -> Tensor:
        return torch.zeros(129, self.rate * self.seconds // 128 + 1)


def _repeated(waveform: Tensor, length: int) -> Tensor:
    return waveform.repeat(math.ceil(length / len(waveform)))[:length]


def _checked_array(path: Path, shape: tuple[int, ...]) -> Tensor:
    array = load_array(path)
    if array.shape != shape:
        raise DecodeError(path, f"expected an array {list(shape)}, got {list(array.shape)}")
    return torch.from_numpy(array)
