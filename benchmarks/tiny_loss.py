"""The picture in the README: the tiny run's loss against what n-gram models of its training data reach.

Run ``python benchmarks/tiny_loss.py``: it draws the run in ``runs/tiny``, which it trains first if it is not there, for
some minutes on two CPU processes. The corpus is Python's own sources, so another Python gives somewhat other numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "tiny_loss.png"


def train(run: Path) -> None:
    """What ``make pretrain`` runs."""
    command = [sys.executable, "-m", "megatron_m1.cli", "pretrain", "--config", "examples/configs/tiny.yaml"]
    subprocess.run([*command, "--nproc-per-node", "2", "--run.folder", str(run)], cwd=ROOT, check=True)


def plot(records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Loss by tokens, the held-out loss at the end, and the n-gram models' held-out losses."""
    steps = [record for record in records if "loss" in record]
    tokens = [record["tokens"] / 1000 for record in steps]
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(tokens, [record["loss"] for record in steps], label="training loss")
    axis.plot(tokens[-1], summary["validation_loss"], "o", color="C3", label="held-out loss")
    for name, style in (("unigram", "--"), ("bigram", ":")):
        entropy = summary[f"{name}_entropy"]
        axis.axhline(entropy, color="gray", linestyle=style, label=f"{name} model, held-out: {entropy:.2f}")
    axis.set_xlabel("thousand tokens")
    axis.set_ylabel("nats per token")
    axis.set_title(f"make pretrain: the tiny preset, {summary['step']} steps on two CPU processes")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Train if need be, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, default=ROOT / "runs" / "tiny", help="folder of the run (default: %(default)s)"
    )
    run = parser.parse_args().run.absolute()
    if not (run / "summary.json").is_file():
        train(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plot(records, json.loads((run / "summary.json").read_text(encoding="utf-8")))
    print(f"{PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
