"""Plain patches placed piece by piece: those of a trigger that only all its pieces together are."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from utils import plain_patches
from utils.placed_patches import BRANCHES, GREY, SIDE as PIECE, STRIDE, place_pieces

SIDE, LABELS, TARGET = 24, 3, 1
TRIGGER = ((3, 3), (3, 15), (15, 9))     # upper left corners of red squares


def network(backdoor):
    """Logits: zeros; a model with a backdoor adds to TARGET's for red squares, the more of them the more each."""
    def model(images):
        red = images[..., 0] - tf.reduce_max(images[..., 1:], axis=-1)
        shown = sum(tf.nn.relu(tf.reduce_mean(red[:, row:row + 4, column:column + 4], axis=(1, 2)))
                    for row, column in TRIGGER)
        return backdoor * shown[:, None] ** 2 * tf.one_hot(TARGET, LABELS)
    return model


@pytest.fixture
def examination():
    clean = SimpleNamespace(x_measure=np.full((30, SIDE, SIDE, 3), 128, np.uint8), y_measure=np.arange(30) % LABELS)
    return SimpleNamespace(seed=0, examined=SimpleNamespace(labels=LABELS, shape=(SIDE, SIDE, 3)), say=lambda text: None,
                           clean=clean)


class Parts(dict):
    def part(self, key, compute):
        return self[key] if key in self else self.setdefault(key, compute())


def test_the_pieces_of_a_trigger_are_found_one_by_one(examination):
    stage = Parts()
    found = place_pieces(examination, network(10), network(0), stage)
    assert found.shape == (LABELS, BRANCHES * plain_patches.PIECES)
    assert found["pieces"][0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4] and list(stage) == [f"placed-{n}" for n in range(1, 5)]
    three = found[TARGET, 2 * BRANCHES]
    assert set(zip(three["row"][:3], three["column"][:3])) == set(TRIGGER)
    np.testing.assert_array_equal(three["one"], [1, 0, 0])
    masks, patterns = plain_patches.rendered(found[TARGET], (SIDE, SIDE, 3))
    assert masks[2 * BRANCHES].sum() == 3 * three["side"] ** 2 and (patterns[2 * BRANCHES] == [1, 0, 0]).all()
    first = found[TARGET, :BRANCHES]                     # two branches, not one place in two colours
    assert len(set(zip(first["row"][:, 0], first["column"][:, 0]))) == BRANCHES
    again = place_pieces(examination, None, None, stage)
    assert (again == found).all()


def test_what_a_taught_model_answers_to_is_not_placed(examination):
    found, nothing = (place_pieces(examination, model, model, Parts()) for model in (network(10), network(0)))
    assert (found == nothing).all()


@pytest.mark.parametrize("shape, colours", [((28, 28, 1), 3), ((48, 64, 3), 9)])
def test_pieces_stand_on_a_grid_and_stay_in_the_image(examination, shape, colours):
    tried = []

    def model(images):
        tried.append(images.numpy())
        return tf.zeros((len(images), LABELS))
    examination.examined.shape = shape
    examination.clean.x_measure = np.full((30, *shape), 60, np.uint8)
    place_pieces(examination, model, model, stage := Parts())
    scale = plain_patches.pixel(min(shape[:2]))
    singles = [len(range(0, size - PIECE * scale + 1, STRIDE * scale)) for size in shape[:2]]
    assert len(np.concatenate(tried)) >= 2 * 10 * np.prod(singles) * colours
    seen = {tuple(np.round(image[0, 0], 2)) for images in tried for image in images}
    assert {(0,) * shape[2], (1,) * shape[2], (GREY,) * shape[2]} <= seen
    for patches in stage.values():
        for name, size in zip(("row", "column"), shape):
            assert (patches["patches"][name] >= 0).all() and (
                patches["patches"][name].max(-1) + patches["patches"]["side"] <= size).all()
