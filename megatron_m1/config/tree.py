"""The configuration tree of a run: one dataclass per concern, every field with its unit.

Field names are Megatron's where Megatron has one. ``docs in the field`` is what ``--help`` prints. A field whose
default is ``None`` is derived by ``megatron_m1.config.resolve`` from the others. Presets
(``megatron_m1.config.presets``) are instances of ``ModelConfig``, whose own defaults are MiniMax-M1's (456B).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PATH = {"path": True}
"""Metadata of a field that holds paths: ``~`` and ``$VARIABLES`` in it are expanded when it is read."""


@dataclass
class ModelConfig:
    """Shape and numerics of the model."""

    num_layers: int = 80
    """Transformer layers, a multiple of the kinds that mixers and ffns list."""
    hidden_size: int = 6144
    """Width of the residual stream."""
    num_attention_heads: int = 64
    """Query heads; lightning layers have as many key and value heads."""
    kv_channels: int = 128
    """Width of one head."""
    num_query_groups: int = 8
    """Key/value heads of the softmax layers (GQA)."""
    mixers: list[str] = field(default_factory=lambda: ["lightning"] * 7 + ["softmax"])
    """Kind of each layer's attention (lightning, softmax): one a layer, or fewer that are repeated over the layers."""
    ffns: list[str] = field(default_factory=lambda: ["moe"])
    """Kind of each layer's feed-forward network (moe): one a layer, or fewer that are repeated over the layers."""
    residual: Literal["deepnorm", "prenorm"] = "deepnorm"
    """What a sub-layer's output is added to: the normalised tensor times alpha, as M1 does, or the norm's input."""
    moe_ffn_hidden_size: int = 9216
    """Inner width of one expert (SwiGLU)."""
    num_moe_experts: int = 32
    """Experts in every layer."""
    moe_router_topk: int = 2
    """Experts per token."""
    moe_router_load_balancing_type: Literal["aux_loss", "global_aux_loss", "none"] = "aux_loss"
    """What balances the experts besides a bias: a loss over each pack; global_aux_loss, one whose loads are those of
    all packs of the step so far, on all ranks; or none."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss (MiniMax-01 paper, section 4.2), in Megatron's convention (1 at balance)."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router's z-loss, the mean square of its log-sum-exp (ST-MoE, arXiv 2202.08906); none is off."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """From the router's logits to scores; those of the chosen experts are divided by their sum either way."""
    moe_router_enable_expert_bias: bool = False
    """Choose by score plus a bias that rises for experts with less than their share of tokens, once a step
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2); needs moe_router_score_function sigmoid."""
    moe_router_bias_update_rate: float = 1e-3
    """What the bias rises or falls by in a step."""
    moe_expert_capacity_factor: float | None = None
    """Tokens that an expert takes of all ranks of a stage and micro-batch, as a multiple of the balanced share; the
    least likely ones beyond are dropped. none drops no token."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "alltoall"
    """How tokens travel to experts on other ranks."""
    vocab_size: int = 200_064
    """Rows of the embedding and of the untied head, a multiple of tensor_model_parallel_size."""
    max_position_embeddings: int | None = None
    """Tokens of the longest sequence that the model is meant for, as a converted folder will say; none, or less than
    data.seq_length, means data.seq_length. Rotary positions have no limit."""
    rotary_base: float = 10_000.0
    """RoPE base of the softmax layers; 1e7 in the released checkpoints."""
    rotary_percent: float = 0.5
    """Share of each softmax head that is rotated (its first dimensions)."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the block norms and of the final norm."""
    lightning_norm_epsilon: float = 1e-6
    """Epsilon of the RMSNorm inside a lightning layer."""
    residual_alpha: float | None = None
    """Factor on the residual; none means the scheme's: (2 num_layers)^(1/4) for deepnorm, 1 for prenorm."""
    residual_beta: float = 1.0
    """Factor on the sub-layer's output."""
    lm_head_precision: Literal["fp32", "bf16"] = "fp32"
    """fp32: weights, forward and backward of the head in FP32 with TF32 off. bf16: what M1's pre-training used."""
    lm_head_chunk_mib: float = 256.0
    """MiB of logits that exist at a time on a rank: loss and gradient are computed for so many tokens together. Logits
    that don't all fit are made twice."""
    lightning_backend: Literal["auto", "naive", "chunk", "triton"] = "auto"
    """Form of lightning attention and of its gated norm; auto takes the fastest that the device has."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear, norm and expert modules: auto takes transformer-engine when it is installed and a GPU is there."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 matrix products; needs transformer_impl transformer_engine."""


