"""Megatron-LM's description of a model, with what it derives by itself, in terms of the tree."""

from __future__ import annotations

from megatron_m1.config.foreign.command_line import CommandLine
from megatron_m1.config.foreign.schedule import Said

FLAGS = (
    *("ffn-hidden-size", "moe-ffn-hidden-size", "num-experts", "moe-router-topk", "num-query-groups", "kv-channels"),
    *("vocab-size", "padded-vocab-size", "make-vocab-size-divisible-by"),
)
"""What is read here of a whole model, besides the sizes that are called alike."""
CHUNKS = "num-layers-per-virtual-pipeline-stage"
"""What is read here in any case."""
_OTHERWISE = {
    "swiglu": "GELU networks: experts are SwiGLU here",
    "untie-embeddings-and-output-weights": "one matrix for embedding and head: the head has its own here",
    "disable-bias-linear": "matrices with biases: none has one here",
    "normalization": "LayerNorm: norms are RMSNorm here",
    "position-embedding-type": "learned positions: softmax layers have rotary ones here",
    "hidden-dropout": "dropout of 0.1: there is none here",
    "attention-dropout": "attention dropout of 0.1: there is none here",
    "reset-attention-mask": "attention across the documents of a pack: data.reset_at_documents keeps them apart",
}
"""What Megatron-LM does unless a flag is given, and this program never."""
_DIVISOR = 128
"""Its default of ``--make-vocab-size-divisible-by``."""


def is_whole_shape(command: CommandLine) -> bool:
    """Whether a command line describes a model, and not only changes one."""
    return command.known("num-layers") is not None and command.known("hidden-size") is not None


def translate_shape(command: CommandLine, said: Said) -> None:
    """Say the model of a command line that has a whole one.

    Raises:
        ValueError: a value is no number, or sizes don't divide; one line.
    """
    _virtual_stages(command, said)
    hidden = command.known("hidden-size")
    if hidden is None or not is_whole_shape(command):
        return
    said.say("model.mixers", ["softmax"], "Megatron-LM's GPT; M1's are seven lightning and one softmax")
    said.say("model.residual", "prenorm", "Megatron-LM's GPT; M1's is deepnorm")
    said.say("model.lm_head_precision", "bf16", "as the rest")
    _heads(command, said, hidden.whole_number(1))
    _experts(command, said, hidden.whole_number(1))
    _vocabulary(command, said)
    said.unsaid += [f"(no --{name}) {what}" for name, what in _OTHERWISE.items() if name not in command.flags]


def _heads(command: CommandLine, said: Said, hidden: int) -> None:
    given = command.known("num-attention-heads")
    if given is None:
        return
    heads = given.whole_number(1)
    width, groups = command.known("kv-channels"), command.known("num-query-groups")
    if width is None and hidden % heads:
        raise ValueError(f"--hidden-size {hidden} is not divisible by {given.text}: give --kv-channels")
    if width is None:
        said.say("model.kv_channels", hidden // heads, "--hidden-size / --num-attention-heads")
    else:
        said.say("model.kv_channels", width.whole_number(1))
    if groups is None:
        said.say("model.num_query_groups", heads, "no --num-query-groups: one a head")
    else:
        said.say("model.num_query_groups", groups.whole_number(1))


def _experts(command: CommandLine, said: Said, hidden: int) -> None:
    given = command.known("moe-ffn-hidden-size") or command.known("ffn-hidden-size")
    if given is not None:
        width, comment = given.whole_number(1), given.text
    else:
        gated = "swiglu" in command.flags
        width = int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden
        comment = "Megatron-LM's default for this --hidden-size"
    experts, used = command.known("num-experts"), command.known("moe-router-topk")
    if experts is None:
        _dense(said, width, comment)
        return
    said.say("model.moe_ffn_hidden_size", width, comment)
    said.say("model.num_moe_experts", experts.whole_number(1))
    if used is None:
        said.say("model.moe_router_topk", 2, "Megatron-LM's default")
    else:
        said.say("model.moe_router_topk", used.whole_number(1))
    defaults: dict[str, tuple[str, object]] = {
        "moe-aux-loss-coeff": ("model.moe_aux_loss_coeff", 0.0),
        "moe-token-dispatcher-type": ("model.moe_token_dispatcher_type", "allgather"),
    }
    for name, (path, value) in defaults.items():
        if name not in command.flags:
            said.say(path, value, "Megatron-LM's default")


def _dense(said: Said, width: int, comment: str) -> None:
    said.say("model.moe_ffn_hidden_size", -(-width // 2), f"half of {comment}")
    said.say("model.num_moe_experts", 2, "as many parameters as a dense network")
    said.say("model.moe_router_topk", 2)
    said.unsaid.append(
        "(no --num-experts) a dense network: every layer's is a mixture of experts here; two of half the width, which "
        "every token visits, have its parameters and its work"
    )


def _vocabulary(command: CommandLine, said: Said) -> None:
    padded, given = command.known("padded-vocab-size"), command.known("vocab-size")
    if padded is not None:
        said.say("model.vocab_size", padded.whole_number(1))
    elif given is not None:
        divisor, ranks = command.known("make-vocab-size-divisible-by"), command.known("tensor-model-parallel-size")
        multiple = (divisor.whole_number(1) if divisor else _DIVISOR) * (ranks.whole_number(1) if ranks else 1)
        size = -(-given.whole_number(1) // multiple) * multiple
        said.say("model.vocab_size", size, f"{given.text} padded to a multiple of {multiple}")
    else:
        said.unsaid.append(
            "(no --vocab-size) the tokenizer's, padded: set model.vocab_size to at least as many as data.tokenizer has"
        )


def _virtual_stages(command: CommandLine, said: Said) -> None:
    given = command.known(CHUNKS)
    if given is None:
        return
    layers, stages = command.known("num-layers"), command.known("pipeline-model-parallel-size")
    if layers is None or stages is None:
        said.unsaid.append(
            f"{given.text}: --num-layers and --pipeline-model-parallel-size are not both given as numbers"
        )
        return
    of_stage, of_chunk = stages.whole_number(1), given.whole_number(1)
    chunks, rest = divmod(layers.whole_number(1), of_stage * of_chunk)
    if rest or not chunks:
        raise ValueError(f"{given.text}: {layers.text} does not split into chunks of that on {of_stage} stages")
    if chunks > 1:
        said.say("parallel.virtual_pipeline_model_parallel_size", chunks, given.text)
