import pytest
import torch

from mamba_vision.backbone.windows import crop_windows, cut_windows, join_windows, window_shape


@pytest.mark.parametrize(
    ("size", "window", "padding", "shape"),
    [
        ((50, 80), 112, "full", (112, 112)),
        ((50, 80), 112, "fit", (50, 80)),
        ((25, 40), 14, "full", (14, 14)),
        ((25, 40), 14, "fit", (13, 14)),  # 2 x 3 windows: ceil(25 / 2) x ceil(40 / 3)
        ((28, 42), 14, "fit", (14, 14)),
        ((1, 63), 14, "fit", (1, 13)),  # 5 windows of 13
    ],
)
def test_window_shape(size, window, padding, shape):
    assert window_shape(*size, window, padding) == shape


def test_cut_by_hand():
    # Two images of one channel, 3 x 5, in windows of 2 x 3: 2 x 2 of them, padded to 4 x 6.
    first = torch.arange(1.0, 16.0).view(1, 1, 3, 5)
    windows = cut_windows(torch.cat((first, -first)), (2, 3))
    expected = torch.tensor(
        [
            [1, 2, 3, 6, 7, 8],
            [4, 5, 0, 9, 10, 0],
            [11, 12, 13, 0, 0, 0],
            [14, 15, 0, 0, 0, 0],
        ]
    ).float()
    assert torch.equal(windows, torch.cat((expected, -expected)).unsqueeze(-1))
    assert windows.is_contiguous()


def test_crop_by_hand():
    windows = torch.arange(12.0).view(2, 6, 1)  # two of 2 x 3
    cropped = crop_windows(windows, (2, 3), (2, 2)).squeeze(-1)
    assert cropped.tolist() == [[0, 1, 3, 4], [6, 7, 9, 10]]
    assert crop_windows(windows, (2, 3), (1, 3)).squeeze(-1).tolist() == [[0, 1, 2], [6, 7, 8]]


@pytest.mark.parametrize(("shape", "part"), [((9, 9), (6, 7)), ((2, 9), (2, 7)), ((9, 3), (6, 3))])
def test_cropped_windows_join_to_the_map(shape, part):
    x = torch.randn(2, 5, 6, 7)
    cropped = crop_windows(cut_windows(x, shape), shape, part)
    assert cropped.is_contiguous()
    assert torch.equal(join_windows(cropped, part, (6, 7)), x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (3, 5), (7, 9), (12, 16), (1, 1)])
def test_join_undoes_cut(shape, channels_last):
    x = torch.randn(2, 6, 7, 9)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    joined = join_windows(cut_windows(x, shape), shape, (7, 9))
    assert torch.equal(joined, x)
    assert joined.is_contiguous(memory_format=torch.channels_last)


def test_one_whole_window_is_not_copied():
    x = torch.randn(2, 6, 7, 9).to(memory_format=torch.channels_last)
    windows = cut_windows(x, (7, 9))
    assert windows.data_ptr() == x.data_ptr()
    assert join_windows(windows, (7, 9), (7, 9)).data_ptr() == x.data_ptr()
