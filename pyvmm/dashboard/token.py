"""The word that a browser has to know before it may start a failover."""

from __future__ import annotations

import hmac
import os
import secrets
import stat

from pyvmm.errors import ConfigError

SHORTEST, LONGEST = 16, 256


def new_token() -> str:
    """One that nobody guesses."""
    return secrets.token_urlsafe(24)


def read_token(path: str) -> str:
    """What is in the file ``path``, without white space around it; ConfigError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dashboard-token {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"--dashboard-token {path}: has to be a file")
        words = os.read(fd, 4 * LONGEST).strip()
        if os.read(fd, 1):
            words = b""
    except OSError as error:
        raise ConfigError(f"--dashboard-token {path}: {error.strerror}") from None
    finally:
        os.close(fd)
    if not SHORTEST <= len(words) <= LONGEST or not all(0x20 < byte < 0x7F for byte in words):
        raise ConfigError(
            f"--dashboard-token {path}: has to hold {SHORTEST} to {LONGEST} letters, digits and signs, in one word"
        )
    return words.decode("ascii")


def same_token(given: bytes, token: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given, token.encode("ascii"))
