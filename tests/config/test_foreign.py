"""Flags of Megatron-LM and torchtitan: the table of meanings, and what is answered to whoever uses one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_m1.commands.pretrain import command_parser
from megatron_m1.config.fields import field_types
from megatron_m1.config.foreign.answer import TABLES, answer, find_meaning
from megatron_m1.config.foreign.meaning import Meaning, Unit, normal_name
from megatron_m1.config.io import parse_config
from tests.config.test_config import message_of

ROWS = [row for rows in TABLES.values() for row in rows]
GROUPS = ("model", "parallel", "train")


def test_every_row_leads_to_a_field_that_exists_or_to_a_reason() -> None:
    options = {f"--{name}" for name in command_parser().option_names()}
    for row in ROWS:
        assert row.flag == normal_name(row.flag)
        if row.field is None:
            assert row.why, row.flag
            assert row.unit is Unit.SAME and row.value is None, row.flag
        else:
            assert row.field in field_types() or row.field in options, row.flag
            assert not row.as_here, row.flag


def test_reasons_name_no_field_that_does_not_exist() -> None:
    groups = {path.partition(".")[0] for path in field_types() if "." in path}
    for row in ROWS:
        for word in f"{row.why} {row.unit.value}".replace(":", " ").replace(",", " ").replace(";", " ").split():
            word = word.strip("().").removesuffix("'s")
            if word.partition(".")[0] in groups and "." in word:
                assert word in field_types(), (row.flag, word)


def test_what_a_field_of_experts_says_is_not_denied() -> None:
    """Megatron-LM's name of a field of experts is that of the field."""
    named = {f"{group}.{flag.replace('-', '_')}": row for row in ROWS for flag in [row.flag] for group in GROUPS}
    for path in field_types():
        if path.partition(".")[2].startswith("moe_") and path in named:
            assert named[path].field == path


def test_no_flag_stands_there_twice_and_there_are_many() -> None:
    flags = [row.flag for row in ROWS]
    assert [flag for flag in flags if flags.count(flag) > 1] == []
    assert len(TABLES["Megatron-LM"]) > 200
    assert len(TABLES["torchtitan"]) > 80


def test_values_that_flags_give_are_values_of_their_fields() -> None:
    for row in ROWS:
        if row.field is not None and row.value is not None:
            parse_config([], [f"--{row.field}={row.value}"])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--micro-batch-size 4", ["--micro-batch-size is Megatron-LM's", "a micro-batch is always one pack"]),
        ("--use-distributed-optimizer", ["needs no field here", "always spread over the data-parallel ranks"]),
        ("--num-workers 8", ["has no field here", "mapped files"]),
        ("--attention-backend flash", ["torch's flash kernel", "model.lightning_backend"]),
        ("--load x", ["run.folder", "run.init_from"]),
        ("--save x", ["here it is --run.folder"]),
        ("--data-path x", ["here it is --data.train"]),
        ("--split 99,1,0", ["tokenize --split"]),
        ("--bf16", ["here it is --train.precision bf16"]),
        ("--lr-warmup-fraction .01", ["--optimizer.lr_warmup_tokens, in tokens"]),
        ("--lr-warmup-iters 500", ["here it is --optimizer.lr_warmup_steps"]),
        ("--lr-decay-iters 500", ["--optimizer.lr_decay_tokens", "iterations x train.global_batch_size"]),
        ("--moe-z-loss-coeff 1e-3", ["here it is --model.moe_z_loss_coeff"]),
        ("--moe-router-enable-expert-bias", ["here it is --model.moe_router_enable_expert_bias"]),
        ("--moe-router-score-function sigmoid", ["here it is --model.moe_router_score_function"]),
        ("--moe-router-load-balancing-type none", ["here it is --model.moe_router_load_balancing_type"]),
        ("--moe-router-bias-update-rate 1e-3", ["here it is --model.moe_router_bias_update_rate"]),
        ("--rampup-batch-size 16 16 5859375", ["train.global_batch_size_schedule has points"]),
        ("--exit-duration-in-mins 230", ["USR1"]),
        ("--recompute-activations", ["--train.recompute_granularity selective"]),
        ("--distributed-timeout-minutes=30", ["--parallel.distributed_timeout_seconds 1800"]),
        ("--train-samples 100", ["--train.max_steps", "samples / train.global_batch_size"]),
        ("--eval-iters 10", ["--train.eval_samples", "in packs"]),
        ("--no_load_optim", ["--no_load_optim is Megatron-LM's", "run.init_from"]),
        ("--num-layers 8", ["here it is --model.num_layers"]),
        ("--training.seq_len 4096", ["torchtitan's: here it is --data.seq_length"]),
        ("--training.local-batch-size 4", ["torchtitan's", "always one pack"]),
        ("--parallelism.data_parallel_shard_degree -1", ["torchtitan's", "what the other sizes leave"]),
        ("--lr_scheduler.warmup_steps 5", ["here it is --optimizer.lr_warmup_steps"]),
        ("--job.config_file x", ["here it is --config"]),
        ("--train.micro_batch_size 4", ["there is no --train.micro_batch_size", "--micro-batch-size has no field"]),
        ("--train.lr 1e-4", ["there is no --train.lr", "Megatron-LM's --lr is here --optimizer.lr"]),
        ("--micro-batch-sise 4", ["unknown option --micro-batch-sise: --help lists"]),
        ("--ep 4", ["unknown option --ep: --help lists"]),
        ("--deepspeed", ["unknown option --deepspeed: --help lists"]),
        ("--loss-scale 1024", ["only fp16 needs it"]),
    ],
)
def test_a_flag_of_another_program_is_answered(flags: str, parts: list[str]) -> None:
    message = message_of([], flags.split())
    assert [part for part in parts if part not in message] == [], message


def test_a_key_of_a_file_is_answered_as_well(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("micro_batch_size: 4\n")
    message = message_of([file], [])
    assert "micro_batch_size is Megatron-LM's, and has no field here: a micro-batch is always one pack" in message
    assert "--micro" not in message
    file.write_text("train: {bf16: true}\n")
    assert "is here train.precision bf16" in message_of([file], [])


def test_what_is_nobodys_is_not_answered() -> None:
    assert find_meaning("no-such-flag") is None
    assert answer("maxsteps") is None
    assert isinstance(find_meaning("--Micro_Batch_Size"), tuple)
    assert Meaning("x").field is None
