"""LinearNF4: a frozen linear layer in 4 bits an element, under the keys of bitsandbytes."""

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import lora_linear
from ..ops.lora_base import no_delta
from ..ops.lora_formula import exporting, formula
from ..ops.nf4 import NF4Weight, expect_block, expect_quant_type
from ..ops.nf4_state import NESTED, scales_of, table_of
from .nf4_packed import PackedNF4
from .nf4_peft import meet
from .nf4_state_dict import StateDictNF4

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit


class LinearNF4(StateDictNF4, nn.Linear):
    """y = x·Ŵᵀ + bias with Ŵ = table[code] · absmax, differentiable in x and bias.

    x is (..., in_features) and y is (..., out_features), in x's dtype or autocast's. Kernels read
    the codes; Ŵ is never stored.

    Options and state dict are those of bitsandbytes' Linear4bit, byte for byte. Loading a state
    dict whose weight is not quantized quantizes it. Codes and scales are frozen parameters, which
    FSDP2 shards and which no cast to another dtype changes. PEFT counts, initializes and merges
    over this layer as over its dense weight, and refuses by name what it cannot do (nf4_peft.py).

    Args:
        in_features: the size of x, at least 1.
        out_features: the size of y, at least 1.
        bias: add a bias (out_features,).
        blocksize: elements that share a scale, a power of two from 32 to 4096.
        double_quant: quantize the scales, too (bitsandbytes' compress_statistics).
        quant_type: "nf4" or "fp4".
        compute_dtype: x is cast to it, and y back to x's dtype, as bitsandbytes does. None: each
            call computes in its own x's dtype, where bitsandbytes keeps that of the first call.
        quant_storage: the dtype in which the state dict holds the bytes of the codes.
        device: where the layer is made.
        dtype: that of the weight before it is quantized, and of the bias.

    Raises:
        ValueError: a size, blocksize or quant_type is none of the above.
        TypeError: dtype is float64, in which a weight cannot be quantized.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314.
    """

    if TYPE_CHECKING:  # what the integration with transformers sets
        columns: bool  # the checkpoint holds the weight as (in_features, out_features)
        _is_hf_initialized: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"LinearNF4: features must be at least 1, got {in_features} and {out_features}"
            )
        expect_quant_type("LinearNF4", quant_type)
        expect_block(blocksize)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage
        dtype = dtype or torch.get_default_dtype()
        base = empty_base(in_features * out_features, blocksize, double_quant, device)
        self.hold(base, dtype, blocksize, quant_type)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, device=device, dtype=dtype)
            )
        if not self.weight.is_meta:
            self.reset_parameters()

    def hold(
        self, base: list[Tensor], dtype: torch.dtype, blocksize: int, quant_type: str
    ) -> None:
        super().hold(base, dtype, blocksize, quant_type)
        meet(LinearNF4, PackedNF4)

    def reset_parameters(self) -> None:
        """Sets the initial values of nn.Linear, quantized."""
        weight = torch.empty(
            self.out_features,
            self.in_features,
            dtype=self.weight_dtype,
            device=self.weight.device,
        )
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.quantize(weight)
        if self.bias is not None:
            limit = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -limit, limit)

    def quantize(self, weight: Tensor) -> None:
        """Replaces the weight by what bitsandbytes makes of this one.

        Args:
            weight: (out_features, in_features), float32, float16 or bfloat16, contiguous.

        Raises:
            ValueError: it has another shape, or holds NaN or infinity. The layer stays as it is.
            TypeError: it is of another dtype. The layer stays as it is.
        """
        if isinstance(weight, Tensor) and weight.shape != self.shape:
            raise ValueError(
                f"LinearNF4: weight must be {self.shape}, got {tuple(weight.shape)}"
            )
        q = NF4Weight.quantize(
            weight, self.blocksize, self.double_quant, self.quant_type
        )
        self.hold(q.base, q.dtype, q.block, q.quant_type)

    @classmethod
    def of(
        cls,
        q: NF4Weight,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> "LinearNF4":
        """Makes a layer of a quantized weight and a bias, which it shares.

        Args:
            q: an NF4Weight of shape (out_features, in_features).
            bias: (out_features,), or None.
            compute_dtype: see the class.
            quant_storage: see the class.

        Raises:
            ValueError: q has not two dimensions.
        """
        if len(q.shape) != 2:
            raise ValueError(
                f"LinearNF4: weight must be (out_features, in_features), got {tuple(q.shape)}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = q.shape
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage
        self.hold(q.base, q.dtype, q.block, q.quant_type)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.bias = bias
        return self

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
    ) -> "LinearNF4":
        """Quantizes the weight of a layer. The two layers share the bias.

        Args:
            linear: nn.Linear or transformers' Conv1D, in float32, float16 or bfloat16.
            blocksize: see the class, as for the arguments that follow.
            double_quant: whether the scales are quantized too.
            quant_type: "nf4" or "fp4".
            compute_dtype: None computes in x's dtype.

        Raises:
            TypeError: linear is of another class or dtype.
            ValueError: its weight holds NaN or infinity.
        """
        transformers = sys.modules.get("transformers.pytorch_utils")
        columns = transformers and type(linear) is transformers.Conv1D
        if type(linear) is not nn.Linear and not columns:
            got = type(linear).__name__
            raise TypeError(
                f"LinearNF4: linear must be nn.Linear or transformers' Conv1D, got {got}"
            )
        weight: Any = linear.weight.T if columns else linear.weight
        bias: Any = linear.bias
        q = NF4Weight.quantize(weight.contiguous(), blocksize, double_quant, quant_type)
        return cls.of(q, bias, compute_dtype=compute_dtype).train(linear.training)

    @classmethod
    def from_bnb(cls, linear: "Linear4bit") -> "LinearNF4":
        """Makes a layer of a bitsandbytes Linear4bit, whose bytes it shares.

        Raises:
            ValueError: linear is not quantized yet, or bitsandbytes has repacked it for inference
                on a CPU. That rounds its scales to bf16, so the weight is another one.
        """
        weight = linear.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError(
                "LinearNF4: linear must be quantized, which .to(device) does, "
                "got one that is not"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "LinearNF4: linear must be as it was loaded, "
                "got one repacked for inference on a CPU"
            )
        codes = weight.detach().as_subclass(Tensor).contiguous()
        q = NF4Weight(
            codes,
            table_of(state),
            scales_of(state),
            state.shape,
            state.dtype,
            state.blocksize,
            state.quant_type,
        )
        layer = cls.of(
            q,
            linear.bias,
            compute_dtype=linear.compute_dtype,
            quant_storage=codes.dtype,
        )
        return layer.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (out_features, in_features); `weight` holds packed bytes (n·k/2, 1)."""
        return self.out_features, self.in_features

    def computes(self, x: Tensor) -> torch.dtype:
        """The dtype that x is cast to, autocast aside."""
        if self.compute_dtype is None or x.dtype is torch.float64:
            return x.dtype
        return self.compute_dtype

    def bias_for(self, dtype: torch.dtype) -> Tensor | None:
        """The bias as lora_linear takes it, where x is of this dtype."""
        bias = self.bias
        return (
            bias
            if bias is None or bias.dtype in (dtype, torch.float32)
            else bias.to(dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.computes(x)
        x_dtype = x.dtype
        if dtype is not x_dtype:
            x = x.to(dtype)
        if exporting():
            y = self.exported(x)
        else:
            delta = no_delta(self.in_features, self.out_features, dtype, x.device)
            y = lora_linear(x, self.base(dtype), *delta, self.bias_for(dtype))
        return y if self.compute_dtype is None else y.to(x_dtype)

    def exported(self, x: Tensor) -> Tensor:
        """y by torch's own operations, in x's dtype, for graphs that run without peftops."""
        base = self.base(x.dtype)
        weight = formula("nf4_plain", base.tensors, base.block, self.shape, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight, bias)

    @property
    def W_q(self) -> Tensor:
        """The codes, by the name under which PEFT looks for a layer that has dequantize()."""
        return self.weight

    @property
    def quant_state(self) -> NF4Weight:
        """The NF4Weight. By this name PEFT knows a layer that LoRA-GA cannot start from."""
        return self.quantized

    def extra_repr(self) -> str:
        text = (
            f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}"
        )
        if self.compute_dtype is None:
            return text
        return f"{text}, compute_dtype={self.compute_dtype}"


def empty_base(
    size: int,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str | int | None,
) -> list[Tensor]:
    """Uninitialized tensors of an NF4Weight with `size` elements: codes, table, then scales."""
    blocks = -(-size // blocksize)
    shapes: list[tuple[Any, torch.dtype]] = [
        (-(-size // 2), torch.uint8),
        (16, torch.float32),
    ]
    if double_quant:
        shapes += [
            (blocks, torch.uint8),
            (-(-blocks // NESTED), torch.float32),
            (NESTED, torch.float32),
            ((), torch.float32),
        ]
    else:
        shapes.append((blocks, torch.float32))
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
