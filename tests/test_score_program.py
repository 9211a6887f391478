"""Scores of sets: anchors that mean what they say, kept features, one line for what cannot be compared, one page."""

import ast
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from run_fixtures import ROOT, run

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import png_bytes, write_png
from m2m_jax.data import generated
from m2m_jax.data.records import ImageSetRecord
from m2m_jax.scoring import anchors
from m2m_jax.scoring.encoders import SET_ENCODERS
from m2m_jax.scoring.features import features_of
from m2m_jax.scoring.figures import measure
from m2m_jax.scoring.judging import score_sets
from m2m_jax.scoring.metrics import Features, Measured, Score
from m2m_jax.scoring.options import Scoring
from m2m_jax.scoring.sets import open_sets

SETS, GIVEN, JUDGED, SIZE = 12, 2, 3, 16


def images_of(number: int, noise: float) -> np.ndarray:
    """A set: a pattern of its own, whose pictures differ a little, and by noise in those that are judged."""
    rng, own = np.random.default_rng([number, 1]), np.random.default_rng(number)
    pattern = own.integers(0, 256, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
    images = pattern[None] + rng.normal(0, 12, (GIVEN + JUDGED, 1, 1, 3))
    images[GIVEN:] += np.random.default_rng([number, 2]).normal(0, noise, (JUDGED, SIZE, SIZE, 3))
    return np.clip(images, 0, 255).astype(np.uint8)


def write_sets(root: pathlib.Path, noise: float, num_sets: int = SETS) -> pathlib.Path:
    for number in range(num_sets):
        (root / f"set{number:02d}").mkdir(parents=True)
        for i, image in enumerate(images_of(number, noise)):
            write_png(root / f"set{number:02d}" / f"{i:03d}.png", image)
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("real") / "real", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("made") / "made", 80)


@pytest.fixture
def copy(made, tmp_path):
    """Sets to spoil."""
    return write_sets(tmp_path / "copy", 80)


def options(made, real, output, **changes) -> Scoring:
    fields = {
        "generated": str(made),
        "real": str(real),
        "given": GIVEN,
        "output": output,
        "draws": 50,
        "scores": ("similarity", "frechet"),
    }
    return Scoring(**(fields | changes))


@pytest.fixture(scope="module")
def scored(made, real, tmp_path_factory):
    """The folder of scores, and the lines that were told."""
    output, lines = tmp_path_factory.mktemp("scores") / "scores", []
    score_sets(options(made, real, output, training=str(real), scores=()), report=lines.append)
    return output, lines


def figures(folder: pathlib.Path) -> dict:
    return {figure["name"]: figure for figure in json.loads((folder / "scores.json").read_text())["figures"]}


def test_arms_stand_where_they_must(scored):
    found = json.loads((scored[0] / "scores.json").read_text())
    assert found["num_sets"] == SETS and found["same_sets"] and found["num_images"] == JUDGED
    figure = figures(scored[0])["similarity_to_given/pixels-8"]
    means = {arm: values["mean"] for arm, values in figure["arms"].items()}
    assert means["shuffled"] < means["ours"] < means["real"]
    expected = (means["shuffled"] - means["ours"]) / (means["shuffled"] - means["real"])
    assert figure["closeness"] == pytest.approx(expected) == found["headline"]["closeness"]
    assert 0 < expected < 1 and figure["closeness_half_width"] > 0
    assert all(len(arm["by_position"]) == JUDGED == len(arm["half_widths"]) for arm in figure["arms"].values())
    assert figures(scored[0])["similarity_to_real/pixels-8"]["arms"]["real"]["mean"] == pytest.approx(1)


def test_a_copier_is_nearer_to_what_was_given_than_real_images_and_is_shown(scored):
    arms = figures(scored[0])["similarity_to_given/pixels-8"]["arms"]
    assert arms["copy"]["mean"] > arms["real"]["mean"]
    assert "copy" in (scored[0] / "index.html").read_text()


def test_what_cannot_bear_so_few_sets_is_refused_or_marked(made, real, scored, tmp_path):
    figure = figures(scored[0])["frechet/pixels-8"]
    assert figure["minimum_sets"] > figure["num_sets"] and not figure["arms"]
    result = run(
        *("score", f"--generated={made}", f"--real={real}", f"--given={GIVEN}", f"--output={tmp_path / 'scores'}"),
        *(f"--features={scored[0] / 'features'}", "--allow_few", "--scores=frechet"),
    )
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if line.startswith("frechet/pixels-8 "))
    assert "†" in line and f" {SETS // 2} " in line
    assert "encoding" not in result.out  # the features were there


def test_equal_draws_make_equal_numbers(made, real, scored, tmp_path):
    again, lines = tmp_path / "scores", []
    kept = {"features": scored[0] / "features", "training": str(real), "scores": ()}
    score_sets(options(made, real, again, **kept), report=lines.append)
    assert not lines and len(scored[1]) == 3
    assert (again / "scores.json").read_text() == (scored[0] / "scores.json").read_text()


