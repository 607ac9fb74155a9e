"""What a user can put right."""


class UserError(ValueError):
    """Wrong input; the message is one line that says what was expected and what came. Commands exit with code 2."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first words, or else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
