"""Package metadata. The rooms are top-level folders; they are imported below the one name ``megatron_m1``.

The links in ``megatron_m1/`` show editors and mypy the same; where a checkout has no links, the mapping here holds.
"""

import re
from pathlib import Path

from setuptools import setup

ROOMS = {"megatron_m1": "megatron_m1"} | {f"megatron_m1.{room}": room for room in ("parallel", "kernels", "data")}
VERSION = re.findall(
    r'^__version__ = "(.+)"$', Path(__file__).with_name("megatron_m1").joinpath("__init__.py").read_text(), re.MULTILINE
)[0]
"""Read, not imported: what the package needs is not there yet."""
PACKAGES = [
    *ROOMS,
    "megatron_m1.checkpoint",
    "megatron_m1.commands",
    "megatron_m1.config",
    "megatron_m1.config.foreign",
    "megatron_m1.convert",
    "megatron_m1.convert.families",
    "megatron_m1.convert.families.minimax_m1",
    "megatron_m1.evaluation",
    "megatron_m1.generate",
    "megatron_m1.launch",
    "megatron_m1.layers",
    "megatron_m1.library",
    "megatron_m1.model",
    "megatron_m1.plan",
    "megatron_m1.report",
    "megatron_m1.runtime",
    "megatron_m1.runtime.pool",
    "megatron_m1.shapes",
    "megatron_m1.training",
    "megatron_m1.kernels.expert_mlp",
    "megatron_m1.kernels.lightning",
    "megatron_m1.kernels.matmul",
    "megatron_m1.kernels.rmsnorm",
    "megatron_m1.parallel.expert",
    "megatron_m1.data.chat",
    "megatron_m1.data.corpora",
    "megatron_m1.data.demo",
    "megatron_m1.data.packed",
    "megatron_m1.data.stream",
    "megatron_m1.data.tokenize",
    "megatron_m1.data.tokenizers",
]

setup(
    name="megatron-m1",
    version=VERSION,
    description="A Megatron-style 3D-parallel pretraining system for MiniMax-M1-class models",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=PACKAGES,
    package_dir=ROOMS,
    package_data={
        "megatron_m1": ["py.typed"],
        "megatron_m1.data.chat": ["templates/*.jinja"],
        "megatron_m1.plan": ["hardware.yaml"],
        "megatron_m1.report": ["page.html"],
    },
    install_requires=[
        "torch>=2.11",  # tensors, autograd, process groups, torchrun
        "triton>=3.6; platform_system == 'Linux'",  # GPU kernels
        "megatron-core>=0.19.2,<0.20",  # TP, PP, EP, distributed optimizer, dist_checkpointing, datasets
        "transformers>=5.10",  # tokenizer folders without tokenizer.json, and the native MiniMax model
        "jinja2>=3.1.6",  # chat templates, which transformers renders with it
        "numpy>=2.0",  # token files
        "safetensors>=0.5",  # weights of Hugging Face folders
        "tokenizers>=0.21",  # Hugging Face tokenizers
        "sentencepiece>=0.2",  # BPE tokenizers, trained and loaded
        "protobuf>=5",  # the format of SentencePiece's models
        "pyarrow>=18",  # Parquet corpora
        "zstandard>=0.23",  # .zst corpora
        "jsonargparse[signatures]>=4.40",  # one dataclass tree from YAML and dotted flags
        "pyyaml>=6.0",  # YAML configs, resolved config files
        "psutil>=6.0",  # dist_checkpointing reads host memory with it
        "rich>=13.9",  # console: progress bars, tables
        "tensorboard>=2.18",  # event files
    ],
    extras_require={
        "dev": [
            "pytest>=8.3",  # test runner
            "pytest-timeout>=2.3",  # a hung collective ends a test
            "pytest-xdist>=3.6",  # tests of one process side by side
            "hypothesis>=6.100",  # random packs
            "ruff>=0.12",  # format and lint
            "mypy>=1.15",  # types
            "types-PyYAML",  # types
            "types-psutil",  # types
            "matplotlib>=3.9",  # plots of benchmarks
            "bokeh>=3.10",  # as the extra report has it
            "wandb>=0.18",  # its offline mode, as the extra below has it
            "lm-eval>=0.4.13,<0.5",  # standard tasks, as the extra below has it
        ],
        "eval": ["lm-eval>=0.4.13,<0.5", "matplotlib>=3.9"],  # evaluate: standard tasks, pictures
        "wandb": ["wandb>=0.18"],  # runs on Weights & Biases
        "report": [
            "bokeh>=3.10",  # charts in one HTML file that can be zoomed; its script is half as large as Plotly's
            "jinja2>=3.1",  # the page around them
        ],
        "gpu": ["transformer-engine[pytorch]>=2.5"],
    },
    entry_points={"console_scripts": ["megatron-m1 = megatron_m1.cli:main"]},
)