def test_generated_records_score_as_folders_do(made, real, scored, tmp_path):
    names = [f"set{number:02d}" for number in range(SETS)]
    manifest = generated.Manifest(
        *(generated.VERSION, {"seed": 5}, GIVEN, JUDGED, SIZE, "records", 5, names, ["folder"] * SETS, {}, {})
    )
    generated.start(tmp_path / "records", manifest)
    for shard, numbers in enumerate(manifest.shards):
        sets = [ImageSetRecord(names[i], "folder", "", images=tuple(map(png_bytes, images_of(i, 80)))) for i in numbers]
        generated.write_shard(tmp_path / "records", manifest, shard, sets)
    score_sets(options(tmp_path / "records", real, tmp_path / "scores"), report=lambda line: None)
    for name, figure in figures(tmp_path / "scores").items():
        assert figure == figures(scored[0])[name]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["made_by"] == {"seed": 5}


def test_sets_of_other_names_are_compared_as_such(real, tmp_path):
    other = write_sets(tmp_path / "other", 0, num_sets=5)
    for number, folder in enumerate(sorted(other.iterdir())):
        folder.rename(folder.with_name(f"mine{(number + 2) % 5}"))
    scores = score_sets(options(other, real, tmp_path / "scores"), report=lambda line: None)
    assert not scores.paired and len(scores.made) == len(scores.real) == 5
    assert not any("_to_real" in figure.name for figure in scores.figures)
    (figure,) = [one for one in scores.figures if one.name == "similarity_to_given/pixels-8"]
    assert figure.arms["real"].mean > 0.9  # to what was given of its own set, and not of the one in its place


def test_a_page_is_one_file_for_light_and_dark_without_a_script(scored):
    page = (scored[0] / "index.html").read_text()
    assert "prefers-color-scheme: dark" in page and "<script" not in page and "http" not in page
    assert page.count("<svg") >= 4 and page.count("data:image/png") > 9 * 2 * (GIVEN + JUDGED)
    for title in ("Best", "Median", "Worst", "likest given", "likest training"):
        assert title in page


def test_requirements_decide_the_exit_code(made, real, scored, tmp_path):
    flags = [f"--generated={made}", f"--real={real}", f"--given={GIVEN}", f"--output={tmp_path}"]
    flags += [f"--features={scored[0] / 'features'}", "--scores=similarity"]
    met = run("score", *flags, "--require=similarity_to_given/pixels-8>0.1,closeness<1")
    assert met.code == 0, met.err
    unmet = run("score", *flags, "--require=closeness>0.999")
    assert unmet.code == 3 and "closeness is 0." in unmet.err
    assert run("score", *flags, "--require=closeness").code == 2
    unknown = run("score", *flags, "--require=fid<3")
    assert unknown.code == 2 and "similarity_to_given/pixels-8" in unknown.err


def _remove_one(folder):
    (folder / "set03" / "002.png").unlink()


def _remove_the_last(folder):
    (folder / "set03" / "004.png").unlink()


def _resize_one(folder):
    Image.new("RGB", (20, 16)).save(folder / "set04" / "001.png")


def _damage_one(folder):
    path = folder / "set05" / "003.png"
    path.write_bytes(path.read_bytes()[:60])


def _rename_one(folder):
    (folder / "set06").rename(folder / "another")


def _empty_one(folder):
    for path in (folder / "set07").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_remove_the_last, "set set00 has 5 images and set set03 has 4: --num_images"),
        (_resize_one, "001.png: is 20 x 16 px, and 16 x 16 are expected: --image_size=16"),
        (_damage_one, "003.png: .*damaged"),
        (_rename_one, "1 of 12 sets of .* are not among the usable ones"),
        (_empty_one, "set07: no images"),
    ],
)
def test_bad_folders_are_named_in_one_line(spoil, words, copy, real, tmp_path):
    spoil(copy)
    with pytest.raises(UserError, match=words) as found:
        score_sets(options(copy, real, tmp_path / "scores"), report=lambda line: None)
    assert "\n" not in str(found.value)


def test_a_number_that_is_left_out_is_missed(copy, real, tmp_path):
    _remove_one(copy)
    with pytest.raises(UserError, match="set03: image 002 is missing, between 001 and 003"):
        score_sets(options(copy, real, tmp_path / "scores", num_images=2), report=lambda line: None)


def test_too_small_sets_are_left_out_where_a_number_was_asked_for(copy, real, tmp_path, capsys):
    _remove_the_last(copy)
    sets = open_sets(str(copy), GIVEN + JUDGED)
    assert len(sets) == SETS - 1 and "1 sets with fewer than 5 images are left out" in capsys.readouterr().err


