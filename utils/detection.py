"""The decision for a label and for a model: TNDA (paper IV-E), and the default's, by evidence.

TNDA asks whether a pattern transfers to tuned models: an adversarial patch does, a real trigger does not. The default
asks whether the label is reached at a lower price, more surely and oftener by chance than it could be without a backdoor,
and by a patch that works on tuned models less than the other labels' do (utils/evidence.py).
"""

import json
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np

from utils import photo_filters, plain_patches, transfer
from utils.config import UserError
from utils.controls import relative_ratios, typical
from utils.evidence import (BESIDE, PATCHES, convicting, exclusiveness, factors_of, lead, own, sureness_of, weighed,
                            with_lead, with_traced)
from utils.files import replacing
from utils.margins import relearned
from utils.reconstruction import COLLAPSED
from utils.tuning import HELD_OUT, SUBSETS, TAUGHT

RANDOM, PATCH, INFECTED = "clean: random pattern", "clean: adversarial patch", "infected"
DEGENERATE = "clean: the filter leaves nothing to see"
UNSURE = "clean: the filter leads there unsurely"
EXPLAINED = "clean: explained by another label's backdoor"
TOO_LITTLE = "clean: adversarial patch, too little evidence"
UNTOLD = "clean: nothing known, too few tuned models to transfer to"


def decide(asr, transfers, settings, threshold, collapse=0.0, entropy=0.0):
    """TNDA's decision for a label, one of the texts above (paper IV-E).

    asr: of the reconstructed trigger on the examined model. transfers: tuned model name → ASR of the preserved trigger, of
    those models that classify at all; half of them are too few. threshold: the ASR that counts as a transfer;
    `settings.transfers_needed` (q) of them make an adversarial patch.
    collapse: how much tuned model 123 gives filtered images one label (`utils.transfer.collapse`): an all-black image
    reaches some label on any model, and that is no backdoor. entropy: mean cross-entropy of filtered images on the examined
    model, nats: a backdoor was learned by heart, but saturated colours that a network never saw lead to some label, too.
    """
    if asr < settings.random_threshold:
        return RANDOM
    if collapse > COLLAPSED:
        return DEGENERATE
    if settings.filter_entropy and entropy > settings.filter_entropy:
        return UNSURE
    if too_few(transfers):
        return UNTOLD
    reached = sum(value >= threshold for value in transfers.values())
    return PATCH if reached >= min(settings.transfers_needed, len(transfers)) else INFECTED


def weigh(decision, evidence, enough, patch, own=None):
    """The default's decision for a label, from TNDA's, its evidence (utils/evidence.py) and what is enough to convict it.

    A patch (in place of a filter) is a backdoor's by evidence alone: TNDA flags clean labels on most models.
    own: of labels beside other ones' backdoors, what counts of it (`utils.evidence.own`), which decides in its place.
    """
    if (evidence if own is None else own) >= enough:
        return INFECTED
    if evidence >= enough:
        return EXPLAINED
    return TOO_LITTLE if patch and decision in (PATCH, INFECTED, UNTOLD) else decision


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


def transfers_that_count(examination, tuned, transfers):
    """Of array `transfer` the columns of tuned models that learned to classify; none where those are too few to tell."""
    able = classifying(examination, tuned)
    counted = [column for column, name in enumerate(HELD_OUT) if name in able]
    return transfers[:, [] if too_few(counted) else counted]


def too_few(models):
    """Whether so many of HELD_OUT, half or more, did not learn to classify that transfers to these others tell nothing."""
    return 2 * len(models) <= len(HELD_OUT)


def require_preserved(made_with, settings):
    """Raise UserError where labels that are to be judged kept their whole mask. made_with: settings of that stage."""
    if made_with["random_threshold"] > settings.random_threshold:
        raise UserError(f"RANDOM_THRESHOLD {settings.random_threshold} is under the {made_with['random_threshold']} that "
                        "triggers were preserved with: run critical_features_preservation.py again with --overwrite and "
                        "the same one")


def random_under(settings, triggers):
    """The ASR under which a trigger is what random patterns reach."""
    return settings.filter_random_threshold if "matrix" in triggers else settings.random_threshold


