"""What TNDA, the paper's rule, makes of triggers that lack a part of the method: preservation, or L_clean.

Measures the transfers of each scanned model's patches three times: preserved, as in the paper; whole, as reconstructed; and
those of the examined model alone, made without L_clean and with a price on their size, as Neural Cleanse makes them. Reads
the artifacts of benchmarks.zoo; models of the zoo without any are named and left out.

    python -m benchmarks.without --zoo benchmarks/test_zoo.txt --datasets gtsrb --precision mixed_bfloat16
"""

import json
import pathlib
from collections import defaultdict

from utils.config import UserError, configure, run

ZOO = "benchmarks/validation_zoo.txt"    # the list of models
DATASETS: list[str] = []                 # only these datasets' models; none: all
NAMES: list[str] = []                    # only models of these names; none: all
RESULTS = "results/zoo/default"          # where the scans' artifacts are; of a setting that makes controls
MODELS = "models"                        # MODELS/DATASET/NAME.keras, with the reports of models.train beside them
CLEAN_PER_LABEL: int | None = None       # clean images of each label that they used at most; none: the dataset's number
SETTINGS = "default"                     # the named setting of the scans
SEED = 0                                 # their seed
PRECISION = "float32"                    # and their networks' precision

configure(globals())

from benchmarks.leftover import OTHERS
from benchmarks.tables import missed_and_wrong
from benchmarks.zoo import chosen_models
from utils.detection import INFECTED, decide, measure_transfers
from utils.examination import examinations

THRESHOLDS = (0.1, 0.2, 0.4)             # the paper's 0.2 for many labels and 0.4 for few, and the default's


def main():
    outcomes, missing = defaultdict(list), []
    for data, name, _ in chosen_models(ZOO, DATASETS, NAMES):
        folder, model = pathlib.Path(RESULTS, data, name), pathlib.Path(MODELS, data, name + ".keras")
        if not (folder / "preserved_triggers.h5").exists() or not model.exists():
            missing.append(f"{data}/{name}")
            continue
        targets = json.loads(model.with_suffix(".json").read_text())["targets"]
        constants = globals() | OTHERS | {"DATASET": data, "MODELS": [str(model)]}
        for examination in examinations(constants):
            for kind, (asr, transfers) in measured(examination).items():
                for threshold in THRESHOLDS:
                    outcomes[kind, threshold] += judged(asr, transfers, targets, examination.settings, threshold)
    if not outcomes:
        raise UserError(f"no model of {ZOO} has preserved triggers in {RESULTS}: run benchmarks.zoo first, with these "
                        "RESULTS and MODELS")
    print(table(outcomes))
    print(f"not scanned: {', '.join(missing) or 'none'}")


def measured(examination):
    """Kind of trigger → (ASR on the examined model, L; transfers, L×6)."""
    tuned, _, _ = examination.read("pnnir", "pnnir.py")
    found, _, _ = examination.read("potential_triggers", "potential_triggers_reconstruction.py")
    preserved, _, _ = examination.read("preserved_triggers", "critical_features_preservation.py")
    if len(found.get("free", {"label": ()})["label"]) < len(found["asr"]):
        raise UserError(f"{examination.folder}/potential_triggers.h5 has no free patches of all labels: scan with SETTINGS "
                        "default and a SCREEN_SHARE of 1")
    kinds = {"as in the paper": found | {"mask": preserved["mask"]}, "no preservation": found,
             "no preservation, no L_clean (Neural Cleanse)": found["free"]}
    return {kind: (triggers["asr"], measure_transfers(examination, tuned, triggers)) for kind, triggers in kinds.items()}


def judged(asr, transfers, targets, settings, threshold):
    """(is a target, is called infected) of every label. asr: L; transfers: L×6, nan where not measured."""
    return [(label in targets, decide(asr[label], dict(enumerate(row)), settings, threshold) == INFECTED)
            for label, row in enumerate(transfers)]


def table(outcomes):
    """A Markdown table of FNR and FPR. outcomes: (kind, threshold) → pairs from `judged`."""
    lines = ["| triggers | transfer from | FNR | FPR |", "|---|---|---|---|"]
    lines += [f"| {kind} | {threshold} | {missed_and_wrong(pairs)} |" for (kind, threshold), pairs in outcomes.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
