"""What zeros are worth: reports, compaction, packed files."""

from __future__ import annotations

import functools
import json
import math

import pytest
import sparse_models
import torch
from small_models import bits, logits, same_bits, trained_tensors
from sparse_models import bare, batch, pruned
from torch import nn

from lorakit.adapters import (
    AdapterSettings,
    LoRALayer,
    adapter_layers,
    attach,
    detach,
    load_adapter,
    merge,
    save_adapter,
    sparsity_report,
)
from lorakit.adapters.packed import PACKED_FILE, pack, unpack
from lorakit.adapters.zeros import compact, effective_rank, singular_values
from lorakit.errors import CheckpointError, LorakitError, ParameterError

model = sparse_models.model
moved = sparse_models.moved


# --- what zeros are worth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 8])
def test_half_the_entries_zero_leave_ba_nearly_dense_and_the_merged_weight_dense(rank):
    layer = LoRALayer(nn.Linear(400, 300), AdapterSettings(rank=rank))
    nn.init.normal_(layer.lora_B)
    built = pruned(nn.Sequential(layer), 0.5)
    zeros = sparsity_report(built)["zeros"]
    assert (zeros["A"], zeros["B"], zeros["merged"]) == (0.5, 0.5, 0)
    assert zeros["BA"] == pytest.approx((1 - 0.25) ** rank, abs=0.01)  # 0.32 at rank 4, 0.10 at rank 8


def test_report_equals_the_dense_computation(moved):
    built = pruned(moved(), 0.8)
    layers, report = adapter_layers(built), sparsity_report(built)
    product = {path: (layer.lora_B @ layer.lora_A).detach() for path, layer in layers.items()}
    assert report["nonzero"]["BA"] == sum(int(torch.count_nonzero(BA)) for BA in product.values())
    assert report["nonzero"]["merged"] == sum(int(torch.count_nonzero(la.merged_weight())) for la in layers.values())
    for path, BA in product.items():
        sigma = torch.linalg.svdvals(BA.double())
        p = sigma[:8] / sigma[:8].sum()
        entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 1e-12)
        own = report["layers"][path]
        assert own["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-5)
        assert own["numerical_rank"] == int(torch.linalg.matrix_rank(BA))
        assert own["BA"] == pytest.approx(float((BA == 0).float().mean()), abs=1e-7)
    assert report["effective_rank"] == pytest.approx(sum(la["effective_rank"] for la in report["layers"].values()) / 7)


def test_effective_rank_of_known_spectra():
    orthogonal = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64)).Q
    assert effective_rank(singular_values(orthogonal.T, orthogonal)) == pytest.approx(5)
    assert singular_values(torch.eye(3), torch.eye(3)).dtype == torch.float64
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(8**0.5)  # exp(½ log 2 + ½ log 4)
    assert effective_rank(torch.zeros(4)) == 0


def test_report_reads_any_lora_merged_or_not(moved, tiny_bert):
    built = moved("lora")
    before = sparsity_report(built)
    assert before["zeros"] == {"A": 0, "B": 0, "BA": 0, "merged": 0} and before["numerical_rank"] == 8
    assert sparsity_report(merge(built)) == before
    with pytest.raises(LorakitError, match="has no LoRA layers"):
        sparsity_report(tiny_bert())