def test_two_sizes_and_nothing_to_judge_are_refused(made, real, tmp_path):
    large = tmp_path / "large"
    for folder in pathlib.Path(real).iterdir():
        (large / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            Image.open(path).resize((32, 32)).save(large / folder.name / path.name)
    with pytest.raises(UserError, match="--image_size=16 scales all"):
        score_sets(options(made, large, tmp_path / "scores"), report=lambda line: None)
    with pytest.raises(UserError, match="leave none to judge"):
        score_sets(options(made, real, tmp_path / "scores", given=5), report=lambda line: None)
    with pytest.raises(UserError, match="unknown image encoder 'pixel'; did you mean pixels"):
        score_sets(options(made, real, tmp_path / "scores", encoders=("pixel",)), report=lambda line: None)


def test_features_of_another_encoder_and_damaged_ones_are_refused(made, tmp_path):
    sets, encoder = open_sets(str(made)), SET_ENCODERS["pixels"](None)
    features_of(sets, encoder, tmp_path)
    (path,) = tmp_path.iterdir()
    other = SET_ENCODERS["pixels"](None)
    other.name = "pixels-9"
    path.rename(path.with_name(path.name.replace("pixels-8", "pixels-9")))
    (path,) = tmp_path.iterdir()
    with pytest.raises(UserError, match="holds features of another encoder or of other images"):
        features_of(sets, other, tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        features_of(sets, other, tmp_path)


def test_shuffled_sets_hold_every_image_once_and_none_of_their_own():
    for num_sets, num_positions in ((7, 3), (4, 10), (2, 2)):
        from_nk = anchors.shuffle(num_sets, num_positions, seed=0)
        assert (np.sort(from_nk, axis=0) == np.arange(num_sets)[:, None]).all()
        assert (from_nk != np.arange(num_sets)[:, None]).all()
    assert (np.diff(np.sort(anchors.shuffle(9, 5, seed=1), axis=1)) > 0).all()  # no two of one set


class _MeanDifference(Score):
    """A figure of distributions whose values are known."""

    needs = ("made_nkc", "real_nkc")
    better = "lower"

    def measure(self, features):
        made_nk, real_nk = (features.get(name)[..., 0] for name in self.needs)
        return {"difference": Measured(lambda s: abs(made_nk[s].mean(0) - real_nk[s].mean(0)), len(made_nk))}


def test_distances_are_of_disjoint_halves_and_shuffling_changes_none():
    rng = np.random.default_rng(0)
    real_nkc = rng.normal(size=(100, 2, 1))
    features = Features("mine", real_nkc + 3, real_nkc, real_nkc[:, :1])
    figure = {one.name: one for one in measure(_MeanDifference(), features)}
    whole, halves = figure["difference/mine, all sets"], figure["difference/mine"]
    assert whole.num_sets == 100 and halves.num_sets == 50
    np.testing.assert_allclose(whole.arms["ours"].values_k, 3)
    assert 0 < halves.arms["real"].mean < 0.5  # what is left between two halves of one thing
    np.testing.assert_allclose(halves.arms["shuffled"].values_k, halves.arms["real"].values_k)
    assert halves.arms["ours"].mean == pytest.approx(3, abs=0.5) and halves.closeness is None


def test_intervals_of_means_hold_what_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        of_sets_nk = rng.normal(1.0, 2.0, (80, 3))
        features = Features("mine", of_sets_nk[..., None], of_sets_nk[..., None])
        (figure,) = measure(_Value(), features)
        arm = figure.arms["ours"]
        held += abs(arm.values_k[0] - 1.0) <= arm.half_widths_k[0]
    assert 34 <= held <= 40


class _Value(Score):
    needs = ("made_nkc",)
    better = "higher"

    def measure(self, features):
        return {"value": Measured.mean(features.get("made_nkc")[..., 0])}


class _Share(_MeanDifference):
    """A figure of every image that compares with the real ones of all sets."""

    def measure(self, features):
        made_nk, real_nk = (features.get(name)[..., 0] for name in self.needs)
        return {"share": Measured.mean([[x in real_nk[:, k] for k, x in enumerate(of_set)] for of_set in made_nk])}


def test_what_compares_with_all_real_images_does_not_compare_them_with_themselves():
    real_nkc = np.random.default_rng(0).normal(size=(20, 2, 1))
    figures = measure(_Share(), Features("mine", real_nkc, real_nkc))
    arms = {one.name: one.arms for one in figures}
    assert arms["share/mine, all sets"]["ours"].mean == 1 and arms["share/mine"]["real"].mean == 0


def test_scores_know_nothing_of_models_that_generate():
    for path in [ROOT / "m2m_jax" / "score.py", *(ROOT / "m2m_jax" / "scoring").glob("*.py")]:
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        for package in ("sampling", "tasks", "training", "checkpoints", "diffusion"):
            assert not any((name or "").startswith(f"m2m_jax.{package}") for name in names), path


def test_every_score_is_measured_on_every_arm_or_says_why(scored):
    found = json.loads((scored[0] / "scores.json").read_text())
    names = {name.partition("/")[0] for name in found["not_measured"]}
    assert names == {"text_similarity", "inception_score"}
