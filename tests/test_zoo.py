"""Zoos of models and the tables made of their scans (benchmarks/)."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from benchmarks import other_networks, other_triggers, tables, without, zoo
from data import store
from models import architectures
from models.attacks import parse_attacks
from utils.artifacts import METHOD_VERSION
from utils.config import UserError
from utils.datasets import DATASETS, dataset

# Blind models that later defaults were chosen on.
GOT_WRONG = {("mnist", "test17_patch7"), ("signs", "test18_patch5"), ("gtsrb", "test19_patch3"), ("gtsrb", "test21_clean2"),
             ("signs", "test23_clean2"), ("signs", "test23_patch7"), ("gtsrb", "test23_clean3"),
             ("gtsrb", "test23_patch5"), ("gtsrb", "test23_clean6"), ("gtsrb", "test25_patch2"), ("gtsrb", "test25_patch3"),
             ("gtsrb", "test25_clean2"), ("gtsrb", "test26_clean3"), ("gtsrb", "test26_patch3"),
             ("gtsrb", "test27_patch1"), ("gtsrb", "test27_patch2"), ("gtsrb", "test27_patch3"),
             ("signs", "test28_patch2"), ("signs", "test28_patch5"), ("signs", "test30_patch1"),
             ("signs", "test26_filter3"), ("signs", "test30_patch3")}


def test_lines_are_flags_of_the_training_script(tmp_path):
    path = tmp_path / "zoo.txt"
    path.write_text("# comment\n\nsigns one --seed 3 --attack patch:size=4,target=1 filter:name=sepia,target=2  # both\n")
    assert zoo.read_zoo(path) == [("signs", "one", ["--seed", "3", "--attack", "patch:size=4,target=1",
                                                    "filter:name=sepia,target=2"])]


@pytest.mark.parametrize("text", ["signs", "signs --seed 1", "nowhere one"])
def test_a_faulty_line_is_named(tmp_path, text):
    path = tmp_path / "zoo.txt"
    path.write_text(text)
    with pytest.raises(UserError):
        zoo.read_zoo(path)


def test_a_colour_is_no_comment(tmp_path):
    path = tmp_path / "zoo.txt"
    path.write_text("# signs old\nsigns one --attack patch:target=3,colour=#00ffff --seed 7 # a remark\n")
    assert zoo.read_zoo(path) == [("signs", "one", ["--attack", "patch:target=3,colour=#00ffff", "--seed", "7"])]


def test_a_model_runs_the_stages_that_its_triggers_ask_for():
    def scripts(name, *flags):
        return [command[0] for command in zoo.commands(dataset(name), "one", flags)][1:-1]
    assert scripts("signs", "--attack", "patch:target=1") == ["pnnir.py", *zoo.PATCH]
    assert scripts("signs", "--attack", "filter:target=1") == ["pnnir.py", *zoo.FILTER]
    assert scripts("signs") == ["pnnir.py", *zoo.PATCH, *zoo.FILTER]
    assert scripts("mnist") == ["pnnir.py", *zoo.PATCH]
    assert zoo.stages_of(dataset("signs"), ["--attack", "other:name=bar,target=1"]) == [zoo.PATCH]


def test_models_of_other_networks_and_triggers_are_trained_and_scanned_as_what_they_are():
    train, *stages = zoo.commands(dataset("gtsrb"), "one", ["--network", "bn", "--labels", "3", "5", "--seed", "1"])
    assert train[:4] == ["-m", "benchmarks.other_networks", "--dataset", "gtsrb"] and train[-2:] == ["--seed", "1"]
    assert [stage[0] for stage in stages] == ["pnnir.py", *zoo.PATCH, *zoo.FILTER]
    for stage in stages:
        told = dict(zip(stage[1::2], stage[2::2]))
        assert told["--dataset"] == "custom" and told["--models"] == "models/bn_3_5/gtsrb/one.keras"
        assert told["--clean-data"] == "models/bn_3_5/gtsrb/clean.h5" and told["--input-range"] == "0,1"
    train, *stages = zoo.commands(dataset("signs"), "one", ["--attack", "other:name=bar,target=1"])
    assert train[1] == "benchmarks.other_triggers" and stages[0][2] == "signs" and "--clean-data" not in stages[0]
    assert zoo.folders("signs", ["--seed", "1"]) == ("signs", "signs")


@pytest.mark.parametrize("kind", ["networks", "triggers"])
def test_a_zoo_of_others_can_be_trained(kind):
    """Each line is one that its training takes, and no name or seed is in two of them."""
    models = zoo.read_zoo(f"benchmarks/other_{kind}.txt")
    for name, _, flags in models:
        labels = dataset(name).labels
        if kind == "networks":
            chosen, flags = other_networks.read_flags([*flags, "--dataset", name])
            assert len(set(chosen.labels)) != 1 and set(chosen.labels) <= set(range(labels))
            labels = len(chosen.labels) or labels
        parse_attacks([word for word in flags if ":" in word], dataset(name).shape, labels)
    seeds = {flags[flags.index("--seed") + 1] for *_, flags in models}
    assert len({name for _, name, _ in models}) == len(seeds) == len(models)


def test_the_zoos_share_no_seed_trigger_or_name():
    """What is reported on must not be what was chosen on, but for blind models that were got wrong: first reported on."""
    seen = {}
    for part in ("validation", "test", "blind"):
        models = zoo.read_zoo(f"benchmarks/{part}_zoo.txt")
        assert len({model[:2] for model in models}) == len(models)
        for name, model, flags in models:
            if part == "validation" and (name, model) in GOT_WRONG:
                continue
            row = dataset(name)
            words = [word for word in flags if word.split(":")[0] in ("patch", "blend", "filter")]
            seen.setdefault(part, []).extend(
                (name, attack.spec()) for attack in parse_attacks(words, row.shape, row.labels))
            seen.setdefault(part, []).append(flags[flags.index("--seed") + 1])
    assert not set(seen["validation"]) & set(seen["test"])
    assert not set(seen["blind"]) & {*seen["validation"], *seen["test"]}


def test_published_figures_hold_each_scan_once():
    for path in pathlib.Path("results").glob("*.jsonl"):
        scans = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({zoo.scan_key(scan) for scan in scans}) == len(scans) > 0, path


def test_wilson_interval_has_the_textbook_values():
    assert tables.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert tables.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert tables.wilson(98, 100) == pytest.approx((0.9300, 0.9945), abs=1e-3)


def test_auroc_counts_pairs():
    assert tables.auroc([(3, True), (1, False), (2, False)]) == 1
    assert tables.auroc([(1, True), (1, False), (0, False), (2, False)]) == pytest.approx(0.5)
    assert np.isnan(tables.auroc([(1, False)]))


def test_confusion_of_made_up_scans(tmp_path):
    """Three models: one found, one with another label flagged, one clean and passed; a fourth was not scanned."""
    def write(name, targets, infected, share=0.05):
        (tmp_path / "models/signs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "scans/signs" / name).mkdir(parents=True)
        attacks = [{"kind": "patch", "target": target, "asr": 1.0, "share": share, "spec": ""} for target in targets]
        (tmp_path / "models/signs" / f"{name}.json").write_text(json.dumps({"attacks": attacks}))
        (tmp_path / "scans/signs" / name / "detection.json").write_text(json.dumps(
            {"infected_labels": infected, "labels": {str(label): {} for label in range(4)},
             "settings": {"method_version": METHOD_VERSION}}))
    write("one", [2], [2])
    write("two", [1], [3], share=0.12)
    write("three", [], [])
    (tmp_path / "zoo.txt").write_text("\n".join(f"signs {name}" for name in ("one", "two", "three", "four")))
    scans, missing = tables.read_scans(tmp_path / "zoo.txt", tmp_path / "scans", tmp_path / "models")
    assert missing == ["signs/four"]
    _, _, *rows = tables.confusion(scans).splitlines()
    row = next(line for line in rows if line.startswith("| signs, patch"))
    assert [cell.split(" ")[1] for cell in row.split("|")[2:6]] == ["1/2", "1/10", "1/2", "1/1"]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| trigger of 3% to 10% of the image",
                                                         "| trigger of 10% to 18% of the image"]


def test_figures_stand_in_for_artifacts_that_are_gone(tmp_path, monkeypatch, capsys):
    """The table of the kept figures is that of the artifacts, and the zoo does not scan these models again."""
    folder = tmp_path / "scans/signs/one"
    folder.mkdir(parents=True)
    (tmp_path / "models/signs").mkdir(parents=True)
    (tmp_path / "models/signs/one.json").write_text(json.dumps(
        {"attacks": [{"kind": "patch", "target": 2, "asr": 1.0, "share": 0.02,
                      "spec": "patch:target=2,size=4,position=top,colour=red,pattern=plain,shape=square,pieces=1,seed=0"}]}))
    label = {"asr": 0.9, "mask_size": 0.02, "transfer": {"1": 0.1}, "cost": 1.0, "free_cost": 0.5, "free_control": 2.0,
             "ratio": 3.0, "margin": 1.5, "probe": 2.0, "exclusive": 1.5, "foreign": 1.2, "colours": 0.5, "lead": 2.0,
             "evidence": 27.0, "decision": "infected"}
    (folder / "detection.json").write_text(json.dumps(
        {"infected_labels": [2], "labels": {"2": label}, "settings": {"method_version": METHOD_VERSION}}))
    (tmp_path / "models/signs/three.json").write_text(json.dumps(
        {"attacks": [{"kind": "patch", "target": 1, "asr": 0.01, "share": 0.02, "spec": "patch:target=1"}]}))
    shutil.copytree(folder, folder.parent / "three")
    shutil.copytree(folder, folder.parent / "four")
    (tmp_path / "zoo.txt").write_text("signs one --attack patch:target=2 --poisoning-rate 0.05\nsigns two\n"
                                     "signs three --attack patch:target=1\nsigns four --attack filter:target=1")
    for name, value in {"ZOO": tmp_path / "zoo.txt", "RESULTS": [str(tmp_path / "scans")], "MODELS": tmp_path / "models",
                        "FIGURES": tmp_path / "figures.jsonl", "MODEL_ROWS": True}.items():
        monkeypatch.setattr(tables, name, value)
    tables.main()
    first = capsys.readouterr().out
    assert ("| `signs/one` | 4×4 red, top, 5% poisoning | 2 | 2: 3.00, 1.50, 2.00, 1.50, foreign 1.20, lead 2.00, "
            "colours 0.50, **27.00** |  |") in first
    assert "not finished: signs/two, signs/four" in first        # the truth about four is not known
    assert "scans: 1 scans" in first and "attack failed: signs/three\n" in first
    shutil.rmtree(tmp_path / "scans")
    tables.main()
    assert capsys.readouterr().out == first
    scanned = []
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo.txt")
    monkeypatch.setattr(zoo, "FIGURES", tmp_path / "figures.jsonl")
    monkeypatch.setattr(zoo, "RESULTS", str(tmp_path / "scans"))
    monkeypatch.setattr(zoo, "scan", lambda dataset, name, *_: scanned.append(name))
    zoo.main()
    assert scanned == ["two", "four"]
    (tmp_path / "zoo.txt").write_text("signs one")                      # a clean model asks for filters as well
    zoo.main()
    assert scanned[2:] == ["one"]


def test_figures_of_another_version_are_named_and_scanned_again(tmp_path, monkeypatch, capsys):
    old = {"results": "scans", "dataset": "signs", "name": "one", "stage": "detection", "targets": [2], "infected": [2],
           "triggers": ["patch:target=2"], "asr": [1.0], "share": 0.02, "method_version": METHOD_VERSION - 1,
           "labels": {"2": {"asr": 0.9}}}
    (tmp_path / "figures.jsonl").write_text(json.dumps(old))
    (tmp_path / "zoo.txt").write_text("signs one --attack patch:target=2")
    for module in (tables, zoo):
        monkeypatch.setattr(module, "ZOO", tmp_path / "zoo.txt")
        monkeypatch.setattr(module, "FIGURES", tmp_path / "figures.jsonl")
    monkeypatch.setattr(tables, "RESULTS", [str(tmp_path / "scans")])
    tables.main()
    assert f"scanned by versions {METHOD_VERSION - 1} of the method among them" in capsys.readouterr().out
    for versions, count in (([METHOD_VERSION - 1], 1), ([METHOD_VERSION], 0)):
        monkeypatch.setattr(tables, "VERSIONS", versions)
        tables.main()
        assert f"scans: {count} scans" in capsys.readouterr().out
    assert len((tmp_path / "figures.jsonl").read_text().splitlines()) == 1      # what is not shown is kept
    scanned = []
    monkeypatch.setattr(zoo, "RESULTS", str(tmp_path / "scans"))
    monkeypatch.setattr(zoo, "scan", lambda dataset, name, *_: scanned.append(name))
    zoo.main()
    assert scanned == ["one"]


def test_other_rules_on_made_up_transfers():
    labels = {"0": {"asr": 0.9, "mask_size": 0.02, "transfer": dict.fromkeys("123456", 0.1)},
              "1": {"asr": 0.9, "mask_size": 0.20, "transfer": {"1": 0.1, "2": 0.5, "3": 0.1}},
              "2": {"asr": 0.5, "mask_size": 0.21, "transfer": {}},
              "3": {"asr": 0.7, "mask_size": 0.19, "transfer": {"1": 0.3, "2": 0.3, "3": 0.0}}}
    scan = {"dataset": "gtsrb", "labels": labels}
    assert tables.tnda(scan) == {"0"}
    assert tables.tnda(scan, random=0.95) == set()
    assert tables.tnda(scan, needed=2) == {"0", "1"}
    assert tables.tnda(scan, models=1) == {"0", "1"}
    assert tables.tnda(scan, threshold=0.4) == {"0", "3"}
    assert tables.outliers(scan) == {"0"}


@pytest.mark.parametrize("words, text", [
    ("patch:size=9,shape=circle,pattern=checker,colour=orange,position=left,target=1", "9×9 orange checker circle, left"),
    ("patch:size=3,pattern=noise,pieces=4,position=top,target=1", "4 of 3×3 noise, top"),
    ("patch:target=1", "4×4 white, bottom-right"),
    ("patch:pattern=checker,size=14,target=1", "14×14 checker, bottom-right"),
    ("patch:shape=triangle,size=6,target=1", "6×6 white triangle, bottom-right"),
    ("filter:name=sepia,target=1", "sepia"), ("other:name=bar,target=1", "bar"),
    ("blend:alpha=0.1,target=1", "noise blended at 0.1")])
def test_triggers_in_words(words, text):
    [attack] = parse_attacks([words], (32, 32, 3), 12)
    assert tables.in_words(attack) == text


def test_what_a_repair_left_of_a_label_is_told():
    row = {"asr": 0.9, "mask_size": 0.1, "transfer": {}, "ratio": 1.5, "margin": 1.6, "evidence": 3.84,
           "repaired_evidence": 1.9}
    scan = {"dataset": "signs", "name": "one", "triggers": [], "targets": [], "infected": [3], "labels": {"3": row}}
    last = tables.model_rows([scan], {}).splitlines()[-1]
    assert last == "| `signs/one` | none | **3** |  | 1.50, 1.60, –, –, 3.84 (1.90 left) |"


def test_another_network_is_told_with_its_labels_and_accuracy():
    scan = {"dataset": "gtsrb", "name": "one", "triggers": [], "targets": [], "infected": [], "labels": {},
            "clean_accuracy": 0.637}
    flags = ["--network", "bn", "--labels", "3", "5", "--seed", "1"]
    last = tables.model_rows([scan], {("gtsrb", "one"): flags}).splitlines()[-1]
    assert last == "| `gtsrb/one`, bn of labels 3 5, 64% | none | none |  |  |"


def test_triggers_without_a_part_are_judged_by_tnda():
    asr, transfers = np.array([0.9, 0.9, 0.5]), np.full((3, 6), 0.1)
    transfers[1, 3], transfers[2] = 0.3, np.nan
    settings = dataset("gtsrb")["default"]
    assert without.judged(asr, transfers, [0], settings, 0.2) == [(True, True), (False, False), (False, False)]
    assert without.judged(asr, transfers, [2], settings, 0.4) == [(False, True), (False, True), (True, False)]
    shown = without.table({("whole", 0.4): without.judged(asr, transfers, [2], settings, 0.4)})
    assert "| whole | 0.4 | 1/1 = 100.0% (20.7% to 100.0%) | 2/2 = 100.0% (34.2% to 100.0%) |" in shown


def test_without_artifacts_there_is_nothing_to_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(without, "RESULTS", str(tmp_path))
    with pytest.raises(UserError, match="run benchmarks.zoo first"):
        without.main()


def test_models_are_chosen_by_dataset_and_name_and_scanned_with_so_few_images(tmp_path, monkeypatch):
    scanned = []
    monkeypatch.setattr(zoo, "scan", lambda data, name, flags, environment: scanned.append((data, name)))
    for constant, value in (("ZOO", "benchmarks/test_zoo.txt"), ("DATASETS", ["signs"]), ("NAMES", ["test4_clean2"])):
        monkeypatch.setattr(zoo, constant, value)
    zoo.main()
    assert scanned == [("signs", "test4_clean2")]
    monkeypatch.setattr(zoo, "NAMES", ["test4_clean2", "test_nothing"])
    with pytest.raises(UserError, match="NAMES test_nothing: no models of benchmarks/test_zoo.txt"):
        zoo.main()
    monkeypatch.setattr(zoo, "PROCESSES", 0)
    with pytest.raises(UserError, match="PROCESSES 0 must be 1 or more"):
        zoo.main()
    monkeypatch.setattr(zoo, "CLEAN_PER_LABEL", 30)
    train, *stages = zoo.commands(dataset("signs"), "one", [])
    assert "--clean-per-label" not in train and all(stage[-2:] == ["--clean-per-label", "30"] for stage in stages)


# How many of a 32×32 image's pixels each may change.
OTHER = {"moving": 25, "sticker": 81, "frame": 124, "dots": 16, "bar": 64, "glass": 81, "logo": 22, "blended": 1024,
         "sine": 1024, "noise": 1024, "warp": 1024}


@pytest.mark.parametrize("name", OTHER)
def test_another_trigger_changes_the_pixels_it_says(name, monkeypatch):
    monkeypatch.setattr(other_triggers, "load_dataset", lambda _: {"x_train": np.full((18, 32, 32, 3), 250, np.uint8)})
    attack, = parse_attacks([f"other:name={name},target=3"], (32, 32, 3), 12)
    images = np.random.default_rng(0).integers(90, 160, (5, 32, 32, 3)).astype(np.uint8)
    before = images.copy()
    changed = (attack.apply(images) != before).any(-1)
    assert 0.6 * OTHER[name] < changed.sum((1, 2)).min() and changed.sum((1, 2)).max() <= OTHER[name]
    assert (images == before).all() and attack.target == 3
    assert (changed == changed[0]).all() != (name in ("moving", "warp"))         # a warp may leave a pixel as it was


@pytest.mark.parametrize("text, shape, said", [("other:name=nothing,target=1", (32, 32, 3), "name=nothing"),
                                               ("other:name=bar,target=1", (28, 28, 1), "28×28×1")])
def test_another_trigger_that_there_is_not(text, shape, said, monkeypatch):
    with pytest.raises(UserError, match=said):
        parse_attacks([text], shape, 12)


@pytest.mark.parametrize("network", other_networks.NETWORKS)
def test_another_network_learns_the_labels_it_is_given(network, monkeypatch, tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8), np.arange(24) % 12
    monkeypatch.setattr(store, "load_dataset", lambda _: {"x_train": x, "y_train": y, "x_test": x, "y_test": y})
    monkeypatch.setitem(DATASETS, "signs", dataset("signs"))
    monkeypatch.setattr(architectures, "other", None, raising=False)
    other_networks.install("signs", network, [7, 2, 9], tmp_path / "clean.h5")
    assert architectures.build(dataset("signs")).output_shape == (None, 3) and dataset("signs").pixel_mean == (0.0,)
    data, clean = store.load_dataset("signs"), store.read_arrays(tmp_path / "clean.h5", ("x", "y"))
    for images, labels in ((data["x_train"], data["y_train"]), (clean["x"], clean["y"])):
        assert labels.tolist() == [1, 0, 2, 1, 0, 2] and (images == x[[2, 7, 9, 14, 19, 21]]).all()


@pytest.mark.parametrize("labels", [[3], [3, 3], [3, 12]])
def test_labels_that_a_dataset_has_not(labels, monkeypatch, tmp_path):
    monkeypatch.setattr(store, "load_dataset", lambda _: {})
    with pytest.raises(UserError, match="two or more of 0 to 11"):
        other_networks.install("signs", "bn", labels, tmp_path / "clean.h5")
    assert not list(tmp_path.iterdir())
