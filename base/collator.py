"""Rows -> batches. Images are decoded and tokenised here, that is, in data-loader workers.

A family overrides a collator only where its image inputs need more than its processor gives:

    class LlavaDPODataCollatorWithPadding(VLDPODataCollatorWithPadding):
        def __call__(self, features):
            padded_batch = super().__call__(features)
            padded_batch["img_input_dict"] = dict(pixel_values=...)  # from padded_batch["img_path"], one image after the other
            return padded_batch
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset

from base.errors import InputError
from base.packing import pack_rows
from base.processor import IGNORE_INDEX, VLProcessor, image_file
from data.lengths import LengthCounts, LengthLimits, fit_row
from data.pairs import ordered_pairs

Row = dict[str, Any]


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

    def drop_overlong(self, dataset: Dataset, num_proc: int | None = None) -> tuple[Dataset, dict[str, int]]:
        """Leave out the rows whose prompt does not fit the limits (or raise, with --overlong error), and count.

        Returns:
            The rows that stay, and the counts of `LengthCounts` for the log and run.json. Without limits nothing is read.
        """
        if self.limits == LengthLimits(overlong=self.limits.overlong):
            return dataset, {}

        def count(row: Row, index: int) -> dict[str, int]:
            counts = LengthCounts()
            counted = self.fit(row, counts, where=row.get("where") or f"row {index}")
            return {"keep": int(counted)} | counts.as_dict()

        counts = dataset.map(
            count, with_indices=True, num_proc=num_proc, remove_columns=dataset.column_names, desc="Checking lengths"
        )
        keep = [i for i, kept in enumerate(counts["keep"]) if kept]
        if not keep:
            raise InputError("No row fits --max_length / --max_prompt_length: raise the limits (image tokens count).")
        return dataset.select(keep), {name: sum(counts[name]) for name in LengthCounts().as_dict()}

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        """Hook: whether the row's prompt fits the limits, counted in `counts`."""
        raise NotImplementedError

    @staticmethod
    def image_files(features: Sequence[Row]) -> list[Any]:
        """All images of the batch in order, as PIL.Image.open accepts them."""
        return [image_file(image) for row in features for image in row["images"]]


class VLSFTDataCollatorWithPadding(VLDataCollator):
    """Conversations -> input_ids, attention_mask, labels (B, L); completion_index, completion_ids (N,) of the trained tokens; images."""

    def __init__(self, processor: VLProcessor, limits: LengthLimits | None = None, train_on: str = "all") -> None:
        super().__init__(processor, limits)
        self.train_on = train_on

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        ids, labels = self._encode([row])[:2]
        return self._fit(ids[0], labels[0], counts, where) is not None

    def _encode(self, features: Sequence[Row]) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
        encoded = self.processor.process_batch_conv(
            [r["messages"] for r in features], [r["images"] for r in features], self.train_on
        )
        return encoded["input_ids"], encoded["labels"], encoded["img_input_dict"]

    def _fit(self, ids: list[int], labels: list[int], counts: LengthCounts, where: str) -> list[int] | None:
        """Tokens that stay of a conversation: only the last answer, if it is trained, can be shortened."""
        start = next(
            i
            for i in range(len(labels) - 1, -1, -1)
            if i == 0 or (labels[i - 1] == IGNORE_INDEX and labels[i] != IGNORE_INDEX)
        )
        kept = fit_row(start, [ids[start:]], self.limits, counts, where)
        return ids[:start] + kept[0] if kept is not None else None

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        processor = self.processor
        input_ids, labels, img_inputs = self._encode(features)
        for b, row in enumerate(features):
            kept = self._fit(input_ids[b], labels[b], LengthCounts(), row.get("where") or f"row {b} of a batch")
            if kept is None:
                raise InputError(
                    f"{row.get('where') or 'A row'} is longer than the limits: call drop_overlong on the data first."
                )
            input_ids[b], labels[b] = kept, labels[b][: len(kept)]
        img_inputs = {
            k: [v[: len(ids)] for v, ids in zip(vs, input_ids, strict=True)] if k in processor.per_token_keys else vs
            for k, vs in img_inputs.items()
        }
        labels = processor.pad(labels, IGNORE_INDEX)
        trained = (labels != IGNORE_INDEX).flatten()
        return {
            "input_ids": processor.pad(input_ids, processor.tokenizer.pad_token_id),
            "attention_mask": processor.pad([[1] * len(i) for i in input_ids], 0),
            "labels": labels,
            # The first token of a row is never trained, so the position before a trained token is in the same row.
            "completion_index": trained.nonzero()[:, 0] - 1,
            "completion_ids": labels.flatten()[trained],
            "img_path": self.image_files(features),
            "img_input_dict": processor.pad_img_inputs(img_inputs),
        }