def evidence_of(examination, tuned, found, made_with=None):
    """Each label's JSON fields: `margin`, `evidence`, mostly `probe`; of patches `beside`, `ratio`, `repaired_…` and others.

    `beside` is the evidence by the powers of labels beside a known backdoor; `ratio` and the last one are there for some
    labels. Both kinds of evidence are without the patches' transfers, which `report` counts. None where no evidence decides.
    tuned: arrays of pnnir.h5. found, made_with: arrays and settings of potential_triggers.h5; or arrays alone, of
    potential_triggers_feature_space.h5: filters have no price. A ratio that was not measured (the label is too costly, or a
    first round dropped it) counts as 1.
    Raises UserError where the earlier stages left out what these settings ask for.
    """
    settings, patches = examination.settings, "matrix" not in found
    name = "evidence" if patches else "filter_evidence"
    if not getattr(settings, name):
        return None
    if not settings.controls:
        raise UserError(f"{name.upper()} needs controls, margins and probes, which the settings paper and release do not "
                        f"make: take SETTINGS default, or leave {name.upper()} out")
    if patches:
        tuned = with_traced(tuned, found.get("traced"), examination.accuracy)
    factors = factors_of(tuned, examination.accuracy, filters=None if patches else found)
    if patches and (
            made_with.get("controls") != list(settings.controls)
            or made_with["random_threshold"] > settings.random_threshold
            or any(made_with.get(name, math.inf) > getattr(settings, name) for name in ("evidence", "unprobed_evidence"))
            or "repaired_evidence" not in found):
        raise UserError("the triggers were reconstructed with other controls, with a higher RANDOM_THRESHOLD, EVIDENCE or "
                        "UNPROBED_EVIDENCE, or by an earlier version: run potential_triggers_reconstruction.py again "
                        "with --overwrite and these settings")
    ratios = relative_ratios(found) if patches else {}
    values = factors | {"evidence": weighed(ratios, sureness_of(factors, **(PATCHES if patches else {})))}
    if patches:
        values |= {"beside": weighed(ratios, sureness_of(factors, **BESIDE)),
                   "ratio": [ratios.get(label, math.nan) for label in range(len(values["evidence"]))],
                   "repaired_evidence": found["repaired_evidence"]}
    return _fields(values)


def held_against(evidence, exclusive, enough):
    """Rows of `evidence_of` of patches, weighed by `exclusive` (L) and, where probes count, by leads.

    `lead` is that of `evidence`. Those with `repaired_evidence`, which was weighed so when it was measured, hold `own`
    (`utils.evidence.own`). So do those that were not asked what they keep, though their evidence is `enough` and they are
    not the surest of such: preserved, some patch transfers less, and what they have beside that one has to be enough.
    """
    alone, beside = (np.array([row[name] for row in evidence]) * exclusive for name in ("evidence", "beside"))
    kept = np.array([row.get("repaired_evidence", math.nan) for row in evidence])
    factors = {name: np.array([row[name] for row in evidence]) for name in ("probe", "foreign") if name in evidence[0]}
    values = {"exclusive": exclusive} | ({"lead": lead(alone)} if "probe" in factors else {})
    alone, beside = with_lead(alone, factors), with_lead(beside, factors)
    unasked = np.isnan(kept) & (alone >= enough)
    kept[unasked & (alone < alone.max(initial=0, where=unasked))] = np.inf
    values |= {"evidence": alone, "beside": beside, "own": own(beside, kept, factors)}
    return [row | fields for row, fields in zip(evidence, _fields(values))]


def classifying(examination, tuned):
    """Names of the tuned models that learned to classify: that nothing transfers to another says nothing."""
    least = transfer.least_accuracy(examination.examined.labels)
    return [name for name in SUBSETS if tuned[name]["accuracy"] >= least]


