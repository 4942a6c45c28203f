"""Which version of MQTT to speak: 5, and 3.1.1 where the broker makes clear that it knows no other.

A broker of 3.1.1 should refuse version 5 in so many words; then there is nothing to guess. Some close the connection, or
say nothing. But so does anything that stands in front of a broker that is not up yet, and nobody should lose version 5
for having started early. So silence proves nothing until 3.1.1 has been answered and 5, right after it, has not:

    speaking    what happens                          next
    5           refused as a version                  3.1.1
    5           no answer                             3.1.1, as a probe: accepted, it is closed again
    probe       accepted                              5 again, and this time no answer means 3.1.1
    probe       anything else                         5
    3.1.1       refused as a version                  5
"""

from __future__ import annotations

from typing import Literal

from midge.transport.failures import Failure, Kind

Version = Literal["5", "3.1.1"]


class Versions:
    """What was learnt of the broker so far.

    Attributes:
        current: the version to speak next.
        probing: whether the next connection is only to see whether it would be accepted.
    """

    def __init__(self) -> None:
        self.current: Version = "5"
        self.probing = False
        self._older_works = False
        self._num_refused = 0

    def learn(self, failure: Failure, *, accepted: bool) -> Failure:
        """Take in how a connection ended; what is returned says so to others.

        Args:
            failure: why it ended.
            accepted: whether the broker had taken it (a probe counts as not taken).
        """
        self._num_refused = self._num_refused + 1 if failure.kind is Kind.WRONG_VERSION else 0
        match self.current, failure.kind:
            case _ if accepted:
                self._older_works = False
            case "5", Kind.WRONG_VERSION:
                self._speak("3.1.1")
            case "3.1.1", Kind.WRONG_VERSION:
                self._speak("5")
            case "5", Kind.NO_ANSWER:
                self._speak("3.1.1", probing=not self._older_works)
            case "3.1.1", _ if self.probing:
                self._older_works = failure.kind is Kind.PROBED
                self._speak("5")
        if self._num_refused > 1:
            return Failure(Kind.FATAL, f"{failure.reason} (5 and 3.1.1 were tried)")
        return failure

    def _speak(self, version: Version, *, probing: bool = False) -> None:
        self.current = version
        self.probing = probing
