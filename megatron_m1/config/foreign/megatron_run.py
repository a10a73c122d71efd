"""Megatron-LM's flags of training, data, checkpoints and logs, by the names in megatron/training."""

from __future__ import annotations

from megatron_m1.config.foreign.meaning import Meaning, Unit, always, converted, nothing, same, turned

_PACK = "a micro-batch is always one pack of data.seq_length tokens: train.global_batch_size packs are a step"
_RAMP = "train.global_batch_size_schedule has points of tokens and packs, such as [0, 2048, 69e9, 4096]"
_SPLIT = "documents are held out when a corpus is tokenised: megatron-m1 tokenize --split A,B; then data.validation"
_SIGNALS = "SIGTERM, and SLURM's USR1 before the time is over, let the step finish and save"
_WEIGHTS = "run.init_from (--init-from) starts a new run from weights alone: a checkpoint, a run, or hf:FOLDER"
_RESUMES = "a run goes on from the newest complete checkpoint of run.folder, with everything that it had"
_ADAMW = "the optimizer is AdamW"
_WEIGHT_DECAY = "weight decay is constant"
_RECORDS = "metrics.jsonl and TensorBoard have what is measured, at every step"
_CLEAN_UP = "Python collects its garbage as it sees fit"
_READ = "packs are read from mapped files, in the training process"
_SCHEDULE = "the schedule counts tokens and is that of the configuration, also after a resumption"
_SAVED = "checkpoints are megatron-core's torch_dist, and complete"
_TOKENIZER = "data.tokenizer is a SentencePiece .model or a Hugging Face folder, and its files tell which"

