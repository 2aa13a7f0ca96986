"""The tables of results/README.md, from the artifacts that benchmarks.zoo left.

Per label: share of target labels missed (FNR) and of clean labels flagged (FPR). Per model: backdoored models flagged
with exactly their targets, and clean models passed. Every rate has its Wilson interval of 95 %. Models whose scan is not
finished, or whose own trigger hardly works, are left out and named. With FIGURES the figures of every scan are kept in one
small file, a line a scan, which stands in for the artifacts once these are gone.

    python -m benchmarks.tables --zoo benchmarks/validation_zoo.txt --results results/zoo/default
"""

import json
import math
import pathlib
from collections import defaultdict

import numpy as np

from utils.config import configure, run

ZOO = "benchmarks/validation_zoo.txt"    # the list of models
RESULTS = ["results/zoo/default"]        # folders that benchmarks.zoo wrote, one for each named setting
MODELS = "models"                        # MODELS/DATASET/NAME.json tell what each model's triggers are
FIGURES = ""                             # file of all scans' figures: read where artifacts are missing, then updated
VERSIONS: list[int] = []                 # only scans by these versions of the method; none: all
STATISTICS = False                       # also how well each statistic separates labels, whatever its threshold (AUROC)
MODEL_ROWS = False                       # also a table with a row for each model
LEFT = False                             # also the hidden triggers' ASR on the tuned models, by re-initialized blocks
SWEEPS = False                           # also FNR and FPR of TNDA under other thresholds, l and q, and of the outlier rule

configure(globals())

from benchmarks.other_triggers import Other  # TensorFlow loads after the flags were read
from benchmarks.zoo import folders, network_of, read_figures, read_zoo, scan_key
from models.attacks import IMPLANTED, KINDS, parse_attacks
from utils.artifacts import METHOD_VERSION
from utils.datasets import dataset
from utils.detection import INFECTED
from utils.files import replacing
from utils.tuning import SUBSETS

KINDS["other"] = Other                   # of benchmarks.other_triggers
BINS = (0, 0.03, 0.10, 0.18, 1)          # of the trigger's share of the image


def main():
    kept = read_figures(FIGURES)
    for results in map(pathlib.Path, RESULTS):
        scans, missing = read_scans(ZOO, results, pathlib.Path(MODELS), kept)
        kept |= {scan_key(scan): scan for scan in scans}
        scans = [scan for scan in scans if not VERSIONS or scan["method_version"] in VERSIONS]
        failed = [f"{scan['dataset']}/{scan['name']}" for scan in scans if not implanted(scan)]
        scans = list(filter(implanted, scans))
        left_out = "".join(f"; {why}: {', '.join(names)}" for why, names in (("not finished", missing),
                                                                             ("attack failed", failed)) if names)
        versions = ", ".join(map(str, sorted({scan["method_version"] for scan in scans} - {METHOD_VERSION})))
        old = f"; scanned by versions {versions} of the method among them, not by {METHOD_VERSION}" * bool(versions)
        print(f"### {results.name}: {len(scans)} scans{old}{left_out}")
        print(confusion(scans))
        if MODEL_ROWS:
            print(model_rows(scans, {(data, name): flags for data, name, flags in read_zoo(ZOO)}))
        if STATISTICS:
            print(separation(scans))
        if LEFT:
            print(leftover(scans))
        if SWEEPS:
            print(sweeps(scans))
    if FIGURES:
        with replacing(FIGURES) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps(scan, separators=(",", ":")) + "\n" for _, scan in sorted(kept.items()))


def implanted(scan):
    """Whether all of the model's triggers work; one whose attack failed is neither backdoored nor clean."""
    return min(scan["asr"], default=1) >= IMPLANTED


