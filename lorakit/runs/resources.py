"""What a run needs of a machine, for a scheduler: `resources:` of its setting's file, its row's file winning by key."""

from pathlib import Path

from lorakit.errors import ParameterError, require
from lorakit.fields import Settings, field
from lorakit.params import files


class Resources(Settings):
    """The keys of `resources:`; nothing that a run computes depends on them, and no record holds them."""

    gpus: int = field(1, "GPUs; of several each has a process, through `accelerate launch`, and no notebook", ge=0)
    cpus: int = field(8, "cores", ge=1)
    memory: float = field(32.0, "GiB of main memory", gt=0)
    hours: float = field(4.0, "until the scheduler stops the run, which goes on from its checkpoint when asked", gt=0)
    together: int = field(1, "short runs in one submission, one after another, each with all of this", ge=1)


def resources(paths: list[Path]) -> Resources:
    """What the params files ask for, later ones winning.

    Raises:
        ParameterError: naming key, value, file and what is allowed.
    """
    asked: dict[str, object] = {}
    for path in paths:
        own, place = files.read(path).get(files.RESOURCES, {}), f"in {path.parent.name}/{path.name}"
        named = isinstance(own, dict) and all(isinstance(name, str) for name in own)
        require(named, files.RESOURCES, own, f"{place}: must be a mapping of names to values")
        try:
            asked |= Resources(**own).model_dump(exclude_unset=True)
        except ParameterError as error:
            raise ParameterError(f"{files.RESOURCES}.{error.name}", error.value, f"{place}: {error.allowed}") from None
    return Resources(**asked)
