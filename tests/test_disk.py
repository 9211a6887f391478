"""What appears whole or not at all, and what is left of those who were killed."""

import errno

import pytest

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_older_one_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    disk.write(path, b"old")
    with pytest.raises(RuntimeError, match="half-way"), disk.new_file(path) as aside:
        aside.write_bytes(b"ne")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]
    with disk.new_file(path) as aside:
        aside.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.json"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "runs" / "out"
    with pytest.raises(RuntimeError, match="half-way"), disk.new_folder(path) as aside:
        (aside / "a").write_text("")
        raise RuntimeError("half-way")
    assert names(tmp_path / "runs") == []
    with disk.new_folder(path) as aside:
        (aside / "a").write_text("")
        assert not path.exists()
    assert names(tmp_path / "runs") == ["out"] and names(path) == ["a"]
    with pytest.raises(UserError, match=r"--output=.*out exists already"), disk.new_folder(path):
        pass


def test_leftovers_are_of_that_name_alone(tmp_path):
    left = [".a[1].7-ab.partial", ".a[1].json.7-ab.partial", ".a1.7-ab.partial", "a[1].partial"]
    for name in left:
        (tmp_path / name).write_text("")
    (tmp_path / ".a[1].8-cd.partial").mkdir()
    disk.remove_leftovers(tmp_path, "a[1]")
    assert names(tmp_path) == sorted(left[1:])
    disk.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a[1].partial"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("INTERNAL: Failed writing: No space left on device"),  # as array_record says it
    ],
)
def test_what_the_disk_says_is_a_line(error):
    words = r"^out cannot be written: No space left on device; try another$"
    with pytest.raises(UserError, match=words), disk.errors("out", "; try another"):
        raise error


def test_a_name_that_is_too_long_is_a_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written: File name too long$"), disk.errors("out"):
        disk.write(tmp_path / ("a" * 300), b"")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), UserError("out is a file"), TimeoutError("1200 s")]
)
def test_what_the_disk_did_not_say_stays(error):
    with pytest.raises(type(error), match=str(error)), disk.errors("out"):
        raise error
