"""A pretraining engineer with Megatron-LM's flags by heart walks from its command line to a requeued SLURM job."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.walks.checkout import SMALL_MODEL, Checkout, Shell, commands_of, flags_of

MEGATRON = """
    torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 32 --hidden-size 4096 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --seq-length 8192 --max-position-embeddings 8192
    --micro-batch-size 2 --global-batch-size 1024 --train-iters 100000 --lr 3e-4 --min-lr 3e-5
    --lr-decay-style cosine --lr-warmup-fraction 0.01 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer --data-path 0.5 a 0.5 b
    --split 969,30,1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model tok --save ckpt --load ckpt
    --recompute-activations --rampup-batch-size 16 16 1000 --swiglu --num-experts 8 --moe-router-topk 2 --num-lears 3
"""
SRUN = """#!/bin/bash
# One node of SLURM's: no options of its own, but the variables; the first start is told that the time is nearly up.
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NNODES=1 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_STEP_NODELIST=localhost
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    (until grep -qs '"step": 3' "$RUN/metrics.jsonl"; do sleep 0.05; done; kill -USR1 "$JOB") &
fi
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> asked
"""


def a_command_line_is_translated(checkout: Checkout, shell: Shell) -> None:
    """Everything that it says is in the YAML, or in a line that tells why not; a dry run takes it."""
    shell.refuses("translate", "--", said="translate needs a command line of Megatron-LM")
    shell.refuses("translate", "--", "pretrain_gpt.py", "--num-layers", said="--num-layers: give it one value")
    out = shell.says("translate", "--", *shlex.split(MEGATRON))
    for line in (
        "#   --micro-batch-size 2: a micro-batch is always one pack ",
        "#   --split 969,30,1: ",
        "#   --rampup-batch-size 16 16 1000: train.global_batch_size_schedule has points of tokens and packs",
        "#   --num-lears 3\n",
        "  tensor_model_parallel_size: 8\n",
        "  train: ['0.5', a, '0.5', b]\n",
        "  lr_warmup_tokens: 8388608000  # --lr-warmup-fraction 0.01 of 838,860,800,000 tokens\n",
        "  folder: ckpt\n",
        "  residual: prenorm  # Megatron-LM's GPT",
    ):
        assert line in out, line
    said = [word for word in shlex.split(MEGATRON.partition("pretrain_gpt.py")[2]) if word.startswith("--")]
    config_words = re.sub(r"[-_]", "", out)
    known = {"--data-path", "--load", "--save", "--bf16", "--train-iters", "--tokenizer-model", "--num-experts"}
    for flag in {*said} - known:
        assert re.sub(r"[-_]", "", flag) in config_words, flag
    (checkout.folder / "run.yaml").write_text(out)


def its_plan_is_made(checkout: Checkout, shell: Shell) -> None:
    """Dry runs for the machines of the pages, and what does not fit them."""
    plans = [
        line[1:]
        for page in ("README.md", "docs/failures.md")
        for line in commands_of(checkout.folder / page)
        if Path(line[0]).name == "megatron-m1" and "--dry-run" in line and "--world-size" in line
    ]
    sizes = [words[words.index("--world-size") + 1] for words in plans]
    assert sizes == ["2048", "1024", "512"]
    data = flags_of(data=dict(train="[corpora/web]", tokenizer="tokenizers/m1.model"))
    for words, size in zip(plans, sizes, strict=True):
        out = shell.says(*words, *data)
        assert re.search(rf"^mesh .* = {size}$", out, re.MULTILINE) and "456,089,655,296 parameters" in out
    translated = ["pretrain", "--config", "run.yaml", "--dry-run", "--device", "gpu", "--world-size"]
    out = shell.says(*translated, 2048, *data)
    assert "plan        preset m1-456b, bf16 on gpu over nccl" in out
    assert "mesh        tensor 8 x context 1 x pipeline 4 x data 64 = 2048" in out
    shell.refuses(*translated, 2048, said="data.tokenizer = tok can't be read")
    shell.refuses(*translated, 2040, *data, said="start a multiple of 32")
    shell.refuses(*translated, "2k", *data, said="2000 or 2048")
    shell.refuses(*(word for word in translated[:3]), "--world-size", 8, *data, said="they need --dry-run")
    assert not (checkout.folder / "runs").exists() and not (checkout.folder / "ckpt").exists()


def old_habits_are_answered(shell: Shell) -> None:
    """Flags of Megatron-LM and torchtitan name the field, or the reason why there is none."""
    for words, said in (
        ("--micro-batch-size 2", "a micro-batch is always one pack"),
        ("--micro_batch_size=2", "a micro-batch is always one pack"),
        ("--use-distributed-optimizer", "always spread over the data-parallel ranks"),
        ("--tensor-model-parallel-size 2", "here it is --parallel.tensor_model_parallel_size"),
        ("--bf16", "here it is --train.precision bf16"),
        ("--data-path a b", "here it is --data.train"),
        ("--load x", "run.init_from"),
        ("--num-workers 2", "--num-workers is Megatron-LM's"),
        ("--attention-backend flash", "--attention-backend is Megatron-LM's"),
        ("--training.local_batch_size 4", "is torchtitan's, and has no field here"),
        ("--parallelism.tensor_parallel_degree 2", "here it is --parallel.tensor_model_parallel_size"),
        ("-tp 2", "settings are --group.field value"),
    ):
        shell.refuses("pretrain", *words.split(), said=said)


def run_flags() -> list[str]:
    """A small model on the job's one node, a profile, and W&B without a network."""
    return flags_of(
        model=SMALL_MODEL,
        data=dict(train="[corpora/web]", tokenizer="tokenizers/m1.model", seq_length=64),
        optimizer=dict(lr_warmup_tokens=1024, lr_constant_tokens=0, lr_decay_tokens=4096),
        train=dict(
            max_steps=100_000, global_batch_size=4, eval_interval=0, eval_samples=0, recompute_granularity="none",
            profile_step_start=2, profile_step_end=3,
        ),
        run=dict(folder="runs/mid", wandb_project="m1", wandb_mode="offline", wandb_tags="[a, b]"),
    )  # fmt: skip


