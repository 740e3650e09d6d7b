"""Flags of train_dpo.py alone."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import losses
from args.rollouts import RolloutFlags
from args.training import VLConfig
from common.errors import InputError

# What losses may read of answers that were just sampled: nothing beside the answers themselves
ONLINE_NEEDS = frozenset({"per_token", "token_kl", "running_delta"})


@dataclass
class DPOConfig(RolloutFlags, VLConfig):
    """Direct preference optimisation and its relatives (losses/, docs/losses.md).

    `parse` adds a field for every hyper-parameter of every loss, under its name: `args.beta`, `args.mdpo_delta`, ...
    """

    title: ClassVar[str] = "DPO and other preference losses"
    learning_rate: float = field(
        default=1e-6, metadata={"help": "Peak learning rate; with LoRA 10 times this is usual."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One or more names; several are summed."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per --loss_type; 1 by default."}
    )
    corruption: Literal["crop", "diffusion", "black", "patch", "swap"] | None = field(
        default=None,
        metadata={
            "help": "How losses that need it corrupt the image; their papers' way by default. crop: a small part, diffusion: noise, "
            "black: a black picture, patch: half of the squares greyed out, swap: another row's image."
        },
    )
    diffusion_step: int = field(default=500, metadata={"help": "Noise of --corruption diffusion, of 1000 steps."})
    online: bool = field(
        default=False,
        metadata={
            "help": "Learn from the policy's own answers instead of the data's: every step samples --rollouts_per_prompt answers to "
            "each prompt, rewards score them, --pairs says which of them are compared (2402.04792)."
        },
    )
    response_length: int = field(default=53, metadata={"help": "With --online: longest answer, in tokens."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once, keep them on disk, train without a reference."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device in that pass; --per_device_train_batch_size by default."}
    )
    ref_log_probs_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where they are kept, for all runs of all nodes; $HF_HOME/vl_rlhf/reference_logps by default."
        },
    )

    @property
    def row_kind(self) -> Literal["preference", "unpaired", "prompt"]:
        """The rows (data/rows.py) that are read."""
        if self.online:
            return "prompt"
        return "preference" if losses.reads_pairs(self.loss_type) else "unpaired"

    @property
    def compares_answers(self) -> bool:
        """Whether an answer without a score can be left out: pairs are made of the others."""
        return True

    @property
    def reads_reference(self) -> bool:
        """Whether any loss depends on the reference's log-probs."""
        return not all(losses.get_loss(name).reference_free for name in self.loss_type)

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.check_losses(
            self.loss_type, self.loss_weights, vars(self), precompute_ref_log_probs=self.precompute_ref_log_probs
        )
        for name, value in losses.common_hyperparameters(self.loss_type, vars(self)).items():
            setattr(self, name, value)  # a flag whose default is the loss's own shows it from here on
        ways = {loss.corruption for name in self.loss_type if (loss := losses.get_loss(name)).corruption}
        if self.corruption and not ways:
            raise InputError(
                f"--corruption does nothing with --loss_type {' '.join(self.loss_type)}: no image is corrupted."
            )
        if len(ways) > 1 and not self.corruption:
            raise InputError(
                f"These losses corrupt images in different ways ({', '.join(sorted(ways))}): give --corruption."
            )
        self.corruption = self.corruption or next(iter(ways), None)
        if "mismatched" in losses.needs_of(self.loss_type):
            for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
                if getattr(self, name) < 2:
                    raise InputError(
                        f"--{name} 1 leaves no other answer in a batch, on which --loss_type {' '.join(self.loss_type)} estimates the KL "
                        "to the reference: give 2 or more."
                    )
        if "running_delta" in losses.needs_of(self.loss_type):
            self.restore_callback_states_from_checkpoint = True
        if not 0 <= self.diffusion_step < 1000:
            raise InputError(f"--diffusion_step is a step from 0 to 999, not {self.diffusion_step}.")
        if self.online:
            self._settle_online()
        else:
            self._refuse_rollouts()

    def _refuse_rollouts(self) -> None:
        for f in dataclasses.fields(RolloutFlags):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            if getattr(self, f.name) != default:
                raise InputError(f"--{f.name} needs --online True: without it the answers are those of the data.")

    def _settle_online(self) -> None:
        self.rollouts_per_prompt = 2 if self.rollouts_per_prompt is None else self.rollouts_per_prompt
        self.temperature = 1.0 if self.temperature is None else self.temperature
        self.check_rollouts("Online DPO")
        if self.rollouts_per_prompt < 2:
            raise InputError("--online compares answers: --rollouts_per_prompt 2 at least.")
        if self.precompute_ref_log_probs:
            raise InputError(
                "--precompute_ref_log_probs knows the data's answers, not those of --online: leave it out."
            )
        if self.log_image_sensitivity:
            raise InputError("--log_image_sensitivity reads answers in the data; --online takes none: leave it out.")
        for name in self.loss_type:
            reads = {*losses.needs_of([name]) - ONLINE_NEEDS, *losses.columns_of([name])}
            if reads:
                raise InputError(
                    f"--loss_type {name} reads {', '.join(sorted(reads))}, which answers of --online do not have: take another loss."
                )

    def __reduce__(self) -> tuple[object, ...]:
        # Trainer pickles its arguments. pickle cannot find a class that `parse` has made: a plain DPOConfig comes back.
        return object.__new__, (DPOConfig,), self.__getstate__()


def with_loss_flags(config: type[DPOConfig]) -> type[DPOConfig]:
    """The class with a field for each hyper-parameter of the losses registered so far, and their names in its help."""
    known = {f.name: f for f in dataclasses.fields(config)}
    names = "; ".join(
        f"{name}: {loss.summary}{f' ({loss.paper})' if loss.paper else ''}" for name, loss in losses.LOSSES.items()
    )
    loss_type = known["loss_type"]
    described = field(
        default_factory=loss_type.default_factory, metadata={"help": f"{loss_type.metadata['help']} {names}."}
    )
    fields: list[tuple[str, Any, Any]] = [("loss_type", loss_type.type, described)]
    for name, flag in losses.flags().items():
        if name in known:
            raise ValueError(f"--{name} is a flag already: give the hyper-parameter of the loss another name.")
        kind = flag.type | None if flag.default is None else flag.type
        fields.append((name, kind, field(default=flag.default, metadata={"help": flag.help})))
    namespace = {"__module__": config.__module__, "__doc__": config.__doc__}
    return dataclasses.make_dataclass(config.__name__, fields, bases=(config,), namespace=namespace)
