"""Lets PEFT do over LinearNF4 what it does over bitsandbytes' 4-bit layers.

PEFT knows those by the name of the weight's class, Params4bit. Our weight is a plain parameter of
bytes. So PEFT's methods that read or replace the weight are wrapped: while one runs, the LinearNF4
is an nn.Linear in fp32, and what the method leaves there is quantized. The counts of parameters and
LoftQ over a quantized base are replaced.

on_dense(layer), refuse(layer, reason) and the like return a function `around`: around(stock) is
what replaces PEFT's function `stock`.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .nf4_packed import PackedNF4

Layer = Any  # LinearNF4, whose module imports this one
Around = Callable[[Callable[..., Any]], Callable[..., Any]]
INITS = (
    "olora_init",
    "pissa_init",
    "mica_init",
    "corda_init",
    "orthogonal_init",
    "lora_ga_init",
)
LOFTQ = (
    "LinearNF4: init_lora_weights='loftq' must have a base that is not quantized yet; "
    "over this one call peft.replace_lora_weights_loftq, which reads the weight there was "
    "from its file"
)
HIRA = (
    "LinearNF4: HiRA must have a base of nn.Linear or bitsandbytes' Linear4bit, "
    "for each forward reads the weight"
)
_lock = threading.Lock()
_met: set[type] = set()  # holds LinearNF4 once PEFT's functions are wrapped


def meet(layer: type[Layer], packed: type[PackedNF4]) -> None:
    """Wraps PEFT's functions, once and only if PEFT is imported.

    layer: LinearNF4. packed: PackedNF4, the class of all modules that own a weight in 4 bits.
    """
    if _met or not hasattr(sys.modules.get("peft"), "replace_lora_weights_loftq"):
        return
    with _lock:
        if not _met:
            wrap_all(layer, packed)
            _met.add(layer)


def wrap_all(layer: type[Layer], packed: type[PackedNF4]) -> None:
    """Wraps all functions of PEFT that read, replace or count the weight of a base layer."""
    peft = sys.modules["peft"]
    lora = peft_module("tuners.lora.layer").LoraLayer
    for name in INITS:
        wrap(lora, name, on_dense(layer))
    wrap(lora, "loftq_init", refuse(layer, LOFTQ))
    for tuner_class in subclasses(peft_module("tuners.tuners_utils").BaseTunerLayer):
        for name in sorted({"merge", "unmerge"} & set(vars(tuner_class))):
            wrap(tuner_class, name, on_dense(layer))
    for model_class in (peft.PeftModel, peft.PeftMixedModel):
        wrap(model_class, "get_nb_trainable_parameters", count(packed))
    wrap(
        getattr(peft_module("tuners.hira.layer"), "HiraLayer", None),
        "update_layer",
        refuse(layer, HIRA),
    )
    wrap(
        getattr(peft_module("helpers"), "KappaTuneSelector", None),
        "_compute_kappas",
        condition(layer),
    )
    corda = peft_module("tuners.lora.corda")
    wrap(corda, "target_modules", each_dense(layer))
    wrap(corda, "collect_eigens_for_layer", argument_dense(layer))
    wrap_imported(
        "utils.quantization_utils", "resolve_quantization_backend", backend(layer)
    )
    redirect(peft.replace_lora_weights_loftq, layer)


def peft_module(name: str) -> Any:
    """A module of PEFT, imported if it is not yet; None where this version has none."""
    try:
        return import_module(f"peft.{name}")
    except ImportError:
        return None


def wrap_imported(home: str, name: str, around: Around) -> None:
    """Wraps a function of the module `home` in all modules of PEFT that have imported it."""
    stock = getattr(peft_module(home), name, None)
    if stock is None:
        return
    for module_name, holder in [*sys.modules.items()]:
        if module_name.startswith("peft.") and vars(holder).get(name) is stock:
            wrap(holder, name, around)


def wrap(holder: Any, name: str, around: Around) -> None:
    """Puts around(stock) in the place of a function, if this version of PEFT has it."""
    stock = getattr(holder, name, None)
    if stock is not None:
        setattr(holder, name, functools.wraps(stock)(around(stock)))


def subclasses(cls: type) -> Iterator[type]:
    """All classes of PEFT that derive from this one."""
    children: list[type] = cls.__subclasses__()
    for child in children:
        if child.__module__.startswith("peft."):
            yield child
        yield from subclasses(child)


@contextmanager
def dense(base: Layer) -> Iterator[None]:
    """Inside, a LinearNF4 is an nn.Linear in fp32. At the end, a changed weight is quantized."""
    layer_class = type(base)
    codes = base._parameters["weight"]
    dtype = base.weight_dtype
    before = base.dequantize(torch.float32)
    base.__class__ = nn.Linear
    base._parameters["weight"] = nn.Parameter(before.clone(), requires_grad=False)
    try:
        yield
        after = base._parameters["weight"].detach()
    finally:
        base.__class__ = layer_class
        base._parameters["weight"] = codes
    if not torch.equal(after, before):
        base.quantize(after.contiguous())
        base.weight_dtype = dtype


def on_dense(layer: type[Layer]) -> Around:
    """For a method of a PEFT layer that reads or changes the base's weight."""

    def around(stock):
        def method(self, *args, **options):
            base = self.get_base_layer()
            quantized = isinstance(base, layer) and not base.weight.is_meta
            if not quantized or getattr(self, "quantization_backend", None) is not None:
                return stock(self, *args, **options)
            merged = [*getattr(self, "merged_adapters", ())]
            try:
                with dense(base):
                    return stock(self, *args, **options)
            except BaseException:
                if merged or hasattr(self, "merged_adapters"):
                    self.merged_adapters[:] = merged
                raise

        return method

    return around


