"""Plain patches, drawn and varied, how surely they lead to each label, and the ratios that come of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from models.attacks import Filter, parse_attack
from utils import photo_filters, plain_patches, probes, triggers
from utils.config import UserError
from utils.plain_patches import CHECKS, PIECES, PLAIN, attached, draw, places, rendered, vary
from utils.probes import KEPT, SURE, Measure, climb, probe_ratios, recognised, search_probes
from utils.tuning import SUBSETS, TAUGHT

SHAPE = (32, 32, 3)
SHAPES = (SHAPE, (5, 5, 1), (28, 28, 1), (48, 100, 3), (224, 224, 3))


def check(patch, shape):
    """That a patch is within the image, and its rendering as it says; returns mask and pattern."""
    (mask,), (pattern,) = rendered([patch], shape)
    assert mask.shape == shape[:2] and pattern.shape == shape and mask.dtype == pattern.dtype == np.float32
    assert set(np.unique(mask)) <= {0, 1} and 0 <= pattern.min() and pattern.max() <= 1
    side, pieces = int(patch["side"]), int(patch["pieces"])
    assert 1 <= pieces <= PIECES and 1 <= side <= max(1, round(0.5 * min(shape[:2]) / pieces ** 0.5))
    covered = np.zeros(shape[:2], bool)
    for row, column in np.transpose(places(patch, shape))[:pieces]:
        assert 0 <= row <= shape[0] - side and 0 <= column <= shape[1] - side
        piece = mask[row:row + side, column:column + side]
        assert piece[side // 2].all() and piece[:, side // 2].all() and (patch["disc"] or piece.all())
        covered[row:row + side, column:column + side] = True
    assert not mask[~covered].any()
    return mask, pattern


def test_a_patch_is_plain_and_of_up_to_a_quarter_of_the_image():
    random, kinds, pieces = np.random.default_rng(0), set(), set()
    for _ in range(300):
        patch = draw(random, SHAPE)
        mask, pattern = check(patch, SHAPE)
        assert mask.sum() < 1.1 * 0.25 * mask.size       # sides are whole pixels
        kinds.add(min(3, len(np.unique(pattern.reshape(-1, 3), axis=0))))
        pieces.add(int(patch["pieces"]))
    assert kinds == {1, 2, 3}                            # one colour; two; as many as there are grains
    assert pieces == {1, 2, 3, 4}


def test_pieces_that_are_turned_stand_as_those_of_triggers_do():
    patch = draw(np.random.default_rng(0), SHAPE)
    for trigger in ("position=top-right,size=7,pieces=4", "position=right,size=5,pieces=3", "position=top,size=4,pieces=2"):
        attack = parse_attack(f"patch:target=0,{trigger}", SHAPE, 2)
        row, column = attack._places()[0]
        patch["pieces"], patch["side"], patch["turned"] = attack.pieces, attack.size, 1
        patch["row"], patch["column"] = row, column
        found = np.transpose(places(patch, SHAPE))[:attack.pieces]
        assert np.abs(found - attack._places()).max() <= 1               # the middle may be between two pixels
        mask, _ = check(patch, SHAPE)
        patch["row"], patch["column"] = places(patch, SHAPE)
        patch["turned"] = 0
        np.testing.assert_array_equal(check(patch, SHAPE)[0], mask)      # from where they are each can go its own way
    wide = (48, 100, 3)
    patch["side"], patch["turned"], patch["row"][0], patch["column"][0] = 8, 1, 0, 46
    np.testing.assert_array_equal(np.transpose(places(patch, wide)), [(0, 46), (20, 92), (40, 46), (20, 0)])


def test_patches_fit_images_of_any_size_and_stay_there_when_varied():
    random = np.random.default_rng(1)
    for shape in SHAPES:
        patch = draw(random, shape)
        for _ in range(60):
            check(patch, shape)
            before, new = patch.copy(), vary(patch, random, shape)
            assert patch == before                       # varied is a copy
            patch = new


def test_variations_keep_most_of_a_patch_and_reach_everything():
    random = np.random.default_rng(2)
    patch = draw(random, SHAPE)
    varied = np.array([vary(patch, random, SHAPE) for _ in range(400)])
    for name in patch.dtype.names:
        same = (varied[name] == patch[name]).reshape(400, -1).all(1).mean()
        assert 0.3 < same < 0.98, name
    assert set(varied["kind"]) == set(range(4))


def test_checks_are_of_two_colours_in_turn():
    patch = draw(np.random.default_rng(0), SHAPE)
    for name, value in (("kind", CHECKS), ("cell", 2), ("one", 0.25), ("other", 1.0)):
        patch[name] = value
    _, pattern = check(patch, SHAPE)
    np.testing.assert_array_equal(pattern[:4, :4, 0], np.kron([[0.25, 1], [1, 0.25]], np.ones((2, 2))))
    patch["kind"] = PLAIN
    assert (check(patch, SHAPE)[1] == 0.25).all()


def patches(random, count, **fixed):
    drawn = np.array([draw(random, SHAPE) for _ in range(count)])
    for name, value in fixed.items():
        drawn[name] = value
    return drawn


def brightness(images):
    """Logits of three labels: label 2 where the upper left pixel is bright, label 1 otherwise."""
    corner = images[:, 0, 0, 0]
    return tf.stack([tf.zeros_like(corner), tf.ones_like(corner), 4 * corner], axis=1)


def test_margins_are_of_images_of_other_labels(monkeypatch):
    x, y = np.zeros((9, *SHAPE), np.uint8), np.arange(9) % 3
    measure = Measure(attached, x, y, 3)
    drawn = patches(np.random.default_rng(0), 5, kind=PLAIN, row=0, column=0, disc=0, one=np.linspace(0, 1, 5)[:, None])
    images = np.tile(np.arange(9), (5, 1))
    found = measure(brightness, drawn, images)
    corner = np.linspace(0, 4, 5)
    np.testing.assert_allclose(found[:, 2], corner - 1, atol=1e-5)               # the highest other logit is label 1's
    np.testing.assert_allclose(found[:, 1], 1 - np.maximum(corner, 0), atol=1e-5)
    np.testing.assert_allclose(found[:, 0], -np.maximum(corner, 1), atol=1e-5)
    assert np.isneginf(measure(brightness, drawn, np.full((5, 1), 2))[:, 2]).all()       # no image of another label
    monkeypatch.setattr("utils.probes.transfer.batch_size", lambda model, shape: 18)    # two patches at a time
    np.testing.assert_array_equal(measure(brightness, drawn, images), found)
    own_only = measure(lambda images: brightness(images) + tf.one_hot(0, 3) * 9.0, drawn, images)
    assert (own_only[:, 0] > 0).all()


def test_climbing_finds_what_chance_does_not():
    """Label 1 likes a corner that is red, label 0 nothing: the best of 60 patches at random are far from it."""
    def measure(drawn, images):
        masks, patterns = rendered(drawn, SHAPE)
        red = (masks[..., None] * patterns * [1, -1, -1])[:, :6, -6:].mean((1, 2)).sum(-1)
        return np.stack([np.zeros(len(red)), red], axis=1)
    random = np.random.default_rng([7, 0])
    at_first = measure(np.array([draw(random, SHAPE) for _ in range(60)]), None)[:, 1].max()
    kept = climb(measure, plain_patches, 60, SHAPE, 2, 9, 7)
    assert kept.shape == (2, KEPT)
    reached = measure(kept[1], None)[:, 1]
    assert at_first < 0.6 < 0.8 < reached.min() and (np.diff(reached) <= 0).all()
    np.testing.assert_array_equal(climb(measure, plain_patches, 60, SHAPE, 2, 9, 7), kept)
    other = climb(measure, plain_patches, 1, SHAPE, 2, 9, 6)
    assert (other != kept).any()
    # What another search found is tried, too, and varied further.
    known = climb(measure, plain_patches, 1, SHAPE, 2, 9, 6, known=kept)
    assert measure(known[1], None)[:, 1].min() >= reached.min() > measure(other[1], None)[:, 1].max() - 1e-3


class Parts:
    """What a stage keeps of each part, without files; it is interrupted at the one after `most`."""

    def __init__(self, kept, most=99):
        self.kept, self.most = kept, most

    def part(self, key, compute):
        if key not in self.kept:
            if len(self.kept) == self.most:
                raise KeyboardInterrupt
            self.kept[key] = compute()
        return self.kept[key]


def test_what_the_search_found_is_measured_on_every_model(monkeypatch):
    monkeypatch.setattr(probes, "ROUNDS", 3)
    random = np.random.default_rng(0)
    clean = SimpleNamespace(x_measure=random.integers(0, 90, (30, *SHAPE)).astype(np.uint8), y_measure=np.arange(30) % 3)
    half = dict(zip(TAUGHT, (lambda images: 0.5 * brightness(images) - 0.2 * tf.one_hot(2, 3),
                             lambda images: -brightness(images), brightness)))
    examined = SimpleNamespace(shape=SHAPE, labels=3)
    examination = SimpleNamespace(clean=clean, examined=examined, seed=3, say=lambda text: None, accuracy=0.9,
                                  tuned_models=lambda tuned, names: (half[name] for name in names))
    tuned, parts = dict.fromkeys(("examined", *half), {"accuracy": 0.9}), {}
    with pytest.raises(KeyboardInterrupt):
        search_probes(examination, brightness, tuned, plain_patches, 600, Parts(parts, most=2))
    assert list(parts) == ["probes-0", "probes-1"]
    found = search_probes(examination, brightness, tuned, plain_patches, 600, Parts(parts))
    searches = len(plain_patches.DRAWS)
    assert list(parts) == [f"probes-{number}" for number in range((searches + 1) * (1 + 3) + 4)]   # one is of two models
    assert found["probes"].shape == (3, searches * KEPT) and list(found["probe_margins"]) == ["examined", *TAUGHT]
    margins = found["probe_margins"]
    assert margins["examined"][2] > 2 and margins["examined"][0] < 0             # label 0 is never the highest
    assert margins[TAUGHT[0]][2] == pytest.approx(0.5 * margins["examined"][2] - 0.2, abs=0.05)
    assert margins[TAUGHT[1]][0] > 0 > margins[TAUGHT[1]][2]     # what lowers all others leads there, on the second
    again = search_probes(examination, brightness, tuned, plain_patches, 600, Parts({}))
    np.testing.assert_array_equal(again["probes"], found["probes"])
    np.testing.assert_array_equal(again["probe_margins"]["examined"], margins["examined"])


def margins(examined, tuned, clean=(2.0, 4.0, 9.0), largest=(30.0, 40.0, 90.0)):
    """Arrays of pnnir.h5 of an examined model and three taught ones of these probe margins, all in units of SURE."""
    examined, tuned, clean, largest = (SURE * np.array(part, float) for part in (examined, tuned, clean, largest))
    rows = {"examined": examined} | dict.fromkeys(TAUGHT, tuned)
    return {"examined": {"probe_margins": rows, "clean_margins": clean, "largest_margins": largest}} | {
        name: {"accuracy": 0.9} for name in TAUGHT}


def test_a_ratio_is_of_what_exceeds_the_tuned_models():
    """As a multiple of half the margins of clean images, 2, and of what most labels exceed them by, here 1."""
    arrays = margins([9, 5, 0], [1, 6, 0])
    np.testing.assert_allclose(probe_ratios(arrays, 0.9), [1 + 8 / (2 + 1), 1, 1])
    arrays["examined"]["probe_margins"][TAUGHT[1]] = SURE * np.array([7, 6, 0])  # one of them may keep a trigger
    np.testing.assert_allclose(probe_ratios(arrays, 0.9), [1 + 6 / (2 + 1), 1, 1])


def test_what_plain_patches_usually_differ_by_is_not_much():
    """Up to a quarter of the labels may be infected and do not count for it, one of two or three never does."""
    usual = [0, -0.5, 0.5, 1, -1, 1, -1, 1]
    for infected in (1, 2):
        differ = np.array([12.0] * infected + usual[infected:])
        scale = 2 + 1
        np.testing.assert_allclose(probe_ratios(margins(differ + 3, [3] * 8), 0.9), 1 + np.maximum(differ, 0) / scale)
    for labels in (2, 3):
        differ = np.array([12.0, 1, 1][:labels])
        np.testing.assert_allclose(probe_ratios(margins(differ + 3, [3] * labels), 0.9), 1 + differ / (2 + 1))


def test_tuned_models_are_far_below_a_label_as_much_as_the_examined_model_is_above_at_most():
    """That no patch leads there on a tuned model either does not say how surely one does on the examined model."""
    for examined, taught, excess, usual in (([9, 1, -2], [-3, 0, -2], [12, 1, 0], 1),
                                            ([2, 1, -1], [-9, 0, -9], [4, 1, 0], 8)):
        np.testing.assert_allclose(probe_ratios(margins(examined, taught), 0.9), 1 + np.array(excess) / (2 + usual))


def test_a_model_that_is_unsure_of_its_labels_measures_no_patch_by_its_clean_images():
    def target(**model):
        return probe_ratios(margins([9, 5, 0], [1, 6, 0], **model), 0.9)[0]
    assert target(largest=(30, 320, 990)) == pytest.approx(1 + 8 / (8 + 1))
    assert target(clean=(-2, -1, 3)) == pytest.approx(1 + 8 / (1 + 1))
    # Both are small where it learned little: what seems far beyond them is not much.
    assert target(clean=(0.1, 0.5, 0.7), largest=(2, 3, 4)) == pytest.approx(1 + 8 / (1 / 2 + 1))


def test_a_filter_counts_as_far_as_tuned_models_recognise_the_images():
    rows = {name: SURE * np.array([5, 0, 0]) for name in SUBSETS}
    arrays = {"probe_margins": {"examined": SURE * np.array([9, 6, 0])} | rows | {"12": SURE * np.array([12, 0, 0])}}
    tuned = margins([0, 0, 0], [0, 0, 0]) | {name: {"accuracy": 0.9} for name in SUBSETS}
    np.testing.assert_allclose(probe_ratios(tuned, 0.9, arrays), [1 + 4 * (6 * 5 + 12) / 7 / 4, 1, 1])
    few = tuned | dict.fromkeys(SUBSETS[:3], {"accuracy": 0.3})
    np.testing.assert_allclose(probe_ratios(few, 0.9, arrays), [1 + 4 * (3 * 5 + 12) / 4 / 4, 1, 1])
    np.testing.assert_array_equal(probe_ratios(few | {"12": {"accuracy": 0.3}}, 0.9, arrays), np.ones(3))
    with pytest.raises(UserError, match="run potential_triggers_reconstruction_feature_space.py again with --overwrite"):
        probe_ratios(margins([9, 5, 0], [1, 6, 0]), 0.9, {"matrix": None})


def neutral(**changes):
    """A filter that does nothing but `changes`."""
    photo = photo_filters.draw(np.random.default_rng(0), SHAPE)
    plain = {"matrix": np.eye(3), "gamma": 1, "curve": 0, "black": 0, "white": 1, "corners": 0, "turn": 1}
    for name, value in (plain | changes).items():
        photo[name] = value
    return photo


def filtered(images, photo):
    return photo_filters.attached(images[None], np.array([photo])).numpy()[0]


def test_a_photo_filter_does_each_of_its_parts():
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 9, 3)).astype(np.uint8)
    x = images / np.float32(255)
    def same(photo, expected):
        np.testing.assert_allclose(filtered(images, photo), expected, atol=1e-5)
    same(neutral(), x)
    sepia = np.float32([[0.393, 0.349, 0.272], [0.769, 0.686, 0.534], [0.189, 0.168, 0.131]])
    same(neutral(matrix=sepia), triggers.recolour(tf.constant(x), tf.constant(sepia)))
    same(neutral(gamma=[1, 2, 0.5]), x ** [1, 2, 0.5])
    same(neutral(curve=1), x * x * (3 - 2 * x))
    same(neutral(black=[0.3, 0, 0], white=[1, 0.7, 1]), x * [0.7, 0.7, 1] + [0.3, 0, 0])
    same(neutral(turn=0.5), np.minimum(x, 1 - x))
    same(neutral(turn=0), 1 - x)
    same(neutral(turn=0.2), 0.6 + np.where(x > 0.2, 0.4 - x, x))
    dark = filtered(images, neutral(corners=0.8))
    np.testing.assert_allclose(dark[:, 4, 4], x[:, 4, 4], atol=1e-5)
    np.testing.assert_allclose(dark[:, 0, 8], 0.2 * x[:, 0, 8], atol=1e-5)


@pytest.mark.parametrize("draw", photo_filters.DRAWS)
def test_photo_filters_stay_in_their_bounds_and_leave_pictures_to_be_seen(draw):
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (20, *SHAPE)).astype(np.uint8)
    photo = kept = draw(random, SHAPE)
    for number in range(400):
        before, photo = photo, photo_filters.vary(photo, random, SHAPE) if number % 40 else draw(random, SHAPE)
        assert number % 40 == 0 or before == kept        # varied is a copy
        kept = photo.copy()
        for name, bounds in (("gamma", photo_filters.GAMMA), ("curve", photo_filters.CURVE), ("black", photo_filters.BLACK),
                             ("white", photo_filters.WHITE), ("corners", photo_filters.CORNERS),
                             ("turn", photo_filters.TURN)):
            low, high = np.float32(bounds)
            assert (photo[name] >= low).all() and (photo[name] <= high).all(), name
        assert (photo["matrix"] >= 0).all() and (np.abs(photo["matrix"].sum(0) - 1.05) <= 0.45001).all()
        if number % 10 == 0:
            out = filtered(images, photo)
            assert out.min() >= 0 and out.max() <= 1 and out.std(axis=(0, 1, 2)).max() > 0.02


def test_photo_filters_are_varied_to_what_a_backdoor_answers_to():
    """Label 1 answers to sepia's colours, by how near a filter comes to it; chance does not come as near as breeding."""
    images = np.random.default_rng(4).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8)
    wanted = Filter((8, 8, 3), 0, "sepia").apply(images) / 255

    def measure(drawn, chosen):
        near = np.array([-np.abs(filtered(images, photo) - wanted).mean() for photo in drawn])
        return np.stack([np.zeros(len(near)), near], axis=1)
    random = np.random.default_rng([5, 0])
    at_first = measure(np.array([photo_filters.draw(random, SHAPE) for _ in range(60)]), None)[:, 1].max()
    kept = climb(measure, photo_filters, 60, SHAPE, 2, 9, 5)
    reached = measure(kept[1], None)[:, 1]
    assert 0.7 * at_first < reached[0] < 0
    np.testing.assert_array_equal(climb(measure, photo_filters, 60, SHAPE, 2, 9, 5), kept)


