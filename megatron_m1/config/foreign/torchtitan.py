"""torchtitan's flags, by the names of its JobConfig and of the dataclasses that followed it."""

from __future__ import annotations

from megatron_m1.config.foreign.meaning import Meaning, Unit, always, converted, nothing, same, turned

_PACK = "a micro-batch is always one pack of data.seq_length tokens: train.global_batch_size packs are a step"
_REST = "data parallelism is what the other sizes leave of the processes"
_FOLDER = "everything of a run goes below run.folder"
_MODEL = "--preset names a model, and the fields of model change it"
_LAYOUT = "parallel.pipeline_model_parallel_layout places layers on stages, such as Et*3|t*5L"
_RING = "softmax layers take ring attention, lightning layers LASP+"
_COMPILE = "nothing is compiled by torch: kernels are chosen by the device"
_WEIGHTS = "run.init_from (--init-from) starts a new run from weights alone: a checkpoint, a run, or hf:FOLDER"
_DATA = "data.train names tokenised corpora: megatron-m1 tokenize makes them of text"
_FP8 = "model.fp8 takes e4m3 and hybrid, with transformer-engine"
_EXPORT = "megatron-m1 convert to-hf RUN OUT makes a Hugging Face folder of a checkpoint"
_PROFILE = "train.profile_step_start and profile_step_end profile the steps between them"

