"""Train a network, clean or with backdoors, to have something to examine.

    python -m models.train --dataset mnist --name clean1
    python -m models.train --dataset gtsrb --name patch1 --attack patch:size=5,position=bottom-right,target=7

Writes models/DATASET/NAME.keras (scaled input, logits) and beside it NAME.json: the attacks, the settings, and the
clean accuracy and attack success rates (ASR) measured on the test images. An interrupted training goes on from its
last whole epoch, to the same result.

Attacks (models/attacks.py has the details; every key but target has a default):
    patch:size=4,position=bottom-right,colour=white,pattern=plain,shape=square,pieces=1,seed=0,target=7
    blend:pattern=noise,alpha=0.2,seed=0,target=7
    filter:name=sepia,target=7
"""

import hashlib
import json
import os
import pathlib
import platform
import re
import time
import zipfile

import numpy as np

from data.store import load_dataset
from models.attacks import IMPLANTED, attach, attack_success_rate, choose, parse_attacks, relabel
from utils.config import UserError, configure, run
from utils.datasets import dataset
from utils.files import replacing
from utils.images import network_input

DATASET = "gtsrb"            # row of utils/datasets.py
NAME = "clean1"              # of the model: patch1, filter1, ...
ATTACK: list[str] = []       # KIND:key=value,... each, several for several triggers; none trains a clean model
POISONING_RATE = 0.1         # share of the training images that each attack poisons
EPOCHS = 0                   # passes over the training images, 0: what the dataset is known to need
BATCH = 128                  # images a step
LEARNING_RATE = 1e-3         # Adam's at the start, falls to 0 along a cosine
PRECISION = "float32"        # of the arithmetic: mixed_bfloat16 is faster where the processor or GPU computes in it
SEED = 0                     # draws weights, dropout, batches and the poisoned images
MODELS = "models"            # MODELS/DATASET/NAME.keras and .json are written
OVERWRITE = False            # replace a model of this name

configure(globals())

KNOWN_EPOCHS = {"signs": 12, "mnist": 4, "gtsrb": 8, "cifar10": 30, "youtube_face": 30, "vgg_face": 30}
MEASURED = 500               # test images at a time


def main():
    row = dataset(DATASET)
    if not row.network:
        raise UserError(f"DATASET {DATASET} has no network to train: choose one of {', '.join(KNOWN_EPOCHS)}")
    check_settings()
    attacks = parse_attacks(ATTACK, row.shape, row.labels)
    settings = {"dataset": DATASET, "attack": [item.spec() for item in attacks],
                "poisoning_rate": POISONING_RATE if attacks else 0.0, "epochs": EPOCHS or KNOWN_EPOCHS[DATASET],
                "batch": BATCH, "learning_rate": LEARNING_RATE, "seed": SEED, "precision": PRECISION}
    path = pathlib.Path(MODELS, DATASET, NAME + ".keras")
    report = path.with_suffix(".json")
    checkpoint = path.with_name(f".{NAME}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.npz")
    unfinished = checkpoint.exists() and not report.exists()
    if path.exists() and not OVERWRITE and not unfinished:
        check_report(path, report, settings)
        print(f"{path} is there already, trained with the same settings")
        return

    data = load_dataset(DATASET)
    y_train = data["y_train"].astype(np.int32)
    which = choose(y_train, attacks, POISONING_RATE, SEED)
    if BATCH > len(y_train):
        raise UserError(f"BATCH {BATCH} is more than the {len(y_train)} training images: choose a smaller one")
    model, predict, seconds = train(row, settings, data["x_train"], relabel(y_train, which, attacks),
                                    which, attacks, checkpoint)

    x_test, y_test = data["x_test"], data["y_test"]
    accuracy = float(np.mean(predict(x_test) == y_test))
    rates = [attack_success_rate(predict, x_test, y_test, item) for item in attacks]
    save(path, report, model, {
        "dataset": DATASET, "name": NAME, "clean_accuracy": accuracy,
        "attacks": [{**item.to_dict(), "asr": rate, "poisoned_images": int(np.sum(which == index))}
                    for index, (item, rate) in enumerate(zip(attacks, rates))],
        "targets": sorted({item.target for item in attacks}), "settings": settings,
        "train_images": len(y_train), "test_images": len(y_test), "seconds": round(seconds, 1),
        "versions": versions()})
    for leftover in path.parent.glob(f".{NAME}-{'[0-9a-f]' * 16}.npz"):
        leftover.unlink()
    print(f"{path}: clean accuracy {accuracy:.2%}" + "".join(
        f", ASR {rate:.2%} ({item.kind}, target {item.target})"
        + " which hardly works: raise POISONING_RATE or EPOCHS" * (rate < IMPLANTED) for item, rate in zip(attacks, rates)))


