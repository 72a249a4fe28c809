"""Makes `silkbus.pyz`, the cf CLI plugin: `python -m cli.plugin.build FILE`, or `make plugin`.

A zip file that Python runs: our client, and the libraries it needs, which are pure Python. Each module is there
compiled, for a quick start under the Python that built it, and as source, which any other takes. The same sources give
the same file.
"""

import importlib.metadata
import importlib.util
import marshal
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

SHEBANG = b"#!/usr/bin/env python3\n"
LIBRARIES = ("tenacity", "PyYAML")
LEAST_PYTHON = (3, 11)
MAIN = f"""import sys

if sys.version_info < {LEAST_PYTHON}:
    sys.exit("silkbus needs Python {".".join(map(str, LEAST_PYTHON))} or later; this is " + sys.version.split()[0])

from cli.plugin.main import main

sys.exit(main())
"""
_DATE = (1980, 1, 1, 0, 0, 0)


def build(target: Path) -> None:
    """Write the plugin to `target`, whole or not at all."""
    temporary = target.with_name(target.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(SHEBANG)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for name, content in sorted(_contents()):
                    _add(archive, name, content)
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _contents() -> Iterator[tuple[str, bytes]]:
    yield "__main__.py", MAIN.encode()
    package = Path(__file__).parent.parent
    for path in package.rglob("*.py"):
        yield from _module(f"cli/{path.relative_to(package).as_posix()}", path.read_bytes())
    version = importlib.metadata.version("silkbus")
    yield (
        f"silkbus-{version}.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: silkbus\nVersion: {version}\n".encode(),
    )
    for library in LIBRARIES:
        for file in importlib.metadata.files(library) or ():
            name, path = file.as_posix(), Path(str(file.locate()))
            if name.endswith(".py") and ".." not in file.parts:
                yield from _module(name, path.read_bytes())
            elif ".dist-info/" in name and (file.name == "METADATA" or "licenses" in file.parts or "LICENSE" in name):
                yield name, path.read_bytes()


def _module(name: str, source: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, source
    compiled = compile(source, name, "exec", dont_inherit=True, optimize=0)
    # PEP 552: by its source's hash, and never to be checked, since dates in a zip file mean nothing here.
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + importlib.util.source_hash(source)
    yield name + "c", head + marshal.dumps(compiled)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, _DATE)
    info.external_attr = 0o644 << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cli.plugin.build FILE")
    build(Path(sys.argv[1]))
