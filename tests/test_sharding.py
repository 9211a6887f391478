"""The mesh, the rule table, and that sharding changes no number."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.training import sharding
from m2m_jax.training.optimizer import make_optimizer
from m2m_jax.training.state import TrainState
from m2m_jax.training.step import make_train_step


def _mesh(data, fsdp, **axes):
    config = default_config().mesh
    config.update({"data": data, "fsdp": fsdp, **axes})
    return sharding.make_mesh(config)


def _params():
    return {
        "conv_in.kernel": jnp.linspace(-1.0, 1.0, 3 * 3 * 4 * 16).reshape(3, 3, 4, 16),
        "conv_in.bias": jnp.zeros((16,)),
        "blocks.0.norm.scale": jnp.ones((16,)),
        "blocks.0.linear.kernel": jnp.linspace(1.0, -1.0, 16 * 8).reshape(16, 8),
        "blocks.1.linear.kernel": jnp.ones((16, 8)),
        "odd.kernel": jnp.ones((3, 5)),
    }


@pytest.mark.parametrize(("asked", "made"), [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((2, 4), (2, 4))])
def test_mesh(asked, made):
    mesh = _mesh(*asked)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == made


@pytest.mark.parametrize("asked", [(3, -1), (2, 2), (-1, -1), (16, 1)])
def test_mesh_that_does_not_fit_is_refused(asked):
    with pytest.raises(UserError, match=rf"mesh\.data={asked[0]}, config\.mesh\.fsdp={asked[1]}"):
        _mesh(*asked)


def test_mesh_error_names_both_numbers():
    with pytest.raises(UserError, match="they make 4 devices, and there are 8"):
        _mesh(2, 2)


@pytest.mark.parametrize(("platform", "asked"), [("gpu", 1), ("gpu", 2), ("tpu", 2), ("tpu", 1)])
def test_slices_are_tpus(platform, asked, monkeypatch):
    """Both platforms number groups of devices; slices of TPUs must be an axis of the mesh, nodes of GPUs need not."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int

        def __getattr__(self, name):
            return {"platform": platform, "process_index": self.id // 4, "slice_index": self.id // 4}[name]

    config = default_config().mesh
    config.slice = asked
    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", lambda within, across, devices, **options: 0)
    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", lambda sizes, devices, **options: sizes)
    monkeypatch.setattr(sharding, "Mesh", lambda grid, axes, axis_types: grid)
    monkeypatch.setattr(sharding.gathering, "connect", lambda mesh: None)
    devices = [Device(i) for i in range(8)]
    if platform == "tpu" and asked == 1:
        with pytest.raises(UserError, match="these devices are in 2 slices; set it to that"):
            sharding.make_mesh(config, devices)
    else:
        assert sharding.make_mesh(config, devices) == (0 if platform == "tpu" else (asked, 8 // asked, 1, 1, 1))


def test_kernels_are_split_along_their_longest_divisible_axis():
    mesh = _mesh(2, 4)
    specs = {name: s.spec for name, s in sharding.parameter_shardings(_params(), mesh).items()}
    assert specs == {
        "conv_in.kernel": P(None, None, None, "fsdp"),
        "conv_in.bias": P(None),
        "blocks.0.norm.scale": P(None),
        "blocks.0.linear.kernel": P("fsdp", None),
        "blocks.1.linear.kernel": P("fsdp", None),
        "odd.kernel": P(None, None),
    }


def test_tokens_that_are_learnt_lie_whole():
    assert sharding.parameter_spec("blocks.0.attn_memory.tokens", (8, 16), _mesh(2, 4)) == P(None, None)


def test_a_parameter_that_no_rule_names_is_an_error():
    with pytest.raises(ValueError, match=r"position\.table"):
        sharding.parameter_spec("position.table", (4, 4), _mesh(-1, 1))


def test_batch_size_must_divide():
    sharding.check_batch_size(16, _mesh(2, 4), "data.batch_size")
    with pytest.raises(UserError, match=r"config\.data\.batch_size is 12.*8 devices"):
        sharding.check_batch_size(12, _mesh(2, 4), "data.batch_size")


def test_table_shows_every_rule_and_split():
    table = sharding.describe(_params(), _mesh(2, 4))
    assert "[fsdp, -]" in table
    counted = sum(int(line.split()[-2].replace(",", "")) for line in table.splitlines()[1:-1])
    assert "b over slice, data, fsdp; h over context" in table.splitlines()[-1]
    assert counted == sum(np.prod(value.shape, dtype=int) for value in _params().values())


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("images_bnhwc", P(("slice", "data", "fsdp"), None, "context", None, None)),
        ("token_ids_bns", P(("slice", "data", "fsdp"), None, None)),
        ("record_index_b", P(("slice", "data", "fsdp"))),
    ],
)
def test_the_name_of_an_array_says_how_it_is_split(name, spec):
    mesh = _mesh(2, 4)
    found = sharding.batch_sharding(mesh, name)
    assert found.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), len(spec))


