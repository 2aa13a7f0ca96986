"""Constants become flags, read from the assignments themselves."""

import os
import subprocess
import sys
import textwrap

import pytest

from utils.config import read_constants

SOURCE = textwrap.dedent('''
    """What the script does."""
    import json
    import sys
    sys.path.insert(0, {root!r})
    from utils.config import UserError, configure, run

    DATASET = "signs"            # row of the table
    MODELS = ["patch1"]          # names or paths
    # Adam's rate,
    # in two lines
    RATE: float | None = None
    RANGE: list[float] | None = None   # black and white
    STEPS = 5                    # how many
    OVERWRITE = False            # start afresh
    configure(globals(), tensorflow=False)
    LATER = 3

    def main():
        if DATASET == "bad":
            raise UserError("DATASET 'bad' is\\nnot there")
        if DATASET == "full":
            raise OSError(28, "No space left on device", "results/x.h5")
        if DATASET == "large":
            raise MemoryError
        if DATASET == "signs √":
            return print(DATASET)
        if DATASET == "long":
            print("line\\n" * 100_000)
        print(json.dumps([DATASET, MODELS, RATE, RANGE, STEPS, OVERWRITE]))

    if __name__ == "__main__":
        run(main)
''')


@pytest.fixture
def call(tmp_path, pytestconfig):
    script = tmp_path / "script.py"
    script.write_text(SOURCE.format(root=str(pytestconfig.rootpath)))
    return lambda *arguments: subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_types_and_comments_come_from_the_assignments():
    assert read_constants(SOURCE.format(root="")) == {
        "DATASET": (str, False, "row of the table"), "MODELS": (str, True, "names or paths"),
        "RATE": (float, False, "Adam's rate, in two lines"), "RANGE": (float, True, "black and white"),
        "STEPS": (int, False, "how many"), "OVERWRITE": (bool, False, "start afresh")}


@pytest.mark.parametrize("arguments, printed", [
    ((), '["signs", ["patch1"], null, null, 5, false]'),
    (("--models", "a", "b", "--rate", "0.5", "--overwrite"), '["signs", ["a", "b"], 0.5, null, 5, true]'),
    (("--range", "-1,1"), '["signs", ["patch1"], null, [-1.0, 1.0], 5, false]'),
    (("--range", "0", "255", "--no-overwrite", "--steps=7"), '["signs", ["patch1"], null, [0.0, 255.0], 7, false]')])
def test_every_constant_is_a_flag(call, arguments, printed):
    assert call(*arguments).stdout.strip() == printed


@pytest.mark.parametrize("arguments, said", [
    (("--steps", "many"), "--steps"), (("--steps", "-1"), "from 0 up"), (("--steps", "9" * 400), "finite"),
    (("--rate", "nan"), "finite"),
    (("--later", "3"), "--later"), (("--data", "x"), "--data"), (("--dataset", "bad"), "DATASET 'bad' is not there"),
    (("--dataset", "full"), "No space left on device (results/x.h5)"), (("--dataset", "large"), "out of memory")])
def test_what_is_wrong_is_one_line_and_exit_code_2(call, arguments, said):
    done = call(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr


def test_a_reader_that_has_enough_interrupts(call, tmp_path):
    """As `| head` does: nothing is wrong with the disk."""
    with subprocess.Popen([sys.executable, tmp_path / "script.py", "--dataset", "long"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 130 and said.strip().startswith("interrupted") and said.strip().count("\n") == 0


def test_a_character_that_the_output_has_not_ends_no_scan(tmp_path, call):
    done = subprocess.run([sys.executable, tmp_path / "script.py", "--dataset", "signs √"], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0 and done.stdout.split() == [b"signs", b"?"]


def test_help_shows_comments_and_defaults(call):
    shown = call("--help").stdout
    assert "What the script does." in shown and "names or paths (default: patch1)" in shown
