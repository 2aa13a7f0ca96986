"""How surely what is too plain to fit a network leads to each label, on the examined model alone (not in the paper).

A patch of which every pixel is optimized fits the examined model: adversarial patches, too, are cheap on it and transfer to
no tuned model. A plain patch (utils/plain_patches.py) or a photo filter (utils/photo_filters.py) has too few parameters to
fit much. But a backdoor answers to more than its trigger: to parts of it, to other places and colours, and, of a large one,
to anything that is as coarse or as fine. So probes are drawn at random and the best of each label are varied, round after
round, towards a larger margin of its logit. A backdoor takes that far beyond what the model gives to clean images, and, as
in TNDA, hardly transfers to tuned models; what leads to a clean label is mostly some feature of it, which they know, too,
those best of all that were taught the examined model's logits. Of photo filters more can be asked, for they change
colours alone: to whom the backdoor is unknown, the image shows what it showed before. Colours so far off that tuned models
recognise nothing in them lead to some label on any network that is not sure of its own.
"""

import functools
import itertools

import numpy as np
import tensorflow as tf

from utils import transfer
from utils.config import UserError
from utils.margins import enough_relearned, relearned

IMAGES = 10              # that a probe is tried on, others each time: many probes on few tell more than few on many
KEPT, VARIED = 4, 8      # probes of a label that go on to the next round, and variations of these that it tries
ROUNDS = 16
LAST_IMAGES = 20         # images that the last round's probes are measured on
# As many times as a patch's a filter's margin counts: where tuned models recognise the image, theirs is far below zero.
FILTER_WEIGHT = 4
AS_SURE = 2              # of filters: in colours that leave a tuned model unsure the examined one's sureness tells little
# Plain patches lead to clean labels of some models far more surely than to others', on the examined model and on its tuned
# ones: what they differ by on most of a model's labels says how much more is unusual. Up to a quarter may be infected.
ORDINARY = 0.75
CLEAN = 1 / 2            # of the margins of clean images, lest little is much where they hardly differ
UNSURE = 0.05            # of the largest margins: where clean images reach less, the model hardly knows its labels
# Logits, at least: a clean network of 60 % accuracy gives clean images margins of 2 and some plain patch one of 7, which
# taught models do not know. The zoos' networks are all above it (results/tried.md).
SURE = 6.0


def search_probes(examination, model, tuned, kind, count, stage, name="probes", known=None):
    """`probes`, the KEPT best of each label on a model from each search, and `probe_margins`, how surely they lead there.

    model: function from images in [0, 1] to logits, the examined model or a repaired one; tuned: arrays of pnnir.h5; kind:
    `utils.plain_patches` or `utils.photo_filters`, whose probes these are; its DRAWS say what each search begins with;
    count: drawn at random to begin with, in each; stage: its parts, called `name` and a number, keep what each round
    measured: a stopped run goes on with the next. Of a kind that is `RECOGNISED_BY` some, only the KEPT best of all searches
    stay, for one alone draws what is like a filter, where any patch is like a trigger. known: `probes` found before that are
    tried besides those drawn. `probe_margins` has a row of L for "examined", that is `model`, and for each tuned model
    `kind.AGAINST`: the mean over a label's probes of its logit's mean margin over the highest other one, on images of other
    labels, 0 where no probe was tried on such an image. Of a kind that tuned models recognise images of, less than 0 counts
    as 0. A kind that is `RECOGNISED_BY` tuned models is bred in images that the first of these recognises which relearned
    the labels; its rows of `kind.AGAINST` are the margins of `model`, too, each in the images that this tuned model
    recognises (`recognised`). The last search of one that is `BRED_AGAINST` some is for margins in `excess` of those of the
    first that relearned.
    """
    clean, labels, seed = examination.clean, examination.examined.labels, examination.seed
    measure, number = Measure(kind.attached, clean.x_measure, clean.y_measure, labels), itertools.count()

    def measured(model, by, probes, images):             # what is drawn repeats with the seed, so that only this takes time
        return stage.part(f"{name}-{next(number)}", lambda: {"margins": measure(model, probes, images, by)})["margins"]

    def first_relearned(names):
        return next(examination.tuned_models(tuned, relearned(tuned, examination.accuracy, names)), None)

    first, other = first_relearned(kind.RECOGNISED_BY), first_relearned(kind.BRED_AGAINST)
    breeder = first and recognised(first, clean.x_measure)
    searches = [functools.partial(measured, model, breeder)] * len(kind.DRAWS)
    if other:
        searches[-1] = lambda probes, images: excess(measured(model, None, probes, images),
                                                     measured(other, None, probes, images))
    before = [None] * len(kind.DRAWS) if known is None else np.array_split(known, len(kind.DRAWS), axis=1)
    probes = np.concatenate([
        climb(search, kind, count, examination.examined.shape, labels, len(clean.x_measure), seed + 10_000 * which,
              examination.say, before[which], draw)
        for which, (search, draw) in enumerate(zip(searches, kind.DRAWS))], axis=1)
    images = np.random.default_rng([seed, 3]).integers(len(clean.x_measure), size=(probes.size, LAST_IMAGES))
    if kind.RECOGNISED_BY:
        margins = own_margins(measured(model, breeder, probes.ravel(), images))
        probes = _best(probes, margins)[0]
        images = images[:probes.size]

    def lead(model, by=None):
        return mean_of_own(measured(model, by, probes.ravel(), images), 0 if kind.RECOGNISED_BY else -np.inf)
    rows = {"examined": lead(model)}
    for subset, one in zip(kind.AGAINST, examination.tuned_models(tuned, kind.AGAINST)):
        rows[subset] = lead(model, recognised(one, clean.x_measure)) if kind.RECOGNISED_BY else lead(one)
    return {"probes": probes, "probe_margins": rows}


