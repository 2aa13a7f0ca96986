"""Which labels get controls, what these cost, and the ratios that come of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from utils import controls
from utils.datasets import Settings

CONTROLS = ("123/examined", "23/123", "123", "12")


@pytest.fixture
def measured(monkeypatch):
    """A stand-in for the optimization, and what it was asked: (models, labels, restart).

    A free patch costs 1 for label 0, 2 for label 1 and so on; alone on 123 twice that, on 12 eight times. Controls of the
    patch proper cost 6 and 24 each.
    """
    calls = []

    class Made:
        def __init__(self, kind, examination, models, pair, stage, labels_at_once=None, most=None):
            self.pair = pair

        def __call__(self, labels, restart=0):
            calls.append((self.pair, list(labels), restart))
            labels = np.array(labels)
            flat = np.ones(len(labels))
            cost = {"examined": labels + 1.0, "123": 2 * (labels + 1.0), "12": 8 * (labels + 1.0), "examined/123": 4 * flat,
                    "123/examined": 6 * flat, "23/123": 24 * flat}[self.pair]
            # A second start halves the cost of label 0 alone, and is random on label 3.
            cost = np.where(labels == 0, cost / 2, cost + (labels != 3)) if restart else cost
            asr = np.where((labels == 3) & (restart > 0), 0.5, 0.9)
            return {"label": labels, "cost": cost, "entropy": cost / 2, "asr": asr}
    monkeypatch.setattr(controls, "Reconstructor", Made)
    monkeypatch.setattr(controls, "GROUP", 2)
    monkeypatch.setattr(controls, "SPREAD", 3)
    return calls


def measure(asr, cost=9.0, ratio=2.1, restarts=0, sureness=None, **more):
    """cost: of the patches proper; ratio: that convicts where the sureness is 1."""
    settings = replace(Settings(), controls=CONTROLS, restarts=restarts)
    needed = ratio / (np.ones(len(asr)) if sureness is None else np.array(sureness))
    arrays = {"label": np.arange(len(asr)), "cost": np.zeros(len(asr)) + cost, "entropy": np.ones(len(asr)),
              "asr": np.array(asr)}
    return controls.measure_controls(SimpleNamespace(settings=settings), None, arrays | more, needed, None)


def test_free_controls_are_of_labels_of_every_cost_and_of_the_cheapest(measured):
    found = measure([0.9] * 7)
    # Spread: the cheapest, the middle, the costliest; the usual ratio is 4, held to 2.5. Then labels 1 and 2, whose patches
    # of 2 and 3 a control of 28 could convict at 2.1 · 2.5, and 4 and 5 (5 · 5.25 < 28); 6 were the spread's.
    np.testing.assert_array_equal(found["free_controls"]["label"], [0, 3, 6, 1, 2, 4, 5])
    np.testing.assert_allclose(found["free_controls"]["cost"][:2], [[2, 8], [8, 32]])
    assert found["usual_ratio"] == 2.5
    assert measured[0] == ("examined", list(range(7)), 0)


def test_labels_too_costly_to_be_convicted_get_no_free_controls(measured):
    found = measure([0.9] * 7, ratio=4.0)          # 2 · 4 · 2.5 is under 28, 5 · 4 · 2.5 is not
    np.testing.assert_array_equal(found["free_controls"]["label"], [0, 3, 6, 1, 2])
    assert set(controls.relative_ratios(found)) == {0, 1, 2, 3, 6}


def test_a_large_sureness_makes_up_for_a_high_price(measured):
    found = measure([0.9] * 7, ratio=4.0, sureness=[1, 1, 1, 1, 1, 4, 1])       # 6 · 4 · 2.5 / 4 is under 28
    np.testing.assert_array_equal(found["free_controls"]["label"][3:], [1, 5])


def test_labels_that_evidence_might_reach_get_controls_of_the_patch_proper(measured):
    found = measure([0.9, 0.9, 0.59, 0.9], cost=[2.0, 4.0, 4.0, 9.0], sureness=[1, 1, 1, 0.6])
    # Every free ratio is 4, 1.6 times the 2.5 that is usual at most; labels 0 and 1 ask for 2.1, 3 for more than twice 1.6.
    np.testing.assert_array_equal(found["controls"]["label"], [0, 1])           # label 2 is random
    np.testing.assert_allclose(found["controls"]["cost"], [[6, 24], [6, 24]])
    ratios = controls.relative_ratios(found)
    assert ratios[0] == pytest.approx(np.sqrt(4 * 12 / 2) / 2.5)                # of both patches
    np.testing.assert_allclose([ratios[1], ratios[2]], 4 / 2.5)                 # of the free one: 12 / 4 is less, or unknown


def test_labels_that_cannot_be_convicted_get_no_further_controls(measured):
    assert "controls" not in measure([0.9] * 3, ratio=3.3)
    assert {pair for pair, _, _ in measured} == {"examined", "123", "12"}


def test_a_patch_proper_that_is_cheaper_is_the_free_patch(measured):
    found = measure([0.9, 0.59, 0.9], cost=0.5)
    np.testing.assert_allclose(found["free"]["cost"], [0.5, 2.0, 0.5])          # label 1's is random
    np.testing.assert_allclose(found["free"]["asr"], 0.9)                       # the price alone counts for it


def test_labels_that_the_first_round_dropped_get_nothing(measured):
    found = measure([0.9] * 4, restarts=1, dropped=np.array([False, True, False, False]))
    np.testing.assert_array_equal(found["free"]["label"], [0, 2, 3])
    np.testing.assert_array_equal(found["free_controls"]["label"], [0, 2, 3])
    assert all(1 not in labels for _, labels, _ in measured)
    ratios = controls.relative_ratios(found)
    np.testing.assert_allclose([ratios[0], ratios[2], ratios[3]], np.array([8, 4, 4]) / 2.5)


def test_a_label_with_controls_keeps_the_cheapest_of_its_starts(measured):
    found = measure([0.9] * 4, restarts=1, ratio=0.1)
    np.testing.assert_allclose(found["free"]["cost"], [0.5, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(found["cost"], [2.0, 5.0, 5.0, 9.0])             # the second start of label 3 is random
    again = measure([0.9] * 4, cost=4.5, restarts=1, ratio=0.1)
    np.testing.assert_allclose(again["cost"], [2.0, 4.5, 4.5, 4.5])


def test_what_is_usual_is_the_median_within_bounds():
    assert controls.usual([1.2, 9.0, 1.4]) == pytest.approx(1.4)
    assert controls.usual([0.7, 0.8]) == 1.0                 # no model's clean labels make a label easier to convict
    assert controls.usual([9.0, 8.0]) == 2.5                 # all labels infected: they do not hide each other


def test_controls_are_averaged_in_their_logarithms():
    assert controls.typical(np.array([2.0, 8.0])) == pytest.approx(4.0)


def test_patches_that_cost_nothing_have_ratios_all_the_same():
    """Without a price of pixels, one that is sure of every image costs exactly 0 in float32."""
    own = {"label": np.arange(2), "cost": np.array([0.0, 2.0], np.float32)}
    found = controls.ratios_of(own, {"label": np.arange(2), "cost": np.array([[1.0, 4.0], [0.0, 0.0]])})
    assert found[0] == pytest.approx(2e6) and found[1] == pytest.approx(5e-7)