def each_dense(layer: type[Layer]) -> Around:
    """For CorDA's iterator over linear layers. The caller reads each weight before the next."""

    def around(stock):
        def target_modules(model, config):
            for name, module in stock(model, config):
                if isinstance(module, layer):
                    with dense(module):
                        yield name, module
                else:
                    yield name, module

        return target_modules

    return around


def argument_dense(layer: type[Layer]) -> Around:
    """For a function that reads the weight of the linear layer that it is given."""

    def around(stock):
        def function(linear, *args, **options):
            if not isinstance(linear, layer):
                return stock(linear, *args, **options)
            with dense(linear):
                return stock(linear, *args, **options)

        return function

    return around


def refuse(layer: type[Layer], reason: str) -> Around:
    """For a method of a PEFT layer that cannot work over LinearNF4: ValueError with the reason."""

    def around(stock):
        def method(self, *args, **options):
            if isinstance(self.get_base_layer(), layer):
                raise ValueError(reason)
            return stock(self, *args, **options)

        return method

    return around


def count(packed: type[PackedNF4]) -> Around:
    """For the counts of parameters: the elements of a weight instead of its codes and scales.

    This is how PEFT counts layers of bitsandbytes.
    """

    def around(stock):
        def get_nb_trainable_parameters(self):
            trainable, total = stock(self)
            owners = {id(m.weight): m for m in self.modules() if isinstance(m, packed)}
            for owner in owners.values():
                total += torch.Size(owner.shape).numel()
                for t in (owner.weight, owner.absmax, owner.nested_absmax):
                    total -= 0 if t is None else t.numel()
            return trainable, total

        return get_nb_trainable_parameters

    return around


class Backend:
    """How PEFT's methods other than LoRA read and replace a LinearNF4's weight."""

    supports_merge = True
    backend_name = "peftops nf4"
    layer_type = "linear"

    def get_base_weight(self, base_layer: Layer) -> Tensor:
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        dtype = base.weight_dtype
        base.quantize(weight_data.detach().contiguous())
        base.weight_dtype = dtype

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x


def backend(layer: type[Layer]) -> Around:
    """For the function that chooses PEFT's backend for a quantized base layer."""

    def around(stock):
        def resolve_quantization_backend(base_layer, **options):
            return (
                Backend()
                if isinstance(base_layer, layer)
                else stock(base_layer, **options)
            )

        return resolve_quantization_backend

    return around


class Others:
    """A model whose named_modules() leaves out the modules of a class."""

    def __init__(self, model: nn.Module, layer: type):
        self.model = model
        self.layer = layer

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        return [
            (name, m)
            for name, m in self.model.named_modules()
            if not isinstance(m, self.layer)
        ]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()


def condition(layer: type[Layer]) -> Around:
    """For KappaTune, which would compute the condition numbers of the codes."""

    def around(stock):
        def _compute_kappas(self):
            model = self.model
            is_known = self._condition_numbers is not None
            self.model = Others(model, layer)
            try:
                stock(self)
            finally:
                self.model = model
            if is_known:
                return
            for name, linear in model.named_modules():
                if not isinstance(linear, layer):
                    continue
                if max(linear.shape) <= self.max_dim_size_to_analyze:
                    values = torch.linalg.svdvals(linear.dequantize(torch.float32))
                    self._condition_numbers[name] = (
                        values[0] / (values[-1] + 1e-8)
                    ).item()

        return _compute_kappas

    return around


def redirect(function: Any, layer: type[Layer]) -> None:
    """Makes replace_lora_weights_loftq call `loftq`, also for those who have imported it already.

    So its code is replaced in place. The new code sees only the globals of PEFT's module.
    """

    def forwarded(peft_model, model_path=None, adapter_name="default", callback=None):
        return _peftops_loftq(peft_model, model_path, adapter_name, callback)  # noqa: F821

    inner = getattr(function, "__wrapped__", function)
    stock = type(inner)(
        inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__
    )
    inner.__globals__["_peftops_loftq"] = functools.partial(
        loftq, stock, inner.__globals__, layer
    )
    inner.__code__ = forwarded.__code__


@torch.no_grad()
def loftq(
    stock: Callable[..., None],
    peft: dict[str, Any],
    layer: type[Layer],
    peft_model: nn.Module,
    model_path: str | None,
    adapter_name: str,
    callback: Callable[[nn.Module, str], bool] | None,
) -> None:
    """peft.replace_lora_weights_loftq over LinearNF4: B·A closest to what quantization lost.

    stock: PEFT's function, for models without LinearNF4. peft: the globals of its module.
    """
    adapted = {}
    for full_name, module in peft_model.named_modules():
        if hasattr(module, "lora_A") and isinstance(module.get_base_layer(), layer):
            adapted[full_name] = module
    if not adapted:
        return stock(peft_model, model_path, adapter_name, callback)
    files = peft["_SafetensorLoader"](peft_model, model_path)
    prefix = "base_model.model."
    for full_name, module in adapted.items():
        if not full_name.startswith(prefix):
            raise TypeError("The passed model does not appear to be a valid PeftModel")
        name = full_name.removeprefix(prefix)
        base = module.get_base_layer()
        weight = files.get_tensor(f"{name}.weight").to(
            base.weight.device, torch.float32
        )
        weight = weight.T if getattr(base, "columns", False) else weight
        lost = weight - base.dequantize().float()
        factors = peft["_low_rank_decomposition"](
            lost, reduced_rank=module.r[adapter_name]
        )
        a = module.lora_A[adapter_name].weight
        b = module.lora_B[adapter_name].weight
        before = a.data, b.data
        a.data, b.data = factors["R"], factors["L"]
        if callback and not callback(peft_model, name):
            a.data, b.data = before
    return None
