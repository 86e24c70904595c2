"""Where the project keeps its parameters and results, wherever a notebook or a command is started from."""

from lorakit.files import PARAMS, PROJECT, RESULTS
from lorakit.params import params_of

__all__ = ["PARAMS", "PROJECT", "RESULTS", "params_of"]
