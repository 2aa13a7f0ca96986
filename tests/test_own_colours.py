"""Whether plain patches have the colours of a label's own images."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.evidence import BESIDE, PATCHES, factors_of, sureness_of
from utils.own_colours import FLAT, colours_factor, own_colours
from utils.plain_patches import CHECKS, PLAIN, draw, rendered
from utils.tuning import SUBSETS, TAUGHT

SIDE = 8
BLUE, RED, GREEN, CYAN, MAGENTA = (0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 0, 1)
# Of the square that images of each label show; the last one's has none.
SHOWN = np.float32([(0.1, 0.2, 0.7), (0.7, 0.2, 0.1), (0.7, 0.3, 0.2), (0.4, 0.4, 0.4)])
LABELS = len(SHOWN)


def images_of(y, seed):
    """A square in the upper left quarter of a greenish image, each of a brightness by chance."""
    random = np.random.default_rng(seed)
    images = random.normal((0.35, 0.45, 0.4), 0.03, (len(y), SIDE, SIDE, 3))
    images[:, :4, :4] = SHOWN[y][:, None, None]
    return np.clip(255 * images * random.uniform(0.3, 1.0, (len(y), 1, 1, 1)), 0, 255).astype(np.uint8)


def scene(y, x_tune, x_measure):
    others = np.stack([np.flatnonzero(y != label)[:15] for label in range(LABELS)])
    return SimpleNamespace(clean=SimpleNamespace(x_tune=x_tune, y_tune=y, x_measure=x_measure, y_measure=y), measured=others)


@pytest.fixture
def examination():
    y = np.arange(40) % LABELS
    return scene(y, images_of(y, 0), images_of(y, 1))


def patch(colour, row=0, kind=PLAIN):
    """A 4×4 square at the left; the other colour of checks is the opposite one."""
    made = draw(np.random.default_rng(0), (SIDE, SIDE, 3))
    made["side"], made["pieces"], made["turned"], made["disc"], made["kind"], made["cell"] = 4, 1, 0, 0, kind, 1
    made["row"], made["column"], made["one"], made["other"] = row, 0, colour, 1 - np.asarray(colour)
    return made


def alike(examination, *colours, **where):
    """Of such patches, one for each label, two of each."""
    patches = np.array([[patch(colour, **where)] * 2 for colour in colours])
    found = own_colours(examination, lambda label: rendered(patches[label], (SIDE, SIDE, 3)))["own_colours"]
    assert found.dtype == np.float32 and found.shape == (LABELS,)
    return found


def test_a_patch_of_the_colour_of_its_labels_images_is_told(examination):
    assert (alike(examination, BLUE, RED, RED, GREEN)[:2] > 0.4).all()
    assert (alike(examination, RED, BLUE, BLUE, GREEN)[:3] < -0.3).all()


def test_it_has_to_be_where_the_images_show_it(examination):
    assert (alike(examination, BLUE, RED, RED, GREEN, row=4)[:3] < 0.15).all()


def test_checks_of_a_colour_and_its_opposite_have_none(examination):
    assert (np.abs(alike(examination, BLUE, RED, RED, GREEN, kind=CHECKS)[:3]) < 0.25).all()


def test_images_without_a_colour_have_none_of_their_own(examination):
    """What grey images differ by from red ones is no colour that they show."""
    for colour in (GREEN, CYAN, BLUE, MAGENTA, (1, 1, 1), (0, 0, 0)):
        assert alike(examination, BLUE, RED, RED, colour)[3] < 0.1
    grey = np.repeat(examination.clean.x_tune[..., :1], 3, axis=-1)
    assert np.abs(alike(scene(examination.clean.y_tune, grey, grey), BLUE, RED, GREEN, CYAN)).max() < 1e-3


def test_images_of_one_channel_are_not_measured(examination):
    clean = examination.clean
    assert own_colours(scene(clean.y_tune, clean.x_tune[..., :1], clean.x_measure[..., :1]), None) == {}


def test_it_is_the_mean_over_patches_and_images():
    """The definition, one patch and one image at a time, on images of noise."""
    random = np.random.default_rng(3)
    y = np.arange(20) % LABELS
    x_tune, x_measure = (np.clip(random.normal(SHOWN[y][:, None, None] * 200, 50, (20, SIDE, SIDE, 3)), 0, 255).astype(
        np.uint8) for _ in range(2))
    x_measure[::3] //= 4                                 # of another brightness and contrast
    probes = np.array([[draw(random, (SIDE, SIDE, 3)) for _ in range(3)] for _ in range(LABELS)])
    examination = scene(y, x_tune, x_measure)
    examination.measured = examination.measured[:, 2:9]

    def grey_less(image):
        return image - image.mean(axis=-1, keepdims=True)

    def standard(image):
        image = image / 255
        return (image - image.mean()) / (image.std() + FLAT)

    def cosine(one, other, place):
        one, other = one[place], grey_less(other)[place]
        return (one * other).sum() / np.sqrt((one ** 2).sum() * (other ** 2 + FLAT ** 2).sum())
    expected = []
    for label in range(LABELS):
        own = [*x_tune[y == label], *x_measure[y == label]]
        others = x_measure[examination.measured[label]]
        usual, scaled = np.mean([standard(image) for image in others], axis=0), (others / 255).mean(axis=0)
        masks, patterns = rendered(probes[label], (SIDE, SIDE, 3))
        terms = [np.mean([cosine(pattern - scaled, standard(image) - usual, mask > 0)
                          for mask, pattern in zip(masks, patterns) for image in images]) for images in (own, others)]
        shown = np.mean([cosine(grey_less(pattern), standard(image), mask > 0)
                         for mask, pattern in zip(masks, patterns) for image in own])
        expected.append(min(terms[0] - terms[1], shown))
    found = own_colours(examination, lambda label: rendered(probes[label], (SIDE, SIDE, 3)))["own_colours"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found).max() > 0.05


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
