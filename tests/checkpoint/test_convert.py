import json
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from mamba_vision import VARIANTS, MambaVision, model_zoo
from mamba_vision.checkpoint import convert, read_checkpoint
from mamba_vision.checkpoint.names import head_name
from mamba_vision.errors import UserError

DATA = Path(__file__).parents[1] / "data"
BACKBONES = json.loads((DATA / "mamba_vision_names.json").read_text())
HEADS = json.loads((DATA / "mmdetection_head_names.json").read_text())


def on_meta(build):
    with torch.device("meta"):
        return build()


class TestDetectors:
    @pytest.mark.parametrize(
        ("size", "variant"), [("tiny", "tiny"), ("small", "small"), ("base", "base")]
    )
    def test_full_size(self, size, variant):
        """The released names and shapes fill the config's model, every one and no other."""
        shapes = {f"backbone.{name}": shape for name, shape in BACKBONES[size].items()}
        shapes |= HEADS["common"] | HEADS[size]
        state = {name: torch.rand(shape) for name, shape in shapes.items()}
        conversion = convert({"meta": {"epoch": 36}, "state_dict": state, "optimizer": {}})
        assert conversion.source == "mmdetection detector"
        assert conversion.variant == (variant,)
        assert conversion.num_classes == 80
        assert conversion.left_out == dict.fromkeys(("meta", "optimizer"), "not the weights")
        assert sum(conversion.moved.values()) == len(conversion.weights) == len(state)
        # Each tensor of the file is there once, under a name of its own.
        assert {id(t) for t in conversion.weights.values()} == {id(t) for t in state.values()}

        config = model_zoo.get_config(f"cascade_mask_rcnn_mamba_vision_{size}_3x_coco")
        model = on_meta(lambda: instantiate(config.model))
        model.load_state_dict(conversion.weights, strict=True, assign=True)

    def test_summary(self, released):
        lines = str(convert(read_checkpoint(released))).splitlines()
        assert lines == [
            "mmdetection detector, MambaVision of sizes of its own, 5 classes",
            "   126 tensors -> backbone.bottom_up.*",
            "     8 tensors -> backbone.fpn_lateral*",
            "     8 tensors -> backbone.fpn_output*",
            "     6 tensors -> proposal_generator.rpn_head*",
            "    12 tensors -> roi_heads.box_predictor*",
            "    78 tensors -> roi_heads.box_head*",
            "    36 tensors -> roi_heads.mask_head*",
            "     1 left out (not the weights): meta",
        ]

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("neck.lateral_convs.0.conv.weight", "backbone.fpn_lateral2.weight"),
            ("neck.fpn_convs.3.conv.bias", "backbone.fpn_output5.bias"),
            ("rpn_head.rpn_cls.bias", "proposal_generator.rpn_head.objectness_logits.bias"),
            (
                "roi_head.bbox_head.2.shared_convs.3.bn.running_var",
                "roi_heads.box_head.2.conv4.norm.running_var",
            ),
            ("roi_head.bbox_head.0.shared_fcs.0.weight", "roi_heads.box_head.0.fc1.weight"),
            ("roi_head.bbox_head.1.fc_reg.bias", "roi_heads.box_predictor.1.bbox_pred.bias"),
            ("roi_head.mask_head.1.upsample.weight", "roi_heads.mask_head.1.deconv.weight"),
            ("roi_head.bbox_head.fc_cls.weight", None),
            ("roi_head.semantic_head.0.weight", None),
        ],
    )
    def test_names(self, theirs, ours):
        assert head_name(theirs) == ours

    @pytest.mark.parametrize("prefix", ["", "module.", "model."])
    def test_prefixes(self, released, prefix):
        data = read_checkpoint(released)
        plain = convert(data).weights
        state = {f"{prefix}{name}": value for name, value in data["state_dict"].items()}
        assert convert({"state_dict": state}).weights.keys() == plain.keys()

    def test_a_tensor_that_fits_nothing(self, released):
        data = read_checkpoint(released)
        data["state_dict"]["roi_head.glbctx_head.fc.weight"] = torch.rand(3)
        data["state_dict"]["backbone.levels.2.blocks.1.mixer.D2"] = torch.rand(3)
        with pytest.raises(UserError, match=r"2 tensors fit nothing.*glbctx_head.*mixer\.D2"):
            convert(data)