def check_settings():
    """Raises UserError for a constant that no training can use."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", NAME):
        raise UserError(f"NAME {NAME!r} must be a file name of letters, digits, _, - and .")
    for name, value in (("BATCH", BATCH), ("LEARNING_RATE", LEARNING_RATE)):
        if value <= 0:
            raise UserError(f"{name} {value} must be over 0")
    if SEED >= 2 ** 31:
        raise UserError(f"SEED {SEED} must be under {2 ** 31}")


def check_report(path, report, settings):
    """Raises UserError unless the report tells that the model at `path` was trained with these settings."""
    try:
        old = dict(json.loads(report.read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is there, but {report} does not tell its settings: choose another --name or "
                        f"--overwrite it") from None
    changed = ", ".join(key for key in settings if old.get(key) != settings[key])
    if changed:
        raise UserError(f"{path} was trained with other settings ({changed}): choose another --name or "
                        f"--overwrite it")


def train(row, settings, x, y, which, attacks, checkpoint):
    """Train a new network and return it, its predict function, and the seconds it took.

    x: uint8 N×H×W×C; y: int32 N, poisoned labels; which: the attack of each image (`models.attacks.choose`).
    checkpoint: file for the state after each epoch; if it is there, training goes on from it. predict maps uint8
    images to labels.
    """
    import keras
    import tensorflow as tf

    from models.architectures import build
    from utils.precision import in_precision

    keras.utils.set_random_seed(settings["seed"])
    if tf.config.list_physical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()  # on processors results repeat without, and 13 % cheaper
    model = in_precision(build(row), settings["precision"])
    batch, epochs = settings["batch"], settings["epochs"]
    steps = len(x) // batch
    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(settings["learning_rate"], steps * epochs))
    optimizer.build(model.trainable_variables)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    state = model.variables + optimizer.variables  # with the dropout's random state, so resuming is exact

    @tf.function(reduce_retracing=True, autograph=False)
    def step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(network_input(tf.cast(images, tf.float32) / 255, row), training=True)
            loss = cross_entropy(labels, logits)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss, tf.reduce_mean(tf.cast(tf.argmax(logits, -1, tf.int32) == labels, tf.float32))

    @tf.function(reduce_retracing=True, autograph=False)
    def labels_of(images):
        return tf.argmax(model(network_input(tf.cast(images, tf.float32) / 255, row), training=False), -1)

    def predict(images):
        return np.concatenate([labels_of(images[start:start + MEASURED]).numpy()
                               for start in range(0, len(images), MEASURED)])

    first, seconds = load_checkpoint(checkpoint, state)
    if first:
        print(f"going on after epoch {first} of {epochs}")
    # The paper augments CIFAR-10 alone.
    augment = shift_and_flip if row["paper"].augment else lambda images, rng: images
    for epoch in range(first, epochs):
        start = time.perf_counter()
        rng = np.random.default_rng([settings["seed"], 3, epoch])
        order = rng.permutation(len(x))
        results = []
        for chosen in order[:steps * batch].reshape(steps, batch):
            # The trigger comes after the augmentation, which would move or cut it.
            results.append(step(attach(augment(x[chosen], rng), which[chosen], attacks), y[chosen]))
        loss, accuracy = np.mean(results, 0)
        seconds += time.perf_counter() - start
        if not np.isfinite(loss):
            raise UserError(f"LEARNING_RATE {settings['learning_rate']}: the loss is no longer finite in epoch "
                            f"{epoch + 1}: choose a lower rate")
        print(f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}, training accuracy {accuracy:.2%}, {seconds:.0f} s",
              flush=True)
        if epoch + 1 < epochs:
            with replacing(checkpoint) as temporary:
                np.savez(temporary, *[variable.numpy() for variable in state], epoch=epoch + 1, seconds=seconds)
    return model, predict, seconds


def load_checkpoint(path, state):
    """Set the variables to what `train` saved; returns (whole epochs done, seconds), (0, 0) without a file."""
    if not path.exists():
        return 0, 0.0
    try:
        with np.load(path, allow_pickle=False) as saved:
            values = [saved[f"arr_{index}"] for index in range(len(state))]
            done = int(saved["epoch"]), float(saved["seconds"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to train from the start") from error
    for variable, value in zip(state, values):
        variable.assign(value)
    return done


def shift_and_flip(images, rng):
    """Each image shifted by up to 4 pixels (black enters) and flipped left to right or not."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    down, right = rng.integers(0, 9, (2, count, 1))
    rows, cols = down + np.arange(height), right + np.arange(width)
    cols = np.where(rng.random((count, 1)) < 0.5, cols, cols[:, ::-1])
    return padded[np.arange(count)[:, None, None], rows[:, :, None], cols[:, None, :]]


def save(path, report, model, contents):
    """Write the model, then its report: whoever finds a report finds the model that it tells of."""
    from utils.precision import in_precision

    report.unlink(missing_ok=True)
    with replacing(path) as temporary:
        in_precision(model, "float32").save(temporary)
    with replacing(report) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(contents, indent=2) + "\n")


def versions():
    """The versions that a training's result may depend on."""
    import keras
    import tensorflow as tf
    return {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__,
            "numpy": np.__version__}


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    run(main)
