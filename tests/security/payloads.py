"""What a hostile file is made of: pickles that call functions, archives that lie, pictures that are all promise."""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path


def call(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls what `name` is in `module`; of a name with dots, what it reaches."""

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()

    values = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + values + b"tR."


def gadgets(marker: Path) -> dict[str, bytes]:
    """Pickles that each make the file `marker` when Python reads them."""
    touch, program = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    script = marker.with_name("planted.py")
    script.write_text(program)
    return {
        "posix.system": call("posix", "system", touch),
        "os.mkdir": call("os", "mkdir", str(marker)),
        "eval": call("builtins", "eval", program),
        "exec": call("builtins", "exec", program),
        "subprocess": call("subprocess", "call", ["touch", str(marker)]),
        "a planted file": call("runpy", "run_path", str(script)),
        "a pickle in a pickle": call("_pickle", "loads", call("posix", "system", touch)),
        "through torch's serialization": call("torch.serialization", "os.system", touch),
        "through torch": call("torch", "serialization.os.system", touch),
        "through a path": call("pathlib", "os.system", touch),
        "a method of what is allowed": call("pathlib", "Path.touch", *()).replace(
            b"\x93(", b"\x93(" + call("pathlib", "PosixPath", str(marker))[2:-1]
        ),
        "an instance of old": f"(S{touch!r}\niposix\nsystem\n.".encode(),
        "an object of old": b"(cposix\nsystem\n" + f"S{touch!r}\no.".encode(),
        "a name of Python 2": f"c__builtin__\neval\n(S{program!r}\ntR.".encode(),
    }


# Read by Python's reader in C, six bytes take 64 GB; and the others what their numbers say.
HUNGRY = {
    "a place in a table": b"\x80\x02Nr\xff\xff\xff\xff0N.",
    "room for bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "zeros": call("builtins", "bytearray", 1 << 40),
    "bytes that do not follow": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "a frame that does not follow": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "a storage": call("torch.storage", "UntypedStorage", 1 << 40),
}


def torch_archive(pickled: bytes, *, deflated: bytes | None = None) -> bytes:
    """What torch.save writes, with any pickle in it; and a compressed storage 0."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        if deflated is not None:
            archive.writestr("archive/data/0", deflated, zipfile.ZIP_DEFLATED)
        archive.writestr("archive/version", "3\n")
    return content.getvalue()


def legacy_file(pickled: bytes) -> bytes:
    """What torch.save wrote before 1.6."""
    heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(head, 2) for head in heads) + pickled + pickle.dumps([], 2)


def storage(count: int, dtype: str = "FloatStorage") -> bytes:
    """Opcodes that leave storage 0 on the stack, which says that it has `count` numbers."""
    place = pickle.dumps(("storage", None, "0", "cpu", count), 2)[2:-1].replace(b"N", f"ctorch\n{dtype}\n".encode(), 1)
    return place + b"Q"


def tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of a state dict with one tensor."""
    values = b"".join(pickle.dumps(value, 2)[2:-1] for value in (0, size, stride, False))
    arguments = storage(count) + values + b"ccollections\nOrderedDict\n)R"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def member(name: str, content: bytes = b"", **changes: object) -> bytes:
    """A file in a tar archive; `changes` to its header, whose size need not be that of its content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    header = info.tobuf(tarfile.GNU_FORMAT)
    return header + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def png(width: int, height: int, colour: int = 6, *, chunks: bytes = b"", rows: int | None = None) -> bytes:
    """A picture of zeros: colour type 6 is RGBA, 2 RGB; fewer `rows` than it promises."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    packer = zlib.compressobj(1)
    row = bytes(1 + width * channels)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(tags: dict[int, int], data: bytes = b"x") -> bytes:
    """A picture of these tags, each a number; the value -1 stands for the place of `data`."""
    place = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, place if value < 0 else value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def zeros(size: int, packer: Callable[[], "zlib._Compress"]) -> bytes:
    """So many zeros, compressed a megabyte at a time."""
    compress = packer()
    block = bytes(1 << 20)
    return b"".join(compress.compress(block) for _ in range(size >> 20)) + compress.flush()


def zip_bomb(name: str, size: int, *others: tuple[str, bytes]) -> bytes:
    """An archive of a file of `size` spaces; and others as they are."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, data in others:
            archive.writestr(other, data)
        with archive.open(name, "w") as file:
            for _ in range(size >> 20):
                file.write(b" " * (1 << 20))
    return content.getvalue()
