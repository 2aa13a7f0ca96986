"""The decision for a label and for a model: TNDA (paper IV-E), and the role swap.

TNDA asks whether a pattern transfers to tuned models: an adversarial patch does, a real trigger does not. The role
swap asks what it costs to find a pattern that works on the examined model and not on tuned model 123, against the
same with the two models' roles exchanged. On a clean label both are the same problem; a backdoor makes the first
far cheaper. Each label is its own control.
"""

import json

import numpy as np

from utils import transfer
from utils.config import UserError
from utils.files import replacing
from utils.tuning import SUBSETS

HELD_OUT = SUBSETS[:-1]      # 123 was used to reconstruct, so it says nothing about transfer
RANDOM, PATCH, INFECTED = "clean: random pattern", "clean: adversarial patch", "infected"
DEGENERATE = "clean: the filter leaves nothing to see"
COLLAPSED = 0.5              # share of one label on a clean model over which a filter has erased the images
NO_CHEAPER = "clean: as costly with the models' roles swapped"


def decide(asr, transfers, settings, threshold, cost=None, swapped_cost=None, collapse=0.0):
    """A label's decision, one of the texts above.

    asr: of the reconstructed trigger on the examined model. transfers: tuned model name → ASR of the preserved
    trigger. threshold: the ASR that counts as a transfer; `settings.transfers_needed` (q) of them make an
    adversarial patch. cost, swapped_cost: final objectives of the two roles; with them the role swap decides.
    collapse: share of filtered images that tuned model 123 gives one label: an all-black image reaches some label on any
    model, and that is no backdoor.
    """
    if asr < settings.random_threshold:
        return RANDOM
    if collapse > COLLAPSED:
        return DEGENERATE
    if cost is not None:
        return INFECTED if swapped_cost >= settings.swap_ratio * cost else NO_CHEAPER
    reached = sum(value >= threshold for value in transfers.values())
    return PATCH if reached >= settings.transfers_needed else INFECTED


def measure_transfers(examination, tuned, triggers):
    """ASR of every label's trigger on each tuned model but 123: array `transfer`, labels × 6.

    tuned: arrays of pnnir.h5; triggers: arrays with `mask` and `pattern`, or `matrix`. Labels whose pattern is random
    are not measured (nan).
    """
    x, measured = examination.clean.x_measure, examination.measured
    tested = np.flatnonzero(triggers["asr"] >= examination.settings.random_threshold)
    transfers = np.full((len(triggers["asr"]), len(HELD_OUT)), np.nan, np.float32)
    for column, model in enumerate(examination.tuned_models(tuned, HELD_OUT)):
        transfers[tested, column], _ = transfer.measure(model, x, measured[tested], transfer.trigger_of(triggers, tested),
                                                        tested)
        examination.say(f"measured {len(tested)} triggers on tuned model {HELD_OUT[column]}")
    return transfers


def report(examination, stage, found, transfers, threshold, masks=None):
    """Decide for every label, print the table and the verdict, and write the stage's JSON; returns what it holds."""
    settings = examination.settings
    swapped = {int(label): float(cost) for label, cost in zip(found.get("swapped", {}).get("label", ()),
                                                              found.get("swapped", {}).get("cost", ()))}
    labels = {}
    for label, asr in enumerate(found["asr"]):
        cost = {"cost": round(float(found["cost"][label]), 6), "swapped_cost": round(swapped[label], 6)} \
            if label in swapped else {}
        row = {"asr": round(float(asr), 6)}
        if masks is not None:
            row["mask_size"] = round(float(found["mask"][label].mean()), 6)
            row["preserved_size"] = round(float(masks[label].mean()), 6)
        row["transfer"] = {name: round(float(value), 6) for name, value in zip(HELD_OUT, transfers[label])
                           if not np.isnan(value)}
        if settings.role_swap and masks is not None and asr >= settings.random_threshold and not cost:
            raise UserError(f"label {label} has no swapped reconstruction: run potential_triggers_reconstruction.py again "
                            "with --overwrite and this RANDOM_THRESHOLD")
        collapse = {"collapse": found["collapse"][label]} if masks is None else {}
        labels[str(label)] = row | cost | {"decision": decide(asr, row["transfer"], settings, threshold, **cost, **collapse)}
    infected = [int(label) for label, row in labels.items() if row["decision"] == INFECTED]
    verdict = {"dataset": examination.row.name, "model": examination.examined.name,
               "clean_accuracy": round(examination.accuracy, 6), "backdoored": bool(infected),
               "infected_labels": infected,
               "clean_labels": [label for label in range(len(labels)) if label not in infected],
               "labels": labels, "settings": stage.settings, "seed": examination.seed,
               "fingerprints": {key: value for key, value in stage.settings.items() if len(str(value)) == 64}}
    print(_table(labels, infected))
    with replacing(stage.path.with_suffix(".json")) as temporary, open(temporary, "w") as file:
        json.dump(verdict, file, indent=1)
        file.write("\n")
    named = f"BACKDOORED, infected labels: {', '.join(map(str, infected))}" if infected else "no backdoor found"
    print(f"verdict: {examination.row.name}/{examination.examined.name} {named}", flush=True)
    return verdict


def _table(labels, infected):
    sized, swapped = "mask_size" in labels["0"], any("cost" in row for row in labels.values())
    lines = ["label    ASR" + "   mask  kept" * sized + "  " + "".join(f"{name:>6}" for name in HELD_OUT)
             + "   cost  swapped ratio" * swapped + "  decision"]
    for label, row in labels.items():
        line = f"{label:>5} {row['asr']:6.2f}"
        if sized:
            line += f" {row['mask_size']:6.1%} {row['preserved_size']:5.1%}"
        line += "  " + "".join(f"{row['transfer'][name]:6.2f}" if name in row["transfer"] else "     -"
                               for name in HELD_OUT)
        if swapped and "cost" not in row:
            line += " " * 22
        elif swapped:
            line += f" {row['cost']:6.2f} {row['swapped_cost']:8.2f} {row['swapped_cost'] / row['cost']:5.2f}"
        lines.append(line + ("  " + row["decision"] if int(label) not in infected else "  INFECTED"))
    return "\n".join(lines)
