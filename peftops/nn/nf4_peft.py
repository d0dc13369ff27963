"""What PEFT does over bitsandbytes' 4-bit layers because it knows the names of their classes, for LinearNF4 too.

PEFT asks whether the class of a weight is called Params4bit. Our weight is a plain parameter of bytes. So a method of
PEFT that reads or replaces the weight finds an nn.Linear in the place of a LinearNF4 while it runs, and what it leaves
there is quantized. Counts of parameters and LoftQ for a quantized base have answers of their own.
"""

import functools
import sys
import threading
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import nn

INITS = "olora_init", "pissa_init", "mica_init", "corda_init", "orthogonal_init", "lora_ga_init"
LOFTQ = (
    "LinearNF4: init_lora_weights='loftq' must have a base that is not quantized yet; over this one call "
    "peft.replace_lora_weights_loftq, which reads the weight there was from its file"
)
HIRA = "LinearNF4: HiRA must have a base of nn.Linear or bitsandbytes' Linear4bit, for each forward reads the weight"
_lock, _met = threading.Lock(), set()


def meet(layer, packed):
    """Wraps PEFT's functions once, where PEFT is imported. layer: LinearNF4, packed: the class of all in 4 bits."""
    if _met or not hasattr(sys.modules.get("peft"), "replace_lora_weights_loftq"):
        return
    with _lock:
        if not _met:
            wrap_all(layer, packed)
            _met.add(layer)


def wrap_all(layer, packed):
    def module(name):
        """A part of PEFT, some of which nobody has imported yet; None where this version has none."""
        try:
            return import_module(f"peft.{name}")
        except ImportError:
            return None

    lora, peft = module("tuners.lora.layer").LoraLayer, sys.modules["peft"]
    for name in INITS:
        wrap(lora, name, on_dense(layer))
    wrap(lora, "loftq_init", refuse(layer, LOFTQ))
    for kind in below(module("tuners.tuners_utils").BaseTunerLayer):
        for name in sorted({"merge", "unmerge"} & set(vars(kind))):
            wrap(kind, name, on_dense(layer))
    for kind in (peft.PeftModel, peft.PeftMixedModel):
        wrap(kind, "get_nb_trainable_parameters", count(packed))
    wrap(
        getattr(module("tuners.hira.layer"), "HiraLayer", None),
        "update_layer",
        refuse(layer, HIRA),
    )
    wrap(
        getattr(module("helpers"), "KappaTuneSelector", None),
        "_compute_kappas",
        condition(layer),
    )
    wrap(module("tuners.lora.corda"), "target_modules", each_dense(layer))
    wrap(module("tuners.lora.corda"), "collect_eigens_for_layer", argument_dense(layer))
    stock = getattr(module("utils.quantization_utils"), "resolve_quantization_backend", None)
    for holder in [held for name, held in [*sys.modules.items()] if name.startswith("peft.")]:
        if stock is not None and vars(holder).get("resolve_quantization_backend") is stock:
            wrap(holder, "resolve_quantization_backend", backend(layer))
    redirect(peft.replace_lora_weights_loftq, layer)


def wrap(holder, name, around):
    """Puts around(stock) in the place of a function; PEFT of another version may not have it."""
    stock = getattr(holder, name, None)
    if stock is not None:
        setattr(holder, name, functools.wraps(stock)(around(stock)))


def below(kind):
    """All classes of PEFT that derive from one."""
    for child in kind.__subclasses__():
        if child.__module__.startswith("peft."):
            yield child
        yield from below(child)


@contextmanager
def dense(base):
    """A LinearNF4 that is an nn.Linear in float32 for a while; what was changed then is quantized."""
    kind, codes, dtype = type(base), base._parameters["weight"], base.weight_dtype
    before = base.dequantize(torch.float32)
    base.__class__ = nn.Linear
    base._parameters["weight"] = nn.Parameter(before.clone(), requires_grad=False)
    try:
        yield
        after = base._parameters["weight"].detach()
    finally:
        base.__class__ = kind
        base._parameters["weight"] = codes
    if not torch.equal(after, before):
        base.quantize(after.contiguous())
        base.weight_dtype = dtype


def on_dense(layer):
    """For a method of a PEFT layer, whose base it reads or changes."""

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


def each_dense(layer):
    """For the function by which CorDA finds linear layers, whose sizes it reads before it asks for the next."""

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


