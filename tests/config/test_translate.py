"""Command lines of Megatron-LM as YAML of ours: its own examples, what can't be said, and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_m1 import cli
from megatron_m1.config import Config
from megatron_m1.config.foreign.translation import translate_command
from megatron_m1.config.io import parse_config
from megatron_m1.config.resolve import resolve

GPT3 = """
torchrun --nproc_per_node 8 --nnodes 1 --master_addr localhost --master_port 29500 pretrain_gpt.py
    --num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
    --attention-backend auto
    --micro-batch-size 1 --global-batch-size 1536
    --step-batch-size-schedule "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
    --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0
    --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001 --lr-decay-iters 430000
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16
    --data-path $DATA_PATH --vocab-file $VOCAB_FILE --merge-file $MERGE_FILE --split 949,50,1
    --log-interval 100 --save-interval 10000 --eval-interval 1000 --save $CHECKPOINT_PATH --load $CHECKPOINT_PATH
    --eval-iters 10 --tensorboard-dir $TENSORBOARD_LOGS_PATH
"""
"""examples/gpt3/train_gpt3_175b_distributed.sh"""

MIXTRAL = """
torchrun --nproc_per_node 8 --nnodes 8 pretrain_gpt.py
    --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
    --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
    --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
    --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
    --no-position-embedding --rotary-base 1000000
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce
    --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizers/mixtral --data-path 0.7 corpora/code 0.3 corpora/web
    --split 99990,8,2
    --micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000
    --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
    --use-distributed-optimizer --sequence-parallel
    --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save ckpt/mixtral
    --load ckpt/mixtral --tensorboard-dir "ckpt/mixtral/tensorboard" --no-load-optim --no-load-rng
    --wandb-project Mixtral --wandb-exp-name Mixtral_8x7B
"""
"""examples/mixtral/train_mixtral_8x7b_distributed.sh"""

LLAMA3 = """
torchrun pretrain_gpt.py
    --use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
    --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
    --hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused
    --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear
    --micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
    --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
    --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
    --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
    --empty-unused-memory-level 1 --exit-duration-in-mins 235
    "--fp8-format hybrid" "--fp8-amax-history-len 1024" "--fp8-amax-compute-algo max" "--fp8-param-gather"
    --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    "--mock-data" "--tokenizer-type NullTokenizer" "--vocab-size 128256" "--tiktoken-pattern v2" "--split '99,1,0'"
    "--no-create-attention-mask-in-dataloader" "--no-mmap-bin-files" "--num-workers 1"
    --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
    --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60
    --save "ckpt/llama" --load "ckpt/llama" --tensorboard-dir "logs"
"""
"""examples/llama/train_llama3_8b_h100_fp8.sh"""


SO_HERE = ["so here in any case"]


def loaded(text: str, tmp_path: Path) -> Config:
    """Read a translation as pretrain reads a file."""
    (tmp_path / "run.yaml").write_text(text)
    return parse_config([tmp_path / "run.yaml"], [])


def comments(text: str) -> dict[str, list[str]]:
    """Entries of the comments above, by their titles."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("#   "):
            found[title].append(line.removeprefix("#   "))
        elif line.startswith("# "):
            title = line.removeprefix("# ").removesuffix(":")
            found[title] = []
    return found


def has_reason(text: str, flag: str, part: str = "") -> bool:
    return any(line.startswith(flag) and part in line for line in comments(text)["not said, and why"])


def test_gpt3(tmp_path: Path) -> None:
    text = translate_command([GPT3])
    config = loaded(text, tmp_path)
    model, optimizer = config.model, config.optimizer
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.kv_channels) == (96, 12288, 96, 128)
    assert (model.num_query_groups, model.mixers, model.residual) == (96, ["softmax"], "prenorm")
    assert (model.num_moe_experts, model.moe_router_topk, model.moe_ffn_hidden_size) == (2, 2, 2 * 12288)
    step = 1536 * 2048
    assert (config.train.max_steps, config.train.global_batch_size, config.data.seq_length) == (500_000, 1536, 2048)
    assert optimizer.lr_warmup_tokens == 430 * step
    assert optimizer.lr_warmup_tokens + optimizer.lr_decay_tokens == 430_000 * step
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (6e-5, 6e-6, "cosine")
    assert config.parallel.pipeline_model_parallel_size == 16
    assert config.train.eval_samples == 10 * 1536
    for flag in ("--micro-batch-size 1", "--step-batch-size-schedule 0:16 2.4B:320", "--fp16", "--split 949,50,1"):
        assert has_reason(text, flag), flag
    assert has_reason(text, "--data-path $DATA_PATH", "a variable of the shell")
    assert has_reason(text, "(no --num-experts)", "a dense network")
    assert has_reason(text, "(no --hidden-dropout)", "dropout of 0.1")
    assert "unknown here" not in comments(text)
    resolve(config, 128, has_gpu=True)


