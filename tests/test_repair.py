"""Which labels are measured again on which repaired model, and that a trigger is unlearned."""

from dataclasses import replace
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from utils import controls, detection, repair
from utils.datasets import Settings
from utils.evidence import PATCHES
from utils.plain_patches import draw
from utils.tuning import HELD_OUT, TAUGHT


@pytest.fixture
def convicted(monkeypatch):
    """The evidence that labels keep, given what they have and what they have on each repaired model.

    Usual labels, of evidence 1, make them up to twelve, three of which may lead.
    """
    def filled(values, usual):
        return np.array([*values, *[usual] * (12 - len(values))], float)

    def kept(evidence, without, transfers=(), idle=0, asked=None, usual=0.0, beside=None, **settings):
        monkeypatch.setattr(repair, "weighed",
                            lambda ratios, powers: filled(evidence if powers == PATCHES else beside or evidence, 1.0))
        monkeypatch.setattr(repair, "relative_ratios", lambda arrays: {})
        monkeypatch.setattr(repair, "factors_of", lambda tuned, accuracy: {"probe": None, "foreign": np.ones(12)})
        monkeypatch.setattr(repair, "sureness_of", lambda factors, **powers: powers)
        monkeypatch.setattr(repair, "_evidence_without", lambda known, others, *_: filled(without[tuple(known)], 1.0))
        monkeypatch.setattr(repair, "measure_transfers", asked or (lambda examination, tuned, arrays: np.tile(
            filled(transfers, usual), (6, 1)).T * (np.arange(6) >= idle) + np.eye(12)[0][:, None] * (np.arange(6) < idle)))
        monkeypatch.setattr(detection, "classifying", lambda examination, tuned: HELD_OUT[idle:])
        settings = replace(Settings(), **{"evidence": 12 / np.log(12), "repair_steps": 5} | settings)
        found = repair.repaired_evidence(SimpleNamespace(settings=settings, accuracy=1.0), {}, {}, {}, {}, stage)
        assert np.isnan(found[len(evidence):]).all()
        return found[:len(evidence)]
    stage = SimpleNamespace(part=lambda key, compute: compute())
    return kept


# 12 convict alone, 8.82 beside another, where 3.48 have to be kept.
def test_one_label_or_none_is_not_measured_again(convicted):
    for evidence in ([1.0, 3.4, 0.5], [1.0, 9.0, 2.5]):
        np.testing.assert_array_equal(convicted(evidence, {}), [np.nan] * 3)
    # Nearly enough, 8.12 of 8.82: preserved, the patch may transfer less. It keeps 1.5, and leads by as much then.
    np.testing.assert_allclose(convicted([1.0, 9.0, 2.85], {(1,): [1.0, 9.0, 1.5]}), [np.nan, np.nan, 2.25])


def test_labels_are_measured_on_the_model_without_the_surer_ones(convicted):
    nan = np.nan
    np.testing.assert_array_equal(convicted([5.0, 1.0, 9.0], {(2,): [1.5, 1.0, 9.0]}), [2.25, nan, nan])
    # 3 and 0 outlast 2, and 3 most, so that it counts as a backdoor of its own, which 0 has to outlast as well. 1 does not.
    found = convicted([30.0, 30.0, 45.0, 30.0], {(2,): [2.4, 1.2, 9, 2.6], (2, 3): [0.3, 9, 9, 9]})
    np.testing.assert_allclose(found, [0.3, 1.2 * 1.2, nan, 2.6 * 2.4 / 1.2], rtol=1e-6)


def test_what_a_label_has_and_keeps_makes_it_a_backdoor_of_its_own(convicted):
    """3 keeps most, but of little; 0 had more, so it is unlearned next and 3 asked again; 1 keeps too little."""
    found = convicted([40.0, 12.0, 60.0, 11.0], {(2,): [3.0, 1.0, 9, 6.0], (2, 0): [9, 9, 9, 4.0]})
    np.testing.assert_allclose(found, [9.0, 1.0, np.nan, 16.0], rtol=1e-6)


def test_what_convicts_alone_is_asked_as_well(convicted):
    """0 would be convicted alone, but has too little beside 2, for which nothing that it keeps makes up."""
    nan = np.nan
    found = convicted([20.0, 2.0, 60.0], {(2,): [1.5, 1.0, 9.0]}, beside=[2.0, 2.0, 20.0])
    np.testing.assert_allclose(found, [2.25, nan, nan])
    found = convicted([20.0, 20.0, 60.0], {(2,): [9.0, 3.0, 9.0]}, beside=[2.0, 8.0, 20.0])    # and 1 enough
    np.testing.assert_allclose(found, [27.0, 9.0, nan])


