"""The card of an exported folder, as the hub's own library reads it, and the licence files beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_m1.config.io import load_config
from megatron_m1.convert.card import CardFacts, model_card
from megatron_m1.convert.tokenizer import left_behind
from tests.convert.conftest import Run
from tests.convert.folders import convert
from tests.data.test_tokenizers import hugging_face_folder

FACTS = CardFacts("bfloat16", None, [], None, remote_code=False, caveats=["one reader does it so"])
ROOT = Path(__file__).resolve().parents[2]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Fields and text, as the hub's library reads them."""
    card = ModelCard.load(folder / "README.md")
    fields = card.data.to_dict()
    assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", "text-generation")
    assert "lightning-attention" in fields["tags"]
    return fields, card.text


def test_a_run(fp32_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers by hand: 7 lightning layers and 1 softmax layer with 4 experts, of which 2 are taken."""
    convert("to-hf", fp32_run.folder, tmp_path / "out", "--license", "apache-2.0")
    said = capsys.readouterr().out
    fields, text = card_of(tmp_path / "out")
    assert fields["license"] == "apache-2.0" and "Stated by who exported it: `apache-2.0`." in text
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    config = json.loads((tmp_path / "out/config.json").read_text())
    parameters = index["metadata"]["total_size"] // 4
    experts = 8 * 4 * 3 * config["hidden_size"] * config["intermediate_size"]
    assert f"| Parameters | {parameters:,}, of which a token passes through {parameters - experts // 2:,} |" in text
    assert "8: 7 lightning attention and 1 softmax attention, each followed by a mixture of experts" in text
    assert f"| Experts | 4 a layer, 2 a token, inner size {config['intermediate_size']:,} |" in text
    assert f"| Heads | {config['num_attention_heads']} of {config['head_dim']}; " in text
    assert "Training began with random weights." in text and " in 1 steps of " in text
    notes = [line.removeprefix("note: ") for line in said.splitlines() if line.startswith("note: ")]
    caveats = [line for line in notes if "tokenizer" not in line]
    assert len(caveats) >= 2 and all(f"- {line}.\n" in text for line in caveats)
    convert("to-hf", fp32_run.folder, tmp_path / "elsewhere/again", "--license", "apache-2.0")
    assert (tmp_path / "elsewhere/again/README.md").read_text() == (tmp_path / "out/README.md").read_text()
    assert str(fp32_run.folder) not in text and str(tmp_path) not in text


def test_data_are_named_and_their_places_are_not(checkpoint: Path) -> None:
    config = load_config(checkpoint / "config.yaml")
    state = json.loads((checkpoint / "state.json").read_text())
    blend = ["3", "/secret/place/web", "1", "/secret/place/co`de|\n## x"]
    data, run = replace(config.data, train=blend), replace(config.run, init_from="hf:/secret/MiniMax-M1-80k")
    text = model_card(checkpoint, replace(config, data=data, run=run), FACTS)
    assert "- `web`: 75.0%\n- `co de  ## x`: 25.0%\n" in text
    assert "Training began with the weights of `MiniMax-M1-80k`, whose own card is not part of this folder." in text
    assert f"{state['tokens']:,} tokens in 1 steps of" in text
    assert "secret" not in text and "\n## x" not in text
    # Without weights, shares are those of the corpora's sizes, and these corpora are gone.
    text = model_card(checkpoint, replace(config, data=replace(data, train=["/secret/web", "/secret/code"])), FACTS)
    assert "- `web`\n- `code`\n" in text and "secret" not in text


def test_licence_files_travel(hub: Path, tmp_path: Path) -> None:
    """Of a folder without a tokenizer as well; and one of the tokenizer's own is kept beside the model's."""
    theirs = tmp_path / "theirs"
    shutil.copytree(hub / "hub", theirs)
    files = {"LICENSE": "the model's", "NOTICE.txt": "notice", "LICENCE-CODE": "code's", "COPYING": "copies"}
    for name, text in files.items():
        (theirs / name).write_text(text)
    left = f"left in {theirs}, and not exported again: README.md, generation_config.json"
    assert left_behind(theirs) == [left]
    convert("from-hf", theirs, tmp_path / "ours")
    convert("to-hf", tmp_path / "ours", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("[A-Z]*")} == {*files, "README.md"}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in files.items())
    fields, text = card_of(tmp_path / "out")
    assert (fields["license"], fields["license_link"]) == ("other", "LICENSE")
    assert "kept as they were: `LICENSE`, `LICENCE-CODE`, `COPYING`, `NOTICE.txt`." in text
    assert "imported from `theirs`. Their own card says what" in text
    assert (tmp_path / "out/README.md").read_text() != (theirs / "README.md").read_text()

    tokenizer = hugging_face_folder(tmp_path / "tokenizer", eos="<end>")
    (tokenizer / "LICENSE").write_text("the tokenizer's")
    convert("from-hf", theirs, tmp_path / "large", "--resize-vocab", 300)
    convert("to-hf", tmp_path / "large", tmp_path / "both", "--tokenizer", tokenizer, "--license", "mit")
    assert (tmp_path / "both/LICENSE").read_text() == "the model's"
    assert (tmp_path / "both/LICENSE.tokenizer").read_text() == "the tokenizer's"
    fields, text = card_of(tmp_path / "both")
    assert fields["license"] == "mit" and "`LICENSE.tokenizer`" in text
    assert "| Tokenizer | a Hugging Face folder's, 257 ids, 256 ends documents |" in text


def test_without_a_word_on_licences(hub: Path) -> None:
    fields, text = card_of(hub / "hub")
    assert fields["license"] == "unknown" and "so the field above says `unknown`: fill it in" in text


HEAVY = """\
import sys
from megatron_m1.cli import exit_status, run
for words in {lines!r}:
    assert exit_status(lambda: run(words)) == 2, words
heavy = ("torch", "megatron.core", "transformers", "numpy", "safetensors", "tokenizers", "sentencepiece")
print([name for name in heavy if name in sys.modules])
"""


def test_wrong_paths_are_told_before_anything_heavy_is_imported(hub: Path, fp32_run: Run, tmp_path: Path) -> None:
    """Paths, kinds of folders, sizes and an existing OUT: the modules that are there at the end are counted."""
    run, folder, out, gone = (str(path) for path in (fp32_run.folder, hub / "hub", tmp_path / "out", tmp_path / "gone"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "bare").mkdir()
    shutil.copy(hub / "hub/config.json", tmp_path / "bare")
    lines = [
        [],
        ["runs/mid", out],
        ["to-hf", gone, out],
        ["to-hf", folder, out],
        ["to-hf", run, str(tmp_path)],
        ["to-hf", run, out, "--tokenizer", gone],
        ["to-hf", run, out, "--remote-code", gone],
        ["to-hf", run, out, "--shard-size", "2XB"],
        ["to-hf", run, out, "--license", "My Own"],
        ["from-hf", gone, out],
        ["from-hf", "org/name", out],
        ["from-hf", run, out],
        ["from-hf", str(tmp_path / "other"), out],
        ["from-hf", str(tmp_path / "bare"), out],
        ["from-hf", folder, str(tmp_path)],
        ["from-hf", folder, out, "--resize-init", "mean"],
    ]
    code = HEAVY.format(lines=[["convert", *words] for words in lines])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(lines) and all(line.startswith("megatron-m1: error: ") for line in errors)
    assert not Path(out).exists()
