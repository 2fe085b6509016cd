"""Server-sent events: the bytes of a stream, however they are cut, to the data of its events.

As in the HTML standard, section 9.2.6: lines end with LF, CR or CRLF, an empty line ends an event, its
`data` lines are joined. Comments and other fields say nothing here.
"""

import codecs
import io


class EventParser:
    """Takes a stream part by part; an event that is not ended stays inside."""

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._text = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._line, self._data = "", list[str]()

    def feed(self, part: bytes) -> list[str]:
        """The data of each event that ends in this part."""
        *lines, self._line = (self._line + self._text.decode(part)).split("\n")
        found = []
        for line in lines:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                found.append("\n".join(self._data))
                self._data = []
        return found