# --- compaction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_compact_removes_zero_ranks_and_changes_no_output(moved, rslora):
    built = pruned(moved(rslora=rslora), 3 / 8, kind="structured")
    next(iter(adapter_layers(built).values())).lora_A.requires_grad_(False)
    before, scale = logits(built), [layer.scaling for layer in adapter_layers(built).values()]
    report, state = sparsity_report(built), torch.get_rng_state()
    assert compact(built) is built and torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(logits(built), before, atol=1e-6)
    for layer, was in zip(adapter_layers(built).values(), scale, strict=True):
        assert layer.lora_A.shape == (5, layer.in_features) and layer.lora_B.shape == (layer.out_features, 5)
        settings = layer.settings
        assert layer.scaling == was == pytest.approx(settings.alpha / (math.sqrt(5) if rslora else 5))
    flags = [p.requires_grad for layer in adapter_layers(built).values() for p in layer.adapter_parameters().values()]
    assert flags == [False] + [True] * 13  # as before
    after = sparsity_report(built)
    assert report["bytes"]["compacted"] == after["bytes"]["dense"] == after["bytes"]["compacted"]
    assert built.lorakit_attachment.settings.rank == 5
    assert compact(built) is built and torch.allclose(logits(built), before, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_compacted_file_of_uneven_ranks_loads_in_peft_and_here(build, tmp_path, kind, rslora):
    from peft import PeftModel

    built = attach(build(kind), "sparse", rank=6, alpha=10, rslora=rslora, seed=0)
    with torch.no_grad():
        for count, layer in enumerate(adapter_layers(built).values()):
            layer.lora_B.normal_()
            layer.lora_A[: count % 4] = 0  # 0 to 3 ranks go
            layer.lora_B[:, -1] *= count % 4 < 3  # and one more of B alone
    before = logits(built)
    folder = save_adapter(compact(built), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) and set(config["alpha_pattern"].values())
    for other in (load_adapter(build(kind), folder), PeftModel.from_pretrained(build(kind), folder)):
        assert torch.allclose(logits(other), before, atol=1e-5)
    ranks = {layer.settings.rank for layer in adapter_layers(built).values()}
    assert ranks == {6, 5, 4, 2}


def test_a_layer_of_zero_ranks_alone_keeps_one(model):
    built = model()
    before = logits(built)
    compact(built)
    assert {layer.settings.rank for layer in adapter_layers(built).values()} == {1}
    assert torch.equal(logits(built), before)
    built.train()(**batch()).loss.backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in adapter_layers(built).values())  # it can still learn


def test_compact_leaves_the_base_to_be_detached(moved):
    built = detach(compact(pruned(moved(trainable=()), 0.5, kind="structured")))
    assert torch.equal(logits(built), logits(bare())) and all(p.requires_grad for p in built.parameters())


def test_compact_refuses_what_it_cannot_shrink(moved, tiny_bert):
    with pytest.raises(LorakitError, match="no adapter; call attach"):
        compact(tiny_bert())
    with pytest.raises(LorakitError, match="has no LoRA layers"):
        compact(attach(tiny_bert(), "head"))
    built = merge(pruned(moved(), 0.5, kind="structured"))
    layers = adapter_layers(built)
    with pytest.raises(LorakitError, match="unmerge"):
        compact(built)
    assert adapter_layers(built) == layers


# --- packed files ----------------------------------------------------------------------------------------------------


def raw(tensor):
    return tensor.flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5, 7), (16,), (1,), (), (0, 4)])
def test_packing_is_exact_to_the_bit(dtype, shape):
    tensor = (torch.randn(shape) * (torch.rand(shape) < 0.3)).to(dtype)
    if dtype.is_floating_point and tensor.numel() > 3:
        tensor.view(-1)[:3] = torch.tensor([-0.0, math.nan, math.inf])
    stored, metadata = pack({"x": tensor})
    (back,) = unpack(stored, metadata).values()
    assert back.shape == tensor.shape and back.dtype == dtype and torch.equal(raw(back), raw(tensor))


def test_packed_bits_are_where_the_format_says():
    tensor = torch.zeros(3, 6)
    tensor[0, 1], tensor[1, 2], tensor[2, 5] = 1.5, 2.5, 3.5  # entries 1, 8 and 17
    stored, metadata = pack({"x": tensor, "a": tensor})
    assert stored["x::bitmap"].tolist() == [2, 1, 2] and stored["x::values"].tolist() == [1.5, 2.5, 3.5]
    shapes = '{"a": [3, 6], "x": [3, 6]}'
    assert metadata == {"format": "lorakit-packed", "version": "1", "shapes": shapes}


