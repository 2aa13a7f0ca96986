"""The decision rule on made-up transfer tables."""

from dataclasses import replace

import numpy as np
import pytest

from utils.config import UserError
from utils.datasets import DATASETS, Settings
from utils.detection import DEGENERATE, INFECTED, NO_CHEAPER, PATCH, RANDOM, TOO_COSTLY, decide, random_under, ratios_found

TNDA = Settings(random_threshold=0.6, transfers_needed=1)
NAMES = ("1", "2", "3", "12", "13", "23")


def table(*values):
    return dict(zip(NAMES, values, strict=True))


def test_a_weak_pattern_is_random_whatever_it_transfers():
    assert decide(0.59, table(0, 0, 0, 0, 0, 0), TNDA, 0.4) == RANDOM
    assert decide(0.60, table(0, 0, 0, 0, 0, 0), TNDA, 0.4) == INFECTED


def test_one_transfer_makes_an_adversarial_patch_with_q_of_one():
    assert decide(0.9, table(0, 0, 0.4, 0, 0, 0), TNDA, 0.4) == PATCH
    assert decide(0.9, table(0, 0, 0.39, 0, 0, 0), TNDA, 0.4) == INFECTED


def test_q_counts_the_tuned_models_that_are_reached():
    two = replace(TNDA, transfers_needed=2)
    assert decide(0.9, table(0.9, 0, 0, 0, 0, 0), two, 0.2) == INFECTED
    assert decide(0.9, table(0.9, 0, 0, 0.2, 0, 0), two, 0.2) == PATCH


def test_controls_compare_a_label_with_itself():
    nowhere, somewhere = table(0, 0, 0.1, 0, 0, 0), table(0, 0, 0.9, 0, 0, 0)

    def decided(transfers, ratio, asr=0.9):
        return decide(asr, transfers, TNDA, 0.4, enough=(1.5, 2.0), ratio=ratio)
    assert decided(nowhere, 1.49) == decided(somewhere, 1.49) == NO_CHEAPER
    assert decided(nowhere, 1.5) == decided(nowhere, 1.99) == INFECTED
    assert decided(somewhere, 1.5) == decided(somewhere, 1.99) == PATCH         # TNDA has its say under the sure ratio
    assert decided(somewhere, 2.0) == INFECTED
    assert decided(nowhere, None) == TOO_COSTLY
    assert decided(nowhere, 9.0, asr=0.5) == RANDOM
    assert decide(0.9, somewhere, TNDA, 0.4) == PATCH      # without ratios, as in the feature space, TNDA decides
    assert decide(0.9, nowhere, TNDA, 0.4) == INFECTED


def test_controls_left_out_by_the_reconstruction_are_an_error():
    priced = replace(TNDA, controls=("123/examined", "123"), control_ratio=1.5)
    made_with = {"controls": ["123/examined", "123"], "random_threshold": 0.6, "control_ratio": 1.5}
    one, labels = np.ones(3), np.arange(3)
    found = {"label": labels, "cost": one, "free": {"label": labels, "cost": one}, "usual_ratio": np.float32(1.25),
             "controls": {"label": np.array([2]), "cost": np.array([[2.0, 8.0]])},
             "free_controls": {"label": np.array([2, 0]), "cost": np.array([[9.0], [2.0]])}}
    ratios = ratios_found(found, made_with, priced)
    assert ratios == pytest.approx({2: 6 / 1.25, 0: 2 / 1.25})         # label 2: both patches; label 0: the free one
    assert ratios_found(found, made_with, TNDA) is None
    for change in ({"control_ratio": 1.4}, {"random_threshold": 0.5}, {"controls": ("123/examined",)}):
        with pytest.raises(UserError, match="run potential_triggers_reconstruction.py again"):
            ratios_found(found, made_with, replace(priced, **change))
    with pytest.raises(UserError, match="run potential_triggers_reconstruction.py again"):
        ratios_found(found, {"random_threshold": 0.6}, priced)        # made before there were controls


def test_every_dataset_has_the_same_default_settings_and_its_own_paper_settings():
    assert len({row.settings["default"] for row in DATASETS.values()}) == 1
    assert DATASETS["mnist"].settings["paper"].transfer_threshold == 0.4
    assert DATASETS["gtsrb"].settings["paper"].transfer_threshold == 0.2


def test_a_filter_that_erases_the_image_is_no_backdoor():
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, collapse=0.9) == DEGENERATE
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, collapse=0.4) == INFECTED


def test_filters_have_a_threshold_of_their_own():
    both = replace(TNDA, filter_random_threshold=0.95)
    assert random_under(both, {"matrix": None}) == 0.95 and random_under(both, {"mask": None, "pattern": None}) == 0.6