def test_mixtral(tmp_path: Path) -> None:
    text = translate_command([MIXTRAL])
    config = loaded(text, tmp_path)
    model, step = config.model, 256 * 4096
    assert (model.num_moe_experts, model.moe_router_topk, model.moe_ffn_hidden_size) == (8, 2, 14336)
    assert (model.num_query_groups, model.rotary_base, model.rotary_percent) == (8, 1_000_000.0, 1.0)
    assert (model.moe_aux_loss_coeff, model.moe_token_dispatcher_type) == (0.01, "alltoall")
    assert config.data.train == ["0.7", "corpora/code", "0.3", "corpora/web"]
    assert config.data.tokenizer == "tokenizers/mixtral"
    assert (config.optimizer.lr_warmup_steps, config.optimizer.lr_warmup_tokens) == (500, 0)
    assert config.optimizer.lr_decay_tokens == (320_000 - 500) * step
    assert (config.train.precision, config.run.folder, config.run.save_interval) == ("bf16", "ckpt/mixtral", 10_000)
    assert config.parallel.overlap_param_gather
    assert "  adam_beta2: 0.999  # Megatron-LM's default" in text.splitlines()
    assert "--use-distributed-optimizer" in comments(text)["so here in any case"][0]
    # It saves where it loads: that is what a run folder does.
    assert not has_reason(text, "--load")
    assert (config.run.wandb_project, config.run.wandb_name) == ("Mixtral", "Mixtral_8x7B")
    resolve(config, 64, has_gpu=True)


def test_llama3(tmp_path: Path) -> None:
    text = translate_command([LLAMA3])
    config = loaded(text, tmp_path)
    assert config.train.max_steps == -(-1_953_125_000 // 128)
    assert config.optimizer.lr_warmup_tokens == 3_906_252 * 8192
    assert config.optimizer.lr_decay_tokens == (1_949_218_748 - 3_906_252) * 8192
    assert config.model.vocab_size == 128_256
    assert config.parallel.distributed_timeout_seconds == 3600.0
    assert (config.train.profile_step_start, config.train.profile_step_end) == (4, 6)
    assert config.model.fp8 == "hybrid"
    for flag in (
        "--mock-data",
        "--num-workers 1",
        "--exit-duration-in-mins 235",
        "--decoupled-lr 5.0e-4",
        "--split 99,1,0",
    ):
        assert has_reason(text, flag), flag
    assert has_reason(text, "--tokenizer-type NullTokenizer", "data.tokenizer is a SentencePiece .model")
    assert "unknown here" not in comments(text)


def test_what_is_said_is_the_whole_difference(tmp_path: Path) -> None:
    """The YAML has no field that the command did not lead to, and says nothing twice."""
    text = translate_command(["--train-iters", "10", "--bf16", "--lr", "1e-3", "--global-batch-size", "4"])
    said = yaml.safe_load(text)
    assert said["train"] == {"max_steps": 10, "global_batch_size": 4, "precision": "bf16"}
    assert said["preset"] == "tiny"
    assert "model" not in said
    assert loaded(text, tmp_path).model == parse_config([], []).model


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        ("--lr-decay-style constant --lr-warmup-iters 5", {"lr_warmup_steps": 5, "lr_decay_tokens": 0}),
        ("", {"lr_decay_tokens": 10_000, "lr_decay_style": "linear", "min_lr": 0.0}),
        ("--lr-warmup-fraction 0.1", {"lr_warmup_tokens": 1000, "lr_decay_tokens": 9000}),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-wsd-decay-style cosine --lr-warmup-iters 10",
            {"lr_warmup_steps": 10, "lr_constant_tokens": 7000, "lr_decay_tokens": 2000, "lr_decay_style": "cosine"},
        ),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 20",
            {"lr_constant_tokens": 8000, "lr_decay_tokens": 2000, "lr_decay_style": "linear"},
        ),
    ],
)
def test_schedules(words: str, optimizer: dict[str, object], tmp_path: Path) -> None:
    base = "--train-iters 100 --global-batch-size 2 --seq-length 50 --lr 1e-3"
    config = loaded(translate_command(f"{base} {words}".split()), tmp_path)
    assert {name: getattr(config.optimizer, name) for name in optimizer} == optimizer


def test_flags_that_need_others_say_so() -> None:
    text = translate_command(["--lr-warmup-iters", "5", "--train-samples", "100", "--eval-iters", "3"])
    for flag in ("--lr-warmup-iters 5", "--train-samples 100", "--eval-iters 3", "(no --global-batch-size)"):
        assert has_reason(text, flag), flag


