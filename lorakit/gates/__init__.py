"""Which batches get a backward pass."""

from lorakit.gates.build import GATES, build_gate
from lorakit.gates.log import GateWarning
from lorakit.gates.novelty import HeadGradientGate
from lorakit.gates.simple import LossFloor, RandomGate
from lorakit.gates.threshold import ThresholdController
from lorakit.gates.variants import GradientNorm, LeastNovel, NoveltyAndLoss
