"""Early stopping: when, what it leaves, and what a resumed training knows of it."""

import pytest

OPTIONS = (
    "train.max_iter=12",
    "train.eval_period=2",
    "train.patience=2",
    "train.best_metric=bbox/AP",
)


def test_stops_after_evaluations_without_a_better_one(train, scripted, read, metrics, caplog):
    # Better, not better, better, equal, worse: the fifth evaluation, after step 10, is the last.
    evaluated = scripted(10.0, 5.0, 20.0, 20.0, 19.0)
    with caplog.at_level("INFO"):
        out = train(*OPTIONS, "train.checkpointer.period=7")
    assert len(evaluated) == 5
    assert "after step 10: 2 evaluations without a better one than that of step 6" in caplog.text
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    final = read(out / "model_final.pth")
    assert final["iteration"] == final["trainer"]["iteration"] == 9
    assert read(out / "model_best.pth")["iteration"] == 5
    logged = metrics(out)
    assert max(logged) == 9
    assert logged[9]["bbox/AP"] == 19
    assert "Exception" not in caplog.text


def test_better_ones_let_it_end(train, scripted, read):
    scripted(1.0, 2.0, 1.0, 3.0, 2.0, 2.0)
    out = train(*OPTIONS)
    assert read(out / "model_final.pth")["iteration"] == 11


def test_what_was_stopped_is_evaluated_and_left_alone(train, scripted, caplog):
    scripted(3.0, 2.0, 1.0)
    out = train(*OPTIONS)
    before = {p.name: p.read_bytes() for p in out.glob("*.pth")}
    evaluated = scripted(1.0)
    train(*OPTIONS, output=out, resume=True)
    assert "train.patience=2 is used up" in caplog.text
    assert len(evaluated) == 1
    assert {p.name: p.read_bytes() for p in out.glob("*.pth")} == before

    scripted(1.0, 1.0, 1.0)
    train(*OPTIONS, "train.patience=4", output=out, resume=True)
    assert (out / "model_0000008.pth").exists()  # patience 4: on to step 10


@pytest.mark.parametrize(("kept", "again"), [(4, [3.5, 4.0]), (6, [3.5])])
def test_a_resumed_training_remembers_the_evaluations(train, scripted, read, kept, again):
    """As killed behind step ``kept + 1``; before it none was in vain, or one was."""
    options = (*OPTIONS, f"train.checkpointer.period={kept + 1}")
    scripted(3.0, 4.0, 2.0, 2.0)
    out = train(*options)
    assert read(out / "model_final.pth")["iteration"] == 7
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text(f"model_{kept:07d}.pth")
    evaluated = scripted(*again)
    train(*options, output=out, resume=True)
    assert len(evaluated) == len(again)
    assert read(out / "model_final.pth")["iteration"] == 7
    assert read(out / "model_best.pth")["iteration"] == 3


def test_a_metric_that_is_not_there_never_stops(train, scripted, read):
    scripted(*[1.0] * 6)
    out = train(*OPTIONS, "train.best_metric=segm/AP")
    assert read(out / "model_final.pth")["iteration"] == 11
