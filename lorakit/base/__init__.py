"""How the frozen base is kept: in full precision, or in 4-bit NormalFloat (QLoRA)."""
