"""A run as one configuration: which source wins, and that file, command line and facts say the same."""

import shlex
from pathlib import Path

import pytest
from fastdistill.training.documented import described
from fastdistill.training.registry import METHODS, config_class
from fastdistill.training.run import RunConfig, command, load_run, read_prompts, run_of, run_yaml
from fastdistill.training.settings import SettingsError


def written(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def test_options_win_over_settings_over_the_file_over_the_defaults(tmp_path):
    file = written(
        tmp_path,
        "teacher: of-file\ndevice: cpu\nmethod:\n  critic_ratio: 4\n  pair_steps: 7\n"
        "  trainer: {updates: 4, seed: 4, batch_size: 4}\n",
    )
    run = load_run(
        "dmd",
        file,
        ["critic_ratio=5", "trainer.updates=5", "trainer.seed=5", "teacher=of-set"],
        seed=6,
        teacher="of-option",
        updates=None,
    )
    trainer = run.method.trainer
    assert (run.teacher, trainer.seed) == ("of-option", 6)
    assert (run.method.critic_ratio, trainer.updates) == (5, 5)
    assert (run.device, run.method.pair_steps, trainer.batch_size) == ("cpu", 7, 4)
    assert (run.prompts, run.method.guidance_scale) == ("digits", 1.0)


def test_a_setting_that_run_and_method_both_have_is_the_methods():
    run = load_run("dmd", settings=["pairs=7", "method.pair_steps=3", "out=student"])
    assert (run.method.pairs, run.method.pair_steps, run.pairs, run.out) == (7, 3, None, Path("student"))


def test_a_file_knows_its_method(tmp_path):
    assert load_run(file=written(tmp_path, "method: {name: dmd, critic_ratio: 9}")).method.critic_ratio == 9
    assert load_run(file=written(tmp_path, "method: dmd")).method == config_class("dmd")()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("techer: a", "techer: unknown setting; did you mean teacher?"),
        ("critic_ratio: 4", "critic_ratio: unknown setting; did you mean method.critic_ratio?"),
        ("method: {critic_rato: 4}", "method.critic_rato: unknown setting; did you mean method.critic_ratio?"),
        ("method: {batch_size: 4}", "method.batch_size: unknown setting; did you mean method.trainer.batch_size?"),
        (
            "method: {student: {lerning_rate: 4}}",
            "method.student.lerning_rate: unknown setting; did you mean method.student.learning_rate?",
        ),
        ("method: {trainer: 4}", "method.trainer: needed settings of its own; got 4"),
        ("method: {trainer: {updates: 0}}", "method.trainer.updates must be 1 or more; got 0"),
        ("method: {name: other}", "method.name: the file is for other; the command is dmd"),
        ("method: 3", "method: needed a name, or settings; got 3"),
        ("prompts: []\nmethod: {trainer: {updates: x}}", "method.trainer.updates: needed a whole number; got 'x'"),
        ("export_dtype: int8", "export_dtype must be one of float16, bfloat16, float32; got 'int8'"),
    ],
)
def test_what_a_file_cannot_say_is_refused_with_its_name_and_place(tmp_path, text, message):
    file = written(tmp_path, text)
    with pytest.raises(SettingsError) as refused:
        load_run("dmd", file)
    assert str(refused.value) == f"{file}: {message}"


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"method 'dnd': unknown; known are .*dmd"):
        load_run(file=written(tmp_path, "method: dnd"))
    with pytest.raises(SettingsError, match=r"method\.name: is missing"):
        load_run(file=written(tmp_path, "teacher: a"))


def elaborate(method):
    return load_run(
        method,
        settings=["trainer.batch_size=3", "student.learning_rate=0.5"],
        teacher="some folder",
        prompts=["a seven", "two, three"],
        out="a/b",
        device="cpu",
        seed=3,
        updates=11,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [lambda method: RunConfig(method=config_class(method)()), elaborate])
def test_the_yaml_of_a_run_is_the_run(method, make, tmp_path):
    run = make(method)
    assert load_run(file=written(tmp_path, run_yaml(run))) == run
    assert load_run(method, written(tmp_path, run_yaml(run))) == run


@pytest.mark.parametrize("method", METHODS)
def test_the_command_of_a_run_is_the_run(method):
    run = elaborate(method)
    words = shlex.split(command(run))
    assert words[:3] == ["fastdistill", "train", method]
    pairs = list(zip(words[3::2], words[4::2]))
    settings = [value for name, value in pairs if name == "--set"]
    options = {name[2:].replace("-", "_"): value for name, value in pairs if name != "--set"}
    assert load_run(method, settings=settings, **{name: options[name] for name in options}) == run


def test_the_command_names_what_differs_from_the_defaults_alone():
    run = load_run("dmd", settings=["critic_ratio=5", "student.beta1=0.0"], out="some/student", seed=2)
    expected = "--teacher digits-teacher --prompts digits --out student --seed 2 --set critic_ratio=5"
    assert command(run, out="student") == f"fastdistill train dmd {expected}"


def test_every_field_of_a_run_is_documented():
    run = RunConfig(method=config_class("dmd")())
    assert [name for name, _, doc in described(run) if not doc] == []


def test_prompts_are_read_from_a_file_a_list_or_the_digits(tmp_path):
    file = written(tmp_path, " a seven \n\ntwo\n")
    assert read_prompts(str(file)) == ["a seven", "two"]
    assert read_prompts(("a", " ", "b ")) == ["a", "b"]
    assert len(read_prompts("digits")) == 300


@pytest.mark.parametrize(
    ("prompts", "message"), [("missing.txt", "missing.txt: No such file"), ((" ",), "no prompt in it")]
)
def test_prompts_that_are_none_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(prompts)


def test_the_facts_beside_a_student_are_its_run():
    run = elaborate("dmd")
    from fastdistill.training.run import _facts
    from fastdistill.training.settings import to_dict

    facts = {"method": "dmd", "config": to_dict(run.method), "run": _facts(run, ["a seven"])}
    told = run_of(facts)
    assert (told.method, told.teacher, told.prompts) == (run.method, run.teacher, run.prompts)
