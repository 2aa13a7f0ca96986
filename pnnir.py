"""Stage 1, PNNIR: make tuned models, the clean variants of the examined model (paper IV-B).

Three blocks at the network's end are numbered 1, 2, 3. For every non-empty subset of them, the chosen blocks are
re-initialized and trained with everything else frozen, and then the whole network is trained, on clean images only.
Three more, of two blocks each, learn the examined model's own logits besides: they know its labels as it does, less a
backdoor. Writes RESULTS/DATASET/MODEL/pnnir.h5 (the weights of all tuned models, and how surely each label can be reached on
them and on the examined model).
"""

from utils.config import configure, run

DATASET = "signs"                # row of the table in utils/datasets.py; custom: any other model
MODELS = ["patch1"]              # names under models/DATASET/, or paths of model files; one or more
CLEAN_DATA = ""                  # HDF5 file with x, y, or folder of images per label; empty: the dataset's held-out part
CLEAN_PER_LABEL: int | None = None   # clean images of each label used at most; none: the dataset's number
RESULTS = "results"              # artifacts go to RESULTS/DATASET/MODEL/
SETTINGS = "default"             # named setting in utils/datasets.py: default, paper, or release
SEED = 0                         # decides the split of the clean data and every random draw
OVERWRITE = False                # start afresh where there are artifacts already
PRECISION = "float32"            # of the networks: mixed_bfloat16 is faster where the processor or GPU computes in it
ARCHITECTURE = ""                # for files with weights only: a row of the dataset table, or a model's JSON file
INPUT_RANGE: list[float] | None = None   # what the network takes for black and white, as 0,1; none: the dataset's scaling
INPUT_MEAN: list[float] | None = None    # subtracted from each channel after scaling to INPUT_RANGE
CHANNEL_ORDER = "rgb"            # order of the channels that the network takes: rgb or bgr (with INPUT_RANGE)
BLOCKS: list[str] | None = None  # the three blocks, each layer names joined by +; none: the dataset's, or found
FEATURE_MAP = ""                 # layer whose output Grad-CAM reads; empty: the dataset's, or found
ALLOW_LOW_ACCURACY = False       # go on where the examined model hardly classifies the clean data

INIT_BOUND: float | None = None          # weights start anew uniform in ± this; none: the named setting's, as all below
LEARNING_RATE: float | None = None       # of Adam, both phases
BATCH: int | None = None                 # images a step, drawn evenly over the labels
PHASE1_STEPS: list[int] | None = None    # steps with all else frozen, for one, two and three blocks
PHASE2_STEPS: list[int] | None = None    # steps of the whole network, for one, two and three blocks
PHASE2_PEAK: float | None = None         # peak of a learning rate that rises and falls once over phase 2; 0: LEARNING_RATE
DISTILLATION: float | None = None        # of the taught models: weight of the examined model's logits beside the labels
ERASE: float | None = None               # random erasing in phase 2: sides of the rectangle, share of the image's; 0: none
MARGIN_STARTS: int | None = None         # random images from which each label's largest margin is searched; 0: not at all
PROBES: int | None = None                # random plain patches from which each label's most telling are bred; 0: none, which
                                         # will do for filters, but not for patches under SETTINGS default
configure(globals())

from utils import transfer  # TensorFlow loads after the flags were read
from utils.evidence import search_plain_patches
from utils.examination import examinations, set_weights, weights_of
from utils.margins import margin_meter
from utils.topology import block_layers
from utils.tuning import SUBSETS, TAUGHT, Tuner

FIELDS = ("init_bound", "learning_rate", "batch", "phase1_steps", "phase2_steps", "phase2_stop",
          "phase2_peak", "distillation", "augment", "erase", "margin_starts", "probes", "measured_images")


def main():
    for examination in examinations(globals()):
        examined, clean = examination.examined, examination.clean
        with examination.stage("pnnir", FIELDS, blocks=examined.blocks) as stage:
            if stage.finished:
                examination.say(f"{stage.path} is there already")
                continue
            original, settings = weights_of(examined.network), examination.settings
            measure = margin_meter(examination, examination.model, settings.margin_starts)
            tuner = Tuner(examined, clean, settings)
            tuned = {"examined": stage.part("examined", measure)}
            for number, name in enumerate(SUBSETS + TAUGHT * bool(settings.margin_starts or settings.probes)):
                subset = name.removesuffix("-taught")

                def make():
                    set_weights(examined.network, original)
                    layers = {layer.name: layer for block in subset
                              for layer in block_layers(examined.network, examined.blocks[int(block) - 1])}
                    tuner.tune(list(layers.values()), len(subset), 1000 * SEED + number, lambda *at: examination.say(
                        "tuned model {}: phase {}, step {} of {}, loss {:.4f}".format(name, *at)), name in TAUGHT)
                    accuracy = transfer.accuracy(examination.model, clean.x_measure, clean.y_measure)
                    return {"weights": weights_of(examined.network), "accuracy": accuracy} | (
                        measure() if name in SUBSETS else {})
                tuned[name] = stage.part(name, make)
                examination.say(f"tuned model {name}: clean accuracy {float(tuned[name]['accuracy']):.1%}")
            set_weights(examined.network, original)
            if settings.probes:
                tuned["examined"] |= search_plain_patches(
                    examination, examined.network, examination.model, tuned, settings.probes, stage)
            stage.finish(tuned)
            examination.say(f"wrote {stage.path}")


if __name__ == "__main__":
    run(main)
