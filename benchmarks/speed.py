"""How fast the stages are, as ratios measured in one run on one machine; larger is faster for us.

    python -m benchmarks.speed

Uses GTSRB's network, with random weights and random images where time does not depend on the values. Each figure compares
the medians of RUNS runs that alternate with those of the reference, after one run of each that compiles. Prints a table
and writes OUTPUT (JSON).
"""

import contextlib
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

from utils.config import configure, run

OUTPUT = "benchmarks/results.json"   # the figures as JSON
RUNS = 3                     # timed runs of each figure and of its reference
STEPS = 3                    # of reconstruction in a timed run
PHASE_STEPS = 50             # of PNNIR's phase 1 in a timed run for one block, twice and three times as many for more
CLEAN_PER_LABEL = 30         # images to tune on: a sixth of the default's for GTSRB
TRAINING_STEPS = 150         # of the network whose triggers are preserved and detected
TRIGGER_STEPS = 150          # with which these triggers are reconstructed
PRESERVED_LABELS = 6         # labels of the 43 whose triggers are preserved and detected
GROWTH_LABELS = [10, 43, 200, 1000]  # rows of the growth table
GROWTH_STEPS = 10            # of reconstruction in it
ALONE = ""                   # measure reconstruction alone: gtsrb, or a number of labels of a small network
configure(globals())

import cv2
import keras
import numpy as np
import tensorflow as tf

from benchmarks import published
from models.architectures import build, convnet
from utils import detection, preservation, tuning
from utils.artifacts import Stage
from utils.clean_data import CleanData, Sampler
from utils.datasets import dataset
from utils.examination import Examination, classifier, weights_of
from utils.examined_model import ExaminedModel
from utils.files import replacing
from utils.images import network_input
from utils.reconstruction import PatchTrigger, Reconstructor, reconstruction
from utils.topology import block_layers

GTSRB = dataset("gtsrb")


def main():
    if ALONE:
        print(json.dumps(reconstruct_alone()))
        return
    start, results = time.time(), {"machine": machine(), "runs": {}}
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items()), flush=True)
    for measure in (reconstruction_ratios, phase1_ratio, phase2_ratio, preservation_detection_ratio):
        for name, figures in measure().items():
            results[name], results["runs"][name] = figures.pop("ratio"), figures
            print(f"{name:40} {results[name]:7.2f}   ours {seconds(figures['ours'])}, "
                  f"reference {seconds(figures['reference'])}", flush=True)
    results["peak_rss_bytes"] = alone("gtsrb", STEPS)["peak_rss_bytes"]
    print(f"{'peak memory, reconstruction of 43 labels':40} {results['peak_rss_bytes'] / 2**30:7.2f} GiB", flush=True)
    results["growth"] = [alone(labels, GROWTH_STEPS) for labels in GROWTH_LABELS]
    for row in results["growth"]:
        print("{labels:>6} labels, {steps} steps: {0:7.1f} s, {1:5.2f} GiB".format(
            row["seconds"], row["peak_rss_bytes"] / 2**30, **row), flush=True)
    with replacing(OUTPUT) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {OUTPUT} after {time.time() - start:.0f} s")


def reconstruction_ratios():
    """All labels at once, against one at a time, and against nothing but passes through both networks."""
    scene, labels = examination(GTSRB), range(GTSRB.labels)
    settings = replace(GTSRB["default"], steps=STEPS)
    attacked, control = scene.model, classifier(keras.models.clone_model(scene.examined.network), scene.examined.preprocess)
    images, y = scene.clean.x_tune, scene.clean.y_tune
    trigger = PatchTrigger(labels, GTSRB.shape, settings, 0)
    optimize = reconstruction(trigger, attacked, control, tf.constant(images), Sampler(y, GTSRB.labels), settings, 0)
    one = published.Reconstruction(attacked, control, GTSRB.shape, settings, 0)
    random, others = np.random.default_rng(0), [np.flatnonzero(y != label) for label in labels]
    batch = tf.constant(random.random((GTSRB.labels * settings.images_per_label, *GTSRB.shape), np.float32))

    @tf.function
    def both(x):
        gradients = []
        for model in (attacked, control):
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = tf.reduce_sum(model(x))
            gradients.append(tape.gradient(total, x))
        return gradients

    def ours():
        trigger.start(labels, 0)
        optimize(labels)

    def per_label():
        for label in labels:
            one.reconstruct(label, lambda _: images[random.choice(others[label], settings.images_per_label)])

    def bare():
        for _ in range(STEPS):
            both(batch)
    return compare(ours, reconstruction_vs_per_label=per_label, reconstruction_vs_bare=bare)


