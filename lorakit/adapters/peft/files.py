"""Files of any PEFT method: PEFT's own, written and read by PEFT, checked by what is in the model afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from lorakit.adapters.attachment import check_state
from lorakit.adapters.peft.config import NOISE
from lorakit.adapters.peft.forward import ADAPTER, config_of
from lorakit.adapters.peft_format import BOOKKEEPING
from lorakit.errors import CheckpointError, retold
from lorakit.modules import set_until
from lorakit.quiet import quiet

_SIZES_OF_THE_BASE = ("token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")


def stored_tensors(wrapper: nn.Module) -> dict[str, Tensor]:
    """What PEFT writes for the adapter, by the names in its file."""
    with quiet(*NOISE), _exact_ranks(wrapper):
        return get_peft_model_state_dict(wrapper, save_embedding_layers=False)


def save_peft(wrapper: nn.Module, folder: Path) -> None:
    """PEFT's `save_pretrained`, without its model card."""
    with quiet(*NOISE), _exact_ranks(wrapper):
        wrapper.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()


@contextmanager
def _exact_ranks(wrapper: nn.Module) -> Iterator[None]:
    """Let AdaLoRA leave out only singular values that are zero.

    Its last pattern may be newer than the weights, where those of an earlier step were chosen.
    """
    config = config_of(wrapper)
    before = getattr(config, "rank_pattern", None)
    with ExitStack() as stack:
        if config.peft_type == "ADALORA" and before is not None:
            exact: dict[str, list[bool]] = {}  # which singular values of a layer go into the file
            values = {name: p for name, p in wrapper.base_model.model.named_parameters() if ".lora_E." in name}
            for name, p in values.items():
                exact[name] = before.get(name, before.get(name.replace(f".{ADAPTER}", "")))
                if len(exact[name]) == len(p):  # else loaded from a file that left some out already
                    kept = zip(exact[name], p.detach().flatten() != 0, strict=True)
                    exact[name] = [keep or bool(value) for keep, value in kept]
            set_until(stack, config, rank_pattern=exact)
        yield


def load_peft(wrapper: nn.Module, folder: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put what PEFT stored in `folder` in place of what is attached.

    Raises:
        CheckpointError: another type, other settings or another base, or a file that does not hold the trained weights.
    """
    here, given = config_of(wrapper), read_config(folder)
    if given.peft_type != (kind := here.peft_type.value):
        raise CheckpointError(f"holds PEFT's {given.peft_type.value}, but {kind} is attached")
    mine, theirs = here.to_dict(), given.to_dict()
    skipped = {*BOOKKEEPING, *_SIZES_OF_THE_BASE, "rank_pattern" if kind == "ADALORA" else ""}
    for name in sorted(mine.keys() - skipped):
        if _plain(mine[name]) != _plain(theirs.get(name)):
            raise CheckpointError(f"{name}={theirs.get(name)!r}, attached is {mine[name]!r}; detach(model) first")
    if not holds_weights(here):
        raise CheckpointError(f"{kind} stores what its encoder gives, not its weights: detach(model) first")
    check_state(stored_tensors(wrapper), tensors)
    put(wrapper, tensors)
    return wrapper


def read_config(folder: Path) -> Any:
    with retold((ValueError, TypeError, KeyError), CheckpointError, "PEFT cannot read its config"), quiet(*NOISE):
        return PeftConfig.from_pretrained(folder)


def holds_weights(config: Any) -> bool:
    """Prompt methods with an encoder store the prompt it makes."""
    return config.peft_type != "P_TUNING" and not getattr(config, "prefix_projection", False)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (list, set, tuple)) else value


def put(wrapper: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give PEFT the tensors, and look whether they are what the model then has."""
    if config_of(wrapper).peft_type != "ADALORA":  # it takes up the ranks of its file first
        check_state(stored_tensors(wrapper), tensors)
    with retold((RuntimeError, KeyError), CheckpointError, "the adapter does not fit this model"), quiet(*NOISE):
        set_peft_model_state_dict(wrapper, dict(tensors))
    after = stored_tensors(wrapper)
    check_state(after, tensors)
    for name, tensor in after.items():
        if not torch.equal(tensor.cpu(), tensors[name].to(tensor.dtype).cpu()):
            raise CheckpointError(f"PEFT did not take {name} from the file")
