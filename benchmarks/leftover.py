"""What PNNIR left of the hidden triggers: their ASR on the examined and on every tuned model, and the clean accuracies.

The attack is known here, since models.train wrote it beside the model; a scan knows nothing of it. Measured on the clean
images that no tuned model was trained on. Reads pnnir.h5; writes RESULTS/DATASET/MODEL/leftover.json and prints it.

    python -m benchmarks.leftover --dataset signs --models models/signs/val_patch1.keras --results results/zoo/default
"""

import json
import pathlib
from itertools import chain

from utils.config import UserError, configure, run

DATASET = "signs"            # row of the table in utils/datasets.py
MODELS = ["models/signs/val_patch1.keras"]   # model files with the report of models.train beside them
RESULTS = "results/zoo/default"      # where pnnir.py wrote
CLEAN_PER_LABEL: int | None = None   # clean images of each label that the scan used at most; none: the dataset's number
SETTINGS = "default"         # the named setting of the scan
SEED = 0                     # its seed
PRECISION = "float32"        # and its networks' precision

configure(globals())

from models.attacks import attack_success_rate, parse_attacks
from utils import transfer
from utils.examination import examinations
from utils.files import replacing
from utils.tuning import SUBSETS

OTHERS = {"CLEAN_DATA": "", "OVERWRITE": False, "ARCHITECTURE": "", "INPUT_RANGE": None,
          "INPUT_MEAN": None, "CHANNEL_ORDER": "rgb", "BLOCKS": None, "FEATURE_MAP": "", "ALLOW_LOW_ACCURACY": True}


def main():
    for examination in examinations(globals() | OTHERS):
        examined, clean = examination.examined, examination.clean
        attacks = parse_attacks(specs(examined.path), examined.shape, examined.labels)
        tuned, _, _ = examination.read("pnnir", "pnnir.py")
        left = {}
        # One network takes each tuned model's weights in turn: no list of them could be made.
        for name, model in chain([("examined", examination.model)], zip(SUBSETS, examination.tuned_models(tuned, SUBSETS))):
            def predict(images):
                return transfer.logits_of(model, images).argmax(axis=1)
            left[name] = {"accuracy": round(transfer.accuracy(model, clean.x_measure, clean.y_measure), 6),
                          "asr": [round(attack_success_rate(predict, clean.x_measure, clean.y_measure, attack), 6)
                                  for attack in attacks]}
            examination.say(f"{name}: clean accuracy {left[name]['accuracy']:.1%}, ASR of the hidden triggers "
                            f"{', '.join(f'{asr:.1%}' for asr in left[name]['asr']) or '-'}")
        with replacing(examination.folder / "leftover.json") as temporary:
            pathlib.Path(temporary).write_text(json.dumps(left) + "\n")


def specs(model):
    """The attacks of a trained model, as models.train takes them."""
    report = pathlib.Path(model).with_suffix(".json")
    try:
        return [attack["spec"] for attack in json.loads(report.read_text())["attacks"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{report} does not tell the model's attacks: train it with models.train") from None


if __name__ == "__main__":
    run(main)
