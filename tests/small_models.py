"""What tests of adapters share: a batch for every small model, weights as after training, and PEFT's twin."""

from __future__ import annotations

import torch

from lorakit.adapters.attachment import attachment_of
from lorakit.errors import LorakitError

KINDS = ("bert", "gpt2", "gemma")
HEADS = {"bert": ["classifier"], "distilbert": ["pre_classifier", "classifier"], "gpt2_classifier": ["score"]}
LINEARS = {
    "bert": ["query", "key", "value", "dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt2_classifier": ["c_attn", "c_fc", "c_proj"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
STILL = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma": {},
}


def trained_tensors(model) -> dict[str, torch.Tensor]:
    """The live tensors that were trained, by their names in `Attachment.tensors`."""
    return attachment_of(model).tensors(model)


def conv1d(inputs=5, outputs=7):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


def batch(rows=4, length=9):
    ids = torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def perturb(model):
    """Weights as after training: adapters and head away from where they started, HiRA's BA of the order of 0.3."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            spread = 1.0 if "hira_B" in name else 0.1
            tensor.add_(spread * torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype))
    return model


def train(model, steps=5):
    """AdamW steps, an evaluation after each."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model.train()(**batch()).logits.square().mean().backward()
        optimizer.step()
        assert all(p.grad is None for p in frozen)
        optimizer.zero_grad()
        logits(model)
    return model


def backward(model):
    """Logits, after the backward of a fixed random projection of them."""
    out = model(**batch()).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    return out.detach()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def _held(model):
    """Everything stored, the scales of 4-bit weights too; while merged, when nothing is, what the model holds."""
    try:
        return model.state_dict()
    except LorakitError:
        return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in _held(model).items()}


def same_bits(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in _held(model).items())


def assert_only_trained(model, before):
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def peft_model(base, kind, method="Lora", **options):
    import peft

    head = list(HEADS.get(kind, [])) or None  # PEFT adds names of its own to the list
    config = {"r": 4, "target_modules": LINEARS[kind], "modules_to_save": head, "task_type": head and "SEQ_CLS"}
    config |= {"lora_alpha": 12} if method == "Lora" else {}
    return peft.get_peft_model(base, getattr(peft, f"{method}Config")(**config | options)).eval()
