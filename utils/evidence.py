"""What the default convicts a label by: price, margin, probes and transfer, each held against models without the backdoor.

The price (utils/controls.py) tells of small triggers, which no patch of a clean label is as cheap as; probes
(utils/probes.py) of large and of forgiving ones, and of filters; foreignness (utils/foreignness.py) of triggers that
look like none of the label's images, and their colours (utils/own_colours.py) of those that have other ones than these;
the margin (utils/margins.py) of all; the transfer (paper IV-E) of patches that clean variants answer to as well; the lead
of labels that are far ahead of all others. What moves one of these on a clean label hardly moves the others, so that
their product sets targets apart where each alone does not (results/README.md). A price that was not measured, or that
there is none of, as of filters, counts as 1.
"""

import math

import numpy as np

from utils import plain_patches, traced_patches
from utils.foreignness import foreignness, likeness
from utils.margins import enough_relearned, margin_ratios, relearned
from utils.own_colours import colours_factor, own_colours
from utils.probes import excess, mean_over, probe_ratios, search_probes
from utils.tuning import SUBSETS, TAUGHT

# Powers of patches' factors. The largest margins of clean labels differ most by luck, while of targets that price and margin
# miss probes tell more surely than of labels of clean models: with both to the power of 1 one was missed that had less
# evidence than some label of a clean model, by an unusual margin (results/tried.md). Of filters both count as they are.
PATCHES = {"margin": 1 / 2, "probe": 3 / 2}
# Beside a known backdoor probes count less: the network learned to see what looks like that one's trigger anywhere, but that
# leads to its target only where the trigger was, elsewhere to some clean label as surely, at no unusual price or margin. So
# it is with what a label has, and with what it keeps where the other one's trigger is unlearned, of which other powers were
# not tried. What is asked of both was measured before colours counted, which hardly moves it (results/tried.md).
BESIDE, KEPT = {"margin": 1 / 2, "probe": 1.0}, {"margin": 1.0, "probe": 1.0, "trust": 2 / 3}
MOST_EXCLUSIVE = 2       # of a patch that transfers to no tuned model where the others' always do
LEADERS = 4              # one of so many labels may lead, as targets of backdoors, the others
# Of what convicts alone, to be had and to be kept by labels beside another's backdoor: unlearning that one weakens a second.
SECOND_HAS, SECOND_KEEPS = 0.735, 0.29
FEW = 10                 # labels: fewer ask for as much evidence, since of so few the usual is uncertain


def search_plain_patches(examination, network, model, tuned, count, stage, name="probes", known=None):
    """All that `factors_of` takes of plain patches: those of `search_probes`, `likeness` and `own_colours` of them.

    network, model: the examined one or a repaired one, and its function from images in [0, 1] to logits; the others are as
    for `utils.probes.search_probes`.
    """
    found = search_probes(examination, model, tuned, plain_patches, count, stage, name, known)
    return found | _what_is_known_of(examination, network, lambda label: plain_patches.rendered(
        found["probes"][label], examination.examined.shape))


def trace_patches(examination, tuned, arrays, stage):
    """`traced`: the labels' patches traced, and all that `with_traced` takes of them. Arguments as for `traced_patches`."""
    found = traced_patches.trace_patches(examination, tuned, examination.model, arrays, stage)
    return {"traced": found | _traced(examination, examination.examined.network, found)} if found else {}


def trace_again(examination, network, model, traced):
    """`traced` as it is on a repaired model: the same patches, measured anew."""
    margins = {"examined": traced_patches.mean_margins(examination, model, traced["patches"])}
    return traced | {"probe_margins": traced["probe_margins"] | margins} | _traced(examination, network, traced)


def _traced(examination, network, traced):
    return _what_is_known_of(examination, network, lambda label: traced_patches.rendered(traced["patches"][label]))


def _what_is_known_of(examination, network, patches):
    return likeness(examination, network, patches) | own_colours(examination, patches)


def with_traced(tuned, traced, accuracy):
    """`tuned` with the figures of traced patches for the labels that they lead to more surely than those drawn, by `excess`.

    tuned, accuracy: as for `factors_of`; traced: from `trace_patches` or `trace_again`, or none. `traced` among the examined
    model's arrays tells which labels' they are, L booleans. What is usual is still told by those drawn, which `drawn` holds:
    else what few labels owe to traced patches would count for, or against, all others.
    """
    if not traced:
        return tuned
    examined, names = tuned["examined"], relearned(tuned, accuracy, plain_patches.AGAINST)
    beyond, others = (excess(margins["examined"], mean_over(margins, names))
                      for margins in (traced["probe_margins"], examined["probe_margins"]))
    better = beyond > others

    def merged(name):
        return np.where(better, traced[name], examined[name])
    figures = {name: merged(name) for name in ("likeness", "own_colours") if name in traced}
    rows = {name: np.where(better, traced["probe_margins"][name], row) if name in traced["probe_margins"] else row
            for name, row in examined["probe_margins"].items()}
    return tuned | {"examined": examined | figures | {"probe_margins": rows, "traced": better, "drawn": examined}}


def factors_of(tuned, accuracy, filters=None):
    """What tells, beside its price, how surely each label is reached: `margin`, `probe`, `foreign` and `colours`, L each.

    The last two are of patches alone, `foreign` on networks whose features are known (utils/foreignness.py), `colours` in
    images that have some (utils/own_colours.py). Where too few tuned models know the labels, margins are ones and there is
    nothing else. tuned: arrays of pnnir.h5, whose probes are plain patches; accuracy: clean accuracy of the examined model;
    filters: arrays of potential_triggers_feature_space.h5, whose probes are taken instead. Raises UserError where either
    was left out.
    """
    factors = {"margin": margin_ratios(tuned, accuracy), "probe": probe_ratios(tuned, accuracy, filters)}
    if not all(enough_relearned(tuned, accuracy, names) for names in (SUBSETS, TAUGHT)):
        return {"margin": np.ones_like(factors["margin"])}
    if filters is None:
        if "likeness" in tuned["examined"]:
            factors["foreign"] = foreignness(tuned)
        if "own_colours" in tuned["examined"]:
            factors["colours"] = colours_factor(tuned)
    return factors


