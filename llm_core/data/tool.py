"""How the scripts of tools/ end: one line and an exit code, never a traceback for a known cause."""

from __future__ import annotations

from collections.abc import Callable

from llm_core.errors import EnvironmentFault, UserError
from llm_core.report.console import console
from llm_core.runtime import prepare_environment

_GOES_ON = "stopped; the same command goes on from the finished parts"


def run_tool(main: Callable[[], None], stopped: str | None = _GOES_ON) -> int:
    """Run `main`; returns the exit code: 0, 2 for a user's mistake, 1 for a fault of the machine, 130 for Ctrl-C.

    stopped: what is said at Ctrl-C, None = nothing.
    """
    prepare_environment()
    try:
        main()
    except UserError as error:
        console.error(str(error))
        return 2
    except EnvironmentFault as error:
        console.error(str(error))
        return 1
    except OSError as error:
        console.error(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        if stopped:
            console.error(stopped)
        return 130
    return 0
