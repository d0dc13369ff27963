"""Who answers the requests of `peftops demo --adapters N`: an AdapterPool, PEFT, the model alone.

Adapters are mounted when they are asked for. Those that were not used for the longest time make
room.
"""

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

import peftops

from .demo_adapters import BASE
from .demo_contenders import clock

NEW = 16  # tokens of an answer


@dataclass
class Server:
    """The model alone, which answers without adapters.

    Attributes:
        model: what generates.
        seconds: of each batch, without what it took to mount its adapters.
        mounts: seconds of each adapter that was mounted.
        evictions: how many adapters made room.
    """

    model: torch.nn.Module
    seconds: list[float] = field(default_factory=list)
    mounts: list[float] = field(default_factory=list)
    evictions: int = 0

    def answer(self, names, prompts):
        """The prompts with their answers. It takes the time."""
        device = prompts.device
        with ExitStack() as held:
            for name in dict.fromkeys(names):
                if name == BASE:
                    continue
                start = clock(device)
                if self.mount(name, names, held):
                    self.mounts.append(clock(device) - start)
            start = clock(device)
            tokens = self.generate(names, prompts)
            self.seconds.append(clock(device) - start)
        return tokens

    def mount(self, name, names, held):
        """Whether the adapter had to be mounted. It stays so while `held` is open.

        Args:
            names: all that this batch has.
        """
        return False

    def generate(self, names, prompts, **options):
        return self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **options,
        )

    def forget(self):
        """Begins to count anew."""
        self.seconds.clear()
        self.mounts.clear()
        self.evictions = 0

    @property
    def bytes(self):
        """What its adapters take."""
        return 0


@dataclass
class Pooled(Server):
    """A model with an AdapterPool."""

    pool: peftops.AdapterPool | None = None

    def mount(self, name, names, held):
        before = self.pool.stats()
        held.enter_context(self.pool.use([name]))
        after = self.pool.stats()
        self.evictions += after.evictions - before.evictions
        return after.mounts > before.mounts

    def generate(self, names, prompts, **options):
        return super().generate(names, prompts, adapter_names=names)

    def logits(self, names, tokens):
        return self.model(input_ids=tokens, adapter_names=names).logits

    @property
    def bytes(self):
        stats = self.pool.stats()
        return (stats.pages - stats.free_pages) * stats.page_bytes


@dataclass
class Stock(Server):
    """PEFT, with load_adapter, adapter_names and delete_adapter.

    Attributes:
        folders: {name: folder} of all adapters.
        sizes: {name: bytes}.
        memory: bytes that its adapters may take.
        mixes: whether PEFT has batches that mix such adapters. Of DoRA it has none, so they are
            answered one by one.
        loaded: {name: bytes}; those that were not used for the longest time come first.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    mixes: bool = True
    loaded: dict[str, int] = field(default_factory=dict)

    def mount(self, name, names, held):
        if name in self.loaded:
            self.loaded[name] = self.loaded.pop(name)
            return False
        self.load(name)
        idle = [other for other in self.loaded if other not in names]
        while self.bytes > self.memory and idle:
            oldest = idle.pop(0)
            self.model.delete_adapter(oldest)
            del self.loaded[oldest]
            self.evictions += 1
        return True

    def load(self, name):
        import peft

        folder = str(self.folders[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.loaded:
                self.model.load_adapter(folder, name)
            else:
                self.model = peft.PeftModel.from_pretrained(self.model, folder, name)
        self.loaded[name] = self.sizes[name]

    def generate(self, names, prompts, **options):
        if self.mixes:
            return super().generate(names, prompts, adapter_names=names)
        tokens = prompts.new_zeros(len(prompts), prompts.shape[1] + NEW)
        for name, own in samples(names).items():
            with self.only(name):
                tokens[own] = super().generate(names, prompts[own])
        return tokens

    def logits(self, name, tokens):
        """Those of samples that have this adapter alone."""
        with self.only(name):
            return self.model(input_ids=tokens).logits

    @contextmanager
    def only(self, name):
        """Inside, this adapter is the active one."""
        if name != BASE:
            self.model.set_adapter(name)
        with self.model.disable_adapter() if name == BASE else nullcontext():
            yield

    @property
    def bytes(self):
        return sum(self.loaded.values())


def samples(names):
    """{name: the samples that have this adapter}"""
    return {
        name: [i for i, other in enumerate(names) if other == name]
        for name in dict.fromkeys(names)
    }


@dataclass
class Check:
    """What became of the samples, beside PEFT with the adapter of each alone.

    Attributes:
        samples, wrong: how many there were, and how many have other logits.
        tokens, equal: how many were made, and how many are PEFT's best.
        error: ‖difference of logits‖ / ‖logits‖ of the worst sample.
    """

    samples: int = 0
    wrong: int = 0
    tokens: int = 0
    equal: int = 0
    error: float = 0.0

    def take(self, ours, alone, tokens, tolerance):
        """Compares one sample.

        Args:
            ours, alone: logits (tokens, words).
            tokens: of the prompt and the answer.
            tolerance: what the relative error of the logits may be.
        """
        answer = tokens[-NEW:]
        best = alone[-NEW - 1 : -1].argmax(-1)
        error = ((ours - alone).float().norm() / alone.float().norm()).item()
        self.samples += 1
        self.wrong += not error <= tolerance
        self.tokens += NEW
        self.equal += (best == answer).sum().item()
        self.error = max(self.error, error)
