"""Caption files: every layout reads alike, damage is refused by its line, and what rules drop is counted."""

import gzip
import itertools
import json
import tempfile
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from caption_fixtures import SUFFIXES, write_captions
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m_jax.building.caption_rules import CaptionRules, latin_share
from m2m_jax.building.captions import MAX_LINE_BYTES, clean_captions, read_captions
from m2m_jax.core.errors import UserError

CAPTIONS = ["a cat", "", " two  dogs ", "Käse, 北京 \u2028 \x85", 'a "quoted" one', "a cat"]
# What a line of text can hold, and of that what no layout has a meaning of its own for.
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r\t\ufeff"), max_size=40)


def _read(tmp_path, name: str, data: bytes) -> list[str]:
    (tmp_path / name).write_bytes(data)
    return list(read_captions(tmp_path / name))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_layout_gives_the_same_captions(tmp_path, suffix):
    assert list(read_captions(write_captions(tmp_path / f"some.captions{suffix}", CAPTIONS))) == CAPTIONS


@settings(max_examples=60, deadline=None)
@given(captions=st.lists(_TEXT, min_size=1, max_size=6), suffix=st.sampled_from(SUFFIXES))
def test_what_was_written_is_read(captions, suffix):
    with tempfile.TemporaryDirectory() as folder:
        assert list(read_captions(write_captions(Path(folder) / f"captions{suffix}", captions))) == captions


@pytest.mark.parametrize(
    ("name", "data", "captions"),
    [
        ("c.tsv", "Caption\turl\tid\na cat\tu\t1\na dog\tu\t2\n", ["a cat", "a dog"]),
        ("c.tsv", "http://a.b/c\tcaption\n", ["caption"]),  # the caption of a picture, and no header
        ("c.TXT", "\ufeffa cat\r\na dog", ["a cat", "a dog"]),
        ("c.jsonl", '{"text": "a cat", "id": 1}\n{"id": 2, "text": null}\n', ["a cat", ""]),
        ("c.jsonl", '{"text": "no", "caption": "a cat"}\n', ["a cat"]),
        ("c.jsonl", '{"text": "a cat"}\n\n \r\n', ["a cat"]),  # blank lines at the end
        ("c.tsv", "url\tcaption\nhttp://a\ta cat\n\n", ["a cat"]),
    ],
)
def test_other_layouts(tmp_path, name, data, captions):
    assert _read(tmp_path, name, data.encode()) == captions


def test_parquet_columns(tmp_path):
    path = tmp_path / "c.parquet"
    column = pyarrow.array(["a cat", None], pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"URL": [1, 2], "TEXT": column}), path, row_group_size=1)
    assert list(read_captions(path)) == ["a cat", ""]


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.tsv", b"http://a\ta cat\nhttp://b\n", "line 2: has 1 fields, not 2"),
        ("c.tsv", b"http://a\ta cat\nhttp://b\tone\ttwo\n", "line 2: has 3 fields, not 2"),
        ("c.tsv", b"a cat\thttp://a\n", "line 1: expected url TAB caption, or"),  # Conceptual Captions 3M's order
        ("c.tsv", b"url\tcaption\nhttp://a\ta cat\n\nhttp://b\ta dog\n", "line 3: has 1 fields"),
        ("c.txt", b"a cat\n\xff\xfe dog\n", "line 2: not UTF-8 (byte 0 of the line)"),
        ("c.txt", "a cat".encode("utf-16"), "line 1: not UTF-8|line 1: has a zero byte"),
        ("c.txt", b"a\n\0\n", "line 2: has a zero byte"),
        ("c.txt", b"a\n" + LONG.encode() + b"\n", f"line 2: longer than {MAX_LINE_BYTES} bytes"),
        ("c.txt", b"", "holds no captions"),
        ("c.tsv", b"url\tcaption\n", "holds no captions"),
        ("c.jsonl", b'{"caption": "a"}\n{"caption": "b"\n', "line 2: not JSON"),
        ("c.jsonl", b'{"caption": "a"}\n\n{"caption": "b"}\n', "line 2: not JSON"),
        ("c.jsonl", b"[" * 60_000, "line 1: not JSON"),
        ("c.jsonl", b'["a"]\n', "line 1: not a JSON object"),
        ("c.jsonl", b'{"caption": "a"}\n{"text": "b"}\n', "line 2: has no field 'caption'"),
        ("c.jsonl", b'{"title": "a"}\n', "line 1: has no field 'caption'"),
        ("c.jsonl", b'{"caption": "a"}\n{"caption": 5}\n', "line 2, field 'caption': int in the place of text"),
        ("c.jsonl", b'{"caption": "\\ud800"}\n', "line 1, field 'caption': half of a surrogate pair"),
        ("c.jsonl", b'{"caption": "a\\u0000"}\n', "line 1, field 'caption': has a zero byte"),
        ("c.parquet", b"PAR1 but no more of it", "cannot be read"),
        ("c.txt.gz", b"not compressed", "cannot be read"),
        ("c.txt.gz", gzip.compress(b"a cat\n" * 1000, mtime=0)[:-20], "cannot be read"),
        ("c.csv", b"a cat\n", "captions are read from .txt, .tsv"),
        ("c.parquet.gz", b"", "captions are read from .txt, .tsv"),
        ("captions", b"a cat\n", "captions are read from .txt, .tsv"),
    ],
)
def test_damage_is_refused_by_its_place(tmp_path, name, data, message):
    with pytest.raises(UserError) as error:
        _read(tmp_path, name, data)
    assert name in str(error.value) and any(part in str(error.value) for part in message.split("|"))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("title", ["a"], "has no column 'caption' or 'text', but title"),
        ("caption", [1, 2], "column 'caption' holds int64, not text"),
        ("caption", ["a", LONG], "row 2: longer than"),
        ("caption", [], "holds no captions"),
    ],
)
def test_refused_parquet(tmp_path, column, values, message):
    path = tmp_path / "c.parquet"
    kind = pyarrow.int64() if 1 in values else pyarrow.string()
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(values, kind)}), path)
    with pytest.raises(UserError, match=message):
        list(read_captions(path))


