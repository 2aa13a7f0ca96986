"""Train a zoo of models and scan each with the stages that its triggers ask for.

A zoo is a text file: a dataset, a name and flags of models.train on each line, or of benchmarks.other_networks or
benchmarks.other_triggers, whose models are trained by these. Patch models run the patch stages, filter models the
feature-space stages, clean models both where images have colours. What is done already is kept, so the same command goes
on where it stopped; each model's output is in RESULTS/DATASET/NAME.log, DATASET being `custom` for other networks.

    python -m benchmarks.zoo --zoo benchmarks/validation_zoo.txt --processes 2
"""

import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from utils.config import UserError, configure, run
from utils.datasets import dataset

ZOO = "benchmarks/validation_zoo.txt"    # the list of models
DATASETS: list[str] = []                 # only these datasets' models; none: all
NAMES: list[str] = []                    # only models of these names; none: all
CLEAN_PER_LABEL: int | None = None       # clean images of each label that a scan uses at most; none: the dataset's number
PROCESSES = 2                            # models at work at a time, which share the processor's cores
SETTINGS = "default"                     # named setting of the scans
RESULTS = "results/zoo/default"          # artifacts and logs of the scans; another folder for other settings
MODELS = "models"                        # trained models go to MODELS/DATASET/NAME.keras
PRECISION = "float32"                    # of the networks, in training and in scans: float32 or mixed_bfloat16
FIGURES = ""                             # of benchmarks.tables: models with figures of this version are not scanned again

configure(globals(), tensorflow=False)

from benchmarks import other_networks  # h5py loads after the flags were read
from utils.artifacts import METHOD_VERSION

PATCH = ("potential_triggers_reconstruction.py", "critical_features_preservation.py", "backdoor_detection.py")
FILTER = ("potential_triggers_reconstruction_feature_space.py", "backdoor_detection_feature_space.py")


def main():
    known = {key[1:] for key, scan in read_figures(FIGURES).items()
             if key[0] == pathlib.Path(RESULTS).name and scan["method_version"] == METHOD_VERSION}

    def verdicts(row, name, flags):
        return {(row, name, stages[-1].removeprefix("backdoor_").removesuffix(".py"))
                for stages in stages_of(dataset(row), flags)}
    if PROCESSES < 1:
        raise UserError(f"PROCESSES {PROCESSES} must be 1 or more")
    models = [model for model in chosen_models(ZOO, DATASETS, NAMES) if not verdicts(*model) <= known]
    threads = str(max(1, (os.cpu_count() or 1) // PROCESSES))
    environment = os.environ | {"TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": threads,
                                "TF_CPP_MIN_LOG_LEVEL": "3"}
    with ThreadPoolExecutor(PROCESSES) as pool:
        failed = [name for name in pool.map(lambda model: scan(*model, environment), models) if name]
    if failed:
        raise UserError(f"{', '.join(failed)} failed: their logs in {RESULTS} tell why")


def read_zoo(path):
    """(dataset, name, flags of models.train) of every line of a zoo file. Raises UserError naming a line's fault."""
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"ZOO {path} cannot be read: {error.strerror}") from error
    models = []
    for number, line in enumerate(lines, 1):
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line))         # a colour in a word, #00ffff, is no comment
        if not words:
            continue
        if len(words) < 2 or words[1].startswith("-"):
            raise UserError(f"{path}, line {number}: expected a dataset, a name and flags of models.train")
        dataset(words[0])
        models.append((words[0], words[1], words[2:]))
    return models


def chosen_models(path, datasets, names):
    """What `read_zoo` gives, of these datasets and names alone; none: of all. Raises UserError naming unknown names."""
    zoo = [model for model in read_zoo(path) if not datasets or model[0] in datasets]
    if unknown := set(names) - {name for _, name, _ in zoo}:
        raise UserError(f"NAMES {', '.join(sorted(unknown))}: no models of {path}{' and DATASETS' if datasets else ''}")
    return [model for model in zoo if not names or model[1] in names]


def read_figures(path):
    """What benchmarks.tables keeps of every scan: a dict by `scan_key`."""
    if not path or not pathlib.Path(path).exists():
        return {}
    return {scan_key(scan): scan for scan in map(json.loads, pathlib.Path(path).read_text().splitlines())}


def scan_key(scan):
    """The results folder's name, dataset, model and stage."""
    return scan["results"], scan["dataset"], scan["name"], scan["stage"]


def stages_of(row, flags):
    """The scripts after pnnir.py that a model's triggers ask for, those of patches, of filters, or both."""
    attacks = {word.split(":")[0] for word in flags if word.startswith(("patch:", "blend:", "filter:", "other:"))}
    return [PATCH] * (not attacks or bool(attacks - {"filter"})) + [FILTER] * (
        row.shape[-1] == 3 and (not attacks or "filter" in attacks))


def trainer(flags):
    """The module that trains a model of these flags."""
    if "--network" in flags:
        return "benchmarks.other_networks"
    return "benchmarks.other_triggers" if any(word.startswith("other:") for word in flags) else "models.train"


def network_of(data, flags):
    """Another network than that of the dataset `data` and its labels, as `other_networks.read_flags` gives them, or none."""
    if trainer(flags) == "benchmarks.other_networks":
        return other_networks.read_flags([*flags, "--dataset", data])[0]


def folders(data, flags):
    """(below MODELS, below RESULTS): where a model of the dataset `data` is, and where its artifacts are."""
    network = network_of(data, flags)
    return (f"{other_networks.subfolder(network)}/{data}", "custom") if network else (data, data)


def commands(row, name, flags):
    """Every command that one model needs, in order."""
    module, (model_folder, scanned_as) = trainer(flags), folders(row.name, flags)
    yield ["-m", module, "--dataset", row.name, "--name", name, "--models", MODELS, "--precision", PRECISION, *flags]
    options = ["--dataset", scanned_as, "--models", f"{MODELS}/{model_folder}/{name}.keras",
               "--settings", SETTINGS, "--precision", PRECISION, "--results", RESULTS]
    if CLEAN_PER_LABEL:
        options += ["--clean-per-label", str(CLEAN_PER_LABEL)]
    if scanned_as == "custom":
        options += ["--clean-data", f"{MODELS}/{model_folder}/clean.h5", "--input-range", "0,1"]
    for stage in ("pnnir.py", *itertools.chain(*stages_of(row, flags))):
        yield [stage, *options]
    if module == "models.train":
        yield ["-m", "benchmarks.leftover", *options]


def scan(dataset_name, name, flags, environment):
    """Train and scan one model; returns its name if a command failed."""
    log = pathlib.Path(RESULTS, folders(dataset_name, flags)[1], name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    seconds = []
    with open(log, "a") as output:
        for command in commands(dataset(dataset_name), name, flags):
            start = time.time()
            print("$ python", shlex.join(command), file=output, flush=True)
            if subprocess.run([sys.executable, *command], stdout=output, stderr=output, env=environment).returncode:
                print(f"{dataset_name}/{name}: FAILED, {log} tells why", flush=True)
                return f"{dataset_name}/{name}"
            seconds.append(time.time() - start)
    verdicts = [line for line in log.read_text().splitlines() if line.startswith("verdict: ")]
    print(f"{' '.join(f'{value:.0f}' for value in seconds)} s; {'; '.join(dict.fromkeys(verdicts[-2:]))}", flush=True)


if __name__ == "__main__":
    run(main)
