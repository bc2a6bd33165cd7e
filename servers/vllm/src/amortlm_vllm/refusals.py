"""Answers that are errors."""


class RefusalError(Exception):
    """An answer that is an error: 400, what cannot be done; 410, the server does not have what the request names."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
