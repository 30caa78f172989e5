"""What holds for the arguments of every tool."""

from pathlib import Path

import pytest

TOOLS = sorted(path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py"))


@pytest.mark.parametrize("name", TOOLS)
def test_an_unknown_argument_is_one_line(tool, name, capsys):
    assert tool(name)(["--nonsense"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("name", TOOLS)
def test_help(tool, name, capsys):
    with pytest.raises(SystemExit) as end:
        tool(name)(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
