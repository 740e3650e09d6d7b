"""losses/ against numbers that others computed (tests/goldens/losses), by hand, and by finite differences.

Everything runs in float64 on the CPU without a model.
"""

import ast
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

import losses
from losses import (
    LOSSES,
    NEEDS,
    PairLogps,
    PreferenceBatch,
    Sides,
    UnpairedBatch,
    check_losses,
    get_loss,
    preference_loss,
)

GOLDENS = Path(__file__).parent / "goldens" / "losses"
LN2 = math.log(2)


def load(name: str) -> object:
    return json.loads((GOLDENS / name).read_text())


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pad(rows: list[list[float]], width: int | None = None) -> Tensor:
    """(M, T) float64, NaN where padded, so that a loss which reads padding fails."""
    width = width or max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64)


def assert_close(actual: Tensor | float, expected: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=atol,
        rtol=1e-12,
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- goldens: TRL, the predecessor, mDPO, InternVL

LOGPS = load("dpo/logps.json")
EXPECTED = load("dpo/expected.json")

OF_PAIRS = [name for name, loss in LOSSES.items() if not loss.unpaired]  # tests/test_kto.py has the others


def golden_batch(name: str, pairs: slice = slice(None)) -> PreferenceBatch:
    data = {
        key: torch.tensor(value[pairs], dtype=torch.float64) for key, value in LOGPS[name].items() if "token" not in key
    }
    return PreferenceBatch(
        policy=PairLogps(
            chosen=data["policy_chosen_logps"],
            rejected=data["policy_rejected_logps"],
            corrupted=data["policy_imageless_chosen_logps"],
        ),
        ref=PairLogps(
            chosen=data["ref_chosen_logps"],
            rejected=data["ref_rejected_logps"],
            corrupted=data["ref_imageless_chosen_logps"],
        ),
        chosen_lengths=data["chosen_len"],
        rejected_lengths=data["rejected_len"],
    )


def cases(source: str) -> list[object]:
    """One pytest parameter per golden case, named by its settings."""
    found = []
    for batch, items in EXPECTED[source]["cases"].items():
        for item in items:
            if "loss" in item:
                settings = [f"{v}" for k, v in item.items() if k in ("loss", "beta", "label_smoothing", "fdiv", "tau")]
                found.append(pytest.param(batch, item, id="-".join([batch, *settings])))
    return found


@pytest.mark.parametrize("batch, case", cases("trl"))
def test_trl(batch: str, case: dict) -> None:
    """Every loss of TRL 1.16's DPOTrainer, with its values."""
    flags = {"beta": case["beta"], "label_smoothing": case.get("label_smoothing", 0.0)}
    flags |= {"f_divergence_type": case["fdiv"]} if "fdiv" in case else {}
    flags |= {"discopop_tau": case["tau"]} if "tau" in case else {}
    per_pair, _ = preference_loss(golden_batch(batch), case["loss"].split("+"), case.get("weights"), flags)
    assert per_pair.shape == (len(LOGPS[batch]["chosen_len"]),)
    assert_close(per_pair.mean(), case["mean"], atol=1e-10)
    if "per_pair" in case:
        assert_close(per_pair, case["per_pair"], atol=1e-10)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("batch", ["small", "large"] if "large" in LOGPS else list(LOGPS))
def test_losses_without_a_reference_are_those_of_trl(batch: str, epsilon: float) -> None:
    """CPOTrainer's and ORPOTrainer's own functions, called with the settings they read."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    data = golden_batch(batch)
    sums = data.policy.chosen, data.policy.rejected
    means = sums[0] / data.chosen_lengths, sums[1] / data.rejected_lengths
    theirs = SimpleNamespace(beta=0.3, alpha=0.0, label_smoothing=epsilon, simpo_gamma=0.6, loss_type="sigmoid")
    theirs.accelerator = SimpleNamespace(device="cpu")
    smooth = {"beta": 0.3, "label_smoothing": epsilon}
    assert_close(get_loss("cpo")(data, **smooth), CPOTrainer.cpo_loss(theirs, *sums)[0])
    theirs.loss_type = "simpo"
    assert_close(get_loss("simpo")(data, simpo_gamma=0.6, **smooth), CPOTrainer.cpo_loss(theirs, *means)[0])
    found = get_loss("orpo")(data, beta=0.3)
    assert_close(found, -ORPOTrainer.odds_ratio_loss(theirs, *means)[0].double(), atol=1e-6)  # float32 there


def test_losses_without_a_reference_by_hand() -> None:
    """π(w) = e^-1 per token over 2 tokens, π(l) = e^-2 over 1 token."""
    data = dataclasses.replace(
        random_batch(),
        policy=PairLogps(chosen=t(-2.0), rejected=t(-2.0)),
        chosen_lengths=t(2.0),
        rejected_lengths=t(1.0),
        ref=None,
    )
    assert_close(get_loss("simpo")(data, beta=2.0, simpo_gamma=0.5), [-math.log(sigmoid(2 * (-1 + 2) - 0.5))])
    assert_close(get_loss("cpo")(data, beta=2.0), [LN2])
    odds = [math.exp(-x) / (1 - math.exp(-x)) for x in (1, 2)]
    assert_close(get_loss("orpo")(data, beta=0.2), [-0.2 * math.log(sigmoid(math.log(odds[0] / odds[1])))])
    certain = dataclasses.replace(data, policy=PairLogps(chosen=t(0.0).requires_grad_(), rejected=t(-2.0)))
    get_loss("orpo")(certain).sum().backward()
    assert torch.isfinite(get_loss("orpo")(certain)).all()


def test_trl_logged_rewards() -> None:
    for batch, items in EXPECTED["trl"]["cases"].items():
        logged = items[-1]["rewards_beta0_1"]
        chosen, rejected = losses.implicit_rewards(golden_batch(batch), beta=0.1)
        assert_close(chosen.mean(), logged["rewards/chosen"])
        assert_close(rejected.mean(), logged["rewards/rejected"])
        assert_close((chosen - rejected).mean(), logged["rewards/margins"])
        assert_close((chosen > rejected).double().mean(), logged["rewards/accuracies"], atol=1e-7)  # float32 there


@pytest.mark.parametrize("batch, case", cases("vlrlhf"))
def test_predecessor(batch: str, case: dict) -> None:
    """kto_pair, sigmoid with label smoothing, hinge; and ipo on sums, which is ours with all lengths 1."""
    data = golden_batch(batch)
    expected = torch.tensor(case["losses"], dtype=torch.float64)
    if case["loss"] == "ipo":
        ones = torch.ones_like(data.chosen_lengths)
        data = dataclasses.replace(data, chosen_lengths=ones, rejected_lengths=ones)
    if case["loss"] == "kto_pair":
        expected = expected.view(2, -1).mean(0)  # it returns chosen, then rejected
    per_pair, _ = preference_loss(data, [case["loss"]], None, case)
    assert_close(per_pair, expected, atol=1e-10)
    assert_close(per_pair.mean(), case["mean"], atol=1e-10)
    chosen, rejected = losses.implicit_rewards(data, case["beta"])
    assert_close(chosen, case["chosen_rewards"])
    assert_close(rejected, case["rejected_rewards"])


@pytest.mark.parametrize("case", EXPECTED["mdpo"]["cases"], ids=lambda c: f"{c['batch']}-{c['beta']}")
def test_mdpo(case: dict) -> None:
    assert_close(get_loss("mdpo")(golden_batch(case["batch"]), beta=case["beta"]), case["losses"], atol=1e-10)


def test_mpo_with_running_delta() -> None:
    """InternVL's three steps: δ is updated with the batch before the batch's loss, and kept in float32 there."""
    mean, count = t(0.0).squeeze(), t(0.0).squeeze()
    for step in EXPECTED["mpo_internvl"]["steps"]:
        data = golden_batch("small", slice(step["pairs"][0], step["pairs"][-1] + 1))
        rewards = torch.cat(losses.implicit_rewards(data, beta=0.1))
        mean, count = losses.update_running_mean(mean, count, rewards)
        assert_close(mean, step["delta_after"], atol=1e-7)
        per_pair = get_loss("mpo")(dataclasses.replace(data, running_delta=mean), beta=0.1)
        # Its nll is the language model's own loss, a given number here: it takes the place of our sft.
        own_sft = get_loss("sft")(data).mean()
        assert_close(per_pair.mean() - own_sft + step["nll"], step["loss"], atol=1e-7)
    assert count == 24


def test_mpo_without_delta_is_trls_mixture() -> None:
    data = dataclasses.replace(golden_batch("small"), running_delta=t(0.0).squeeze())
    mixture, parts = preference_loss(data, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {"beta": 0.1})
    assert_close(get_loss("mpo")(data), mixture)
    assert list(parts) == ["sigmoid", "bco_pair", "sft"]


def test_running_mean_is_the_mean_of_everything() -> None:
    chunks = [t(1.0, 2.0, 6.0), t(-4.0), t(0.5, 0.5)]
    mean, count = torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        mean, count = losses.update_running_mean(mean, count, chunk)
    assert_close(mean, torch.cat(chunks).mean(), atol=1e-6)
    assert count == 6


# ---------------------------------------------------------------- goldens: dense DPO

DDPO = load("ddpo/expected.json")
PAIRS = [json.loads(line) for line in (GOLDENS / "ddpo/pairs.jsonl").read_text().splitlines()]
PRESETS = {
    "paper_avg_gamma5": {"ddpo_gamma": 5.0, "ddpo_average": True, "ddpo_changed_only": False},
    "muffin_sum_weight3": {"ddpo_gamma": 3.0, "ddpo_average": False, "ddpo_changed_only": False},
    "vlrlhf_mask": {"ddpo_gamma": 1.0, "ddpo_average": False, "ddpo_changed_only": True},
}


def indices(flags: list[bool]) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag]


@pytest.mark.parametrize("code", ["muffin", "vlrlhf"])
def test_changed_tokens_of_bare_answers(code: str) -> None:
    """Insertions, deletions, equal answers and more than 200 tokens (difflib's autojunk) are among the 30 pairs."""
    for pair, expected in zip(PAIRS, DDPO["get_diff_ids_on_answers"], strict=True):
        chosen, rejected = losses.changed_tokens(pair["chosen_ids"], pair["rejected_ids"])
        assert len(chosen) == len(pair["chosen_ids"]) and len(rejected) == len(pair["rejected_ids"])
        assert indices(chosen) == expected[code]["chosen"]
        assert indices(rejected) == expected[code]["rejected"]


def ddpo_batch(pairs: list[dict], changed: list[tuple[list[bool], list[bool]]]) -> PreferenceBatch:
    fields, models = {}, {"policy": {}, "ref": {}}
    for side, flags in (("chosen", [c for c, _ in changed]), ("rejected", [r for _, r in changed])):
        lengths = torch.tensor([len(pair[f"{side}_ids"]) for pair in pairs])
        width = int(lengths.max()) + 1  # padding in every row
        fields[f"{side}_mask"] = torch.arange(width) < lengths[:, None]
        fields[f"{side}_changed"] = torch.tensor([[*f, *[True] * (width - len(f))] for f in flags])
        fields[f"{side}_lengths"] = lengths
        for name, logps in models.items():
            rows = [pair[f"{name}_{side}_logps"] for pair in pairs]
            logps[f"{side}_per_token"] = pad(rows, width)
            logps[side] = torch.tensor([sum(row) for row in rows], dtype=torch.float64)
    return PreferenceBatch(policy=PairLogps(**models["policy"]), ref=PairLogps(**models["ref"]), **fields)


@pytest.mark.parametrize("mode", ["answer_only", "with_prompt"])
@pytest.mark.parametrize("preset", PRESETS)
def test_ddpo(preset: str, mode: str) -> None:
    """Three published variants on 30 pairs in one padded batch: changed tokens, sequence scores and losses."""
    expected = DDPO[preset][mode]
    context = [pair["prompt_ids"] if mode == "with_prompt" else [] for pair in PAIRS]  # the codes drop the bos
    changed = [
        losses.changed_tokens(p["chosen_ids"], p["rejected_ids"], c) for p, c in zip(PAIRS, context, strict=True)
    ]
    for (chosen, rejected), item in zip(changed, expected, strict=True):
        assert indices(chosen) == item["chosen_changed"]
        assert indices(rejected) == item["rejected_changed"]

    batch, flags = ddpo_batch(PAIRS, changed), PRESETS[preset]
    for side in ("chosen", "rejected"):
        mask, marks = getattr(batch, f"{side}_mask"), getattr(batch, f"{side}_changed")
        weights = losses.segment_weights(mask, marks, flags["ddpo_gamma"], flags["ddpo_changed_only"], torch.float64)
        for who, logps in (("policy", batch.policy), ("ref", batch.ref)):
            score = losses.weighted_logps(getattr(logps, f"{side}_per_token"), weights, flags["ddpo_average"])
            assert_close(score, [item[f"{who}_{side}"] for item in expected], atol=1e-10)
    for beta, key in ((0.1, "loss_beta0_1"), (0.5, "loss_beta0_5")):
        assert_close(get_loss("ddpo")(batch, beta=beta, **flags), [item[key] for item in expected], atol=1e-10)


def test_changed_tokens_by_hand() -> None:
    # a b c X Y d e f / a b c Z d e f: one substitution between matches of three
    assert losses.changed_tokens([1, 2, 3, 8, 9, 4, 5, 6], [1, 2, 3, 7, 4, 5, 6]) == (
        [False] * 3 + [True] * 2 + [False] * 3,
        [False] * 3 + [True] + [False] * 3,
    )
    # the match of two at the end is too short, and what is only inserted is not marked
    assert losses.changed_tokens([1, 2, 3, 8, 4, 5], [1, 2, 3, 7, 4, 5]) == (
        [False] * 3 + [True] * 3,
        [False] * 3 + [True] * 3,
    )
    assert losses.changed_tokens([1, 2, 3, 9, 9, 4, 5, 6], [1, 2, 3, 4, 5, 6]) == ([False] * 8, [False] * 6)
    # a prompt that ends alike completes a match of three
    assert indices(losses.changed_tokens([1, 2, 8], [1, 2, 9])[0]) == [0, 1, 2]
    assert indices(losses.changed_tokens([1, 2, 8], [1, 2, 9], context=[5])[0]) == [2]


# ---------------------------------------------------------------- every other loss by hand


def two_pairs(policy: dict[str, Tensor] = {}, ref: dict[str, Tensor] = {}, **more: object) -> PreferenceBatch:  # noqa: B006
    """log-ratios: chosen +1 and -1, rejected -2 and +0.5."""
    return PreferenceBatch(
        policy=PairLogps(chosen=t(-4.0, -6.0), rejected=t(-7.0, -3.0), **policy),
        ref=PairLogps(chosen=t(-5.0, -5.0), rejected=t(-5.0, -3.5), **ref),
        chosen_lengths=torch.tensor([2, 3]),
        rejected_lengths=torch.tensor([4, 1]),
        **more,
    )


def nls(x: float) -> float:
    """-log σ(x)"""
    return math.log(1 + math.exp(-x))


def test_hsa() -> None:
    # Δ with severity: 1 - 3·(-2) = 7 and -1 - 0.5·0.5 = -1.25
    batch = two_pairs(response_columns={"severity": Sides(t(9.0, 9.0), t(3.0, 0.5))})
    assert_close(get_loss("hsa")(batch, beta=0.2), [nls(1.4), nls(-0.25)])


def test_rdpo() -> None:
    # retrieved image: policy -4.5, reference -4 → log-ratio -0.5; and 2
    batch = two_pairs({"image_rejected": t(-4.5, -1.0)}, {"image_rejected": t(-4.0, -3.0)})
    assert_close(get_loss("rdpo")(batch, beta=0.2), [nls(0.6) + nls(0.3), nls(-0.3) + nls(-0.6)])


def test_povid() -> None:
    # ŷ: log-ratios 0.5 and -3
    batch = two_pairs({"negative": t(-1.0, -4.0)}, {"negative": t(-1.5, -1.0)})
    assert_close(get_loss("povid")(batch, beta=0.2), [(nls(0.6) + nls(0.1)) / 2, (nls(-0.3) + nls(0.4)) / 2])


def test_mmdpo() -> None:
    # β(δ): margin 2 → 0.2·(1 + 0.5·(1 - e^-2)); margin 0 → 0.2. SFT: 10 nats over 5 tokens in 2 pairs = 2.5 tokens each
    batch = two_pairs(row_columns={"margin": t(2.0, 0.0)})
    beta = 0.2 * (1 + 0.5 * (1 - math.exp(-2)))
    expected = [nls(beta * 3) + 0.25 * 4 / 2.5, nls(0.2 * -1.5) + 0.25 * 6 / 2.5]
    assert_close(get_loss("mmdpo")(batch, beta=0.2, mmdpo_w=0.5, mmdpo_k=1.0), expected)
    # a judge that disagrees strongly cannot turn β negative
    batch = two_pairs(row_columns={"margin": t(-20.0, -20.0)})
    assert_close(get_loss("mmdpo")(batch, beta=0.2, mmdpo_gamma=0.0), [nls(0.003), nls(-0.0015)])


def test_vdpo() -> None:
    # γ 3: ŝ(w) = 3·-4 - 2·-8 = 4, ŝ(l) = 3·-7 - 2·-9 = -3; Δ = (4+5) - (-3+5) = 7
    # second: ŝ(w) = -18 + 14 = -4, ŝ(l) = -9 + 4 = -5; Δ = (-4+5) - (-5+3.5) = 2.5
    batch = two_pairs(text_only_chosen=t(-8.0, -7.0), text_only_rejected=t(-9.0, -2.0))
    assert_close(get_loss("vdpo")(batch, beta=0.2, vdpo_gamma=3.0), [nls(1.4), nls(0.5)])
    assert_close(get_loss("vdpo")(batch, beta=0.2, vdpo_gamma=1.0), get_loss("sigmoid")(batch, beta=0.2))


def test_tpo_token() -> None:
    # one pair, chosen of two tokens, rejected of one; σ(ln 3) = 3/4, σ(0) = 1/2, σ(-ln 3) = 1/4
    batch = PreferenceBatch(
        policy=PairLogps(
            chosen=t(-3.0),
            rejected=t(-2.0),
            chosen_per_token=pad([[-1.0, -2.0]], 3),
            rejected_per_token=pad([[-2.0]], 2),
            chosen_logit_shift=pad([[math.log(3), 0.0]], 3),
            rejected_logit_shift=pad([[math.log(3)]], 2),
        ),
        ref=PairLogps(
            chosen=t(-4.0),
            rejected=t(-1.0),
            chosen_per_token=pad([[-1.5, -2.5]], 3),
            rejected_per_token=pad([[-1.0]], 2),
            chosen_logit_shift=pad([[0.0, -math.log(3)]], 3),
            rejected_logit_shift=pad([[-math.log(3)]], 2),
        ),
        chosen_lengths=torch.tensor([2]),
        rejected_lengths=torch.tensor([1]),
        chosen_mask=torch.tensor([[True, True, False]]),
        rejected_mask=torch.tensor([[True, False]]),
    )
    chosen = (-3 + math.log(1.25)) - (-4 + math.log(0.75))  # weights 5/4 and 1; 1 and 3/4
    rejected = (-2 + math.log(0.75)) - (-1 + math.log(1.25))
    assert_close(get_loss("tpo_token")(batch, beta=0.3), [nls(0.3 * (chosen - rejected))])


def test_chip() -> None:
    # one pair; second chosen token and the rejected token changed, γ 2, α 0.5, β 0.2
    batch = PreferenceBatch(
        policy=PairLogps(
            chosen=t(-3.0),
            rejected=t(-2.0),
            chosen_per_token=pad([[-1.0, -2.0]], 3),
            rejected_per_token=pad([[-2.0]], 2),
            corrupted_per_token=pad([[-2.0, -4.0]], 3),
        ),
        ref=PairLogps(
            chosen=t(-4.5),
            rejected=t(-1.0),
            chosen_per_token=pad([[-1.5, -3.0]], 3),
            rejected_per_token=pad([[-1.0]], 2),
            corrupted_per_token=pad([[-2.5, -3.5]], 3),
        ),
        chosen_lengths=torch.tensor([2]),
        rejected_lengths=torch.tensor([1]),
        chosen_mask=torch.tensor([[True, True, False]]),
        rejected_mask=torch.tensor([[True, False]]),
        chosen_changed=torch.tensor([[False, True, False]]),
        rejected_changed=torch.tensor([[True, False]]),
        chosen_token_kl=t(0.4),
        rejected_token_kl=t(1.0),
    )
    chosen = 0.5 + 2 * 1.0  # = 2.5
    rejected = 2 * -1.0
    corrupted = 0.5 + 2 * -0.5  # = -0.5
    logit = (chosen - rejected) + (chosen - corrupted) - 0.5 * (1.0 - 0.4)  # 4.5 + 3 - 0.3 = 7.2
    assert_close(get_loss("chip")(batch, beta=0.2, chip_gamma=2.0, chip_alpha=0.5), [nls(0.2 * logit)])


def test_stop_gradients() -> None:
    """By design no gradient: CHiP's KL of the chosen answer, V-DPO's text-only scores."""
    batch = random_batch()
    for name, field in (
        ("chip", "chosen_token_kl"),
        ("vdpo", "text_only_chosen"),
        ("vdpo", "text_only_rejected"),
    ):
        leaf = getattr(batch, field).clone().requires_grad_()
        loss = LOSSES[name](dataclasses.replace(batch, **{field: leaf}))
        assert not loss.requires_grad and torch.equal(loss, LOSSES[name](batch))


def test_mdpo_anchor() -> None:
    batch = two_pairs({"corrupted": t(-9.0, -9.0)}, {"corrupted": t(-9.0, -9.0)})
    plain, anchored = (get_loss("mdpo")(batch, beta=0.2, mdpo_delta=delta) for delta in (0.0, 0.7))
    assert_close(anchored - plain, [nls(0.2 - 0.7) - nls(0.2), nls(-0.2 - 0.7) - nls(-0.2)])


def test_alpha_divergence() -> None:
    # α 0.5: f′(u) = (u^-½ - 1)/-½ = 2 - 2/√u; α 1 is the reverse KL
    scores = losses.f_divergence_score(t(math.log(4), 0.0, -4000.0), "alpha_divergence", 0.5)
    assert_close(scores[:2], [1.0, 0.0])
    assert torch.isfinite(scores).all()
    assert_close(losses.f_divergence_score(t(0.3, -2.0), "alpha_divergence", 1.0), [0.3, -2.0])
    assert_close(losses.f_divergence_score(t(math.log(4)), "forward_kl", 0.5), [0.75])


def test_token_kl() -> None:
    # reference (½, ½), policy (¾, ¼): ½ log(½/¾) + ½ log(½/¼) = ½ log(4/3)
    kl = losses.token_kl(t([0.0, 0.0], [1.0, 1.0]), t([math.log(3), 0.0], [5.0, 5.0]))
    assert_close(kl, [0.5 * math.log(4 / 3), 0.0])


# ---------------------------------------------------------------- properties that all losses have


def read(batch: PreferenceBatch, path: str) -> Tensor:
    """The field at `policy.chosen`, `margin` (a column), `severity.rejected` (a column) or `running_delta`."""
    first, *rest = path.split(".")
    columns = batch.row_columns | batch.response_columns
    value = columns[first] if first in columns else getattr(batch, first)
    return getattr(value, rest[0]) if rest else value


def replaced(batch: PreferenceBatch, values: dict[str, object]) -> PreferenceBatch:
    """The batch with other values at these paths; a column's is a whole column, and None takes it away."""
    for path, value in values.items():
        first, *rest = path.split(".")
        if rest:
            first, value = first, dataclasses.replace(getattr(batch, first), **{rest[0]: value})
        for columns in ("row_columns", "response_columns"):
            if first in getattr(batch, columns):
                kept = {k: v for k, v in getattr(batch, columns).items() if k != first}
                first, value = columns, kept if value is None else kept | {first: value}
        batch = dataclasses.replace(batch, **{first: value})
    return batch


def required(name: str) -> list[str]:
    """Paths of everything beyond log-probs and lengths that a loss declares."""
    needs, columns = LOSSES[name].required
    paths = [("", PreferenceBatch), ("policy.", PairLogps)] + ([("ref.", PairLogps)] if "reference" in needs else [])
    fields = [p + f.name for p, kind in paths for f in dataclasses.fields(kind) if f.metadata.get("need") in needs]
    return [*fields, *columns]


def random_batch(seed: int = 0, same: bool = False) -> PreferenceBatch:
    """Every field set, three pairs; with `same` the policy is the reference."""
    generator = torch.Generator().manual_seed(seed)

    def random(field: dataclasses.Field) -> Tensor:
        tokens = 3 if "rejected" in field.name else 4
        shape = [(), (3,), (3, tokens)][field.metadata.get("dims", 1)]
        return -torch.rand(shape, generator=generator, dtype=torch.float64) * 3

    fields = {
        "chosen_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool(),
        "rejected_mask": torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool(),
        "chosen_changed": torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool(),
        "rejected_changed": torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool(),
        "row_columns": {"margin": t(0.0, 1.0, 3.0)},
        "response_columns": {"severity": Sides(t(0.0, 0.0, 0.0), t(0.5, 1.0, 2.0))},
        "f_divergence": None,
    }
    fields |= {f"{side}_lengths": fields[f"{side}_mask"].sum(-1) for side in ("chosen", "rejected")}
    for model in ("policy", "ref"):
        fields[model] = PairLogps(**{f.name: random(f) for f in dataclasses.fields(PairLogps)})
    for field in dataclasses.fields(PreferenceBatch):
        if field.name not in fields:
            fields[field.name] = random(field)
    if same:
        fields["policy"] = fields["ref"]
        fields["chosen_token_kl"] = fields["rejected_token_kl"] = torch.zeros(3, dtype=torch.float64)
    return PreferenceBatch(**fields)


def flags_of(name: str) -> dict[str, object]:
    return {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[name].hyperparameters else {}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_gradient(name: str) -> None:
    """Finite differences through every policy quantity that the loss reads; nothing else carries a gradient."""
    batch, loss = random_batch(), LOSSES[name]
    frozen = {"text_only_chosen", "text_only_rejected", "severity", "margin", "running_delta", "ref"}
    if name == "chip":
        frozen.add("chosen_token_kl")  # stop-gradient by design
    inputs = ["policy.chosen", "policy.rejected"] + [
        path
        for path in required(name)
        if path not in frozen and not path.startswith("ref.") and read(batch, path).is_floating_point()
    ]

    def function(*tensors: Tensor) -> Tensor:
        return loss(replaced(batch, dict(zip(inputs, tensors, strict=True))), **flags_of(name))

    tensors = [read(batch, path).clone().requires_grad_() for path in inputs]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    gradients = torch.autograd.grad(function(*tensors).sum(), tensors, allow_unused=True)
    for path, gradient in zip(inputs, gradients, strict=True):
        unread = (name == "sft" and path == "policy.rejected") or (
            "per_token" in loss.needs and path in ("policy.chosen", "policy.rejected")
        )
        assert (gradient is None or not gradient.any()) == unread, path


@pytest.mark.parametrize("name", OF_PAIRS)
def test_shape_and_declared_fields(name: str) -> None:
    """One finite number per pair from the declared fields alone, and one sentence when one of them is missing."""
    whole, loss = random_batch(), LOSSES[name]
    undeclared = {path for other in OF_PAIRS for path in required(other)} - {*required(name)}
    undeclared |= {f"ref.{f.name}" for f in dataclasses.fields(PairLogps) if f.metadata} - {*required(name)}
    order = sorted(undeclared, key=lambda path: path == "ref")  # fields of the reference before the reference
    batch = replaced(whole, dict.fromkeys(order))
    per_pair = loss(batch, **flags_of(name))
    assert per_pair.shape == (3,) and per_pair.dtype == torch.float64 and torch.isfinite(per_pair).all()
    for path in required(name):
        with pytest.raises(ValueError, match=path):
            loss(replaced(batch, {path: None}))


@pytest.mark.parametrize(
    "name, terms",
    [(n, 1) for n in ("sigmoid", "sigmoid_norm", "robust", "aot", "ddpo", "chip", "hsa", "tpo_token", "povid")]
    + [("bco_pair", 2), ("nca_pair", 2), ("rdpo", 2), ("mdpo", 3)],
)
def test_policy_equals_reference(name: str, terms: int) -> None:
    """-log σ(0) = ln 2 for each logistic term, to the bit, and no reward."""
    batch = random_batch(same=True)
    assert torch.equal(LOSSES[name](batch), sum([torch.full((3,), LN2, dtype=torch.float64)] * terms))
    batch = replaced(batch, {"policy.chosen": batch.policy.chosen.clone().requires_grad_()})
    rewards = torch.cat(losses.implicit_rewards(batch, beta=0.1))
    assert not rewards.any() and not rewards.requires_grad


@pytest.mark.parametrize("name", ["ddpo", "chip", "tpo_token"])
def test_padding_is_never_read(name: str) -> None:
    """NaN and inf where the mask is False change neither loss nor gradient."""
    batch = random_batch()
    dirty = {}
    for model in ("policy", "ref"):
        for field in dataclasses.fields(PairLogps):
            if field.metadata.get("dims") == 2:
                mask = batch.rejected_mask if "rejected" in field.name else batch.chosen_mask
                value = read(batch, f"{model}.{field.name}")
                junk = math.nan if "shift" in field.name else -math.inf
                dirty[f"{model}.{field.name}"] = torch.where(mask, value, junk)
    assert len(dirty) == 10
    policy = batch.policy.chosen_per_token.clone().requires_grad_()
    clean = LOSSES[name](replaced(batch, {"policy.chosen_per_token": policy}))
    (expected,) = torch.autograd.grad(clean.sum(), policy)
    soiled = dirty["policy.chosen_per_token"].clone().requires_grad_()
    actual = LOSSES[name](replaced(batch, dirty | {"policy.chosen_per_token": soiled}))
    (gradient,) = torch.autograd.grad(actual.sum(), soiled)
    assert torch.equal(actual, clean) and torch.equal(gradient, expected)


def test_losses_are_per_pair() -> None:
    """A pair's loss does not depend on its neighbours, except where the docstring says that it does."""
    whole = random_batch()
    of_the_batch = {"aot", "aot_unpaired", "kto_pair"}  # sorted, or a KL of the batch
    with_token_mean = {"sft", "mpo", "mmdpo"}  # of these pairs, unless they are told how many tokens a pair has

    def part(value: object, i: int) -> object:
        """Pair i of a field, of a column or of a model's fields."""
        if isinstance(value, Tensor):
            return value if value.ndim == 0 else value[i : i + 1]
        if isinstance(value, Sides):
            return Sides(*(part(v, i) for v in value))
        if isinstance(value, dict):
            return {name: part(v, i) for name, v in value.items()}
        if isinstance(value, PairLogps):
            return PairLogps(**{f.name: part(getattr(value, f.name), i) for f in dataclasses.fields(value)})
        return value

    def only(i: int) -> PreferenceBatch:
        return PreferenceBatch(**{f.name: part(getattr(whole, f.name), i) for f in dataclasses.fields(whole)})

    for dependent in (of_the_batch, of_the_batch | with_token_mean):
        for name, loss in ((name, LOSSES[name]) for name in OF_PAIRS):
            alone = torch.cat([loss(only(i), **flags_of(name)) for i in range(3)])
            together = loss(whole, **flags_of(name))
            assert torch.allclose(alone, together, atol=1e-14, rtol=0) != (name in dependent), name
        whole = dataclasses.replace(whole, chosen_tokens_per_pair=None)


# ---------------------------------------------------------------- registry, flags, mixtures


def test_unknown_loss_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'dpo'.*sigmoid, hinge, ipo.*povid"):
        get_loss("dpo")


def test_flags_are_the_hyperparameters() -> None:
    """A flag has the type and the default of the argument; None where the losses' own defaults differ."""
    flags = losses.flags()
    assert set(flags) == {name for loss in LOSSES.values() for name in loss.hyperparameters}
    assert flags["beta"] == (float, 0.1, "strength of the pull to the reference: higher keeps closer to it (IPO's τ)")
    assert flags["ddpo_average"][:2] == (bool, True) and flags["ddpo_average"].help.startswith(
        "ddpo: divide by the sum"
    )
    assert flags["label_smoothing"][:2] == (float | None, None)
    assert "0.0 for sigmoid, robust, aot, aot_unpaired, simpo, cpo; 0.001 for exo_pair" in flags["label_smoothing"].help
    for name, flag in flags.items():
        defaults = {loss.hyperparameters[name].default for loss in LOSSES.values() if name in loss.hyperparameters}
        assert defaults == {flag.default} or (name, defaults) == ("label_smoothing", {0.0, 1e-3}), name
        assert flag.default is None or type(flag.default) is flag.type
        assert all(loss.hyperparameters[name].help for loss in LOSSES.values() if name in loss.hyperparameters), name


def test_a_hyperparameter_of_zero_is_zero():
    assert losses.hyperparameters_of(["mpo"], {"mpo_wg": 0.0, "mpo_wp": None})["mpo"] == {
        "beta": 0.1, "mpo_wp": 0.8, "mpo_wq": 0.2, "mpo_wg": 0.0,
    }  # fmt: skip


def test_each_loss_runs_with_its_own_default() -> None:
    both = ["sigmoid", "exo_pair", "sft"]
    assert losses.hyperparameters_of(both, {"label_smoothing": None, "beta": 0.3, "seed": 1}) == {
        "sigmoid": losses.hyperparameters_of(["sigmoid"], {})["sigmoid"] | {"beta": 0.3, "label_smoothing": 0.0},
        "exo_pair": losses.hyperparameters_of(["exo_pair"], {})["exo_pair"] | {"beta": 0.3, "label_smoothing": 1e-3},
        "sft": {},
    }
    common = {"beta": 0.1, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    assert losses.common_hyperparameters(both, {"label_smoothing": None}) == common
    assert losses.common_hyperparameters(both, {"label_smoothing": 0.2}) == common | {"label_smoothing": 0.2}
    batch = golden_batch("small")
    total, _ = preference_loss(batch, both[:2], None, {"label_smoothing": None})
    assert_close(total, get_loss("sigmoid")(batch) + get_loss("exo_pair")(batch, label_smoothing=1e-3))


@pytest.fixture
def unregister() -> Iterator[None]:
    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def test_a_loss_declares_itself_once(unregister: None) -> None:
    @losses.loss(paper="1234.56789", summary="a loss", needs={"per_token"}, columns={"margin"})
    def mine(batch: PreferenceBatch, *, beta: losses.Beta = 0.2, mine_k: Annotated[int, "how much"] = 3) -> Tensor:
        if mine_k < 0:
            raise ValueError("--mine_k is not negative.")
        return batch.policy.chosen_per_token.sum(-1) * mine_k + batch.row_columns["margin"]

    assert losses.needs_of(["sigmoid", "mine"]) == {"per_token"} and losses.columns_of(["mine", "hsa"]) == {
        "margin",
        "severity",
    }
    assert losses.flags()["mine_k"] == (int, 3, "mine: how much")
    assert losses.flags()["beta"].default is None and "0.2 for mine" in losses.flags()["beta"].help
    check_losses(["mine"], None, {"mine_k": 0})
    for arguments, message in (
        ((["mine"], None, {"mine_k": -1}), "--mine_k is not negative"),
        ((["mine"], None, {}, ["prompt"]), "reads the column 'margin'"),
        ((["sigmoid"], None, {"mine_k": 4}), "--mine_k does nothing with --loss_type sigmoid: it belongs to mine"),
        ((["sigmoid", "mine"], None, {}), "different defaults of --beta: give one for all"),
    ):
        with pytest.raises(ValueError, match=message):
            check_losses(*arguments)
    check_losses(["sigmoid", "mine"], None, {"beta": 0.2})
    batch = random_batch()
    assert_close(get_loss("mine")(batch, mine_k=2), 2 * batch.policy.chosen_per_token.sum(-1) + t(0.0, 1.0, 3.0))


@pytest.mark.parametrize(
    "declaration, message",
    [
        ({"needs": {"per_tokens"}}, "needs per_tokens; known are per_token, changed_tokens"),
        ({"needs": {"corrupted_image"}}, "a corruption goes with"),
        ({"corruption": "crop"}, "a corruption goes with"),
    ],
)
def test_wrong_declarations_are_refused(declaration: dict, message: str) -> None:
    before = dict(LOSSES)
    with pytest.raises(ValueError, match=message):
        losses.loss(summary="", **declaration)(lambda batch: batch.policy.chosen)
    with pytest.raises(ValueError, match="gamma has no type or no default"):
        losses.loss(summary="")(lambda batch, *, gamma=1.0: batch.policy.chosen)
    assert before == LOSSES


def test_one_name_has_one_type(unregister: None) -> None:
    @losses.loss(summary="a loss")
    def mine(batch: PreferenceBatch, *, mdpo_delta: str = "a") -> Tensor:
        return batch.policy.chosen

    with pytest.raises(ValueError, match="mdpo, mine give --mdpo_delta different types"):
        losses.flags()


def test_needs_are_declared() -> None:
    """Every need fills fields and is asked for by a loss; what reads v′ cannot be cached."""
    filled = {
        f.metadata["need"]
        for kind in (PreferenceBatch, PairLogps, UnpairedBatch)
        for f in dataclasses.fields(kind)
        if f.metadata
    }
    assert filled - {"reference"} == set(NEEDS) == {need for loss in LOSSES.values() for need in loss.needs}
    assert losses.needs_of(["sigmoid", "hsa", "mdpo"]) == {"corrupted_image"}
    assert get_loss("rdpo").data_columns == {"image_rejected"} and get_loss("hsa").data_columns == {"severity"}
    assert {name for name, loss in LOSSES.items() if not loss.cacheable} == {"mdpo", "chip", "tpo_token", "povid"}


def test_the_docs_name_every_loss_and_its_paper() -> None:
    text = (Path(__file__).parents[1] / "docs/losses.md").read_text()
    for name, loss in LOSSES.items():
        rows = [line for line in text.splitlines() if f"`{name}`" in line]
        assert any(loss.paper in line for line in rows), name
    for name in losses.flags():
        assert f"--{name}`" in text, name


def test_combine() -> None:
    a, b = t(1.0, 2.0), t(10.0, 20.0)
    assert_close(losses.combine([a, b]), [11.0, 22.0])
    assert_close(losses.combine([a, b], [0.5, 0.1]), [1.5, 3.0])
    with pytest.raises(ValueError, match="1 values for 2 losses"):
        losses.combine([a, b], [0.5])


def test_preference_loss_hands_each_loss_its_own_flags() -> None:
    batch = golden_batch("small")
    total, parts = preference_loss(batch, ["sigmoid", "sft"], [1.0, 0.5], {"beta": 0.5, "ddpo_gamma": 7.0, "seed": 1})
    assert_close(parts["sigmoid"], get_loss("sigmoid")(batch, beta=0.5))
    assert_close(total, parts["sigmoid"] + 0.5 * parts["sft"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["sigmoid", "nope"], None, {}), "Unknown loss_type 'nope'"),
        (([], None, {}), "at least one"),
        ((["sigmoid", "sigmoid"], None, {}), "each loss once"),
        ((["sigmoid", "sft"], [1.0], {}), "1 values for 2 losses"),
        ((["hinge"], None, {"label_smoothing": 0.1}), "--label_smoothing does nothing with --loss_type hinge"),
        ((["ddpo"], None, {"f_divergence_type": "forward_kl"}), "--f_divergence_type does nothing"),
        ((["sigmoid"], None, {"f_divergence_type": "kl"}), "Unknown f_divergence_type 'kl'"),
        ((["robust"], None, {"label_smoothing": 0.5}), "below 0.5"),
        ((["exo_pair"], None, {"label_smoothing": 0.0}), "exo_pair needs --label_smoothing above 0"),
        ((["aot"], None, {"label_smoothing": 1.0}), "--label_smoothing is a probability below 1"),
        ((["hsa"], None, {}, ["prompt", "responses"]), "reads the column 'severity'; the data has prompt, responses"),
        ((["sigmoid", "mdpo"], None, {}, None, True), "--precompute_ref_log_probs cannot serve --loss_type mdpo"),
    ],
)
def test_check_losses_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_losses(*arguments)


def test_check_losses_accepts() -> None:
    check_losses(["sigmoid"], None, {"beta": 0.3, "label_smoothing": 0.1, "learning_rate": 1.0}, ["prompt"], True)
    check_losses(["ddpo", "sft"], [1.0, 0.1], {"ddpo_gamma": 3.0, "ddpo_average": False}, [], True)
    check_losses(["hsa"], None, {}, ["severity"], True)
    check_losses(["exo_pair"], None, {"label_smoothing": 1e-3})
    check_losses(["exo_pair"], None, {})  # its own default


@pytest.mark.parametrize("name, epsilon", [("robust", 0.5), ("robust", -0.1), ("exo_pair", 0.0)])
def test_impossible_smoothing(name: str, epsilon: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        get_loss(name)(golden_batch("small"), label_smoothing=epsilon)


def test_losses_imports_nothing_heavy() -> None:
    """losses/ is lifted into other projects and tested in milliseconds: torch and the standard library only."""
    imported = set()
    for file in Path(losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported == {
        "collections", "dataclasses", "difflib", "functools", "inspect", "losses", "math", "torch", "typing"
    }  # fmt: skip


# ---------------------------------------------------------------- reductions


def test_two_shards_average_to_the_whole() -> None:
    """Unequal shards (ranks): with the shards' mean count as divisor, their results average to the whole batch's."""
    samples = torch.arange(4, dtype=torch.float64) ** 2
    shards = [samples[:1], samples[1:]]
    parts = [losses.sample_mean(shard, len(samples) / len(shards)) for shard in shards]
    assert_close(sum(parts) / 2, losses.sample_mean(samples))
    assert_close(losses.sample_mean(samples), samples.mean())
    assert_close(sum(losses.sample_mean(shard) for shard in shards) / 2, 7 / 3)  # mean of 0 and of 1, 4, 9: not 3.5


def test_row_mean() -> None:
    # row 0 has three pairs (K = 3), row 2 one; row 1 none (all tied)
    assert_close(losses.row_mean(t(1.0, 2.0, 6.0, 5.0), torch.tensor([0, 0, 0, 2])), [3.0, 5.0])


# ---------------------------------------------------------------- reward models

RM_BATCHES, RM_CASES = load("rm/batches.json"), load("rm/expected.json")["cases"]


@pytest.mark.parametrize(
    "case", RM_CASES, ids=lambda c: f"{c['batch']}-{c['use_margin']}-{c['center_rewards_coefficient']}"
)
def test_reward_model(case: dict) -> None:
    batch = {key: torch.tensor(value, dtype=torch.float64) for key, value in RM_BATCHES[case["batch"]].items()}
    margin = batch["margin"] if case["use_margin"] else None
    loss = losses.bradley_terry(batch["chosen"], batch["rejected"], margin, case["center_rewards_coefficient"])
    assert loss.shape == batch["chosen"].shape
    assert_close(loss.mean(), case["loss"])


def test_margin_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match="margin has shape"):
        losses.bradley_terry(t(1.0, 2.0)[:, None], t(0.0, 0.0)[:, None], t(0.1, 0.2))


def test_k_wise_ranking_by_hand() -> None:
    """Three ranked answers: InstructGPT's mean over the three ordered pairs, and each row counts once."""
    rewards, chosen, rejected = t(2.0, 1.0, 0.0, 3.0, 3.5), torch.tensor([0, 0, 1, 3]), torch.tensor([1, 2, 2, 4])
    per_pair = losses.bradley_terry(rewards[chosen], rewards[rejected])
    rows = losses.row_mean(per_pair, torch.tensor([0, 0, 0, 1]))
    assert_close(rows, [(nls(1.0) + nls(2.0) + nls(1.0)) / 3, nls(-0.5)])


def test_bradley_terry_gradient() -> None:
    inputs = (t(1.0, -2.0, 0.3).requires_grad_(), t(0.5, 1.0, 0.3).requires_grad_())
    assert torch.autograd.gradcheck(lambda c, r: losses.bradley_terry(c, r, t(0.0, 0.5, 1.0), 0.01), inputs)


# ---------------------------------------------------------------- PPO

PPO = {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "ppo/tensors.npz").items()}
PPO_SCALARS = load("ppo/expected.json")["scalars"]
MASK = PPO["legacy.mask"].bool()  # (8, 9)


def assert_masked(actual: Tensor, expected: Tensor, mask: Tensor = MASK, atol: float = 1e-12) -> None:
    assert_close(actual[mask], expected[mask], atol=atol)


def test_the_mask_ends_at_the_end_token() -> None:
    assert torch.equal(MASK, torch.arange(9) <= PPO["sequence_lengths"][:, None])
    assert torch.equal(losses.last_token_index(MASK), PPO["sequence_lengths"])


@pytest.mark.parametrize("case", "abcd")
def test_ppo_advantages_equal_trl_0_8_1(case: str) -> None:
    """Rewards with the score on the last answer token → (whiten) → GAE → whiten."""
    config, golden = PPO_SCALARS[f"legacy_{case}"]["config"], lambda name: PPO[f"legacy_{case}.{name}"]
    kl = golden("kl")
    if config["kl_penalty"] == "kl":
        kl = losses.kl_per_token(PPO["old_logprobs"], PPO["ref_logprobs"], "k1")
        assert_masked(kl, golden("kl"))
    rewards = losses.token_rewards(PPO["scores"], kl, MASK, config["kl_coef"])
    assert not rewards[~MASK].any()
    assert_masked(rewards, golden("rewards"))
    if config["whiten_rewards"]:
        return  # departure 3, next test
    advantages, returns = losses.gae(rewards, PPO["values"], MASK, config["gamma"], config["lam"])
    assert not advantages[~MASK].any() and not returns[~MASK].any()
    assert_masked(returns, golden("returns"))
    assert_masked(losses.masked_whiten(advantages, MASK), golden("advantages"))


def test_whitened_rewards_do_not_leak_out_of_padding() -> None:
    """Departure 3: TRL 0.8.1 leaves mean - mean/std on the padding, and GAE carries it into the answer; 1.10 fixes that."""
    config, raw = PPO_SCALARS["legacy_c"]["config"], PPO["legacy_c.rewards"] * MASK
    gamma, lam = config["gamma"], config["lam"]
    whitened = losses.masked_whiten(raw, MASK, shift_mean=False)
    assert not whitened[~MASK].any()
    _, returns = losses.gae(whitened, PPO["values"], MASK, gamma, lam)
    full = MASK.all(-1)
    assert_close(returns[full], PPO["legacy_c.returns"][full])

    mean, std = losses.masked_mean(raw, MASK), torch.sqrt(losses.masked_var(raw, MASK) + 1e-8)
    leaking = torch.where(MASK, whitened, mean - mean / std)
    _, leaked = losses.gae(leaking, PPO["values"] * MASK, torch.ones_like(MASK), gamma, lam)
    assert_masked(leaked, PPO["legacy_c.returns"])
    assert not torch.allclose(leaked[~full][:, 0], returns[~full][:, 0])

    # TRL 1.10: case c is case b with whitened rewards
    value_mask = ~PPO["c.padding_mask_p1"]
    assert_masked(losses.masked_whiten(PPO["b.rewards"], value_mask, shift_mean=False), PPO["c.rewards"], value_mask)


@pytest.mark.parametrize("case", "abcd")
def test_ppo_losses_equal_trl_0_8_1(case: str) -> None:
    scalars, golden = PPO_SCALARS[f"legacy_{case}"], lambda name: PPO[f"legacy_{case}.{name}"]
    config, logits = scalars["config"], PPO["legacy.logits"]
    logprobs = logits.log_softmax(-1).gather(-1, PPO["responses"][..., None]).squeeze(-1)
    assert_masked(logprobs, golden("new_logprobs"))
    policy, clipped = losses.clipped_policy_loss(
        logprobs, PPO["old_logprobs"], golden("advantages"), config["cliprange"]
    )
    assert_close(losses.masked_mean(policy, MASK), scalars["loss/policy"])
    assert_close(losses.masked_mean(clipped.double(), MASK), scalars["policy/clipfrac"])
    value, clipped = losses.clipped_value_loss(
        PPO["vpred"], golden("values"), golden("returns"), config["cliprange_value"]
    )
    assert_close(losses.masked_mean(value, MASK), scalars["loss/value"])
    assert_close(losses.masked_mean(clipped.double(), MASK), scalars["val/clipfrac"])
    approx_kl = losses.approx_kl_per_token(logprobs, PPO["old_logprobs"])
    assert_close(losses.masked_mean(approx_kl, MASK), scalars["policy/approxkl"])
    assert_close(losses.masked_mean(Categorical(logits=logits).entropy(), MASK), scalars["policy/entropy"])
    assert_close(losses.masked_mean(PPO["old_logprobs"] - logprobs, MASK), scalars["policy/policykl"])
    total = scalars["loss/policy"] + config["vf_coef"] * scalars["loss/value"]
    assert_close(total, scalars["loss/total"])


@pytest.mark.parametrize("case", "abcd")
def test_ppo_where_trl_1_10_coincides(case: str) -> None:
    """On TRL 1.10's own masks our functions give its numbers; on ours its unmasked means scale by the share of padding."""
    scalars, golden = PPO_SCALARS[case], lambda name: PPO[f"{case}.{name}"]
    config, policy_mask, value_mask = scalars["config"], ~golden("padding_mask"), ~golden("padding_mask_p1")
    assert torch.equal(policy_mask, MASK)

    kl = losses.kl_per_token(PPO["old_logprobs"], PPO["ref_logprobs"], config["kl_estimator"])
    assert_masked(kl, golden("kl"))
    assert_masked(-config["kl_coef"] * kl, golden("non_score_reward"))
    scores = losses.penalize_missing_eos(PPO["scores"], golden("contain_eos_token"), config["missing_eos_penalty"])
    assert_close(scores, golden("scores"))

    # departure 1: the score; a full-width answer has no pad to put it on, so there both agree
    rewards = losses.token_rewards(scores, kl, MASK, config["kl_coef"])
    if not config["whiten_rewards"]:
        full = MASK.all(-1)
        assert full.sum() == 2
        assert_close(rewards[full], golden("rewards")[full])
        assert not torch.allclose(rewards[~full], golden("rewards")[~full])
        assert_close(rewards.sum(), golden("rewards").sum())

    advantages, returns = losses.gae(golden("rewards"), golden("values"), value_mask, config["gamma"], config["lam"])
    assert_masked(advantages, golden("advantages_before_whitening"), value_mask)
    assert_masked(returns, golden("returns"), value_mask)
    assert_masked(losses.masked_whiten(advantages, policy_mask), golden("advantages"), policy_mask, atol=1e-9)

    logits = PPO["new_logits"] / (config["temperature"] + 1e-7)
    logprobs = logits.log_softmax(-1).gather(-1, PPO["responses"][..., None]).squeeze(-1)
    assert_masked(logprobs, golden("new_logprobs"))
    policy, clipped = losses.clipped_policy_loss(
        logprobs, PPO["old_logprobs"], golden("advantages"), config["cliprange"]
    )
    assert_close(losses.masked_mean(policy, policy_mask), scalars["pg_loss"])
    assert_close(losses.masked_mean(clipped.double(), policy_mask), scalars["pg_clipfrac"], atol=1e-7)
    value, clipped = losses.clipped_value_loss(
        PPO["vpred"], golden("values"), golden("returns"), config["cliprange_value"]
    )
    assert_close(losses.masked_mean(value, value_mask), scalars["vf_loss"])
    assert_close(losses.masked_mean(clipped.double(), value_mask), scalars["vf_clipfrac"], atol=1e-7)

    # departure 2: means over answer tokens only
    share = MASK.double().mean()
    approx_kl = losses.masked_mean(losses.approx_kl_per_token(logprobs, PPO["old_logprobs"]), MASK)
    assert_close(approx_kl * share, scalars["approxkl"])
    entropy = Categorical(logits=logits).entropy()  # as base/logps.py
    assert_close(entropy, golden("entropy"))
    assert_close(entropy.mean(), scalars["entropy_mean"])
    assert not torch.allclose(losses.masked_mean(entropy, MASK), entropy.mean())


def test_masked_statistics() -> None:
    x, mask, expected = PPO["mm_x"], PPO["mm_mask"], PPO_SCALARS["masked"]
    dirty = torch.where(mask, x, math.nan)
    for values in (x, dirty):
        assert_close(losses.masked_mean(values, mask), expected["masked_mean"])
        assert_close(losses.masked_mean(values, mask, dim=1), expected["masked_mean_axis1"])
        assert_close(losses.masked_var(values, mask), expected["masked_var"])
        assert_close(losses.masked_var(values, mask, unbiased=False), expected["masked_var_biased"])
        assert_masked(losses.masked_whiten(values, mask), PPO["mm_whiten"], mask)
        assert_masked(losses.masked_whiten(values, mask, shift_mean=False), PPO["mm_whiten_keep_mean"], mask)
    with pytest.raises(ValueError, match="at least two answer tokens"):
        losses.masked_var(x, torch.zeros_like(mask))


def test_kl_estimators_by_hand() -> None:
    logprobs, ref = t(-1.0, -2.0), t(-1.0, -1.0)
    assert_close(losses.kl_per_token(logprobs, ref, "k1"), [0.0, -1.0])
    assert_close(losses.kl_per_token(logprobs, ref, "k3"), [0.0, math.e - 2])
    with pytest.raises(ValueError, match="known are k1, k3"):
        losses.kl_per_token(logprobs, ref, "k2")


def test_token_rewards_by_hand() -> None:
    # a hole in the mask (a tool's output, say) does not move the score from the last answer token
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    kl = t([1.0, 2.0, 9.0, 9.0], [1.0, 9.0, 3.0, 9.0])
    assert_close(losses.token_rewards(t(10.0, -1.0), kl, mask, 0.5), [[-0.5, 9.0, 0.0, 0.0], [-0.5, 0.0, -2.5, 0.0]])
    with pytest.raises(ValueError, match="Rollout 1 of the batch is empty"):
        losses.token_rewards(t(10.0, -1.0), kl, mask & torch.tensor([[True], [False]]), 0.5)


def test_gae_by_hand() -> None:
    # two tokens, γ ½, λ ½: δ1 = 4 - 2 = 2, δ0 = 1 + ½·2 - 1 = 1; Â1 = 2, Â0 = 1 + ¼·2 = 1.5
    mask = torch.tensor([[True, True, False]])
    advantages, returns = losses.gae(t([1.0, 4.0, 99.0]), t([1.0, 2.0, 99.0]), mask, 0.5, 0.5)
    assert_close(advantages, [[1.5, 2.0, 0.0]])
    assert_close(returns, [[2.5, 4.0, 0.0]])


def test_padding_length_moves_nothing() -> None:
    """Three more columns of padding change no PPO number."""
    wide = torch.nn.functional.pad(MASK, (0, 3))
    junk = {
        name: torch.nn.functional.pad(PPO[name], (0, 3), value=7.0)
        for name in ("old_logprobs", "ref_logprobs", "values")
    }
    results = []
    for mask, data in ((MASK, PPO), (wide, junk)):
        kl = losses.kl_per_token(data["old_logprobs"], data["ref_logprobs"])
        rewards = losses.token_rewards(PPO["scores"], kl, mask, 0.05)
        advantages, returns = losses.gae(rewards, data["values"], mask, 0.99, 0.9)
        results.append((losses.masked_whiten(advantages, mask)[:, :9], returns[:, :9]))
    for narrow, padded in zip(*results, strict=True):
        assert_close(narrow, padded)


def test_first_minibatch_has_ratio_one() -> None:
    """Policy = old policy: the loss is minus the mean advantage, nothing is clipped, approx_kl is exactly 0."""
    old, advantages = PPO["old_logprobs"], PPO["a.advantages"]
    loss, clipped = losses.clipped_policy_loss(old, old, advantages, 0.2)
    assert torch.equal(loss, -advantages) and not clipped.any()
    assert not losses.approx_kl_per_token(old, old).any()


def test_ppo_gradients() -> None:
    def check(function: Callable[[Tensor], Tensor], at: Tensor) -> None:
        assert torch.autograd.gradcheck(function, (at.clone().requires_grad_(),), fast_mode=True)

    old, advantages = PPO["old_logprobs"][:1, :4], PPO["a.advantages"][:1, :4]
    values, returns = PPO["values"][:1, :4], PPO["a.returns"][:1, :4]
    check(
        lambda x: losses.clipped_policy_loss(x, old, advantages, cliprange=0.2)[0],
        old + t([0.0, 0.25, -0.3, 0.1]),
    )
    check(lambda v: losses.clipped_value_loss(v, values, returns, cliprange_value=0.2)[0], PPO["vpred"][:1, :4])
    check(lambda x: losses.token_kl(PPO["new_logits"][0, 2:4], x), PPO["new_logits"][0, :2])


def test_adaptive_kl_coef() -> None:
    # Ziegler's controller: too much KL raises the coefficient, the error is clipped at ±20 %
    assert losses.adaptive_kl_coef(0.2, kl=6.6, target_kl=6.0, horizon=1000, num_samples=100) == pytest.approx(
        0.2 * 1.01
    )
    assert losses.adaptive_kl_coef(0.2, kl=600.0, target_kl=6.0, horizon=1000, num_samples=100) == pytest.approx(
        0.2 * 1.02
    )
    assert losses.adaptive_kl_coef(0.2, kl=-3.0, target_kl=6.0, horizon=1000, num_samples=100) == pytest.approx(
        0.2 * 0.98
    )
    assert losses.adaptive_kl_coef(0.2, kl=6.0, target_kl=6.0, horizon=1000, num_samples=100) == 0.2
