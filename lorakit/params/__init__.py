"""What a run is told: every parameter, read from params files, the command line or a notebook, and completed alike."""

from lorakit.params.doors import beside, collect, complete, given, params_of, parse_override, resolve
from lorakit.params.files import merge, read_files
from lorakit.params.overview import capabilities, reference, shown
from lorakit.params.whole import METHODS, NESTED, PER_RUN, RATES, Params, check, method_of, rate_note, row_of
