"""Tasks: text in three splits that share nothing -> token ids, collators, metrics."""

from lorakit.tasks.loading import load
from lorakit.tasks.registry import NAMES, kind
from lorakit.tasks.task import Task
