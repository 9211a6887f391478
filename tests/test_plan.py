"""The planner: what it reads out of compiled programs, its arithmetic, and one tiny plan where libtpu is installed."""

import importlib.util
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Var
from run_fixtures import ONE_LEVEL, config_argument, run

from m2m_jax.attention.layout import SetLayout
from m2m_jax.configuration import default_config
from m2m_jax.core.chips import CHIPS, GIB, chip_of, gpus_of, peak_flops
from m2m_jax.core.errors import UserError
from m2m_jax.models.remat import REMAT
from m2m_jax.models.unet_config import UNetConfig
from m2m_jax.planning import compile, hlo, jobs
from m2m_jax.planning.collectives import Collective, collectives
from m2m_jax.planning.formula import plan_by_formula
from m2m_jax.planning.gpus import TARGETS, can_compile
from m2m_jax.planning.hbm import hbm_bytes
from m2m_jax.planning.memory import Memory, advice, bytes_per_device, parse_out_of_memory, state_bytes
from m2m_jax.planning.report import as_dict, as_text
from m2m_jax.planning.roofline import mfu, roofline
from m2m_jax.planning.sampling import Program, SamplingPlan, sampling_as_text
from m2m_jax.planning.search import search
from m2m_jax.tasks.autoencoding import Autoencoding
from m2m_jax.training import sharding
from m2m_jax.training.attention_flops import AttentionFlops, attention_flops
from m2m_jax.training.setup import set_up
from m2m_jax.training.workload import Workload, batch_shapes, count_flops, kept_bytes, make_task

TINY = config_argument("emoji:tiny")
SMALL = (TINY, *ONE_LEVEL)  # where any network will do: plans trace it several times

# Memory


def _mesh_config(**axes):
    config = default_config().mesh
    config.update(axes)
    return config


def _abstract_mesh(devices, **axes):
    return sharding.abstract_mesh(_mesh_config(**axes), devices)


def test_state_bytes_follow_the_shardings():
    config = default_config()
    config.task = "autoencoder"
    task = Autoencoding(config)
    copies, shares = (
        state_bytes(set_up(task, config, sharding.make_mesh(_mesh_config(fsdp=fsdp))).state) for fsdp in (1, 8)
    )
    whole = sum(4 * x.size for x in task.shapes.values())
    assert copies["parameters"] == copies["ema"] == whole
    assert 2 * whole <= copies["optimizer"] < 2 * whole + 100  # two moments and a few counts
    split = sharding.parameter_shardings(task.shapes, sharding.make_mesh(_mesh_config(fsdp=8)))
    eighth = sum(4 * x.size // (8 if "fsdp" in split[name].spec else 1) for name, x in task.shapes.items())
    assert shares["parameters"] == shares["ema"] == eighth < whole / 4


def test_bytes_per_device_of_a_batch():
    mesh = sharding.make_mesh(_mesh_config(fsdp=2, context=2))
    x = jax.ShapeDtypeStruct((8, 5, 16, 16, 4), jnp.float32, sharding=sharding.batch_sharding(mesh, "latents_bnhwc"))
    assert bytes_per_device({"latents_bnhwc": x}) == 8 * 5 * 16 * 16 * 4 * 4 // 8


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space "
            "hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.",
            (21.95 * GIB, 15.48 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) "
            "exceeds available HBM (30.75G).",
            (0.5 * GIB, 30.75 * GIB),
        ),
        ("Ran out of memory in memory space smem. Used 1.00M of 1.00M smem.", None),
        ("Used 1.50T of 95.74G hbm.", (1536 * GIB, 95.74 * GIB)),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_out_of_memory_message(message, sizes):
    assert parse_out_of_memory(message) == sizes


KEPT = {"none": 10e9, "dots": 4e9, "blocks": 2e9}


