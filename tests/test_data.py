"""Images to train and to test on: the digits, class folders, and batches of them."""

import pytest
import torch

from fused_inception.tools import data, run
from tests.commands import fails_with, image_folder

for extra in ("PIL", "sklearn"):
    pytest.importorskip(extra)

from PIL import Image  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images")


def test_image_folder_is_split_by_class(folder):
    opened = data.open_data(f"imagefolder:{folder}", 8)
    assert opened.classes == ("bright", "dark")
    assert (len(opened.train), len(opened.test)) == (8, 2)
    for part in (opened.train, opened.test):
        for image, label in (part[i] for i in range(len(part))):
            assert image.shape == (3, 8, 8)
            assert abs(image.float().mean().item() - (230, 20)[label]) < 2
    assert sorted(label for _, label in (opened.test[i] for i in range(2))) == [0, 1]
    (folder / "dark").rename(folder / "train")  # a class beside classes
    assert data.open_data(f"imagefolder:{folder}", 8).classes == ("bright", "train")


@pytest.mark.parametrize("parts", ["train val", "train validation", "Training Testing"])
def test_image_folder_with_its_own_test_part(parts, folder, tmp_path):
    train, test = (tmp_path / "parts" / name for name in parts.split())
    train.parent.mkdir()
    folder.rename(train)
    (test / "dark").mkdir(parents=True)
    Image.new("L", (9, 9), 20).save(test / "dark" / "0.png")
    opened = data.open_data(f"imagefolder:{train.parent}", 8)
    assert opened.classes == ("bright", "dark")
    assert (len(opened.train), len(opened.test)) == (10, 1)
    assert opened.test[0][1] == opened.classes.index("dark")


def test_unsuitable_folders_are_one_line(folder, tmp_path, capsys):
    def line(path):
        return fails_with(capsys, ["train", "--data", f"imagefolder:{path}"])

    assert "no class folders" in line(folder / "bright" / "nested")
    (folder / "empty").mkdir()
    assert "no images in" in line(folder)
    (folder / "empty").rmdir()
    (tmp_path / "one" / "only").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "one" / "only" / "0.png")
    assert "has one image" in line(tmp_path / "one")
    Image.new("L", (9, 9)).save(tmp_path / "one" / "only" / "1.png")
    assert "at least two are needed" in line(tmp_path / "one")
    (tmp_path / "one" / "only").rename(tmp_path / "one" / "Test")
    assert "has Test and no train beside it: add that, or take image" in line(tmp_path / "one")
    folder.rename(tmp_path / "one" / "train")
    assert "no class folders in" in line(tmp_path / "one")
    (tmp_path / "one" / "Test" / "other").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "one" / "Test" / "other" / "0.png")
    assert "one/Test has the class 'other', which" in line(tmp_path / "one")


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_a_pixel_are_scaled(mode, tmp_path):
    """TIFF has them in both orders of bytes, PNG in one."""
    path = tmp_path / "image.tif"
    Image.new(mode, (9, 9), 200 * 256 + 255).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    assert data.read_image(path, 4).unique().tolist() == [200]


def test_a_data_set_has_one_name(capsys):
    """Options follow from it: digits are enlarged to another side than photographs."""
    for name in ("digits:", "synthetic:", "imagefolder:"):
        assert f"unknown data set '{name}'" in fails_with(capsys, ["train", "--data", name])


def test_digits_are_split_once():
    opened = data.open_data("digits", 8)
    assert (len(opened.train), len(opened.test)) == (1437, 360)
    counts = torch.bincount(torch.tensor([opened.test[i][1] for i in range(360)]))
    assert counts.min() >= 34
    assert counts.max() <= 37
    seen = {opened.train[i][0].numpy().tobytes() for i in range(1437)}
    again = data.open_data("digits", 8)
    assert all(torch.equal(opened.test[i][0], again.test[i][0]) for i in range(360))
    assert not any(opened.test[i][0].numpy().tobytes() in seen for i in range(360))


def test_order_depends_on_the_seed_alone():
    opened = data.open_data("digits", 8)

    def labels(seed):
        batches = data.train_batches(opened.train, 32, seed=seed, limit=100)
        assert (batches.images, batches.steps) == (96, 3)
        return torch.cat([labels for _, labels in batches])

    assert torch.equal(labels(1), labels(1))
    assert not torch.equal(labels(1), labels(2))


@pytest.mark.parametrize("images", [(40, 33), (5, 5), (7, 3), (16, 32), (17, 1)])
def test_batch_sizes_are_those_of_an_epoch(images):
    """What is compiled ahead is what runs."""
    sets = [[(torch.zeros(3, 4, 4), 0)] * n for n in images]
    found = set()
    for training, batches in (
        (True, data.train_batches(sets[0], 16, seed=0)),
        (False, data.held_out_batches(sets[1], 16)),
    ):
        found |= {(training, len(labels)) for _, labels in batches}
    assert set(run.batch_sizes(16, *images)) == found


def test_limited_test_part_has_every_class(folder):
    opened = data.open_data(f"imagefolder:{folder}", 8)
    (batch,) = data.held_out_batches(opened.train, 8, limit=4)
    assert batch[1].tolist() == [0, 0, 1, 1]
