"""The decision for a label and for a model: TNDA (paper IV-E), and the comparison with controls.

TNDA asks whether a pattern transfers to tuned models: an adversarial patch does, a real trigger does not. The controls
(utils/controls.py) ask whether the pattern is cheaper than it could be without a backdoor. The default asks both.
"""

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np

from utils import transfer
from utils.config import UserError
from utils.controls import convicting, relative_ratios, typical
from utils.files import replacing
from utils.reconstruction import COLLAPSED
from utils.tuning import SUBSETS

HELD_OUT = SUBSETS[:-1]      # 123 was used to reconstruct, so it says nothing about transfer
RANDOM, PATCH, INFECTED = "clean: random pattern", "clean: adversarial patch", "infected"
DEGENERATE = "clean: the filter leaves nothing to see"
NO_CHEAPER = "clean: adversarial patch, as costly as its controls"
TOO_COSTLY = "clean: adversarial patch, too costly for a backdoor"     # so no controls were measured


def decide(asr, transfers, settings, threshold, enough=None, ratio=None, collapse=0.0):
    """A label's decision, one of the texts above.

    asr: of the reconstructed trigger on the examined model. transfers: tuned model name → ASR of the preserved
    trigger. threshold: the ASR that counts as a transfer; `settings.transfers_needed` (q) of them make an
    adversarial patch. enough: two ratios, from `utils.controls.convicting`, where controls decide, too. ratio: of the
    label's controls to its own patches, as a multiple of what is usual on the model (`utils.controls.relative_ratios`): it
    has to be the first of `enough`, and from the second up convicts whatever transfers. None: the label's patch is too
    costly to be a backdoor's.
    collapse: share of filtered images that tuned model 123 gives one label: an all-black image reaches some label on any
    model, and that is no backdoor.
    """
    if asr < settings.random_threshold:
        return RANDOM
    if collapse > COLLAPSED:
        return DEGENERATE
    if enough:
        if ratio is None:
            return TOO_COSTLY
        if ratio < enough[0]:
            return NO_CHEAPER
        if ratio >= enough[1]:
            return INFECTED
    reached = sum(value >= threshold for value in transfers.values())
    return PATCH if reached >= settings.transfers_needed else INFECTED


def measure_transfers(examination, tuned, triggers):
    """ASR of every label's trigger on each tuned model but 123: array `transfer`, labels × 6.

    tuned: arrays of pnnir.h5; triggers: arrays with `mask` and `pattern`, or `matrix`. Labels whose pattern is random
    are not measured (nan).
    """
    x, measured = examination.clean.x_measure, examination.measured
    tested = np.flatnonzero(triggers["asr"] >= random_under(examination.settings, triggers))
    transfers = np.full((len(triggers["asr"]), len(HELD_OUT)), np.nan, np.float32)
    for column, model in enumerate(examination.tuned_models(tuned, HELD_OUT)):
        transfers[tested, column], _ = transfer.measure(model, x, measured[tested], transfer.trigger_of(triggers, tested),
                                                        tested)
        examination.say(f"measured {len(tested)} triggers on tuned model {HELD_OUT[column]}")
    return transfers


def random_under(settings, triggers):
    """The ASR under which a trigger is what random patterns reach."""
    return settings.filter_random_threshold if "matrix" in triggers else settings.random_threshold


def ratios_found(found, made_with, settings):
    """Label → its relative ratio, where the reconstruction measured controls; None where no controls decide.

    found, made_with: arrays and settings of potential_triggers.h5. Raises UserError where it left out labels that these
    settings could convict.
    """
    if not settings.controls:
        return None
    if (made_with.get("controls") != list(settings.controls) or made_with["random_threshold"] > settings.random_threshold
            or made_with["control_ratio"] > settings.control_ratio):
        raise UserError("the triggers were reconstructed with other controls, or with a higher RANDOM_THRESHOLD or "
                        "CONTROL_RATIO: run potential_triggers_reconstruction.py again with --overwrite and these settings")
    return relative_ratios(found)