def recognised(model, x):
    """A function that tells how surely a tuned model still sees in images what it sees without probe, as `Measure` takes it.

    It takes images N×H×W×C in [0, 1], and which of x (uint8) each of them is; it returns N×L: how far above each label's
    logit that of the label seen without probe is, 0 where another one is seen. model: from images in [0, 1] to logits.
    """
    without = transfer.logits_of(model, x).argmax(axis=1)

    def above(images, which):
        logits = transfer.logits_of(model, images).astype(np.float32)
        seen = logits.argmax(axis=1) == without[which]
        return np.where(seen[:, None], logits.max(axis=1, keepdims=True) - logits, 0)
    return above


class Measure:
    """Mean margins of every label's logit, over images of other labels that carry a probe.

    attached: from images uint8 P×n×H×W×C and probes P to images that carry these, in [0, 1]. x: uint8 N×H×W×C; y: N.
    """

    def __init__(self, attached, x, y, labels):
        self.attached, self.x, self.y, self.labels = attached, x, y, labels

    def __call__(self, model, probes, images, by=None):
        """P×L; -inf where no image is left. model: from images in [0, 1] to logits; probes: P; images: P×n indices.

        by: what `recognised` returns. A margin counts for no more than AS_SURE times what the tuned model tells the label
        from what it recognises by: for nothing where it recognises nothing, or saw the probe's label already.
        """
        together = max(1, transfer.batch_size(model, self.x.shape) // images.shape[1])
        return np.concatenate([self._measure(model, probes[first:first + together], images[first:first + together], by)
                               for first in range(0, len(probes), together)])

    def _measure(self, model, probes, images, by):
        attached = tf.reshape(self.attached(self.x[images], probes), (-1, *self.x.shape[1:]))
        logits = transfer.logits_of(model, attached).astype(np.float32)
        highest, second = np.sort(logits, axis=1)[:, :-3:-1].T[..., None]
        margins = np.where(logits == highest, logits - second, logits - highest)
        if by is not None:
            margins = np.minimum(margins, AS_SURE * by(attached, images.ravel()))
        margins = margins.reshape(*images.shape, self.labels)
        others = self.y[images][..., None] != np.arange(self.labels)
        counts = others.sum(1)
        return np.where(counts > 0, (margins * others).sum(1) / np.maximum(counts, 1), -np.inf)


def mean_of_own(margins, least=-np.inf):
    """The mean over each label's own probes of their margins, of `least` at least, L.

    Those of -inf, tried on no image of another label, do not count; 0 where none does. margins: P×L, as many rows of each
    label, in order.
    """
    own = own_margins(margins)
    finite = np.isfinite(own)                            # a label of most images may be all that some are tried on
    return np.where(finite, np.maximum(own, least), 0).sum(1) / np.maximum(finite.sum(1), 1)


def own_margins(margins):
    """The margins of each label's own probes, labels×n. margins: as for `mean_of_own`."""
    rows, labels = margins.shape
    return margins[np.arange(rows), np.repeat(np.arange(labels), rows // labels)].reshape(labels, -1)


def climb(measure, kind, count, shape, labels, images, seed, say=lambda text: None, known=None,
          draw=None):
    """The KEPT probes that lead to each label most surely, labels×KEPT, surest first: `count` drawn, the best varied.

    measure: from probes P and images P×IMAGES, indices under `images`, to margins P×labels; kind, known: as above; shape:
    H, W, C.
    """
    random = np.random.default_rng([seed, 0])
    drawn = np.array([(draw or kind.draw)(random, shape) for _ in range(count)])
    margins = measure(drawn, random.integers(images, size=(count, IMAGES)))
    kept, reached = _best(np.broadcast_to(drawn, margins.T.shape), margins.T)

    def with_others(probes):
        """The best of those kept and as many others of each label, labels×n."""
        margins = own_margins(measure(probes.ravel(), random.integers(images, size=(probes.size, IMAGES))))
        return _best(*(np.concatenate(pair, axis=1) for pair in ((kept, probes), (reached, margins))))
    if known is not None:
        kept, reached = with_others(known)
    for number in range(1, ROUNDS + 1):
        varied = np.array([kind.vary(parent, random, shape) for parents in kept
                           for parent in parents[random.integers(parents.size, size=VARIED)]])
        kept, reached = with_others(varied.reshape(labels, VARIED))
        if number % 4 == 0:
            say(f"{kind.NAME}: round {number} of {ROUNDS}, largest margin {reached.max():.1f}")
    return kept


def _best(probes, margins):
    """The KEPT probes of the largest margins in each row, largest first, and these margins. Both labels×any number."""
    order = np.argsort(-margins, axis=1, kind="stable")[:, :KEPT]
    return np.take_along_axis(probes, order, axis=1), np.take_along_axis(margins, order, axis=1)


def probe_ratios(tuned, accuracy, filters=None):
    """How surely probes lead to each label on the examined model alone, L, from 1 up.

    tuned: arrays of pnnir.h5; accuracy: clean accuracy of the examined model; filters: arrays of
    potential_triggers_feature_space.h5, whose probes are taken in place of tuned's. One more than by how much the margin of
    the label's plain patches on the examined model exceeds that on the tuned ones, as far below 0 at most as it is above; or
    than FILTER_WEIGHT times the margin of its photo filters in the images that the tuned models recognise. Filters' as a
    multiple of the model's margins of clean images, of UNSURE of its largest margins, or of SURE, whichever is most (medians
    over labels); plain patches' of CLEAN of that and of what those drawn usually differ by, the ORDINARY quantile over
    labels. Ones where too few tuned models have relearned the labels (utils/margins.py). Raises UserError where probes were
    left out.
    """
    made, artifact, script = (tuned.get("examined", {}), "pnnir.h5", "pnnir.py") if filters is None else (
        filters, "potential_triggers_feature_space.h5", "potential_triggers_reconstruction_feature_space.py")
    if "probe_margins" not in made:
        raise UserError(f"{artifact} has no probes, for PROBES was 0 or an earlier version made it: run {script} again with "
                        "--overwrite and PROBES of 1 or more")
    margins = made["probe_margins"]
    against = [name for name in margins if name != "examined"]
    if not enough_relearned(tuned, accuracy, against):
        return np.ones(len(margins["examined"]), np.float32)
    names = relearned(tuned, accuracy, against)
    others = mean_over(margins, names)
    clean, largest = (np.median(tuned["examined"][name]) for name in ("clean_margins", "largest_margins"))
    usual = max(float(clean), UNSURE * float(largest), SURE)
    if filters is None:
        above = excess(margins["examined"], others)
        drawn = made.get("drawn", made)["probe_margins"]
        usual = CLEAN * usual + np.quantile(np.abs(drawn["examined"] - mean_over(drawn, names)), ORDINARY, method="lower")
    else:
        above = FILTER_WEIGHT * others
    return (1 + np.maximum(above, 0) / usual).astype(np.float32)


def mean_over(margins, names):
    """The mean of `probe_margins` on the tuned models of these names, L: one may keep a large trigger almost whole."""
    return np.mean([margins[name] for name in names], axis=0)


def excess(examined, others):
    """By how much margins on the examined model exceed others, which count as far below 0 at most as it is above."""
    return np.where(examined > 0, examined - np.maximum(others, -examined), examined)
