"""What a user can put right."""


class UserError(ValueError):
    """Wrong input; the message is one line that says what was expected and what came. Commands exit with code 2."""
