"""From what ``load`` found to a model on a device."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron_m1.config import Config, ModelConfig
from megatron_m1.convert.families.minimax_m1.config import DTYPES
from megatron_m1.convert.our_checkpoint import OurCheckpoint
from megatron_m1.convert.sources import open_any
from megatron_m1.data.tokenizers import Tokenizer
from megatron_m1.library.places import Place
