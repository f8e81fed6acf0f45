"""Which handler carries out which mnemonic."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.arch.x86.fallback.execution import Execution

Handler = Callable[[Execution], None]
HANDLERS: dict[str, Handler] = {}
"""Handler by iced's mnemonic in lower case. Filled when the instruction families are imported."""


def handles(*mnemonics: str) -> Callable[[Handler], Handler]:
    """Declare the function to be the handler of ``mnemonics``."""

    def register(handler: Handler) -> Handler:
        for mnemonic in mnemonics:
            if mnemonic in HANDLERS:
                raise ValueError(f"two handlers for {mnemonic}")
            HANDLERS[mnemonic] = handler
        return handler

    return register
