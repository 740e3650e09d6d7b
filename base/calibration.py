"""How often a reward model is right, by how sure it is."""

import json
import math
from collections.abc import Sequence
from pathlib import Path


def draw_calibration(margins: Sequence[float], output_dir: str, num_bins: int = 8) -> list[dict[str, float]]:
    """Write `calibration.png` and `calibration.json`: how often the model is right, by how sure it is.

    A Bradley-Terry model that is calibrated is right with probability σ(|margin|).

    Args:
        margins: reward of chosen minus reward of rejected, one per pair.

    Returns:
        Per bin of equal count: mean |margin|, accuracy, σ(|margin|) and number of pairs.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot no display is touched

    ordered = sorted(margins, key=abs)
    bins = [
        chunk
        for i in range(num_bins)
        if (chunk := ordered[i * len(ordered) // num_bins : (i + 1) * len(ordered) // num_bins])
    ]
    table = [
        {
            "margin": sum(map(abs, chunk)) / len(chunk),
            "accuracy": sum(m > 0 for m in chunk) / len(chunk),
            "expected": sum(1 / (1 + math.exp(-abs(m))) for m in chunk) / len(chunk),
            "pairs": len(chunk),
        }
        for chunk in bins
    ]
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    (Path(output_dir) / "calibration.json").write_text(json.dumps(table, indent=2) + "\n")
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [b["margin"] for b in table], [b["accuracy"] for b in table], "o-", label=f"this model, {len(margins)} pairs"
    )
    axes.plot([b["margin"] for b in table], [b["expected"] for b in table], "--", color="grey", label="σ(|margin|)")
    axes.set(xlabel="|reward of chosen - reward of rejected|", ylabel="share of pairs ranked right", ylim=(0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(Path(output_dir) / "calibration.png", dpi=120)
    return table
