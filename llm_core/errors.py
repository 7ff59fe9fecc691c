"""The two ways a command may fail without a traceback."""


class UserError(Exception):
    """Something the user can mend: the message names the file, the value and the way out. Exit code 2."""


class EnvironmentFault(Exception):
    """Something the machine refused (disk full, no permission, a lost device). Exit code 1."""
