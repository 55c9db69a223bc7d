"""The keys of one attempt's channel: made by whoever starts the workers, read by the workers.

Hosts of one run make the same keys of one secret that all have (`Keys.of`).

Two CURVE key pairs (http://curvezmq.org): the donor's and the receiver's. Each end proves that it
has its own secret, and knows the other's public key, so that both are authenticated. They lie in
files of mode 0600 in a folder of mode 0700: what guards them is the file system.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.utils.z85

from shoal.errors import ChannelError

_FILES = ("donor.key", "receiver.key")
_KEY_CHARACTERS = 40


@dataclass(frozen=True)
class Pair:
    """A public key and its secret, in Z85 (40 printable characters each)."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Pair({self.public.decode()}, secret)"


@dataclass(frozen=True)
class Keys:
    """Both pairs. A donor uses `donor.secret`, a receiver `receiver.secret`."""

    donor: Pair
    receiver: Pair

    @classmethod
    def make(cls, folder: Path) -> Keys:
        """New keys, written to `folder`, which is made. Raises OSError; FileExistsError for a
        folder that holds keys already (every attempt has its own)."""
        made = cls(*(Pair(*zmq.curve_keypair()) for _ in _FILES))
        made.write(folder)
        return made

    @classmethod
    def of(cls, secret: bytes) -> Keys:
        """The keys that everybody makes of one secret, of 32 random bytes at least."""
        assert len(secret) >= 32, "a secret that nobody guesses"
        pairs = []
        for name in _FILES:
            own = hashlib.blake2b(secret, digest_size=32, person=name.encode()).digest()
            text = zmq.utils.z85.encode(own)
            pairs.append(Pair(zmq.curve_public(text), text))
        return cls(*pairs)

    def write(self, folder: Path) -> None:
        """Into `folder`, which is made. Raises as `make`."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        for name, pair in zip(_FILES, (self.donor, self.receiver)):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            handle = os.open(folder / name, flags, mode=0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(pair.public + b"\n" + pair.secret + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Keys:
        """The keys in `folder`. Raises ChannelError when others could have read or set them."""
        _check_private(folder, folder.lstat(), directory=True)
        return cls(*(_read(folder / name) for name in _FILES))


def _read(path: Path) -> Pair:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise ChannelError(f"{path}: cannot be read: {error.strerror}") from None
    with os.fdopen(handle, "rb") as file:
        _check_private(path, os.fstat(handle), directory=False)
        lines = file.read(4 * _KEY_CHARACTERS).splitlines()
    if [len(line) for line in lines] != [_KEY_CHARACTERS] * 2:
        raise ChannelError(f"{path}: expected two lines of {_KEY_CHARACTERS} characters")
    return Pair(*lines)


def _check_private(path: Path, status: os.stat_result, *, directory: bool) -> None:
    right = stat.S_ISDIR(status.st_mode) if directory else stat.S_ISREG(status.st_mode)
    if not right or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        wanted = "a folder of mode 0700" if directory else "a file of mode 0600"
        raise ChannelError(
            f"{path}: expected {wanted} that belongs to this user, found mode "
            f"{stat.S_IMODE(status.st_mode):04o} of user {status.st_uid}; start the workers again "
            "to get new keys"
        )
