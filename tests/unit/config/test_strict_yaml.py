"""YAML 1.2 scalars, repeated keys, and files that are no experiments at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlfer.config.strict_yaml import format_yaml, parse_yaml, read_yaml
from dlfer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e-10", 1e-10),
        ("2E5", 2e5),
        ("+1.", 1.0),
        (".5", 0.5),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("FALSE", False),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("-.INF", -math.inf),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!float 3", 3.0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(f"key: {text}", "a.yaml").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number():
    assert math.isnan(parse_yaml("key: .NaN", "a.yaml").data["key"])


def test_anchors_are_filled_in_and_lines_are_known():
    document = parse_yaml("a: &x\n  b: [1, 2]\nc: *x\n", "a.yaml")
    assert document.data == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}
    assert document.data["a"]["b"] is not document.data["c"]["b"]
    assert document.marks["a", "b"] == "a.yaml line 2"
    assert document.marks["a", "b", "1"] == "a.yaml line 2"


def test_repeated_keys_merge_keys_and_numbers_as_keys_are_all_named():
    text = "a: 1\nb:\n  c: 2\n  c: 3\na: 4\n1: x\n<<: {d: 1}\n"
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    message = str(caught.value)
    assert "a.yaml line 4: the key 'c' is repeated; it is already in line 3" in message
    assert "a.yaml line 5: the key 'a' is repeated; it is already in line 1" in message
    assert 'a.yaml line 6: found the key 1, expected text; put it in quotes: "1"' in message
    assert "a.yaml line 7: '<<' is not part of YAML 1.2" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n", "a.yaml line 2, column 1: this is not YAML"),
        ("a:\tb: 1\n", "cannot start any token"),
        ("a: 1\n--- \nb: 2\n", "this is not YAML"),
        ("a: 'x\x00'", "this is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: found the tag 'python/object/apply:os.system'"),
        ("a: !mine x", "line 1: cannot read 'x' as '!mine'"),
        ("a: !!int x", "line 1: cannot read 'x' as 'int'"),
        ("&a [*a]", "30 levels"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "line 1: cannot read '999"),
        ('a: "\\ud800"', "line 1: cannot read"),
        ("? [a]\n: 1", "found a list or mapping as a key"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
            "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
            "more than 20,000 values",
        ),
    ],
)
def test_what_is_not_an_experiment_is_refused_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no such file\. Expected an experiment file.*dlfer init FOLDER"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; expected an experiment file.*dlfer init"):
        read_yaml(tmp_path)


@pytest.mark.parametrize("name", ["my_face.yaml", "my_faces.yml", "my-faces.yaml", "my_faces.json"])
def test_a_missing_file_is_answered_with_the_file_beside_it_that_was_meant(name, tmp_path):
    (tmp_path / "my_faces.yaml").write_text("a: 1\n")
    (tmp_path / "notes.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"there is no such file. Did you mean .*my_faces.yaml\?"):
        read_yaml(tmp_path / name)
    with pytest.raises(ConfigError, match=r"there is no such file\. Expected"):
        read_yaml(tmp_path / "quick.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml line 2: expected text in UTF-8, found the byte 0xe9"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match="1,000,001 bytes"):
        read_yaml(tmp_path / "large.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "a.yaml").data == {"a": 1}


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_text, _values, max_size=4))
def test_what_is_written_reads_back_equal(values):
    assert parse_yaml(format_yaml(values), "a.yaml").data == values


@pytest.mark.parametrize("text", ["no", "1e-3", "0o17", "1_000", "12:30", "null", "~", "2024-01-01", "=", "<<", "1."])
def test_text_that_looks_like_something_else_stays_text(text):
    assert parse_yaml(format_yaml({"key": text, text: 1}), "a.yaml").data == {"key": text, text: 1}
