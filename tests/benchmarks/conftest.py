"""The comparisons, called with arguments, and the tables that they print."""

import argparse

import pytest

from mamba_vision.benchmarks import rows, timing

SMALL = [
    *("--config-file", "cascade_mask_rcnn_mamba_vision_nano_shapes"),
    *("--device", "cpu", "--size", "64x96", "--rounds", "1", "--window-padding", "full"),
]
WINDOWS = "model.backbone.bottom_up.window_size"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_PER_TIMING", 0)


@pytest.fixture
def run():
    """Call a comparison's module with arguments."""

    def call(module, *arguments):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return module.run(parser.parse_args([*SMALL, *arguments]))

    return call


@pytest.fixture
def tables(capsys):
    """What was printed: for each table a list of rows, each from column to cell."""

    def read():
        found = []
        for block in capsys.readouterr().out.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            if lines:
                head, _, *body = [[c.strip() for c in x.strip("|").split("|")] for x in lines]
                assert {len(cells) for cells in body} <= {len(head)}
                # of two columns of a name the first
                found.append([dict(reversed(list(zip(head, cells)))) for cells in body])
        return found

    return read


@pytest.fixture
def switches(monkeypatch):
    """Put others in the place of the switches."""

    def put(*others):
        monkeypatch.setattr(rows, "SWITCHES", others)

    return put


@pytest.fixture
def right():
    """A switch that changes nothing."""
    return rows.Switch("right", ((WINDOWS, "[8,8,16,8]", "[8,8,16,8]"),))


@pytest.fixture
def wrong():
    """A switch that changes what is computed, but no shape."""
    return rows.Switch("wrong", ((WINDOWS, "[8,8,16,8]", "[8,8,2,2]"),))