@pytest.mark.parametrize("name", ["images", "images_bxhwc"])
def test_an_array_whose_axes_no_rule_names_is_an_error(name):
    with pytest.raises(ValueError, match=f"the letters that end '{name}' must be among b, n, h, w, c, s"):
        sharding.batch_sharding(_mesh(2, 4), name)


def test_sharded_steps_equal_those_of_one_device():
    config = default_config().optimizer
    config.warmup_steps = 1
    optimizer, _ = make_optimizer(config, 10)
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype(np.float32)

    def loss(params, batch):
        layout = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            batch["x_bhwc"], params["conv_in.kernel"], (1, 1), "SAME", dimension_numbers=layout
        )
        h = jnp.tanh(h) @ params["blocks.0.linear.kernel"] - (h @ params["blocks.1.linear.kernel"]) * 0.1
        return jnp.mean(jnp.square(h))

    def run(mesh):
        names = ("conv_in.kernel", "blocks.0.linear.kernel", "blocks.1.linear.kernel")
        params = {name: _params()[name] for name in names}
        shapes = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
        placed = sharding.state_shardings(shapes, mesh)
        state = jax.jit(lambda p: TrainState.create(p, optimizer), out_shardings=placed)(params)

        def step(state, batch):
            value, gradients = jax.value_and_grad(loss)(state.params, batch)
            return state.apply_gradients(gradients, optimizer, 0.9), value

        step = jax.jit(step, donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)))
        batch = sharding.make_global_batch(mesh, {"x_bhwc": images}, len(images))
        losses = []
        for _ in range(5):
            state, value = step(state, batch)
            losses.append(float(value))
        return losses, state

    one = sharding.make_mesh(default_config().mesh, jax.devices()[:1])
    losses_one, _ = run(one)
    losses_all, state = run(_mesh(2, 4))
    np.testing.assert_allclose(losses_all, losses_one, rtol=1e-5)
    # The moments and the average lie where their parameter lies.
    split = P(None, None, None, "fsdp")
    followers = [state.params, state.ema_params, state.opt_state[1][0].mu, state.opt_state[1][0].nu]
    assert [tree["conv_in.kernel"].sharding.spec for tree in followers] == [split] * 4


def test_kernels_are_gathered_and_each_device_sums_the_slice_of_a_gradient_that_it_keeps():
    mesh = _mesh(2, 4)
    name, spec = "blocks.0.linear.kernel", P("fsdp", None)
    params = {name: _params()[name]}
    x = jnp.linspace(-1.0, 1.0, 8 * 16).reshape(8, 16)

    def loss(params, x, gathered):
        params = sharding.gathered(params, mesh, "float32") if gathered else params
        return jnp.sum(jnp.tanh(x @ params[name]))

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    placed = jax.device_put(
        (params, x), (sharding.parameter_shardings(params, mesh), sharding.batch_sharding(mesh, "x_bc"))
    )
    found = gradient(*placed, True)[name]
    assert placed[0][name].sharding.spec == found.sharding.spec == spec
    np.testing.assert_allclose(found, gradient(params, x, False)[name], atol=1e-6)  # of sums of up to 2
    # The kernel is gathered, once, and nothing of the batch.
    text = gradient.lower(*placed, True).compile().as_text()
    assert [line.split(" = ")[1].split("{")[0] for line in text.splitlines() if " all-gather(" in line] == ["f32[16,8]"]


