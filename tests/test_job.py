"""Which files a sampling job reads: names with commas, brackets and numbers, and what lies beside images."""

import pathlib
import re
import shlex

import pytest
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import split_list
from m2m_jax.sampling.job import Job


def _write(folder: pathlib.Path, *names: str) -> list[pathlib.Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    return [folder / name for name in names]


def _context(*items: object) -> list[pathlib.Path]:
    return Job(context=tuple(map(str, items)), output="nowhere").find_sets()[""]


@pytest.mark.parametrize("name", ["a,b.png", "a, b.png", "a,b,c.png", "a, b, c.png"])
def test_a_name_with_a_comma_is_read_in_quotes_as_the_hint_says(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, name, "d.png")
    with pytest.raises(UserError, match="a name with a comma stands in double quotes: ") as error:
        _context(*split_list(f"d.png,{name}"))
    # The shell takes the outer quotes away.
    (argument,) = shlex.split(re.search(r"--context=(.*)", str(error.value))[1])
    assert _context(*split_list(argument)) == [pathlib.Path(name)]
    with pytest.raises(UserError, match=r"x: no such file$"):
        _context("x", "d.png", "y")


@pytest.mark.parametrize("folder", ["runs [v2]", "[ab]", "a*b", "what?", "[", "a [1] [2]"])
def test_a_pattern_below_a_folder_with_signs_of_patterns(tmp_path, monkeypatch, folder):
    files = _write(tmp_path / folder, "1.png", "2.png")
    assert _context(tmp_path / folder / "*.png") == files
    assert _context(tmp_path / folder) == files
    assert _context(tmp_path / folder / "1.png") == files[:1]
    monkeypatch.chdir(tmp_path)
    assert _context(f"{folder}/[12].png") == [pathlib.Path(folder) / "1.png", pathlib.Path(folder) / "2.png"]
    with pytest.raises(UserError, match="there is no image at"):
        _context(tmp_path / folder / "none*")


def test_a_pattern_over_several_folders(tmp_path):
    files = [*_write(tmp_path / "s2", "10.png"), *_write(tmp_path / "s10", "9.png")]
    assert _context(tmp_path / "s*" / "*.png") == files


def test_files_and_sets_are_in_the_order_in_which_people_count(tmp_path):
    names = [f"{number}.png" for number in (1, 2, 9, 10, 11)]
    files = _write(tmp_path / "set2", *names[::-1])[::-1]
    assert _context(tmp_path / "set2") == _context(tmp_path / "set2" / "*") == files
    _write(tmp_path / "set10", "1.png")
    sets = Job(sets=tmp_path, output="nowhere", num_context=3).find_sets()
    assert next(iter(sets.items())) == ("set2", files[:3]) and list(sets) == ["set2", "set10"]


def test_what_is_no_image_of_a_set_is_passed_over(tmp_path):
    files = _write(tmp_path / "a", "1.png")
    _write(tmp_path / "a", "._2.png")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / "caption.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    assert Job(sets=tmp_path, output="nowhere").find_sets() == {"a": files}
    assert _context(tmp_path / "a") == files


def test_context_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = _write(tmp_path / "pictures", "1.png", "2.png")
    assert (
        _context("~/pictures") == _context("~/pictures/*") == _context("~/pictures/1.png", "~/pictures/2.png") == files
    )
