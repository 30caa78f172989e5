"""Configs fitted to data of the user's own, and what refuses to be."""

import argparse
import json

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog

from mamba_vision import model_zoo
from mamba_vision.data import check_dataset, draw_shapes
from mamba_vision.data.coco_sets import read_set
from mamba_vision.engine import fit_to_data, load_config
from mamba_vision.engine.own_data import read_own_data
from mamba_vision.errors import UserError

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"
SIZES = ("tiny", "small", "base")
CONFIGS = [
    NANO,
    "cascade_mask_rcnn_mamba_vision_tiny_finetune",
    *(f"cascade_mask_rcnn_mamba_vision_{size}_3x_coco" for size in SIZES),
    *(f"cascade_rcnn_mamba_vision_{size}_3x_coco" for size in SIZES),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "set"
    draw_shapes(folder, 5)
    return folder


@pytest.fixture
def own(drawn, tmp_path):
    """Write the drawn annotations with two of the classes, changed; returns the CocoSet."""

    def write(name, change=lambda content: None):
        content = json.loads((drawn / "annotations.json").read_text())
        content["categories"] = [{"id": 2, "name": "dog"}, {"id": 9, "name": "cat"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 2 if annotation["category_id"] < 3 else 9
        change(content)
        (tmp_path / name).write_text(json.dumps(content))
        return read_set(tmp_path / name, drawn / "images")

    yield write
    for name in list(DatasetCatalog):
        if name.startswith(str(tmp_path)):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def without_masks(content):
    for annotation in content["annotations"]:
        del annotation["segmentation"]


def rename(*names):
    def change(content):
        content["categories"] = [
            {"id": i, "name": name} for i, name in zip((2, 9, *range(10, 20)), names)
        ]

    return change


def parameters(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in instantiate(config.model).named_parameters()}


def test_what_is_read(own, drawn, tmp_path):
    def spoil(content):
        for annotation in content["annotations"]:
            if annotation["image_id"] == 1:
                annotation["iscrowd"] = 1
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
        content["categories"].reverse()

    found = own("a.json", spoil)
    assert found.name == found.json_file == str(tmp_path / "a.json")
    assert found.image_root == str(drawn / "images")
    assert found.classes == ("dog", "cat")  # in the order of their ids
    assert found.images == 5
    assert found.training_images == 3
    assert found.has_masks
    assert not own("b.json", without_masks).has_masks


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masks", [True, False])
def test_every_config_can_be_fitted(own, name, masks):
    change = (lambda content: None) if masks else without_masks
    train, val = own("train.json", change), own("val.json", change)
    config, before = model_zoo.get_config(name), model_zoo.get_config(name)
    words = fit_to_data(config, train, val)

    expected = parameters(before)
    has_masks = any("mask_head" in parameter for parameter in expected)
    if not masks:
        expected = {n: shape for n, shape in expected.items() if "mask_head" not in n}
    found = parameters(config)
    assert found.keys() == expected.keys()
    for parameter, shape in found.items():
        if "cls_score" in parameter:
            assert shape[0] == 2 + 1
        elif "bbox_pred" in parameter:
            assert shape[0] == 2 * 4
        elif "mask_head" in parameter and ".predictor." in parameter:
            assert shape[0] == 2
        else:
            assert shape == expected[parameter]
    assert "2 classes: dog, cat" in words
    assert any("without mask heads" in word for word in words) == (has_masks and not masks)

    assert [config.dataloader[part].dataset.names for part in ("train", "test")] == [
        train.name,
        val.name,
    ]
    assert instantiate(config.dataloader.evaluator)._metadata.json_file == val.json_file
    for part in (train, val):
        check_dataset(part.name, 2)
    assert instantiate(config.dataloader.train.mapper).use_instance_mask == (has_masks and masks)
    (sample,) = [r for r in DatasetCatalog.get(train.name) if r["image_id"] == 1]
    mapped = instantiate(config.dataloader.train.mapper)(sample)
    assert mapped["instances"].has("gt_masks") == (has_masks and masks)


def test_the_schedule_follows_the_images(own):
    """Worked by hand: 5 images at 2 a step are 3 steps a pass."""

    def fitted(name, overrides=(), **kwargs):
        config = load_config(name, overrides)
        fit_to_data(config, train, val, **kwargs)
        return config

    train, val = own("train.json"), own("val.json")
    coco = "cascade_mask_rcnn_mamba_vision_tiny_3x_coco"
    batch = ["dataloader.train.total_batch_size=2"]
    config = fitted(coco, batch, epochs=400)
    assert config.train.max_iter == 1200
    assert config.train.eval_period == round(1200 / 36)  # once in 36 parts, as of COCO's training
    assert config.train.checkpointer.period == round(1200 / 36)
    assert config.lr_multiplier.warmup_iters == 1200 / 20
    schedule = instantiate(config.lr_multiplier)
    assert schedule(0.05) == 1
    assert schedule(0.76) == pytest.approx(0.1)  # after 27 parts of 36

    assert fitted(coco, batch).train.max_iter == 1000  # 36 x 3 would be few
    assert fitted(coco, batch, epochs=1).train.max_iter == 3
    assert fitted(coco, batch, epochs=9).train.eval_period == 3  # not more often than once a pass
    long = fitted(coco, batch, epochs=100_000)
    assert long.lr_multiplier.warmup_iters == 1000  # as it was
    empty_kept = ["dataloader.train.dataset.filter_empty=False", *batch]
    train = own(
        "train.json",
        lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] > 2]),
    )
    assert fitted(coco, batch, epochs=10).train.max_iter == 10 * 2
    assert fitted(coco, empty_kept, epochs=10).train.max_iter == 10 * 3

    config = fitted("cascade_mask_rcnn_mamba_vision_tiny_finetune", epochs=100)
    assert config.train.max_iter == 100
    assert config.train.eval_period == 10  # ten times, as before
    config = fitted(NANO, epochs=100)
    assert config.train.eval_period == 0  # at the end alone, as before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dog"], "val.json lacks cat; give"),
        (["dog", "cat", "owl"], "train.json lacks owl"),
        (["dog", "car"], "val.json lacks cat; .*train.json lacks car"),
        (["cat", "dog"], "the same names, in another order"),
    ],
)
def test_classes_that_differ(own, names, message):
    def change(content):
        rename(*names)(content)
        known = {category["id"] for category in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]

    train, val = own("train.json"), own("val.json", change)
    with pytest.raises(UserError, match=message):
        fit_to_data(model_zoo.get_config(NANO), train, val)


