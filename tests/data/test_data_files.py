"""test_data_files.py - JSONL, arrays, gz and parquet to records; errors name file and row; nothing takes long."""
import gzip
import json
import sys
import time

import pytest

from data.files import is_text, named, plain_name, read_stories, records
from runs.files import UserError

ROWS = [{"a": "ein Satz, naïve 😀"}, {"a": [1, None, {"b": "x\ny"}]}, {}]


def read(path):
    return [row for _, row in records(path)]


def texts():
    """The same rows as a file's text, in the ways that there are."""
    lines = [json.dumps(row) for row in ROWS]
    return {"lines": "\n".join(lines) + "\n", "no end": "\n".join(lines), "blank": "\n\n" + " \n".join(lines),
            "array": json.dumps(ROWS), "indented": "\n" + json.dumps(ROWS, indent=1, ensure_ascii=False) + "\n",
            "bom": "\ufeff" + "\r\n".join(lines)}


@pytest.mark.parametrize("kind", texts())
def test_one_object_per_line_or_an_array(tmp_path, kind):
    data = texts()[kind].encode()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(data))
    assert read(tmp_path / "a") == read(str(tmp_path / "a.json.gz")) == ROWS


def test_rows_are_numbered_as_an_editor_does(tmp_path):
    (tmp_path / "a").write_text('\n{"a": 1}\n\n{"a": 2}')
    assert [where for where, _ in records(tmp_path / "a")] == [f"{tmp_path / 'a'}, row {n}" for n in (2, 4)]
    (tmp_path / "a").write_text('[\n\n{"a": 1},\n\n{"a": 2}]')
    assert [where for where, _ in records(tmp_path / "a")] == [f"{tmp_path / 'a'}, row {n}" for n in (1, 2)]


@pytest.mark.parametrize("text, says", [
    ("{}\n{", "row 2: not JSON"), ("{}\n[1]", "row 2: not a JSON object"), ("[{}, 3]", "row 2: not a JSON object"),
    ("[{}, {]", "row 2: not JSON"), ("[{}, ]", "row 2: not JSON"), ("[{}", "row 1: not JSON; behind it"),
    ("[{} {}]", "row 1: not JSON; behind it"), ("[{}] {}", "row 1: not JSON; behind it"), ("[", "row 1: not JSON"),
    ("\n \n", "the file is empty"), ("[ ]", "the file is empty"), ("a,b\n1,2", "row 1: not JSON"),
    ("[" * 10 ** 5, "row 1: not JSON"), ('{"a": ' * 10 ** 5, "row 1: not JSON"), (b"\xff\xfe\x00", "not UTF-8")])
def test_broken_files(tmp_path, text, says):
    (tmp_path / "a").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read(tmp_path / "a")
    assert f"{tmp_path / 'a'}" in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "no.gz").write_text("{}")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps({"a": "x" * 9999}).encode())[:-9])
    for name in ("none", "", "no.gz", "cut.gz"):
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path / name)


def test_half_a_surrogate(tmp_path):
    path = tmp_path / "a"
    for text in ('{{"a": "{}", "b": {{"c": ["{}"]}}, "d": 1}}', '[{{"a": "{}", "b": {{"c": ["{}"]}}, "d": 1}}]'):
        path.write_text(text.format("x\\ud800y", "\\uDC00"))
        assert read(path) == [{"a": "x\ufffdy", "b": {"c": ["\ufffd"]}, "d": 1}]
        path.write_text(text.format("\\ud83d\\ude00", "\\\\ud800"))          # a whole one; and five letters
        assert read(path) == [{"a": "😀", "b": {"c": ["\\ud800"]}, "d": 1}]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    rows = [{"a": "x", "b": [{"role": "user", "content": "c"}], "d": None}, {"a": "y", "b": [], "d": 1}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows
    (tmp_path / "b.parquet").write_text("x")
    for name in ("b.parquet", "none.parquet"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as parquet"):
            read(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="a.parquet: parquet files need pyarrow: pip install pyarrow"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("value", ["x" * 10 ** 7, " " * 10 ** 7, "\\n" * 5 * 10 ** 6, "\\ud800" * 10 ** 6])
def test_a_line_of_ten_megabytes(tmp_path, value):
    for text in ('{"a": "' + value + '"}', '[{}, {"a": "' + value + '"}]'):
        (tmp_path / "a").write_text(text)
        start = time.process_time()
        assert len(read(tmp_path / "a")) == 1 + (text[0] == "[") and time.process_time() - start < 2


def test_an_array_takes_time_in_proportion(tmp_path):
    (tmp_path / "a").write_text("[" + ", ".join(['{"a": "' + "x" * 400 + '"}'] * 20000) + "]")
    start = time.process_time()
    assert len(read(tmp_path / "a")) == 20000 and time.process_time() - start < 2    # wrong: the rest is copied, 80 GB


def test_names(tmp_path, monkeypatch):
    assert named("helpful=a/b.jsonl") == ("helpful", "a/b.jsonl") and named("a/b.jsonl") == (None, "a/b.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3.jsonl").write_text("{}")
    assert named("lr=3.jsonl") == (None, "lr=3.jsonl") and named("a=lr=3.jsonl") == ("a", "lr=3.jsonl")
    assert [plain_name(x) for x in ("a=d/train.v2.jsonl.gz", "d/train.json", "out/run", "a=run", "lr=3.jsonl")] == [
        "train.v2", "train", "run", "run", "lr=3"]
    assert is_text("a/s.txt") and is_text("s.txt.gz") and not is_text("txt.jsonl")


def test_stories_may_be_compressed(tmp_path):
    (tmp_path / "s.txt.gz").write_bytes(gzip.compress(b"One two three four.\nToo short.\n"))
    assert read_stories(tmp_path / "s.txt.gz", 2) == ([("One two", " three four.")], 1)
