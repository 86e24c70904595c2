"""Tasks: text in three splits that share nothing -> token ids, collators, metrics."""

from lorakit.tasks.registry import NAMES, kind, load, read
from lorakit.tasks.task import Task