def test_virtual_stages(tmp_path: Path) -> None:
    base = "--num-layers 16 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage"
    assert loaded(translate_command(f"{base} 2".split()), tmp_path).parallel.virtual_pipeline_model_parallel_size == 2
    with pytest.raises(ValueError, match="does not split into chunks"):
        translate_command(f"{base} 3".split())


def test_launchers_variables_and_unknown_flags() -> None:
    words = (
        "srun python -m torch.distributed.run --nproc_per_node 8 x/pretrain_gpt.py ${ARGS[@]} --num_layers 8 ${B[*]}"
    )
    for given in ([words], words.split()):
        text = translate_command(
            [*given, "--no-such-flag", "1", "2"] if len(given) > 1 else [f"{words} --no-such-flag 1 2"]
        )
        assert "  num_layers: 8" in text.splitlines()
        assert comments(text)["skipped"] == ["${ARGS[@]}", "${B[*]}"]
        assert comments(text)["unknown here"] == ["--no-such-flag 1 2"]
        assert "nproc" not in text


def test_a_value_that_only_megatron_has_is_a_reason() -> None:
    text = translate_command(["--moe-token-dispatcher-type", "flex", "--num-layers", "8"])
    assert has_reason(text, "--moe-token-dispatcher-type flex", "one of allgather, alltoall")
    assert has_reason(translate_command(["--optimizer", "muon"]), "--optimizer muon", "AdamW")


def test_flags_of_experts_are_fields(tmp_path: Path) -> None:
    """DeepSeek-V3's kind of router, and what else weighs, biases and drops."""
    text = translate_command(
        [
            """--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type none --moe-z-loss-coeff 1e-3
        --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 2e-3
        --moe-expert-capacity-factor 1.25 --moe-token-drop-policy probs --global-batch-size 8"""
        ]
    )
    model = loaded(text, tmp_path).model
    assert (model.moe_router_load_balancing_type, model.moe_router_score_function) == ("none", "sigmoid")
    assert (model.moe_z_loss_coeff, model.moe_router_bias_update_rate) == (1e-3, 2e-3)
    assert (model.moe_router_enable_expert_bias, model.moe_expert_capacity_factor) == (True, 1.25)
    assert set(comments(text)) == {"From a command line of Megatron-LM, by megatron-m1 translate.", *SO_HERE}
    assert comments(text)[SO_HERE[0]] == ["--moe-token-drop-policy probs"]


def test_kinds_of_balancing(tmp_path: Path) -> None:
    flag = "--moe-router-load-balancing-type"
    for kind in ("aux_loss", "global_aux_loss"):
        model = loaded(translate_command([flag, kind]), tmp_path).model
        assert model.moe_router_load_balancing_type == kind
    assert has_reason(translate_command([flag, "sinkhorn"]), f"{flag} sinkhorn", "one of aux_loss, global_aux_loss")


def test_texts_are_quoted_where_yaml_needs_it(tmp_path: Path) -> None:
    config = loaded(translate_command(["--save", "a: #b", "--data-path", "1.0", "x:y, z"]), tmp_path)
    assert (config.run.folder, config.data.train) == ("a: #b", ["1.0", "x:y,", "z"])
    assert "\n" not in translate_command(["--foo", "a\nb"]).split("--foo")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "needs a command line"),
        (["pretrain_gpt.py"], "needs a command line"),
        (["--num-layers", "many"], "model.num_layers = 'many'"),
        (["--num-layers", "8", "--hidden-size", "x"], "--hidden-size x: give it one number"),
        (["--train-iters", "1.5"], "--train-iters 1.5: give it an integer"),
        (["--train-iters", "0"], "an integer of at least 1"),
        (["--train-iters", "1e99"], "--train-iters 1e99"),
        (["--lr"], "--lr: give it one value"),
        (["--lr", "1", "2"], "--lr 1 2: give it one value"),
        (["--lr", "-1"], "optimizer.lr = -1"),
        (["--distributed-timeout-minutes", "x"], "give it one number"),
        (["--num-layers 8 --save 'x"], "no closing quotation"),
        (
            ["--train-iters", "9", "--global-batch-size", "2", "--seq-length", "8", "--lr-warmup-iters", "9"],
            "does not end before",
        ),
        (
            ["--train-iters", "9", "--global-batch-size", "2", "--seq-length", "8", "--lr-decay-style", "x"],
            "inverse-square-root",
        ),
    ],
)
def test_wrong_values_are_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_status(lambda: cli.run(["translate", "--", *words])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert part in err


def test_the_command_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_status(lambda: cli.run(["translate", "--", "--num-layers", "8"])) == 0
    assert "  num_layers: 8" in capsys.readouterr().out.splitlines()
    assert cli.exit_status(lambda: cli.run(["translate"])) == 0
    assert "usage: megatron-m1 translate -- " in capsys.readouterr().out