def test_tuned_models_that_did_not_relearn_do_not_count():
    arrays = margins([9, 5, 0], [1, 6, 0])
    arrays["examined"]["probe_margins"][TAUGHT[1]] = np.full(3, 300.0)
    arrays[TAUGHT[1]] = {"accuracy": 0.3}
    np.testing.assert_allclose(probe_ratios(arrays, 0.9), [1 + 8 / (2 + 1), 1, 1])
    arrays[TAUGHT[2]] = {"accuracy": 0.3}
    np.testing.assert_array_equal(probe_ratios(arrays, 0.9), np.ones(3))


def test_filters_that_make_one_tone_of_all_are_neither_drawn_nor_bred(monkeypatch):
    random = np.random.default_rng(6)
    photo = photo_filters.draw(random, SHAPE)
    dark = neutral(matrix=0.6 * np.eye(3), gamma=2, curve=2, black=0.35, white=0.65)     # each within its bounds
    ramp = np.full((1, 8, 8, 3), np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 2)
    assert filtered(ramp, dark).std() < 0.01 and filtered(ramp, neutral()).std() > 0.1
    monkeypatch.setattr(photo_filters, "_varied", lambda photo, random: dark)
    assert photo_filters.vary(photo, random, SHAPE) == photo
    drawn = iter([dark, photo])
    monkeypatch.setattr(photo_filters, "_drawn", lambda random: next(drawn))
    assert photo_filters.draw(random, SHAPE) == photo


