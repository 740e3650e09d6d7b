"""Data sets: every format becomes checked rows of one kind. `load_train_eval` is what the scripts call."""
