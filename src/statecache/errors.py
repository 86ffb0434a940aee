"""One family of errors. Each says which state, what came, what was expected and what to do, and changes nothing."""


class StateCacheError(Exception):
    """Anything that statecache refuses to do."""


class OptionError(StateCacheError, ValueError):
    """An option of a constructor or method makes no sense."""


class UnknownLayerError(StateCacheError, ValueError):
    """A configuration names a layer type that no table row describes."""


class LayerError(StateCacheError, IndexError):
    """No such layer, or the layer has no such state."""


class ConfigError(StateCacheError, ValueError):
    """A configuration that no cache can be made from, or that a model's tensors do not match."""


class ShapeError(StateCacheError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(StateCacheError, TypeError):
    """A tensor has the wrong dtype."""


class DeviceError(StateCacheError, ValueError):
    """A tensor is on the wrong device."""


class RowsError(StateCacheError, ValueError):
    """A batch has the wrong number of rows, or a row does not exist."""


class CapacityError(StateCacheError, ValueError):
    """More tokens than a fixed capacity holds."""


class SlackError(StateCacheError, ValueError):
    """The operation needs slots that `slack=` would have reserved."""


class RollbackError(StateCacheError, ValueError):
    """The tokens to forget reach below what the states still hold."""


class RaggedError(StateCacheError, ValueError):
    """Rows of different lengths where one length for all is needed."""


class RotaryError(StateCacheError, ValueError):
    """Rotary factors change with the length of a row, and a pass would mix keys of different ones."""


class FileError(StateCacheError, ValueError):
    """A file is damaged, of another format, or of another model."""


class UnverifiedWeights(FileError):
    """Nothing says that the weights which filled a file are those of the model that is to go on with it."""


class StepError(StateCacheError, RuntimeError):
    """A forward pass did not call the cache as a whole pass would: interrupted, or its states out of order."""


class MarkError(StateCacheError, ValueError):
    """A mark belongs to another cache."""


class StaleMarkError(MarkError):
    """Something written since the mark was taken overwrote what it stands for."""
