"""tools/analyze_model.py."""

NANO = "cascade_mask_rcnn_mamba_vision_nano_shapes"


def numbers(line, name):
    return [float(x.replace(",", "")) for x in line.removeprefix(name).split()]


def test_the_table_adds_up(tool, capsys):
    assert tool("analyze_model")(["--config-file", NANO, "--size", "640", "960"]) == 0
    header, columns, *rows = capsys.readouterr().out.splitlines()
    assert header == "an image of 640 x 960, 1000 RoIs, 100 masks; multiply-adds in G"
    assert columns.split() == ["part", "parameters", "layers", "attention", "scan", "sum"]
    parts = ["backbone", "FPN", "RPN", "box heads", "mask heads"]
    *table, total = [numbers(row, name) for row, name in zip(rows, [*parts, "all"], strict=True)]
    assert all(row[0] > 0 and row[1] > 0 for row in table)
    assert table[0][2] > 0  # attention
    assert sum(row[0] for row in table) == total[0]
    for column in range(1, 5):
        assert abs(sum(row[column] for row in table) - total[column]) < 0.05 * 6
    for row in [*table, total]:
        assert abs(sum(row[1:4]) - row[4]) < 0.05 * 4


def test_window_padding_and_overrides(tool, capsys):
    def backbone(*arguments):
        assert (
            tool("analyze_model")(["--config-file", NANO, "--size", "320", "320", *arguments]) == 0
        )
        return capsys.readouterr().out.splitlines()[2]

    padded = backbone()  # maps of 20 x 20 and 10 x 10, windows of 16 and 8
    assert backbone("--window-padding", "fit") != padded
    assert backbone("--window-padding", "fit") == backbone(
        "model.backbone.bottom_up.window_size=[8,8,10,5]"
    )


def test_a_mistake_is_one_line(tool, capsys):
    for arguments, word in (
        (["--config-file", NANO, "--size", "100", "128"], "not multiples of 32"),
        (["--config-file", NANO, "--window-padding", "none"], "--window-padding"),
        (["--config-file", "nowhere.py"], "nowhere.py does not exist"),
    ):
        assert tool("analyze_model")(arguments) == 2
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") == 1
