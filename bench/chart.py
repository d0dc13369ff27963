"""The chart of README: our share of PEFT's time, where we win and where we lose."""

from typing import NamedTuple

PEFT = "PEFT", "PEFT + bitsandbytes"
MODEL = "SmolLM2-135M, all linear layers"
LAYER = "Llama-3.1-8B q, o"
TOKEN = f"{LAYER}, one token"
STEP = "step without optimizer"
TOKENS = "generate 24 tokens"
BOTH = "forward + backward"
BF16 = "AMD EPYC, AVX-512 bf16"
AVX2 = "AMD EPYC, AVX2"
H200 = "NVIDIA H200"
WON, LOST = "#1f77b4", "#d62728"


class Bar(NamedTuple):
    """A result that the chart shows.

    Attributes:
        label: what was measured, for readers.
        device, row, layer, dtype, dropout, pass_name: the result, as its line names them.
        graph: the times of CUDA graphs are shown, instead of eager ones.
    """

    label: str
    device: str
    row: str
    layer: str
    dtype: str
    dropout: float
    pass_name: str
    graph: bool = False


BARS = (
    Bar("135M model, LoRA step", BF16, "model", MODEL, "bf16", 0.0, STEP),
    Bar("LoRA step, dropout 0.1", BF16, "model", MODEL, "bf16", 0.1, STEP),
    Bar("QLoRA step, dropout 0.1", BF16, "model", f"{MODEL}, qlora", "bf16", 0.1, STEP),
    Bar("DoRA step, dropout 0.1", BF16, "model", f"{MODEL}, dora", "bf16", 0.1, STEP),
    Bar("24 generated tokens", BF16, "model", MODEL, "bf16", 0.0, TOKENS),
    Bar("135M model, LoRA step, fp32", AVX2, "model", MODEL, "fp32", 0.0, STEP),
    Bar("LoRA step, fp32, dropout 0.1", AVX2, "model", MODEL, "fp32", 0.1, STEP),
    Bar(
        "8B layer, one token, CUDA graph",
        H200,
        "lora",
        TOKEN,
        "bf16",
        0.0,
        "forward",
        True,
    ),
    Bar("forward + backward, CUDA graph", H200, "lora", LAYER, "bf16", 0.0, BOTH, True),
    Bar("… dropout 0.1, CUDA graph", H200, "lora", LAYER, "bf16", 0.1, BOTH, True),
    Bar("forward + backward, eager", H200, "lora", LAYER, "bf16", 0.0, BOTH),
    Bar("… dropout 0.1, eager", H200, "lora", LAYER, "bf16", 0.1, BOTH),
)


def shares(lines: list[dict]) -> dict[Bar, float]:
    """{bar: our time / PEFT's} of all bars whose result is among the lines."""
    measured = {
        (
            line["device"],
            line["row"],
            line["layer"],
            line["dtype"],
            line["dropout"],
            line["pass"],
        ): line
        for line in lines
    }
    values = {}
    for bar in BARS:
        line = measured.get(bar[1:7], {})
        ratios = line.get("graph_ratio" if bar.graph else "ratio", {})
        share = next((ratios[peer] for peer in PEFT if peer in ratios), None)
        if share is not None:
            values[bar] = share
    return values


def draw(lines: list[dict]):
    """The figure of all bars that were measured, or None if none was.

    Each bar has its value in it, and the device that it was measured on beneath its label.
    """
    from matplotlib import pyplot

    values = shares(lines)
    if not values:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.46 * len(values) + 0.9))
    places = range(len(values), 0, -1)
    for place, (bar, share) in zip(places, values.items(), strict=True):
        axes.barh(place, share, 0.55, color=WON if share <= 1 else LOST)
        axes.text(
            share - 0.015,
            place,
            f"{share:.2f}",
            ha="right",
            va="center",
            weight="bold",
            color="white",
        )
        axes.text(-0.02, place + 0.02, bar.label, ha="right", va="bottom")
        axes.text(
            -0.02,
            place - 0.04,
            bar.device,
            ha="right",
            va="top",
            fontsize=6.5,
            color="#666666",
        )
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.text(1, len(values) + 0.55, "PEFT", ha="center", va="bottom")
    axes.set(
        xlim=(0, 1.35),
        ylim=(0.4, len(values) + 0.6),
        xlabel="time ÷ PEFT's (shorter is better)",
    )
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    return figure
