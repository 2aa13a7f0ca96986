"""The decision rule on made-up transfer tables."""

from dataclasses import replace

from utils.datasets import DATASETS, Settings
from utils.detection import DEGENERATE, INFECTED, NO_CHEAPER, PATCH, RANDOM, decide

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


def test_the_role_swap_compares_a_label_with_itself():
    swap = replace(TNDA, role_swap=True, swap_ratio=1.5)
    transfers = table(0.9, 0.9, 0, 0, 0, 0)                  # transfers do not decide here
    assert decide(0.9, transfers, swap, 0.4, cost=2.0, swapped_cost=3.0) == INFECTED
    assert decide(0.9, transfers, swap, 0.4, cost=2.0, swapped_cost=2.9) == NO_CHEAPER
    assert decide(0.9, transfers, swap, 0.4) == PATCH        # without costs, as in the feature space, TNDA decides
    assert decide(0.5, transfers, swap, 0.4, cost=2.0, swapped_cost=9.0) == RANDOM


def test_every_dataset_has_the_same_default_settings_and_its_own_paper_settings():
    assert len({row.settings["default"] for row in DATASETS.values()}) == 1
    assert DATASETS["mnist"].settings["paper"].transfer_threshold == 0.4
    assert DATASETS["gtsrb"].settings["paper"].transfer_threshold == 0.2


def test_a_filter_that_erases_the_image_is_no_backdoor():
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, collapse=0.9) == DEGENERATE
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, collapse=0.4) == INFECTED
