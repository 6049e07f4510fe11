"""The memory table of the documentation: every line is a command, and says what that command prints."""

import json
import shlex

import pytest
from fastdistill.bench import plans
from fastdistill.training.memory_plan import GIB
from typer.testing import CliRunner

from fastdistill.cli import app


@pytest.mark.parametrize("line", [plans.Line("dmd2", "sd15-tiny", 2, "lora:4", optimizer="8bit")])
def test_a_line_says_what_its_command_prints(line):
    printed = CliRunner().invoke(app, [*shlex.split(line.command)[1:], "--json"])
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert plans.row(line) == f"| `{line.command}` | {found['peak_bytes'] / GIB:.1f} | 24 GB |"
    assert found["cards"]["24 GB"]


def test_lines_go_from_the_plainest_to_adapters_for_every_architecture():
    for architecture in ("sd15", "sd21", "sdxl"):
        commands = [line.command for line in plans.lines(architecture)]
        assert len(set(commands)) == len(commands)
        assert any("lora:64" in command for command in commands)
