"""Rows -> batches. Images are decoded and tokenised here, that is, in data-loader workers.

A family overrides a collator only where its image inputs need more than its processor gives:

    class LlavaDPODataCollatorWithPadding(VLDPODataCollatorWithPadding):
        def __call__(self, features):
            padded_batch = super().__call__(features)
            padded_batch["img_input_dict"] = dict(pixel_values=...)  # from padded_batch["img_path"], one image after the other
            return padded_batch
"""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from base.corruption import Corruption, corrupt_picture, diffuse
from base.images import image_file, load_image
from base.packing import common_beginning, pack_rows, packed_length
from base.processor import IGNORE_INDEX, VLProcessor
from common.errors import InputError
from common.seeds import stable_seed
from data.lengths import LengthCounts, LengthLimits, fit_row
from data.pairs import ordered_pairs
from losses import changed_tokens

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Pairs = list[tuple[int, int]]  # (better, worse) response indices of a row


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
            The rows that stay, and the counts of `LengthCounts` for the log and run.json. Without limits nothing is read.
        """
        if dataset is None or self.limits == LengthLimits(overlong=self.limits.overlong):
            return dataset, {}

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

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        """Hook: whether the row's prompt fits the limits, counted in `counts`."""
        raise NotImplementedError

    def with_lengths(self, dataset: Dataset, column: str, num_proc: int | None = None) -> Dataset:
        """Add the tokens that each row takes in a batch, image tokens included, for `--train_sampling_strategy group_by_length`."""

        def count(row: Row) -> dict[str, int]:
            with self.processor.lengths_only():
                return {column: self.length(row)}

        lengths = dataset.map(
            count,
            num_proc=num_proc,
            remove_columns=dataset.column_names,
            load_from_cache_file=False,  # an image may have changed
            desc="Counting tokens",
        )
        return dataset.add_column(column, lengths[column][:])

    def length(self, row: Row) -> int:
        """Hook: tokens of a row as this collator lays it out."""
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

    def length(self, row: Row) -> int:
        ids, labels = self._encode([row])[:2]
        return len(self._fit(ids[0], labels[0], LengthCounts(), "a row") or ids[0])

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

    What a loss needs beyond that (losses.NEEDS) is added to the same rows, or as further rows of the same forward pass, each with one image pass:
    `corrupted_of`, `image_rejected_of`, `negative_of` (R,) give the response that repeats a response on v', on the row's second image, or that stands
    ready for the policy's own tokens; -1 where there is none. `text_only` and `probe` are batches of their own, for passes without gradient.
    """

    def __init__(
        self,
        processor: VLProcessor,
        limits: LengthLimits | None = None,
        share_prefix: bool = True,
        pairs: str = "all",
        score_margin: float | None = None,
        needs: Collection[str] = (),
        corruption: Corruption | None = None,
        diffusion_step: int = 500,
        seed: int = 0,
    ) -> None:
        """
        Args:
            needs: keys of losses.NEEDS that the batch provides for.
            corruption: how v' is made; `diffusion_step` of 1000 is how noisy. With `seed`, the epoch and the row it gives the draw.
        """
        super().__init__(processor, limits)
        self.share_prefix = share_prefix
        self.pairs = pairs
        self.score_margin = score_margin
        self.needs = frozenset(needs)
        self.corruption = corruption
        self.diffusion_step = diffusion_step
        self.seed = seed
        self.epoch = 0  # the trainer sets it, so that every epoch draws anew

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        self._check_columns(features)
        pairs = [ordered_pairs(r["ranks"], r.get("scores"), self.pairs, self.score_margin) for r in features]
        rows, negatives = self._with_negatives(features, pairs)
        starts = np.cumsum([0, *(len(row["responses"]) for row in rows)])
        chosen = [starts[b] + better for b, row in enumerate(pairs) for better, _ in row]
        rejected = [starts[b] + worse for b, row in enumerate(pairs) for _, worse in row]
        views = self._views(features, pairs)
        batch = self.encode_rows([*rows, *(row for view, _ in views.values() for row in view)])
        batch |= {
            "chosen": torch.tensor(chosen, dtype=torch.long),
            "rejected": torch.tensor(rejected, dtype=torch.long),
        }

        # Which response of the batch repeats which
        R, next_response = len(batch["completion_ids"]), int(starts[-1])
        for name, (_, kept) in views.items():
            index = torch.full((R,), -1)
            for b, responses in enumerate(kept):
                for k in responses:
                    index[starts[b] + k] = next_response
                    next_response += 1
            batch[f"{name}_of"] = index
        if "policy_negative" in self.needs:
            batch["negative_of"] = torch.full((R,), -1)
            for b, row_negatives in enumerate(negatives):
                for k, negative in row_negatives.items():
                    batch["negative_of"][starts[b] + k] = starts[b] + negative

        if "corrupted" in views and self.corruption == "diffusion":
            batch["img_input_dict"] = self._diffused(batch["img_input_dict"], features, rows, views)
        if "policy_negative" in self.needs:
            batch["probe"] = self._probe(features, pairs)
        if "text_only" in self.needs:
            batch["text_only"] = self.encode_rows([self._without_images(row) for row in features])
        if "changed_tokens" in self.needs:
            batch |= self._changed(batch)

        if all(row.get("reference_logps") is not None for row in features):
            batch["reference_logps"] = self._reference(features, batch)
        per_row = [b for b, row in enumerate(pairs) for _ in row]
        if all(row.get("margin") is not None for row in features):  # one number per row, given to each of its pairs
            batch["margin"] = torch.tensor([float(features[b]["margin"]) for b in per_row])
        for column in ("scores", "severity"):  # one number per response
            if all(row.get(column) is not None and None not in row[column] for row in features):
                values = torch.full((R,), float("nan"))
                for b, row in enumerate(features):
                    values[starts[b] : starts[b] + len(row[column])] = torch.tensor([float(v) for v in row[column]])
                batch[column] = values
        return batch

    def _reference(self, features: Sequence[Row], batch: dict[str, Any]) -> torch.Tensor:
        """The cached log-probs of the reference (base/reference_cache.py), (R, T), zero where padded."""
        mask = batch["completion_mask"]
        reference = torch.zeros(mask.shape)
        row_of = batch["rows"] % len(features)  # further rows repeat the batch's rows in order
        for b, row in enumerate(features):
            own = mask & (row_of == b)[:, None]
            reference[own] = torch.tensor(row["reference_logps"])
        return reference

    # -- what some losses need beyond the pairs ---------------------------------------------------------------------------

    def _check_columns(self, features: Sequence[Row]) -> None:
        for column in ("severity", "margin", "image_rejected"):
            for row in features if column in self.needs else ():
                if not row.get(column) and row.get(column) != 0:
                    raise InputError(
                        f"{row.get('where') or 'A row'} has no {column}, which the loss reads: add it to the row."
                    )

    def _views(self, features: Sequence[Row], pairs: Sequence[Pairs]) -> dict[str, tuple[list[Row], list[list[int]]]]:
        """Further rows: name -> (rows with another image, which responses of each original row they repeat)."""
        views = {}
        if self.needs & {"corrupted_image", "corrupted_image_per_token", "logit_shift"}:
            kept = [
                sorted({k for pair in row for k in (pair if "logit_shift" in self.needs else pair[:1])} or {0})
                for row in pairs
            ]
            views["corrupted"] = (self._corrupted(features, kept), kept)
        if "image_rejected" in self.needs:
            kept = [sorted({better for better, _ in row} or {0}) for row in pairs]
            rows = []
            for row, responses in zip(features, kept, strict=True):
                images = [row["image_rejected"], *row["images"][1:]]
                rows.append(row | {"images": images, "responses": [row["responses"][k] for k in responses]})
            views["image_rejected"] = (rows, kept)
        return views

    def _corrupted(self, features: Sequence[Row], kept: Sequence[Sequence[int]]) -> list[Row]:
        """The rows with v' in the place of their images, and only the responses `kept`."""
        if self.corruption == "swap" and len(features) < 2:
            raise InputError("--corruption swap takes another row's image: use batches of two rows or more.")
        pictures = [[load_image(image) for image in row["images"]] for row in features]
        rows = []
        for b, row in enumerate(features):
            rng = np.random.default_rng(self._draw(row))
            own = [corrupt_picture(picture, self.corruption, rng) for picture in pictures[b]]
            if self.corruption == "swap":
                others = next(
                    (
                        pictures[(b + n) % len(features)]
                        for n in range(1, len(features))
                        if pictures[(b + n) % len(features)]
                    ),
                    own,
                )
                own = [others[i % len(others)].resize(picture.size) for i, picture in enumerate(own)]
            rows.append(row | {"images": own, "responses": [row["responses"][k] for k in kept[b]]})
        return rows

    def _draw(self, *rows: Row) -> int:
        return stable_seed(self.seed, self.epoch, [(row["prompt"], row["responses"]) for row in rows])

    def _diffused(
        self, img_inputs: dict[str, Any], features: Sequence[Row], rows: Sequence[Row], views: dict[str, Any]
    ) -> dict[str, Any]:
        """Noise on the pixels of the corrupted view, which lie behind those of the original rows."""
        if "pixel_values" not in img_inputs:
            return img_inputs
        pixels = img_inputs["pixel_values"]
        if self.share_prefix and len(views) == 1:
            first, last = len(pixels) // 2, len(pixels)
        else:  # the other parts differ in size: count theirs
            first = len(self.encode_rows(rows)["img_input_dict"]["pixel_values"])
            last = first + len(self.encode_rows(views["corrupted"][0])["img_input_dict"]["pixel_values"])
        noisy = diffuse(pixels[first:last], self.diffusion_step, self._draw(*features))
        return img_inputs | {"pixel_values": torch.cat([pixels[:first], noisy, pixels[last:]])}

    def _with_negatives(
        self, features: Sequence[Row], pairs: Sequence[Pairs]
    ) -> tuple[list[Row], list[dict[int, int]]]:
        """The rows with a copy of each chosen response at their end, and for each row {response: its copy}.

        The trainer puts the policy's own tokens into the copies.
        """
        if "policy_negative" not in self.needs:
            return list(features), [{} for _ in features]
        rows, copies = [], []
        for row, row_pairs in zip(features, pairs, strict=True):
            better = sorted({better for better, _ in row_pairs})
            K = len(row["responses"])
            rows.append(row | {"responses": [*row["responses"], *(row["responses"][k] for k in better)]})
            copies.append({k: K + n for n, k in enumerate(better)})
        return rows, copies

    def _probe(self, features: Sequence[Row], pairs: Sequence[Pairs]) -> dict[str, Any]:
        """The chosen responses on v', from which the policy's own tokens are read."""
        kept = [sorted({better for better, _ in row} or {0}) for row in pairs]
        probe = self.encode_rows(self._corrupted(features, kept))
        pixels = probe["img_input_dict"].get("pixel_values")
        if self.corruption == "diffusion" and pixels is not None:
            probe["img_input_dict"]["pixel_values"] = diffuse(pixels, self.diffusion_step, self._draw(*features))
        return probe

    def _without_images(self, row: Row) -> Row:
        remove = self.processor.remove_image_placeholder
        prompt = []
        for message in row["prompt"]:
            content = message["content"]
            if isinstance(content, str):
                content = remove(content).strip("\n")
            else:
                content = [part for part in content if part["type"] != "image"]
            prompt.append({"role": message["role"], "content": content})
        return row | {"images": [], "prompt": prompt}

    def _changed(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """chosen_changed, rejected_changed (M, T) bool: the segments in which the two answers of a pair differ."""
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        flags = torch.zeros((2, len(batch["chosen"]), ids.shape[1]), dtype=torch.bool)
        for m, (c, r) in enumerate(zip(batch["chosen"], batch["rejected"], strict=True)):
            for side, changed in enumerate(changed_tokens(ids[c][mask[c]].tolist(), ids[r][mask[r]].tolist())):
                flags[side, m, : len(changed)] = torch.tensor(changed)
        return {"chosen_changed": flags[0], "rejected_changed": flags[1]}

    # -----------------------------------------------------------------------------------------------------------------------

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        text = self.processor.render(row["prompt"], add_generation_prompt=True, images=len(row["images"]))
        return self._fit(self.processor.encode_prompts([text], [row["images"]])[0][0], row, counts, where) is not None

    def length(self, row: Row) -> int:
        """Of the packed row; without a shared prefix, of all its responses' rows together."""
        batch = self.encode_rows([row])
        return int((batch["segment_ids"] >= 0).sum())

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
        # The policy's own tokens will stand in the place of some responses: nothing of those is shared.
        shared = [0 if "policy_negative" in self.needs else common_beginning(row) for row in responses]
        sources = [
            [*range(len(prompt)), *[-1] * (packed_length(prompt, row, n) - len(prompt))]
            for prompt, row, n in zip(prompts, responses, shared, strict=True)
        ]
        return {
            **pack_rows(prompts, responses, processor.tokenizer.pad_token_id, shared),
            "packed": any(len(row) > 1 for row in responses),
            "rows": rows,
            "img_path": self.image_files(features),
            "img_input_dict": processor.pad_img_inputs(processor.follow_tokens(img_inputs, sources)),
        }


class VLRMDataCollatorWithPadding(VLDPODataCollatorWithPadding):
    """The same batch, because a reward model ranks the responses that DPO pairs; and `source`, the data set of every row."""

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        return super().__call__(features) | {"source": [row.get("source") for row in features]}


class VLPPODataCollator(VLDataCollator):
    """Prompts -> token ids and images. Responses do not exist yet: the trainer samples them and calls `pack`.

    The batch: rows (the dataset's rows), prompts (their token ids), img_path, img_input_dict (per-token entries still one list per
    prompt).
    """

    def __init__(self, processor: VLProcessor, limits: LengthLimits | None = None, share_prefix: bool = True) -> None:
        super().__init__(processor, limits)
        self.share_prefix = share_prefix

    def fit(self, row: Row, counts: LengthCounts, where: str) -> bool:
        return fit_row(len(self._encode([row])[0][0]), [], self.limits, counts, row.get("where") or where) is not None

    def length(self, row: Row) -> int:
        return len(self._encode([row])[0][0])

    def _encode(self, features: Sequence[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        texts = [
            self.processor.render(r["prompt"], add_generation_prompt=True, images=len(r["images"])) for r in features
        ]
        return self.processor.encode_prompts(texts, [r["images"] for r in features])

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        prompts, img_inputs = self._encode(features)
        return {
            "rows": list(features),
            "prompts": prompts,
            "img_input_dict": img_inputs,
            "img_path": self.image_files(features),
        }

    def per_token(self, img_inputs: dict[str, Any]) -> dict[str, list[Any]]:
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
    ) -> dict[str, Any]:
        """Lay out prompts with the token ids of their K responses as DPO's rows; `img_input_dict` holds per-token entries only.

        Without a shared prefix every response gets a row of its own, the first response of all prompts first.
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
            "packed": any(len(row) > 1 for row in responses),
            "img_input_dict": self.processor.pad_img_inputs(self.processor.follow_tokens(per_token, sources)),
        }
