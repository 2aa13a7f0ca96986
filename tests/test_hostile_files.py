"""Files made to run code, read or write other files, or use up memory: one clear line, nothing done, at once."""

import base64
import io
import json
import marshal
import resource
import stat
import time
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from tests.test_examined_model import ROW, classifier, keras2_file, keras2_layer
from utils import safe_files
from utils.config import UserError
from utils.examined_model import load_examined


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture(autouse=True)
def at_once_and_in_bounds(request):
    start, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20        # KiB: less than 1 GiB more


@pytest.fixture
def good_hdf5(monkeypatch):
    """For tests of descriptions: the HDF5 file beside them is a good one, so it need not be read twice."""
    monkeypatch.setattr(safe_files, "_read_elsewhere", lambda *_: None)


def bytecode(marker):
    """The code of `lambda x: (write the marker, x)[1]`, as Keras keeps it in a description."""
    code = eval(f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]").__code__
    return base64.b64encode(marshal.dumps(code)).decode()


def payloads(marker):
    """{what: a layer as (class name, options, other fields)}; each would make `marker` if it were obeyed."""
    code, path = bytecode(marker), str(marker)
    write = {"module": "builtins", "class_name": "function", "config": "open", "registered_name": "function"}
    system = {"module": "os", "class_name": "system", "config": {"command": f"touch {path}"}, "registered_name": None}
    lambda_3 = {"class_name": "__lambda__", "config": {"code": code, "defaults": None, "closure": None}}
    return {
        "Lambda of Keras 3": ("Lambda", {"function": lambda_3, "arguments": {}}, {}),
        "Lambda of Keras 2": ("Lambda", {"function": [code, None, None], "function_type": "lambda", "arguments": {},
                                         "module": "__main__"}, {}),
        "function of a module as activation": ("Activation", {"activation": system}, {}),
        "builtin as activation": ("Activation", {"activation": write}, {}),
        "name of a function": ("Activation", {"activation": "os.system"}, {}),
        "activation by another module": ("Dense", {"units": 3, "activation": {
            "module": "keras.utils", "class_name": "get_file", "config": {"origin": f"file://{path}"}}}, {}),
        "initializer": ("Dense", {"units": 3, "kernel_initializer": system}, {}),
        "lambda in an initializer": ("Dense", {"units": 3, "kernel_initializer": {
            "module": "keras.initializers", "class_name": "Constant", "config": {"value": lambda_3}}}, {}),
        "regularizer": ("Dense", {"units": 3, "kernel_regularizer": system}, {}),
        "constraint by name": ("Dense", {"units": 3, "kernel_constraint": "os>system"}, {}),
        "dtype policy": ("Dense", {"units": 3, "dtype": system}, {}),
        "seed": ("Dropout", {"rate": 0.5, "seed": system}, {}),
        "seed of an augmentation": ("RandomFlip", {"seed": system}, {}),
        "plain option": ("Rescaling", {"scale": system}, {}),
        "layer of another module": ("Dense", {"units": 3}, {"module": "os.path"}),
        "layer from subprocess": ("Popen", {"args": ["touch", path]}, {"module": "subprocess"}),
        "module that only starts like keras": ("Dense", {"units": 3}, {"module": "keras_evil.layers"}),
        "registered class": ("Evil", {}, {"registered_name": "package>Evil"}),
        "standard name, registered": ("Dense", {"units": 3}, {"registered_name": "package>Dense"}),
        "unknown class": ("Evil", {}, {}),
        "StringLookup": ("StringLookup", {"vocabulary": path}, {}),
        "IntegerLookup": ("IntegerLookup", {"vocabulary": path}, {}),
        "TextVectorization": ("TextVectorization", {"vocabulary": path}, {}),
        "TFSMLayer": ("TFSMLayer", {"filepath": path}, {}),
        "TorchModuleWrapper": ("TorchModuleWrapper", {"module": code}, {}),
        "JaxLayer": ("JaxLayer", {"call_fn": lambda_3}, {}),
        "FlaxLayer": ("FlaxLayer", {"module": lambda_3}, {}),
        "wrapped Lambda": ("TimeDistributed", {"layer": {"class_name": "Lambda", "config": {
            "function": lambda_3}}}, {}),
        "subclassed model": ("Model", {}, {"module": "evil"}),
        "TensorFlow function": ("TFOpLambda", {"function": "io.write_file"}, {}),
        "arithmetic that is none": ("Map", {"function": lambda_3}, {"module": "keras.src.ops.core"}),
        "unknown option": ("Dense", {"units": 3, "call": lambda_3}, {}),
    }


