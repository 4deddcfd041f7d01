"""The bearer token, if one is asked for.

Stage: serving. In: DTI_RAY_SERVE_TOKEN, or the file that `serve.token_file` names. Out: bytes to compare with.
Invariant: a token is in no configuration, log or message, and a wrong one takes as long to compare as the right one.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from pathlib import Path

from dti_ray.config import ServeConfig
from dti_ray.errors import ConfigError, Fault

VARIABLE = "DTI_RAY_SERVE_TOKEN"
SHORTEST = 8  # characters


def read_token(limits: ServeConfig) -> bytes | None:
    """Return the token; None where nobody is asked for one.

    Raises:
        ConfigError: it is given twice, is empty or short, or its file cannot be read.
    """
    given = os.environ.get(VARIABLE)
    if limits.token_file is None:
        return None if given is None else _checked(given, VARIABLE)
    if given is not None:
        raise ConfigError(Fault("serve.token_file", f"is given beside {VARIABLE}", "one of them"))
    try:
        return _checked(Path(limits.token_file).read_text(encoding="utf-8"), limits.token_file)
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{limits.token_file} cannot be read ({type(error).__name__})"
        raise ConfigError(Fault("serve.token_file", problem, "a text file with the token")) from None


def is_open(limits: ServeConfig) -> bool:
    """Say whether other machines may ask without a token; a name other than localhost counts as such an address."""
    try:
        is_own = ipaddress.ip_address(limits.host).is_loopback
    except ValueError:
        is_own = limits.host == "localhost"
    return not is_own and read_token(limits) is None


def is_right(token: bytes, given: str) -> bool:
    """Compare in constant time."""
    return secrets.compare_digest(given.encode(), token)


def _checked(text: str, where: str) -> bytes:
    token = text.strip()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        expected = f"at least {SHORTEST} printable ASCII characters without a space"
        raise ConfigError(Fault(where, f"holds a token of {len(token)} characters that cannot be used", expected))
    return token.encode()
