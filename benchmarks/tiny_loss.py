"""The pictures in the README and in docs/metrics.md: the tiny run's loss against what n-gram models of its training
data reach, and how its tokens spread over the experts.

Run ``python benchmarks/tiny_loss.py``: it draws the run in ``runs/tiny``, which it trains first if it is not there, for
some minutes on two CPU processes. The corpus is Python's own sources, so another Python gives somewhat other numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def train(run: Path) -> None:
    """What ``make pretrain`` runs."""
    command = [sys.executable, "-m", "megatron_m1.cli", "pretrain", "--config", "examples/configs/tiny.yaml"]
    subprocess.run([*command, "--nproc-per-node", "2", "--run.folder", str(run)], cwd=ROOT, check=True)


def plot_loss(steps: list[dict[str, Any]], summary: dict[str, Any], vocab_size: int) -> Path:
    """Loss by tokens, the held-out loss at the end, the n-gram models' held-out losses and that of guessing."""
    tokens = [record["tokens"] / 1000 for record in steps]
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(tokens, [record["loss"] for record in steps], label="training loss")
    axis.plot(tokens[-1], summary["validation_loss"], "o", color="C3", label="held-out loss")
    guess = math.log(vocab_size)
    axis.axhline(
        guess, color="gray", linestyle="-.", label=f"any of {vocab_size:,} tokens, ln {vocab_size}: {guess:.2f}"
    )
    for name, style in (("unigram", "--"), ("bigram", ":")):
        entropy = summary[f"{name}_entropy"]
        axis.axhline(entropy, color="gray", linestyle=style, label=f"{name} model, held-out: {entropy:.2f}")
    axis.set_xlabel("thousand tokens")
    axis.set_ylabel("nats per token")
    axis.set_title(f"make pretrain: the tiny preset, {summary['step']} steps on two CPU processes")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, "tiny_loss.png")


def plot_experts(steps: list[dict[str, Any]]) -> Path:
    """Auxiliary loss and the most loaded expert by tokens; both are 1 at balance."""
    tokens = [record["tokens"] / 1000 for record in steps]
    figure, axis = plt.subplots(figsize=(7, 3))
    for name, label in (
        ("expert_load_max_over_mean", "most loaded expert over the mean"),
        ("aux_loss", "auxiliary loss"),
    ):
        axis.plot(tokens, [record[name] for record in steps], label=label)
    axis.axhline(1.0, color="gray", linestyle="--", label="balance")
    axis.set_xlabel("thousand tokens")
    axis.set_title("the same run: how its tokens spread over 8 experts, 2 for each token")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, "tiny_experts.png")


def _save(figure: Any, name: str) -> Path:
    figure.tight_layout()
    DOCS.mkdir(exist_ok=True)
    figure.savefig(DOCS / name, dpi=110)
    return DOCS / name


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
    steps = [record for record in records if "loss" in record]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    vocab_size = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["vocab_size"]
    for picture in (plot_loss(steps, summary, vocab_size), plot_experts(steps)):
        print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
