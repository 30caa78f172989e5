"""MambaVision as a Detectron2 backbone.

Shape legend: B images, H x W pixels; feature res{i + 2} of stage i (0-3) is
(B, dim * 2**i, H / s, W / s) with stride s = 4 * 2**i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..errors import UserError
from ..ops import add_layer_norm
from .attention import ATTENTION_BACKENDS
from .stages import ConvStage, Stage, Stem, WindowStage
from .windows import PADDINGS

__all__ = ["MambaVision"]

_FEATURES = ("res2", "res3", "res4", "res5")
_NORMS = ("BN", "SyncBN", "naiveSyncBN", "FrozenBN")
_DIVISIBILITY = 32


class MambaVision(Backbone):
    """The hybrid Mamba-Transformer backbone of arXiv:2407.08083, for dense prediction.

    A stem, two convolutional stages, and two stages of Mamba mixers followed by attention. Each
    feature goes through a LayerNorm over its channels. Parameter names are those of the released
    weights; norms of features not asked for, and stages after the last one asked for, are not
    built. The maps are dense in the ``channels_last`` memory format.

    Args:
        dim: channels of the first stage; each next one has twice as many.
        in_dim: channels between the stem's two convs.
        depths: blocks of each stage. In a windowed stage of depth d the last d // 2 attend.
        num_heads: attention heads of each stage; the first two numbers have no effect.
        window_size: nominal side of each stage's windows, in tokens; likewise.
        mlp_ratio: hidden channels of an MLP over its input's.
        layer_scale: start of the windowed blocks' layer scale; None for no such parameters.
        layer_scale_conv: the same for the convolutional blocks.
        drop_path_rate: probability of dropping the last block's branches, in [0, 1); the other
            blocks' rise to it linearly from 0. Windows, not images, are dropped in the last stages.
        in_chans: channels of the input.
        out_features: which of ``res2`` .. ``res5`` to return.
        norm: ``"BN"``, ``"SyncBN"`` (PyTorch's: plain BatchNorm in a single process; several
            processes need GPUs), ``"naiveSyncBN"`` (Detectron2's: several processes on CPUs too),
            ``"FrozenBN"``, or a function from channels to a layer.
        freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and the first stage (its downsampling
            and its feature's norm too), and so on up to 5. Frozen batch norms use their running
            statistics, as in Detectron2's ResNet, and frozen blocks drop no path.
        activation_checkpointing: in training trade time for memory, block by block.
        window_padding: ``"full"`` pads a map to whole windows, as the released weights expect;
            ``"fit"`` cuts it into as many windows, of equal size, that pad only what that needs.
        fused_norm: add and normalize by the fastest backend of
            :func:`~mamba_vision.ops.add_layer_norm` rather than by PyTorch's operators. Either way
            the features have autocast's dtype, where it is on.
        fused_linear: compute the MLPs and attention's linear layers by the fastest backend of
            :func:`~mamba_vision.ops.mlp` and :func:`~mamba_vision.ops.linear`, whose backward pass
            is faster and for an MLP needs less to be kept, rather than by PyTorch's operators.
        skip_padding: compute nothing that depends on padding alone: where a single window covers
            the map's rows or columns, the last block of its stage leaves out the padded ones.
        cuda_graphs: in training on a GPU record the windowed stages, but for their last blocks, and
            replay them: for the first two shapes of their input that come three times. Without
            effect where blocks are checkpointed, compiled or hooked.
        scan_backend, conv_backend: of :func:`~mamba_vision.ops.selective_scan` and
            :func:`~mamba_vision.ops.depthwise_conv1d_silu`; None leaves the choice to them.
        attention_backend: of :class:`~mamba_vision.backbone.attention.Attention`.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        dim: int,
        in_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Sequence[int],
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        out_features: Iterable[str] = _FEATURES,
        norm: str | Callable[[int], nn.Module] = "BN",
        freeze_at: int = 0,
        activation_checkpointing: bool = False,
        window_padding: str = "full",
        fused_norm: bool = True,
        fused_linear: bool = True,
        skip_padding: bool = True,
        cuda_graphs: bool = True,
        scan_backend: str | None = None,
        conv_backend: str | None = None,
        attention_backend: str | None = None,
    ) -> None:
        super().__init__()
        depths = _per_stage("depths", depths)
        num_heads = _per_stage("num_heads", num_heads)
        window_size = _per_stage("window_size", window_size)
        _check("mlp_ratio", mlp_ratio, _is_number(mlp_ratio) and mlp_ratio > 0, "a positive number")
        rate_fits = _is_number(drop_path_rate) and 0 <= drop_path_rate < 1
        _check("drop_path_rate", drop_path_rate, rate_fits, "a number in [0, 1)")
        _check("freeze_at", freeze_at, freeze_at in range(6), "a whole number from 0 to 5")
        _check("window_padding", window_padding, window_padding in PADDINGS, _either(PADDINGS))
        known = attention_backend is None or attention_backend in ATTENTION_BACKENDS
        _check("attention_backend", attention_backend, known, _either(ATTENTION_BACKENDS))
        for name, value in (("dim", dim), ("in_dim", in_dim), ("in_chans", in_chans)):
            _check(name, value, _is_positive_integer(value), "a positive whole number")
        for stage in (2, 3):
            _check(
                f"num_heads[{stage}]",
                num_heads[stage],
                dim * 2**stage % num_heads[stage] == 0,
                f"a divisor of the stage's {dim * 2**stage} channels",
            )

        self.in_chans = in_chans
        self.norm_backend = None if fused_norm else "torch"
        self._out_features = _features(out_features)
        self._out_feature_channels = {f: dim * 2**i for i, f in enumerate(_FEATURES)}
        self._out_feature_strides = {f: 4 * 2**i for i, f in enumerate(_FEATURES)}
        new_norm = _norm_factory(norm)
        stages = 1 + _FEATURES.index(self._out_features[-1])
        drop_paths = _drop_paths(drop_path_rate, depths)

        self.patch_embed = Stem(in_chans, in_dim, dim, new_norm)
        self.levels = nn.ModuleList()
        for i in range(stages):
            downsample = i + 1 < stages
            if i < 2:
                level: Stage = ConvStage(
                    dim * 2**i,
                    drop_paths[i],
                    norm=new_norm,
                    layer_scale=layer_scale_conv,
                    downsample=downsample,
                    activation_checkpointing=activation_checkpointing,
                )
            else:
                level = WindowStage(
                    dim * 2**i,
                    drop_paths[i],
                    num_heads=num_heads[i],
                    window_size=window_size[i],
                    window_padding=window_padding,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    downsample=downsample,
                    activation_checkpointing=activation_checkpointing,
                    skip_padding=skip_padding,
                    cuda_graphs=cuda_graphs,
                    scan_backend=scan_backend,
                    conv_backend=conv_backend,
                    norm_backend=self.norm_backend,
                    linear_backend=None if fused_linear else "torch",
                    attention_backend=attention_backend,
                )
            self.levels.append(level)
        for i, feature in enumerate(_FEATURES):
            if feature in self._out_features:
                self.add_module(f"outnorm{i}", nn.LayerNorm(dim * 2**i))

        self.apply(_initialize_linear)
        self._freeze(freeze_at)

    def _outnorm(self, stage: int) -> nn.LayerNorm | None:
        """The norm of a stage's feature; None where the feature was not asked for."""
        return getattr(self, f"outnorm{stage}", None)

    def _freeze(self, freeze_at: int) -> None:
        parts = [self.patch_embed, *self.levels][:freeze_at]
        norms = [self._outnorm(stage) for stage in range(freeze_at - 1)]
        for part in parts + [norm for norm in norms if norm is not None]:
            part.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(part)
            for module in part.modules():
                if isinstance(module, StochasticDepth):
                    module.p = 0.0

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this."""
        return _DIVISIBILITY

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of a batch of images.

        Args:
            x: (B, in_chans, H, W), H and W multiples of 32, floating point.

        Returns:
            The features asked for, by name, from fine to coarse; see the legend above.

        Raises:
            UserError: the input has another shape.
        """
        self._check_input(x)
        # Features and windows take channels last: convs that keep them so spare every transpose.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        features = {}
        for i, stage in enumerate(self.levels):
            feature, x = stage(x)
            if (norm := self._outnorm(i)) is not None:
                features[_FEATURES[i]] = self._normalized(feature, norm)
        return features

    def _normalized(self, feature: Tensor, norm: nn.LayerNorm) -> Tensor:
        tokens = feature.permute(0, 2, 3, 1)
        weights = norm.weight, norm.bias, norm.eps
        _, tokens = add_layer_norm(tokens, None, None, *weights, backend=self.norm_backend)
        return tokens.permute(0, 3, 1, 2)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise UserError(
                f"MambaVision's input x has the shape {tuple(x.shape)}: "
                f"give a batch of images, (B, {self.in_chans}, H, W)"
            )
        if any(side < _DIVISIBILITY or side % _DIVISIBILITY for side in x.shape[2:]):
            raise UserError(
                f"MambaVision's input x is {x.shape[2]} x {x.shape[3]} pixels, "
                f"not multiples of {_DIVISIBILITY}: pad it, as Detectron2's ImageList.from_tensors "
                f"does when given the backbone's size_divisibility"
            )


def _initialize_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _drop_paths(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop path probabilities, rising linearly from 0 to ``rate`` over all blocks, by stage."""
    last = max(sum(depths) - 1, 1)
    return [
        [rate * j / last for j in range(sum(depths[:i]), sum(depths[: i + 1]))]
        for i in range(len(depths))
    ]


def _norm_factory(norm: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    _check("norm", norm, callable(norm) or norm in _NORMS, f"{_either(_NORMS)}, or a function")
    return lambda channels: get_norm(norm, channels)


def _features(names: Iterable[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    known = 0 < len(names) == len(set(names)) and set(names) <= set(_FEATURES)
    _check("out_features", names, known, f"one or more of {', '.join(_FEATURES)}, each once")
    return [feature for feature in _FEATURES if feature in names]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _per_stage(name: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        numbers = tuple(values)
    except TypeError:
        numbers = ()
    correct = len(numbers) == len(_FEATURES) and all(map(_is_positive_integer, numbers))
    _check(name, values, correct, "four positive whole numbers, one for each stage")
    return numbers


def _either(choices: Sequence[str]) -> str:
    quoted = [f'"{choice}"' for choice in choices]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _check(name: str, value: object, correct: bool, remedy: str) -> None:
    if not correct:
        raise UserError(f"MambaVision's argument {name} is {value!r}: give {remedy}")
