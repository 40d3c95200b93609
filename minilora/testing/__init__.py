"""The reference math in its plainest form, and inputs that break implementations.

Every function is a loop over Python floats (float64) that spells a definition out, and nothing else of the package is
imported, so that another project can hold its own NF4, LoRA, AdamW or loss against these:

    from minilora import testing

    codes, absmax = testing.quantize(weights, testing.nf4_code(), blocksize=64)
    assert my_packed_bytes == testing.pack(codes)

Tensors are nested lists here (anything with ``tolist()`` is taken as well).  `quantize` and its kin round every intermediate
result as float32 hardware does, since bits are the contract there; ``precision=float`` gives the same without that rounding.

The strategies need hypothesis (extra ``[test]``), and only they do.

Example: the table of NF4 levels posted in issue 299 of the qlora repository is symmetric and has fifteen entries, so that a
sixteenth of the codes is never used and every positive level but the largest is off:

    posted = [-1.0, -0.6962, -0.525, -0.394, -0.284, -0.18, -0.076, 0.0, 0.076, 0.18, 0.284, 0.394, 0.525, 0.6962, 1.0]
    testing.check_nf4_code(posted)      # AssertionError: NF4 has 16 levels, found 15
"""
from minilora.testing.confidence import calibration_error, coverage, reliability
from minilora.testing.specifications import (
    IGNORED,
    adamw,
    adamw_8bit,
    check_nf4_code,
    dequantize,
    derived_nf4_code,
    double_dequantize,
    double_quantize,
    dynamic_code,
    float32,
    label_mask,
    lora_forward,
    lora_gradients,
    masked_loss,
    matmul,
    nearest,
    negative_log_likelihood,
    nf4_code,
    pack,
    pager,
    quantize,
    transpose,
    unpack,
)
from minilora.testing.strategies import (
    batches,
    checkpoint_shapes,
    matrices,
    page_accesses,
    weights,
)

__all__ = [
    "IGNORED", "adamw", "adamw_8bit", "batches", "calibration_error", "check_nf4_code", "checkpoint_shapes", "coverage",
    "dequantize", "derived_nf4_code", "double_dequantize", "double_quantize", "dynamic_code", "float32", "label_mask",
    "lora_forward",
    "lora_gradients", "masked_loss", "matmul", "matrices", "nearest", "negative_log_likelihood", "nf4_code", "pack",
    "page_accesses", "pager", "quantize", "reliability", "transpose", "unpack", "weights",
]
