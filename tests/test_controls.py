"""Which labels get controls, and what these cost."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from utils import controls
from utils.datasets import Settings

PAIRS = ("123/examined", "23/123")


@pytest.fixture
def measured(monkeypatch):
    """A stand-in for the optimization: control costs of 2 and 8 for label 0, of 3 and 12 for label 1, and so on."""
    calls = []

    class Made:
        def __init__(self, kind, examination, models, pair, stage, chunk, restart=0):
            self.pair, self.restart = pair, restart

        def __call__(self, labels):
            calls.append((self.pair, list(labels)))
            if self.restart:                     # a second start finds a patch of cost 4 for every label
                return {"cost": np.full(len(labels), 4.0), "asr": np.where(np.array(labels) == 3, 0.5, 0.7)}
            cost = (np.array(labels) + 2.0) * (4 if self.pair == "23/123" else 1)
            return {"cost": cost, "entropy": cost / 2, "asr": cost * 0 + 0.9}
    monkeypatch.setattr(controls, "Reconstructor", Made)
    monkeypatch.setattr(controls, "GROUP", 2)
    monkeypatch.setattr(controls, "USUAL", (1.0, 1.0))
    return calls


def measure(cost, asr, ratio=2.0, restarts=0, **more):
    examination = SimpleNamespace(settings=replace(Settings(), controls=PAIRS, control_ratio=ratio, restarts=restarts))
    return controls.measure_controls(examination, None, {"cost": np.array(cost), "asr": np.array(asr)} | more, None)


def costs(*args, **options):
    return measure(*args, **options).get("controls", {})


def test_labels_come_in_the_order_of_cost_until_no_control_could_convict_them(measured):
    # Labels 4 and 1 are the cheapest; their controls cost 12 and 6. Label 3 at 5 could be convicted by a control of 12
    # and is measured with label 0; label 2 at 6.1 could not.
    found = costs([5.5, 1.5, 6.1, 5.0, 1.0], [0.9] * 5)
    assert measured == [(pair, labels) for labels in ([1, 4], [0, 3]) for pair in PAIRS]
    np.testing.assert_array_equal(found["label"], [1, 4, 0, 3])
    np.testing.assert_allclose(found["cost"], [[3, 12], [6, 24], [2, 8], [5, 20]])
    assert controls.typical(found["cost"][0]) == pytest.approx(6.0)


def test_fewer_labels_could_be_convicted_where_all_ratios_are_high(measured, monkeypatch):
    cheap = [5.5, 5.0, 6.1, 1.5, 1.0], [0.9] * 5             # the first two labels' controls cost 10 and 12
    assert len(costs(*cheap)["label"]) == 4
    monkeypatch.setattr(controls, "USUAL", (1.0, 2.5))       # twice the median of all labels' patches
    assert len(costs(*cheap)["label"]) == 2


def test_random_patterns_need_no_controls(measured):
    found = costs([1.0, 1.0, 1.0], [0.59, 0.6, 0.2])
    np.testing.assert_array_equal(found["label"], [1])
    assert costs([1.0, 1.0], [0.1, 0.2]) == {}


def test_labels_that_the_first_round_dropped_get_no_controls(measured):
    found = measure([1.0, 1.5, 2.0], [0.9] * 3, restarts=1, dropped=np.array([True, False, False]))
    np.testing.assert_array_equal(found["controls"]["label"], [1, 2])
    np.testing.assert_array_equal(found["dropped"], [True, False, False])
    assert all(0 not in labels for _, labels in measured)


def test_a_lower_ratio_measures_more_labels(measured):
    assert len(costs([1.0, 1.0, 9.0, 9.0], [0.9] * 4, ratio=2.0)["label"]) == 2
    assert len(costs([1.0, 1.0, 9.0, 9.0], [0.9] * 4, ratio=0.5)["label"]) == 4


def test_a_label_with_controls_keeps_the_cheapest_of_its_starts(measured):
    found = measure([5.0, 3.0, 90.0, 5.5], [0.9] * 4, ratio=0.1, restarts=1)
    assert measured[0] == ("examined/123", [0, 1]) and measured[3] == ("examined/123", [2, 3])
    np.testing.assert_allclose(found["cost"], [4.0, 3.0, 4.0, 5.5])     # the second start of label 3 is random
    np.testing.assert_allclose(found["asr"], [0.7, 0.9, 0.7, 0.9])


def test_what_is_usual_is_median_to_median_within_bounds():
    def usual(costs, found):
        return controls.usual({"cost": np.array(costs)}, found)
    assert usual([1.0, 2.0, 2.0, 2.0, 4.0], [3.0, 3.4, 9.0]) == pytest.approx(1.7)
    assert usual([0.5, 0.5, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]) == pytest.approx(1.5)     # half of the labels infected
    assert usual([4.0, 4.0], [3.0]) == 1.0                   # no model's clean labels make a label easier to convict
    assert usual([0.1, 0.2], [3.0, 3.0]) == 2.5              # all labels infected: they do not hide each other
    assert usual([1.0], []) == 1.0


def test_what_is_usual_does_not_hang_on_which_labels_were_measured():
    """Ratios of the cheapest labels are high for their cheap patches alone; labels that were dropped did not converge."""
    costs = np.array([1.0, 1.5, 2.0, 3.0, 3.0, 3.0, 9.0, 9.0])
    assert controls.usual({"cost": costs[:6]}, [3.9, 3.9]) == pytest.approx(1.3)
    assert controls.usual({"cost": costs, "dropped": costs > 8}, [3.9, 3.9]) == pytest.approx(1.3)