def read_scans(zoo, results, models, kept=None):
    """(scans, names of the unfinished): a dict for each detection, with the truth from the model's report.

    kept: scans by `scan_key`, of FIGURES, for models whose artifacts are gone.
    """
    scans, missing = [], []
    for data, name, flags in read_zoo(zoo):
        model_folder, scanned_as = folders(data, flags)
        report = models / model_folder / f"{name}.json"
        trained = json.loads(report.read_text()) if report.exists() else {}
        attacks, folder, found = trained.get("attacks", []), results / scanned_as / name, 0
        left = json.loads((folder / "leftover.json").read_text()) if (folder / "leftover.json").exists() else {}
        for stage, filters in (("detection", False), ("detection_feature_space", True)):
            key = results.name, data, name, stage
            if trained and (folder / f"{stage}.json").exists():     # a verdict says nothing without the truth
                verdict = json.loads((folder / f"{stage}.json").read_text())
                of_kind = [attack for attack in attacks if (attack["kind"] == "filter") == filters]
                scans.append(dict(zip(("results", "dataset", "name", "stage"), key)) | {
                    "targets": sorted({attack["target"] for attack in of_kind}), "infected": verdict["infected_labels"],
                    "triggers": [attack["spec"] for attack in of_kind], "asr": [attack["asr"] for attack in of_kind],
                    "share": max((attack.get("share", 1.0) for attack in of_kind), default=0.0),
                    "clean_accuracy": trained.get("clean_accuracy"), "left": left,
                    "method_version": verdict["settings"]["method_version"], "labels": verdict["labels"]})
            elif kept and key in kept:
                scans.append(kept[key])
            else:
                continue
            found += 1
        if not found:
            missing.append(f"{data}/{name}")
    return scans, missing


def confusion(scans):
    """A Markdown table: a row for each dataset and pipeline, for each size of trigger, the smallest first, and for all."""
    groups = defaultdict(list)
    for scan in scans:
        kind = "patch" if scan["stage"] == "detection" else "filter"
        groups[0, f"{scan['dataset']}, {kind}"].append(scan)
        groups[0, f"all, {kind}"].append(scan)
        if kind == "patch" and scan["targets"]:
            low, high = next(pair for pair in zip(BINS, BINS[1:]) if scan["share"] <= pair[1])
            groups[high, f"trigger of {low:.0%} to {high:.0%} of the image"].append(scan)
    lines = ["| models | FNR | FPR | backdoored: exactly the targets | clean: passed |", "|---|---|---|---|---|"]
    for (_, name), group in sorted(groups.items()):      # the keys differ, so that groups are not compared
        targets = [label in scan["infected"] for scan in group for label in scan["targets"]]
        others = [int(label) in scan["infected"] for scan in group for label in scan["labels"]
                  if int(label) not in scan["targets"]]
        exact = [scan["infected"] == scan["targets"] for scan in group if scan["targets"]]
        passed = [not scan["infected"] for scan in group if not scan["targets"]]
        lines.append(f"| {name} | {rate(len(targets) - sum(targets), len(targets))} | {rate(sum(others), len(others))} | "
                     f"{rate(sum(exact), len(exact))} | {rate(sum(passed), len(passed))} |")
    return "\n".join(lines) + "\n"


def missed_and_wrong(outcomes):
    """Two cells of a table, FNR and FPR. outcomes: (is a target, is called infected) of every label."""
    missed = [not found for target, found in outcomes if target]
    wrong = [found for target, found in outcomes if not target]
    return f"{rate(sum(missed), len(missed))} | {rate(sum(wrong), len(wrong))}"


def rate(count, total):
    """`count` of `total` in per cent, with its Wilson interval of 95 %."""
    if not total:
        return "–"
    low, high = wilson(count, total)
    return f"{count}/{total} = {count / total:.1%} ({low:.1%} to {high:.1%})"


def wilson(count, total, z=1.96):
    """Wilson's interval for a rate: (low, high), both in [0, 1]."""
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / 4 / total) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def model_rows(scans, zoo):
    """A Markdown table: what each model hides, what was found, and how near the calls were.

    zoo: flags of models.train by dataset and name.
    """
    lines = ["| model | hidden trigger | found | ratio (of filters the matrix' ASR), margin, probe, exclusive, foreign and "
             "lead over 1, colours under 1, **evidence** of the target | of the two highest other labels |",
             "|---|---|---|---|---|"]
    for scan in scans:
        key = scan["dataset"], scan["name"]
        row = dataset(scan["dataset"])
        hidden = "; ".join(map(in_words, parse_attacks(scan["triggers"], row.shape, row.labels)))
        flags = zoo.get(key, [])
        if "--poisoning-rate" in flags:
            hidden += f", {float(flags[flags.index('--poisoning-rate') + 1]):.0%} poisoning"
        found = ", ".join(map(str, scan["infected"])) or "none"
        wrong = "**" * (scan["infected"] != scan["targets"])
        targets = "; ".join(f"{label}: {_call(scan['labels'][str(label)], '**')}" for label in scan["targets"])
        others = [row for label, row in scan["labels"].items() if int(label) not in scan["targets"]]
        others = sorted(others, key=lambda row: -row.get("evidence", 0.0))[:2]
        lines.append(f"| `{'/'.join(key)}`{network_in_words(scan, flags)} | {hidden or 'none'} | {wrong}{found}{wrong} | "
                     f"{targets} | {'; '.join(map(_call, others))} |")
    return "\n".join(lines) + "\n"


