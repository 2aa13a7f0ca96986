"""Stage 2 in the feature space: a colour matrix for every label (paper, supplementary).

For each label, optimize a 3×3 colour matrix that sends images of other labels to it on the examined model and not on
tuned model 123. The default setting breeds photo filters, too, which do more than a matrix. Reads pnnir.h5; writes
RESULTS/DATASET/MODEL/potential_triggers_feature_space.h5 and a sheet of recoloured images. One-channel images have no
colours to filter.
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

FILTER_STEPS: int | None = None  # steps of Adam for each label; none: the named setting's, as for all that follow
FILTER_RATE: float | None = None         # learning rate of the matrix
FILTER_RESTARTS: int | None = None       # further starts of every label's matrix; the best is kept
CLEAN_MASS: float | None = None          # v of L_clean
IMAGES_PER_LABEL: int | None = None      # clean images of other labels in a step
PROBES: int | None = None                # random photo filters from which each label's most telling are bred; 0: none
LABELS_AT_ONCE: int | None = None        # labels optimized together, to bound memory; none: as many as 64 images of 32×32
configure(globals())

from utils import photo_filters, pictures  # TensorFlow loads after the flags were read
from utils.examination import examinations
from utils.probes import search_probes
from utils.reconstruction import reconstruct_filters

FIELDS = ("filter_steps", "filter_rate", "filter_restarts", "images_per_label", "clean_mass", "adam_kept", "measured_images",
          "probes")


def main():
    for examination in examinations(globals()):
        examination.require_colour()
        tuned, _, pnnir = examination.read("pnnir", "pnnir.py")
        with examination.stage("potential_triggers_feature_space", FIELDS, pnnir=pnnir) as stage:
            if stage.finished:
                examination.say(f"{stage.path} is there already")
                continue
            models = examination.models(tuned, ["examined/123"])
            arrays = reconstruct_filters(examination, models, stage, LABELS_AT_ONCE)
            if examination.settings.probes:
                arrays |= search_probes(examination, examination.model, tuned, photo_filters, examination.settings.probes,
                                        stage)
            pictures.write(stage.path.with_suffix(".png"),
                           pictures.filter_sheet(arrays, examination.clean.x_measure))
            stage.finish(arrays)
            examination.say(f"wrote {stage.path} and {stage.path.with_suffix('.png').name}")


if __name__ == "__main__":
    run(main)
