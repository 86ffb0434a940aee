"""How a command says that it cannot go on."""


class CommandError(Exception):
    """One line that says what came and what to do. `code` is the exit status: 2 where the call itself is wrong."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