def described(kind, options, fields, form):
    """A functional network with the payload's layer second, in Keras 3's or Keras 2's form."""
    def layer(kind, name, inputs, options, fields):
        made = keras2_layer(kind, name, inputs, **options)
        if form == "h5":
            return made | fields
        made["inbound_nodes"] = [{"args": [{"class_name": "__keras_tensor__", "config": {
            "shape": [None], "dtype": "float32", "keras_history": [x, 0, 0]}}], "kwargs": {}} for x in inputs]
        return {"module": "keras.layers", "registered_name": None} | made | fields
    config = {"name": "m", "input_layers": [["i", 0, 0]], "output_layers": [["c", 0, 0]], "layers": [
        layer("InputLayer", "i", [], {"batch_input_shape" if form == "h5" else "batch_shape": [None, 8, 8, 3]}, {}),
        layer(kind, "payload", ["i"], options, fields), layer("Flatten", "f", ["payload"], {}, {}),
        layer("Dense", "a", ["f"], {"units": 3}, {}), layer("Dense", "b", ["a"], {"units": 3}, {}),
        layer("Dense", "c", ["b"], {"units": 3}, {})]}
    return {"class_name": "Functional", "config": config} | (
        {} if form == "h5" else {"module": "keras", "registered_name": "Functional"})


def save(path, config, weights=None):
    """A file with a description and some weights, in the form that the suffix asks for."""
    if path.suffix == ".h5":
        keras2_file(path, config, weights or {"a": [("a/kernel:0", np.zeros((192, 3), "f4"))]})
        return path
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["layers/dense/vars/0"] = np.zeros((192, 3), "f4")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config if isinstance(config, (str, bytes)) else json.dumps(config))
        archive.writestr("model.weights.h5", content.getvalue())
    return path