def phase1_ratio():
    """Phase 1 of all seven tuned models on kept features, the time to compute these included, or on the whole network."""
    scene = examination(GTSRB)
    network, room = scene.examined.network, tuning.CACHED_BYTES
    chosen = {subset: [layer for block in subset for layer in block_layers(network, GTSRB.blocks[int(block) - 1])]
              for subset in tuning.SUBSETS}

    def trainers(subsets):
        tuner = tuning.Tuner(scene.examined, scene.clean, scene.settings)
        return [(tuner.phase1(chosen[subset]), PHASE_STEPS * len(subset)) for subset in subsets]

    def train(compiled):
        for trainer, steps in compiled:
            trainer.train(steps, 0)
    kept = trainers(tuning.SUBSETS)
    tuning.CACHED_BYTES = 0                          # no room for features
    whole = trainers(tuning.SUBSETS)
    tuning.CACHED_BYTES = room

    def ours():
        trainers("123")                              # features for block 1, 2 and 3, which all subsets share
        train(kept)
    return compare(ours, phase1_vs_full=lambda: train(whole))


def phase2_ratio():
    """Training of the whole network, against Keras' own `fit` on images that are scaled already."""
    scene, batch = examination(GTSRB), GTSRB["default"].batch
    tuner, steps = tuning.Tuner(scene.examined, scene.clean, scene.settings), len(scene.clean.y_tune) // batch
    network = keras.models.clone_model(scene.examined.network)
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    x, y = scene.examined.preprocess(scene.clean.x_tune / np.float32(255)), scene.clean.y_tune
    return compare(lambda: tuner.phase2.train(4 * steps, 0),
                   phase2_vs_fit=lambda: network.fit(x[:steps * batch], y[:steps * batch], batch, epochs=4, verbose=0))


def preservation_detection_ratio():
    """Patches that do reach their label, since it is by what they look at that the time is decided: reconstructed for a
    network trained on `coloured_fields`, without a control model. The tuned models' weights are random."""
    scene = examination(GTSRB, coloured_fields())
    # A network that starts from nothing may die of the default's peak of 0.01: it did on one of two processors. At this
    # price the patches cover what they do on real networks of this kind, 11 to 22 % of the image, at an ASR over 0.8.
    scene = replace(scene, settings=replace(scene.settings, phase2_peak=0.003, steps=TRIGGER_STEPS, pixel_price=0.02))
    tuning.Tuner(scene.examined, scene.clean, scene.settings).phase2.train(TRAINING_STEPS, 0)
    tested = np.linspace(0, GTSRB.labels - 1, PRESERVED_LABELS).astype(int)

    def nothing(images):
        return tf.zeros((images.shape[0], GTSRB.labels))
    with stage("potential_triggers") as kept:
        rows = Reconstructor(PatchTrigger, scene, {"examined": scene.model, "123": nothing}, "examined/123", kept)(tested)
    found = {name: np.zeros((GTSRB.labels, *array.shape[1:]), np.float32) for name, array in rows.items()}
    for name, array in rows.items():
        found[name][tested] = array                  # all other labels count as random patterns and are left out
    tuned = {name: {"weights": weights_of(build(GTSRB))} for name in tuning.HELD_OUT}
    heat = preservation.grad_cam(scene.examined.network, GTSRB.feature_map)
    transfers = published.Transfers(scene, tuned)
    answers = {}

    def ours():
        with stage("preserved_triggers") as kept:
            preserved = preservation.preserve_all(scene, found, kept)
        measured = detection.measure_transfers(scene, tuned, found | {"mask": preserved["mask"]})
        answers["ours"] = preserved["threshold"][tested], measured[tested]

    def reference():
        thresholds, rows = [], []
        for label in tested:
            trigger = {name: found[name][label] for name in ("mask", "pattern")}
            images = scene.clean.x_measure[scene.measured[label]]
            threshold, trigger["mask"], _ = published.preserve(scene.model, heat, scene.examined.preprocess, images, trigger,
                                                               label, scene.settings.kept_asr)
            thresholds.append(threshold)
            rows.append(transfers.measure(trigger, label))
        answers["reference"] = np.array(thresholds), np.array(rows)
    figures = compare(ours, preservation_detection_vs_published=reference)
    print(f"triggers of {len(tested)} labels, ASR {rows['asr'].min():.2f} to {rows['asr'].max():.2f}, "
          f"{rows['mask'].mean():.0%} of the image, thresholds {sorted(answers['reference'][0].round(2).tolist())}; ours "
          f"differ by {np.abs(answers['ours'][0] - answers['reference'][0]).max():.2f} at most, transfers by "
          f"{np.abs(answers['ours'][1] - answers['reference'][1]).max():.3f}")
    return figures