def test_advice_says_how_much():
    m = Memory(4 * GIB, 8 * GIB, 4 * GIB, 0, 0, peak=32 * GIB, beside=0, limit=20 * GIB)
    assert not m.fits
    assert m.rest == 16 * GIB
    lines = advice(m, {1: 16 * GIB, 2: 8 * GIB, 4: 4 * GIB, 8: 2 * GIB}, fsdp=1, parts=1, sets=8, kept=KEPT, context=2)
    assert [line.split(":")[0].split(" (")[0] for line in lines] == [
        "--config.model.remat=blocks",
        "--config.mesh.fsdp=4",  # 12 GiB less are enough
        "--config.train.accumulation=4",  # 2 sets at once take a quarter of 16 GiB, and 4 GiB are left for them
        "--config.data.batch_size / 4, likewise",
    ]
    assert "12.8 GiB less, and are computed again" in lines[0] and "alone" not in lines[0]
    assert "12.0 GiB less" in lines[1]
    assert "12.0 GiB less" in lines[2]


def test_of_one_set_that_keeps_the_least_two_devices_are_the_advice():
    m = Memory(1 * GIB, 2 * GIB, 1 * GIB, 0, 0, peak=24 * GIB, beside=0, limit=16 * GIB)
    (line,) = advice(m, {1: 4 * GIB}, fsdp=1, parts=1, sets=1, kept={"blocks": 1e9}, context=4)
    assert line.startswith("--config.mesh.context=4 ") and line.endswith("10.0 GiB less")
    assert advice(m, {1: 4 * GIB}, fsdp=1, parts=1, sets=1, kept={"blocks": 1e9}, context=None) == []


def test_advice_on_sampling_says_how_much():
    program = Program(scratch=1 * GIB, seconds=1.0, limiter="hbm")

    def plan(**changes):
        values = {
            "devices": 4,
            "sets_per_device": 8,
            "context_images": 4,
            "steps": 50,
            "parameters": 4 * GIB,
            "cache": 15 * GIB,
            "limit": 16 * GIB,
            "programs": {"denoise": program},
            "image_seconds": 1.0,
            "images_per_second": 1.0,
            "compile_seconds": 1.0,
            "notes": (),
        }
        return SamplingPlan(**values | changes)

    assert not plan().fits
    assert plan().advice == ["--sets_per_device=6: takes about 4.0 GiB less"]
    (line,) = plan(sets_per_device=1).advice
    assert "images_per_set" in line and "3.8 GiB" in line
    assert "too large by 4.0 GiB" in sampling_as_text(plan(), "v5e:2x2")


# Roofline


def test_roofline_is_the_slowest_resource():
    chip = CHIPS["v5p"]
    times = roofline(chip, flops=459e12, hbm_bytes=2765e9 / 2, ici_bytes=600e9 * 2, dcn_bytes=0)
    assert (times.compute, times.hbm, times.ici, times.dcn) == (1, 0.5, 2, 0)
    assert (times.step_seconds, times.limiter) == (2, "ici")
    assert mfu(459e12 * 4, times.step_seconds, 4, chip) == 0.5
    assert roofline(CHIPS["v4"], 1, 1, 1, dcn_bytes=1).dcn is None  # not published


def test_two_devices_on_a_chip_share_it():
    half = CHIPS["tpu7x"].share(2)
    assert (half.hbm, half.flops) == (94.75 * GIB, 2307e12 / 2)
    assert CHIPS["v4"].share(1) == CHIPS["v4"]


