"""LoRA: a trained low-rank update beside a frozen linear layer.

    y = x Wᵀ + b + scaling · (dropout(x) Aᵀ) Bᵀ         A: (r, in), B: (out, r)

A starts Kaiming-uniform (as in PEFT; the paper draws from a normal distribution), B at zero, so step 0 computes the base
model exactly; at step 1 only B has a gradient (∂L/∂A carries a factor B = 0), from then on both.  ``scaling`` is alpha / r
(LoRA, arXiv 2106.09685, section 4.1), so that alpha, not r, sets the strength of the update; rsLoRA (arXiv 2312.03732) argues
for alpha / √r.

DoRA (arXiv 2402.09353, section 4) trains a length for each output row beside the direction:

    y = m · x (W + scaling·BA)ᵀ / ‖W + scaling·BA‖ + b      the norm is per row and carries no gradient (its section 4.3)

(The paper writes W as (in, out): what it calls columns are the rows here, in PEFT and in its authors' code.)

The layer asks nothing of the base but to be callable and, for DoRA and merging, to tell its weight: a ``weight``
parameter, or ``dense_weight()`` where the weight is stored some other way.  A base that can (``adds_in_place``) is given the
update, to add its product to (``add_to``).

Lessons 02, 03 and 18 explain it.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.layers.hooks import is_hooked
from minilora.layers.low_rank import LowRankUpdate, few_rows_update, plain_update

# A row of zeros (pruned, or lost in quantization) has length 0, and m / 0 would be NaN for the whole model, as in PEFT.
SMALLEST_NORM = torch.finfo(torch.float32).tiny
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """What to attach where.

    Attributes:
        r: rank, 1 or more. alpha: strength; the update is scaled by alpha/r, or alpha/√r with `use_rslora`.
        dropout: probability in [0, 1) of zeroing an entry of x on its way into A, while training.
        target_modules: last name parts of the linears to adapt; default all seven of a block (QLoRA, figure 2: all
            of them are needed to match 16-bit fine-tuning).
        use_rslora, use_dora: see the module docstring.

    Raises:
        ConfigError: a value out of range.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEARS
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"r must be a whole number of at least 1, not {self.r!r}")
        if isinstance(self.alpha, bool) or not (isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha)
                                                and self.alpha > 0):
            raise ConfigError(f"alpha must be a positive number, not {self.alpha!r}")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must lie in [0, 1), not {self.dropout!r}")
        names = self.target_modules
        if not isinstance(names, (tuple, list, set, frozenset)) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"target_modules is a list of names such as 'q_proj', not {names!r:.60}")
        object.__setattr__(self, "target_modules", tuple(names) if isinstance(names, (tuple, list)) else tuple(sorted(names)))

    @property
    def scaling(self) -> float:
        """Factor on B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def dense_weight(linear: nn.Module) -> Tensor:
    """A linear layer's (out, in) weight, rebuilt where it is stored in another form."""
    rebuild = getattr(linear, "dense_weight", None)
    weight: Tensor = getattr(linear, "weight") if rebuild is None else rebuild()    # noqa: B009
    return weight


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")     # draws no first weights
    linear.weight = nn.Parameter(weight)
    return linear


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update that is trained while the layer is frozen.

    Parameters are float32 whatever the compute type: an update of 1e-5 beside a weight of 1 is lost in bfloat16.

    Args:
        base_layer: (..., in) -> (..., out) module with ``in_features`` and ``out_features``; it is frozen here.
        r, alpha, dropout, use_rslora, use_dora: as in `LoRAConfig`, which checks them.
        generator: source of A's initial values; default torch's global one.

    Raises: ConfigError: a value out of range, or `base_layer` has no such features.
    """

    def __init__(self, base_layer: nn.Module, r: int = 16, alpha: float = 32, dropout: float = 0.0,
                 use_rslora: bool = False, use_dora: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__()
        config = LoRAConfig(r, alpha, dropout, use_rslora=use_rslora, use_dora=use_dora)
        if not hasattr(base_layer, "in_features") or not hasattr(base_layer, "out_features"):
            raise ConfigError(f"LoRA goes over a linear layer with in_features and out_features, not over a "
                              f"{type(base_layer).__name__}")
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = (int(getattr(base_layer, name)) for name in ("in_features", "out_features"))
        self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, dropout, use_rslora
        self.scaling = config.scaling
        self.active = True      # False: compute the base alone (`qlora.base_only`)
        device = next((t.device for t in (*base_layer.parameters(), *base_layer.buffers())), torch.device("cpu"))
        self.lora_A = _linear(torch.empty(self.r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = _linear(torch.empty(self.out_features, self.r, dtype=torch.float32, device=device))
        self.lora_magnitude_vector = nn.Parameter(self._row_norms(0)) if use_dora else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to the start: A Kaiming-uniform with a = √5 (bound 1/√in), B zero, DoRA's lengths those of W's rows."""
        with torch.no_grad():
            # Drawn on the CPU, so that a seed means the same adapter on every device.
            initial = torch.empty(self.r, self.in_features, dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
            self.lora_A.weight.copy_(initial)
            self.lora_B.weight.zero_()
            if self.lora_magnitude_vector is not None:
                self.lora_magnitude_vector.copy_(self._row_norms(0))

    @torch.no_grad()
    def start_at(self, base_layer: nn.Module, a: Tensor, b: Tensor) -> None:
        """Begin from another base and other A (r, in) and B (out, r); DoRA's lengths become those of the sum."""
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A.weight.copy_(a)
        self.lora_B.weight.copy_(b)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._row_norms())

    def update(self) -> Tensor:
        """ΔW = scaling · B A, (out, in) float32.  (With DoRA the merged weight also rescales rows: `merged_weight`.)"""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def merged_weight(self, base_weight: Tensor | None = None) -> Tensor:
        """The (out, in) float32 weight of the plain linear layer that computes the same as this one.

        Args:
            base_weight: (out, in) to merge into instead of the layer's own base.
        """
        merged = (dense_weight(self.base_layer) if base_weight is None else base_weight).float() + self.update()
        if self.lora_magnitude_vector is not None:
            merged *= (self.lora_magnitude_vector / merged.norm(dim=1).clamp(min=SMALLEST_NORM))[:, None]
        return merged

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype; A and B are rounded to it for the products."""
        add_to = self._add_to(x.device.type)
        if add_to is not None:
            few = few_rows_update(x, self.lora_A.weight, self.lora_B.weight, self.scaling)
            if few is not None:
                return add_to(few, x)
            through, update = LowRankUpdate.apply(x, self.lora_A.weight, self.lora_B.weight, self.scaling)
            return add_to(update, x if through is None else through)
        y = self.base_layer(x)
        if not self.active:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        update = plain_update(dropped, self.lora_A.weight, self.lora_B.weight, self.scaling)        # (..., out)
        if self.lora_magnitude_vector is None:
            return update.add_(y)
        bias = getattr(self.base_layer, "bias", None)
        # Dropout acts on the whole adapted path, as in PEFT; without it the base product is already there.
        base = F.linear(dropped, dense_weight(self.base_layer).to(x.dtype)) if self.training and self.dropout else \
            y if bias is None else y - bias
        with torch.no_grad():
            norms = self._row_norms()
        # In float32 up to the sum, as in PEFT: near 1 bfloat16 goes in steps of 0.4 and 0.8 %, more than a length is moved.
        rescale = self.lora_magnitude_vector / norms.clamp(min=SMALLEST_NORM)                                       # (out,)
        return (y + (rescale - 1) * base + rescale * update).to(x.dtype)

    def _add_to(self, device: str) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The base's ``add_to``, if it has one and nothing comes between base and update."""
        between = not self.active or self.lora_magnitude_vector is not None or (self.training and self.dropout)
        # Under autocast the types are torch's to choose; what torch.compile makes of the update can't be added to.
        if (between or torch.is_autocast_enabled(device) or torch.compiler.is_compiling()
                or is_hooked(self.base_layer) or not getattr(self.base_layer, "adds_in_place", False)):
            return None
        add_to: Callable[[Tensor, Tensor], Tensor] = self.base_layer.add_to     # type: ignore[assignment]
        return add_to

    def _row_norms(self, update_scale: float = 1.0) -> Tensor:
        """‖W + scaling·BA‖ per output row, (out,) float32; 0 leaves the update out."""
        weight = dense_weight(self.base_layer).detach().float()
        return (weight + self.update().detach() if update_scale else weight).norm(dim=1)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        kind = "" if self.lora_magnitude_vector is None else ", DoRA"
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}{kind}"
