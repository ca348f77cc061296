"""The one error class of the package."""


class MLFSError(Exception):
    """Reports something that the caller can put right: a bad argument, a bad file, a subnet outside the space.

    The message is one line: what was wrong, what was expected, what to do. The command line prints it without a
    traceback; any other exception that reaches the user is a defect of the package.
    """
