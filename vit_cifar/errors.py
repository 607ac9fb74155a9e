"""What a user can put right."""


class UserError(ValueError):
    """Wrong input; the message is one line that says what was expected and what came. Commands exit with code 2."""


def one_line(error: BaseException) -> str:
    """All that an error says, with its line breaks as spaces."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of a library's error that is not empty, or else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
