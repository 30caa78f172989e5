"""Configs by path and by name, and how a bad one is refused."""

import pytest

from mamba_vision import model_zoo
from mamba_vision.engine import find_config, load_config
from mamba_vision.errors import UserError

GOOD = "model = optimizer = lr_multiplier = train = dict()\ndataloader = dict()\n"


def test_loads_a_path_and_applies_overrides(toy):
    config = load_config(toy, ["train.max_iter=11"])
    assert config.train.max_iter == 11
    assert config.optimizer.lr == 0.1


@pytest.mark.parametrize("suffix", ["", ".py"])
def test_finds_the_projects_configs_by_name(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    name = model_zoo.names()[0]
    assert find_config(name + suffix) == model_zoo.CONFIGS / f"{name}.py"


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / f"{model_zoo.names()[0]}.py"
    mine.write_text(GOOD)
    assert find_config(mine.name).resolve() == mine


def test_every_config_of_the_project_loads():
    for name in model_zoo.names():
        assert load_config(name).train.max_iter > 0


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("toyy.py", None, ["toyy.py does not exist", "did you mean", "toy.py?"]),
        ("folder", None, ["folder is a folder"]),
        ("bad.py", "import os\n1 / 0\n", ["bad.py cannot be loaded (line 2)", "ZeroDivisionError"]),
        ("bad.py", "def f(:\n", ["bad.py cannot be loaded", "SyntaxError"]),
        ("bad.py", "from .lost import model\n", ["bad.py cannot be loaded", "lost.py does not"]),
        ("bad.py", "model = dict()\n", ["bad.py does not define dataloader, optimizer"]),
        ("bad.txt", GOOD, ["bad.txt is neither a .py nor a .yaml file"]),
        ("", None, ["--config-file", model_zoo.names()[0]]),
    ],
)
def test_a_bad_config_is_refused_in_one_line(toy, tmp_path, name, content, parts):
    (tmp_path / "folder").mkdir()
    path = tmp_path / name if name else ""
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