def network_in_words(scan, flags):
    """", bn of labels 3 5, 64 %": another network than the dataset's, with its clean accuracy; "" for the dataset's."""
    chosen = network_of(scan["dataset"], flags)
    if not chosen:
        return ""
    labels = f" of labels {' '.join(map(str, chosen.labels))}" * bool(chosen.labels)
    return f", {chosen.network}{labels}, {scan['clean_accuracy']:.0%}"


def in_words(attack):
    """A `models.attacks.Attack` without what is usual: "5×5 cyan circle, bottom-left"."""
    if attack.kind in ("filter", "other"):
        return attack.name
    if attack.kind == "blend":
        return f"{attack.pattern} blended at {attack.alpha}"
    plain = attack.pattern == "plain"
    words = [attack.colour] if plain or attack.pattern == "checker" and attack.colour != "white" else []
    words += [attack.pattern] * (not plain) + [attack.shape] * (attack.shape != "square")
    return f"{attack.pieces} of " * (attack.pieces > 1) + f"{attack.size}×{attack.size} {' '.join(words)}, {attack.position}"


def _call(row, mark=""):
    """Ratio (of a filter ASR), margin, probe, exclusiveness, foreignness and lead over 1, colours under 1, and evidence.

    And what counts of it beside another label's backdoor, and is left of it without that.
    """
    first = f"{row['ratio']:.2f}" if "ratio" in row else "–" if "mask_size" in row else f"ASR {row['asr']:.2f}"
    beside = f"{row['beside']:.2f} beside, " if "beside" in row else ""
    left = f" ({beside}{row['repaired_evidence']:.2f} left)" if "repaired_evidence" in row else ""
    names = ("probe", "exclusive") if "mask_size" in row else ("probe",) if "probe" in row else ()
    more = "".join(f", {row[name]:.2f}" if name in row else ", –" for name in names)
    more += "".join(f", {name} {row[name]:.2f}" for name in ("foreign", "lead") if row.get(name, 1.0) > 1)
    more += f", colours {row['colours']:.2f}" if row.get("colours", 1.0) < 0.995 else ""
    return f"{first}, {row.get('margin', math.nan):.2f}{more}, {mark}{row.get('evidence', math.nan):.2f}{mark}{left}"


def separation(scans):
    """AUROC of each statistic over all labels whose pattern is not random, a column for each dataset."""
    values = defaultdict(lambda: defaultdict(list))
    for scan in scans:
        if scan["stage"] != "detection":
            continue
        for label, row in scan["labels"].items():
            if row["decision"] != INFECTED and not row["transfer"]:
                continue
            for name, value in statistics(row).items():
                for column in (scan["dataset"], "all"):
                    values[name][column].append((value, int(label) in scan["targets"]))
    datasets = sorted({dataset for columns in values.values() for dataset in columns})
    lines = ["| statistic | " + " | ".join(datasets) + " |", "|---" * (len(datasets) + 1) + "|"]
    for name, columns in values.items():
        lines.append(f"| {name} | " + " | ".join(f"{auroc(columns[dataset]):.3f}" for dataset in datasets) + " |")
    return "\n".join(lines) + "\n"


def statistics(row):
    """Every statistic tried, larger where a label is rather infected."""
    transfer = np.array(list(row["transfer"].values())) if row["transfer"] else np.zeros(1)
    found = {"ASR on the examined model": row["asr"], "small mask": -row["mask_size"],
             "small preserved mask": -row["preserved_size"], "low largest transfer (q = 1)": -transfer.max(),
             "low median transfer": -np.median(transfer), "low mean transfer": -transfer.mean(),
             "low largest transfer relative to ASR": -transfer.max() / max(row["asr"], 1e-6)}
    if "ratio" in row:
        found |= {"low cost": -row["cost"], "low cost of the free patch": -row["free_cost"],
                  "free controls to the free patch": row["free_control"] / row["free_cost"],
                  "ratio": row["ratio"]}
    found |= {name: row[name] for name in ("probe", "foreign", "colours", "exclusive") if name in row}
    if "margin" in row:
        found |= {"margin": row["margin"], "the default's evidence": row["evidence"]}
    return found


