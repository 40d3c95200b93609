"""The Llama family: its shape (`config`), the model, its weights on disk (`checkpoint`), and its tokenizers."""
