"""``bench.make_avdigits`` on a small tree of what its two sources look like, and beside the file that was measured with."""

import gzip
import os
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from bench import make_avdigits
from bench.accuracy.settings import avdigits

FILE = Path(os.environ.get("AVDIGITS", "avdigits.npz"))
SPEAKERS = ("george", "lucas")


def tone(frequency, seconds):
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(8000 * seconds)) / 8000)


def write_wav(path, samples, rate=8000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def sources(tmp_path):
    """Two takes of each digit by two speakers, of different lengths, and 6 images of each digit."""
    recordings, mnist = tmp_path / "fsdd" / "recordings", tmp_path / "mnist"
    recordings.mkdir(parents=True)
    mnist.mkdir()
    for digit in range(10):
        for speaker in SPEAKERS:
            for take in (3, 12):
                write_wav(recordings / f"{digit}_{speaker}_{take}.wav", tone(300 + 300 * digit, 0.3 if take == 3 else 0.9))
    (recordings / "notes.wav").write_bytes(b"no recording")
    random = np.random.RandomState(1)
    labels = random.permutation(np.arange(60) % 10)
    images = random.randint(0, 256, (60, 28, 28))
    (mnist / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path / "fsdd", mnist, images, labels


def test_it_is_what_the_bench_reads(sources, tmp_path, capsys):
    recordings, mnist, images, labels = sources
    output = tmp_path / "out.npz"
    make_avdigits.main(["--recordings", str(recordings), "--mnist", str(mnist), "--output", str(output)])
    assert "40 clips of george, lucas" in capsys.readouterr().out
    made = dict(np.load(output))
    assert made["label"].tolist() == sorted(4 * list(range(10)))
    assert made["take"][:4].tolist() == [12, 3, 12, 3] and made["speaker"][:4].tolist() == [0, 0, 1, 1]  # as names are sorted
    assert len(set(made["mnist_index"].tolist())) == 40
    assert np.array_equal(labels[made["mnist_index"]], made["label"])
    assert np.array_equal(images[made["mnist_index"]], made["image"])
    whole = avdigits(str(output))
    assert {name: tuple(x.shape) for name, x in whole.inputs.items()} == {"audio": (40, 16, 16), "image": (40, 14, 14)}


def test_a_tone_is_where_its_pitch_is_and_silence_is_black(sources):
    made = make_avdigits.build(*sources[:2])
    loudest = made["audio"].astype(int).sum(2).argmax(1)[made["take"] == 12]  # [20], two for each digit
    frequencies = 300 + 300 * np.arange(10)
    mel = 2595 * np.log10(1 + frequencies / 700)
    low, high = 2595 * np.log10(1 + np.array([60, 4000]) / 700)
    expected = (mel - low) / (high - low) * 33 - 1  # the place of the triangle whose middle it is
    assert np.abs(loudest.reshape(10, 2).mean(1) - expected).max() <= 1
    short = made["audio"][made["take"] == 3]
    assert made["audio"].max((1, 2)).tolist() == [255] * 40
    assert not short[:, :, 15:].any()  # 0.3 s are 2400 samples, 14 frames and the end of a fifteenth
    assert made["audio"][made["take"] == 12][:, :, 31].any(1).all()


@pytest.mark.skipif(not FILE.exists(), reason="no avdigits.npz")
def test_it_has_the_layout_of_the_file_that_was_measured_with(sources):
    made, file = make_avdigits.build(*sources[:2]), dict(np.load(FILE))
    assert list(made) == list(file)
    for name, array in file.items():
        assert made[name].dtype.kind == array.dtype.kind and made[name].shape[1:] == array.shape[1:], name
        assert name == "speaker_names" or made[name].dtype == array.dtype
    names = [
        f"{d}_{file['speaker_names'][s]}_{t}.wav" for d, s, t in zip(file["label"], file["speaker"], file["take"], strict=True)
    ]
    assert names == sorted(names)
    assert (file["audio"].max((1, 2)) == 255).all()


def test_what_is_wrong_is_said(sources, tmp_path, capsys):
    recordings, mnist, images, labels = sources

    def error(**more):
        given = {"recordings": recordings, "mnist": mnist, "output": tmp_path / "out.npz"} | more
        with pytest.raises(SystemExit, match="2"):
            make_avdigits.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
        return capsys.readouterr().err

    assert "git clone https://github.com/Jakobovski/free-spoken-digit-dataset" in error(recordings=mnist)
    assert "--mnist: expected t10k-images-idx3-ubyte" in error(mnist=recordings)
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(labels)[:-1])
    assert "expected a file of MNIST" in error()
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(60)))
    assert "--mnist: expected an image of 1 for each of 4 clips, got 0" in error()
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    write_wav(recordings / "recordings" / "4_lucas_5.wav", tone(500, 0.3), rate=16000)
    assert "4_lucas_5.wav: expected sound of 16 bits, one channel and 8000 Hz" in error()
    assert not (tmp_path / "out.npz").exists()
