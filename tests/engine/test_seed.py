"""train.seed: what is drawn, from the weights on, is the same in every run, or not."""

import pytest
import torch

from mamba_vision.engine import argument_parser, train_net


@pytest.fixture
def train(toy):
    def run(seed, name):
        output = toy.parent / name
        options = ["train.device=cpu", "train.max_iter=3", f"train.output_dir={output}"]
        arguments = ["--config-file", str(toy), *options, f"train.seed={seed}"]
        train_net(argument_parser("").parse_args(arguments))
        return torch.load(output / "model_final.pth", weights_only=True)["model"]["conv.weight"]

    return run


def test_equal_seeds_give_equal_trainings(train):
    one, again, other = train(3, "one"), train(3, "again"), train(4, "other")
    torch.testing.assert_close(again, one, rtol=0, atol=0)
    assert (other - one).abs().max() > 1e-2


def test_a_negative_seed_is_another_each_time(train):
    one, other = train(-1, "one"), train(-1, "other")
    assert (other - one).abs().max() > 1e-2
