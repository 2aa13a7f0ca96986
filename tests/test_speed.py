"""The benchmark runs whole, at sizes too small for its figures to mean anything."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TINY = ("--runs", "1", "--steps", "1", "--phase-steps", "1", "--clean-per-label", "2", "--training-steps", "1",
        "--trigger-steps", "1", "--preserved-labels", "1", "--growth-labels", "3", "--growth-steps", "1")


def test_the_benchmark_writes_every_figure(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed", *TINY, "--output", str(tmp_path / "results.json")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    ratios = ("reconstruction_vs_per_label", "reconstruction_vs_bare", "phase1_vs_full", "phase2_vs_fit",
              "preservation_detection_vs_published")
    assert all(results[name] > 0 for name in ratios)
    assert results["peak_rss_bytes"] > 10 ** 8 and [row["labels"] for row in results["growth"]] == [3]
