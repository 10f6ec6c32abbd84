"""The converter's exceptions: each message says what is wrong, where, and what to do next."""


class ConvertError(Exception):
    """Base of everything the converter raises on purpose; its text is one line for the user."""


class CheckpointError(ConvertError):
    """The input is not a usable checkpoint: missing, damaged, pickled, or not in Hugging Face format."""


class HubError(CheckpointError):
    """A model id could not be fetched from the hub."""


class UnsupportedModelError(ConvertError):
    """The architecture, the quantization of the checkpoint or its custom code is not supported."""


class TokenizerError(ConvertError):
    """The tokenizer is missing, damaged, or its pre-tokenizer is not known."""


class QuantizeError(ConvertError):
    """A tensor cannot be quantized as asked: non-finite values, or an importance matrix is needed."""


class CalibrationError(ConvertError):
    """The calibration text will not do, the model gives no numbers on it, or an unfinished one is of other inputs."""


class ImatrixError(ConvertError):
    """The importance matrix file cannot be read or does not fit the model."""


class OutputError(ConvertError):
    """The output cannot be written: exists already, no permission, no space."""


class LibraryError(ConvertError):
    """The installed llama-cpp-python is not the patched one."""


class PruneError(ConvertError):
    """Blocks cannot be removed as asked: the wrong ones, too many, or from a model that would not stand it."""
