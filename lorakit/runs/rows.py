"""A row of a table is one combination of answers: what is trained, on which base, which layers get a backward."""

from lorakit.params import Params


def row_of(params: Params) -> str:
    """The run's name in tables and figures: `params.row`, or one made from what is switched on.

    LoRA on an NF4 base is "qlora", with skipped layers "skip", with a novelty gate "slora"; other combinations are
    joined by "+". Chosen tokens make it "flora", or "random_tokens".
    """
    if params.row:
        return params.row
    base = params.peft_type.lower() if params.method == "peft" else params.method
    extras = [name for name, on in (("nf4", params.quantize != "none"), ("skip", params.skip != "none")) if on]
    if params.gate != "none":
        extras.append("slora" if params.gate == "novelty" else params.gate)
    if params.gating.method != "baseline":
        extras.append("flora" if params.gating.method == "flora" else "random_tokens")
    if base == "lora" and len(extras) == 1:
        return "qlora" if extras == ["nf4"] else extras[0]
    return "+".join([base, *extras])


def notebook_of(params: Params) -> str:
    """The notebook that tells the story of this combination: of its most particular answer."""
    if params.gating.method != "baseline" or "-tokens" in params.setting:
        return "08_flora.ipynb"
    if params.gate != "none" or params.redundancy or params.setting.endswith("-gates"):  # their ungated rows too
        return "07_slora.ipynb"
    if params.skip != "none":
        return "05_skiplora.ipynb"
    if params.quantize != "none":
        return "04_qlora.ipynb"
    return {"sparse": "02_sparse_lora.ipynb", "hira": "03_hira.ipynb"}.get(params.method, "01_lora.ipynb")
