"""LoRA from scratch: the layer, a transformer that carries it, and a trainer, each small enough to read in one go."""

import warnings

from lorakit.scratch.attention import SelfAttention
from lorakit.scratch.cli import main
from lorakit.scratch.compare import Comparison, Settings, compare
from lorakit.scratch.layer import LoRALinear
from lorakit.scratch.loop import VOCAB_SIZE, DivergedError, LoRATrainer, byte_loader, byte_rows, evaluate, pretrain
from lorakit.scratch.transformer import LoRATransformer

warnings.filterwarnings("ignore", "'lorakit.scratch", RuntimeWarning)  # of `python -m` a part, which is imported above
