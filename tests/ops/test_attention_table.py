"""The choice table of attention: which rule decides, where tables come from, what a broken file says."""

import json

import pytest
import torch

from fastdistill.ops import attention, attention_table, explain
from fastdistill.ops.attention_table import (
    BACKENDS,
    TableError,
    choose,
    packaged_path,
    parse,
    preferred,
    read,
    user_path,
)

CPU = torch.device("cpu")


def site(D=64, N=1024, M=1024, heads=10, dtype="bfloat16", direction="forward"):
    return attention_table.Site(D, N, M, heads, dtype, direction)


def table(*rules):
    return {"device": "any", "source": "a test", "rules": [{"reason": "said so", **rule} for rule in rules]}


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Writes a table and names it in the environment."""

    def write(*rules, name="mine.json"):
        path = tmp_path / name
        path.write_text(json.dumps(table(*rules)))
        monkeypatch.setenv(attention_table.VARIABLE, str(path))
        return path

    return write


@pytest.fixture(autouse=True)
def no_tables_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    attention_table._table_of.cache_clear()
    attention_table._remembered.cache_clear()


def inputs(tokens=8, keys=8, width=16, dtype=torch.float32):
    return [torch.randn(1, 2, n, width, dtype=dtype) for n in (tokens, keys, keys)]


def decided(content, wanted):
    rules = parse(content).rules
    return next((rule.backends for rule in rules if rule.holds(wanted)), ())


def test_the_first_rule_that_holds_decides():
    rules = table({"D": [64, 64], "backends": ["triton"]}, {"backends": ["sdpa"]}, {"backends": ["reference"]})
    assert decided(rules, site(D=64)) == ("triton",)
    assert decided(rules, site(D=80)) == ("sdpa",)


@pytest.mark.parametrize("key", ["D", "N", "M", "heads"])
def test_both_ends_of_a_range_belong_to_it_and_null_is_no_end(key):
    closed, opened = table({key: [10, 20], "backends": ["triton"]}), table({key: [10, None], "backends": ["triton"]})
    found = [bool(decided(closed, site(**{key: value}))) for value in (9, 10, 15, 20, 21)]
    assert found == [False, True, True, True, False]
    assert [bool(decided(opened, site(**{key: value}))) for value in (9, 10, 10**9)] == [False, True, True]


def test_every_condition_of_a_rule_must_hold():
    rule = {"D": [64, 64], "M": [1, 128], "dtype": ["float16"], "direction": ["full"], "backends": ["triton"]}
    right = {"D": 64, "M": 77, "dtype": "float16", "direction": "full"}
    assert decided(table(rule), site(**right)) == ("triton",)
    for wrong in ({"D": 80}, {"M": 129}, {"dtype": "bfloat16"}, {"direction": "forward"}):
        assert decided(table(rule), site(**{**right, **wrong})) == ()


# ---- a call ---------------------------------------------------------------------------------------------------------


def test_a_call_is_decided_by_the_table_that_the_environment_names(named):
    path = named({"N": [1, 8], "backends": ["sdpa:math"]}, {"backends": ["reference"]})
    assert explain("attention", *inputs(8)).backend == "sdpa:math"
    assert explain("attention", *inputs(9)).backend == "reference"
    assert f"rule 2 of {path} (a test): reference: said so" in explain("attention", *inputs(9)).notes["choice"]


def test_a_backend_that_cannot_serve_gives_way_to_the_next_of_the_rule(named):
    named({"backends": ["sdpa:cudnn", "triton", "sdpa:math"]})
    assert explain("attention", *inputs()).backend == "sdpa:math"


def test_without_a_rule_the_ops_own_order_holds(named):
    named({"D": [8, 8], "backends": ["sdpa:math"]})
    explanation = explain("attention", *inputs())
    assert explanation.backend == "sdpa"
    assert explanation.notes["choice"].startswith("no rule of ")


def test_a_gradient_that_will_be_needed_is_the_direction_full(named):
    named({"direction": ["full"], "backends": ["sdpa:math"]}, {"backends": ["sdpa:flash"]})
    q, k, v = inputs()
    assert explain("attention", q, k, v).backend == "sdpa:flash"
    v.requires_grad_()
    assert explain("attention", q, k, v).backend == "sdpa:math"
    with torch.no_grad():
        assert explain("attention", q, k, v).backend == "sdpa:flash"


def test_heads_are_those_of_all_samples_and_the_dtype_is_autocasts(named):
    named(
        {"heads": [6, 6], "dtype": ["bfloat16"], "backends": ["sdpa:math"]},
        {"heads": [6, 6], "backends": ["reference"]},
    )
    q, k, v = (torch.randn(3, 2, 8, 16) for _ in range(3))
    assert explain("attention", q, k, v).backend == "reference"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain("attention", q, k, v).backend == "sdpa:math"
    assert explain("attention", q[:2], k[:2], v[:2]).backend == "sdpa"


def test_what_is_asked_for_by_name_needs_no_table(named):
    named({"backends": ["sdpa:math"]})
    assert explain("attention", *inputs(), backend="sdpa:flash").backend == "sdpa:flash"


def test_a_compiled_graph_holds_what_the_table_chose(named):
    named({"N": [1, 8], "backends": ["reference"]}, {"backends": ["sdpa:flash"]})
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.code))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda *t: attention(*t), fullgraph=True, dynamic=True, backend=keep)
    for tokens in (8, 12):
        q, k, v = inputs(tokens, 8)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert ["softmax" in code for code in graphs] == [True, False]


# ---- where tables come from -----------------------------------------------------------------------------------------


def test_the_users_own_table_wins_over_the_packages_and_the_environments_over_both(named):
    assert choose(site(), CPU).table.path == str(packaged_path("default"))
    own = user_path("cpu")
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(table({"backends": ["sdpa:math"]})))
    attention_table._table_of.cache_clear()
    assert choose(site(), CPU).table.path == str(own)
    path = named({"backends": ["sdpa:flash"]})
    assert choose(site(), CPU).table.path == str(path)


def test_a_table_is_read_once(named, monkeypatch):
    path = named({"backends": ["sdpa:math"]})
    assert preferred(site(), CPU) == ("sdpa:math",)
    path.unlink()
    assert preferred(site(), CPU) == ("sdpa:math",)
    assert preferred(site(N=77), CPU) == ("sdpa:math",)


def test_every_packaged_table_is_sound_and_decides_every_call():
    paths = sorted(packaged_path("default").parent.glob("*.json"))
    assert packaged_path("default") in paths
    for path in paths:
        rules = read(path).rules
        for direction in attention_table.DIRECTIONS:
            for dtype in attention_table.DTYPES:
                assert any(rule.holds(site(12345, 1, 1, 1, dtype, direction)) for rule in rules)


@pytest.mark.parametrize(
    ("wanted", "backend"),
    [
        (site(D=40, N=4096, M=4096, heads=8), "triton"),
        (site(D=80, N=1024, M=1024, heads=8, direction="full"), "triton"),
        (site(D=160, N=4096, M=4096, heads=64, direction="full"), "triton"),
        (site(D=64, N=4096, M=77), "triton"),
        (site(D=64, N=4096, M=4096), "sdpa"),
        (site(D=64, N=1024, M=1024, heads=10), "triton"),
        (site(D=64, N=1024, M=1024, heads=20), "sdpa"),
        (site(D=64, N=64, M=64, heads=20), "triton"),
        (site(D=512, N=4096, M=4096, heads=1), "triton"),
        (site(D=512, N=4096, M=4096, heads=1, dtype="float32"), "triton"),
        (site(D=64, N=4096, M=4096, dtype="float32"), "sdpa"),
    ],
    ids=str,
)
def test_the_estimates_prefer_what_their_reasons_say(wanted, backend):
    choice = choose(wanted, CPU)
    assert choice.backends[0] == backend
    assert "estimates, not measured" in str(choice)
    assert len(choice.rule.reason) > 20


# ---- broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: "),
        ("[]", 'expected an object with "device", "source" and a list "rules"'),
        ('{"device": "a", "source": "b", "rules": {}}', 'a list "rules"'),
        ('{"device": 1, "source": "b", "rules": []}', "device: expected a string, got 1"),
        ('{"device": "a", "rules": []}', "source: expected a string, got None"),
        (json.dumps(table({"backends": ["sdpa"]}) | {"rules": [3]}), "rule 1: expected an object, got 3"),
        (json.dumps(table({"backends": ["sdpa"]}, {"backends": []})), "rule 2: backends: expected a list of triton, "),
        (json.dumps(table({"backends": ["xformers"]})), r"rule 1: backends: .* got \['xformers'\]"),
        (json.dumps(table({})), "rule 1: backends: expected a list of at least one"),
        (json.dumps(table({"backends": ["sdpa"], "reason": ""})), "rule 1: reason: expected a sentence"),
        (json.dumps(table({"backends": ["sdpa"], "K": [1, 2]})), "rule 1: unknown key 'K'; known: D, N, M, heads, "),
        (json.dumps(table({"backends": ["sdpa"], "N": [2, 1]})), r"rule 1: N: expected \[lowest, .* got \[2, 1\]"),
        (json.dumps(table({"backends": ["sdpa"], "N": [0, 1]})), r"rule 1: N: .* got \[0, 1\]"),
        (json.dumps(table({"backends": ["sdpa"], "N": [1.5, 2]})), r"rule 1: N: .* got \[1.5, 2\]"),
        (json.dumps(table({"backends": ["sdpa"], "N": 7})), "rule 1: N: .* got 7"),
        (json.dumps(table({"backends": ["sdpa"], "dtype": "float16"})), "rule 1: dtype: .* got 'float16'"),
        (
            json.dumps(table({"backends": ["sdpa"], "direction": ["backward"]})),
            "rule 1: direction: expected a list of ",
        ),
    ],
)
def test_a_broken_file_is_named_with_its_entry(tmp_path, monkeypatch, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(TableError, match=f"attention table {path}: .*{message}"):
        read(path)
    monkeypatch.setenv(attention_table.VARIABLE, str(path))
    with pytest.raises(TableError, match=str(path)):
        attention(*inputs())


def test_a_file_that_is_named_but_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(attention_table.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.raises(TableError, match=r"nowhere\.json: No such file or directory"):
        attention(*inputs())


def test_a_table_may_name_every_backend_of_the_op():
    from fastdistill.ops._dispatch import ops

    assert set(BACKENDS) == {backend.name for backend in ops()["attention"].backends}
