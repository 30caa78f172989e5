"""The demo tool: pictures of detections, from images good and bad."""

import shutil

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from mamba_vision.engine import load_config


@pytest.fixture
def demo(tool, toy):
    """Call the tool with the toy's config and weights."""
    weights = toy.parent / "weights.pth"
    torch.save({"model": instantiate(load_config(toy).model).state_dict()}, weights)
    main = tool("demo")
    start = ["--config-file", toy, "--weights", weights, "--output", toy.parent / "pictures"]
    return lambda *arguments: main([str(a) for a in (*start, *arguments)])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_draws_a_folder(demo, toy, capsys):
    images = toy.parent / "test_images"
    before = {p: p.read_bytes() for p in images.iterdir()}
    assert demo("--input", images) == 0
    assert names(toy.parent / "pictures") == ["0.png", "1.png", "2.png"]  # and annotations.json not
    assert {p: p.read_bytes() for p in images.iterdir()} == before
    caught = capsys.readouterr()
    assert caught.out.endswith("pictures: 3\n")
    assert "3/3" in caught.err  # the progress bar

    for name in names(toy.parent / "pictures"):
        old, new = pixels(images / name), pixels(toy.parent / "pictures" / name)
        assert new.shape == old.shape
        changed = np.abs(new - old).sum(-1) > 30
        assert changed[20:44, 20:44].mean() > 0.9  # the mask
        assert not changed[:8].any()  # nothing is found there


def test_confidence_hides_what_is_below_it(demo, toy):
    image = toy.parent / "test_images" / "0.png"  # its square scores 0.75
    assert demo("--input", image, "--confidence", "0.76") == 0
    assert np.array_equal(pixels(toy.parent / "pictures" / "0.png"), pixels(image))
    assert demo("--input", image, "--confidence", "0.75", "--overwrite") == 0
    assert not np.array_equal(pixels(toy.parent / "pictures" / "0.png"), pixels(image))


def test_scale_makes_larger_pictures(demo, toy):
    assert demo("--input", toy.parent / "test_images" / "0.png", "--scale", "2.5") == 0
    assert pixels(toy.parent / "pictures" / "0.png").shape == (160, 160, 3)


def test_skips_what_is_no_image_and_says_so(demo, toy, capsys):
    (toy.parent / "bad.jpg").write_text("no image")
    good = toy.parent / "test_images" / "1.png"
    assert demo("--input", toy.parent / "bad.jpg", good) == 1
    assert names(toy.parent / "pictures") == ["1.png"]
    caught = capsys.readouterr()
    skipped = [line for line in caught.err.splitlines() if "skipped" in line]
    assert len(skipped) == 1
    assert "bad.jpg" in skipped[0]
    assert "pictures: 1, skipped: 1" in caught.out
    assert "Traceback" not in caught.err


def test_takes_globs_and_each_image_once(demo, toy):
    images = toy.parent / "test_images"
    assert demo("--input", images / "[01].png", images / "0.png", images / "1.png") == 0
    assert names(toy.parent / "pictures") == ["0.png", "1.png"]


def test_names_are_unique_and_never_an_inputs(demo, toy):
    pictures = toy.parent / "pictures"
    pictures.mkdir()
    shutil.copy(toy.parent / "test_images" / "2.png", pictures / "1.png")
    original = (pictures / "1.png").read_bytes()
    assert demo("--input", toy.parent / "test_images", toy.parent / "train_images", pictures) == 0
    assert names(pictures) == [
        "0-2.png",
        "0.png",
        "1-2.png",
        "1-3.png",
        "1-4.png",
        "1.png",
        "2-2.png",
        "2.png",
        "3.png",
        "4.png",
    ]
    assert (pictures / "1.png").read_bytes() == original


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--input", "no_such.png"], "no_such.png does not exist"),
        (["--input", "{}/no_such_*.png"], "no file matches"),
        (["--input", "{}/empty"], "holds no image"),
        (["--input", "{}/test_images", "--confidence", "1.5"], "--confidence 1.5"),
        (["--input", "{}/test_images", "--confidence", "high"], "--confidence"),
        (["--input", "{}/test_images", "--scale", "0"], "--scale 0"),
        (["--input", "{}/test_images", "--output", "{}/toy.py"], "toy.py is not a folder"),
        (["--input", "{}/test_images", "--weights", "{}/toy.py"], "toy.py"),
        (["--input", "{}/test_images", "--weights", "no_such.pth"], "no_such.pth"),
        (["--input", "{}/test_images", "--config-file", "no_such.py"], "no_such.py does not exist"),
        (["--input", "{}/test_images", "--device", "cuda:99"], "cuda:99"),
        (["--input", "{}/test_images", "--opts", "model.chanels=1"], "model.channels"),
        ([], "--input"),
    ],
)
def test_refuses_bad_arguments(demo, toy, capsys, arguments, part):
    (toy.parent / "empty").mkdir()
    assert demo(*(a.format(toy.parent) for a in arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert part in lines[0]
    assert not (toy.parent / "pictures").exists()


def test_replaces_pictures_only_when_told(demo, toy, capsys):
    images = toy.parent / "test_images"
    assert demo("--input", images) == 0
    picture = toy.parent / "pictures" / "1.png"
    picture.write_text("mine")
    capsys.readouterr()
    assert demo("--input", images) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert picture.read_text() == "mine"
    assert demo("--input", images, "--overwrite") == 0
    assert pixels(picture).shape == (64, 64, 3)
