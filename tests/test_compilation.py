"""What compiles says so, and how long it took before."""

import json
import time

import jax
import pytest

from m2m_jax.core import compilation
from m2m_jax.core.compilation import FILE, compiling, saying_so


@pytest.fixture(autouse=True)
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "PATIENCE", 0.05)
    monkeypatch.setattr(compilation, "_announced", set())
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def compile_for(seconds: float, about: object = 1) -> None:
    with compiling("the step", about):
        time.sleep(seconds)


def test_what_takes_long_is_named_with_the_time_that_it_took_before(tmp_path, capsys):
    compile_for(0.2)
    assert capsys.readouterr().err == "compiling the step (not compiled here before) ...\n"
    ((name, seconds),) = json.loads((tmp_path / FILE).read_text()).items()
    assert name.startswith("the step, ") and seconds >= 0.2

    (tmp_path / FILE).write_text(json.dumps({name: 130}))
    compile_for(0.2)
    assert "compiling the step (took 2 min 10 s before) ..." in capsys.readouterr().err
    assert json.loads((tmp_path / FILE).read_text()) == {name: 130}  # the cache's time is not the compiler's
    compile_for(0.2, about=2)
    assert "not compiled here before" in capsys.readouterr().err
    assert len(json.loads((tmp_path / FILE).read_text())) == 2


def test_what_is_quick_is_not_mentioned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compilation, "PATIENCE", 60)  # on a busy machine a moment may be long
    compile_for(0.0)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("damaged", [b"{", b"[1]", b'{"the step, 1": "long"}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_as_none(tmp_path, capsys, damaged):
    (tmp_path / FILE).write_bytes(damaged)
    compile_for(0.2)
    assert "not compiled here before" in capsys.readouterr().err
    assert len(json.loads((tmp_path / FILE).read_text())) == 1


def test_without_a_folder_for_compiled_programs_nothing_is_kept(capsys):
    jax.config.update("jax_compilation_cache_dir", None)
    compile_for(0.2)
    assert "compiling the step" in capsys.readouterr().err


def test_only_the_first_call_of_a_program_compiles(capsys):
    for _ in range(2):  # as two samplers that are alike
        slow = saying_so("the sampler", "about", lambda seconds: time.sleep(seconds) or seconds)
        assert slow(0.2) == slow(seconds=0.2) == 0.2
    assert capsys.readouterr().err.count("compiling the sampler") == 1
