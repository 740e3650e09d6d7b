"""The one exception for wrong input: its message is a sentence that names the file, the row and the fix."""


class InputError(ValueError):
    """Wrong input from the user. `args.run` prints it as one sentence and exits with status 2, without a traceback."""
