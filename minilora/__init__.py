"""minilora: LoRA and QLoRA from scratch, to read in an afternoon, check to the last bit, and use on a real 7B model."""
from minilora import stopping

with stopping.imports():
    from minilora.adapters import load_adapter, save_adapter
    from minilora.config import TrainConfig
    from minilora.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        HubError,
        MiniloraError,
        OutputError,
        QuantizationError,
        StoppedError,
    )
    from minilora.evaluate import evaluate
    from minilora.generate import generate
    from minilora.layers.lora import LoRAConfig, LoRALinear
    from minilora.layers.merge import merge_lora
    from minilora.layers.nf4_linear import NF4Linear
    from minilora.layers.qlora import add_lora
    from minilora.llama.bnb_format import save_quantized
    from minilora.loading import load_model, load_tokenizer
    from minilora.optim.paged_adamw import PagedAdamW
    from minilora.quant.codebooks import NF4_CODE
    from minilora.quant.nf4 import NF4Tensor, quantize_nf4
    from minilora.train import train

__all__ = [
    "NF4_CODE", "CheckpointError", "ConfigError", "DataError", "HubError", "LoRAConfig", "LoRALinear", "MiniloraError",
    "NF4Linear", "NF4Tensor", "OutputError", "PagedAdamW", "QuantizationError", "StoppedError", "TrainConfig", "add_lora",
    "evaluate", "generate", "load_adapter", "load_model", "load_tokenizer", "merge_lora", "quantize_nf4", "save_adapter",
    "save_quantized", "train",
]
