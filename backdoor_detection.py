"""Stage 4, backdoor detection: which labels are infected, and is the examined model backdoored (paper IV-E)?

Measures each preserved trigger's transfer to tuned models 1, 2, 3, 12, 13 and 23 and decides for each label: random
pattern, adversarial patch, or infected. The default setting holds transfers against each other, and asks controls,
margins, probes and features as well. Reads pnnir.h5, potential_triggers.h5, preserved_triggers.h5; writes
RESULTS/DATASET/MODEL/detection.json (and .h5, .png) and prints the same as a table.
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
MEASURED_IMAGES: int | None = None       # images of other labels behind each ASR
TRANSFER_THRESHOLD: float | None = None  # ASR from which on a trigger transfers to a tuned model
TRANSFERS_NEEDED: int | None = None      # q: tuned models it transfers to that make an adversarial patch of it
EVIDENCE: float | None = None            # times ln(labels): the evidence, of transfers among others, that convicts a label
UNPROBED_EVIDENCE: float | None = None   # the same where too few tuned models know the labels for probes to count
configure(globals())

from utils import pictures  # TensorFlow loads after the flags were read
from utils.detection import evidence_of, measure_transfers, report, require_preserved
from utils.examination import examinations

FIELDS = ("random_threshold", "measured_images", "transfer_threshold", "transfers_needed", "controls", "evidence",
          "unprobed_evidence")


def main():
    for examination in examinations(globals()):
        tuned, _, pnnir = examination.read("pnnir", "pnnir.py")
        found, made_with, potential_triggers = examination.read(
            "potential_triggers", "potential_triggers_reconstruction.py", pnnir=pnnir)
        preserved, kept_with, preserved_triggers = examination.read(
            "preserved_triggers", "critical_features_preservation.py", potential_triggers=potential_triggers)
        require_preserved(kept_with, examination.settings)
        evidence = evidence_of(examination, tuned, found, made_with)
        inputs = {"pnnir": pnnir, "potential_triggers": potential_triggers, "preserved_triggers": preserved_triggers}
        with examination.stage("detection", FIELDS, **inputs) as stage:
            triggers = found | {"mask": preserved["mask"]}
            transfers = stage.arrays["transfer"] if stage.finished else measure_transfers(
                examination, tuned, triggers)
            verdict = report(examination, stage, tuned, found, transfers, examination.settings.transfer_threshold,
                             preserved["mask"], evidence)
            pictures.write(stage.path.with_suffix(".png"),
                           pictures.attached_sheet(triggers, verdict, examination.clean.x_measure))
            stage.finish({"transfer": transfers})


if __name__ == "__main__":
    run(main)