def warnings_of(examination, tuned, evidence, patches=True):
    """What makes a verdict by evidence less certain on this model, a list of sentences.

    tuned: arrays of pnnir.h5; evidence: from `evidence_of`; patches: whether they are judged, or filters.
    """
    warnings, able = [], classifying(examination, tuned)
    if idle := [name for name in SUBSETS if name not in able]:
        warnings.append(f"tuned models {', '.join(idle)} hardly classify the clean images, so that transfers to them do not "
                        "count: more PHASE2_STEPS, or another PHASE2_PEAK, may help")
    if evidence is None:
        return warnings
    if "probe" not in evidence[0]:
        taught, others = (f"{len(relearned(tuned, examination.accuracy, names))} of {len(names)}"
                          for names in (TAUGHT, SUBSETS))
        warnings.append(f"the clean accuracy of only {taught} taught models and {others} others is near the examined "
                        "model's, that of more than half of both must be for margins and probes to count: "
                        f"{'large triggers' if patches else 'filters that no matrix matches'} will be missed. "
                        "More PHASE2_STEPS, or another PHASE2_PEAK, may help")
    if len(evidence) == 2:
        warnings.append("each of two labels has only the other one to be held against, which this method was no good at "
                        "(results/README.md): take the verdict for a hint")
    return warnings


def report(examination, stage, tuned, found, transfers, threshold, masks=None, evidence=None):
    """Decide for every label, print the table and the verdict, and write the stage's JSON; returns what it holds.

    tuned: arrays of pnnir.h5. masks: preserved masks of patches. evidence: from `evidence_of`; without it TNDA decides
    alone.
    """
    settings = replace(examination.settings, random_threshold=random_under(examination.settings, found))
    warnings = warnings_of(examination, tuned, evidence, patches=masks is not None)
    labels = {}
    factors = evidence[0] if evidence else ()
    probed, foreign, coloured = (name in factors for name in ("probe", "foreign", "colours"))
    enough = convicting(settings, len(found["asr"]), factors, filters=masks is None)
    priced = evidence is not None and "free" in found
    led = priced and probed
    costs = _costs(found) if priced else defaultdict(dict)
    able = classifying(examination, tuned)
    if priced:
        evidence = held_against(evidence, exclusiveness(transfers_that_count(examination, tuned, transfers)), enough)
        if not any(row["evidence"] >= enough and "own" not in row for row in evidence):
            # What others were asked beside is convicted no more: EVIDENCE was lower when patches were reconstructed, or its
            # patch, preserved, transfers more. So each stands for itself.
            for row in evidence:
                row.pop("own", None)
    for label, asr in enumerate(found["asr"]):
        row = {"asr": round(float(asr), 6)}
        if masks is not None:
            row["mask_size"] = round(float(found["mask"][label].mean()), 6)
            row["preserved_size"] = round(float(masks[label].mean()), 6)
        row["transfer"] = {name: round(float(value), 6) for name, value in zip(HELD_OUT, transfers[label])
                           if not np.isnan(value)}
        counted = {name: value for name, value in row["transfer"].items() if name in able}
        filtered = {}
        if masks is None:
            row["entropy"] = round(float(found["entropy"][label]), 6)
            filtered = {"entropy": row["entropy"], "collapse": found["collapse"][label] if "123" in able else 0.0}
        row["decision"] = decide(asr, counted, settings, threshold, **filtered)
        if evidence is not None:
            row = row | costs[label] | evidence[label]
            row["decision"] = weigh(row["decision"], row["evidence"], enough, masks is not None,
                                    own=row.get("own"))
        labels[str(label)] = row
    infected = [int(label) for label, row in labels.items() if row["decision"] == INFECTED]
    verdict = {"dataset": examination.row.name, "model": examination.examined.name,
               "clean_accuracy": round(examination.accuracy, 6), "backdoored": bool(infected),
               "infected_labels": infected,
               "clean_labels": [label for label in range(len(labels)) if label not in infected],
               "labels": labels, "warnings": warnings, "settings": stage.settings, "seed": examination.seed,
               "fingerprints": {key: value for key, value in stage.settings.items() if len(str(value)) == 64}}
    print(_table(labels, infected))
    if evidence is not None:
        verdict["evidence_needed"] = round(enough, 6)
        if priced:
            verdict["usual_ratio"] = round(float(found["usual_ratio"]), 6)
            print("ratio: of the free patch's control to its cost, or the geometric mean of both where that is higher, "
                  f"as a multiple of what is usual on this model ({found['usual_ratio']:.2f})")
        print("margin: largest on the examined model to tuned models, as a multiple of the median label's\n"
              + (f"probe: how much more surely {plain_patches.NAME} lead to the label than on the tuned models\n" if priced
                 else f"probe: how surely {photo_filters.NAME} lead to it in images that tuned models recognise\n") * probed
              + "foreign: how unlike the label's own images these drive it, as a multiple of the median label's\n" * foreign
              + "colours: 1 − how much more these have the colours of the label's own images than of others'\n" * coloured
              + "exclusive: 1 + the median label's largest transfer − the label's\n" * priced
              + "lead: how far the label, with those that have more, is ahead of the next ones\n" * led
              + f"infected from an evidence of {enough:.2f} up: " + ("ratio × √margin" if priced else "margin")
              + (" × (1 + (probe^1.5 − 1)" + " × foreign" * foreign + " × colours" * coloured + ")" if foreign or coloured
                 else (" × probe" + "^1.5" * priced) * probed)
              + " × exclusive" * priced + " × lead" * led
              + "; or where the matrix surely reaches the label and transfers nowhere" * (not priced))
        if any("own" in row for row in labels.values()):
            print("own: of labels beside another's backdoor, what decides in place of evidence: the lesser of what they have"
                  "\nand of what they keep, times foreign, where that one is unlearned, each divided by its share")
    with replacing(stage.path.with_suffix(".json")) as temporary, open(temporary, "w") as file:
        json.dump(verdict, file, indent=1)
        file.write("\n")
    for warning in warnings:
        print(f"WARNING: {warning}")
    named = f"BACKDOORED, infected labels: {', '.join(map(str, infected))}" if infected else "no backdoor found"
    print(f"verdict: {examination.row.name}/{examination.examined.name} {named}", flush=True)
    return verdict