def test_of_labels_about_as_sure_the_one_that_transfers_least_is_the_backdoors(convicted):
    nan = np.nan
    without = {(2,): [1.5, 1.0, 9.0], (0,): [9.0, 1.0, 2.0]}

    def keep(evidence, transfers, left, **idle):
        np.testing.assert_allclose(convicted(evidence, without, transfers, **idle), left, rtol=1e-6)
    keep([5.0, 1.0, 9.0], [0.01, 0.0, 0.2], [nan, nan, (2.0 * 0.8) ** 2])   # transfers are evidence as well
    keep([5.0, 1.0, 9.0], [0.2, 0.0, 0.2], [(1.5 * 0.8) ** 2, nan, nan])
    # Hardly any transfer is as good as none.
    keep([5.0, 1.0, 9.0], [0.0, 0.0, 0.02], [2.25, nan, nan])
    keep([5.0, 1.0, 9.0], [0.0, 0.0, 0.06], [nan, nan, (2.0 * 0.94) ** 2])
    # Transfers do not tell for a label that is far less sure, nor where the pattern is random.
    keep([3.5, 1.0, 9.0], [0.0, 0.0, 0.2], [2.25, nan, nan])
    keep([5.0, 1.0, 9.0], [nan, nan, 0.2], [2.25, nan, nan])
    keep([5.0, 1.0, 9.0], [nan] * 12, [2.25, nan, nan])
    # Models that do not classify give all images label 0, whose patch seems to transfer to them; half of them are too many.
    keep([5.0, 1.0, 9.0], [0.01, 0.0, 0.2], [nan, nan, (2.0 * 0.8) ** 2], idle=2)
    keep([5.0, 1.0, 9.0], [0.01, 0.0, 0.2], [2.25, nan, nan], idle=3)


def test_transfers_make_a_suspect_and_clear_one(convicted):
    nan = np.nan
    np.testing.assert_array_equal(convicted([9.0, 1.0, 3.0], {}, [0.1, 0.1, 0.5]), [nan] * 3)
    found = convicted([9.0, 1.0, 2.5], {(0,): [1.0, 1.0, 1.5]}, [0.4, 0.4, 0.0], usual=0.4)
    np.testing.assert_allclose(found, [nan, nan, (1.5 * 1.4) ** 2], rtol=1e-6)


def test_nothing_is_measured_where_no_label_could_be_convicted(convicted):
    def measured(*_):
        raise AssertionError("transfers were measured")
    np.testing.assert_array_equal(convicted([1.0, 1.7, 0.9], {}, asked=measured), [np.nan] * 3)
    with pytest.raises(AssertionError, match="transfers were measured"):
        convicted([1.0, 1.8, 0.9], {}, asked=measured)