def test_whole_arrays_for_one_process():
    mesh = Mesh(_mesh(2, 4).devices[..., ::-1, :, :], sharding.AXES)  # TPUs are in no order of their numbers, either
    rows, same = jax.sharding.NamedSharding(mesh, P("fsdp")), sharding.replicated(mesh)
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    placed = {"split": jax.device_put(x, rows), "copied": jax.device_put(x, same)}
    found = sharding.on_this_process(placed, mesh)
    np.testing.assert_array_equal(found["split"], x)
    np.testing.assert_array_equal(found["copied"], x)
    assert isinstance(found["split"], np.ndarray)
    # A sampler of all devices of this process takes it as it lies.
    of_sampler = jax.device_put(found["copied"], sharding.replicated(Mesh(np.array(jax.local_devices()), ("data",))))
    where = {shard.device: shard.data.unsafe_buffer_pointer() for shard in placed["copied"].addressable_shards}
    assert {shard.device: shard.data.unsafe_buffer_pointer() for shard in of_sampler.addressable_shards} == where


class Product:
    """A task of one product in bfloat16, of rows whose gradients bfloat16 cannot add up."""

    compute_dtype = "bfloat16"

    @staticmethod
    def draw(batch, step):
        return None

    @staticmethod
    def loss(params, frozen, batch, draws):
        (kernel,) = params.values()
        y_bc = batch["x_bc"].astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)
        loss = jnp.mean(y_bc.astype(jnp.float32))
        return loss, {"loss": loss}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_summed_in_float32_where_that_is_asked_for(accumulation):
    """The text is that of the program before XLA: on a CPU, which has no bfloat16, XLA sums in float32 in any case."""
    mesh, name = _mesh(2, 4), "blocks.0.linear.kernel"
    params = {name: jnp.zeros(_params()[name].shape)}
    optimizer, _ = make_optimizer(default_config().optimizer, 1000)
    # 1 and 2**-7: each gradient is exact in bfloat16, and so is no sum of both.
    x = np.where(np.arange(16)[:, None] < 2, 1.0, 2.0**-7).astype(np.float32).repeat(params[name].shape[0], axis=1)
    batch = sharding.make_global_batch(mesh, {"x_bc": x}, 16)
    shapes = jax.eval_shape(lambda p: TrainState.create(p, optimizer), params)
    placed = sharding.state_shardings(shapes, mesh)
    state = jax.jit(lambda p: TrainState.create(p, optimizer), out_shardings=placed)(params)
    step = make_train_step(Product, optimizer, placed, mesh, 0.9, accumulation=accumulation, reduce_dtype="float32")
    text = step.lower(state, {}, batch).as_text()
    sums = re.findall(r'"stablehlo\.(reduce_scatter|all_reduce)".*?\}\) : \(tensor<([^>]*)>', text, re.DOTALL)
    assert sums and all(of.endswith("f32") for _, of in sums), sums
    assert [kind for kind, _ in sums].count("reduce_scatter") == 1  # once a step, whatever the parts
    metrics = step(state, {}, batch)[1]
    columns = params[name].shape[1]
    expected = x.mean(axis=0)[:, None].repeat(columns, axis=1) / columns
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(expected), rtol=1e-6)


def test_float32_sums_are_refused_where_xla_splits_tensors():
    with pytest.raises(UserError, match="set both to 1"):
        sharding.summed_in_float32(None, _mesh(2, 2, tensor=2))
