"""Comparing models of torch libraries with ours, layer by layer, at random weights."""

import functools
import json
import math

import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit

from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.folder import require_same

# Parts of the names of parameters whose output enters softmax, silu or gelu, or follows a norm.
STRONG = (
    *("norm", "time_embedding", ".to_q.", ".to_k.", ".ff.up."),
    *(".q_proj.", ".k_proj.", ".fc1.", ".weights_in.", ".lambda1"),
)


@functools.cache
def random_model(cls, config):
    """(graphdef, params) without a zero among the parameters, also where training starts from zeros.

    Features are so weak that the epsilon of every norm matters; what enters softmax, silu and gelu is not.
    """
    graphdef, shapes = abstract(lambda: cls(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = {}
    for name, x in shapes.items():
        strong = any(part in name for part in STRONG)
        kernel = (0, math.prod(x.shape[:-1]) ** -0.5)
        mean, std = {"bias": (0, 0.2), "scale": (1, 0.2), "lambda1": (1, 0.2)}.get(name.rpartition(".")[2], kernel)
        std *= 1 if strong else 0.03
        params[name] = (mean + std * rng.standard_normal(x.shape)).astype(np.float32)
    return graphdef, params


def record(graphdef, params, kinds, call, *inputs) -> dict[str, np.ndarray]:
    """What `call(model, *inputs)` returns by name, after the output of every module of these `kinds`."""
    order = []

    @quick_jit
    def run(params, *inputs):
        model = merge(graphdef, params)
        names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
        outputs = {}

        def recording(original):
            def recorded(self, *args, **kwargs):
                out = original(self, *args, **kwargs)
                outputs[names[id(self)]] = out[0] if isinstance(out, tuple) else out  # keys and values are ours alone
                return out

            return recorded

        with pytest.MonkeyPatch.context() as patch:
            for kind in kinds:
                patch.setattr(kind, "__call__", recording(kind.__call__))
            outputs |= call(model, *inputs)
        order.extend(outputs)
        return outputs

    outputs = run(params, *inputs)
    return {name: np.asarray(outputs[name]) for name in order}


def torch_record(model, names, call) -> dict[str, np.ndarray]:
    """`record` of a torch model, for the modules among `names`."""
    import torch

    outputs, modules = {}, dict(model.named_modules(remove_duplicate=False))
    handles = []
    for name in set(names) & modules.keys():

        def hook(module, args, out, name=name):
            outputs[name] = to_numpy(out[0] if isinstance(out, tuple) else out)

        handles.append(modules[name].register_forward_hook(hook))
    with torch.no_grad():
        outputs |= {name: to_numpy(x) for name, x in call(model).items()}
    for handle in handles:
        handle.remove()
    return outputs


def to_numpy(tensor) -> np.ndarray:
    """NCHW to NHWC; tokens stay."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def to_torch(x_bhwc):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x_bhwc.transpose(0, 3, 1, 2)))


def relative_error(ours, theirs) -> float:
    """The largest difference, in units of the largest magnitude there."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def require_equal(ours, theirs) -> None:
    """All within 1e-5 of the largest magnitude there; a failure names the first layer that differs."""
    assert list(theirs) and ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.shape == theirs[name].shape, f"{name}: {x.shape}; torch: {theirs[name].shape}"
        error = relative_error(x, theirs[name])
        assert error <= 1e-5, f"{name} is the first to differ: relative error {error:.1e}"


def assert_same_params(found, expected) -> None:
    """Float32, with the same names and values, to the last bit."""
    require_same("the folder", expected, found)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert found[name].dtype == np.float32


def change_config(folder, **fields) -> None:
    """Replaces fields of the `config.json` of a model folder."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))
