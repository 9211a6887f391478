"""What the planner reads out of the text of a compiled program: collectives, and bytes through HBM."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from m2m_jax.configuration import default_config
from m2m_jax.planning import hlo
from m2m_jax.planning.collectives import _groups, collectives, wire_bytes
from m2m_jax.planning.hbm import hbm_bytes
from m2m_jax.training import sharding

# Collectives

PROGRAM = """\
HloModule jit_train_step, is_scheduled=true

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[]{:T(128)} parameter(0)
  ROOT %add.2 = f32[]{:T(128)} add(%x.1, %y.1)
}

%body (p.1: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %gather.1 = f32[64,32]{1,0:T(8,128)} all-gather(%p.2), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[64,32]{1,0}) tuple(%i, %gather.1)
}

%condition (p.3: (s32[], f32[64,32])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %p.3 = (s32[]{:T(128)}, f32[64,32]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

%all-reduce-scatter.1 (p.4: f32[40]) -> f32[10] {
  %whole = f32[40]{0} all-reduce(%p.4), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add.1
  ROOT %part = f32[10]{0} dynamic-slice(%whole, %k), dynamic_slice_sizes={10}
}

%fused.1 (p: f32[16]) -> f32[4] {
  ROOT %scatter = f32[4]{0:T(128)S(1)} reduce-scatter(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
}

%fused.2 (p: f32[16]) -> f32[4] {
  ROOT %scatter.2 = f32[4]{0:T(128)S(1)} reduce-scatter(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (s32[], f32[64,32]{1,0}) while(%init), condition=%condition, body=%body
  %f.1 = f32[4]{0} fusion(%a), kind=kCustom, calls=%fused.1
  %f.2 = f32[4]{0} fusion(%a), kind=kCustom, calls=%fused.2, metadata={op_name="all-reduce(x)"}
  %reduce = (f32[100]{0}, bf16[50]{0}) all-reduce(%b, %c), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.1
  %start = (f32[4,4]{1,0}, f32[4,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%d), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %done = f32[4,4]{1,0} collective-permute-done(%start)
  %rs = f32[10]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %splash_mha_fwd_residuals.1 = bf16[8,128]{1,0} custom-call(%e), custom_call_target="tpu_custom_call", metadata={op_name="x"}
  ROOT %r = f32[8]{0} copy(%a)
}
"""  # noqa: E501


def test_collectives_of_a_program():
    """Two slices of four devices. Loops count, fusions that share a channel count once."""
    found = {c.kind: c for c in collectives(hlo.parse(PROGRAM), [0] * 4 + [1] * 4)}
    gather = found["all-gather"]
    assert (gather.count, gather.group_size, gather.slices) == (3, 4, 1)
    assert (gather.ici_bytes, gather.dcn_bytes) == (3 * 64 * 32 * 4 * 3 / 4, 0)
    assert (found["reduce-scatter"].count, found["reduce-scatter"].ici_bytes) == (2, 4 * 4 * 3 + 10 * 4 * 3)
    reduce = found["all-reduce"]  # of devices i and i + 4, one of each slice
    assert (reduce.group_size, reduce.slices) == (2, 2)
    assert (reduce.ici_bytes, reduce.dcn_bytes) == (0, 500)
    assert found["collective-permute"].ici_bytes == pytest.approx(64, abs=4)


def test_kernels_are_counted_by_kind():
    assert hlo.kernel_calls(PROGRAM) == {"fwd": 1, "dq": 0, "dkv": 0}
    with pytest.raises(ValueError, match="not known: %my_kernel"):
        hlo.kernel_calls(PROGRAM.replace("splash_mha_fwd_residuals", "my_kernel"))


@pytest.mark.parametrize(("kind", "sent"), [("ALL_REDUCE", 1024), ("ALL_GATHER", 1024), ("REDUCE_SCATTER", 512)])
def test_transfers_between_slices_are_sent_to_the_host(kind, sent):
    send = (
        "  %send.1 = (bf16[1,4,128]{2,1,0:T(4,128)(2,1)}, u32[], token[]) send(%b, %after), channel_id=9, "
        f'is_host_transfer=true, frontend_attributes={{_xla_megascale_transfer_type="{kind}"}}'
    )
    (row,) = collectives(hlo.parse(f"ENTRY %m (a: f32[]) -> f32[] {{\n{send}\n}}"), [0] * 4 + [1] * 4)
    assert (row.kind, row.slices, row.ici_bytes, row.dcn_bytes) == (kind.lower().replace("_", "-"), 2, 0, sent)


def test_a_collective_over_slices_crosses_each_link_once():
    line = "ENTRY %m (a: f32[]) -> f32[] {\n  %r = f32[80]{0} all-reduce(%a), replica_groups={}\n}"
    (row,) = collectives(hlo.parse(line), [0] * 4 + [1] * 4)
    # Scattered within the slice, reduced between slices in quarters, gathered within the slice.
    assert (row.group_size, row.slices, row.ici_bytes, row.dcn_bytes) == (8, 2, 2 * 320 * 3 / 4, 80)


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=1], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,2,1) {'a'}", ((0, 2), (3, 1))),
    ],
)
def test_groups_of_a_collective(notation, groups):
    assert _groups(f"%r = f32[8]{{0}} all-reduce(%a), channel_id=1, {notation}, to_apply=%add", 4) == groups


def test_collectives_in_an_unknown_notation_are_an_error():
    with pytest.raises(ValueError, match="does not know the groups"):
        collectives(hlo.parse("ENTRY %m (a: f32[]) -> f32[] {\n  %r = f32[8]{0} all-reduce(%a), groups=?\n}"), [0])


@pytest.mark.parametrize(
    ("kind", "sent"), [("all-gather", 75), ("reduce-scatter", 300), ("all-reduce", 150), ("collective-permute", 100)]
)
def test_bytes_on_the_wire(kind, sent):
    assert wire_bytes(kind, 100, 4) == sent
    assert wire_bytes(kind, 100, 1) == 0


def test_collectives_of_a_program_that_xla_compiled():
    """All that is assumed of HLO's text, against the XLA that is installed."""
    config = default_config().mesh
    config.fsdp = 8
    mesh = sharding.make_mesh(config)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    text = jax.jit(lambda x: x * 2, out_shardings=sharding.replicated(mesh)).lower(x).compile().as_text()
    (row,) = collectives(hlo.parse(text), [0] * 8)
    assert (row.kind, row.group_size, row.count, row.ici_bytes) == ("all-gather", 8, 1, 16 * 64 * 4 * 7 / 8)


# HBM

KIB = 1024  # of an array f32[16,16]
LAYOUT, CORE = "{1,0:T(8,128)}", "{1,0:T(8,128)S(1)}"  # in HBM, in the memory of a TPU's core


def _moved(lines: str, computations: str = "") -> float:
    """KiB of a program of these instructions."""
    entry = "".join(f"  {line.strip()}\n" for line in lines.strip().splitlines())
    arrays = "%a = f32[16,16]{1,0:T(8,128)} parameter(0)\n  %b = f32[16,16]{1,0:T(8,128)} parameter(1)"
    text = f"{computations}\nENTRY %main (a: f32[16,16], b: f32[16,16]) -> f32[16,16] {{\n  {arrays}\n{entry}}}\n"
    text = text.replace("ARRAY", f"f32[16,16]{LAYOUT}").replace("FETCHED", f"f32[16,16]{CORE}")
    return hbm_bytes(hlo.parse(text)) / KIB


def test_what_is_fetched_ahead_counts_once():
    """As a TPU's compiler prints it; XLA counts four arrays more for each fetch."""
    moved = _moved(
        """
        %fetch = (FETCHED, ARRAY, u32[]{:S(2)}) copy-start(%a), cross_program_prefetch_index=0
        %fetched = FETCHED copy-done(%fetch)
        %f = (f32[16]{0:T(128)S(1)}, ARRAY) fusion(%b, %fetched), kind=kOutput, calls=%fused
        %sum = f32[16]{0:T(128)S(1)} get-tuple-element(%f), index=0
        %x = ARRAY get-tuple-element(%f), index=1
        %y = FETCHED fusion(%x, %sum), kind=kLoop, calls=%fused
        ROOT %z = ARRAY fusion(%y, %fetched), kind=kLoop, calls=%fused
        """
    )
    assert moved == 5  # reads a, b and x, writes x and z


def test_a_copy_within_hbm_is_read_and_written():
    moved = _moved("%start = (ARRAY, ARRAY, u32[]{:S(2)}) copy-start(%a)\nROOT %done = ARRAY copy-done(%start)")
    assert moved == 2


def test_of_what_is_sliced_the_slice_counts():
    fused = """
%fused (p: f32[16,16], q: f32[16,16]) -> f32[4,16] {
  %p = ARRAY parameter(0)
  %q = ARRAY parameter(1)
  %same = ARRAY bitcast(%p)
  %s = f32[4,16]{1,0} dynamic-slice(%same, %i, %j), dynamic_slice_sizes={4,16}
  %t = f32[4,16]{1,0} dynamic-slice(%q, %i, %j), dynamic_slice_sizes={4,16}
  %u = ARRAY negate(%q)
  ROOT %add = f32[4,16]{1,0} add(%s, %t)
}
"""
    assert _moved("ROOT %f = f32[4,16]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused", fused) == 0.25 + 1 + 0.25
    assert _moved("ROOT %s = f32[4,16]{1,0} dynamic-slice(%a, %i, %j), dynamic_slice_sizes={4,16}") == 0.5
    slice_start = "%s = ((ARRAY), f32[4,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:16]}"
    assert _moved(slice_start) == 0.25


def test_of_what_is_updated_in_place_the_update_counts():
    fused = """
%fused (p: f32[16,16], q: f32[4,16]) -> f32[16,16] {
  %p = ARRAY parameter(0)
  %q = f32[4,16]{1,0} parameter(1)
  ROOT %update = ARRAY dynamic-update-slice(%p, %q, %i, %j)
}
"""
    lines = "%part = f32[4,16]{1,0} constant({...})\n"
    assert _moved(lines + "ROOT %f = ARRAY fusion(%a, %part), kind=kLoop, calls=%fused", fused) == 0.5
    assert _moved(lines + "ROOT %u = ARRAY dynamic-update-slice(%a, %part, %i, %j)") == 0.5


def test_loops_and_branches():
    computations = """
%once (p: f32[16,16]) -> f32[16,16] {
  %p = ARRAY parameter(0)
  ROOT %n = ARRAY negate(%p)
}

%nothing (p.2: f32[16,16]) -> f32[16,16] {
  ROOT %p.2 = ARRAY parameter(0)
}

%three (p.3: f32[16,16]) -> pred[] {
  %c = s32[]{:S(2)} constant(3)
  ROOT %less = pred[]{:S(2)} compare(%i, %c), direction=LT
}
"""
    loop = "%w = ARRAY while(%a), condition=%three, body=%once"
    assert _moved(loop, computations) == 6
    assert _moved("%c = ARRAY conditional(%i, %a, %a), branch_computations={%nothing, %once}", computations) == 2
    assert _moved("%c = ARRAY call(%a), to_apply=%once", computations) == 2


def test_collectives_are_read_and_written():
    assert _moved("%r = ARRAY all-reduce(%a), replica_groups={}, to_apply=%add") == 2
    start = "%s = ARRAY all-reduce-start(%a), replica_groups={}, to_apply=%add\n%d = ARRAY all-reduce-done(%s)"
    assert _moved(start) == 2
    start = "%s = (ARRAY, f32[32,16]{1,0}) all-gather-start(%a), dimensions={0}\n%d = f32[32,16] all-gather-done(%s)"
    assert _moved(start) == 3


def test_without_another_memory_it_is_xla_s_count():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(lambda x, y: x @ y @ y).lower(x, x).compile()
    assert hbm_bytes(hlo.parse(compiled.as_text())) == compiled.cost_analysis()["bytes accessed"]


def test_loops_of_a_program_that_was_compiled_here_run_as_often_as_it_says():
    program = hlo.parse(
        jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, None, length=7)[0])
        .lower(jax.ShapeDtypeStruct((4, 4), jnp.float32))
        .compile()
        .as_text()
    )
    loops = [one for part in program.computations.values() for one in part.instructions if one.opcode == "while"]
    assert [program.trips(one) for one in loops] == [7]
