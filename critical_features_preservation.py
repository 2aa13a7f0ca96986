"""Stage 3, critical features preservation: strip from each patch what the examined model does not look at (paper IV-D).

Grad-CAM on images with the trigger attached gives a heat map for each label; the preserved mask is the trigger's mask
where the heat is at least the largest threshold that keeps 95 % of the ASR. Labels whose pattern is random are left
out. Reads potential_triggers.h5; writes RESULTS/DATASET/MODEL/preserved_triggers.h5 and a sheet of heat maps.
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

RANDOM_THRESHOLD: float | None = None    # labels of a lower ASR are clean; none: the named setting's, as below
KEPT_ASR: float | None = None            # share of the ASR that the preserved trigger keeps
MEASURED_IMAGES: int | None = None       # images of other labels behind each ASR
configure(globals())

from utils import pictures  # TensorFlow loads after the flags were read
from utils.examination import examinations
from utils.preservation import preserve_all

FIELDS = ("random_threshold", "kept_asr", "measured_images")


def main():
    for examination in examinations(globals()):
        found, _, potential_triggers = examination.read("potential_triggers", "potential_triggers_reconstruction.py")
        with examination.stage("preserved_triggers", FIELDS, potential_triggers=potential_triggers,
                               feature_map=examination.examined.feature_map) as stage:
            if stage.finished:
                examination.say(f"{stage.path} is there already")
                continue
            arrays = preserve_all(examination, found, stage)
            pictures.write(stage.path.with_suffix(".png"), pictures.heat_sheet(arrays))
            stage.finish(arrays)
            examination.say(f"wrote {stage.path} and {stage.path.with_suffix('.png').name}")


if __name__ == "__main__":
    run(main)
