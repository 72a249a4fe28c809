"""Is this machine's clock right? Leases, caches and tokens go by clocks, and logs are compared by them."""

import ctypes
import email.utils
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from services.doctor.finding import Finding, fine, unknown, warning, wrong
from services.doctor.settings import DoctorSettings

CHECK = "clock"
TIMEOUT = 5.0
TOLERATED = 2.0
"""Seconds: a Date has a resolution of one, and it takes time to come."""
TIME_ERROR = 5
"""What adjtimex(2) answers while nobody keeps the clock right."""
REMEDY = "see that chrony, ntpd or systemd-timesyncd runs and reaches a server"


class _Timex(ctypes.Structure):
    """struct timex; with `modes` 0 it is only read. What follows the first field is not looked at."""

    _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_char * 256))


def look(settings: DoctorSettings) -> Iterator[Finding]:
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(_Timex(0))) == TIME_ERROR:
        yield warning(CHECK, "nobody keeps this machine's clock right, the kernel says", REMEDY)
    else:
        yield fine(CHECK, "is kept right, the kernel says")
    if not settings.api:
        yield unknown(CHECK, "compared with nobody's", "set api to the policy server's URL, to compare with its clock")
        return
    try:
        date, ours = _date(settings.api)
    except (OSError, ValueError) as error:
        yield unknown(CHECK, f"the policy server at {settings.api} does not say its time: {error}", "correct api")
        return
    yield from judge(ours - date)


def judge(ahead: float) -> Iterator[Finding]:
    """What is to be said of a clock that is so many seconds ahead of the policy server's."""
    text = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the policy server's"
    yield wrong(CHECK, text, REMEDY) if abs(ahead) > TOLERATED else fine(CHECK, text)


def _date(api: str) -> tuple[float, float]:
    """The server's time and ours, in Unix seconds, as of the middle of a request. Raises OSError or ValueError."""
    if not api.startswith(("http://", "https://")):
        raise ValueError("api must be an http:// or https:// URL")
    before = time.time()
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/livez", timeout=TIMEOUT) as answer:  # noqa: S310 (see above)
            text = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        text = error.headers.get("Date")
    middle = (before + time.time()) / 2
    if text is None:
        raise ValueError("its answer has no Date")
    # A Date is cut off to its second: half of one later is what it is on average.
    return email.utils.parsedate_to_datetime(text).timestamp() + 0.5, middle