def test_only_what_is_convicted_explains_others(convicted):
    """Label 2, nearly convicted, transfers least of the three, but 1 is unlearned, and 2 has to outlast it."""
    nan = np.nan
    found = convicted([12.0, 9.0, 3.4], {(1,): [3.0, 9.0, 0.4]}, [0.2, 0.1, 0.0])
    np.testing.assert_allclose(found, [(3.0 * 0.8) ** 2, nan, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(convicted([3.4, 3.4, 3.4], {}), [nan] * 3)


def test_no_steps_no_repair(convicted):
    np.testing.assert_array_equal(convicted([5.0, 1.0, 9.0], {}, repair_steps=0), [np.nan] * 3)


def test_evidence_on_a_repaired_model_is_against_what_is_usual_on_it(monkeypatch):
    """Free patches cost 2 on the repaired model, those of label 1 a half, their controls 4; the second start costs more.

    Patches proper cost twice that.
    """
    asked = []

    class Made:
        def __init__(self, kind, examination, models, pair, stage, chunk=None):
            self.proper = pair.endswith("/123")
            assert pair.split("/")[0] in models

        def __call__(self, labels, restart=0):
            labels = list(labels)
            asked.append((self.proper, labels, restart))
            assert labels, "there is nothing to optimize"
            cost = np.where(np.array(labels) == 1, 0.5, 2.0) * (1 + self.proper) + restart
            return {"label": np.array(labels), "cost": cost, "entropy": cost / 2, "asr": np.ones(len(cost))}
    parts = {}

    def part(key, compute):
        return parts.setdefault(key, compute())
    monkeypatch.setattr(repair, "Reconstructor", Made)
    monkeypatch.setattr(controls, "SPREAD", 3)
    network = keras.Sequential([keras.Input((2, 2, 3)), keras.layers.Flatten(), keras.layers.Dense(5)])
    network = keras.Model(network.inputs, network.outputs)
    random = np.random.default_rng(0)
    clean = SimpleNamespace(x_tune=random.integers(0, 256, (10, 2, 2, 3), np.uint8), y_tune=np.arange(10) % 5,
                            x_measure=random.integers(0, 256, (10, 2, 2, 3), np.uint8), y_measure=np.arange(10) % 5)
    examined = SimpleNamespace(network=network, preprocess=lambda images: images, shape=(2, 2, 3), labels=5)
    examination = SimpleNamespace(examined=examined, clean=clean, x_tune=tf.constant(clean.x_tune), accuracy=0.9, seed=0,
                                  measured=np.zeros((5, 4), int),
                                  say=lambda text: None, model=network,
                                  settings=replace(Settings(), evidence=1.0, repair_steps=1, restarts=1),
                                  tuned_models=lambda tuned, names: (tf.function(network) for _ in names))
    tuned = {"examined": {"probes": np.array([[draw(random, (2, 2, 3)) for _ in range(3)] for _ in range(5)])}, "1": {},
             **{name: {"accuracy": 0.9} for name in TAUGHT}}
    measured_with = {"margin_starts": 1, "probes": 7, "distillation": 0.0}

    def factors(tuned, accuracy):
        assert all(margins.shape == (5,) for margins in tuned["examined"]["probe_margins"].values())
        assert list(tuned["examined"]["probe_margins"]) == ["examined", *TAUGHT]
        assert tuned["examined"]["largest_margins"].shape == tuned["examined"]["likeness"].shape == (5,)
        assert tuned["examined"]["own_colours"].shape == (5,)
        return {"margin": np.array([1.0, 2.0, 1.0, 3.0, 1.0]), "probe": np.array([1.0, 1.0, 1.0, 8.0, 1.0])}
    monkeypatch.setattr(repair, "factors_of", factors)
    search = repair.search_plain_patches

    def search_again(*given, known):
        np.testing.assert_array_equal(known, tuned["examined"]["probes"])
        return search(*given, known=known)
    monkeypatch.setattr(repair, "search_plain_patches", search_again)
    own = {"label": np.arange(5), "cost": np.array([5.0, 4.0, 1.0, 2.0, 3.0]), "mask": np.ones((5, 2, 2)),
           "pattern": np.ones((5, 2, 2, 3))}
    arrays = own | {"free": own, "free_controls": {"label": np.array([4, 0, 1, 2]), "cost": np.full((4, 1), 4.0)}}
    found = repair._evidence_without([2], [1, 3], examination, tuned, measured_with, {}, arrays,
                                     SimpleNamespace(part=part), None)
    # The spread of the labels with controls are 2, 1 or 4, and 0; ratios are 2, of label 1 it is 8, so 2 is usual.
    np.testing.assert_allclose(found[[0, 1, 2]], [1, 4 * 2, 1])
    # No controls: by its sureness alone, in which a probe of 8 counts as 4 beside a known backdoor.
    assert found[3] == pytest.approx(3 * 4)
    assert [(proper, number) for proper, _, number in asked] == [(True, 0), (False, 0), (False, 1)]
    assert asked[0][1] == asked[1][1] == asked[2][1]
    assert {key.split("-probes-")[0] for key in parts} == {"repaired-1-2"}
    # Controls of the patch proper, whose second start costs more: 64 times 1, so that both are √(8 · 64) / 2.
    asked.clear()
    priced = arrays | {"controls": {"label": np.array([1, 2]), "cost": np.full((2, 1), 64.0)}}
    found = repair._evidence_without([2], [1, 3], examination, tuned, measured_with, {}, priced,
                                     SimpleNamespace(part=part), None)
    assert found[1] == pytest.approx(np.sqrt(8 * 64) / 2 * 2) and found[2] == 1
    assert (True, [1], 1) in asked
    # A label without controls, alone: what is usual is measured all the same.
    assert repair._evidence_without([2], [3], examination, tuned, measured_with, {}, priced,
                                    SimpleNamespace(part=part), None)[3] == pytest.approx(3 * 4)


def test_a_trigger_is_unlearned_and_the_labels_are_kept():
    """Labels are the brightness of an image's right half; a white pixel in the corner leads to label 1."""
    random = np.random.default_rng(0)
    images = random.integers(40, 90, (200, 6, 6, 1)).astype(np.uint8)
    labels = np.arange(200) % 2
    images[labels == 1, :, 3:] += 80
    triggered = images.copy()
    triggered[:, :2, :2] = 255
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 1))
    x = keras.layers.Dense(16, activation="relu")(keras.layers.Flatten()(inputs))
    network = keras.Model(inputs, keras.layers.Dense(2)(x))
    network.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(np.concatenate([images, triggered]) / 255.0, np.concatenate([labels, np.ones(200, int)]), epochs=60,
                verbose=0)

    def share(images, label):
        return (network.predict(images / 255.0, verbose=0).argmax(1) == label).mean()
    assert share(triggered, 1) > 0.95 and share(images, labels) > 0.95
    mask = np.zeros((1, 6, 6), np.float32)
    mask[:, :2, :2] = 1
    clean = SimpleNamespace(x_tune=images, y_tune=labels)
    examination = SimpleNamespace(clean=clean, x_tune=tf.constant(images), seed=0,
                                  settings=replace(Settings(), repair_steps=5000),
                                  examined=SimpleNamespace(preprocess=tf.identity), model=tf.function(network))
    learned, before, moved = network.get_weights(), network.predict(images / 255.0, verbose=0), []
    for distillation in (0.0, 100.0):
        network.set_weights(learned)
        repair.unlearn(network, (mask, np.ones((1, 6, 6, 1), np.float32)), examination, distillation)
        assert share(triggered[labels == 0], 1) < 0.1
        assert share(images, labels) > 0.95
        moved.append(np.ptp(network.predict(images / 255.0, verbose=0) - before, axis=1).mean())   # but for a constant
    assert moved[1] < moved[0], "distillation holds on to the logits of images without the trigger"