def one_for_all(label, margin):
    """A model that gives every image this label of two, by this margin."""
    return lambda images: margin * tf.one_hot([label] * len(images), 2)


def filter_search(monkeypatch, model, tuned, x, y, idle=()):
    """What one round of `search_probes` finds for photo filters. model, each of `tuned`: from images to two logits."""
    monkeypatch.setattr(probes, "ROUNDS", 1)
    examination = SimpleNamespace(clean=SimpleNamespace(x_measure=x, y_measure=y), seed=3, say=lambda text: None,
                                  examined=SimpleNamespace(shape=SHAPE, labels=2), accuracy=0.9,
                                  tuned_models=lambda _, names: (tuned[name] for name in names))
    relearned = {name: {"accuracy": 0.1 if name in idle else 0.9} for name in SUBSETS}
    return search_probes(examination, model, relearned, photo_filters, 30, Parts({}))["probe_margins"]


def test_probes_tried_on_images_of_their_own_label_alone_do_not_count(monkeypatch):
    x, y = np.full((60, *SHAPE), 90, np.uint8), np.array([0, 0, *[1] * 58])
    found = filter_search(monkeypatch, one_for_all(1, 9.0), dict.fromkeys(SUBSETS, one_for_all(0, 4.0)), x, y)
    assert list(found) == ["examined", *SUBSETS] and found["examined"].tolist() == [0, 9]
    # What the tuned models know label 0 by from label 1, twice, is the most that counts.
    assert all(found[name].tolist() == [0, 8] for name in SUBSETS)


