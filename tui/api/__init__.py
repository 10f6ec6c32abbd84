"""Models behind HTTP, in OpenAI's form: this project's server and any other."""

from ziggurat.tui.api.address import Address
from ziggurat.tui.api.client import HttpBackend

__all__ = ["Address", "HttpBackend"]
