"""Where the page may be reached, and with which token."""

from __future__ import annotations

import ipaddress
import re

from tracin.errors import OptionError

__all__ = ["is_loopback", "require_token"]

SHORTEST_TOKEN = 16
"""Characters of a token."""

_TOKEN = re.compile(r"[A-Za-z0-9._~-]+", re.ASCII)
"""What stands in an address as it is."""


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone.

    Args:
        host: A name or an address.

    Returns:
        Whether it is.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_token(host: str, token: str | None) -> str | None:
    """The token, if host and token go together.

    Args:
        host: Where to listen.
        token: What visitors must show.

    Returns:
        The token.

    Raises:
        OptionError: Another host than the loopback without a token, or a token that is easily guessed.
    """
    if token is None:
        if not is_loopback(host):
            raise OptionError(
                f"--host {host} can be reached from other machines: give --token too, or TRACIN_TOKEN in the environment, "
                f"with {SHORTEST_TOKEN} characters or more."
            )
        return None
    if len(token) < SHORTEST_TOKEN or not _TOKEN.fullmatch(token):
        raise OptionError(
            f"the token has to be {SHORTEST_TOKEN} or more of A to Z, a to z, 0 to 9 and - . _ ~, which stand in an address as "
            "they are, such as python -c 'import secrets; print(secrets.token_urlsafe())' prints."
        )
    return token