class TestBackbones:
    @pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "model.", "module.encoder."])
    @pytest.mark.parametrize("key", ["state_dict", "model", None])
    def test_wrappings(self, imagenet, prefix, key):
        state = imagenet(prefix)
        conversion = convert({key: state, "epoch": 3} if key else state)
        assert conversion.source == "ImageNet backbone"
        assert conversion.num_classes is None
        classifier = ["norm.weight", "norm.bias", "norm.running_mean", "head.bias", "head.weight"]
        reasons = {"epoch": "not the weights"} if key else {}
        assert conversion.left_out == reasons | dict.fromkeys(classifier, "the classifier's")
        assert len(conversion.weights) == len(state) - len(classifier)
        for name, value in conversion.weights.items():
            assert state[prefix + name.removeprefix("backbone.bottom_up.")] is value

    @pytest.mark.parametrize("name", VARIANTS)
    def test_variants(self, name):
        state = on_meta(lambda: MambaVision(**VARIANTS[name])).state_dict()
        state = {key: value for key, value in state.items() if "outnorm" not in key}
        conversion = convert({"state_dict": state}, prefix="")
        assert name in conversion.variant
        shapes = {(v["dim"], v["in_dim"], tuple(v["depths"])) for v in VARIANTS.values()}
        assert len(shapes) == 7
        assert len(conversion.variant) == (2 if "_" in name or name == "large2" else 1)
        assert conversion.weights == state

    @pytest.mark.parametrize(
        "changes",
        [
            {"layer_scale": 1e-5},
            {"layer_scale_conv": 1e-5},
            {"mlp_ratio": 3},
            {"mlp_ratio": 2.7, "dim": 20, "num_heads": (1, 1, 4, 4)},
            {"depths": (2, 1, 10, 2)},
            {"in_chans": 4, "in_dim": 8},
        ],
        ids=str,
    )
    def test_other_sizes(self, imagenet, backbone, changes):
        conversion = convert({"state_dict": imagenet(**changes)}, prefix="")
        assert conversion.variant == ()
        fits = backbone(**changes).load_state_dict(conversion.weights, strict=False)
        assert fits.unexpected_keys == []
        assert all(name.startswith("outnorm") for name in fits.missing_keys)

    def test_batch_counters_may_lack(self, imagenet):
        state = {k: v for k, v in imagenet().items() if not k.endswith("num_batches_tracked")}
        assert len(convert({"model": state}).weights) == len(state) - 5

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda s: s.pop("levels.2.blocks.1.attn.x", s.pop("levels.3.blocks.0.norm1.bias")),
             "lacks levels.3.blocks.0.norm1.bias"),
            (lambda s: s.update({"levels.0.blocks.0.conv1.weight": torch.rand(16, 16, 1, 1)}),
             r"levels.0.blocks.0.conv1.weight of shape \(16, 16, 1, 1\)"),
            (lambda s: s.update({"aux.weight": torch.rand(1)}), "fit nothing.*aux.weight"),
            (lambda s: s.update({"levels.2.blocks.0.norm1.weight": [1]}), r"norm1.weight' is"),
            (lambda s: s.pop("patch_embed.conv_down.3.weight"), "incomplete"),
            (lambda s: s.pop("patch_embed.conv_down.0.weight"), "has no 'patch_embed"),
            (lambda s: s.update({"module.head.bias": torch.rand(1)}), "two tensors are called"),
        ],
    )  # fmt: skip
    def test_errors(self, imagenet, change, reason):
        state = imagenet()
        change(state)
        with pytest.raises(UserError, match=reason):
            convert({"state_dict": state})

    def test_already_converted(self, released):
        weights = convert(read_checkpoint(released)).weights
        with pytest.raises(UserError, match="Detectron2 checkpoint already"):
            convert({"model": weights})