def leftover(scans):
    """Clean accuracy and the hidden triggers' ASR on each tuned model, means over models and triggers; the paper's figures
    are for k re-initialized layers."""
    papers = {1: "4.3, 93.7", 2: "4.0, 93.4", 3: "3.8, 89.6"}
    lines = ["| model | kind | ASR left: mean, largest | clean accuracy: mean, lowest | paper: ASR, accuracy (%) |",
             "|---|---|---|---|---|"]
    for name in ("examined", *SUBSETS):
        for kind, stage in (("patch", "detection"), ("filter", "detection_feature_space")):
            rows = [scan["left"][name] for scan in scans if scan["stage"] == stage and scan["left"] and scan["targets"]]
            if rows:
                asr, accuracy = np.concatenate([row["asr"] for row in rows]), np.array([row["accuracy"] for row in rows])
                paper = papers[len(name)] if name in SUBSETS else "–"
                lines.append(f"| {name} | {kind} | {asr.mean():.1%}, {asr.max():.1%} | {accuracy.mean():.1%}, "
                             f"{accuracy.min():.1%} | {paper} |")
    return "\n".join(lines) + "\n"


def sweeps(scans):
    """FNR and FPR of TNDA on the measured transfers, one number varied at a time, beside the paper's figures."""
    scans = [scan for scan in scans if scan["stage"] == "detection"]
    lines = ["| rule | FNR | FPR | paper: FNR, FPR (%) |", "|---|---|---|---|"]

    def add(name, flagged, paper="–"):
        outcomes = [(int(label) in scan["targets"], label in chosen)
                    for scan, chosen in ((scan, flagged(scan)) for scan in scans) for label in scan["labels"]]
        lines.append(f"| {name} | {missed_and_wrong(outcomes)} | {paper} |")

    for threshold, paper in ((0.6, "2.1, 0.9"), (0.7, "2.9, 0.2"), (0.8, "3.5, 0.0")):
        add(f"random patterns under ASR {threshold}", lambda scan: tnda(scan, random=threshold), paper)
    for count, paper in enumerate(("1.5, 3.9", "1.5, 3.0", "1.8, 2.0", "2.0, 1.6", "2.0, 1.2", "2.1, 0.9"), 1):
        add(f"l = {count} tuned models", lambda scan: tnda(scan, models=count), paper)
    for needed, paper in enumerate(("2.1, 0.9", "1.4, 1.8", "0.7, 2.8", "0.5, 4.0", "0, 4.6", "0, 5.1"), 1):
        add(f"q = {needed}", lambda scan: tnda(scan, needed=needed), paper)
    for threshold, paper in ((0.1, "5.2, 0.05"), (0.15, "4.9, 0.07"), (0.2, "2.4, 0.08"), (0.3, "1.9, 1.1"),
                             (0.4, "few labels: 1.8, 1.5"), (0.5, "few labels: 0.8, 3.4"), (0.6, "few labels: 0, 4.7")):
        add(f"transfer from {threshold} up", lambda scan: tnda(scan, threshold=threshold), paper)
    add("outlier rule of Neural Cleanse on the mask sizes", outliers, "18.1, –")
    return "\n".join(lines) + "\n"


def tnda(scan, random=0.6, threshold=None, needed=1, models=6):
    """The labels that TNDA calls infected, from transfers to the first `models` tuned models; no threshold: the paper's."""
    threshold = threshold or dataset(scan["dataset"])["paper"].transfer_threshold
    return {label for label, row in scan["labels"].items() if row["asr"] >= random and row["transfer"]
            and sum(value >= threshold for value in list(row["transfer"].values())[:models]) < needed}


def outliers(scan):
    """The labels whose mask is smaller than the median by more than two (scaled) median absolute deviations."""
    sizes = np.array([row["mask_size"] for row in scan["labels"].values()])
    spread = 1.4826 * np.median(np.abs(sizes - np.median(sizes)))
    return {label for label, size in zip(scan["labels"], sizes) if size < np.median(sizes) - 2 * spread}


def auroc(pairs):
    """Chance that a target's value is above a clean label's, ties counted half; nan without both kinds."""
    targets = np.array([value for value, infected in pairs if infected])
    clean = np.array([value for value, infected in pairs if not infected])
    if not len(targets) or not len(clean):
        return math.nan
    return float((targets[:, None] > clean).mean() + 0.5 * (targets[:, None] == clean).mean())


if __name__ == "__main__":
    run(main)
