import copy
import logging
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from mamba_vision import MambaVisionCheckpointer, model_zoo
from mamba_vision.checkpoint import convert, files, read_checkpoint
from mamba_vision.errors import UserError


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the checkpointer warned of, so far."""
    logger = logging.getLogger("fvcore")
    monkeypatch.setattr(logger, "propagate", True)  # which Detectron2's setup_logger changes
    caplog.set_level(logging.INFO, logger.name)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


class TestLoad:
    def test_released_detector(self, detector, released, warnings, caplog):
        model = detector()
        rest = MambaVisionCheckpointer(model).load(str(released))
        assert same(model.state_dict(), convert(read_checkpoint(released)).weights)
        assert warnings() == []
        assert rest == {}
        assert "mmdetection detector" in caplog.text

    def test_as_detectron2s_own_from_a_converted_file(self, detector, released, path, warnings):
        torch.save({"model": convert(read_checkpoint(released)).weights}, path)
        ours, stock = detector(), detector()
        MambaVisionCheckpointer(ours).load(str(path))
        DetectionCheckpointer(stock).load(str(path))
        assert warnings() == []
        assert same(ours.state_dict(), stock.state_dict())

    def test_imagenet_weights_leave_new_layers(self, detector, imagenet, path, warnings):
        state = imagenet("module.")
        torch.save({"state_dict": state, "arch": "mamba_vision_T"}, path)
        model = detector()
        before = copy.deepcopy(model.state_dict())
        MambaVisionCheckpointer(model).load(str(path))
        missing = []
        for name, value in model.state_dict().items():
            source = state.get(name.replace("backbone.bottom_up.", "module."))
            if source is None:
                missing.append(name)
                assert torch.equal(value, before[name])
            else:
                assert torch.equal(value, source.to(value.dtype))
        assert len(warnings()) == 1
        message = warnings()[0]
        assert "backbone.bottom_up.outnorm0" in message
        assert "levels" not in message
        assert "patch_embed" not in message
        new = ("backbone.bottom_up.outnorm", "backbone.fpn_", "proposal_generator.", "roi_heads.")
        assert all(name.startswith(new) for name in missing)

    def test_other_classes_leave_their_layers(self, detector, released, warnings):
        model = detector(num_classes=3)
        before = copy.deepcopy(model.state_dict())
        MambaVisionCheckpointer(model).load(str(released))
        assert len(warnings()) == 1
        assert warnings()[0].partition(": ")[2].split(", ") == [
            "roi_heads.box_predictor.*.cls_score",
            "roi_heads.box_predictor.*.bbox_pred",
            "roi_heads.mask_head.*.predictor",
        ]
        weights = convert(read_checkpoint(released)).weights
        for name, value in model.state_dict().items():
            resized = "box_predictor" in name or name.split(".")[-2] == "predictor"
            assert torch.equal(value, (before if resized else weights)[name])

    def test_mask_heads_of_which_a_model_has_none_are_told_in_a_line(
        self, detector, released, warnings
    ):
        model = detector(config="cascade_rcnn_mamba_vision_tiny_3x_coco")
        MambaVisionCheckpointer(model).load(str(released))
        # 3 heads of 6 layers, each with weight and bias
        assert warnings() == [
            "Not used, for the model has no such part (tensors): roi_heads.mask_head (36)"
        ]
        weights = convert(read_checkpoint(released)).weights
        assert len(weights) == len(model.state_dict()) + 36
        assert all(torch.equal(value, weights[n]) for n, value in model.state_dict().items())

    def test_bare_backbone(self, backbone, imagenet, path, warnings):
        state = imagenet()
        torch.save({"state_dict": state}, path)
        model = backbone()
        MambaVisionCheckpointer(model).load(str(path))
        assert torch.equal(model.levels[2].blocks[0].mixer.D, state["levels.2.blocks.0.mixer.D"])
        assert len(warnings()) == 1
        assert "outnorm0" in warnings()[0]

    def test_pickle_of_arrays(self, backbone, tmp_path, warnings):
        state = backbone().state_dict()
        arrays = {name: value.numpy() for name, value in state.items()}
        data = {"model": arrays, "__author__": "someone"}
        (tmp_path / "weights.pkl").write_bytes(pickle.dumps(data))
        model = backbone()
        assert not same(model.state_dict(), state)
        MambaVisionCheckpointer(model).load(str(tmp_path / "weights.pkl"))
        assert same(model.state_dict(), state)
        assert warnings() == []

    def test_nothing(self, backbone):
        assert MambaVisionCheckpointer(backbone()).load("") == {}

    def test_url_is_fetched_once_without_its_query(self, detector, released, monkeypatch):
        asked = []
        monkeypatch.setattr(
            PathManager, "get_local_path", lambda path: asked.append(path) or str(released)
        )
        model = detector()
        MambaVisionCheckpointer(model).load("https://host/a/detector.pth?download=true")
        assert asked[0] == "https://host/a/detector.pth"
        assert same(model.state_dict(), convert(read_checkpoint(released)).weights)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            ({"model": {"a.weight": torch.rand(1)}}, "none of its 1 weights is the model's"),
            ({"b": 1}, "its weight 'b' is a int"),
            ({"model": [1]}, "is no dict of weights"),
            (
                {"model": {"a": np.random.default_rng}},
                "is a numpy.random.*default_rng, not a tensor",
            ),
            ({"state_dict": {"conv1.weight": torch.rand(1)}}, "has no 'patch_embed"),
            ({"model": {"a": "x"}}, "is a str, not a tensor"),
        ],
    )
    def test_errors(self, backbone, path, data, reason):
        torch.save(data, path)
        with pytest.raises(UserError, match=rf"weights\.pth: .*{reason}"):
            MambaVisionCheckpointer(backbone()).load(str(path))

    @pytest.mark.parametrize("source", ["imagenet", "detectron2"])
    def test_another_backbone(self, detector, backbone, imagenet, path, source):
        model = detector()
        before = copy.deepcopy(model.state_dict())
        larger = {"dim": 20, "num_heads": (1, 1, 4, 4)}
        if source == "imagenet":
            torch.save({"state_dict": imagenet(**larger)}, path)
        else:
            torch.save({"model": detector(**larger).state_dict()}, path)
        checkpointer = MambaVisionCheckpointer(model)
        with pytest.raises(UserError, match=r"weights\.pth: its backbone is of another size: .*20"):
            checkpointer.load(str(path))
        assert same(model.state_dict(), before)
        torch.save({"model": before}, path)
        checkpointer.load(str(path))  # and it still works

    @pytest.mark.parametrize("name", ["no such file.pth", "."])
    def test_no_file(self, backbone, tmp_path, name):
        with pytest.raises(UserError, match=r"there is no such file|it is a directory"):
            MambaVisionCheckpointer(backbone()).load(str(tmp_path / name))


class TestSave:
    def test_resume(self, backbone, tmp_path):
        model = backbone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        MambaVisionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("at_3", iteration=3)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["at_3.pth", "last_checkpoint"]

        other = backbone()
        other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.2)
        checkpointer = MambaVisionCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
        assert checkpointer.resume_or_load("", resume=True) == {"iteration": 3}
        assert same(other.state_dict(), model.state_dict())
        ours, theirs = other_optimizer.state_dict(), optimizer.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert all(same(ours["state"][i], theirs["state"][i]) for i in theirs["state"])

    def test_detectron2_reads_it(self, backbone, tmp_path):
        model, other = backbone(), backbone()
        MambaVisionCheckpointer(model, str(tmp_path)).save("model_final")
        DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
        assert same(other.state_dict(), model.state_dict())

    def test_all_or_nothing(self, backbone, tmp_path, monkeypatch):
        checkpointer = MambaVisionCheckpointer(backbone(), str(tmp_path))
        checkpointer.save("model")
        before = (tmp_path / "model.pth").read_bytes()

        def fail(data, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save("model")
        assert (tmp_path / "model.pth").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]

    def test_no_directory(self, backbone, tmp_path):
        checkpointer = MambaVisionCheckpointer(backbone(), str(tmp_path / "gone"))
        with pytest.raises(UserError, match=r"model\.pth: cannot be written: No such file"):
            checkpointer.save("model")

    def test_not_the_last(self, backbone, tmp_path):
        checkpointer = MambaVisionCheckpointer(backbone(), str(tmp_path))
        checkpointer.save("model_0000001")
        checkpointer.save("model_best", last=False)
        assert (tmp_path / "model_best.pth").exists()
        assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")

    def test_no_room(self, backbone, tmp_path):
        """Stopped by the system amid the weights, as by a full disk."""
        checkpointer = MambaVisionCheckpointer(backbone(), str(tmp_path))
        checkpointer.save("model")
        before = (tmp_path / "model.pth").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            with pytest.raises(UserError, match=r"model\.pth: cannot be written: File too large"):
                checkpointer.save("model")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "model.pth").read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]

    def test_not_the_main_process(self, backbone, tmp_path):
        MambaVisionCheckpointer(backbone(), str(tmp_path), save_to_disk=False).save("model")
        assert list(tmp_path.iterdir()) == []


def test_written_files_are_as_readable_as_others(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with files.atomic_write(tmp_path / "atomic") as file:
        file.write(b"x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_removes_what_a_killed_process_had_begun(tmp_path):
    for name in (".model.pth.a1b2.partial", "model.pth", ".hidden", "mine.partial"):
        (tmp_path / name).touch()
    files.remove_partial_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "mine.partial", "model.pth"]
    files.remove_partial_files(tmp_path / "gone")


def test_unreachable_address():
    with pytest.raises(UserError, match=r"https://host\.invalid/a\.pth: cannot be downloaded"):
        files.fetch("https://host.invalid/a.pth")


def test_model_zoo_has_the_released_detectors(detector, released, monkeypatch):
    """Their names are configs', and what is fetched from their addresses is loaded."""
    assert set(model_zoo.RELEASED) < set(model_zoo.names())
    name = "cascade_mask_rcnn_mamba_vision_tiny_3x_coco"
    address = f"https://huggingface.co/nvidia/{name}/resolve/main/{name}.pth"
    assert model_zoo.RELEASED[name] == address
    get_local_path = PathManager.get_local_path
    monkeypatch.setattr(
        PathManager,
        "get_local_path",
        lambda path: str(released) if path == address else get_local_path(path),
    )
    monkeypatch.setattr(model_zoo, "instantiate", lambda _: detector())
    model = model_zoo.get(name, trained=True, device="cpu")
    assert same(model.state_dict(), convert(read_checkpoint(released)).weights)


def test_the_docs_list_the_released_detectors():
    page = (Path(__file__).parents[2] / "docs/model_zoo.md").read_text()
    for name, address in model_zoo.RELEASED.items():
        assert f"[model]({address})" in page
        assert f"(../configs/{name}.py)" in page
