"""The reference's log-probs of whole data sets, before the first training step: `--precompute_ref_log_probs`.

rows -> their keys -> those that base/reference_cache.py lacks -> every rank asks the reference about its share -> cache -> column of the data set
"""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, List, Value
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from args import DPOConfig
from base.collator import VLDPODataCollatorWithPadding
from base.images import IMAGE_STATES, image_states
from base.processor import VLProcessor
from base.reference_cache import COLUMN, ReferenceCache, processor_digest, row_key, weights_digest
from common.threads import map_in_threads

logger = logging.getLogger(__name__)


def about_reference(
    reference: nn.Module,
    config: PreTrainedConfig,
    processor: VLProcessor,
    collator: VLDPODataCollatorWithPadding,
    *,
    is_policy: bool,
    precision: str,
    second_image: bool,
) -> dict[str, Any]:
    """Everything that changes the log-probs of every row: what the cache's key covers.

    Args:
        reference: without wrappers; `config` is that of the family's model in it.
        is_policy: see `weights_digest`.
        precision: in which the model computes, accelerate's name, and by whom.
        second_image: whether the reference also reads the chosen answer on the row's second image (`image_rejected`).
    """
    about = {
        "weights": weights_digest(reference, is_policy),
        "config": {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")},
        "processor": processor_digest(processor),
        "limits": dataclasses.asdict(collator.limits),
        "precision": precision,
        "share_prefix": collator.share_prefix,
        "losses": ["image_rejected"] if second_image else [],
        "pairs": [collator.pairs, collator.score_margin] if second_image else None,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }
    if is_deepspeed_zero3_enabled():  # every rank holds a part of the weights
        about["weights"] = gather_object([about["weights"]])
    return about


@contextmanager
def weights_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute with parameters of this type, as DeepSpeed will once it has started; then they are what they were.

    Buffers keep theirs, as in DeepSpeed 0.19 (`_cast_module_mixed_precision`): with frequencies of the rotary embedding in bf16 the reference
    would be another model than the policy.
    """
    tensors = [p for p in model.parameters() if p.is_floating_point()]
    kept = [t.data for t in tensors]
    for t in tensors:
        t.data = t.data.to(dtype)
    try:
        yield
    finally:
        for t, data in zip(tensors, kept, strict=True):
            t.data = data


class ReferencePass:
    """Gives data sets the column `reference_logps`, from disk where it is there."""

    def __init__(
        self,
        args: DPOConfig,
        cache: ReferenceCache,
        collator: VLDPODataCollatorWithPadding,
        reference_logps: Callable[[dict[str, Any]], Tensor],
        columns: Sequence[str],
    ) -> None:
        """
        Args:
            reference_logps: batch of the collator, on the CPU -> the reference's log-probs of all response tokens, (R, T).
            columns: what the reference is asked about beyond prompt, responses and images.
        """
        self.args = args
        self.cache = cache
        self.collator = collator
        self.reference_logps = reference_logps
        self.columns = columns
        self.quiet = args.disable_tqdm or args.process_index > 0

    def add_to(self, dataset: Dataset, name: str) -> Dataset:
        """The data set with the column. Every rank must call it.

        Args:
            name: of the data set, for the log.
        """
        rank, world = self.args.process_index, self.args.world_size
        states = [image_states(row) for row in dataset]
        keys = self._row_keys(dataset)
        known = set().union(*gather_object([self.cache.keys()]))  # one answer for all ranks, before any of them writes
        todo = list({key: i for i, key in enumerate(keys) if key not in known}.values())
        logger.info(
            "Reference log-probs of %s: %d of %d rows are in %s",
            name,
            len(keys) - len(todo),
            len(keys),
            self.cache.folder,
        )
        # Every rank gets equally many rows: under ZeRO-3 all of them must run every batch.
        mine = [todo[i % len(todo)] for i in range(rank, -(-len(todo) // world) * world, world)]
        self._compute(dataset.select(mine), [keys[i] for i in mine], len(todo))
        self.args.distributed_state.wait_for_everyone()
        values = self.cache.read(keys)
        dataset = dataset.add_column(COLUMN, [values[key] for key in keys], feature=List(Value("float32")))
        return dataset.add_column(IMAGE_STATES, states, feature=List(List(Value("int64"))))

    def _row_keys(self, dataset: Dataset) -> list[str]:
        """`row_key` of every row; each rank reads the images of its share."""
        rank, world = self.args.process_index, self.args.world_size
        mine = map_in_threads(
            lambda i: row_key(dataset[i], self.columns, self.collator.processor), range(rank, len(dataset), world)
        )
        shares = gather_object([list(tqdm(mine, "Reading rows", len(dataset) // world, disable=self.quiet))])
        keys = [""] * len(dataset)
        for start, share in enumerate(shares):
            keys[start::world] = share
        return keys

    def _compute(self, dataset: Dataset, keys: list[str], total: int) -> None:
        """Write the reference's log-probs of these rows, this rank's share of `total`."""
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        loader = DataLoader(
            dataset,
            size,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        for step, batch in enumerate(tqdm(loader, f"Reference log-probs of {total} rows", disable=self.quiet)):
            logps = self.reference_logps(batch).cpu()
            rows = keys[step * size : (step + 1) * size]
            row_of = batch["rows"] % len(rows)  # further rows of the batch repeat its first rows in order
            for b, key in enumerate(rows):
                self.cache.add(key, logps[batch["completion_mask"] & (row_of == b)[:, None]])
        self.cache.flush()
