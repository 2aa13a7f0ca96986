"""What the default convicts a label by: its price, its margin and its probes, each held against models without the backdoor.

The price (utils/controls.py) tells of small triggers, which no patch of a clean label is as cheap as; probes
(utils/probes.py) of large and of forgiving ones, and of filters; the margin (utils/margins.py) of all. What moves
one of these on a clean label hardly moves the others, so that their product sets targets apart where each alone does not
(results/README.md). A price that was not measured, or that there is none of, as of filters, counts as 1; so does the low
price of a patch that transfers to a tuned model.
"""

import math

import numpy as np

from utils.margins import enough_relearned, margin_ratios
from utils.probes import probe_ratios
from utils.tuning import SUBSETS, TAUGHT

FEW = 10                 # labels: fewer ask for as much evidence, since of so few the usual is uncertain


def factors_of(tuned, accuracy, filters=None):
    """What tells, beside its price, how surely each label is reached: `margin`, and `probe` where it counts; L each.

    Where too few tuned models know the labels, margins are ones and there are no probes. tuned: arrays of pnnir.h5, whose
    probes are plain patches; accuracy: clean accuracy of the examined model; filters: arrays of
    potential_triggers_feature_space.h5, whose probes are taken instead. Raises UserError where either was left out.
    """
    factors = {"margin": margin_ratios(tuned, accuracy), "probe": probe_ratios(tuned, accuracy, filters)}
    if all(enough_relearned(tuned, accuracy, names) for names in (SUBSETS, TAUGHT)):
        return factors
    return {"margin": np.ones_like(factors["margin"])}


def sureness_of(factors):
    """Margin × probe: what times its price ratio is a label's evidence, L; margin alone where probes do not count."""
    return factors["margin"].astype(float) * factors.get("probe", 1)


def weighed(ratios, sureness):
    """The evidence of every label, L. ratios: label → price ratio, those that were measured; sureness: L."""
    return np.array([ratios.get(label, 1.0) for label in range(len(sureness))]) * sureness


def unpriced(fields):
    """A label's JSON fields, from `utils.detection.evidence_of`, with a price that counts as usual where it was lower.

    For patches that work on a tuned model, too: they are no cheaper on the examined model than where no backdoor is.
    """
    ratio = fields.get("ratio", 1.0)
    return fields if ratio <= 1 else fields | {"ratio": 1.0, "evidence": round(fields["evidence"] / ratio, 6)}


def convicting(settings, labels, probed, filters=False):
    """The evidence that convicts a label of a model of so many: that of the settings times ln(labels), of FEW at least.

    The largest of so many clean labels grows like that, as of draws from a distribution with an exponential tail. probed:
    whether probes count, which let the evidence of patches vary more; filters: whether it is theirs.
    """
    asked = settings.filter_evidence if filters else settings.evidence if probed else settings.unprobed_evidence
    return asked * math.log(max(FEW, labels))


def ratios_needed(settings, factors):
    """The price ratio that convicts each label, L; of 1 or less: unless it is dearer than usual. factors: `factors_of`."""
    return convicting(settings, len(factors["margin"]), "probe" in factors) / sureness_of(factors)