def test_what_packing_would_not_shrink_is_stored_as_it_is():
    dense = torch.ones(64)
    nearly = torch.ones(64)
    nearly[:2] = 0  # 8 + 62·4 bytes = 64·4: not smaller
    assert pack({"a": dense, "b": nearly})[0].keys() == {"a", "b"}
    nearly[2] = 0
    assert "b::bitmap" in pack({"b": nearly})[0]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_packed_file_is_smaller_and_equal(build, tmp_path, sparsity):
    base = functools.partial(build, "bert", hidden_size=128, intermediate_size=512)
    built = attach(base(), "sparse", seed=0, trainable=())
    for layer in adapter_layers(built).values():
        nn.init.normal_(layer.lora_B)
    pruned(built, sparsity)
    dense = save_adapter(built, tmp_path / "dense") / "adapter_model.safetensors"
    packed = save_adapter(built, tmp_path / "packed", packed=True) / PACKED_FILE
    assert sorted(path.name for path in packed.parent.iterdir()) == ["adapter_config.json", PACKED_FILE]
    sizes = sparsity_report(built)["bytes"]
    assert sizes["packed"] / sizes["dense"] == pytest.approx(1 - sparsity + 1 / 32, abs=1e-3)
    for file, size in ((dense, sizes["dense"]), (packed, sizes["packed"])):
        assert file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") == size
    assert packed.stat().st_size / dense.stat().st_size < 1 - sparsity + 1 / 32 + 0.06  # headers and all
    for other in (base(), attach(base(), "lora", trainable=()), attach(base(), "sparse", trainable=())):
        load_adapter(other, packed.parent)
        for path, layer in adapter_layers(built).items():
            for name, tensor in layer.adapter_parameters().items():
                assert torch.equal(raw(getattr(adapter_layers(other)[path], name).detach()), raw(tensor.detach()))
        assert torch.equal(logits(other), logits(built))


def test_packed_and_dense_replace_each_other(moved, tmp_path):
    for packed in (True, False, True):
        save_adapter(moved(), tmp_path, packed=packed)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"adapter_config.json", PACKED_FILE if packed else "adapter_model.safetensors"}


def test_head_and_full_are_not_packed(tiny_bert, tmp_path):
    with pytest.raises(ParameterError, match="packed=True: is for adapters, not 'head'"):
        save_adapter(attach(tiny_bert(), "head"), tmp_path / "head", packed=True)
    assert not (tmp_path / "head").exists()


def test_damaged_packed_files_are_refused(moved, tmp_path):
    from safetensors.torch import save_file

    folder = save_adapter(pruned(moved()), tmp_path / "adapter", packed=True)
    tensors = {f"base_model.model.{name}": t.detach() for name, t in trained_tensors(pruned(moved())).items()}
    whole, metadata = pack(tensors)
    some = next(name for name in whole if name.endswith("::values"))
    broken = {
        "lacks its bitmap": ({name: t for name, t in whole.items() if name != some}, metadata),
        "lacks its bitmap or": ({n: t for n, t in whole.items() if n != some.replace("values", "bitmap")}, metadata),
        "values, ": (whole | {some: whole[some][1:]}, metadata),
        "not of format": (whole, {"format": "pt"}),
    }
    target = moved()
    before = bits(target)
    for message, (stored, described) in broken.items():
        save_file(stored, folder / PACKED_FILE, metadata=described)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(target, folder)
    assert same_bits(target, before)


@pytest.mark.parametrize("methods", [("lora", "sparse"), ("sparse", "lora")])
def test_lora_and_sparse_share_their_files(model, moved, tmp_path, methods):
    saved, attached = methods
    built = moved(saved)
    other = load_adapter(model(attached), save_adapter(built, tmp_path / "adapter"))
    assert torch.equal(logits(other), logits(built)) and other.lorakit_attachment.method == attached
