"""The table of ablations: its rows, its file, and that no run is made twice."""

import json

import pytest
from fastdistill.training import ADDConfig, ablate
from fastdistill.training.settings import changed

from fastdistill import cli


@pytest.fixture
def runs(monkeypatch):
    """What would be trained, with figures that tell the runs apart."""
    seen = []

    def run(config, teacher, images, device):
        seen.append(config)
        return {"fd": len(seen), "accuracy": 1, "diversity": 2, "seconds": 1.0}

    monkeypatch.setattr(ablate, "_run", run)
    return seen


def test_every_row_can_be_configured_and_none_is_another_ones_copy():
    configs = [changed(ADDConfig(), **row.changes) for row in ablate.ROWS]
    same = [row.name for row, config in zip(ablate.ROWS, configs) if config == configs[0]]
    # The conditioning that is the default stands in the table twice, once in its group.
    assert same == ["as configured", *[name for name in same[1:] if name in ("text", "image", "text and image")]]
    assert len(same) <= 2
    assert len({row.name for row in ablate.ROWS}) == len(ablate.ROWS)


def test_all_rows_train_as_long_with_each_seed(runs, tmp_path):
    rows = ablate.chosen_rows(["loss terms", "4 steps"])
    config = changed(ADDConfig(), trainer={"updates": 7})
    table = ablate.ablate(tmp_path / "table.json", config=config, rows=rows, seeds=(3, 4))
    assert [config.trainer.updates for config in runs] == 6 * [7]
    assert [config.trainer.seed for config in runs] == [3, 4, 3, 4, 3, 4]
    assert [(c.distill_weight > 0, c.adversarial_weight > 0, c.teacher_steps) for c in runs[::2]] == [
        (False, True, 1),
        (True, False, 1),
        (True, True, 4),
    ]
    assert table == json.loads((tmp_path / "table.json").read_text())
    lines = ablate.as_markdown(table, rows).splitlines()
    assert lines[2:] == [
        "| loss terms | adversarial alone | 1.500 (1.000 to 2.000) | 1.000 | 2.000 |",
        "| loss terms | distillation alone | 3.500 (3.000 to 4.000) | 1.000 | 2.000 |",
        "| teacher | 4 steps | 5.500 (5.000 to 6.000) | 1.000 | 2.000 |",
    ]


def test_an_interrupted_table_is_continued_where_it_stopped(runs, tmp_path, monkeypatch):
    out, rows = tmp_path / "table.json", ablate.chosen_rows(["teacher"])
    whole, calls = ablate._run, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(ablate, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(out, rows=rows)
    assert list(json.loads(out.read_text())["rows"]) == ["2 steps"]
    monkeypatch.setattr(ablate, "_run", whole)
    table = ablate.ablate(out, rows=rows)
    assert [config.teacher_steps for config in runs] == [2, 4]
    assert ablate.ablate(out, rows=rows) == table
    assert len(runs) == 2
    with pytest.raises(ValueError, match=r"other settings \(config\.trainer\.updates\); needed the same"):
        ablate.ablate(out, config=changed(ADDConfig(), trainer={"updates": 3}), rows=rows)


def test_a_file_that_is_no_table_is_left_as_it_is(tmp_path):
    out = tmp_path / "table.json"
    out.write_text("[1]")
    with pytest.raises(ValueError, match="is no table of ablations"):
        ablate.ablate(out)
    assert out.read_text() == "[1]"


def run_cli(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, *capsys.readouterr()


def test_the_command_prints_the_table(runs, tmp_path, capsys):
    out = tmp_path / "table.json"
    code, printed, _ = run_cli(
        ["ablate", "add", "--out", str(out), "--updates", "5", "--seeds", "0,1", "--rows", "2 steps", "--set",
         "trainer.batch_size=8"], capsys,
    )  # fmt: skip
    assert code == 0
    assert "| teacher | 2 steps | 1.500 (1.000 to 2.000) |" in printed
    assert [(config.trainer.updates, config.trainer.batch_size) for config in runs] == [(5, 8), (5, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "dmd"], "method 'dmd': no table of ablations; known: add"),
        (["ablate", "add", "--rows", "losses"], "rows: 'losses' is none of the table; known: as configured"),
        (["ablate", "add", "--seeds", "a"], "--seeds a: needed a list of whole numbers"),
        (["ablate", "add", "--set", "timestep=3"], "unknown setting; did you mean timesteps?"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(arguments, message, capsys):
    code, _, errors = run_cli(arguments, capsys)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