def reconstruct_alone():
    """Seconds and peak memory of a `Reconstructor` in this process, its compilation and the measurements included."""
    row = GTSRB
    if ALONE != "gtsrb":
        row = replace(GTSRB, name="small", labels=int(ALONE))
    scene = examination(row)
    settings = replace(row["default"], steps=STEPS)
    scene = replace(scene, settings=settings)
    control = classifier(keras.models.clone_model(scene.examined.network), scene.examined.preprocess)
    models, start = {"examined": scene.model, "123": control}, time.perf_counter()
    with stage("potential_triggers") as kept:
        Reconstructor(PatchTrigger, scene, models, "examined/123", kept)(range(row.labels))
    return {"labels": row.labels, "steps": STEPS, "seconds": round(time.perf_counter() - start, 2),
            "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes():
    """This process's own peak: getrusage starts, after a fork, from the peak of the process that forked."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def alone(what, steps):
    """What `reconstruct_alone` finds in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed", "--alone", str(what), "--steps", str(steps)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours, **references):
    """Time `ours` and each reference in turn; for each reference the ratio of the medians and all seconds, sorted."""
    runs = {"ours": ours} | references
    found = {name: [] for name in runs}
    for number in range(RUNS + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if number:                               # the first one compiles
                found[name].append(round(time.perf_counter() - start, 4))
    median = {name: statistics.median(times) for name, times in found.items()}
    return {name: {"ratio": round(median[name] / median["ours"], 3), "ours": sorted(found["ours"]),
                   "reference": sorted(found[name])} for name in references}


def examination(row, clean=None):
    """An examined model of a row's shape and labels, with random weights; clean images are random where none are given."""
    keras.utils.set_random_seed(0)
    network = build(row) if row is GTSRB else convnet(row.shape, row.labels, ((8, 8), (16, 16)), 32, row.name)
    if clean is None:
        random, parts = np.random.default_rng(0), []
        for count in (CLEAN_PER_LABEL if row is GTSRB else 2, 10 if row is GTSRB else 1):
            y = np.repeat(np.arange(row.labels, dtype=np.int32), count)
            parts += [random.integers(0, 256, (len(y), *row.shape)).astype(np.uint8), y]
        clean = CleanData(*parts, fingerprint="")

    def preprocess(images):
        return network_input(images, row)
    examined = ExaminedModel(row.name, pathlib.Path(), network, preprocess, row.blocks, row.feature_map, row.labels,
                             row.shape, "")
    return Quiet(examined, clean, row, row["default"], pathlib.Path(), 0, False, classifier(network, preprocess), 1.0, None)


class Quiet(Examination):
    """An examination that does not tell how far it is."""

    def say(self, text):
        pass


def coloured_fields():
    """Clean data of 43 labels that a network tells apart after a hundred steps: each label's own smooth field of colours,
    shifted by up to four pixels, darker or brighter, and noisy."""
    random, parts = np.random.default_rng(0), []
    fields = [cv2.resize(random.normal(0, 60, (8, 8, 3)), (40, 40), interpolation=cv2.INTER_CUBIC)
              for _ in range(GTSRB.labels)]
    for count in (CLEAN_PER_LABEL, 10):
        y = np.repeat(np.arange(GTSRB.labels, dtype=np.int32), count)
        x = [fields[label][down:down + 32, right:right + 32] for label, (down, right)
             in zip(y, random.integers(0, 9, (len(y), 2)))] + random.normal(128, 30, (len(y), 1, 1, 1))
        parts += [np.clip(x + random.normal(0, 15, x.shape), 0, 255).astype(np.uint8), y]
    return CleanData(*parts, fingerprint="")


@contextlib.contextmanager
def stage(name):
    """An artifact that nobody needs afterwards."""
    with tempfile.TemporaryDirectory() as folder, Stage(folder, name, {}) as kept:
        yield kept


def machine():
    cpus = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")] \
        if cpus.exists() else []
    return {"processor": (names or [platform.machine()])[0], "cores": os.cpu_count(),
            "load before": round(os.getloadavg()[0], 2), "python": platform.python_version(), "tensorflow": tf.__version__,
            "keras": keras.__version__, "numpy": np.__version__}


def seconds(times):
    return f"{statistics.median(times):.2f} s ({times[0]:.2f} to {times[-1]:.2f})"


if __name__ == "__main__":
    run(main)
