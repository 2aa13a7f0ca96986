"""What labels owe to another label's backdoor: the examined model repaired of it (after the paper's removal).

A network uses the features of its backdoor for other labels, too: their patches are cheap then, and hardly transfer, as if
they had triggers of their own. Where evidence convicts a label and others come near, the patches of the surest are
unlearned, and the others are measured again on what is left: evidence that a label keeps is mostly its own
(`utils.evidence.own`). Of labels that are about as sure the one whose patch transfers least for its evidence is taken,
after TNDA: unlearning either mostly clears the other.
"""

from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from utils import plain_patches, traced_patches, transfer, triggers
from utils.controls import cheapest_first, cheapest_of_starts, lend_price, ratios_of, relative_ratios, spread_of, usual
from utils.detection import measure_transfers, transfers_that_count
from utils.evidence import (BESIDE, KEPT, MOST_EXCLUSIVE, PATCHES, convicting, exclusiveness, factors_of, own,
                            search_plain_patches, sureness_of, trace_again, weighed, with_lead, with_traced)
from utils.examination import classifier, set_weights, weights_of
from utils.margins import margin_meter
from utils.reconstruction import PatchTrigger, Reconstructor
from utils.tuning import Trainer, reset_random_layers

RATE, BATCH = 3e-5, 100  # the removal of the paper takes 1e-4 and 2000 steps: that harms a second backdoor as well
CARRYING = 0.5           # share of the images that carry a patch (paper: a tenth): fewer steps are enough
TIED = 2                 # times as much evidence, within which transfer tells which label is the backdoor's
FAINT = 0.05             # of transfers: ASRs of a few images in a hundred differ by luck, and evidence tells then
# Share of what convicts, alone or beside another backdoor, from which on labels are asked what they keep: preserved, the
# patches, by whose transfers detection counts, transfer a little less.
NEARLY = 0.9


def repaired_evidence(examination, tuned, made_with, models, arrays, stage, labels_at_once=None):
    """The evidence, with leads, that labels keep where the surer ones' patches are unlearned, L; nan where none was asked.

    tuned, made_with: arrays, from `with_traced`, and settings of pnnir.h5; models: by name, from `examination.models`;
    arrays: from `utils.controls.measure_controls`, and `traced`. The surest label that evidence convicts, or of those TIED
    with it the one of the most evidence to its transfer, is taken to be a backdoor's, as is, on the model repaired of all
    those so far, the next one that has and keeps enough.
    """
    settings = examination.settings
    factors, ratios = factors_of(tuned, examination.accuracy), relative_ratios(arrays)
    alone, beside = (weighed(ratios, sureness_of(factors, **powers)) for powers in (PATCHES, BESIDE))
    enough = convicting(settings, len(alone), factors)
    kept, known = np.full(len(alone), np.nan, np.float32), []
    # As if the surest were the most exclusive, and by as much more so than the next.
    if not settings.repair_steps or MOST_EXCLUSIVE ** 2 * with_lead(alone, factors).max() < enough:
        return kept
    transfers = stage.part("transfers", lambda: {"transfer": measure_transfers(examination, tuned, arrays)})["transfer"]
    transfers = transfers_that_count(examination, tuned, transfers)
    exclusive, mean = exclusiveness(transfers), np.full(len(transfers), np.inf)
    if transfers.shape[1]:
        mean = np.nan_to_num(transfers.mean(axis=1), nan=np.inf)        # random patterns are no backdoor's
    evidence, beside = (with_lead(exclusive * each, factors) for each in (alone, beside))
    asked = np.flatnonzero(np.maximum(evidence, own(beside, np.inf, factors)) >= NEARLY * enough).tolist()
    suspects = _surest_first(asked, evidence)
    while len(suspects) > 1 and evidence[suspects[0]] >= enough:
        tied = [label for label in suspects if evidence[label] >= max(enough, evidence[suspects[0]] / TIED)]
        known.append(max(tied, key=lambda label: evidence[label] / (mean[label] + FAINT)))
        others = [label for label in suspects if label != known[-1]]
        left = exclusive * _evidence_without(known, others, examination, tuned, made_with, models, arrays, stage,
                                             labels_at_once)
        left[known] = 0                                  # what is known hides no lead
        left = with_lead(left, factors)
        kept[others] = left[others]
        evidence = own(beside, left, factors)
        suspects = _surest_first((label for label in others if evidence[label] >= NEARLY * enough), evidence)
    return kept


def _surest_first(labels, evidence):
    return sorted(labels, key=lambda label: -evidence[label])


