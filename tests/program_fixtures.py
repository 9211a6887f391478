"""Programs written by hand, as someone who forges a bundle would write them."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

TYPE = "tensor<2xf32>"
# Where one operation on %x can stand; it gives %y.
PLACES = {
    "main": "{operation}\n    return %y : tensor<2xf32>\n  }}",
    "function": """%0 = call @inner(%x) : (tensor<2xf32>) -> tensor<2xf32>
    return %0 : tensor<2xf32>
  }}
  func.func private @inner(%x: tensor<2xf32>) -> tensor<2xf32> {{
    {operation}
    return %y : tensor<2xf32>
  }}""",
    "function that nobody calls": """return %x : tensor<2xf32>
  }}
  func.func private @inner(%x: tensor<2xf32>) -> tensor<2xf32> {{
    {operation}
    return %y : tensor<2xf32>
  }}""",
    "branch": """%i = stablehlo.constant dense<0> : tensor<i32>
    %0 = "stablehlo.case"(%i) ({{
      {operation}
      stablehlo.return %y : tensor<2xf32>
    }}, {{
      stablehlo.return %x : tensor<2xf32>
    }}) : (tensor<i32>) -> tensor<2xf32>
    return %0 : tensor<2xf32>
  }}""",
    "loop": """%0 = "stablehlo.while"(%x) ({{
    ^bb0(%a: tensor<2xf32>):
      %c = stablehlo.constant dense<false> : tensor<i1>
      stablehlo.return %c : tensor<i1>
    }}, {{
    ^bb0(%a: tensor<2xf32>):
      {operation}
      stablehlo.return %y : tensor<2xf32>
    }}) : (tensor<2xf32>) -> tensor<2xf32>
    return %0 : tensor<2xf32>
  }}""",
    "branch of a loop": """%i = stablehlo.constant dense<0> : tensor<i32>
    %0 = "stablehlo.while"(%x) ({{
    ^bb0(%a: tensor<2xf32>):
      %c = stablehlo.constant dense<false> : tensor<i1>
      stablehlo.return %c : tensor<i1>
    }}, {{
    ^bb0(%a: tensor<2xf32>):
      %1 = "stablehlo.case"(%i) ({{
        {operation}
        stablehlo.return %y : tensor<2xf32>
      }}) : (tensor<i32>) -> tensor<2xf32>
      stablehlo.return %1 : tensor<2xf32>
    }}) : (tensor<2xf32>) -> tensor<2xf32>
    return %0 : tensor<2xf32>
  }}""",
    "decomposition": """%0 = "stablehlo.composite"(%x)
      {{name = "chlo.erf", decomposition = @inner}} : (tensor<2xf32>) -> tensor<2xf32>
    return %0 : tensor<2xf32>
  }}
  func.func private @inner(%x: tensor<2xf32>) -> tensor<2xf32> {{
    {operation}
    return %y : tensor<2xf32>
  }}""",
}

CALL = f"%y = func.call @{{}}(%x) : ({TYPE}) -> {TYPE}"


def arithmetic(attributes: str = "") -> str:
    """An operation that only computes."""
    return f'%y = "stablehlo.negate"(%x) {{{attributes}}} : ({TYPE}) -> {TYPE}'


def custom_call(target: str, fields: str = "api_version = 2 : i32") -> str:
    """A call of what a library registered with XLA under a name."""
    return f'%y = "stablehlo.custom_call"(%x) {{call_target_name = "{target}", {fields}}} : ({TYPE}) -> {TYPE}'


def composite(name: str) -> str:
    """A call of the function main under another name."""
    return f'%y = "stablehlo.composite"(%x) {{name = "{name}", decomposition = @main}} : ({TYPE}) -> {TYPE}'


def infeed() -> str:
    """An operation that waits for the host."""
    return f"""%t = "stablehlo.create_token"() : () -> !stablehlo.token
      %y, %u = "stablehlo.infeed"(%t) {{infeed_config = "", layout = [[0]]}}
        : (!stablehlo.token) -> ({TYPE}, !stablehlo.token)"""


def nested(depth: int) -> str:
    """Branches within branches."""
    body = f"%y{depth} = stablehlo.negate %x : {TYPE}"
    for i in reversed(range(depth)):
        name = f"%y{i}" if i else "%y"
        branch = f"{body}\n stablehlo.return %y{i + 1} : {TYPE}"
        body = f'{name} = "stablehlo.case"(%n) ({{ {branch} }}) : (tensor<i32>) -> {TYPE}'
    return f"%n = stablehlo.constant dense<0> : tensor<i32>\n{body}"


def write_program(operation: str, place: str = "main", module: str = "", **fields) -> bytes:
    """Return a serialized program of one float32 array [2] that holds an operation at a place.

    Args:
      operation: StableHLO text that makes %y of %x.
      place: a name in `PLACES`.
      module: attributes of the module, as text.
      **fields: replace those of `jax.export.Exported`.
    """
    body = PLACES[place].format(operation=operation)
    attributes = f"mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32{module}"
    text = (
        f"module @jit_f attributes {{{attributes}}} {{\n"
        f"  func.func public @main(%x: {TYPE}) -> {TYPE} {{\n    {body}\n}}"
    )
    with make_ir_context() as context:
        context.allow_unregistered_dialects = True
        data = stablehlo.serialize_portable_artifact(ir.Module.parse(text), stablehlo.get_current_version(), True)
    harmless = jax.export.export(jax.jit(lambda x: -x), platforms=("cpu",))(jnp.zeros(2))
    return bytes(dataclasses.replace(harmless, mlir_module_serialized=data, **fields).serialize())
