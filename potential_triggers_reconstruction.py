"""Stage 2, potential trigger reconstruction: a mask and a pattern for every label (paper IV-C).

For each label, optimize a patch that sends images of other labels to it on the examined model and not on tuned model
123. Under the default setting also a free patch, on the examined model alone, and for labels that might be convicted the
same on models without the backdoor: the controls that they are judged against; and where several labels look infected,
what the others keep once the surest one's patches are unlearned. Reads pnnir.h5; writes
RESULTS/DATASET/MODEL/potential_triggers.h5 and a sheet of all masks and patterns.
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

STEPS: int | None = None         # steps of Adam for each label; none: the named setting's, as for all that follow
TRIGGER_RATE: float | None = None        # learning rate of mask and pattern, which are in [0, 1]
NOISE_WEIGHT: float | None = None        # β of L_noise
CLEAN_MASS: float | None = None          # v of L_clean
PIXEL_PRICE: float | None = None         # λ: price of a masked pixel (of 32×32; larger images: the same for their share)
IMAGES_PER_LABEL: int | None = None      # clean images of other labels in a step
RANDOM_THRESHOLD: float | None = None    # labels of a lower ASR get no controls but to tell what is usual
RESTARTS: int | None = None              # further starts of the patches that get controls; the cheapest is kept
REPAIR_STEPS: int | None = None          # steps that unlearn the surest labels' patches, to see what others keep; 0: none
EVIDENCE: float | None = None            # as in backdoor_detection.py: what labels are measured, and unlearned, by
UNPROBED_EVIDENCE: float | None = None   # the same where no probes count
SCREEN_SHARE: float | None = None        # of many labels, those that go on after a first round; 1: all, without that round
SCREEN_STEPS: int | None = None          # steps of that first round
LABELS_AT_ONCE: int | None = None        # labels optimized together, to bound memory; none: as many as 64 images of 32×32
configure(globals())

from utils import pictures  # TensorFlow loads after the flags were read
from utils.controls import measure_controls
from utils.detection import measure_transfers, transfers_that_count
from utils.evidence import exclusiveness, factors_of, ratios_needed, trace_patches, with_traced
from utils.examination import examinations
from utils.reconstruction import reconstruct_patches
from utils.repair import repaired_evidence

FIELDS = ("steps", "trigger_rate", "images_per_label", "mask_gain", "mask_centre", "mask_start", "noise_weight",
          "clean_mass", "pixel_price", "price_ramp", "adam_kept", "random_threshold", "measured_images", "controls",
          "evidence", "unprobed_evidence", "restarts", "repair_steps", "screen_share", "screen_steps")


def main():
    for examination in examinations(globals()):
        tuned, made_with, pnnir = examination.read("pnnir", "pnnir.py")
        with examination.stage("potential_triggers", FIELDS, pnnir=pnnir) as stage:
            if stage.finished:
                examination.say(f"{stage.path} is there already")
                continue
            controls = examination.settings.controls
            models = examination.models(tuned, ["examined/123", *controls])
            arrays = reconstruct_patches(examination, models, stage, LABELS_AT_ONCE)
            if controls:
                if "probes" in tuned["examined"]:
                    arrays |= trace_patches(examination, tuned, arrays, stage)
                    tuned = with_traced(tuned, arrays.get("traced"), examination.accuracy)
                first = stage.part("first-transfers", lambda: {"transfer": measure_transfers(examination, tuned, arrays)})
                exclusive = exclusiveness(transfers_that_count(examination, tuned, first["transfer"]))
                needed = ratios_needed(examination.settings, factors_of(tuned, examination.accuracy), exclusive)
                arrays = measure_controls(examination, models, arrays, needed, stage, LABELS_AT_ONCE)
                arrays["repaired_evidence"] = repaired_evidence(
                    examination, tuned, made_with, models, arrays, stage, LABELS_AT_ONCE)
            pictures.write(stage.path.with_suffix(".png"), pictures.trigger_sheet(arrays))
            stage.finish(arrays)
            examination.say(f"wrote {stage.path} and {stage.path.with_suffix('.png').name}")


if __name__ == "__main__":
    run(main)
