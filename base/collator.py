"""Rows -> batches, whose fields stand in base/batch.py. Images are decoded here, that is, in data-loader workers.

A family overrides a collator only where its image inputs need more than its processor gives:

    class LlavaDPODataCollatorWithPadding(VLDPODataCollatorWithPadding):
        def __call__(self, features):
            padded_batch = super().__call__(features)
            # from padded_batch["img_path"], one image after the other
            padded_batch["img_input_dict"] = dict(pixel_values=...)
            return padded_batch
"""

import copy
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from io import BytesIO
from typing import Any

import torch
from datasets import Dataset

from base import views
from base.batch import DPOBatch, ImageInputs, PPOBatch, ResponseBatch, RMBatch, SFTBatch
from base.corruption import Corruption, diffuse
from base.images import IMAGE_STATES, image_states, openable
from base.packing import common_beginning, pack_rows, packed_length
from base.processor import IGNORE_INDEX, VLProcessor, answer_start
from base.segments import Layout
from base.videos import media_of
from base.views import Pairs, Places, Row, View
from common.errors import InputError
from common.seeds import stable_seed
from data.lengths import LengthCounts, LengthLimits, fit, fit_row
from data.pairs import PairMode, ordered_pairs
from data.rows import NUMBER_COLUMNS
from data.stream import StreamedRows
from losses import changed_tokens

logger = logging.getLogger(__name__)


class VLDataCollator:
    """What the collators share: the processor and the length limits."""

    def __init__(self, processor: VLProcessor, limits: LengthLimits | None = None) -> None:
        """
        Args:
            processor: in training mode.
            limits: see data.lengths; none by default.
        """
        self.processor = processor
        self.limits = limits or LengthLimits()

    def drop_overlong(
        self, dataset: Dataset | None, num_proc: int | None = None
    ) -> tuple[Dataset | None, dict[str, int]]:
        """Leave out the rows whose prompt does not fit the limits (or raise, with --overlong error), and count.

        Returns:
            The rows that stay, and the counts of `LengthCounts` for log and run.json. Without limits no row is read.
        """
        if dataset is None or self.limits == LengthLimits(overlong=self.limits.overlong):
            return dataset, {}
        if isinstance(dataset, StreamedRows):
            return dataset.only(self._overlong), {}

        def count(row: Row, index: int) -> dict[str, int]:
            counts = LengthCounts()
            with self.processor.lengths_only():
                counted = self.fit(row, counts, where=row.get("where") or f"row {index}")
            return {"keep": int(counted)} | counts.as_dict()

        counts = dataset.map(
            count, with_indices=True, num_proc=num_proc, remove_columns=dataset.column_names, desc="Checking lengths"
        )
        keep = [i for i, kept in enumerate(counts["keep"]) if kept]
        if not keep:
            raise InputError("No row fits --max_length / --max_prompt_length: raise the limits (image tokens count).")
        totals = {name: sum(counts[name]) for name in LengthCounts().as_dict()}
        logger.warning("Lengths: %s", ", ".join(f"{name} {count}" for name, count in totals.items()))
        return dataset.select(keep), totals

    def _overlong(self, row: Row) -> str | None:
        """Why a row is left out. Raises InputError with --overlong error."""
        with self.processor.lengths_only():
            fits = self.fit(row, LengthCounts(), where=str(row.get("where")))
        return None if fits else "is longer than --max_length / --max_prompt_length, or its answers are equal once cut"

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        """Hook: whether the row's prompt fits the limits, counted in `counts`."""
        raise NotImplementedError

    def with_lengths(self, dataset: Dataset, column: str, num_proc: int | None = None) -> Dataset:
        """Add the number of tokens that each row takes in a batch, for `--train_sampling_strategy group_by_length`."""
        return dataset.add_column(column, self.lengths(dataset, num_proc))

    def lengths(self, dataset: Dataset, num_proc: int | None = None) -> list[int]:
        """Tokens that each row takes in a batch; of images the headers are read."""

        def count(row: Row) -> dict[str, int]:
            with self.processor.lengths_only():
                return {"length": self.length(row)}

        counted = dataset.map(
            count,
            num_proc=num_proc,
            remove_columns=dataset.column_names,
            load_from_cache_file=False,  # an image may have changed
            desc="Counting tokens",
        )
        return counted["length"][:]

    def length(self, row: Row) -> int:
        """Hook: tokens of a row as this collator lays it out."""
        raise NotImplementedError

    def encode_prompts(self, features: Sequence[Row]) -> tuple[list[list[int]], ImageInputs]:
        """Token ids of the rows' prompts, image tokens and generation prompt included, and their image inputs."""
        return self.processor.encode_conversations(
            [row["prompt"] for row in features], [media_of(row) for row in features]
        )

    @staticmethod
    def places(features: Sequence[Row]) -> list[str]:
        """Where each row comes from, for messages about a batch."""
        return [str(row.get("where") or f"row {b} of a batch") for b, row in enumerate(features)]

    @staticmethod
    def image_files(features: Sequence[Row]) -> list[str | BytesIO]:
        """All images of the batch in order, as PIL.Image.open takes them."""
        return [openable(image) for row in features for image in row["images"]]


