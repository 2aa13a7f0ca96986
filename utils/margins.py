"""How surely a label can be reached at all, on the examined model and on its tuned models (not in the paper).

The largest margin of a label is that of its logit over the highest other one, over all images in [0, 1] (Wang et al., MM-BD,
2024: a backdoor's target has an unusually large one, whatever its trigger looks like). So it tells of triggers as large as
the objects, and of filters, whose price says nothing. Labels differ in it without any backdoor, so each is its own control
here, too: tuned models, which lost the backdoor, know the same label. Those that learn labels alone are asked: of a label
that the examined model hardly knows, taught ones know even less, and reach a fraction of its margin. As their margins are
uncertain, too, they count by three quarters. What is left between labels has much to do with how sure the models are of
the label's own images, as labels seen often in training are; a root of that is taken off.
"""

import keras
import numpy as np
import tensorflow as tf

from utils import transfer
from utils.clean_data import both_splits
from utils.config import UserError
from utils.tuning import SUBSETS
from utils.starts import start_anew, uniform

STEPS, RATE = 100, 0.1   # Adam's; four times as many steps change a margin by less than another start does
QUARTILE = 0.75          # of the margins of a label's clean images: how sure a model is of the label
FLOOR = 0.3              # of the labels' median: a label that one model knows badly is no sign of the other's backdoor
CONTROLLED = 0.75        # power of the tuned models' margins: the whole would add their chance to the label's own
ROOT = 1 / 3             # of how sure a model is of a label, which its largest margin grows with
RELEARNED = 0.8          # of the examined model's clean accuracy: a tuned model under it does not know the labels
SMALLEST = 0.01          # of the labels' median: largest margins under it, or negative, count as this


def margin_meter(examination, model, starts):
    """A function that measures `LargestMargins` and returns its arrays, none where there are no starts."""
    if not starts:
        return dict
    examined = examination.examined
    return LargestMargins(model, examination.clean, examined.shape, examined.labels, starts, examination.seed)


class LargestMargins:
    """Searches for each label's largest margin under a model, and measures its clean images' margins.

    model: function from images in [0, 1] to logits, compiled into the search at the first call; its weights may change
    between calls. clean: `utils.clean_data.CleanData`; shape: H, W, C; starts: random images a label starts from.
    """

    def __init__(self, model, clean, shape, labels, starts, seed):
        self.model, self.clean, self.labels, self.seed = model, clean, labels, seed
        chunk = max(1, min(labels, transfer.batch_size(model, shape) // starts))
        self.image = tf.Variable(tf.zeros((chunk, starts, *shape)), name="image")
        self.optimizer = keras.optimizers.Adam(RATE)
        self.optimizer.build([self.image])

        @tf.function
        def search(targets):
            own = tf.one_hot(tf.repeat(targets, starts), labels)
            for _ in tf.range(STEPS):
                with tf.GradientTape() as tape:
                    loss = -tf.reduce_sum(margins_of(model(tf.reshape(self.image, (-1, *shape))), own))
                self.optimizer.apply(tape.gradient(loss, [self.image]), [self.image])
                self.image.assign(tf.clip_by_value(self.image, 0.0, 1.0))
            found = margins_of(model(tf.reshape(self.image, (-1, *shape))), own)
            return tf.reduce_max(tf.reshape(found, (-1, starts)), axis=1)
        self.search = search

    def __call__(self):
        """`largest_margins` of the labels, and `clean_margins`, the upper quartile over their images: logits, L each.

        Raises UserError where one is NaN or infinite.
        """
        found = {"largest_margins": self._largest(), "clean_margins": self._clean()}
        if not all(np.isfinite(margins).all() for margins in found.values()):
            raise UserError("some images get NaN or infinite scores, from which nothing can be told: the examined model was "
                            "made so or is damaged, or, of a tuned model, a lower PHASE2_PEAK may help")
        return found

    def _largest(self):
        chunk, *shape = self.image.shape
        rows = []
        for first in range(0, self.labels, chunk):
            targets = np.minimum(np.arange(first, first + chunk), self.labels - 1)
            self.image.assign(uniform(self.seed, targets, shape))
            start_anew(self.optimizer)
            rows.append(self.search(tf.constant(targets, tf.int32)).numpy())
        return np.concatenate(rows)[:self.labels]

    def _clean(self):
        images, labels = both_splits(self.clean)
        logits = transfer.logits_of(self.model, images)
        return np.array([np.quantile(margins_of(logits[labels == label], tf.one_hot(label, self.labels)), QUARTILE)
                         for label in range(self.labels)], np.float32)


def margins_of(logits, own):
    """Own logit less the highest other one, N. logits: N×L; own: one-hot rows, N×L, or one for all."""
    logits = tf.cast(logits, tf.float32)
    return tf.reduce_sum(logits * own, axis=1) - tf.reduce_max(logits - 1e9 * own, axis=1)


def margin_ratios(tuned, accuracy):
    """Each label's largest margin on the examined model to its geometric mean on the SUBSETS to the power CONTROLLED, L.

    tuned: arrays of pnnir.h5; accuracy: clean accuracy of the examined model. Each margin is divided by the ROOT of how sure
    its model is of the label. As a multiple of the labels' median: a tuned model's logits are larger or smaller throughout.
    Ones where not enough of these have RELEARNED the labels: what was not measured counts as usual.
    Raises UserError where pnnir.py left margins out.
    """
    if "largest_margins" not in tuned.get("examined", {}):
        raise UserError("pnnir.h5 has no margins: run pnnir.py again with --overwrite and a MARGIN_STARTS of 1 or more")
    if not enough_relearned(tuned, accuracy, SUBSETS):
        return np.ones(len(tuned["examined"]["largest_margins"]), np.float32)
    others = [_logarithms(tuned[name]) for name in relearned(tuned, accuracy, SUBSETS)]
    ratios = np.exp(_logarithms(tuned["examined"]) - CONTROLLED * np.mean(others, axis=0))
    return (ratios / np.median(ratios)).astype(np.float32)


def enough_relearned(tuned, accuracy, names):
    """Whether most of the tuned models know the labels: of fewer the mean is too uncertain to convict a label by."""
    return 2 * len(relearned(tuned, accuracy, names)) > len(names)


def relearned(tuned, accuracy, names):
    """Those of the names whose tuned models know the labels. tuned, accuracy: as for `margin_ratios`."""
    return [name for name in names if tuned[name]["accuracy"] >= RELEARNED * accuracy]


def _logarithms(margins):
    """Logarithm of the largest margins, less how sure the model is of the labels' clean images."""
    largest, clean = margins["largest_margins"].astype(float), margins["clean_margins"].astype(float)
    return (np.log(np.maximum(largest, SMALLEST * max(np.median(largest), 1e-6)))
            - ROOT * np.log(np.maximum(clean, FLOOR * max(np.median(clean), 1e-6))))
