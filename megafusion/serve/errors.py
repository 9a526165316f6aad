"""Refusals of requests, in OpenAI's shape of errors."""

from starlette.responses import JSONResponse

MAX_MESSAGE = 2000
"""Characters of a message, which may quote what was sent."""
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """A request that is not answered: status, message with the field and its limit, further headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}

    def body(self) -> dict:
        """The refusal as OpenAI's clients read it."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message[:MAX_MESSAGE] + "..." * (len(self.message) > MAX_MESSAGE)
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}

    def response(self) -> JSONResponse:
        """The refusal as an answer."""
        return JSONResponse(self.body(), self.status, self.headers)