def report(examination, stage, found, transfers, threshold, masks=None, ratios=None):
    """Decide for every label, print the table and the verdict, and write the stage's JSON; returns what it holds.

    masks: preserved masks of patches. ratios: from `ratios_found`; without them transfers decide alone.
    """
    settings = replace(examination.settings, random_threshold=random_under(examination.settings, found))
    labels, enough, costs = {}, None, {}
    if ratios is not None:
        enough, costs = convicting(settings, len(found["asr"])), _costs(found)
    for label, asr in enumerate(found["asr"]):
        row = {"asr": round(float(asr), 6)}
        if masks is not None:
            row["mask_size"] = round(float(found["mask"][label].mean()), 6)
            row["preserved_size"] = round(float(masks[label].mean()), 6)
        row["transfer"] = {name: round(float(value), 6) for name, value in zip(HELD_OUT, transfers[label])
                           if not np.isnan(value)}
        if ratios is not None:
            row |= costs[label] | ({"ratio": round(ratios[label], 6)} if label in ratios else {})
        collapse = {"collapse": found["collapse"][label]} if masks is None else {}
        row["decision"] = decide(asr, row["transfer"], settings, threshold, enough, row.get("ratio"), **collapse)
        labels[str(label)] = row
    infected = [int(label) for label, row in labels.items() if row["decision"] == INFECTED]
    verdict = {"dataset": examination.row.name, "model": examination.examined.name,
               "clean_accuracy": round(examination.accuracy, 6), "backdoored": bool(infected),
               "infected_labels": infected,
               "clean_labels": [label for label in range(len(labels)) if label not in infected],
               "labels": labels, "settings": stage.settings, "seed": examination.seed,
               "fingerprints": {key: value for key, value in stage.settings.items() if len(str(value)) == 64}}
    print(_table(labels, infected))
    if ratios is not None:
        verdict["usual_ratio"] = round(float(found["usual_ratio"]), 6)
        print(f"ratio: of controls to cost, as a multiple of what is usual on this model ({found['usual_ratio']:.2f}); "
              f"infected from {enough[0]:.2f} up if it transfers nowhere, and from {enough[1]:.2f} up")
    with replacing(stage.path.with_suffix(".json")) as temporary, open(temporary, "w") as file:
        json.dump(verdict, file, indent=1)
        file.write("\n")
    named = f"BACKDOORED, infected labels: {', '.join(map(str, infected))}" if infected else "no backdoor found"
    print(f"verdict: {examination.row.name}/{examination.examined.name} {named}", flush=True)
    return verdict


def _costs(found):
    """Label → JSON fields: what its patches cost, and their controls where they were measured."""
    fields = defaultdict(dict)
    for prefix, own in (("", found), ("free_", found["free"])):
        for label, cost in zip(own["label"], own["cost"]):
            fields[int(label)][f"{prefix}cost"] = round(float(cost), 6)
        controls = found.get(f"{prefix}controls", {"label": (), "cost": ()})
        for label, costs in zip(controls["label"], controls["cost"]):
            fields[int(label)] |= {f"{prefix}control": round(typical(costs), 6),
                                   f"{prefix}controls": np.round(costs.astype(float), 6).tolist()}
    return fields


def _table(labels, infected):
    sized, priced = "mask_size" in labels["0"], "cost" in labels["0"]
    lines = ["label    ASR" + "   mask  kept" * sized + "  " + "".join(f"{name:>6}" for name in HELD_OUT)
             + "   cost control   free control  ratio" * priced + "  decision"]
    for label, row in labels.items():
        line = f"{label:>5} {row['asr']:6.2f}"
        if sized:
            line += f" {row['mask_size']:6.1%} {row['preserved_size']:5.1%}"
        line += "  " + "".join(f"{row['transfer'][name]:6.2f}" if name in row["transfer"] else "     -"
                               for name in HELD_OUT)
        if priced:
            line += "".join(f"{row[name]:{width}.2f}" if name in row else "-".rjust(width) for name, width in
                            (("cost", 7), ("control", 8), ("free_cost", 7), ("free_control", 8), ("ratio", 7)))
        lines.append(line + ("  " + row["decision"] if int(label) not in infected else "  INFECTED"))
    return "\n".join(lines)
