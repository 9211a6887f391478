"""What the annotations say of axes is checked while tests run."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.plain import attend
from m2m_jax.diffusion.guidance import fade
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.tasks.objective import weighted_loss

pytestmark = pytest.mark.skipif(os.environ.get("M2M_CHECK_SHAPES") == "0", reason="shapes are not checked")


def test_a_wrong_axis_is_refused():
    q_bqthd, k_bkshd = jnp.ones((1, 7, 4, 2, 8)), jnp.ones((1, 3, 4, 2, 8))
    layout = SetLayout.training(4)
    assert BACKENDS["dense"](q_bqthd, k_bkshd, k_bkshd, layout).shape == q_bqthd.shape
    with pytest.raises(TypeCheckError, match="k_bkshd"):
        BACKENDS["dense"](q_bqthd, k_bkshd[..., :4], k_bkshd, layout)  # another width of a head
    with pytest.raises(TypeCheckError, match="keep_bk"):
        BACKENDS["dense"](q_bqthd, k_bkshd, k_bkshd, layout, jnp.ones((1, 4), bool))  # one image too many


def test_a_mask_that_is_not_boolean_is_refused():
    q_bthd = jnp.ones((1, 4, 2, 8))
    with pytest.raises(TypeCheckError, match="mask_qk"):
        attend(q_bthd, q_bthd, q_bthd, np.ones((4, 4), np.float32))


def test_a_scalar_in_the_place_of_an_axis_is_refused():
    with pytest.raises(TypeCheckError, match="noise_s"):
        fade(np.array(0.5), (1.0, 0.0), (0.0, 1.0), "constant")
    with pytest.raises(TypeCheckError, match="timestep_bn"):
        weighted_loss(NoiseSchedule(), jnp.ones((2, 3)), jnp.ones((2, 4), jnp.int32), None)


@pytest.mark.parametrize("first", ["attention.backends", "diffusion.guidance"])
def test_the_module_that_is_imported_first_is_checked_too(first):
    program = f"import shape_checks; shape_checks.install(); import m2m_jax.{first} as first; print(first.__loader__)"
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "jaxtyping" in printed
