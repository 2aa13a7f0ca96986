"""What the default convicts a label by: its price and its margin, each held against models without the backdoor.

The price (utils/controls.py) tells of small triggers, which no patch of a clean label is as cheap as; the margin
(utils/margins.py) of large ones and of filters. What moves the one on a clean label hardly moves the other, so that their
product sets targets apart where each alone does not (results/README.md). A price that was not measured counts as 1.
"""

import math

import numpy as np

LEAST = 2.3              # no evidence under it convicts, however few the labels: of so few the usual is uncertain


def weight_of(margins):
    """What a label's margin ratio counts beside its price ratio: both spread about as much over clean labels then."""
    return margins ** 2


def weighed(ratios, margins):
    """The evidence of every label, L. ratios: label → price ratio, those that were measured; margins: L."""
    return np.array([ratios.get(label, 1.0) for label in range(len(margins))]) * weight_of(np.asarray(margins, float))


def convicting(settings, labels):
    """The evidence that convicts a label of a model of so many: `settings.evidence` times ln(labels), not under LEAST.

    The largest of so many clean labels grows like that, as of draws from a distribution with an exponential tail.
    """
    return max(LEAST, settings.evidence * math.log(labels))