class VLDPODataCollatorWithPadding(VLDataCollator):
    """Prompts with K ranked responses each -> the packed rows of base/packing.py, their pairs, and images.

    The batch: what `packing.pack_rows` returns; chosen, rejected (M,) long: the pairs, as response indices 0..R-1; `packed`: whether responses share
    rows; img_path, img_input_dict; `rows`: (R,) long, the dataset row in the batch of every response; columns that losses ask for, (M,) or (R,).
    """

    def __init__(
        self,
        processor: VLProcessor,
        limits: LengthLimits | None = None,
        share_prefix: bool = True,
        pairs: str = "all",
        score_margin: float | None = None,
    ) -> None:
        super().__init__(processor, limits)
        self.share_prefix = share_prefix
        self.pairs = pairs
        self.score_margin = score_margin

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        chosen, rejected, pair_rows, first = [], [], [], 0
        for b, row in enumerate(features):
            for better, worse in ordered_pairs(row["ranks"], row.get("scores"), self.pairs, self.score_margin):
                chosen.append(first + better)
                rejected.append(first + worse)
                pair_rows.append(b)
            first += len(row["responses"])
        batch = self.encode_rows(features)
        batch |= {
            "chosen": torch.tensor(chosen, dtype=torch.long),
            "rejected": torch.tensor(rejected, dtype=torch.long),
        }
        for column in ("margin",):  # one number per row, given to each of its pairs
            if all(row.get(column) is not None for row in features):
                batch[column] = torch.tensor([float(features[b][column]) for b in pair_rows])
        for column in ("scores", "severity"):  # one number per response
            if all(row.get(column) is not None and None not in row[column] for row in features):
                batch[column] = torch.tensor([float(value) for row in features for value in row[column]])
        return batch

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        text = self.processor.render(row["prompt"], add_generation_prompt=True, images=len(row["images"]))
        return self._fit(self.processor.encode_prompts([text], [row["images"]])[0][0], row, counts, where) is not None

    def _fit(self, prompt: list[int], row: Row, counts: LengthCounts, where: str) -> list[list[int]] | None:
        responses = [self.processor.encode_response(r) for r in row["responses"]]
        return fit_row(len(prompt), responses, self.limits, counts, row.get("where") or where)

    def encode_rows(self, features: Sequence[Row]) -> dict[str, Any]:
        """Tokenise and lay out prompts with their responses; the part of the batch that RM and PPO share."""
        processor = self.processor
        rows = torch.tensor([b for b, row in enumerate(features) for _ in row["responses"]])
        if not self.share_prefix:
            features = [row | {"responses": [response]} for row in features for response in row["responses"]]
        texts = [processor.render(r["prompt"], add_generation_prompt=True, images=len(r["images"])) for r in features]
        prompts, img_inputs = processor.encode_prompts(texts, [r["images"] for r in features])
        responses = [
            self._fit(prompt, row, LengthCounts(), "a row of the batch")
            for prompt, row in zip(prompts, features, strict=True)
        ]
        if None in responses:
            raise InputError("A prompt is longer than the limits: call drop_overlong on the data first.")
        sources = [
            [*range(len(prompt)), *[-1] * sum(map(len, row))] for prompt, row in zip(prompts, responses, strict=True)
        ]
        return {
            **pack_rows(prompts, responses, processor.tokenizer.pad_token_id),
            "packed": any(len(row) > 1 for row in responses),
            "rows": rows,
            "img_path": self.image_files(features),
            "img_input_dict": processor.pad_img_inputs(processor.follow_tokens(img_inputs, sources)),
        }


class VLRMDataCollatorWithPadding(VLDPODataCollatorWithPadding):
    """The same batch, because a reward model ranks the responses that DPO pairs; and `source`, the data set of every row."""

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        return super().__call__(features) | {"source": [row.get("source") for row in features]}