@dataclass
class ParallelConfig:
    """The mesh. tensor x context x pipeline sizes must divide the world; what is left is data parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices and heads."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per stage (interleaved 1F1B); none means one."""
    pipeline_model_parallel_layout: str | None = None
    """Layers by stage in Megatron's notation, e.g. "Et*3|t*5L": E embedding, t layer, L head and loss; none splits
    evenly."""
    context_parallel_size: int = 1
    """Ranks that share one packed sequence."""
    expert_model_parallel_size: int = 1
    """Ranks over which the experts are spread."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share one expert's matrices; none means 1."""
    moe_token_groups: int = 1
    """Groups into which a rank's tokens are split, so that the experts' products of one run while others travel; of
    use with EP or ETP above 1, without which nothing travels; needs model.moe_token_dispatcher_type alltoall. 1 is
    off."""
    sequence_parallel: bool | None = None
    """Split activations outside the matrices over the tensor ranks; none turns it on when there are any."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs overlap_grad_reduce."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto is nccl with GPUs and gloo without."""
    distributed_timeout_seconds: float = 600.0
    """A collective that hangs for so long ends the run and names the rank and the step."""


@dataclass
class DataConfig:
    """Where tokens come from and how they are packed. Write lengths out: 32K might be 32,768 or 32,000."""

    embedded_corpus: str | None = field(default=None, metadata=PATH)
    """Folder of the embedded corpus (Python's own sources and documentation), built there when it is missing; train,
    validation and tokenizer are taken from it when they are empty. none uses only what they name."""
    train: list[str] = field(default_factory=list, metadata=PATH)
    """Blend of tokenised corpora: .bin/.idx prefixes, each optionally preceded by its weight, e.g. [0.7, code, 0.3,
    prose]."""
    validation: list[str] = field(default_factory=list, metadata=PATH)
    """Held-out blend, same form; empty means no validation."""
    allow_shared_validation: bool = False
    """Let data.validation name a corpus that data.train names as well; otherwise that is refused."""
    tokenizer: str = field(default="", metadata=PATH)
    """A SentencePiece .model file or a Hugging Face tokenizer folder; empty takes that of run.init_from."""
    seq_length: int = 8192
    """Tokens of one pack; one micro-batch is one pack. Where nothing says, 512 with the preset tiny and 8192 with
    others; with init_from, what its weights were trained on, or 8192 and no more than their longest sequence."""
    reset_at_documents: bool = True
    """Attention, state and positions restart at every document; false lets them flow through the pack."""
    cache_folder: str | None = field(default=None, metadata=PATH)
    """Where sample indices and what was found in corpora are cached; none means <run.folder>/data_cache."""
    packing: Literal["chop", "best_fit"] = "chop"
    """How documents become packs: chop fills every pack and cuts documents at its end; best_fit cuts none that a pack
    can hold, and pads."""
    train_transition_tokens: int = 0
    """Tokens at the beginning of a stage over which the weights of the blend go in a straight line from those of the
    stage before to those of train."""
    max_epochs: list[str] = field(default_factory=list, metadata=PATH)
    """How often the run may read the corpora of train: one number for all, or one before each prefix, [4, code, 2,
    prose]; the others take the weight of one that is used up. Empty is as often as it takes."""


@dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule, which counts tokens; 1e9, 500M, 1.5B and 2T are numbers of them."""

    lr: float = 2e-4
    """Peak learning rate."""
    min_lr: float = 2e-5
    """Final learning rate."""
    lr_warmup_tokens: int = 0
    """Tokens of linear warm-up."""
    lr_warmup_steps: int = 0
    """Instead of lr_warmup_tokens, steps of linear warm-up."""
    lr_constant_tokens: int = 0
    """Tokens at the peak after the warm-up."""
    lr_decay_tokens: int = 0
    """Tokens of decay from the peak to min_lr after that; 0 stays at the peak."""
    lr_decay_style: Literal["linear", "cosine", "exponential"] = "cosine"
    """Shape of the decay."""
    lr_segments: list[str] = field(default_factory=list)
    """Instead of the constant tokens and the decay, segments of shape, tokens and learning rate at their end:
    [constant, 7.2T, 2e-4, exponential, 1T, 3e-5]; shapes are constant, linear, cosine, exponential. The first begins at
    lr, a constant one has its own value throughout; warm-up is a part of the first ones, and after the last its rate
    stays."""
    lr_may_jump: bool = False
    """Let a stage begin with another learning rate than the one before ends with; otherwise that is refused."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment. Our default: M1 publishes 1e-15 for its RL stage only."""
    weight_decay: float = 0.1
    """Decoupled weight decay, not applied to norms."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off. Our default: M1 publishes
    none."""
    clip_grad_schedule: list[float] = field(default_factory=list)
    """Instead of clip_grad, points of tokens and norm, [0, 1, 1e12, 0.5]: linear between them, constant outside."""