class Device(NamedTuple):
    device_kind: str
    coords: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("devices", "flops"),
    [
        ([Device("TPU v5 lite", (i, 0, 0)) for i in range(4)], 197e12),
        ([Device("TPU7x", (i // 2, 0, 0)) for i in range(8)], 2307e12 / 2),  # two devices a chip
        ([Device("NVIDIA A100-SXM4-80GB")] * 2, 312e12),
        ([Device("NVIDIA H200")], 989e12),
        ([Device("NVIDIA L4")], 121e12),
        ([Device("NVIDIA L40S")], None),
        ([Device("NVIDIA H100 80GB HBM3 MIG 1g.10gb")], None),
        ([Device("NVIDIA H100 PCIe")], None),
        ([Device("cpu")], None),
    ],
)
def test_peak_of_a_device(devices, flops):
    assert peak_flops(devices) == flops


# Search, and what is printed


def _plan(gibibytes: float, images_per_second: float) -> compile.Plan:
    times = roofline(CHIPS["v5e"], 1e12, 1e9, 1e6, 0)
    gather = Collective("all-gather", 4, 1, 7, 2e9, 0.0)
    work = compile.Work(1e12, 1e9, (gather,), 3, {}, times, images_per_second, 0.5)
    needs = Memory(GIB, 2 * GIB, GIB, 0, 0, peak=gibibytes * GIB, beside=0, limit=16 * GIB)
    return compile.Plan(
        {"slice": 1, "data": 4, "fsdp": 1}, 8, 2, needs, work, ("--config.model.remat=blocks",), ("a note",), 60.0
    )


def test_search_takes_the_fastest_of_what_fits(monkeypatch):
    tried = []

    def make_plan(config, machine, workload):
        """Sets a device cost memory, copies of the state, too; shares cost speed."""
        sets, fsdp = config.data.batch_size // 16, config.mesh.fsdp
        tried.append((fsdp, sets))
        return _plan(gibibytes=12 / fsdp + 2 * sets, images_per_second=sets * 100 / (1 + fsdp / 100)), ""

    monkeypatch.setattr("m2m_jax.planning.search.make_plan", make_plan)
    machine = compile.Machine("v5e:4x4", (None,) * 16, CHIPS["v5e"], 1)
    config = default_config()
    config.eval.batch_size = 24
    plan, overrides = search(config, machine, None, lambda overrides, plan: None)
    of_shares = [1, 2, 4, 8, 6, 7]  # twice as many until they do not fit, and then between
    assert tried == [(1, 1), (1, 2), (1, 4), (1, 3)] + [(fsdp, sets) for fsdp in (8, 16) for sets in of_shares]
    assert overrides == ["--config.mesh.fsdp=8", "--config.data.batch_size=112", "--config.eval.batch_size=16"]
    assert plan.fits


def test_where_nothing_fits_search_has_what_needs_least(monkeypatch):
    def make_plan(config, machine, workload):
        return _plan(17 + 1 / config.mesh.fsdp, 1), ""

    monkeypatch.setattr("m2m_jax.planning.search.make_plan", make_plan)
    machine = compile.Machine("v5e:4x4", (None,) * 16, CHIPS["v5e"], 1)
    plan, overrides = search(default_config(), machine, None, lambda overrides, plan: None)
    assert not plan.fits and plan.advice and "--config.mesh.fsdp=16" in overrides


@pytest.mark.parametrize(("gibibytes", "said"), [(12, "of 16.0 GiB: fits"), (20, "too large by 4.0 GiB")])
def test_what_is_said(gibibytes, said):
    plan, workload = _plan(gibibytes, 1.0), Workload(1e12, AttentionFlops(1e9, 1e9))
    text = as_text(plan, "v5e:2x2", workload, [])
    assert said in text
    assert ("--config.model.remat=blocks" in text) == (not plan.fits)
    for words in ("mesh data 4", "note: a note", "7 x between 4 devices", "3 calls of kernels", "MFU"):
        assert words in text
    values = json.loads(json.dumps(as_dict(plan, "v5e:2x2", workload, [])))
    assert values["fits"] == plan.fits
    assert values["work"]["times"]["limiter"] == "compute"
    assert values["memory"]["gradients_and_activations"] == (gibibytes - 4) * GIB


# FLOPs


def test_image_set_attention_executes_the_allowed_products_or_more():
    config = UNetConfig(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        num_attention_heads=(2, 2), norm_num_groups=8,
    )  # fmt: skip
    layout = SetLayout.training(4)
    pairs = layout.mask_qk().sum()
    found = attention_flops(config, 4, 8, None, mesh := _abstract_mesh(1))
    # Three blocks of 64 tokens at the top and one of 16 in the middle, two products of two FLOPs each.
    an_image = 4 * (3 * 64**2 * 16 + 16**2 * 32)
    assert found == AttentionFlops(pairs * an_image, pairs * an_image, 7 * an_image, calls=8)
    dense = UNetConfig(**{**vars(config), "attention_backend": "dense"})
    assert attention_flops(dense, 4, 8, None, mesh).executed == found.allowed * layout.mask_qk().size / pairs


@pytest.mark.parametrize(
    ("images", "tokens", "most"),
    [(5, None, 1.0003), (10, None, 1.0003), (25, None, 1.0003), (5, 257, 1.2), (10, 257, 1.11), (25, 257, 1.05)],
)
def test_the_kernel_computes_little_that_is_forbidden(images, tokens, most):
    """Stable Diffusion's network at 512 px: the blocks that splash attention visits, over the allowed ones.

    The 257 tokens of DINOv2 end within a block of 128, which costs most where sets are small.
    """
    config = UNetConfig(attention_backend="splash", context_dim=tokens and 1024)
    found = attention_flops(config, images, 64, tokens, _abstract_mesh(1))
    assert 1 <= found.executed / found.allowed < most


@pytest.mark.parametrize(
    ("axes", "most"), [({"context": 2}, 1.001), ({"tensor": 2}, 1.001), ({"context": 4, "tensor": 2}, 1.02)]
)
def test_devices_that_share_a_set_share_its_attention(axes, most):
    """25 images at 512 px: a level has 5, 10 or 20 heads, and where these do not divide tokens do. Shares of the lowest
    level's 64 tokens are less than a block."""
    config = UNetConfig(attention_backend="splash")
    alone, shared = (attention_flops(config, 25, 64, None, _abstract_mesh(8, **some)) for some in ({}, axes))
    assert shared.allowed == alone.allowed
    assert 1 <= shared.executed / alone.executed < most
    assert 1 <= shared.within_images / alone.within_images < most


def test_what_no_axis_divides_every_device_computes():
    config = UNetConfig(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), num_attention_heads=(1,),
        attention_backend="splash",
    )  # fmt: skip
    alone, shared = (attention_flops(config, 4, 3, None, _abstract_mesh(8, **some)) for some in ({}, {"context": 2}))
    assert shared.executed == 2 * alone.executed


def test_kernels_count_as_often_as_they_are_called():
    attention, once = AttentionFlops(executed=3.0, within_images=1.0, calls=2), {"fwd": 2, "dq": 2, "dkv": 2}
    # Two products forward, three and four backward, of which two are computed a second time.
    assert compile.kernel_flops(once, attention) == 4.0 * (2 + 3 + 4) / 2
    assert compile.kernel_flops(once | {"fwd": 4}, attention) == 4.0 * (2 + 2 + 3 + 4) / 2  # remat=blocks
    assert compile.kernel_flops(dict.fromkeys(once, 0), AttentionFlops()) == 0.0


def test_model_flops_do_not_depend_on_remat_or_batch():
    config = default_config()
    config.task = "autoencoder"
    config.data.images_per_set = 1
    config.autoencoder.block_out_channels = (16, 16)
    one = count_flops(config, 1).model_flops
    assert one > 0
    config.data.batch_size, config.train.accumulation, config.model.remat = 64, 4, "blocks"
    assert count_flops(config, 1).model_flops == one


# GPUs


def _formula(devices: int, **fields):
    """The plan of a small U-Net by formula, and its config."""
    config = default_config()
    config.model.update(block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), num_attention_heads=(2,))
    config.data.update(name="precomputed", path="none", image_size=256, images_per_set=2, batch_size=4)
    config.data.augment.enabled = False
    config.autoencoder.path = "none"
    for name, value in fields.items():
        group, _, field = name.partition("_")
        setattr(getattr(config, group), field, value)
    return plan_by_formula(config, gpus_of("h100:1")[0], devices, count_flops(config, devices, "gpu")), config


def _formula_and_step(devices: int, **fields):
    """The plan of a small U-Net by formula, and its step on as many of these devices, lowered."""
    plan, config = _formula(devices, **fields)
    config.model.attention_backend = "prefix"
    task, mesh = make_task(config)[0], sharding.make_mesh(config.mesh, jax.devices()[:devices])
    setup = set_up(task, config, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh, name))
        for name, x in batch_shapes(config, task, config.data.batch_size).items()
    }
    return plan, setup.step.lower(setup.state, task.frozen, batch)


