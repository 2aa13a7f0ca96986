"""Loads `utils` before any test loads TensorFlow, as the scripts do: it chooses how TensorFlow computes."""

import pytest

import utils  # noqa: F401


def recorded_writes(patch):
    """The list of paths of artifacts and parts, which grows as they are written. patch: a pytest.MonkeyPatch."""
    from utils import artifacts
    written, write = [], artifacts.write
    patch.setattr(artifacts, "write", lambda path, *rest: (written.append(path), write(path, *rest)))
    return written


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    """A folder with a tiny network, tiny.keras, its weights alone, and clean images of its labels, clean.h5."""
    from tests.test_foreign_scan import tiny, write_clean
    folder = tmp_path_factory.mktemp("scene")
    tiny().save(folder / "tiny.keras")
    tiny().save_weights(folder / "alone.weights.h5")
    write_clean(folder / "clean.h5")
    return folder


@pytest.fixture(scope="session")
def complete(scene, tmp_path_factory):
    """RESULTS of an uninterrupted scan of the tiny network with all six scripts; parts.txt names all it kept on its way."""
    from tests.test_foreign_scan import scan
    from tests.test_pipeline import FEATURE, PATCH
    results = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        written = recorded_writes(patch)
        for script in PATCH + FEATURE[1:]:
            scan(script, scene, results)
    (results / "parts.txt").write_text("\n".join(f"{path.parent.name}/{path.name}" for path in written
                                                 if path.parent.suffix == ".parts"))
    return results
