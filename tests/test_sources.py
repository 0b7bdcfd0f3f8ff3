"""Images from NumPy files, from arrays in memory, and from EMNIST; class names; images in colour."""

import gzip
import hashlib
import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import fit_on_one, idx_bytes, main, small, user_error
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.resource import get_dl_fname
from tensorflow_datasets.core.utils import Size

import flaxmnist as fm
from flaxmnist.config import Data
from flaxmnist.data.sources import CLASS_NAMES
from flaxmnist.store.load import predict_files


def arrays(colours=3, train=40, test=16, side=12) -> dict[str, np.ndarray]:
    """Return images of two classes: the first is bright on the left, the second on the right."""
    generator = np.random.default_rng(0)
    result = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 2
        images = generator.integers(0, 60, (count, side, side, colours), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, label * side // 2 : (label + 1) * side // 2] += 180
        result |= {f"{split}_images": images, f"{split}_labels": labels}
    return result


# --- Arrays in memory -----------------------------------------------------------------------------------------------


def test_a_run_on_arrays_is_evaluated_and_reported_with_them(tmp_path):
    data = fm.Dataset.from_arrays(**arrays(), validation=8, class_names=["left", "right"])
    assert (data.train.images.shape, len(data.validation.labels), data.classes) == ((32, 12, 12, 3), 8, 2)
    run = fit_on_one(small("mlp", data=Data(name="arrays"), steps=60), data, tmp_path / "run")
    assert run.result.test_accuracy == 1
    folder = str(tmp_path / "run")
    assert fm.evaluate_run(folder, data=data).accuracy == 1
    with user_error("was trained on arrays in memory: pass them again in Python, as data= to"):
        fm.evaluate_run(folder)
    assert main("evaluate")([folder]) == 2
    other = fm.Dataset.from_arrays(**arrays(train=41), validation=8)
    with user_error("but this data set is"):
        fm.evaluate_run(folder, data=other)
    page, pictures = fm.write_report([tmp_path / "run"], data=data)
    assert "\nleft " in page.read_text() and {"weights.png", "examples.png"} <= {path.name for path in pictures}


def test_arrays_may_have_no_channels_and_labels_two_axes():
    grey = arrays(colours=1)
    columns = {name: array[:, None] if "labels" in name else array[..., 0] for name, array in grey.items()}
    one, other = fm.Dataset.from_arrays(**grey), fm.Dataset.from_arrays(**columns)
    for name in ("images", "labels"):
        np.testing.assert_array_equal(getattr(one.train, name), getattr(other.train, name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_images", lambda x: x / 255, "train_images must be uint8 [n, h, w] or [n, h, w, c], from 0 to 255"),
        ("test_images", lambda x: x[:, :, 0, 0], "but is uint8 [16, 12]"),
        ("train_labels", lambda x: x[1:], "train_labels must be integers, one for each image"),
        ("train_labels", lambda x: x - 1, "train_labels must be in [0, 65535]"),
        ("test_labels", lambda x: x.astype(np.int64) + 2**32, "test_labels must be in [0, 65535]"),
        ("test_labels", lambda x: x + 1, "the largest test label is 2"),
        ("test_images", lambda x: x[..., :1], "training images are 12×12×3, test images 12×12: make them the same"),
        ("class_names", lambda _: ["one"], "arrays has labels up to 1, but 1 class names"),
        ("train_images", lambda x: x[:, :4], "images of 4×12×3 pixels: use 8 to 256 per side"),
    ],
)
def test_arrays_must_fit(name, change, message):
    values = arrays() | {"class_names": ()}
    with user_error(message):
        fm.Dataset.from_arrays(**values | {name: change(values[name])})


# --- NumPy files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keras", [False, True])
def test_npz_file(keras, tmp_path):
    values = arrays()
    if keras:
        names = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}
        values = {names[name]: array for name, array in values.items()}
    np.savez(tmp_path / "some.npz", class_names=["left", "right"], **values)
    for path in (tmp_path, tmp_path / "some.npz"):
        data = fm.load_data("npz", path)
        assert data.class_names == ("left", "right") and data.train.images.shape == (35, 12, 12, 3)
        assert data.source == f"some.npz, SHA-256: {hashlib.sha256((tmp_path / 'some.npz').read_bytes()).hexdigest()}"
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with user_error("contains 2 .npz files: pass the one to use as --data-dir"):
        fm.load_data("npz", tmp_path)
    with user_error("other.npz has the arrays x: it needs train_images, train_labels, test_images, test_labels, or x_"):
        fm.load_data("npz", tmp_path / "other.npz")
    (tmp_path / "other.npz").write_bytes(b"damaged")
    with user_error("other.npz is not a readable .npz file"):
        fm.load_data("npz", tmp_path / "other.npz")


# --- EMNIST ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def emnist(tmp_path, monkeypatch):
    """The folder of a small archive in the layout of EMNIST: image i has one bright pixel in row 1 and column i."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for kind, first in (("letters", 1), ("balanced", 0)):
            for split, count in (("train", 10), ("test", 4)):
                images = np.zeros((count, 28, 28))
                images[np.arange(count), np.arange(count), 1] = 255  # transposed
                labels = first + np.arange(count) % 3
                for name, values in (("images-idx3", images), ("labels-idx1", labels)):
                    archive.writestr(f"gzip/emnist-{kind}-{split}-{name}-ubyte.gz", gzip.compress(idx_bytes(values)))
    content, url = content.getvalue(), "http://127.0.0.1:9/gzip.zip"
    checksum = hashlib.sha256(content).hexdigest()
    info = UrlInfo(size=Size(len(content)), checksum=checksum, filename="gzip.zip")
    monkeypatch.setattr(tfds.builder_cls("emnist"), "url_infos", {url: info})
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / get_dl_fname(url, checksum)).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", ["emnist/letters", "emnist/balanced"])
def test_emnist_is_upright_and_its_labels_start_at_0(name, emnist):
    data = fm.load_data(Data(name=name, validation=0), emnist)
    assert data.class_names == CLASS_NAMES[name] and data.name == name
    rows, columns = np.nonzero(data.train.images[:, 1, :, 0])
    assert rows.tolist() == columns.tolist() == list(range(10))
    assert data.train.labels[:4].tolist() == [0, 1, 2, 0]
    assert data.test.labels.tolist() == [0, 1, 2, 0]


def test_emnist_runs(emnist, tmp_path, capsys):
    options = ["--data-dir", str(emnist), "--workdir", str(tmp_path / "run"), "--devices", "1", "--train.steps", "3"]
    assert (
        main("train")(["softmax_beginners", "--data.name", "emnist/letters", "--train.batch-size", "4", *options]) == 0
    )
    capsys.readouterr()
    assert main("evaluate")([str(tmp_path / "run"), "--data-dir", str(emnist)]) == 0
    assert "\nz " in capsys.readouterr().out


def test_another_archive_is_an_error(emnist):
    with user_error("is not the archive of EMNIST: \"There is no item named 'gzip/emnist-digits-train"):
        fm.load_data("emnist/digits", emnist)


def test_class_names():
    sizes = {"fashion_mnist": 10, "kmnist": 10}
    sizes |= {"emnist/letters": 26, "emnist/byclass": 62, "emnist/bymerge": 47, "emnist/balanced": 47}
    assert {name: len(set(names)) for name, names in CLASS_NAMES.items()} == sizes


# --- Image files ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_image_files_for_models_of_colours_and_of_other_sizes(few, tmp_path):
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 20:] = (200, 180, 190)
    Image.fromarray(picture).save(tmp_path / "right.png")
    data = fm.Dataset.from_arrays(**arrays(), class_names=["left", "right"])
    fit_on_one(small(steps=60), data, tmp_path / "run")
    (prediction,) = predict_files(tmp_path / "run", [tmp_path / "right.png"])
    assert prediction.image.shape == (12, 12, 3) and prediction.names[prediction.prediction] == "right"
    fit_on_one(small(steps=1), fm.Dataset.from_arrays(**arrays(colours=2)), tmp_path / "two")
    with user_error("image files have 1 or 3 channels, but the model needs 2"):
        predict_files(tmp_path / "two", [tmp_path / "right.png"])
    digit = Image.fromarray(few.test.images[0, :, :, 0])
    digit.save(tmp_path / "digit.png")
    large = {name: np.pad(split.images, ((0, 0), (2, 2), (2, 2), (0, 0))) for name, split in few.splits().items()}
    padded = replace(few, **{name: getattr(few, name)._replace(images=images) for name, images in large.items()})
    fit_on_one(small(steps=1), padded, tmp_path / "large")
    (prediction,) = predict_files(tmp_path / "large", [tmp_path / "digit.png"])
    np.testing.assert_array_equal(
        prediction.image[:, :, 0], np.asarray(digit.resize((32, 32), Image.Resampling.BICUBIC))
    )
