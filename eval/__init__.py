"""Evaluation: `eval.generate` writes answers, one scorer per group of benchmarks turns them into the official number.

    python -m eval.generate --task pope --model M --data F --output answers.jsonl      model  -> answers.jsonl
    python -m eval.yesno    --task pope --data F --answers answers.jsonl               answers -> results.json
    python -m eval.report   runs/a runs/b --output report                              results -> tables, charts, page

Scorers never load a model. docs/evaluation.md has every command, and where our numbers differ from other harnesses.
"""

import common.compat  # noqa: F401  (must come before transformers)