def refused(path, match="", **options):
    with pytest.raises(UserError, match=match or None) as caught:
        load_examined(path, ROW, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize("what", payloads(""))
@pytest.mark.usefixtures("good_hdf5")
def test_nothing_in_a_description_runs(what, form, tmp_path, marker):
    kind, options, fields = payloads(marker)[what]
    message = refused(save(tmp_path / f"evil.{form}", described(kind, options, fields, form)))
    assert not marker.exists()
    assert "standard layer" in message or "cannot be built" in message


@pytest.mark.parametrize("form", ["keras", "h5"])
def test_nothing_in_a_json_architecture_runs(form, tmp_path, marker):
    kind, options, fields = payloads(marker)["Lambda of Keras 3"]
    (tmp_path / "evil.json").write_text(json.dumps(described(kind, options, fields, form)))
    classifier().save_weights(tmp_path / "w.weights.h5")
    refused(tmp_path / "w.weights.h5", "Lambda", architecture=str(tmp_path / "evil.json"))
    assert not marker.exists()


def test_the_payload_is_live(tmp_path, marker):
    """Control: Keras itself, asked to trust the file, runs the code. A dead payload would prove nothing."""
    network = keras.Sequential([layers.Input((8, 8, 3)), layers.Lambda(lambda x: x, output_shape=(8, 8, 3)),
                                layers.Flatten(), layers.Dense(3)])
    network.save(tmp_path / "whole.keras")
    with zipfile.ZipFile(tmp_path / "whole.keras") as archive:
        config = json.loads(archive.read("config.json"))
        weights = archive.read("model.weights.h5")
    config["config"]["layers"][1]["config"]["function"]["config"]["code"] = bytecode(marker)
    with zipfile.ZipFile(tmp_path / "evil.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights)
    refused(tmp_path / "evil.keras", "'Lambda'")
    assert not marker.exists()
    keras.models.load_model(tmp_path / "evil.keras", safe_mode=False, compile=False)(np.zeros((1, 8, 8, 3)))
    assert marker.exists()


@pytest.mark.usefixtures("good_hdf5")
def test_call_arguments_and_parts_of_training(tmp_path, marker):
    """Arguments of calls are refused; build_config, compile_config and training_config are not looked at."""
    network = classifier()
    network.save(tmp_path / "good.keras")
    with zipfile.ZipFile(tmp_path / "good.keras") as archive:
        good, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    system = {"module": "os", "class_name": "system", "config": {"command": f"touch {marker}"}}
    ignored = json.loads(json.dumps(good))
    ignored["compile_config"] = {"optimizer": system, "loss": system}
    ignored["build_config"] = system
    for layer in ignored["config"]["layers"]:
        layer["build_config"] = {"input_shape": system}
        layer["shared_object_id"] = system
    with zipfile.ZipFile(tmp_path / "ignored.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(ignored))
        archive.writestr("model.weights.h5", weights)
    assert load_examined(tmp_path / "ignored.keras", ROW).labels == 3
    for place in ("args", "kwargs"):
        evil = described("Rescaling", {"scale": 1.0}, {}, "keras")
        node = evil["config"]["layers"][1]["inbound_nodes"][0]
        node[place] = [system] if place == "args" else {"inputs": system}
        refused(save(tmp_path / "evil.keras", evil), "cannot be built")
    assert not marker.exists()


BOMBS = {
    "a layer of 10^12 units": ("Dense", {"units": 10 ** 12}, {}),
    "a layer of 2^30 units": ("Dense", {"units": 2 ** 30}, {}),
    "a kernel of 65536 x 65536": ("Conv2D", {"filters": 8, "kernel_size": [65536, 65536], "padding": "same"}, {}),
    "an image of 10^6 x 10^6": ("Resizing", {"height": 10 ** 6, "width": 10 ** 6}, {}),
    "zeros around it": ("ZeroPadding2D", {"padding": [[10 ** 6, 10 ** 6], [10 ** 6, 10 ** 6]]}, {}),
    "a magnification": ("UpSampling2D", {"size": [100_000, 100_000]}, {}),
    "a wide dilation": ("Conv2D", {"filters": 1, "kernel_size": [3, 3], "dilation_rate": [99_999, 1],
                                   "padding": "same"}, {}),
    "a negative size": ("Dense", {"units": -5}, {}),
    "a size that is a word": ("Dense", {"units": "many"}, {}),
    "a size that is no number": ("Dense", {"units": None}, {}),
}


@pytest.mark.parametrize("form", ["keras", "h5"])
@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.usefixtures("good_hdf5")
def test_sizes_out_of_proportion(what, form, tmp_path):
    refused(save(tmp_path / f"bomb.{form}", described(*BOMBS[what], form)))


@pytest.mark.parametrize("shape", [[None, 10 ** 6, 10 ** 6, 3], [None, -1, 8, 3], [None, 8, 8, 4], [None, 8], "x",
                                   [8] * 99])
@pytest.mark.usefixtures("good_hdf5")
def test_odd_input_shapes(shape, tmp_path):
    config = described("Rescaling", {"scale": 1.0}, {}, "keras")
    config["config"]["layers"][0]["config"]["batch_shape"] = shape
    refused(save(tmp_path / "odd.keras", config))


@pytest.mark.usefixtures("good_hdf5")
def test_graphs_that_do_not_end(tmp_path):
    loop = described("Rescaling", {"scale": 1.0}, {}, "h5")
    loop["config"]["layers"][1]["inbound_nodes"] = [[["b", 0, 0, {}]]]
    refused(save(tmp_path / "loop.h5", loop), "loop")
    missing = described("Rescaling", {"scale": 1.0}, {}, "h5")
    missing["config"]["layers"][1]["inbound_nodes"] = [[["nobody", 0, 0, {}]]]
    refused(save(tmp_path / "missing.h5", missing), "'nobody' that is not there")
    twice = described("Rescaling", {"scale": 1.0}, {}, "h5")
    twice["config"]["layers"][2]["name"] = "payload"
    refused(save(tmp_path / "twice.h5", twice), "two layers")

    inner = keras2_layer("Dense", "d", None, units=3)
    for level in range(40):         # models inside models
        inner = {"class_name": "Sequential", "config": {"name": f"m{level}", "layers": [inner]}}
    refused(save(tmp_path / "deep.h5", inner), "deep")
    block = described("Rescaling", {"scale": 1.0}, {}, "h5")
    for level in range(8):          # each calls the one inside it ten times: 10^8 layers
        block = {"class_name": "Functional", "name": "payload", "config": dict(block["config"], name=f"m{level}"),
                 "inbound_nodes": [[["i", 0, 0, {}]]] * 10}
        outer = described("Rescaling", {"scale": 1.0}, {}, "h5")
        outer["config"]["layers"][1] = block
        block = outer
    refused(save(tmp_path / "wide.h5", block), "more than 3000 layers")
    many = described("Rescaling", {"scale": 1.0}, {}, "h5")
    many["config"]["layers"] += [keras2_layer("Flatten", f"x{number}", ["i"]) for number in range(5000)]
    refused(save(tmp_path / "many.keras", many), "more than 3000 layers")


@pytest.mark.parametrize("text, match", [
    (b"[" * 100_000, "JSON"), (b"{" + b'"a":{' * 500 + b"}" * 501, "levels deep"), (b'{"class_name": NaN}', "JSON"),
    (b"\xff\xfe{", "JSON"), (b"1" * 10_000, "JSON"), (b"", "JSON"), (b"[]", ""), (b"3", ""), (b"null", ""),
    (b'"a"', ""), (b"{}", ""), (b'{"class_name": "Sequential"}', ""),
    (b'{"class_name": "Sequential", "config": []}', ""),
    (b'{"class_name": "Sequential", "config": {"name": "a/b", "layers": [{"class_name": "Dense"}]}}', ""),
    (b'{"class_name": ["Sequential"], "config": {}}', ""), (b" " * (17 << 20), "description of")])
@pytest.mark.usefixtures("good_hdf5")
def test_descriptions_that_are_none(text, match, tmp_path):
    refused(save(tmp_path / "odd.keras", text), match)


def archive_with(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt", "C:\\out.txt"])
def test_members_outside_the_archive(name, tmp_path):
    members = [("config.json", "{}"), ("model.weights.h5", "x"), (name, "y")]
    refused(archive_with(tmp_path / "x.keras", members), "outside")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives(tmp_path):
    both = [("config.json", "{}"), ("model.weights.h5", "x")]
    refused(archive_with(tmp_path / "twice.keras", [*both, both[0]]), "there twice")
    link = zipfile.ZipInfo("model.weights.h5")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(archive_with(tmp_path / "link.keras", [both[0], (link, "/etc/passwd")]), "is a link")
    refused(archive_with(tmp_path / "many.keras", [*both, *((f"a{n}", "") for n in range(1500))]), "1502 members")
    zeros = [both[0], ("model.weights.h5", bytes(40 << 20))]
    refused(archive_with(tmp_path / "bomb.keras", zeros, compression=zipfile.ZIP_DEFLATED), "unpacks to far more")
    refused(archive_with(tmp_path / "config.keras", [("config.json", b" " * (40 << 20)), both[1]],
                         compression=zipfile.ZIP_DEFLATED), "unpacks to far more")
    classifier().save(tmp_path / "whole.keras")
    whole = (tmp_path / "whole.keras").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.keras").write_bytes(whole[:length])
        refused(tmp_path / "cut.keras", "damaged archive")
    # A directory entry that declares more than the archive holds.
    lying = bytearray(archive_with(tmp_path / "lying.keras", both).read_bytes())
    place = lying.rindex(b"PK\x01\x02")
    lying[place + 24:place + 28] = (2 ** 32 - 2).to_bytes(4, "little")
    (tmp_path / "lying.keras").write_bytes(lying)
    refused(tmp_path / "lying.keras")


def hdf5(change):
    """A function that writes a good `.h5` and lets `change(file)` spoil it."""
    def write(path):
        classifier().save(path)
        with h5py.File(path, "r+", libver="latest") as file:
            change(file)
        return path
    return write


def external_link(file):
    del file["model_weights/b"]
    file["model_weights/b"] = h5py.ExternalLink("secret.h5", "/a")


def soft_link(file):
    file["model_weights/soft"] = h5py.SoftLink("/model_weights/b")


def external_storage(file):
    file["model_weights"].create_dataset("raw", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "a", (4,))
    file["model_weights"].create_virtual_dataset("virtual", layout)


def huge(file):
    file["model_weights"].create_dataset("huge", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip")


def words(file):
    file["model_weights"]["words"] = ["a", "b"]


def compound(file):
    file["model_weights"]["pair"] = np.zeros(3, [("a", "f4"), ("b", "i4")])


def named_twice(file):
    attributes = file["model_weights/b"].attrs
    attributes["weight_names"] = np.repeat(attributes["weight_names"], 2)


def layer_twice(file):
    attributes = file["model_weights"].attrs
    attributes["layer_names"] = np.repeat(attributes["layer_names"], 2)


def reference(file):
    file["model_weights"].create_dataset("reference", (1,), h5py.ref_dtype)


def named_type(file):
    file["model_weights"]["type"] = np.dtype("f4")


def numeric_config(file):
    file.attrs["model_config"] = 7


def missing_layer(file):
    del file["model_weights/b"]


def other_names(file):
    file["model_weights"].attrs["layer_names"] = [b"../a", b"b", b"c"]


def other_shape(file):
    group = file["model_weights/b"]
    name = group.attrs["weight_names"][0]
    shape = group[name].shape
    del group[name]
    group[name] = np.zeros(shape[::-1], "f4")


HDF5 = {external_link: "links to another", soft_link: "links to another", external_storage: "in another file",
        virtual: "in another file", huge: "declares .* bytes", words: "not an array of numbers",
        compound: "not an array of numbers", reference: "not an array of numbers", named_type: "neither a group",
        numeric_config: "damaged|weights alone", missing_layer: "do not fit|holds 71",
        named_twice: "a name twice", layer_twice: "a name twice",
        other_names: "do not fit|damaged", other_shape: "do not fit"}


@pytest.mark.parametrize("form, change", [
    (form, change) for form in ("h5", "keras", "weights") for change in HDF5
    if form == "h5" or change is not numeric_config], ids=lambda value: getattr(value, "__name__", value))
def test_hostile_hdf5(form, change, tmp_path, monkeypatch):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["a"] = np.arange(4, dtype="f4")
    monkeypatch.chdir(tmp_path)
    if form == "h5":
        refused(hdf5(change)(tmp_path / "evil.h5"), HDF5[change])
        return
    hdf5(change)(tmp_path / "inner.h5")
    network = classifier()
    if form == "weights":
        (tmp_path / "a.json").write_text(network.to_json())
        refused(tmp_path / "inner.h5", HDF5[change], architecture=str(tmp_path / "a.json"))
        return
    archive_with(tmp_path / "evil.keras", [("config.json", network.to_json()),
                                           ("model.weights.h5", (tmp_path / "inner.h5").read_bytes())])
    refused(tmp_path / "evil.keras", HDF5[change])


def test_description_that_fills_the_memory(tmp_path):
    with h5py.File(tmp_path / "big.h5", "w", libver="latest") as file:
        file.attrs["model_config"] = np.zeros(4_000_000, "S5")
    refused(tmp_path / "big.h5", "too large")


def test_file_on_which_the_hdf5_library_hangs(tmp_path, monkeypatch):
    """One damaged number in a heap of texts, and reading an attribute never ends (HDF5 1.14)."""
    path = tmp_path / "endless.h5"
    classifier().save(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"GCOL") + 16
    while number := int.from_bytes(content[place:place + 2], "little"):
        assert number < 100
        place += 16 + (int.from_bytes(content[place + 8:place + 16], "little") + 7) // 8 * 8
    content[place + 8:place + 16] = bytes(8)        # the heap's free rest has size 0: no step leads on
    path.write_bytes(content)
    monkeypatch.setattr(safe_files, "PROBE_SECONDS", 1)
    refused(path, "cannot read to its end")


def test_group_that_holds_itself(tmp_path):
    def circle(file):
        file["model_weights/b/again"] = file["model_weights"]
    assert load_examined(hdf5(circle)(tmp_path / "circle.h5"), ROW).labels == 3


def test_weights_missing_from_keras_3_layout(tmp_path):
    network = classifier()
    network.save_weights(tmp_path / "w.weights.h5")
    (tmp_path / "a.json").write_text(network.to_json())
    with h5py.File(tmp_path / "w.weights.h5", "r+") as file:
        del file["layers/dense/vars/1"]
        file["padding"] = np.zeros(100, "f4")
    refused(tmp_path / "w.weights.h5", "do not fit", architecture=str(tmp_path / "a.json"))


def test_truncated_hdf5(tmp_path):
    classifier().save(tmp_path / "whole.h5")
    whole = (tmp_path / "whole.h5").read_bytes()
    for length in (8, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.h5").write_bytes(whole[:length])
        refused(tmp_path / "cut.h5")


def test_a_refused_network_leaves_no_weights_behind(tmp_path):
    bomb = described("Dense", {"units": 2 ** 30}, {}, "keras")
    refused(save(tmp_path / "bomb.keras", bomb), "weights, but the file")
    assert layers.Dense(2)(np.ones((1, 2))).shape == (1, 2)     # Keras would now initialize any it had noted


def test_json_bounds():
    assert safe_files.parse_json('{"a": [1, {"b": null}]}', "x") == {"a": [1, {"b": None}]}
    with pytest.raises(UserError, match="^x nests"):
        safe_files.parse_json("[" * 200 + "]" * 200, "x")
