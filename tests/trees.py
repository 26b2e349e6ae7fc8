"""Small trees in the layouts in which the paper's data sets are published, with their traps."""

import json
import wave

import numpy as np

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 61000\n"


def write_wav(path, samples, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def write_image(path, array, mode=None):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)


def picture(height, width, seed=0):
    coarse = 0.25 + 0.5 * np.random.RandomState(seed).rand(4, 4, 3)  # Pillow clips between the passes of a bicubic filter
    return (np.kron(coarse, np.ones((height // 4 + 1, width // 4 + 1, 1)))[:height, :width] * 255).astype("u1")


def write_text(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def tone(label, seconds=0.3):
    """A sound that tells the class."""
    return 0.4 * np.sin(np.arange(int(16000 * seconds)) * 0.05 * (label + 1))


CREMA_D = ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]


def crema_d(root, actors=(1001, 1002, 1010, 1011)):
    """Six clips of each actor. Of 1002, ANG is silent, DIS has no frames, FEA an LFS pointer for audio, HAP a damaged frame, SAD
    nothing."""
    for actor in actors:
        for label, emotion in enumerate(CREMA_D):
            name = f"{actor}_IEO_{emotion}_LO"
            write_wav(root / "AudioWAV" / f"{name}.wav", tone(label) * ((actor, label) != (1002, 0)))
            for second in range(4):
                write_image(root / "Image-01-FPS" / name / f"{second:05}.jpg", picture(24, 30, label))
    odd = "1002_IEO_{}_LO"
    for path in (root / "Image-01-FPS" / odd.format("DIS")).iterdir():
        path.unlink()
    (root / "AudioWAV" / f"{odd.format('FEA')}.wav").write_text(LFS_POINTER)
    (root / "AudioWAV" / f"{odd.format('SAD')}.wav").write_bytes(b"")
    (root / "Image-01-FPS" / odd.format("HAP") / "00001.jpg").write_bytes(b"\xff\xd8\xff")
    for path in [*(root / "Image-01-FPS" / odd.format("SAD")).iterdir()]:
        path.unlink()
    (root / "AudioWAV" / "._1001_IEO_ANG_LO.wav").write_bytes(b"\0\5\x16\7")
    write_wav(root / "AudioWAV" / "readme_sound.wav", tone(0))
    return root


def kinetics_sounds(root, per_class=4):
    """Two classes; yt1_2 has two frames, yt0_3 neither sound nor frames: its video is gone."""
    train, test = [], []
    for label in range(2):
        for i in range(per_class):
            name = f"yt{label}_{i}" if i == 3 else f"yt{label}_00000{i}_000010"
            (test if i == 3 else train).append((name, label))
            rng = np.random.RandomState(label)
            (root / "audio_spec").mkdir(parents=True, exist_ok=True)
            np.save(root / "audio_spec" / f"{name}.npy", rng.randn(1024, 128).astype("f4"))
            for frame in range(2 if (label, i) == (1, 2) else 5):
                write_image(root / "visual" / name / f"frame_{frame + 1:05}.jpg", picture(20, 20, label))
    write_text(root / "my_train.txt", "".join(f"{name},10,{label}\n" for name, label in [*train, ("gone_000001_000002", 1)]))
    write_text(root / "my_test.txt", "".join(f"{name},10,{label}\n" for name, label in test))
    return root


TITLES = """\
apple_pie_1.jpg,"Apple pie, the best",apple_pie
apple_pie_2.jpg,Apple pie,apple_pie
breakfast_burrito_730.jpg,"Breakfast burrito with a quote that stays open,breakfast_burrito
breakfast_burrito_731.txt,Breakfast burrito again,breakfast_burrito
breakfast_burrito_732.jpg,"A title
of two lines",breakfast_burrito
breakfast_burrito_733.jpg,Another dish,apple_pie
breakfast_burrito_734.jpg,"Say ""cheese"" now",breakfast_burrito
"""


def food101(root):
    """Seven rows in train. 733's class is not its file's; apple_pie_2 has no image, 3 no title, 731 is grey, 734 a page."""
    write_text(root / "texts/train_titles.csv", TITLES)
    rows = "apple_pie_9.jpg,Pie,apple_pie\nbreakfast_burrito_9.jpg,Burrito,breakfast_burrito\n"
    write_text(root / "texts/test_titles.csv", rows)
    for part, name in [("train", f"apple_pie_{i}") for i in (1, 3)] + [("train", f"breakfast_burrito_73{i}") for i in range(5)]:
        path = root / "images" / part / name.rsplit("_", 1)[0] / f"{name}.jpg"
        write_image(path, picture(40, 30), "L" if name.endswith("731") else None)
    for name in ("apple_pie_9", "breakfast_burrito_9"):
        write_image(root / "images/test" / name[:-2] / f"{name}.jpg", picture(30, 40))
    (root / "images/train/breakfast_burrito/breakfast_burrito_734.jpg").write_text("<html>")
    return root


def mmbt(root):
    """The lists of MMBT beside it."""
    for part, ids in (("train", (1, 2, 3)), ("dev", (4,)), ("test", (5, 6))):
        rows = []
        for i in ids:
            label = ("hot_dog", "ramen")[i % 2]
            write_image(root / f"images/{label}_{i}.jpg", picture(20, 20))
            rows.append({"id": f"{label}_{i}", "label": label, "text": f"a {label}", "img": f"images/{label}_{i}.jpg"})
        write_text(root / f"{part}.jsonl", "\n".join(map(json.dumps, rows)))
    return root


def mvsa(root, rows=30):
    """Labels in threes: both agree, one is neutral, they contradict. Tweets in three encodings; 4 has no image, 7 no text."""
    lines, names = ["ID\ttext,image"], ("negative", "neutral", "positive")
    for i in range(1, rows + 1):
        text = names[i % 2 * 2]
        image = (text, "neutral", names[2 - i % 2 * 2])[i % 3]
        lines.append(f"{i}\t{text},{image}")
        text, encoding = (("café …", "utf-8"), ("吃饭", "gb18030"), ("café au lait", "latin-1"))[i // 3 % 3]
        write_text(root / f"data/{i}.txt", "" if i == 7 else text, encoding)
        if i != 4:
            write_image(root / f"data/{i}.jpg", picture(20, 30, i % 2))
    write_text(root / "labelResultAll.txt", "\r\n".join(lines), "utf-8-sig")
    return root


def iemocap(root, sessions=(1, 4, 5)):
    """Six utterances a session: the four classes, excitement, one without a label; macOS files and a folder among them.

    Three sessions are enough to train, validate and test on, by encoders that take seconds for an utterance on a CPU.
    """
    emotions = ["ang", "hap", "exc", "neu", "sad", "xxx"]
    for session in sessions:
        dialog, base = f"Ses0{session}F_impro01", root / f"Session{session}"
        lines, spoken = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""], [f"{dialog}_M00X: not an utterance"]
        for i, emotion in enumerate(emotions):
            name = f"{dialog}_F00{i}"
            lines += [f"[{i}.2901 - {i + 1}.2357]\t{name}\t{emotion}\t[2.5, 2.5, 2.5]", f"C-E2:\t{emotion};\t()"]
            spoken.append(f"{name} [00{i}.2901-00{i + 1}.2357]: words of {emotion}.")
            write_wav(base / f"sentences/wav/{dialog}/{name}.wav", tone(i))
            for frame in range(3):
                write_image(root / f"faces/{name}/{frame}.jpg", picture(20, 20, i))
        write_text(base / f"dialog/EmoEvaluation/{dialog}.txt", "\n".join(lines))
        write_text(base / f"dialog/EmoEvaluation/._{dialog}.txt", "\0\5")
        write_text(base / f"dialog/EmoEvaluation/Categorical/{dialog}_e1_cat.txt", f"{dialog}_F000 :Anger; ()")
        write_text(base / f"dialog/transcriptions/{dialog}.txt", "\n".join(spoken))
    return root


def clip_food101(root, npz=False, width=16):
    """Features of two dishes by their classes, in a file each or in two archives; train has a title less, and a damaged file."""
    rng = np.random.RandomState(0)
    for part, count in (("train", 12), ("test", 4)):
        arrays = {"image": [], "text": [], "label": []}
        for i in range(count):
            label = ("hot_dog", "ramen")[i % 2]
            arrays["label"].append(label)
            for modality in ("image", "text"):
                x = (rng.randn(1, width) + 6 * (i % 2) - 3).astype("f4")
                arrays[modality].append(x[0])
                path = root / modality / part / f"{label}_{i}.npy"
                if not npz and (part, modality, i) != ("train", "text", 0):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, x if i != 5 or part == "test" else x[:, 1:])
        if npz:
            root.mkdir(parents=True, exist_ok=True)
            np.savez(root / f"{part}.npz", **arrays)
    return root
