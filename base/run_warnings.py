"""Signs in the numbers of a run that it is going wrong, as sentences. docs/losses.md has the table of healthy curves."""

from collections.abc import Mapping, Sequence

from base.charts import Points

LAST = 10  # steps whose mean is looked at
SUNK = 50.0  # nats that chosen answers lost against the reference
SATURATED = 20.0  # reward margin whose gradient, 1 - sigmoid, is 2e-9
GREW = 2.0  # answers against the first ones


def unbalanced(labels: Sequence[bool], desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to say of labelled answers whose weights in sum are not near those of KTO's paper (2402.01306 eq. 8); None if they are."""
    good = sum(labels)
    bad = len(labels) - good
    if not (good and bad and desirable_weight and undesirable_weight):
        return None
    ratio = desirable_weight * good / (undesirable_weight * bad)
    if 1 <= ratio <= 4 / 3:
        return None
    least, most = desirable_weight / ratio, undesirable_weight * ratio
    return (
        f"{good} good and {bad} bad answers weigh {ratio:.3g} : 1; the paper of KTO takes 1 : 1 to 4 : 3. Give either --desirable_weight "
        f"{least:.3g} to {4 / 3 * least:.3g}, or --undesirable_weight {most / (4 / 3):.3g} to {most:.3g}."
    )


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def run_warnings(found: Mapping[str, Points], beta: float = 1.0) -> dict[str, str]:
    """Name -> sentence of each sign that is there now, from `charts.series`; of fewer than LAST steps nothing is said.

    Args:
        beta: of the implicit rewards, to tell log-ratios from them.
    """
    signs: dict[str, str] = {}
    if len(found.get("logps/chosen", ())) >= LAST and len(found.get("rewards/chosen", ())) >= LAST:
        ratio = _mean(found["rewards/chosen"][-LAST:]) / beta
        if ratio < -SUNK:
            signs["chosen"] = (
                f"Chosen answers have lost {-ratio:.0f} nats against the reference: the policy unlearns them together with the rejected ones. "
                "Raise --beta, lower --learning_rate, or add sft to --loss_type."
            )
    for name in ("rewards/margins", "margin"):
        if len(found.get(name, ())) >= LAST and (margin := _mean(found[name][-LAST:])) > SATURATED:
            signs["margin"] = (
                f"The margin is {margin:.0f}: nothing is left to learn from these pairs, and the policy drifts. Stop earlier, or lower "
                "--learning_rate."
            )
    held = found.get("eval_loss", [])
    if len(held) >= 3:
        best = min(held, key=lambda point: point[1])
        if held[-1][1] > 1.1 * best[1] and held[-1][1] - best[1] > 0.02 and held[-2][1] > best[1]:
            signs["held out"] = (
                f"The loss on held-out rows has risen from {best[1]:.4g} at step {best[0]:.0f} to {held[-1][1]:.4g}: the run learns its rows "
                "by heart. Take that checkpoint, or fewer epochs."
            )
    length = found.get("val/response_length", [])
    if len(length) >= 2 * LAST and (grown := _mean(length[-LAST:]) / max(_mean(length[:LAST]), 1)) > GREW:
        signs["length"] = (
            f"Answers are {grown:.1f} times as long as at the start: look whether they are better, or whether the reward likes length."
        )
    return signs
