"""The trigger's mathematics, each against an independent computation in numpy."""

import numpy as np
import tensorflow as tf

from utils import triggers

random = np.random.default_rng(0)


def test_mask_is_half_of_tanh_plus_one_and_stays_within_zero_and_one():
    m = random.uniform(size=(3, 5, 4)).astype(np.float32)
    expected = 1 / (1 + np.exp(-2 * 8.0 * (m - 0.5)))        # ½(tanh z + 1) is the logistic function of 2z
    mask = triggers.mask_from(tf.constant(m), 8.0, 0.5).numpy()
    np.testing.assert_allclose(mask, expected, atol=1e-6)
    ends = triggers.mask_from(tf.constant([0.0, 0.5, 1.0]), 10.0, 0.5).numpy()
    np.testing.assert_allclose(ends, [4.54e-5, 0.5, 1 - 4.54e-5], atol=1e-6)


def test_attach_pastes_the_pattern_where_the_mask_is_one():
    image, pattern = np.full((1, 2, 2, 3), 0.2, np.float32), np.full((1, 2, 2, 3), 0.9, np.float32)
    mask = np.array([[1, 0], [0.5, 0]], np.float32)[None, ..., None]
    attached = triggers.attach(image, mask, pattern)
    np.testing.assert_allclose(attached[0, :, :, 1], [[0.9, 0.2], [0.55, 0.2]], atol=1e-6)


def test_noise_sums_differences_of_all_eight_connected_neighbours_once():
    mask = random.uniform(size=(2, 4, 5)).astype(np.float32)
    expected = []
    for one in mask:
        total = 0.0
        for y in range(4):
            for x in range(5):
                for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    if 0 <= y + down < 4 and 0 <= x + right < 5:
                        total += abs(one[y, x] - one[y + down, x + right])
        expected.append(total)
    np.testing.assert_allclose(triggers.noise(tf.constant(mask)), expected, rtol=1e-5)


def test_excess_mass_counts_what_labels_collect_beyond_the_allowed():
    logits = np.array([[[2.0, 0, 0], [3, 0, 0], [0, 1, 0], [4, 0, 0]]], np.float32)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    collected = softmax[0].sum(0)
    assert collected[0] > 2 > collected[1]                   # only label 0 is over the allowance
    np.testing.assert_allclose(triggers.excess_mass(tf.constant(logits), 2.0), [collected[0] - 2], rtol=1e-5)
    np.testing.assert_allclose(triggers.excess_mass(tf.constant(logits), 4.0), [0.0], atol=1e-6)


def test_recolour_multiplies_row_vectors_and_keeps_the_range():
    image = random.uniform(size=(1, 2, 3, 3)).astype(np.float32)
    matrix = random.uniform(size=(3, 3)).astype(np.float32)
    expected = np.zeros_like(image)
    for y in range(2):
        for x in range(3):
            for to in range(3):
                expected[0, y, x, to] = sum(image[0, y, x, of] * matrix[of, to] for of in range(3))
    np.testing.assert_allclose(triggers.recolour(tf.constant(image), tf.constant(matrix)), expected.clip(0, 1), atol=1e-6)
    several = triggers.recolour(tf.constant(image[None]), tf.constant(matrix[None]))
    np.testing.assert_allclose(several[0], expected.clip(0, 1), atol=1e-6)


def test_only_rows_with_a_sum_over_one_are_divided_by_it():
    matrix = tf.constant([[[0.2, 0.3, 0.1], [1.0, 0.5, 0.5], [0.4, 0.3, 0.3]]])
    bounded = triggers.bound_rows(matrix).numpy()[0]
    np.testing.assert_allclose(bounded, [[0.2, 0.3, 0.1], [0.5, 0.25, 0.25], [0.4, 0.3, 0.3]], atol=1e-6)
