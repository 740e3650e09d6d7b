"""What every model family inherits: model mixin, processor, packed rows, collators and trainers."""

import base.compat  # noqa: F401  must come before transformers
