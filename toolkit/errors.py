"""The errors a user can cause or meet, each with the exit code of the command line.

0 ok · 1 bug · 2 usage (click's own) · 3 environment · 4 bad or untrusted input · 5 gate failed ·
130 interrupted. An error's text names the thing, the value, the rule and the way out.
"""

from __future__ import annotations


class GblmError(Exception):
    """Base of every error that is reported as one sentence instead of a traceback."""

    exit_code = 1


class UsageError(GblmError):
    """The arguments do not fit together, or name something that does not exist."""

    exit_code = 2


class MachineError(GblmError):
    """The machine lacks something: a package, a device, disk space, the network."""

    exit_code = 3


class InputError(GblmError):
    """A file or folder handed in is missing, broken, unsupported or not trusted."""

    exit_code = 4


class PatternError(InputError):
    """A pattern or value type does not exist or fit a weight, or a weight breaks its pattern."""


class CheckpointError(InputError):
    """A checkpoint folder, its manifest or one of its tensors is not what it must be."""


class GateError(GblmError):
    """A measured value missed the bound that was asked for."""

    exit_code = 5


# What taking apart JSON that is not as it must be raises; huge integers are no floats.
DAMAGE = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)
