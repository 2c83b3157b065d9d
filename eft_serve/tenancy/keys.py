"""API keys: how they are made, stored and compared; knows nothing of tenants.

A key is 32 random bytes, so a plain SHA-256 of it is safe to store: the slow, salted hashes of passwords exist because
people choose guessable ones, and nobody guesses 256 bits.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

KEY_PREFIX = "eft-"
HASH_PREFIX = "sha256:"


def generate_key() -> str:
    """A new key: `eft-` and 32 random bytes, URL-safe."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored of a key: `sha256:` and 64 hexadecimal digits."""
    return HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()


def same_hash(a: str, b: str) -> bool:
    """Whether two stored hashes are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(a.encode(), b.encode())