def argument_dense(layer):
    """For a function of a linear layer, which it reads."""

    def around(stock):
        def function(linear, *args, **options):
            if not isinstance(linear, layer):
                return stock(linear, *args, **options)
            with dense(linear):
                return stock(linear, *args, **options)

        return function

    return around


def refuse(layer, reason):
    def around(stock):
        def method(self, *args, **options):
            if isinstance(self.get_base_layer(), layer):
                raise ValueError(reason)
            return stock(self, *args, **options)

        return method

    return around


def count(packed):
    """Elements of a weight for its codes, and no scales, as PEFT counts those of bitsandbytes."""

    def around(stock):
        def get_nb_trainable_parameters(self):
            trainable, every = stock(self)
            held = {id(m.weight): m for m in self.modules() if isinstance(m, packed)}
            for module in held.values():
                parts = module.weight, module.absmax, module.nested_absmax
                every += torch.Size(module.shape).numel() - sum(
                    t.numel() for t in parts if t is not None
                )
            return trainable, every

        return get_nb_trainable_parameters

    return around


class Backend:
    """How PEFT's methods other than LoRA read a LinearNF4's weight and put back what they made of it."""

    supports_merge = True
    backend_name = "peftops nf4"
    layer_type = "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        dtype = base.weight_dtype
        base.quantize(weight_data.detach().contiguous())
        base.weight_dtype = dtype

    def maybe_clone_base_result(self, x):
        return x


def backend(layer):
    def around(stock):
        def resolve_quantization_backend(base_layer, **options):
            return Backend() if isinstance(base_layer, layer) else stock(base_layer, **options)

        return resolve_quantization_backend

    return around


class Others:
    """A model without the modules of a class, for who walks through it."""

    def __init__(self, model, layer):
        self.model, self.layer = model, layer

    def named_modules(self):
        return [
            (name, m) for name, m in self.model.named_modules() if not isinstance(m, self.layer)
        ]

    def named_parameters(self):
        return self.model.named_parameters()


def condition(layer):
    """KappaTune's condition numbers, which would be those of the codes."""

    def around(stock):
        def _compute_kappas(self):
            model, done = self.model, self._condition_numbers is not None
            self.model = Others(model, layer)
            try:
                stock(self)
            finally:
                self.model = model
            for name, module in [] if done else model.named_modules():
                if (
                    isinstance(module, layer)
                    and max(module.shape) <= self.max_dim_size_to_analyze
                ):
                    values = torch.linalg.svdvals(module.dequantize(torch.float32))
                    self._condition_numbers[name] = (values[0] / (values[-1] + 1e-8)).item()

        return _compute_kappas

    return around


def redirect(function, layer):
    """Changes what a function does for those too who imported it before. Its code may know nothing of this module."""

    def forwarded(peft_model, model_path=None, adapter_name="default", callback=None):
        return _peftops_loftq(peft_model, model_path, adapter_name, callback)  # noqa: F821

    inner = getattr(function, "__wrapped__", function)
    stock = type(inner)(inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__)
    inner.__globals__["_peftops_loftq"] = functools.partial(
        loftq, stock, inner.__globals__, layer
    )
    inner.__code__ = forwarded.__code__


@torch.no_grad()
def loftq(stock, peft, layer, peft_model, model_path, adapter_name, callback):
    """peft.replace_lora_weights_loftq for a model whose base is of LinearNF4: the best adapters for what was lost."""
    ours = {name: m for name, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    ours = {name: m for name, m in ours.items() if isinstance(m.get_base_layer(), layer)}
    if not ours:
        return stock(peft_model, model_path, adapter_name, callback)
    files, prefix = peft["_SafetensorLoader"](peft_model, model_path), "base_model.model."
    for full, module in ours.items():
        if not full.startswith(prefix):
            raise TypeError("The passed model does not appear to be a valid PeftModel")
        name, base = full.removeprefix(prefix), module.get_base_layer()
        weight = files.get_tensor(f"{name}.weight").to(base.weight.device, torch.float32)
        weight = weight.T if getattr(base, "columns", False) else weight
        lost = weight - base.dequantize().float()
        made = peft["_low_rank_decomposition"](lost, reduced_rank=module.r[adapter_name])
        a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        before = a.data, b.data
        a.data, b.data = made["R"], made["L"]
        if callback and not callback(peft_model, name):
            a.data, b.data = before
    return None
