"""The two ways in which a command fails, and the exit status of each."""


class InputError(ValueError):
    """Bad input: one clear line that names the file, the key or row, and the remedy. The command line exits with 2."""


class NotebookError(RuntimeError):
    """A notebook failed for a reason other than bad input. The command line exits with 1."""