class VLSFTDataCollatorWithPadding(VLDataCollator):
    """Conversations -> token ids, labels and images: `base.batch.SFTBatch`."""

    def __init__(self, processor: VLProcessor, limits: LengthLimits | None = None, train_on: str = "all") -> None:
        super().__init__(processor, limits)
        self.train_on = train_on

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        """Whether what stands before the last answer fits the limits."""
        ids, labels = self._encode([row])[:2]
        return self._fit(ids[0], labels[0], counts, where) is not None

    def length(self, row: Row) -> int:
        """Tokens of the conversation after the limits."""
        ids, labels = self._encode([row])[:2]
        return len(self._fit(ids[0], labels[0], LengthCounts(), "a row") or ids[0])

    def _encode(self, features: Sequence[Row]) -> tuple[list[list[int]], list[list[int]], ImageInputs]:
        return self.processor.encode_talks(
            [r["messages"] for r in features], [media_of(row) for row in features], self.train_on
        )

    def _fit(self, ids: list[int], labels: list[int], counts: LengthCounts, where: str) -> list[int] | None:
        """Tokens that stay of a conversation: only the last answer, if it is trained, can be shortened."""
        start = answer_start(labels)
        kept = fit_row(start, [ids[start:]], self.limits, counts, where)
        return ids[:start] + kept[0] if kept is not None else None

    def __call__(self, features: Sequence[Row]) -> SFTBatch:
        """Tokenise, shorten the last answers to the limits, pad."""
        processor = self.processor
        input_ids, labels, img_inputs = self._encode(features)
        for b, row in enumerate(features):
            kept = self._fit(input_ids[b], labels[b], LengthCounts(), row.get("where") or f"row {b} of a batch")
            if kept is None:
                raise InputError(
                    f"{row.get('where') or 'A row'} is longer than the limits: call drop_overlong on the data first."
                )
            trained = labels[b][: len(kept)]
            input_ids[b], labels[b] = kept, [IGNORE_INDEX] * len(kept) if row.get("repeated") else trained
        img_inputs = {
            k: [v[: len(ids)] for v, ids in zip(vs, input_ids, strict=True)] if k in processor.per_token_keys else vs
            for k, vs in img_inputs.items()
        }
        padded_labels = processor.pad(labels, IGNORE_INDEX)
        is_trained = (padded_labels != IGNORE_INDEX).flatten()
        attention_mask = processor.pad([[1] * len(i) for i in input_ids], 0)
        return {
            "input_ids": processor.pad(input_ids, processor.tokenizer.pad_token_id),
            "attention_mask": attention_mask,
            "layout": Layout(attention_mask - 1),
            "labels": padded_labels,
            # The first token of a row is never trained, so the position before a trained token is in the same row.
            "completion_index": is_trained.nonzero()[:, 0] - 1,
            "completion_ids": padded_labels.flatten()[is_trained],
            "img_path": self.image_files(features),
            "img_input_dict": processor.pad_img_inputs(img_inputs),
            "where": self.places(features),
        }


