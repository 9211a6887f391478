"""Images that the devices hold: what a step picks of them is what the host would have sent, to the bit."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare_runs import losses
from data_fixtures import data_config, write_image_folder
from run_fixtures import one_level_arguments, run

from m2m_jax.core.errors import UserError
from m2m_jax.data import pipeline, transform
from m2m_jax.data.records import BadRecord


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fourteen sets of pictures of many kinds, some transparent."""
    return write_image_folder(tmp_path_factory.mktemp("images"), num_sets=14, images_per_set=5)


def _examples(folder, resident, **changes):
    config = data_config(name="folder", path=str(folder), resident=resident, **changes)
    return pipeline.open_examples(config, split="train", seed=3, in_step=resident)


def _batch(examples, step=0):
    return pipeline.inputs(pipeline.make_dataset(examples, batch_size=4)[step])


@pytest.mark.parametrize("augment", [{}, {"augment.enabled": False}], ids=["augmented", "as they are"])
def test_a_step_makes_the_images_that_the_host_makes(folder, augment):
    on_host, resident = _examples(folder, False, **augment), _examples(folder, True, **augment)
    finish = jax.jit(transform.finish)
    store = jnp.asarray(resident.resident.rgba_nhwc)
    for step in range(3):
        sent = _batch(resident, step)
        assert set(sent) == {"place_bn", "augmentation_bs"} and sent["place_bn"].dtype == np.int32
        made = finish(sent, store)
        np.testing.assert_array_equal(made["images_bnhwc"], _batch(on_host, step)["images_bnhwc"])


def test_a_damaged_image_is_named_at_its_turn_or_passed_over(folder, tmp_path):
    damaged = write_image_folder(tmp_path / "images", num_sets=14, images_per_set=5)
    image = damaged / "set03" / "0.png"
    image.write_bytes(image.read_bytes()[:-30])
    examples = _examples(damaged, True)
    found = [i for i in range(examples.epoch_length) if _raises(examples, i)]
    assert len(found) == 1
    skipping = _batch(_examples(damaged, True, on_error="skip"), 0)
    on_host = _batch(_examples(damaged, False, on_error="skip"), 0)
    made = transform.finish(skipping, jnp.asarray(_examples(damaged, True, on_error="skip").resident.rgba_nhwc))
    np.testing.assert_array_equal(made["images_bnhwc"], on_host["images_bnhwc"])


def _raises(examples, index):
    try:
        examples[index]
    except BadRecord as error:
        assert "set03" in str(error)
        return True
    return False


def test_worker_processes_get_no_images(folder):
    examples = _examples(folder, True)
    assert len(pickle.dumps(examples)) < examples.resident.rgba_nhwc.nbytes // 4
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(examples))[5]["place_n"], examples[5]["place_n"])


def test_latents_have_no_images_to_hold():
    config = data_config(name="precomputed", path="somewhere", resident=True)
    config.augment.enabled = False
    with pytest.raises(UserError, match=r"config\.data\.resident is True; devices hold images"):
        config.check()


def test_training_on_eight_devices_and_going_on_from_the_host(tmp_path_factory, tmp_path):
    """The losses are those of images from the host, and a run can change from one to the other."""
    arguments = (*one_level_arguments(tmp_path_factory), "--config.train.log_every=1")
    resident, on_host = tmp_path / "resident", tmp_path / "host"
    result = run("train", *arguments, "--config.train.steps=3", "--config.data.resident=True", f"--workdir={resident}")
    assert (result.code, result.err) == (0, "")
    assert run("train", *arguments, "--config.train.steps=5", f"--workdir={on_host}").code == 0
    result = run("train", *arguments, "--config.train.steps=5", f"--workdir={resident}")
    assert result.code == 0 and "config.data.resident" not in result.out
    here, there = losses(resident), losses(on_host)
    steps = [key for key in there if key[1] == "train/loss" and key[0] <= 3]
    assert len(steps) == 3
    # The images are the same to the bit; what XLA makes of the rest of the step need not be.
    np.testing.assert_allclose([here[key] for key in steps], [there[key] for key in steps], rtol=1e-5)