@dataclass
class TrainConfig:
    """The loop."""

    max_steps: int | None = None
    """Optimizer steps of the whole run; none means 1,000, or with stages as many as these take."""
    global_batch_size: int = 8
    """Packs per optimizer step over the whole mesh."""
    global_batch_size_schedule: list[float] = field(default_factory=list)
    """Instead of global_batch_size, points of tokens and packs, [0, 2048, 69e9, 4096]: each from its tokens on."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Parameters and matrix products; auto is bf16 on a GPU and fp32 on a CPU."""
    seed: int = 1234
    """Seed of the initial weights and of the data order."""
    loss_normalization: Literal["token", "sample"] = "token"
    """token weighs every learnt token of a global batch the same, sample every document (a conversation), whose tokens
    share its weight."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """full recomputes whole layers, selective the modules of recompute_modules; none keeps all activations."""
    recompute_num_layers: int = 1
    """With full: layers per recomputed chunk."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective: any of core_attn, moe."""
    moe_aux_loss_coeff_schedule: list[float] = field(default_factory=list)
    """Instead of model.moe_aux_loss_coeff, points of tokens and weight, [0, 0.01, 1e12, 0.001]: linear between them,
    constant outside. A step has the weight at the tokens after it."""
    eval_interval: int = 0
    """Steps between validations; 0 validates only at the end."""
    eval_samples: int = 16
    """Packs per validation."""
    max_skipped_steps: int = 5
    """Steps in a row with a non-finite loss or gradient (each is skipped) after which the run stops."""
    spike_guard: Literal["off", "count", "skip", "stop", "rollback"] = "off"
    """What is done with a step whose gradient norm is a spike. count: it is applied, clipped as ever. skip: it is not
    applied. stop: it is not applied, and the run ends. rollback: the newest checkpoint is loaded, and the data go on
    behind the step's batch. All but off count it, and write the losses of its documents to <run.folder>/spikes."""
    spike_factor: float = 5.0
    """A spike is a gradient norm above so many times the median of the last ones. Our default: M1 publishes none."""
    spike_window: int = 128
    """Steps that the median is of, spikes left out; nothing is judged before half of them are there."""
    max_spikes: int = 10
    """Spikes with no more than spike_window steps between the last and the first of them, with which the run ends; 0
    never ends it, which rollback does not allow."""
    grad_norm_interval: int = 0
    """Steps between records of the gradient norms by kind and depth of the layers; 0 records them at spikes only."""
    profile_step_start: int | None = None
    """First step of the profiler window; none profiles nothing."""
    profile_step_end: int | None = None
    """Step after the last of the profiler window."""


@dataclass
class RunConfig:
    """Folder, checkpoints, logs."""

    folder: str = field(default="runs/m1", metadata=PATH)
    """Everything of the run goes here: config, checkpoints, metrics.jsonl, TensorBoard, profiles."""
    init_from: str | None = field(default=None, metadata=PATH)
    """Weights that a new run starts from, and whose model it takes (set by --init-from): hf:FOLDER is a local Hugging
    Face folder, anything else a checkpoint or a run; none draws them."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the folder; false refuses a folder that has one."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    save_interval_minutes: float = 0.0
    """Minutes between checkpoints, besides save_interval; 0 is off."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on; the last one is waited for."""
    max_failed_saves: int = 3
    """Saves in a row that can't be written (each is tried twice, and the older checkpoints stay) after which the run
    stops."""
    log_interval: int = 1
    """Steps between console lines (metrics.jsonl has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events to <folder>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; none is off. Needs the wandb package (pip install 'megatron-m1[wandb]'). What the next
    fields leave open, W&B's own variables say (WANDB_ENTITY, WANDB_MODE, ...)."""
    wandb_entity: str | None = None
    """User or team that the project belongs to."""
    wandb_name: str | None = None
    """Name of the run there."""
    wandb_group: str | None = None
    """Group of runs that this one is shown with."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    wandb_id: str | None = None
    """W&B run to go on in; none is that of <folder>/wandb_id, or a new one."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline writes to <folder>/wandb, for "wandb sync" later; none is WANDB_MODE, or else online."""


@dataclass
class StageConfig:
    """A part of a run, by the tokens that it trains on. What it does not name it has from the stage before it."""

    name: str
    """Another one for every stage."""
    tokens: int
    """That the stage trains on. It ends at the first step at which the run's tokens reach the sum up to here."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What it names, by dotted path; the first stage has the rest from the run's own groups."""


@dataclass
class Config:
    """A whole run."""

    preset: str = "tiny"
    """Model preset whose values `model` starts from: tiny, m1-mid, m1-456b."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: list[StageConfig] = field(default_factory=list)
    """Parts of the run in their order; none means one stage of ``train.max_steps``."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, without what pads the packs' ends."""
        return self.train.global_batch_size * self.data.seq_length