def sureness_of(factors, margin=1.0, probe=1.0, trust=1.0):
    """Margin × probe of every label, L, each to its power; margin alone where probes do not count.

    What the probe, to its power, is over 1 counts times `foreign`, times `colours`: patches that lead nowhere may be like
    nothing. trust: the power of that whole factor.
    """
    lifted = 1 + (factors.get("probe", 1) ** probe - 1) * factors.get("foreign", 1) * factors.get("colours", 1)
    return factors["margin"].astype(float) ** margin * lifted ** trust


def weighed(ratios, sureness):
    """The evidence of every label but for transfers, L. ratios: label → price ratio, those measured; sureness: L."""
    return np.array([ratios.get(label, 1.0) for label in range(len(sureness))]) * sureness


def exclusiveness(transfers):
    """How much each label's patch is the examined model's own: 1 + the median label's transfer - the label's.

    Returns L numbers from 0 to MOST_EXCLUSIVE. A label's transfer is the largest of its ASRs on tuned models (paper IV-E,
    q = 1). How far patches of clean labels transfer varies from model to model, so that no fixed ASR tells a trigger
    (results/README.md), but the other labels' do. transfers: L×models, ASRs in [0, 1]; random patterns, which have nan,
    count as 1, as do all where no model is left.
    """
    largest = transfers.max(axis=1) if transfers.shape[1] else np.full(len(transfers), np.nan)
    if np.isnan(largest).all():
        return np.ones(len(transfers))
    return np.nan_to_num(1 + np.nanmedian(largest) - largest, nan=1.0).astype(float)


def lead(evidence):
    """How far each label, with those that have more, stands out from the next ones; 1 for those that do not, L.

    How much evidence clean labels get varies from model to model, and all of a model's labels with it, so that labels which
    the next ones come near to are less of a sign than such as are far ahead of them. It is the largest gap behind the label:
    the multiple that one label's evidence is of the next one's, of this label or of another down to a fourth of all
    (LEADERS), since several targets lead together. Evidence under 1, that of a usual label, counts as 1. evidence: L.
    """
    ranked = np.argsort(-evidence, kind="stable")
    gaps = np.maximum(evidence[ranked], 1)
    gaps[:-1] /= gaps[1:]
    gaps[max(1, len(evidence) // LEADERS):] = 1
    found = np.empty(len(evidence))
    found[ranked] = np.maximum.accumulate(gaps[::-1])[::-1]
    return found


def with_lead(evidence, factors):
    """The evidence times the leads, L; as it is where no probes count, without which no lead does. factors: as below."""
    return evidence * lead(evidence) if "probe" in factors else evidence


def own(beside, kept, factors):
    """What counts of the evidence of a label beside another's backdoor, to be held against `convicting`: by SECOND_….

    A backdoor lends evidence to clean labels, most of which they lose when it is unlearned: of both, what a label has and
    what it keeps, there has to be enough. What is kept counts as many times as the label is foreign: what a backdoor lends
    leads to its labels by features of their own. Without probes, and so without leads, what convicts alone is asked of both.
    beside, kept: evidence by the powers BESIDE and KEPT, with the leads, L; factors: as for `sureness_of`.
    """
    has, keeps = (SECOND_HAS, SECOND_KEEPS) if "probe" in factors else (1, 1)
    return np.minimum(beside / has, kept * factors.get("foreign", 1) / keeps)


def convicting(settings, labels, factors, filters=False):
    """The evidence that convicts a label of a model of so many: that of the settings times ln(labels), of FEW at least.

    The largest of so many clean labels grows like that, as of draws from a distribution with an exponential tail. factors:
    what counts, from `factors_of`, or a label's JSON fields: with probes the evidence of patches varies more; filters:
    whether it is theirs.
    """
    if filters:
        asked = settings.filter_evidence
    elif "probe" not in factors:
        asked = settings.unprobed_evidence
    else:
        asked = settings.evidence
    return asked * math.log(max(FEW, labels))


def ratios_needed(settings, factors, exclusive):
    """The least price ratio that convicts each label, alone or beside another backdoor, L; 1 or less: a usual one is enough.

    factors: from `factors_of`; exclusive: from `exclusiveness` of first patches, L. Below 1 it counts as 1: cheaper patches,
    from other starts, may transfer less. The other labels' prices, too, count as usual ones.
    """
    alone, beside = (sureness_of(factors, **powers) * np.maximum(exclusive, 1) for powers in (PATCHES, BESIDE))
    enough = convicting(settings, len(alone), factors)
    if "probe" not in factors:
        return enough / alone

    def least(label, evidence, enough):
        """The least ratio by which the label has evidence enough, with the lead it has then."""
        low, high = 0.0, enough
        for _ in range(40):
            middle = (low + high) / 2
            supposed = np.where(np.arange(len(evidence)) == label, middle, evidence)
            low, high = (low, middle) if with_lead(supposed, factors)[label] >= enough else (middle, high)
        return high / evidence[label]
    return np.array([min(least(label, alone, enough), least(label, beside, SECOND_HAS * enough))
                     for label in range(len(alone))])
