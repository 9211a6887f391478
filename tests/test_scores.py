"""Metrics of generated sets."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from safetensors.numpy import save_file
from test_perceptual import random_params

from m2m_jax.core.errors import UserError
from m2m_jax.models import stlpips
from m2m_jax.models.autoencoder import pixels_to_float
from m2m_jax.scoring.colours import lab
from m2m_jax.scoring.copies import nearest_given
from m2m_jax.scoring.distributions import directions
from m2m_jax.scoring.encoders import SET_ENCODERS, require_unseen
from m2m_jax.scoring.metrics import SCORES, Features, Measured


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


# --- Distances of distributions --------------------------------------------------------------------------------------


def test_kid_is_the_unbiased_estimate_and_a_bootstrap_keeps_it_so():
    made_nkc, real_nkc = gaussian(0, 30), gaussian(1, 30) + 0.5
    (measured,) = SCORES["kid"]()(Features("x", made_nkc, real_nkc)).values()

    def kernel(a, b):
        return (a @ b / 8 + 1) ** 3

    x, y = made_nkc[:, 0].astype(float), real_nkc[:, 0].astype(float)
    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    expected = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert measured.values_k[0] == pytest.approx(expected, rel=1e-6)
    # Every image twice: the same distributions. Pairs of an image with itself would lower it.
    twice = measured.at(np.tile(np.arange(30), 2))
    np.testing.assert_allclose(twice, measured.values_k, rtol=1e-6)


def test_kid_of_many_sets_goes_by_blocks(monkeypatch):
    features = Features("x", gaussian(0, 400, 1), gaussian(1, 400, 1) + 0.3)
    (whole,) = SCORES["kid"]()(features).values()
    value = whole.values_k[0]
    monkeypatch.setattr(SCORES["kid"], "BLOCK", 50)
    assert whole.values_k[0] == pytest.approx(value, rel=0.3)


def test_mind_is_the_sliced_distance_of_sorted_projections():
    made_nkc, real_nkc = gaussian(0), gaussian(1) + 0.5
    (measured,) = SCORES["mind"]()(Features("x", made_nkc, real_nkc)).values()
    total = 0.0
    for direction_c in directions(8):
        a, b = sorted(made_nkc[:, 1] @ direction_c), sorted(real_nkc[:, 1] @ direction_c)
        total += np.mean((np.array(a) - np.array(b)) ** 2) / 1000
    assert measured.values_k[1] == pytest.approx(3 * 8 * total, rel=1e-4)


def test_inception_score_is_exp_of_the_mean_divergence():
    logits_nkl = 3 * gaussian(0, c=5)
    (measured,) = SCORES["inception_score"]()(Features("x", logits_nkl=logits_nkl)).values()
    p = scipy.special.softmax(logits_nkl[:, 2].astype(float), axis=1)
    assert measured.values_k[2] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)


def test_precision_recall_density_coverage_by_counting():
    made_nkc, real_nkc = 1.5 * gaussian(0, 40, 1, 3), 1.3 * gaussian(1, 40, 1, 3) + 1.2
    found = SCORES["prdc"]()(Features("x", made_nkc, real_nkc))
    made, real = made_nkc[:, 0], real_nkc[:, 0]

    def radius(x, i):
        return sorted(np.linalg.norm(x - x[i], axis=1))[5]

    def inside(a, others):
        return [np.linalg.norm(a - b) < radius(others, j) for j, b in enumerate(others)]

    expected = {
        "precision": np.mean([any(inside(a, real)) for a in made]),
        "recall": np.mean([any(inside(b, made)) for b in real]),
        "density": np.mean([sum(inside(a, real)) / 5 for a in made]),
        "coverage": np.mean([min(np.linalg.norm(b - a) for a in made) < radius(real, i) for i, b in enumerate(real)]),
    }
    for name, value in expected.items():
        assert value > 0
        assert found[f"{name}/x"].values_k[0] == pytest.approx(value, abs=1e-9)


# --- Single images ---------------------------------------------------------------------------------------------------


def test_the_nearest_and_the_diverse_are_found():
    made_nkc, given_nmc, training_tc = gaussian(0), gaussian(1, k=2), gaussian(2)[:, 0]
    made_nkc[5, 1], made_nkc[6, 2] = 3 * given_nmc[5, 0], training_tc[7]
    features = Features("x", made_nkc, given_nmc=given_nmc, training_tc=training_tc)
    found = SCORES["nearest"]()(features)
    assert found["nearest_given/x"].per_set_nk[5, 1] == pytest.approx(1, abs=1e-5)
    assert found["nearest_training/x"].per_set_nk[6, 2] == pytest.approx(1, abs=1e-5)
    assert found["nearest_given/x"].per_set_nk[6, 2] < 0.99
    collapsed = Features("x", np.repeat(made_nkc[:, :1], 3, axis=1))
    (measured,) = SCORES["diversity"]()(collapsed).values()
    assert measured.values_k == pytest.approx(0, abs=1e-5)
    assert SCORES["diversity"]()(features)["diversity/x"].values_k.min() > 0.5


def test_text_is_compared_with_every_image():
    made_nkc = gaussian()
    (measured,) = SCORES["text_similarity"]()(Features("x", made_nkc, text_nc=made_nkc[:, 1])).values()
    assert measured.values_k[1] == pytest.approx(1, abs=1e-5)
    assert measured.values_k[0] < 0.3


def test_slope_is_that_of_the_line():
    measured = Measured.mean(np.tile(np.array([1.0, 3.0, 5.0]), (4, 1)))
    assert measured.slope() == pytest.approx(2)
    assert Measured.mean(np.ones((4, 1))).slope() == 0


# --- Pixels: real pictures, and what is done to them ------------------------------------------------------------------


def pictures(n=16, k=5, size=32, seed=0):
    """Sets [n, k, size, size, 3]: a set has a subject (a shape at a place) and a palette of its own."""
    rng = np.random.default_rng(seed)
    made = np.zeros((n, k, size, size, 3), np.uint8)
    y, x = np.mgrid[:size, :size] / size
    for i in range(n):
        ground, ink = rng.integers((100, 40, 0), (256, 160, 100), (2, 3))  # warm: another hue is another distribution
        phase = rng.uniform(0, 6, 4)
        for j in range(k):
            wave = np.sin(9 * x * np.cos(phase[0]) + 9 * y * np.sin(phase[0]) + phase[1] + 1.5 * j)
            blob = np.exp(
                -((x - 0.5 - 0.3 * np.cos(phase[2] + j)) ** 2 + (y - 0.5 - 0.3 * np.sin(phase[3] + j)) ** 2) / 0.03
            )
            made[i, j] = (ground + (ink - ground) * np.clip(0.5 * wave + 2 * blob, 0, 1)[..., None]).round()
    return made


def test_copies_are_found_mirrored_and_in_other_colours():
    sets = pictures()
    given, made = sets[:, :2], sets[:, 2:].copy()
    made[3, 0] = given[3, 1][:, ::-1]  # mirrored
    made[4, 2] = (given[4, 0] * np.array([0.9, 0.9, 0.9])).astype(np.uint8)
    training = sets[:, 4][8:]
    found = SCORES["copy"]()(Features(made_nkhwc=made, given_nmhwc=given, training_thwc=training))
    of_given = found["likeness_to_given"].per_set_nk
    assert of_given[3, 0] > 0.99 and of_given[4, 2] > 0.99
    assert found["copied_training"].values_k[2] >= 0.5  # the last images of half the sets are in the training set
    values_nk, which_nk = nearest_given(made, given)
    assert which_nk[3, 0] == 1 and which_nk[4, 2] == 0 and values_nk[3, 0] == of_given[3, 0]


def test_palettes_know_hue_and_colours_drift():
    sets = pictures()
    given = sets[:, :2]
    arms = {"real": sets[:, 2:], "hue": np.roll(sets[:, 2:], 1, axis=-1), "other": np.roll(sets[:, 2:], 1, axis=0)}
    values = {
        name: SCORES["palette"]()(Features(made_nkhwc=made, given_nmhwc=given))["palette_distance"].values_k.mean()
        for name, made in arms.items()
    }
    assert values["real"] < values["hue"] and values["real"] < values["other"]
    fading = sets.astype(float) * (1 - 0.15 * np.arange(5)[:, None, None, None])
    drift = SCORES["drift"]()(Features(made_nkhwc=fading.astype(np.uint8)))
    assert drift["lightness"].slope() < -5 and drift["contrast"].slope() < 0
    white, red = lab(np.array([[255, 255, 255], [255, 0, 0]], np.uint8))
    np.testing.assert_allclose(white, [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(red, [53.24, 80.09, 67.20], atol=0.02)


def blurred(images, steps):
    x = images.astype(float)
    for _ in range(steps):
        x = (x + np.roll(x, 1, -2) + np.roll(x, -1, -2) + np.roll(x, 1, -3) + np.roll(x, -1, -3)) / 5
    return x.astype(np.uint8)


def noisy(images, sigma):
    rng = np.random.default_rng(0)
    return np.clip(images + sigma * rng.standard_normal(images.shape), 0, 255).astype(np.uint8)


def hued(images, share):
    return ((1 - share) * images + share * np.roll(images, 1, -1)).astype(np.uint8)


def doubled(images, share):
    """A share of the sets replaced by the first one: images dropped, one doubled."""
    images = images.copy()
    images[: int(share * len(images))] = images[:1]
    return images


@pytest.fixture(scope="module")
def probe():
    """(made images) -> {figure: mean over places} against real images of other sets, by a few mixtures of pixels."""
    real, encoder = pictures(200, 1, 16, seed=1), SET_ENCODERS["pixels"](None)
    mixtures = 10 * directions(encoder.dim, 12).T  # so large that a cubic kernel sees more than means

    def features(images_nkhwc):
        return (encoder(images_nkhwc.reshape(-1, 16, 16, 3)) @ mixtures).reshape(*images_nkhwc.shape[:2], -1)

    real_nkc = features(real)

    def figures(made):
        judged = Features(encoder.name, features(made), real_nkc)
        return {
            name.partition("/")[0]: measured.values_k.mean()
            for score in ("frechet", "kid", "mind", "prdc")
            for name, measured in SCORES[score]()(judged).items()
        }

    return figures


def test_of_real_sets_distances_are_near_zero(probe):
    clean = pictures(200, 1, 16, seed=2)
    real, far = probe(clean), probe(hued(clean, 0.8))
    for name in ("frechet", "kid", "mind"):
        assert abs(real[name]) < 0.02 * far[name], name
    assert real["coverage"] > 0.85 and real["precision"] > 0.85


@pytest.mark.parametrize(
    "worse, amounts",
    [(blurred, (0, 8, 40)), (noisy, (0, 30, 90)), (hued, (0, 0.4, 0.8)), (doubled, (0, 0.3, 0.7))],
)
def test_distances_grow_with_what_is_done_to_images(probe, worse, amounts):
    clean = pictures(200, 1, 16, seed=2)
    found = [probe(worse(clean, amount)) for amount in amounts]
    for name in ("frechet", "kid", "mind"):
        first, second, third = (one[name] for one in found)
        assert first < third, name
        assert first < second < third or name == "kid", name  # unbiased, and so noisy: a little worse may look better
    if worse in (noisy, doubled):
        assert found[2]["coverage"] < found[0]["coverage"]


def test_a_copier_and_a_shuffler_lose():
    sets, encoder = pictures(60, 5, 16), SET_ENCODERS["pixels"](None)
    given, real = sets[:, :2], sets[:, 2:]
    arms = {"real": real, "copier": np.repeat(given[:, :1], 3, axis=1), "shuffler": np.roll(real, 7, axis=0)}

    def features(images):
        return encoder(images.reshape(-1, *images.shape[2:])).reshape(*images.shape[:2], -1)

    found = {}
    for name, made in arms.items():
        judged = Features("x", features(made), features(real), features(given), made_nkhwc=made, given_nmhwc=given)
        scores = [SCORES[score]()(judged) for score in ("similarity", "diversity", "copy", "palette")]
        found[name] = {key: measured.values_k.mean() for score in scores for key, measured in score.items()}
    assert found["shuffler"]["similarity_to_given/x"] < found["real"]["similarity_to_given/x"]
    assert found["shuffler"]["palette_distance"] > found["real"]["palette_distance"]
    assert found["copier"]["copied_given"] == 1 > found["real"]["copied_given"]
    assert found["copier"]["diversity/x"] < 0.1 * found["real"]["diversity/x"]


def test_st_lpips_compares_all_images_of_a_set_in_one_pass(tmp_path):
    params = random_params(network="alex")
    save_file(params, tmp_path / stlpips.WEIGHTS)
    sets = pictures(2, 3, 16)
    given, real = sets[:, :2], sets[:, 2:]
    made = real.copy()
    made[1, 0] = given[1, 0]
    found = SCORES["st_lpips"](tmp_path)(Features(made_nkhwc=made, given_nmhwc=given, real_nkhwc=real))
    to_real, to_given = (found[f"st_lpips_alex_to_{name}"].per_set_nk for name in ("real", "given"))
    assert to_real[0] == pytest.approx(0, abs=1e-5) and to_real[1, 0] > 0.01
    x = pixels_to_float(sets[1])
    expected = stlpips.distance(params, x[:1], x[1:2])[0]
    assert to_given[1, 0] == pytest.approx(float(expected) / 2, rel=1e-3)


def test_st_lpips_asks_for_its_weights():
    with pytest.raises(UserError, match="prepare_stlpips"):
        SCORES["st_lpips"]()
