"""What the pages of a Parquet file say that they unpack to, which its reader reserves and the footer need not tell.

Source: apache/parquet-format at 2.11.0, README.md ("Data Pages") and src/main/thrift/parquet.thrift (PageHeader);
apache/thrift doc/specs/thrift-compact-protocol.md.
"""

from typing import Any

_BOOLEANS, _BYTE, _NUMBERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
_UNCOMPRESSED, _COMPRESSED = 2, 3  # fields of a page's header


def page_sizes(content: bytes, columns: list[Any]) -> list[int]:
    """Of each column of each group of rows the bytes that its pages unpack to.

    Args:
        columns: pyarrow's ColumnChunkMetaData.
    Raises:
        ValueError: there are more pages than the file has room for, or what is there is none.
    """
    found, count = [], 0
    for column in columns:
        # As the reader begins; of a column without values it reads no page.
        start = column.data_page_offset
        if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
            start = column.dictionary_page_offset
        end = min(len(content), start + column.total_compressed_size) if column.num_values else start
        place, unpacked = start, 0
        while place < end:
            header = _Header(content, place)
            unpacked += header.fields.get(_UNCOMPRESSED, 0)
            place, count = header.place + header.fields.get(_COMPRESSED, 0), count + 1
            if place < header.place or 8 * count > len(content):
                raise ValueError("its pages are more than there is room for")
        found.append(unpacked)
    return found


class _Header:
    """The numbers of a page's header, by field, and the place behind it."""

    def __init__(self, content: bytes, place: int) -> None:
        self.content, self.place = content, place
        self.fields: dict[int, int] = {}
        try:
            self._struct(self.fields, depth=0)
        except IndexError:
            raise ValueError("a page's header ends early") from None

    def _struct(self, fields: dict[int, int], depth: int) -> None:
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._number()
            if (kind := kind & 15) in _NUMBERS:
                fields[number] = self._number()
            else:
                self._skip(kind, depth)

    def _skip(self, kind: int, depth: int, is_item: bool = False) -> None:
        if depth > 8:
            raise ValueError("a page's header is nested too deeply")
        if kind in _BOOLEANS:
            self.place += is_item  # a field's value is its kind
        elif kind == _BYTE:
            self.place += 1
        elif kind in _NUMBERS:
            self._number()
        elif kind == _DOUBLE:
            self.place += 8
        elif kind == _BINARY:
            length = self._unsigned()
            self.place += length
        elif kind in _LISTS:
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._unsigned()):
                self._skip(head & 15, depth + 1, is_item=True)
        elif kind == _MAP:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._skip(kinds >> 4, depth + 1, is_item=True)
                self._skip(kinds & 15, depth + 1, is_item=True)
        elif kind == _STRUCT:
            self._struct({}, depth + 1)
        else:
            raise ValueError("a page's header is none")

    def _byte(self) -> int:
        self.place += 1
        return self.content[self.place - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of a page's header is too long")

    def _number(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
