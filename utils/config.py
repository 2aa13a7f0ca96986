"""Constants at the top of a script, and the command-line flags of the same names.

A script assigns its constants in upper case, each with a comment, and then calls `configure(globals())`.
When it runs as a program every constant is also a flag (`CLEAN_DATA` is `--clean-data`); the flag's type,
default and help text are read from the assignment and its comment, so nothing is written twice. This module
imports nothing heavy: `--help` answers before TensorFlow is loaded.
"""

import argparse
import ast
import io
import math
import os
import re
import sys
import textwrap
import tokenize

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


class UserError(Exception):
    """What a person can mend: the message says what is wrong, where, and how to mend it, in one line."""


def configure(namespace, tensorflow=True):
    """Override the upper-case constants in a script's `globals()` from the command line.

    Then loads TensorFlow, quietly, unless the script computes without it. Does nothing when the script is imported.
    Raises SystemExit: 0 after `--help`, 2 for an unknown flag or a value of the wrong type.
    """
    if namespace["__name__"] != "__main__":
        return
    with tokenize.open(namespace["__file__"]) as file:
        constants = read_constants(file.read())
    parser = Parser(prog=namespace["__file__"].rsplit("/", 1)[-1], description=namespace["__doc__"],
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, (kind, many, comment) in constants.items():
        default = namespace[name]
        shown = " ".join(map(str, default)) if many and default else default
        options = {"help": textwrap.shorten(f"{comment} (default: {shown})", 10_000).replace("%", "%%"),
                   "default": default, "dest": name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _numbers if many and kind is float else _value(kind)
            options["metavar"] = kind.__name__.upper()
            if many:
                options["nargs"] = "+"
        parser.add_argument("--" + name.lower().replace("_", "-"), **options)
    values = vars(parser.parse_args(_join_negative(sys.argv[1:])))
    for name, (kind, many, _) in constants.items():
        if many and kind is float and values[name]:
            values[name] = [number for item in values[name]
                            for number in (item if isinstance(item, list) else [item])]
    namespace.update(values)
    if tensorflow:
        load_tensorflow()


def read_constants(source):
    """The constants that a script assigns before it calls `configure`.

    source: the script's text. Returns a dict from name to (type, is a list, comment); the type is that of the
    annotation (`int | None`, `list[str]`) or else of the assigned literal. The comment is what stands behind the
    assignment on its line, or else on the lines above it.
    """
    comments = {token.start[0]: token.string.lstrip("# ").rstrip()
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and getattr(getattr(node.value, "func", None), "id", "") == "configure":
            break
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(
            node, ast.Assign) else None
        if not isinstance(target, ast.Name) or not target.id.isupper():
            continue
        if isinstance(node, ast.AnnAssign):
            words = re.findall(r"\w+", ast.unparse(node.annotation))
        else:
            literal = ast.literal_eval(node.value)
            words = [type(literal).__name__] + [type(item).__name__ for item in
                                                (literal[:1] if isinstance(literal, list) else [])]
        kind = next(TYPES[word] for word in words if word in TYPES)
        comment = [comments[node.end_lineno]] if node.end_lineno in comments else []
        above = node.lineno - 1
        while above in comments and lines[above - 1].lstrip().startswith("#"):
            comment.insert(0, comments[above])
            above -= 1
        found[target.id] = (kind, "list" in words, " ".join(comment))
    return found


def run(main):
    """Call a script's `main` and end the process: 0, or 2 after one line for a `UserError`, or 130 if interrupted.

    A reader of the output that goes away, as `| head` does, is an interruption, too. Where the output's encoding lacks a
    character, a question mark stands for it: that ends no scan.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # what is left to write would raise again
        sys.exit(_interrupted())
    except OSError as error:
        # A full disk or a folder that may not be written is the user's to mend, not a crash of ours.
        place = f" ({error.filename})" if error.filename else ""
        sys.exit(_complain(f"{error.strerror or error}{place}: check the disk's space and the folder's permissions"))
    except Exception as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "ResourceExhaustedError":     # TensorFlow's
            raise
        sys.exit(_complain("out of memory: the same command goes on where it was, with more memory free, or, of the "
                           "reconstructions, with fewer LABELS_AT_ONCE"))


def load_tensorflow():
    """Import TensorFlow without the notes that its C++ prints past every log level; errors still raise."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow
        tensorflow.config.list_physical_devices()
        tensorflow.get_logger().setLevel("ERROR")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _interrupted():
    print("\ninterrupted: finished parts are kept, the same command goes on from them", file=sys.stderr)
    return 130


def _complain(message):
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A parser that ends with 2 after one line for what it does not know."""

    def error(self, message):
        self.exit(_complain(f"{message}; {self.prog} --help lists every flag"))


def _value(kind):
    def convert(text):
        value = kind(text)
        if kind is not str and not 0 <= value <= sys.float_info.max:
            raise argparse.ArgumentTypeError(f"{text} must be a finite number from 0 up")
        return value
    convert.__name__ = kind.__name__
    return convert


def _numbers(text):
    values = [float(part) for part in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text} must be finite numbers")
    return values


def _join_negative(arguments):
    """Let `--input-range -1,1` pass: argparse takes a word that starts with a dash for a flag."""
    joined = []
    for word in arguments:
        if joined and re.fullmatch(r"-[\d.]+(,-?[\d.]+)+", word) and joined[-1].startswith("--"):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined
