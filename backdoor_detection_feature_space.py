"""Stage 4 in the feature space: which labels serve a filter backdoor (paper, supplementary)?

Measures each colour matrix's transfer to tuned models 1, 2, 3, 12, 13 and 23 and decides for each label. The default
setting convicts by margins and bred photo filters, too: a trigger need not be a matrix to show in them. Reads pnnir.h5 and
potential_triggers_feature_space.h5; writes RESULTS/DATASET/MODEL/detection_feature_space.json (and .h5, .png) and prints
the same as a table.
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

FILTER_RANDOM_THRESHOLD: float | None = None    # labels of a lower ASR are clean; none: the named setting's, as below
FILTER_ENTROPY: float | None = None      # mean cross-entropy of a matrix that convicts, at most; 0: any
MEASURED_IMAGES: int | None = None       # images of other labels behind each ASR
FILTER_TRANSFER_THRESHOLD: float | None = None  # ASR from which on a trigger transfers to a tuned model
TRANSFERS_NEEDED: int | None = None      # q: tuned models it transfers to that make an adversarial patch of it
FILTER_EVIDENCE: float | None = None     # times ln(labels): the evidence of margins and probes that convicts a label, too
configure(globals())

from utils import pictures  # TensorFlow loads after the flags were read
from utils.detection import evidence_of, measure_transfers, report
from utils.examination import examinations

FIELDS = ("filter_random_threshold", "filter_entropy", "measured_images", "filter_transfer_threshold", "transfers_needed",
          "filter_evidence")


def main():
    for examination in examinations(globals()):
        examination.require_colour()
        tuned, _, pnnir = examination.read("pnnir", "pnnir.py")
        found, _, potential_triggers = examination.read(
            "potential_triggers_feature_space", "potential_triggers_reconstruction_feature_space.py", pnnir=pnnir)
        evidence = evidence_of(examination, tuned, found)
        inputs = {"pnnir": pnnir, "potential_triggers_feature_space": potential_triggers}
        with examination.stage("detection_feature_space", FIELDS, **inputs) as stage:
            transfers = stage.arrays["transfer"] if stage.finished else measure_transfers(
                examination, tuned, found)
            verdict = report(examination, stage, tuned, found, transfers, examination.settings.filter_transfer_threshold,
                             evidence=evidence)
            pictures.write(stage.path.with_suffix(".png"),
                           pictures.attached_sheet(found, verdict, examination.clean.x_measure))
            stage.finish({"transfer": transfers})


if __name__ == "__main__":
    run(main)
