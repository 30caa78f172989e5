"""The average of the weights: its numbers, its files, and what is evaluated."""

import copy
import shutil

import pytest
import torch
from torch import nn

from mamba_vision.engine import argument_parser, train_net
from mamba_vision.engine.hooks import EMA


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_hand_computed_average():
    """The warm-up's decays are 2 / 11, 3 / 12, and then 0.3, which 4 / 13 and 5 / 14 exceed."""
    model = nn.BatchNorm1d(1)
    model.weight.data.fill_(0)
    ema = EMA(model, decay=0.3)
    ema.before_train()
    averages = []
    for step, weight in enumerate((11 / 9, 4, 8, 8)):
        model.weight.data.fill_(weight)
        model.running_mean.fill_(step)
        ema.after_step()
        averages.append(ema.model.weight.item())
        assert ema.model.running_mean.item() == step  # copied, not averaged
    assert averages == pytest.approx([1, 3.25, 6.575, 7.5725])


@pytest.mark.cuda
def test_an_average_on_a_gpu_equals_one_on_the_cpu():
    torch.manual_seed(0)
    steps = [torch.randn(3, 4) for _ in range(5)]
    linear, averages = nn.Linear(4, 3), []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(linear).to(device)
        ema = EMA(model, decay=0.9)
        ema.before_train()
        for weight in steps:
            model.weight.data.copy_(weight)
            ema.after_step()
        assert ema.model.weight.device.type == device
        averages.append(ema.model.weight.data.cpu())
    torch.testing.assert_close(averages[1], averages[0])


def test_in_training_it_is_the_average_of_the_weights_after_each_step(train, read):
    period = "train.checkpointer.period=1", "train.checkpointer.max_to_keep=9"
    out = train("train.max_iter=4", "train.ema_decay=0.25", *period)
    steps = [read(out / f"model_{k:07d}.pth") for k in range(4)]
    start = train("train.max_iter=1", "optimizer.lr=0", output=out.parent / "start")
    average = read(start / "model_final.pth")["model"]["conv.weight"].double()
    for k, checkpoint in enumerate(steps):
        decay = min(0.25, (2 + k) / (11 + k))
        average = decay * average + (1 - decay) * checkpoint["model"]["conv.weight"].double()
        saved = checkpoint["ema"]["module.conv.weight"].double()
        torch.testing.assert_close(saved, average, rtol=1e-6, atol=1e-7)
        equal(
            checkpoint["ema"]["module.norm.running_mean"], checkpoint["model"]["norm.running_mean"]
        )

    final = read(out / "model_ema.pth")["model"]
    equal(final["conv.weight"], steps[-1]["ema"]["module.conv.weight"])
    assert (final["conv.weight"] - steps[-1]["model"]["conv.weight"]).abs().max() > 1e-4
    assert (out / "last_checkpoint").read_text() == "model_final.pth"

    again = train(
        "train.max_iter=1",
        "optimizer.lr=0",
        f"train.init_checkpoint={out}/model_ema.pth",
        output=out.parent / "again",
    )
    equal(read(again / "model_final.pth")["model"]["conv.weight"], final["conv.weight"])


def test_the_average_is_evaluated_and_kept_as_the_best(train, read, scripted):
    evaluated = scripted(10.0, 30.0, 20.0)
    out = train(
        "train.ema_decay=0.9",
        "train.eval_period=2",
        "train.best_metric=bbox/AP",
        "train.checkpointer.period=2",
        "train.checkpointer.max_to_keep=9",
    )
    for k, model in zip((1, 3, 5), evaluated):
        equal(model["conv.weight"], read(out / f"model_{k:07d}.pth")["ema"]["module.conv.weight"])
    equal(read(out / "model_best.pth")["model"]["conv.weight"], evaluated[1]["conv.weight"])


def test_a_resumed_average_equals_one_that_never_stopped(train, read, caplog):
    whole = train("train.ema_decay=0.9")
    parts = whole.parent / "parts"
    parts.mkdir()
    shutil.copy(whole / "model_0000002.pth", parts)
    (parts / "last_checkpoint").write_text("model_0000002.pth")
    train("train.ema_decay=0.9", output=parts, resume=True)
    expected = read(whole / "model_final.pth")["ema"]
    assert expected["n_averaged"] == 7  # six steps, and the start
    equal(read(parts / "model_final.pth")["ema"], expected)


def test_switched_on_at_resume_it_starts_there(train, read):
    out = train("train.max_iter=3")
    train("train.ema_decay=0.9", output=out, resume=True)
    assert read(out / "model_final.pth")["ema"]["n_averaged"] == 4


def test_a_training_that_is_done_without_is_evaluated_without(train, scripted, read):
    out = train()
    evaluated = scripted(1.0)
    train("train.ema_decay=0.9", output=out, resume=True)
    equal(evaluated[0]["conv.weight"], read(out / "model_final.pth")["model"]["conv.weight"])


def test_eval_only_takes_the_average_of_what_is_resumed(toy, train, scripted):
    out = train("train.ema_decay=0.9")
    evaluated = scripted(1.0, 1.0)
    for arguments in (["--resume"], [f"train.init_checkpoint={out}/model_final.pth"]):
        options = ["train.device=cpu", f"train.output_dir={out}", "+train.ema_decay=0.9"]
        arguments = ["--config-file", str(toy), "--eval-only", *arguments, *options]
        train_net(argument_parser("").parse_args(arguments))
    final = torch.load(out / "model_final.pth", weights_only=True)
    equal(evaluated[0]["conv.weight"], final["ema"]["module.conv.weight"])
    equal(evaluated[1]["conv.weight"], final["model"]["conv.weight"])


def test_off_nothing_is_kept(train, read):
    out = train("train.max_iter=1")
    assert "ema" not in read(out / "model_final.pth")
    assert not (out / "model_ema.pth").exists()
