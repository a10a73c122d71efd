"""Short names of the fields that the planner's tests vary."""

from __future__ import annotations

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = (
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
FULL = {"recompute_granularity": "full"}
CORE = {"recompute_granularity": "selective"}
MOE = CORE | {"recompute_modules": ["moe"]}
