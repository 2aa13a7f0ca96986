"""Whether plain patches have the colours of a label's own images."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.evidence import BESIDE, PATCHES, factors_of, sureness_of
from utils.own_colours import colours_factor, own_colours
from utils.plain_patches import CHECKS, PLAIN, draw
from utils.tuning import SUBSETS, TAUGHT

SIDE = 8
COLOURS = np.float32([(0.1, 0.2, 0.7), (0.7, 0.2, 0.1), (0.4, 0.4, 0.4)])      # of the disc that images of a label show


def images_of(y, brightness=1.0):
    """A square of the label's colour in the upper left quarter of a grey image, of a brightness by chance."""
    random = np.random.default_rng(0)
    images = random.normal(0.4, 0.03, (len(y), SIDE, SIDE, 3))
    images[:, :4, :4] = COLOURS[y][:, None, None]
    light = random.uniform(brightness / 2, brightness, (len(y), 1, 1, 1))
    return np.clip(255 * images * light, 0, 255).astype(np.uint8)


@pytest.fixture
def examination():
    y = np.arange(30) % 3
    others = np.stack([np.flatnonzero(y != label) for label in range(3)])
    return SimpleNamespace(clean=SimpleNamespace(x_tune=images_of(y), y_tune=y, x_measure=images_of(y), y_measure=y),
                           measured=others)


def patches(*colours, row=0, kind=PLAIN):
    """A plain 4×4 square of each colour, at the left, once for each label."""
    found = []
    for colour in colours:
        patch = draw(np.random.default_rng(0), (SIDE, SIDE, 3))
        patch["side"], patch["pieces"], patch["turned"], patch["disc"], patch["kind"], patch["cell"] = 4, 1, 0, 0, kind, 1
        patch["row"], patch["column"], patch["one"], patch["other"] = row, 0, colour, 1 - np.asarray(colour)
        found.append([patch] * 2)
    return np.array(found)


BLUE, RED, GREEN = (0, 0, 1), (1, 0, 0), (0, 1, 0)


def test_a_patch_of_the_colour_of_its_labels_images_is_told(examination):
    found = own_colours(examination, patches(BLUE, RED, GREEN))["own_colours"]
    assert found.dtype == np.float32 and found.shape == (3,)
    assert (found[:2] > 0.5).all()
    assert (own_colours(examination, patches(RED, BLUE, GREEN))["own_colours"][:2] < -0.3).all()      # each other's


def test_it_has_to_be_where_the_images_show_it(examination):
    elsewhere = own_colours(examination, patches(BLUE, RED, GREEN, row=4))["own_colours"]
    assert (np.abs(elsewhere) < 0.3).all()


def test_checks_of_a_colour_and_its_opposite_have_none(examination):
    checks = own_colours(examination, patches(BLUE, RED, GREEN, kind=CHECKS))["own_colours"]
    assert (np.abs(checks[:2]) < 0.35).all()


def test_brightness_tells_nothing(examination):
    white = own_colours(examination, patches((1, 1, 1), (0, 0, 0), (0.9, 0.9, 0.9)))["own_colours"]
    assert (np.abs(white) < 0.35).all()
    clean = examination.clean
    grey = np.repeat(clean.x_tune.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    uncoloured = SimpleNamespace(clean=SimpleNamespace(x_tune=grey, y_tune=clean.y_tune, x_measure=grey,
                                                       y_measure=clean.y_measure), measured=examination.measured)
    np.testing.assert_allclose(own_colours(uncoloured, patches(BLUE, RED, GREEN))["own_colours"], 0, atol=1e-3)


def test_grey_images_have_none(examination):
    clean = examination.clean
    grey = SimpleNamespace(clean=SimpleNamespace(x_tune=clean.x_tune[..., :1]), measured=examination.measured)
    assert own_colours(grey, None) == {}


def test_it_takes_from_what_the_probe_counts():
    tuned = {name: {"accuracy": 0.9, "clean_margins": np.full(3, 6.0), "largest_margins": np.ones(3)} for name in SUBSETS}
    tuned |= {name: {"accuracy": 0.9} for name in TAUGHT}
    probe_margins = {name: np.full(3, 12.0 * (name == "examined")) for name in ("examined", *TAUGHT)}
    tuned["examined"] = {"clean_margins": np.full(3, 6.0), "largest_margins": np.ones(3), "probe_margins": probe_margins,
                         "own_colours": np.float32([0, 0.75, -1])}
    np.testing.assert_allclose(colours_factor(tuned), [1, 0.25, 1])
    factors = factors_of(tuned, 0.9)
    probe = factors["probe"][0]
    assert probe > 1 and "foreign" not in factors
    for powers in (PATCHES, BESIDE):
        lifted = probe ** powers["probe"] - 1
        np.testing.assert_allclose(sureness_of(factors, **powers), [1 + lifted, 1 + lifted / 4, 1 + lifted], rtol=1e-6)