def test_the_config_saved_registers_its_data_again(own, tmp_path):
    train, val = own("train.json"), own("val.json")
    config = model_zoo.get_config(NANO)
    fit_to_data(config, train, val, epochs=3)
    LazyConfig.save(config, str(tmp_path / "config.yaml"))
    for data in (train, val):
        DatasetCatalog.remove(data.name)
        MetadataCatalog.remove(data.name)
    again = load_config(tmp_path / "config.yaml")
    assert again.train.max_iter == config.train.max_iter == 6
    for data in (train, val):
        assert MetadataCatalog.get(data.name).thing_classes == ["dog", "cat"]
        assert len(DatasetCatalog.get(data.name)) == 5
    assert parameters(again) == parameters(config)

    own("val.json", rename("dog", "bird"))  # the file changes behind the config's back
    with pytest.raises(
        UserError, match="lists other classes than the config's data_sets: dog, cat"
    ):
        check_dataset(val.name)
    again.data_sets[val.name].pop("image_root")
    LazyConfig.save(again, str(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match="give it json_file, image_root and thing_classes"):
        load_config(tmp_path / "config.yaml")


def test_evaluation_alone_keeps_model_and_schedule(own):
    config, before = model_zoo.get_config(NANO), model_zoo.get_config(NANO)
    val = own("val.json", without_masks)
    assert fit_to_data(config, None, val) == [f"{val.name} has no masks: only boxes are evaluated"]
    assert list(instantiate(config.dataloader.evaluator)._tasks) == ["bbox"]
    assert config.model == before.model
    assert config.train == before.train
    assert config.dataloader.train == before.dataloader.train
    assert config.dataloader.test.dataset.names == val.name
    with pytest.raises(UserError, match="2 classes and the model 6"):
        check_dataset(val.name, config.model.roi_heads.num_classes)
    other = own("other.json", rename("dog", "bird"))
    with pytest.raises(UserError, match=r"the config's data_sets and .*other\.json differ"):
        fit_to_data(config, None, other)


def test_a_set_registered_anew_is_the_new_one(own, drawn):
    train, val = own("train.json"), own("val.json")
    fit_to_data(model_zoo.get_config(NANO), train, val)
    held = MetadataCatalog.get(val.name)
    check_dataset(val.name, 2)
    records = DatasetCatalog[val.name]
    fit_to_data(model_zoo.get_config(NANO), train, val)
    assert DatasetCatalog[val.name] is records  # nothing changed: what was loaded is kept
    train, val = own("train.json", rename("owl", "bat")), own("val.json", rename("owl", "bat"))
    fit_to_data(model_zoo.get_config(NANO), train, val)
    assert MetadataCatalog.get(val.name).thing_classes == ["owl", "bat"]
    assert held.thing_classes == ["dog", "cat"]


def test_a_config_without_such_heads(own, toy):
    with pytest.raises(UserError, match=r"no model\.roi_heads\.num_classes"):
        fit_to_data(load_config(toy), own("train.json"), own("val.json"))


def options(**given):
    names = ("train_json", "train_images", "val_json", "val_images", "epochs")
    return argparse.Namespace(**{"eval_only": False} | dict.fromkeys(names) | given)


def test_options_that_do_not_go_together(own, drawn, tmp_path):
    data, images = own("a.json").json_file, drawn / "images"
    train = {"train_json": data, "train_images": images}
    val = {"val_json": data, "val_images": images}
    assert read_own_data(options()) is None
    assert read_own_data(options(**train, **val, epochs=3)).epochs == 3
    assert read_own_data(options(**val, eval_only=True)).train is None
    for given, message in (
        ({"train_json": data}, "--train-json needs --train-images too"),
        ({"val_images": images}, "--val-images needs --val-json too"),
        (train, "--train-json needs --val-json and --val-images too"),
        (val, "--val-json alone cannot be trained on"),
        ({"epochs": 3}, "--epochs 3 must be 1 or more and goes with --train-json"),
        (train | val | {"epochs": 0}, "--epochs 0 must be 1 or more"),
        (train | {"val_json": tmp_path / "none.json", "val_images": images}, "does not exist"),
        (train | {"val_json": data, "val_images": tmp_path / "none"}, "image folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_own_data(options(**given))


def test_masks_in_one_file_alone(own):
    config = model_zoo.get_config(NANO)
    whole, boxes = own("a.json"), own("b.json", without_masks)
    with pytest.raises(UserError, match=r"a\.json has masks and .*b\.json has none"):
        fit_to_data(config, whole, boxes)
    fit_to_data(config, boxes, whole)  # the model finds none, and none are evaluated
    config = model_zoo.get_config(NANO)
    fit_to_data(config, None, boxes)
    fit_to_data(config, None, whole)
    assert instantiate(config.dataloader.evaluator)._tasks is None  # again all that is found


def test_nothing_to_train_on(own):
    crowded = own("train.json", lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    with pytest.raises(UserError, match=r"train\.json: no image has an object to train on"):
        fit_to_data(model_zoo.get_config(NANO), crowded, own("val.json"))


def test_broken_annotations_are_named(own):
    def spoil(content):
        content["annotations"][0]["category_id"] = 77

    with pytest.raises(UserError, match=r"a.json: annotation 1 has category_id 77"):
        own("a.json", spoil)
