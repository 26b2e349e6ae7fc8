"""How samples become tensors: filter banks against torchaudio's recorded values, spectrograms, images and texts by hand."""

import builtins
import pickle

import numpy as np
import pytest
import torch
from trees import picture, write_image, write_wav

from mla_fast.datasets import DecodeError, audio, files, images
from mla_fast.datasets.audio import Fbank, Spectrogram, fbank, log_spectrogram
from mla_fast.datasets.images import IMAGENET, Images
from mla_fast.datasets.text import Tokens

pytest.importorskip("PIL")
f64 = torch.float64


def signals():
    t, random = np.arange(16000) / 16000, np.random.RandomState(0)
    return {
        "noise": (0.1 * random.randn(4000), 16000),
        "sine": (0.5 * np.sin(2 * np.pi * 440 * t[:4800]), 16000),
        "chirp": (0.3 * np.sin(2 * np.pi * (100 * t + 3500 * t * t)), 16000),
        "clicks": ((np.arange(8000) % 1000 == 0) * 0.9, 16000),
        "noise 22050": (0.01 * random.randn(6000) + 0.3, 22050),
    }


# torchaudio 2.11.0's compliance.kaldi.fbank(htk_compat=True, use_energy=False, window_type="hanning", num_mel_bins=128,
# dither=0.0, frame_shift=10) of these signals in float64: shape, mean, deviation, each 15th bin from the 7th of the middle frame.
RECORDED = {
    "noise": (
        (23, 128),
        -0.960233,
        3.557626,
        [-7.69027, -3.0292, -3.20915, -2.29416, -0.65927, -0.14834, 1.73766, 3.54276, 4.15312],
    ),
    "sine": (
        (28, 128),
        -13.328953,
        4.845675,
        [-14.95246, 3.41858, -11.35542, -15.94239, -15.94239, -15.94239, -15.94239, -15.94239, -15.94239],
    ),
    "chirp": (
        (98, 128),
        -13.966566,
        4.681202,
        [-15.94239, -15.94239, -15.94239, -15.94239, -15.94239, -11.79223, -8.40209, -15.94239, -15.94239],
    ),
    "clicks": (
        (48, 128),
        -11.614773,
        6.465064,
        [-8.65623, -4.57796, -2.83228, -1.61995, -0.51264, 0.51345, 1.37455, 2.1152, 2.61198],
    ),
    "noise 22050": (
        (25, 128),
        -4.628335,
        3.354345,
        [-9.88742, -8.54125, -7.68391, -4.48827, -3.67163, -2.42866, -1.88686, -0.2436, 0.13886],
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_fbank_is_that_of_torchaudio(name):
    samples, rate = signals()[name]
    banks = fbank(torch.from_numpy(samples), rate)
    shape, mean, deviation, some = RECORDED[name]
    assert banks.shape == shape and banks.dtype == torch.float32
    measured = [banks.double().mean(), banks.double().std(), *banks[len(banks) // 2, 7::15]]
    torch.testing.assert_close(
        torch.tensor([float(v) for v in measured]), torch.tensor([mean, deviation, *some]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("length", "frames"), [(399, 0), (400, 1), (559, 1), (560, 2)])
def test_frames_are_within_the_signal(length, frames):
    assert fbank(torch.randn(length), 16000).shape == (frames, 128)


@pytest.mark.parametrize("frames", [1, 63, 128])
def test_fbank_of_a_file(tmp_path, frames):
    pytest.importorskip("soundfile")
    samples = 0.3 * np.sin(np.arange(11000) * 0.05) + 0.1
    write_wav(tmp_path / "a.wav", samples)
    read, rate = audio.read_audio(tmp_path / "a.wav")
    assert rate == 16000 and abs(read - torch.from_numpy(samples)).max() < 1e-4
    banks = fbank(read - read.mean(), rate)[:frames]
    expected = torch.cat([banks, torch.zeros(frames - len(banks), 128)])
    whole, centred = Fbank(frames), Fbank(frames, audio.CAVMAE)
    assert torch.equal(whole.finish(whole.decode(tmp_path / "a.wav"), False), expected)
    torch.testing.assert_close(centred.finish(centred.decode(tmp_path / "a.wav"), False), (expected + 5.081) / 4.4849)


def test_log_spectrogram_by_hand():
    x = torch.randn(900, dtype=f64) * 0.5
    spectrum = log_spectrogram(x, 64, 50)
    padded = torch.cat([x[1:33].flip(0), x, x[-33:-1].flip(0)]).clamp(-1, 1)
    n, window = torch.arange(64, dtype=f64), (torch.arange(64, dtype=f64) * 2 * torch.pi / 64).cos() * -0.5 + 0.5
    for frame in (0, 7, 18):
        part = padded[50 * frame : 50 * frame + 64] * window
        for k in (0, 5, 32):
            angle = 2 * torch.pi * k * n / 64
            size = ((part * angle.cos()).sum() ** 2 + (part * angle.sin()).sum() ** 2).sqrt()
            torch.testing.assert_close(spectrum[k, frame].double(), (size + 1e-7).log(), rtol=1e-5, atol=1e-5)
    assert spectrum.shape == (33, 19)


def test_spectrogram_repeats_what_is_short(tmp_path):
    pytest.importorskip("soundfile")
    write_wav(tmp_path / "a.wav", 0.5 * np.sin(np.arange(30000) * 0.1), 22050)
    spectrum = Spectrogram().decode(tmp_path / "a.wav")
    assert spectrum.shape == (257, 188) == Spectrogram().empty().shape
    read, _ = audio.read_audio(tmp_path / "a.wav")
    assert torch.equal(spectrum, log_spectrogram(torch.cat([read, read, read])[:66150]))


def test_audio_that_is_none(tmp_path):
    pytest.importorskip("soundfile")
    write_wav(tmp_path / "silent.wav", np.zeros(8000))
    write_wav(tmp_path / "short.wav", np.random.randn(100) * 0.1)
    (tmp_path / "damaged.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    for name, reason in (("silent", "silent"), ("short", "shorter than 25 ms"), ("damaged", "not audio")):
        with pytest.raises(DecodeError, match=rf"{name}\.wav: {reason}"):
            Fbank().decode(tmp_path / f"{name}.wav")


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_arrays_of_others(tmp_path):
    a = np.random.randn(8, 128)
    np.save(tmp_path / "a.npy", a)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(a.astype("f4")))
    for name in ("a.npy", "b.pkl"):
        assert torch.equal(Fbank(8).decode(tmp_path / name), torch.from_numpy(a).float())
    with pytest.raises(DecodeError, match=r"a.npy: expected an array \[9, 128\], got \[8, 128\]"):
        Fbank(9).decode(tmp_path / "a.npy")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DecodeError, match="evil.pkl: not an array .*expected a NumPy array, got builtins.eval"):
        files.load_array(tmp_path / "evil.pkl")
    np.save(tmp_path / "objects.npy", np.array([Evil()], dtype=object))
    with pytest.raises(DecodeError, match="objects.npy: not an array"):
        files.load_array(tmp_path / "objects.npy")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_are_rgb(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    write_image(path, picture(8, 12), mode)
    image = images.read_image(path)
    assert image.shape == (8, 12, 3) and image.dtype == torch.uint8
    if mode in ("RGB", "RGBA"):
        assert (image.numpy() == picture(8, 12)).all()
    if mode == "L":
        assert (image[..., 0] == image[..., 1]).all()


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize(("height", "width"), [(63, 90), (200, 101)])
def test_resizing_is_that_of_pillow(tmp_path, height, width, squash, resample):
    Image = pytest.importorskip("PIL.Image")
    reader, array = Images(32, squash=squash, resample=resample), picture(height, width)
    x = reader.finish(torch.from_numpy(array)[None], augment=False)
    size = (32, 32) if squash else (round(32 * width / min(height, width)), round(32 * height / min(height, width)))
    resized = np.asarray(Image.fromarray(array).resize(size, getattr(Image.Resampling, resample.upper())), dtype="f8") / 255
    top, left = (round((side - 32) / 2) for side in resized.shape[:2])
    expected = (resized[top : top + 32, left : left + 32] - np.array(IMAGENET[0])) / np.array(IMAGENET[1])
    assert x.shape == (3, 32, 32) and np.abs(x.permute(1, 2, 0).numpy() - expected).max() < 1.5 / 255 / 0.2


def test_augmentation_is_a_crop_that_the_generator_draws():
    reader, decoded = Images(16, frames=2, jitter=0.4), torch.from_numpy(picture(40, 50)).expand(2, -1, -1, -1)
    torch.manual_seed(0)
    first = reader.finish(decoded, augment=True)
    second = reader.finish(decoded, augment=True)
    torch.manual_seed(0)
    assert torch.equal(reader.finish(decoded, augment=True), first) and not torch.equal(first, second)
    assert first.shape == (2, 3, 16, 16) == reader.empty().shape
    for _ in range(300):
        top, left, height, width = images.random_crop(40, 50)
        assert 0 <= top <= 40 - height and 0 <= left <= 50 - width
        assert 0.07 * 2000 < height * width <= 2000 and (0.7 < width / height < 1.4 or (height, width) == (40, 50))


def test_frames_of_a_folder(tmp_path):
    for number in (10, 2, 1, 33, 4, 5, 6):  # not in the order of their names
        write_image(tmp_path / "clip" / f"frame_{number}.png", np.full((4, 4, 3), number, "u1"))
    (tmp_path / "clip" / "._frame_1.png").write_bytes(b"\0\5\x16\7")
    decoded = Images(8, frames=3).decode(tmp_path / "clip")
    assert decoded[:, 0, 0, 0].tolist() == [1, 4, 6]  # of 1 2 4 5 6 10 33: places 0, 2, 4
    assert Images(8).decode(tmp_path / "clip")[:, 0, 0, 0].tolist() == [5]
    assert images.spread(2, 3) == [0, 0, 0] and images.spread(3, 3) == [0, 1, 2] and images.spread(8, 3) == [0, 2, 4]
    write_image(tmp_path / "clip" / "frame_3.png", np.zeros((5, 4, 3), "u1"))
    with pytest.raises(DecodeError, match="clip: frames of different sizes"):
        Images(8, frames=3).decode(tmp_path / "clip")


def test_images_that_are_none(tmp_path):
    write_image(tmp_path / "whole.jpg", picture(64, 64))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "empty").mkdir()
    for name, reason in (("cut.jpg", "not an image"), ("page.jpg", "not an image"), ("empty", "folder without frames")):
        with pytest.raises(DecodeError, match=f"{name}: {reason}"):
            Images().decode(tmp_path / name)


def test_frames_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(60):  # six seconds, each second brighter by 40
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 40 * (i // 10), "u1"), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for source, expected in ((tmp_path / "clip.mp4", [20, 100, 180]), ((tmp_path / "clip.mp4", 3.0, 5.95), [140, 180, 220])):
        decoded = Images(16, frames=3).decode(source).float().mean((1, 2, 3))
        assert (decoded - torch.tensor(expected)).abs().max() < 12
    (tmp_path / "damaged.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(DecodeError, match="damaged.mp4: not a video"):
        Images(16).decode(tmp_path / "damaged.mp4")


def by_words(text):
    return [len(word) for word in text.split()]


def test_tokens(tmp_path):
    reader = Tokens(by_words, 4)
    assert reader.finish(reader.decode("ab c"), False).tolist() == [2, 1, 0, 0]
    assert reader.finish(reader.decode("a b c d e f"), False).tolist() == [1, 1, 1, 1]
    np.save(tmp_path / "t.npy", np.array([[7, 8, 0, 0]]))
    assert reader.decode(tmp_path / "t.npy").tolist() == [7, 8, 0, 0]
    np.save(tmp_path / "long.npy", np.ones((1, 5)))
    for source, reason in (("  ", "no text"), (tmp_path / "long.npy", "long.npy: expected 4 tokens, got 5")):
        with pytest.raises(DecodeError, match=reason):
            reader.decode(source)
    assert pickle.loads(pickle.dumps(reader)).decode("ab c").tolist() == [2, 1]


def test_tokens_of_a_tokenizer_without_special_ones(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "apple", "pie", "##s"]))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    reader = Tokens(str(tmp_path), 6)
    assert reader.decode("Apple pies").tolist() == [5, 6, 7]
    assert pickle.loads(pickle.dumps(reader)).decode("apple").tolist() == [5]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "latin-1"])
def test_texts_in_other_encodings(tmp_path, encoding):
    text = {"gb18030": "吃饭…", "latin-1": "café and so on"}.get(encoding, "café 吃饭 😀")
    (tmp_path / "t.txt").write_bytes(text.encode(encoding))
    assert files.read_text(tmp_path / "t.txt") == text


@pytest.mark.parametrize(
    ("package", "read", "extra"),
    [
        ("soundfile", lambda path: audio.read_audio(path), r"needs soundfile: pip install 'mla_fast\[paper\]'"),
        ("PIL", lambda path: images.read_image(path), r"needs Pillow: pip install 'mla_fast\[paper\]'"),
        ("av", lambda path: images.read_video(path, 1), r"needs PyAV, or its frames extracted: pip install 'mla_fast\[video\]'"),
        ("transformers", lambda path: Tokens("bert-base-uncased").decode("a"), r"transformers: pip install 'mla_fast\[paper\]'"),
    ],
)
def test_what_needs_a_package_says_which_extra_has_it(tmp_path, monkeypatch, package, read, extra):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package}")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=extra):
        read(tmp_path / "x")


@pytest.mark.parametrize("rate", [8000, 44100])
def test_audio_of_another_rate_is_resampled(tmp_path, rate):
    """A tone keeps its place among the filters; read at its own rate, it would be elsewhere."""
    pytest.importorskip("soundfile")
    pytest.importorskip("scipy")
    for name, hertz in (("right", 16000), ("other", rate)):
        write_wav(tmp_path / f"{name}.wav", 0.5 * np.sin(2 * np.pi * 1000 * np.arange(hertz) / hertz), hertz)
    right, other = (Fbank(64).decode(tmp_path / f"{name}.wav") for name in ("right", "other"))
    assert len(right) == len(other) and torch.equal(right[20].topk(3).indices, other[20].topk(3).indices)
    torch.testing.assert_close(right[20].max(), other[20].max(), atol=0.05, rtol=0)
    own = Fbank(64, rate=None).decode(tmp_path / "other.wav")
    assert own[20].argmax() != right[20].argmax()
    x = audio.Spectrogram().decode(tmp_path / "other.wav")
    assert x.shape == (257, 188) and abs(int(x[:, 90].argmax()) - 1000 * 512 / 22050) < 1


def test_mlas_spectrogram_of_five_seconds(tmp_path):
    pytest.importorskip("soundfile")
    samples = 0.1 * np.random.RandomState(0).randn(50000)
    write_wav(tmp_path / "a.wav", samples)
    reader = audio.CroppedSpectrogram()
    decoded = reader.decode(tmp_path / "a.wav")
    assert decoded.shape == (160000,) and torch.equal(decoded[50000:100000], decoded[:50000])
    assert reader.finish(decoded, False).shape == reader.empty().shape == (129, 626)
    torch.testing.assert_close(reader.finish(decoded, False), audio.log_spectrogram(decoded[40000:120000], 256, 128))
    torch.manual_seed(0)
    one, two = (reader.finish(decoded, True) for _ in range(2))
    assert one.shape == (129, 626) and not torch.equal(one, two)