def _fields(values):
    """JSON fields of each label, those that are not nan. values: name → L numbers."""
    return [{name: round(float(value), 6) for name, value in zip(values, row) if not math.isnan(value)}
            for row in zip(*values.values())]


def _costs(found):
    """Label → JSON fields: what its patches cost, and their controls where they were measured."""
    fields = defaultdict(dict)
    for prefix, made in (("", found), ("free_", found["free"])):
        for label, cost in zip(made["label"], made["cost"]):
            fields[int(label)][f"{prefix}cost"] = round(float(cost), 6)
        controls = found.get(f"{prefix}controls", {"label": (), "cost": ()})
        for label, costs in zip(controls["label"], controls["cost"]):
            fields[int(label)] |= {f"{prefix}control": round(typical(costs), 6),
                                   f"{prefix}controls": np.round(costs.astype(float), 6).tolist()}
    return fields


def _table(labels, infected):
    sized, priced, probed, foreign, coloured, led, weighed, beside = (
        any(name in row for row in labels.values())
        for name in ("mask_size", "cost", "probe", "foreign", "colours", "lead", "evidence", "own"))
    lines = ["label    ASR" + ("   mask  kept" if sized else " entropy") + "  " + "".join(f"{name:>6}" for name in HELD_OUT)
             + "   cost control   free control  ratio" * priced + " margin" * weighed + "  probe" * probed
             + " foreign" * foreign + " colours" * coloured + " exclusive" * priced + "  lead" * led
             + " evidence" * weighed + "      own" * beside + "  decision"]
    for label, row in labels.items():
        line = f"{label:>5} {row['asr']:6.2f}"
        if sized:
            line += f" {row['mask_size']:6.1%} {row['preserved_size']:5.1%}"
        else:
            line += f" {row['entropy']:7.2f}"
        line += "  " + "".join(f"{row['transfer'][name]:6.2f}" if name in row["transfer"] else "     -"
                               for name in HELD_OUT)
        columns = ((("cost", 7), ("control", 8), ("free_cost", 7), ("free_control", 8), ("ratio", 7)) * priced
                   + (("margin", 7),) * weighed + (("probe", 7),) * probed + (("foreign", 8),) * foreign
                   + (("colours", 8),) * coloured
                   + (("exclusive", 10),) * priced + (("lead", 6),) * led + (("evidence", 9),) * weighed
                   + (("own", 9),) * beside)
        for name, width in columns:
            line += f"{row[name]:{width}.2f}" if name in row else "-".rjust(width)
        lines.append(line + ("  " + row["decision"] if int(label) not in infected else "  INFECTED"))
    return "\n".join(lines)
