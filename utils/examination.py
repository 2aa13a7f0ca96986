"""What every stage starts from: the examined model, the clean data, the settings, and where its artifacts go."""

import functools
import pathlib
import time
from dataclasses import asdict, dataclass, replace

import keras
import tensorflow as tf

from utils import artifacts, topology, transfer
from utils.clean_data import CleanData, images_of_all, images_of_others, load_clean_data
from utils.config import UserError
from utils.datasets import Dataset, Settings, dataset
from utils.examined_model import ExaminedModel, load_examined
from utils.precision import in_precision

COUNT, SHARE, RATE, WEIGHT = (1, 10**6), (0, 1), (1e-9, 1e3), (0, 1e6)
BOUNDS = {               # of the scripts' numbers: the least and the most
    "SEED": (0, 2**21 - 1), "CLEAN_PER_LABEL": (2, 10**9), "LABELS_AT_ONCE": COUNT, "BATCH": COUNT, "STEPS": COUNT,
    "SCREEN_STEPS": COUNT, "SCREEN_SHARE": SHARE, "FILTER_STEPS": COUNT, "IMAGES_PER_LABEL": COUNT,
    "MEASURED_IMAGES": COUNT, "PHASE1_STEPS": (0, 10**7), "PHASE2_STEPS": (0, 10**7), "TRANSFERS_NEEDED": (1, 6),
    "RESTARTS": (0, 100), "REPAIR_STEPS": (0, 10**7), "ERASE": SHARE, "LEARNING_RATE": RATE, "TRIGGER_RATE": RATE,
    "FILTER_RATE": RATE, "EVIDENCE": RATE, "UNPROBED_EVIDENCE": RATE, "FILTER_EVIDENCE": WEIGHT, "MARGIN_STARTS": (0, 10**4),
    "PROBES": (0, 10**6), "NOISE_WEIGHT": WEIGHT, "PIXEL_PRICE": WEIGHT, "CLEAN_MASS": WEIGHT,
    "RANDOM_THRESHOLD": SHARE, "KEPT_ASR": SHARE, "TRANSFER_THRESHOLD": SHARE,
    "FILTER_TRANSFER_THRESHOLD": SHARE, "FILTER_RANDOM_THRESHOLD": SHARE, "FILTER_ENTROPY": WEIGHT,
    "FILTER_RESTARTS": (0, 100), "INIT_BOUND": RATE, "PHASE2_PEAK": (0, 1e3), "DISTILLATION": WEIGHT}


@dataclass(frozen=True)
class Examination:
    """One examined model with all that a stage needs. `model` maps images in [0, 1] to logits."""

    examined: ExaminedModel
    clean: CleanData
    row: Dataset
    settings: Settings
    folder: pathlib.Path
    seed: int
    overwrite: bool
    model: object
    accuracy: float
    input_scaling: list | None          # the constants that depart from the row's own scaling
    named_setting: str = "default"      # in utils/datasets.py: stages of different ones do not mix
    precision: str = "float32"

    @property
    def inputs(self):
        """What every artifact of this examination depends on, and carries."""
        return {"model": self.examined.fingerprint, "clean_data": self.clean.fingerprint, "seed": self.seed,
                "input_scaling": self.input_scaling, "precision": self.precision, "named_setting": self.named_setting,
                "method_version": artifacts.METHOD_VERSION}

    @functools.cached_property
    def x_tune(self):
        """`clean.x_tune` as a tensor, one for all that draw from it: several hundred MB where images are large."""
        return tf.constant(self.clean.x_tune)

    @functools.cached_property
    def measured(self):
        """For each label the indices in `clean.x_measure` of the images of other labels that an ASR is measured on, L×n."""
        return images_of_others(self.clean.y_measure, range(self.examined.labels), self.settings.measured_images, self.seed)

    @functools.cached_property
    def evenly(self):
        """Indices in `clean.x_measure` of as many images of each label, to see whether a filter leaves labels apart."""
        return images_of_all(self.clean.y_measure, self.settings.measured_images, self.seed)

    def stage(self, name, fields, **inputs):
        """The `artifacts.Stage` called `name`; it depends on `fields` of the settings and on `inputs`."""
        return artifacts.Stage(self.folder, name, self.inputs | {key: getattr(self.settings, key) for key in fields}
                               | inputs, self.overwrite)

    def read(self, name, script, **made_from):
        """(arrays, settings, fingerprint) of an earlier stage, made from the same model and clean data.

        made_from: fingerprints of the artifacts that it must have been made from, by their names.
        """
        return artifacts.read_stage(self.folder, name, script, **self.inputs, **made_from)

    def require_colour(self):
        """Raise UserError for a model of one-channel images."""
        if self.examined.shape[-1] == 1:
            raise UserError(f"{self.examined.path} takes one-channel images, which have no colours to filter: the feature-"
                            "space stages need three channels, use potential_triggers_reconstruction.py")

    def tuned_models(self, tuned, names):
        """Yield each tuned model as a function from images in [0, 1] to logits, valid until the next is asked for.

        tuned: arrays of `pnnir.h5`. One network takes the weights of each in turn, so it is compiled once; where no model is
        asked for there is none.
        """
        if not names:
            return
        network = keras.models.clone_model(self.examined.network)
        model = classifier(network, self.examined.preprocess)
        for name in names:
            set_weights(network, tuned[name]["weights"])
            yield model

    def models(self, tuned, pairs):
        """Name → function from images in [0, 1] to logits, for every model in `pairs` ("examined/123", …)."""
        names = dict.fromkeys(name for pair in pairs for name in pair.split("/"))
        return {name: self.model if name == "examined" else next(self.tuned_models(tuned, [name])) for name in names}

    def say(self, text):
        print(f"[{self.row.name}/{self.examined.name}] {text}", flush=True)