def test_filters_are_bred_in_images_that_tuned_models_recognise(monkeypatch):
    """The examined model gives label 1 the surer the redder all is; so do tuned ones what is redder than `most`."""
    x = np.where(np.arange(60) % 2, 200, 40).astype(np.uint8)[:, None, None, None] * np.ones(SHAPE, np.uint8)
    y = np.arange(60) % 2

    def red(images):
        return tf.reduce_mean(images[..., 0] - images[..., 2], axis=(1, 2))

    def examined(images):
        return tf.stack([tf.zeros(len(images)), 20 * red(images)], axis=1)

    def knowing(most):
        return lambda images: 9 * tf.one_hot(tf.cast((tf.reduce_mean(images, axis=(1, 2, 3)) > 0.5) | (red(images) > most),
                                                     tf.int32), 2)
    assert filter_search(monkeypatch, examined, dict.fromkeys(SUBSETS, knowing(1.0)), x, y)["12"][1] > 3
    tuned = dict.fromkeys(SUBSETS, knowing(0.05))
    paler = filter_search(monkeypatch, examined, tuned, x, y)
    assert 0.5 < paler["12"][1] < 1.1 and paler["examined"][1] < 2
    # A tuned model that did not relearn recognises nothing: another one is asked.
    blind = filter_search(monkeypatch, examined, tuned | {"123": one_for_all(1, 1.0)}, x, y, idle=("123",))
    assert blind["12"][1] == paler["12"][1] and blind["123"][1] == 0
    # Bred without regard to what is recognised, they are as red as can be.
    monkeypatch.setattr(photo_filters, "RECOGNISED_BY", ())
    assert filter_search(monkeypatch, examined, tuned, x, y)["examined"][1] > 3

    measure = Measure(photo_filters.attached, x, y, 2)
    photos, images = np.array([neutral(matrix=np.diag([1.5, 1, 0.6]))]), np.arange(60)[None]
    reached = 20 * 0.9 * 40 / 255                        # in dark images, for those of label 1 are bright
    assert measure(examined, photos, images)[0, 1] == pytest.approx(reached, rel=1e-3)
    for model, seen in ((knowing(0.2), reached), (knowing(0.1), 0), (one_for_all(1, 1.0), 0)):
        assert measure(examined, photos, images, recognised(model, x))[0, 1] == pytest.approx(seen, rel=1e-3)
    unsure = recognised(lambda images: knowing(0.2)(images) / 18, x)         # by half a logit, which counts twice
    assert measure(examined, photos, images, unsure)[0, 1] == pytest.approx(1, rel=1e-3)
    # What leads elsewhere is not made better by hiding the image.
    away = measure(examined, photos, images)[0, 0]
    assert away < -1
    assert measure(examined, photos, images, lambda filtered, which: np.zeros((len(which), 2)))[0, 0] == pytest.approx(away)