def job(checkout: Checkout, *more: str, restarts: int) -> subprocess.CompletedProcess[str]:
    """Start the sbatch file as SLURM does on the first node."""
    bin_folder = checkout.folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(program)
        (bin_folder / name).chmod(0o755)
    environ = checkout.environ()
    variables = dict(
        PATH=f"{bin_folder}:{environ['PATH']}",
        GPUS_PER_NODE="1",
        RUN="runs/mid",
        SLURM_JOB_ID="17",
        SLURM_JOB_NAME="m1",
        SLURM_RESTART_COUNT=str(restarts),
    )
    script = ["bash", "-c", 'JOB=$$ exec bash examples/pretrain_m1.sbatch "$@"', "sbatch", *run_flags(), *more]
    return subprocess.run(
        script, cwd=checkout.folder, env=environ | variables, capture_output=True, text=True, timeout=300, check=False
    )


def a_job_requeues_itself_and_goes_on(checkout: Checkout) -> None:
    """USR1 saves and requeues; the second start comes to its end; a refused configuration is not tried again."""
    first = job(checkout, restarts=0)
    assert first.returncode == 0, first.stderr
    assert "SIGUSR1: finishing" in first.stdout + first.stderr
    assert "pretrain_m1.sbatch: the time is nearly up: requeued" in first.stderr
    assert (checkout.folder / "asked").read_text() == "requeue 17\n"
    (saved,) = re.findall(r"SIGUSR1: saving step (\d+), then leaving", first.stdout)
    second = job(checkout, "--train.max_steps", str(int(saved) + 2), restarts=1)
    assert second.returncode == 0, second.stderr
    assert f"resumed from step {saved} " in second.stdout
    assert (checkout.folder / "asked").read_text() == "requeue 17\n"
    refused = job(checkout, "--train.max_steps", "0", restarts=2)
    assert refused.returncode == 2 and "pretrain_m1.sbatch: status 2 after 2 restarts: not requeued" in refused.stderr
    assert (checkout.folder / "asked").read_text() == "requeue 17\n"


def its_records_are_what_the_page_says(checkout: Checkout) -> None:
    """docs/metrics.md has a line for every field and no other; W&B and the profile are where they are said."""
    run = checkout.folder / "runs" / "mid"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(1, len(records) + 1)]
    page = (checkout.folder / "docs" / "metrics.md").read_text()
    table = page.partition("## A training step")[2].partition("## A validation")[0]
    # The peak of a CPU is not known, nothing has stages or schedules, and two layers have no quarters three and four.
    missing = {name for name in re.findall(r"\w+", table) if re.search(r"_quarter_[34]$", name)}
    assert (
        set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
        == {*records[-1], "mfu", "stage", "aux_loss_coeff"} | missing
    )
    assert list((run / "wandb").glob("offline-run-*")) and (run / "wandb_id").read_text()
    assert (run / "profile" / "steps_2_to_2_rank_0.json").stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())


def its_configuration_runs_on_gpus(checkout: Checkout, shell: Shell) -> None:
    """``auto`` is still ``auto`` in the file of a CPU run; a dry run in its folder says what has changed."""
    plan = ["--dry-run", "--world-size", 4]
    out = shell.says("pretrain", "--config", "runs/mid/config.yaml", *plan, "--device", "gpu", "--run.folder", "runs/b")
    assert "bf16 on gpu over nccl" in out
    newest = max(path.name for path in (checkout.folder / "runs" / "mid" / "checkpoints").iterdir())
    out = shell.says("pretrain", "--run.folder", "runs/mid", *plan, "--train.seed", 3, "--train.max_steps", 10**6)
    assert f"run folder  runs/mid, goes on from {newest}" in out
    assert "train.seed 1234 -> 3" in out
    shell.refuses(
        *("pretrain", "--run.folder", "runs/mid", *plan, "--train.max_steps", 10**6, "--model.hidden_size", 64),
        said="model.hidden_size is 64, but checkpoint",
    )
    shell.refuses("pretrain", "--run.folder", "runs/mid", "--no-resume", said="choose another folder, or resume")


@pytest.fixture
def web(checkout: Checkout, own_texts: Path, shell: Shell) -> None:
    """A corpus and a tokenizer by the names of the pages."""
    train = ["--train-tokenizer", 384, "--tokenizer", "tokenizers/m1.model"]
    shell.says("tokenize", own_texts, *train, "--output", "corpora/web")


@pytest.mark.slow
@pytest.mark.usefixtures("web")
def test_the_walk(checkout: Checkout, shell: Shell) -> None:
    a_command_line_is_translated(checkout, shell)
    its_plan_is_made(checkout, shell)
    old_habits_are_answered(shell)
    a_job_requeues_itself_and_goes_on(checkout)
    its_records_are_what_the_page_says(checkout)
    its_configuration_runs_on_gpus(checkout, shell)
