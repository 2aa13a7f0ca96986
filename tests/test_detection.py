"""The decision rule on made-up transfer tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from utils.config import UserError
from utils.datasets import DATASETS, Settings
from utils.detection import (DEGENERATE, EXPLAINED, INFECTED, PATCH, RANDOM, TOO_LITTLE, UNSURE, UNTOLD, decide, evidence_of,
                             random_under, report, require_preserved, warnings_of, weigh)
from utils.evidence import PATCHES, SECOND_HAS, SECOND_KEEPS, convicting, exclusiveness, factors_of, lead, own, ratios_needed
from utils.tuning import SUBSETS, TAUGHT

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
    five = dict(list(table(1, 1, 1, 1, 1, 1).items())[:5])
    assert decide(0.9, five, replace(TNDA, transfers_needed=6), 0.2) == PATCH, "it transfers to all there are"


def test_evidence_convicts_whatever_tnda_says_and_clears_patches_alone():
    for said in (RANDOM, PATCH, INFECTED, DEGENERATE):
        assert weigh(said, 2.5, 2.5, patch=True) == weigh(said, 2.5, 2.5, patch=False) == INFECTED
        assert weigh(said, 2.49, 2.5, patch=False) == said
    assert weigh(PATCH, 2.49, 2.5, patch=True) == weigh(INFECTED, 2.49, 2.5, patch=True) == TOO_LITTLE
    assert weigh(RANDOM, 2.49, 2.5, patch=True) == RANDOM


def test_beside_another_backdoor_both_what_a_label_has_and_what_it_keeps_count():
    np.testing.assert_allclose(own(np.array([7.35, 7.35, 1.47]), np.array([3.9, 0.58, 9.0]), {"probe": 1}), [10, 2, 2])
    foreign = {"probe": 1, "foreign": np.array([1.0, 2.5])}                              # counts for what is kept
    np.testing.assert_allclose(own(np.array([7.35, 7.35]), np.array([0.58, 0.58]), foreign), [2, 5])
    np.testing.assert_array_equal(own(np.array([7.0, 2.0]), np.array([2.4, 9.0]), {"margin": 1}), [2.4, 2])   # without leads
    assert weigh(INFECTED, 9.0, 2.5, patch=True, own=2.5) == INFECTED
    assert weigh(INFECTED, 9.0, 2.5, patch=True, own=2.49) == EXPLAINED
    assert weigh(INFECTED, 2.49, 2.5, patch=True, own=2.5) == INFECTED       # less is enough beside another's
    assert weigh(INFECTED, 2.49, 2.5, patch=True, own=2.49) == TOO_LITTLE


def test_labels_lead_by_the_largest_gap_behind_them():
    np.testing.assert_allclose(lead(np.array([1.5, 6.0, 0.3])), [1, 4, 1])
    np.testing.assert_allclose(lead(np.array([0.5, 6.0, 0.3])), [1, 6, 1])               # less than usual counts as usual
    np.testing.assert_array_equal(lead(np.array([6.0, 0.3, 6.0])), np.ones(3))
    np.testing.assert_array_equal(lead(np.array([0.6, 0.3])), np.ones(2))
    # Of eight labels two may lead, together or the first of them alone, but not three.
    rest = [1.5, 0.3, 1.2, 0.9, 1.1]
    np.testing.assert_allclose(lead(np.array([8.0, 6.0, 2.0] + rest)), [3, 3] + [1] * 6)
    np.testing.assert_allclose(lead(np.array([6.0, 30.0, 2.0] + rest)), [3, 5] + [1] * 6)
    np.testing.assert_allclose(lead(np.array([8.0, 6.0, 5.0] + rest)), [8 / 6, 6 / 5] + [1] * 6)


def test_a_price_is_asked_for_with_the_lead_it_would_give():
    settings = replace(TNDA, evidence=1.75)
    enough = convicting(settings, 3, {"probe", "foreign"})
    for probe in ([1.5, 1.2, 0.8], [2.0, 5.0, 1.0], [0.5, 0.6, 0.7]):
        factors = {"margin": np.ones(3), "probe": np.array(probe), "foreign": np.ones(3)}
        for label, ratio in enumerate(ratios_needed(settings, factors, np.ones(3))):
            def counts(power):
                evidence = np.array(probe) ** power
                evidence[label] *= ratio
                return (evidence * lead(evidence))[label]
            assert max(counts(PATCHES["probe"]), counts(1) / SECOND_HAS) == pytest.approx(enough)     # alone or beside


def test_more_labels_ask_for_more_evidence():
    settings = replace(TNDA, evidence=1.5, unprobed_evidence=1.2, filter_evidence=0.7)
    known = {"margin", "probe"}
    assert convicting(settings, 100, known) == pytest.approx(1.5 * np.log(100))
    assert convicting(settings, 5, known) == convicting(settings, 2, known) == pytest.approx(1.5 * np.log(10))
    assert convicting(settings, 100, {"margin"}) == pytest.approx(1.2 * np.log(100))
    assert convicting(settings, 100, known, filters=True) == pytest.approx(0.7 * np.log(100))


def examination(settings):
    return SimpleNamespace(settings=settings, accuracy=0.9, examined=SimpleNamespace(labels=3, name="b"),
                           row=SimpleNamespace(name="a"), seed=0, say=lambda text: None)


def test_evidence_is_of_price_margin_and_probes():
    priced = replace(TNDA, controls=("123/examined", "123"), evidence=1.5, unprobed_evidence=1.0, filter_evidence=1.5)
    made_with = {"controls": ["123/examined", "123"], "random_threshold": 0.6, "evidence": 1.5, "unprobed_evidence": 1.0}
    one, labels = np.ones(3), np.arange(3)
    found = {"label": labels, "cost": one, "free": {"label": labels, "cost": one}, "usual_ratio": np.float32(1.25),
             "controls": {"label": np.array([2]), "cost": np.array([[3.0, 27.0]])},
             "free_controls": {"label": np.array([2, 0]), "cost": np.array([[4.0], [2.0]])},
             "repaired_evidence": np.array([2.5, np.nan, np.nan])}
    tuned = {name: {"accuracy": 0.9, "clean_margins": np.full(3, 6.0), "largest_margins": np.array(largest)}
             for name, largest in zip(("examined", *SUBSETS),
                                      ([4.0, 2.0, 8.0], [1.0, 1.0, 1.0], [4.0, 4.0, 4.0], *[[2.0, 2.0, 2.0]] * 5))}
    tuned |= {name: {"accuracy": 0.9} for name in TAUGHT}
    # Plain patches lead to label 1 on the examined model alone, by four times half of what it gives to clean images, and
    # to 2 on all: mostly they do not differ.
    tuned["examined"]["probe_margins"] = {name: np.array([0, 12.0 * (name == "examined"), 18]) for name in tuned}
    tuned["examined"]["likeness"] = 1.02 - np.array([0.2, 0.4, 0.1])     # twice as unlike its images is 1
    tuned["examined"]["own_colours"] = np.array([0.5, 0.25, -0.5])       # of which it takes what is over 0
    fields = evidence_of(examination(priced), tuned, found, made_with)
    # Label 2: ratios of both patches; label 0: of the free one; label 1: none, which counts as 1.
    assert fields[0] == {"ratio": 1.6, "margin": 1.0, "probe": 1.0, "foreign": 1.0, "colours": 0.5, "evidence": 1.6,
                         "beside": 1.6, "repaired_evidence": 2.5}
    once = 0.5 ** 0.5 * (1 + 1.5 * (5 ** 1.5 - 1))       # what it is over 1 counts 2 × 0.75 times
    assert fields[1] == {"margin": 0.5, "probe": 5.0, "foreign": 2.0, "colours": 0.75,
                         "evidence": pytest.approx(once, abs=1e-6), "beside": pytest.approx(7 * 0.5 ** 0.5, abs=1e-6)}
    twice = pytest.approx(4.8 * 2 ** 0.5, abs=1e-6)
    assert fields[2] == {"ratio": 4.8, "margin": 2.0, "probe": 1.0, "foreign": 1.0, "colours": 1.0, "evidence": twice,
                         "beside": twice}
    needed = ratios_needed(priced, factors_of(tuned, 0.9), np.ones(3))
    enough = 1.5 * np.log(10)                            # label 1 has more; it has a lead over label 2's root of 2
    assert needed[0] == pytest.approx(SECOND_HAS * enough)
    assert needed[1] == pytest.approx((enough * 2 ** 0.5) ** 0.5 / once)
    unlike = tuned | {"examined": tuned["examined"] | {"likeness": 1.02 - np.array([0.2, 0.1, 0.4])}}
    foreign = evidence_of(examination(priced), unlike, found, made_with)[2]
    assert (foreign["foreign"], foreign["evidence"]) == (2.0, twice)          # nothing leads there in excess
    # One taught model alone knows the labels: margins and probes do not count, and less of it convicts.
    tuned[TAUGHT[1]]["accuracy"] = tuned[TAUGHT[2]]["accuracy"] = 0.3
    fields = evidence_of(examination(priced), tuned, found, made_with)
    assert "probe" not in fields[0] and [row["evidence"] for row in fields] == [1.6, 1.0, pytest.approx(4.8)]
    for patches, missed in ((True, "large triggers will be missed"), (False, "no matrix matches will be missed")):
        warning, = warnings_of(examination(priced), tuned, fields, patches)
        assert "only 1 of 3 taught models and 7 of 7 others" in warning and missed in warning
    own = np.array([1, 2, 0.5])
    np.testing.assert_allclose(ratios_needed(priced, factors_of(tuned, 0.9), own), np.log(10) / [1, 2, 1])
    tuned[TAUGHT[1]]["accuracy"] = tuned[TAUGHT[2]]["accuracy"] = 0.9
    # So it is with three of the seven others.
    few = tuned | {name: tuned[name] | {"accuracy": 0.3} for name in SUBSETS[:4]}
    assert evidence_of(examination(priced), few, found, made_with) == fields
    assert evidence_of(examination(TNDA), tuned, found, made_with) is None
    assert warnings_of(examination(TNDA), tuned, None) == warnings_of(examination(priced), tuned, [{"probe": 1.0}] * 3) == []
    assert "two labels" in warnings_of(examination(priced), tuned, [{"probe": 1.0}] * 2)[0]
    for change in ({"evidence": 1.4}, {"unprobed_evidence": 0.9}, {"random_threshold": 0.5},
                   {"controls": ("123/examined",)}):
        with pytest.raises(UserError, match="run potential_triggers_reconstruction.py again"):
            evidence_of(examination(replace(priced, **change)), tuned, found, made_with)
    with pytest.raises(UserError, match="EVIDENCE needs controls"):
        evidence_of(examination(replace(priced, controls=())), tuned, found, made_with)
    older = {name: found[name] for name in found if name != "repaired_evidence"}
    for before, arrays in (({"random_threshold": 0.6}, found), (made_with, older),
                           ({name: made_with[name] for name in ("controls", "random_threshold")}, found)):
        with pytest.raises(UserError, match="run potential_triggers_reconstruction.py again"):
            evidence_of(examination(priced), tuned, arrays, before)       # before there were controls, repairs, evidence
    unprobed = {name: {key: one[key] for key in one if key != "probe_margins"} for name, one in tuned.items()}
    for missing in ({SUBSETS[0]: {}}, {"examined": {}}, unprobed):
        with pytest.raises(UserError, match="run pnnir.py again"):
            evidence_of(examination(priced), missing, found, made_with)
    # Filters have no price, and probes of their own.
    filters = {"matrix": np.zeros((3, 3, 3)), "probe_margins": {
        name: np.array([0, 12.0, 18]) if name == "examined" else np.array([0, 1.5, 10.5]) for name in tuned}}
    assert evidence_of(examination(priced), unprobed, filters, {}) == [
        {"margin": 1.0, "probe": 1.0, "evidence": 1.0}, {"margin": 0.5, "probe": 2.0, "evidence": 1.0},
        {"margin": 2.0, "probe": 8.0, "evidence": 16.0}]
    with pytest.raises(UserError, match="FILTER_EVIDENCE needs controls"):
        evidence_of(examination(replace(priced, controls=())), tuned, filters, {})
    assert evidence_of(examination(replace(priced, filter_evidence=0.0)), tuned, filters, {}) is None
    with pytest.raises(UserError, match="run potential_triggers_reconstruction_feature_space.py again"):
        evidence_of(examination(priced), tuned, {"matrix": filters["matrix"]}, {})
    tuned[TAUGHT[1]]["accuracy"] = tuned[TAUGHT[2]]["accuracy"] = 0.3
    assert [row["evidence"] for row in evidence_of(examination(priced), tuned, filters, {})] == [1, 1, 1]


def test_every_dataset_has_the_same_default_settings_and_its_own_paper_settings():
    assert len({row.settings["default"] for row in DATASETS.values()}) == 1
    assert DATASETS["mnist"].settings["paper"].transfer_threshold == 0.4
    assert DATASETS["gtsrb"].settings["paper"].transfer_threshold == 0.2


def test_a_filter_that_erases_the_image_is_no_backdoor():
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, collapse=0.9) == DEGENERATE
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, collapse=0.4) == INFECTED


def test_a_matrix_that_leads_to_its_label_unsurely_is_no_backdoor():
    sure = replace(TNDA, filter_entropy=0.1)
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), sure, 0.2, entropy=0.11) == UNSURE
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), sure, 0.2, entropy=0.09) == INFECTED
    assert decide(1.0, table(0, 0, 0, 0, 0, 0), TNDA, 0.2, entropy=9.0) == INFECTED       # the paper asks for the ASR alone
    assert weigh(UNSURE, 1.0, 2.5, patch=False) == UNSURE and weigh(UNSURE, 2.6, 2.5, patch=False) == INFECTED


def test_models_that_do_not_classify_show_no_transfer(capsys, tmp_path):
    """Nothing transfers to dead models, and dead 123 gives all images one label: neither convicts or clears."""
    few = {name: value for name, value in table(0, 0, 0, 0, 0, 0).items() if name in NAMES[:3]}
    assert decide(1.0, few, TNDA, 0.2) == UNTOLD and decide(0.5, few, TNDA, 0.2) == RANDOM
    assert decide(1.0, few | {"12": 0.0}, TNDA, 0.2) == INFECTED and decide(1.0, few | {"12": 0.3}, TNDA, 0.2) == PATCH
    assert weigh(UNTOLD, 1.0, 2.5, patch=True) == TOO_LITTLE and weigh(UNTOLD, 1.0, 2.5, patch=False) == UNTOLD
    tuned = {name: {"accuracy": 0.9} for name in SUBSETS}
    found = {"asr": np.ones(3), "entropy": np.zeros(3), "matrix": np.zeros((3, 3, 3)), "collapse": np.array([1.0, 0, 0])}
    stage = SimpleNamespace(settings={}, path=tmp_path / "detection.h5")
    scene = examination(replace(TNDA, filter_random_threshold=0.9))

    def decisions(**dead):
        verdict = report(scene, stage, {name: {"accuracy": dead.get("m" + name, 0.9)} for name in tuned}, found,
                         np.array([[0] * 6, [0] * 6, [0, 0, 0, 0, 0, 0.8]], np.float32), 0.5)
        return [row["decision"] for row in verdict["labels"].values()], verdict["warnings"]
    assert decisions() == ([DEGENERATE, INFECTED, PATCH], [])
    told, (warning,) = decisions(m123=0.3)
    assert told == [INFECTED, INFECTED, PATCH] and warning.startswith("tuned models 123 hardly classify")
    told, (warning,) = decisions(m23=0.3)
    assert told == [DEGENERATE, INFECTED, INFECTED] and warning.startswith("tuned models 23 hardly classify")
    told, (warning,) = decisions(m1=0.3, m2=0.3, m3=0.3)
    assert told == [DEGENERATE, UNTOLD, UNTOLD] and "1, 2, 3 hardly" in warning
    assert "WARNING: tuned models" in capsys.readouterr().out


def priced_patches(count):
    """Arrays of potential_triggers.h5 as `report` reads them: so many labels, each reached by a patch of the same cost."""
    labels, one = np.arange(count), np.ones(count)
    return {"asr": one, "mask": np.zeros((count, 2, 2)), "label": labels, "cost": one,
            "free": {"label": labels, "cost": one}, "usual_ratio": np.float32(1)}


def judged(tmp_path, has, keeps, second, beside=None):
    """What `report` says of eight labels, two of which may lead, where 2.5 ln(10) = 5.76 convict alone.

    `keeps` is label 0's, none where it was not asked, as is `beside`, what counts of `has` beside a backdoor, where that is
    less.
    """
    found = priced_patches(8)
    evidence = [{"margin": 1.0, "probe": 1.0, "foreign": 1.0, "colours": 1.0, "evidence": value, "beside": value}
                for value in (has, second, *[1.0] * 6)]
    evidence[0] |= {"beside": beside or has} | ({} if keeps is None else {"repaired_evidence": keeps})
    return report(examination(replace(TNDA, evidence=2.5)), SimpleNamespace(settings={}, path=tmp_path / "detection.h5"),
                  {name: {"accuracy": 0.9} for name in SUBSETS}, found, np.zeros((8, 6)), 0.5, found["mask"], evidence)


def test_a_label_is_not_explained_by_one_that_convicts_no_more(tmp_path):
    """Reconstructed with a lower EVIDENCE than it is judged by: label 1 explained label 0, and is clean itself now."""
    assert judged(tmp_path, 10.0, 1.0, 2.5)["infected_labels"] == [1]
    assert judged(tmp_path, 10.0, 1.0, 2.3)["infected_labels"] == [0]
    assert judged(tmp_path, 2.0, 90.0, 2.3)["infected_labels"] == []         # enough beside another, but there is none


@pytest.mark.parametrize("has, keeps, decision", [(4.0, 1.66, EXPLAINED), (4.0, 1.67, INFECTED), (2.06, 1.67, INFECTED),
                                                 (2.06, 1.66, TOO_LITTLE), (2.05, 90.0, TOO_LITTLE)])
def test_a_label_beside_another_has_to_keep_some_of_its_evidence(tmp_path, has, keeps, decision):
    """With the lead, which is as large as what it has is."""
    labels = judged(tmp_path, has, keeps, 10.0)["labels"]
    assert [row["decision"] for row in labels.values()] == [decision, INFECTED] + [TOO_LITTLE] * 6
    assert labels["0"]["own"] == pytest.approx(min(has * has / SECOND_HAS, keeps / SECOND_KEEPS), abs=1e-6)
    assert "own" not in labels["1"]


def test_a_label_that_was_not_asked_has_to_have_enough_beside_another(tmp_path):
    """Its patch, preserved, transfers less, so that evidence convicts it that did not when others were asked."""
    labels = judged(tmp_path, 4.0, None, 10.0, beside=2.05)["labels"]
    assert [row["decision"] for row in labels.values()] == [EXPLAINED, INFECTED] + [TOO_LITTLE] * 6
    assert labels["0"]["own"] == pytest.approx(2.05 ** 2 / SECOND_HAS, abs=1e-6)
    assert not any("own" in row for label, row in labels.items() if label != "0")
    assert judged(tmp_path, 4.0, None, 10.0, beside=2.06)["infected_labels"] == [0, 1]
    assert judged(tmp_path, 10.0, None, 2.3, beside=0.1)["infected_labels"] == [0]       # the surest is beside none
    assert judged(tmp_path, 2.0, None, 10.0, beside=2.06)["infected_labels"] == [1]      # of little nothing is asked


def test_the_table_says_what_counts(tmp_path, capsys):
    judged(tmp_path, 4.0, 90.0, 10.0)
    printed = capsys.readouterr().out
    assert "  probe foreign colours exclusive  lead evidence      own  decision\n" in printed
    assert "ratio × √margin × (1 + (probe^1.5 − 1) × foreign × colours) × exclusive × lead\n" in printed
    assert "\ncolours: 1 − how much" in printed


def test_a_label_beside_another_is_judged_by_what_counts_beside_it(tmp_path):
    assert judged(tmp_path, 4.0, 90.0, 10.0, beside=2.05)["labels"]["0"]["decision"] == EXPLAINED
    assert judged(tmp_path, 1.2, 90.0, 10.0, beside=2.06)["infected_labels"] == [0, 1]


def test_patches_that_transfer_less_than_other_labels_do_are_more_of_a_backdoors(tmp_path):
    """What works on a clean variant is no backdoor's; how well the other labels' patches do tells what is usual."""
    found, scene = priced_patches(5), examination(replace(TNDA, evidence=2.5))
    found["asr"] = np.array([1, 1, 1, 1, 0.3])
    evidence = [{"ratio": ratio, "margin": 1.0, "probe": 2.0, "foreign": 1.0, "evidence": 2 * ratio, "beside": 2 * ratio}
                for ratio in (2.5, 4.0, 1.0, 1.0, 3.0)]
    transfers = np.array([[0, 0.1, 0, 0, 0, 0], [0.9] + [0] * 5, [0.4] * 6, [0, 0, 0, 0, 0, 0.5], [np.nan] * 6], np.float32)

    def rows(**dead):
        tuned = {name: {"accuracy": dead.get("m" + name, 0.9)} for name in SUBSETS}
        stage = SimpleNamespace(settings={}, path=tmp_path / "detection.h5")
        verdict = report(scene, stage, tuned, found, transfers, 0.5, found["mask"], evidence)
        assert verdict["labels"] == json.loads((tmp_path / "detection.json").read_text())["labels"]
        return list(verdict["labels"].values())
    assert [row["exclusive"] for row in rows()] == pytest.approx([1.35, 0.55, 1.05, 0.95, 1])     # usual: 0.45
    assert [row["lead"] for row in rows()] == pytest.approx([6.75 / 6, 1, 1, 1, 1], abs=1e-6)
    assert [row["evidence"] for row in rows()] == pytest.approx([6.75 * 6.75 / 6, 4.4, 2.1, 1.9, 6])
    assert [row["decision"] for row in rows()] == [INFECTED, TOO_LITTLE, TOO_LITTLE, TOO_LITTLE, INFECTED]  # 5.76 convict
    assert rows(m1=0.3)[1]["decision"] == INFECTED       # a model that does not classify says nothing
    assert [row["exclusive"] for row in rows(m1=0.3, m2=0.3, m3=0.3)] == [1] * 5      # nor do half of them


def test_patches_of_which_none_was_measured_are_no_ones_own():
    np.testing.assert_array_equal(exclusiveness(np.full((3, 6), np.nan)), [1, 1, 1])
    np.testing.assert_array_equal(exclusiveness(np.zeros((3, 0))), [1, 1, 1])
    np.testing.assert_allclose(exclusiveness(np.array([[0.0, 1.0], [0.0, 0.2], [np.nan] * 2])), [0.6, 1.4, 1])


def test_filters_have_a_threshold_of_their_own():
    both = replace(TNDA, filter_random_threshold=0.95)
    assert random_under(both, {"matrix": None}) == 0.95 and random_under(both, {"mask": None, "pattern": None}) == 0.6


def test_labels_whose_whole_mask_was_kept_are_not_judged():
    require_preserved({"random_threshold": 0.6}, Settings(random_threshold=0.7))
    with pytest.raises(UserError, match="RANDOM_THRESHOLD 0.6 is under the 0.9 that triggers were preserved with"):
        require_preserved({"random_threshold": 0.9}, Settings(random_threshold=0.6))
