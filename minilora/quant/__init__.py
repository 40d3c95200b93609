"""Quantization: tables (`codebooks`), the block-wise rule (`blockwise`), and the 4-bit tensor (`nf4`)."""