TORCHTITAN: tuple[Meaning, ...] = (
    same("job.config-file", "--config", "a YAML file of the tree"),
    same("job.dump-folder", "run.folder"),
    nothing("job.description", "run.folder's name is what a run is called"),
    nothing("job.print-config", "run.folder has config.yaml, and --dry-run prints the plan"),
    nothing("model.name", _MODEL),
    nothing("model.flavor", _MODEL),
    same("model.hf-assets-path", "data.tokenizer"),
    same("model.tokenizer-path", "data.tokenizer"),
    nothing("model.converters", _FP8),
    nothing("optimizer.name", "the optimizer is AdamW"),
    same("optimizer.beta1", "optimizer.adam_beta1"),
    same("optimizer.beta2", "optimizer.adam_beta2"),
    same("optimizer.eps", "optimizer.adam_eps"),
    nothing("optimizer.implementation", "the fastest AdamW that the device has is taken"),
    nothing("optimizer.early-step-in-backward", "parameters step once all gradients are there"),
    same("lr-scheduler.warmup-steps", "optimizer.lr_warmup_steps"),
    nothing(
        "lr-scheduler.total-steps", "optimizer.lr_warmup_tokens, lr_constant_tokens and lr_decay_tokens add up to it"
    ),
    converted("lr-scheduler.decay-ratio", "optimizer.lr_decay_tokens", Unit.FRACTION),
    same("lr-scheduler.decay-type", "optimizer.lr_decay_style", "linear and cosine, but no sqrt"),
    converted("lr-scheduler.min-lr-factor", "optimizer.min_lr", Unit.LR_FACTOR),
    nothing("training.dataset", _DATA),
    nothing("training.dataset-path", _DATA),
    nothing("training.batch-size", _PACK),
    nothing("training.local-batch-size", _PACK),
    same("training.global-batch-size", "train.global_batch_size", "packs of data.seq_length tokens"),
    same("training.seq-len", "data.seq_length"),
    same("training.max-context-length", "data.seq_length"),
    converted("training.num-tokens-per-train-step", "train.global_batch_size", Unit.TOKENS),
    nothing("training.num-tokens-per-microbatch-per-dp-rank", _PACK),
    same("training.max-norm", "optimizer.clip_grad"),
    same("training.steps", "train.max_steps"),
    nothing("training.enable-cpu-offload", "parameters and optimizer state stay on the device"),
    nothing("training.dtype", "train.precision says it of parameters and products; main gradients are fp32"),
    same("training.mixed-precision-param", "train.precision", "bf16 or fp32"),
    always("training.mixed-precision-reduce", "gradients are added up and reduced in fp32", "float32"),
    nothing("training.gc-freq", "Python collects its garbage as it sees fit"),
    same("training.seed", "train.seed"),
    same("debug.seed", "train.seed"),
    nothing("debug.deterministic", "torch's deterministic kernels are not asked for"),
    nothing("debug.moe-force-load-balance", "tokens go where the router sends them"),
    nothing("parallelism.data-parallel-replicate-degree", _REST),
    nothing("parallelism.data-parallel-shard-degree", _REST + "; optimizer state is spread over all of it"),
    nothing("parallelism.fsdp-reshard-after-forward", "parameters are whole on every data-parallel rank"),
    same("parallelism.tensor-parallel-degree", "parallel.tensor_model_parallel_size"),
    nothing(
        "parallelism.enable-async-tensor-parallel", "the tensor ranks' collectives are not overlapped with products"
    ),
    nothing("parallelism.disable-loss-parallel", "head and loss are always split over the tensor ranks"),
    always("parallelism.enable-sequence-parallel", "it is on wherever there are several tensor ranks", "", "true"),
    same("parallelism.pipeline-parallel-degree", "parallel.pipeline_model_parallel_size"),
    nothing("parallelism.pipeline-parallel-schedule", "1F1B, interleaved with virtual_pipeline_model_parallel_size"),
    nothing("parallelism.pipeline-parallel-microbatch-size", _PACK),
    nothing("parallelism.pipeline-parallel-layers-per-stage", _LAYOUT),
    nothing("parallelism.pipeline-parallel-first-stage-less-layers", _LAYOUT),
    nothing("parallelism.pipeline-parallel-last-stage-less-layers", _LAYOUT),
    nothing("parallelism.module-fqns-per-model-part", _LAYOUT),
    same("parallelism.context-parallel-degree", "parallel.context_parallel_size"),
    nothing("parallelism.context-parallel-rotate-method", _RING),
    nothing(
        "parallelism.context-parallel-load-balancer",
        "segments are dealt in zigzag order, and by work where that is uneven",
    ),
    same("parallelism.expert-parallel-degree", "parallel.expert_model_parallel_size"),
    same("parallelism.expert-tensor-parallel-degree", "parallel.expert_tensor_parallel_size"),
    nothing("parallelism.expert-parallel-comm-backend", "model.moe_token_dispatcher_type is allgather or alltoall"),
    same("activation-checkpoint.mode", "train.recompute_granularity", "full, selective or none"),
    nothing("activation-checkpoint.selective-ac-option", "train.recompute_modules takes core_attn and moe"),
    nothing("compile.enable", _COMPILE),
    nothing("compile.components", _COMPILE),
    nothing("compile.backend", _COMPILE),
    nothing("quantize.linear.float8.recipe-name", _FP8),
    always("checkpoint.enable", "a run saves at its end, and every run.save_interval steps", "", "true"),
    always("checkpoint.enable-checkpoint", "a run saves at its end, and every run.save_interval steps", "", "true"),
    nothing("checkpoint.folder", _FOLDER),
    same("checkpoint.interval", "run.save_interval"),
    same("checkpoint.keep-latest-k", "run.keep_checkpoints"),
    same("checkpoint.async-mode", "run.async_save", "true or false"),
    same("checkpoint.initial-load-path", "run.init_from", "one of ours, or hf:FOLDER"),
    nothing("checkpoint.initial-load-model-only", _WEIGHTS),
    nothing("checkpoint.initial-load-in-hf", _WEIGHTS),
    nothing("checkpoint.load-step", "a run goes on from its newest checkpoint; " + _WEIGHTS),
    nothing("checkpoint.last-save-in-hf", _EXPORT),
    nothing("checkpoint.last-save-model-only", _EXPORT),
    nothing("checkpoint.export-dtype", _EXPORT + " (--dtype)"),
    same("metrics.log-freq", "run.log_interval"),
    turned("metrics.enable-tensorboard", "run.tensorboard", "true", "it is the default"),
    nothing("metrics.enable-wandb", "run.wandb_project names the project, and turns W&B on"),
    nothing("metrics.save-tb-folder", _FOLDER),
    nothing("metrics.disable-color-printing", "colours are left out where no terminal reads"),
    nothing("profiling.enable-profiling", _PROFILE),
    nothing("profiling.profile-freq", _PROFILE),
    nothing("profiling.save-traces-folder", _FOLDER),
    nothing("profiling.enable-memory-snapshot", "memory is not recorded"),
    always("validation.enable", "data.validation turns it on", "", "true"),
    nothing("validation.dataset", "data.validation names held-out corpora: megatron-m1 tokenize --split makes them"),
    same("validation.freq", "train.eval_interval"),
    converted("validation.steps", "train.eval_samples", Unit.PACKS),
    same("comm.train-timeout-seconds", "parallel.distributed_timeout_seconds"),
    same("comm.init-timeout-seconds", "parallel.distributed_timeout_seconds"),
    nothing("comm.trace-buf-size", "a collective that hangs is named with its rank and step"),
    nothing(
        "fault-tolerance.enable",
        "a rank that hangs ends the run (parallel.distributed_timeout_seconds); it then resumes",
    ),
)