def test_parquet_that_is_not_utf8(tmp_path):
    path = tmp_path / "c.parquet"
    column = pyarrow.array([b"a cat", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"caption": column}), path)
    with pytest.raises(UserError, match="row 2: not UTF-8"):
        list(read_captions(path))


def test_a_name_that_is_no_file_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_captions(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_captions(tmp_path / "folder.txt")


def test_a_file_is_read_as_it_is_used(tmp_path):
    """What comes first can be used although what comes later is damaged: nothing is read whole."""
    (tmp_path / "c.txt").write_bytes(b"a cat\na dog\n" + b"\xff\n")
    assert list(itertools.islice(read_captions(tmp_path / "c.txt"), 2)) == ["a cat", "a dog"]


def test_cleaning_keeps_the_numbers_of_rows():
    kept, dropped = clean_captions(CAPTIONS, CaptionRules())
    assert kept == [(0, "a cat"), (2, "two dogs"), (3, "Käse, 北京"), (4, 'a "quoted" one')]
    assert dropped == {"empty": 1, "drop_duplicates": 1}
    everything, dropped = clean_captions(CAPTIONS, CaptionRules(drop_duplicates=False))
    assert [row for row, _ in everything] == [0, 2, 3, 4, 5] and dropped == {"empty": 1}


@pytest.mark.parametrize(
    ("rules", "kept", "dropped"),
    [
        ({}, 6, {"drop_duplicates": 2}),
        ({"drop_duplicates": False}, 8, {}),
        ({"min_characters": 4}, 5, {"min_characters": 1, "drop_duplicates": 2}),
        ({"max_characters": 16}, 5, {"max_characters": 1, "drop_duplicates": 2}),
        ({"min_words": 2}, 3, {"min_words": 3, "drop_duplicates": 2}),
        ({"max_words": 3}, 5, {"max_words": 1, "drop_duplicates": 2}),
        ({"min_latin_share": 0.5}, 4, {"min_latin_share": 2, "drop_duplicates": 2}),
    ],
)
def test_each_rule_is_a_switch(rules, kept, dropped):
    captions = ["big cat", "BIG  Cat", "ｂｉｇ ｃａｔ", "ox", "café au lait", "собака", "1234", "a very long caption"]
    found, counts = clean_captions(captions, CaptionRules(**rules))
    assert (len(found), counts) == (kept, dropped)


@pytest.mark.parametrize(
    ("text", "share"),
    [("plain", 1), ("Çedilla ﬁ Ａ", 1), ("北京 cat", 0.6), ("123 !", 0), ("", 0), ("ªº", 1), ("и́ я", 0)],
)
def test_latin_share(text, share):
    assert latin_share(text) == share


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_characters": 0},
        {"min_words": 5, "max_words": 4},
        {"max_characters": 0},
        {"min_latin_share": 1.5},
        {"min_latin_share": float("nan")},
    ],
)
def test_rules_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        CaptionRules(**wrong)


def test_rules_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"no caption is left .*min_words: 2"):
        clean_captions(["cat", "dog"], CaptionRules(min_words=2))


@settings(max_examples=100, deadline=None)
@given(st.lists(_TEXT, max_size=12))
def test_every_row_is_kept_or_counted(captions):
    try:
        kept, dropped = clean_captions(captions, CaptionRules(max_characters=20))
    except UserError:
        assert not any(0 < len(" ".join(caption.split())) <= 20 for caption in captions)
        return
    assert len(kept) + dropped.total() == len(captions)
    assert [row for row, _ in kept] == sorted({row for row, _ in kept})
    keys = [" ".join(unicodedata.normalize("NFKC", caption).casefold().split()) for _, caption in kept]
    assert len(set(keys)) == len(keys)
    assert all(caption == " ".join(captions[row].split()) for row, caption in kept)
    json.dumps(dropped)
