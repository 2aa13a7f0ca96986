"""What a label's patch would cost were there no backdoor: its controls (not in the paper).

The patch of a label is effective on the examined model and not on tuned model 123. The same is asked of other pairs of
models that are as alike as those two, the first of which has no backdoor: two tuned models, or the same two with their
roles swapped. On a clean label all of these are the same problem. A backdoor makes the first far cheaper: each label is
its own control. The free patch of a label is made without L_clean, and its controls on tuned models alone: what little a
tuned model still answers to, L_clean forbids the first patch, the patch proper. Both err, and mostly apart. What training
the tuned models does to all labels alike is in the ratio of every label, so it is held against what is usual on the model.
"""

import functools

import numpy as np

from utils.reconstruction import PatchTrigger, Reconstructor

OWN, FREE = "examined/123", "examined"
GROUP = 6                # labels measured together
SPREAD = 12              # labels, evenly from the cheapest to the costliest, that tell what is usual
USUAL = (1.0, 2.5)       # the least and most that counts as usual: several targets in one model must not hide each other
PRICE = ("cost", "entropy")
LEAST = 1e-6             # that a patch counts as costing: without a price of pixels one may cost nothing
REACH = 2.0              # labels whose free patch, by this many times, could not convict them get no further controls


def measure_controls(examination, models, arrays, needed, stage, labels_at_once=None):
    """The patches with restarts of the suspicious labels, the free patches, and what the controls of both cost.

    models: by name, from `examination.models`; arrays: of the patches, labels × …; needed: L, from `ratios_needed`. Free
    patches are made for every label that is not dropped; controls of these for labels SPREAD over the order of their cost,
    and for others until what is left could not be convicted at the highest control measured. Labels whose ratio of these,
    times REACH, at least convicts them are suspicious: they get controls of the patch proper, too. A label that has controls
    is started again `settings.restarts` times and keeps its cheapest patch that is not random: found once is found. The
    first patch proper is a free patch as well, so that its price counts for that one where it is lower. Labels whose pattern
    is random, or that a first round dropped, are not suspicious.
    Returns arrays as those given, and `free` (as the patches, rows of `label`), `free_controls` and `controls`: each with
    `label` K, and `cost`, `entropy`, `asr` K×models; and `usual_ratio`.
    """
    settings = examination.settings
    made = {}

    def reconstruct(pair, labels, restart=0):
        if pair not in made:
            made[pair] = Reconstructor(PatchTrigger, examination, models, pair, stage, labels_at_once, most=GROUP)
        return made[pair](labels, restart)

    def measure(own, pair, controls, labels):
        """Keep the cheapest starts of `own` (rows by label) and return the controls of `labels`."""
        labels = np.sort(labels)
        cheapest_of_starts(own, labels, functools.partial(reconstruct, pair), settings)
        found = [reconstruct(control, labels) for control in controls]
        return {"label": labels} | {name: np.stack([one[name] for one in found], axis=1)
                                    for name in ("cost", "entropy", "asr")}

    arrays = {name: array.copy() for name, array in arrays.items()}
    kept = np.flatnonzero(~arrays["dropped"]) if "dropped" in arrays else np.arange(len(arrays["cost"]))
    hopeful = arrays["asr"] >= settings.random_threshold
    free = Reconstructor(PatchTrigger, examination, models, FREE, stage, labels_at_once)(kept)
    pairs, alone = pairs_of(settings.controls)
    lend_price(free, arrays, settings)

    order = cheapest_first(kept, free)
    spread = spread_of(order)
    groups = [measure(free, FREE, alone, spread)]
    usual_ratio = usual(ratios_of(free, groups[0]).values())
    # What controls would have to cost, by the free patch as it is by now; nothing, where the other factors would do.
    least = dict(zip(kept, free["cost"] * usual_ratio * np.where(needed > 1, needed, 0.0)[kept]))
    others = sorted((label for label in order if hopeful[label] and label not in spread), key=least.get)
    for group in (others[first:first + GROUP] for first in range(0, len(others), GROUP)):
        if least[group[0]] > max(typical(costs) for one in groups for costs in one["cost"]):
            break
        groups.append(measure(free, FREE, alone, group))
    arrays |= {"free": free, "usual_ratio": np.float32(usual_ratio),
               "free_controls": {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}}
    suspects = [label for label, ratio in ratios_of(free, arrays["free_controls"]).items()
                if hopeful[label] and REACH * ratio >= needed[label] * usual_ratio]
    if suspects:
        arrays["controls"] = measure(arrays, OWN, pairs, np.array(suspects))
    return arrays


def cheapest_first(labels, free):
    """`labels` in the order of what their free patches cost. free: arrays, a row for each `label`."""
    return labels[np.argsort(free["cost"][np.searchsorted(free["label"], labels)], kind="stable")]


def spread_of(order):
    """SPREAD labels, evenly from the first to the last of `order`."""
    return order[np.unique(np.linspace(0, len(order) - 1, SPREAD).round().astype(int))]


def cheapest_of_starts(own, labels, reconstruct, settings):
    """Start the patches of `labels` again, `settings.restarts` times, and keep in `own` the cheapest that is not random.

    own: arrays, a row for each `label`. reconstruct: from labels and the number of the start to such arrays.
    """
    for restart in range(1, settings.restarts + 1) if len(labels) else ():
        keep_cheaper(own, labels, reconstruct(labels, restart), settings)


def keep_cheaper(own, labels, found, settings, names=None):
    """Put into `own` (rows by `label`) those of `found` (a row for each of `labels`) that are cheaper and not random.

    names: of the arrays that are put there; none: all.
    """
    rows = np.searchsorted(own["label"], labels)
    cheaper = (found["asr"] >= settings.random_threshold) & (found["cost"] < own["cost"][rows])
    for name in names or found:
        own[name][rows[cheaper]] = found[name][cheaper]


def lend_price(free, proper, settings):
    """Let the price of the patch proper be the free patch's where it is lower, since it is one as well. Rows by `label`."""
    rows = np.searchsorted(proper["label"], free["label"])
    keep_cheaper(free, free["label"], {name: proper[name][rows] for name in (*PRICE, "asr")}, settings, PRICE)


def pairs_of(controls):
    """(controls of patches, controls of free patches): pairs of models, and models alone."""
    return [name for name in controls if "/" in name], [name for name in controls if "/" not in name]


def typical(costs):
    """The geometric mean of a label's controls: what its patch would cost without a backdoor."""
    return float(np.exp(np.mean(np.log(np.maximum(costs, LEAST)))))


def ratios_of(own, controls):
    """Label → what its controls cost typically, as a multiple of its patch. own: arrays, a row for each `label`."""
    rows = np.searchsorted(own["label"], controls["label"])
    return {int(label): typical(costs) / max(float(cost), LEAST)
            for label, costs, cost in zip(controls["label"], controls["cost"], own["cost"][rows])}


def usual(ratios):
    """The median of `ratios`, within USUAL: up to half of the labels may be infected."""
    return float(np.clip(np.median(list(ratios)), *USUAL))


def relative_ratios(arrays):
    """Label → its ratio as a multiple of what is usual, from what `measure_controls` returned.

    That of the free patch, or its geometric mean with that of the patch proper where it was measured and is higher: it finds
    what the free patch misses, but of large triggers, which no price tells of, it is as often the lower one.
    """
    proper = ratios_of(arrays, arrays["controls"]) if "controls" in arrays else {}
    return {label: float(np.sqrt(ratio * max(ratio, proper.get(label, 0.0))) / arrays["usual_ratio"])
            for label, ratio in ratios_of(arrays["free"], arrays["free_controls"]).items()}