def _noise_last(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let the outermost `__call__` of a collator put the noise of `--corruption diffusion` on the pixels.

    A subclass may have made them anew.
    """

    @functools.wraps(call)
    def with_noise(self: "VLDPODataCollatorWithPadding", features: Sequence[Row]) -> Any:
        self._depth += 1
        try:
            batch = call(self, features)
        finally:
            self._depth -= 1
        if self._depth == 0 and self._to_diffuse is not None:
            batch["img_input_dict"] = self._diffused(batch["img_input_dict"], features, *self._to_diffuse)
            self._to_diffuse = None
        return batch

    return with_noise


class VLDPODataCollatorWithPadding(VLDataCollator):
    """Prompts with K ranked responses each -> packed rows, their pairs and images: `base.batch.DPOBatch`.

    Rows with one labelled answer each (data/rows.py) form no pairs: `answers`, `desirable` and `mismatched` stand in their place.

    What a loss needs beyond that (losses.NEEDS) is added to the same rows, or as further rows of the same forward pass
    (base/views.py), whose images go through the vision tower as well. `text_only` and `probe` are separate batches, for
    passes without gradient.
    """

    def __init__(
        self,
        processor: VLProcessor,
        limits: LengthLimits | None = None,
        share_prefix: bool = True,
        pairs: PairMode = "all",
        score_margin: float | None = None,
        needs: Collection[str] = (),
        columns: Collection[str] = (),
        corruption: Corruption | None = None,
        diffusion_step: int = 500,
        seed: int = 0,
    ) -> None:
        """
        Args:
            needs: keys of losses.NEEDS that the batch provides for.
            share_prefix: whether the responses of a prompt share one row.
            corruption: how v' is made; the draw depends on `seed`, epoch and row.
            diffusion_step: how noisy v' is with corruption "diffusion", of 1000.
            columns: columns of numbers that every row must have.
        """
        super().__init__(processor, limits)
        self.share_prefix = share_prefix
        self.pairs = pairs
        self.score_margin = score_margin
        self.needs = frozenset(needs)
        self.columns = frozenset(columns)
        self.corruption = corruption
        self.diffusion_step = diffusion_step
        self.seed = seed
        self.epoch = 0  # the trainer sets it, so that every epoch draws anew
        # The policy's tokens will replace those of some responses, which therefore share nothing.
        self._share_beginnings = "policy_negative" not in self.needs

    # Of the batch in the making: `__call__`s that run inside each other; its rows, and those with noise
    _depth = 0
    _to_diffuse: tuple[Sequence[Row], View] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _noise_last(cls.__call__)  # type: ignore[method-assign]

    @_noise_last
    def __call__(self, features: Sequence[Row]) -> DPOBatch:
        """Lay out rows and pairs, and what the losses need beyond them."""
        self._to_diffuse = None
        if "ranks" not in features[0]:
            return self._unpaired(features)
        self._check_columns(features)
        pairs = [
            [] if row.get("repeated") else ordered_pairs(row["ranks"], row.get("scores"), self.pairs, self.score_margin)
            for row in features
        ]
        better = [views.better_responses(row) for row in pairs]
        rows = self._with_negatives(features, better)
        corrupted, image_rejected = self._corrupted_rows(features, pairs), self._image_rejected_rows(features, better)
        batch = DPOBatch(**self.encode_rows([*rows, *corrupted.rows, *image_rejected.rows]))

        self._check_different(features, batch)
        places = Places(rows, len(batch["completion_ids"]))
        batch["chosen"] = places.of([[k for k, _ in row] for row in pairs])
        batch["rejected"] = places.of([[k for _, k in row] for row in pairs])
        batch["where"] = self.places(features)
        self._add_columns(batch, features, pairs, places)
        if corrupted.rows:
            copies = range(places.end, places.end + len(corrupted))
            batch["corrupted_of"] = places.repeats(corrupted.repeated, copies)
            if self.corruption == "diffusion":
                self._to_diffuse = rows, corrupted
        if image_rejected.rows:  # the last rows of the batch
            copies = range(places.num_responses - len(image_rejected), places.num_responses)
            batch["image_rejected_of"] = places.repeats(image_rejected.repeated, copies)
        if "policy_negative" in self.needs:
            behind = [
                range(len(row["responses"]), len(row["responses"]) + len(better[b])) for b, row in enumerate(features)
            ]
            batch["negative_of"] = places.repeats(better, places.of(behind))
            batch["probe"] = self._probe(features, better)
        if "text_only" in self.needs:
            remove = self.processor.remove_image_placeholder
            batch["text_only"] = self.encode_rows([views.without_images(row, remove) for row in features])
        if "changed_tokens" in self.needs:
            batch["chosen_changed"], batch["rejected_changed"] = self._changed(batch)
        return batch

    def _unpaired(self, features: Sequence[Row]) -> DPOBatch:
        """Rows with one labelled answer each, and where a loss needs it the answer of another row to the same prompt."""
        rows = views.with_mismatched(features) if "mismatched" in self.needs else features
        batch = DPOBatch(**self.encode_rows(rows))
        places = Places(rows, len(batch["completion_ids"]))
        counted = [not row.get("repeated") for row in features]
        batch["answers"] = places.of([[0] * count for count in counted])
        batch["desirable"] = torch.tensor([row["label"] for row in features])[counted]
        others = [range(1, len(row["responses"]) if count else 1) for row, count in zip(rows, counted, strict=True)]
        batch["mismatched"] = places.of(others)
        batch["where"] = self.places(features)
        if all(row.get("reference_logps") is not None for row in features):
            batch["reference_logps"] = self._reference(features, batch)
        return batch

    def _add_columns(self, batch: DPOBatch, features: Sequence[Row], pairs: Sequence[Pairs], places: Places) -> None:
        """Fill the fields that stand in the data, where every row has them."""

        def of_responses(column: str) -> torch.Tensor:
            values = torch.full((places.num_responses,), float("nan"))
            given = [float(value) for row in features for value in row[column]]
            values[places.of([range(len(row[column])) for row in features])] = torch.tensor(given)
            return values

        for column, of in NUMBER_COLUMNS.items():
            if any(row.get(column) is None for row in features):
                continue
            if of == "row":  # given to each of its pairs
                of_pair = [
                    float(row[column]) for row, row_pairs in zip(features, pairs, strict=True) for _ in row_pairs
                ]
                batch[column] = torch.tensor(of_pair)  # type: ignore[literal-required]
            elif not any(None in row[column] for row in features):
                batch[column] = of_responses(column)  # type: ignore[literal-required]
        for column in sorted(self.columns - NUMBER_COLUMNS.keys()):
            if self._of_responses(column, features):
                batch.setdefault("own_of_response", {})[column] = of_responses(column)
            else:
                of_pair = [float(row[column]) for row, own in zip(features, pairs, strict=True) for _ in own]
                batch.setdefault("own_of_row", {})[column] = torch.tensor(of_pair)
        if all(row.get("reference_logps") is not None for row in features):
            batch["reference_logps"] = self._reference(features, batch)

    def _reference(self, features: Sequence[Row], batch: DPOBatch) -> torch.Tensor:
        """The cached log-probs of the reference (base/reference_cache.py), (R, T), zero where padded."""
        mask = batch["completion_mask"]
        reference = torch.zeros(mask.shape)
        row_of = batch["rows"] % len(features)  # further rows repeat the batch's rows in order
        for b, row in enumerate(features):
            if row.get(IMAGE_STATES) is not None and row[IMAGE_STATES] != image_states(row):
                raise InputError(
                    f"{row.get('where') or 'A row'}: its image has changed since the reference saw it: start the run again, which asks the "
                    "reference about the new one, or put the old file back."
                )
            reference[mask & (row_of == b)[:, None]] = torch.tensor(row["reference_logps"])
        return reference

    # -- what some losses need beyond the pairs (base/views.py) --------------------------------------------------------

    def _check_columns(self, features: Sequence[Row]) -> None:
        for column in sorted(self.columns | (self.needs & {"image_rejected"})):
            for row in features:
                if not row.get(column) and row.get(column) != 0:
                    where = row.get("where") or "A row"
                    raise InputError(f"{where} has no {column}, which the loss reads: add it to the row.")

    @staticmethod
    def _of_responses(column: str, features: Sequence[Row]) -> bool:
        """Whether a column of the user's own holds a number per response; else it holds one per row. Raises InputError."""
        of_responses = isinstance(features[0][column], list)
        for row in features:
            values = row[column] if isinstance(row[column], list) else [row[column]]
            right = isinstance(row[column], list) == of_responses and all(isinstance(v, int | float) for v in values)
            if not right or (of_responses and len(values) != len(row["responses"])):
                raise InputError(
                    f"{row.get('where') or 'A row'} has the {column} {row[column]!r}, which the loss reads: it is one number in "
                    "every row, or a list with one number per response in every row."
                )
        return of_responses

    @staticmethod
    def _check_different(features: Sequence[Row], batch: DPOBatch) -> None:
        """Raise InputError for a row whose texts differ and whose tokens do not: there is nothing to prefer."""
        ids = [
            tuple(row[keep].tolist())
            for row, keep in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        ]
        for b, row in enumerate(features):
            own = [tokens for tokens, r in zip(ids, batch["rows"].tolist(), strict=True) if r == b]
            if len(own) > 1 and len(set(own)) == 1:
                raise InputError(
                    f"{row.get('where') or 'A row'}: its {len(own)} responses are the same tokens, although their texts "
                    "differ: leave the row out, or raise the limit that cuts them."
                )

    def _with_negatives(self, features: Sequence[Row], better: Sequence[Sequence[int]]) -> Sequence[Row]:
        """The rows with copies of the chosen responses at their end; the trainer puts the policy's tokens there."""
        if "policy_negative" not in self.needs:
            return features
        return [views.with_copies(row, responses) for row, responses in zip(features, better, strict=True)]

    def _corrupted_rows(self, features: Sequence[Row], pairs: Sequence[Pairs]) -> View:
        """The rows on v', empty if no loss needs them; `logit_shift` reads the rejected responses, too."""
        if not self.needs & {"corrupted_image", "corrupted_image_per_token", "logit_shift"}:
            return View()
        read = views.paired_responses if "logit_shift" in self.needs else views.better_responses
        return self._corrupted(features, [read(row) for row in pairs])

    def _image_rejected_rows(self, features: Sequence[Row], better: Sequence[Sequence[int]]) -> View:
        return views.image_rejected_view(features, better) if "image_rejected" in self.needs else View()

    def _corrupted(self, features: Sequence[Row], repeated: Sequence[Sequence[int]]) -> View:
        return views.corrupted_view(features, repeated, self.corruption, [self._draw(row) for row in features])

    def _draw(self, *rows: Row) -> int:
        return stable_seed(self.seed, self.epoch, [(row["prompt"], row["responses"]) for row in rows])

    def _diffused(
        self, img_inputs: ImageInputs, features: Sequence[Row], rows: Sequence[Row], corrupted: View
    ) -> ImageInputs:
        """Noise on the pixels of the corrupted rows, which lie behind those of `rows`."""
        pixels = img_inputs.get("pixel_values")
        if pixels is None:
            return img_inputs
        if self.share_prefix and "image_rejected" not in self.needs:  # both parts have the same number of equal images
            first, last = len(pixels) // 2, len(pixels)
        else:  # the parts differ in size: count theirs
            first = len(self.responses_only(rows)["img_input_dict"]["pixel_values"])
            last = first + len(self.responses_only(corrupted.rows)["img_input_dict"]["pixel_values"])
        noisy = diffuse(pixels[first:last], self.diffusion_step, self._draw(*features))
        return img_inputs | {"pixel_values": torch.cat([pixels[:first], noisy, pixels[last:]])}

    def _probe(self, features: Sequence[Row], better: Sequence[Sequence[int]]) -> ResponseBatch:
        """The chosen responses on v', from which the policy's tokens are read."""
        probe = self.responses_only(self._corrupted(features, better).rows)
        pixels = probe["img_input_dict"].get("pixel_values")
        if self.corruption == "diffusion" and pixels is not None:
            probe["img_input_dict"]["pixel_values"] = diffuse(pixels, self.diffusion_step, self._draw(*features))
        return probe

    @staticmethod
    def _changed(batch: DPOBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The segments in which the two answers of a pair differ: chosen, rejected (M, T) bool."""
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        flags = torch.zeros((2, len(batch["chosen"]), ids.shape[1]), dtype=torch.bool)
        for m, (c, r) in enumerate(zip(batch["chosen"], batch["rejected"], strict=True)):
            for side, changed in enumerate(changed_tokens(ids[c][mask[c]].tolist(), ids[r][mask[r]].tolist())):
                flags[side, m, : len(changed)] = torch.tensor(changed)
        return flags[0], flags[1]

    # -- rows ----------------------------------------------------------------------------------------------------------

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        """Whether the prompt fits the limits and the responses still differ within them."""
        return self._fit(self.encode_prompts([row])[0][0], row, counts, where) is not None

    def length(self, row: Row) -> int:
        """Of the packed row; without a shared prefix, of all its responses' rows together."""
        batch = self.encode_rows([row])
        return int((batch["segment_ids"] >= 0).sum())

    def _fit(self, prompt: list[int], row: Row, counts: LengthCounts, where: str) -> list[list[int]] | None:
        return fit_row(len(prompt), self._responses(row), self.limits, counts, row.get("where") or where)

    def _responses(self, row: Row) -> list[list[int]]:
        return self.processor.encode_responses(row["prompt"], row["responses"], media_of(row), _ended(row))

    def responses_only(self, features: Sequence[Row]) -> ResponseBatch:
        """Rows whose responses form no pairs, through `__call__`: with the image inputs that a subclass makes."""
        plain = copy.copy(self)
        plain.needs, plain.columns, plain._depth, plain._to_diffuse = frozenset(), frozenset(), 0, None
        unpaired = dict.fromkeys([*NUMBER_COLUMNS, "reference_logps"]) | {"repeated": True}
        batch = plain([row | unpaired | {"ranks": [0.0] * len(row["responses"])} for row in features])
        kept = {key: value for key, value in batch.items() if key not in ("chosen", "rejected", "source", "counted")}
        return ResponseBatch(**kept)  # type: ignore[typeddict-item]

    def encode_rows(self, features: Sequence[Row]) -> ResponseBatch:
        """Tokenise and lay out prompts with their responses; the part of the batch that RM and PPO share."""
        processor = self.processor
        rows = torch.tensor([b for b, row in enumerate(features) for _ in row["responses"]])
        if not self.share_prefix:
            features = [
                row | {"responses": [response], "responses_ended": [ended]}
                for row in features
                for response, ended in zip(row["responses"], _ended(row), strict=True)
            ]
        prompts, img_inputs = self.encode_prompts(features)
        responses = []
        for prompt, row in zip(prompts, features, strict=True):
            # One by one: a view may hold equal responses of a row that has others.
            fitted = [fit(len(prompt), [response], self.limits) for response in self._responses(row)]
            if reason := next((f.reason for f in fitted if f.responses is None), None):
                raise InputError(f"{row.get('where') or 'A row'}: {reason}; or call drop_overlong on the data first.")
            responses.append([ids for f in fitted for ids in f.responses or ()])
        shared = [common_beginning(row) if self._share_beginnings else 0 for row in responses]
        sources = [
            [*range(len(prompt)), *[-1] * (packed_length(prompt, row, n) - len(prompt))]
            for prompt, row, n in zip(prompts, responses, shared, strict=True)
        ]
        return {
            **pack_rows(prompts, responses, processor.tokenizer.pad_token_id, shared),
            "rows": rows,
            "img_path": self.image_files(features),
            "img_input_dict": processor.pad_img_inputs(processor.follow_tokens(img_inputs, sources)),
        }


def _ended(row: Row) -> Sequence[bool]:
    """Whether each response ends; sampled ones may be cut off (base/reward.py), those of data sets are whole."""
    return row.get("responses_ended") or [True] * len(row["responses"])


class VLRMDataCollatorWithPadding(VLDPODataCollatorWithPadding):
    """DPO's batch, because a reward model ranks the responses that DPO pairs, with `source`: `base.batch.RMBatch`."""

    def __call__(self, features: Sequence[Row]) -> RMBatch:
        """The DPO batch, with each row's `source`."""
        counted = torch.tensor([not row.get("repeated") for row in features])
        batch = RMBatch(**super().__call__(features), source=[row.get("source") for row in features])
        batch["counted"] = counted[batch["rows"]]
        return batch


class VLPPODataCollator(VLDataCollator):
    """Prompts -> token ids and images: `base.batch.PPOBatch`. The trainer samples responses and calls `pack`."""

    def __init__(self, processor: VLProcessor, limits: LengthLimits | None = None, share_prefix: bool = True) -> None:
        super().__init__(processor, limits)
        self.share_prefix = share_prefix

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        """Whether the prompt fits the limits."""
        prompt = self.encode_prompts([row])[0][0]
        return fit_row(len(prompt), [], self.limits, counts, row.get("where") or where) is not None

    def length(self, row: Row) -> int:
        """Tokens of the prompt."""
        return len(self.encode_prompts([row])[0][0])

    def __call__(self, features: Sequence[Row]) -> PPOBatch:
        """Tokenise prompts and prepare their images."""
        prompts, img_inputs = self.encode_prompts(features)
        return {
            "rows": list(features),
            "where": self.places(features),
            "prompts": prompts,
            "img_input_dict": img_inputs,
            "img_path": self.image_files(features),
        }

    def per_token(self, img_inputs: ImageInputs) -> dict[str, list[Any]]:
        """The image inputs that have one entry per token."""
        return {k: v for k, v in img_inputs.items() if k in self.processor.per_token_keys}

    def pad_for_generation(self, prompts: Sequence[Sequence[int]], per_token: dict[str, list[Any]]) -> dict[str, Any]:
        """Left-padded input_ids, attention_mask (B, L) and per-token image inputs."""
        self.processor.infer()
        try:
            return {
                "input_ids": self.processor.pad(prompts, self.processor.tokenizer.pad_token_id),
                "attention_mask": self.processor.pad([[1] * len(p) for p in prompts], 0),
                **self.processor.pad_img_inputs(per_token),
            }
        finally:
            self.processor.train()

    def pack(
        self, prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]], per_token: dict[str, list[Any]]
    ) -> ResponseBatch:
        """Lay out prompts with the token ids of their K responses as DPO's rows.

        The batch has no `rows` and no `img_path`, and its `img_input_dict` holds per-token entries only.

        Without a shared prefix every response gets a separate row, the first response of all prompts first.
        """
        if not self.share_prefix:
            K, B = len(responses[0]), len(prompts)
            responses = [[responses[b][k]] for k in range(K) for b in range(B)]
            prompts = [*prompts] * K
            per_token = {key: [*values] * K for key, values in per_token.items()}
        sources = [
            [*range(len(prompt)), *[-1] * sum(map(len, row))] for prompt, row in zip(prompts, responses, strict=True)
        ]
        return {
            **pack_rows(prompts, responses, self.processor.tokenizer.pad_token_id),
            "img_input_dict": self.processor.pad_img_inputs(self.processor.follow_tokens(per_token, sources)),
        }
