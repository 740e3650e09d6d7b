"""What every model family inherits: model mixin, processor, packed rows, collators and trainers."""

import common.compat  # noqa: F401  isort: skip  (must come before transformers)