RUN: tuple[Meaning, ...] = (
    # Batches and length.
    nothing("micro-batch-size", _PACK),
    same("global-batch-size", "train.global_batch_size"),
    nothing("rampup-batch-size", _RAMP),
    nothing("step-batch-size-schedule", _RAMP),
    nothing("decrease-batch-size-if-needed", "train.global_batch_size must be a multiple of the data-parallel size"),
    same("seq-length", "data.seq_length"),
    same("encoder-seq-length", "data.seq_length"),
    same("train-iters", "train.max_steps"),
    converted("train-samples", "train.max_steps", Unit.STEPS),
    nothing("exit-interval", "train.max_steps ends a run, and may be raised to go on"),
    nothing("exit-duration-in-mins", _SIGNALS),
    always("exit-signal-handler", _SIGNALS),
    nothing("iterations-to-skip", "steps with a non-finite loss are skipped (train.max_skipped_steps), no others"),
    same("seed", "train.seed"),
    nothing("data-parallel-random-init", "weights are drawn by their names: replicas are equal"),
    # The optimizer.
    always("optimizer", _ADAMW, "adam"),
    same("lr", "optimizer.lr"),
    same("min-lr", "optimizer.min_lr"),
    nothing("decoupled-lr", "embedding and head have the learning rate of the rest"),
    nothing("decoupled-min-lr", "embedding and head have the learning rate of the rest"),
    same("adam-beta1", "optimizer.adam_beta1"),
    same("adam-beta2", "optimizer.adam_beta2"),
    same("adam-eps", "optimizer.adam_eps"),
    same("weight-decay", "optimizer.weight_decay"),
    nothing("start-weight-decay", _WEIGHT_DECAY),
    nothing("end-weight-decay", _WEIGHT_DECAY),
    always("weight-decay-incr-style", _WEIGHT_DECAY, "constant"),
    same("clip-grad", "optimizer.clip_grad"),
    same("lr-decay-style", "optimizer.lr_decay_style", "constant is lr_decay_tokens 0, and WSD has lr_constant_tokens"),
    converted("lr-decay-iters", "optimizer.lr_decay_tokens", Unit.ITERATIONS, "without the warm-up"),
    converted("lr-decay-samples", "optimizer.lr_decay_tokens", Unit.SAMPLES, "without the warm-up"),
    same("lr-warmup-iters", "optimizer.lr_warmup_steps"),
    converted("lr-warmup-samples", "optimizer.lr_warmup_tokens", Unit.SAMPLES),
    converted("lr-warmup-fraction", "optimizer.lr_warmup_tokens", Unit.FRACTION),
    always("lr-warmup-init", "the warm-up begins at 0", "0", "0.0"),
    converted("lr-wsd-decay-iters", "optimizer.lr_decay_tokens", Unit.ITERATIONS),
    converted("lr-wsd-decay-samples", "optimizer.lr_decay_tokens", Unit.SAMPLES),
    same("lr-wsd-decay-style", "optimizer.lr_decay_style"),
    nothing("override-opt-param-scheduler", _SCHEDULE),
    nothing("use-checkpoint-opt-param-scheduler", _SCHEDULE),
    always("calculate-per-token-loss", "the loss is per token of the global batch"),
    # Data.
    same("data-path", "data.train", "prefixes of tokenised corpora, with weights or without"),
    same("train-data-path", "data.train"),
    same("valid-data-path", "data.validation"),
    nothing("test-data-path", "there is no test during a run: data.validation is what is evaluated"),
    nothing("data-args-path", "data.train in a YAML file has as many corpora as you like"),
    nothing("per-split-data-args-path", "data.train and data.validation in a YAML file have as many as you like"),
    nothing("split", _SPLIT),
    nothing("mock-data", "data.embedded_corpus FOLDER builds a small real corpus there, with its tokenizer"),
    same("data-cache-path", "data.cache_folder"),
    nothing("num-workers", _READ),
    nothing("no-mmap-bin-files", _READ),
    nothing("no-create-attention-mask-in-dataloader", "no attention mask is made: packs carry the bounds of documents"),
    always("dataloader-type", _READ, "single"),
    turned("reset-position-ids", "data.reset_at_documents", "true", "it is the default"),
    turned("reset-attention-mask", "data.reset_at_documents", "true", "it is the default"),
    always("eod-mask-loss", "the prediction across the end of a document is masked"),
    nothing("dataloader-inter-document-masking", "data.reset_at_documents keeps documents apart, and is the default"),
    same("tokenizer-model", "data.tokenizer"),
    always(
        "tokenizer-type",
        _TOKENIZER,
        *("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
    ),
    nothing("vocab-file", _TOKENIZER + ": one that holds vocab.json and merges.txt will do"),
    nothing("merge-file", _TOKENIZER + ": one that holds vocab.json and merges.txt will do"),
    nothing("tiktoken-pattern", _TOKENIZER),
    nothing("trust-remote-code", "code in a folder is never run"),
    # Validation.
    same("eval-interval", "train.eval_interval"),
    converted("eval-iters", "train.eval_samples", Unit.PACKS),
    nothing("full-validation", "train.eval_samples packs are a validation"),
    nothing("skip-train", "a run trains: megatron-m1 inspect and generate look at what it left"),
    # Checkpoints.
    same("save", "run.folder", "the whole run goes there"),
    nothing("load", _RESUMES + "; for other weights, " + _WEIGHTS),
    same("save-interval", "run.save_interval"),
    nothing("save-retain-interval", "run.keep_checkpoints is how many stay"),
    nothing("non-persistent-save-interval", "run.save_interval_minutes and run.async_save save often"),
    same("async-save", "run.async_save"),
    always("ckpt-format", _SAVED, "torch_dist"),
    always("auto-detect-ckpt-format", _SAVED),
    always("use-dist-ckpt", _SAVED),
    always("dist-ckpt-format", _SAVED, "torch_dist"),
    nothing("no-ckpt-fully-parallel-save", "data-parallel ranks always share the writing"),
    nothing("ckpt-fully-parallel-load", "megatron-core's default holds"),
    nothing("ckpt-assume-constant-structure", "megatron-core's default holds"),
    nothing("dist-ckpt-strictness", "a checkpoint must have every tensor of the model"),
    nothing("ckpt-step", "a run goes on from its newest checkpoint; " + _WEIGHTS),
    nothing("no-save-optim", _SAVED),
    nothing("no-save-rng", _SAVED),
    nothing("no-load-optim", _WEIGHTS),
    nothing("no-load-rng", _WEIGHTS),
    nothing("finetune", _WEIGHTS),
    same("pretrained-checkpoint", "run.init_from", "one of ours, or hf:FOLDER"),
    nothing("use-checkpoint-args", "run.init_from takes the model of its weights; a run folder has its config.yaml"),
    nothing(
        "exit-on-missing-checkpoint",
        "--no-resume refuses a folder that has checkpoints; a new one starts from the seed",
    ),
    # Logs.
    same("log-interval", "run.log_interval"),
    nothing("tensorboard-dir", "run.tensorboard is on, and writes below run.folder"),
    nothing("tensorboard-log-interval", _RECORDS),
    nothing("tensorboard-queue-size", _RECORDS),
    same("wandb-project", "run.wandb_project"),
    same("wandb-exp-name", "run.wandb_name"),
    same("wandb-entity", "run.wandb_entity"),
    nothing("wandb-save-dir", "W&B's files of an offline run are in <run.folder>/wandb"),
    always("log-throughput", _RECORDS),
    nothing("log-params-norm", _RECORDS),
    nothing("log-num-zeros-in-grad", _RECORDS),
    nothing("log-timers-to-tensorboard", _RECORDS),
    nothing("log-memory-to-tensorboard", _RECORDS),
    nothing("log-validation-ppl-to-tensorboard", _RECORDS),
    always("log-progress", _RECORDS),
    nothing("timing-log-level", "train.profile_step_start and profile_step_end profile some steps"),
    nothing("logging-level", "run.log_interval is how often a line is printed"),
    nothing("profile", "train.profile_step_start and profile_step_end profile the steps between them"),
    same("profile-step-start", "train.profile_step_start"),
    same("profile-step-end", "train.profile_step_end"),
    always("use-pytorch-profiler", "steps are profiled by torch's profiler"),
    nothing("profile-ranks", "every rank is profiled"),
    nothing("record-memory-history", "memory is not recorded"),
    # What keeps a job going.
    nothing("manual-gc", _CLEAN_UP),
    nothing("manual-gc-interval", _CLEAN_UP),
    nothing("empty-unused-memory-level", "torch keeps the memory that it has"),
    nothing(
        "no-check-for-nan-in-loss-and-grad", "such a step is skipped, and train.max_skipped_steps in a row end the run"
    ),
    nothing(
        "enable-ft-package", "a rank that hangs ends the run (parallel.distributed_timeout_seconds); it then resumes"
    ),
    nothing(
        "inprocess-restart", "a rank that hangs ends the run (parallel.distributed_timeout_seconds); it then resumes"
    ),
    nothing("config-logger-dir", "run.folder has config.yaml, which is the whole configuration"),
    nothing("local-rank", "torchrun's variables say it"),
)
