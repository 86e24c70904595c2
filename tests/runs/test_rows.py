"""One combination of answers is one row: its name, its notebook, and which combinations are refused."""

from __future__ import annotations

import pytest

import lorakit
from lorakit.errors import ParameterError
from lorakit.params import METHODS, check, method_of, params_of, resolve, row_of
from lorakit.params.whole import notebook_of


@pytest.mark.parametrize(
    ("given", "row", "notebook"),
    [({}, "lora", "01_lora"), ({"method": "full"}, "full", "01_lora"),
     ({"method": "sparse"}, "sparse", "02_sparse_lora"),
     ({"method": "sparse", "row": "sparse_ranks"}, "sparse_ranks", "02_sparse_lora"),
     ({"method": "hira"}, "hira", "03_hira"), ({"quantize": "nf4"}, "qlora", "04_qlora"),
     ({"method": "hira", "quantize": "nf4"}, "hira+nf4", "04_qlora"), ({"skip": "adapter"}, "skip", "05_skiplora"),
     ({"skip": "prefix", "quantize": "nf4"}, "lora+nf4+skip", "05_skiplora"),
     ({"method": "peft", "peft_type": "DORA"}, "dora", "01_lora"), ({"gate": "novelty"}, "slora", "07_slora"),
     ({"gate": "random", "quantize": "nf4"}, "lora+nf4+random", "07_slora"),
     ({"setting": "sst2-minilm-gates", "row": "baseline"}, "baseline", "07_slora"),
     ({"redundancy": 0.5, "row": "baseline"}, "baseline", "07_slora"),
     ({"gating": {"method": "flora"}}, "flora", "08_flora"),
     ({"gating": {"method": "random"}}, "random_tokens", "08_flora"),
     ({"gating": {"method": "baseline"}}, "lora", "01_lora"),
     ({"gating": {"method": "flora"}, "gate": "novelty"}, "lora+slora+flora", "08_flora"),
     ({"gating": {"method": "flora"}, "quantize": "nf4"}, "lora+nf4+flora", "08_flora"),
     ({"gating": {"method": "random"}, "method": "hira"}, "hira+random_tokens", "08_flora"),
     ({"setting": "toy-tokens", "row": "baseline"}, "baseline", "08_flora")],
)  # fmt: skip
def test_names_and_notebooks(given, row, notebook):
    params = resolve(given)
    assert (row_of(params), notebook_of(params)) == (row, f"{notebook}.ipynb")


def test_a_params_file_is_about_the_method_it_is_called_after():
    assert params_of("sst2-minilm", "hira")["method"] == "hira"
    assert params_of("sst2-minilm", "sparse_ranks")["method"] == "sparse"
    assert "method" not in params_of("sst2-minilm", "qlora")  # LoRA, the default
    assert [method_of(name) for name in ("full", "qlora")] == [{"method": "full"}, {}]


def test_the_methods_are_the_ones_that_can_be_attached():
    from lorakit.adapters.attach import ADAPTERS

    assert set(METHODS) == {*ADAPTERS, "peft", "head", "full"}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"gate": "slora"}, "gate='slora': must be one of none, random"),
     ({"gate": "novelty", "precision": "fp16"}, "precision='fp16'.*gradient scaler"),
     ({"gating": {"method": "flora", "mode": "fractional"}, "task": "toy-stories"}, "^gating.mode='fractional'"),
     ({"method": "galore"}, "method='galore'.*lora, hira, sparse"),
     ({"method": "hira", "alpha": 8.0}, "alpha=8.0: HiRA has no alpha"),
     ({"method": "hira", "rslora": True}, "rslora=True: HiRA has no alpha"),
     ({"peft_type": "DORA"}, "peft_type='DORA': is for method 'peft'"),
     ({"peft_options": {"r": 2}}, "peft_options=.*is for method 'peft'"), ({"method": "peft"}, "peft_type=''"),
     ({"method": "peft", "peft_type": "NOLA"}, "peft_type='NOLA'.*LORA"),
     ({"method": "full", "quantize": "nf4"}, "quantize='nf4'.*cannot be trained"),
     ({"quantize": "nf4", "precision": "fp16"}, "precision='fp16'"),
     ({"method": "hira", "skip": "prefix"}, "skip='prefix': needs a method of lora, sparse, peft"),
     ({"method": "sparse", "select": "best"}, "select='best'"), ({"method": "sparse", "sparsity": 1.0}, "sparsity=1.0"),
     ({"method": "sparse", "sparsify": "structured", "rank": 1}, "sparsity=0.5"),
     ({"skip": "prefix", "skip_threshold": -1.0}, "skip_threshold=-1.0"),
     ({"skip": "prefix", "skip_warmup": 1.0}, "skip_warmup=1.0"),
     ({"skip": "prefix", "skip_min_active": 1000}, "skip_min_active=1000"),
     ({"gating": {"method": "flora"}}, "gating.method='flora': needs a language model"),
     ({"gating": {"method": "flora", "score": "excess_loss"}, "method": "full"}, "gating.score='excess_loss'.*adapter"),
     ({"gating": {"method": "flora"}, "precision": "fp16"}, "precision='fp16'"),
     ({"gating": {"method": "flora", "mode": "fractional"}, "skip": "prefix"}, "gating.mode=.*measures no layers"),
     ({"gating": {"method": "random", "mode": "fractional"}, "gradient_checkpointing": True}, "gradient_check")],
)  # fmt: skip
def test_contradictions_are_refused_before_anything_is_written(given, message, tmp_path):
    with pytest.raises(ParameterError, match=message):
        lorakit.run({"record": str(tmp_path / "r.json"), "run_dir": str(tmp_path / "run"), "max_train": 32} | given)
    assert not (tmp_path / "r.json").exists() and not list(tmp_path.glob("run/*"))


def test_hira_takes_the_default_alpha_for_none():
    """A notebook's parameters may carry every default; HiRA does not read this one."""
    for alpha in (16.0, None):
        check(resolve({"method": "hira", "alpha": alpha}))
