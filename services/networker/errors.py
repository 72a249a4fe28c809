"""How attaching and removing can fail, in terms that any front door can tell its runtime."""


class Unavailable(Exception):
    """A part of the cell does not answer or is not ready. Trying the same again later may succeed."""


class Failed(Exception):
    """A part of the cell refused, or answered what cannot be understood. Trying again will not help by itself."""


class Rejected(Failed):
    """What the caller wishes for its container (address, MAC, limits) cannot be given: it must ask otherwise."""


class Conflict(Exception):
    """What is asked contradicts what is: the namespace is none, or the handle is attached in another way."""


class NotAttached(Exception):
    """There is no attachment of this handle, or it is not what it was answered to be."""
