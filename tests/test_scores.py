"""Metrics of generated sets."""

import numpy as np
import pytest
import scipy.linalg

from m2m_jax.core.errors import UserError
from m2m_jax.scoring.encoders import SET_ENCODERS, require_unseen
from m2m_jax.scoring.metrics import SCORES, Features


def gaussian(seed=0, n=60, k=3, c=8):
    return np.random.default_rng(seed).standard_normal((n, k, c)).astype(np.float32)


def test_frechet_is_the_formula_with_a_matrix_root():
    for n in (6, 40):  # fewer and more samples than features
        made_nkc, real_nkc = gaussian(0, n), 1.5 * gaussian(1, n) + 0.3
        (measured,) = SCORES["frechet"]()(Features("x", made_nkc, real_nkc)).values()
        for k, value in enumerate(measured.values_k):
            (m1, m2), (c1, c2) = zip(*((x[:, k].mean(0), np.cov(x[:, k].T)) for x in (made_nkc, real_nkc)), strict=True)
            root = scipy.linalg.sqrtm(c1 @ c2)
            expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root).real
            assert value == pytest.approx(expected, rel=1e-4)


def test_similarities_are_mean_cosines():
    made_nkc, given_nmc, real_nkc = gaussian(0), gaussian(1, k=2), gaussian(2)
    found = SCORES["similarity"]()(Features("x", made_nkc, real_nkc, given_nmc))

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    set_, place = 3, 2
    made = made_nkc[set_, place]
    given, before = list(given_nmc[set_]), list(made_nkc[set_, :place])
    for name, others in (("given", given), ("before", given + before), ("real", [real_nkc[set_, place]])):
        expected = np.mean([cosine(made, other) for other in others])
        assert found[f"similarity_to_{name}/x"].per_set_nk[set_, place] == pytest.approx(expected, abs=1e-5)


def test_what_a_metric_lacks_is_named():
    with pytest.raises(UserError, match="needs real_nkc"):
        SCORES["frechet"]()(Features("x", gaussian()))


def test_pixels_are_an_encoder_of_any_number_of_images():
    encoder = SET_ENCODERS["pixels"](None)
    images_bhwc = np.random.default_rng(0).integers(0, 256, (33, 16, 16, 3), np.uint8)
    features_bc = encoder(images_bhwc)
    assert features_bc.shape == (33, encoder.dim)
    np.testing.assert_array_equal(features_bc[32:], encoder(images_bhwc[32:]))
    assert encoder(images_bhwc[:0]).shape == (0, encoder.dim)
    require_unseen(encoder, {"some network"})


def test_nobody_is_judged_by_what_it_was_conditioned_on():
    encoder = SET_ENCODERS["pixels"](None)
    encoder.fingerprint = "abc"
    with pytest.raises(UserError, match="pixels-8 has the weights that the judged model was conditioned on"):
        require_unseen(encoder, {"abc"})
