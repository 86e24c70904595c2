"""Names to modules: which linear layers get an adapter (PEFT's rules), what is trained in full, replacing."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ParameterError, require
from lorakit.head import has_task_head, output_head, task_head

ALL_LINEAR = "all-linear"
MATCHING_SECONDS = 0.5  # a pattern of names takes microseconds


def set_until(stack: contextlib.ExitStack, owner: Any, **values: Any) -> None:
    """Give `owner` these attributes of its own until `stack` ends."""
    own = vars(owner)
    for name, value in values.items():
        stack.callback(*(own.__setitem__, name, own[name]) if name in own else (own.pop, name, None))
        own[name] = value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; each of its modules gets its own mode back."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            set_until(stack, module, training=module.training)
        model.eval()
        yield


def random_state(tensor: Tensor) -> Tensor:
    """Changes whenever a random number is drawn on the CPU or where `tensor` is."""
    return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(t.device) for t in [tensor] if t.is_cuda)])


def unwrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a model, for a `torch.compile`d one too: of the model inside, whose names are the model's own.

    Raises:
        ParameterError: a part of the model is compiled by itself, in whose names `torch.compile` stands.
    """

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(model, "_orig_mod", model)
        require_own_names(inner)
        result = function(inner, *args, **kwargs)
        return model if result is inner else result

    return call


def require_own_names(model: nn.Module) -> None:
    """Refuse a model in whose modules' names `torch.compile` stands; see `unwrapping`."""
    alone = next((path for path, module in model.named_modules() if hasattr(module, "_orig_mod")), None)
    how = f"torch.compile(model), or model.get_submodule({alone!r}).compile(), keep the names"
    require(alone is None, "model", type(model).__name__, f"its {alone} is compiled by itself: {how}")


