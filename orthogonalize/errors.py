"""The one exception that a user is meant to see."""


class OrthogonalizeError(Exception):
    """Something the user can mend: one line that names the thing and the way out.

    The command line prints it without a traceback and exits with status 1. Anything else that
    escapes is a defect of this package.
    """