def examinations(constants):
    """Yield an `Examination` for each of MODELS. constants: the calling script's `globals()`."""
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_op_determinism()      # on processors results repeat without, and a tenth cheaper
    row = dataset(constants["DATASET"])
    settings = row[constants["SETTINGS"]]
    check_constants(constants)
    own = {key.lower(): value for key, value in constants.items() if key.isupper() and value is not None}
    settings = replace(settings, **{key: type(getattr(settings, key))(own[key]) for key in asdict(settings).keys()
                                    & own.keys()})
    for name in constants["MODELS"]:
        start = time.time()
        keras.utils.set_random_seed(constants["SEED"])
        examined = load_examined(name, row, architecture=constants["ARCHITECTURE"],
                                 input_range=constants["INPUT_RANGE"], input_mean=constants["INPUT_MEAN"],
                                 channel_order=constants["CHANNEL_ORDER"], blocks=constants["BLOCKS"],
                                 feature_map=constants["FEATURE_MAP"])
        examined = replace(examined, network=in_precision(examined.network, constants["PRECISION"]))
        clean = load_clean_data(constants["CLEAN_DATA"], row.name, examined.shape, examined.labels,
                                constants["CLEAN_PER_LABEL"] or row.clean_per_label, constants["SEED"])
        scaling = [constants[key] for key in ("INPUT_RANGE", "INPUT_MEAN", "CHANNEL_ORDER")]
        model = classifier(examined.network, examined.preprocess)
        reached = transfer.accuracy(model, clean.x_measure, clean.y_measure)
        # So low a one means that the input is not what it was trained on.
        if reached < transfer.least_accuracy(examined.labels) and not constants["ALLOW_LOW_ACCURACY"]:
            raise UserError(
                f"{examined.path} classifies only {reached:.1%} of the clean images rightly: check INPUT_RANGE, "
                "INPUT_MEAN, CHANNEL_ORDER and the order of the labels, or set ALLOW_LOW_ACCURACY")
        examination = Examination(examined, clean, row, settings,
                                  pathlib.Path(constants["RESULTS"]) / row.name / examined.name, constants["SEED"],
                                  constants["OVERWRITE"], model, reached, scaling if scaling[0] else None,
                                  constants["SETTINGS"], constants["PRECISION"])
        examination.say(f"clean accuracy {reached:.1%} on {len(clean.y_measure)} images; {len(clean.y_tune)} images to "
                        f"tune on; blocks {', '.join('+'.join(block) for block in examined.blocks)}; feature map "
                        f"{examined.feature_map}")
        yield examination
        examination.say(f"done in {time.time() - start:.0f} s")


def check_constants(constants):
    """Raise UserError for a constant that no stage can work with."""
    if not constants["MODELS"] or isinstance(constants["MODELS"], str):
        raise UserError(f"MODELS {constants['MODELS']!r} is no list of models: give one or more names or paths")
    results = pathlib.Path(constants["RESULTS"])
    if not constants["RESULTS"] or results.exists() and not results.is_dir():
        raise UserError(f"RESULTS {constants['RESULTS']!r} is no folder: name one, it is made where it is missing")
    for name, (least, most) in BOUNDS.items():
        value = constants.get(name)
        if value is None:
            continue
        many = name in ("PHASE1_STEPS", "PHASE2_STEPS")
        if many and (isinstance(value, (int, str)) or len(value) != 3):
            raise UserError(f"{name} {value} must be three numbers, for one, two and three blocks")
        for number in value if many else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
                raise UserError(f"{name} {number!r} must be a number from {least} to {most}")


def classifier(network, preprocess):
    """A compiled function from float32 RGB images in [0, 1], N×H×W×C, to the network's logits, N×labels."""
    @tf.function(reduce_retracing=True)
    def logits(images):
        return network(preprocess(images), training=False)
    logits.enlarges = topology.enlargement(network)
    return logits


def weights_of(network):
    """All weights as arrays by their path: what `pnnir.h5` holds of a tuned model."""
    return {weight.path: weight.numpy() for weight in network.weights}


def set_weights(network, weights):
    """Put arrays by their paths (nested or not) into a network of the same topology."""
    arrays = artifacts.plain(weights)
    for weight in network.weights:
        weight.assign(arrays[weight.path])
