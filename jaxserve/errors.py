"""The exceptions of jaxserve. A leaf: every package but pallas_kernels may import it.

* JaxserveError
  + ConfigError            an option is unknown, or its value cannot work
    x DoesNotFitError      the devices have too little memory
  x ModelLoadError         a model's files are missing, malformed or of an unknown architecture
  x WeightsError           weights that should replace the model's are not of its form
  + RequestError           one request cannot be served; the engine goes on
    x InvalidRequestError  a field is out of range or not supported
    x PromptTooLongError   the prompt does not fit the model or the KV pool
    x QueueFullError       too many requests wait already; try again later
  x EngineDeadError        the engine has stopped; no request can be served

Every text says what was wanted, what came and what to do.
"""


class JaxserveError(Exception):
    """Base of every error that jaxserve raises on purpose."""


class ConfigError(JaxserveError):
    """An option is unknown, or its value cannot work."""


class DoesNotFitError(ConfigError):
    """The devices' memory does not hold the model with these options."""


class ModelLoadError(JaxserveError):
    """A model's files are missing, malformed, or of an architecture that is not supported."""


class WeightsError(JaxserveError):
    """Weights that should replace the model's are not of its form; those in use are unaffected."""


class RequestError(JaxserveError):
    """One request cannot be served; the others and the engine are unaffected.

    Attributes:
        param: the request field at fault, for the OpenAI error body.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequestError(RequestError):
    """A field of the request is out of range, malformed or not supported."""


class PromptTooLongError(RequestError):
    """The prompt (with the tokens asked for) does not fit the model or the KV pool."""


class QueueFullError(RequestError):
    """The waiting queue is full; the client should retry later."""


class EngineDeadError(JaxserveError):
    """The engine has stopped, and no request can be served any more."""