@pytest.mark.parametrize("remat", list(REMAT))
def test_flops_by_formula_are_those_of_the_program(remat):
    plan, step = _formula_and_step(1, model_remat=remat)
    assert plan.work.flops == pytest.approx(step.cost_analysis()["flops"], rel=0.01)


def test_what_is_kept_for_the_gradient_grows_with_the_sets_and_else_does_not():
    """By what depends on the batch in one trace: two sets are traced to compare."""
    _, config = _formula(1, model_remat="dots")
    task = make_task(config)[0]
    kept = kept_bytes(config, task)
    assert kept.a_set > 0 and kept.of(2) == kept.fixed + 2 * kept.a_set

    def traced(sets: int) -> int:
        batch = batch_shapes(config, task, sets)

        def residuals(params, batch, step):
            return jax.vjp(lambda p: task.loss(p, task.frozen, batch, task.draw(batch, step))[0], params)[1]

        jaxpr = jax.make_jaxpr(residuals)(task.shapes, batch, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr
        arrays = {x for x in jaxpr.outvars if isinstance(x, Var)} - {*jaxpr.invars, *jaxpr.constvars}
        return sum(x.aval.size * x.aval.dtype.itemsize for x in arrays)

    assert [traced(1), traced(2)] == [kept.of(1), kept.of(2)]


def test_gradients_are_summed_as_often_as_the_program_sums_them():
    """Once for each part of a batch: the sums stand in the loop over the parts."""
    plan, step = _formula_and_step(2, mesh_data=2, train_accumulation=2)
    found = collectives(hlo.parse(step.compile().as_text()), (0, 0))
    (planned,) = plan.work.collectives
    assert (planned.kind, planned.count) == ("all-reduce", 2)
    sent = sum(one.ici_bytes for one in found if one.kind == "all-reduce")
    assert planned.ici_bytes == pytest.approx(sent, rel=0.05)


def test_gathered_kernels_take_memory_where_nothing_casts_them():
    """Kernels in float32 are gathered as they are, and whole from forward to backward."""
    (copies, config), (shares, _) = (_formula(4, mesh_data=4 // fsdp, mesh_fsdp=fsdp) for fsdp in (1, 4))
    mesh, shapes = _abstract_mesh(4, data=1, fsdp=4), make_task(config)[0].shapes
    split = {name: x for name, x in shapes.items() if "fsdp" in sharding.parameter_spec(name, x.shape, mesh)}
    gathered = sum(4 * x.size for x in split.values())
    # The gradient is split as its kernels are.
    assert shares.memory.rest - copies.memory.rest == gathered - gathered * 3 // 4


def _plan_gpus(*arguments) -> dict:
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16
        given = (*SMALL, "--config.autoencoder.path=none", "--config.model.dtype=bfloat16", "--formula", "--json")
        result = run("plan", *given, *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_gpus_are_planned_by_formula():
    plan = _plan_gpus("--topology=h100:2", "--slices=2")
    assert (plan["devices"], plan["mesh"]["slice"], plan["mesh"]["data"]) == (4, 2, 2)
    assert "by formula" in plan["notes"][0]
    assert plan["compile_seconds"] is None
    memory, (within, between) = plan["memory"], plan["work"]["collectives"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    assert memory["parameters"] == memory["ema"]
    # The gradients, in bfloat16, are summed within a node, and each half of them between the nodes.
    gradients = memory["parameters"] / 2
    assert (within["group_size"], within["ici_bytes"], within["dcn_bytes"]) == (2, gradients, 0)
    assert (between["slices"], between["dcn_bytes"]) == (2, gradients / 2)


def test_what_does_not_fit_ends_with_1_and_says_what_would_help():
    # An l4 is not described to XLA: by formula.
    given = (*SMALL, "--topology=l4:1", "--config.data.batch_size=32768", "--config.eval.batch_size=8")
    result = run("plan", *given)
    assert result.code == 1, result.err
    for words in ("DOES NOT FIT", "too large by", "--config.model.remat=", "--config.train.accumulation="):
        assert words in result.out
    advised = next(line.split(":")[0].strip() for line in result.out.splitlines() if "train.accumulation" in line)
    assert run("plan", *given, advised).code == 0


def test_gpus_share_the_state_by_fsdp_and_keep_less_by_remat():
    copies = _plan_gpus("--topology=h100:4")["memory"]
    plan = _plan_gpus("--topology=h100:4", "--config.mesh.fsdp=4", "--config.model.remat=blocks")
    # As a compiled step does: three quarters of the kernels arrive, in bfloat16, and of the gradients leave.
    sent = {one["kind"]: one["ici_bytes"] for one in plan["work"]["collectives"]}
    assert sent == dict.fromkeys(("all-gather", "reduce-scatter"), copies["parameters"] / 2 * 3 / 4)
    shares = plan["memory"]
    assert shares["ema"] < 0.3 * copies["ema"]
    assert shares["gradients_and_activations"] < 0.5 * copies["gradients_and_activations"]


@pytest.mark.parametrize("chip", sorted(file.stem for file in TARGETS.glob("*.txtpb")))
def test_descriptions_of_gpus_are_of_chips_that_there_are(chip):
    text = (TARGETS / f"{chip}.txtpb").read_text()
    numbers = {name: float(value) for name, value in re.findall(r"^ *(\w+): ([\d.]+)$", text, re.MULTILINE)}
    of_table, _ = gpus_of(f"{chip}:1")
    assert of_table.hbm == pytest.approx(0.92 * numbers["device_memory_size"], rel=0.01)
    assert of_table.hbm_bandwidth == pytest.approx(numbers["memory_bandwidth"], rel=0.05)
    assert "xla/backends/gpu/target_config/specs/" in text  # its source


def test_what_needs_a_compiler_for_gpus_says_so(monkeypatch):
    monkeypatch.setattr(jobs, "can_compile", lambda chip: False)
    for arguments in (["--job=sample"], ["--search"], ["--hlo=x"]):
        result = run("plan", TINY, "--topology=h100:1", *arguments)
        assert result.code == 2 and "requirements-cuda.txt" in result.err
        assert run("plan", TINY, "--topology=h100:1", "--formula", *arguments).code == 2
    assert "none of them" in run("plan", TINY, "--topology=v5e:4x4", "--formula").err


@pytest.mark.slow
@pytest.mark.skipif(not can_compile("h100"), reason="needs requirements-cuda.txt")
def test_gpus_are_compiled_for_where_jax_can():
    result = run("plan", TINY, "--config.autoencoder.path=none", "--topology=h100:2", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["compile_seconds"] > 0 and "nothing is autotuned" in " ".join(plan["notes"])
    assert plan["work"]["launches"]["fusions"] > 100
    (sent,) = plan["work"]["collectives"]
    assert sent["kind"] == "all-reduce" and sent["group_size"] == 2


# The program


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5q:2x2", "did you mean v5"),
        ("v5e", "says nothing of how many chips"),
        ("h1000:8", "did you mean h100"),
        ("h100", "say how many a node has"),
        ("abacus:1", "is unknown; the chips are v4, v5e, v5p, v6e, tpu7x, a100"),
    ],
)
def test_unknown_topologies_are_refused(topology, words):
    with pytest.raises(UserError, match=words):
        gpus_of(topology) or chip_of(topology)


def test_without_libtpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(jax._src.xla_bridge, "get_tpu_library_path", lambda: None)
    monkeypatch.setattr(jax._src.lib.xla_client, "pjrt_plugin_loaded", lambda name: False)
    result = run("plan", TINY, "--topology=v5e:2x2")
    assert result.code == 2
    assert result.err.startswith("error: planning needs libtpu")
    assert "requirements-tpu.txt" in result.err
    assert result.err.count("\n") == 1


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: requirements-tpu.txt"
)


def _plan_tiny(*arguments) -> dict:
    result = run(
        "plan",
        TINY,
        "--config.data.name=precomputed",
        "--config.data.augment.enabled=False",
        "--config.autoencoder.path=none",
        "--config.data.image_size=64",
        "--topology=v5e:2x2",
        "--json",
        *arguments,
    )
    assert result.code == 0, result.err
    return json.loads(result.out)


@needs_libtpu
def test_a_tiny_plan(tmp_path):
    plan = _plan_tiny(f"--hlo={tmp_path / 'step.hlo'}")
    assert plan["fits"]
    assert plan["devices"] == 4
    assert plan["memory"]["needed"] > plan["memory"]["parameters"] > 0
    assert "none: Stable Diffusion's autoencoder" in plan["notes"][0]
    assert "peak in bfloat16" in plan["notes"][1]
    assert {c["kind"] for c in plan["work"]["collectives"]} >= {"all-reduce"}
    assert 0 < plan["work"]["mfu"] < 1
    # Seven transformer blocks, two attentions each, a kernel forward and two backward.
    assert plan["work"]["kernels"] == 7 * 2 * 3
    # What a step must move at least: it reads parameters, moments and average, and writes them.
    memory, program = plan["memory"], hlo.parse((tmp_path / "step.hlo").read_text())
    assert plan["work"]["hbm_bytes"] == hbm_bytes(program)
    assert plan["work"]["hbm_bytes"] > 2 * (memory["parameters"] + memory["optimizer"] + memory["ema"])


@pytest.mark.slow
@needs_libtpu
def test_a_tiny_plan_of_sampling():
    plan = _plan_tiny("--job=sample", "--sets_per_device=2")
    assert (plan["devices"], plan["sets_per_device"], plan["context_images"], plan["steps"]) == (4, 2, 3, 2)
    assert plan["programs"]["denoise"]["seconds"] > 0
    assert plan["images_per_second"] == pytest.approx(8 / plan["image_seconds"])
    assert 0 < plan["cache"] < plan["parameters"] < plan["limit"]


# Building image sets


def _plan_building(*arguments) -> dict:
    result = run("plan", TINY, "--job=build_mis", "--config.data.images_per_set=25", "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_building_is_planned_by_formula():
    plan = _plan_building("--topology=v5e:4x8", "--slices=2", "--captions=1000", "--mfu=0.5")
    assert (plan["chips"], plan["peak_flops"], plan["evaluations"]) == (64, 197e12, 4)
    flops = 4 * plan["unet_flops"] + plan["decoder_flops"]
    assert plan["hours"] == pytest.approx(25_000 * flops / (64 * 197e12 * 0.5) / 3600)
    assert plan["bytes"]["latents, float16"] == 25_000 * 8 * 8 * 4 * 2
    other = _plan_building("--topology=h100:8", "--captions=2000", "--config.sample.guidance_scale=1")
    assert (other["chips"], other["evaluations"], other["unet_flops"]) == (8, 2, plan["unet_flops"])
    text = run("plan", TINY, "--job=build_mis", "--topology=h100:8").out
    assert "by formula, at 30% of the peak" in text and "chip-hours" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5e:4xa"], "say how many chips along each side"),
        (["--topology=v5e:4x0"], "say how many chips along each side"),
        (["--topology=v9:4x4"], "--topology=v9:4x4 is unknown"),
        (["--topology=h100"], "say how many a node has"),
        (["--topology=v5e:2x2", "--mfu=0"], "--mfu=0.0: must be above 0"),
        (["--topology=v5e:2x2", "--mfu=1.5"], "--mfu=1.5: must be above 0"),
    ],
)
def test_builds_that_cannot_be_planned(arguments, words):
    result = run("plan", TINY, "--job=build_mis", *arguments)
    assert result.code == 2 and words in result.err
