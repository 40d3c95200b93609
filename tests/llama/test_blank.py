"""A blank model has a model's names and shapes, no memory, and made without torch's compiler."""
from __future__ import annotations

import subprocess
import sys

import torch

from minilora.llama.blank import blank_model
from minilora.llama.config import LlamaConfig
from minilora.llama.model import LlamaForCausalLM
from minilora.shapes import SHAPES
from tests.models import SHAPE

WITHOUT_COMPILER = """
import sys
from minilora.llama.blank import blank_model
from minilora.llama.config import LlamaConfig
from minilora.shapes import SHAPES
blank_model(LlamaConfig.from_dict(SHAPES["7b"]))
print("torch._dynamo" in sys.modules)
"""


def test_names_shapes_and_ties_are_those_of_a_model() -> None:
    for raw in (SHAPE, {**SHAPE, "tie_word_embeddings": True}, {**SHAPE, "model_type": "qwen2"}):
        config = LlamaConfig.from_dict(raw)
        blank, model = blank_model(config), LlamaForCausalLM(config)
        assert {name: (p.shape, p.is_meta) for name, p in blank.named_parameters()} == \
            {name: (p.shape, True) for name, p in model.named_parameters()}
        assert (blank.lm_head.weight is blank.model.embed_tokens.weight) == config.tie_word_embeddings


def test_models_made_afterwards_are_filled_again() -> None:
    blank_model(LlamaConfig.from_dict(SHAPES["110m"]))
    linear = torch.nn.Linear(64, 64)
    assert 0.01 < float(linear.weight.detach().std()) < 1


def test_torchs_compiler_is_not_imported_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
