"""Layers: a frozen 4-bit linear (`nf4_linear`), LoRA over any linear (`lora`), and where the two meet (`qlora`, `merge`)."""
