"""The errors that fxopt raises. Each says what was wrong and what to do next; causes are chained.

FxoptError
├── InputError             inputs, options or files given by the caller do not fit
├── CaptureError           no frontend could turn the model into a program
├── PipelineError          passes in an order, or on a program, that they do not allow
├── PassError              a pass failed, at a node
├── VerificationError      a check failed after a pass
├── RegistryError          a name that is not registered, or registered twice, or a spec that does not parse
├── ArtifactError          a saved folder is incomplete, altered or foreign
└── BackendError           lowering or running failed
    └── BackendUnavailable the backend's package or device is missing
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none: what fits into another message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class FxoptError(Exception):
    """Base of all errors raised by fxopt on purpose."""


class InputError(FxoptError, ValueError):
    """What the caller passed (inputs, options, files) does not fit."""


class CaptureError(FxoptError):
    """No frontend could turn the model into a program."""


class PipelineError(FxoptError):
    """Passes in an order, or on a program, that their contracts do not allow."""


class PassError(FxoptError):
    """A pass failed.

    Attributes:
        pass_name: registry name of the pass.
        node: name of the node it was working on, or None.
    """

    def __init__(self, message: str, *, pass_name: str, node: str | None = None) -> None:
        where = pass_name if node is None else f"{pass_name} at {node}"
        super().__init__(f"{where}: {message}")
        self.pass_name = pass_name
        self.node = node


class VerificationError(FxoptError):
    """A check failed after a pass.

    Attributes:
        pass_name: registry name of the pass.
        rewrite: description of the offending rewrite, or None if it could not be narrowed down.
        check: which check failed, and by how much.
        excerpt: the neighbourhood of the node in the program's text.
    """

    def __init__(self, *, pass_name: str, check: str, rewrite: str | None = None, excerpt: str = "") -> None:
        parts = [f"{pass_name}: {check}"]
        if rewrite is not None:
            parts.append(f"in the rewrite {rewrite}")
        message = " ".join(parts)
        super().__init__(f"{message}\n{excerpt}" if excerpt else message)
        self.pass_name = pass_name
        self.rewrite = rewrite
        self.check = check
        self.excerpt = excerpt


class RegistryError(FxoptError):
    """An unknown or ambiguous name, or a spec string that does not parse."""


class ArtifactError(FxoptError):
    """A saved folder is incomplete, altered, or not written by fxopt."""


class BackendError(FxoptError):
    """Lowering a program or running an engine failed."""


class BackendUnavailable(BackendError):
    """The backend needs a package or a device that is not here."""
