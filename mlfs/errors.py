"""The one error class of the package."""


class MLFSError(Exception):
    """Something the caller can put right: a bad argument, a bad file, a sub-transformer outside the space.

    The message is one line: what was wrong, what was expected, what to do. The command line prints it without a
    traceback; anything else that escapes is a defect of the package.
    """