def usable_device(device: str | torch.device) -> torch.device:
    """`device`, which is there.

    Raises:
        ParameterError: it is not on this machine, or PyTorch is not built for it.
    """
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
        cuda = f"cuda (PyTorch sees {torch.cuda.device_count()})"
        why = str(error).strip().splitlines()[0][:100]
        raise ParameterError("device", str(device), f"is not there: {why}; there are cpu, {cuda}") from None


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' GPT-2 Conv1D: a linear map that stores W transposed, (in, out)."""
    # a model that has one has imported it
    return isinstance(module, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear map an adapter can wrap."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def name_matches(name: str, path: str) -> bool:
    """PEFT's rule for a listed name: the whole path or the end of it, at a dot."""
    return path == name or path.endswith(f".{name}")


def fullmatch(pattern: str, path: str, parameter: str) -> bool:
    """Whether the regular expression `pattern`, which `parameter` holds, matches the whole `path`.

    Raises:
        ParameterError: it is none, or one that takes exponential time.
    """
    import regex  # unlike `re`, it can give up

    try:
        return regex.fullmatch(pattern, path, timeout=MATCHING_SECONDS) is not None
    except regex.error as error:
        raise ParameterError(parameter, pattern, f"not a regular expression: {error}") from None
    except TimeoutError:
        raise ParameterError(parameter, pattern, f"takes over {MATCHING_SECONDS} s to match {path}") from None


def inside(path: str, roots: Sequence[str]) -> bool:
    """Whether `path` is one of the modules `roots` or lies in one."""
    return any(not root or path == root or path.startswith(f"{root}.") for root in roots)


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the linear layers inside `model` (not `model` itself, which has no parent to hold an adapter)."""
    return [path for path, module in model.named_modules() if path and is_linear(module)]


def other_towers(model: nn.Module) -> list[str]:
    """Paths of what stands beside the language model of a multimodal one (Gemma 3, Llava): text never reaches it."""
    paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "language_model"]
    roots = [path.removesuffix("language_model") for path in paths]
    beside = {at + name: child for at in roots for name, child in model.get_submodule(at.rstrip(".")).named_children()}
    kept = {*output_head(model), *task_head(model), *paths}
    return [path for path, child in beside.items() if path not in kept and any(True for _ in child.parameters())]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What `model`, or the model under PEFT's wrapper, trains outside its task head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = task_head(base)
    return [p for name, p in base.named_parameters() if p.requires_grad and not inside(name, head)]


def named(paths: Sequence[str], parameter: str, names: Any, allowed: str, has: str = "") -> list[str]:
    """Those of `paths` that the list `names`, which `parameter` holds, names as PEFT reads one.

    Raises:
        ParameterError: it is no list of names, or one matches none of `paths`; `has`: what there is.
    """
    listed = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(name, str) for name in names)
    require(listed, parameter, names, allowed)
    for name in names:
        require(any(name_matches(name, path) for path in paths), parameter, names, f"{name!r} matches no module{has}")
    return [path for path in paths if any(name_matches(name, path) for name in names)]


def resolve_trainable(model: nn.Module, trainable: str | Sequence[str]) -> list[str]:
    """Paths of the modules trained in full: "head", or names matched as PEFT does for `modules_to_save`.

    Raises:
        ParameterError: a name matches no module that has parameters.
    """
    if isinstance(trainable, str):
        require(trainable == "head", "trainable", trainable, 'must be "head", a list of module names, or ()')
        found, name = task_head(model), type(model).__name__
        lost = has_task_head(model) and not found and not output_head(model)
        require(not lost, "trainable", "head", f"{name} has no head outside its base: name its modules, or () for none")
        return found
    paths = [path for path, module in model.named_modules() if path and any(True for _ in module.parameters())]
    has = f"; the model has {_short_names(paths)}"
    found = named(paths, "trainable", trainable, 'must be "head", a list of module names, or ()', has)
    return [path for path in found if not inside(path, [other for other in found if other != path])]


def resolve_targets(model: nn.Module, target_modules: str | Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Paths of the linear layers that get an adapter, in the model's order.

    Args:
        target_modules: "all-linear" (all but the heads, and what stands beside a language model), a list of names (the
            path or its end), or a regular expression that must match the whole path.
        excluded: paths of modules trained in full; nothing in them gets an adapter.

    Raises:
        ParameterError: a name matches nothing, or something that is not linear; the message lists what there is.
    """
    paths = [path for path, _ in model.named_modules() if path]
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        excluded = [*excluded, *task_head(model), *output_head(model), *other_towers(model)]
        found = linear_paths(model)
    elif isinstance(target_modules, str):
        found = [path for path in paths if fullmatch(target_modules, path, "target_modules")]
    else:
        allowed = 'must be "all-linear", a list of names, or a regular expression'
        has = f"; the model's linear layers are {_short_names(linear_paths(model))}"
        found = named(paths, "target_modules", target_modules, allowed, has)
    found = [path for path in found if not inside(path, excluded)]
    for path in found:
        if not is_linear(module := model.get_submodule(path)):
            raise _unknown(model, target_modules, f"{path} is a {type(module).__name__}, not a linear layer")
    if not found:
        hint = "; a string is a regular expression on the whole path, a list holds names"
        hint = hint if isinstance(target_modules, str) else ""
        raise _unknown(model, target_modules, f"matches no linear layer outside the modules trained in full{hint}")
    return found


def _unknown(model: nn.Module, target_modules: object, problem: str) -> ParameterError:
    names = _short_names(linear_paths(model))
    return ParameterError("target_modules", target_modules, f"{problem}; the model's linear layers are {names}")


def _short_names(paths: Sequence[str]) -> str:
    """Last parts of the paths, once each; a whole path where the last part is only a number."""
    names = [path if path.rpartition(".")[2].isdigit() else path.rpartition(".")[2] for path in paths]
    return ", ".join(dict.fromkeys(names)) or "none"


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put `new[child]` in place of every `child`, under every name it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])


def once(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor by the first of its names."""
    first: dict[Tensor, str] = {}
    return {name: tensor for name, tensor in named.items() if first.setdefault(tensor, name) == name}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in forward order: of the lists of modules of one class the largest; empty without any."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    return [*max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=[])]
