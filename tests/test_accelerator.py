"""benchmarks/accelerator: all of its parts at a tiny size, programs in files, limits, traces, and its page."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from run_fixtures import ROOT

from benchmarks.accelerator import document, networks
from benchmarks.accelerator.ahead import compile_all
from benchmarks.accelerator.executable import load
from benchmarks.accelerator.parts import PARTS, Session, run_part
from benchmarks.accelerator.program import flat
from benchmarks.accelerator.sizes import SIZES
from m2m_jax.core.errors import UserError
from m2m_jax.planning import hlo

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of all programs, compiled for this machine, and what was said of them."""
    folder, said = tmp_path_factory.mktemp("executables"), []
    assert compile_all("tiny", folder, "here", (), lambda **line: said.append(line)) == 0
    return folder, said


@pytest.fixture(scope="module")
def lines(compiled):
    """{part: what it said} with programs that were compiled before; the last part has nothing to do with JAX."""
    return {name: list(_said(name, compiled[0])) for name in PARTS if name != "diffusers"}


def _said(name, executables):
    found = []
    session = Session(TINY, executables, lambda **line: found.append(line), began=0.0)
    PARTS[name]().run(session)
    json.dumps(found)
    return found


def test_every_program_is_compiled_and_described(compiled):
    folder, said = compiled
    names = [name for part in networks.names(TINY).values() for name in part]
    assert [line["program"] for line in said if "program" in line] == names
    for line in said[1:]:
        assert line["moved_gb"] > 0 and "fusions" in line
    about = json.loads((folder / f"{names[0]}.json").read_text())
    assert about["versions"]["jax"] == jax.__version__ and about["chip"] == "here"


def test_training_steps_are_timed_and_their_loss_is_finite(lines):
    for part in ("text_step", "set_step"):
        found = [line for line in lines[part] if "seconds" in line]
        assert [line["program"] for line in found] == list(networks.names(TINY)[part])
        for line in found:
            assert 0 < line["loss"] < 100 and line["seconds"] > 0 and "load_seconds" in line
    assert any(line.get("kernels") for line in lines["text_step"])


def test_sampling_is_timed_with_each_number_of_context_images(lines):
    cases = [line.get("case") for line in lines["sampling"] if line.get("program") == "denoise_1_guided"]
    assert [case for case in cases if case] == ["0 context images", "2 context images"]
    assert {line["program"] for line in lines["autoencoder"]} >= {"encode_1", "decode_1"}


def test_starting_is_told_by_phase(lines):
    phases = [line["phase"] for line in lines["cold_start"]]
    assert phases[:2] == ["import", "devices"] and phases[-1] == "second step"
    assert lines["input"][0]["images_per_second"] > 0


def test_nothing_failed(lines):
    assert not [line for said in lines.values() for line in said if "failed" in line]


def test_a_state_without_average_takes_as_much_less_memory():
    made = [networks.make(TINY, f"text_1{end}", jax.devices()[:1], "cpu").description for end in ("", "_no_ema")]
    names = [{one.path for one in description.arguments} for description in made]
    averages = {name for name in names[0] if "ema_params" in name}
    assert averages and names[0] - averages == names[1]
    assert made[0].flops == made[1].flops > 0


def test_what_is_not_what_was_written_is_not_loaded(compiled, tmp_path):
    folder, _ = compiled
    name = networks.names(TINY)["autoencoder"][0]
    about = json.loads((folder / f"{name}.json").read_text())
    payload = bytearray((folder / f"{name}.executable").read_bytes())
    payload[len(payload) // 2] ^= 1
    (tmp_path / f"{name}.executable").write_bytes(payload)
    (tmp_path / f"{name}.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"is not what {name}.json says"):
        load(tmp_path, name)
    about["versions"]["jax"] = "0.0.1"
    (tmp_path / f"{name}.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"compiled with jax 0.0.1.*here is jax"):
        load(tmp_path, name)


def test_a_part_that_fails_says_so(monkeypatch, capsys):
    def fail(self, session):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(PARTS["input"], "run", fail)
    with pytest.raises(RuntimeError):
        run_part("input", TINY, None, began=0.0)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == "RuntimeError: no such kernel"


def test_arguments_are_filled_by_their_names():
    shapes = {"a.kernel": (3, 4), "a.bias": (4,), "a.scale": (4,), "x": (2, 2)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    program = flat("one", lambda tree, n: tree, (tree, jax.ShapeDtypeStruct((), jnp.int32)), items=1, unit="x")
    made = {one.path: one.make() for one in program.description.arguments}
    assert not made["0.a.bias"].any() and (made["0.a.scale"] == 1).all() and made["1"] == 0
    assert made["0.x"].std() > 0.1 and made["0.a.kernel"].any()


@pytest.mark.slow
def test_the_program_goes_on_where_a_part_takes_too_long(tmp_path):
    """Of two parts the first is ended at its limit, and the second still runs."""
    output = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--preset=tiny", "--only=input", f"--output={output}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    said = [json.loads(line) for line in output.read_text().splitlines()]
    assert said[-1]["done"] and any("images_per_second" in line for line in said)


def test_the_page_says_what_was_measured_and_what_was_not(lines, compiled):
    assert "Nothing was measured yet" in document.tables([compiled[1]])
    run = [{"command": "python -m x"}, {"device": "cpu", "jax": "1", "jaxlib": "1"}]
    run += [{"part": part} | line for part, said in lines.items() for line in said]
    text = document.tables([run, compiled[1]])
    assert "Nothing was measured" not in text
    for words in (
        "python -m x",
        "| text_2_no_ema |",
        "cold start: import",
        "| denoise_1_guided |",
        "The longest kernels of text_2_no_ema",
    ):
        assert words in text


GPU_PROGRAM = """\
ENTRY %main (a: f32[8]) -> f32[8] {
  %input_reduce_fusion.1 = f32[8]{0} fusion(%a), kind=kInput, calls=%f.1
  %loop_add_fusion = f32[8]{0} fusion(%a), kind=kLoop, calls=%f.2
  %c = (f32[8]{0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$convForward"
  %d = (f32[8]{0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %e = (f32[8]{0}, u8[0]{0}) custom-call(%a), custom_call_target="__cublas$gemm"
  ROOT %o = f32[8]{0} custom-call(%a), custom_call_target="TopK"
}
"""


def test_kernels_of_a_gpu_by_kind():
    assert hlo.kinds_of_kernels(GPU_PROGRAM) == {
        "fusions": 2,
        "reductions": 1,
        "convolutions": 1,
        "attentions": 1,
        "products": 1,
        "others": 1,
    }
