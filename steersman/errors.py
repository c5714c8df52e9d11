"""The one exception a user of Steersman needs to know."""

__all__ = ["LostRankError", "PreemptedError", "SteersmanError", "UnfinishedError", "near_names"]


_LONGEST = 2000


class SteersmanError(ValueError):
    """A mistake in what the user asked for or in a file they named.

    The message is one line that says what was wrong, where, and what would fix it. The command line prints it and
    exits with code 2. Of what a file holds a message quotes so much that it can be read.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} ... {text[-300:]}")


class UnfinishedError(SteersmanError):
    """Work that stopped before its end through no mistake of the user, and that the same command resumes.

    The command line exits with code 75 (EX_TEMPFAIL), on which a scheduler can put the job back in its queue.
    """


class LostRankError(UnfinishedError):
    """Another process of the job is gone or does not answer."""


class PreemptedError(UnfinishedError):
    """The system asked this process to end; what was done is saved."""


def near_names(name: str, known: list[str], limit: int = 5) -> str:
    """The known names most like `name`, as text for an error message.

    >>> near_names("blocks.3.hook_resid_pst", ["blocks.3.hook_resid_post", "blocks.3.hook_mlp_out", "embed"], 1)
    'blocks.3.hook_resid_post'
    """
    import difflib

    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.0)
    return ", ".join(close)