def _evidence_without(known, others, examination, tuned, made_with, models, arrays, stage, labels_at_once):
    """Evidence on the model repaired of the labels `known`, L; factors count by the powers of KEPT."""
    name = f"repaired-{len(known)}-{known[-1]}"         # `known` only grows, so these two tell it apart
    network = keras.models.clone_model(examination.examined.network)
    model = classifier(network, examination.examined.preprocess)

    def repair():
        examination.say(f"unlearning the patches of {', '.join(map(str, known))}, to see what "
                        f"{', '.join(map(str, others))} keep")
        network.set_weights(examination.examined.network.get_weights())
        unlearn(network, _patches(known, arrays, tuned), examination, made_with["distillation"])
        accuracy = transfer.accuracy(model, examination.clean.x_measure, examination.clean.y_measure)
        examination.say(f"clean accuracy {accuracy:.1%} without them")
        margins = margin_meter(examination, model, made_with["margin_starts"])()
        return {"weights": weights_of(network), "accuracy": accuracy} | margins
    repaired = stage.part(name, repair)
    set_weights(network, repaired["weights"])
    if made_with["probes"]:
        # Those of the examined model are tried again: what still works is not found worse for another search.
        repaired |= search_plain_patches(examination, network, model, tuned, made_with["probes"], stage, f"{name}-probes",
                                         known=tuned["examined"]["probes"])

    controls = arrays["free_controls"]
    spread = spread_of(cheapest_first(controls["label"], arrays["free"]))
    labels = np.union1d(spread, np.intersect1d(others, controls["label"])).astype(int)
    reconstruct, reconstruct_free = (
        Reconstructor(PatchTrigger, examination, models | {name: model}, pair, stage, labels_at_once)
        for pair in (f"{name}/123", name))
    paired, free = reconstruct(labels), reconstruct_free(labels)
    lend_price(free, paired, examination.settings)
    cheapest_of_starts(free, labels, reconstruct_free, examination.settings)
    measured = {"free": free, "free_controls": _rows(controls, labels),
                "usual_ratio": usual(ratios_of(free, _rows(controls, spread)).values())}
    if "controls" in arrays:
        measured["controls"] = _rows(arrays["controls"], others)
        cheapest_of_starts(paired, measured["controls"]["label"], reconstruct, examination.settings)
    left = tuned | {"examined": repaired}
    if "traced" in arrays:
        left = with_traced(left, trace_again(examination, network, model, arrays["traced"]), examination.accuracy)
    sureness = sureness_of(factors_of(left, examination.accuracy), **KEPT)
    return weighed(relative_ratios(paired | measured), sureness)


def _rows(controls, labels):
    """Those of the labels, of arrays with a row for each `label`."""
    return {name: array[np.isin(controls["label"], labels)] for name, array in controls.items()}


def _patches(known, arrays, tuned):
    """(masks K×H×W, patterns K×H×W×C) of labels: both kinds of reconstructed ones, plain ones, and traced that count."""
    made = [[patches[name][np.isin(patches["label"], known)] for name in ("mask", "pattern")]
            for patches in (arrays, arrays["free"])]
    if "probes" in tuned["examined"]:
        made.append(plain_patches.rendered(tuned["examined"]["probes"][known].ravel(), arrays["pattern"].shape[1:]))
    if "traced" in tuned["examined"]:
        counted = np.array(known)[tuned["examined"]["traced"][known]]
        made.append(traced_patches.rendered(arrays["traced"]["patches"][counted].ravel()))
    return tuple(map(np.concatenate, zip(*made)))


def unlearn(network, patches, examination, distillation):
    """Train the network, in place, to give images that carry one of the patches their own label (paper: removal).

    patches: masks K×H×W and patterns K×H×W×C in [0, 1]. `settings.repair_steps` steps on the images to tune on.
    distillation: weight, beside the labels, of the examined model's logits of the images without a patch.
    """
    masks, patterns = (tf.constant(part, tf.float32) for part in patches)

    def attached(batch, step, seed):
        key = tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)])
        which = tf.random.stateless_uniform((BATCH,), key + 6_000_011, 0, len(masks), tf.int32)
        carrying = tf.random.stateless_uniform((BATCH, 1, 1, 1), key + 7_000_003) < CARRYING
        mask = tf.gather(masks, which)[..., None] * tf.cast(carrying, tf.float32)
        return examination.examined.preprocess(
            triggers.attach(tf.cast(batch, tf.float32) / 255.0, mask, tf.gather(patterns, which)))
    clean, settings, seed = examination.clean, examination.settings, examination.seed
    taught = transfer.logits_of(examination.model, clean.x_tune) if distillation else None
    reset_random_layers(network, seed)
    Trainer(network, [layer for layer in network.layers if layer.weights], attached, [examination.x_tune],
            clean.y_tune, replace(settings, learning_rate=RATE, batch=BATCH), taught=taught).train(
                settings.repair_steps, seed, distillation=distillation)
