"""Names and values of YAML files and overrides: kept as they are written, or refused."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megafusion.config import load_config
from megafusion.errors import UserError
from megafusion.train.config import RunConfig
from megafusion.yaml_values import dump_yaml, load_values, parse_yaml
from tests.support.small import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
# What YAML 1.1 or 1.2 reads as a boolean, null, number, date or time.
SPECIAL = """
on off yes no y n Yes NO On true False null ~ Null 1 0 010 0o17 0x1F 1_000 1e-4 .5 1. .inf .nan -3 12:30
1:30:00 2024-01-01 2024-01-01T10:00:00Z <<x
""".split()  # noqa: SIM905
printable = st.characters(codec="utf-8", exclude_categories=["C"])
names = st.sampled_from(SPECIAL) | st.text(printable, min_size=1)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names


@given(st.dictionaries(names, scalars | st.lists(scalars) | st.dictionaries(names, scalars)))
def test_what_is_written_is_read_back(values):
    assert parse_yaml(dump_yaml(values)) == values


@given(st.lists(st.sampled_from(SPECIAL), min_size=1, unique=True))
def test_names_of_sources_are_text_in_files_and_overrides(tmp_path_factory, plain):
    path = tmp_path_factory.mktemp("names") / "run.yaml"
    values = yaml.safe_load(QUICKSTART.read_text())
    del values["data"]["sources"]
    lines = [f"    {name}: {{path: data/pairs}}" for name in plain]
    text = yaml.safe_dump(values).replace("\ndata:\n", "\n".join(["", "data:", "  sources:", *lines, ""]), 1)
    path.write_text(text)
    overrides = [f"data.sources.{name}.weight=2" for name in plain if "." not in name]
    sources = load_config(RunConfig, path, overrides).data.sources
    assert list(sources) == plain
    assert all(source.weight == 2 for name, source in sources.items() if "." not in name)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("7", 7),
        ("1_000", 1000),
        ("0x1f", 31),
        ("-0", 0),
        ("1e3", 1e3),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("2.", 2.0),
    ],
)
def test_numbers_are_read(value, read):
    assert parse_yaml(value) == read
    assert type(parse_yaml(value)) is type(read)


@pytest.mark.parametrize("value", ["010", "0o17", "12:30", "2024-01-01", "yes", "1e", "0x", "--1"])
def test_a_number_that_is_written_otherwise_is_refused_as_text(value):
    with pytest.raises(UserError, match=rf"key 'seed': Input should be a valid integer \(got '{value}'\)"):
        load_config(RunConfig, QUICKSTART, [f"seed={value}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.compile=yes", r"key 'train.compile': .* \(got 'yes'\); write true or false"),
        ("train.compile=off", r"write true or false"),
        (
            "telemetry.wandb_project=2024",
            r"valid string \(got 2024\); put a text that looks like a number in qu",
        ),
        ("out=1e4", r"key 'out': .*\(got 10000.0\); put a text that looks like a number in quotes"),
        ("out=[", "override of out: not readable as YAML: .*expected the node content"),
        ("out=*there", "override of out: not readable as YAML: found undefined alias 'there' in line 1"),
        ("out=!!python/name:os.system x", "override of out: not readable as YAML: could not determine a con"),
        ("out=!!timestamp 2024-01-01", "date is not JSON serializable"),
        ("seed=" + "9" * 5000, "override of seed: not readable as YAML: Exceeds the limit"),
        ("a..b=1", "override 'a..b=1' is not of the form key.path=value"),
        (".=1", "override '.=1' is not of the form"),
    ],
)
def test_what_an_override_cannot_mean_is_refused_in_a_sentence(override, message):
    with pytest.raises(UserError, match=message) as refused:
        load_config(RunConfig, QUICKSTART, [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nseed: 2\n", r"run\.yaml: not readable as YAML: key 'seed' twice in line 2"),
        (b"data:\n  'on': 1\n  on: 2\n", "key 'on' twice in line 3"),
        (b"? [a, b]\n: 1\n", "a key is text in line 1"),
        (b"seed: caf\xe9\n", "not readable as YAML: unacceptable character"),
        (b"seed: 1\n---\nseed: 2\n", "expected a single document"),
        (b"a: &x [*x]\n", r"run\.yaml: (Circular reference|not readable as YAML)"),
        (b"[" * 3000 + b"]" * 3000, "not readable as YAML"),
        (b"seed: 1\n\tx: 2\n", "not readable as YAML: .*line 2"),
    ],
)
def test_a_file_that_is_not_keys_and_values_is_refused_in_a_sentence(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load_config(RunConfig, path)
    assert "\n" not in str(refused.value)


def test_byte_order_mark_windows_line_ends_and_merge_keys_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffbase: &b {a: 1, c: 2}\r\nother: {<<: *b, c: 3}\r\n".encode())
    assert load_values(path) == {"base": {"a": 1, "c": 2}, "other": {"a": 1, "c": 3}}


def test_overrides_merge_into_the_file_and_the_last_wins():
    values = load_values(QUICKSTART, ["train={num_steps: 3}", "seed=1", "seed=2", "new.key=[1, {a: b}]"])
    assert (values["train"]["num_steps"], values["train"]["global_batch_size"]) == (3, 16)
    assert (values["seed"], values["new"]) == (2, {"key": [1, {"a": "b"}]})
