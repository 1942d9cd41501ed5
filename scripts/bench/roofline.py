"""A roofline plot (Williams et al. 2009) of what `speed.py` measured: GFLOP/s against operations per byte.

    draw(result, Path("roofline.png"))

Worth knowing: the sloping roof is the bandwidth of plain reads in the same run, the flat roof the rate of its fastest
product. A point's height as a share of the roof above it is its share of that bandwidth or rate.
"""

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fast.cli import replacing

COLOURS = {"bf16": "tab:blue", "int8": "tab:orange", "int4": "tab:green"}


def roof(result: dict[str, Any]) -> tuple[float, float]:
    """The bandwidth in GB/s (median over the decodes), and the GFLOP/s of the fastest product."""
    bandwidth = median(point["bandwidth_gb_per_s"] for point in result["decode"])
    return bandwidth, max(point["matmul_gflops_per_s"] for point in result["prefill"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the prefills and decodes of `result`, the benchmark's JSON, to the PNG file `path`, written atomically."""
    bandwidth, peak = roof(result)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(kind, point) for kind in ("decode", "prefill") for point in result[kind]]
    intensities = [point["operations"] / point["bytes"] for _, point in points]
    x = [min(intensities) / 2, peak / bandwidth, max(*intensities, peak / bandwidth) * 3]
    axes.loglog(x, [min(i * bandwidth, peak) for i in x], color="black", lw=1)
    axes.annotate(f"read {bandwidth:.0f} GB/s", (x[0], x[0] * bandwidth), (16, -4), textcoords="offset points")
    axes.annotate(f"product {peak:.0f} GFLOP/s", (x[1], peak), (2, 5), textcoords="offset points")
    named = set()
    for (kind, point), intensity in zip(points, intensities, strict=True):
        name = f"{point['mode']} {kind}"
        style = {"color": COLOURS[point["mode"]], "marker": "o" if kind == "decode" else "s", "ms": 5, "ls": "none"}
        axes.plot(intensity, point["gflops_per_s"], label=None if name in named else name, alpha=0.8, **style)
        named.add(name)
        if kind == "prefill":
            label = f"{point['batch_size']} x {point['prompt_length']}"
        else:  # contexts lie close together: label only the first
            alike = [p for p in result[kind] if all(p[key] == point[key] for key in ("mode", "batch_size"))]
            lengths = sorted({p["context_length"] for p in alike})
            label = f"{point['batch_size']} x {lengths[0]}" + (f" to {lengths[-1]}" if len(lengths) > 1 else "")
            if point is not alike[0]:
                continue
        below = 9 + (8 * list(COLOURS).index(point["mode"]) if kind == "prefill" else 0)
        axes.annotate(label, (intensity, point["gflops_per_s"]), (5, -below), textcoords="offset points", fontsize=7)
    axes.set(xlabel="operations per byte", ylabel="GFLOP/s")
    axes.set_title(f"{result['model']}, {result['hardware']}, torch {result['torch']}, {result['date']}", fontsize=9)
    for scale in (axes.yaxis, axes.xaxis):
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(title="points: rows x context or prompt", fontsize=8, title_fontsize=8, loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
