"""What a label's patch would cost were there no backdoor: its controls (not in the paper).

The patch of a label is effective on the examined model and not on tuned model 123. The same is asked of other pairs of
models that are as alike as those two, the first of which has no backdoor: two tuned models, or the same two with their
roles swapped. On a clean label all of these are the same problem. A backdoor makes the first far cheaper: each label is
its own control. What the tuned models' training does to all labels alike, as when random erasing hardens them against any
patch, is in the ratio of every label, so a label's ratio is held against what is usual on the model.
"""

import numpy as np

from utils.reconstruction import PatchTrigger, Reconstructor

GROUP = 8                # labels measured together
USUAL = (1.0, 2.5)       # the least and most that counts as usual: several targets in one model must not hide each other


def measure_controls(examination, models, arrays, stage, labels_at_once=None):
    """The patches, with restarts of the cheapest, and under `controls` what the controls of these cost.

    models: by name, from `examination.models`; arrays: of the patches, labels × …. Labels come in the order of their
    patch's cost, until that times the ratio that convicts (`settings.control_ratio` times what is `usual` so far) is more
    than any control measured: labels from there on cannot be infected unless their controls cost more than all the others'
    or their further starts less than their first. Labels whose pattern is random, or that a first round dropped, have
    none. A label that has controls is started again `settings.restarts` times and keeps its cheapest patch that is not
    random: found once is found.
    Returns arrays as those given, and `controls`: `label` L, and `cost`, `entropy`, `asr` L×pairs in the order of
    `settings.controls`.
    """
    settings = examination.settings
    chunk = min(GROUP, labels_at_once or GROUP)
    again = [Reconstructor(PatchTrigger, examination, models, "examined/123", stage, chunk, restart)
             for restart in range(1, settings.restarts + 1)]
    reconstructors = [Reconstructor(PatchTrigger, examination, models, pair, stage, chunk) for pair in settings.controls]
    arrays = {name: array.copy() for name, array in arrays.items()}
    order = np.argsort(arrays["cost"], kind="stable")
    hopeful = (arrays["asr"] >= settings.random_threshold) & ~arrays.get("dropped", np.zeros(len(order), bool))
    order = order[hopeful[order]]
    groups, controls, highest = [], [], np.inf
    for group in (order[first:first + GROUP] for first in range(0, len(order), GROUP)):
        if arrays["cost"][group[0]] * settings.control_ratio * usual(arrays, controls) > highest:
            break
        group = np.sort(group)
        for restarted in (reconstructor(group) for reconstructor in again):
            reaches = restarted["asr"] >= settings.random_threshold
            cheaper = reaches & (restarted["cost"] < arrays["cost"][group])
            for name, array in restarted.items():
                arrays[name][group[cheaper]] = array[cheaper]
        found = [reconstructor(group) for reconstructor in reconstructors]
        groups.append({"label": group} | {name: np.stack([one[name] for one in found], axis=1)
                                                   for name in ("cost", "entropy", "asr")})
        controls += map(typical, groups[-1]["cost"])
        highest = max(controls)
    if groups:
        arrays["controls"] = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    return arrays


def typical(costs):
    """The geometric mean of a label's controls: what its patch would cost without a backdoor."""
    return float(np.exp(np.mean(np.log(costs))))


def usual(arrays, controls):
    """What the controls of a clean label cost on this model, as a multiple of its own patch, within USUAL.

    The lower median of `controls` (of the measured labels, from `typical`) to the upper median of all labels' `cost`: so up to
    half of the labels may be infected. Not the median of the measured labels' ratios: where labels are many, those
    measured are the ones with the cheapest patches, whose ratios are high for that alone.
    """
    costs = np.sort(arrays["cost"][~arrays["dropped"]] if "dropped" in arrays else arrays["cost"])
    ordered = sorted(controls)
    return float(np.clip(ordered[(len(ordered) - 1) // 2] / costs[len(costs) // 2], *USUAL)) if ordered else USUAL[0]
