"""What a program of a bundle may hold: arithmetic on its arguments, and nothing that reaches out of XLA.

`jax.export` runs whatever an exported program names. A custom call can be any function that a library in the process
registered with XLA, Python callbacks at an index of the caller's choice among them; `infeed`, `send` and their like
speak to the host. So every operation, every call and every attribute must stand in the lists below. They hold what
StableHLO computes with; exported samplers use a part of it, the same on all platforms. `bundle_writer` checks what it
writes by the same lists.
"""

from __future__ import annotations

import jax.export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

# Pure functions of the StableHLO specification, and control flow whose bodies are walked as well.
_STABLEHLO = """
    abs add after_all and atan2 batch_norm_inference bitcast_convert broadcast broadcast_in_dim case cbrt ceil clamp
    compare complex composite concatenate constant convert convolution cosine count_leading_zeros divide dot_general
    dynamic_broadcast_in_dim dynamic_conv dynamic_gather dynamic_iota dynamic_pad dynamic_reshape dynamic_slice
    dynamic_update_slice exponential exponential_minus_one floor gather get_dimension_size get_tuple_element if imag
    iota is_finite log log_plus_one logistic map maximum minimum multiply negate not optimization_barrier or pad popcnt
    power real real_dynamic_slice reduce reduce_precision reduce_window remainder reshape return reverse
    rng_bit_generator round_nearest_afz round_nearest_even rsqrt scatter select select_and_scatter set_dimension_size
    shift_left shift_right_arithmetic shift_right_logical sign sine slice sort sqrt subtract tan tanh transpose tuple
    while xor
"""
OPERATIONS = frozenset({"func.call", "func.return"} | {f"stablehlo.{name}" for name in _STABLEHLO.split()})
# Functions that XLA may have a kernel for; each brings its own decomposition, a function that is walked.
COMPOSITES = frozenset(f"chlo.{name}" for name in ("erf", "erfc", "erf_inv", "lgamma", "digamma"))
CALLEES = {"func.call": "callee", "stablehlo.composite": "decomposition"}
# What an operation may carry: its own fields, and JAX's notes. Others tell XLA to place it elsewhere, to take it for
# another operation, or to believe in a shape or a layout.
_FIELDS = """
    algorithm arg_attrs base_dilations batch_group_count broadcast_dimensions broadcast_sizes callee compare_type
    comparison_direction decomposition dimension dimension_numbers dimensions dot_dimension_numbers edge_padding_high
    edge_padding_low epsilon exponent_bits feature_group_count feature_index function_type index indices_are_sorted
    interior_padding iota_dimension is_stable known_expanding_dimensions known_nonexpanding_dimensions lhs_dilation
    limit_indices mantissa_bits name padding permutation precision_config res_attrs result_accuracy rhs_dilation
    rng_algorithm scatter_dimension_numbers slice_sizes start_indices strides sym_name sym_visibility unique_indices
    value version window_dilations window_dimensions window_reversal window_strides
    jax.global_constant jax.result_info jax.uses_shape_polymorphism mhlo.num_partitions mhlo.num_replicas
"""
ATTRIBUTES = frozenset(_FIELDS.split())
# The one custom call: a condition on the sizes of the arguments, which JAX evaluates and removes before it compiles.
ASSERTION = "stablehlo.custom_call"
# Bodies within bodies and calls within calls; XLA's compiler walks both with its own stack, which thousands overflow.
MAX_DEPTH = 100


class ForbiddenProgram(ValueError):
    """A program that does something else than exported samplers do."""


def require_arithmetic(exported: jax.export.Exported) -> None:
    """Walk a program and refuse what is not in the lists of this module. Compiles and runs nothing.

    Args:
      exported: the program as it was read. JAX compiles exactly the module that is walked here.

    Raises:
      ForbiddenProgram: names the first thing that no exported sampler holds.
      Exception: others of MLIR's reader, for a module that is damaged.
    """
    if exported.ordered_effects or exported.unordered_effects:
        raise ForbiddenProgram("it has side effects")
    if exported.nr_devices != 1:
        raise ForbiddenProgram(f"it is of {exported.nr_devices} devices")
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        _require_attributes("the module", module.operation.attributes)
        calls: dict[str, set[str]] = {}
        for function in module.body:
            if function.operation.name != "func.func":
                raise ForbiddenProgram(f"it holds {function.operation.name!r:.60}")
            calls[_text(function.operation, "sym_name")] = _check(function.operation)
    _require_shallow(calls)


def _check(function: ir.Operation) -> set[str]:
    """Refuse what stands in a function, at any depth; return the names of the functions that it calls."""
    _require_attributes(function.name, function.attributes)
    called, waiting = set(), _bodies(function, 1)
    while waiting:
        operation, depth = waiting.pop()
        name = operation.name
        if depth > MAX_DEPTH:
            raise ForbiddenProgram(f"its bodies are nested more than {MAX_DEPTH} deep")
        if name == ASSERTION:
            _require_assertion(operation)
            continue
        if name not in OPERATIONS:
            raise ForbiddenProgram(f"it holds {name!r:.60}")
        _require_attributes(name, operation.attributes)
        if name == "stablehlo.composite" and _text(operation, "name") not in COMPOSITES:
            raise ForbiddenProgram(f"it calls {_text(operation, 'name')!r:.60}")
        if name in CALLEES:
            called.add(ir.FlatSymbolRefAttr(operation.attributes[CALLEES[name]]).value)
        waiting += _bodies(operation, depth + 1)
    return called


def _bodies(operation: ir.Operation, depth: int) -> list[tuple[ir.Operation, int]]:
    return [(one.operation, depth) for region in operation.regions for block in region for one in block]


def _require_assertion(operation: ir.Operation) -> None:
    """Refuse calls but those that JAX evaluates; it believes in the types of their parts."""
    target, fields = _text(operation, "call_target_name"), _names(operation.attributes)
    types = [str(operand.type) for operand in operation.operands]
    if not (
        target == "shape_assertion"
        and fields == {"api_version", "call_target_name", "error_message", "has_side_effect"}
        and isinstance(operation.attributes["error_message"], ir.StringAttr)
        and types[:1] == ["tensor<i1>"]
        and set(types[1:]) <= {"tensor<i32>", "tensor<i64>"}
        and not len(operation.results)
    ):
        raise ForbiddenProgram(f"it calls {target!r:.60}")


def _require_attributes(name: str, attributes) -> None:
    fields = _names(attributes)
    for lists in ("arg_attrs", "res_attrs"):
        if lists in fields:
            fields |= {field for one in ir.ArrayAttr(attributes[lists]) for field in _names(ir.DictAttr(one))}
    for field in sorted(fields - ATTRIBUTES):
        raise ForbiddenProgram(f"{name} carries {field!r:.60}")


def _require_shallow(calls: dict[str, set[str]]) -> None:
    """Refuse functions that call themselves, or through too many others."""
    left = dict(calls)
    for _ in range(MAX_DEPTH):
        left = {name: called for name, called in left.items() if called & left.keys()}
    if left:
        raise ForbiddenProgram(f"{min(left)!r:.60} calls itself, or through more than {MAX_DEPTH} others")


def _text(operation: ir.Operation, field: str) -> str:
    return ir.StringAttr(operation.attributes[field]).value


def _names(attributes) -> set[str]:
    """Return the names in an attribute map; iteration gives names or named attributes, by the version of jaxlib."""
    return {one if isinstance(one, str) else one.name for one in attributes}
