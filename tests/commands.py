"""What tests of the commands share: images in class folders, and the line that a failure prints."""

from pathlib import Path

import pytest

from fused_inception.__main__ import main


def image_folder(root: Path) -> Path:
    """Class folders of dark and bright images in several modes and shapes; 5 of each class."""
    # here, as it is an extra
    from PIL import Image

    for name, level in (("bright", 230), ("dark", 20)):
        (root / name / "nested").mkdir(parents=True)
        Image.new("RGB", (40, 30), (level, level, level)).save(root / name / "0.png")
        Image.new("L", (17, 90), level).save(root / name / "1.JPG")
        Image.new("RGBA", (50, 50), (level, level, level, 255)).save(root / name / "2.png")
        Image.new("I;16", (50, 50), level * 256).save(root / name / "3.png")
        Image.new("L", (9, 9), level).save(root / name / "nested" / "4.bmp")
        (root / name / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def fails_with(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err
